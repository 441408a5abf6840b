"""Random gates that are exactly open or shut with a learned probability: what pruning while training rests on."""

import math

import torch
from torch import Tensor, nn

BETA, LOWER, UPPER, EPSILON = 2 / 3, -0.1, 1.1, 1e-6
EVALUATION_SLOPE = 0.8


def hard_concrete(logits: Tensor, uniform: Tensor) -> Tensor:
    """Factors in [0, 1] of draws from the uniform distribution; same shape as both.

    A binary concrete variable of temperature 2/3, stretched to (-0.1, 1.1) and cut to [0, 1].
    """
    soft = torch.sigmoid((torch.logit(uniform) + logits) / BETA)
    return (soft * (UPPER - LOWER) + LOWER).clamp(0, 1)


class HardConcreteGates(nn.Module):
    """Random factors in [0, 1] for a row of units, which are exactly 0 or 1 with a learned probability.

    Louizos et al. 2018, https://arxiv.org/abs/1712.01312, section 2.2, with the factors for evaluation of DPHuBERT's
    code. Logits are float32.

    Args:
        num_units: factors.
        drop_rate: where they start, above 0 and below 1; the logits scatter by 0.01 around it.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, num_units: int, drop_rate: float) -> None:
        super().__init__()
        if num_units < 1 or not 0 < drop_rate < 1:
            raise ValueError(f"num_units={num_units}, drop_rate={drop_rate}; give 1 unit or more and a rate in (0, 1)")
        self.logits = nn.Parameter(torch.normal(math.log((1 - drop_rate) / drop_rate), 0.01, (num_units,)))

    def open_probabilities(self) -> Tensor:
        """How likely each factor is not 0, (units,), float64."""
        return torch.sigmoid(self.logits.double() - BETA * math.log(-LOWER / UPPER))

    def expected_size(self) -> Tensor:
        """Expected number of factors that are not 0; 0-dim, float64."""
        return self.open_probabilities().sum()

    def forward(self) -> Tensor:
        """Factors, (units,), float32: a new draw from torch's generator in training, `evaluation_mask` otherwise."""
        if not self.training:
            return self.evaluation_mask()
        return hard_concrete(self.logits, torch.empty_like(self.logits).uniform_(EPSILON, 1 - EPSILON))

    @torch.no_grad()
    def evaluation_mask(self) -> Tensor:
        """Fixed factors, (units,), float32: as many zeros as are expected, the smallest; the others stay soft."""
        mask = torch.sigmoid(EVALUATION_SLOPE / BETA * self.logits)
        num_zeros = round(len(mask) - self.expected_size().item())
        mask[self.logits.argsort(stable=True)[:num_zeros]] = 0
        return mask
