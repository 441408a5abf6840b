"""Pseudo-labels: greedy transcripts of a manifest, written to a label store."""

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm
from transformers import WhisperForConditionalGeneration

from speechkd.data.audit import usable_clips
from speechkd.data.features import SAMPLE_RATE_HZ
from speechkd.data.hub import read_utterances
from speechkd.data.loader import clip_batches, length_sorted, report_skipped
from speechkd.data.manifest import Manifest
from speechkd.data.packing import WINDOW_SECONDS, PackedManifest, pack_manifest
from speechkd.files import folder_lock
from speechkd.labels.decoder_state_labels import decoder_states_header
from speechkd.labels.decoding import DecodingConfig
from speechkd.labels.labeller import Labeller, Target
from speechkd.labels.teacher_cache import LabelStore, LabelStoreError, create_store
from speechkd.labels.topk_labels import TOPK
from speechkd.labels.topk_records import topk_header
from speechkd.preemption import Preempted, sigterm_requests
from speechkd.teachers import load_whisper, teacher_identity

logger = logging.getLogger(__name__)

Engine = Literal["local", "ray"]
SHARD_UTTERANCES = 256
SHARD_SECONDS = 30.0  # a kill loses at most this much work


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
    engine: Engine = "local",
    num_actors: int | None = None,
) -> LabelStore:
    """Transcribe a manifest with a Whisper and keep what it says, carrying on where an earlier call stopped.

    A row holds `id, duration_seconds, text, token_ids, mean_logprob, compression_ratio, no_speech_prob, finished,
    compute_seconds`; with "encoder_states" the store also has the last encoder states, (frames, dim), float16, with
    "topk" the teacher's likeliest ids at each token of its label, to be read by `topk_records.read_topk`, and with
    "decoder_states" its last decoder states there, by `decoder_state_labels.read_decoder_states`. With `pack`, clips
    are joined to windows of up to 30 s: `id` and `previous_id` are those of `pack_manifest`, and `parts` holds
    `id, start_seconds, duration_seconds` of the clips.

    Args:
        model_name: Hub id, folder or `bundled:<name>`.
        manifest_path: JSONL manifest.
        output_dir: label store; created or continued.
        decoding: language and limits.
        targets: what to store; "text" is always there.
        pack: label windows of joined clips, a third of the work for clips of 8 s; each clip is decoded once more
            beforehand, so that a bad one does not take its neighbours along.
        max_skipped_fraction: share of clips that may be undecodable, 0 to 1.
        device: where the model runs; by default CUDA if there is one. Workers on Ray choose it themselves.
        engine: "local" is this process, "ray" many workers and machines; each can go on with what the other began.
        num_actors: workers on Ray; None takes one for each GPU, or else one for each machine.

    Returns:
        The finished store.

    Raises:
        ManifestError, LabelStoreError, AudioError: see their modules.
        ValueError: a language that the teacher does not know, or Ray is not installed.
        Preempted: SIGTERM came; the batches before it are stored.
    """
    if engine == "local" and num_actors is not None:
        raise ValueError(f"num_actors={num_actors} is for engine ray; leave it out, or pass --engine ray")
    output_dir = Path(output_dir)
    manifest = read_utterances(manifest_path)
    label: Callable[[Manifest, list[int], LabelStore, float], None]
    with folder_lock(output_dir):
        if engine == "ray":
            from speechkd.labels.ray_engine import RayWorkers  # Ray is optional

            workers = RayWorkers(model_name, decoding, num_actors)
            header = workers.header(targets, pack)
            label = workers.label
        else:
            device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            model = load_whisper(model_name, device=device)
            label = partial(_label, Labeller(model_name, model, decoding))
            header = store_header(model_name, model, targets, decoding, pack)
        store = create_store(output_dir, header)  # after all that refuses a wrong language
        if pack:
            manifest = pack_usable(manifest, output_dir, decoding.num_workers, max_skipped_fraction)
        pending = pending_positions(manifest, store)
        if not pending:
            logger.info("%s already holds all %d utterances of %s", output_dir, len(manifest), manifest_path)
        else:
            label(manifest, pending, store, max_skipped_fraction)
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
    if "topk" in targets:
        header["topk"] = topk_header(TOPK, model.config.vocab_size)
    if "decoder_states" in targets:
        header["decoder_states"] = decoder_states_header(model.config.d_model)
    return header


