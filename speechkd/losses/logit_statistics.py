"""Losses that compare logits by their statistics: over the vocabulary, over the batch, or between tokens.

Arguments, errors and reductions are those of `logits`.
"""

import torch
from torch import Tensor

from speechkd.losses.contract import NEVER, Number, Reduction, kl_rows, log_probs, reduce_rows, scored_rows, squared


def logit_mse(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    scale_t2: bool = True,
    center: bool = True,
) -> Tensor:
    """Mean over the vocabulary of the squared difference of the logits.

    With `center` each row first loses its mean: the loss is then blind to a constant, and is twice the limit of the
    forward KL for a high temperature. `center=False` compares raw logits. The temperature cancels with `scale_t2`.
    """
    student, teacher, mask = scored_rows(student_logits, teacher_logits, mask, temperature)
    difference = (student - teacher) / temperature
    known = ~(torch.isneginf(student) | torch.isneginf(teacher))
    difference = torch.where(known, difference, 0.0)
    if center:
        mean = difference.sum(dim=-1, keepdim=True) / known.sum(dim=-1, keepdim=True).clamp(min=1)
        difference = torch.where(known, difference - mean, 0.0)
    loss = difference.square().mean(dim=-1)
    return reduce_rows(loss * squared(temperature, scale_t2), mask, reduction, num_items)


def standardized_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    scale_t2: bool = True,
) -> Tensor:
    """Forward KL of logits that were standardised over the vocabulary; blind to their shift and scale.

    Sun et al. 2024, *Logit Standardization in Knowledge Distillation*, https://arxiv.org/abs/2403.01427, which takes
    temperature 2 and weight 9 on images. The deviation is the unbiased one plus 1e-7; the gradient flows through it.
    """
    student, teacher, mask = scored_rows(student_logits, teacher_logits, mask, temperature)
    known = ~(torch.isneginf(student) | torch.isneginf(teacher))
    log_q, log_p = log_probs(_standardize(student, known), _standardize(teacher, known), temperature)
    return reduce_rows(kl_rows(log_p, log_q) * squared(temperature, scale_t2), mask, reduction, num_items)


def _standardize(logits: Tensor, known: Tensor) -> Tensor:
    """Rows with mean 0 and deviation 1 over their known ids; the others are ruled out."""
    count = known.sum(dim=-1, keepdim=True)
    centred = torch.where(known, logits, 0.0)
    centred = torch.where(known, centred - centred.sum(dim=-1, keepdim=True) / count.clamp(min=1), 0.0)
    variance = centred.square().sum(dim=-1, keepdim=True) / (count - 1).clamp(min=1)
    # a constant row has deviation 0, where the root has no derivative
    deviation = torch.where(variance > 0, variance, 1.0).sqrt() * (variance > 0)
    return torch.where(known, centred / (deviation + 1e-7), NEVER)


def luminet(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    alpha: float = 1.0,
) -> Tensor:
    """alpha**2 times the forward KL of logits that were standardised over the batch, id by id.

    LumiNet, Hossain et al. 2023, https://arxiv.org/abs/2310.03669; ImageNet takes alpha 2 and temperature 0.7, without
    its square. For classification heads: one token alone gives 0, and with 50,000 ids the statistics are noise. The
    gradient couples the tokens, so parts of a batch do not add up to the whole.
    """
    student, teacher, mask = scored_rows(student_logits, teacher_logits, mask, temperature)
    known = ~(torch.isneginf(student) | torch.isneginf(teacher))
    log_q, log_p = log_probs(_standardize_columns(student, known), _standardize_columns(teacher, known), temperature)
    return reduce_rows(kl_rows(log_p, log_q) * alpha**2, mask, reduction, num_items)


def _standardize_columns(logits: Tensor, known: Tensor) -> Tensor:
    """Each id with mean 0 and deviation 1 over the rows that know it; in the others it is ruled out."""
    count = known.sum(dim=0).clamp(min=1)
    mean = torch.where(known, logits, 0.0).sum(dim=0) / count
    centred = torch.where(known, logits - mean, 0.0)
    variance = centred.square().sum(dim=0) / count
    return torch.where(known, centred / (variance + 1e-5).sqrt(), NEVER)


def sinkhorn_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    reduction: Reduction = "sum",
    num_items: Number = None,
    epsilon: float = 0.1,
    iterations: int = 20,
    detach_plan: bool = False,
) -> Tensor:
    """Entropy-regularised transport cost between the tokens' distributions of the student and of the teacher.

    SinKD, Cui et al. 2024, https://arxiv.org/abs/2402.17110: temperature 2, and in its code weight 0.0008 on the sum.
    The cost of a pair is the L1 distance of its distributions. The gradient also flows through the iterations, as
    there; `detach_plan=True` takes the plan as a constant. Equal logits do not give 0. Compares all pairs of tokens:
    pass a mask of at most 64.
    """
    if epsilon <= 0 or iterations < 1:
        raise ValueError(f"epsilon must be positive and iterations 1 or more, got {epsilon} and {iterations}")
    student, teacher, mask = scored_rows(student_logits, teacher_logits, mask, temperature)
    log_q, log_p = log_probs(student, teacher, temperature)
    cost = torch.cdist(log_q.exp(), log_p.exp(), p=1)
    log_plan = -cost / epsilon
    for _ in range(iterations):
        log_plan = log_plan - log_plan.logsumexp(dim=1, keepdim=True)
        log_plan = log_plan - log_plan.logsumexp(dim=0, keepdim=True)
    plan = log_plan.exp().detach() if detach_plan else log_plan.exp()
    return reduce_rows((plan * cost).sum(dim=-1), mask, reduction, num_items)
