import json
from itertools import chain, islice

import numpy as np
import pytest
from benchmarks.padding import MAX_PADDING, padded_seconds, padding_share, random_batches, simulated_durations
from hypothesis import given, settings
from hypothesis import strategies as st

from speechkd.data.sampler import BatchLimits, DurationBatchSampler, StreamBatcher, bucket_edges

DURATIONS = np.random.default_rng(0).uniform(1.0, 20.0, size=203)

durations_lists = st.lists(st.sampled_from([0.3, 1.0, 2.5, 7.1]) | st.floats(0.1, 30.0), min_size=1, max_size=120)
limit_settings = st.fixed_dictionaries(
    {
        "quadratic_duration_seconds": st.none() | st.floats(15.0, 40.0),
        "max_batch_size": st.none() | st.integers(1, 9),
    }
)
max_seconds = st.floats(100.0, 300.0)  # 30 s cost 90 s at most with the quadratic term


def bucket_numbers(durations: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.searchsorted(edges, durations).clip(max=len(edges) - 1)


def test_batches_stay_within_the_padded_seconds_and_cover_every_utterance_once():
    sampler = DurationBatchSampler(DURATIONS, 60.0)
    batches = list(sampler)
    assert sorted(chain(*batches)) == list(range(203))
    assert padded_seconds(batches, DURATIONS).max() <= 60.0
    assert padding_share(batches, DURATIONS) < 0.1


@settings(max_examples=150, deadline=None)
@given(
    durations=durations_lists,
    max_batch_seconds=max_seconds,
    limits=limit_settings,
    world_size=st.integers(1, 4),
    num_buckets=st.integers(1, 12),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 9),
)
def test_on_any_durations_the_ranks_share_one_plan(
    durations, max_batch_seconds, limits, world_size, num_buckets, seed, epoch
):
    durations = np.array(durations)
    bucket_of = bucket_numbers(durations, bucket_edges(durations, num_buckets))
    settings_of_all = {"seed": seed, "world_size": world_size, "num_buckets": num_buckets, **limits}
    ranks = []
    for rank in range(world_size):
        sampler = DurationBatchSampler(durations, max_batch_seconds, rank=rank, **settings_of_all)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler) > 0
    cost = BatchLimits(max_batch_seconds, **limits).cost_seconds
    for step in zip(*ranks, strict=True):
        assert len({bucket_of[index] for index in chain(*step)}) == 1
        lengths = [len(batch) for batch in step]
        assert 1 <= min(lengths) and max(lengths) <= min(min(lengths) + 1, limits["max_batch_size"] or 10**9)
        assert all(len(batch) * cost(durations[batch].max()) <= max_batch_seconds for batch in step)
    counts = np.bincount(list(chain(*chain(*ranks))), minlength=len(durations))
    assert counts.min() >= 1
    for bucket, size in enumerate(sampler.batch_sizes):
        of_bucket = counts[bucket_of == bucket]
        if size > 1 and len(of_bucket) >= world_size:
            assert (of_bucket == 1).all()
        assert (of_bucket - 1).sum() < world_size  # repeats complete one step


@settings(max_examples=50, deadline=None)
@given(durations=durations_lists, world_size=st.integers(1, 3), epoch=st.integers(0, 5), share=st.floats(0, 1))
def test_a_restored_state_gives_the_rest_of_the_epoch_on_every_rank(durations, world_size, epoch, share):
    def make(rank: int) -> DurationBatchSampler:
        return DurationBatchSampler(np.array(durations), 60.0, rank=rank, world_size=world_size, num_buckets=4, seed=9)

    stopped = make(0)
    stopped.set_epoch(epoch)
    position = round(share * len(stopped))
    list(islice(stopped, position))
    state = json.loads(json.dumps(stopped.state_dict()))
    assert state["position"] == position
    for rank in range(world_size):
        whole, resumed = make(rank), make(rank)
        whole.set_epoch(epoch)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert list(resumed) == list(whole)[position:]
        assert list(resumed) == list(whole)  # only the first iteration is shortened
        resumed.set_epoch(epoch + 1)
        whole.set_epoch(epoch + 1)
        assert list(resumed) == list(whole)


