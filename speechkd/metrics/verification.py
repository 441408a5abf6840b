"""How well scores tell trials of the same speaker, the targets, from all others: equal error rate and detection cost.

A trial is accepted where its score reaches the threshold. Rates are fractions, 0 to 1. Nothing here changes if all
scores go through the same increasing function.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class VerificationScores:
    """Errors over a list of trials.

    Args:
        eer: equal error rate, a fraction.
        min_dcf: least detection cost over all thresholds, normalised: 1 is what accepting nothing or everything costs.
        target_prior: share of targets that the cost assumes.
        num_targets: trials of the same speaker.
        num_nontargets: the others.
    """

    eer: float
    min_dcf: float
    target_prior: float
    num_targets: int
    num_nontargets: int


def trial_scores(embeddings: Mapping[str, ArrayLike], trials: Sequence[tuple[str, str]]) -> np.ndarray:
    """Cosine of the two vectors of each trial, (trials,), float64, -1 to 1.

    Args:
        embeddings: vector of each clip, (dim,), all of one width.
        trials: names of two clips each.

    Raises:
        ValueError: there is no trial, one names a clip without a vector, or a vector is zero, NaN or infinite, or of
            another width.
    """
    names = sorted({name for trial in trials for name in trial})
    if not names:
        raise ValueError("there is no trial to score; check the trial list")
    missing = [name for name in names if name not in embeddings]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(names)} clips in the trials have no embedding, {missing[0]!r} first; embed them "
            "too, or leave their trials out"
        )
    vectors = [np.asarray(embeddings[name], dtype=np.float64) for name in names]
    shapes = sorted({vector.shape for vector in vectors})
    if len(shapes) > 1 or len(shapes[0]) != 1:
        raise ValueError(f"embeddings have the shapes {shapes}; give one vector (dim,) of the same width a clip")
    table = np.stack(vectors)
    lengths = np.linalg.norm(table, axis=1, keepdims=True)
    broken = np.flatnonzero(~np.isfinite(lengths[:, 0]) | (lengths[:, 0] == 0))
    if len(broken):
        raise ValueError(
            f"the embedding of {names[broken[0]]!r} and {len(broken) - 1} more of {len(names)} are zero or hold NaN or "
            "infinite values, so they have no cosine; look at these clips, or encode in float32"
        )
    table /= lengths
    position = {name: index for index, name in enumerate(names)}
    first, second = ([position[trial[side]] for trial in trials] for side in (0, 1))
    return (table[first] * table[second]).sum(axis=1).clip(-1, 1)


def detection_errors(scores: ArrayLike, is_target: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both kinds of error at every threshold that makes a difference, from the strictest to the laxest.

    Args:
        scores: higher is more alike, (trials,).
        is_target: whether a trial is of one speaker, (trials,), bool or 0 and 1.

    Returns:
        Thresholds, the first infinite, then each score that occurs; the share of targets below each; the share of
        other trials at or above each.

    Raises:
        ValueError: lengths differ, a score is NaN or infinite, a label is neither 0 nor 1, or either kind of trial is
            missing.
    """
    values, labels = _checked(scores, is_target)
    order = np.argsort(-values, kind="stable")
    values, labels = values[order], labels[order]
    last_of_score = np.append(np.flatnonzero(np.diff(values)), len(values) - 1)  # equal scores are accepted together
    accepted_targets = np.cumsum(labels)[last_of_score]
    accepted_others = last_of_score + 1 - accepted_targets
    num_targets = int(labels.sum())
    miss = 1 - np.append(0, accepted_targets) / num_targets
    false_alarm = np.append(0, accepted_others) / (len(labels) - num_targets)
    return np.append(math.inf, values[last_of_score]), miss, false_alarm


