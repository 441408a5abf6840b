"""What `fused` computes on the logits of a chunk of tokens: terms of the loss, with gradients in closed form.

The gradient on the student's logits over T is q * (f - <q, f>) for f = d loss / d q. The divergences overwrite `log_q`
and `log_p`, both (tokens, vocabulary), and hold at most one more tensor of that size, two for mixtures. They return
values, (tokens,), and gradients, (tokens, vocabulary).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from speechkd.losses.contract import check_fraction, log_mix
from speechkd.losses.sparse import TopK, topk_divergence

ValuesAndGradient = tuple[Tensor, Tensor]


def forward_kl(log_q: Tensor, log_p: Tensor) -> ValuesAndGradient:
    p = log_p.exp()
    values = log_p.sub_(log_q).mul_(p).sum(dim=-1)
    return values, log_q.exp_().sub_(p)


def reverse_kl(log_q: Tensor, log_p: Tensor) -> ValuesAndGradient:
    ratio = torch.sub(log_q, log_p, out=log_p)
    q = log_q.exp_()
    return _with_values(q, ratio.mul_(q))


def _with_values(q: Tensor, terms: Tensor) -> ValuesAndGradient:
    """Row sums of `terms` as values, and `terms - q * values` as gradient."""
    values = terms.sum(dim=-1)
    return values, terms.addcmul_(q, values[:, None], value=-1)


def generalized_jsd(log_q: Tensor, log_p: Tensor, *, beta: float) -> ValuesAndGradient:
    log_m = log_mix(beta, log_p, log_q)
    p = log_p.exp()
    teacher_values = log_p.sub_(log_m).mul_(p).sum(dim=-1)
    q = torch.exp(log_q, out=p)
    values, gradient = _with_values(q, log_q.sub_(log_m).mul_(q).mul_(1 - beta))
    return values + beta * teacher_values, gradient


def skew_kl(log_q: Tensor, log_p: Tensor, *, alpha: float) -> ValuesAndGradient:
    log_m = log_mix(alpha, log_p, log_q)
    p = log_p.exp()
    log_p.sub_(log_m)
    values = log_p.mul(p).sum(dim=-1)
    slopes = log_p.exp_().mul_(p.copy_(log_q).exp_()).mul_(alpha - 1)  # p / M * q
    return values, _with_values(p, slopes)[1]


def skew_reverse_kl(log_q: Tensor, log_p: Tensor, *, alpha: float, detach_mixture: bool) -> ValuesAndGradient:
    log_m = log_mix(alpha, log_q, log_p)
    ratio = torch.sub(log_q, log_m, out=log_p)
    q = log_q.exp_()
    values = torch.mul(ratio, q, out=log_m).sum(dim=-1)
    slopes = ratio if detach_mixture else ratio.sub_(torch.exp(ratio, out=log_m), alpha=alpha)
    return values, _with_values(q, slopes.mul_(q))[1]


def total_variation(log_q: Tensor, log_p: Tensor) -> ValuesAndGradient:
    q = log_q.exp_()
    gap = torch.sub(q, log_p.exp_(), out=log_p)
    values = 0.5 * gap.abs().sum(dim=-1)
    return values, _with_values(q, gap.sign_().mul_(0.5).mul_(q))[1]


def choose_divergence(
    name: str, *, beta: float, alpha: float, detach_mixture: bool
) -> Callable[[Tensor, Tensor], ValuesAndGradient]:
    """The function of a name, with its parameters bound.

    Raises:
        ValueError: the name is unknown, or a parameter is outside 0 to 1.
    """
    check_fraction("beta", beta)
    check_fraction("alpha", alpha)
    if name == "generalized_jsd" and beta in (0, 1):
        name = "forward_kl" if beta == 0 else "reverse_kl"
    if name in ("skew_kl", "skew_reverse_kl") and alpha == 0:
        name = "forward_kl" if name == "skew_kl" else "reverse_kl"
    known: dict[str, Callable[..., ValuesAndGradient]] = {
        "forward_kl": forward_kl,
        "reverse_kl": reverse_kl,
        "generalized_jsd": partial(generalized_jsd, beta=beta),
        "skew_kl": partial(skew_kl, alpha=alpha),
        "skew_reverse_kl": partial(skew_reverse_kl, alpha=alpha, detach_mixture=detach_mixture),
        "total_variation": total_variation,
    }
    if name not in known:
        raise ValueError(f"divergence must be one of {', '.join(known)}, got {name!r}")
    return known[name]


@dataclass(frozen=True)
class Teacher:
    """What the student is compared to, and how; `hidden` is (..., dim) or top-k targets, which have no head."""

    hidden: Tensor | TopK
    weight: Tensor | None
    bias: Tensor | None
    compare: Callable[[Tensor, Tensor], ValuesAndGradient]
    temperature: float
    scale_t2: bool
    target_temperature: float


# a term of the loss: (logits of a chunk, its first token, its last) to values and gradient; may overwrite the logits
Term = Callable[[Tensor, int, int], ValuesAndGradient]


def cross_entropy_term(labels: Tensor) -> Term:
    """Negative log-likelihood of labels, (tokens,)."""

    def term(logits: Tensor, start: int, stop: int) -> ValuesAndGradient:
        index = labels[start:stop, None]
        log_q = F.log_softmax(logits, dim=-1)
        values = -log_q.gather(-1, index)[:, 0]
        return values, log_q.exp_().scatter_add_(-1, index, log_q.new_full(index.shape, -1.0))

    return term


def divergence_term(teacher: Teacher, hidden: Tensor, head: Tensor, mask: Tensor, vocabulary: int) -> Term:
    """Divergence to a teacher whose logits are made chunk by chunk."""
    factor = teacher.temperature if teacher.scale_t2 else 1 / teacher.temperature  # T**2 / T
    rows, dtype = hidden.detach()[mask], compute_dtype(hidden, head)
    weight = head.detach()[:vocabulary].to(dtype)
    bias = None if teacher.bias is None else teacher.bias.detach()[:vocabulary].to(dtype)

    def term(logits: Tensor, start: int, stop: int) -> ValuesAndGradient:
        teacher_logits = F.linear(rows[start:stop].to(dtype), weight, bias).to(logits.dtype)
        log_p = F.log_softmax(teacher_logits.div_(teacher.temperature), dim=-1)
        del teacher_logits
        log_q = F.log_softmax(logits.div_(teacher.temperature), dim=-1)
        del logits
        values, gradient = teacher.compare(log_q, log_p)
        return values * (factor * teacher.temperature), gradient if factor == 1 else gradient.mul_(factor)

    return term


def topk_term(teacher: Teacher, targets: TopK, mask: Tensor) -> Term:
    """Divergence to top-k targets; its gradient comes from autograd, over the chunk."""
    if targets.ids.shape[:-1] != mask.shape:
        raise ValueError(f"top-k targets are {tuple(targets.ids.shape)}, the tokens {tuple(mask.shape)}")
    targets = TopK(*(field[mask] for field in targets))

    def term(logits: Tensor, start: int, stop: int) -> ValuesAndGradient:
        chunk = TopK(*(field[start:stop] for field in targets))
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            values = topk_divergence(
                leaf,
                chunk,
                temperature=teacher.temperature,
                target_temperature=teacher.target_temperature,
                scale_t2=teacher.scale_t2,
                reduction="none",
            )
            (gradient,) = torch.autograd.grad(values.sum(), leaf)
        return values.detach(), gradient

    return term


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """That of autocast where it is on, else that of the inputs."""
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return torch.promote_types(hidden.dtype, weight.dtype)