def test_a_state_of_other_data_or_processes_is_refused():
    state = DurationBatchSampler(DURATIONS, 60.0, world_size=2).state_dict()
    for other, message in (
        (DurationBatchSampler(DURATIONS, 60.0), "world_size=2, this run has 1"),
        (DurationBatchSampler(DURATIONS, 60.0, world_size=2, seed=1), "seed=0, this run has 1"),
        (DurationBatchSampler(DURATIONS[1:], 60.0, world_size=2), "num_utterances=203, this run has 202"),
        (DurationBatchSampler(DURATIONS, 90.0, world_size=2), "num_steps="),
    ):
        with pytest.raises(ValueError, match=f"the sampler's state has {message}"):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="position=99999, outside 0 to"):
        DurationBatchSampler(DURATIONS, 60.0, world_size=2).load_state_dict({**state, "position": 99_999})


def test_an_epoch_is_reproducible_and_differs_from_the_next():
    sampler = DurationBatchSampler(DURATIONS, 60.0, seed=5)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first and len(second) == len(first)
    assert list(DurationBatchSampler(DURATIONS, 60.0, seed=6)) != first


def test_batches_of_a_bucket_are_equally_full():
    sampler = DurationBatchSampler(np.full(16, 30.0), 150.0)
    assert [len(batch) for batch in sampler] == [4, 4, 4, 4]  # not 5, 5, 5, 1


def test_equal_durations_are_shuffled_as_one_bucket():
    sampler = DurationBatchSampler(np.full(1000, 30.0), 300.0)
    assert len(sampler.buckets) == 1
    assert max(max(batch) - min(batch) for batch in sampler) > 500


def test_the_quadratic_term_shrinks_long_batches_and_a_count_bounds_short_ones():
    plain = BatchLimits(200.0)
    quadratic = BatchLimits(200.0, quadratic_duration_seconds=20.0)
    assert (plain.batch_size(20.0), quadratic.batch_size(20.0)) == (10, 5)  # 20 + 20**2 / 20 = 40
    assert (plain.batch_size(1.0), quadratic.batch_size(1.0)) == (200, 190)
    assert BatchLimits(200.0, max_batch_size=64).batch_size(1.0) == 64
    durations = np.array([20.0] * 10 + [1.0] * 190)
    sampler = DurationBatchSampler(durations, 200.0, quadratic_duration_seconds=20.0, max_batch_size=95)
    assert sorted(len(batch) for batch in sampler) == [5, 5, 95, 95]


def test_buckets_hold_equal_seconds_and_equal_durations_share_one():
    for kind in MAX_PADDING:
        durations = simulated_durations(kind)
        edges = bucket_edges(durations, 30)
        seconds = np.bincount(bucket_numbers(durations, edges), weights=durations)
        shares = 30 * seconds / seconds.sum()
        np.testing.assert_allclose(shares[:-1], 1, rtol=0.01)
        assert edges[-1] == durations.max() and shares[-1] == pytest.approx(31 - len(edges), rel=0.01)
    assert len(bucket_edges(simulated_durations("conversational"), 30)) == 29  # two edges at its 30 s became one
    np.testing.assert_array_equal(bucket_edges(np.array([1.0, 1.0, 1.0, 1.0, 8.0]), 4), [1.0, 8.0])


@pytest.mark.parametrize(("kind", "bucketed", "unbucketed"), [("read", 0.030, 0.201), ("conversational", 0.054, 0.748)])
def test_thirty_buckets_pad_little_and_no_batch_passes_200_seconds(kind, bucketed, unbucketed):
    durations = simulated_durations(kind)
    assert padding_share(random_batches(durations), durations) == pytest.approx(unbucketed, abs=0.005)
    batches = list(DurationBatchSampler(durations, 200.0, num_buckets=30))
    share = padding_share(batches, durations)
    assert share <= MAX_PADDING[kind] and share == pytest.approx(bucketed, abs=0.005)
    assert (padded_seconds(batches, durations) > 200.0).sum() == 0


