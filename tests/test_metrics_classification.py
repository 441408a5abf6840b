import math

import numpy as np
import pytest
import torch

from speechkd.metrics.classification import (
    ClassScores,
    accuracy,
    class_scores,
    confusion_counts,
    macro_f1,
    mosei_scores,
    pearson_r,
    weighted_f1,
)

TRUTH, PREDICTIONS = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 0]
SENTIMENT = [-2, -0.4, 0, 0.6, 1.5, 3]
PREDICTED_SENTIMENT = [-1.2, 0.1, 0.3, 0.4, 2.5, 2.2]


def plain_f1(truth, predictions, label):
    right = sum(a == b == label for a, b in zip(truth, predictions, strict=True))
    called, actual = predictions.count(label), truth.count(label)
    precision = right / called if called else 0
    recall = right / actual if actual else 0
    return 2 * precision * recall / (precision + recall) if right else 0


def random_labels(seed, count=60):
    """Truth and predictions; class 5 is never predicted, class 6 never true."""
    random = np.random.default_rng(seed)
    truth = random.integers(0, 6, size=count).tolist()
    predictions = [
        label if random.random() < 0.5 and label != 5 else int(random.choice([0, 1, 2, 3, 4, 6])) for label in truth
    ]
    return truth, predictions


def test_worked_example_of_weighted_f1_and_accuracy():
    assert weighted_f1(TRUTH, PREDICTIONS) == pytest.approx(0.6, abs=1e-12)
    assert accuracy(TRUTH, PREDICTIONS) == pytest.approx(0.666667, abs=5e-7)


def test_intents_of_the_worked_example():
    truth, predictions = list("aabcc"), list("abbac")
    assert accuracy(truth, predictions) == pytest.approx(0.6)
    assert macro_f1(truth, predictions) == pytest.approx(0.611111, abs=5e-7)
    scores = class_scores(truth, predictions).values()
    assert np.mean([score.precision for score in scores]) == pytest.approx(0.666667, abs=5e-7)
    assert np.mean([score.recall for score in scores]) == pytest.approx(0.666667, abs=5e-7)


def test_scores_of_every_class():
    scores = class_scores(TRUTH, PREDICTIONS)
    assert list(scores) == [0, 1, 2]
    assert scores[0] == ClassScores(precision=2 / 3, recall=2 / 3, f1=2 / 3, num_true=3, num_predicted=3)
    assert scores[1] == ClassScores(precision=2 / 3, recall=1.0, f1=0.8, num_true=2, num_predicted=3)
    assert scores[2] == ClassScores(precision=0.0, recall=0.0, f1=0.0, num_true=1, num_predicted=0)


@pytest.mark.parametrize("seed", range(5))
def test_means_of_f1_are_those_of_a_plain_loop(seed):
    truth, predictions = random_labels(seed)
    labels = sorted({*truth, *predictions})
    by_class = [plain_f1(truth, predictions, label) for label in labels]
    assert macro_f1(truth, predictions) == pytest.approx(sum(by_class) / len(labels))
    weighted = sum(f1 * truth.count(label) for f1, label in zip(by_class, labels, strict=True)) / len(truth)
    assert weighted_f1(truth, predictions) == pytest.approx(weighted)


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_those_of_sklearn(seed):
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    truth, predictions = random_labels(seed)
    for average, ours in (("weighted", weighted_f1), ("macro", macro_f1)):
        theirs = sklearn_metrics.f1_score(truth, predictions, average=average, zero_division=0)
        assert ours(truth, predictions) == pytest.approx(theirs)
    counts, classes = confusion_counts(truth, predictions)
    assert counts.tolist() == sklearn_metrics.confusion_matrix(truth, predictions, labels=classes).tolist()


def test_confusion_has_true_rows_and_predicted_columns():
    counts, classes = confusion_counts(TRUTH, PREDICTIONS)
    assert classes == [0, 1, 2]
    assert counts.tolist() == [[2, 1, 0], [0, 2, 0], [1, 0, 0]]


def test_confusion_follows_the_given_order_and_keeps_absent_classes():
    counts, classes = confusion_counts(["tea", "tea"], ["tea", "milk"], ["tea", "water", "milk"])
    assert classes == ["tea", "water", "milk"]
    assert counts.tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 0]]


def test_a_class_unknown_to_training_counts_as_wrong():
    assert accuracy([0, 1, -1, -1], [0, 1, 0, 1]) == 0.5
    assert class_scores([0, 1, -1, -1], [0, 1, 0, 1])[-1].recall == 0
    assert confusion_counts([0, -1], [0, 0])[1] == [-1, 0]


def test_arrays_and_tensors_score_like_lists():
    counts, classes = confusion_counts(np.array(TRUTH), torch.tensor(PREDICTIONS))
    assert counts.tolist() == confusion_counts(TRUTH, PREDICTIONS)[0].tolist()
    assert all(type(label) is int for label in classes)
    assert weighted_f1(torch.tensor(TRUTH), np.array(PREDICTIONS)) == weighted_f1(TRUTH, PREDICTIONS)
    assert accuracy(np.array(["a", "b"]), ["a", "c"]) == 0.5


