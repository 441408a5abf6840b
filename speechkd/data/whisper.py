"""Training examples of a Whisper student: label ids with either the clip's samples or its cached encoder states."""

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from speechkd.data.audit import usable_clips
from speechkd.data.augment import WaveformAugment
from speechkd.data.collate import MAX_LABEL_TOKENS, LabelDraws, WhisperTokens, collate_labels, draw_label
from speechkd.data.features import SAMPLE_RATE_HZ, WINDOW_SAMPLES
from speechkd.data.loader import pad_waveforms, report_skipped
from speechkd.data.manifest import FIELDS, Manifest
from speechkd.data.packing import (
    PACK_FEATURES,
    WINDOW_SECONDS,
    PackedManifest,
    load_pack,
    pack_label,
    pack_manifest,
    split_label,
)
from speechkd.files import read_jsonl
from speechkd.labels.decoder_state_labels import collate_decoder_states, read_decoder_states
from speechkd.labels.filters import NEED_REFERENCES, FilterConfig, apply_filters
from speechkd.labels.scores import compression_ratio
from speechkd.labels.teacher_cache import LabelStore
from speechkd.labels.topk_records import collate_topk, read_topk

logger = logging.getLogger(__name__)


class WhisperTrainSet(Dataset):
    """Items are dicts with `id`, `duration_seconds`, `token_ids`, and `waveform` or `encoder_states`.

    `waveform` is (samples,), int16, or float32 where it is augmented; `encoder_states` is (frames, dim). `previous_ids`
    is the label before, or None, and `epoch` chooses what is drawn of both labels.

    Args:
        manifest: the utterances of the items, one each.
        token_ids: the label of each, from `<|startoftranscript|>` to `<|endoftext|>`.
        states: label store that has the encoder states; None decodes the audio.
        previous: for each item the position of the one whose label may be its prompt, or None; None for no prompts.
    """

    def __init__(
        self,
        manifest: Manifest,
        token_ids: list[list[int]],
        states: LabelStore | None = None,
        previous: Sequence[int | None] | None = None,
    ) -> None:
        self.manifest, self.token_ids, self.states = manifest, token_ids, states
        self.previous = [None] * len(token_ids) if previous is None else list(previous)
        self.augment: WaveformAugment | None = None
        self.window_samples = WINDOW_SAMPLES  # of the student; no clip is slowed down beyond it
        # with the teacher's top-k targets or decoder states, if they are wanted
        self.topk: LabelStore | None = None
        self.decoder_states: LabelStore | None = None
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def label_lengths(self) -> np.ndarray:
        """Tokens of each label, without a prompt, (items,), int64."""
        return np.array([len(token_ids) for token_ids in self.token_ids], dtype=np.int64)

    def set_epoch(self, epoch: int) -> None:
        """Choose what the augmentation and the collator draw."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        utterance, previous = self.manifest[index], self.previous[index]
        item = {name: utterance[name] for name in ("id", "duration_seconds")} | {
            "token_ids": self.token_ids[index],
            "previous_ids": None if previous is None else self.token_ids[previous],
            "epoch": self.epoch,
        }
        if self.topk is not None:
            item["topk"] = read_topk(self.topk, utterance["id"])
        if self.decoder_states is not None:
            item["teacher_decoder_states"] = read_decoder_states(self.decoder_states, utterance["id"])
        if self.states is not None:
            return {**item, "encoder_states": self.states.array(utterance["id"])}
        if self.augment is None:
            return {**item, "waveform": load_pack(utterance, SAMPLE_RATE_HZ, torch.int16)}
        waveform = load_pack(utterance, SAMPLE_RATE_HZ)
        augmented = self.augment(waveform, utterance["id"], self.epoch)
        # slowed down beyond the window, the clip would lose the words at its end
        return {**item, "waveform": augmented if len(augmented) <= self.window_samples else waveform}


def collate_whisper(
    items: Sequence[dict[str, Any]],
    tokens: WhisperTokens,
    draws: LabelDraws | None = None,
    *,
    window_seconds: float = WINDOW_SECONDS,
) -> dict[str, Any]:
    """A batch: `ids`, `decoder_input_ids` and `labels` (batch, tokens), and what the items carry of the audio.

    That is `waveforms`, (batch, samples), zero-padded, with the list `num_samples`, or `encoder_states`, (batch,
    frames, dim); and what the items have of the teacher's outputs: what `collate_topk` makes of its targets, or
    `teacher_decoder_states`, (batch, tokens, dim), padded with 0. `audio_seconds` and `padded_seconds` are for the log;
    Whisper pads every clip to its window.

    Args:
        items: of a `WhisperTrainSet`.
        tokens: of the vocabulary.
        draws: how often timestamps and prompts are there; None takes the labels as they are, without prompts.
        window_seconds: of the model, if it was shortened.
    """
    sequences = [item["token_ids"] for item in items]
    if draws is not None:
        sequences = [
            draw_label(
                item["token_ids"], item["previous_ids"], tokens, draws, utterance_id=item["id"], epoch=item["epoch"]
            )
            for item in items
        ]
    decoder_input_ids, labels = collate_labels(sequences, tokens)
    batch = {
        "ids": [item["id"] for item in items],
        "decoder_input_ids": decoder_input_ids,
        "labels": labels,
        "audio_seconds": sum(item["duration_seconds"] for item in items),
        "padded_seconds": len(items) * window_seconds,
    }
    num_tokens, width = list(map(len, sequences)), labels.shape[1]
    if "topk" in items[0]:
        batch |= collate_topk([item["topk"] for item in items], num_tokens, width)
    if "teacher_decoder_states" in items[0]:
        states = [item["teacher_decoder_states"] for item in items]
        batch["teacher_decoder_states"] = collate_decoder_states(states, num_tokens, width)
    if "encoder_states" in items[0]:
        return {**batch, "encoder_states": torch.stack([item["encoder_states"] for item in items])}
    waveforms, num_samples = pad_waveforms([item["waveform"] for item in items], max_samples=WINDOW_SAMPLES)
    return {**batch, "waveforms": waveforms, "num_samples": num_samples.tolist()}


def pseudo_labelled_set(
    manifest: Manifest,
    store: LabelStore,
    filters: FilterConfig,
    *,
    tokenizer: PreTrainedTokenizerBase,
    tokens: WhisperTokens,
    cached_encoder_states: bool,
    max_skipped_fraction: float,
) -> tuple[WhisperTrainSet, dict[str, Any]]:
    """Utterances whose pseudo-label passes the filters; windows of utterances where the store holds labels of these.

    Filters that compare with references judge single utterances: a window hides a bad one among good ones, see
    https://github.com/huggingface/distil-whisper/issues/127. Labels of windows are then cut at their timestamps, and
    the utterances that pass are packed anew. Prompts come from labels that pass, too.

    Args:
        manifest: utterances to train on.
        store: the teacher's labels of them.
        filters: which labels are good enough.
        tokenizer: of the student, to read the cut labels.
        tokens: special ids for the language and task of the labels.
        cached_encoder_states: take the encoder's output from the store instead of the audio.
        max_skipped_fraction: share of the utterances that may be without a label, 0 to 1.

    Returns:
        The set, and the filters' report as JSON-serialisable counts.

    Raises:
        ValueError: the store lacks too many of the manifest's utterances, no label passes, or labels of windows are to
            be compared with references and have no timestamps, or their encoder states are asked for.
    """
    positions = {key: index for index, key in enumerate(manifest.ids)}
    rows = [row for row in store.rows() if all(key in positions for key in clip_ids(row))]
    _check_missing(manifest, store, len({key for row in rows for key in clip_ids(row)}), max_skipped_fraction)
    is_packed = store.header["decoding"].get("pack", False)
    if is_packed and compares_references(filters):
        if cached_encoder_states or not store.header["decoding"].get("timestamps", False):
            raise ValueError(
                f"the labels in {store.folder} are of windows, and a WER or CER filter judges single utterances: label "
                "with timestamps (decoding.timestamps=true) and set teacher.cache_encoder_states=false, since the "
                "utterances that pass are joined to new windows; or set filters.max_wer=null"
            )
        return _repacked_set(manifest, positions, rows, filters, tokenizer, tokens)
    references = [None] * len(manifest) if is_packed else manifest.rows["text"][:]
    rows = [{**row, "reference": references[positions[clip_ids(row)[0]]]} for row in rows]
    kept, report = _filtered(rows, filters)
    # the order must not depend on how labelling was interrupted
    kept.sort(key=lambda row: positions[clip_ids(row)[0]])
    if is_packed:
        chosen: Manifest = _packs(manifest, positions, kept)
        previous_ids = [row["previous_id"] for row in kept]
    else:
        chosen = manifest.select([positions[row["id"]] for row in kept])
        before = segments_before(manifest)
        previous_ids = [before[positions[row["id"]]] for row in kept]
    states = store if cached_encoder_states else None
    previous = _positions_of(previous_ids, chosen.ids)
    return WhisperTrainSet(chosen, [row["token_ids"] for row in kept], states, previous), report


def clip_ids(row: Mapping[str, Any]) -> list[str]:
    """Utterances that a row of a label store is about: one, or the parts of a window."""
    return [part["id"] for part in row["parts"]] if "parts" in row else [row["id"]]


def compares_references(filters: FilterConfig) -> bool:
    """Whether a filter needs reference texts."""
    return filters.max_wer is not None or any(score.name in NEED_REFERENCES for score in filters.scores)


def segments_before(manifest: Manifest) -> list[str | None]:
    """Of each segment of a recording the id of the one before it there, if the same speaker says it; else None."""
    before: list[str | None] = [None] * len(manifest)
    rows = manifest.rows
    if rows.features["audio"] != FIELDS["audio"]:  # rows of the Hub hold whole recordings
        return before
    offsets, audio, ids = rows["offset_seconds"][:], rows["audio"][:], manifest.ids
    voices = list(zip(audio, rows["speaker"][:], rows["language"][:], strict=True))
    segments = [index for index, offset in enumerate(offsets) if offset is not None]
    segments.sort(key=lambda index: (audio[index], offsets[index]))
    for first, second in pairwise(segments):
        if voices[first] == voices[second]:
            before[second] = ids[first]
    return before


def _positions_of(wanted: Sequence[str | None], ids: Sequence[str]) -> list[int | None]:
    """Positions of ids; None where there is no such id."""
    known = {key: index for index, key in enumerate(ids)}
    return [None if key is None else known.get(key) for key in wanted]


def _check_missing(manifest: Manifest, store: LabelStore, num_labelled: int, max_skipped_fraction: float) -> None:
    if num_labelled == 0:
        raise ValueError(
            f"label store {store.folder} holds no utterance of {manifest.path}; run `speechkd label` on this manifest"
        )
    missing = len(manifest) - num_labelled
    if missing:
        summary = f"{missing} of {len(manifest)} utterances have no label in {store.folder}"
        if missing > max_skipped_fraction * len(manifest):
            raise ValueError(
                f"{summary}, more than data.max_skipped_fraction={max_skipped_fraction}; finish `speechkd label` on "
                "this manifest, look at skipped.jsonl there, or raise the limit"
            )
        logger.warning("%s", summary)


def _filtered(rows: list[dict[str, Any]], filters: FilterConfig) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    kept, report = apply_filters(rows, filters)
    for line in report.lines():
        logger.info("%s", line)
    return kept, report.as_dict()


def _packs(manifest: Manifest, positions: dict[str, int], rows: Sequence[dict[str, Any]]) -> PackedManifest:
    """The windows that label rows are of, whatever others the labelling skipped."""
    packs = [
        {
            **dict.fromkeys(PACK_FEATURES),  # a pack's text and voice are read from its parts
            "id": row["id"],
            "duration_seconds": row["duration_seconds"],
            "sample_rate_hz": SAMPLE_RATE_HZ,
            "previous_id": row["previous_id"],
            "positions": [positions[key] for key in clip_ids(row)],
        }
        for row in rows
    ]
    return PackedManifest(manifest, datasets.Dataset.from_list(packs, features=datasets.Features(PACK_FEATURES)))


def _repacked_set(
    manifest: Manifest,
    positions: dict[str, int],
    rows: Sequence[dict[str, Any]],
    filters: FilterConfig,
    tokenizer: PreTrainedTokenizerBase,
    tokens: WhisperTokens,
) -> tuple[WhisperTrainSet, dict[str, Any]]:
    """New windows of the utterances whose part of a window's label passes the filters."""
    references = manifest.rows["text"][:]
    clips = []
    for row in rows:
        for part, token_ids in zip(row["parts"], split_label(row, row["token_ids"], tokens), strict=True):
            # neither words that cannot be told apart nor a clip that the teacher left out may be trained on
            text = str(tokenizer.decode(token_ids)).strip() if token_ids else None
            clips.append(
                {
                    **row,
                    "id": part["id"],
                    "duration_seconds": part["duration_seconds"],
                    "token_ids": token_ids,
                    "text": text,
                    "compression_ratio": compression_ratio(text or ""),
                    "reference": references[positions[part["id"]]],
                }
            )
    kept, report = _filtered(clips, filters)
    labels = {positions[row["id"]]: row["token_ids"] for row in kept}
    return _packed_set(pack_manifest(manifest, kept=labels), labels, tokens), report


