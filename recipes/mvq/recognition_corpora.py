"""The clips that a recogniser trains on: what is said in each, as symbols, and what the teacher makes of it."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from teacher_targets import Targets, collate_targets
from torch import Tensor
from torch.utils.data import Dataset

from speechkd.data.audio import load_utterance
from speechkd.data.audit import usable_clips
from speechkd.data.features import SAMPLE_RATE_HZ
from speechkd.data.loader import pad_waveforms
from speechkd.data.manifest import Manifest
from speechkd.labels.filters import FilterConfig, apply_filters
from speechkd.labels.teacher_cache import LabelStore, LabelStoreError
from speechkd.metrics.normalizers import Normalizer
from speechkd.models.ctc_head import frames_needed
from speechkd.models.recognizer import RecognizerConfig
from speechkd.models.recognizer_tokens import Tokens

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class DataConfig:
    """Manifests, what is said in them, and batches.

    Args:
        train_manifest: utterances to train on, a manifest or `hub:NAME[:CONFIG]:SPLIT`.
        test_manifest: utterances to score on.
        dev_manifest: utterances for `trainer.eval_strategy`; null for none.
        labels_dir: folder of the label stores `train`, `test` and `dev` with transcripts; null takes the manifest's own
            text.
        label_teacher: Whisper that makes them: Hub id, folder or `bundled:<name>`.
        max_batch_seconds: padded audio seconds per device and step.
        max_skipped_fraction: share of clips that may be undecodable, without a label or without the teacher's targets
            before a run fails.
        num_workers: processes that prepare batches; 0 prepares them in the main process.
    """

    train_manifest: str
    test_manifest: str
    dev_manifest: str | None = None
    labels_dir: str | None = None
    label_teacher: str = "bundled:whisper-base"
    max_batch_seconds: float = 160.0
    max_skipped_fraction: float = 0.01
    num_workers: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.max_batch_seconds < math.inf:
            raise ValueError(f"data.max_batch_seconds must be a positive number, got {self.max_batch_seconds}")
        if not 0 <= self.max_skipped_fraction <= 1:
            raise ValueError(f"data.max_skipped_fraction must be 0 to 1, got {self.max_skipped_fraction}")
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers must be 0 or more, got {self.num_workers}")


@dataclass(kw_only=True)
class TokensConfig:
    """What the student writes.

    Args:
        kind: characters, or bpe for pieces of words, which want much text.
        num_symbols: of bpe, at most.
        normalizer: applied to the texts before.
    """

    kind: Literal["characters", "bpe"] = "characters"
    num_symbols: int = 500
    normalizer: Normalizer = "basic"

    def make(self, texts: Sequence[str]) -> Tokens:
        """Symbols of these texts."""
        if self.kind == "bpe":
            return Tokens.bpe(texts, self.num_symbols, self.normalizer)
        return Tokens.characters(texts, self.normalizer)


class RecognitionSet(Dataset):
    """Items are dicts with `id`, `duration_seconds`, `waveform`, `num_frames`, `target`, `epoch`, and the teacher's.

    `waveform` is (samples,), int16; `target` numbers of symbols, (symbols,), int64; what else there is, `Targets` says.

    Args:
        manifest: the utterances of the items, one each.
        targets: symbols of each.
        student: its frames.
        teacher: targets in a store; None without one.
        known: ids that the store has.
    """

    def __init__(
        self,
        manifest: Manifest,
        targets: Sequence[Tensor],
        student: RecognizerConfig,
        teacher: Targets | None = None,
        known: frozenset[str] = frozenset(),
    ) -> None:
        self.manifest, self.targets, self.student = manifest, list(targets), student
        self.teacher, self.known, self.epoch = teacher, known, 0

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def label_lengths(self) -> np.ndarray:
        """Symbols of each item, (items,), int64."""
        return np.array([len(target) for target in self.targets], dtype=np.int64)

    def set_epoch(self, epoch: int) -> None:
        """Choose which masks are drawn."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        utterance = self.manifest[index]
        waveform = load_utterance(utterance, SAMPLE_RATE_HZ, torch.int16)
        num_frames = int(self.student.num_frames(torch.tensor([len(waveform)])))
        key = utterance["id"]
        item = {
            "id": key,
            "duration_seconds": utterance["duration_seconds"],
            "waveform": waveform,
            "num_frames": num_frames,
            "target": self.targets[index],
            "epoch": self.epoch,
        }
        if self.teacher is not None:
            item |= self.teacher.stored(key, num_frames, is_known=key in self.known)
        return item


