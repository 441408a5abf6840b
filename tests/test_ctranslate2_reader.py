"""The CTranslate2 reader, on files built here by the format's description and on the real one."""

import struct
from pathlib import Path

import numpy as np
import pytest

from speechkd.bundled import WHISPER_BASE_PARTS
from speechkd.ctranslate2_reader import read_variables, whisper_state_dict


def string(text):
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def variable(name, array, type_id):
    shape = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
    return string(name) + shape + struct.pack("<BI", type_id, array.nbytes) + array.tobytes()


def binary(*variables, version=6, aliases=()):
    head = struct.pack("<I", version) + string("WhisperSpec") + struct.pack("<II", 3, len(variables))
    tail = struct.pack("<I", len(aliases)) + b"".join(string(alias) + string(name) for alias, name in aliases)
    return head + b"".join(variables) + tail


WEIGHT = np.arange(6, dtype=np.float16).reshape(2, 3)


def test_reader_returns_every_type_and_alias():
    arrays = {0: np.float32(1.5), 1: np.array([-3], np.int8), 2: np.int16(-1), 3: np.array([7, 8], np.int32), 4: WEIGHT}
    content = binary(*(variable(f"v{i}", np.asarray(a), i) for i, a in arrays.items()), aliases=[("tied", "v4")])
    name, variables = read_variables(content)
    assert name == "WhisperSpec"
    for type_id, array in arrays.items():
        np.testing.assert_array_equal(variables[f"v{type_id}"], array, strict=True)
    assert variables["tied"] is variables["v4"]


def test_every_truncation_is_an_error_that_names_the_file():
    content = binary(variable("encoder/conv1/weight", WEIGHT, 4), aliases=[("tied", "encoder/conv1/weight")])
    for length in range(len(content)):
        with pytest.raises(ValueError, match=rf"weights.bin: truncated at byte {length}; .* needs bytes \d+ to \d+"):
            read_variables(content[:length], source="weights.bin")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04" + bytes(100), "byte 0: binary version 67324752, only version 6"),
        (binary(version=5), "binary version 5"),
        (binary(variable("w", WEIGHT, 9)), r"byte \d+: variable 'w' has unknown type 9; known are 0 \(float32\)"),
        (binary(variable("w", WEIGHT, 0)), r"'w' holds 12 bytes, but its shape \(2, 3\) of float32 takes 24"),
        (binary(aliases=[("a", "b")]), "alias 'a' points to 'b', which is not in the file"),
        (binary() + b"xy", "2 bytes left over at byte"),
    ],
)
def test_malformed_files_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        read_variables(content)


def test_weights_that_are_not_whispers_are_refused():
    packages = [Path(pytest.importorskip(package).__path__[0]) / "data" for package in WHISPER_BASE_PARTS]
    parts = [packages[0] / "model.bin.part1", packages[1] / "model.bin.part2"]
    _, variables = read_variables(b"".join(part.read_bytes() for part in parts))
    bias = "decoder/layer_0/self_attention/linear_0/bias"
    cases: list[tuple[dict[str, np.ndarray], str]] = [
        ({bias: np.ones(1536, np.float16)}, f"{bias}: the key part is not zero"),
        ({"decoder/layer_0/gate/weight": WEIGHT}, "no Whisper model has: decoder/layer_0/gate/weight"),
        ({"decoder/activation": np.array(0, np.int8)}, "decoder/activation is 0, Whisper has 3"),
        ({"decoder/projection/weight": WEIGHT}, "is not tied"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            whisper_state_dict(variables | change)
    del variables["encoder/conv1/bias"]
    with pytest.raises(ValueError, match="no variable 'encoder/conv1/bias'"):
        whisper_state_dict(variables)
