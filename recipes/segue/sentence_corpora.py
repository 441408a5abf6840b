"""The utterances that SEGUE trains on: what is said in each, the teacher's vector of it, and what the student hears."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from speechkd.data.audio import load_utterance
from speechkd.data.audit import usable_clips
from speechkd.data.features import SAMPLE_RATE_HZ, WINDOW_SAMPLES
from speechkd.data.hub import read_utterances
from speechkd.data.loader import pad_waveforms
from speechkd.data.manifest import Manifest
from speechkd.labels.embeddings import (
    check_embeddings,
    embedding_header,
    lower_states_header,
    read_embeddings,
    read_lower_states,
)
from speechkd.labels.filters import FilterConfig, apply_filters
from speechkd.labels.teacher_cache import LabelStore, LabelStoreError, check_teacher
from speechkd.models.segue import SegueEncoder
from speechkd.teachers_text import SentenceTeacher

logger = logging.getLogger(__name__)

MIN_SAMPLES = 3280  # ten frames of wav2vec 2.0, as many as its SpecAugment masks at once
SPLITS = ("train", "dev", "test")


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
        max_batch_size: clips per device and step at most; null leaves it to the seconds.
        max_skipped_fraction: share of clips that may be undecodable, or without a label in the store, before a run
            fails.
        num_workers: processes that prepare batches; 0 prepares them in the main process.
    """

    train_manifest: str
    test_manifest: str
    dev_manifest: str | None = None
    labels_dir: str | None = None
    label_teacher: str = "bundled:whisper-base"
    max_batch_seconds: float = 160.0
    max_batch_size: int | None = None
    max_skipped_fraction: float = 0.01
    num_workers: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.max_batch_seconds < math.inf:
            raise ValueError(f"data.max_batch_seconds must be a positive number, got {self.max_batch_seconds}")
        if self.max_batch_size is not None and self.max_batch_size < 1:
            raise ValueError(f"data.max_batch_size must be 1 or more, got {self.max_batch_size}; null sets no bound")
        if not 0 <= self.max_skipped_fraction <= 1:
            raise ValueError(f"data.max_skipped_fraction must be 0 to 1, got {self.max_skipped_fraction}")
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers must be 0 or more, got {self.num_workers}")

    def manifest_of(self, split: str) -> str | None:
        """The manifest of `train`, `dev` or `test`; None where there is none."""
        return {"train": self.train_manifest, "dev": self.dev_manifest, "test": self.test_manifest}[split]

    def labels_of(self, split: str) -> Path | None:
        """The label store of a split; None where the manifest's own text is taken."""
        return None if self.labels_dir is None else Path(self.labels_dir) / split


class SentenceSet(Dataset):
    """Items are dicts with `id`, `duration_seconds`, `heard_seconds`, `num_samples`, and two more values.

    Those are `waveform`, (samples,), int16, or `states`, (frames, width), float16, of the student's frozen layers; and
    `embedding`, (dim,), float32, or `text`.

    Args:
        manifest: the utterances of the items, one each.
        texts: what is said in each.
        heard_seconds: what the student computes for each, padding to its window included, (items,).
        min_samples: shorter clips get silence on both sides.
        max_samples: longer clips are cut here; None for no bound.
        embeddings: label store with the teacher's vectors; None gives the texts.
        states: label store with the states of the frozen layers; None decodes the audio.
    """

    def __init__(
        self,
        manifest: Manifest,
        texts: Sequence[str],
        heard_seconds: np.ndarray,
        *,
        min_samples: int = 1,
        max_samples: int | None = None,
        embeddings: LabelStore | None = None,
        states: LabelStore | None = None,
    ) -> None:
        self.manifest, self.texts, self.heard_seconds = manifest, list(texts), heard_seconds
        self.min_samples, self.max_samples = min_samples, max_samples
        self.embeddings, self.states = embeddings, states
        stored = [] if states is None else states.rows()
        self.num_samples = {row["id"]: int(row["num_samples"]) for row in stored}

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        utterance = self.manifest[index]
        key = utterance["id"]
        item = {"id": key, "duration_seconds": utterance["duration_seconds"]}
        item["heard_seconds"] = float(self.heard_seconds[index])
        if self.embeddings is None:
            item["text"] = self.texts[index]
        else:
            item["embedding"] = read_embeddings(self.embeddings, [key])[0]
        if self.states is not None:
            return {**item, "num_samples": self.num_samples[key], "states": read_lower_states(self.states, key)}
        waveform = lengthened(load_utterance(utterance, SAMPLE_RATE_HZ, torch.int16), self.min_samples)
        waveform = waveform[: self.max_samples]
        return {**item, "num_samples": len(waveform), "waveform": waveform}


