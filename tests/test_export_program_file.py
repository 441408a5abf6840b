"""Programs of `torch.export`: what loads as it was, and what could run code and is refused."""

import json
import pickle
import zipfile

import pytest
import torch
from torch import nn

from speechkd.export.program_file import load_program


class EverySecond(nn.Module):
    """A linear map of every second row, so that sizes are expressions."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, rows):
        return self.linear(rows[:, 1::2])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path, auto = tmp_path_factory.mktemp("program") / "model.pt2", torch.export.Dim.AUTO
    torch.manual_seed(0)
    program = torch.export.export(EverySecond(), (torch.zeros(2, 9, 3),), dynamic_shapes=({0: auto, 1: auto},))
    program.example_inputs = None
    torch.export.save(program, path)
    return path


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def forge(source, target, changes):
    """A copy of a `.pt2` file with other contents under some names; a function makes the new one of the old."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        contents = {name: old.read(name) for name in old.namelist()}
        for name, change in changes.items():
            contents[name] = change(contents.get(name, b"").decode("latin-1")).encode("latin-1")
        for name, content in contents.items():
            new.writestr(name, content)


def test_a_program_loads_as_it_was_also_out_of_a_rewritten_archive(source, tmp_path):
    forge(source, tmp_path / "model.pt2", {})
    rows = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    expected = EverySecond()(rows)
    for path in (source, tmp_path / "model.pt2"):
        torch.testing.assert_close(load_program(path).module()(rows), expected)
    assert "FloorDiv(" in zipfile.ZipFile(source).read("model/models/model.json").decode()


def test_programs_that_would_run_code_are_refused(source, tmp_path):
    forged, trace = tmp_path / "model.pt2", tmp_path / "ran"
    trap = pickle.dumps(Trap(trace)).decode("latin-1")
    code = f"Max(1, exec(open({str(trace)!r}, 'w')))"
    weights, model = "model/data/weights/model_weights_config.json", "model/models/model.json"
    name = json.loads(zipfile.ZipFile(source).read(model))["graph_module"]["graph"]["inputs"][0]["as_tensor"]["name"]

    def with_expression(text):
        program = json.loads(text)
        program["graph_module"]["graph"]["sym_int_values"]["trap"] = {"as_expr": {"expr_str": code, "hint": None}}
        return json.dumps(program)

    for changes, message in (
        ({"model/data/constants/opaque_obj_0": lambda _: trap}, "it holds 'model/data/constants/opaque_obj_0', which"),
        ({"model/data/aotinductor/model/run.so": lambda _: ""}, "it holds 'model/data/aotinductor/model/run.so'"),
        (
            {
                weights: lambda text: text.replace('"use_pickle": false', '"use_pickle": true', 1),
                "model/data/weights/weight_0": lambda _: trap,
            },
            "it holds a pickle",
        ),
        ({model: with_expression}, "which is no arithmetic"),
        ({model: lambda text: text.replace("builtins.dict", "collections.deque")}, "takes or gives a collections"),
        ({model: lambda text: text.replace('arg_names": ["rows"]', 'arg_names": ["x=1"]')}, "holds 'x=1' in place"),
        ({model: lambda text: text.replace(f'"name": "{name}"', '"name": "x=exit()"')}, r"holds 'x=exit\(\)' in place"),
    ):
        forge(source, forged, changes)
        with pytest.raises(ValueError, match=f"torch .* cannot load .*{message}.*export the encoder anew"):
            load_program(forged)
    assert not trace.exists()
    forged.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="cannot load .*zip"):
        load_program(forged)
    with pytest.raises(ValueError, match="missing.pt2 does not exist; export the encoder anew"):
        load_program(tmp_path / "missing.pt2")
