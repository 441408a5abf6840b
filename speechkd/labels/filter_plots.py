"""Pictures of label scores: how they spread, and how many hours each threshold would keep."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from speechkd.files import atomic_write
from speechkd.labels.filters import HIGHER_IS_BETTER, ScoreName, label_scores
from speechkd.metrics.normalizers import Normalizer

AXIS_LABELS: dict[ScoreName, str] = {
    "wer": "word error rate against the reference (%)",
    "cer": "character error rate against the reference (%)",
    "proxy_wer": "word error rate against the proxy model (%)",
    "speech_text_cosine": "cosine of speech and text embeddings",
    "confidence": "geometric mean of token probabilities",
    "mean_entropy": "mean token entropy over ln(vocabulary)",
    "lm_nll": "language model, nats per token",
    "words_per_second": "words per second",
    "characters_per_second": "characters per second",
    "length_deviation": "|ln(characters per second / median)|",
    "compression_ratio": "plain / compressed length",
    "repeated_5grams": "repeated 5-grams",
}


def kept_hours_curve(
    values: np.ndarray, durations_seconds: Sequence[float], *, higher_is_better: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Hours that every possible threshold would keep, labels at the threshold included.

    Args:
        values: one score a label, (labels,); NaN and infinite ones are never kept.
        durations_seconds: audio of each label.
        higher_is_better: whether a threshold keeps the values above it.

    Returns:
        The different values from the strictest threshold to the loosest, and the hours kept at each.
    """
    usable = np.isfinite(values)
    badness = -values[usable] if higher_is_better else values[usable]
    thresholds, positions = np.unique(badness, return_inverse=True)
    seconds = np.bincount(positions, weights=np.asarray(durations_seconds)[usable], minlength=len(thresholds))
    return (-thresholds if higher_is_better else thresholds), np.cumsum(seconds) / 3600


def plot_score(
    rows: Sequence[Mapping[str, Any]],
    name: ScoreName,
    path: str | Path,
    *,
    normalizer: Normalizer = "english",
    threshold: float | None = None,
) -> None:
    """Draw one score before choosing where to cut: a histogram, and kept hours over the threshold.

    Values beyond the 1st and 99th percentile are drawn at the border, so that a few loops of 1000 % do not hide the
    rest; labels without a value are counted in the title.

    Args:
        rows: label rows as for `label_scores`.
        name: the score.
        path: PNG file, written atomically.
        normalizer: for wer and cer.
        threshold: drawn as a line, with the hours it keeps.

    Raises:
        ValueError: no label has a value, or a row lacks what the score needs.
    """
    values = label_scores(rows, name, normalizer)
    usable = np.isfinite(values)
    if not usable.any():
        raise ValueError(
            f"none of {len(rows)} labels has a value of {name} to draw; wer and cer need references, all need texts"
        )
    higher_is_better = name in HIGHER_IS_BETTER
    seconds = [row["duration_seconds"] for row in rows]
    thresholds, kept_hours = kept_hours_curve(values, seconds, higher_is_better=higher_is_better)
    low, high = np.percentile(values[usable], [1, 99])
    if low == high:
        low, high = low - 0.5, high + 0.5

    figure = Figure(figsize=(8, 6), layout="constrained")
    spread, curve = figure.subplots(2, sharex=True)
    spread.hist(np.clip(values[usable], low, high), bins=50, range=(low, high))
    spread.set_ylabel("labels")
    undefined = len(values) - int(usable.sum())
    spread.set_title(f"{name}: {len(values)} labels, {sum(seconds) / 3600:.2f} h, {undefined} without a value")
    strictest, loosest = (high, low) if higher_is_better else (low, high)
    curve.step([strictest, *thresholds, loosest], [0, *kept_hours, kept_hours[-1]], where="post")
    curve.set_xlim(low, high)
    curve.set_ylim(0, 1.05 * sum(seconds) / 3600)
    curve.set_ylabel("kept hours")
    share = curve.secondary_yaxis(
        "right", functions=(lambda hours: 360_000 * hours / sum(seconds), lambda part: part * sum(seconds) / 360_000)
    )
    share.set_ylabel("kept share (%)")
    curve.set_xlabel(f"threshold: {AXIS_LABELS[name]}, {'higher' if higher_is_better else 'lower'} is better")
    if threshold is not None:
        kept = usable & ((values >= threshold) if higher_is_better else (values <= threshold))
        hours = float(np.asarray(seconds)[kept].sum()) / 3600
        for axes in (spread, curve):
            axes.axvline(threshold, color="black", linestyle="--")
        curve.set_title(f"{threshold:g} keeps {int(kept.sum())} labels, {hours:.2f} h")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
