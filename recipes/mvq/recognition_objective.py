"""The objective of MVQ: recognise, and let a middle layer predict what a teacher makes of each frame.

Guo et al. 2022, https://arxiv.org/abs/2211.00508.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from teacher_targets import Distillation, Targets
from torch import Tensor, nn

from speechkd.data.audio import pcm16_to_float
from speechkd.data.augment import SpecAugmentConfig, spec_augment
from speechkd.data.features import padding_mask
from speechkd.losses.codebook import CodebookPredictor, PredictorMode, codebook_loss
from speechkd.losses.contract import IGNORE_INDEX
from speechkd.losses.layerwise import normalize_frames
from speechkd.models.recognizer import DistilledRecognizer, RecognizerInputs
from speechkd.trainer import Batch


@dataclass(kw_only=True)
class LossConfig:
    """What is learnt besides the texts.

    Args:
        kd: mvq predicts codes of the teacher's states, l1 and l2 the states themselves, none learns from texts alone.
        weight: of that term. Both it and the recogniser's loss are sums over the batch, this over frames, that over
            clips; the codes' loss of a frame is a mean over codes. The paper's 0.1 with sums over 16 codes is 1.6 here.
        layer: of the student, from 1, that predicts; null for the middle one.
        predictor: independent heads for the codes, or joint ones that are told the codes before.
        delay_frames: student frames by which it may be late, for an Emformer.
    """

    kd: Distillation = "mvq"
    weight: float = 1.6
    layer: int | None = None
    predictor: PredictorMode = "independent"
    delay_frames: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"loss.weight must be 0 or more, got {self.weight}; loss.kd=none removes the term")
        if self.delay_frames < 0:
            raise ValueError(f"loss.delay_frames must be 0 or more, got {self.delay_frames}")

    def layer_of(self, num_layers: int) -> int:
        """The layer that predicts, from 1.

        Raises:
            ValueError: the student has no such layer.
        """
        layer = (num_layers + 1) // 2 if self.layer is None else self.layer
        if not 1 <= layer <= num_layers:
            raise ValueError(f"loss.layer={layer}, but the student has layers 1 to {num_layers}")
        return layer

    def describe(self, head: str) -> str:
        """The objective in a few words, for the model card."""
        return head if self.kd == "none" else f"{head} + {self.weight:g} {self.kd}"


def make_head(weights: LossConfig, width: int, targets: Targets | None) -> nn.Module | None:
    """What predicts the teacher's frames from states of the student, (batch, frames, width)."""
    if targets is None:
        return None
    per_frame, quantizer = targets.alignment.per_frame, targets.quantizer
    if quantizer is None:
        return nn.Linear(width, per_frame * targets.width)
    return CodebookPredictor(
        width, per_frame * quantizer.num_codebooks, quantizer.codebook_size, mode=weights.predictor
    )


def loss_terms(
    model: Any,
    teacher: nn.Module | None,
    batch: Batch,
    *,
    weights: LossConfig,
    inputs: RecognizerInputs,
    live: Targets | None = None,
    masks: SpecAugmentConfig | None = None,
    seed: int = 0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed objective of a batch, and its terms.

    Args:
        model: the student, a `DistilledRecognizer`.
        teacher: None; a live one is in `live`.
        batch: of `collate_recognition`.
        weights: of the terms.
        inputs: makes features.
        live: runs the teacher; None where the batch carries its targets, or nothing is distilled.
        masks: on what the student hears in training; None for none. The teacher hears everything.
        seed: of the masks.
    """
    student: DistilledRecognizer = model
    waveforms = pcm16_to_float(batch["waveforms"])
    features, num_frames = inputs(waveforms, torch.tensor(batch["num_samples"]))
    if masks is not None and model.training:
        heard = features.transpose(1, 2)
        heard = spec_augment(heard, num_frames, batch["ids"], masks, seed=seed, epoch=batch["epoch"])
        features = heard.transpose(1, 2)
    states, num_frames = student(features, num_frames)
    loss = student.recognizer.loss(states[-1], num_frames, batch["targets"])
    terms = {student.recognizer.config.head: loss.detach()}
    if student.head is None:
        return loss, terms
    hidden = states[weights.layer_of(len(states)) - 1]
    found = batch if live is None else live.live(waveforms, batch["num_samples"], batch["num_frames"])
    mask = padding_mask(num_frames, hidden[..., 0])
    if weights.kd == "mvq":
        codes = found["codes"]
        if weights.predictor == "joint":  # it is told all codes of a frame or none
            codes = codes.masked_fill((codes == IGNORE_INDEX).any(dim=-1, keepdim=True), IGNORE_INDEX)
        head: Any = student.head
        kd = codebook_loss(hidden, codes, head, mask, reduction="sum")
    else:
        kd = regression_loss(hidden, found["states"], found["states_mask"] & mask[..., None], student.head, weights.kd)
    return loss + weights.weight * kd, {**terms, weights.kd: kd.detach()}


def regression_loss(hidden: Tensor, states: Tensor, mask: Tensor, head: nn.Module, distance: str) -> Tensor:
    """Distance of predicted from true states, a mean over width and over the teacher's frames of one of the student.

    The teacher's states are brought to mean 0 and variance 1 over their width.

    Args:
        hidden: student states, (batch, frames, dim).
        states: of the teacher, (batch, frames, per_frame, width).
        mask: True where there is one, (batch, frames, per_frame), bool.
        head: from dim to per_frame * width.
        distance: "l1" or "l2".

    Returns:
        Sum over frames, 0-dim, float32.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        predicted = head(hidden.float()).unflatten(-1, states.shape[2:])
        difference = (predicted - normalize_frames(states.float())).masked_fill(~mask[..., None], 0.0)
        values = difference.abs() if distance == "l1" else difference.square()
        return values.mean(dim=-1).sum() / states.shape[2]


def count_items(batch: Batch) -> Tensor:
    """Student frames of a batch, 0-dim, int64."""
    return torch.tensor(sum(batch["num_frames"]))
