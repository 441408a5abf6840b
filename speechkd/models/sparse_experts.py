"""A feed-forward block as a sparse mixture of experts that starts as copies of it ("up-cycling").

LLaVA-MoD, Shu et al. 2024, https://arxiv.org/abs/2408.15881. Losses on the routing are in `losses.routing`.
"""

import copy

import torch
from torch import Tensor, nn

from speechkd.losses.routing import top_k_gates


class SparseExperts(nn.Module):
    """Each token goes through the `top_k` blocks that its router finds likeliest, weighted by gates that add up to 1.

    With experts that are copies this is the block itself, up to rounding, so training goes on from the dense model. No
    expert has a limit of tokens: none is dropped, unlike in the published code, whose capacity is 1.5 times the even
    share. After a forward pass `router_logits`, (..., experts), are those of its tokens, for `balance_loss`.

    Args:
        feed_forward: block from (..., width) to (..., width), token by token.
        width: of its input.
        num_experts: copies of it; LLaVA-MoD has 4.
        top_k: experts of a token; LLaVA-MoD has 2.

    Raises:
        ValueError: top_k is not 1 to `num_experts`.
    """

    router_logits: Tensor

    def __init__(self, feed_forward: nn.Module, width: int, *, num_experts: int = 4, top_k: int = 2) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be 1 to num_experts={num_experts}, got {top_k}")
        self.top_k = top_k
        self.experts = nn.ModuleList(copy.deepcopy(feed_forward) for _ in range(num_experts))
        weight = next(feed_forward.parameters())
        self.router = nn.Linear(width, num_experts, bias=False, device=weight.device, dtype=weight.dtype)

    def forward(self, states: Tensor) -> Tensor:
        """(..., width) to (..., width)."""
        self.router_logits = self.router(states)
        gates, chosen = top_k_gates(self.router_logits.flatten(0, -2), self.top_k)
        tokens = states.flatten(0, -2)
        result = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, ranks = (chosen == number).nonzero(as_tuple=True)  # also of no token: every expert is in the graph
            result = result.index_add(0, rows, expert(tokens[rows]) * gates[rows, ranks, None].to(tokens.dtype))
        return result.view_as(states)
