"""Output head and loss in one pass over chunks of tokens, so that logits of all tokens never exist at once.

The head is a matrix (vocabulary, dim), with a bias or without. Masked tokens are dropped before the product. A chunk's
gradient follows from its logits in closed form, so the forward pass also makes the gradients of the hidden states and,
unless it is frozen, of the head; the backward pass scales them. Only `reduction="none"`, where each token gets its own
gradient from outside, computes the logits again in the backward pass. Memory beyond the inputs is the head's gradient
and three to six chunks. Where no gradient is wanted nothing but the chunks is held.

Compute dtype is that of autocast where it is on, else that of the inputs; the loss itself and the sums of the gradients
are float32 (or float64). Heads must be whole on the device: gather sharded ones first.
"""

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from speechkd.losses.chunk_terms import (
    Teacher,
    Term,
    choose_divergence,
    compute_dtype,
    cross_entropy_term,
    divergence_term,
    forward_kl,
    topk_term,
)
from speechkd.losses.contract import (
    Number,
    Reduction,
    check_labels,
    check_mask,
    check_temperature,
    reduce_rows,
    same_vocabulary,
)
from speechkd.losses.sparse import TopK

Divergence = Literal["forward_kl", "reverse_kl", "generalized_jsd", "skew_kl", "skew_reverse_kl", "total_variation"]
CHUNK_TOKENS = {"cpu": 96, "cuda": 1024}  # measured on a CPU, tests/benchmarks/losses.py


def fused_linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | TopK,
    teacher_weight: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    divergence: Divergence = "forward_kl",
    temperature: float = 1.0,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    scale_t2: bool = True,
    beta: float = 0.5,
    alpha: float = 0.1,
    detach_mixture: bool = False,
    target_temperature: float = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """A divergence of `logits`, from hidden states instead of logits.

    Args:
        student_hidden: last hidden states, (..., student dim).
        student_weight: the student's head, (vocabulary, student dim).
        teacher_hidden: (..., teacher dim), or top-k targets of `sparse`, which are compared by forward KL on k ids
            and one for the rest.
        teacher_weight: the teacher's head, (vocabulary, teacher dim); None with top-k targets.
        mask: True on scored tokens, (...), bool; None scores all.
        divergence: the loss of that name in `logits`.
        temperature: divides both logits; `scale_t2` multiplies the loss by its square.
        reduction: see `contract.reduce_rows`.
        num_items: likewise.
        scale_t2: likewise.
        beta: teacher's weight in the mixture of generalized_jsd; 0 and 1 are forward and reverse KL.
        alpha: weight of the mixture of the skew divergences.
        detach_mixture: no gradient through the mixture of skew_reverse_kl.
        target_temperature: at which top-k targets were made; see `sparse.topk_divergence`.
        student_bias: (vocabulary,).
        teacher_bias: (vocabulary,).
        token_weights: constant weight of each token, (...); the divisor of a mean stays the number of tokens.
        chunk_size: tokens whose logits are held at once; by default 96 on a CPU and 1,024 on a GPU.

    Returns:
        0-dim, or (...) with "none".

    Raises:
        ValueError: shapes, vocabularies or arguments do not fit; the message has the values.
    """
    compare = choose_divergence(divergence, beta=beta, alpha=alpha, detach_mixture=detach_mixture)
    teacher = Teacher(teacher_hidden, teacher_weight, teacher_bias, compare, temperature, scale_t2, target_temperature)
    head = _Head(student_hidden, student_weight, student_bias)
    total, _ = _fused_loss(head, mask, None, 0.0, teacher, 1.0, token_weights, reduction, num_items, chunk_size)
    return total


def fused_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Negative log-likelihood of the labels, (...), int64, -100 where not scored; else as `fused_linear_divergence`."""
    head = _Head(hidden, weight, bias)
    total, _ = _fused_loss(head, mask, labels, 1.0, None, 0.0, token_weights, reduction, num_items, chunk_size)
    return total


def fused_linear_distillation(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | TopK,
    teacher_weight: Tensor | None,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    label_weight: float = 0.5,
    kd_weight: float | None = None,
    divergence: Divergence = "forward_kl",
    temperature: float = 1.0,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    scale_t2: bool = True,
    beta: float = 0.5,
    alpha: float = 0.1,
    detach_mixture: bool = False,
    target_temperature: float = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`label_weight` * CE(labels) + `kd_weight` * divergence, both from one pass over the student's head.

    The fused form of `logits.hinton_kd`; arguments as there and in `fused_linear_divergence`.

    Returns:
        The weighted sum, with its graph, and the terms "cross_entropy" and "divergence" without; 0-dim each, or (...)
        with "none".
    """
    kd_weight = 1 - label_weight if kd_weight is None else kd_weight
    compare = choose_divergence(divergence, beta=beta, alpha=alpha, detach_mixture=detach_mixture)
    teacher = Teacher(teacher_hidden, teacher_weight, teacher_bias, compare, temperature, scale_t2, target_temperature)
    head = _Head(student_hidden, student_weight, student_bias)
    total, values = _fused_loss(
        head, mask, labels, label_weight, teacher, kd_weight, None, reduction, num_items, chunk_size
    )
    return total, {"cross_entropy": values[0], "divergence": values[1]}


