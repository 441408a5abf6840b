"""Slots: how many survive in a transcript, and how well they are predicted. Rates are in percent.

Predicted and gold slots are a dict of name and value per utterance. Space around values does not count, and "none" is
the value of a slot that is not there: to name it so or to leave it out is the same. An intent is scored along with the
slots if both sides hold it as one more of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from speechkd.metrics.normalizers import get_normalizer

NO_VALUE = "none"
FSC_SLOTS = ("action", "object", "location")
Slots = Mapping[str, str]


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


@dataclass(frozen=True)
class SlotF1:
    """Predicted slots over a whole corpus; a slot is right if name and value are.

    Args:
        precision: right share of the predicted slots, in percent; 0 where there are none.
        recall: found share of the gold slots, in percent; 0 where there are none.
        f1: harmonic mean of both, in percent; 0 where no slot is right.
        num_right: slots predicted right.
        num_predicted: slots predicted.
        num_gold: slots that are there.
    """

    precision: float
    recall: float
    f1: float
    num_right: int
    num_predicted: int
    num_gold: int


@dataclass(frozen=True)
class FscScores:
    """Scores on Fluent Speech Commands, in percent.

    Args:
        exact_match: utterances whose action, object and location are all right.
        slot_accuracy: share of right values of each of the three.
        num_utterances: utterances scored.
    """

    exact_match: float
    slot_accuracy: dict[str, float]
    num_utterances: int


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


def strict_match(gold: Sequence[Slots], predicted: Sequence[Slots]) -> float:
    """Share of utterances that have exactly the gold slots, in percent.

    Args:
        gold: slots of each utterance.
        predicted: in the same order.

    Raises:
        ValueError: lengths differ, there is no utterance, or a value is empty or no text.
    """
    pairs = _paired(gold, predicted)
    return 100 * sum(right == guess for right, guess in pairs) / len(pairs)


def benchmark_acceptance(gold: Sequence[Slots], predicted: Sequence[Slots]) -> float:
    """Share of utterances in which every gold slot is predicted right, in percent; further slots cost nothing.

    This is how Picovoice's speech-to-intent benchmark counts (https://github.com/Picovoice/speech-to-intent-benchmark).
    A system that names all slots all the time does well here: report `strict_match` beside it.

    Args:
        gold: slots of each utterance.
        predicted: in the same order.

    Raises:
        ValueError: as of `strict_match`.
    """
    pairs = _paired(gold, predicted)
    return 100 * sum(right.items() <= guess.items() for right, guess in pairs) / len(pairs)


def slot_accuracy(
    gold: Sequence[Slots], predicted: Sequence[Slots], names: Sequence[str] | None = None
) -> dict[str, float]:
    """Share of utterances in which a slot has the right value, or is rightly absent, in percent.

    Args:
        gold: slots of each utterance.
        predicted: in the same order.
        names: slots to score, in this order; None takes all that occur, sorted. Name them where a mean over slots is
            compared across test sets.

    Returns:
        A rate for each slot.

    Raises:
        ValueError: as of `strict_match`, `names` lacks a slot that occurs, or there is no slot at all.
    """
    pairs = _paired(gold, predicted)
    occurring = {name for pair in pairs for slots in pair for name in slots}
    names = sorted(occurring) if names is None else list(names)
    unknown = sorted(occurring - set(names))
    if unknown:
        raise ValueError(f"slots {unknown} are not among those to score, {list(names)}; add them or leave them out")
    if not names:
        raise ValueError(f"none of {len(pairs)} utterances has a slot, gold or predicted; pass their names")
    return {
        name: 100 * sum(right.get(name) == guess.get(name) for right, guess in pairs) / len(pairs) for name in names
    }


def slot_f1(gold: Sequence[Slots], predicted: Sequence[Slots]) -> SlotF1:
    """Precision, recall and F1 over the slots of all utterances together (micro).

    Args:
        gold: slots of each utterance.
        predicted: in the same order.

    Raises:
        ValueError: as of `strict_match`.
    """
    pairs = _paired(gold, predicted)
    num_right = sum(len(right.items() & guess.items()) for right, guess in pairs)
    num_gold, num_predicted = sum(len(right) for right, _ in pairs), sum(len(guess) for _, guess in pairs)
    return SlotF1(
        precision=100 * num_right / max(num_predicted, 1),
        recall=100 * num_right / max(num_gold, 1),
        f1=200 * num_right / max(num_gold + num_predicted, 1),
        num_right=num_right,
        num_predicted=num_predicted,
        num_gold=num_gold,
    )


def fsc_scores(gold: Sequence[Slots], predicted: Sequence[Slots]) -> FscScores:
    """Scores on Fluent Speech Commands, Lugosch et al. 2019, https://arxiv.org/abs/1904.03670.

    Args:
        gold: `action`, `object` and `location` of each utterance, "none" among their values.
        predicted: in the same order.

    Raises:
        ValueError: as of `strict_match`, or an utterance has other slots than these three.
    """
    for kind, rows in (("gold", gold), ("predicted", predicted)):
        for index, slots in enumerate(rows):
            if slots.keys() != set(FSC_SLOTS):
                raise ValueError(
                    f"utterance {index} has the {kind} slots {sorted(slots)}; "
                    f"Fluent Speech Commands needs {', '.join(FSC_SLOTS)}, with {NO_VALUE!r} where there is none"
                )
    return FscScores(
        exact_match=strict_match(gold, predicted),
        slot_accuracy=slot_accuracy(gold, predicted, FSC_SLOTS),
        num_utterances=len(gold),
    )


def _paired(gold: Sequence[Slots], predicted: Sequence[Slots]) -> list[tuple[dict[str, str], dict[str, str]]]:
    if len(gold) != len(predicted):
        raise ValueError(
            f"gold slots of {len(gold)} utterances and predicted slots of {len(predicted)} differ in number; "
            "pass predicted slots for every utterance, in the same order"
        )
    if not gold:
        raise ValueError("there is no utterance to score; check that the manifest holds slots")
    return [
        (_present(right, f"gold slots of utterance {index}"), _present(guess, f"predicted slots of utterance {index}"))
        for index, (right, guess) in enumerate(zip(gold, predicted, strict=True))
    ]


def _present(slots: Slots, place: str) -> dict[str, str]:
    """Slots that are there, their values stripped."""
    for name, value in slots.items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(
                f"{place}: {name!r} has the value {value!r}, not a text; leave the slot out or write {NO_VALUE!r}"
            )
    return {name: value.strip() for name, value in slots.items() if value.strip() != NO_VALUE}
