"""Losses between attention maps, and between the relations that attention is made of.

Maps are (batch, heads, queries, keys). The teacher gets no gradient, and a query's loss is a mean over heads.

- mask: True on real queries, (batch, queries), bool; None takes all.
- key_mask: True on real keys, (batch, keys), bool. None means self-attention, where it is the mask; for the
  cross-attention of a Whisper, whose keys are all real, pass one of ones.
- reduction, num_items: see `contract.reduce_rows`; queries are what counts.

A score that a model itself rules out, with -inf or a large negative number as causal masks have, is left out on both
sides. All raise ValueError, with the values, on shapes, masks or arguments that do not fit. Everything is computed in
float32, also under autocast; float64 stays.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from speechkd.losses.contract import NEVER, Number, Reduction, as_float, kl_rows, reduce_rows
from speechkd.losses.hidden import inner_products, position_mask

RULED_OUT = -1e3  # no real score is below; additive masks are -1e4, or the lowest number of the dtype, and more
FLOOR = 1e-9  # of a probability whose logarithm is mixed with those of other heads
Maps = Literal["scores", "probabilities"]


def attention_mse(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    *,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    average_heads: bool = False,
) -> Tensor:
    """Squared difference of attention scores, before the softmax; a mean over keys and heads.

    TinyBERT, Jiao et al. 2019, https://arxiv.org/abs/1909.10351, at the layers of the uniform `layers.layer_map`. Its
    code sets ruled-out scores to 0 and has them in the mean; here the mean is over the others, and padding changes
    nothing.

    Args:
        student: scores, (batch, heads, queries, keys).
        teacher: same shape; heads may differ with `average_heads`.
        mask: see the module.
        key_mask: see the module.
        reduction: see `contract.reduce_rows`.
        num_items: divisor of a mean.
        average_heads: compare the means over heads.
    """
    student, teacher, keys, mask = _scored_queries(student, teacher, mask, key_mask)
    if average_heads:
        student, teacher = student.mean(dim=1, keepdim=True), teacher.mean(dim=1, keepdim=True)
    _check_heads(student, teacher, "pass average_heads=True")
    allowed = _allowed(student, teacher, keys)
    squares = torch.where(allowed, student - teacher, 0.0).square()
    loss = squares.sum(dim=-1) / allowed.sum(dim=-1).clamp(min=1)
    return reduce_rows(loss.mean(dim=-1), mask, reduction, num_items)


def attention_kl(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    *,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    maps: Maps = "scores",
) -> Tensor:
    """KL(teacher || student) between attention distributions over the keys, the first half of `minilm`.

    Args:
        student: (batch, heads, queries, keys).
        teacher: same shape.
        mask: see the module.
        key_mask: see the module.
        reduction: see `contract.reduce_rows`.
        num_items: divisor of a mean.
        maps: "scores" are before the softmax; "probabilities" after it, as `output_attentions=True` gives them.
    """
    if maps not in ("scores", "probabilities"):
        raise ValueError(f"maps must be scores or probabilities, got {maps!r}")
    student, teacher, keys, mask = _scored_queries(student, teacher, mask, key_mask)
    _check_heads(student, teacher, "take minilm_v2, which chooses its own heads")
    if maps == "probabilities":
        student, teacher = _log(student), _log(teacher)
    allowed = _allowed(student, teacher, keys)
    log_q, log_p = (scores.masked_fill(~allowed, NEVER).log_softmax(dim=-1) for scores in (student, teacher))
    return reduce_rows(kl_rows(log_p, log_q).mean(dim=-1), mask, reduction, num_items)


def relation_kl(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    num_heads: int,
) -> Tensor:
    """KL between the relations of an utterance's vectors: softmax of their scaled products with each other, per head.

    Widths may differ. With values and the models' own heads it is the second half of `minilm`; `minilm_v2` adds three.

    Args:
        student: queries, keys or values of all heads side by side, (batch, frames, student_dim).
        teacher: the same, (batch, frames, teacher_dim).
        mask: True on real frames, (batch, frames), bool.
        reduction: see `contract.reduce_rows`.
        num_items: divisor of a mean.
        num_heads: parts into which both widths are cut.
    """
    student_scores, teacher_scores = (_self_scores(vectors, mask, num_heads) for vectors in (student, teacher.detach()))
    return attention_kl(student_scores, teacher_scores, mask, reduction=reduction, num_items=num_items)


def minilm(
    student: Tensor,
    teacher: Tensor,
    student_values: Tensor,
    teacher_values: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    maps: Maps = "scores",
) -> Tensor:
    """`attention_kl` of self-attention plus `relation_kl` of its values, both of the last layer.

    MiniLM, Wang et al. 2020, https://arxiv.org/abs/2002.10957. Widths may differ, heads may not.

    Args:
        student: self-attention, (batch, heads, frames, frames).
        teacher: same shape.
        student_values: of all heads side by side, (batch, frames, student_dim).
        teacher_values: the same, (batch, frames, teacher_dim).
        mask: True on real frames, (batch, frames), bool.
        reduction: see `contract.reduce_rows`.
        num_items: divisor of a mean.
        maps: see `attention_kl`.
    """
    attention = attention_kl(student, teacher, mask, reduction=reduction, num_items=num_items, maps=maps)
    heads = student.shape[1]
    return attention + relation_kl(
        student_values, teacher_values, mask, reduction=reduction, num_items=num_items, num_heads=heads
    )


def minilm_v2(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    num_heads: int = 48,
) -> Tensor:
    """Sum of `relation_kl` over queries, keys and values.

    MiniLMv2, Wang et al. 2020, https://arxiv.org/abs/2012.15828: 48 relation heads for a base-sized teacher, its last
    layer; 64 for a large one, layer 21 of 24; the student's last layer. Neither widths nor the models' heads need fit.

    Args:
        student: queries, keys and values, each of all heads side by side, (batch, frames, student_dim).
        teacher: the same, (batch, frames, teacher_dim).
        mask: True on real frames, (batch, frames), bool.
        reduction: see `contract.reduce_rows`.
        num_items: divisor of a mean.
        num_heads: relation heads; divides both widths.
    """
    if len(student) != len(teacher) or not student:
        raise ValueError(
            f"student and teacher gave {len(student)} and {len(teacher)} tensors; give queries, keys and values of both"
        )
    losses = [
        relation_kl(ours, theirs, mask, reduction=reduction, num_items=num_items, num_heads=num_heads)
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(losses).sum(dim=0)


class AttentionAligner(nn.Module):
    """Mixes the student's attention heads into as many as the teacher has: a convolution with a 1 x 1 kernel.

    Args:
        num_student_heads: of all layers together.
        num_teacher_heads: of all layers together.
    """

    def __init__(self, num_student_heads: int, num_teacher_heads: int) -> None:
        super().__init__()
        self.mix = nn.Conv1d(num_student_heads, num_teacher_heads, kernel_size=1)

    def forward(self, maps: Tensor) -> Tensor:
        """(n, teacher_heads, positions) of (n, student_heads, positions)."""
        with torch.autocast(maps.device.type, enabled=False):
            return self.mix(maps.to(self.mix.weight.dtype)).to(maps.dtype)


def aligned_attention_kl(
    student: Tensor,
    teacher: Tensor,
    aligner: AttentionAligner,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    *,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    form: Literal["rows", "map"] = "rows",
) -> Tensor:
    """KL(teacher || aligned student) between the attention of all layers at once; a query's loss sums over heads.

    Align-to-Distill, Jin et al. 2024, https://arxiv.org/abs/2403.01479, which takes `reduction="sum"` and multiplies
    it by 0.9 each epoch.

    By default the aligner mixes logarithms of attention, the softmax runs over the keys of each query, and the target
    is the teacher's attention itself. `form="map"` is the published code: the aligner mixes probabilities, and one
    softmax over all queries and keys of a map is taken of them, and of the teacher's probabilities too.

    Args:
        student: probabilities, heads of all layers in one axis, (batch, student_heads, queries, keys).
        teacher: the same, (batch, teacher_heads, queries, keys).
        aligner: for these numbers of heads; trained with the student.
        mask: see the module.
        key_mask: see the module.
        reduction: see `contract.reduce_rows`.
        num_items: divisor of a mean.
        form: "rows" or "map".
    """
    expected = (aligner.mix.in_channels, aligner.mix.out_channels)
    if student.ndim == teacher.ndim == 4 and (student.shape[1], teacher.shape[1]) != expected:
        raise ValueError(
            f"student and teacher have {student.shape[1]} and {teacher.shape[1]} heads in all, the aligner is for "
            f"{expected[0]} and {expected[1]}"
        )
    if form == "rows":
        student, teacher, keys, mask = _scored_queries(student, teacher, mask, key_mask)
        lowest = min([0.0, *(maps.min().item() for maps in (student, teacher) if maps.numel())])
        if lowest < 0:
            raise ValueError(f"attention must be probabilities, got {lowest:g}; pass scores.softmax(dim=-1)")
        allowed = (keys & (teacher.amax(dim=1) > 0))[:, None]
        aligned = aligner(student.clamp(min=FLOOR).log())
        log_q = aligned.masked_fill(~allowed, NEVER).log_softmax(dim=-1)
        loss = (torch.xlogy(teacher, teacher) - teacher * log_q).sum(dim=(1, 2))
        return reduce_rows(loss, mask, reduction, num_items)
    if form != "map":
        raise ValueError(f"form must be rows or map, got {form!r}")
    mask, key_mask = _attention_masks(student, teacher, mask, key_mask)
    real = (mask[:, :, None] & key_mask[:, None]).flatten(1)[:, None]
    student, teacher = (torch.where(real, as_float(maps).flatten(2), 0.0) for maps in (student, teacher.detach()))
    log_q = aligner(student).masked_fill(~real, NEVER).log_softmax(dim=-1)
    log_p = teacher.to(student.dtype).masked_fill(~real, NEVER).log_softmax(dim=-1)
    loss = (log_p.exp() * (log_p - log_q)).sum(dim=1).unflatten(-1, (mask.shape[1], key_mask.shape[1])).sum(dim=-1)
    return reduce_rows(loss[mask], mask, reduction, num_items)


def _attention_masks(
    student: Tensor, teacher: Tensor, mask: Tensor | None, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Masks of queries and of keys, after all checks."""
    if student.ndim != 4 or teacher.ndim != 4 or student[:, 0].shape != teacher[:, 0].shape:
        raise ValueError(
            f"student attention {tuple(student.shape)} and teacher attention {tuple(teacher.shape)} must be (batch, "
            "heads, queries, keys) over the same queries and keys; give both models the same inputs"
        )
    queries, keys = student.shape[2:]
    if key_mask is None and mask is not None:
        if queries != keys:
            raise ValueError(
                f"attention {tuple(student.shape)} has {queries} queries and {keys} keys, so the mask of queries does "
                "not serve for keys; pass key_mask, (batch, keys)"
            )
        key_mask = mask
    key_mask = position_mask(key_mask, student[:, 0].transpose(1, 2), "key_mask")
    return position_mask(mask, student[:, 0]), key_mask


