"""Whisper models as one file of whisper.cpp's binary format, and a transcriber that runs it through pywhispercpp.

The format is public: https://github.com/ggml-org/whisper.cpp, `models/README.md` and the loader in `src/whisper.cpp`.
"""

import logging
import math
import struct
from collections.abc import Callable
from os import SEEK_CUR
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, WhisperConfig, WhisperForConditionalGeneration
from transformers.convert_slow_tokenizer import bytes_to_unicode

from speechkd.data.collate import WhisperTokens
from speechkd.data.features import SAMPLE_RATE_HZ, SAMPLES_PER_POSITION, WhisperLogMel
from speechkd.teachers import load_processor, load_whisper

GGML_PRECISIONS = ("f16", "q5_0")
GGML_FILE = "ggml-model.bin"

MAGIC = 0x67676D6C  # "ggml"
FILE_TYPES = {"f16": 1, "q5_0": 2008}  # of the header: 8 is "mostly q5_0", 2000 the version of the quantisation
F32, F16, Q5_0 = 0, 1, 6  # types of a tensor
Q5_0_BLOCK = 32  # values that share a scale
BLOCK_VALUES, BLOCK_BYTES = {F32: 1, F16: 1, Q5_0: Q5_0_BLOCK}, {F32: 4, F16: 2, Q5_0: 22}
KNOWN_VOCABULARIES = (51864, 51865, 51866)  # English-only, multilingual, large-v3; the program counts ids from these
ALWAYS_F32 = ("encoder.positional_embedding", "decoder.positional_embedding")
CONV_BIASES = ("encoder.conv1.bias", "encoder.conv2.bias")
LAYER_PARTS = {
    "self_attn": "attn",
    "self_attn_layer_norm": "attn_ln",
    "encoder_attn": "cross_attn",
    "encoder_attn_layer_norm": "cross_attn_ln",
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "out_proj": "out",
    "fc1": "mlp.0",
    "fc2": "mlp.2",
    "final_layer_norm": "mlp_ln",
}
OTHER_NAMES = {
    "encoder.embed_positions.weight": "encoder.positional_embedding",
    "decoder.embed_positions.weight": "decoder.positional_embedding",
    "decoder.embed_tokens.weight": "decoder.token_embedding.weight",
    "encoder.layer_norm.weight": "encoder.ln_post.weight",
    "encoder.layer_norm.bias": "encoder.ln_post.bias",
    "decoder.layer_norm.weight": "decoder.ln.weight",
    "decoder.layer_norm.bias": "decoder.ln.bias",
}


def export_ggml(model_folder: Path, output_dir: Path, *, precision: str) -> None:
    """Write a Whisper as `ggml-model.bin` for whisper.cpp.

    Encoder and decoder may differ in depth. whisper.cpp approximates GELU by its tanh form and computes attention in
    float16, so a few words may differ from those of PyTorch.

    Args:
        model_folder: Hugging Face folder of a Whisper.
        output_dir: an empty folder.
        precision: `f16`, or `q5_0` for 5-bit weights with a float16 scale for every 32 of them. Convolutions are
            float16 and vectors float32 in both.

    Raises:
        ValueError: an unknown precision, no Whisper, or one that whisper.cpp cannot hold.
    """
    if precision not in GGML_PRECISIONS:
        raise ValueError(f"ggml precision {precision!r} is unknown; choose one of {', '.join(GGML_PRECISIONS)}")
    model = load_whisper(str(model_folder), dtype=torch.float32)
    tokenizer = load_processor(str(model_folder)).tokenizer
    _check_supported(model, precision)
    with (output_dir / GGML_FILE).open("wb") as file:
        _write_header(file, model.config, precision)
        _write_mel_filters(file, model.config.num_mel_bins)
        _write_vocabulary(file, tokenizer)
        for name, weight in model.model.state_dict().items():
            _write_tensor(file, ggml_name(name), weight.numpy(), precision)


