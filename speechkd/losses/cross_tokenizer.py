"""Losses between the logits of models with different tokenizers.

Student logits are (batch, length, vocabulary), teacher logits (batch, other length, other vocabulary), each aligned
with its own labels (logit i predicts label i). Labels are int64, -100 on tokens that are not scored, and both spell the
same text. The teacher gets no gradient. `uld` needs nothing else; `gold` and `min_edit_logits` also read what the ids
spell: see `token_alignment`. With hidden states at hand there is `dual_space`.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from speechkd.losses.contract import (
    Number,
    Reduction,
    as_float,
    check_fraction,
    check_labels,
    check_mask,
    check_temperature,
    jsd_rows,
    reduce_rows,
)
from speechkd.losses.token_alignment import (
    NO_TEXT,
    align_ends,
    byte_ends,
    min_edit_alignment,
    shared_ids,
    spell,
    token_bytes,
)

__all__ = [
    "align_ends",
    "byte_ends",
    "gold",
    "min_edit_alignment",
    "min_edit_logits",
    "shared_ids",
    "token_bytes",
    "uld",
]

LOG_FLOOR = math.log(1e-8)  # GOLD takes no smaller probability, neither of a token in a group nor in its divergence
Merge = Literal["bayesian", "observed"]


def uld(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    teacher_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
) -> Tensor:
    """L1 distance of sorted probabilities: the k-th likeliest id of one model against that of the other, 0 to 2.

    ULD, Boizard et al. 2024, https://arxiv.org/abs/2402.12030, with weight 1.5 beside the cross entropy. The n-th
    scored token of a sequence is compared with the teacher's n-th and the rest of the longer one is dropped, whatever
    the text; `gold` aligns it. The smaller vocabulary is padded with zeros; permuted ids change nothing. DSKD averages
    over tokens, as here, TRL over sequences: `reduction="seq_mean"`. Neither has a factor T**2.

    Args:
        student_logits: (..., length, vocabulary).
        teacher_logits: (..., other length, other vocabulary).
        mask: True on scored student tokens, (..., length), bool; None scores all.
        teacher_mask: True on scored teacher tokens, (..., other length); None takes the student's.
        temperature: divides both logits.
        reduction: see `contract.reduce_rows`, with pairs as tokens. "none" is (..., length).
        num_items: divisor of a mean.

    Raises:
        ValueError: shapes, masks or temperature do not fit.
    """
    check_temperature(temperature)
    if student_logits.ndim < 2 or student_logits.shape[:-2] != teacher_logits.shape[:-2]:
        raise ValueError(_not_one_batch(student_logits, teacher_logits))
    ours = check_mask(mask, student_logits)
    if teacher_mask is None and mask is not None and mask.shape != teacher_logits.shape[:-1]:
        raise ValueError(
            f"the student's mask {tuple(mask.shape)} does not fit teacher logits {tuple(teacher_logits.shape)}; pass "
            "teacher_mask, True on the teacher's scored tokens"
        )
    theirs = check_mask(mask if teacher_mask is None else teacher_mask, teacher_logits)
    num_pairs = torch.minimum(ours.sum(dim=-1, keepdim=True), theirs.sum(dim=-1, keepdim=True))
    ours, theirs = ours & (ours.cumsum(dim=-1) <= num_pairs), theirs & (theirs.cumsum(dim=-1) <= num_pairs)
    log_q = F.log_softmax(as_float(student_logits[ours]) / temperature, dim=-1)
    log_p = F.log_softmax(teacher_logits.detach()[theirs].to(log_q.dtype) / temperature, dim=-1)
    return reduce_rows(_sorted_l1(log_q, log_p), ours, reduction, num_items)


def gold(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    student_labels: Tensor,
    teacher_labels: Tensor,
    student_ends: Tensor,
    teacher_ends: Tensor,
    shared: Tensor | None = None,
    weights: tuple[float, float] | None = None,
    beta: float = 0.5,
    merge: Merge = "bayesian",
    temperature: float | Tensor = 1.0,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
) -> Tensor:
    """ULD between groups of tokens that spell the same bytes; ids that both models have are compared directly.

    GOLD, Patino et al. 2025, https://huggingface.co/spaces/HuggingFaceH4/general-on-policy-logit-distillation, where
    the cross entropy has no weight. `align_ends` forms the groups; EOS and other tokens without text are left out.
    `merge` makes one distribution, on purpose not normalised, of a group of several tokens:

    - "bayesian", our default: the last token's distribution times the probabilities of the tokens before it; by the
      chain rule, the probability of every text that differs in the last token.
    - "observed", TRL's default: the first token's distribution times the probabilities of the tokens after it; right
      for the text that occurred, not for others. TRL also reads these logits one token late: its numbers come out when
      logit i is the one that follows label i, so with `logits[:, 1:]` beside `labels[:, 1:]`.

    With `shared`, these ids add `weights[0]` times the generalised JSD of their probabilities, which are not normalised
    again, and the others `weights[1]` times ULD. Where one model has no others, TRL drops that term; here they are
    compared with zeros. TRL averages over groups, then over sequences: `reduction="seq_mean"`. No factor T**2.

    Args:
        student_logits: (batch, length, vocabulary).
        teacher_logits: (batch, other length, other vocabulary).
        student_labels: (batch, length).
        teacher_labels: (batch, other length).
        student_ends: where each token ends in the text, in bytes, (batch, length), int64, from `byte_ends`; -1 leaves a
            token out. To score EOS, give it the end of the token before.
        teacher_ends: (batch, other length).
        shared: student and teacher id of equal tokens, (pairs, 2), int64, from `shared_ids`; None uses ULD alone.
        weights: of the shared ids and of the others; None takes the shared fraction of the teacher's ids and the rest.
        beta: the teacher's weight in the JSD's mixture; 0 gives the forward and 1 the reverse KL, as in TRL.
        merge: see above.
        temperature: divides both logits.
        reduction: see `contract.reduce_rows`, with groups as tokens. "none" is (batch, length), with a group's loss at
            its last student token.
        num_items: divisor of a mean.

    Raises:
        ValueError: shapes, labels, ends, ids or arguments do not fit.
    """
    check_temperature(temperature)
    check_fraction("beta", beta)
    if merge not in ("bayesian", "observed"):
        raise ValueError(f"merge must be 'bayesian' or 'observed', got {merge!r}")
    student_mask, teacher_mask = _check_batch(student_logits, student_labels, teacher_logits, teacher_labels)
    ours = _scored_ends("student_ends", student_ends, student_mask)
    theirs = _scored_ends("teacher_ends", teacher_ends, teacher_mask)
    groups = [(row, pair) for row, ends in enumerate(zip(ours, theirs, strict=True)) for pair in align_ends(*ends)]

    student = as_float(student_logits)
    teacher = teacher_logits.detach().to(student.dtype)
    log_q = _merged(student, student_labels, [(row, pair[0]) for row, pair in groups], temperature, merge)
    log_p = _merged(teacher, teacher_labels, [(row, pair[1]) for row, pair in groups], temperature, merge)
    if shared is None:
        loss = _sorted_l1(log_q, log_p)
    else:
        our_ids, their_ids = _check_shared(shared, student, teacher)
        part = len(shared) / teacher.shape[-1]
        matched_weight, other_weight = (part, 1 - part) if weights is None else weights
        matched = jsd_rows(log_q[:, our_ids].clamp(min=LOG_FLOOR), log_p[:, their_ids].clamp(min=LOG_FLOOR), beta)
        others = _sorted_l1(log_q[:, _without(our_ids, log_q)], log_p[:, _without(their_ids, log_p)])
        loss = matched_weight * matched + other_weight * others
    lasts = torch.tensor([(row, pair[0][-1]) for row, pair in groups], dtype=torch.long, device=student.device)
    mask = torch.zeros_like(student_mask)
    mask[tuple(lasts.view(-1, 2).T)] = True
    return reduce_rows(loss, mask, reduction, num_items)


def min_edit_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    student_labels: Tensor,
    teacher_labels: Tensor,
    student_bytes: Sequence[bytes],
    teacher_bytes: Sequence[bytes],
    shared: Tensor,
) -> Tensor:
    """The teacher's logits on the student's tokens and ids: `forward_kl(student_logits, min_edit_logits(...), mask)`.

    MinED, Wan et al. 2024 (FuseLLM), https://arxiv.org/abs/2401.10491, as DSKD's code has it. A student token that
    `min_edit_alignment` pairs with a single teacher token, of the same spelling, takes that token's logits, with -inf
    on ids that the teacher lacks. All others take their label as one-hot logits, on which the forward KL is the cross
    entropy. Here the labels are paired; DSKD pairs the tokens that are read, one earlier.

    Args:
        student_logits: (batch, length, vocabulary); only their shape and dtype are read.
        teacher_logits: (batch, other length, other vocabulary).
        student_labels: (batch, length).
        teacher_labels: (batch, other length).
        student_bytes: what each id spells, from `token_bytes`.
        teacher_bytes: the teacher's.
        shared: student and teacher id of equal tokens, (pairs, 2), int64, from `shared_ids`.

    Returns:
        (batch, length, student vocabulary), float32 or float64, without a graph; 0 on tokens that are not scored.

    Raises:
        ValueError: shapes, labels or ids do not fit.
    """
    student_mask, teacher_mask = _check_batch(student_logits, student_labels, teacher_logits, teacher_labels)
    our_ids, their_ids = _check_shared(shared, student_logits, teacher_logits)
    translated = torch.full(teacher_logits.shape[-1:], -1, device=our_ids.device).scatter(0, their_ids, our_ids)
    targets = as_float(student_logits.detach()[:0]).new_zeros(student_logits.shape)
    for row, target in enumerate(targets):
        positions = student_mask[row].nonzero()[:, 0]
        labels, teacher_ids = student_labels[row, positions], teacher_labels[row, teacher_mask[row]]
        candidates = teacher_logits[row].detach()[teacher_mask[row]][:, their_ids].to(target.dtype)
        pairs = min_edit_alignment(spell(student_bytes, labels.tolist()), spell(teacher_bytes, teacher_ids.tolist()))
        meaning = translated[teacher_ids].tolist()
        matches = [
            (place, pair[0])
            for place, (pair, label) in enumerate(zip(pairs, labels.tolist(), strict=True))
            if len(pair) == 1 and meaning[pair[0]] == label
        ]
        places, sources = torch.tensor(matches, dtype=torch.long, device=labels.device).view(-1, 2).unbind(-1)
        usable = candidates[sources].isfinite().any(dim=-1)
        places, sources = positions[places[usable]], sources[usable]
        target[positions] = -torch.inf
        target[positions, labels] = 0.0
        target[places] = -torch.inf
        target[places[:, None], our_ids] = candidates[sources]
    return targets


def _merged(
    logits: Tensor, labels: Tensor, spans: list[tuple[int, list[int]]], temperature: float | Tensor, merge: Merge
) -> Tensor:
    """Log-probabilities of groups, (groups, vocabulary); a span is a sequence and the group's positions in it."""
    kept = -1 if merge == "bayesian" else 0
    tokens = [
        (row, position, group, position == positions[kept])
        for group, (row, positions) in enumerate(spans)
        for position in positions
    ]
    rows, places, group, is_kept = torch.tensor(tokens, dtype=torch.long, device=logits.device).view(-1, 4).unbind(-1)
    log_probs = F.log_softmax(logits[rows, places] / temperature, dim=-1)
    own = log_probs.gather(-1, labels[rows, places][:, None])[:, 0].clamp(min=LOG_FLOOR)
    factor = own.new_zeros(len(spans)).index_add(0, group, own.masked_fill(is_kept.bool(), 0.0))
    return log_probs[is_kept.bool()] + factor[:, None]


