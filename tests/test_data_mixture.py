import json
from itertools import islice

import numpy as np
import pytest
from accelerate.data_loader import skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, DataLoader

from speechkd.data.manifest import read_manifest
from speechkd.data.mixture import Mixture, MixtureSampler, batch_counts
from speechkd.data.sampler import DurationBatchSampler
from speechkd.data.whisper import WhisperTrainSet

SIZES = (60, 25, 7)
WEIGHTS = [1, 2, 0.5]


def make_mixture(weights=WEIGHTS, rank: int = 0, world_size: int = 1, seed: int = 3) -> MixtureSampler:
    rng = np.random.default_rng(0)
    samplers = [
        DurationBatchSampler(
            rng.uniform(1, 10, size=size), 20.0, seed=seed, rank=rank, world_size=world_size, num_buckets=3
        )
        for size in SIZES
    ]
    return MixtureSampler(samplers, weights)


def batches_of_epochs(mixture: MixtureSampler, num_epochs: int) -> list[list[int]]:
    batches = []
    for epoch in range(num_epochs):
        mixture.set_epoch(epoch)
        batches += list(mixture)
    return batches


def corpora_of(batches: list[list[int]]) -> list[int]:
    """The corpus of each batch; every index of a batch must be of the same."""
    edges = np.cumsum(SIZES)
    corpora = [set(np.searchsorted(edges, batch, side="right").tolist()) for batch in batches]
    assert all(len(corpus) == 1 for corpus in corpora)
    return [corpus.pop() for corpus in corpora]


@pytest.mark.parametrize("weights", [[1, 2, 0.5], [0.7, 0.2, 0.1], [1, 1, 1], [100, 1, 1], [1 / 3, 0.123456789, 2e-3]])
def test_after_any_number_of_batches_every_corpus_has_given_its_share_to_within_one(weights):
    corpora = corpora_of(batches_of_epochs(make_mixture(weights), 4))
    taken = np.cumsum(np.eye(3)[corpora], axis=0)
    wanted = np.arange(1, len(corpora) + 1)[:, None] * np.array(weights) / sum(weights)
    assert abs(taken - wanted).max() < 1


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(st.integers(1, 100), min_size=1, max_size=9), num_batches=st.integers(0, 400))
def test_the_counts_of_any_prefix_are_within_one_of_the_shares(weights, num_batches):
    counts = batch_counts(weights, num_batches)
    assert sum(counts) == num_batches
    for weight, count in zip(weights, counts, strict=True):
        assert abs(count * sum(weights) - num_batches * weight) < sum(weights)


def test_the_corpus_furthest_behind_would_leave_the_bound_where_the_quota_method_keeps_it():
    weights = [2, 6, 100, 100, 10, 21, 2]
    for num_batches in range(2 * sum(weights)):
        shares = np.array(weights) * num_batches / sum(weights)
        assert abs(batch_counts(weights, num_batches) - shares).max() < 1


def test_an_epoch_has_as_many_batches_as_the_corpora_together():
    mixture = make_mixture()
    assert len(mixture) == sum(map(len, mixture.samplers))
    assert all(len(batches_of_epochs(mixture, num)) == num * len(mixture) for num in (1, 3))


def test_every_corpus_is_covered_completely_before_it_repeats_and_is_then_reshuffled():
    mixture = make_mixture()
    batches = batches_of_epochs(mixture, 8)
    corpora = corpora_of(batches)
    edges = [0, *np.cumsum(SIZES)]
    for corpus, sampler in enumerate(mixture.samplers):
        own = [batch for batch, number in zip(batches, corpora, strict=True) if number == corpus]
        passes = [own[first : first + len(sampler)] for first in range(0, len(own), len(sampler))]
        assert len(passes) >= 3
        for batches_of_pass in passes[:-1]:
            assert sorted(sum(batches_of_pass, [])) == list(range(edges[corpus], edges[corpus + 1]))
        assert passes[0] != passes[1]


