"""Which teacher layer a student layer learns from: fixed maps, a learned mixture, and LEAD's weighted pairs.

Layers are numbered as in `hidden_states`: 0 is the embeddings, 1 the first layer's output.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechkd.losses.contract import (
    Number,
    Reduction,
    as_float,
    check_labels,
    kl_rows,
    log_probs,
    reduce_rows,
    scored_rows,
    squared,
)
from speechkd.losses.hidden import position_mask

LayerMap = Literal["uniform", "skip", "first", "middle", "last"]


def layer_map(num_student_layers: int, num_teacher_layers: int, kind: LayerMap = "uniform") -> list[int]:
    """Teacher layers of the student's layers 1, 2, ..., as indices into `hidden_states`.

    Equal depths give the identity. For a Whisper, map encoder and decoder apart; which layers Distil-Whisper copies
    says `speechkd.models.whisper.choose_layers`.

    Args:
        num_student_layers: depth of the student, 1 to the teacher's.
        num_teacher_layers: depth of the teacher.
        kind: "uniform" is layer round(j * teacher / student), halves to the even one, as in TinyBERT, Jiao et al. 2019,
            https://arxiv.org/abs/1909.10351, which also pairs the embeddings; "skip" every k-th, k = teacher //
            student, and "last" the last ones, as in Patient KD, Sun et al. 2019, https://arxiv.org/abs/1908.09355,
            there for all but the last layer (5 of 12 layers give its 2, 4, 6, 8, 10); "first" and "middle" are runs.

    Raises:
        ValueError: the student is deeper than the teacher or has no layer, or the kind is unknown.
    """
    if not 1 <= num_student_layers <= num_teacher_layers:
        raise ValueError(
            f"a student of {num_student_layers} layers cannot be mapped to different layers of a teacher of "
            f"{num_teacher_layers}; choose 1 to {num_teacher_layers}"
        )
    spare = num_teacher_layers - num_student_layers
    layers = range(1, num_student_layers + 1)
    if kind == "uniform":
        return [round(layer * num_teacher_layers / num_student_layers) for layer in layers]
    if kind == "skip":
        return [layer * (num_teacher_layers // num_student_layers) for layer in layers]
    if kind == "first":
        return list(layers)
    if kind == "middle":
        return [layer + spare // 2 for layer in layers]
    if kind == "last":
        return [layer + spare for layer in layers]
    raise ValueError(f"kind must be uniform, skip, first, middle or last, got {kind!r}")


def stack_layers(hidden_states: Sequence[Tensor], layers: Iterable[int]) -> Tensor:
    """The chosen layers of a model's `hidden_states`, each (batch, frames, dim), as (batch, layers, frames, dim).

    Raises:
        ValueError: there is no such layer.
    """
    layers = list(layers)
    wrong = [layer for layer in layers if not 0 <= layer < len(hidden_states)]
    if wrong or not layers:
        raise ValueError(
            f"layers {layers} must be among 0 (embeddings) to {len(hidden_states) - 1} (last) of the "
            f"{len(hidden_states)} hidden states"
        )
    return torch.stack([hidden_states[layer] for layer in layers], dim=1)


class LearnedLayerMap(nn.Module):
    """Mixes the teacher's layers for each layer of the student, with one weight per pair.

    The weights of a student layer are a softmax, at first even but for more on the layer of the uniform map. Trained by
    the loss that it serves, a map drifts to layers that are easy to copy: watch `weights`.

    Args:
        num_student_layers: rows.
        num_teacher_layers: columns.
        uniform_bonus: what the logit of the uniform map's layer has more than the others at the start.
    """

    def __init__(self, num_student_layers: int, num_teacher_layers: int, uniform_bonus: float = 1.0) -> None:
        super().__init__()
        columns = torch.tensor(layer_map(num_student_layers, num_teacher_layers)) - 1
        self.logits = nn.Parameter(uniform_bonus * F.one_hot(columns, num_teacher_layers).float())

    def weights(self) -> Tensor:
        """(student_layers, teacher_layers), each row adds up to 1."""
        return self.logits.softmax(dim=-1)

    def forward(self, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Targets, (batch, student_layers, frames, dim), whose gradient reaches the weights alone.

        Args:
            teacher: layers 1 to the last, (batch, teacher_layers, frames, dim).
            mask: True on real frames, (batch, frames), bool; the targets of others are 0.

        Raises:
            ValueError: the teacher has another number of layers, or the mask does not fit.
        """
        num_layers = self.logits.shape[1]
        if teacher.ndim != 4 or teacher.shape[1] != num_layers:
            raise ValueError(
                f"teacher states are {tuple(teacher.shape)}, this map needs (batch, {num_layers}, frames, dim); take "
                f"stack_layers(hidden_states, range(1, {num_layers + 1}))"
            )
        real = position_mask(mask, teacher)
        states = torch.where(real[..., None], as_float(teacher.detach()), 0.0)
        with torch.autocast(states.device.type, enabled=False):
            return torch.einsum("st,btfd->bsfd", self.weights().to(states.dtype), states)


