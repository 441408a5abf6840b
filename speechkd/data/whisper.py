"""Training examples of a Whisper student: label ids with either the clip's samples or its cached encoder states."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from speechkd.data.audit import usable_clips
from speechkd.data.augment import WaveformAugment
from speechkd.data.collate import MAX_LABEL_TOKENS, WhisperTokens, collate_labels
from speechkd.data.features import SAMPLE_RATE_HZ, WINDOW_SAMPLES
from speechkd.data.loader import pad_waveforms, report_skipped
from speechkd.data.manifest import Manifest
from speechkd.data.packing import load_pack
from speechkd.files import read_jsonl
from speechkd.labels.filters import FilterConfig, apply_filters
from speechkd.labels.teacher_cache import LabelStore

logger = logging.getLogger(__name__)


class WhisperTrainSet(Dataset):
    """Items are dicts with `id`, `duration_seconds`, `token_ids` and `waveform` or `encoder_states`.

    `waveform` is (samples,), int16, or float32 where it is augmented; `encoder_states` is (frames, dim).

    Args:
        manifest: the utterances of the items, one each.
        token_ids: the label of each, from `<|startoftranscript|>` to `<|endoftext|>`.
        states: label store that has the encoder states; None decodes the audio.
    """

    def __init__(self, manifest: Manifest, token_ids: list[list[int]], states: LabelStore | None = None) -> None:
        self.manifest, self.token_ids, self.states = manifest, token_ids, states
        self.augment: WaveformAugment | None = None
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.token_ids)

    def set_epoch(self, epoch: int) -> None:
        """Choose what the augmentation draws."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        utterance = self.manifest[index]
        item = {name: utterance[name] for name in ("id", "duration_seconds")} | {"token_ids": self.token_ids[index]}
        if self.states is not None:
            return {**item, "encoder_states": self.states.array(utterance["id"])}
        if self.augment is None:
            return {**item, "waveform": load_pack(utterance, SAMPLE_RATE_HZ, torch.int16)}
        waveform = load_pack(utterance, SAMPLE_RATE_HZ)
        augmented = self.augment(waveform, utterance["id"], self.epoch)
        # slowed down beyond the window, the clip would lose the words at its end
        return {**item, "waveform": augmented if len(augmented) <= WINDOW_SAMPLES else waveform}


def collate_whisper(items: Sequence[dict[str, Any]], tokens: WhisperTokens) -> dict[str, Any]:
    """A batch: `ids`, `decoder_input_ids` and `labels` (batch, tokens), and what the items carry of the audio.

    That is `waveforms`, (batch, samples), zero-padded, or `encoder_states`, (batch, frames, dim). `audio_seconds` and
    `padded_seconds` are for the log; Whisper pads every clip to its window.
    """
    decoder_input_ids, labels = collate_labels([item["token_ids"] for item in items], tokens)
    batch = {
        "ids": [item["id"] for item in items],
        "decoder_input_ids": decoder_input_ids,
        "labels": labels,
        "audio_seconds": sum(item["duration_seconds"] for item in items),
        "padded_seconds": len(items) * WINDOW_SAMPLES / SAMPLE_RATE_HZ,
    }
    if "encoder_states" in items[0]:
        return {**batch, "encoder_states": torch.stack([item["encoder_states"] for item in items])}
    waveforms, _ = pad_waveforms([item["waveform"] for item in items], max_samples=WINDOW_SAMPLES)
    return {**batch, "waveforms": waveforms}


def pseudo_labelled_set(
    manifest: Manifest,
    store: LabelStore,
    filters: FilterConfig,
    *,
    cached_encoder_states: bool,
    max_skipped_fraction: float,
) -> tuple[WhisperTrainSet, dict[str, Any]]:
    """Utterances whose pseudo-label passes the filters.

    Args:
        manifest: utterances to train on.
        store: the teacher's labels of them.
        filters: which labels are good enough.
        cached_encoder_states: take the encoder's output from the store instead of the audio.
        max_skipped_fraction: share of the utterances that may be without a label, 0 to 1.

    Returns:
        The set, and the filters' report as JSON-serialisable counts.

    Raises:
        ValueError: the store lacks too many of the manifest's utterances, or no label passes.
    """
    positions = {key: index for index, key in enumerate(manifest.ids)}
    references = manifest.rows["text"][:]
    rows = [{**row, "reference": references[positions[row["id"]]]} for row in store.rows() if row["id"] in positions]
    if rows and len(rows) < len(positions):
        missing = len(positions) - len(rows)
        summary = f"{missing} of {len(positions)} utterances have no label in {store.folder}"
        if missing > max_skipped_fraction * len(positions):
            raise ValueError(
                f"{summary}, more than data.max_skipped_fraction={max_skipped_fraction}; finish `speechkd label` on "
                "this manifest, look at skipped.jsonl there, or raise the limit"
            )
        logger.warning("%s", summary)
    if not rows:
        raise ValueError(
            f"label store {store.folder} holds no utterance of {manifest.path}; run `speechkd label` on this manifest"
        )
    kept, report = apply_filters(rows, filters)
    for line in report.lines():
        logger.info("%s", line)
    kept.sort(key=lambda row: positions[row["id"]])  # the order must not depend on how labelling was interrupted
    chosen = manifest.select([positions[row["id"]] for row in kept])
    states = store if cached_encoder_states else None
    return WhisperTrainSet(chosen, [row["token_ids"] for row in kept], states), report.as_dict()


def reference_set(
    manifest: Manifest,
    tokenizer: PreTrainedTokenizerBase,
    tokens: WhisperTokens,
    *,
    output_dir: str,
    max_skipped_fraction: float,
    num_workers: int = 0,
) -> WhisperTrainSet:
    """Utterances with their own text as labels, for fine-tuning without a teacher.

    Audio is decoded once beforehand, by `usable_clips`: what cannot be used is named in `skipped.jsonl`.

    Args:
        manifest: utterances with `text`.
        tokenizer: of the student.
        tokens: special ids for the language and task.
        output_dir: folder of `skipped.jsonl`.
        max_skipped_fraction: share of clips that may be undecodable or have a label that is too long.
        num_workers: processes that decode; 0 decodes in this one.

    Raises:
        ValueError: an utterance has no text.
    """
    references = manifest.rows["text"][:]
    missing = [key for key, text in zip(manifest.ids, references, strict=True) if not text]
    if missing:
        raise ValueError(
            f"{len(missing)} utterances of {manifest.path} have no text, the first is {missing[0]!r}; "
            "set data.labels_dir to train on a teacher's labels"
        )
    labels = [
        [*tokens.prefix, *tokenizer.encode(" " + text.strip(), add_special_tokens=False), tokens.end_of_text]
        for text in references
    ]
    usable = usable_clips(
        manifest,
        output_dir,
        max_seconds=WINDOW_SAMPLES / SAMPLE_RATE_HZ,
        max_skipped_fraction=max_skipped_fraction,
        num_workers=num_workers,
    )
    too_long = [index for index in usable if len(labels[index]) > MAX_LABEL_TOKENS]
    if too_long:
        ids = manifest.ids
        skipped = read_jsonl(Path(output_dir) / "skipped.jsonl") + [
            {
                "id": ids[index],
                "audio": None,
                "reason": f"label of {len(labels[index])} tokens, above {MAX_LABEL_TOKENS}",
            }
            for index in too_long
        ]
        report_skipped(skipped, len(manifest), output_dir, max_skipped_fraction)
    chosen = sorted(set(usable) - set(too_long))
    return WhisperTrainSet(manifest.select(chosen), [labels[index] for index in chosen])