def test_all_ranks_take_the_same_corpus_at_the_same_step():
    ranks = [batches_of_epochs(make_mixture(rank=rank, world_size=2), 2) for rank in range(2)]
    assert corpora_of(ranks[0]) == corpora_of(ranks[1])
    assert ranks[0] != ranks[1]


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_a_restored_state_gives_the_rest_of_the_epoch_on_every_rank(epoch):
    for position in (0, 1, 7, len(make_mixture(world_size=2))):
        stopped = make_mixture(world_size=2)
        stopped.set_epoch(epoch)
        list(islice(stopped, position))
        state = json.loads(json.dumps(stopped.state_dict()))
        assert state["position"] == position
        for rank in range(2):
            whole, resumed = make_mixture(rank=rank, world_size=2), make_mixture(rank=rank, world_size=2)
            expected = batches_of_epochs(whole, epoch + 2)
            resumed.load_state_dict(state)
            assert resumed.state_dict() == state
            assert list(resumed) == expected[epoch * len(whole) + position : (epoch + 1) * len(whole)]
            resumed.set_epoch(epoch + 1)
            assert list(resumed) == expected[(epoch + 1) * len(whole) :]


def test_a_second_iteration_of_an_epoch_gives_the_same_batches():
    mixture = make_mixture()
    mixture.set_epoch(2)
    first = list(mixture)
    assert list(mixture) == first


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_loader_reads_the_concatenated_corpora_and_accelerate_skips_into_them(num_workers):
    corpora = ConcatDataset([[(corpus, index) for index in range(size)] for corpus, size in enumerate(SIZES)])
    items = [corpora[index] for index in range(len(corpora))]
    expected = [[items[index] for index in batch] for batch in make_mixture()]
    loader = DataLoader(corpora, batch_sampler=make_mixture(), collate_fn=list, num_workers=num_workers)
    assert list(loader) == expected and len(loader) == len(expected)
    assert list(skip_first_batches(loader, 5)) == expected[5:]


def test_weights_in_any_unit_give_the_same_batches():
    assert list(make_mixture([0.75, 0.5, 0.25])) == list(make_mixture([3, 2, 1]))
    assert make_mixture([0.7, 0.2, 0.1]).weights == [7, 2, 1]


def test_wrong_weights_and_samplers_of_different_processes_are_refused():
    for weights, message in (
        ([1, 1], "3 corpora and 2 weights"),
        ([1, 0, 1], "weight 1 of the mixture is 0; it must be a positive number"),
        ([1, 1, float("nan")], "weight 2 of the mixture is nan"),
        ([float("inf"), 1, 1], "weight 0 of the mixture is inf"),
    ):
        with pytest.raises(ValueError, match=message):
            make_mixture(weights)
    with pytest.raises(ValueError, match="0 corpora and 0 weights"):
        MixtureSampler([], [])
    samplers = [DurationBatchSampler(np.ones(4), 2.0, rank=rank, world_size=2) for rank in range(2)]
    with pytest.raises(ValueError, match=r"different \(rank, world_size\), \[\(0, 2\), \(1, 2\)\]"):
        MixtureSampler(samplers, [1, 1])


def test_a_state_of_another_mixture_is_refused():
    state = make_mixture().state_dict()
    with pytest.raises(ValueError, match=r"has weights=\[2, 4, 1\], this run has \[1, 1, 1\]"):
        make_mixture([1, 1, 1]).load_state_dict(state)
    with pytest.raises(ValueError, match="corpus 0 of the mixture's state has seed=3, this run has 4"):
        make_mixture(seed=4).load_state_dict(state)
    with pytest.raises(ValueError, match="position=9999, outside 0 to"):
        make_mixture().load_state_dict({**state, "position": 9999})


def test_every_corpus_of_a_mixture_is_told_the_epoch(tone_manifest):
    manifest = read_manifest(tone_manifest)
    parts = [manifest.select(range(2)), manifest.select(range(2, 6))]
    mixture = Mixture([WhisperTrainSet(part, [[1]] * len(part)) for part in parts])
    mixture.set_epoch(3)
    assert [mixture[index]["epoch"] for index in (0, 5)] == [3, 3] and mixture[5]["id"] == "tone-5"
