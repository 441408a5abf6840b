"""Training on what the student itself writes: where a batch comes from, what of it counts, and MiniLLM's losses.

Who generates is a function of no arguments that the recipe makes for each batch, `lambda: student.generate(...)`; it
returns ids, (batch, length), int64, which begin with the prompt. Let the student generate in eval mode: with dropout
it samples from another model than the one that is trained. One step of GKD for a causal model:

    ids, labels, source = policy.batch(dataset, prompt_length, student=lambda: student.generate(prompts))
    student_logits, teacher_logits = student(ids).logits[:, :-1], teacher(ids).logits[:, :-1]
    loss = generalized_jsd(student_logits, teacher_logits, labels[:, 1:] != IGNORE_INDEX)
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from speechkd.losses.contract import (
    IGNORE_INDEX,
    Number,
    Reduction,
    as_float,
    check_fraction,
    check_labels,
    check_mask,
    log_probs,
    reduce_rows,
    same_vocabulary,
    scored_rows,
)
from speechkd.losses.logits import reverse_kl
from speechkd.losses.preference import token_log_probs

Generate = Callable[[], Tensor]
Source = Literal["student", "teacher", "dataset"]
LengthNorm = Literal["discount", "tokens", "none"]


def completion_labels(ids: Tensor, prompt_length: int, eos_id: int | Sequence[int]) -> Tensor:
    """The ids that were generated, up to and with the first end of text; -100 on the prompt and on padding.

    Padding is found by the end of text and not by its id, which is often the same: what TRL's MiniLLM trainer scores
    there is left out.

    Args:
        ids: prompt and completion, (batch, length), int64.
        prompt_length: number of prompt tokens; all rows have as many, shorter ones being padded on the left.
        eos_id: id of the end of text, or several, as in `generation_config.eos_token_id`.

    Returns:
        (batch, length), int64, not shifted.

    Raises:
        ValueError: ids are not (batch, length), or the prompt is longer than they are.
    """
    if ids.ndim != 2 or not 0 <= prompt_length <= ids.shape[1]:
        raise ValueError(
            f"ids must be (batch, length) and begin with the {prompt_length} tokens of the prompt, got "
            f"{tuple(ids.shape)}; a model that returns the completion alone has prompt_length 0"
        )
    completion = ids[:, prompt_length:]
    is_eos = torch.isin(completion, torch.as_tensor(eos_id, device=ids.device))
    after_eos = is_eos.cumsum(dim=1) - is_eos.long() > 0
    labels = ids.clone()
    labels[:, :prompt_length] = IGNORE_INDEX
    labels[:, prompt_length:].masked_fill_(after_eos, IGNORE_INDEX)
    return labels


class GkdPolicy:
    """Draws for each batch whether the student, the teacher or the dataset provides the text.

    GKD, Agarwal et al. 2023, https://arxiv.org/abs/2306.13649. TRL samples with temperature 0.9 and up to 128 new
    tokens, and computes the loss, `generalized_jsd`, at temperature 1. All ranks of a run get the same seed: they then
    generate in the same steps and none waits for another. The state goes into checkpoints.

    Args:
        eos_id: id of the end of text, or several.
        student_fraction: share of batches that the student writes, GKD's lambda: 1 is on-policy, 0 supervised.
        seed: of the draws.

    Raises:
        ValueError: student_fraction is not 0 to 1.
    """

    def __init__(self, eos_id: int | Sequence[int], *, student_fraction: float = 0.5, seed: int = 0) -> None:
        check_fraction("student_fraction", student_fraction)
        self.eos_id, self.student_fraction = eos_id, student_fraction
        self.generator = torch.Generator().manual_seed(seed)

    def batch(
        self,
        dataset: tuple[Tensor, Tensor],
        prompt_length: int,
        *,
        student: Generate,
        teacher: Generate | None = None,
    ) -> tuple[Tensor, Tensor, Source]:
        """Ids and labels of this step and who wrote them.

        Args:
            dataset: ids and labels of the batch as the data has it, (batch, length) each.
            prompt_length: number of prompt tokens in what `student` and `teacher` return.
            student: generates with the student; called without gradients.
            teacher: generates with the teacher, which then replaces the dataset (TRL's `seq_kd`).

        Returns:
            ids and labels, (batch, length), not shifted, and "student", "teacher" or "dataset".
        """
        # below, not at most: draws are in [0, 1), so that a share of 0 is never and of 1 always
        source: Source
        if torch.rand((), generator=self.generator).item() < self.student_fraction:
            source, generate = "student", student
        elif teacher is not None:
            source, generate = "teacher", teacher
        else:
            return *dataset, "dataset"
        with torch.no_grad():
            ids = generate()
        return ids, completion_labels(ids, prompt_length, self.eos_id), source

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs for the same draws after it."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.generator.set_state(state["generator"].cpu())


def minillm_rewards(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float | Tensor = 1.0
) -> Tensor:
    """How much likelier the teacher finds each token than the student that wrote it: log p - log q, without gradient.

    MiniLLM, Gu et al. 2023, https://arxiv.org/abs/2306.08543.

    Args:
        student_logits: (batch, length, vocabulary), aligned with the labels.
        teacher_logits: same shape.
        labels: the sampled ids, (batch, length), int64, -100 on prompt and padding.
        temperature: divides both logits.

    Returns:
        (batch, length), in nats; 0 where the label is -100.

    Raises:
        ValueError: shapes, vocabularies, labels or temperature do not fit.
    """
    student_logits, teacher_logits = same_vocabulary(student_logits.detach(), teacher_logits)
    mask = check_labels(labels, student_logits, None)
    student, teacher, mask = scored_rows(student_logits, teacher_logits, mask, temperature)
    log_q, log_p = log_probs(student, teacher, temperature)
    return reduce_rows((log_p - log_q).gather(-1, labels[mask][:, None])[:, 0], mask, "none")


def minillm_advantages(
    rewards: Tensor, mask: Tensor | None = None, *, gamma: float = 0.0, length_norm: LengthNorm = "discount"
) -> Tensor:
    """Discounted sum of the rewards from each token on: A_t = sum over i >= t of gamma**(i - t) * r_i.

    MiniLLM, Gu et al. 2023, https://arxiv.org/abs/2306.08543. The paper's sum starts at the next token, t + 1; the
    authors' code and TRL start it at t, as here. `length_norm` keeps long texts from being punished for their length:

    - "discount", TRL's reading, divides by the sum of gamma**(i - t): a weighted mean; with gamma 0 it is r_t.
    - "tokens", the authors' code, divides by the number of tokens from t on. That code takes gamma 0.95 and goes on to
      standardise the advantages over the batch, which is left to the caller.
    - "none" does not divide. TRL then discounts from the start of the text, gamma**i, not from t.

    Args:
        rewards: (batch, length).
        mask: True on sampled tokens, (batch, length), bool; None takes all.
        gamma: discount, 0 to 1.
        length_norm: "discount", "tokens" or "none".

    Returns:
        (batch, length), without gradient; 0 where the mask is False.

    Raises:
        ValueError: shapes, gamma or length_norm do not fit.
    """
    check_fraction("gamma", gamma)
    if length_norm not in ("discount", "tokens", "none"):
        raise ValueError(f"length_norm must be discount, tokens or none, got {length_norm!r}")
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be (batch, length), got {tuple(rewards.shape)}; add the batch axis")
    mask = check_mask(mask, rewards[..., None])
    rewards = as_float(rewards.detach()).masked_fill(~mask, 0.0)
    advantages = _sums_from_here(rewards, gamma)
    if length_norm != "none":
        lengths = _sums_from_here(mask.to(rewards.dtype), gamma if length_norm == "discount" else 1.0)
        advantages = advantages / lengths.masked_fill(~mask, 1.0)
    return advantages.masked_fill(~mask, 0.0)


def _sums_from_here(values: Tensor, gamma: float) -> Tensor:
    """sum over i >= t of gamma**(i - t) * values_i, (batch, length)."""
    total, sums = torch.zeros_like(values[:, 0]), []
    for column in reversed(values.unbind(dim=1)):
        total = column + gamma * total
        sums.append(total)
    return torch.stack(sums[::-1], dim=1)


def clipped_policy_loss(
    student_log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip: float = 0.2,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
) -> Tensor:
    """-min(ratio * A, clamp(ratio, 1 - clip, 1 + clip) * A), the ratio being new over old probability of the token.

    PPO, Schulman et al. 2017, https://arxiv.org/abs/1707.06347. Where the old probabilities are the student's own,
    before any update, the value is -A and the gradient -A * grad log q.

    Args:
        student_log_probs: of the sampled tokens, (batch, length), from `token_log_probs`.
        old_log_probs: of the same tokens under whatever sampled them; no gradient. With MiniLLM's teacher-mixed
            sampling that is `contract.log_mix(0.2, teacher_log_probs, student_log_probs)`, and the ratio then holds
            the paper's importance weight.
        advantages: (batch, length); no gradient.
        mask: True on sampled tokens, (batch, length), bool; None takes all.
        clip: how far the ratio may move before its gradient stops.
        reduction: as in `contract.reduce_rows`; likewise num_items.
        num_items: divisor of a mean.

    Returns:
        0-dim, or (batch, length).

    Raises:
        ValueError: shapes, mask, clip or reduction do not fit.
    """
    shapes = [tuple(x.shape) for x in (student_log_probs, old_log_probs, advantages)]
    if len(set(shapes)) != 1:
        raise ValueError(f"student, old log-probabilities and advantages must have one shape, got {shapes}")
    if not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}; 0.2 is usual")
    mask = check_mask(mask, student_log_probs[..., None])
    log_q = as_float(student_log_probs)[mask]
    ratio = (log_q - old_log_probs.detach().to(log_q.dtype)[mask]).exp()
    advantage = advantages.detach().to(log_q.dtype)[mask]
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return reduce_rows(loss, mask, reduction, num_items)


def minillm_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    labels: Tensor,
    old_log_probs: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    scale_t2: bool = True,
    gamma: float = 0.0,
    length_norm: LengthNorm = "discount",
    single_step: bool = True,
    clip: float = 0.2,
) -> Tensor:
    """Reverse KL of whole texts that the student wrote: clipped policy gradient plus the exact term of each step.

    MiniLLM, Gu et al. 2023, https://arxiv.org/abs/2306.08543; the defaults are TRL's, in which gamma 0 gives both terms
    the same gradient on average. Sample with temperature 1, so that old and new probabilities are of one model; the
    temperature here divides the logits of rewards and single-step term alone. The paper adds cross entropy on plain
    text, `logits.cross_entropy`.

    Args:
        student_logits: (batch, length, vocabulary), aligned with the labels.
        teacher_logits: same shape; no gradient.
        mask: leaves out more tokens, (batch, length), bool.
        labels: the sampled ids, (batch, length), int64, from `completion_labels`; -100 is not scored.
        old_log_probs: see `clipped_policy_loss`; None where the student has not changed since it sampled.
        temperature: of rewards and single-step term.
        reduction: as in `contract.reduce_rows`; likewise num_items.
        num_items: divisor of a mean.
        scale_t2: multiply the single-step term by the squared temperature.
        gamma: see `minillm_advantages`; likewise length_norm.
        length_norm: how advantages are divided.
        single_step: add the reverse KL over the whole vocabulary, which has no sampling noise.
        clip: see `clipped_policy_loss`.

    Returns:
        0-dim, or (batch, length).

    Raises:
        ValueError: shapes, vocabularies, mask, labels or arguments do not fit.
    """
    student_logits, teacher_logits = same_vocabulary(student_logits, teacher_logits)
    mask = check_labels(labels, student_logits, mask)
    labels = labels.masked_fill(~mask, IGNORE_INDEX)
    rewards = minillm_rewards(student_logits, teacher_logits, labels, temperature=temperature)
    advantages = minillm_advantages(rewards, mask, gamma=gamma, length_norm=length_norm)
    log_q = token_log_probs(student_logits, labels)
    old = log_q if old_log_probs is None else old_log_probs
    loss = clipped_policy_loss(log_q, old, advantages, mask, clip=clip, reduction=reduction, num_items=num_items)
    if not single_step:
        return loss
    return loss + reverse_kl(
        student_logits,
        teacher_logits,
        mask,
        temperature=temperature,
        reduction=reduction,
        num_items=num_items,
        scale_t2=scale_t2,
    )
