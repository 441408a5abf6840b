"""Losses between a student's and a teacher's logits, computed per token in float32 and log space.

All take `(student_logits, teacher_logits, mask=None, *, temperature=1.0, reduction="token_mean", num_items=None)`:

- student_logits, teacher_logits: (..., vocabulary), aligned; the teacher gets no gradient.
- mask: True on scored tokens, (...), bool; None scores all, or all that have a label.
- temperature: divides both logits. `scale_t2` multiplies the loss by its square, which keeps the gradient's size; most
  published code omits it for every loss but the forward KL. Bounds that are given hold without it.
- reduction, num_items: see `contract.reduce_rows`. The result is 0-dim, or (...) with "none".

They raise ValueError, with the values, on shapes, vocabularies, masks, labels or arguments that do not fit. An id that
either model rules out with a logit of -inf adds 0. Here are the divergences; losses that also read labels come from
`labelled`, those on statistics of the logits from `logit_statistics`.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from speechkd.losses.contract import (
    IGNORE_INDEX,
    Number,
    Reduction,
    as_float,
    check_fraction,
    check_labels,
    jsd_rows,
    kl_rows,
    log_mix,
    log_probs,
    reduce_rows,
    same_vocabulary,
    scored_rows,
    squared,
)
from speechkd.losses.labelled import QuantileBounds, atkd, dac_kl, decoupled_kd, self_evolution_kd, token_scaled_kd
from speechkd.losses.logit_statistics import logit_mse, luminet, sinkhorn_kd, standardized_kl

__all__ = [
    "QuantileBounds",
    "adaptive_kl",
    "atkd",
    "cross_entropy",
    "dac_kl",
    "decoupled_kd",
    "forward_kl",
    "generalized_jsd",
    "hinton_kd",
    "jeffreys",
    "js",
    "logit_mse",
    "luminet",
    "reverse_kl",
    "self_evolution_kd",
    "sinkhorn_kd",
    "skew_kl",
    "skew_reverse_kl",
    "soft_cross_entropy",
    "standardized_kl",
    "token_scaled_kd",
    "total_variation",
]


def cross_entropy(
    student_logits: Tensor, labels: Tensor, *, reduction: Reduction = "token_mean", num_items: Number = None
) -> Tensor:
    """Negative log-likelihood of the labels, (...), int64, at temperature 1; -100 is not scored."""
    mask = check_labels(labels, student_logits, None)
    loss = F.cross_entropy(as_float(student_logits)[mask], labels[mask], reduction="none")
    return reduce_rows(loss, mask, reduction, num_items)


def forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    scale_t2: bool = True,
    subtract_entropy: bool = True,
) -> Tensor:
    """KL(teacher || student); covers every mode of the teacher.

    Hinton et al. 2015, https://arxiv.org/abs/1503.02531. DistiLLM, TAID and TSLD call the cross entropy by this name:
    `subtract_entropy=False` gives theirs, larger by the teacher's entropy and with the same gradient.
    """
    student, teacher, mask = scored_rows(student_logits, teacher_logits, mask, temperature)
    log_q, log_p = log_probs(student, teacher, temperature)
    loss = kl_rows(log_p, log_q) if subtract_entropy else -(log_p.exp() * log_q).sum(dim=-1)
    return reduce_rows(loss * squared(temperature, scale_t2), mask, reduction, num_items)


def hinton_kd(
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
    kd_weight: float | None = None,
) -> Tensor:
    """`label_weight` * CE(labels) + `kd_weight` * T**2 * KL(teacher || student); the CE is at temperature 1.

    Hinton et al. 2015, https://arxiv.org/abs/1503.02531. Without a `kd_weight` the weights add up to 1. Distil-Whisper
    has 0.8 and 1.0 at temperature 2.
    """
    student_logits, teacher_logits = same_vocabulary(student_logits, teacher_logits)
    student_logits = as_float(student_logits)  # once, so that both terms' gradients add up in float32
    mask = check_labels(labels, student_logits, mask)
    labels = labels.masked_fill(~mask, IGNORE_INDEX)
    hard = cross_entropy(student_logits, labels, reduction=reduction, num_items=num_items)
    soft = forward_kl(
        student_logits,
        teacher_logits,
        mask,
        temperature=temperature,
        reduction=reduction,
        num_items=num_items,
        scale_t2=scale_t2,
    )
    return label_weight * hard + (1 - label_weight if kd_weight is None else kd_weight) * soft


def soft_cross_entropy(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    scale_t2: bool = True,
) -> Tensor:
    """Cross entropy with the teacher's distribution as target; the forward KL plus the teacher's entropy."""
    return forward_kl(
        student_logits,
        teacher_logits,
        mask,
        temperature=temperature,
        reduction=reduction,
        num_items=num_items,
        scale_t2=scale_t2,
        subtract_entropy=False,
    )


def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    scale_t2: bool = True,
) -> Tensor:
    """KL(student || teacher); seeks the teacher's main mode.

    The token-level part of MiniLLM, Gu et al. 2023, https://arxiv.org/abs/2306.08543.
    """
    student, teacher, mask = scored_rows(student_logits, teacher_logits, mask, temperature)
    log_q, log_p = log_probs(student, teacher, temperature)
    return reduce_rows(kl_rows(log_q, log_p) * squared(temperature, scale_t2), mask, reduction, num_items)


def jeffreys(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    scale_t2: bool = True,
    forward_weight: float = 0.5,
    subtract_entropy: bool = True,
) -> Tensor:
    """`forward_weight` * KL(teacher || student) + the rest * KL(student || teacher).

    DistiLLM's `symmetric_kl` is `forward_weight=0.1, subtract_entropy=False`.
    """
    check_fraction("forward_weight", forward_weight)
    student, teacher, mask = scored_rows(student_logits, teacher_logits, mask, temperature)
    log_q, log_p = log_probs(student, teacher, temperature)
    forward = kl_rows(log_p, log_q) if subtract_entropy else -(log_p.exp() * log_q).sum(dim=-1)
    loss = forward_weight * forward + (1 - forward_weight) * kl_rows(log_q, log_p)
    return reduce_rows(loss * squared(temperature, scale_t2), mask, reduction, num_items)


def generalized_jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    scale_t2: bool = True,
    beta: float = 0.5,
    endpoints: Literal["kl", "formula"] = "kl",
) -> Tensor:
    """Generalised Jensen-Shannon divergence; `beta` is the teacher's weight in the mixture M.

    beta KL(p || M) + (1 - beta) KL(q || M), M = beta p + (1 - beta) q. GKD, Agarwal et al. 2023,
    https://arxiv.org/abs/2306.13649. At most the entropy of (beta, 1 - beta).

    The formula is 0 at both ends. As in TRL and Liger, beta 0 gives the forward and beta 1 the reverse KL instead, the
    limits of JSD / beta and JSD / (1 - beta); `endpoints="formula"` gives the 0. DistiLLM's `js_distance(lam)` has
    beta = 1 - lam.
    """
    check_fraction("beta", beta)
    if endpoints not in ("kl", "formula"):
        raise ValueError(f"endpoints must be 'kl' or 'formula', got {endpoints!r}")
    student, teacher, mask = scored_rows(student_logits, teacher_logits, mask, temperature)
    log_q, log_p = log_probs(student, teacher, temperature)
    loss = jsd_rows(log_q, log_p, beta)
    if beta in (0, 1) and endpoints == "formula":
        loss = 0 * loss
    return reduce_rows(loss * squared(temperature, scale_t2), mask, reduction, num_items)


def js(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    scale_t2: bool = True,
) -> Tensor:
    """Jensen-Shannon divergence, at most log 2 and symmetric."""
    return generalized_jsd(
        student_logits,
        teacher_logits,
        mask,
        temperature=temperature,
        reduction=reduction,
        num_items=num_items,
        scale_t2=scale_t2,
    )


def total_variation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    scale_t2: bool = True,
) -> Tensor:
    """Half the L1 distance of the distributions, 0 to 1; robust to label noise, with a weak gradient.

    f-distill, Wen et al. 2023, https://arxiv.org/abs/2307.15190.
    """
    student, teacher, mask = scored_rows(student_logits, teacher_logits, mask, temperature)
    log_q, log_p = log_probs(student, teacher, temperature)
    loss = 0.5 * (log_p.exp() - log_q.exp()).abs().sum(dim=-1)
    return reduce_rows(loss * squared(temperature, scale_t2), mask, reduction, num_items)


def skew_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    scale_t2: bool = True,
    alpha: float = 0.1,
    subtract_entropy: bool = True,
) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q); the forward KL with a bounded gradient.

    DistiLLM, Ko et al. 2024, https://arxiv.org/abs/2402.03898. Its code, and TAID's, return the cross entropy with the
    mixture: `subtract_entropy=False`, larger by the teacher's entropy and with the same gradient.
    """
    check_fraction("alpha", alpha)
    student, teacher, mask = scored_rows(student_logits, teacher_logits, mask, temperature)
    log_q, log_p = log_probs(student, teacher, temperature)
    log_m = log_mix(alpha, log_p, log_q)
    loss = kl_rows(log_p, log_m) if subtract_entropy else -(log_p.exp() * log_m).sum(dim=-1)
    return reduce_rows(loss * squared(temperature, scale_t2), mask, reduction, num_items)


