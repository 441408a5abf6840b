"""Reading `.pt2` files of `torch.export` that somebody else may have written."""

import ast
import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

# what torch.export.save writes of a program whose weights and constants are tensors; torch's loader would unpickle
# objects (opaque_obj_*), link compiled libraries (data/aotinductor) and go back to older layouts
ENTRY = re.compile(
    r"[^/]+/(data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|data/sample_inputs/model\.pt|models/model\.json"
    r"|archive_format|archive_version|byteorder|\.data/(version|serialization_id))"
)
NAME = re.compile(r"[\w.]*")  # torch writes names into the code that it runs
# sizes are expressions that sympy evaluates as Python; these parts of the language compute and do nothing else
ARITHMETIC = (
    ast.Expression,
    ast.BinOp,
    ast.UnaryOp,
    ast.BoolOp,
    ast.Compare,
    ast.Call,
    ast.keyword,
    ast.Name,
    ast.Constant,
    ast.operator,
    ast.unaryop,
    ast.boolop,
    ast.cmpop,
    ast.expr_context,
)
CONTAINERS = ("builtins.tuple", "builtins.list", "builtins.dict", None)  # types of a treespec; None is a leaf


def load_program(path: Path) -> torch.export.ExportedProgram:
    """A program out of a `.pt2` file, without running what such a file can smuggle in.

    Refused are pickles, compiled libraries, expressions that are more than arithmetic, and names that are none. torch
    warns against `.pt2` files of unknown origin all the same; ONNX is the format to take from strangers.

    Raises:
        ValueError: the file is missing, spoiled, holds one of these, or needs an operator that this torch lacks.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; export the encoder anew")
    try:
        _check(path)
        with _no_pickles():
            return torch.export.load(path)
    except Exception as error:  # of the archive, of JSON, of an operator, of unpickling: they have no common base
        raise ValueError(f"torch {torch.__version__} cannot load {path}: {error}; export the encoder anew") from error


def _check(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.namelist()
        for entry in entries:
            if not ENTRY.fullmatch(entry) or entries.count(entry) > 1:
                raise ValueError(f"it holds {entry!r}, which no export of an encoder has")
        for entry in entries:
            if entry.endswith(".json"):
                _check_json(json.loads(archive.read(entry)))


def _check_json(value: Any, key: str = "") -> None:
    """Walk through the description of a program or of its weights and refuse what torch would run."""
    if isinstance(value, dict):
        for name, item in value.items():
            _check_json(item, name)
    elif isinstance(value, list):
        for item in value:
            _check_json(item, key)
    elif key == "use_pickle" and value:
        raise ValueError("it holds a pickle, which could run any code")
    elif key == "expr_str":
        _check_expression(value)
    elif key in ("in_spec", "out_spec"):
        _check_treespec(json.loads(value)[1])
    elif key.endswith(("name", "names", "fqn")) and value and not NAME.fullmatch(value):
        raise ValueError(f"it holds {value!r} in place of a name")


def _check_expression(text: str) -> None:
    for node in ast.walk(ast.parse(text, mode="eval")):
        is_arithmetic = isinstance(node, ARITHMETIC)
        if isinstance(node, ast.Constant):  # Symbol('s76', positive=True) has a name in it
            is_name = isinstance(node.value, str) and node.value.isidentifier()
            is_arithmetic = is_name or isinstance(node.value, (int, float))
        elif isinstance(node, ast.Call):  # Max(...), FloorDiv(...), but not exec(...), which sympy knows too
            is_arithmetic = isinstance(node.func, ast.Name) and node.func.id[0].isupper()
        if not is_arithmetic:
            raise ValueError(f"it holds the expression {text!r}, which is no arithmetic")


def _check_treespec(spec: dict[str, Any]) -> None:
    if spec["type"] not in CONTAINERS or spec["context"] not in (None, "null", "[]"):
        raise ValueError(f"it takes or gives a {spec['type']} of {spec['context']}, which no export of an encoder does")
    for child in spec["children_spec"]:
        _check_treespec(child)


@contextmanager
def _no_pickles() -> Iterator[None]:
    """Make `torch.load` refuse all but tensors, also where torch's own loader asks for more."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
