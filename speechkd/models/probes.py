"""Linear probes: what can be read off fixed embeddings. Ridge regression for values, softmax heads for classes.

The protocol of SEGUE, Tan et al. 2023, https://arxiv.org/abs/2305.12301: one linear map on the pooled vector of a
frozen encoder, with no activation and no dropout.
"""

import logging
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

logger = logging.getLogger(__name__)


def ridge_probe(features: Tensor, targets: Tensor, alpha: float = 100.0) -> nn.Linear:
    """Ridge regression in closed form, by singular values.

    Minimises sum |y - W x - b|^2 + alpha |W|^2. The intercept b is free of the penalty, so W comes from centred
    features and targets: with U S V^T the centred features, W^T = V diag(S / (S^2 + alpha)) U^T y. Computed in
    float64.

    Args:
        features: fixed embeddings, (items, dim).
        targets: values to predict, (items,) or (items, outputs).
        alpha: weight of the penalty, above 0; SEGUE takes 100.

    Returns:
        A layer of the features' dtype and device, frozen; it maps (..., dim) to (..., outputs), 1 for plain targets.

    Raises:
        ValueError: shapes do not fit, there is no item, a value is NaN or infinite, or alpha is not positive.
    """
    _check_features(features)
    if targets.ndim not in (1, 2) or len(targets) != len(features):
        raise ValueError(
            f"targets {tuple(targets.shape)} do not fit features {tuple(features.shape)}; they must be (items,) or "
            "(items, outputs), one row for each row of the features"
        )
    if not targets.isfinite().all():
        raise ValueError(f"{int((~targets.isfinite()).sum())} targets are NaN or infinite; leave those items out")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be a positive number, got {alpha}; 100 is usual, 1e-6 is nearly no penalty")
    inputs, values = features.detach().double(), targets.detach().reshape(len(targets), -1).double()
    input_mean, value_mean = inputs.mean(dim=0), values.mean(dim=0)
    left, singular, right = torch.linalg.svd(inputs - input_mean, full_matrices=False)
    shrunk = singular / (singular.square() + alpha)
    weight = (right.T @ (shrunk[:, None] * (left.T @ (values - value_mean)))).T
    layer = nn.Linear(inputs.shape[1], values.shape[1], device=features.device, dtype=features.dtype)
    layer.requires_grad_(False)
    layer.weight.copy_(weight)
    layer.bias.copy_(value_mean - weight @ input_mean)
    return layer


def encode_classes(labels: Sequence[str], classes: Sequence[str], *, for_training: bool = False) -> tuple[Tensor, int]:
    """Numbers of classes, -1 for a label that is none of them.

    No head ever predicts -1, so at test time such an item counts as wrong, as it should: the probe cannot know it.

    Args:
        labels: one an item.
        classes: the classes in the order of the head's outputs, those of the training data as a rule.
        for_training: refuse labels that are none of the classes.

    Returns:
        Numbers, (items,), int64; how many of them are -1.

    Raises:
        ValueError: a class stands twice, or a label to train on is none of the classes.
    """
    positions = {label: index for index, label in enumerate(classes)}
    if len(positions) < len(classes):
        twice = sorted({label for label in classes if list(classes).count(label) > 1})
        raise ValueError(f"classes {twice} stand twice in the list of {len(classes)}; name each once")
    numbers = [positions.get(label, -1) for label in labels]
    num_unseen = numbers.count(-1)
    if num_unseen:
        unseen = sorted({repr(label) for label in labels if label not in positions})
        named = ", ".join(unseen[:5]) + (f" and {len(unseen) - 5} more" if len(unseen) > 5 else "")
        if for_training:
            raise ValueError(
                f"{num_unseen} of {len(labels)} items to train on have a label that is none of the {len(classes)} "
                f"classes: {named}; add it to the classes or leave the items out"
            )
        logger.warning(
            "%d of %d items have a label unseen in training and count as wrong: %s", num_unseen, len(labels), named
        )
    return torch.tensor(numbers, dtype=torch.int64), num_unseen


def linear_heads(dim: int, num_classes: Sequence[int], *, seed: int) -> nn.ModuleList:
    """One linear head per label, weights from N(0, sqrt(2 / dim)) and biases 0, as SEGUE begins.

    Args:
        dim: width of the embeddings.
        num_classes: outputs of each head.
        seed: of the weights; the same on every device.

    Raises:
        ValueError: there is no head, or one without classes.
    """
    if not num_classes or min(num_classes) < 1:
        raise ValueError(f"heads need one class or more each, got num_classes={list(num_classes)}")
    generator = torch.Generator().manual_seed(seed)
    heads = nn.ModuleList()
    for count in num_classes:
        head = nn.Linear(dim, count)
        nn.init.normal_(head.weight, std=math.sqrt(2 / dim), generator=generator)
        nn.init.zeros_(head.bias)
        heads.append(head)
    return heads