def _sorted_l1(log_a: Tensor, log_b: Tensor) -> Tensor:
    """L1 distance of each row's sorted probabilities, (tokens,); the shorter rows are padded with zeros."""
    a, b = (x.exp().sort(dim=-1, descending=True).values for x in (log_a, log_b))
    width = max(a.shape[-1], b.shape[-1])
    return (F.pad(a, (0, width - a.shape[-1])) - F.pad(b, (0, width - b.shape[-1]))).abs().sum(dim=-1)


def _without(ids: Tensor, log_probs: Tensor) -> Tensor:
    """True on all other ids, (vocabulary,)."""
    return torch.ones(log_probs.shape[-1], dtype=torch.bool, device=ids.device).index_fill(0, ids, False)


def _scored_ends(name: str, ends: Tensor, mask: Tensor) -> list[list[int]]:
    """The ends, with -1 on tokens that are not scored."""
    if ends.shape != mask.shape:
        raise ValueError(
            f"{name} is {tuple(ends.shape)}, its labels are {tuple(mask.shape)}; use byte_ends(labels, ...)"
        )
    return ends.to(mask.device).masked_fill(~mask, NO_TEXT).tolist()


def _check_batch(
    student_logits: Tensor, student_labels: Tensor, teacher_logits: Tensor, teacher_labels: Tensor
) -> tuple[Tensor, Tensor]:
    """The masks of both models' scored tokens."""
    if student_logits.ndim != 3 or teacher_logits.ndim != 3 or len(student_logits) != len(teacher_logits):
        raise ValueError(_not_one_batch(student_logits, teacher_logits))
    return check_labels(student_labels, student_logits, None), check_labels(teacher_labels, teacher_logits, None)


def _check_shared(shared: Tensor, student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Student's and teacher's ids of the pairs, (pairs,) each."""
    if shared.ndim != 2 or shared.shape[-1] != 2 or shared.dtype != torch.long:
        raise ValueError(f"shared must be (pairs, 2), int64, got {tuple(shared.shape)}, {shared.dtype}; use shared_ids")
    limits = (student_logits.shape[-1], teacher_logits.shape[-1])
    wrong = ((shared < 0) | (shared >= shared.new_tensor(limits))).any(dim=-1)
    if wrong.any():
        raise ValueError(
            f"shared ids {shared[wrong][0].tolist()} are not in the vocabularies of {limits[0]} and {limits[1]} ids; a "
            "pair is (student id, teacher id)"
        )
    our_ids, their_ids = shared.to(student_logits.device).unbind(-1)
    return our_ids, their_ids


def _not_one_batch(student_logits: Tensor, teacher_logits: Tensor) -> str:
    return (
        f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} are not "
        "(batch, length, vocabulary) of one batch; only length and vocabulary may differ"
    )