@dataclass(frozen=True)
class _Head:
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


@torch.compiler.disable  # how many tokens are scored is data; compiled code around the loss keeps its own graphs
def _fused_loss(
    head: _Head,
    mask: Tensor | None,
    labels: Tensor | None,
    label_weight: float,
    teacher: Teacher | None,
    kd_weight: float,
    token_weights: Tensor | None,
    reduction: Reduction,
    num_items: Number,
    chunk_size: int | None,
) -> tuple[Tensor, list[Tensor]]:
    """Weighted sum of the terms, reduced, and each term without a graph."""
    logits = _check(head, teacher, chunk_size)
    mask = check_mask(mask, logits) if labels is None else check_labels(labels, logits, mask)
    vocabulary = logits.shape[-1]
    terms: list[tuple[float, Term]] = []
    if labels is not None:
        terms.append((label_weight, cross_entropy_term(labels[mask])))
    if teacher is not None:
        if isinstance(teacher.hidden, TopK):
            term = topk_term(teacher, teacher.hidden, mask)
        else:
            term = divergence_term(teacher, teacher.hidden, cast(Tensor, teacher.weight), mask, vocabulary)
        terms.append((kd_weight, term))
    hidden = head.hidden[mask]
    ones = hidden.new_ones(len(hidden), dtype=_sum_dtype(hidden))
    if token_weights is not None:
        if token_weights.shape != mask.shape:
            raise ValueError(f"token_weights are {tuple(token_weights.shape)}, the tokens {tuple(mask.shape)}")
        ones = token_weights.detach()[mask].to(ones)

    def reduce(values: Tensor) -> Tensor:
        return reduce_rows(values * ones, mask, reduction, num_items)

    coefficient = None
    if reduction != "none":  # the other reductions are linear: their gradient says how much a token counts
        with torch.enable_grad():
            leaf = torch.zeros_like(ones).requires_grad_()
            (coefficient,) = torch.autograd.grad(reduce(leaf), leaf)
    weight, bias = head.weight, head.bias
    if len(weight) > vocabulary:  # slicing a whole weight would cost its backward pass a second gradient
        weight, bias = weight[:vocabulary], None if bias is None else bias[:vocabulary]
    chunk = chunk_size or CHUNK_TOKENS.get(hidden.device.type, CHUNK_TOKENS["cpu"])
    total, values = _FusedLinear.apply(hidden, weight, bias, terms, coefficient, chunk, torch.is_grad_enabled())
    return (reduce(total) if coefficient is None else total), [reduce(row) for row in values]


