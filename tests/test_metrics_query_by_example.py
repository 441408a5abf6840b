import math

import numpy as np
import pytest

from speechkd.metrics import query_by_example as query_by_example_module
from speechkd.metrics.query_by_example import (
    QUESST_BETA,
    best_threshold,
    match_scores,
    normalised_scores,
    open_ended_dtw,
    query_by_example,
    score_detections,
    term_weighted_value,
)

SCORES = np.array([[3.0, 1.0, 0.0, -1.0], [2.0, 2.5, 0.5, -2.0]])
TARGETS = np.array([[True, True, False, False], [True, False, False, False]])


def path_by_recursion(distances):
    """Least sum along a path that steps 0, 1 or 2 document frames with every query frame, over the query's frames."""
    num_query, num_document = distances.shape

    def cost(query, document):
        if document < 0:
            return math.inf
        if query == 0:
            return distances[0, document]
        return distances[query, document] + min(cost(query - 1, document - step) for step in (0, 1, 2))

    return min(cost(num_query - 1, document) for document in range(num_document)) / num_query


def match_by_loop(query, document, frames):
    """Score of one pair, straight from the definition."""
    centre, spread = frames.mean(axis=0), frames.std(axis=0)
    query, document = (query - centre) / spread, (document - centre) / spread
    distances = np.array(
        [[math.exp(1 - q @ d / np.linalg.norm(q) / np.linalg.norm(d)) - 1 for d in document] for q in query]
    )
    low, high = distances.min(axis=1, keepdims=True), distances.max(axis=1, keepdims=True)
    return -path_by_recursion((distances - low) / (high - low))


def random_clips(prefix, lengths, dim=6, seed=0):
    generator = np.random.default_rng(seed)
    return {f"{prefix}{index}": generator.normal(size=(length, dim)) for index, length in enumerate(lengths)}


def test_worked_example_of_the_path():
    # begin at the second frame, stay for one query frame, then jump over the fourth: 0 + 1 + 0 of three query frames
    distances = [[9, 0, 9, 9, 9], [9, 1, 9, 9, 9], [9, 9, 9, 0, 9]]
    assert open_ended_dtw([distances]).tolist() == pytest.approx([1 / 3])


def test_path_never_goes_back_nor_skips_two_frames():
    assert open_ended_dtw([[[5, 0], [0, 5]]]).tolist() == [2.5]
    assert open_ended_dtw([[[0, 5, 5, 5], [5, 5, 5, 0]]]).tolist() == [2.5]
    assert open_ended_dtw([[[0, 5, 5, 5], [5, 5, 0, 5]]]).tolist() == [0]


def test_paths_equal_a_recursion():
    distances = np.random.default_rng(1).random((4, 6, 7))
    expected = [path_by_recursion(table) for table in distances]
    np.testing.assert_allclose(open_ended_dtw(distances), expected)


def test_padding_of_documents_is_never_entered():
    distances = np.random.default_rng(2).random((2, 5, 6))
    padded = np.concatenate([distances, np.full((2, 5, 3), math.inf)], axis=2)
    np.testing.assert_array_equal(open_ended_dtw(padded), open_ended_dtw(distances))


def test_document_of_one_frame_matches_all_query_frames_with_it():
    assert open_ended_dtw([[[1.0], [2.0], [6.0]]]).tolist() == [3]


def test_scores_equal_the_definition_whatever_the_lengths():
    queries, documents = random_clips("q", [5, 7]), random_clips("d", [9, 3, 12, 6], seed=1)
    frames = np.concatenate([*queries.values(), *documents.values()])
    expected = [
        [match_by_loop(query, document, frames) for document in documents.values()] for query in queries.values()
    ]
    np.testing.assert_allclose(match_scores(queries, documents), expected, atol=1e-12)


def test_documents_are_searched_in_parts(monkeypatch):
    queries, documents = random_clips("q", [5, 7]), random_clips("d", [9, 3, 12, 6, 8], seed=1)
    at_once = match_scores(queries, documents)
    monkeypatch.setattr(query_by_example_module, "DOCUMENTS_AT_ONCE", 2)
    np.testing.assert_allclose(match_scores(queries, documents), at_once, atol=1e-12)


def test_document_that_holds_the_query_is_best():
    documents = random_clips("d", [20] * 5)
    queries = {"q": documents["d3"][6:14]}
    scores = match_scores(queries, documents)[0]
    assert scores.argmax() == 3
    assert scores[3] == pytest.approx(0, abs=1e-12)
    assert scores.max() <= 0 and scores.min() >= -1


def test_shift_and_scale_of_every_dimension_do_not_matter():
    queries, documents = random_clips("q", [6]), random_clips("d", [9, 8], seed=1)
    shift, scale = np.arange(6.0), np.linspace(0.1, 100, 6)
    moved = [{name: frames * scale + shift for name, frames in clips.items()} for clips in (queries, documents)]
    np.testing.assert_allclose(match_scores(*moved), match_scores(queries, documents), atol=1e-9)


def test_constant_dimension_and_single_precision_change_little():
    queries, documents = random_clips("q", [6]), random_clips("d", [9, 8], seed=1)
    wider = [
        {
            name: np.column_stack([frames, np.full(len(frames), 2.0)]).astype(np.float32)
            for name, frames in clips.items()
        }
        for clips in (queries, documents)
    ]
    np.testing.assert_allclose(match_scores(*wider), match_scores(queries, documents), atol=1e-5)


