"""The clips that a compact encoder is distilled on. Audio is all that it needs: labels are never read."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import TrainingArguments

from speechkd.data.audio import load_utterance
from speechkd.data.audit import usable_clips
from speechkd.data.augment import utterance_random, utterance_seed
from speechkd.data.features import SAMPLE_RATE_HZ, WhisperWindow
from speechkd.data.hub import read_utterances
from speechkd.data.loader import pad_waveforms
from speechkd.data.manifest import Manifest
from speechkd.data.mixture import Mixture
from speechkd.data.sampler import DurationBatchSampler
from speechkd.losses.layerwise import span_mask

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class DataConfig:
    """Manifests and batches.

    Args:
        train_manifest: utterances to train on, a manifest or `hub:NAME[:CONFIG]:SPLIT`.
        test_manifest: utterances that the data script makes beside them, for probing.
        dev_manifest: utterances for `trainer.eval_strategy`; null for none.
        crop_seconds: longer clips are cropped to this, at a place drawn anew in each epoch.
        max_batch_seconds: padded audio seconds per device and step.
        max_batch_size: clips per device and step at most; null leaves it to the seconds.
        extra_manifests: more of them to train on, of other ids; each epoch has all clips once.
        max_skipped_fraction: share of a manifest's clips that may be undecodable before a run fails.
        num_workers: processes that prepare batches; 0 prepares them in the main process.
    """

    train_manifest: str
    test_manifest: str | None = None
    dev_manifest: str | None = None
    crop_seconds: float = 15.6
    max_batch_seconds: float = 160.0
    max_batch_size: int | None = None
    extra_manifests: list[str] = field(default_factory=list)
    max_skipped_fraction: float = 0.01
    num_workers: int = 0

    def __post_init__(self) -> None:
        for name in ("crop_seconds", "max_batch_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"data.{name} must be a positive number, got {getattr(self, name)}")
        if self.crop_seconds > self.max_batch_seconds:
            raise ValueError(
                f"data.crop_seconds={self.crop_seconds:g} is more than data.max_batch_seconds="
                f"{self.max_batch_seconds:g}, so a long clip fits no batch; lower the one or raise the other"
            )
        if self.max_batch_size is not None and self.max_batch_size < 1:
            raise ValueError(f"data.max_batch_size must be 1 or more, got {self.max_batch_size}; null sets no bound")
        if not 0 <= self.max_skipped_fraction <= 1:
            raise ValueError(f"data.max_skipped_fraction must be 0 to 1, got {self.max_skipped_fraction}")
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers must be 0 or more, got {self.num_workers}")

    @property
    def train_manifests(self) -> list[str]:
        """All that is trained on."""
        return [self.train_manifest, *self.extra_manifests]


class ClipSet(Dataset):
    """Items are dicts with `id`, `duration_seconds` (after cropping), `waveform`, (samples,), int16, and `spans_seed`.

    With `states`, by id the teacher's states of whole clips, (layers, frames, width), they have those too.

    Args:
        manifest: the utterances of the items, one each.
        crop_seconds: see `DataConfig`.
        shortest_samples: a clip that is shorter than its manifest says gets silence up to this.
        seed: of the crops and of the spans that are hidden.
    """

    def __init__(self, manifest: Manifest, crop_seconds: float, *, shortest_samples: int = 1, seed: int = 0) -> None:
        self.manifest, self.seed, self.epoch = manifest, seed, 0
        self.states: Mapping[str, Tensor] | None = None
        self.max_samples, self.shortest_samples = round(crop_seconds * SAMPLE_RATE_HZ), shortest_samples

    def __len__(self) -> int:
        return len(self.manifest)

    @property
    def durations_seconds(self) -> np.ndarray:
        """Of each item, after cropping, (items,)."""
        return np.minimum(self.manifest.durations_seconds, self.max_samples / SAMPLE_RATE_HZ)

    def set_epoch(self, epoch: int) -> None:
        """Choose where long clips are cropped, and which spans are hidden."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        utterance = self.manifest[index]
        key = utterance["id"]
        waveform = load_utterance(utterance, SAMPLE_RATE_HZ, torch.int16)
        spare = len(waveform) - self.max_samples
        if spare > 0:
            start = utterance_random(self.seed, self.epoch, key, "crop").randint(0, spare)
            waveform = waveform[start : start + self.max_samples]
        waveform = F.pad(waveform, (0, max(0, self.shortest_samples - len(waveform))))
        item = {
            "id": key,
            "duration_seconds": len(waveform) / SAMPLE_RATE_HZ,
            "waveform": waveform,
            "spans_seed": utterance_seed(self.seed, self.epoch, key, "spans"),
        }
        return item if self.states is None else {**item, "states": self.states[key]}


