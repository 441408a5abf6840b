import numpy as np
import pytest

from speechkd.data.sampler import DurationBatchSampler

DURATIONS = np.random.default_rng(0).uniform(1.0, 20.0, size=203)


def test_batches_stay_within_the_padded_seconds_and_cover_every_utterance_once():
    sampler = DurationBatchSampler(DURATIONS, 60.0)
    batches = list(sampler)
    assert sorted(sum(batches, [])) == list(range(203))
    assert all(len(batch) * DURATIONS[batch].max() <= 60.0 for batch in batches)
    padded = sum(len(batch) * DURATIONS[batch].max() for batch in batches)
    assert padded < 1.1 * DURATIONS.sum()  # bucketing wastes little


def test_every_rank_and_epoch_has_the_same_number_of_batches_and_none_is_left_out():
    for epoch in range(3):
        seen = []
        for rank in range(4):
            sampler = DurationBatchSampler(DURATIONS, 60.0, rank=rank, world_size=4)
            sampler.set_epoch(epoch)
            batches = list(sampler)
            assert len(batches) == len(sampler)
            seen += sum(batches, [])
        assert set(seen) == set(range(203))


def test_an_epoch_is_reproducible_and_differs_from_the_next():
    sampler = DurationBatchSampler(DURATIONS, 60.0, seed=5)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_an_utterance_above_the_limit_and_an_empty_set_are_refused():
    with pytest.raises(ValueError, match="utterance 1 lasts 31.0 s, longer than max_batch_seconds=30.0"):
        DurationBatchSampler(np.array([1.0, 31.0]), 30.0)
    with pytest.raises(ValueError, match="no utterance to batch"):
        DurationBatchSampler(np.array([]), 30.0)
