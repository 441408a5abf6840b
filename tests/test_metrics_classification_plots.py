import math
import warnings

import matplotlib.image
import numpy as np
import pytest

from speechkd.metrics.classification_plots import fit_band, log_fit, plot_confusion, plot_k_shot, t_percentile

SCORES = {
    "SEGUE": {1: [0.31, 0.36, 0.33], 2: [0.42, 0.45, 0.40], 4: [0.55, 0.52, 0.57], 16: [0.71, 0.72, 0.70]},
    "untouched encoder": {1: [0.2, 0.25, 0.22], 2: [0.26, 0.28, 0.3], 4: [0.33, 0.36, 0.35], 16: [0.5, 0.48, 0.52]},
}


def dark_share(path):
    """Share of pixels in strong blue: cells that hold most of their row."""
    red, green, blue = np.moveaxis(matplotlib.image.imread(path)[..., :3], -1, 0)
    return float(((red < 0.3) & (green < 0.5) & (blue > 0.4)).mean())


def coloured_share(path):
    """Share of pixels that are not grey."""
    return float((np.ptp(matplotlib.image.imread(path)[..., :3], axis=-1) > 0.2).mean())


@pytest.mark.parametrize(
    ("degrees", "value"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (10, 2.22814), (23, 2.06866)]
)
def test_percentiles_of_student_are_those_of_the_tables(degrees, value):
    assert t_percentile(degrees) == pytest.approx(value, rel=3e-6)


def test_percentiles_of_student_equal_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 2, 3, 5, 8, 50, 501):
        assert t_percentile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-10)


def test_percentile_without_a_degree_of_freedom_is_refused():
    with pytest.raises(ValueError, match="1 degree of freedom or more, got 0"):
        t_percentile(0)


def test_an_exact_log_law_is_found_with_a_band_of_no_width():
    ks = [1, 2, 4, 8, 16]
    fit = log_fit(ks, [0.1 * math.log(k) + 0.3 for k in ks])
    assert (fit.slope, fit.intercept) == pytest.approx((0.1, 0.3))
    score, low, high = fit_band(fit, np.array([1.0, math.e]))
    assert score == pytest.approx([0.3, 0.4])
    assert high - low == pytest.approx(0, abs=1e-12)


def test_band_of_a_small_example():
    # x = ln k = 0, 1, 2 (k need not be whole here): a = 0.15, b = 0.2, residuals 0.1 (1, -2, 1) / 2
    fit = log_fit([1, math.e, math.e**2], [0.25, 0.25, 0.55])
    assert (fit.slope, fit.intercept) == pytest.approx((0.15, 0.2))
    assert fit.residual_deviation == pytest.approx(math.sqrt(0.05**2 + 0.1**2 + 0.05**2))
    score, low, high = fit_band(fit, np.array([math.e, math.e**2]))
    assert score == pytest.approx([0.35, 0.5])
    half_width = 12.7062 * fit.residual_deviation * np.sqrt([1 / 3, 1 / 3 + 1 / 2])
    assert high - score == pytest.approx(half_width, rel=1e-5)
    assert score - low == pytest.approx(half_width, rel=1e-5)


def test_band_covers_the_true_line_in_95_of_100_fits():
    random = np.random.default_rng(0)
    ks = [k for k in (1, 2, 4, 8, 16) for _ in range(2)]
    covered = 0
    for _ in range(1000):
        fit = log_fit(ks, 0.1 * np.log(ks) + 0.3 + random.normal(scale=0.05, size=len(ks)))
        _, low, high = fit_band(fit, np.array([8.0]))
        covered += bool(low[0] <= 0.1 * math.log(8) + 0.3 <= high[0])
    assert 0.93 < covered / 1000 < 0.97


@pytest.mark.parametrize(
    ("ks", "scores", "message"),
    [
        ([1, 2], [0.1], "2 k and 1 scores differ in number"),
        ([1, 2], [0.1, 0.2], r"3 scores or more at 2 different k, got 2 at k=\[1, 2\]"),
        ([4, 4, 4], [0.1, 0.2, 0.3], r"2 different k, got 3 at k=\[4\]"),
        ([0, 1, 2], [0.1, 0.2, 0.3], "every k must be 1 or more"),
        ([1, 2, 4], [0.1, math.nan, 0.3], "every score a number"),
    ],
)
def test_points_that_cannot_be_fitted_are_refused(ks, scores, message):
    with pytest.raises(ValueError, match=message):
        log_fit(ks, scores)


