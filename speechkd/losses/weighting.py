"""Weights between the terms of an objective that are learnt with the model."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from speechkd.losses.contract import Number


class UncertaintyWeights(nn.Module):
    """Sum of exp(-s) * loss / 2 + s / 2 over the terms, with one learnt s each: a noisy term gets less weight.

    Homoscedastic uncertainty, Kendall et al. 2018, https://arxiv.org/abs/1705.07115; LLaVA-KD's code offers it with
    1,000 times the base learning rate. At first each s is 0, so that each term has weight 1/2. The least value for a
    constant loss L is at s = log L, where its weight is 1 / (2 L). It must be a part of the student, to be optimised
    and saved.

    Args:
        names: of the terms.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        if not names or len(set(names)) != len(names):
            raise ValueError(f"names must be one or more different terms, got {names}")
        self.names = tuple(names)
        self.log_variances = nn.Parameter(torch.zeros(len(names)))

    def forward(self, terms: Mapping[str, Tensor], num_items: Number = None) -> Tensor:
        """The weighted sum.

        Args:
            terms: 0-dim losses by name, all of `names`: means, or sums over items.
            num_items: the items of sums; None for means.

        Returns:
            0-dim, float32; a sum over items where the terms are.

        Raises:
            ValueError: the names of the terms are others.
        """
        if set(terms) != set(self.names):
            raise ValueError(f"the terms are {sorted(terms)}, the weights are for {sorted(self.names)}; give all")
        losses = torch.stack([terms[name].float() for name in self.names])
        count = 1 if num_items is None else num_items
        return 0.5 * (torch.exp(-self.log_variances) * losses + self.log_variances * count).sum()