def _packed_set(packed: PackedManifest, labels: Mapping[int, Sequence[int]], tokens: WhisperTokens) -> WhisperTrainSet:
    """Windows with labels made of those of their parts, which are given by position in the manifest."""
    token_ids = [
        pack_label(pack, [labels[position] for position in positions], tokens)
        for pack, positions in zip(packed, packed.rows["positions"][:], strict=True)
    ]
    fitting = [index for index, label in enumerate(token_ids) if len(label) <= MAX_LABEL_TOKENS]
    if not fitting:
        raise ValueError(
            f"the labels of all {len(token_ids)} windows of {packed.path} are above Whisper's {MAX_LABEL_TOKENS} "
            "tokens; set data.pack=false, or look at the texts"
        )
    if len(fitting) < len(token_ids):
        left_out = len(token_ids) - len(fitting)
        logger.warning("%d windows have labels above %d tokens and are left out", left_out, MAX_LABEL_TOKENS)
    chosen = packed.select(fitting)
    previous = _positions_of(chosen.rows["previous_id"][:], chosen.ids)
    return WhisperTrainSet(chosen, [token_ids[index] for index in fitting], previous=previous)


def reference_set(
    manifest: Manifest,
    tokenizer: PreTrainedTokenizerBase,
    tokens: WhisperTokens,
    *,
    output_dir: str,
    max_skipped_fraction: float,
    num_workers: int = 0,
    pack: bool = False,
    window_seconds: float = WINDOW_SECONDS,
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
        pack: join utterances to windows of up to 30 s, each between timestamps.
        window_seconds: of the student, if it was shortened; longer clips cannot be used.

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
        max_seconds=window_seconds,
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
    if pack:
        return _packed_set(pack_manifest(manifest, kept=chosen), dict(enumerate(labels)), tokens)
    before = segments_before(manifest)
    kept = manifest.select(chosen)
    previous = _positions_of([before[index] for index in chosen], kept.ids)
    return WhisperTrainSet(kept, [labels[index] for index in chosen], previous=previous)
