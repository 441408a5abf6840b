"""Losses that change while training goes on, and the small states behind them.

Losses take the arguments of `logits`. A state has `state_dict()` and `load_state_dict()`, plain numbers and tensors, so
that it goes into checkpoints and a resumed run continues as if it had not stopped; its constructor's arguments come
from the configuration again. A loss that a state reads must be the same on all ranks: give the mean over them.
"""

import math
from collections import deque
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from speechkd.losses.contract import (
    Number,
    Reduction,
    check_fraction,
    kl_rows,
    log_probs,
    reduce_rows,
    same_vocabulary,
    scored_rows,
    squared,
)
from speechkd.losses.preference import PairReduction, reduce_pairs, sequence_log_probs

Source = Literal["student", "buffer", "dataset"]


def taid_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    tau: float,
    temperature: float | Tensor = 1.0,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    scale_t2: bool = True,
    subtract_entropy: bool = False,
) -> Tensor:
    """Cross entropy with a target between student and teacher: softmax((1 - tau) * student + tau * teacher).

    TAID, Shing et al. 2025, https://arxiv.org/abs/2501.16937. The student inside the target gets no gradient. `tau`, 0
    to 1, comes from a `TaidSchedule`, which reads this value as its authors' code does; `subtract_entropy=True` gives
    the KL divergence to the target, smaller by its entropy and with the same gradient: the forward KL for tau 1.
    """
    check_fraction("tau", tau)
    student, teacher, mask = scored_rows(student_logits, teacher_logits, mask, temperature)
    ruled_out = torch.isneginf(student) | torch.isneginf(teacher)  # 0 * -inf would be NaN
    target = ((1 - tau) * student.detach() + tau * teacher).masked_fill(ruled_out, -torch.inf)
    log_q, log_p = log_probs(student, target, temperature)
    loss = kl_rows(log_p, log_q) if subtract_entropy else -(log_p.exp() * log_q).sum(dim=-1)
    return reduce_rows(loss * squared(temperature, scale_t2), mask, reduction, num_items)


class TaidSchedule:
    """TAID's tau: rises from `start` to `end` at least linearly, and faster while the loss falls.

    TAID, Shing et al. 2025, https://arxiv.org/abs/2501.16937, which starts between 0.2 and 0.4.

    Args:
        total_steps: optimizer steps of the run.
        start: first tau.
        end: last tau.
        step_size: largest share of 1 - tau that one update adds.
        momentum: of the mean over the losses' relative changes.

    Raises:
        ValueError: total_steps is below 1, or not 0 <= start <= end <= 1, or momentum is not 0 to 1.
    """

    def __init__(
        self, total_steps: int, *, start: float = 0.4, end: float = 1.0, step_size: float = 5e-4, momentum: float = 0.99
    ) -> None:
        _check_steps(total_steps)
        if not 0 <= start <= end <= 1:
            raise ValueError(f"tau must rise within 0 to 1, got start={start} and end={end}")
        check_fraction("momentum", momentum)
        self.total_steps, self.start, self.end = total_steps, start, end
        self.step_size, self.momentum = step_size, momentum
        self.tau, self.trend = start, 0.0
        self.previous_loss: float | None = None

    def update(self, loss: float | Tensor, step: int) -> float:
        """Take in the loss of an optimizer step, 0 to `total_steps`, and return tau; the first call only remembers it.

        Raises:
            ValueError: the loss is not finite.
        """
        loss = _finite("loss", loss)
        if self.previous_loss is not None:
            change = (self.previous_loss - loss) / (self.previous_loss + 1e-15)
            self.trend = self.momentum * self.trend + (1 - self.momentum) * change
            sigmoid = 0.5 * (1 + math.tanh(self.trend / 2))
            linear = self.start + (self.end - self.start) * step / self.total_steps
            self.tau = min(self.end, max(linear, self.tau + self.step_size * sigmoid * (1 - self.tau)))
        self.previous_loss = loss
        return self.tau

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"tau": self.tau, "trend": self.trend, "previous_loss": self.previous_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.tau, self.trend, self.previous_loss = state["tau"], state["trend"], state["previous_loss"]


