"""Losses between embeddings: one vector of the student against the teacher's, against others', or against its class's.

All take `(student, teacher, mask=None, *, reduction="token_mean", num_items=None)`:

- student, teacher: (..., dim), for one (batch, dim) pooled states. The teacher gets no gradient. Where widths differ,
  map the student's first: see `hidden.hidden_projection`.
- mask: True on the vectors that count, (...), bool; None takes all.
- reduction, num_items: see `contract.reduce_rows`. Losses that contrast a vector with the others of its batch see fewer
  in a part of a batch, so there parts do not add up to the whole.

They raise ValueError, with the values, on shapes, widths, masks or arguments that do not fit. Everything is computed in
float32, also under autocast; float64 stays. The cosine distance of DistilBERT is `hidden.hidden_cosine`.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechkd.losses.contract import (
    IGNORE_INDEX,
    Number,
    Reduction,
    as_float,
    check_fraction,
    log_mix,
    reduce_rows,
)
from speechkd.losses.hidden import inner_products, position_mask, scored_vectors, unit_vectors

Critic = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def pkd(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    divide_by_dim: bool = False,
) -> Tensor:
    """Squared distance of the normalised vectors, 0 to 4; twice the cosine distance.

    Patient KD, Sun et al. 2019, https://arxiv.org/abs/1908.09355: [CLS] states of every student layer but the last,
    against those of the "skip" or the "last" `layers.layer_map`, weight 10 to 1,000, summed over layers as in
    (batch, layers, dim) with `num_items` the batch. TextBrewer takes the mean over the width: `divide_by_dim=True`.
    """
    student, teacher, mask = scored_vectors(student, teacher, mask)
    loss = (unit_vectors(student) - unit_vectors(teacher)).square().sum(dim=-1)
    return reduce_rows(loss / student.shape[-1] if divide_by_dim else loss, mask, reduction, num_items)


class TeacherQueue(nn.Module):
    """The teacher's latest vectors, the oldest going first, as more wrong answers for `info_nce`.

    Its state goes into checkpoints with those of the module that holds it.

    Args:
        size: vectors that it holds.
        dim: their width.
    """

    stored: Tensor
    num_pushed: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"a queue holds 1 vector or more, got size={size}; without one, pass queue=None")
        self.register_buffer("stored", torch.zeros(size, dim))
        self.register_buffer("num_pushed", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, teacher: Tensor, mask: Tensor | None = None) -> None:
        """Add the teacher's vectors, (..., dim), of the batch just seen: after its loss, or they count twice.

        Raises:
            ValueError: their width is another, or the mask does not fit.
        """
        size, dim = self.stored.shape
        if teacher.shape[-1] != dim:
            raise ValueError(f"vectors {tuple(teacher.shape)} do not fit a queue of width {dim}")
        vectors = teacher[position_mask(mask, teacher)].to(self.stored)
        slots = (torch.arange(len(vectors), device=self.stored.device) + self.num_pushed) % size
        self.stored[slots[-size:]] = vectors[-size:]
        self.num_pushed += len(vectors)

    def vectors(self) -> Tensor:
        """Those that it holds, (n, dim), in no order."""
        return self.stored[: int(self.num_pushed)]


def info_nce(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    temperature: float = 0.05,
    queue: Tensor | None = None,
) -> Tensor:
    """Cross entropy of finding the teacher's vector of the same item among those of all, by cosine.

    CKD of DistilCSE, Gao et al. 2021, https://arxiv.org/abs/2112.05638. The log of the number of candidates minus this
    is a lower bound of the information that the student's vector has on the teacher's.

    Args:
        student: (..., dim).
        teacher: same shape.
        mask: True on the vectors that count; the others are no candidates either.
        reduction: see `contract.reduce_rows`.
        num_items: divisor of a mean.
        temperature: divides the cosines.
        queue: more vectors of the teacher, (n, dim), for one `TeacherQueue.vectors()`.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    student, teacher, mask = scored_vectors(student, teacher, mask)
    candidates = teacher
    if queue is not None:
        if queue.ndim != 2 or queue.shape[-1] != teacher.shape[-1]:
            raise ValueError(f"queue is {tuple(queue.shape)}, vectors of width {teacher.shape[-1]} need (n, width)")
        candidates = torch.cat([teacher, queue.detach().to(teacher)])
    scores = inner_products(unit_vectors(student), unit_vectors(candidates)) / temperature
    target = torch.arange(len(student), device=student.device)
    return reduce_rows(F.cross_entropy(scores, target, reduction="none"), mask, reduction, num_items)