def _scored_queries(
    student: Tensor, teacher: Tensor, mask: Tensor | None, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maps of the scored queries, (n, heads, keys), 0 at padded keys; their real keys, (n, keys); and the mask."""
    mask, key_mask = _attention_masks(student, teacher, mask, key_mask)
    keys = key_mask[:, None].expand(-1, mask.shape[1], -1)[mask]
    student = as_float(student).transpose(1, 2)[mask]
    teacher = teacher.detach().to(student.dtype).transpose(1, 2)[mask]
    real = keys[:, None]
    return torch.where(real, student, 0.0), torch.where(real, teacher, 0.0), keys, mask


def _check_heads(student: Tensor, teacher: Tensor, way_out: str) -> None:
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"the student has {student.shape[1]} heads, the teacher {teacher.shape[1]}; {way_out}, or learn which "
            "belong together with AttentionAligner"
        )


def _allowed(student: Tensor, teacher: Tensor, keys: Tensor) -> Tensor:
    """Real keys that neither model rules out, (n, heads, keys)."""
    return keys[:, None] & ~((student <= RULED_OUT) | (teacher <= RULED_OUT))


def _log(probabilities: Tensor) -> Tensor:
    """Logarithm, ruled out where the probability is 0; its gradient is 0 there."""
    nothing = probabilities <= 0
    return torch.where(nothing, 1.0, probabilities).log().masked_fill(nothing, NEVER)


def _self_scores(vectors: Tensor, mask: Tensor | None, num_heads: int) -> Tensor:
    """Scaled products of an utterance's vectors with each other, (batch, heads, frames, frames)."""
    if vectors.ndim != 3 or num_heads < 1 or vectors.shape[-1] % num_heads:
        raise ValueError(
            f"vectors are {tuple(vectors.shape)}; relations need (batch, frames, dim) with a dim that num_heads="
            f"{num_heads} divides"
        )
    real = position_mask(mask, vectors)[..., None]
    heads = torch.where(real, as_float(vectors), 0.0).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    return inner_products(heads, heads) / math.sqrt(heads.shape[-1])
