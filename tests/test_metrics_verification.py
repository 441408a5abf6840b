import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechkd.metrics.verification import (
    detection_errors,
    equal_error_rate,
    min_dcf,
    trial_scores,
    verification_scores,
)

SCORES = [0.9, 0.8, 0.7, 0.6, 0.55, 0.5, 0.4, 0.3, 0.2, 0.1]
LABELS = [1, 1, 0, 1, 1, 0, 1, 0, 0, 0]
PRIORS = (0.01, 0.05, 0.5)
EMBEDDINGS = {"a": [1.0, 0.0], "b": [3.0, 4.0], "c": [0.0, -2.0]}

both_kinds = st.lists(st.tuples(st.integers(-8, 8), st.booleans()), min_size=2, max_size=40).filter(
    lambda trials: len({label for _, label in trials}) == 2
)


def dcf_by_loop(scores, labels, prior):
    """Cost at every score and above the highest, counted trial by trial."""
    costs = []
    for threshold in [*scores, math.inf]:
        miss = sum(label and score < threshold for score, label in zip(scores, labels, strict=True)) / sum(labels)
        alarm = sum(not label and score >= threshold for score, label in zip(scores, labels, strict=True))
        alarm /= len(labels) - sum(labels)
        costs.append((miss * prior + alarm * (1 - prior)) / min(prior, 1 - prior))
    return min(costs)


def test_worked_example():
    assert equal_error_rate(SCORES, LABELS) == pytest.approx(0.2)
    assert [min_dcf(SCORES, LABELS, target_prior=prior) for prior in PRIORS] == pytest.approx([0.6, 0.6, 0.4])


def test_worked_example_in_one_call():
    scores = verification_scores(SCORES, LABELS)
    assert (scores.eer, scores.min_dcf) == pytest.approx((0.2, 0.6))
    assert (scores.target_prior, scores.num_targets, scores.num_nontargets) == (0.05, 5, 5)


@pytest.mark.parametrize("prior", PRIORS)
def test_perfect_separation_has_no_error(prior):
    assert equal_error_rate([3, 2, 1, 0], [1, 1, 0, 0]) == 0
    assert min_dcf([3, 2, 1, 0], [1, 1, 0, 0], target_prior=prior) == 0


@pytest.mark.parametrize("prior", PRIORS)
def test_equal_scores_are_a_trivial_system(prior):
    assert equal_error_rate([0.3] * 5, [1, 0, 0, 1, 0]) == 0.5
    assert min_dcf([0.3] * 5, [1, 0, 0, 1, 0], target_prior=prior) == 1


@pytest.mark.parametrize("prior", PRIORS)
def test_scores_the_wrong_way_round_cost_no_more_than_accepting_nothing(prior):
    assert equal_error_rate([0, 1, 2, 3], [1, 1, 0, 0]) == 1
    assert min_dcf([0, 1, 2, 3], [1, 1, 0, 0], target_prior=prior) == 1


def test_rates_without_a_crossing_are_interpolated():
    # (false alarms, hits): (0, 0), (0, 1/2), (1/3, 1/2), (1/3, 1), ...: 1 - x meets the second step at x = 1/3, and
    # with the tie between target and non-target it meets the line from (0, 1/2) to (1/3, 1) at 1 - x = 1/2 + 3 x / 2
    assert equal_error_rate([5, 4, 3, 2, 1], [1, 0, 1, 0, 0]) == pytest.approx(1 / 3)
    assert equal_error_rate([5, 4, 4, 2, 1], [1, 0, 1, 0, 0]) == pytest.approx(0.2)


def test_order_of_tied_trials_does_not_matter():
    assert equal_error_rate([1, 1, 0, 0], [1, 0, 1, 0]) == equal_error_rate([1, 1, 0, 0], [0, 1, 0, 1])


@given(both_kinds)
def test_increasing_transforms_change_nothing_and_costs_equal_a_loop(trials):
    scores, labels = [score for score, _ in trials], [label for _, label in trials]
    transformed = [math.exp(score / 4) - 100 for score in scores]
    assert equal_error_rate(transformed, labels) == equal_error_rate(scores, labels)
    for prior in PRIORS:
        cost = min_dcf(scores, labels, target_prior=prior)
        assert cost == min_dcf(transformed, labels, target_prior=prior)
        assert cost == pytest.approx(dcf_by_loop(scores, labels, prior))


@given(both_kinds)
def test_kinds_of_trials_may_change_places(trials):
    scores, labels = np.array([score for score, _ in trials]), np.array([label for _, label in trials])
    assert equal_error_rate(-scores, ~labels) == pytest.approx(equal_error_rate(scores, labels))


