"""Utterances joined to windows of up to 30 s, with timestamps and previous-text prompts that follow from it.

Whisper encodes 30 s whatever the clip's length, so short clips cost as much as long ones. A pack is a row like a
manifest's that names its `parts`: the audio stays where it is and is joined when it is loaded.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from speechkd.data.audio import load_utterance
from speechkd.data.collate import WhisperTokens
from speechkd.data.features import SAMPLE_RATE_HZ, WINDOW_SAMPLES
from speechkd.data.manifest import FIELDS, Manifest

TIMESTAMP_SECONDS = 0.02  # step of Whisper's timestamp tokens
WINDOW_SECONDS = WINDOW_SAMPLES / SAMPLE_RATE_HZ
PART_FIELDS = ("id", "audio", "offset_seconds", "duration_seconds", "sample_rate_hz", "text")
PACK_FEATURES = {
    **{field: FIELDS[field] for field in ("id", "duration_seconds", "sample_rate_hz", "text", "speaker", "language")},
    "previous_id": datasets.Value("string"),
    "positions": datasets.List(datasets.Value("int64")),
}
BLOCK_ROWS = 1000


def pack_utterances(
    utterances: Iterable[dict[str, Any]],
    *,
    max_seconds: float = WINDOW_SECONDS,
    keep: Callable[[dict[str, Any]], bool] | None = None,
) -> Iterator[dict[str, Any]]:
    """Join neighbours of a stream to packs; one pack is in memory at a time.

    Distil-Whisper, Gandhi et al. 2023, https://arxiv.org/abs/2311.00430: the next clip joins while the speaker stays
    and the total is at most `max_seconds`; no silence is put between clips. Unknown speakers count as one speaker.
    Order is kept, and a clip that alone is longer stays alone, for the loader to name.

    Args:
        utterances: rows of a manifest or a stream.
        max_seconds: longest pack, at most Whisper's 30 s.
        keep: False leaves an utterance out, such as one whose own text is wrong. A pack hides bad clips among good
            ones, so judge before packing.

    Yields:
        Packs: manifest rows with `audio` None, `sample_rate_hz` of the sample grid on which parts lie, `text` joined
        with spaces (None where a part has none), and
        `parts`: `id, audio, offset_seconds, duration_seconds, sample_rate_hz, text` of each utterance
        (`offset_seconds` in its file) and `start_seconds` in the pack;
        `previous_id`: the pack whose text may be the prompt. It is None unless that pack ends right before this one,
        with the same speaker, and in the same recording where utterances are segments of one.

    Raises:
        ValueError: `max_seconds` is not in (0, 30], or an utterance has no usable duration.
    """
    if not 0 < max_seconds <= WINDOW_SECONDS:
        raise ValueError(f"max_seconds must be above 0 and at most Whisper's {WINDOW_SECONDS:.0f} s, got {max_seconds}")
    max_samples = round(max_seconds * SAMPLE_RATE_HZ)
    held: list[dict[str, Any]] = []
    held_samples, previous_id, is_interrupted = 0, None, False
    for utterance in utterances:
        if keep is not None and not keep(utterance):
            is_interrupted = True
            continue
        num_samples = _num_samples(utterance)
        if held and (_voice(held[-1]) != _voice(utterance) or held_samples + num_samples > max_samples):
            pack = _pack(held, previous_id)
            yield pack
            follows = not is_interrupted and _follows(held[-1], utterance)
            previous_id = pack["id"] if follows else None
            held, held_samples = [], 0
        held.append(utterance)
        held_samples += num_samples
        is_interrupted = False
    if held:
        yield _pack(held, previous_id)


class PackedManifest(Manifest):
    """Packs over the utterances of a manifest, made by `pack_manifest`; items as `pack_utterances` gives them.

    Args:
        source: manifest of the utterances; JSONL, tar shards or Hub.
        rows: packs, with the positions of their parts in the source.
    """

    def __init__(self, source: Manifest, rows: datasets.Dataset) -> None:
        super().__init__(source.path, rows)
        self.source = source

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[int(index)]
        return _pack([self.source[position] for position in row["positions"]], row["previous_id"])

    def select(self, indices: Iterable[int]) -> "PackedManifest":
        """The packs at these positions, in this order."""
        return PackedManifest(self.source, self.rows.select(list(indices)))


def pack_manifest(
    manifest: Manifest,
    *,
    max_seconds: float = WINDOW_SECONDS,
    kept: Iterable[int] | None = None,
    sort_by_speaker: bool = False,
) -> PackedManifest:
    """Pack a whole corpus as `pack_utterances` does; the rows are memory-mapped and equal calls give equal packs.

    Args:
        manifest: the utterances.
        max_seconds: longest pack, at most Whisper's 30 s.
        kept: positions of the utterances to pack, such as those that pass the filters; None takes all.
        sort_by_speaker: bring each speaker's utterances together, in their order. Without it a corpus whose speakers
            alternate has nothing to join.

    Returns:
        The packs.

    Raises:
        ValueError: see `pack_utterances`; or nothing is kept.
    """
    is_kept = np.ones(len(manifest), dtype=bool)
    if kept is not None:
        is_kept[:] = False
        is_kept[list(kept)] = True
    if not is_kept.any():
        raise ValueError(
            f"none of the {len(manifest)} utterances of {manifest.path} is kept for packing; loosen the filters"
        )
    order = np.arange(len(manifest))
    if sort_by_speaker:
        numbers: dict[str | None, int] = {}
        speakers = [numbers.setdefault(speaker, len(numbers)) for speaker in manifest.rows["speaker"][:]]
        order = np.argsort(np.asarray(speakers), kind="stable")
    columns = ["id", "duration_seconds", "sample_rate_hz", "offset_seconds", "text", "speaker", "language"]
    if manifest.rows.features["audio"] == FIELDS["audio"]:  # of Hub rows it is the encoded audio
        columns.append("audio")
    rows = datasets.Dataset.from_generator(
        _packed_rows,
        features=datasets.Features(PACK_FEATURES),
        gen_kwargs={
            "rows": manifest.rows.select_columns(columns),
            "order": order,
            "is_kept": is_kept,
            "max_seconds": max_seconds,
        },
    )
    return PackedManifest(manifest, rows)


def load_pack(pack: dict[str, Any], sample_rate_hz: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Waveform of a pack, joined from its parts; of an utterance without `parts`, what `load_utterance` gives.

    Each part fills exactly the samples that its row says. A file may differ from its row by the 0.1 s that
    `load_audio` tolerates; then it is cut, or followed by zeros, and the parts behind it stay in place.

    Args:
        pack: one of `pack_utterances`.
        sample_rate_hz: rate of the result.
        dtype: float32 or int16.

    Returns:
        (samples,); samples are `duration_seconds` times the rate.

    Raises:
        AudioError: a part cannot be used; the message names the utterance.
    """
    if not pack.get("parts"):
        return load_utterance(pack, sample_rate_hz, dtype)
    starts = [round(part["start_seconds"] * sample_rate_hz) for part in pack["parts"]]
    ends = [*starts[1:], round(pack["duration_seconds"] * sample_rate_hz)]
    waveform = torch.zeros(ends[-1], dtype=dtype)
    for part, start, end in zip(pack["parts"], starts, ends, strict=True):
        clip = load_utterance(part, sample_rate_hz, dtype)[: end - start]
        waveform[start : start + len(clip)] = clip
    return waveform