def pack_usable(manifest: Manifest, output_dir: Path, num_workers: int, max_skipped_fraction: float) -> PackedManifest:
    """Packs of the clips that can be decoded; the others are named in `skipped.jsonl` of the output folder.

    Raises:
        AudioError: too many cannot.
    """
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


def pending_positions(manifest: Manifest, store: LabelStore) -> list[int]:
    """Positions without a row yet, longest first, so that memory runs out at the start or not at all.

    Raises:
        LabelStoreError: the store holds an id with another duration, so with other audio.
    """
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
    return length_sorted(manifest, pending)[::-1]


def _label(
    labeller: Labeller, manifest: Manifest, pending: list[int], store: LabelStore, max_skipped_fraction: float
) -> None:
    targets = store.header["targets"]  # of an earlier call, they may be more
    if "encoder_states" in targets:
        num_bytes = 2 * labeller.model.config.max_source_positions * labeller.model.config.d_model
        logger.info("encoder states: %s bytes a clip, %.2f GB in all", f"{num_bytes:,}", len(pending) * num_bytes / 1e9)
    batches = clip_batches(
        manifest,
        pending,
        sample_rate_hz=SAMPLE_RATE_HZ,
        batch_size=labeller.num_clips,
        max_seconds=labeller.window_seconds,
        num_workers=labeller.decoding.num_workers,
        device=labeller.model.device,
    )
    with sigterm_requests() as termination, ShardWriter(store, manifest, pending, max_skipped_fraction) as writer:
        for batch in batches:
            rows, arrays = labeller.label(batch, targets)
            writer.add(rows, arrays, batch.skipped, write_now=termination.received)
            if termination.received:
                raise Preempted(f"stopped by SIGTERM; what is labelled is in {store.folder}, the same command resumes")


class ShardWriter:
    """Takes rows as they come, commits them shard by shard, and shows progress; a context manager.

    Where its block ends without an error, the rest is written and skipped clips are reported.

    Args:
        store: where shards go.
        manifest: all utterances.
        pending: positions of those that are to come.
        max_skipped_fraction: share of clips that may be undecodable, 0 to 1.
    """

    def __init__(self, store: LabelStore, manifest: Manifest, pending: list[int], max_skipped_fraction: float) -> None:
        self.store, self.manifest, self.max_skipped_fraction = store, manifest, max_skipped_fraction
        self.rows: list[dict[str, Any]] = []
        self.arrays: dict[str, torch.Tensor] = {}
        self.skipped: list[dict[str, Any]] = []
        hours = manifest.durations_seconds / 3600
        self.bar = _progress_bar(float(hours.sum()), float(hours.sum() - hours[pending].sum()))
        self.started = self.last_write = time.monotonic()

    def add(
        self,
        rows: list[dict[str, Any]],
        arrays: dict[str, torch.Tensor],
        skipped: list[dict[str, Any]],
        *,
        write_now: bool = False,
    ) -> None:
        """Take one batch.

        Args:
            rows: of its labelled clips.
            arrays: by id; empty where the store keeps none.
            skipped: rows of `skipped.jsonl`.
            write_now: commit without waiting for a full shard.
        """
        self.rows += rows
        self.arrays |= arrays
        self.skipped += skipped
        is_due = len(self.rows) >= SHARD_UTTERANCES or time.monotonic() - self.last_write > SHARD_SECONDS
        if self.rows and (is_due or write_now):
            self._write()
        self.bar.update(sum(row["duration_seconds"] for row in rows) / 3600)
        audio_hours = (self.bar.n - self.bar.initial) / (time.monotonic() - self.started)
        self.bar.set_postfix_str(f"{audio_hours:.5f} audio-h/s")

    def _write(self) -> None:
        self.store.write_shard(self.rows, self.arrays)
        self.rows, self.arrays, self.last_write = [], {}, time.monotonic()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self.bar.close()
        if error_type is not None:
            return
        if self.rows:
            self._write()
        # of packs, skipped.jsonl names the clips that were left out before
        if self.skipped or not isinstance(self.manifest, PackedManifest):
            report_skipped(self.skipped, len(self.manifest), self.store.folder, self.max_skipped_fraction)


def _progress_bar(total_hours: float, done_hours: float) -> tqdm:
    return tqdm(
        total=round(total_hours, 6),
        initial=round(done_hours, 6),
        unit="audio-h",
        desc="label",
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.3f}/{total:.3f} audio-h [{elapsed}<{remaining}{postfix}]",
    )