class PairCritic(nn.Module):
    """Scores each pair of a student's and a teacher's vector, and estimates a baseline; see `mutual_information`.

    Args:
        student_dim: width of the student's vectors.
        teacher_dim: width of the teacher's.
        hidden: width in which they are compared.
    """

    def __init__(self, student_dim: int, teacher_dim: int, hidden: int = 128) -> None:
        super().__init__()
        self.student_map = nn.Linear(student_dim, hidden)
        self.teacher_map = nn.Linear(teacher_dim, hidden)
        self.baseline = nn.Sequential(nn.Linear(teacher_dim, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Scores f(x_i, y_j), (n, n), and the log-baseline log q(y_j), (n,), of (n, dim) vectors x and y."""
        dtype = self.student_map.weight.dtype
        ours, theirs = self.student_map(student.to(dtype)), self.teacher_map(teacher.to(dtype))
        scores = inner_products(ours, theirs) / math.sqrt(ours.shape[-1])
        return scores, self.baseline(teacher.to(dtype))[:, 0]


def mutual_information(
    student: Tensor,
    teacher: Tensor,
    critic: Critic,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    alpha: float = 0.5,
) -> Tensor:
    """Minus a lower bound, in nats, of the information that student and teacher share; trains the critic too.

    MI-alpha, He et al. 2021, *Distiller*, https://arxiv.org/abs/2109.11105, after Poole et al. 2019,
    https://arxiv.org/abs/1905.06922:

        1 + mean_i(f(x_i, y_i) - log D_i) - mean_(i != j)(exp f(x_i, y_j) / D'_j),  D = alpha m + (1 - alpha) q

    m_j is the mean of exp f(x_i, y_j), over all i in D and over those that do not belong to y_j in D', so that alpha 1
    is InfoNCE, at most the log of the batch, and alpha 0 the bound of Nguyen, Wainwright and Jordan: no limit, but a
    variance that grows with the information. Tune it. A vector alone shares nothing: 0.

    Args:
        student: (..., student_dim).
        teacher: (..., teacher_dim).
        critic: gives f and log q, for one `PairCritic`.
        mask: True on the vectors that count.
        reduction: see `contract.reduce_rows`.
        num_items: divisor of a mean.
        alpha: 0 to 1.
    """
    check_fraction("alpha", alpha)
    student, teacher, mask = scored_vectors(student, teacher, mask, same_width=False)
    with torch.autocast(student.device.type, enabled=False):
        scores, log_baseline = (as_float(part) for part in critic(student, teacher))
    if len(scores) < 2:
        return reduce_rows(0 * (scores.sum(dim=0) + log_baseline), mask, reduction, num_items)
    num_others = len(scores) - 1
    itself = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    others = scores.masked_fill(itself, -torch.inf).logsumexp(dim=0) - math.log(num_others)
    everyone = scores.logsumexp(dim=0) - math.log(len(scores))
    joint = scores.diagonal() - log_mix(alpha, everyone, log_baseline)
    marginal = (others - log_mix(alpha, others, log_baseline)).exp()
    return reduce_rows(marginal - joint - 1, mask, reduction, num_items)


class ClassMeans(nn.Module):
    """Mean of the teacher's vectors of each class, gathered over the training data before `norm_direction` is used.

    Args:
        num_classes: labels are 0 to this, excluded.
        dim: width of the vectors.
    """

    sums: Tensor
    counts: Tensor

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(num_classes, dim, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))

    @torch.no_grad()
    def add(self, teacher: Tensor, labels: Tensor) -> None:
        """Count a batch of vectors, (..., dim), with labels (...), int64; -100 is left out.

        Raises:
            ValueError: shapes, width or labels do not fit.
        """
        num_classes, dim = self.sums.shape
        if teacher.shape != (*labels.shape, dim):
            raise ValueError(f"vectors {tuple(teacher.shape)} and labels {tuple(labels.shape)} do not fit width {dim}")
        labeled = labels != IGNORE_INDEX
        _check_classes(labels[labeled], num_classes)
        self.sums.index_add_(0, labels[labeled], teacher[labeled].to(self.sums))
        self.counts += labels[labeled].bincount(minlength=num_classes)

    def forward(self, labels: Tensor) -> Tensor:
        """Mean of each label's class, (..., dim), float32; 0 for -100 and for classes that were never seen."""
        labeled = labels != IGNORE_INDEX
        _check_classes(labels[labeled], len(self.counts))
        means = self.sums / self.counts.clamp(min=1)[:, None]
        return (means[labels.where(labeled, 0)] * labeled[..., None]).float()


def _check_classes(labels: Tensor, num_classes: int) -> None:
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        raise ValueError(f"label {labels[wrong][0].item()} is not one of {num_classes} classes, 0 to {num_classes - 1}")


def norm_direction(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    centers: Tensor,
) -> Tensor:
    """1 - <s, e> / max(|s|, |t|), e the direction of the class centre: draws s along e, up to the teacher's norm.

    ND, Wang et al. 2023, https://arxiv.org/abs/2305.17007, weight about 1. 0 only where s lies along e and is not
    shorter than t; where it is longer, the gradient also flows through its norm, and only its direction counts.

    Args:
        student: (..., dim).
        teacher: same shape.
        mask: True on the vectors that count.
        reduction: see `contract.reduce_rows`.
        num_items: divisor of a mean.
        centers: the teacher's mean over the training data, of the class of each vector, (..., dim), as
            `ClassMeans` gives it, or (dim,) for all; a class is an utterance's label or a token.
    """
    if centers.shape not in (student.shape, student.shape[-1:]):
        raise ValueError(
            f"centers are {tuple(centers.shape)}, vectors {tuple(student.shape)} need the same shape or "
            f"({student.shape[-1]},); index the class means with the labels"
        )
    centers = centers.expand_as(student)
    student, teacher, mask = scored_vectors(student, teacher, mask)
    along = (student * unit_vectors(centers.detach()[mask].to(student.dtype))).sum(dim=-1)
    longest = torch.maximum(torch.linalg.vector_norm(student, dim=-1), torch.linalg.vector_norm(teacher, dim=-1))
    return reduce_rows(1 - along / torch.where(longest > 0, longest, 1.0), mask, reduction, num_items)