def timestamp_token(seconds: float, tokens: WhisperTokens) -> int:
    """Id of the timestamp nearest to `seconds`, on Whisper's grid of 0.02 s.

    Raises:
        ValueError: outside of 0 to 30 s.
    """
    if not 0 <= seconds <= WINDOW_SECONDS:
        raise ValueError(f"Whisper's timestamps go from 0 to {WINDOW_SECONDS:.0f} s, got {seconds}")
    return tokens.no_timestamps + 1 + round(seconds / TIMESTAMP_SECONDS)


def pack_label(pack: Mapping[str, Any], part_token_ids: Sequence[Sequence[int]], tokens: WhisperTokens) -> list[int]:
    """Label of a pack from those of its parts, each between the timestamps of its start and end.

    `strip_timestamps` makes the label without timestamps of it, and `prepend_prompt` puts the label of the pack
    `previous_id` before it.

    Args:
        pack: one of `pack_utterances`.
        part_token_ids: token ids of each part's text; special ones are removed, so whole labels serve too.
        tokens: of the vocabulary.

    Returns:
        From `<|startoftranscript|>` to `<|endoftext|>`. Parts without text have no timestamps; without any text it is
        the empty label, with `<|notimestamps|>`.

    Raises:
        ValueError: not one label a part, or a part ends behind 30 s.
    """
    parts = pack["parts"]
    if len(part_token_ids) != len(parts):
        raise ValueError(
            f"pack {pack['id']!r} has {len(parts)} parts, got token ids of {len(part_token_ids)}; give one list a "
            "part, empty where nothing is said"
        )
    label: list[int] = []
    for part, token_ids in zip(parts, part_token_ids, strict=True):
        text_ids = [token for token in token_ids if token < tokens.first_special]
        if text_ids:
            start = timestamp_token(part["start_seconds"], tokens)
            end = timestamp_token(_end_seconds(part), tokens)
            label += [start, *text_ids, end]
    prefix = tokens.prefix[:-1] if label else tokens.prefix
    return [*prefix, *label, tokens.end_of_text]


