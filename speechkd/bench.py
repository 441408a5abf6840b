"""Size, load time, latency, throughput, memory and error rate of Whispers and their exports, measured in turns."""

import logging
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, WhisperForCausalLM
from transformers.modeling_outputs import BaseModelOutput

from speechkd.data.collate import WhisperTokens
from speechkd.data.features import SAMPLE_RATE_HZ, WhisperLogMel
from speechkd.data.hub import read_utterances
from speechkd.data.loader import clip_batches, length_sorted
from speechkd.data.manifest import Manifest
from speechkd.data.packing import WINDOW_SECONDS
from speechkd.doctor import hardware_name
from speechkd.evaluate import real_time_factor_inverse
from speechkd.export.ctranslate2 import Ctranslate2Transcriber
from speechkd.export.parity import check_clips_fit
from speechkd.export.transcribers import Transcriber, load_transcriber, read_export
from speechkd.labels.pseudo_label import DecodingConfig
from speechkd.metrics.normalizers import Normalizer, get_normalizer
from speechkd.metrics.wer import error_rates
from speechkd.models.speculative import Speculated, load_assistant, speculative_decode
from speechkd.models.whisper import encode
from speechkd.resources import now, peak_megabytes, resident_bytes, size_bytes
from speechkd.teachers import load_processor, load_whisper, resolve_model

logger = logging.getLogger(__name__)


@dataclass
class _Contender:
    """One row of the table: a model, alone or with an assistant, or an export, and what was measured of it."""

    names: list[str]
    load_seconds: float
    model: Any = None  # these four are None for an export
    tokenizer: Any = None
    tokens: Any = None
    log_mel: Any = None
    assistant: WhisperForCausalLM | None = None
    transcriber: Transcriber | None = None  # of an export
    weights_megabytes: float | None = None  # of an export: what the process grew by
    parameters: int | None = None  # of an export
    working_megabytes: float | None = None
    encode_seconds: list[float] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)
    batched_seconds: float = 0.0
    texts: list[str] = field(default_factory=list)
    speculated: list[Speculated] = field(default_factory=list)


class _NoTimestamps(LogitsProcessor):
    """Rules timestamps out: on one that was not asked for, transformers would cut the clip and decode its rest."""

    def __init__(self, no_timestamps: int) -> None:
        self.no_timestamps = no_timestamps

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.no_timestamps + 1 :] = -torch.inf
        return scores


