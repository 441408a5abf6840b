"""Losses on logits that also read the labels; arguments, errors and reductions are those of `logits`.

`labels` are token ids, (...), int64, with -100 on tokens that are not scored; a mask, if given, leaves out more.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechkd.losses.contract import (
    NEVER,
    Number,
    Reduction,
    check_fraction,
    check_labels,
    kl_rows,
    log_mix,
    log_probs,
    reduce_rows,
    same_vocabulary,
    scored_rows,
    squared,
)

Bounds = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def decoupled_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    scale_t2: bool = True,
    target_weight: float = 1.0,
    non_target_weight: float = 8.0,
) -> Tensor:
    """`target_weight` * TCKD + `non_target_weight` * NCKD.

    DKD, Zhao et al. 2022, https://arxiv.org/abs/2203.08679, which takes temperature 4 on images. TCKD compares how much
    mass the label gets, NCKD how the rest is spread; the forward KL is TCKD + (1 - p_label) * NCKD. The published code
    divides by all tokens, also those that are masked; here, as everywhere, only scored ones count.
    """
    labels, student, teacher, mask = _labelled_rows(student_logits, teacher_logits, mask, labels, temperature)
    _, target, non_target = _decoupled_rows(*log_probs(student, teacher, temperature), labels)
    loss = target_weight * target + non_target_weight * non_target
    return reduce_rows(loss * squared(temperature, scale_t2), mask, reduction, num_items)


def atkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    scale_t2: bool = True,
    easy_weight: float = 0.2,
) -> Tensor:
    """Decoupled KD by difficulty: `easy_weight` * mean(NCKD of easy) + the rest * mean(TCKD + NCKD of hard tokens).

    ATKD, Zhong et al. 2024, https://arxiv.org/abs/2402.11890. Easy tokens are those where the teacher is surer of the
    label than at the median of the batch. An empty group adds 0. Each group has its own mean: the loss of a token is
    weighted so that "token_mean" gives that sum, and parts of a batch do not add up to the whole.
    """
    check_fraction("easy_weight", easy_weight)
    labels, student, teacher, mask = _labelled_rows(student_logits, teacher_logits, mask, labels, temperature)
    log_rest, target, non_target = _decoupled_rows(*log_probs(student, teacher, temperature), labels)
    easy = log_rest < _median(log_rest)
    num_easy, num_hard = (group.sum(dtype=log_rest.dtype).clamp(min=1) for group in (easy, ~easy))
    weight = torch.where(easy, easy_weight / num_easy, (1 - easy_weight) / num_hard) * len(easy)
    loss = weight * torch.where(easy, non_target, target + non_target)
    return reduce_rows(loss * squared(temperature, scale_t2), mask, reduction, num_items)


def token_scaled_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    reduction: Reduction = "seq_mean",
    num_items: Number = None,
    scale_t2: bool = True,
    scale_temperature: float = 10.0,
) -> Tensor:
    """Cross entropy with the teacher's distribution, more of it where the teacher itself misses the label.

    TSLD, Kim et al. 2023, https://arxiv.org/abs/2308.06744. Weights are a softmax of the teacher's cross entropy over
    the scored tokens of a sequence, divided by `scale_temperature`; as this grows, the plain "seq_mean" remains. The
    published code sums over the batch and gives weight to ignored tokens too. "seq_mean" is the method's own reduction,
    and what makes sense of the others is that a token's loss carries the number of tokens of its sequence.

    Logits must be (batch, length, vocabulary).
    """
    if labels.ndim < 2:
        raise ValueError(
            f"token_scaled_kd weighs within sequences; labels must be (batch, length), got {tuple(labels.shape)}"
        )
    labels, student, teacher, mask = _labelled_rows(student_logits, teacher_logits, mask, labels, temperature)
    log_q, log_p = log_probs(student, teacher, temperature)
    difficulty = F.cross_entropy(teacher, labels, reduction="none").clamp(max=-NEVER)  # the teacher may rule one out
    table = difficulty.new_full(mask.shape, -torch.inf).masked_scatter(mask, difficulty / scale_temperature)
    weight = (table.softmax(dim=-1) * mask.sum(dim=-1, keepdim=True))[mask]
    loss = -weight * (log_p.exp() * log_q).sum(dim=-1)
    return reduce_rows(loss * squared(temperature, scale_t2), mask, reduction, num_items)


def self_evolution_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    scale_t2: bool = True,
    label_weight: float = 0.5,
    prior_weight: float = 0.5,
    threshold: float | None = None,
) -> Tensor:
    """KL(r || student), r a mixture of label and teacher; on hard tokens the student is first mixed with r.

    Self-Evolution KD, Song et al. 2024, https://arxiv.org/abs/2412.15303, in our reading: r = `label_weight` * onehot +
    the rest * p; a token is hard where KL(r || q) exceeds `threshold`, by default the batch's median; there the loss is
    KL(r || `prior_weight` * r + the rest * q). The gradient flows through q alone.
    """
    check_fraction("label_weight", label_weight)
    check_fraction("prior_weight", prior_weight)
    labels, student, teacher, mask = _labelled_rows(student_logits, teacher_logits, mask, labels, temperature)
    log_q, log_p = log_probs(student, teacher, temperature)
    log_label = torch.full_like(log_p, NEVER).scatter(-1, labels[:, None], 0.0)
    log_r = log_mix(label_weight, log_label, log_p).masked_fill(log_p == NEVER, NEVER)  # a label may be ruled out
    plain = kl_rows(log_r, log_q)
    limit = _median(plain.detach()) if threshold is None else threshold
    helped = kl_rows(log_r, log_mix(prior_weight, log_r, log_q))
    loss = torch.where(plain > limit, helped, plain)
    return reduce_rows(loss * squared(temperature, scale_t2), mask, reduction, num_items)


class QuantileBounds(nn.Module):
    """Predicts for each token between which quantiles of the teacher's probability mass its ids are kept.

    Args:
        top_k: likeliest ids that it reads.
        hidden: width of its one hidden layer.

    Raises:
        ValueError: top_k is below 1.
    """

    def __init__(self, top_k: int = 256, hidden: int = 64) -> None:
        super().__init__()
        if top_k < 1:
            raise ValueError(f"top_k must be 1 or more, got {top_k}")
        self.top_k = top_k
        self.layers = nn.Sequential(nn.Linear(2 * top_k, hidden), nn.GELU(), nn.Linear(hidden, 2))

    def forward(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bound, (tokens,) each, 0 to 1.

        Args:
            log_p: the teacher's log-probabilities, likeliest id first, (tokens, vocabulary).
            log_q: the student's, for the same ids.
        """
        columns = [F.pad(x[:, : self.top_k].exp(), (0, max(0, self.top_k - x.shape[-1]))) for x in (log_p, log_q)]
        lower, width = self.layers(torch.cat(columns, dim=-1).float()).sigmoid().unbind(-1)
        return lower, lower + (1 - lower) * width


