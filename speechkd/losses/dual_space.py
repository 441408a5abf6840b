"""Dual-space distillation: each model's hidden states, projected, go through the other model's head.

DSKD, Zhang et al. 2024, https://arxiv.org/abs/2406.17328. The projections between the two spaces are learned with the
student and dropped when it is exported.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechkd.losses.contract import NEVER, Number, Reduction, as_float, check_labels, reduce_rows
from speechkd.losses.logits import forward_kl


class TokenStates(NamedTuple):
    """What DSKD reads of one model for one batch.

    Args:
        hidden: what the head reads, after the last layer and its norm, (batch, length, dim).
        logits: (batch, length, vocabulary), with logit i predicting label i.
        labels: (batch, length), int64, -100 on tokens that are not scored.
        head: weight of the output layer, (vocabulary, dim).
        input_ids: the tokens that were read; label i follows token i, (batch, length). For different tokenizers only.
        embeddings: weight of the input embedding, (vocabulary, dim). For different tokenizers only.
    """

    hidden: Tensor
    logits: Tensor
    labels: Tensor
    head: Tensor
    input_ids: Tensor | None = None
    embeddings: Tensor | None = None


class DualSpaceTerms(NamedTuple):
    """The three terms of DSKD, whose sum it weighs with 0.5 beside 0.5 of the student's cross entropy.

    Args:
        projection: cross entropy of the teacher's states in the student's space; trains the projections alone.
        student_space: divergence of the student's logits from those of these states; trains the student alone.
        teacher_space: KL(teacher || student) of the student's states in the teacher's space; trains both.
    """

    projection: Tensor
    student_space: Tensor
    teacher_space: Tensor


class DualSpaceKD(nn.Module):
    """DSKD of two models with one tokenizer.

    Args:
        student_dim: width of the student's hidden states.
        teacher_dim: width of the teacher's.
    """

    only_right = False  # whether the student's space leaves out tokens whose projected teacher state misses the label

    def __init__(self, student_dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.to_student = nn.Linear(teacher_dim, student_dim)
        self.to_teacher = nn.Linear(student_dim, teacher_dim)

    def forward(
        self,
        student: TokenStates,
        teacher: TokenStates,
        *,
        divergence: Callable[..., Tensor] = forward_kl,
        temperature: float | Tensor = 1.0,
        scale_t2: bool = True,
        reduction: Reduction = "token_mean",
        num_items: Number = None,
    ) -> DualSpaceTerms:
        """The three terms of a batch; the teacher and both heads get no gradient.

        DSKD's code has no factor T**2, `scale_t2=False`, and divides all terms by the number of student tokens.

        Args:
            student: states with a graph.
            teacher: states of the same batch; masked positions of either may hold anything.
            divergence: the loss in the student's space, any of `logits` that needs no labels.
            temperature: divides the logits, except those of the projection's cross entropy.
            scale_t2: multiplies both divergences by T**2.
            reduction: of each term over its own tokens, see `contract.reduce_rows`.
            num_items: divisor of each mean.

        Raises:
            ValueError: states do not fit one another or this module.
        """
        mask = _check_states("student", student, self.to_teacher.in_features)
        teacher_mask = _check_states("teacher", teacher, self.to_student.in_features)
        if len(mask) != len(teacher_mask):
            raise ValueError(
                f"student labels {tuple(mask.shape)} and teacher labels {tuple(teacher_mask.shape)} differ in batch "
                "size; give both models the same utterances"
            )
        projected, returned, mask, teacher_mask = self.exchange(student, teacher, mask, teacher_mask)
        labels = student.labels[mask]
        logits = as_float(F.linear(projected.to(student.head.dtype), student.head.detach()))
        teacher_logits = F.linear(returned.to(teacher.head.dtype), teacher.head.detach())
        projection = F.cross_entropy(logits, labels, reduction="none")
        if len(labels):
            student_space = divergence(
                student.logits[mask], logits.detach(), temperature=temperature, scale_t2=scale_t2, reduction="none"
            )
            teacher_space = forward_kl(
                teacher_logits,
                teacher.logits[teacher_mask],
                temperature=temperature,
                scale_t2=scale_t2,
                reduction="none",
            )
        else:  # divergences refuse an empty batch; these sums have no element but a graph
            student_space = as_float(student.logits[mask]).sum(dim=-1)
            teacher_space = as_float(teacher_logits).sum(dim=-1)
        if self.only_right:
            student_space = student_space * (logits.argmax(dim=-1) == labels)
        return DualSpaceTerms(
            reduce_rows(projection, mask, reduction, num_items),
            reduce_rows(student_space, mask, reduction, num_items),
            reduce_rows(teacher_space, teacher_mask, reduction, num_items),
        )

    def exchange(
        self, student: TokenStates, teacher: TokenStates, mask: Tensor, teacher_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Teacher states in the student's space and student states in the teacher's, (tokens, dim), and their masks."""
        if not torch.equal(student.labels, teacher.labels):
            raise ValueError(
                "student and teacher have different labels, which DualSpaceKD pairs one to one; use "
                "CrossModelAttentionKD for different tokenizers"
            )
        projected = _apply(self.to_student, teacher.hidden.detach()[mask])
        return projected, _apply(self.to_teacher, student.hidden[mask]), mask, teacher_mask