class JoinedClips(Mixture):
    """The clips of several manifests, one behind the other; `datasets` are their `ClipSet`s."""

    @property
    def durations_seconds(self) -> np.ndarray:
        """Of each item, after cropping, (items,)."""
        return np.concatenate([clips.durations_seconds for clips in self.datasets])  # type: ignore[attr-defined]


def clip_sets(*sets: ClipSet | JoinedClips | None) -> list[ClipSet]:
    """The sets of single manifests that these are made of."""
    parts: list[Any] = []
    for clips in filter(None, sets):
        parts += clips.datasets if isinstance(clips, JoinedClips) else [clips]
    return parts


@dataclass(frozen=True)
class SpanDraws:
    """Spans to hide from the student, drawn for each clip from its own seed: workers and resumed runs agree.

    Args:
        num_frames: lengths in samples, (clips,), int64, to frames.
        start_probability: see `span_mask`.
        span: see there.
    """

    num_frames: Callable[[Tensor], Tensor]
    start_probability: float
    span: int

    def __call__(self, items: Sequence[dict[str, Any]]) -> Tensor:
        """True on the frames to hide, (batch, frames), bool."""
        frames = self.num_frames(torch.tensor([len(item["waveform"]) for item in items]))
        hidden = torch.zeros(len(items), int(frames.max()), dtype=torch.bool)
        for row, item, count in zip(hidden, items, frames, strict=True):
            generator = torch.Generator().manual_seed(item["spans_seed"])
            row[: int(count)] = span_mask(
                count[None], start_probability=self.start_probability, span=self.span, generator=generator
            )[0]
        return hidden


def collate_clips(
    items: Sequence[dict[str, Any]], *, window: WhisperWindow | None = None, spans: SpanDraws | None = None
) -> dict[str, Any]:
    """A batch of clips.

    Args:
        items: of a `ClipSet`.
        window: what a Whisper computes of the longest clip, and so of each; None for encoders that hear clips as they
            are.
        spans: what is hidden from the student; None hides nothing.

    Returns:
        `ids`, `waveforms`, (batch, samples), int16, zero-padded, the list `num_samples`, with `spans` also `masked`,
        (batch, frames), bool, of items with states `states`, (batch, layers, frames, width), zero-padded, and for the
        log `audio_seconds` and `padded_seconds`.
    """
    waveforms, num_samples = pad_waveforms([item["waveform"] for item in items], grid_samples=1)
    longest_seconds = np.array([waveforms.shape[1] / SAMPLE_RATE_HZ])
    heard_seconds = longest_seconds if window is None else window.heard_seconds(longest_seconds)
    batch: dict[str, Any] = {
        "ids": [item["id"] for item in items],
        "waveforms": waveforms,
        "num_samples": num_samples.tolist(),
        "audio_seconds": sum(item["duration_seconds"] for item in items),
        "padded_seconds": len(items) * heard_seconds.item(),
    }
    if spans is not None:
        batch["masked"] = spans(items)
    if "states" in items[0]:
        states = [item["states"].transpose(0, 1) for item in items]
        batch["states"] = pad_sequence(states, batch_first=True).transpose(1, 2)
    return batch


def check_ids(manifests: Sequence[Manifest]) -> None:
    """Refuse manifests that share an id: crops and spans are drawn by it, and a clip would come twice.

    Raises:
        ValueError: names the id and both files.
    """
    places: dict[str, Path] = {}
    for manifest in manifests:
        for key in manifest.ids:
            if key in places:
                raise ValueError(
                    f"utterance id {key!r} is both in {places[key]} and in {manifest.path}; of data.train_manifest and "
                    "data.extra_manifests each clip may be in one alone, so take one out or rename its ids"
                )
            places[key] = manifest.path


