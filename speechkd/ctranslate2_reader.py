"""Read a CTranslate2 `model.bin` (binary version 6) and name a Whisper model's tensors as Hugging Face does."""

import math
import re
import struct

import numpy as np

BINARY_VERSION = 6
DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
GELU = 3  # ctranslate2.specs.Activation.GELU, the exact one
# What Whisper always is; a file that says otherwise would run, but compute something else.
WHISPER_FLAGS = {
    "decoder/activation": GELU,
    "decoder/alibi": 0,
    "decoder/pre_norm": 1,
    "decoder/scale_embeddings": 0,
    "decoder/start_from_zero_embedding": 0,
}
# Defaults of the converter; the real alignment heads are in config.json.
IGNORED = {"decoder/alignment_heads", "decoder/alignment_layer"}


class _Cursor:
    """A position in the file that knows its name for error messages."""

    def __init__(self, content: bytes | memoryview, source: str) -> None:
        self.content = memoryview(content)
        self.source = source
        self.position = 0

    def take(self, num_bytes: int, what: str) -> memoryview:
        end = self.position + num_bytes
        if end > len(self.content):
            raise ValueError(
                f"{self.source}: truncated at byte {len(self.content)}; {what} needs bytes {self.position} to {end}"
            )
        taken = self.content[self.position : end]
        self.position = end
        return taken

    def number(self, layout: str, what: str) -> int:
        return struct.unpack(f"<{layout}", self.take(struct.calcsize(layout), what))[0]

    def string(self, what: str) -> str:
        start = self.position
        raw = bytes(self.take(self.number("H", f"the length of {what}"), what))
        if not raw.endswith(b"\0"):
            raise ValueError(f"{self.source}: byte {start}: {what} does not end with a zero byte, got {raw[-8:]!r}")
        try:
            return raw[:-1].decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.source}: byte {start}: {what} is not UTF-8 text: {raw[:32]!r}") from error


def read_variables(content: bytes | memoryview, source: str = "model.bin") -> tuple[str, dict[str, np.ndarray]]:
    """Parse a whole `model.bin`.

    Args:
        content: the file; arrays are views of it, so it must not be changed afterwards.
        source: name of the file in error messages.

    Returns:
        The name of the specification (`WhisperSpec`), and all variables; an alias is the same array under a second
        name.

    Raises:
        ValueError: not such a file, truncated, an unknown type, or bytes left over; names what and where.
    """
    cursor = _Cursor(content, source)
    version = cursor.number("I", "the binary version")
    if version != BINARY_VERSION:
        raise ValueError(f"{source}: byte 0: binary version {version}, only version {BINARY_VERSION} is known here")
    spec_name = cursor.string("the specification name")
    cursor.number("I", "the specification revision")

    variables: dict[str, np.ndarray] = {}
    for index in range(cursor.number("I", "the number of variables")):
        name = cursor.string(f"the name of variable {index}")
        what = f"variable {name!r}"
        rank = cursor.number("B", f"the rank of {what}")
        shape = tuple(cursor.number("I", f"the shape of {what}") for _ in range(rank))
        type_position = cursor.position
        type_id = cursor.number("B", f"the type of {what}")
        if type_id not in DTYPES:
            known = ", ".join(f"{number} ({np.dtype(dtype).name})" for number, dtype in DTYPES.items())
            raise ValueError(f"{source}: byte {type_position}: {what} has unknown type {type_id}; known are {known}")
        dtype = np.dtype(DTYPES[type_id]).newbyteorder("<")
        num_bytes = cursor.number("I", f"the size of {what}")
        if num_bytes != math.prod(shape) * dtype.itemsize:
            raise ValueError(
                f"{source}: byte {type_position + 1}: {what} holds {num_bytes} bytes, but its shape {shape} of "
                f"{dtype.name} takes {math.prod(shape) * dtype.itemsize}"
            )
        variables[name] = np.frombuffer(cursor.take(num_bytes, what), dtype=dtype).reshape(shape)

    for index in range(cursor.number("I", "the number of aliases")):
        alias, name = cursor.string(f"alias {index}"), cursor.string(f"the target of alias {index}")
        if name not in variables:
            raise ValueError(f"{source}: alias {alias!r} points to {name!r}, which is not in the file")
        variables[alias] = variables[name]
    if cursor.position != len(cursor.content):
        raise ValueError(f"{source}: {len(cursor.content) - cursor.position} bytes left over at byte {cursor.position}")
    return spec_name, variables