@dataclass(frozen=True)
class Segment:
    """Text between two timestamps.

    Args:
        start_seconds: in the window; None where no timestamp opens it.
        end_seconds: in the window; None where no timestamp closes it.
        token_ids: of the text.
    """

    start_seconds: float | None
    end_seconds: float | None
    token_ids: list[int]


def label_segments(token_ids: Sequence[int], tokens: WhisperTokens) -> list[Segment]:
    """Segments of a label with timestamps, in its order; a label without any is one segment without bounds."""
    segments: list[Segment] = []
    start: float | None = None
    text_ids: list[int] = []
    for token in token_ids:
        if token < tokens.first_special:
            text_ids.append(token)
        elif token > tokens.no_timestamps:
            seconds = (token - tokens.no_timestamps - 1) * TIMESTAMP_SECONDS
            if text_ids:
                segments.append(Segment(start, seconds, text_ids))
                start, text_ids = None, []
            else:
                start = seconds
    if text_ids:
        segments.append(Segment(start, None, text_ids))
    return segments


def split_label(pack: Mapping[str, Any], token_ids: Sequence[int], tokens: WhisperTokens) -> list[list[int] | None]:
    """Token ids of each part's text, as far as the timestamps of a pack's label tell them apart.

    A segment and a part belong together if more than half of the shorter lies in the other: teachers put a start where
    the segment before ends, seconds early, so closer bounds would reject most. What cannot be told apart is not
    guessed: parts that share a segment, or that a segment without both timestamps may reach, get None.

    Args:
        pack: one of `pack_utterances`, or the row of a label store with its `parts`.
        token_ids: the pack's label, from a teacher or from `pack_label`.
        tokens: of the vocabulary.

    Returns:
        One entry a part: token ids to decode, [] where the label has nothing, None where it is not known.
        A teacher that writes timestamps may leave out the last clip of a window: filter empty texts of parts.
    """
    parts = pack["parts"]
    texts: list[list[int] | None] = [[] for _ in parts]
    for segment in label_segments(token_ids, tokens):
        start = 0.0 if segment.start_seconds is None else segment.start_seconds
        end = math.inf if segment.end_seconds is None else segment.end_seconds
        touched = _touched(parts, min(start, end), max(start, end))
        is_bounded = segment.start_seconds is not None and math.isfinite(end) and start <= end
        if len(touched) == 1 and (is_bounded or len(parts) == 1):
            known = texts[touched[0]]
            texts[touched[0]] = None if known is None else known + segment.token_ids
        else:
            for index in touched:
                texts[index] = None
    return texts


