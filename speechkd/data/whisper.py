"""Training examples of a Whisper student: label ids with either the clip's samples or its cached encoder states."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from speechkd.data.audio import load_utterance
from speechkd.data.collate import MAX_LABEL_TOKENS, WhisperTokens, collate_labels
from speechkd.data.features import SAMPLE_RATE_HZ
from speechkd.data.loader import clip_batches, report_skipped
from speechkd.data.manifest import Manifest
from speechkd.labels.filters import FilterConfig, apply_filters
from speechkd.labels.teacher_cache import LabelStore

logger = logging.getLogger(__name__)


class WhisperTrainSet(Dataset):
    """Items are dicts with `id`, `token_ids` and `waveform` (samples,) or `encoder_states` (frames, dim).

    Args:
        manifest: the utterances of the items, one each.
        token_ids: the label of each, from `<|startoftranscript|>` to `<|endoftext|>`.
        states: label store that has the encoder states; None decodes the audio.
    """

    def __init__(self, manifest: Manifest, token_ids: list[list[int]], states: LabelStore | None = None) -> None:
        self.manifest, self.token_ids, self.states = manifest, token_ids, states

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        utterance = self.manifest[index]
        item = {"id": utterance["id"], "token_ids": self.token_ids[index]}
        if self.states is not None:
            return {**item, "encoder_states": self.states.array(utterance["id"])}
        return {**item, "waveform": load_utterance(utterance, SAMPLE_RATE_HZ)}


def collate_whisper(items: Sequence[dict[str, Any]], tokens: WhisperTokens) -> dict[str, Any]:
    """A batch: `ids`, `decoder_input_ids` and `labels` (batch, tokens), and what the items carry of the audio.

    That is `waveforms`, (batch, samples), zero-padded, or `encoder_states`, (batch, frames, dim).
    """
    decoder_input_ids, labels = collate_labels([item["token_ids"] for item in items], tokens)
    batch = {"ids": [item["id"] for item in items], "decoder_input_ids": decoder_input_ids, "labels": labels}
    if "encoder_states" in items[0]:
        return {**batch, "encoder_states": torch.stack([item["encoder_states"] for item in items])}
    return {**batch, "waveforms": pad_sequence([item["waveform"] for item in items], batch_first=True)}


def pseudo_labelled_set(
    manifest: Manifest, store: LabelStore, filters: FilterConfig, *, cached_encoder_states: bool
) -> tuple[WhisperTrainSet, dict[str, Any]]:
    """Utterances whose pseudo-label passes the filters.

    Args:
        manifest: utterances to train on.
        store: the teacher's labels of them.
        filters: which labels are good enough.
        cached_encoder_states: take the encoder's output from the store instead of the audio.

    Returns:
        The set, and the filters' report as JSON-serialisable counts.

    Raises:
        ValueError: the store lacks all of the manifest's utterances, or no label passes.
    """
    positions = {key: index for index, key in enumerate(manifest.ids)}
    references = manifest.rows["text"][:]
    rows = [{**row, "reference": references[positions[row["id"]]]} for row in store.rows() if row["id"] in positions]
    if len(rows) < len(positions):
        logger.warning(
            "%d of %d utterances have no label in %s", len(positions) - len(rows), len(positions), store.folder
        )
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
) -> WhisperTrainSet:
    """Utterances with their own text as labels, for fine-tuning without a teacher.

    Audio is decoded once beforehand: what cannot be used is named in `skipped.jsonl`.

    Args:
        manifest: utterances with `text`.
        tokenizer: of the student.
        tokens: special ids for the language and task.
        output_dir: folder of `skipped.jsonl`.
        max_skipped_fraction: share of clips that may be undecodable or have a label that is too long.

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
    audio = clip_batches(manifest, range(len(manifest)), sample_rate_hz=SAMPLE_RATE_HZ, batch_size=16)
    skipped = [row for batch in audio for row in batch.skipped]
    bad = {row["id"] for row in skipped}
    for key, label in zip(manifest.ids, labels, strict=True):
        if key not in bad and len(label) > MAX_LABEL_TOKENS:
            skipped.append(
                {"id": key, "audio": None, "reason": f"label of {len(label)} tokens, above {MAX_LABEL_TOKENS}"}
            )
    report_skipped(skipped, len(manifest), output_dir, max_skipped_fraction)
    bad = {row["id"] for row in skipped}
    chosen = [index for index, key in enumerate(manifest.ids) if key not in bad]
    return WhisperTrainSet(manifest.select(chosen), [labels[index] for index in chosen])
