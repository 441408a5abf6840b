"""All layers of a frozen encoder on the clips of a manifest: computed once, kept on disk, memory-mapped when read.

A folder of features has one label store for each encoder, kind and manifest: see `features_folder`. A store holds one
array a clip, (layers, frames, width), float16, with the frames of the clip alone, never of padding. The first layer is
what the first block hears. Of tasks whose head is linear up to the mean over frames, only that mean needs to be kept:
(layers, 1, width).
"""

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from speechkd.data.features import SAMPLE_RATE_HZ
from speechkd.data.loader import ClipBatch, clip_batches, skipped_row
from speechkd.data.manifest import Manifest
from speechkd.files import folder_lock
from speechkd.frame_encoders import MAX_CLIP_SECONDS, FrameEncoder
from speechkd.labels.pseudo_label import ShardWriter, pending_positions
from speechkd.labels.teacher_cache import LabelStore, create_store
from speechkd.preemption import Preempted, sigterm_requests

SHARD_BYTES = 512 * 2**20  # that wait in memory for their shard


class FrameStates:
    """States of clips by their ids, as batches for a head.

    Args:
        arrays: id to states (layers, frames, width), such as `stored_states`.

    Raises:
        ValueError: there is no clip.
    """

    def __init__(self, arrays: Mapping[str, Tensor]) -> None:
        if not arrays:
            raise ValueError("there are no states to probe; look at skipped.jsonl in the folder of features")
        self.arrays = arrays
        self.num_layers, _, self.width = arrays[next(iter(arrays))].shape

    def __contains__(self, utterance_id: str) -> bool:
        return utterance_id in self.arrays

    def batch(self, ids: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States padded with zeros, (batch, layers, frames, width), and the mask of real frames, (batch, frames)."""
        clips = [self.arrays[key].transpose(0, 1) for key in ids]
        padded = pad_sequence(clips, batch_first=True).transpose(1, 2)
        lengths = torch.tensor([len(clip) for clip in clips])
        return padded, torch.arange(padded.shape[2]) < lengths[:, None]

    def means(self, ids: Iterable[str]) -> "FrameStates":
        """Means over the frames of these clips, in memory."""
        return FrameStates({key: self.arrays[key].float().mean(dim=1, keepdim=True) for key in ids})


class _StoredArrays(Mapping[str, Tensor]):
    def __init__(self, stores: Sequence[LabelStore]) -> None:
        self.stores = {row["id"]: store for store in stores for row in store.rows()}

    def __getitem__(self, utterance_id: str) -> Tensor:
        return self.stores[utterance_id].array(utterance_id)

    def __contains__(self, utterance_id: object) -> bool:
        return utterance_id in self.stores

    def __iter__(self) -> Iterator[str]:
        return iter(self.stores)

    def __len__(self) -> int:
        return len(self.stores)


def stored_states(stores: Sequence[LabelStore]) -> FrameStates:
    """The states of several stores of one encoder, memory-mapped.

    Raises:
        ValueError: there is none.
    """
    return FrameStates(_StoredArrays(stores))


def features_folder(features_dir: str | Path, encoder: FrameEncoder, manifest: Manifest, *, mean: bool) -> Path:
    """Where the states of a manifest are kept: a folder for its encoder and kind, in it one for the manifest's file."""
    kind = "mean" if mean else "frames"
    window = f"{encoder.max_seconds:g}s" if encoder.max_seconds < MAX_CLIP_SECONDS else "whole"
    path = Path(manifest.path)
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    window += "" if encoder.grid_seconds is None else f"-grid{encoder.grid_seconds:g}"
    layers = (
        f"{encoder.num_layers}layers" if encoder.layers is None else "-".join(["layers", *map(str, encoder.layers)])
    )
    identity = f"{encoder.identity['weights_sha256'][:16]}-{layers}-float16-{window}-{kind}"
    return Path(features_dir) / identity / f"{path.stem}-{place}"


def store_states(
    encoder: FrameEncoder, manifest: Manifest, features_dir: str | Path, *, mean: bool = False, **options: Any
) -> LabelStore:
    """`fill_states` in the folder that `features_folder` names.

    Args:
        encoder: of `load_frame_encoder`.
        manifest: the clips.
        features_dir: see `features_folder`.
        mean: keep the mean over frames alone.
        options: of `fill_states`.
    """
    folder = features_folder(features_dir, encoder, manifest, mean=mean)
    return fill_states(encoder, manifest, folder, mean=mean, **options)


def fill_states(
    encoder: FrameEncoder,
    manifest: Manifest,
    folder: Path,
    *,
    mean: bool = False,
    batch_size: int = 8,
    num_workers: int = 0,
    max_skipped_fraction: float = 0.01,
    device: torch.device | str = "cpu",
) -> LabelStore:
    """Compute the states that are not on disk yet; what a killed run has finished is kept.

    Clips that cannot be decoded, are too short for a frame or too long for the window are named in `skipped.jsonl`.

    Args:
        encoder: of `load_frame_encoder`.
        manifest: the clips.
        folder: the label store; created or continued.
        mean: keep the mean over frames alone.
        batch_size: clips encoded together, see `FrameEncoder.hears_alike`.
        num_workers: processes that decode audio.
        max_skipped_fraction: share of clips that may be skipped, 0 to 1.
        device: where the encoder is.

    Returns:
        The store; rows hold `id, duration_seconds, num_frames`.

    Raises:
        ValueError: the disk is too small, or states are beyond float16 or not finite.
        AudioError: too many clips were skipped.
        Preempted: SIGTERM came; the batches before it are stored.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    header = {
        "teacher": encoder.identity,
        "targets": ["hidden_states"],
        "hidden_states": {
            "layers": encoder.num_layers if encoder.layers is None else list(encoder.layers),
            "width": encoder.width,
            "frame_rate_hz": encoder.frames_per_second,
            "dtype": "float16",
            "mean": mean,
            "max_seconds": encoder.max_seconds,
            **({} if encoder.grid_seconds is None else {"grid_seconds": encoder.grid_seconds}),
        },
    }
    with folder_lock(folder):
        store = create_store(folder, header)
        pending = pending_positions(manifest, store)
        if not pending:
            return store
        _check_disk(encoder, manifest, pending, folder, mean)
        batches = clip_batches(
            manifest,
            pending,
            sample_rate_hz=SAMPLE_RATE_HZ,
            batch_size=1,  # so that nothing is padded and lengths are known
            max_seconds=encoder.max_seconds,
            num_workers=num_workers,
        )
        with sigterm_requests() as termination, ShardWriter(store, manifest, pending, max_skipped_fraction) as writer:
            for clips, skipped in clip_groups(batches, encoder, batch_size):
                rows, arrays = _states_of(encoder, clips, mean, device) if clips else ([], {})
                waiting = sum(array.nbytes for array in (*writer.arrays.values(), *arrays.values()))
                writer.add(rows, arrays, skipped, write_now=termination.received or waiting > SHARD_BYTES)
                if termination.received:
                    raise Preempted(f"stopped by SIGTERM; finished states are in {folder}, the same command resumes")
    return LabelStore(folder)


def open_states(encoder: FrameEncoder, manifest: Manifest, features_dir: str | Path) -> FrameStates:
    """The states that `store_states` has kept of all these clips.

    Raises:
        ValueError: some have none.
    """
    folder = features_folder(features_dir, encoder, manifest, mean=False)
    known = {row["id"] for row in LabelStore(folder).rows()} if (folder / "header.json").is_file() else set()
    if missing := [key for key in manifest.ids if key not in known]:
        raise ValueError(
            f"{len(missing)} of {len(manifest)} clips of {manifest.path} have no states in {folder}, the first is "
            f"{missing[0]!r}; store them first"
        )
    return stored_states([LabelStore(folder)])


Clip = tuple[dict[str, Any], Tensor]


def clip_groups(
    batches: Iterable[ClipBatch], encoder: FrameEncoder, batch_size: int
) -> Iterator[tuple[list[Clip], list[dict[str, Any]]]]:
    """Clips to encode together, and rows of those to skip."""
    group: list[Clip] = []
    skipped: list[dict[str, Any]] = []
    for batch in batches:
        skipped += batch.skipped
        for utterance, waveform in zip(batch.utterances, batch.waveforms, strict=True):
            if len(waveform) < encoder.min_samples:
                reason = (
                    f"utterance {utterance['id']!r}: {len(waveform)} samples at 16 kHz are no frame, which takes "
                    f"{encoder.min_samples}; leave it out of the manifest"
                )
                skipped.append(skipped_row(utterance, reason))
                continue
            if len(group) == batch_size or (group and not encoder.hears_alike(len(waveform), len(group[0][1]))):
                yield group, skipped
                group, skipped = [], []
            group.append((utterance, waveform))
    if group or skipped:
        yield group, skipped


@torch.no_grad()
def _states_of(
    encoder: FrameEncoder, clips: list[Clip], mean: bool, device: torch.device | str
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    waveforms = pad_sequence([waveform for _, waveform in clips], batch_first=True)
    num_samples = torch.tensor([len(waveform) for _, waveform in clips])
    states, num_frames = encoder.encode(waveforms.to(device), num_samples)
    rows, arrays = [], {}
    for (utterance, _), clip_states, frames in zip(clips, states, num_frames.tolist(), strict=True):
        real = clip_states[:, :frames].float()
        stored = (real.mean(dim=1, keepdim=True) if mean else real).half().cpu()
        if not stored.isfinite().all():
            raise ValueError(
                f"states of utterance {utterance['id']!r} reach {real.abs().max().item():g} in "
                f"{encoder.identity['name']}, and float16, in which they are kept, ends at "
                f"{torch.finfo(torch.float16).max:g}; look at its weights, or take an encoder with smaller states"
            )
        arrays[utterance["id"]] = stored
        rows.append(
            {"id": utterance["id"], "duration_seconds": utterance["duration_seconds"], "num_frames": int(frames)}
        )
    return rows, arrays


def _check_disk(encoder: FrameEncoder, manifest: Manifest, pending: list[int], folder: Path, mean: bool) -> None:
    seconds = manifest.durations_seconds[pending]
    num_frames = len(pending) if mean else float((seconds * encoder.frames_per_second + 1).sum())
    needed, free = 2 * num_frames * encoder.num_layers * encoder.width, shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"states of {len(pending)} clips, {seconds.sum() / 3600:.1f} h, need {needed / 1e9:.1f} GB in {folder}, "
            f"where {free / 1e9:.1f} GB are free; choose a larger disk with --features-dir, or a smaller manifest"
        )
