"""The objective of Multilingual DistilWhisper: smoothed cross entropy, a gate budget, and JS to the teacher."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import WhisperForConditionalGeneration

from speechkd.data.audio import pcm16_to_float
from speechkd.data.collate import LabelDraws, WhisperTokens
from speechkd.data.features import WhisperLogMel
from speechkd.data.whisper import collate_whisper
from speechkd.losses.fused import fused_linear_cross_entropy, fused_linear_distillation
from speechkd.models.language_experts import gate_totals, gated_blocks
from speechkd.models.whisper import decoder_states
from speechkd.trainer import Batch

SAMPLES_PER_FRAME = 320  # of the encoder's output, at 16 kHz


@dataclass(kw_only=True)
class LossConfig:
    """0.5 * [(CE + gate) / label_sigma^2 + JS / kd_sigma^2]; without a teacher CE + gate.

    Args:
        label_smoothing: share of each label's probability that goes to the whole vocabulary.
        gate_budget: share of tokens that should pass through the experts; the gate term is the distance from it.
        label_sigma: of cross entropy and gate term.
        kd_sigma: of the Jensen-Shannon divergence to the teacher.
    """

    label_smoothing: float = 0.1
    gate_budget: float = 0.5
    label_sigma: float = 1.41
    kd_sigma: float = 1.0

    def __post_init__(self) -> None:
        for name in ("label_smoothing", "gate_budget"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"loss.{name} must be 0 to 1, got {getattr(self, name)}")
        for name in ("label_sigma", "kd_sigma"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"loss.{name} must be positive, got {getattr(self, name)}; a large one weighs little")


def term_weights(weights: LossConfig, with_teacher: bool) -> tuple[float, float]:
    """Weights of (CE + gate) and of JS in the objective."""
    if not with_teacher:
        return 1.0, 0.0
    return 0.5 / weights.label_sigma**2, 0.5 / weights.kd_sigma**2


def loss_terms(
    model: nn.Module,
    teacher: WhisperForConditionalGeneration | None,
    batch: Batch,
    *,
    weights: LossConfig,
    log_mel: WhisperLogMel,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed objective of a batch and its terms; section 3 of the paper.

    The gate term is one number for the batch, so it counts once for each scored token, as the mean of the others does.
    Logged are `cross_entropy` (smoothed), `js`, `gate` and `gate_mean`, as far as the run has them.
    """
    labels, decoder_input_ids = batch["labels"], batch["decoder_input_ids"]
    features = log_mel(pcm16_to_float(batch["waveforms"]))
    student, head = decoder_states(model, input_features=features, decoder_input_ids=decoder_input_ids)
    label_weight, kd_weight = term_weights(weights, teacher is not None)
    terms: dict[str, Tensor] = {}
    if teacher is None:
        total = fused_linear_cross_entropy(student, head, labels, reduction="sum")
        cross_entropy = total.detach()
    else:
        with torch.no_grad():
            teacher_states = decoder_states(
                teacher, input_features=features.to(teacher.dtype), decoder_input_ids=decoder_input_ids
            )
        total, fused = fused_linear_distillation(
            student,
            head,
            *teacher_states,
            labels,
            label_weight=label_weight,
            kd_weight=kd_weight,
            divergence="generalized_jsd",
            temperature=1.0,
            reduction="sum",
        )
        cross_entropy, terms["js"] = fused["cross_entropy"], fused["divergence"]
    smoothing = weights.label_smoothing * smoothing_term(student, head, labels)
    total = total + label_weight * smoothing
    terms["cross_entropy"] = cross_entropy + smoothing.detach()
    if gated_blocks(model):
        scored = labels >= 0
        sums, counts = gate_totals(model, frame_mask(batch["num_samples"], _num_frames(model)), scored)
        gate_mean = sums.sum() / counts.sum().clamp(min=1)
        gate = (gate_mean - weights.gate_budget).abs() * scored.sum()
        total = total + label_weight * gate
        terms |= {"gate": gate.detach(), "gate_mean": gate_mean.detach() * scored.sum()}
    return total, terms


def smoothing_term(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """What label smoothing of strength 1 adds to the cross entropy: the label's logit less the mean logit, summed.

    Cross entropy with smoothing e is (1 - e) * CE + e * mean over the vocabulary of -log p, which is CE + e * this. It
    needs no logits, for the mean logit is the product with the head's mean row.

    Args:
        hidden: last hidden states, (batch, tokens, dim).
        head: (vocabulary, dim).
        labels: (batch, tokens), -100 where not scored.

    Returns:
        0-dim, float32.
    """
    scored = labels >= 0
    rows = head[labels[scored]].float() - head.float().mean(dim=0)
    return (hidden[scored].float() * rows).sum()


def frame_mask(num_samples: Tensor, num_frames: int) -> Tensor:
    """True on the encoder's frames that hold audio and not padding, (batch, frames)."""
    frames = torch.arange(num_frames, device=num_samples.device)
    return frames < (num_samples / SAMPLES_PER_FRAME).ceil().unsqueeze(-1)


def _num_frames(model: Any) -> int:
    return model.config.max_source_positions


def collate_with_lengths(items: Sequence[dict[str, Any]], tokens: WhisperTokens, window_seconds: float) -> Batch:
    """A batch without timestamps and prompts, and `num_samples`, (batch,): the gates of padding do not count."""
    return {
        **collate_whisper(items, tokens, LabelDraws(), window_seconds=window_seconds),
        "num_samples": torch.tensor([len(item["waveform"]) for item in items]),
    }


def count_items(batch: Batch) -> Tensor:
    """Scored tokens of a batch."""
    return (batch["labels"] >= 0).sum()