class LearnableTemperature(nn.Module):
    """A temperature that is trained against the student: T = start + span * sigmoid(theta), with theta 1 at first.

    CTKD, Li et al. 2022, https://arxiv.org/abs/2211.16231. Give its parameter to the optimizer and the result to
    `logits.forward_kl` as temperature. By default the gradient is reversed, so that T makes the loss larger while the
    student makes it smaller. So does the authors' code: its layer multiplies the gradient by a factor and does not turn
    its sign, but the factor of its scripts runs from 0 to -1. `adversarial=False` lets T make the loss smaller.

    Args:
        start: smallest temperature.
        span: how much more it can be.
        adversarial: reverse the gradient.

    Raises:
        ValueError: start or span is not positive.
    """

    def __init__(self, *, start: float = 1.0, span: float = 20.0, adversarial: bool = True) -> None:
        super().__init__()
        if not (start > 0 and span > 0):
            raise ValueError(f"start and span of the temperature must be positive, got {start} and {span}")
        self.start, self.span, self.adversarial = start, span, adversarial
        self.theta = nn.Parameter(torch.ones(()))

    def forward(self, strength: float = 1.0) -> Tensor:
        """The temperature, 0-dim; its gradient has the given strength, see `ctkd_strength`."""
        scaled = (-strength if self.adversarial else strength) * self.theta
        theta = self.theta.detach() + (scaled - scaled.detach())
        return self.start + self.span * theta.sigmoid()


def ctkd_strength(epoch: float, ramp_epochs: float = 10) -> float:
    """How strongly CTKD trains its temperature: from 0 up to 1 after `ramp_epochs`, along a cosine.

    CTKD, Li et al. 2022, https://arxiv.org/abs/2211.16231; its code counts epochs from 1.

    Raises:
        ValueError: the epoch is negative or ramp_epochs not positive.
    """
    if epoch < 0 or ramp_epochs <= 0:
        raise ValueError(f"epoch must be 0 or more and ramp_epochs positive, got {epoch} and {ramp_epochs}")
    return 0.5 * (1 - math.cos(math.pi * min(epoch / ramp_epochs, 1)))


