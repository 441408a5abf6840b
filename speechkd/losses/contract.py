"""What all losses on logits have in common: checks, the rows that count, float32 log-probabilities, reductions.

Everywhere `student_logits` and `teacher_logits` are (..., vocabulary) and aligned (logit i predicts label i), `mask` is
(...), bool, True on scored tokens, and a loss per token sums over the vocabulary. The teacher gets no gradient.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["token_mean", "sum", "seq_mean", "none"]
Number = Tensor | int | None
IGNORE_INDEX = -100
NEVER = -1e9  # log-probability of an id that a model rules out; its exponential is 0 and, unlike -inf, it has no NaN
VOCABULARY_PADDING = 64  # embedding matrices are padded to multiples of this
MAX_PADDING = 512


def scored_rows(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The logits of the scored tokens, after all checks.

    Args:
        student_logits: (..., vocabulary), of any floating dtype.
        teacher_logits: same shape; where one vocabulary is the other padded to a multiple of 64, its padding is cut.
        mask: True on scored tokens, (...), bool; None scores all.
        temperature: of the loss; only checked here.

    Returns:
        Student and teacher rows, (tokens, vocabulary), float32 or, for a float64 student, float64; and the mask.

    Raises:
        ValueError: shapes, vocabularies, mask or temperature do not fit, or there is no token at all.
    """
    check_temperature(temperature)
    student_logits, teacher_logits = same_vocabulary(student_logits, teacher_logits)
    mask = check_mask(mask, student_logits)
    student = as_float(student_logits)
    teacher = teacher_logits.detach().to(student.dtype)
    if mask.all():
        return student.flatten(0, -2), teacher.flatten(0, -2), mask
    return student[mask], teacher[mask], mask


