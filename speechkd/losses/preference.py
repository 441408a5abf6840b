"""Losses on pairs of whole sequences, a better and a worse one, from their log-probabilities.

A pair has a chosen and a rejected sequence for one input. Log-probabilities are (pairs,), in nats, from
`sequence_log_probs`; those of a reference or teacher get no gradient. `mask`, (pairs,), bool, is True on pairs that
count; None counts all. `reduction` is "pair_mean" (over `num_items` pairs, by default those that count), "sum" or
"none", which gives (pairs,). Computed in float32, or in float64 if the student's log-probabilities are.

They raise ValueError, with the values, on shapes, masks or arguments that do not fit.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from speechkd.losses.contract import NEVER, Number, Reduction, as_float, check_labels, check_mask, reduce_rows

PairReduction = Literal["pair_mean", "sum", "none"]


def token_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label, in nats; 0 where the label is -100.

    Args:
        logits: (..., vocabulary), aligned: logit i predicts label i. A causal model's are `logits[:, :-1]` for
            `labels[:, 1:]`.
        labels: (...), int64, -100 on tokens that are not scored.

    Returns:
        (...), float32 or, for float64 logits, float64. A label that the model rules out with -inf has -1e9.

    Raises:
        ValueError: labels have another shape or are outside the vocabulary, or the batch is empty.
    """
    mask = check_labels(labels, logits, None)
    log_q = -F.cross_entropy(as_float(logits)[mask], labels[mask], reduction="none")
    return reduce_rows(log_q.masked_fill(torch.isneginf(log_q), NEVER), mask, "none")


def sequence_log_probs(logits: Tensor, labels: Tensor, *, length_normalize: bool = False) -> Tensor:
    """Log-probability of each sequence: the sum over its labels or, length-normalised, their mean.

    Args:
        logits: (batch, length, vocabulary), aligned as for `token_log_probs`.
        labels: (batch, length), int64, -100 on tokens that are not scored.
        length_normalize: divide by the number of scored tokens; its exponential is the geometric mean probability.

    Returns:
        (batch,); 0 for a sequence without labels.

    Raises:
        ValueError: logits are not (batch, length, vocabulary), or as for `token_log_probs`.
    """
    if logits.ndim != 3:
        raise ValueError(f"logits must be (batch, length, vocabulary), got {tuple(logits.shape)}; add the batch axis")
    total = token_log_probs(logits, labels).sum(dim=-1)
    return total / (labels >= 0).sum(dim=-1).clamp(min=1) if length_normalize else total