@pytest.mark.parametrize("kind", MAX_PADDING)
def test_a_stream_with_a_buffer_pads_as_little(kind):
    durations = simulated_durations(kind)
    batcher = StreamBatcher(bucket_edges(durations[:10_000], 30), 200.0, buffer_size=20_000)
    batches = list(batcher.batches(enumerate(durations.tolist())))
    assert padding_share(batches, durations) <= MAX_PADDING[kind]
    assert (padded_seconds(batches, durations) > 200.0).sum() == 0


@settings(max_examples=150, deadline=None)
@given(
    durations=durations_lists,
    max_batch_seconds=max_seconds,
    limits=limit_settings,
    world_size=st.integers(1, 4),
    extra_buffer=st.integers(0, 40),
    num_edges_seen=st.integers(1, 120),
)
def test_on_any_stream_the_ranks_share_one_plan(
    durations, max_batch_seconds, limits, world_size, extra_buffer, num_edges_seen
):
    durations = np.array(durations)
    edges = bucket_edges(durations[:num_edges_seen], 5)  # of the beginning: longer ones may follow
    buffer_size = len(edges) * world_size + extra_buffer
    ranks = []
    for rank in range(world_size):
        batcher = StreamBatcher(
            edges, max_batch_seconds, buffer_size=buffer_size, rank=rank, world_size=world_size, **limits
        )
        batches = []
        for batch in batcher.batches(enumerate(durations.tolist())):
            batches.append(batch)
            assert sum(map(len, batcher.held)) < buffer_size
        ranks.append(batches)
    bucket_of = bucket_numbers(durations, edges)
    cost = BatchLimits(max_batch_seconds, **limits).cost_seconds
    for step in zip(*ranks, strict=True):
        assert len({bucket_of[index] for index in chain(*step)}) == 1
        assert all(batch and len(batch) <= (limits["max_batch_size"] or 10**9) for batch in step)
        assert all(len(batch) * cost(durations[batch].max()) <= max_batch_seconds for batch in step)
    counts = np.bincount(list(chain(*chain(*ranks))), minlength=len(durations))
    assert counts.min() >= 1 and (world_size > 1 or counts.max() == 1)
    # an item comes again only to fill the last group of a bucket
    assert (counts - 1).sum() <= len(edges) * (world_size - 1)


@settings(max_examples=50, deadline=None)
@given(durations=durations_lists, num_drawn=st.integers(0, 40), epoch=st.integers(0, 3), world_size=st.integers(1, 2))
def test_a_restored_batcher_gives_the_rest_of_the_stream(durations, num_drawn, epoch, world_size):
    items = list(enumerate(durations))

    def make() -> StreamBatcher[int]:
        batcher = StreamBatcher(
            bucket_edges(np.array(durations), 4), 60.0, buffer_size=20, world_size=world_size, seed=2
        )
        batcher.set_epoch(epoch)
        return batcher

    whole = list(make().batches(iter(items)))
    stopped = make()
    drawn = list(islice(stopped.batches(iter(items)), num_drawn))
    resumed = make()
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed.load_state_dict(state)
    assert drawn + list(resumed.batches(iter(items[state["num_read"] :]))) == whole


def test_a_batcher_refuses_a_state_of_other_buckets_or_processes():
    state = StreamBatcher(np.array([1.0, 2.0]), 60.0).state_dict()
    with pytest.raises(ValueError, match="state has 2 buckets, this run has 1"):
        StreamBatcher(np.array([1.0]), 60.0).load_state_dict(state)
    with pytest.raises(ValueError, match="state has 1 processes, this run has 2"):
        StreamBatcher(np.array([1.0, 2.0]), 60.0, world_size=2).load_state_dict(state)


