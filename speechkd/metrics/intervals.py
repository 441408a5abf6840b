"""How sure a word error rate is: bootstrap intervals, the difference of two systems, and rates per group."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

INTERVAL = (0.025, 0.975)  # 95 %
DRAWS_AT_ONCE = 100_000  # indices of this many draws stay in the processor's cache


@dataclass(frozen=True)
class PairedDifference:
    """A system against a baseline on the same utterances.

    Args:
        wer_difference: WER of the system less that of the baseline, in points; negative is better.
        low: lower end of its 95 % interval.
        high: upper end; below 0 the system is better beyond chance.
        probability_of_improvement: share of the resamples in which the system makes fewer errors, 0 to 1.
    """

    wer_difference: float
    low: float
    high: float
    probability_of_improvement: float


def wer_interval(
    errors: Sequence[int],
    words: Sequence[int],
    *,
    units: Sequence[str] | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Bootstrap interval of a corpus word error rate.

    Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation", ICASSP 2004:
    utterances are drawn with replacement, as many as there are, and every draw gives total errors over total words;
    the percentiles 2.5 and 97.5 of these rates bound the interval. With `units` whole units are drawn, because errors
    of one speaker go together (https://arxiv.org/abs/1912.09508); of a few speakers even that interval is too narrow.

    Args:
        errors: substitutions, deletions and insertions of each utterance, (utterances,).
        words: reference words of each, 1 or more, (utterances,).
        units: what each utterance belongs to, such as its speaker; None draws single utterances.
        num_resamples: how often to draw; 1,000 settle the bounds to a few percent of the width.
        seed: equal seeds give equal bounds.

    Returns:
        Lower and upper bound in percent.

    Raises:
        ValueError: lengths differ, an utterance has no reference word, there are fewer than two units, or
            `num_resamples` is below 1.
    """
    sums = _resampled_sums([errors], words, units, num_resamples, seed)
    low, high = np.quantile(100 * sums[:, 0] / sums[:, -1], INTERVAL)
    return float(low), float(high)


def paired_difference(
    baseline_errors: Sequence[int],
    errors: Sequence[int],
    words: Sequence[int],
    *,
    units: Sequence[str] | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> PairedDifference:
    """Bootstrap of the difference of two systems; both are scored on the same draws, so that hard utterances cancel.

    Bisani and Ney 2004, as of `wer_interval`.

    Args:
        baseline_errors: of the system to compare with, (utterances,).
        errors: of the system, the same utterances in the same order.
        words, units, num_resamples, seed: as of `wer_interval`.

    Raises:
        ValueError: as of `wer_interval`.
    """
    sums = _resampled_sums([baseline_errors, errors], words, units, num_resamples, seed)
    difference = sums[:, 1] - sums[:, 0]
    low, high = np.quantile(100 * difference / sums[:, -1], INTERVAL)
    return PairedDifference(
        wer_difference=float(100 * (np.sum(errors) - np.sum(baseline_errors)) / np.sum(words)),
        low=float(low),
        high=float(high),
        probability_of_improvement=float(np.mean(difference < 0)),
    )


def group_error_rates(
    counts: Sequence[Mapping[str, int]], groups: Sequence[Any], *, num_resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Word error rate of every group, total errors over total words within it.

    Args:
        counts: `substitutions, deletions, insertions, num_reference_words` of each utterance, as `utterance_errors`
            gives them; those without a reference word are left out.
        groups: the language, dialect, speaker or other group of each; utterances of None are left out.
        num_resamples: of the bootstrap; 0 leaves `wer_low` and `wer_high` out, as does a group of one utterance.
        seed: of the bootstrap.

    Returns:
        Per group, in the order of the names: `wer`, `wer_low` and `wer_high` in percent, the summed counts and
        `num_utterances`.

    Raises:
        ValueError: the sequences differ in length.
    """
    if len(counts) != len(groups):
        raise ValueError(f"{len(counts)} utterances and {len(groups)} groups differ in number; pass one group for each")
    members: dict[str, list[Mapping[str, int]]] = {}
    for row, group in zip(counts, groups, strict=True):
        if group is not None and row["num_reference_words"]:
            members.setdefault(str(group), []).append(row)
    return {group: _rates(members[group], num_resamples, seed) for group in sorted(members)}


def macro_mean_wer(groups: Mapping[str, Mapping[str, float]]) -> float:
    """Mean of the groups' word error rates, in percent: every group counts the same, whatever its size.

    Args:
        groups: as `group_error_rates` returns them.

    Raises:
        ValueError: there is no group.
    """
    if not groups:
        raise ValueError("no group has a scored utterance, so there is no mean over groups; choose another field")
    return sum(rates["wer"] for rates in groups.values()) / len(groups)


def num_errors(counts: Mapping[str, int]) -> int:
    """Substitutions, deletions and insertions together."""
    return counts["substitutions"] + counts["deletions"] + counts["insertions"]


def _rates(rows: Sequence[Mapping[str, int]], num_resamples: int, seed: int) -> dict[str, float]:
    errors, words = [num_errors(row) for row in rows], [row["num_reference_words"] for row in rows]
    rates: dict[str, float] = {"wer": 100 * sum(errors) / sum(words)}
    if num_resamples and len(rows) > 1:
        rates["wer_low"], rates["wer_high"] = wer_interval(errors, words, num_resamples=num_resamples, seed=seed)
    for key in ("substitutions", "deletions", "insertions", "num_reference_words"):
        rates[key] = sum(row[key] for row in rows)
    return {**rates, "num_utterances": len(rows)}


def _resampled_sums(
    errors: Sequence[Sequence[int]],
    words: Sequence[int],
    units: Sequence[str] | None,
    num_resamples: int,
    seed: int,
) -> np.ndarray:
    """Total errors of each system, then total words, of every resample, (resamples, systems + 1), int64."""
    lengths = {*map(len, errors), len(words), len(words if units is None else units)}
    if len(lengths) > 1:
        raise ValueError(f"errors, words and units of {sorted(lengths)} utterances differ in number; pass one of each")
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be 1 or more, got {num_resamples}; 1000 is usual")
    columns = np.asarray([*errors, words], dtype=np.int64)
    if columns.size and columns[-1].min() < 1:
        raise ValueError(
            f"utterance {int(columns[-1].argmin())} of {columns.shape[1]} has {columns[-1].min()} reference words; "
            "leave those without any out, as error_rates does"
        )
    if units is not None:
        _, positions = np.unique(np.asarray(units), return_inverse=True)
        columns = np.stack([np.bincount(positions, column) for column in columns]).astype(np.int64)
    num_units = columns.shape[1]
    if num_units < 2:
        raise ValueError(f"an interval needs two or more utterances or units to draw from, got {num_units}")
    generator = np.random.default_rng(seed)
    sums = np.empty((num_resamples, len(columns)), dtype=np.int64)
    step = max(1, DRAWS_AT_ONCE // num_units)
    for start in range(0, num_resamples, step):
        block = sums[start : start + step]
        drawn = generator.integers(num_units, size=(len(block), num_units))
        for index, column in enumerate(columns):
            block[:, index] = column[drawn].sum(axis=1)
    return sums