def ddpo(
    student_chosen: Tensor,
    student_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float = 0.1,
    reduction: PairReduction = "pair_mean",
    num_items: Number = None,
) -> Tensor:
    """-log sigmoid(beta * margin), the margin being how much more than the reference the student prefers the chosen.

    dDPO of Zephyr, Tunstall et al. 2023, https://arxiv.org/abs/2310.16944: the reference is the frozen student after
    supervised training, the chosen answer the one that an AI judge scores best, the rejected a random other one, and
    log-probabilities are sums over tokens. log 2 where student and reference agree.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}; 0.1 is usual")
    pairs, mask = _scored_pairs(mask, student_chosen, student_rejected, reference_chosen, reference_rejected)
    margin = (pairs[0] - pairs[2].detach()) - (pairs[1] - pairs[3].detach())
    return reduce_pairs(-F.logsigmoid(beta * margin), mask, reduction, num_items)


def dpkd(
    student_chosen: Tensor,
    student_rejected: Tensor,
    teacher_chosen: Tensor,
    teacher_rejected: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float = 0.1,
    reduction: PairReduction = "pair_mean",
    num_items: Number = None,
) -> Tensor:
    """dDPO with the teacher as the reference: the student is to prefer the chosen text more than the teacher does.

    DPKD, Li et al. 2024, https://arxiv.org/abs/2406.19774. Chosen is the teacher's or the true text, rejected a sample
    of the student. The paper divides log-probabilities by the length: give all four from
    `sequence_log_probs(..., length_normalize=True)`. Its code sums them: leave that out.
    """
    return ddpo(
        student_chosen,
        student_rejected,
        teacher_chosen,
        teacher_rejected,
        mask,
        beta=beta,
        reduction=reduction,
        num_items=num_items,
    )


def paired_kto(
    student_chosen: Tensor,
    student_rejected: Tensor,
    teacher_chosen: Tensor,
    teacher_rejected: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float = 0.1,
    reduction: PairReduction = "pair_mean",
    num_items: Number = None,
) -> Tensor:
    """Mean of 1 - sigmoid(beta * (r+ - K-)) and 1 - sigmoid(beta * (K+ - r-)), bounded by 0 and 1.

    Preference distillation of LLaVA-MoD, Shu et al. 2024, https://arxiv.org/abs/2408.15881, with the teacher as
    reference: r+ and r- are how much likelier the student finds the chosen and the rejected text than the teacher does,
    and K+ and K- the batch means of r+ and r-, or 0 where they are negative. The K are constants for the gradient, and
    know only the pairs of this call, so parts of a batch do not add up to the whole. Log-probabilities are sums over
    tokens.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}; 0.1 is usual")
    pairs, mask = _scored_pairs(mask, student_chosen, student_rejected, teacher_chosen, teacher_rejected)
    chosen, rejected = pairs[0] - pairs[2].detach(), pairs[1] - pairs[3].detach()
    num_pairs = max(len(chosen), 1)
    usual_chosen, usual_rejected = ((r.detach().sum() / num_pairs).clamp(min=0) for r in (chosen, rejected))
    lost = torch.sigmoid(beta * (usual_rejected - chosen)) + torch.sigmoid(beta * (rejected - usual_chosen))
    return reduce_pairs(0.5 * lost, mask, reduction, num_items)


def plad_ranking(
    student_chosen: Tensor,
    student_rejected: Tensor,
    mask: Tensor | None = None,
    *,
    margin: float | Tensor = 1.0,
    reduction: PairReduction = "pair_mean",
    num_items: Number = None,
) -> Tensor:
    """max(0, margin - chosen + rejected); no gradient once the student prefers the chosen text by the margin.

    PLaD, Zhang et al. 2024, https://arxiv.org/abs/2406.02886. Chosen is the teacher's text and rejected the student's,
    so that nothing inside the teacher is needed. Log-probabilities are length-normalised
    (`sequence_log_probs(..., length_normalize=True)`). A number as `margin` is the paper's ranking loss; its margin
    loss takes for each pair the gap of two quality scores, (pairs,). Usually added to a little cross entropy on the
    chosen text.
    """
    if not isinstance(margin, Tensor):
        margin = student_chosen.new_full(student_chosen.shape, margin)
    pairs, mask = _scored_pairs(mask, student_chosen, student_rejected, margin)
    return reduce_pairs(F.relu(pairs[2].detach() - pairs[0] + pairs[1]), mask, reduction, num_items)


def reduce_pairs(loss: Tensor, mask: Tensor, reduction: PairReduction, num_items: Number = None) -> Tensor:
    """Reduce the losses of the pairs that count, one value per True of the mask; without any it is 0 with a graph.

    Raises:
        ValueError: the reduction is unknown.
    """
    if reduction not in ("pair_mean", "sum", "none"):
        raise ValueError(f"reduction must be pair_mean, sum or none, got {reduction!r}")
    over_rows: Reduction = "token_mean" if reduction == "pair_mean" else reduction
    return reduce_rows(loss, mask, over_rows, num_items)


def _scored_pairs(mask: Tensor | None, *values: Tensor) -> tuple[list[Tensor], Tensor]:
    """The values of the pairs that count, in the first one's precision, and the mask."""
    shapes = [tuple(value.shape) for value in values]
    if len(shapes[0]) != 1 or len(set(shapes)) != 1:
        raise ValueError(f"sequence log-probabilities and margins must all be (pairs,), got {shapes}")
    mask = check_mask(mask, values[0][:, None])
    first = as_float(values[0])
    return [value.to(first.dtype)[mask] for value in (first, *values[1:])], mask