def collate_sentences(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch: `ids`, the list `num_samples`, and what the items carry.

    That is `waveforms`, (batch, samples), int16, or `states`, (batch, frames, width), zero-padded, and `embeddings`,
    (batch, dim), or the list `texts`. `audio_seconds` and `padded_seconds` are for the log.
    """
    batch: dict[str, Any] = {
        "ids": [item["id"] for item in items],
        "num_samples": [item["num_samples"] for item in items],
        "audio_seconds": sum(item["duration_seconds"] for item in items),
        "padded_seconds": len(items) * max(item["heard_seconds"] for item in items),
    }
    if "embedding" in items[0]:
        batch["embeddings"] = torch.stack([item["embedding"] for item in items])
    else:
        batch["texts"] = [item["text"] for item in items]
    if "states" in items[0]:
        return {**batch, "states": pad_sequence([item["states"] for item in items], batch_first=True)}
    # rounded up no further than Whisper's window, where no clip is longer anyway
    bound = WINDOW_SAMPLES if max(batch["num_samples"]) <= WINDOW_SAMPLES else None
    waveforms, _ = pad_waveforms([item["waveform"] for item in items], max_samples=bound)
    return {**batch, "waveforms": waveforms}


def build_set(
    split: str,
    data: DataConfig,
    filters: FilterConfig,
    student: SegueEncoder,
    *,
    student_name: str,
    teacher: SentenceTeacher,
    embeddings_dir: str | None,
    states_dir: str | None,
    output_dir: Path,
) -> tuple[SentenceSet, dict[str, Any]]:
    """The utterances of a split with their texts or the vectors of these, and what was left out.

    Args:
        split: "train" or "dev".
        data: manifests, labels and limits.
        filters: which transcripts of a label store are trained on.
        student: its windows, and which of its layers are frozen.
        student_name: of its encoder, for messages.
        teacher: whose vectors the store must hold.
        embeddings_dir: folder of the label stores of vectors; None gives the texts, for a live teacher.
        states_dir: folder of the label stores of lower states; None decodes the audio.
        output_dir: run folder, for `skipped.jsonl`.

    Raises:
        ValueError: no utterance has a text, or too many clips cannot be used.
        LabelStoreError: a store is of another teacher, of other texts, or lacks utterances.
    """
    manifest = read_utterances(str(data.manifest_of(split)))
    texts, report = spoken_texts(data, split, manifest, filters)
    states: LabelStore | None = None
    if states_dir is not None:
        states = open_states(Path(states_dir) / split, student, student_name)
        known = {row["id"] for row in states.rows()}
        usable = [position for position, key in enumerate(manifest.ids) if key in known]
        _check_share(len(manifest) - len(usable), manifest, f"no states in {states_dir}/{split}", data)
    else:
        usable = usable_clips(
            manifest,
            output_dir if split == "train" else output_dir / split,
            max_seconds=student.window.seconds if student.is_whisper else data.max_batch_seconds,
            max_skipped_fraction=data.max_skipped_fraction,
            num_workers=data.num_workers,
        )
    ids = manifest.ids
    chosen = [position for position in usable if ids[position] in texts]
    if not chosen:
        raise ValueError(f"no utterance of {manifest.path} has both a text and a usable clip; see the warnings above")
    said = [texts[ids[position]] for position in chosen]
    kept = manifest.select(chosen)
    embeddings = None
    if embeddings_dir is not None:
        embeddings = open_embeddings(Path(embeddings_dir) / split, teacher, dict(zip(kept.ids, said, strict=True)))
    report["num_cut"] = tell_cut(teacher, said)
    sentences = SentenceSet(
        kept,
        said,
        heard_seconds(student, kept.durations_seconds),
        min_samples=1 if student.is_whisper else MIN_SAMPLES,
        max_samples=student.log_mel.max_samples if student.is_whisper else None,
        embeddings=embeddings,
        states=states,
    )
    return sentences, report


def spoken_texts(
    data: DataConfig, split: str, manifest: Manifest, filters: FilterConfig | None = None
) -> tuple[dict[str, str], dict[str, Any]]:
    """What is said in the utterances of a split, by id, and how many have no text.

    Args:
        data: where the texts come from.
        split: "train", "dev" or "test".
        manifest: its utterances.
        filters: which transcripts of a label store are good enough; None takes all, as for scoring.

    Returns:
        Texts in the order of the manifest, and counts: `num_without_text`, and the filters' report as `filters`.

    Raises:
        ValueError: no utterance has a text, or too many lack a label.
        LabelStoreError: the store is missing, or its labels are of windows.
    """
    references: dict[str, str | None] = dict(zip(manifest.ids, manifest.rows["text"][:], strict=True))
    labels_dir, report, said, kept = data.labels_of(split), {}, references, set(references)
    if labels_dir is not None:
        store = LabelStore(labels_dir)
        if store.header.get("decoding", {}).get("pack", False):
            raise LabelStoreError(f"the labels in {labels_dir} are of windows (--pack); label the clips one by one")
        rows = [{**row, "reference": references[row["id"]]} for row in store.rows() if row["id"] in references]
        _check_share(len(manifest) - len(rows), manifest, f"no label in {labels_dir}", data)
        said = {row["id"]: row["text"] for row in rows}
        if filters is not None:
            passed, filter_report = apply_filters(rows, filters)
            for line in filter_report.lines():
                logger.info("%s", line)
            report["filters"], kept = filter_report.as_dict(), {row["id"] for row in passed}
    without = [key for key, text in said.items() if text is None or not text.strip()]
    if without:
        logger.warning(
            "%d of %d utterances of %s have an empty or missing text and are left out; first: %r",
            len(without),
            len(manifest),
            manifest.path,
            without[0],
        )
    texts = {key: text for key in references if key in kept and (text := said.get(key)) and text.strip()}
    if not texts:
        raise ValueError(
            f"none of {len(manifest)} utterances of {manifest.path} has a text; "
            + ("set data.labels_dir and label it" if labels_dir is None else f"look at the labels in {labels_dir}")
        )
    return texts, {**report, "num_without_text": len(without)}


def open_embeddings(folder: Path, teacher: SentenceTeacher, texts: dict[str, str]) -> LabelStore:
    """The store of the teacher's vectors, if it holds those of these texts.

    Args:
        folder: label store of `embed_texts`.
        teacher: weights, pooling and scale must be its own.
        texts: what is said now, by id.

    Raises:
        LabelStoreError: the store is of another teacher or pooling, lacks an utterance, or has another text for it.
    """
    store = LabelStore(folder)
    check_embeddings(store)
    check_teacher(store, teacher.identity)
    wanted, stored = embedding_header(teacher)["embeddings"], store.header["embeddings"]
    changed = [f"{key} was {stored.get(key)}, now {wanted[key]}" for key in wanted if stored.get(key) != wanted[key]]
    if changed:
        raise LabelStoreError(
            f"the vectors in {folder} were made otherwise: {'; '.join(changed)}; change teacher back, or embed into "
            "another teacher.embeddings_dir"
        )
    known = {row["id"]: row["text"] for row in store.rows()}
    for key, text in texts.items():
        if known.get(key) != text:
            found = "none" if key not in known else f"that of {known[key]!r}"
            raise LabelStoreError(
                f"{folder} should hold the vector of utterance {key!r}, {text!r}, and holds {found}; run the embed "
                "stage again, into another teacher.embeddings_dir where texts have changed"
            )
    return store


def open_states(folder: Path, student: SegueEncoder, name: str) -> LabelStore:
    """The store of states after the student's frozen layers.

    Raises:
        LabelStoreError: the store is of another encoder, other layers or other windows.
    """
    store, header = LabelStore(folder), lower_states_header(student, name)
    check_teacher(store, header["teacher"])
    if store.header.get("lower_states") != header["lower_states"]:
        raise LabelStoreError(
            f"the states in {folder} were made with {store.header.get('lower_states')}, the student has "
            f"{header['lower_states']}; change student back, or take another student.lower_states_dir"
        )
    return store


def text_vectors(
    teacher: SentenceTeacher, texts: dict[str, str], store_dir: Path | None, batch_size: int = 64
) -> Tensor:
    """The teacher's vectors of texts in their order, (texts, dim), float32, on the CPU.

    Args:
        teacher: it runs once for each different text, where there is no store.
        texts: by utterance id.
        store_dir: label store of `embed_texts`; None for none.
        batch_size: texts that run together; with pooling compat_gather each runs alone.

    Raises:
        LabelStoreError: see `open_embeddings`.
    """
    if store_dir is not None:
        return read_embeddings(open_embeddings(store_dir, teacher, texts), list(texts))
    distinct = list(dict.fromkeys(texts.values()))
    size = 1 if teacher.pooling == "compat_gather" else batch_size
    parts = [teacher(distinct[start : start + size]).cpu() for start in range(0, len(distinct), size)]
    row_of = {text: row for row, text in enumerate(distinct)}
    return torch.cat(parts)[[row_of[text] for text in texts.values()]]


def tell_cut(teacher: SentenceTeacher, texts: Sequence[str]) -> int:
    """How many texts are longer than the teacher reads, and so cut; a warning names the longest."""
    lengths = teacher.num_tokens(list(texts))
    num_cut = sum(length > teacher.max_tokens for length in lengths)
    if num_cut:
        logger.warning(
            "%d of %d texts are longer than the teacher's %d tokens and are cut; the longest has %d",
            num_cut,
            len(texts),
            teacher.max_tokens,
            max(lengths),
        )
    return num_cut


def heard_seconds(student: SegueEncoder, durations_seconds: np.ndarray) -> np.ndarray:
    """Seconds that the student computes for clips: a Whisper's window, the clip's own length for others; (clips,)."""
    if not student.is_whisper:
        return durations_seconds
    return student.window.heard_seconds(durations_seconds)


def lengthened(waveform: Tensor, min_samples: int) -> Tensor:
    """The clip with silence on both sides, where it is shorter than `min_samples`; (samples,)."""
    missing = max(0, min_samples - len(waveform))
    return F.pad(waveform, (missing // 2, missing - missing // 2))


def _check_share(missing: int, manifest: Manifest, what: str, data: DataConfig) -> None:
    if not missing:
        return
    summary = f"{missing} of {len(manifest)} utterances of {manifest.path} have {what}"
    if missing > data.max_skipped_fraction * len(manifest):
        raise ValueError(
            f"{summary}, more than data.max_skipped_fraction={data.max_skipped_fraction}; finish the stage that writes "
            "it (run.sh), look at skipped.jsonl there, or raise the limit"
        )
    logger.warning("%s", summary)