def _check_supported(model: WhisperForConditionalGeneration, precision: str) -> None:
    config = model.config
    problems = []
    if config.vocab_size not in KNOWN_VOCABULARIES:
        problems.append(f"has {config.vocab_size} tokens, not {', '.join(map(str, KNOWN_VOCABULARIES))}")
    if {config.encoder_ffn_dim, config.decoder_ffn_dim} != {4 * config.d_model}:
        problems.append(
            f"has feed-forward widths {config.encoder_ffn_dim} and {config.decoder_ffn_dim}, not 4 x {config.d_model}"
        )
    if config.activation_function != "gelu" or config.scale_embedding:
        problems.append(f"uses {config.activation_function}, scale_embedding={config.scale_embedding}, not plain gelu")
    if not torch.equal(model.proj_out.weight, model.model.decoder.embed_tokens.weight):
        problems.append("has an output head that is not its token embedding")
    if precision == "q5_0" and config.d_model % Q5_0_BLOCK:
        problems.append(f"has width {config.d_model}, not a multiple of {Q5_0_BLOCK}, which q5_0 needs (f16 does not)")
    if problems:
        raise ValueError(
            f"whisper.cpp cannot hold this model: it {'; it '.join(problems)}. Export it to onnx or ctranslate2"
        )


def _write_integers(file: IO[bytes], *values: int) -> None:
    file.write(struct.pack(f"<{len(values)}i", *values))


def _write_header(file: IO[bytes], config: WhisperConfig, precision: str) -> None:
    _write_integers(
        file,
        MAGIC,
        config.vocab_size,
        config.max_source_positions,
        config.d_model,
        config.encoder_attention_heads,
        config.encoder_layers,
        config.max_target_positions,
        config.d_model,
        config.decoder_attention_heads,
        config.decoder_layers,
        config.num_mel_bins,
        FILE_TYPES[precision],
    )


def _write_mel_filters(file: IO[bytes], num_mels: int) -> None:
    filters = WhisperLogMel(num_mels).filters.numpy()  # (mels, frequencies)
    _write_integers(file, *filters.shape)
    file.write(filters.astype("<f4").tobytes())


def _write_vocabulary(file: IO[bytes], tokenizer: PreTrainedTokenizerBase) -> None:
    """The bytes of each text token, by id; whisper.cpp names the special tokens itself."""
    byte_of_character = {character: byte for byte, character in bytes_to_unicode().items()}
    first_special = WhisperTokens.from_tokenizer(tokenizer, language=None).first_special
    texts = {token_id: token for token, token_id in tokenizer.get_vocab().items() if token_id < first_special}
    _write_integers(file, first_special)
    for token_id in range(first_special):
        content = bytes(byte_of_character[character] for character in texts.get(token_id, ""))
        _write_integers(file, len(content))
        file.write(content)


def ggml_name(name: str) -> str:
    """Name of a weight in whisper.cpp; `name` is that of transformers' `WhisperModel`."""
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    side, layers, *rest = name.split(".")
    if layers != "layers":
        return name  # the two convolutions
    number, *parts, kind = rest
    return ".".join([side, "blocks", number, *(LAYER_PARTS[part] for part in parts), kind])


def _write_tensor(file: IO[bytes], name: str, weight: np.ndarray, precision: str) -> None:
    if name in CONV_BIASES:
        weight = weight[:, None]  # added to (channels, frames)
    if weight.ndim == 1 or name in ALWAYS_F32 or name in CONV_BIASES:
        tensor_type, content = F32, weight.astype("<f4").tobytes()
    elif precision == "q5_0" and weight.ndim == 2:
        tensor_type, content = Q5_0, quantize_q5_0(weight)
    else:
        tensor_type, content = F16, weight.astype("<f2").tobytes()
    encoded = name.encode()
    _write_integers(file, weight.ndim, len(encoded), tensor_type, *reversed(weight.shape))
    file.write(encoded)
    file.write(content)


def quantize_q5_0(weight: np.ndarray) -> bytes:
    """Weights in ggml's type q5_0, as `quantize_row_q5_0_ref` of ggml makes them.

    A block is a float16 scale d, the fifth bits of its 32 values as one integer, and their lower four bits, value i
    and value i + 16 in one byte; a value is d (q - 16). The scale maps the value farthest from 0 to q = 0.

    Args:
        weight: (rows, columns), float32; the columns a multiple of 32.

    Returns:
        22 bytes for every 32 values.
    """
    blocks = weight.astype(np.float32).reshape(-1, Q5_0_BLOCK)
    farthest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    scale = farthest / np.float32(-16)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    quants = np.minimum(blocks * inverse + np.float32(16.5), 31).astype(np.uint8)
    fifth_bits = np.packbits(quants >> 4, axis=1, bitorder="little")  # 4 bytes, value 0 the lowest bit
    lower = (quants[:, :16] & 0x0F) | (quants[:, 16:] << 4)
    return np.concatenate([scale.astype("<f2").view(np.uint8), fifth_bits, lower], axis=1).tobytes()


