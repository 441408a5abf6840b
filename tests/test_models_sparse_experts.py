import pytest
import torch
from torch import nn

from speechkd.models.sparse_experts import SparseExperts


def make_block(width=16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_copies_are_the_dense_block(top_k):
    block = make_block()
    states = torch.randn(3, 7, 16)
    sparse = SparseExperts(block, 16, top_k=top_k)
    assert (sparse(states) - block(states)).abs().max().item() <= 1e-6
    probabilities = sparse.router_logits.softmax(-1).topk(top_k, dim=-1).values.sum(-1, keepdim=True)
    if top_k < 4:  # gates as they come out of the softmax would give another block
        assert (probabilities * block(states) - block(states)).abs().max().item() > 0.1


def test_a_token_goes_to_its_likeliest_experts_alone():
    sparse = SparseExperts(nn.Linear(2, 2, bias=False), 2, num_experts=3, top_k=2)
    with torch.no_grad():
        for number, expert in enumerate(sparse.experts):
            expert.weight.copy_((number + 1) * torch.eye(2))
        sparse.router.weight.copy_(torch.tensor([[2.0, 0], [1, 0], [0, 5]]))
    states = torch.tensor([[1.0, 0], [0, 1]])
    first = torch.tensor([2.0, 1]).softmax(-1) @ torch.tensor([1.0, 2])
    second = torch.tensor([5.0, 0]).softmax(-1) @ torch.tensor([3.0, 1])
    torch.testing.assert_close(sparse(states), torch.stack([first * states[0], second * states[1]]))


def test_every_expert_and_the_router_have_a_gradient():
    sparse = SparseExperts(make_block(), 16)
    sparse(torch.randn(1, 16)).sum().backward()  # one token, which two of the experts never see
    assert all(weight.grad is not None for weight in sparse.parameters())


def test_more_experts_than_there_are_is_refused():
    with pytest.raises(ValueError, match="top_k must be 1 to num_experts=4, got 5"):
        SparseExperts(make_block(), 16, top_k=5)
