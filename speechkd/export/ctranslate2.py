"""Whisper models for CTranslate2 and faster-whisper, by CTranslate2's own converter, and a transcriber of them."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speechkd.data.collate import WhisperTokens
from speechkd.data.features import WhisperLogMel
from speechkd.files import write_json
from speechkd.teachers import load_processor

CTRANSLATE2_PRECISIONS = ("float32", "float16", "int8", "int8_float16")
MAX_POSITIONS = 448  # of Whisper's decoder


def export_ctranslate2(model_folder: Path, output_dir: Path, *, precision: str) -> None:
    """Write a Whisper as a folder that `ctranslate2.models.Whisper` and `faster_whisper.WhisperModel` load offline.

    Encoder and decoder may differ in depth. CTranslate2's converter writes weights, vocabulary and configuration;
    tokenizer and feature sizes, which faster-whisper reads too, and the alignment heads behind its word timestamps are
    completed here.

    Args:
        model_folder: Hugging Face folder of a Whisper.
        output_dir: an empty folder.
        precision: of the stored weights, one of `CTRANSLATE2_PRECISIONS`. A CPU computes float16 weights in float32.

    Raises:
        ValueError: an unknown precision, or CTranslate2 is not installed.
    """
    if precision not in CTRANSLATE2_PRECISIONS:
        raise ValueError(
            f"CTranslate2 precision {precision!r} is unknown; choose one of {', '.join(CTRANSLATE2_PRECISIONS)}"
        )
    converters = _require("ctranslate2.converters")
    processor = load_processor(str(model_folder))
    converters.TransformersConverter(str(model_folder)).convert(str(output_dir), quantization=precision, force=True)
    processor.tokenizer.save_pretrained(output_dir)
    processor.feature_extractor.save_pretrained(output_dir)  # preprocessor_config.json, with 80 or 128 mels
    shape = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    config = json.loads((output_dir / "config.json").read_text(encoding="utf-8"))
    heads = valid_alignment_heads(config["alignment_heads"], shape["decoder_layers"], shape["decoder_attention_heads"])
    for name in ("suppress_ids", "suppress_ids_begin"):
        config[name] = config[name] or []  # the program takes no null
    write_json(output_dir / "config.json", config | {"alignment_heads": heads})


def valid_alignment_heads(heads: list[list[int]] | None, num_layers: int, num_heads: int) -> list[list[int]]:
    """Cross-attention heads that a decoder has, for word timestamps.

    Args:
        heads: (layer, head) pairs, perhaps of a deeper teacher; None if unknown.
        num_layers: of the decoder.
        num_heads: of a layer.

    Returns:
        The pairs that exist; if none does, all heads of the upper half of the layers, as CTranslate2 itself takes them.
    """
    valid = [[layer, head] for layer, head in heads or [] if layer < num_layers and head < num_heads]
    return valid or [[layer, head] for layer in range(num_layers // 2, num_layers) for head in range(num_heads)]


def _require(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ValueError(
            'the ctranslate2 format needs ctranslate2, which is not installed; pip install "speechkd[export]"'
        ) from error


class Ctranslate2Transcriber:
    """Greedy transcription by CTranslate2 on the CPU, of one clip or of several together.

    Args:
        folder: made by `export_ctranslate2`.
        language: language code; None for English-only models.
        task: "transcribe" or "translate".
        max_new_tokens: limit of decoded tokens.
        window_seconds: to which clips are padded; the encoder works on so much.

    Raises:
        ValueError: CTranslate2 is not installed, a file is missing or spoiled, or the vocabulary lacks the language.
    """

    def __init__(
        self, folder: Path, *, language: str | None, task: str, max_new_tokens: int, window_seconds: float = 30.0
    ) -> None:
        self._runtime = _require("ctranslate2")
        if not (folder / "model.bin").is_file():
            raise ValueError(
                f"{folder / 'model.bin'} does not exist; make it with `speechkd export --format ctranslate2`"
            )
        self._tokenizer = load_processor(str(folder)).tokenizer
        tokens = WhisperTokens.from_tokenizer(self._tokenizer, language=language, task=task)
        try:
            self._model = self._runtime.models.Whisper(
                str(folder), device="cpu", intra_threads=torch.get_num_threads(), inter_threads=1
            )
        except RuntimeError as error:
            raise ValueError(f"CTranslate2 cannot load {folder}: {error}; export the model anew") from error
        self._log_mel = WhisperLogMel(self._model.n_mels, window_seconds)
        self._prefix = list(tokens.prefix)
        num_tokens = min(max_new_tokens, MAX_POSITIONS - len(self._prefix))
        vocab_size = len(json.loads((folder / "vocabulary.json").read_text(encoding="utf-8")))
        self._settings: dict[str, Any] = {
            "beam_size": 1,
            # the program decodes at most half of this, and at most this less the prefix without its first token
            "max_length": num_tokens + max(num_tokens, len(self._prefix) - 1),
            "suppress_blank": True,
            # -1 stands for the list in config.json; the program rules no timestamp out by itself
            "suppress_tokens": [-1, *range(tokens.no_timestamps + 1, vocab_size)],
        }

    @property
    def compute_type(self) -> str:
        """What the program computes in, which depends on the processor."""
        return str(self._model.compute_type)

    def __call__(self, waveform: np.ndarray) -> str:
        """From 16 kHz samples, at most the window, (samples,), float32, to the text."""
        return self.transcribe_batch(waveform[None])[0]

    def transcribe_batch(self, waveforms: np.ndarray) -> list[str]:
        """From zero-padded clips, (batch, samples), float32, to their texts."""
        features = self._log_mel(torch.from_numpy(np.ascontiguousarray(waveforms))).numpy()
        results = self._model.generate(
            self._runtime.StorageView.from_array(features), [self._prefix] * len(waveforms), **self._settings
        )
        return [self._tokenizer.decode(result.sequences_ids[0], skip_special_tokens=True).strip() for result in results]


def ctranslate2_transcriber(
    folder: Path, *, language: str | None, task: str, max_new_tokens: int, window_seconds: float = 30.0
) -> Ctranslate2Transcriber:
    """As the other formats' transcribers; see `Ctranslate2Transcriber`."""
    return Ctranslate2Transcriber(
        folder, language=language, task=task, max_new_tokens=max_new_tokens, window_seconds=window_seconds
    )
