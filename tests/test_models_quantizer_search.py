import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechkd.models.quantizer_search import SEARCH_BYTES, chunk_frames, refine_codes


def mean_error(frames, codes, centers):
    decoded = centers[torch.arange(len(centers)), codes].sum(dim=1)
    return (decoded - frames).square().sum(dim=-1).mean().item()


def trained_like():
    """The card's case of a good start: frames, codes, centers."""
    generator = torch.Generator().manual_seed(1)
    centers = 0.5 * torch.randn(4, 16, 16, generator=generator)
    frames = torch.randn(512, 16, generator=generator)
    scores = torch.einsum("fd,nkd->fnk", frames, centers) - centers.square().sum(dim=-1) / 2
    return frames, scores.argmax(dim=-1), centers


def over_complete():
    """The card's case of many entries in few dimensions, with a random start."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(8, 16, 4, generator=generator)
    frames = 3 * torch.randn(256, 4, generator=generator)
    return frames, torch.randint(0, 16, (256, 8), generator=generator), centers


PUBLISHED = [
    (trained_like, False, [7.8933, 6.5568, 6.4001, 6.3732, 6.3732]),
    (trained_like, True, [6.7862, 6.4548, 6.4102, 6.3949, 6.3949]),
    (over_complete, False, [23.2857, 59.0797, 30.2402, 64.0596, 34.9123]),
    (over_complete, True, [2.3058, 0.2161, 0.1414, 0.1292, 0.1268]),
]


@pytest.mark.parametrize(("case", "keep_current", "errors"), PUBLISHED)
def test_errors_after_each_call_are_the_measured_ones(case, keep_current, errors):
    frames, codes, centers = case()
    for number, error in enumerate(errors, start=1):
        several = refine_codes(frames, codes, centers, number, keep_current=keep_current)
        assert mean_error(frames, several, centers) == pytest.approx(error, abs=5e-5)


def test_frames_that_each_call_changes_and_share_of_optimal_ones():
    frames, start, centers = trained_like()
    assert mean_error(frames, start, centers) == pytest.approx(13.3734, abs=5e-5)
    changed, codes = [], start
    for _ in range(5):
        after = refine_codes(frames, codes, centers, keep_current=False)
        changed.append(int((after != codes).any(dim=-1).sum()))
        codes = after
    assert changed == [503, 307, 80, 12, 0]
    first, second = ((centers[i][:, None] + centers[i + 1]).flatten(0, 1) for i in (0, 2))
    left = frames[:, None] - first  # (frames, 256, dim)
    products = left @ second.T
    errors = left.square().sum(dim=-1, keepdim=True) + second.square().sum(dim=-1) - 2 * products
    best = errors.flatten(1).min(dim=-1).values
    assert best.mean().item() == pytest.approx(6.0686, abs=5e-5)
    ours = (centers[torch.arange(4), codes].sum(dim=1) - frames).square().sum(dim=-1)
    assert (ours < best + 1e-4).float().mean().item() == pytest.approx(0.627, abs=5e-4)


@settings(max_examples=40, deadline=None)
@given(
    num_codebooks=st.sampled_from([1, 2, 4, 8, 16]),
    codebook_size=st.sampled_from([2, 4, 8, 16, 32]),
    dim=st.integers(1, 9),
    shift=st.sampled_from([0.0, 30.0]),
    seed=st.integers(0, 10_000),
)
def test_no_error_rises_while_the_codes_as_they_are_survive(num_codebooks, codebook_size, dim, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(num_codebooks, codebook_size, dim, generator=generator) + shift
    frames = 3 * torch.randn(20, dim, generator=generator) + shift
    codes = torch.randint(codebook_size, (20, num_codebooks), generator=generator)
    for _ in range(3):
        after = refine_codes(frames, codes, centers)
        for row in range(20):
            old, new = (mean_error(frames[[row]].double(), c[[row]], centers.double()) for c in (codes, after))
            assert new <= old + 1e-4 * max(1, abs(old))
        codes = after


def test_a_case_whose_error_rises_in_the_published_search():
    frames, codes, centers = over_complete()
    once = refine_codes(frames, codes, centers, 1, keep_current=False)
    twice = refine_codes(frames, once, centers, 1, keep_current=False)
    assert mean_error(frames, twice, centers) > 2 * mean_error(frames, once, centers)


@pytest.mark.parametrize("keep_current", [True, False])
@pytest.mark.parametrize(("num_codebooks", "codebook_size"), [(1, 2), (2, 2), (4, 2), (2, 4), (1, 256), (2, 8)])
def test_few_combinations_are_searched_to_the_best(num_codebooks, codebook_size, keep_current):
    torch.manual_seed(3)
    centers, frames = torch.randn(num_codebooks, codebook_size, 6), torch.randn(30, 6)
    start = torch.zeros(30, num_codebooks, dtype=torch.int64)
    codes = refine_codes(frames, start, centers, 1, keep_current=keep_current)
    every = torch.tensor(list(itertools.product(range(codebook_size), repeat=num_codebooks)))
    sums = centers[torch.arange(num_codebooks), every].sum(dim=1)
    best = torch.cdist(frames, sums, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=-1)
    assert codes.tolist() == every[best].tolist()


def test_an_offset_of_all_frames_costs_no_digits():
    frames, start, centers = trained_like()
    shifts = 1000 * torch.randn(4, 1, 16, generator=torch.Generator().manual_seed(2))
    plain = refine_codes(frames, start, centers, 5)
    shifted = refine_codes(frames + shifts.sum(dim=(0, 1)), start, centers + shifts, 5)
    assert (plain == shifted).all(dim=-1).float().mean() > 0.99


def test_chunks_give_what_single_frames_give():
    torch.manual_seed(0)
    centers, frames = torch.randn(4, 4, 20_000), torch.randn(100, 20_000)
    start = torch.randint(4, (100, 4))
    assert 1 < chunk_frames(*centers.shape) < 50
    together = refine_codes(frames, start, centers, 2)
    alone = torch.cat([refine_codes(frames[[row]], start[[row]], centers, 2) for row in range(100)])
    assert together.equal(alone)


def test_a_chunk_stays_within_its_bytes():
    for num_codebooks, codebook_size, dim in [(8, 256, 1280), (32, 256, 1024), (2, 16, 64), (64, 256, 4096)]:
        scores = num_codebooks * codebook_size
        kept = num_codebooks * 16 * dim
        size = chunk_frames(num_codebooks, codebook_size, dim)
        assert size == 1 or 4 * size * (scores + kept) <= SEARCH_BYTES


def test_the_search_makes_no_graph_and_leaves_its_input():
    frames, start, centers = trained_like()
    saved = []
    before = start.clone()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor), lambda tensor: tensor):
        refine_codes(frames.requires_grad_(), start, centers.requires_grad_(), 2)
    assert not saved and start.equal(before)


def test_autocast_changes_nothing():
    frames, start, centers = trained_like()
    plain = refine_codes(frames, start, centers, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert refine_codes(frames, start, centers, 5).equal(plain)