@pytest.mark.parametrize("score", [accuracy, confusion_counts, class_scores, weighted_f1, macro_f1])
@pytest.mark.parametrize(
    ("truth", "predictions", "message"),
    [
        (["a"], ["a", "b"], "1 truths and 2 predictions differ in number"),
        ([], [], "there is no item to score"),
        (["a", "b"], [0, 1], r"got 'a' and 0 \(str, int\)"),
        (["a", None], ["a", "a"], "leave out items without a label"),
        ([0.0, math.nan], [0.0, 1.0], "whole numbers"),
    ],
)
def test_labels_that_cannot_be_compared_are_refused(score, truth, predictions, message):
    with pytest.raises(ValueError, match=message):
        score(truth, predictions)


def test_classes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"labels \['water'\] are not among the 1 classes"):
        confusion_counts(["tea"], ["water"], ["tea"])
    with pytest.raises(ValueError, match=r"classes \['tea'\] stand twice in the list of 2"):
        confusion_counts(["tea"], ["tea"], ["tea", "tea"])


def test_worked_example_of_the_five_sentiment_scores():
    scores = mosei_scores(SENTIMENT, PREDICTED_SENTIMENT)
    assert scores.mae == pytest.approx(0.6, abs=1e-12)
    assert scores.pearson_r == pytest.approx(0.9266294, abs=5e-8)
    assert scores.weighted_f1 == pytest.approx(0.7809524, abs=5e-8)
    assert scores.accuracy_2 == pytest.approx(0.8, abs=1e-12)
    assert scores.accuracy_7 == pytest.approx(0.5, abs=1e-12)
    assert (scores.num_items, scores.num_nonzero) == (6, 5)


def test_halves_round_to_the_even_number():
    # 0.5 -> 0, 1.5 -> 2, 2.5 -> 2, -0.5 -> 0
    assert mosei_scores([0.5, 1.5, 2.5, -0.5], [0, 2, 2, 0]).accuracy_7 == 1.0


def test_a_prediction_beyond_the_scale_is_not_cut_to_it():
    assert mosei_scores([3.0, 1.0], [3.6, 1.0]).accuracy_7 == 0.5


def test_neutral_truths_count_only_for_error_correlation_and_seven_classes():
    without = mosei_scores([1.0, -1.0, 2.0], [0.5, 0.2, 1.0])
    with_neutral = mosei_scores([1.0, -1.0, 2.0, 0.0], [0.5, 0.2, 1.0, -3.0])
    assert with_neutral.weighted_f1 == without.weighted_f1
    assert with_neutral.accuracy_2 == without.accuracy_2
    assert with_neutral.mae > without.mae
    assert with_neutral.num_nonzero == 3


def test_a_prediction_of_zero_is_not_negative_but_not_positive_either():
    scores = mosei_scores([1.0, 2.0, -1.0], [0.0, 2.0, -1.0])
    assert scores.accuracy_2 == 1.0
    assert scores.weighted_f1 == pytest.approx(weighted_f1([1, 1, 0], [0, 1, 0]))


def test_correlation_does_not_depend_on_scale_and_changes_sign():
    assert pearson_r(SENTIMENT, PREDICTED_SENTIMENT) == pytest.approx(np.corrcoef(SENTIMENT, PREDICTED_SENTIMENT)[0, 1])
    assert pearson_r([1, 2, 4], [10, 20, 40]) == pytest.approx(1.0)
    assert pearson_r([1, 2, 4], [-1, -2, -4]) == pytest.approx(-1.0)


def test_correlation_with_a_constant_does_not_exist():
    assert math.isnan(pearson_r([1, 2, 3], [0.1, 0.1, 0.1]))
    assert math.isnan(pearson_r([1], [2]))


@pytest.mark.parametrize(
    ("truth", "predictions", "message"),
    [
        ([1.0, 2.0], [1.0], "2 truths and 1 predictions differ in number"),
        ([], [], "there is no item to score"),
        ([1.0, math.nan], [1.0, 1.0], "item 1 has truth nan and prediction 1.0, and 0 more of 2 are not finite"),
        ([1.0, 1.0], [math.inf, 1.0], "item 0 has truth 1.0 and prediction inf"),
        ([[1.0]], [[1.0]], r"must be one number per item, \(items,\)"),
    ],
)
def test_values_that_cannot_be_compared_are_refused(truth, predictions, message):
    for score in (mosei_scores, pearson_r):
        with pytest.raises(ValueError, match=message):
            score(truth, predictions)


def test_sentiment_without_any_that_is_not_neutral_is_refused():
    with pytest.raises(ValueError, match="all 2 truths are 0"):
        mosei_scores([0.0, 0.0], [1.0, -1.0])
