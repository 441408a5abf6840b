"""Losses between hidden states, position by position, and the checks that all losses on vectors share.

All take `(student, teacher, mask=None, *, reduction="token_mean", num_items=None)`:

- student, teacher: (..., dim), for one (batch, frames, dim) or, for several layers, (batch, layers, frames, dim). The
  teacher gets no gradient. Where widths differ, map the student's first: see `hidden_projection`.
- mask: True on real frames, (...) or, for several layers, (batch, frames), bool; None takes all.
- reduction, num_items: see `contract.reduce_rows`. With several layers every pair of layer and frame counts as one.

They raise ValueError, with the values, on shapes, widths, masks or arguments that do not fit. Everything but
learned maps is computed in float32, also under autocast; float64 stays.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechkd.losses.contract import Number, Reduction, as_float, check_mask, reduce_rows

CosineForm = Literal["one_minus", "negative", "log_sigmoid"]


def position_mask(mask: Tensor | None, states: Tensor, name: str = "mask") -> Tensor:
    """The mask of the positions of (..., dim) states: (...), bool, all True where it is None.

    A mask (batch, frames) holds for every layer of (batch, layers, frames, dim).

    Raises:
        ValueError: it has another shape or dtype, or the batch is empty.
    """
    shape = states.shape[:-1]
    if 0 in shape:
        raise ValueError(f"the batch is empty: its vectors are {tuple(states.shape)}; leave such a batch out")
    if mask is not None:
        per_layer = len(shape) == 3 and mask.shape == (shape[0], shape[2])
        if mask.shape != shape and not per_layer:
            expected = f"{tuple(shape)} or {(shape[0], shape[2])}" if len(shape) == 3 else f"{tuple(shape)}"
            raise ValueError(f"{name} is {tuple(mask.shape)}, vectors {tuple(states.shape)} need {expected}")
        if per_layer:
            mask = mask[:, None].expand(shape)
    return check_mask(mask, states)


def scored_vectors(
    student: Tensor, teacher: Tensor, mask: Tensor | None, *, same_width: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The vectors of the scored positions, after all checks.

    Args:
        student: (..., student_dim), of any floating dtype.
        teacher: (..., teacher_dim).
        mask: see `position_mask`.
        same_width: whether the loss needs equal widths.

    Returns:
        Student and teacher vectors, (positions, dim), float32 or, for a float64 student, float64; and the mask.

    Raises:
        ValueError: shapes, widths or mask do not fit, or there is no position at all.
    """
    if student.ndim < 2 or student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape or are not (..., dim); "
            "give both models the same audio and choose as many layers of one as of the other"
        )
    ours, theirs = student.shape[-1], teacher.shape[-1]
    if same_width and ours != theirs:
        raise ValueError(
            f"the student's vectors have {ours} values, the teacher's {theirs}; map the student's with "
            f"speechkd.losses.hidden.hidden_projection({ours}, {theirs}), or take a loss of speechkd.losses.relation"
        )
    mask = position_mask(mask, student)
    student = as_float(student)
    teacher = teacher.detach().to(student.dtype)
    if mask.all():
        return student.flatten(0, -2), teacher.flatten(0, -2), mask
    return student[mask], teacher[mask], mask


def unit_vectors(vectors: Tensor) -> Tensor:
    """Each vector over its norm, (..., dim); a zero vector stays zero, and its gradient finite."""
    squares = vectors.square().sum(dim=-1, keepdim=True)
    return vectors / torch.where(squares > 0, squares, 1.0).sqrt()


