"""How much of what spoken language understanding needs survives in a transcript."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from speechkd.metrics.normalizers import get_normalizer


@dataclass(frozen=True)
class SlotRecall:
    """Gold slot values found in transcripts.

    Args:
        recall: share of slot values found, in percent.
        num_found: slot values found.
        num_slots: slot values looked for.
    """

    recall: float
    num_found: int
    num_slots: int


def slot_recall(slots: Sequence[Sequence[Mapping[str, str]]], transcripts: Sequence[str]) -> SlotRecall:
    """Share of gold slot values that a transcript contains word for word.

    Whisper's English normaliser is applied to values and transcripts; then the words of a value must occur one after
    the other. Whole words only: "art" is not in "start", "cup" not in "cups". Numbers spoken side by side are one word
    ("eight four" is "84"), so a value that is a part of such a number is not found. Each slot is looked up by itself:
    two slots of the same value may both be found at one place. Values without a word are left out.

    Args:
        slots: for every utterance its slots, dicts with `name` and `value`.
        transcripts: what was recognised, in the same order.

    Returns:
        Recall in percent over all slots, and the counts.

    Raises:
        ValueError: the sequences differ in length, or there is no slot.
    """
    if len(slots) != len(transcripts):
        raise ValueError(
            f"slots of {len(slots)} utterances and {len(transcripts)} transcripts differ in number; "
            "pass one transcript for every utterance, in the same order"
        )
    normalize = get_normalizer("english")
    num_found = num_slots = 0
    for gold, transcript in zip(slots, transcripts, strict=True):
        # spaces around both make a substring search one over whole words
        spaced_transcript = f" {normalize(transcript)} "
        values = [value for value in (normalize(slot["value"]) for slot in gold) if value]
        num_slots += len(values)
        num_found += sum(f" {value} " in spaced_transcript for value in values)
    if num_slots == 0:
        raise ValueError(f"none of {len(slots)} utterances has a slot value; slot recall needs a manifest with slots")
    return SlotRecall(recall=100 * num_found / num_slots, num_found=num_found, num_slots=num_slots)
