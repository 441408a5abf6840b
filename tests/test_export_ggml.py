import ctypes
import struct
import sys
from importlib.metadata import files
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TOKENS
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor

from speechkd.bundled import bundled_path
from speechkd.data.features import WhisperLogMel
from speechkd.export.ggml import export_ggml, ggml_name, ggml_transcriber, quantize_q5_0

WIDTH = 64


def save_model(folder: Path, **options) -> WhisperForConditionalGeneration:
    """A random Whisper with three encoder layers and one decoder layer, and whisper-base's tokenizer."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 51865, "d_model": WIDTH, "encoder_ffn_dim": 4 * WIDTH, "decoder_ffn_dim": 4 * WIDTH}
    depths = {"encoder_layers": 3, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 2}
    model = WhisperForConditionalGeneration(WhisperConfig(**(sizes | depths | options))).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.normal_()  # so that no two vectors are equal
    model.save_pretrained(folder)
    WhisperProcessor.from_pretrained(bundled_path("whisper-base")).save_pretrained(folder)
    return model


class GgmlFile:
    """A reader of its own, from the published description of the format."""

    def __init__(self, path: Path) -> None:
        self.content, self.position = path.read_bytes(), 0
        (self.magic,) = self.integers(1)
        names = "vocab audio_ctx audio_state audio_head audio_layer text_ctx text_state text_head text_layer mels ftype"
        self.header = dict(zip(names.split(), self.integers(11), strict=True))
        mels, frequencies = self.integers(2)
        self.filters = np.frombuffer(self.take(4 * mels * frequencies), "<f4").reshape(mels, frequencies)
        self.words = [self.take(self.integers(1)[0]) for _ in range(self.integers(1)[0])]
        self.tensors, self.types = {}, {}
        while self.position < len(self.content):
            num_dims, name_length, tensor_type = self.integers(3)
            shape = self.integers(num_dims)[::-1]
            name = self.take(name_length).decode()
            self.types[name] = {0: "f32", 1: "f16", 6: "q5_0"}[tensor_type]
            self.tensors[name] = self.values(int(np.prod(shape)), self.types[name]).reshape(shape)

    def take(self, num_bytes: int) -> bytes:
        self.position += num_bytes
        assert self.position <= len(self.content)
        return self.content[self.position - num_bytes : self.position]

    def integers(self, count: int) -> tuple[int, ...]:
        return struct.unpack(f"<{count}i", self.take(4 * count))

    def values(self, count: int, kind: str) -> np.ndarray:
        if kind == "q5_0":
            return dequantize_q5_0(self.take(count // 32 * 22))
        dtype = np.dtype("<f4" if kind == "f32" else "<f2")
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).astype(np.float32)


def dequantize_q5_0(content: bytes) -> np.ndarray:
    """Value by value, from the layout of a block."""
    values = []
    for block in struct.iter_unpack("<eI16s", content):
        scale, fifth_bits, lower = block
        quants = [byte & 15 for byte in lower] + [byte >> 4 for byte in lower]
        values += [scale * ((quant | (fifth_bits >> i & 1) << 4) - 16) for i, quant in enumerate(quants)]
    return np.array(values, dtype=np.float32)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[WhisperForConditionalGeneration, dict[str, GgmlFile]]:
    folder = tmp_path_factory.mktemp("model")
    model = save_model(folder)
    read = {}
    for precision in ("f16", "q5_0"):
        output = tmp_path_factory.mktemp(precision)
        export_ggml(folder, output, precision=precision)
        read[precision] = GgmlFile(output / "ggml-model.bin")
    return model, read


@pytest.mark.parametrize(("precision", "file_type"), [("f16", 1), ("q5_0", 2008)])
def test_the_header_has_both_depths_and_the_type_of_the_file(exported, precision, file_type):
    file = exported[1][precision]
    assert file.magic == 0x67676D6C
    expected = {"vocab": 51865, "audio_ctx": 1500, "audio_state": WIDTH, "audio_head": 4, "audio_layer": 3}
    expected |= {"text_ctx": 448, "text_state": WIDTH, "text_head": 2, "text_layer": 1, "mels": 80}
    assert file.header == expected | {"ftype": file_type}
    np.testing.assert_array_equal(file.filters, WhisperLogMel(80).filters.numpy())


def test_words_are_stored_as_the_bytes_of_their_text_and_specials_are_left_to_the_program(exported):
    tokenizer = WhisperProcessor.from_pretrained(bundled_path("whisper-base")).tokenizer
    words = exported[1]["f16"].words
    assert len(words) == TOKENS.end_of_text
    for text in (" coffee", "Größe", "咖啡", "\n 12"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(words[token_id] for token_id in ids).decode() == text
    assert words[220] == b" " and words[TOKENS.end_of_text - 1] == b""


@pytest.mark.parametrize("precision", ["f16", "q5_0"])
def test_every_weight_is_stored_once_under_the_programs_name_in_the_type_that_it_expects(exported, precision):
    model, files_of = exported
    file = files_of[precision]
    weights = model.model.state_dict()
    assert len(file.tensors) == len(weights)
    for name, weight in weights.items():
        stored, kind = file.tensors[ggml_name(name)], file.types[ggml_name(name)]
        is_vector = weight.ndim == 1 or "embed_positions" in name
        assert kind == ("f32" if is_vector else "f16" if weight.ndim == 3 else precision), name
        tolerance = {"f32": 0, "f16": 1e-3, "q5_0": 1 / 16}[kind] * weight.abs().max().item()
        np.testing.assert_allclose(stored.reshape(weight.shape), weight.numpy(), rtol=0, atol=tolerance, err_msg=name)
    assert file.tensors["encoder.conv1.bias"].shape == (WIDTH, 1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder.layers.2.self_attn.k_proj.weight", "encoder.blocks.2.attn.key.weight"),
        ("decoder.layers.10.self_attn.q_proj.bias", "decoder.blocks.10.attn.query.bias"),
        ("decoder.layers.0.encoder_attn.k_proj.weight", "decoder.blocks.0.cross_attn.key.weight"),
        ("decoder.layers.0.encoder_attn_layer_norm.bias", "decoder.blocks.0.cross_attn_ln.bias"),
        ("encoder.layers.1.fc2.weight", "encoder.blocks.1.mlp.2.weight"),
        ("decoder.layers.1.final_layer_norm.weight", "decoder.blocks.1.mlp_ln.weight"),
        ("encoder.layer_norm.weight", "encoder.ln_post.weight"),
        ("decoder.layer_norm.weight", "decoder.ln.weight"),
        ("decoder.embed_tokens.weight", "decoder.token_embedding.weight"),
        ("encoder.conv1.weight", "encoder.conv1.weight"),
    ],
)
def test_names_are_those_that_whisper_cpp_looks_for(name, expected):
    assert ggml_name(name) == expected


def test_q5_0_blocks_are_those_of_ggml_itself():
    pytest.importorskip("pywhispercpp", exc_type=ImportError)
    library = next(path for path in files("pywhispercpp") or [] if "libggml-base" in path.name)
    quantize = ctypes.CDLL(str(library.locate())).quantize_row_q5_0_ref
    weight = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    weight[0, :32], weight[1, :32], weight[2, 5] = 0, 1, -30  # no scale, equal values, an outlier
    ours = quantize_q5_0(weight)
    theirs = ctypes.create_string_buffer(len(ours))
    quantize(np.ascontiguousarray(weight).ctypes.data_as(ctypes.c_void_p), theirs, ctypes.c_int64(weight.size))
    assert ours == theirs.raw
    assert np.abs(dequantize_q5_0(ours).reshape(weight.shape) - weight).max() < 30 / 16


@pytest.mark.parametrize(
    ("options", "precision", "message"),
    [
        ({"vocab_size": 51867}, "f16", "has 51867 tokens, not 51864, 51865, 51866"),
        ({"encoder_ffn_dim": 128}, "f16", "widths 128 and 256, not 4 x 64"),
        ({"activation_function": "relu"}, "f16", "uses relu"),
        ({"tie_word_embeddings": False}, "f16", "output head that is not its token embedding"),
        ({"d_model": 48, "encoder_ffn_dim": 192, "decoder_ffn_dim": 192}, "q5_0", "width 48, not a multiple of 32"),
    ],
)
def test_a_model_that_the_format_cannot_hold_is_refused_and_nothing_is_written(tmp_path, options, precision, message):
    save_model(tmp_path / "model", **options)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=message):
        export_ggml(tmp_path / "model", tmp_path / "out", precision=precision)
    assert not list((tmp_path / "out").iterdir())


def test_an_unknown_precision_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="'int3' is unknown; choose one of f16, q5_0"):
        export_ggml(tmp_path, tmp_path, precision="int3")


def test_a_file_that_is_missing_spoiled_or_cut_short_is_named_before_the_program_reads_it(tmp_path, exported):
    pytest.importorskip("pywhispercpp", exc_type=ImportError)
    options = {"language": "en", "task": "transcribe", "max_new_tokens": 4}
    with pytest.raises(ValueError, match="ggml-model.bin does not exist"):
        ggml_transcriber(tmp_path, **options)
    content = exported[1]["f16"].content
    for spoiled in (b"", b"no model" * 20, content[:100_000], content[:-100], content + bytes(3)):
        (tmp_path / "ggml-model.bin").write_bytes(spoiled)
        with pytest.raises(ValueError, match="ggml-model.bin is no whole model"):
            ggml_transcriber(tmp_path, **options)


def test_a_missing_pywhispercpp_is_named_with_the_extra_that_brings_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pywhispercpp.model", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"pywhispercpp, which is not installed; pip install \"speechkd\[export\]\""):
        ggml_transcriber(tmp_path, language="en", task="transcribe", max_new_tokens=4)