def whisper_state_dict(variables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Whisper's variables under the names of `transformers.WhisperForConditionalGeneration`.

    CTranslate2 stacks projections that read the same input: query, key, value in self-attention and key, value in
    cross-attention. They are split here. Keys have no bias in Whisper.

    Args:
        variables: as of `read_variables`, unquantized.

    Returns:
        The state dict without `proj_out.weight`, which is tied to the embeddings.

    Raises:
        ValueError: a variable is missing or unknown, a key bias is not zero, or the file is no plain Whisper.
    """
    left = dict(variables)

    def pop(name: str) -> np.ndarray:
        if name not in left:
            raise ValueError(f"the file has no variable {name!r}; it is no float Whisper model")
        return left.pop(name)

    for name, expected in WHISPER_FLAGS.items():
        if (value := pop(name).item()) != expected:
            raise ValueError(f"{name} is {value}, Whisper has {expected}; this file is another architecture")
    for name in IGNORED:
        left.pop(name, None)

    state: dict[str, np.ndarray] = {}

    def copy(target: str, source: str, norm: bool = False) -> None:
        state[f"{target}.weight"] = pop(f"{source}/gamma" if norm else f"{source}/weight")
        state[f"{target}.bias"] = pop(f"{source}/beta" if norm else f"{source}/bias")

    def split(target: str, source: str, projections: str) -> None:
        weights, biases = (np.split(pop(f"{source}/{part}"), len(projections)) for part in ("weight", "bias"))
        for projection, weight, bias in zip(projections, weights, biases, strict=True):
            state[f"{target}.{projection}_proj.weight"] = weight
            if projection != "k":
                state[f"{target}.{projection}_proj.bias"] = bias
            elif np.any(bias):
                raise ValueError(f"{source}/bias: the key part is not zero, but keys have no bias in Whisper")

    for stack in ("encoder", "decoder"):
        pop(f"{stack}/num_heads")
        state[f"model.{stack}.embed_positions.weight"] = pop(f"{stack}/position_encodings/encodings")
        copy(f"model.{stack}.layer_norm", f"{stack}/layer_norm", norm=True)
        for index in range(num_layers(variables, stack)):
            target, source = f"model.{stack}.layers.{index}", f"{stack}/layer_{index}"
            split(f"{target}.self_attn", f"{source}/self_attention/linear_0", "qkv")
            copy(f"{target}.self_attn.out_proj", f"{source}/self_attention/linear_1")
            copy(f"{target}.self_attn_layer_norm", f"{source}/self_attention/layer_norm", norm=True)
            if stack == "decoder":
                copy(f"{target}.encoder_attn.q_proj", f"{source}/attention/linear_0")
                split(f"{target}.encoder_attn", f"{source}/attention/linear_1", "kv")
                copy(f"{target}.encoder_attn.out_proj", f"{source}/attention/linear_2")
                copy(f"{target}.encoder_attn_layer_norm", f"{source}/attention/layer_norm", norm=True)
            copy(f"{target}.fc1", f"{source}/ffn/linear_0")
            copy(f"{target}.fc2", f"{source}/ffn/linear_1")
            copy(f"{target}.final_layer_norm", f"{source}/ffn/layer_norm", norm=True)
    copy("model.encoder.conv1", "encoder/conv1")
    copy("model.encoder.conv2", "encoder/conv2")
    embeddings = state["model.decoder.embed_tokens.weight"] = pop("decoder/embeddings/weight")
    if pop("decoder/projection/weight") is not embeddings:
        raise ValueError("decoder/projection/weight is not tied to decoder/embeddings/weight, as it is in Whisper")
    if left:
        raise ValueError(f"the file has variables that no Whisper model has: {', '.join(sorted(left))}")
    return state


def num_layers(variables: dict[str, np.ndarray], stack: str) -> int:
    """Number of layers in `encoder` or `decoder`."""
    return len({match[0] for name in variables if (match := re.match(rf"{stack}/layer_\d+/", name))})