class AdaptiveOffPolicy:
    """DistiLLM's source of each batch: the dataset, the student, or a buffer of what the student wrote before.

    DistiLLM, Ko et al. 2024, https://arxiv.org/abs/2402.03898. `phi`, the share of batches with student text, starts
    at 0 and grows each time the validation loss got worse by `tolerance`. Of these batches the student writes a part
    anew, which shrinks during training, and all while the buffer is not full; the others come from the buffer. The loss
    is `logits.skew_reverse_kl` or `logits.skew_kl` with alpha 0.1; sampling is at temperature 1 from the whole
    vocabulary. All ranks get the same seed.

    Args:
        total_steps: optimizer steps of the run.
        capacity: sequences in the buffer; the oldest make room.
        schedule: the part of phi that is written anew: "decreasing" from 1 to 0, "constant" 0.5, "increasing".
        step_size: growth of phi.
        tolerance: how much worse the validation loss must be, in nats.
        seed: of the draws.

    Raises:
        ValueError: total_steps or capacity is below 1, or the schedule is unknown.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        capacity: int = 1000,
        schedule: Literal["decreasing", "constant", "increasing"] = "decreasing",
        step_size: float = 0.1,
        tolerance: float = 0.1,
        seed: int = 0,
    ) -> None:
        _check_steps(total_steps)
        if capacity < 1:
            raise ValueError(f"capacity must be 1 sequence or more, got {capacity}")
        if schedule not in ("decreasing", "constant", "increasing"):
            raise ValueError(f"schedule must be decreasing, constant or increasing, got {schedule!r}")
        self.total_steps, self.capacity, self.schedule = total_steps, capacity, schedule
        self.step_size, self.tolerance = step_size, tolerance
        self.phi, self.previous_loss = 0.0, math.inf
        self.buffer: deque[Any] = deque(maxlen=capacity)
        self.generator = torch.Generator().manual_seed(seed)

    def observe_validation(self, loss: float | Tensor) -> float:
        """Take in a validation loss and return phi; the first one, before training, is what later ones compare to.

        Raises:
            ValueError: the loss is not finite.
        """
        loss = _finite("validation loss", loss)
        if self.previous_loss == math.inf:
            self.previous_loss = loss
        elif loss >= self.previous_loss + self.tolerance:
            self.phi, self.previous_loss = min(self.phi + self.step_size, 1.0), loss
        return self.phi

    def choose(self, step: int) -> Source:
        """Where the batch of this optimizer step comes from; one draw."""
        done = min(step / self.total_steps, 1.0)
        part = {"decreasing": 1 - done, "constant": 0.5, "increasing": done}[self.schedule]
        draw = torch.rand((), generator=self.generator).item()
        if draw >= self.phi:
            return "dataset"
        return "student" if draw < self.phi * part or len(self.buffer) < self.capacity else "buffer"

    def remember(self, sequences: Iterable[Any]) -> None:
        """Put into the buffer what the student wrote, one item a sequence: tensors on the CPU, with their input."""
        self.buffer.extend(sequences)

    def recall(self, count: int) -> list[Any]:
        """Different random items of the buffer.

        Raises:
            ValueError: the buffer has fewer.
        """
        if count > len(self.buffer):
            raise ValueError(
                f"the buffer holds {len(self.buffer)} sequences, fewer than the {count} of a batch; recall when "
                "choose() says buffer, and make capacity larger than a batch"
            )
        picked = torch.randperm(len(self.buffer), generator=self.generator)[:count]
        return [self.buffer[index] for index in picked.tolist()]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs; the buffer is that of this rank."""
        draws, texts = self.generator.get_state(), list(self.buffer)
        return {"phi": self.phi, "previous_loss": self.previous_loss, "buffer": texts, "generator": draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.phi, self.previous_loss = state["phi"], state["previous_loss"]
        self.buffer = deque(state["buffer"], maxlen=self.capacity)
        self.generator.set_state(state["generator"].cpu())


def cald_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    reduction: PairReduction = "pair_mean",
    num_items: Number = None,
    scale_t2: bool = True,
    beta: float = 1.0,
    alpha_teacher: float | Tensor = 0.1,
    alpha_student: float | Tensor = 0.1,
    detach_mixture: bool = True,
) -> Tensor:
    """(2 - beta) * skew KL on texts of the teacher + beta * skew reverse KL on texts of the student, for each pair.

    DistiLLM-2, Ko et al. 2025, https://arxiv.org/abs/2503.07067. Each term is the token mean of its sequence. As in its
    code, the student inside the mixture of the reverse term gets no gradient; `detach_mixture=False` gives it one, as
    DistiLLM's `skew_reverse_kl` has. Write the student's texts anew every epoch.

    Args:
        student_logits: (2 * pairs, length, vocabulary), aligned: texts of the teacher, then, in the same order, the
            texts that the student wrote for the same inputs.
        teacher_logits: same shape; no gradient.
        mask: True on scored tokens, (2 * pairs, length), bool; None scores all. A pair without any is left out.
        reduction: "pair_mean" over `num_items` pairs, by default those that count; "sum"; "none" gives (pairs,).
        beta: 0 to 2, for example `gradual_beta(step, total_steps)`.
        alpha_teacher: skew on the teacher's texts, 0 to 1, or one for each pair, (pairs,), from a `SkewCurriculum`.
        alpha_student: skew on the student's texts, likewise.

    Raises:
        ValueError: as in `logits`, or there are no pairs, or beta or an alpha is outside.
    """
    if student_logits.ndim != 3 or len(student_logits) % 2:
        raise ValueError(
            f"student logits must be (2 * pairs, length, vocabulary), got {tuple(student_logits.shape)}; stack the "
            "teacher's texts and then the student's"
        )
    if not 0 <= beta <= 2:
        raise ValueError(f"beta must be 0 to 2, got {beta}")
    student, teacher, mask = scored_rows(student_logits, teacher_logits, mask, temperature)
    log_q, log_p = log_probs(student, teacher, temperature)
    num_pairs = len(mask) // 2
    num_tokens = mask.sum(dim=1)
    on_teacher = int(num_tokens[:num_pairs].sum())  # rows are in the order of their sequences
    q_teacher, q_student = log_q[:on_teacher], log_q[on_teacher:]
    p_teacher, p_student = log_p[:on_teacher], log_p[on_teacher:]
    fixed = q_student.detach() if detach_mixture else q_student
    forward_mix = _mix_rows("alpha_teacher", alpha_teacher, num_tokens[:num_pairs], p_teacher, q_teacher)
    reverse_mix = _mix_rows("alpha_student", alpha_student, num_tokens[num_pairs:], fixed, p_student)
    rows = torch.cat([kl_rows(p_teacher, forward_mix), kl_rows(q_student, reverse_mix)])
    means = reduce_rows(rows, mask, "none").sum(dim=1) / num_tokens.clamp(min=1)
    counts = mask.any(dim=1).view(2, num_pairs).any(dim=0)
    loss = ((2 - beta) * means[:num_pairs] + beta * means[num_pairs:])[counts]
    return reduce_pairs(loss * squared(temperature, scale_t2), counts, reduction, num_items)