def bench_models(
    model_names: list[str],
    manifest_path: str | Path,
    *,
    decoding: DecodingConfig,
    assistant_name: str | None = None,
    max_clips: int | None = None,
    normalizer: Normalizer = "english",
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Measure models and exports on the same clips, every clip going through all of them before the next one comes.

    A clip's latency is that of log-mel, encoder and greedy decoding by transformers' `generate`, reading the file
    excluded; an export goes through its own runtime on the CPU, with as many threads as torch has. Clips that cannot be
    decoded are counted and left out. Memory is the weights plus the most that transcribing one clip took beyond them;
    None where the system does not tell.

    Args:
        model_names: Hub ids, Hugging Face folders, `bundled:<name>` and folders of `speechkd export`, in any mix;
            without text in the manifest the first one's transcripts are what the others are scored against.
        manifest_path: the clips.
        decoding: language and limits; `batch_size` is that of the batched measurement.
        assistant_name: student that drafts for the first model; see `speechkd.models.speculative`.
        max_clips: only the first so many.
        normalizer: applied before words are compared.
        device: where the models run; by default CUDA if there is one.

    Returns:
        `models`, one dict for each (seconds, megabytes, `rtfx`, `wer` in percent), the conditions, and with an
        assistant `speculative`: acceptance, and time of the model alone over time with the assistant, of the whole
        clip (`speed_ratio`) and of decoding alone (`decoding_ratio`).

    Raises:
        ValueError: no clip, clips longer than an export's window, a model or an assistant that does not fit.
    """
    if max_clips is not None and max_clips < 1:
        raise ValueError(f"max_clips must be 1 or more, got {max_clips}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    manifest = read_utterances(manifest_path)
    if max_clips is not None:
        manifest = manifest.select(range(min(max_clips, len(manifest))))
    for name in model_names:
        window_seconds = (read_export(name) or {}).get("window_seconds", WINDOW_SECONDS)
        if window_seconds < WINDOW_SECONDS:
            check_clips_fit(manifest_path, window_seconds, max_clips)
    contenders = [_load(name, decoding, device) for name in model_names]
    if assistant_name is not None:
        contenders.append(_with_assistant(contenders[0], assistant_name))
    utterances, num_skipped = _run_turns(contenders, manifest, decoding, device)
    if not utterances:
        raise ValueError(f"none of the {len(manifest)} clips of {manifest_path} could be decoded; see the log")
    audio_seconds = sum(utterance["duration_seconds"] for utterance in utterances)
    texts = [utterance["text"] for utterance in utterances]
    has_text = all(text is not None for text in texts)
    references = texts if has_text else contenders[0].texts
    result: dict[str, Any] = {
        "models": [_measures(contender, audio_seconds, references, normalizer) for contender in contenders],
        "reference": "the manifest's text" if has_text else f"the transcripts of {model_names[0]}",
        "normalizer": normalizer,
        "manifest": str(manifest_path),
        "num_clips": len(utterances),
        "num_skipped": num_skipped,
        "audio_seconds": audio_seconds,
        "batch_size": decoding.clips_per_batch(device),
        "device": hardware_name(device),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "num_threads": torch.get_num_threads(),
    }
    if assistant_name is not None:
        result["speculative"] = _speculative_measures(contenders[0], contenders[-1])
    return result


def _load(name: str, decoding: DecodingConfig, device: torch.device) -> _Contender:
    export = read_export(name)
    if export is not None and export["format"] != "huggingface":
        return _load_export(name, export, decoding)
    resolve_model(name)  # converts a bundled model on its first use, which is no part of loading
    started = now(device)
    model, processor = load_whisper(name, device=device), load_processor(name)
    load_seconds = now(device) - started
    tokens = WhisperTokens.from_tokenizer(processor.tokenizer, language=decoding.language, task=decoding.task)
    log_mel = WhisperLogMel.for_model(model.config).to(device)
    return _Contender([name], load_seconds, model, processor.tokenizer, tokens, log_mel)


def _load_export(name: str, export: dict[str, Any], decoding: DecodingConfig) -> _Contender:
    # what a runtime holds shows in the process alone; one short clip, because some read weights when they use them
    before_bytes = resident_bytes()
    started = time.perf_counter()
    transcriber = load_transcriber(
        name, language=decoding.language, task=decoding.task, max_new_tokens=decoding.max_new_tokens
    )
    load_seconds = time.perf_counter() - started
    transcriber(np.zeros(SAMPLE_RATE_HZ, dtype=np.float32))
    after_bytes = resident_bytes()
    return _Contender(
        [name],
        load_seconds,
        transcriber=transcriber,
        weights_megabytes=None if before_bytes is None or after_bytes is None else (after_bytes - before_bytes) / 1e6,
        parameters=export.get("parameters"),
    )


def _with_assistant(teacher: _Contender, assistant_name: str) -> _Contender:
    if teacher.model is None:
        raise ValueError(
            f"{teacher.names[0]} is an export, which takes no assistant; name its Hugging Face folder first"
        )
    started = now(teacher.model.device)
    assistant = load_assistant(assistant_name, teacher.model)
    load_seconds = teacher.load_seconds + now(teacher.model.device) - started
    return _Contender(
        [*teacher.names, assistant_name],
        load_seconds,
        teacher.model,
        teacher.tokenizer,
        teacher.tokens,
        teacher.log_mel,
        assistant,
    )


def _run_turns(
    contenders: list[_Contender], manifest: Manifest, decoding: DecodingConfig, device: torch.device
) -> tuple[list[dict[str, Any]], int]:
    """Let all take turns on each clip, then on each batch; the utterances that were decoded, and how many were not."""
    utterances: list[dict[str, Any]] = []
    num_skipped = 0
    batches = clip_batches(
        manifest,
        length_sorted(manifest, range(len(manifest))),
        sample_rate_hz=SAMPLE_RATE_HZ,
        batch_size=decoding.clips_per_batch(device),
        device=device,
    )
    for batch in batches:
        for skipped in batch.skipped:
            logger.warning("%s", skipped["reason"])
        num_skipped += len(batch.skipped)
        if batch.utterances:
            if not utterances:
                _warm_up(contenders, batch.waveforms[:1], decoding)
            for clip in batch.waveforms.split(1):
                for contender in contenders:
                    _one_clip(contender, clip, decoding)
            for contender in contenders:
                if _batches(contender):
                    started = now(device)
                    _transcribe(contender, batch.waveforms, decoding)
                    contender.batched_seconds += now(device) - started
            utterances += batch.utterances
        logger.info("%d of %d clips", len(utterances) + num_skipped, len(manifest))
    return utterances, num_skipped


def _warm_up(contenders: list[_Contender], clip: Tensor, decoding: DecodingConfig) -> None:
    """Let each choose its kernels on one clip, untimed, and then see what memory it takes."""
    for contender in contenders:
        step = partial(_transcribe, contender, clip, decoding)
        step()
        device = torch.device("cpu") if contender.model is None else contender.model.device
        contender.working_megabytes = peak_megabytes(step, device)


def _batches(contender: _Contender) -> bool:
    if contender.transcriber is not None:
        return isinstance(contender.transcriber, Ctranslate2Transcriber)
    return contender.assistant is None


def _one_clip(contender: _Contender, clip: Tensor, decoding: DecodingConfig) -> None:
    if contender.transcriber is not None:
        waveform = clip[0].cpu().numpy()
        started = time.perf_counter()
        contender.texts.append(contender.transcriber(waveform))
        contender.decode_seconds.append(time.perf_counter() - started)
        contender.encode_seconds.append(0.0)  # part of the above
        return
    device = contender.model.device
    started = now(device)
    states = encode(contender.model, contender.log_mel(clip))
    encoded = now(device)
    token_ids, speculated = _decode(contender, states, decoding, clip.shape[-1] / SAMPLE_RATE_HZ)
    contender.decode_seconds.append(now(device) - encoded)
    contender.encode_seconds.append(encoded - started)
    contender.texts.append(contender.tokenizer.decode(token_ids[0], skip_special_tokens=True).strip())
    contender.speculated += speculated


def _transcribe(contender: _Contender, waveforms: Tensor, decoding: DecodingConfig) -> None:
    if isinstance(contender.transcriber, Ctranslate2Transcriber):
        contender.transcriber.transcribe_batch(waveforms.cpu().numpy())
        return
    if contender.transcriber is not None:  # takes one clip at a time, as in the warm-up
        contender.transcriber(waveforms[0].cpu().numpy())
        return
    _decode(
        contender, encode(contender.model, contender.log_mel(waveforms)), decoding, waveforms.shape[-1] / SAMPLE_RATE_HZ
    )


@torch.no_grad()
def _decode(
    contender: _Contender, states: Tensor, decoding: DecodingConfig, duration_seconds: float
) -> tuple[list[list[int]], list[Speculated]]:
    """Token ids of each clip, and with an assistant how they came about."""
    model, tokens = contender.model, contender.tokens
    if contender.assistant is not None:
        speculated = speculative_decode(
            model,
            contender.assistant,
            states,
            tokens,
            max_new_tokens=decoding.max_new_tokens,
            duration_seconds=duration_seconds,
        )
        return [speculated.token_ids], [speculated]
    forced: dict[str, Any] = {} if decoding.language is None else {"language": decoding.language, "task": decoding.task}
    sequences = model.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        logits_processor=LogitsProcessorList([_NoTimestamps(tokens.no_timestamps)]),
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        num_beams=1,
        return_timestamps=False,
        **forced,
    )
    return sequences.tolist(), []


def _measures(
    contender: _Contender, audio_seconds: float, references: list[str], normalizer: Normalizer
) -> dict[str, Any]:
    latencies = [sum(pair) for pair in zip(contender.encode_seconds, contender.decode_seconds, strict=True)]
    normalize = get_normalizer(normalizer)
    has_words = any(normalize(text) for text in references)
    models: list[Any] = [model for model in (contender.model, contender.assistant) if model is not None]
    weights_megabytes, parameters = contender.weights_megabytes, contender.parameters
    if models:
        weights = [weight for model in models for weight in _weights(model)]
        weights_megabytes = sum(weight.numel() * weight.element_size() for weight in weights) / 1e6
        parameters = sum(weight.numel() for model in models for weight in _weights(model.model))  # the head is tied
    working = contender.working_megabytes
    return {
        "name": " + ".join(contender.names),
        "size_megabytes": sum(size_bytes(name) for name in contender.names) / 1e6,
        "parameters": parameters,
        "load_seconds": contender.load_seconds,
        "latency_median_seconds": statistics.median(latencies),
        "latency_p95_seconds": float(np.percentile(latencies, 95)),
        "rtfx": real_time_factor_inverse(sum(latencies), audio_seconds),
        "rtfx_batched": real_time_factor_inverse(contender.batched_seconds, audio_seconds)
        if _batches(contender)
        else None,
        "peak_memory_megabytes": None if working is None or weights_megabytes is None else weights_megabytes + working,
        "wer": error_rates(references, contender.texts, normalizer).wer if has_words else None,
    }


def _speculative_measures(teacher: _Contender, assisted: _Contender) -> dict[str, Any]:
    rows = assisted.speculated
    num_steps, num_drafted = sum(row.num_steps for row in rows), sum(row.num_drafted for row in rows)
    num_accepted = sum(row.num_accepted for row in rows)
    num_tokens = sum(len(row.token_ids) - len(assisted.tokens.prefix) for row in rows)
    alone, together = sum(teacher.decode_seconds), sum(assisted.decode_seconds)
    return {
        "assistant": assisted.names[-1],
        "num_steps": num_steps,
        "tokens_per_step": num_tokens / num_steps,
        "accepted_tokens_per_step": num_accepted / num_steps,
        "acceptance_rate": num_accepted / num_drafted,
        "num_identical_texts": sum(a == b for a, b in zip(teacher.texts, assisted.texts, strict=True)),
        "speed_ratio": (alone + sum(teacher.encode_seconds)) / (together + sum(assisted.encode_seconds)),
        "decoding_ratio": alone / together,
    }


def _weights(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, those of int8 layers included, which torch does not count as such."""
    yield from module.parameters()
    for layer in module.modules():
        if isinstance(layer, torch.ao.nn.quantized.dynamic.Linear):
            yield from (layer.weight(), layer.bias()) if layer.bias() is not None else (layer.weight(),)
