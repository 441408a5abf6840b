import math

import numpy as np
import pytest
import torch

from speechkd.metrics.retrieval import retrieval_scores


def test_only_directions_count_in_the_search():
    generator = np.random.default_rng(0)
    text, names = generator.normal(size=(20, 5)), [str(number) for number in range(20)]
    assert retrieval_scores(text * generator.uniform(0.01, 100, size=(20, 1)), text, names)["top1"] == 1.0
    assert retrieval_scores(-text, text, names)["top1"] == 0.0


def test_more_clips_than_go_at_once():
    text, names = np.random.default_rng(0).normal(size=(1500, 8)), [str(number) for number in range(1500)]
    speech = text.copy()
    speech[[3, 1400]] *= -1
    assert retrieval_scores(torch.from_numpy(speech), text, names)["top1"] == pytest.approx(1498 / 1500)


def test_equally_near_texts_share_the_point():
    text = np.array([[1.0, 0], [1.0, 0], [0, 1.0]])
    assert retrieval_scores(text, text, ["a", "b", "c"])["top1"] == pytest.approx((0.5 + 0.5 + 1) / 3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_encoder_that_maps_all_clips_to_one_vector_scores_chance(dtype):
    generator = np.random.default_rng(0)
    same = np.repeat(generator.normal(size=(1, 384)), 50, axis=0).astype(dtype)
    scores = retrieval_scores(same, generator.normal(size=(50, 384)).astype(dtype), [str(n) for n in range(50)])
    assert scores["top1"] == pytest.approx(1 / 50) == scores["chance"]


def test_clips_of_one_text_look_for_one_candidate():
    text = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    speech = np.array([[2.0, 0.1], [0.1, 3.0], [1.0, 0.9]])  # the last is nearer to the first text
    scores = retrieval_scores(speech, text, ["coffee", "a tone", "a tone"])
    assert scores["top1"] == pytest.approx(2 / 3) and scores["chance"] == 0.5
    assert scores["num_clips"] == 3 and scores["num_texts"] == 2
    cosines = [2 / math.hypot(2, 0.1), 3 / math.hypot(3, 0.1), 0.9 / math.hypot(1, 0.9)]
    assert scores["positive_cosine"] == pytest.approx(sum(cosines) / 3)
    assert scores["mse"] == pytest.approx((1 + 0.01 + 0.01 + 4 + 1 + 0.01) / 6)


def test_an_encoder_that_says_the_same_of_all_clips_scores_by_chance():
    generator = np.random.default_rng(0)
    text = np.repeat(generator.normal(size=(1, 4)), 5, axis=0)
    scores = retrieval_scores(np.ones((5, 4)), text, list("abcde"))
    assert scores["top1"] == pytest.approx(0.2) == scores["chance"]
    assert retrieval_scores(np.ones((2, 4)), text[:2], ["a", "a"])["top1"] == 1.0  # one candidate alone
    assert retrieval_scores(np.zeros((1, 4)), text[:1], ["a"])["positive_cosine"] == 0.0


def test_the_order_of_the_clips_does_not_matter():
    generator = np.random.default_rng(1)
    texts = [str(index % 9) for index in range(12)]
    text = generator.normal(size=(9, 3))[[int(said) for said in texts]]
    speech = text + generator.normal(size=text.shape)
    order = generator.permutation(12)
    scores = retrieval_scores(speech, text, texts)
    assert 0 < scores["top1"] < 1
    assert retrieval_scores(speech[order], text[order], [texts[i] for i in order]) == pytest.approx(scores)


def test_vectors_that_cannot_be_compared_are_refused():
    good = np.ones((2, 3))
    for speech, text, texts in (
        (good, np.ones((2, 4)), ["a", "b"]),
        (good, good, ["a"]),
        (np.ones((0, 3)), np.ones((0, 3)), []),
    ):
        with pytest.raises(ValueError, match="must be one each for every clip, of one width"):
            retrieval_scores(speech, text, texts)
    broken = good.copy()
    broken[1, 0] = np.nan
    with pytest.raises(ValueError, match="the vector of clip 1 and 0 more of 2 hold NaN"):
        retrieval_scores(broken, good, ["a", "b"])
