"""Pictures of classification: which classes are confused, and what more examples bring."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from speechkd.files import atomic_write

LINE_CHARACTERS, MAX_LINES = 26, 3  # of a class name; three lines of 8 points fit a cell
CELL_INCHES = 0.45
CHARACTER_INCHES = 0.075  # of 8 points


@dataclass(frozen=True)
class LogFit:
    """Least-squares fit of score = slope ln k + intercept.

    Args:
        slope: score gained where k grows e-fold.
        intercept: score at k = 1.
        residual_deviation: sqrt(sum of squared residuals / (n - 2)).
        num_points: n, the scores that were fitted.
        mean_log_k: mean of ln k over them.
        spread_log_k: sum of (ln k - mean)^2 over them.
    """

    slope: float
    intercept: float
    residual_deviation: float
    num_points: int
    mean_log_k: float
    spread_log_k: float


def log_fit(ks: Sequence[int], scores: Sequence[float]) -> LogFit:
    """Fit score = a ln k + b by least squares.

    Args:
        ks: examples per class of each score, (points,).
        scores: one for each run, so several for one k, (points,).

    Raises:
        ValueError: lengths differ, there are fewer than 3 points or only one k, a k is below 1, or a score is NaN.
    """
    if len(ks) != len(scores):
        raise ValueError(f"{len(ks)} k and {len(scores)} scores differ in number; pass the k of every score")
    if len(ks) < 3 or len(set(ks)) < 2:
        raise ValueError(
            f"a fit with its band needs 3 scores or more at 2 different k, got {len(ks)} at k={sorted(set(ks))}"
        )
    if min(ks) < 1 or not np.isfinite(scores).all():
        raise ValueError(f"every k must be 1 or more and every score a number, got k={list(ks)}, scores={list(scores)}")
    log_k, score = np.log(np.asarray(ks, dtype=np.float64)), np.asarray(scores, dtype=np.float64)
    spread = float(np.square(log_k - log_k.mean()).sum())
    slope = float((log_k - log_k.mean()) @ (score - score.mean())) / spread
    intercept = float(score.mean() - slope * log_k.mean())
    residuals = score - (slope * log_k + intercept)
    return LogFit(
        slope=slope,
        intercept=intercept,
        residual_deviation=math.sqrt(float(residuals @ residuals) / (len(ks) - 2)),
        num_points=len(ks),
        mean_log_k=float(log_k.mean()),
        spread_log_k=spread,
    )


def fit_band(fit: LogFit, ks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The fitted score with its 95 % band: where the mean score lies, not a single run.

    At x = ln k the half width is t s sqrt(1 / n + (x - mean)^2 / spread), with s the deviation of the residuals and t
    the 97.5th percentile of Student's distribution with n - 2 degrees of freedom. It takes the runs as independent.

    Args:
        fit: from `log_fit`.
        ks: where, (positions,).

    Returns:
        Score, lower and upper end, each (positions,).
    """
    log_k = np.log(ks)
    score = fit.slope * log_k + fit.intercept
    deviation = fit.residual_deviation * np.sqrt(
        1 / fit.num_points + np.square(log_k - fit.mean_log_k) / fit.spread_log_k
    )
    half_width = t_percentile(fit.num_points - 2) * deviation
    return score, score - half_width, score + half_width


def t_percentile(degrees: int) -> float:
    """The value that Student's distribution stays below with probability 0.975.

    Bisects the closed form for whole degrees of freedom, Abramowitz and Stegun 1964, 26.7.3 and 26.7.4: scipy has it
    too, but nothing else here needs scipy.

    Args:
        degrees: degrees of freedom, 1 or more.

    Raises:
        ValueError: there is none.
    """
    if degrees < 1:
        raise ValueError(f"Student's distribution needs 1 degree of freedom or more, got {degrees}")
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        if _central_probability(angle, degrees) < 0.95:
            low = angle
        else:
            high = angle
    return math.sqrt(degrees) * math.tan(low)


