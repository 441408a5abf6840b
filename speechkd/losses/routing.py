"""What a sparse mixture of experts needs beside its experts: gates, and a loss that spreads tokens over all of them.

LLaVA-MoD, Shu et al. 2024, https://arxiv.org/abs/2408.15881, with the balance loss of Switch Transformers, Fedus et
al. 2021, https://arxiv.org/abs/2101.03961. Computed in float32; float64 stays.
"""

import torch.nn.functional as F
from torch import Tensor

from speechkd.losses.contract import as_float, check_mask


def top_k_gates(router_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Gates of the k likeliest experts of each token; they add up to 1, as LLaVA-MoD's do.

    Args:
        router_logits: (..., experts).
        k: experts of a token, 1 to `experts`.

    Returns:
        Gates, (..., k), largest first, and the experts' numbers, (..., k), int64.

    Raises:
        ValueError: there are not k experts.
    """
    if not 1 <= k <= router_logits.shape[-1]:
        raise ValueError(f"top_k must be 1 to {router_logits.shape[-1]}, the number of experts, got {k}")
    chosen, experts = as_float(router_logits).topk(k, dim=-1)
    return chosen.softmax(dim=-1), experts  # softmax over all, divided by the sum of the chosen


def balance_loss(router_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Number of experts * sum over experts of f * P: 1 where tokens are spread evenly, that number where one has all.

    f is the share of tokens whose likeliest expert it is, ties to the lowest number, and P the mean probability; the
    gradient flows through P. Weight 0.01, summed over layers. A mean over the tokens of this call: parts of a batch do
    not add up to the whole.

    Args:
        router_logits: (..., experts).
        mask: True on real tokens, (...), bool; None takes all.

    Returns:
        0-dim; 0 with a graph where no token is real.

    Raises:
        ValueError: the mask does not fit, or the batch is empty.
    """
    mask = check_mask(mask, router_logits)
    num_experts = router_logits.shape[-1]
    probabilities = as_float(router_logits)[mask].softmax(dim=-1)
    num_tokens = max(len(probabilities), 1)
    # argmax leaves open which of equal ones it takes
    is_largest = probabilities == probabilities.amax(dim=-1, keepdim=True) if len(probabilities) else probabilities > 0
    first = is_largest & (is_largest.cumsum(dim=-1) == 1)
    shares = F.normalize(first.sum(dim=0).to(probabilities.dtype), p=1, dim=0)
    return num_experts * (shares * probabilities.sum(dim=0) / num_tokens).sum()