def test_scores_are_normalised_per_query():
    normalised = normalised_scores([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])
    np.testing.assert_allclose(normalised, [[-math.sqrt(1.5), 0, math.sqrt(1.5)], [0, 0, 0]])


def test_worked_example_of_the_term_weighted_value():
    # above 1.5 the first query misses one of two targets, the second has one false alarm in three
    assert term_weighted_value(SCORES, TARGETS, 1.5, beta=0.6) == pytest.approx(1 - (0.5 + 0.6 / 3) / 2)
    assert term_weighted_value(SCORES, TARGETS, math.inf) == 0
    assert term_weighted_value(SCORES, TARGETS, -math.inf) == pytest.approx(1 - QUESST_BETA)
    assert term_weighted_value(SCORES, TARGETS, 3.0) == 0  # detected means above


def test_weight_of_false_alarms_is_that_of_quesst():
    assert QUESST_BETA == pytest.approx(1 / 100 * (1 / 0.0008 - 1))


@pytest.mark.parametrize("beta", [0.1, 1.0, QUESST_BETA])
@pytest.mark.parametrize("seed", range(4))
def test_best_threshold_is_the_best_of_all(seed, beta):
    generator = np.random.default_rng(seed)
    targets = generator.random((6, 9)) < 0.4
    targets[:, 0], targets[:, 1] = True, False
    scores = np.round(generator.normal(size=targets.shape) + 1.5 * targets, 1)  # rounded, so that some are equal
    values = [term_weighted_value(scores, targets, threshold, beta=beta) for threshold in [*scores.ravel(), math.inf]]
    values.append(term_weighted_value(scores, targets, -math.inf, beta=beta))
    found = score_detections(scores, targets, beta=beta)
    assert found.mtwv == pytest.approx(max(values))
    assert term_weighted_value(scores, targets, found.threshold, beta=beta) == found.mtwv


def test_separated_scores_are_perfect():
    found = score_detections(np.where(TARGETS, 3.0, -1.0), TARGETS)
    assert (found.mtwv, found.atwv, found.threshold, found.top1) == (1, 1, 1, 1)
    assert found.chance == 3 / 8
    assert (found.num_queries, found.num_documents) == (2, 4)


def test_scores_the_wrong_way_round_detect_nothing():
    found = score_detections(np.where(TARGETS, -1.0, 3.0), TARGETS)
    assert (found.mtwv, found.threshold, found.top1) == (0, math.inf, 0)
    assert found.atwv == pytest.approx(-QUESST_BETA)
    assert best_threshold(np.where(TARGETS, -1.0, 3.0), TARGETS) == math.inf


def test_top1_counts_ties_in_part():
    assert score_detections(np.zeros((2, 4)), TARGETS).top1 == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert score_detections(SCORES, TARGETS).top1 == 0.5


def test_short_queries_are_scored_as_never_found():
    documents = random_clips("d", [20] * 8)
    queries = {"long": documents["d2"][5:13], "short": documents["d4"][5:9]}
    targets = np.zeros((2, 8), dtype=bool)
    targets[0, 2] = targets[1, 4] = True
    found = query_by_example(queries, documents, targets)
    assert (found.num_queries, found.num_documents, found.num_short) == (2, 8, 1)
    assert (found.mtwv, found.top1) == pytest.approx((0.5, (1 + 1 / 8) / 2))
    assert (match_scores(queries, documents)[1] == 0).all()


@pytest.mark.parametrize(
    ("queries", "documents", "message"),
    [
        ({}, {"d": np.ones((6, 2))}, "there is no query; check the lists"),
        ({"q": np.ones((6, 2))}, {}, "there is no document"),
        ({"q": np.ones((6, 2))}, {"d": np.ones((6, 3))}, r"frames have the widths \[2, 3\]"),
        ({"q": np.ones((6, 2))}, {"d": np.ones((0, 2))}, r"document 'd' has frames \(0, 2\)"),
        ({"q": np.ones(6)}, {"d": np.ones((6, 2))}, r"query 'q' has frames \(6,\)"),
        ({"q": np.full((6, 2), math.nan)}, {"d": np.ones((6, 2))}, r"query 'q' has frames \(6, 2\), or NaN"),
    ],
)
def test_clips_that_cannot_be_matched_are_refused(queries, documents, message):
    with pytest.raises(ValueError, match=message):
        match_scores(queries, documents)


@pytest.mark.parametrize(
    ("scores", "targets", "message"),
    [
        (SCORES, TARGETS[:1], r"scores \(2, 4\) and targets \(1, 4\) of bool do not fit"),
        (SCORES, TARGETS.astype(int), "of int64 do not fit"),
        (SCORES[:0], TARGETS[:0], r"scores \(0, 4\)"),
        (np.where(TARGETS, SCORES, math.nan), TARGETS, "query 0 scores nan on document 2"),
        (SCORES, TARGETS & False, "query 0 occurs in 0 of 4 documents, .* leave the query out"),
        (SCORES, np.array([TARGETS[0], [True] * 4]), "query 1 occurs in 4 of 4 documents"),
    ],
)
def test_scores_that_have_no_value_are_refused(scores, targets, message):
    for measure in (score_detections, best_threshold, lambda *args: term_weighted_value(*args, 0.0)):
        with pytest.raises(ValueError, match=message):
            measure(scores, targets)


@pytest.mark.parametrize("shape", [(2, 3), (1, 0, 3), (1, 3, 0)])
def test_distances_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="alignment needs .documents, query frames, document frames."):
        open_ended_dtw(np.zeros(shape))