@given(both_kinds)
def test_rates_move_one_way_from_nothing_to_everything_accepted(trials):
    thresholds, miss, false_alarm = detection_errors([score for score, _ in trials], [label for _, label in trials])
    assert (np.diff(thresholds) < 0).all() and (np.diff(miss) <= 0).all() and (np.diff(false_alarm) >= 0).all()
    assert (miss[0], false_alarm[0], miss[-1], false_alarm[-1]) == (1, 0, 0, 1)


def test_rates_equal_those_of_sklearn_and_scipy():
    metrics, optimize = pytest.importorskip("sklearn.metrics"), pytest.importorskip("scipy.optimize")
    generator = np.random.default_rng(0)
    labels = generator.random(500) < 0.3
    scores = generator.normal(size=500) + 1.5 * labels
    alarms, hits, _ = metrics.roc_curve(labels, scores, drop_intermediate=False)
    _, miss, false_alarm = detection_errors(scores, labels)
    np.testing.assert_allclose(false_alarm, alarms)
    np.testing.assert_allclose(1 - miss, hits)
    eer = optimize.brentq(lambda x: 1 - x - np.interp(x, alarms, hits), 0, 1)
    assert equal_error_rate(scores, labels) == pytest.approx(eer, abs=1e-9)


def test_higher_cost_of_misses_weighs_them_like_a_higher_prior():
    # 9 * 0.1 : 0.9 is the ratio of 0.5 : 0.5, and normalising takes the common factor out
    dear = min_dcf(SCORES, LABELS, target_prior=0.1, miss_cost=9.0)
    assert dear == pytest.approx(min_dcf(SCORES, LABELS, target_prior=0.5))


def test_trials_are_scored_by_cosine():
    trials = [("a", "b"), ("b", "c"), ("a", "c"), ("b", "b")]
    assert trial_scores(EMBEDDINGS, trials).tolist() == pytest.approx([0.6, -0.8, 0, 1])
    assert trial_scores({"a": np.float32([1, 1]), "b": np.float32([2, 2])}, [("a", "b")]).dtype == np.float64


def test_length_of_embeddings_does_not_matter():
    scaled = {name: np.array(vector) * 7 for name, vector in EMBEDDINGS.items()}
    trials = [("a", "b"), ("b", "c")]
    np.testing.assert_allclose(trial_scores(scaled, trials), trial_scores(EMBEDDINGS, trials))


@pytest.mark.parametrize(
    ("changed", "trials", "message"),
    [
        ({}, [], "there is no trial to score"),
        ({}, [("a", "x"), ("y", "b")], "2 of 4 clips in the trials have no embedding, 'x' first"),
        ({"b": [0.0, 0.0]}, [("a", "b")], "the embedding of 'b' and 0 more of 2 are zero or hold NaN"),
        ({"c": [math.nan, 0.0]}, [("a", "c")], "the embedding of 'c'"),
        ({"b": [1.0]}, [("a", "b")], r"embeddings have the shapes \[\(1,\), \(2,\)\]"),
        ({"a": [[1.0, 0.0]], "b": [[1.0, 0.0]]}, [("a", "b")], r"shapes \[\(1, 2\)\]; give one vector"),
    ],
)
def test_trials_that_cannot_be_scored_are_refused(changed, trials, message):
    with pytest.raises(ValueError, match=message):
        trial_scores(EMBEDDINGS | changed, trials)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1, 0.2], [1], r"scores \(2,\) and labels \(1,\) do not fit"),
        ([[0.1, 0.2]], [[1, 0]], r"scores \(1, 2\)"),
        ([], [], "0 of 0 trials are of the same speaker"),
        ([0.1, 0.2], [1, 1], "2 of 2 trials are of the same speaker; error rates need trials of both kinds"),
        ([0.1, math.nan, math.inf], [1, 0, 0], "trial 1 has the score nan, and 1 more of 3 are not finite"),
        ([0.1, 0.2], [1, 2], "trial 1 has the label .*2.*; labels are 1"),
        ([0.1, 0.2], [1, -1], "trial 1 has the label"),
    ],
)
def test_scores_and_labels_that_do_not_fit_are_refused(scores, labels, message):
    for measure in (equal_error_rate, detection_errors, verification_scores):
        with pytest.raises(ValueError, match=message):
            measure(scores, labels)


@pytest.mark.parametrize(
    "changed", [{"target_prior": 0.0}, {"target_prior": 1.0}, {"miss_cost": 0.0}, {"false_alarm_cost": math.nan}]
)
def test_costs_out_of_range_are_refused(changed):
    with pytest.raises(ValueError, match="a detection cost needs 0 < target_prior < 1 and positive costs"):
        min_dcf(SCORES, LABELS, **{"target_prior": 0.05} | changed)
