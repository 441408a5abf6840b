"""Losses that train a compact speech encoder on layers of its teacher: DistilHuBERT's, DPHuBERT's and CoLLD's.

Arguments, masks, errors and reductions are those of `hidden`: student and teacher are (batch, layers, frames, dim),
everything is computed in float32, also under autocast, and every pair of layer and frame counts as one. Here too are
the heads under which the student is trained, and the spans that CoLLD hides from it.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechkd.losses.contract import Number, Reduction, as_float, check_temperature, reduce_rows
from speechkd.losses.hidden import (
    CosineForm,
    hidden_cosine,
    hidden_l1_cosine,
    hidden_mse,
    hidden_projection,
    inner_products,
    position_mask,
    scored_vectors,
    unit_vectors,
)

Distance = Literal["l1", "l2"]
SAME_VECTOR = 1 - 1e-6  # cosine above which two targets are one: a frame of silence is no wrong answer for another


def normalize_frames(states: Tensor) -> Tensor:
    """Each frame's vector at mean 0 and variance 1 over its width, (..., dim); a layer norm without parameters.

    For teachers whose states grow large, as data2vec's, on which students collapse in half precision.
    """
    states = as_float(states)
    with torch.autocast(states.device.type, enabled=False):
        return F.layer_norm(states, states.shape[-1:])


def distilhubert_terms(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    distance: Distance = "l1",
    cosine_weight: float = 1.0,
    form: CosineForm = "log_sigmoid",
    normalize_targets: bool = False,
) -> tuple[Tensor, Tensor]:
    """The two terms of DistilHuBERT's loss, which is their sum: a distance and a weighted cosine.

    Chang et al. 2022, https://arxiv.org/abs/2110.01900, section 2.2, with distance "l1" and weight 1. DPHuBERT, Peng et
    al. 2023, https://arxiv.org/abs/2305.17651, has `form="negative"`. Equal vectors give 0 + 0.313262 and 0 - 1. The
    published code also averages over padding, which the mask leaves out here.

    Args:
        student: predictions, (batch, layers, frames, dim).
        teacher: targets, same shape.
        mask: True on real frames, (batch, frames), bool.
        reduction: "sum" adds over layers and frames.
        num_items: divisor of a mean; frames * layers where the default divides by its own.
        distance: mean over the width of the absolute or of the squared difference.
        cosine_weight: lambda, 0 or more.
        form: see `hidden.hidden_cosine`.
        normalize_targets: compare with `normalize_frames(teacher)`.

    Returns:
        Distance and weighted cosine; each 0-dim, or (batch, layers, frames) with "none".

    Raises:
        ValueError: shapes or mask do not fit, the distance is unknown, or the weight is negative.
    """
    if distance not in ("l1", "l2"):
        raise ValueError(f"distance must be l1 or l2, got {distance!r}")
    if not cosine_weight >= 0:
        raise ValueError(f"cosine_weight must be 0 or more, got {cosine_weight}; 0 removes the term")
    if normalize_targets:
        teacher = normalize_frames(teacher)
    if distance == "l1":
        first, cosine = hidden_l1_cosine(student, teacher, mask, reduction=reduction, num_items=num_items, form=form)
    else:
        first = hidden_mse(student, teacher, mask, reduction=reduction, num_items=num_items)
        cosine = hidden_cosine(student, teacher, mask, reduction=reduction, num_items=num_items, form=form)
    return first, cosine_weight * cosine


def contrastable(masked: Tensor) -> Tensor:
    """The masked frames that `masked_info_nce` counts: all but one that is alone in its utterance; (..., frames), bool.

    Args:
        masked: True on masked frames, (..., frames), bool.
    """
    return masked & (masked.sum(dim=-1, keepdim=True) > 1)


def masked_info_nce(
    student: Tensor,
    teacher: Tensor,
    masked: Tensor,
    *,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    num_negatives: int = 100,
    temperature: float = 0.1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Cross entropy of finding, by cosine, the teacher's state of a masked frame among those of others.

    CoLLD, Chang et al. 2024, https://arxiv.org/abs/2309.07707. The wrong answers are drawn for each frame and layer,
    each once, from the other masked frames of the same utterance. Those that equal the right one are left out; where
    there are no more than `num_negatives`, all are taken. A frame whose candidates all equal it adds 0 and counts. The
    default mean over frames and layers is the paper's mean over masked frames and then over layers.

    Args:
        student: projected states, (batch, layers, frames, dim) or (batch, frames, dim).
        teacher: states of the same clips without masks, same shape.
        masked: True on the frames that were hidden from the student, none of them padding, (batch, frames), bool.
        reduction: see `contract.reduce_rows`; frames that count are those of `contrastable`, in every layer.
        num_items: divisor of a mean.
        num_negatives: wrong answers for each frame.
        temperature: divides the cosines.
        generator: of the draw, on the CPU or the states' device; None is torch's own.

    Raises:
        ValueError: shapes or mask do not fit, or there are to be no negatives or no positive temperature.
    """
    check_temperature(temperature)
    if num_negatives < 1:
        raise ValueError(f"num_negatives={num_negatives} leaves nothing to tell apart; take 1 or more, 100 is usual")
    scored = contrastable(position_mask(masked, student, "masked"))
    ours, theirs, scored = scored_vectors(student, teacher, scored)
    if not len(ours):
        return reduce_rows(ours.sum(dim=-1), scored, reduction, num_items)
    counts = scored.sum(dim=-1).flatten()  # of each utterance and layer
    slots = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]
    ours, theirs = (_in_slots(unit_vectors(vectors), slots) for vectors in (ours, theirs))
    itself = torch.eye(slots.shape[1], dtype=torch.bool, device=slots.device)
    candidates = slots[:, None] & ~itself & ~_alike(theirs)
    answers = _draw(candidates, num_negatives, generator) | itself
    cosines = inner_products(ours, theirs) / temperature
    right = cosines.diagonal(dim1=1, dim2=2)
    loss = cosines.masked_fill(~answers, -torch.inf).logsumexp(dim=-1) - right
    return reduce_rows(loss[slots], scored, reduction, num_items)


