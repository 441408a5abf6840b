"""The objectives of compact encoders: to predict layers of the teacher, or to tell their masked frames apart."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from speechkd.data.audio import pcm16_to_float
from speechkd.losses.contract import check_temperature
from speechkd.losses.hidden import CosineForm
from speechkd.losses.layerwise import Distance, contrastable, distilhubert_terms, masked_info_nce, normalize_frames
from speechkd.models.distilhubert import CompactStudent, teacher_targets
from speechkd.models.encoder_inputs import EncoderInputs, align_frames
from speechkd.trainer import Batch

Method = Literal["distilhubert", "colld"]


@dataclass(kw_only=True)
class LossConfig:
    """What the student learns of the teacher's layers.

    Args:
        method: distilhubert: heads on the student's last layer predict layers of the teacher. colld: the student hears
            spans masked, and each of its layers picks the teacher's state of a masked frame out of those of others.
        distance: of distilhubert, l1 or l2, averaged over the width.
        cosine: weight of distilhubert's cosine term.
        cosine_form: log_sigmoid as in DistilHuBERT, or negative as in DPHuBERT.
        normalize_targets: layer norm without parameters on each frame of the teacher, against collapse in half
            precision.
        temperature: of colld; divides the cosines.
        num_negatives: wrong answers for each masked frame of colld.
        span_start_probability: share of frames that begin a masked span in colld.
        span_frames: length of a span.
    """

    method: Method = "distilhubert"
    distance: Distance = "l1"
    cosine: float = 1.0
    cosine_form: CosineForm = "log_sigmoid"
    normalize_targets: bool = False
    temperature: float = 0.1
    num_negatives: int = 100
    span_start_probability: float = 0.065
    span_frames: int = 10

    def __post_init__(self) -> None:
        check_temperature(self.temperature, "loss.temperature")
        if not 0 <= self.cosine < math.inf:
            raise ValueError(f"loss.cosine must be 0 or more, got {self.cosine}; 0 leaves the distance alone")
        if not 0 < self.span_start_probability <= 1:
            raise ValueError(
                f"loss.span_start_probability must be above 0 and at most 1, got {self.span_start_probability}"
            )
        for name in ("num_negatives", "span_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"loss.{name} must be 1 or more, got {getattr(self, name)}")

    def describe(self) -> str:
        """The objective in a few words, for the model card."""
        targets = ", targets normalised" if self.normalize_targets else ""
        if self.method == "colld":
            return f"colld: InfoNCE of masked frames (T={self.temperature:g}, {self.num_negatives} negatives){targets}"
        cosine = {"log_sigmoid": "-log sigmoid(cos)", "negative": "-cos", "one_minus": "1 - cos"}[self.cosine_form]
        return f"distilhubert: {self.distance} + {self.cosine:g} ({cosine}){targets}"


@dataclass(frozen=True)
class SharedFrames:
    """Frames that student and teacher both make of clips; they differ by one at most, see `align_frames`.

    Args:
        student: what the student hears.
        teacher: what the teacher hears.
    """

    student: EncoderInputs
    teacher: EncoderInputs

    def __call__(self, num_samples: Tensor) -> Tensor:
        """Lengths in samples, (clips,), int64, to frames of the same shape."""
        return torch.minimum(self.student.num_frames(num_samples), self.teacher.num_frames(num_samples))

    def align(self, ours: Tensor, theirs: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States of both, (batch, layers, frames, dim), over the frames that they share; see `align_frames`."""
        frames = (self.student.num_frames(num_samples), self.teacher.num_frames(num_samples))
        return align_frames(ours, theirs, *frames, num_samples)


def loss_terms(
    model: CompactStudent,
    teacher: PreTrainedModel | None,
    batch: Batch,
    *,
    frames: SharedFrames,
    layers: Sequence[int],
    weights: LossConfig,
    teacher_dropout: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed objective of a batch over frames and layers, and its terms.

    Args:
        model: the student.
        teacher: an encoder of the student's kind: both hear the same input. None where the batch has its states.
        batch: of `collate_clips`, with `masked` for colld.
        frames: of both.
        layers: of the teacher, from 1, one for each head.
        weights: the objective.
        teacher_dropout: see `teacher_targets`.

    Returns:
        0-dim, float32; the terms `l1` or `l2` and `cosine`, or `info_nce`.

    Raises:
        ValueError: a clip is too short or too long, or the models make different numbers of frames.
    """
    num_samples = torch.tensor(batch["num_samples"])  # on the CPU, where the checks of lengths wait for no device
    inputs = model.inputs(pcm16_to_float(batch["waveforms"]), num_samples)
    targets = live_or_stored(teacher, inputs, batch, layers, teacher_dropout)
    predictions, targets, inside = frames.align(model(inputs, batch.get("masked")), targets, num_samples)
    if weights.method == "colld":
        if weights.normalize_targets:
            targets = normalize_frames(targets)
        loss = masked_info_nce(
            predictions,
            targets,
            batch["masked"],
            reduction="sum",
            num_negatives=weights.num_negatives,
            temperature=weights.temperature,
        )
        return loss, {"info_nce": loss.detach()}
    distance, cosine = distilhubert_terms(
        predictions,
        targets,
        inside,
        reduction="sum",
        distance=weights.distance,
        cosine_weight=weights.cosine,
        form=weights.cosine_form,
        normalize_targets=weights.normalize_targets,
    )
    return distance + cosine, {weights.distance: distance.detach(), "cosine": cosine.detach()}


def live_or_stored(
    teacher: PreTrainedModel | None, inputs: dict[str, Tensor], batch: Batch, layers: Sequence[int], dropout: bool
) -> Tensor:
    """The teacher's layers, (batch, layers, frames, width), from the batch where there is no teacher."""
    if teacher is None:
        return batch["states"]
    with torch.autocast(batch["waveforms"].device.type, enabled=False):  # its dtype is its own, as in the paper's code
        return teacher_targets(teacher, inputs, layers, dropout=dropout)


def count_items(batch: Batch, *, num_frames: Callable[[Tensor], Tensor], num_layers: int) -> Tensor:
    """Frames that the objective adds up, times layers; 0-dim, int64.

    Args:
        batch: of `collate_clips`.
        num_frames: lengths in samples to frames.
        num_layers: target layers.
    """
    if "masked" in batch:
        return contrastable(batch["masked"]).sum() * num_layers
    return num_frames(torch.tensor(batch["num_samples"])).sum() * num_layers
