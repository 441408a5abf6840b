"""Losses on aligned logits: logit i predicts label i."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["token_mean", "sum", "none"]


def cross_entropy(
    student_logits: Tensor,
    labels: Tensor,
    *,
    reduction: Reduction = "token_mean",
    num_items: Tensor | int | None = None,
) -> Tensor:
    """Negative log-likelihood of the labels, at temperature 1.

    Args:
        student_logits: (..., vocabulary); computed in float32.
        labels: token ids, (...), int64; -100 is not scored.
        reduction: "token_mean" divides the sum by `num_items`, "none" returns (...).
        num_items: divisor of "token_mean"; by default the scored tokens. A batch without any gives 0.

    Returns:
        0-dim float32, or (...) with `reduction="none"`.
    """
    loss = F.cross_entropy(student_logits.float().flatten(0, -2), labels.flatten(), reduction="none")
    return _reduce(loss.view(labels.shape), labels >= 0, reduction, num_items)


def forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    reduction: Reduction = "token_mean",
    num_items: Tensor | int | None = None,
) -> Tensor:
    """KL(teacher || student) over the vocabulary, times temperature**2.

    Hinton et al. 2015, https://arxiv.org/abs/1503.02531. Summed over the vocabulary; an id that the teacher rules out
    with a logit of -inf adds 0.

    Args:
        student_logits: (..., vocabulary); computed in float32.
        teacher_logits: same shape; receives no gradient.
        mask: True on scored tokens, (...), bool; None scores all.
        temperature: divides both logits; the loss is multiplied by its square, which keeps the gradient's size.
        reduction: "token_mean" divides the sum by `num_items`, "none" returns (...).
        num_items: divisor of "token_mean"; by default the scored tokens. A batch without any gives 0.

    Returns:
        0-dim float32, or (...) with `reduction="none"`.

    Raises:
        ValueError: the logits differ in shape, or the temperature is not positive.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} differ in "
            "shape; both models need the same vocabulary and the same decoder_input_ids"
        )
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    ruled_out = teacher == -torch.inf
    difference = (teacher - student).masked_fill(ruled_out, 0.0)
    loss = (teacher.exp() * difference).sum(dim=-1) * temperature**2
    if mask is None:
        mask = torch.ones(loss.shape, dtype=torch.bool, device=loss.device)
    return _reduce(loss, mask, reduction, num_items)


def _reduce(loss: Tensor, mask: Tensor, reduction: Reduction, num_items: Tensor | int | None) -> Tensor:
    loss = loss.masked_fill(~mask.bool(), 0.0)  # a product with 0 would keep the NaN of a masked token
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if num_items is None:
        num_items = mask.sum().clamp(min=1)
    return loss.sum() / num_items
