"""Heads that start from least squares: the best linear maps from a student's states to its targets.

A student that starts from its teacher's first layers holds much of the targets already. Heads with random weights send
it gradients that mean nothing, and in a run of some hundred steps it loses more than it learns.
"""

import torch
from torch import Tensor

from speechkd.losses.layerwise import PredictionHeads
from speechkd.models.probes import ridge_probe

PENALTY = 1e-3  # of the maps' weights, in variances of the states


@torch.no_grad()
def start_heads(heads: PredictionHeads, states: Tensor, targets: Tensor) -> None:
    """Set the heads, in place, to linear maps fitted by ridge regression.

    Units come in pairs of opposite sign, which pass a value through the GELU as it is, GELU(x) - GELU(-x) = x; so a
    head starts as the best map of a rank of half its inner width.

    Args:
        heads: of a student that is to be trained.
        states: the student's last, (frames, student_dim).
        targets: of the same frames, (frames, heads, teacher_dim).

    Raises:
        ValueError: numbers of frames or heads do not fit, or a value is not finite.
    """
    if targets.shape[1] != heads.num_heads:
        raise ValueError(f"targets {tuple(targets.shape)} do not fit {heads.num_heads} heads; give one for each")
    last = states.double()
    mean = last.mean(dim=0)
    fitted = _fit(states, targets.flatten(1))
    maps = fitted.weight.double().unflatten(0, (heads.num_heads, -1))  # (heads, teacher_dim, student_dim)
    offsets = fitted.bias.double().unflatten(0, (heads.num_heads, -1)) + maps @ mean
    covariance = (last - mean).T @ (last - mean) / len(last)
    expand = heads.expand.weight.unflatten(0, (heads.num_heads, -1))
    shifts = heads.expand.bias.unflatten(0, (heads.num_heads, -1))
    num_pairs = expand.shape[1] // 2
    heads.split.weight.zero_()
    for head, to_teacher in enumerate(maps):
        variances, directions = torch.linalg.eigh(to_teacher @ covariance @ to_teacher.T)
        kept = directions[:, -num_pairs:]  # of what the map predicts; the last vary most
        deviations = variances[-num_pairs:].clamp(min=1e-12 * float(variances[-1].clamp(min=1e-12))).sqrt()
        rows = (kept.T @ to_teacher) / deviations[:, None]  # units of variance 1
        width = len(rows)
        expand[head, :width], expand[head, width : 2 * width] = rows, -rows
        shifts[head, :width], shifts[head, width : 2 * width] = -rows @ mean, rows @ mean
        outputs = (kept * deviations).T
        heads.split.weight[head, :width], heads.split.weight[head, width : 2 * width] = outputs, -outputs
        heads.split.bias[head] = offsets[head]


def _fit(states: Tensor, targets: Tensor) -> torch.nn.Linear:
    states = states.float()
    alpha = PENALTY * len(states) * max(float(states.var(dim=0, correction=0).mean()), 1e-12)
    return ridge_probe(states, targets.float(), alpha)