def _touched(parts: Sequence[Mapping[str, Any]], start: float, end: float) -> list[int]:
    """Positions of the parts that share more than half of the shorter with a stretch of time."""
    touched, nearest = [], []
    for index, part in enumerate(parts):
        overlap = min(end, _end_seconds(part)) - max(start, part["start_seconds"])
        if overlap > min(end - start, part["duration_seconds"]) / 2:
            touched.append(index)
        if overlap >= 0:
            nearest.append(index)
    return touched or nearest or [len(parts) - 1]  # a timestamp behind the audio is of its last words


def _end_seconds(part: Mapping[str, Any]) -> float:
    return part["start_seconds"] + _num_samples(part) / SAMPLE_RATE_HZ


def _num_samples(utterance: Mapping[str, Any]) -> int:
    """Length on the grid of whole samples, where sums have no rounding errors."""
    seconds = utterance["duration_seconds"]
    if not (seconds and math.isfinite(seconds) and seconds > 0):
        raise ValueError(
            f"utterance {utterance['id']!r} has duration_seconds={seconds!r}, which cannot be packed; it must be "
            "positive, rerun the data_prep script"
        )
    return max(1, round(seconds * SAMPLE_RATE_HZ))


def _voice(utterance: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """What all parts of a pack share: a label names one language."""
    return utterance.get("speaker"), utterance.get("language")


def _follows(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether the text before may prompt what comes after."""
    if _voice(before) != _voice(after):
        return False
    first, second = before.get("offset_seconds"), after.get("offset_seconds")
    if first is None and second is None:
        return True
    return first is not None and second is not None and before.get("audio") == after.get("audio") and first <= second


def _pack(utterances: Sequence[Mapping[str, Any]], previous_id: str | None) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    num_samples = 0
    for utterance in utterances:
        part = {field: utterance.get(field) for field in PART_FIELDS}
        parts.append(part | {"start_seconds": num_samples / SAMPLE_RATE_HZ})
        num_samples += _num_samples(utterance)
    texts = [part["text"] for part in parts]
    return {
        **dict.fromkeys(FIELDS),
        "id": _pack_id([part["id"] for part in parts]),
        "duration_seconds": num_samples / SAMPLE_RATE_HZ,
        "sample_rate_hz": SAMPLE_RATE_HZ,
        "text": None if None in texts else " ".join(text.strip() for text in texts if text.strip()),
        "speaker": utterances[0].get("speaker"),
        "language": utterances[0].get("language"),
        "previous_id": previous_id,
        "parts": parts,
    }


def _pack_id(ids: Sequence[str]) -> str:
    """First utterance, how many more, and a hash of all: labels of other packs must not pass for this one's."""
    digest = hashlib.blake2b(json.dumps(ids).encode(), digest_size=4).hexdigest()
    return f"{ids[0]}+{len(ids) - 1}-{digest}"


def _packed_rows(
    rows: datasets.Dataset, order: np.ndarray, is_kept: np.ndarray, max_seconds: float
) -> Iterator[dict[str, Any]]:
    def utterances() -> Iterator[dict[str, Any]]:
        for first in range(0, len(order), BLOCK_ROWS):
            positions = order[first : first + BLOCK_ROWS]
            block = rows[positions.tolist()]
            for index, position in enumerate(positions.tolist()):
                yield {field: values[index] for field, values in block.items()} | {"position": position}

    kept_order = order[is_kept[order]]
    num_packed = 0
    for pack in pack_utterances(
        utterances(), max_seconds=max_seconds, keep=lambda utterance: bool(is_kept[utterance["position"]])
    ):
        num_parts = len(pack["parts"])
        positions = kept_order[num_packed : num_packed + num_parts].tolist()
        num_packed += num_parts
        yield {field: pack[field] for field in PACK_FEATURES if field != "positions"} | {"positions": positions}