def plot_confusion(counts: np.ndarray, classes: Sequence[str], path: str | Path, *, title: str = "") -> None:
    """Draw a confusion matrix: counts as numbers, colour for the share of the true class.

    Names over 26 characters go over up to three lines, longer ones lose their end.

    Args:
        counts: rows the true classes, columns the predicted, (classes, classes), as of `confusion_counts`.
        classes: names in the same order.
        path: PNG file, written atomically.
        title: what was classified, by what; the share of right items is added.

    Raises:
        ValueError: the matrix is not (classes, classes), or holds no item.
    """
    counts = np.asarray(counts)
    size = len(classes)
    if counts.shape != (size, size) or not counts.sum() > 0:
        raise ValueError(
            f"counts {counts.shape} with {counts.sum()} items cannot be drawn for {size} classes; they must be "
            f"({size}, {size}) with one item or more"
        )
    num_true = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(num_true, 1)
    names = [textwrap.fill(str(name), LINE_CHARACTERS, max_lines=MAX_LINES, placeholder="…") for name in classes]
    label_inches = CHARACTER_INCHES * min(LINE_CHARACTERS, max(len(str(name)) for name in classes))
    side = max(CELL_INCHES * size, 2.0)
    # compressed: cells are squares, and a layout that does not know it leaves gaps and cuts the title
    figure = Figure(figsize=(side + label_inches + 1.6, side + label_inches + 1.1), layout="compressed")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in zip(*counts.nonzero(), strict=True):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(size), names, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(range(size), names, fontsize=8, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    right = int(counts.trace())
    outcome = f"{right} of {counts.sum()} right, {100 * right / counts.sum():.1f} %"
    axes.set_title("\n".join(filter(None, (title, outcome))), fontsize=10, parse_math=False)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8, aspect=25)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def plot_k_shot(
    scores: Mapping[str, Mapping[int, Sequence[float]]], path: str | Path, *, score_name: str, title: str = ""
) -> None:
    """Draw scores over the number of training examples of each class.

    A point is the mean over seeds, its bar the sample deviation (none for one seed). The line is score = a ln k + b,
    fitted to the single runs, with the band of `fit_band`; systems with fewer than 3 runs or one k have points alone.

    Args:
        scores: system -> k -> one score a seed.
        path: PNG file, written atomically.
        score_name: label of the axis, with the unit.
        title: what was learnt from few examples.

    Raises:
        ValueError: there is no system, one has no score, a k is below 1, or a score is NaN.
    """
    if not scores or not all(by_k and all(len(runs) for runs in by_k.values()) for by_k in scores.values()):
        counts = {name: {k: len(runs) for k, runs in by_k.items()} for name, by_k in scores.items()}
        raise ValueError(f"every system needs a score at every k it names, got these numbers of scores: {counts}")
    for name, by_k in scores.items():
        if min(by_k) < 1 or not all(np.isfinite(runs).all() for runs in by_k.values()):
            raise ValueError(f"every k of {name!r} must be 1 or more and every score a number, got {dict(by_k)}")
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for index, (name, by_k) in enumerate(scores.items()):
        _draw_system(axes, name, by_k, shift=1.03 ** (index - (len(scores) - 1) / 2), colour=f"C{index}")
    all_ks = sorted({k for by_k in scores.values() for k in by_k})
    axes.set_xscale("log")
    axes.set_xticks(all_ks, [str(k) for k in all_ks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("training examples per class, k")
    axes.set_ylabel(score_name, parse_math=False)
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    for text in axes.legend(fontsize=9).get_texts():
        text.set_parse_math(False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _draw_system(axes: Axes, name: str, by_k: Mapping[int, Sequence[float]], *, shift: float, colour: str) -> None:
    ks = sorted(by_k)
    means = [float(np.mean(by_k[k])) for k in ks]
    deviations = [float(np.std(by_k[k], ddof=1)) if len(by_k[k]) > 1 else 0.0 for k in ks]
    # systems stand a little beside each other, or their bars would lie on one line
    shifted = [k * shift for k in ks]
    run_ks = [k for k in ks for _ in by_k[k]]
    label = name
    if len(run_ks) > 2 and len(ks) > 1:
        fit = log_fit(run_ks, [score for k in ks for score in by_k[k]])
        positions = np.geomspace(ks[0], ks[-1], 100)
        line, low, high = fit_band(fit, positions)
        axes.plot(positions, line, color=colour, linewidth=1)
        axes.fill_between(positions, low, high, color=colour, alpha=0.15, linewidth=0)
        label = f"{name}: {fit.slope:.3g} ln k {'-' if fit.intercept < 0 else '+'} {abs(fit.intercept):.3g}"
    axes.errorbar(shifted, means, yerr=deviations, fmt="o", capsize=3, color=colour, label=label)


def _central_probability(angle: float, degrees: int) -> float:
    """Probability that |t| stays below sqrt(degrees) tan(angle)."""
    odd = degrees % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for exponent in range(odd, degrees - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (exponent + 1) / (exponent + 2)
    share = math.sin(angle) * total
    return 2 / math.pi * (angle + share) if odd else share
