"""Heads by least squares are the best linear maps from the states that they are given."""

import pytest
import torch

from speechkd.losses.layerwise import PredictionHeads
from speechkd.models.head_start import start_heads

FRAMES, WIDTH, TEACHER_WIDTH = 400, 12, 10


def linear_targets(states: torch.Tensor, rank: int, heads: int) -> torch.Tensor:
    """Targets (frames, heads, teacher width) that are linear in the states, of this rank, and not of mean 0."""
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(heads, WIDTH, rank, generator=generator) @ torch.randn(
        heads, rank, TEACHER_WIDTH, generator=generator
    )
    return torch.einsum("fd,hde->fhe", states, maps) + 3.0


def drawn_states() -> torch.Tensor:
    return 2 * torch.randn(FRAMES, WIDTH, generator=torch.Generator().manual_seed(0)) + 1


@torch.no_grad()
def predictions(heads: PredictionHeads, states: torch.Tensor) -> torch.Tensor:
    """(frames, heads, teacher width)."""
    return heads([states[None]])[0].transpose(0, 1)


@pytest.mark.parametrize("inner_dim", [6, 7, 2 * WIDTH])
def test_heads_pass_linear_targets_of_half_their_inner_width_through_the_gelu(inner_dim):
    states = drawn_states()
    targets = linear_targets(states, rank=3, heads=2)
    heads = PredictionHeads(WIDTH, TEACHER_WIDTH, 2, inner_dim)
    start_heads(heads, states, targets)
    predicted = predictions(heads, states)
    # the penalty of a thousandth of the variance shrinks the maps a little
    assert (predicted - targets).abs().mean() < 0.01 * (targets - targets.mean(dim=0)).abs().mean()
    torch.testing.assert_close(predicted.mean(dim=0), targets.mean(dim=0), atol=1e-3, rtol=0)


def test_a_head_that_is_too_narrow_is_the_best_map_of_its_rank():
    states = drawn_states()
    targets = linear_targets(states, rank=8, heads=1)
    heads = PredictionHeads(WIDTH, TEACHER_WIDTH, 1, inner_dim=6)
    start_heads(heads, states, targets)
    predicted = predictions(heads, states)[:, 0]
    centred = targets[:, 0] - targets[:, 0].mean(dim=0)
    lost = torch.linalg.svdvals(centred)[3:].square().sum()  # by the theorem of Eckart and Young
    assert (predicted - targets[:, 0]).square().sum() == pytest.approx(lost.item(), rel=0.01)


def test_a_constant_target_and_a_dead_unit_give_finite_heads():
    states = drawn_states()
    states[:, 0] = 1.0
    heads = PredictionHeads(WIDTH, TEACHER_WIDTH, 1)
    start_heads(heads, states, torch.full((FRAMES, 1, TEACHER_WIDTH), 2.0))
    predicted = predictions(heads, states)
    torch.testing.assert_close(predicted, torch.full_like(predicted, 2.0), atol=1e-3, rtol=0)


def test_numbers_that_do_not_fit_are_refused():
    states = drawn_states()
    with pytest.raises(ValueError, match=r"targets \(400, 1, 10\) do not fit 2 heads"):
        start_heads(PredictionHeads(WIDTH, TEACHER_WIDTH, 2), states, linear_targets(states, 3, 1))