def dac_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    labels: Tensor,
    bounds: Bounds,
    temperature: float | Tensor = 1.0,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    scale_t2: bool = True,
    slope: float = 50.0,
) -> Tensor:
    """Forward KL over the label and the ids that lie between two learned quantiles of the teacher's mass.

    DAC-KL, Liu et al. 2024, https://arxiv.org/abs/2407.10068, in our reading: the quantile of an id is the mass of
    likelier ids plus half its own; a sigmoid of steepness `slope` closes outside the bounds, so that `bounds`, for one
    `QuantileBounds`, learns; both distributions are normalised again. Bounds that keep everything give the forward KL.
    """
    labels, student, teacher, mask = _labelled_rows(student_logits, teacher_logits, mask, labels, temperature)
    log_q, log_p = log_probs(student, teacher, temperature)
    log_p, order = log_p.sort(dim=-1, descending=True)
    log_q = log_q.gather(-1, order)
    quantile = log_p.exp().cumsum(dim=-1) - 0.5 * log_p.exp()
    lower, upper = bounds(log_p, log_q.detach())
    log_gate = F.logsigmoid(slope * (quantile - lower[:, None])) + F.logsigmoid(slope * (upper[:, None] - quantile))
    log_gate = torch.where(order == labels[:, None], 0.0, log_gate)
    kept_p, kept_q = (log_p + log_gate).log_softmax(dim=-1), (log_q + log_gate).log_softmax(dim=-1)
    return reduce_rows(kl_rows(kept_p, kept_q) * squared(temperature, scale_t2), mask, reduction, num_items)


def _labelled_rows(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None, labels: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Labels, student and teacher rows of the scored tokens, and the mask."""
    student_logits, teacher_logits = same_vocabulary(student_logits, teacher_logits)
    mask = check_labels(labels, student_logits, mask)
    student, teacher, mask = scored_rows(student_logits, teacher_logits, mask, temperature)
    return labels[mask], student, teacher, mask


def _decoupled_rows(log_q: Tensor, log_p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Teacher's log-mass beside the label, TCKD and NCKD of each row, (tokens,)."""
    index = labels[:, None]
    rest_q, rest_p = log_q.scatter(-1, index, NEVER), log_p.scatter(-1, index, NEVER)
    log_rest_q, log_rest_p = rest_q.logsumexp(dim=-1), rest_p.logsumexp(dim=-1)
    label_q, label_p = log_q.gather(-1, index)[:, 0], log_p.gather(-1, index)[:, 0]
    target = label_p.exp() * (label_p - label_q) + log_rest_p.exp() * (log_rest_p - log_rest_q)
    non_target = kl_rows(rest_p - log_rest_p[:, None], rest_q - log_rest_q[:, None])
    return log_rest_p, target, non_target


def _median(values: Tensor) -> Tensor:
    """Mean of the two middle values where their number is even; anything for none."""
    return values.quantile(0.5) if values.numel() else values.sum()