def build_clips(
    manifest: Manifest, data: DataConfig, output_dir: Path, *, shortest_samples: int, seed: int
) -> tuple[ClipSet, dict[str, int]]:
    """Clips of a manifest that can be decoded and give a frame.

    Args:
        manifest: all of them.
        data: limits.
        output_dir: folder of `skipped.jsonl`, which names those that cannot be decoded.
        shortest_samples: at 16 kHz; shorter clips have no frame and are left out.
        seed: see `ClipSet`.

    Returns:
        The clips, and how many were left out: `num_undecodable` and `num_short`.

    Raises:
        ValueError: no clip is left.
        AudioError: more than `max_skipped_fraction` cannot be decoded.
    """
    usable = usable_clips(
        manifest,
        output_dir,
        max_seconds=math.inf,
        max_skipped_fraction=data.max_skipped_fraction,
        num_workers=data.num_workers,
    )
    num_samples = np.round(manifest.durations_seconds * SAMPLE_RATE_HZ)
    kept = [position for position in usable if num_samples[position] >= shortest_samples]
    num_short = len(usable) - len(kept)
    if num_short:
        logger.warning(
            "%d of %d clips of %s are shorter than %d samples, which one frame needs, and are left out",
            num_short,
            len(manifest),
            manifest.path,
            shortest_samples,
        )
    if not kept:
        raise ValueError(
            f"no clip of {manifest.path} can be trained on: of {len(manifest)}, {num_short} are shorter than "
            f"{shortest_samples} samples and {len(manifest) - len(usable)} cannot be decoded; give longer clips"
        )
    clips = ClipSet(manifest.select(kept), data.crop_seconds, shortest_samples=shortest_samples, seed=seed)
    return clips, {"num_undecodable": len(manifest) - len(usable), "num_short": num_short}


def clip_sampler(
    clips: ClipSet | JoinedClips,
    data: DataConfig,
    window: WhisperWindow | None,
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> DurationBatchSampler:
    """Batches of clips of similar length.

    Args:
        clips: the clips.
        data: limits of a batch.
        window: what a Whisper computes of clips; None for encoders that hear clips as they are.
        seed: of the shuffling.
        rank: index of this process.
        world_size: number of processes.

    Raises:
        ValueError: clips are longer than the window.
    """
    durations = clips.durations_seconds
    if window is not None and durations.max() > window.seconds:
        raise ValueError(
            f"the longest clip has {durations.max():.1f} s and the encoder hears {window.seconds:g} s; lower "
            "data.crop_seconds to that, or raise teacher.window_seconds"
        )
    return DurationBatchSampler(
        durations if window is None else window.heard_seconds(durations),
        data.max_batch_seconds,
        seed=seed,
        rank=rank,
        world_size=world_size,
        max_batch_size=data.max_batch_size,
        sort_keys=durations,
    )


class TrainingClips(NamedTuple):
    """What an encoder is trained and evaluated on.

    Args:
        train_set: its clips.
        sampler: their batches, on this process.
        dev_set: clips to evaluate on; None for none.
        dev_sampler: their batches.
        left_out: of the training clips of all manifests, see `build_clips`.
    """

    train_set: ClipSet | JoinedClips
    sampler: DurationBatchSampler
    dev_set: ClipSet | None
    dev_sampler: DurationBatchSampler | None
    left_out: dict[str, int]


def training_clips(
    data: DataConfig, arguments: TrainingArguments, *, shortest_samples: int, window: WhisperWindow | None
) -> TrainingClips:
    """Clips and batches of a run, prepared by the main process first.

    Args:
        data: manifests and limits.
        arguments: of the trainer.
        shortest_samples: see `build_clips`.
        window: see `clip_sampler`.

    Raises:
        ValueError: no clip is left, manifests share an id, or clips are longer than the window.
        AudioError: more than `max_skipped_fraction` cannot be decoded.
    """
    output_dir = Path(str(arguments.output_dir))
    build = partial(build_clips, data=data, shortest_samples=shortest_samples, seed=arguments.seed)
    dev_set = None
    with arguments.main_process_first(desc="preparing the data"):
        manifests = [read_utterances(source) for source in data.train_manifests]
        check_ids(manifests)
        folders = [output_dir, *(output_dir / f"corpus-{number}" for number in range(1, len(manifests)))]
        built = [build(manifest, output_dir=folder) for manifest, folder in zip(manifests, folders, strict=True)]
        if data.dev_manifest is not None:
            dev_set, _ = build(read_utterances(data.dev_manifest), output_dir=output_dir / "dev")
    train_set = built[0][0] if len(built) == 1 else JoinedClips([clips for clips, _ in built])
    left_out = {reason: sum(counts[reason] for _, counts in built) for reason in built[0][1]}
    sampler = clip_sampler(
        train_set,
        data,
        window,
        seed=arguments.seed,
        rank=arguments.process_index,
        world_size=arguments.world_size,
    )
    dev_sampler = None if dev_set is None else clip_sampler(dev_set, data, window)
    return TrainingClips(train_set, sampler, dev_set, dev_sampler, left_out)
