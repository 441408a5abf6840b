import math

import matplotlib.image
import numpy as np
import pytest

from speechkd.labels.filter_plots import AXIS_LABELS, kept_hours_curve, plot_score
from speechkd.labels.filters import HIGHER_IS_BETTER, FilterConfig, ScoreFilter, ScoreName, apply_filters, label_scores

OFF = {
    "min_mean_logprob": None,
    "max_compression_ratio": None,
    "max_repeated_5grams": None,
    "drop_all_caps": False,
    "drop_empty": False,
    "drop_unfinished": False,
}


def random_rows(name, count=60):
    """Labels with scores on a coarse grid, so that many are equal, and a few without a value."""
    random = np.random.default_rng(1)
    values = random.uniform(0, 1, size=count).round(1).tolist()
    values[::10] = [None, math.nan, math.inf] * (count // 30)
    return [
        {"id": str(index), "text": "some words", "duration_seconds": float(random.uniform(1, 30)), name: value}
        for index, value in enumerate(values)
    ]


def coloured_share(path):
    """Share of pixels that are not grey: the bars and the curve."""
    pixels = matplotlib.image.imread(path)[..., :3]
    return float((np.ptp(pixels, axis=-1) > 0.2).mean())


@pytest.mark.parametrize("name", ["lm_nll", "speech_text_cosine"])
def test_curve_gives_the_hours_that_the_filter_keeps_at_each_threshold(name):
    rows = random_rows(name)
    thresholds, kept_hours = kept_hours_curve(
        label_scores(rows, name),
        [row["duration_seconds"] for row in rows],
        higher_is_better=name in HIGHER_IS_BETTER,
    )
    assert len(thresholds) == 11
    assert list(thresholds) == sorted(thresholds, reverse=name in HIGHER_IS_BETTER)
    for threshold, hours in zip(thresholds, kept_hours, strict=True):
        score = ScoreFilter(name=name, threshold=float(threshold))
        _, report = apply_filters(rows, FilterConfig(**OFF, scores=[score]))
        assert hours == pytest.approx(report.kept.kept_hours)


def test_curve_of_a_small_example():
    values = np.array([20.0, math.nan, 0.0, 20.0, 10.0])
    thresholds, kept_hours = kept_hours_curve(values, [3600, 3600, 7200, 3600, 1800], higher_is_better=False)
    assert thresholds.tolist() == [0, 10, 20]
    assert kept_hours.tolist() == [2, 2.5, 4.5]
    thresholds, kept_hours = kept_hours_curve(values, [3600, 3600, 7200, 3600, 1800], higher_is_better=True)
    assert thresholds.tolist() == [20, 10, 0]
    assert kept_hours.tolist() == [2, 2.5, 4.5]


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_picture_is_a_png_with_bars_and_a_curve(tmp_path, threshold):
    path = tmp_path / "new" / "lm_nll.png"
    plot_score(random_rows("lm_nll"), "lm_nll", path, threshold=threshold)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in path.parent.iterdir()] == ["lm_nll.png"]
    assert 0.02 < coloured_share(path) < 0.6


def test_one_huge_value_does_not_flatten_the_others(tmp_path):
    rows = random_rows("proxy_wer", count=300)
    plot_score(rows, "proxy_wer", tmp_path / "plain.png")
    plot_score([*rows, rows[1] | {"id": "loop", "proxy_wer": 5000.0}], "proxy_wer", tmp_path / "outlier.png")
    assert coloured_share(tmp_path / "outlier.png") == pytest.approx(coloured_share(tmp_path / "plain.png"), rel=0.2)


def test_equal_values_can_be_drawn(tmp_path):
    rows = [{"id": "a", "text": "a", "duration_seconds": 1.0, "confidence": 1.0, "mean_logprob": -0.1}]
    plot_score(rows * 3, "confidence", tmp_path / "confidence.png")
    assert (tmp_path / "confidence.png").exists()


def test_a_score_without_any_value_is_refused(tmp_path):
    rows = [{"id": "a", "text": "a", "reference": None, "duration_seconds": 1.0}]
    with pytest.raises(ValueError, match="none of 1 labels has a value of wer to draw; wer and cer need references"):
        plot_score(rows, "wer", tmp_path / "wer.png")
    assert list(tmp_path.iterdir()) == []


def test_every_score_has_an_axis_label():
    assert set(AXIS_LABELS) == set(ScoreName.__args__)
