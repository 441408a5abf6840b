"""Losses on a teacher of which only the k likeliest ids of each token were kept.

`topk_targets` makes such targets from logits, `labels.topk_records` keeps them on disk. Arguments, errors and
reductions are those of `logits`, with targets in place of the teacher's logits.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from speechkd.losses.contract import (
    NEVER,
    Number,
    Reduction,
    as_float,
    check_fraction,
    check_mask,
    check_temperature,
    jsd_rows,
    kl_rows,
    log_probs,
    reduce_rows,
    squared,
)

Mode = Literal["bucket", "zero", "renorm_teacher", "renorm_both", "uniform_tail"]
Divergence = Literal["forward_kl", "reverse_kl", "generalized_jsd", "total_variation"]


class TopK(NamedTuple):
    """The k likeliest ids of each token, and how much probability all others have together.

    Args:
        ids: likeliest first, (..., k), integer.
        log_probs: natural log of their probabilities under the whole softmax, (..., k).
        log_tail: natural log of the mass of all other ids, (...); -inf where there are none. It is kept beside the
            log-probabilities because rounding can make their sum exceed 1.
    """

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor


def topk_targets(logits: Tensor, k: int, *, temperature: float = 1.0) -> TopK:
    """Keep the k likeliest ids of each token; of several equal ones, any.

    Args:
        logits: the teacher's, (..., vocabulary), of any floating dtype, cut to the ids that its tokenizer has.
        k: ids to keep, 1 to vocabulary.
        temperature: of the softmax. Only targets made at the temperature of the loss are exact: see `topk_divergence`.

    Returns:
        Targets without a graph, float32, or float64 for float64 logits.

    Raises:
        ValueError: k or the temperature is out of range.
    """
    check_temperature(temperature)
    check_k(k, logits.shape[-1])
    logits = as_float(logits.detach()) / temperature
    top, ids = logits.topk(k, dim=-1)
    log_rest = logits.scatter(-1, ids, -torch.inf).logsumexp(dim=-1)
    log_total = torch.logaddexp(top.logsumexp(dim=-1), log_rest)
    return TopK(ids, top - log_total[..., None], log_rest - log_total)


def topk_divergence(
    student_logits: Tensor,
    targets: TopK,
    mask: Tensor | None = None,
    *,
    mode: Mode = "bucket",
    divergence: Divergence = "forward_kl",
    temperature: float | Tensor = 1.0,
    target_temperature: float = 1.0,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    scale_t2: bool = True,
    beta: float = 0.5,
) -> Tensor:
    """Divergence between top-k targets and the student, by default the forward KL on k ids and one for all others.

    What becomes of the ids that were not kept is up to the mode:

    - "bucket": they are one id for both models. At most the dense divergence; for the forward KL what lacks is the KL
      within the tail times its mass, and k = vocabulary gives the dense value. TRL's tail, DistillKit's
      `symmetric_uniform`.
    - "zero": the k terms of that sum alone. Can be negative; the gradient is q (1 - tail) - p.
    - "renorm_teacher": the teacher's k probabilities are scaled to 1, so that the student learns to give the others
      none; biased, over-confident. What DistillKit calls `zero`.
    - "renorm_both": both models' k probabilities are scaled to 1; the student's others are free.
    - "uniform_tail": the teacher's tail is spread evenly over the other ids; smooths.

    Targets hold no more than the tail's mass at the temperature that they were made at. At any other one "bucket" and
    "zero" treat the tail as one id in both models, and "uniform_tail" spreads it first: approximations. The others are
    exact at every temperature. To be exact, make targets at the temperature of the loss and pass it as both.

    Args:
        student_logits: (..., vocabulary).
        targets: one entry per token, (..., k); values of tokens that are not scored are not read.
        mask: True on scored tokens, (...), bool; None scores all.
        mode: see above.
        divergence: the loss of that name in `logits`; others than the forward KL need a teacher probability for every
            id that the student has one for, so "zero" and "renorm_teacher" refuse them. With few ids the reverse KL
            sees little: TRL allows it with k = 1 only, for the sampled token.
        temperature: of the loss; divides the student's logits.
        target_temperature: at which the targets were made.
        reduction: see `contract.reduce_rows`.
        num_items: likewise.
        scale_t2: multiply by the square of `temperature`.
        beta: the teacher's weight in the mixture of the generalised JSD; 0 and 1 are the forward and the reverse KL.

    Returns:
        0-dim, or (...) with "none"; float32, or float64 for a float64 student.

    Raises:
        ValueError: shapes, ids, mask or arguments do not fit.
    """
    check_temperature(temperature)
    check_temperature(target_temperature, "target_temperature")
    _check_choice(mode, divergence)
    check_fraction("beta", beta)
    student, targets, mask = _scored_targets(student_logits, targets, mask)
    log_q, log_p = _kept_log_probs(student, targets, mode, temperature, target_temperature)
    loss = _divergence_rows(log_q, log_p, divergence, beta)
    return reduce_rows(loss * squared(temperature, scale_t2), mask, reduction, num_items)


def first_kd(
    student_logits: Tensor,
    targets: TopK,
    mask: Tensor | None = None,
    *,
    k: int = 5,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
) -> Tensor:
    """KL(teacher || student) of softmax(p / T) over the k likeliest ids: T divides probabilities, not logits.

    FIRST, Shum et al. 2024, https://arxiv.org/abs/2408.12168, for students with reliable confidences. The p are
    probabilities under the whole softmax at temperature 1; the teacher's are first calibrated, by T, on held-out data.
    The published code divides the sum over tokens by the batch size: `num_items` = batch size. Its "other token" option
    takes probabilities for logs; use `topk_divergence` for a loss that knows of the other ids.

    Args:
        student_logits: (..., vocabulary).
        targets: made at temperature 1, with k ids or more, (..., >= k).
        mask: True on scored tokens, (...), bool; None scores all.
        k: ids that are compared; 5 in the paper.
        temperature: of the second softmax; there is no factor T**2.
        label_smoothing: probability moved from the teacher's likeliest id to the k - 1 others, before the second
            softmax; the paper has 0.1 where it smooths.
        reduction: see `contract.reduce_rows`.
        num_items: likewise.

    Returns:
        0-dim, or (...) with "none".

    Raises:
        ValueError: shapes, ids, mask or arguments do not fit, or the targets hold fewer than k ids.
    """
    check_temperature(temperature)
    check_fraction("label_smoothing", label_smoothing)
    student, targets, mask = _scored_targets(student_logits, targets, mask)
    if not 2 <= k <= targets.ids.shape[-1]:
        raise ValueError(f"k must be 2 to the {targets.ids.shape[-1]} ids of the targets, got {k}")
    log_q = F.log_softmax(_student_buckets(student, targets.ids), dim=-1)
    p, q = targets.log_probs[:, :k].exp(), log_q[:, :k].exp()
    if label_smoothing:
        moved = p.new_full((k,), label_smoothing / (k - 1))
        moved[0] = -label_smoothing
        p = p + moved
    loss = kl_rows(F.log_softmax(p / temperature, dim=-1), F.log_softmax(q / temperature, dim=-1))
    return reduce_rows(loss, mask, reduction, num_items)


def check_k(k: int, vocabulary: int) -> None:
    """Refuse to keep no id, or more than there are.

    Raises:
        ValueError: k is not 1 to vocabulary.
    """
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k must be 1 to the vocabulary of {vocabulary} ids, got {k}")


def check_targets(targets: TopK, vocabulary: int) -> None:
    """Refuse targets whose parts do not fit together.

    Raises:
        ValueError: shapes differ, ids are no integers, or k is not 1 to vocabulary.
    """
    ids, log_p, log_tail = targets
    if ids.ndim < 1 or log_p.shape != ids.shape or log_tail.shape != ids.shape[:-1]:
        raise ValueError(
            f"top-k targets have ids {tuple(ids.shape)}, log_probs {tuple(log_p.shape)} and log_tail "
            f"{tuple(log_tail.shape)}; they must be (..., k), (..., k) and (...)"
        )
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"target ids must be integers, got {ids.dtype}; the order is TopK(ids, log_probs, log_tail)")
    check_k(ids.shape[-1], vocabulary)


def check_ids(ids: Tensor, vocabulary: int) -> None:
    """Refuse ids that the vocabulary does not have.

    Raises:
        ValueError: one is not 0 to vocabulary - 1.
    """
    wrong = (ids < 0) | (ids >= vocabulary)
    if wrong.any():
        raise ValueError(
            f"target id {ids[wrong][0].item()} is not in the vocabulary of {vocabulary} ids; targets and student must "
            "share one tokenizer"
        )


def _scored_targets(student_logits: Tensor, targets: TopK, mask: Tensor | None) -> tuple[Tensor, TopK, Tensor]:
    """Student rows, (tokens, vocabulary), targets of the same tokens and dtype, and the mask, after all checks."""
    if student_logits.ndim < 2 or targets.ids.shape[:-1] != student_logits.shape[:-1]:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and target ids {tuple(targets.ids.shape)} do not belong to "
            "the same tokens; they must be (..., vocabulary) and (..., k)"
        )
    vocabulary = student_logits.shape[-1]
    mask = check_mask(mask, student_logits)
    check_targets(targets, vocabulary)
    ids, log_p, log_tail = (field.detach().to(mask.device)[mask] for field in targets)
    check_ids(ids, vocabulary)
    student = as_float(student_logits)
    student = student.flatten(0, -2) if mask.all() else student[mask]
    return student, TopK(ids.long(), log_p.to(student.dtype), log_tail.to(student.dtype)), mask


def _student_buckets(student: Tensor, ids: Tensor) -> Tensor:
    """The student's logits of the kept ids and one for all others, (tokens, k + 1): their logsumexp.

    Summed over those ids rather than taken as 1 minus the kept ones, which in float32 loses masses below 1e-6. It is
    -inf where they are ruled out or there are none; NEVER keeps NaN out of the gradient of that.
    """
    log_rest = student.scatter(-1, ids, NEVER).logsumexp(dim=-1)
    log_rest = log_rest.masked_fill(log_rest < NEVER / 2, -torch.inf)
    return torch.cat([student.gather(-1, ids), log_rest[:, None]], dim=-1)


def _kept_log_probs(
    student: Tensor, targets: TopK, mode: Mode, temperature: float | Tensor, target_temperature: float
) -> tuple[Tensor, Tensor]:
    """Student's and teacher's log-probabilities of the ids over which the mode compares them."""
    ids, log_p, log_tail = targets
    if mode in ("renorm_teacher", "renorm_both"):
        no_tail = F.pad(log_p * (target_temperature / temperature), (0, 1), value=-torch.inf)
        student = student / temperature
        if mode == "renorm_teacher":
            return log_probs(_student_buckets(student, ids), no_tail)
        # the extra column keeps a row defined in which the student rules out every kept id: it adds 0
        return log_probs(F.pad(student.gather(-1, ids), (0, 1), value=NEVER), no_tail)
    if mode == "uniform_tail":
        vocabulary = student.shape[-1]
        log_other = log_tail - math.log(max(vocabulary - ids.shape[-1], 1))
        dense = (log_other * target_temperature)[:, None].expand(-1, vocabulary)
        return log_probs(student, dense.scatter(-1, ids, log_p * target_temperature), temperature)
    buckets = torch.cat([log_p, log_tail[:, None]], dim=-1)
    ratio = temperature / target_temperature
    log_q, log_p = log_probs(_student_buckets(student / target_temperature, ids), buckets, ratio)
    return (log_q[:, :-1], log_p[:, :-1]) if mode == "zero" else (log_q, log_p)


def _divergence_rows(log_q: Tensor, log_p: Tensor, divergence: Divergence, beta: float) -> Tensor:
    """The divergence of each row, (tokens,)."""
    if divergence == "total_variation":
        return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(dim=-1)
    return jsd_rows(log_q, log_p, {"forward_kl": 0.0, "reverse_kl": 1.0}.get(divergence, beta))


def _check_choice(mode: str, divergence: str) -> None:
    if mode not in ("bucket", "zero", "renorm_teacher", "renorm_both", "uniform_tail"):
        raise ValueError(f"mode must be bucket, zero, renorm_teacher, renorm_both or uniform_tail, got {mode!r}")
    if divergence not in ("forward_kl", "reverse_kl", "generalized_jsd", "total_variation"):
        raise ValueError(
            f"divergence must be forward_kl, reverse_kl, generalized_jsd or total_variation, got {divergence!r}"
        )
    if mode in ("zero", "renorm_teacher") and divergence != "forward_kl":
        raise ValueError(f"mode {mode!r} has the forward KL only, got divergence {divergence!r}; use mode 'bucket'")