def multi_head_cross_entropy(logits: Sequence[Tensor], targets: Tensor) -> Tensor:
    """Cross entropy of several labels: the sum over heads, not their mean, of each head's mean over items.

    Args:
        logits: one for each head, (items, classes of the head).
        targets: numbers of the right classes, (items, heads), int64.

    Returns:
        0-dim, float32.

    Raises:
        ValueError: shapes do not fit, there is no item, or a target is no class of its head.
    """
    _check_targets(targets, [scores.shape[-1] for scores in logits])
    if any(len(scores) != len(targets) for scores in logits):
        raise ValueError(
            f"logits of {[len(scores) for scores in logits]} items and targets of {len(targets)} differ in number"
        )
    losses = [F.cross_entropy(scores.float(), targets[:, index]) for index, scores in enumerate(logits)]
    return torch.stack(losses).sum()


def softmax_probe(
    features: Tensor,
    targets: Tensor,
    num_classes: Sequence[int],
    *,
    num_steps: int = 500,
    learning_rate: float = 1e-2,
    warmup_fraction: float = 0.1,
    seed: int = 0,
) -> nn.ModuleList:
    """Train linear heads on fixed embeddings, all of them and all items in every step.

    AdamW with betas 0.9 and 0.999 and no weight decay; the learning rate rises linearly from 0, then falls linearly
    to 0, as in SEGUE. There batches are of 1 or 8 items; one batch of all takes seconds for a whole corpus and has no
    order to draw, so `seed` sets the first weights alone.

    Args:
        features: fixed embeddings, (items, dim).
        targets: numbers of the right classes, (items, heads), or (items,) for one head; see `encode_classes`.
        num_classes: classes of each head.
        num_steps: steps of the optimizer.
        learning_rate: its peak.
        warmup_fraction: share of the steps before the peak, 0 to 1.
        seed: of the first weights.

    Returns:
        Heads in float32 on the features' device, frozen.

    Raises:
        ValueError: shapes do not fit, there is no item, a feature is NaN or infinite, a target is no class of its
            head, or an argument is out of its range.
    """
    _check_features(features)
    targets = targets[:, None] if targets.ndim == 1 else targets
    _check_targets(targets, num_classes)
    if len(targets) != len(features):
        raise ValueError(f"features of {len(features)} items and targets of {len(targets)} differ in number")
    if num_steps < 1 or not 0 < learning_rate < math.inf or not 0 <= warmup_fraction <= 1:
        raise ValueError(
            f"a probe needs num_steps >= 1, learning_rate > 0 and warmup_fraction in 0 to 1, got {num_steps}, "
            f"{learning_rate} and {warmup_fraction}"
        )
    features, targets = features.detach().float(), targets.to(features.device)
    heads = linear_heads(features.shape[1], num_classes, seed=seed).to(features.device)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=learning_rate, betas=(0.9, 0.999), weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, round(warmup_fraction * num_steps), num_steps)
    for _ in range(num_steps):
        optimizer.zero_grad()
        multi_head_cross_entropy([head(features) for head in heads], targets).backward()
        optimizer.step()
        schedule.step()
    return heads.requires_grad_(False)


@torch.no_grad()
def predict_classes(heads: nn.ModuleList, features: Tensor) -> Tensor:
    """The likeliest class of every head, (items, heads), int64; the first where several are equal.

    Args:
        heads: as `softmax_probe` returns them.
        features: embeddings, (items, dim).
    """
    return torch.stack([head(features.float()).argmax(dim=-1) for head in heads], dim=-1)


def _check_targets(targets: Tensor, num_classes: Sequence[int]) -> None:
    if targets.ndim != 2 or targets.shape[1] != len(num_classes) or targets.dtype != torch.int64:
        raise ValueError(
            f"targets are {tuple(targets.shape)} of {targets.dtype}; {len(num_classes)} heads need (items, "
            f"{len(num_classes)}) of torch.int64"
        )
    if not len(targets):
        raise ValueError("there is no item to train on; check the manifest and its filters")
    sizes = torch.tensor(list(num_classes), device=targets.device)
    wrong = ((targets < 0) | (targets >= sizes)).nonzero()
    if len(wrong):
        item, head = wrong[0].tolist()
        raise ValueError(
            f"item {item} has class {int(targets[item, head])} for head {head}, which knows 0 to "
            f"{num_classes[head] - 1} ({len(wrong)} such targets); -1 is a label that is none of the classes: add it "
            "or leave the items out"
        )


def _check_features(features: Tensor) -> None:
    if features.ndim != 2 or not len(features) or not features.is_floating_point():
        raise ValueError(
            f"features are {tuple(features.shape)} of {features.dtype}; a probe needs embeddings (items, dim) of one "
            "item or more"
        )
    broken = (~features.isfinite().all(dim=1)).nonzero()[:, 0]
    if len(broken):
        raise ValueError(
            f"item {int(broken[0])} and {len(broken) - 1} more of {len(features)} have embeddings with NaN or infinite "
            "values; look at their clips, or encode in float32"
        )
