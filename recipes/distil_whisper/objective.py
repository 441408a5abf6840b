"""The objective of Distil-Whisper: cross entropy on the labels and KL to the teacher, token by token."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import WhisperForConditionalGeneration

from speechkd.data.audio import pcm16_to_float
from speechkd.data.features import WhisperLogMel
from speechkd.losses.fused import fused_linear_cross_entropy, fused_linear_distillation
from speechkd.models.whisper import decoder_states
from speechkd.trainer import Batch


@dataclass(kw_only=True)
class LossConfig:
    """Weights of the objective. The paper prints 0.8 KL + 1.0 CE; its code, and so its checkpoints, have these.

    Args:
        cross_entropy: weight of the cross entropy on the labels.
        kl: weight of KL(teacher || student); 0 trains without a live teacher.
        temperature: of the KL term, which carries its square.
    """

    cross_entropy: float = 0.8
    kl: float = 1.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if min(self.cross_entropy, self.kl) < 0 or self.cross_entropy + self.kl == 0:
            raise ValueError(
                f"loss weights must be >= 0 and not both 0, got cross_entropy={self.cross_entropy}, kl={self.kl}"
            )


def loss_terms(
    model: nn.Module,
    teacher: WhisperForConditionalGeneration | None,
    batch: Batch,
    *,
    weights: LossConfig,
    log_mel: WhisperLogMel,
    shared_encoder: nn.Module | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed objective of a batch and its terms; section 3 of the paper.

    Teacher and student get the same `decoder_input_ids`. A shared encoder runs once, or not at all when the batch
    carries its states.
    """
    labels, decoder_input_ids = batch["labels"], batch["decoder_input_ids"]
    features = states = None
    if "encoder_states" in batch:
        states = batch["encoder_states"].float()
    else:
        features = log_mel(pcm16_to_float(batch["waveforms"]))
        if shared_encoder is not None:
            with torch.no_grad():
                states = shared_encoder(features).last_hidden_state
    inputs = {"input_features": features} if states is None else {"encoder_outputs": (states,)}
    student, head = decoder_states(model, **inputs, decoder_input_ids=decoder_input_ids)
    if teacher is None:
        loss = fused_linear_cross_entropy(student, head, labels, reduction="sum")
        return weights.cross_entropy * loss, {"cross_entropy": loss.detach()}
    if states is None:
        inputs = {"input_features": features.to(teacher.dtype)}
    else:
        inputs = {"encoder_outputs": (states.to(teacher.dtype),)}
    with torch.no_grad():
        teacher_states = decoder_states(teacher, **inputs, decoder_input_ids=decoder_input_ids)
    total, terms = fused_linear_distillation(
        student,
        head,
        *teacher_states,
        labels,
        label_weight=weights.cross_entropy,
        kd_weight=weights.kl,
        temperature=weights.temperature,
        reduction="sum",
    )
    return total, {"cross_entropy": terms["cross_entropy"], "kl": terms["divergence"]}


def count_items(batch: Batch) -> Tensor:
    """Scored tokens of a batch."""
    return (batch["labels"] >= 0).sum()