def colld_layers(num_student_layers: int, num_teacher_layers: int) -> list[int]:
    """The teacher's layer of each student layer i of M: ceil(i L / M), from 1; the last has the last.

    Raises:
        ValueError: the student has no layer, or more than the teacher.
    """
    if not 1 <= num_student_layers <= num_teacher_layers:
        raise ValueError(
            f"a student of {num_student_layers} layers cannot be paired with a teacher of {num_teacher_layers}; "
            f"choose 1 to {num_teacher_layers}"
        )
    return [-(-layer * num_teacher_layers // num_student_layers) for layer in range(1, num_student_layers + 1)]


def span_mask(
    num_frames: Tensor,
    *,
    start_probability: float = 0.065,
    span: int = 10,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Frames to hide from the student, in spans that may overlap; about 49 % of a long clip.

    wav2vec 2.0, Baevski et al. 2020, https://arxiv.org/abs/2006.11477, section 3.1: `start_probability` of a clip's
    frames, drawn without replacement, and at least one, begin a span; the end of the clip cuts it short.

    Args:
        num_frames: valid frames of each clip, (batch,), int64, on the CPU.
        start_probability: above 0, up to 1.
        span: frames, 1 or more.
        generator: on the CPU; None is torch's own.

    Returns:
        True on frames to hide, (batch, longest), bool, on the CPU.

    Raises:
        ValueError: an argument is out of its range.
    """
    if not 0 < start_probability <= 1 or span < 1:
        raise ValueError(
            f"start_probability must be above 0 and at most 1 and span 1 or more, got {start_probability} and {span}"
        )
    drawn = torch.rand(len(num_frames), int(num_frames.max()) + 1, generator=generator)
    real = torch.arange(drawn.shape[1] - 1) < num_frames[:, None]
    num_starts = (start_probability * num_frames + drawn[:, 0]).long().clamp(min=1)  # rounded at random
    ranks = drawn[:, 1:].masked_fill(~real, 2.0).argsort(dim=1).argsort(dim=1)
    begun = F.pad((ranks < num_starts[:, None]) & real, (span, 0)).cumsum(dim=1)
    return (begun[:, span:] > begun[:, :-span]) & real


def _in_slots(vectors: Tensor, slots: Tensor) -> Tensor:
    """Rows (n, dim), in order, where slots (rows, width) are True, and 0 elsewhere: (rows, width, dim)."""
    return vectors.new_zeros(*slots.shape, vectors.shape[-1]).masked_scatter(slots[..., None], vectors)


def _alike(vectors: Tensor) -> Tensor:
    """Which of (rows, n, dim) unit vectors are the same, (rows, n, n), bool, also where a GPU multiplies in TF32."""
    products = inner_products(vectors, vectors)
    norms = products.diagonal(dim1=1, dim2=2).sqrt()
    return products > SAME_VECTOR * norms[:, :, None] * norms[:, None]


def _draw(candidates: Tensor, number: int, generator: torch.Generator | None) -> Tensor:
    """`number` of the True values of each row (..., width), uniformly, or all where there are fewer."""
    if candidates.shape[-1] - 1 <= number:  # no frame is its own candidate
        return candidates
    device = candidates.device if generator is None else generator.device
    keys = torch.rand(candidates.shape, generator=generator, device=device).to(candidates.device)
    best = keys.masked_fill(~candidates, -1.0).topk(number, dim=-1).indices
    return candidates & torch.zeros_like(candidates).scatter(-1, best, True)


class SplitLinear(nn.Module):
    """Linear maps side by side: map i takes part i of the input, y_i = x_i W_i + b_i.

    Args:
        num_splits: maps.
        in_dim: width of each part.
        out_dim: width of each result.
    """

    def __init__(self, num_splits: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        bound = in_dim**-0.5
        self.weight = nn.Parameter(torch.empty(num_splits, in_dim, out_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_splits, out_dim).uniform_(-bound, bound))

    def forward(self, parts: Tensor) -> Tensor:
        """(..., splits, in_dim) to (..., splits, out_dim)."""
        return torch.einsum("...ni,nio->...no", parts, self.weight) + self.bias


class PredictionHeads(nn.Module):
    """DistilHuBERT's heads: each a Linear, a GELU and a Linear on the student's last layer, and each for one target.

    Args:
        student_dim: width of the student.
        teacher_dim: width of the teacher.
        num_heads: target layers.
        inner_dim: width between the two maps; None is the student's.

    Raises:
        ValueError: there is no head.
    """

    def __init__(self, student_dim: int, teacher_dim: int, num_heads: int, inner_dim: int | None = None) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads={num_heads}: a student needs one head for each target layer, 1 or more")
        self.num_heads, inner_dim = num_heads, student_dim if inner_dim is None else inner_dim
        self.expand = nn.Linear(student_dim, num_heads * inner_dim)
        self.split = SplitLinear(num_heads, inner_dim, teacher_dim)

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """Predictions, (batch, heads, frames, teacher_dim), of the last of the states, (batch, frames, student_dim)."""
        parts = F.gelu(self.expand(states[-1])).unflatten(-1, (self.num_heads, -1))
        return self.split(parts).transpose(1, 2)


class LayerProjections(nn.Module):
    """CoLLD's heads: one linear map from each layer of the student to the teacher's width.

    Args:
        num_layers: of the student.
        student_dim: its width.
        teacher_dim: width of the teacher.
    """

    def __init__(self, num_layers: int, student_dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(hidden_projection(student_dim, teacher_dim, bias=True) for _ in range(num_layers))

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """Projected states, (batch, layers, frames, teacher_dim).

        Args:
            states: of the encoder's input and all its layers, each (batch, frames, student_dim).

        Raises:
            ValueError: the layers are not as many as the maps.
        """
        if len(states) != len(self.maps) + 1:
            raise ValueError(
                f"{len(states)} hidden states do not fit maps for {len(self.maps)} layers, which need "
                f"{len(self.maps) + 1}: the encoder's input and each layer's output"
            )
        return torch.stack([to_teacher(layer) for to_teacher, layer in zip(self.maps, states[1:], strict=True)], dim=1)