def learned_map_mse(
    student: Tensor,
    teacher: Tensor,
    learned_map: LearnedLayerMap,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
) -> Tensor:
    """Mean squared difference to a learned mixture of the teacher's layers; trains the student and the mixture.

    `hidden_mse` would not do: it holds its targets fixed.

    Args:
        student: (batch, student_layers, frames, dim), in the teacher's width.
        teacher: layers 1 to the last, (batch, teacher_layers, frames, dim); gets no gradient.
        learned_map: for these numbers of layers.
        mask: True on real frames, (batch, frames), bool.
        reduction: see `contract.reduce_rows`; every pair of student layer and frame counts as one.
        num_items: divisor of a mean.

    Raises:
        ValueError: shapes or mask do not fit.
    """
    target = learned_map(teacher, mask)
    if student.shape != target.shape:
        raise ValueError(
            f"student states are {tuple(student.shape)}, the mixtures {tuple(target.shape)}; map the student's width "
            "with speechkd.losses.hidden.hidden_projection, and give as many layers as the map has"
        )
    real = position_mask(mask, student)
    student, target = as_float(student)[real], target[real]
    return reduce_rows((student - target.to(student.dtype)).square().mean(dim=-1), real, reduction, num_items)


def lead_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    scale_t2: bool = True,
    labels: Tensor | None = None,
    pairs: Sequence[tuple[int, int]] | None = None,
    layer_temperature: float = 1.0,
) -> Tensor:
    """Forward KL between the label distributions of layers, weighted towards the pairs that are worth it.

    LEAD, Sun et al. 2022, https://arxiv.org/abs/2212.05225, where a layer's distribution is over the passages of a
    query; a classifier or CTC head on each layer does as well. Weights are a softmax over the pairs, without gradient,
    of minus a loss over `layer_temperature`; a large one gives the plain mean. That loss is the pair's own mean KL, or,
    with `labels`, the teacher layer's cross entropy, as in the published code, which draws as many layers of each model
    and pairs them in order: `pairs`. Weights are those of the batch, so parts of a batch do not add up to the whole.

    Args:
        student_logits: (batch, student_layers, classes), or (batch, student_layers, frames, classes).
        teacher_logits: the same with teacher_layers.
        mask: True on what is scored, (batch,) or (batch, frames), bool.
        temperature: divides both logits.
        reduction: see `contract.reduce_rows`.
        num_items: divisor of a mean.
        scale_t2: whether the loss is multiplied by the temperature's square.
        labels: (batch,) or (batch, frames), int64, -100 where nothing is scored.
        pairs: (student, teacher) positions in the stacks; None takes all.
        layer_temperature: of the weights.

    Raises:
        ValueError: shapes, mask, labels, pairs or temperatures do not fit.
    """
    if student_logits.ndim < 3 or student_logits.ndim != teacher_logits.ndim:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} must both "
            "be (batch, layers, classes) or (batch, layers, frames, classes)"
        )
    if not layer_temperature > 0:
        raise ValueError(f"layer_temperature must be positive, got {layer_temperature}")
    num_ours, num_theirs = student_logits.shape[1], teacher_logits.shape[1]
    if pairs is None:
        pairs = [(ours, theirs) for ours in range(num_ours) for theirs in range(num_theirs)]
    wrong = [pair for pair in pairs if not (0 <= pair[0] < num_ours and 0 <= pair[1] < num_theirs)]
    if wrong or not pairs:
        raise ValueError(
            f"pairs {list(pairs)} must name some of {num_ours} student and {num_theirs} teacher layers, from 0"
        )
    if labels is not None:
        mask = check_labels(labels, student_logits[:, 0], mask)
    losses, importance = [], []
    for ours, theirs in pairs:
        student, teacher, scored = scored_rows(student_logits[:, ours], teacher_logits[:, theirs], mask, temperature)
        log_q, log_p = log_probs(student, teacher, temperature)
        losses.append(kl_rows(log_p, log_q))
        importance.append(losses[-1] if labels is None else F.cross_entropy(teacher, labels[scored], reduction="none"))
    badness = torch.stack(importance).detach().sum(dim=-1) / max(losses[0].numel(), 1)
    weights = (-badness / layer_temperature).softmax(dim=0)
    loss = (weights[:, None] * torch.stack(losses)).sum(dim=0)
    return reduce_rows(loss * squared(temperature, scale_t2), scored, reduction, num_items)
