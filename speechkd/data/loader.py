"""Clips of a manifest as padded waveform batches; clips that cannot be decoded are set aside, not lost."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from speechkd.data.audio import AudioError, load_utterance
from speechkd.data.manifest import Manifest
from speechkd.files import write_jsonl

logger = logging.getLogger(__name__)


@dataclass
class ClipBatch:
    """Decoded clips.

    Args:
        utterances: manifest rows of the clips that could be decoded.
        waveforms: their samples, zero-padded, (batch, samples), float32.
        skipped: `id`, `audio` and `reason` of the others.
    """

    utterances: list[dict[str, Any]] = field(default_factory=list)
    waveforms: Tensor = field(default_factory=lambda: torch.zeros(0, 1))
    skipped: list[dict[str, Any]] = field(default_factory=list)


class _Clips(Dataset):
    def __init__(self, manifest: Manifest, indices: Sequence[int], sample_rate_hz: int, max_seconds: float) -> None:
        self.manifest, self.indices = manifest, indices
        self.sample_rate_hz, self.max_seconds = sample_rate_hz, max_seconds

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[dict[str, Any], Tensor | str]:
        utterance = self.manifest[self.indices[position]]
        try:
            if utterance["duration_seconds"] > self.max_seconds:
                raise AudioError(
                    f"utterance {utterance['id']!r}: lasts {utterance['duration_seconds']:.1f} s, longer than the "
                    f"{self.max_seconds:.0f} s that the model takes; cut it into shorter clips"
                )
            waveform = load_utterance(utterance, self.sample_rate_hz)
        except AudioError as error:
            return utterance, str(error)
        return utterance, waveform[: round(self.max_seconds * self.sample_rate_hz)]


def _collate(items: list[tuple[dict[str, Any], Tensor | str]]) -> ClipBatch:
    good = [(utterance, clip) for utterance, clip in items if isinstance(clip, Tensor)]
    skipped = [
        {"id": utterance["id"], "audio": utterance["audio"], "reason": reason}
        for utterance, reason in items
        if isinstance(reason, str)
    ]
    if not good:
        return ClipBatch(skipped=skipped)
    utterances, waveforms = zip(*good, strict=True)
    return ClipBatch(list(utterances), pad_sequence(list(waveforms), batch_first=True), skipped)


def clip_batches(
    manifest: Manifest,
    indices: Sequence[int],
    *,
    sample_rate_hz: int,
    batch_size: int,
    max_seconds: float = 30.0,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[ClipBatch]:
    """Decode utterances in batches.

    Args:
        manifest: the utterances.
        indices: which of them, in the order wanted.
        sample_rate_hz: rate of the waveforms.
        batch_size: clips per batch.
        max_seconds: longer clips are set aside.
        num_workers: decoding processes; 0 decodes in this one.
        device: where the waveforms go.

    Yields:
        Batches with waveforms on `device`.
    """
    on_cuda = torch.device(device).type == "cuda"
    loader = DataLoader(
        _Clips(manifest, indices, sample_rate_hz, max_seconds),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=on_cuda,
    )
    for batch in loader:
        batch.waveforms = batch.waveforms.to(device, non_blocking=on_cuda)
        yield batch


def report_skipped(
    skipped: list[dict[str, Any]], num_utterances: int, output_dir: str | Path, max_skipped_fraction: float
) -> None:
    """Name skipped clips in `skipped.jsonl`, and stop when there are too many.

    Args:
        skipped: rows with `id`, `audio` and `reason`.
        num_utterances: clips that were asked for.
        output_dir: folder of `skipped.jsonl`; without skipped clips the file is removed.
        max_skipped_fraction: share of clips that may be missing, 0 to 1.

    Raises:
        AudioError: more were skipped.
    """
    path = Path(output_dir) / "skipped.jsonl"
    if not skipped:
        path.unlink(missing_ok=True)
        return
    write_jsonl(path, skipped)
    fraction = len(skipped) / num_utterances
    summary = f"{len(skipped)} of {num_utterances} clips ({100 * fraction:.1f} %) were skipped and are named in {path}"
    if fraction > max_skipped_fraction:
        raise AudioError(
            f"{summary}; at most {100 * max_skipped_fraction:.1f} % may be (max_skipped_fraction). "
            f"First: {skipped[0]['reason']}"
        )
    logger.warning("%s. First: %s", summary, skipped[0]["reason"])


def length_sorted(manifest: Manifest, indices: Sequence[int]) -> list[int]:
    """These positions ordered by duration, so that batches pad little and decode equally long."""
    durations = manifest.durations_seconds
    return sorted(indices, key=lambda index: (durations[index], index))
