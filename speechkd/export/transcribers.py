"""Callables from a clip to its text, one for each format that `speechkd export` writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speechkd.data.features import WhisperLogMel
from speechkd.labels.decoding import DecodingConfig, decoding_tokens
from speechkd.models.greedy import greedy_tokens
from speechkd.teachers import load_processor, load_whisper

EXPORT_FILE = "export.json"
# from 16 kHz samples, at most the export's window, (samples,), float32, to the text: greedy, without timestamps
Transcriber = Callable[[np.ndarray], str]


def read_export(name: str) -> dict[str, Any] | None:
    """`export.json` of a folder; None for models that `speechkd export` did not write.

    Raises:
        ValueError: the file is spoiled.
    """
    path = Path(name).expanduser() / EXPORT_FILE
    if not path.is_file():
        return None
    try:
        export = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}; export the model anew") from error
    if not isinstance(export, dict) or "format" not in export:
        raise ValueError(f'{path} does not say "format"; export the model anew')
    return export


def load_transcriber(name: str, *, language: str | None, task: str, max_new_tokens: int) -> Transcriber:
    """Greedy transcription on the CPU by the runtime of the format, with as many threads as torch has.

    Args:
        name: folder that `speechkd export` wrote, or a Hugging Face folder, a Hub id or `bundled:<name>`.
        language: language code; None for English-only models.
        task: "transcribe" or "translate".
        max_new_tokens: longest transcript in tokens.

    Raises:
        ValueError: an unknown format, or what the format's own transcriber refuses.
    """
    export = read_export(name)
    format_name = "huggingface" if export is None else export["format"]
    folder = Path(name).expanduser()
    if format_name == "huggingface":
        return huggingface_transcriber(name, language=language, task=task, max_new_tokens=max_new_tokens)
    if format_name == "ctranslate2":
        from speechkd.export.ctranslate2 import ctranslate2_transcriber

        window_seconds = (export or {}).get("window_seconds", 30.0)
        return ctranslate2_transcriber(
            folder, language=language, task=task, max_new_tokens=max_new_tokens, window_seconds=window_seconds
        )
    if format_name == "onnx":
        from speechkd.export.onnx import onnx_transcriber

        return onnx_transcriber(folder, language=language, task=task, max_new_tokens=max_new_tokens)
    if format_name == "ggml":
        from speechkd.export.ggml import ggml_transcriber

        return ggml_transcriber(folder, language=language, task=task, max_new_tokens=max_new_tokens)
    raise ValueError(
        f"{folder / EXPORT_FILE} names the format {format_name!r}, which this version does not know; update speechkd"
    )


def huggingface_transcriber(name: str, *, language: str | None, task: Any, max_new_tokens: int) -> Transcriber:
    """Greedy transcription by PyTorch in float32 on the CPU; arguments and errors as of `load_transcriber`."""
    model, tokenizer = load_whisper(name, dtype=torch.float32), load_processor(name).tokenizer
    decoding = DecodingConfig(language=language, task=task, max_new_tokens=max_new_tokens)
    tokens = decoding_tokens(name, model, tokenizer, decoding)
    log_mel = WhisperLogMel.for_model(model.config)

    @torch.no_grad()
    def transcribe(waveform: np.ndarray) -> str:
        states = model.model.encoder(log_mel(torch.from_numpy(waveform)[None])).last_hidden_state
        (result,) = greedy_tokens(model, states, tokens, max_new_tokens=max_new_tokens)
        return tokenizer.decode(result.token_ids, skip_special_tokens=True).strip()

    return transcribe
