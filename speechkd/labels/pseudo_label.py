"""Pseudo-labels: greedy transcripts of a manifest, written to a label store."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm
from transformers import WhisperForConditionalGeneration

from speechkd.data.audit import usable_clips
from speechkd.data.collate import WhisperTokens
from speechkd.data.features import SAMPLE_RATE_HZ, WhisperLogMel
from speechkd.data.hub import read_utterances
from speechkd.data.loader import ClipBatch, clip_batches, length_sorted, report_skipped
from speechkd.data.manifest import Manifest
from speechkd.data.packing import WINDOW_SECONDS, PackedManifest, pack_manifest
from speechkd.files import folder_lock
from speechkd.labels.filters import compression_ratio
from speechkd.labels.teacher_cache import LabelStore, LabelStoreError, create_store
from speechkd.models.whisper import greedy_decode
from speechkd.preemption import Preempted, sigterm_requests
from speechkd.teachers import load_processor, load_whisper, teacher_identity

logger = logging.getLogger(__name__)

Target = Literal["text", "encoder_states"]
SHARD_UTTERANCES = 256
SHARD_SECONDS = 30.0  # a kill loses at most this much work


@dataclass(kw_only=True)
class DecodingConfig:
    """How a Whisper transcribes.

    Args:
        language: language code of the audio; null for English-only models.
        task: transcribe, or translate into English.
        batch_size: clips decoded together.
        max_new_tokens: longest transcript in tokens; at most 444.
        num_workers: processes that decode audio files; 0 decodes in the main process.
        timestamps: put each segment between timestamps; `strip_timestamps` takes them out again.
    """

    language: str | None = "en"
    task: Literal["transcribe", "translate"] = "transcribe"
    batch_size: int = 16
    max_new_tokens: int = 224
    num_workers: int = 0
    timestamps: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {self.batch_size}")
        if not 1 <= self.max_new_tokens <= 444:
            raise ValueError(
                f"max_new_tokens must be 1 to 444 (Whisper's context less its prefix), got {self.max_new_tokens}"
            )


def label_manifest(
    model_name: str,
    manifest_path: str | Path,
    output_dir: str | Path,
    *,
    decoding: DecodingConfig,
    targets: tuple[Target, ...] = ("text",),
    pack: bool = False,
    max_skipped_fraction: float = 0.01,
    device: torch.device | str | None = None,
) -> LabelStore:
    """Transcribe a manifest with a Whisper and keep what it says, carrying on where an earlier call stopped.

    A row holds `id, duration_seconds, text, token_ids, mean_logprob, compression_ratio, no_speech_prob, finished,
    compute_seconds`; with "encoder_states" the store also has the last encoder states, (frames, dim), float16. With
    `pack`, clips are joined to windows of up to 30 s: `id` and `previous_id` are those of `pack_manifest`, and `parts`
    holds `id, start_seconds, duration_seconds` of the clips.

    Args:
        model_name: Hub id, folder or `bundled:<name>`.
        manifest_path: JSONL manifest.
        output_dir: label store; created or continued.
        decoding: language and limits.
        targets: what to store; "text" is always there.
        pack: label windows of joined clips, a third of the work for clips of 8 s; each clip is decoded once more
            beforehand, so that a bad one does not take its neighbours along.
        max_skipped_fraction: share of clips that may be undecodable, 0 to 1.
        device: where the model runs; by default CUDA if there is one.

    Returns:
        The finished store.

    Raises:
        ManifestError, LabelStoreError, AudioError: see their modules.
        Preempted: SIGTERM came; the batches before it are stored.
    """
    output_dir = Path(output_dir)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    manifest = read_utterances(manifest_path)
    with folder_lock(output_dir):
        model = load_whisper(model_name, device=device)
        store = create_store(output_dir, store_header(model_name, model, targets, decoding, pack))
        if pack:
            manifest = _packed(manifest, output_dir, decoding.num_workers, max_skipped_fraction)
        pending = _pending(manifest, store)
        if not pending:
            logger.info("%s already holds all %d utterances of %s", output_dir, len(manifest), manifest_path)
        else:
            _label(model_name, model, manifest, pending, store, decoding, max_skipped_fraction)
    return store


def store_header(
    model_name: str,
    model: WhisperForConditionalGeneration,
    targets: tuple[Target, ...],
    decoding: DecodingConfig,
    pack: bool = False,
) -> dict[str, Any]:
    """What a label store must know about its origin; two runs with equal headers give equal labels."""
    header: dict[str, Any] = {
        "teacher": teacher_identity(model_name, model),
        "targets": sorted(set(targets) | {"text"}),
        "decoding": {
            "language": decoding.language,
            "task": decoding.task,
            "max_new_tokens": decoding.max_new_tokens,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
    }
    chosen = {"timestamps": decoding.timestamps, "pack": pack}
    header["decoding"] |= {name: True for name, on in chosen.items() if on}  # stores of earlier versions stay valid
    if "encoder_states" in targets:
        frames, dim = model.config.max_source_positions, model.config.d_model
        header["encoder_states"] = {
            "layer": "last",
            "dtype": "float16",
            "shape": [frames, dim],
            "bytes_per_frame": 2 * dim,
        }
    return header


def _packed(manifest: Manifest, output_dir: Path, num_workers: int, max_skipped_fraction: float) -> PackedManifest:
    usable = usable_clips(
        manifest,
        output_dir,
        max_seconds=WINDOW_SECONDS,
        max_skipped_fraction=max_skipped_fraction,
        num_workers=num_workers,
    )
    packed = pack_manifest(manifest, kept=usable)
    logger.info("%d clips are packed to %d windows", len(usable), len(packed))
    return packed


def _pending(manifest: Manifest, store: LabelStore) -> list[int]:
    """Positions without a row yet. A stored row of other audio under the same id is refused."""
    labelled = {row["id"]: row["duration_seconds"] for row in store.rows()}
    pending = []
    for index, (key, seconds) in enumerate(zip(manifest.ids, manifest.durations_seconds, strict=True)):
        if key not in labelled:
            pending.append(index)
        elif abs(labelled[key] - seconds) > 1e-3:
            raise LabelStoreError(
                f"{store.folder} holds utterance {key!r} of {labelled[key]:.2f} s, the manifest has {seconds:.2f} s; "
                "the labels belong to other audio, choose another output folder"
            )
    return pending


def _label(
    model_name: str,
    model: WhisperForConditionalGeneration,
    manifest: Manifest,
    pending: list[int],
    store: LabelStore,
    decoding: DecodingConfig,
    max_skipped_fraction: float,
) -> None:
    tokenizer = load_processor(model_name).tokenizer
    tokens = WhisperTokens.from_tokenizer(tokenizer, language=decoding.language, task=decoding.task)
    log_mel = WhisperLogMel(model.config.num_mel_bins).to(model.device)
    keep_states = "encoder_states" in store.header["targets"]
    if keep_states:
        num_bytes = 2 * model.config.max_source_positions * model.config.d_model
        logger.info("encoder states: %s bytes a clip, %.2f GB in all", f"{num_bytes:,}", len(pending) * num_bytes / 1e9)
    batches = clip_batches(
        manifest,
        length_sorted(manifest, pending),
        sample_rate_hz=SAMPLE_RATE_HZ,
        batch_size=decoding.batch_size,
        num_workers=decoding.num_workers,
        device=model.device,
    )
    rows: list[dict[str, Any]] = []
    arrays: dict[str, torch.Tensor] = {}
    skipped: list[dict[str, Any]] = []
    hours = manifest.durations_seconds / 3600
    started = last_write = time.monotonic()
    warm = False
    with (
        sigterm_requests() as termination,
        _progress_bar(float(hours.sum()), float(hours.sum() - hours[pending].sum())) as bar,
    ):
        for batch in batches:
            skipped += batch.skipped
            if batch.utterances:
                if not warm:  # the first pass pays for loading and kernel selection; its time is not kept
                    first = ClipBatch(batch.utterances[:1], batch.waveforms[:1])
                    _label_batch(model, log_mel, first, tokens, tokenizer, decoding)
                    warm = True
                new_rows, states = _label_batch(model, log_mel, batch, tokens, tokenizer, decoding)
                rows += new_rows
                if keep_states:
                    arrays.update({row["id"]: state for row, state in zip(new_rows, states.half().cpu(), strict=True)})
            is_due = len(rows) >= SHARD_UTTERANCES or time.monotonic() - last_write > SHARD_SECONDS
            if rows and (is_due or termination.received):
                store.write_shard(rows, arrays)
                rows, arrays, last_write = [], {}, time.monotonic()
            bar.update(sum(utterance["duration_seconds"] for utterance in batch.utterances) / 3600)
            bar.set_postfix_str(f"{(bar.n - bar.initial) / (time.monotonic() - started):.5f} audio-h/s")
            if termination.received:
                raise Preempted(f"stopped by SIGTERM; what is labelled is in {store.folder}, the same command resumes")
    if rows:
        store.write_shard(rows, arrays)
    if skipped or not isinstance(manifest, PackedManifest):  # else skipped.jsonl names the clips that were not packed
        report_skipped(skipped, len(manifest), store.folder, max_skipped_fraction)


def _label_batch(
    model: WhisperForConditionalGeneration,
    log_mel: WhisperLogMel,
    batch: ClipBatch,
    tokens: WhisperTokens,
    tokenizer: Any,
    decoding: DecodingConfig,
) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """Rows and encoder states, (batch, frames, dim), of one batch; `compute_seconds` is shared evenly by its clips."""
    started = _synchronized_time(model.device)
    with torch.no_grad():
        states = model.model.encoder(log_mel(batch.waveforms).to(model.dtype)).last_hidden_state
    decoded = greedy_decode(
        model,
        states,
        tokens,
        language=decoding.language,
        task=decoding.task,
        max_new_tokens=decoding.max_new_tokens,
        timestamps=decoding.timestamps,
    )
    seconds = (_synchronized_time(model.device) - started) / len(decoded)
    rows = []
    for utterance, result in zip(batch.utterances, decoded, strict=True):
        text = tokenizer.decode(result.token_ids, skip_special_tokens=True).strip()
        rows.append(
            {
                "id": utterance["id"],
                "duration_seconds": utterance["duration_seconds"],
                "text": text,
                "token_ids": result.token_ids,
                "mean_logprob": result.mean_logprob,
                "compression_ratio": compression_ratio(text),
                "no_speech_prob": result.no_speech_prob,
                "finished": result.finished,
                "compute_seconds": seconds,
            }
        )
        if "parts" in utterance:
            names = ("id", "start_seconds", "duration_seconds")
            parts = [{name: part[name] for name in names} for part in utterance["parts"]]
            rows[-1] |= {"previous_id": utterance["previous_id"], "parts": parts}
    return rows, states


def _synchronized_time(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _progress_bar(total_hours: float, done_hours: float) -> tqdm:
    return tqdm(
        total=round(total_hours, 6),
        initial=round(done_hours, 6),
        unit="audio-h",
        desc="label",
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.3f}/{total:.3f} audio-h [{elapsed}<{remaining}{postfix}]",
    )