def equal_error_rate(scores: ArrayLike, is_target: ArrayLike) -> float:
    """The error rate at which as large a share of targets is missed as of other trials is accepted.

    Where no threshold makes both equal, the curve of both is a straight line between its two nearest points, so ties
    between all trials give 0.5.

    Args:
        scores, is_target: as of `detection_errors`.

    Raises:
        ValueError: as of `detection_errors`.
    """
    _, miss, false_alarm = detection_errors(scores, is_target)
    difference = false_alarm - miss  # -1 at the strictest threshold, 1 at the laxest
    after = int(np.argmax(difference >= 0))
    before = after - 1
    share = -difference[before] / (difference[after] - difference[before])
    return float(false_alarm[before] + share * (false_alarm[after] - false_alarm[before]))


def min_dcf(
    scores: ArrayLike,
    is_target: ArrayLike,
    *,
    target_prior: float,
    miss_cost: float = 1.0,
    false_alarm_cost: float = 1.0,
) -> float:
    """Least detection cost over all thresholds, divided by that of the better trivial system.

    The cost is miss_cost * misses * prior + false_alarm_cost * false alarms * (1 - prior), as in the speaker
    recognition evaluations of NIST. Accepting nothing is one of the thresholds, so it is 1 at most.

    Args:
        scores, is_target: as of `detection_errors`.
        target_prior: share of targets assumed; 0.01 and 0.05 are usual. Name it wherever the value is reported.
        miss_cost: of a target that is missed.
        false_alarm_cost: of another trial that is accepted.

    Raises:
        ValueError: as of `detection_errors`, or a prior outside 0 to 1 or a cost that is not positive.
    """
    if not 0 < target_prior < 1 or not 0 < miss_cost < math.inf or not 0 < false_alarm_cost < math.inf:
        raise ValueError(
            f"a detection cost needs 0 < target_prior < 1 and positive costs, got target_prior={target_prior}, "
            f"miss_cost={miss_cost} and false_alarm_cost={false_alarm_cost}; 0.05, 1 and 1 are usual"
        )
    _, miss, false_alarm = detection_errors(scores, is_target)
    of_misses, of_false_alarms = miss_cost * target_prior, false_alarm_cost * (1 - target_prior)
    return float((of_misses * miss + of_false_alarms * false_alarm).min() / min(of_misses, of_false_alarms))


def verification_scores(scores: ArrayLike, is_target: ArrayLike, *, target_prior: float = 0.05) -> VerificationScores:
    """Equal error rate and normalised detection cost, with costs of 1.

    Args:
        scores, is_target: as of `detection_errors`.
        target_prior: as of `min_dcf`.

    Raises:
        ValueError: as of `min_dcf`.
    """
    num_targets = int(np.asarray(is_target).sum())
    return VerificationScores(
        eer=equal_error_rate(scores, is_target),
        min_dcf=min_dcf(scores, is_target, target_prior=target_prior),
        target_prior=target_prior,
        num_targets=num_targets,
        num_nontargets=len(np.asarray(is_target)) - num_targets,
    )


def _checked(scores: Any, is_target: Any) -> tuple[np.ndarray, np.ndarray]:
    """Scores as float64 and labels as whole numbers."""
    values, labels = np.asarray(scores, dtype=np.float64), np.asarray(is_target)
    if values.ndim != 1 or values.shape != labels.shape:
        raise ValueError(
            f"scores {values.shape} and labels {labels.shape} do not fit; give one of each a trial, (trials,)"
        )
    broken = np.flatnonzero(~np.isfinite(values))
    if len(broken):
        raise ValueError(
            f"trial {broken[0]} has the score {values[broken[0]]}, and {len(broken) - 1} more of {len(values)} are not "
            "finite; look at the embeddings of their clips"
        )
    strange = np.flatnonzero((labels != 0) & (labels != 1))
    if len(strange):
        raise ValueError(
            f"trial {strange[0]} has the label {labels[strange[0]]!r}; labels are 1 for the same speaker and 0 else"
        )
    labels = labels.astype(np.int64)
    num_targets = int(labels.sum())
    if not 0 < num_targets < len(labels):
        raise ValueError(
            f"{num_targets} of {len(labels)} trials are of the same speaker; error rates need trials of both kinds"
        )
    return values, labels