def gradual_beta(step: int, total_steps: int) -> float:
    """DistiLLM-2's weight of the student's texts: from 1 at the start to 1.5 in the middle of the run, then constant.

    Ko et al. 2025, https://arxiv.org/abs/2503.07067; off in its code, where beta is 1.

    Raises:
        ValueError: total_steps is below 1.
    """
    _check_steps(total_steps)
    return 1 + 0.5 * min(1.0, 2 * step / total_steps)


def probability_gaps(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """By how much the teacher's geometric mean probability of each text exceeds the student's, (batch,); no gradient.

    Args:
        student_logits: (batch, length, vocabulary), aligned with the labels.
        teacher_logits: same shape.
        labels: ids of the texts, (batch, length), int64, -100 on tokens that are not scored.

    Raises:
        ValueError: shapes, vocabularies or labels do not fit.
    """
    student_logits, teacher_logits = same_vocabulary(student_logits.detach(), teacher_logits.detach())
    student, teacher = (
        sequence_log_probs(logits, labels, length_normalize=True).exp() for logits in (student_logits, teacher_logits)
    )
    return teacher - student


class SkewCurriculum:
    """DistiLLM-2's skew of each text: the nearer the models are, relative to their distance at first, the smaller.

    Ko et al. 2025, https://arxiv.org/abs/2503.07067: alpha = 1 - (1 - base) * first mean gap / (gap + 1e-5), kept from
    `lowest` to `base`. Give `probability_gaps` of the teacher's texts; of the student's, another object and the negated
    gaps. The published code has it off and, where it is on, silently falls back to `base`. Its mean is the first one
    logged; here it is over the first `first_batches` calls, which give `base`.

    Args:
        base: largest alpha.
        lowest: smallest alpha.
        first_batches: number of calls that the first mean is taken over.

    Raises:
        ValueError: not 0 <= lowest <= base <= 1, or first_batches is below 1.
    """

    def __init__(self, *, base: float = 0.1, lowest: float = 0.01, first_batches: int = 10) -> None:
        if not 0 <= lowest <= base <= 1:
            raise ValueError(f"alpha must stay within 0 to 1, got lowest={lowest} and base={base}")
        if first_batches < 1:
            raise ValueError(f"first_batches must be 1 or more, got {first_batches}")
        self.base, self.lowest, self.first_batches = base, lowest, first_batches
        self.num_batches, self.mean_gap = 0, 0.0

    def alphas(self, gaps: Tensor) -> Tensor:
        """Skew of each text, (pairs,), from its gap, (pairs,)."""
        if self.num_batches < self.first_batches:
            self.num_batches += 1
            self.mean_gap += (_finite("mean gap", gaps.mean()) - self.mean_gap) / self.num_batches
            return torch.full_like(gaps, self.base)
        return (1 - (1 - self.base) * self.mean_gap / (gaps + 1e-5)).clamp(self.lowest, self.base)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"num_batches": self.num_batches, "mean_gap": self.mean_gap}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.num_batches, self.mean_gap = state["num_batches"], state["mean_gap"]


def _mix_rows(name: str, alpha: float | Tensor, num_tokens: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """log(alpha * a + (1 - alpha) * b) of each row, alpha being its sequence's; sequences have num_tokens rows."""
    if not isinstance(alpha, Tensor):
        alpha = torch.full((len(num_tokens),), alpha, dtype=torch.float64)
    if alpha.shape != num_tokens.shape or not ((alpha >= 0) & (alpha <= 1)).all():
        raise ValueError(f"{name} must be 0 to 1, one number or {len(num_tokens)}, (pairs,), got {alpha.tolist()}")
    alpha = alpha.detach().to(log_a).repeat_interleave(num_tokens)[:, None]
    return torch.logaddexp(alpha.log() + log_a, (-alpha).log1p() + log_b)


def _check_steps(total_steps: int) -> None:
    if total_steps < 1:
        raise ValueError(f"total_steps must be 1 or more, got {total_steps}")


def _finite(name: str, value: float | Tensor) -> float:
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; a schedule that takes it in never recovers, so skip this step")
    return value