def inner_products(left: Tensor, right: Tensor) -> Tensor:
    """All products of (..., n, dim) with (..., m, dim) vectors, (..., n, m); at their own precision under autocast."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right.transpose(-1, -2)


def hidden_l1(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
) -> Tensor:
    """Mean over the width of the absolute difference."""
    student, teacher, mask = scored_vectors(student, teacher, mask)
    return reduce_rows((student - teacher).abs().mean(dim=-1), mask, reduction, num_items)


def hidden_mse(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
) -> Tensor:
    """Mean over the width of the squared difference.

    TinyBERT, Jiao et al. 2019, https://arxiv.org/abs/1909.10351, takes it between `hidden_projection`s of the student
    and the teacher's layers of the uniform `layers.layer_map`, and between the embeddings.
    """
    student, teacher, mask = scored_vectors(student, teacher, mask)
    return reduce_rows((student - teacher).square().mean(dim=-1), mask, reduction, num_items)


def hidden_cosine(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    form: CosineForm = "one_minus",
) -> Tensor:
    """Cosine distance, 0 for parallel and 2 for opposite vectors; blind to their lengths.

    DistilBERT, Sanh et al. 2019, https://arxiv.org/abs/1910.01108, takes it between last layers, with weight 1 beside
    5 times the KD loss at temperature 2 and 2 times the masked-language loss.

    Args:
        student: (..., dim).
        teacher: same shape.
        mask: True on real positions.
        reduction: see `contract.reduce_rows`.
        num_items: divisor of a mean.
        form: "one_minus" is 1 - cos; "negative" -cos, as in DPHuBERT's code; "log_sigmoid" -log sigmoid(cos), as in
            DistilHuBERT's. The last two are not 0 for equal vectors. A zero vector has cosine 0.
    """
    student, teacher, mask = scored_vectors(student, teacher, mask)
    return reduce_rows(_cosine_rows(student, teacher, form), mask, reduction, num_items)


def hidden_l1_cosine(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    form: CosineForm = "log_sigmoid",
) -> tuple[Tensor, Tensor]:
    """L1 and cosine distance between student and teacher hidden states, unweighted.

    DistilHuBERT, Chang et al. 2022, https://arxiv.org/abs/2110.01900, weighs both by 1; its code also averages over
    padding. DPHuBERT, Peng et al. 2023, https://arxiv.org/abs/2305.17651, has `form="negative"`.

    Args:
        student: predictions, (batch, layers, frames, dim).
        teacher: targets, same shape.
        mask: True on real frames, (batch, frames), bool.
        reduction: "sum" adds over layers and frames, for recipes that divide by the frames of the whole batch.
        num_items: divisor of a mean; frames * layers where the default divides by its own.
        form: see `hidden_cosine`.

    Returns:
        Of mean_dim |s - t| and of the cosine's form; each 0-dim, or (batch, layers, frames) with "none".
    """
    student, teacher, mask = scored_vectors(student, teacher, mask)
    l1, cosine = (student - teacher).abs().mean(dim=-1), _cosine_rows(student, teacher, form)
    return reduce_rows(l1, mask, reduction, num_items), reduce_rows(cosine, mask, reduction, num_items)


def _cosine_rows(student: Tensor, teacher: Tensor, form: CosineForm) -> Tensor:
    cosine = (unit_vectors(student) * unit_vectors(teacher)).sum(dim=-1)
    if form == "one_minus":
        return 1 - cosine
    if form == "negative":
        return -cosine
    if form == "log_sigmoid":
        return -F.logsigmoid(cosine)
    raise ValueError(f"form must be one_minus, negative or log_sigmoid, got {form!r}")


def hidden_projection(student_dim: int, teacher_dim: int, *, bias: bool = False) -> nn.Linear:
    """A linear map from the student's width to the teacher's, trained with the student and then thrown away.

    The identity where the widths agree, as in DPHuBERT's code, which also has a bias; otherwise orthogonal. A padded
    frame that holds NaN spoils its gradient: give it `states[mask]`.
    """
    projection = nn.Linear(student_dim, teacher_dim, bias=bias)
    if student_dim == teacher_dim:
        nn.init.eye_(projection.weight)
    else:
        nn.init.orthogonal_(projection.weight)
    if bias:
        nn.init.zeros_(projection.bias)
    return projection


class LayerFilters(nn.Module):
    """One linear filter per layer, which keeps what the task needs; see `ted_mse`.

    Args:
        num_layers: layers that are compared.
        dim: width of the model.
        filter_dim: width of the filtered states, the same for student and teacher.
    """

    def __init__(self, num_layers: int, dim: int, filter_dim: int = 768) -> None:
        super().__init__()
        self.filters = nn.ModuleList(nn.Linear(dim, filter_dim) for _ in range(num_layers))

    def forward(self, states: Tensor) -> Tensor:
        """Filtered states, (batch, layers, frames, filter_dim), of (batch, layers, frames, dim).

        Raises:
            ValueError: the layers are not as many as the filters.
        """
        if states.ndim != 4 or states.shape[1] != len(self.filters):
            raise ValueError(
                f"states {tuple(states.shape)} do not fit {len(self.filters)} filters; give them as (batch, "
                f"{len(self.filters)}, frames, dim), for one from speechkd.losses.layers.stack_layers"
            )
        layers = states.to(next(self.parameters()).dtype).unbind(dim=1)
        return torch.stack([keep(layer) for keep, layer in zip(self.filters, layers, strict=True)], dim=1)


def ted_mse(
    student: Tensor,
    teacher: Tensor,
    student_filters: LayerFilters,
    teacher_filters: LayerFilters,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
) -> Tensor:
    """Squared difference of filtered states.

    TED, Liang et al. 2022, *Less is More: Task-aware Layer-wise Distillation*, https://arxiv.org/abs/2210.01351. Stage
    one freezes each model and trains its filters, each under its own task head, on the task. Stage two is this loss: it
    trains the student and its filters, the teacher's stay. There it stands beside the task's loss and 5 to 20 times the
    KL, with weight 20 to 7,500 by task.

    Args:
        student: (batch, layers, frames, student_dim), layers taken at an even interval.
        teacher: (batch, layers, frames, teacher_dim).
        student_filters: the student's, kept from stage one.
        teacher_filters: the teacher's; they get no gradient.
        mask: True on real frames, (batch, frames), bool.
        reduction: see `contract.reduce_rows`.
        num_items: divisor of a mean.
    """
    real = position_mask(mask, student)[..., None]
    filtered = student_filters(torch.where(real, student, 0.0))
    with torch.no_grad():
        target = teacher_filters(torch.where(position_mask(mask, teacher)[..., None], teacher, 0.0))
    return hidden_mse(filtered, target, mask, reduction=reduction, num_items=num_items)