def collate_recognition(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch: `ids`, `waveforms`, (batch, samples), int16, lists `num_samples`, `num_frames` and `targets`, `epoch`.

    With stored targets also what `collate_targets` makes of them. `audio_seconds` and `padded_seconds` are for the log.
    """
    waveforms, num_samples = pad_waveforms([item["waveform"] for item in items], grid_samples=1)
    return {
        "ids": [item["id"] for item in items],
        "waveforms": waveforms,
        "num_samples": num_samples.tolist(),
        "num_frames": [item["num_frames"] for item in items],
        "targets": [item["target"] for item in items],
        "epoch": items[0]["epoch"],
        "audio_seconds": sum(item["duration_seconds"] for item in items),
        "padded_seconds": len(items) * waveforms.shape[1] / SAMPLE_RATE_HZ,
        **collate_targets(items),
    }


def spoken_texts(
    data: DataConfig, split: str, manifest: Manifest, filters: FilterConfig
) -> tuple[dict[str, str], dict[str, Any]]:
    """What is said in the utterances of a split, by id in the manifest's order, and how many have no text.

    Args:
        data: where the texts come from.
        split: "train" or "dev".
        manifest: its utterances.
        filters: which transcripts of a label store are good enough.

    Raises:
        ValueError: no utterance has a text, or too many lack a label.
        LabelStoreError: the store is missing, or its labels are of windows.
    """
    said: dict[str, str | None] = dict(zip(manifest.ids, manifest.rows["text"][:], strict=True))
    report: dict[str, Any] = {}
    if data.labels_dir is not None:
        store = LabelStore(Path(data.labels_dir) / split)
        if store.header.get("decoding", {}).get("pack", False):
            raise LabelStoreError(f"the labels in {store.folder} are of windows (--pack); label the clips one by one")
        rows = [{**row, "reference": said[row["id"]]} for row in store.rows() if row["id"] in said]
        check_share(len(manifest) - len(rows), manifest, f"no label in {store.folder}", data)
        passed, filter_report = apply_filters(rows, filters)
        for line in filter_report.lines():
            logger.info("%s", line)
        report["filters"] = filter_report.as_dict()
        labels = {row["id"]: row["text"] for row in passed}
        said = {key: labels.get(key) for key in manifest.ids}
    texts = {key: text for key, text in said.items() if text is not None and text.strip()}
    if not texts:
        raise ValueError(
            f"none of {len(manifest)} utterances of {manifest.path} has a text; "
            + ("set data.labels_dir and label it" if data.labels_dir is None else f"look at {data.labels_dir}/{split}")
        )
    return texts, {**report, "num_without_text": len(manifest) - len(texts)}


def build_set(
    manifest: Manifest,
    texts: dict[str, str],
    tokens: Tokens,
    student: RecognizerConfig,
    data: DataConfig,
    output_dir: Path,
    teacher: Targets | None = None,
) -> tuple[RecognitionSet, dict[str, int]]:
    """The clips of a split that can be trained on, and how many were left out and why.

    Args:
        manifest: all of them.
        texts: what is said, by id.
        tokens: symbols of the student.
        student: its frames.
        data: limits.
        output_dir: folder of `skipped.jsonl`.
        teacher: targets in a store; None without one. Clips that it lacks learn from their texts alone.

    Raises:
        ValueError: no clip is left, or too many lack targets.
        AudioError: too many cannot be decoded.
        LabelStoreError: clips of the store have other lengths.
    """
    usable = usable_clips(
        manifest,
        output_dir,
        max_seconds=data.max_batch_seconds,
        max_skipped_fraction=data.max_skipped_fraction,
        num_workers=data.num_workers,
    )
    num_samples = torch.tensor([round(seconds * SAMPLE_RATE_HZ) for seconds in manifest.durations_seconds])
    num_frames, ids = student.num_frames(num_samples).tolist(), manifest.ids
    chosen, targets, num_unreadable, num_too_fast = [], [], 0, 0
    for position in usable:
        if (text := texts.get(ids[position])) is None:
            continue
        if tokens.unknown(text) or not len(target := tokens.encode(text)):
            num_unreadable += 1
        elif num_frames[position] < max(1, frames_needed(target) if student.head == "ctc" else 1):
            num_too_fast += 1
        else:
            chosen.append(position)
            targets.append(target)
    counts = {
        "num_undecodable": len(manifest) - len(usable),
        "num_unreadable": num_unreadable,
        "num_too_fast": num_too_fast,
    }
    if num_unreadable or num_too_fast:
        logger.warning(
            "of %d clips of %s, %d have texts that the student's symbols cannot write, and %d fewer frames than "
            "symbols; they are left out",
            len(manifest),
            manifest.path,
            num_unreadable,
            num_too_fast,
        )
    if not chosen:
        raise ValueError(f"no clip of {manifest.path} can be trained on: {counts}; look at its texts and durations")
    kept = manifest.select(chosen)
    known: frozenset[str] = frozenset()
    if teacher is not None:
        assert teacher.store is not None
        rows = {row["id"]: int(row["num_frames"]) for row in teacher.store.rows()}
        known = frozenset(kept.ids) & rows.keys()
        counts["num_without_targets"] = len(kept) - len(known)
        check_share(len(kept) - len(known), kept, f"no targets of the teacher in {teacher.store.folder}", data)
        teacher.check_lengths({ids[position]: num_frames[position] for position in chosen}, rows)
    return RecognitionSet(kept, targets, student, teacher, known), counts


def check_share(missing: int, manifest: Manifest, what: str, data: DataConfig) -> None:
    """Count utterances that lack something.

    Raises:
        ValueError: they are more than `data.max_skipped_fraction`.
    """
    if not missing:
        return
    summary = f"{missing} of {len(manifest)} utterances of {manifest.path} have {what}"
    if missing > data.max_skipped_fraction * len(manifest):
        raise ValueError(
            f"{summary}, more than data.max_skipped_fraction={data.max_skipped_fraction}; finish the stage that writes "
            "it (run.sh), look at skipped.jsonl there, or raise the limit"
        )
    logger.warning("%s", summary)