def test_an_utterance_above_the_limit_and_an_empty_set_are_refused():
    with pytest.raises(ValueError, match="utterance 1 lasts 31.0 s, longer than max_batch_seconds=30.0"):
        DurationBatchSampler(np.array([1.0, 31.0]), 30.0)
    with pytest.raises(ValueError, match="lasts 20.0 s and costs 40.0 s with quadratic_duration_seconds=20"):
        DurationBatchSampler(np.array([20.0]), 30.0, quadratic_duration_seconds=20.0)
    with pytest.raises(ValueError, match="no utterance to batch"):
        DurationBatchSampler(np.array([]), 30.0)
    for seconds in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"utterance 1 has a duration of {seconds} s"):
            DurationBatchSampler(np.array([1.0, seconds]), 30.0)
    with pytest.raises(ValueError, match="item 1 of the stream lasts 31.0 s, longer than max_batch_seconds=30.0"):
        list(StreamBatcher(np.array([5.0]), 30.0).batches([("a", 1.0), ("b", 31.0)]))
    with pytest.raises(ValueError, match="item 0 of the stream has a duration of nan s"):
        list(StreamBatcher(np.array([5.0]), 30.0).batches([("a", np.nan)]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_batch_seconds": np.nan}, "max_batch_seconds must be a positive number, got nan"),
        ({"quadratic_duration_seconds": 0.0}, "quadratic_duration_seconds must be positive, got 0.0"),
        ({"max_batch_size": 0}, "max_batch_size must be 1 or more, got 0"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"rank": 2, "world_size": 2}, "got rank=2 with world_size=2"),
        ({"num_buckets": 0}, "num_buckets must be 1 or more, got 0"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DurationBatchSampler(DURATIONS, **{"max_batch_seconds": 60.0, **arguments})


def test_a_buffer_too_small_for_the_buckets_is_refused():
    with pytest.raises(ValueError, match="buffer_size=5 is below 2 buckets x 4 processes; raise it to 8 or more"):
        StreamBatcher(np.array([1.0, 2.0]), 60.0, buffer_size=5, world_size=4)


@pytest.mark.parametrize("world_size", [1, 2])
def test_sort_keys_bring_like_together_in_as_many_equally_full_batches(world_size):
    keys = np.random.default_rng(5).integers(5, 60, size=400)
    durations, settings_of_all = np.full(400, 30.0), {"world_size": world_size, "seed": 2}
    ranks = []
    for rank in range(world_size):
        plain = DurationBatchSampler(durations, 240.0, rank=rank, **settings_of_all)
        by_key = DurationBatchSampler(durations, 240.0, rank=rank, sort_keys=keys, **settings_of_all)
        ranks.append(list(by_key))
        assert [len(batch) for batch in ranks[-1]] == [len(batch) for batch in plain]
        padded = [sum(len(batch) * keys[batch].max() for batch in sampler) for sampler in (by_key, plain)]
        assert padded[0] < 0.7 * padded[1]
        by_key.set_epoch(1)
        assert {frozenset(batch) for batch in by_key}.isdisjoint(map(frozenset, ranks[-1]))  # others meet
    assert sorted(chain(*chain(*ranks))) == list(range(400))
    for step in zip(*ranks, strict=True):
        assert np.ptp([np.median(keys[batch]) for batch in step]) < 10  # no rank waits for a longer one


def test_a_small_corpus_is_still_mixed_when_it_is_sorted():
    sampler = DurationBatchSampler(np.full(32, 30.0), 240.0, sort_keys=np.arange(32))
    first = {frozenset(batch) for batch in sampler}
    sampler.set_epoch(1)
    assert len(first) == 4 and first.isdisjoint(frozenset(batch) for batch in sampler)


def test_sorted_batches_go_on_where_an_epoch_was_left():
    settings_of_all = {"sort_keys": np.arange(100) % 7, "seed": 4}
    whole = DurationBatchSampler(np.full(100, 30.0), 120.0, **settings_of_all)
    batches = list(whole)
    resumed = DurationBatchSampler(np.full(100, 30.0), 120.0, **settings_of_all)
    resumed.load_state_dict({**whole.state_dict(), "position": 10})
    assert list(resumed) == batches[10:]


def test_a_sort_key_for_each_utterance_is_needed():
    with pytest.raises(ValueError, match="there are 3 durations and 2 sort_keys; give one each"):
        DurationBatchSampler(np.ones(3), 2.0, sort_keys=np.ones(2))