class CrossModelAttentionKD(DualSpaceKD):
    """DSKD of two models with different tokenizers, whose tokens are paired by a learned attention.

    A token is described by the embeddings of what it reads and of its label. Student tokens are the queries and teacher
    tokens the keys, within one sequence; the transposed scores serve the teacher's space. A sequence without a scored
    token in one of the models is left out. The student's space is 0 on tokens whose attended teacher states do not have
    the label as likeliest id; they still count. The embedding of each model is as wide as its hidden states.

    Teacher states and embeddings are divided by their standard deviation over the batch's scored tokens, in DSKD's code
    over padding too. Parts of a batch therefore do not exactly add up to the whole.

    Args:
        student_dim: width of the student's hidden states.
        teacher_dim: width of the teacher's.
    """

    only_right = True

    def __init__(self, student_dim: int, teacher_dim: int) -> None:
        super().__init__(student_dim, teacher_dim)
        self.query = nn.Linear(2 * student_dim, 2 * teacher_dim)

    def exchange(
        self, student: TokenStates, teacher: TokenStates, mask: Tensor, teacher_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Teacher states in the student's space and student states in the teacher's, (tokens, dim), and their masks."""
        in_both = (mask.any(dim=-1) & teacher_mask.any(dim=-1))[:, None]
        mask, teacher_mask = mask & in_both, teacher_mask & in_both
        read, label = _embed("student", student, mask)
        teacher_read, teacher_label = _embed("teacher", teacher, teacher_mask)
        hidden = as_float(student.hidden).masked_fill(~mask[..., None], 0.0)
        teacher_hidden = as_float(teacher.hidden.detach()).masked_fill(~teacher_mask[..., None], 0.0)

        queries = as_float(_apply(self.query, torch.cat([read, label], dim=-1)))
        keys = _standardize(torch.cat([teacher_read, teacher_label], dim=-1), teacher_mask).to(queries.dtype)
        values = _standardize(teacher_hidden, teacher_mask) + _standardize(teacher_label, teacher_mask)
        scores = as_float(queries @ keys.transpose(1, 2)) / math.sqrt(keys.shape[-1])
        scores = scores.masked_fill(~(mask[:, :, None] & teacher_mask[:, None, :]), NEVER)
        projected = scores.softmax(dim=2) @ _apply(self.to_student, values).to(scores.dtype)
        returned = scores.softmax(dim=1).transpose(1, 2) @ _apply(self.to_teacher, hidden).to(scores.dtype)
        return projected[mask], returned[teacher_mask], mask, teacher_mask


def _apply(layer: nn.Linear, states: Tensor) -> Tensor:
    return layer(states.to(layer.weight.dtype))


def _embed(name: str, states: TokenStates, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings of what each token reads and of its label, (batch, length, dim); of id 0 on masked tokens."""
    if states.input_ids is None or states.embeddings is None:
        raise ValueError(f"the {name}'s states need input_ids and embeddings, with which the attention pairs tokens")
    if states.input_ids.shape != mask.shape:
        raise ValueError(f"{name} input_ids are {tuple(states.input_ids.shape)}, its labels {tuple(mask.shape)}")
    size, dim = states.embeddings.shape
    if size < states.logits.shape[-1] or dim != states.hidden.shape[-1]:
        raise ValueError(
            f"{name} embeddings are {(size, dim)}, its logits and hidden states need at least "
            f"{(states.logits.shape[-1], states.hidden.shape[-1])}; pass the weight of its input embedding"
        )
    ids = states.input_ids.masked_fill(~mask, 0)
    if not (ids.amin() >= 0 and ids.amax() < size):
        raise ValueError(f"{name} input_ids reach from {ids.amin()} to {ids.amax()}, its embedding has {size} ids")
    table = as_float(states.embeddings.detach())
    return F.embedding(ids, table), F.embedding(states.labels.masked_fill(~mask, 0), table)


def _standardize(states: Tensor, mask: Tensor) -> Tensor:
    """States over their standard deviation on the scored tokens."""
    return states / states[mask].std().clamp(min=1e-6) if mask.any() else states


def _check_states(name: str, states: TokenStates, dim: int) -> Tensor:
    """The mask of the scored tokens, (batch, length)."""
    if states.logits.ndim != 3:
        raise ValueError(f"{name} logits are {tuple(states.logits.shape)}, not (batch, length, vocabulary)")
    mask = check_labels(states.labels, states.logits, None)
    if states.hidden.shape != (*mask.shape, dim):
        raise ValueError(
            f"{name} hidden states are {tuple(states.hidden.shape)}, the labels and this module's {name}_dim need "
            f"{(*mask.shape, dim)}"
        )
    if states.head.shape != (states.logits.shape[-1], dim):
        raise ValueError(
            f"the {name}'s head is {tuple(states.head.shape)}, its logits and hidden states need "
            f"{(states.logits.shape[-1], dim)}; pass the weight of its output layer"
        )
    return mask