def same_vocabulary(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Both logits over the ids that both models have.

    Raises:
        ValueError: the leading shapes differ, or the vocabularies differ by more than padding.
    """
    if student_logits.ndim < 2 or student_logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} differ in "
            "shape or are not (..., vocabulary); give both models the same decoder_input_ids"
        )
    ours, theirs = student_logits.shape[-1], teacher_logits.shape[-1]
    if ours == theirs:
        return student_logits, teacher_logits
    small, large = sorted((ours, theirs))
    if large % VOCABULARY_PADDING or large - small >= MAX_PADDING:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} differ in "
            f"shape: vocabularies of {ours} and {theirs} ids are not one tokenizer with padding. Slice both to the ids "
            "that they share, or use speechkd.losses.cross_tokenizer"
        )
    return student_logits[..., :small], teacher_logits[..., :small]


def check_mask(mask: Tensor | None, logits: Tensor) -> Tensor:
    """The mask, (...), bool, on the logits' device; all True where it is None.

    Raises:
        ValueError: it has another shape or dtype, or the batch is empty.
    """
    shape = logits.shape[:-1]
    if math.prod(shape) == 0:
        raise ValueError(f"the batch is empty: logits are {tuple(logits.shape)}; leave such a batch out")
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=logits.device)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool with True on scored tokens, got {mask.dtype}; pass mask.bool()")
    if mask.shape != shape:
        raise ValueError(f"mask is {tuple(mask.shape)}, the logits {tuple(logits.shape)} need {tuple(shape)}")
    return mask.to(logits.device)


def check_labels(labels: Tensor, logits: Tensor, mask: Tensor | None) -> Tensor:
    """The mask of the scored tokens: those with a label, and in the mask if there is one.

    Raises:
        ValueError: labels have another shape or dtype, or one is neither -100 nor an id of the vocabulary.
    """
    mask = check_mask(mask, logits)
    if labels.shape != mask.shape:
        raise ValueError(f"labels are {tuple(labels.shape)}, the logits {tuple(logits.shape)} need {tuple(mask.shape)}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 token ids, got {labels.dtype}; pass labels.long()")
    vocabulary = logits.shape[-1]
    wrong = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= vocabulary))
    if wrong.any():
        raise ValueError(
            f"label {labels[wrong][0].item()} is not in the vocabulary of {vocabulary} ids; tokens that are not scored "
            f"have {IGNORE_INDEX}"
        )
    return mask & (labels != IGNORE_INDEX)


def as_float(logits: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def log_probs(student: Tensor, teacher: Tensor, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of rows; an id that either model rules out with -inf has probability 0 in both.

    The others are not normalised again: as in the published code, such an id adds 0 to a divergence.

    Returns:
        log q (student) and log p (teacher), (tokens, vocabulary).
    """
    log_q = F.log_softmax(student / temperature, dim=-1)
    log_p = F.log_softmax(teacher / temperature, dim=-1)
    if log_q.numel() and torch.minimum(log_q.detach().amin(), log_p.detach().amin()) == -torch.inf:
        ruled_out = torch.isneginf(log_q) | torch.isneginf(log_p)
        log_q, log_p = log_q.masked_fill(ruled_out, NEVER), log_p.masked_fill(ruled_out, NEVER)
    return log_q, log_p


def log_mix(weight: float, log_a: Tensor, log_b: Tensor) -> Tensor:
    """log(weight * a + (1 - weight) * b), elementwise, without leaving log space; weight is 0 to 1."""
    if weight == 0:
        return log_b
    if weight == 1:
        return log_a + 0 * log_b  # keeps the graph, with a gradient of 0
    return torch.logaddexp(log_a + math.log(weight), log_b + math.log1p(-weight))


def kl_rows(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) of each row, (tokens,)."""
    return (log_a.exp() * (log_a - log_b)).sum(dim=-1)


def jsd_rows(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence of each row, (tokens,); at beta 0 and 1 the forward and the reverse KL."""
    if beta in (0, 1):
        return kl_rows(log_p, log_q) if beta == 0 else kl_rows(log_q, log_p)
    log_m = log_mix(beta, log_p, log_q)
    return beta * kl_rows(log_p, log_m) + (1 - beta) * kl_rows(log_q, log_m)


def squared(temperature: float | Tensor, scale_t2: bool) -> float | Tensor:
    """The factor T**2, which keeps gradients at their size as T grows, or 1."""
    return temperature**2 if scale_t2 else 1.0


def check_temperature(temperature: float | Tensor, name: str = "temperature") -> None:
    """Refuse temperatures that divide by nothing or leave nothing.

    Raises:
        ValueError: it is not positive, or infinite.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {float(temperature)}")


def check_fraction(name: str, value: float) -> None:
    """Refuse weights outside 0 to 1.

    Raises:
        ValueError: it is outside.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be 0 to 1, got {value}")


def reduce_rows(loss: Tensor, mask: Tensor, reduction: Reduction, num_items: Tensor | int | None = None) -> Tensor:
    """Reduce the losses of the scored tokens.

    Args:
        loss: one value per True of the mask, (tokens,).
        mask: (...), bool.
        reduction: "token_mean" is the sum over `num_items`, by default over the scored tokens; "seq_mean" the mean of
            the sequences' token means, over `num_items` sequences or over those with a scored token; "sum"; "none"
            gives (...) with 0 where the mask is False.
        num_items: divisor of a mean, for batches that are parts of a larger one; 0 where that has no scored token.

    Returns:
        0-dim, or (...). Without any scored token it is 0 and still has a graph.

    Raises:
        ValueError: the reduction is unknown, or has no sequences to average over.
    """
    if reduction == "sum":
        return loss.sum()
    if not loss.numel():
        num_items = 1  # the larger batch may have no scored token either: 0 / 0 would be NaN
    if reduction == "token_mean":
        return loss.sum() / (loss.numel() if num_items is None else num_items)
    if reduction not in ("none", "seq_mean"):
        raise ValueError(f"reduction must be token_mean, sum, seq_mean or none, got {reduction!r}")
    per_token = loss.new_zeros(mask.shape).masked_scatter(mask, loss)
    if reduction == "none":
        return per_token
    if mask.ndim < 2:
        raise ValueError(f"seq_mean needs logits (batch, length, vocabulary), got tokens {tuple(mask.shape)}")
    num_tokens = mask.sum(dim=-1)
    means = per_token.sum(dim=-1) / num_tokens.clamp(min=1)
    return means.sum() / ((num_tokens > 0).sum() if num_items is None else num_items)
