"""Scores of labels and of sentiment values. All of them are fractions, 0 to 1, unless said otherwise.

Labels are all texts or all whole numbers, in lists, arrays or tensors. -1, a class that training did not know (see
`models.probes.encode_classes`), is a label like any other: never predicted, so always wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Labels = Sequence[str] | Sequence[int] | np.ndarray


@dataclass(frozen=True)
class ClassScores:
    """How well one class is found.

    Args:
        precision: right share of what was called this class; 0 where nothing was.
        recall: found share of this class; 0 where it does not occur.
        f1: harmonic mean of both; 0 where nothing is right.
        num_true: items of this class.
        num_predicted: items called this class.
    """

    precision: float
    recall: float
    f1: float
    num_true: int
    num_predicted: int


@dataclass(frozen=True)
class MoseiScores:
    """Five scores of sentiment values between -3 and 3, as CMU-MOSEI is scored.

    Args:
        mae: mean absolute error, in units of the values.
        pearson_r: correlation, -1 to 1; NaN where all truths or all predictions are equal.
        weighted_f1: of "is positive" (> 0), over items whose truth is not 0.
        accuracy_2: of "is not negative" (>= 0), over the same items.
        accuracy_7: of the values rounded to whole numbers, a half to the even one, over all items.
        num_items: items scored.
        num_nonzero: those whose truth is not 0.
    """

    mae: float
    pearson_r: float
    weighted_f1: float
    accuracy_2: float
    accuracy_7: float
    num_items: int
    num_nonzero: int


def accuracy(truth: Labels, predictions: Labels) -> float:
    """Share of items with the right label.

    Args:
        truth: labels, (items,).
        predictions: in the same order, (items,).

    Raises:
        ValueError: lengths differ, there is no item, or labels are not all texts or all whole numbers.
    """
    gold, predicted = _paired(truth, predictions)
    return sum(a == b for a, b in zip(gold, predicted, strict=True)) / len(gold)


def confusion_counts(
    truth: Labels, predictions: Labels, classes: Sequence[Any] | None = None
) -> tuple[np.ndarray, list[Any]]:
    """How often each class was taken for each.

    Args:
        truth: labels, (items,).
        predictions: in the same order, (items,).
        classes: order of rows and columns; None sorts the labels that occur.

    Returns:
        Counts, (classes, classes), int64, a row for each true class and a column for each predicted one; the classes.

    Raises:
        ValueError: as of `accuracy`; `classes` has one twice, or lacks a label that occurs.
    """
    gold, predicted = _paired(truth, predictions)
    occurring = set(gold) | set(predicted)
    classes = sorted(occurring) if classes is None else list(classes)
    positions = {label: index for index, label in enumerate(classes)}
    if len(positions) < len(classes):
        twice = sorted({label for label in classes if classes.count(label) > 1})
        raise ValueError(f"classes {twice} stand twice in the list of {len(classes)}; name each once")
    missing = sorted(occurring - positions.keys())
    if missing:
        raise ValueError(f"labels {missing} are not among the {len(classes)} classes {classes}; add them")
    counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(counts, ([positions[label] for label in gold], [positions[label] for label in predicted]), 1)
    return counts, classes


def class_scores(truth: Labels, predictions: Labels) -> dict[Any, ClassScores]:
    """Precision, recall and F1 of every class that occurs in the truth or the predictions, in sorted order.

    Args:
        truth: labels, (items,).
        predictions: in the same order, (items,).

    Raises:
        ValueError: as of `accuracy`.
    """
    counts, classes = confusion_counts(truth, predictions)
    num_right, num_predicted, num_true = counts.diagonal(), counts.sum(axis=0), counts.sum(axis=1)
    return {
        label: ClassScores(
            precision=float(right / max(called, 1)),
            recall=float(right / max(actual, 1)),
            f1=float(2 * right / (called + actual)),
            num_true=int(actual),
            num_predicted=int(called),
        )
        for label, right, called, actual in zip(classes, num_right, num_predicted, num_true, strict=True)
    }


def weighted_f1(truth: Labels, predictions: Labels) -> float:
    """Mean of the classes' F1, each weighted by its items in the truth.

    Args:
        truth: labels, (items,).
        predictions: in the same order, (items,).

    Raises:
        ValueError: as of `accuracy`.
    """
    scores = class_scores(truth, predictions).values()
    return sum(score.f1 * score.num_true for score in scores) / len(truth)


def macro_f1(truth: Labels, predictions: Labels) -> float:
    """Plain mean of the F1 of every class that occurs in the truth or the predictions.

    Args:
        truth: labels, (items,).
        predictions: in the same order, (items,).

    Raises:
        ValueError: as of `accuracy`.
    """
    scores = class_scores(truth, predictions).values()
    return sum(score.f1 for score in scores) / len(scores)


def pearson_r(truth: ArrayLike, predictions: ArrayLike) -> float:
    """Pearson's correlation, -1 to 1; NaN where all truths or all predictions are equal.

    Args:
        truth: numbers, (items,).
        predictions: in the same order, (items,).

    Raises:
        ValueError: lengths differ, there is no item, or a value is NaN or infinite.
    """
    gold, predicted = _paired_numbers(truth, predictions)
    if np.ptp(gold) == 0 or np.ptp(predicted) == 0:
        return float("nan")
    gold, predicted = gold - gold.mean(), predicted - predicted.mean()
    r = gold @ predicted / (np.linalg.norm(gold) * np.linalg.norm(predicted))
    return float(np.clip(r, -1, 1))


def mosei_scores(truth: ArrayLike, predictions: ArrayLike) -> MoseiScores:
    """The five scores of CMU-MOSEI, as SEGUE (Tan et al. 2023, https://arxiv.org/abs/2305.12301) counts them.

    Predictions are not cut to -3 to 3: one of 3.6 rounds to 4, which is wrong for every truth.

    Args:
        truth: sentiment, (items,).
        predictions: in the same order, (items,).

    Raises:
        ValueError: as of `pearson_r`, or all truths are 0.
    """
    gold, predicted = _paired_numbers(truth, predictions)
    nonzero = gold != 0
    if not nonzero.any():
        raise ValueError(
            f"all {len(gold)} truths are 0, so neither F1 nor 2-class accuracy exists; check the sentiment labels"
        )
    return MoseiScores(
        mae=float(np.abs(gold - predicted).mean()),
        pearson_r=pearson_r(gold, predicted),
        weighted_f1=weighted_f1((gold[nonzero] > 0).astype(int), (predicted[nonzero] > 0).astype(int)),
        accuracy_2=float(((gold[nonzero] >= 0) == (predicted[nonzero] >= 0)).mean()),
        accuracy_7=float((np.round(gold) == np.round(predicted)).mean()),
        num_items=len(gold),
        num_nonzero=int(nonzero.sum()),
    )


def _paired(truth: Labels, predictions: Labels) -> tuple[list[Any], list[Any]]:
    gold, predicted = (
        part.tolist() if hasattr(part, "tolist") else list(part)  # numbers of arrays and tensors become Python's
        for part in (truth, predictions)
    )
    _check_lengths(len(gold), len(predicted))
    labels = gold + predicted
    if not all(isinstance(label, str) for label in labels) and not all(isinstance(label, Integral) for label in labels):
        kinds: dict[str, Any] = {}
        for label in labels:
            kinds.setdefault(type(label).__name__, label)
        raise ValueError(
            f"labels must be all texts or all whole numbers, got {' and '.join(map(repr, kinds.values()))} "
            f"({', '.join(kinds)}); give truth and predictions the same kind and leave out items without a label"
        )
    return gold, predicted


def _paired_numbers(truth: ArrayLike, predictions: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    gold, predicted = np.asarray(truth, dtype=np.float64), np.asarray(predictions, dtype=np.float64)
    if gold.ndim != 1 or predicted.ndim != 1:
        raise ValueError(f"truth {gold.shape} and predictions {predicted.shape} must be one number per item, (items,)")
    _check_lengths(len(gold), len(predicted))
    broken = np.flatnonzero(~np.isfinite(gold) | ~np.isfinite(predicted))
    if len(broken):
        raise ValueError(
            f"item {broken[0]} has truth {gold[broken[0]]} and prediction {predicted[broken[0]]}, and "
            f"{len(broken) - 1} more of {len(gold)} are not finite; leave them out or give their labels a value"
        )
    return gold, predicted


def _check_lengths(num_truths: int, num_predictions: int) -> None:
    if num_truths != num_predictions:
        raise ValueError(
            f"{num_truths} truths and {num_predictions} predictions differ in number; "
            "pass one prediction for every truth, in the same order"
        )
    if num_truths == 0:
        raise ValueError("there is no item to score; check that the manifest holds labels")