def skew_reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    scale_t2: bool = True,
    alpha: float = 0.1,
    detach_mixture: bool = False,
) -> Tensor:
    """KL(q || (1 - alpha) p + alpha q).

    DistiLLM, Ko et al. 2024, https://arxiv.org/abs/2402.03898: the gradient also flows through q in the mixture, as in
    its code and DSKD's. DistiLLM-2 holds that q fixed: `detach_mixture=True`, the same value with another gradient.
    """
    check_fraction("alpha", alpha)
    student, teacher, mask = scored_rows(student_logits, teacher_logits, mask, temperature)
    log_q, log_p = log_probs(student, teacher, temperature)
    log_m = log_mix(alpha, log_q.detach() if detach_mixture else log_q, log_p)
    return reduce_rows(kl_rows(log_q, log_m) * squared(temperature, scale_t2), mask, reduction, num_items)


def adaptive_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    scale_t2: bool = True,
    mu: float = 0.5,
    detach_weight: bool = True,
) -> Tensor:
    """Forward and reverse KL, weighted by where the models differ: in the teacher's head or in its tail.

    AKL, Wu et al. 2024, https://arxiv.org/abs/2404.02657. The head holds the teacher's likeliest ids until their mass
    reaches `mu`. The weight is a constant for the gradient, as in DSKD's code; `detach_weight=False` lets it have one.
    Equal distributions weigh both by a half. TAID's code applies the mask of the sorted ids to the unsorted ones.
    """
    check_fraction("mu", mu)
    student, teacher, mask = scored_rows(student_logits, teacher_logits, mask, temperature)
    log_q, log_p = log_probs(student, teacher, temperature)
    p, order = log_p.exp().sort(dim=-1, descending=True)
    gaps = (p - log_q.exp().gather(-1, order)).abs()
    in_head = p.cumsum(dim=-1) - p < mu
    head, total = (gaps * in_head).sum(dim=-1), gaps.sum(dim=-1)
    weight = torch.where(total > 0, head / total.clamp(min=torch.finfo(total.dtype).tiny), 0.5)
    if detach_weight:
        weight = weight.detach()
    loss = weight * kl_rows(log_p, log_q) + (1 - weight) * kl_rows(log_q, log_p)
    return reduce_rows(loss * squared(temperature, scale_t2), mask, reduction, num_items)