def ggml_transcriber(
    folder: Path, *, language: str | None, task: str, max_new_tokens: int
) -> Callable[[np.ndarray], str]:
    """Greedy transcription by whisper.cpp, without timestamps and without its fallback to higher temperatures.

    Args:
        folder: made by `export_ggml`.
        language: language code; None for English-only models.
        task: "transcribe" or "translate".
        max_new_tokens: longest transcript in tokens; whisper.cpp stops at 220 by itself.

    Returns:
        From 16 kHz samples, at most the model's window, (samples,), float32, to the text.

    Raises:
        ValueError: pywhispercpp is not installed, the file is missing or cannot be read, or the language is unknown.
    """
    model = _load(folder / GGML_FILE)
    with (folder / GGML_FILE).open("rb") as file:
        max_samples = struct.unpack("<3i", file.read(12))[2] * SAMPLES_PER_POSITION  # of `_write_header`
    if language is not None and language not in (known := model.available_languages()):
        raise ValueError(f"whisper.cpp does not know the language {language!r}; it knows {', '.join(sorted(known))}")
    parameters: dict[str, Any] = {
        "n_threads": torch.get_num_threads(),
        "language": language or "en",  # empty would be guessed, which English-only models cannot
        "translate": task == "translate",
        "no_context": True,
        "no_timestamps": True,
        "single_segment": True,
        "suppress_blank": True,
        "suppress_nst": True,
        "temperature": 0.0,
        "temperature_inc": 0.0,
        "no_speech_thold": 2.0,  # a probability never is: text is not dropped
        "max_tokens": max(1, max_new_tokens - 1),  # the program counts from 0
        "greedy": {"best_of": 1},
        "print_progress": False,
        "print_realtime": False,
        "print_timestamps": False,
    }

    def transcribe(waveform: np.ndarray) -> str:
        if len(waveform) > max_samples:
            raise ValueError(
                f"a clip of {len(waveform) / SAMPLE_RATE_HZ:.2f} s is longer than the model's window of "
                f"{max_samples / SAMPLE_RATE_HZ:g} s; cut it"
            )
        # the program refuses very short clips; Whisper sees zeros after the clip anyway
        padded = np.pad(waveform, (0, max(0, SAMPLE_RATE_HZ - len(waveform))))
        segments = model.transcribe(np.ascontiguousarray(padded, dtype=np.float32), **parameters)
        return " ".join(segment.text for segment in segments).strip()

    return transcribe


def _load(path: Path) -> Any:
    try:
        from pywhispercpp.model import Model
    except ImportError as error:
        raise ValueError(
            'the ggml format is run by pywhispercpp, which is not installed; pip install "speechkd[export]"'
        ) from error
    if not path.is_file():
        raise ValueError(f"{path} does not exist; make it with `speechkd export --format ggml`")
    if not _is_complete(path):
        raise ValueError(f"{path} is no whole model for whisper.cpp; make it anew with `speechkd export --format ggml`")
    logging.getLogger("pywhispercpp").setLevel(logging.WARNING)  # it tells of every clip, twice
    return Model(str(path), redirect_whispercpp_logs_to=None)


def _is_complete(path: Path) -> bool:
    """Whether a file that `export_ggml` wrote goes to its end; on half a file whisper.cpp kills the process."""
    with path.open("rb") as file:

        def integers(count: int) -> tuple[int, ...]:
            return struct.unpack(f"<{count}i", file.read(4 * count))

        try:
            magic, *_ = integers(12)
            if magic != MAGIC:
                return False
            num_mels, num_frequencies = integers(2)
            file.seek(4 * num_mels * num_frequencies, SEEK_CUR)
            (num_words,) = integers(1)
            for _ in range(num_words):
                file.seek(integers(1)[0], SEEK_CUR)
            num_bytes = path.stat().st_size
            while file.tell() < num_bytes:
                num_dims, name_length, tensor_type = integers(3)
                num_values = math.prod(integers(num_dims))
                file.seek(name_length + num_values * BLOCK_BYTES[tensor_type] // BLOCK_VALUES[tensor_type], SEEK_CUR)
        except (struct.error, KeyError, OSError):
            return False
        return file.tell() == num_bytes