def _check(head: _Head, teacher: Teacher | None, chunk_size: int | None) -> Tensor:
    """A view that has the shape of the logits, over the ids that both heads have.

    Raises:
        ValueError: shapes, temperature or chunk size do not fit.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be 1 token or more, got {chunk_size}")
    logits = _logits_shape("student", head.hidden, head.weight, head.bias)
    if teacher is None:
        return logits
    check_temperature(teacher.temperature)
    if isinstance(teacher.hidden, TopK):
        if teacher.weight is not None or teacher.compare is not forward_kl:
            raise ValueError("top-k targets have no teacher_weight and are compared by forward_kl")
        return logits
    if teacher.weight is None:
        raise ValueError("teacher_weight is missing: the teacher's head, (vocabulary, dim)")
    return same_vocabulary(logits, _logits_shape("teacher", teacher.hidden, teacher.weight, teacher.bias))[0]


def _logits_shape(model: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.ndim != 2 or hidden.ndim < 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{model}_hidden {tuple(hidden.shape)} and {model}_weight {tuple(weight.shape)} do not multiply; they are "
            "(..., dim) and (vocabulary, dim)"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.isfinite().all()):
        raise ValueError(f"{model}_bias must be {weight.shape[0]} finite values, got {tuple(bias.shape)}")
    return hidden.detach()[..., :1].expand(*hidden.shape[:-1], weight.shape[0])


class _FusedLinear(torch.autograd.Function):
    """Hidden states and head to the weighted sum of the terms and the terms, (terms, tokens).

    With a coefficient per token the sum is 0-dim and its gradients are made here; without one it is (tokens,) and they
    are made in the backward pass, from the logits computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        terms: list[tuple[float, Term]],
        coefficient: Tensor | None,
        chunk: int,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.options = terms, chunk, compute_dtype(hidden, weight)
        wanted = tuple(grad_enabled and need for need in ctx.needs_input_grad[:3])
        ctx.again = coefficient is None
        if ctx.again:
            values, _ = _pass(hidden, weight, bias, None, (False, False, False), *ctx.options)
            ctx.save_for_backward(hidden, weight, bias)
        else:
            values, gradients = _pass(hidden, weight, bias, coefficient, wanted, *ctx.options)
            ctx.save_for_backward(*gradients)
            ctx.input_dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        ctx.mark_non_differentiable(values)
        weighted = sum((factor * row for (factor, _), row in zip(terms, values, strict=True)), torch.zeros(()))
        return (weighted if coefficient is None else (weighted * coefficient).sum()), values

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.again:
            hidden, weight, bias = ctx.saved_tensors
            _, gradients = _pass(hidden, weight, bias, upstream, ctx.needs_input_grad[:3], *ctx.options)
            dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
            scaled = gradients
        else:
            dtypes = ctx.input_dtypes
            # in place unless the graph is kept for another backward pass, for a second copy would be the largest tensor
            keep = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()
            scaled = [
                None if made is None else made * upstream if keep else made.mul_(upstream) for made in ctx.saved_tensors
            ]
        typed = [None if made is None else made.to(dtype) for made, dtype in zip(scaled, dtypes, strict=True)]
        return (*typed, None, None, None, None)


def _pass(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coefficient: Tensor | None,
    wanted: tuple[bool, ...],
    terms: list[tuple[float, Term]],
    chunk: int,
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor | None]]:
    """Values of the terms, (terms, tokens), and the wanted gradients of hidden states, weight and bias."""
    num_tokens, sum_dtype = len(hidden), _sum_dtype(hidden)
    values = torch.zeros(len(terms), num_tokens, dtype=sum_dtype, device=hidden.device)
    d_hidden, d_weight, d_bias = (
        torch.zeros_like(tensor, dtype=sum_dtype) if want and tensor is not None else None
        for tensor, want in zip((hidden, weight, bias), wanted, strict=True)
    )
    made = [d_hidden, d_weight, d_bias]
    if coefficient is None or not num_tokens:
        coefficient = None
    else:  # gradients are made for coefficients of at most 1 and then scaled, so that float16 products do not underflow
        scale = coefficient.abs().amax().clamp(min=1e-30)
        coefficient = (coefficient / scale)[:, None]
        same = bool((coefficient == 1).all())
    with torch.autocast(hidden.device.type, enabled=False):
        head, head_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        for start in range(0, num_tokens, chunk):
            stop = min(start + chunk, num_tokens)
            rows = hidden[start:stop].to(dtype)
            logits = [F.linear(rows, head, head_bias).to(sum_dtype)]
            slopes = []
            for number, (factor, term) in enumerate(terms):
                last = number == len(terms) - 1  # it gets the only reference, so that it can drop the logits early
                values[number, start:stop], slope = term(logits.pop() if last else logits[0], start, stop)
                slopes.append(slope if factor == 1 else slope.mul_(factor))
                del slope
            if coefficient is None or not any(wanted):
                continue
            gradient = slopes.pop(0)
            if slopes:
                gradient.add_(slopes.pop())
            if not same:
                gradient.mul_(coefficient[start:stop])
            cast_gradient = gradient.to(dtype)
            if d_hidden is not None:
                d_hidden[start:stop] = cast_gradient @ head
            if d_weight is not None and dtype == sum_dtype:
                d_weight.addmm_(cast_gradient.T, rows)
            elif d_weight is not None:
                d_weight.add_(cast_gradient.T @ rows)
            if d_bias is not None:
                d_bias.add_(gradient.sum(dim=0))
            del gradient, cast_gradient
    if coefficient is not None:
        made = [None if tensor is None else tensor.mul_(scale) for tensor in made]
    return values, made


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