def test_confusion_picture_is_a_png_and_dark_where_items_are(tmp_path):
    names = ["espresso", "mocha", "latte", "tea"]
    plot_confusion(np.diag([5, 9, 2, 7]), names, tmp_path / "new" / "right.png", title="drinks")
    assert (tmp_path / "new" / "right.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["right.png"]
    plot_confusion(np.full((4, 4), 5), names, tmp_path / "spread.png", title="drinks")
    assert dark_share(tmp_path / "new" / "right.png") > 0.05
    assert dark_share(tmp_path / "spread.png") < 0.5 * dark_share(tmp_path / "new" / "right.png")


def test_colour_is_the_share_of_the_true_class_not_the_count(tmp_path):
    plot_confusion(np.diag([1000, 1, 1]), list("abc"), tmp_path / "uneven.png")
    plot_confusion(np.diag([10, 10, 10]), list("abc"), tmp_path / "even.png")
    assert dark_share(tmp_path / "uneven.png") == pytest.approx(dark_share(tmp_path / "even.png"), rel=0.1)


def test_many_classes_with_long_names_stay_readable(tmp_path):
    names = [f"a little bit of almond milk and sugar, variant number {index}" for index in range(40)]
    plot_confusion(np.diag(range(1, 41)), names, tmp_path / "many.png")
    height, width, _ = matplotlib.image.imread(tmp_path / "many.png").shape
    # 0.45 inch of 120 dots for each class, and the names beside them
    assert min(height, width) > 40 * 0.4 * 120
    assert max(height, width) < 40 * 0.45 * 120 + 600


def test_long_names_that_differ_in_the_middle_can_be_told_apart(tmp_path):
    pictures = []
    for kind in ("soy", "skim"):
        path = tmp_path / f"{kind}.png"
        plot_confusion(np.eye(2, dtype=int), [f"a little bit of {kind} milk with brown sugar", "tea"], path)
        pictures.append(path.read_bytes())
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize("name", ["$5 and $6", "a_{", "100 %", "", "\\frac"])
def test_names_are_drawn_as_they_are(tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_confusion(np.array([[1, 2], [0, 3]]), [name, "tea"], tmp_path / "confusion.png", title=name)
        plot_k_shot({f"a{name}": SCORES["SEGUE"]}, tmp_path / "curve.png", score_name=name, title=name)
    assert (tmp_path / "confusion.png").exists() and (tmp_path / "curve.png").exists()


def test_a_class_that_does_not_occur_can_be_drawn(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_confusion(np.array([[0, 0], [4, 1]]), ["never", "often"], tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").exists()


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.zeros((2, 2), dtype=int), r"counts \(2, 2\) with 0 items cannot be drawn for 2 classes"),
        (np.ones((2, 3), dtype=int), r"counts \(2, 3\) .* must be \(2, 2\)"),
        (np.ones((3, 3), dtype=int), r"must be \(2, 2\)"),
    ],
)
def test_a_matrix_that_does_not_fit_is_refused(tmp_path, counts, message):
    with pytest.raises(ValueError, match=message):
        plot_confusion(counts, ["a", "b"], tmp_path / "confusion.png")
    assert list(tmp_path.iterdir()) == []


def test_curve_is_a_png_with_a_line_and_a_band(tmp_path):
    plot_k_shot(SCORES, tmp_path / "new" / "curve.png", score_name="slot accuracy", title="barista")
    assert (tmp_path / "new" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["curve.png"]
    points = {name: {4: runs[4]} for name, runs in SCORES.items()}
    plot_k_shot(points, tmp_path / "points.png", score_name="slot accuracy")
    assert coloured_share(tmp_path / "new" / "curve.png") > 1.5 * coloured_share(tmp_path / "points.png") > 0


def test_one_run_of_each_k_can_be_drawn(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_k_shot({"a": {1: [0.1], 2: [0.2]}, "b": {1: [0.3]}}, tmp_path / "curve.png", score_name="accuracy")
    assert (tmp_path / "curve.png").exists()


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({}, "every system needs a score"),
        ({"a": {}}, r"every system needs a score .* \{'a': \{\}\}"),
        ({"a": {1: [0.1], 2: []}}, r"\{'a': \{1: 1, 2: 0\}\}"),
        ({"a": {0: [0.1]}}, "every k of 'a' must be 1 or more"),
        ({"a": {1: [math.nan]}}, "every score a number"),
    ],
)
def test_scores_that_cannot_be_drawn_are_refused(tmp_path, scores, message):
    with pytest.raises(ValueError, match=message):
        plot_k_shot(scores, tmp_path / "curve.png", score_name="accuracy")
    assert list(tmp_path.iterdir()) == []
