"""The objective of DPHuBERT: layers of the student against the same layers of the teacher, and the student's size."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from pruned_students import FinalStudent
from torch import Tensor
from transformers import PreTrainedModel

from speechkd.data.audio import pcm16_to_float
from speechkd.losses.hidden import CosineForm
from speechkd.losses.layerwise import Distance, distilhubert_terms
from speechkd.models.encoder_inputs import EncoderInputs, align_frames, as_dtype
from speechkd.models.pruning import GatedEncoder, layer_states, target_sparsity
from speechkd.trainer import Batch


@dataclass(kw_only=True)
class LossConfig:
    """What the student learns of the teacher's layers.

    Args:
        layers: compared in student and teacher: 0 is what the convolutions give, before positions are added, 1 the
            first layer's output and so on.
        distance: l1 or l2, averaged over the width.
        cosine: weight of the cosine term.
        cosine_form: negative as in DPHuBERT, or log_sigmoid as in DistilHuBERT.
    """

    layers: list[int] = field(default_factory=lambda: [0, 4, 8, 12])
    distance: Distance = "l1"
    cosine: float = 1.0
    cosine_form: CosineForm = "negative"

    def __post_init__(self) -> None:
        if not 0 <= self.cosine < math.inf:
            raise ValueError(f"loss.cosine must be 0 or more, got {self.cosine}; 0 leaves the distance alone")
        if not self.layers or sorted(set(self.layers)) != self.layers or self.layers[0] < 0:
            raise ValueError(f"loss.layers={self.layers}; give layers from 0, rising, each once, such as [0, 4, 8, 12]")

    def describe(self) -> str:
        """The objective in a few words, for the model card."""
        cosine = {"log_sigmoid": "-log sigmoid(cos)", "negative": "-cos", "one_minus": "1 - cos"}[self.cosine_form]
        return f"layers {', '.join(map(str, self.layers))}: {self.distance} + {self.cosine:g} ({cosine})"


@dataclass(frozen=True)
class SparsityTarget:
    """The sparsity that the gates are held to.

    Args:
        final: share of parameters to remove in the end.
        ramp_steps: updates until then.
        num_updates: updates so far.
    """

    final: float
    ramp_steps: int
    num_updates: Callable[[], int]

    def __call__(self) -> float:
        """Of the step to come."""
        return target_sparsity(self.num_updates(), self.final, self.ramp_steps)


def loss_terms(
    model: GatedEncoder | FinalStudent,
    teacher: PreTrainedModel,
    batch: Batch,
    *,
    inputs: EncoderInputs,
    weights: LossConfig,
    target: SparsityTarget,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed objective of a batch over frames and layers, and its terms.

    While gates are trained the penalty is added once for each item, so that the mean over the items of a step, however
    many batches and ranks it has, holds it once.

    Args:
        model: the student, with gates in step one.
        teacher: the encoder that the student was made of.
        batch: of `collate_clips`.
        inputs: what both hear of clips.
        weights: the objective.
        target: of the sparsity; not read where there are no gates.

    Returns:
        0-dim, float32; the terms `l1` or `l2` and `cosine`, in training of gates also `penalty`, `sparsity` (expected)
        and `target_sparsity`.

    Raises:
        ValueError: a clip is too short or too long, or the teacher lacks a layer.
    """
    num_samples = torch.tensor(batch["num_samples"])  # on the CPU, where the checks of lengths wait for no device
    heard = inputs(pcm16_to_float(batch["waveforms"]), num_samples)
    with torch.no_grad(), torch.autocast(batch["waveforms"].device.type, enabled=False):
        targets = layer_states(teacher, weights.layers, **as_dtype(heard, teacher.dtype))
    has_gates = isinstance(model, GatedEncoder)
    states = layer_states(model if has_gates else model.encoder, weights.layers, **as_dtype(heard, model.dtype))
    frames = inputs.num_frames(num_samples)
    predictions, targets, inside = align_frames(model.projections(states), targets, frames, frames, num_samples)
    distance, cosine = distilhubert_terms(
        predictions,
        targets,
        inside,
        reduction="sum",
        distance=weights.distance,
        cosine_weight=weights.cosine,
        form=weights.cosine_form,
    )
    loss, terms = distance + cosine, {weights.distance: distance.detach(), "cosine": cosine.detach()}
    if not (has_gates and model.training):
        return loss, terms
    num_items = int(count_items(batch, inputs=inputs, num_layers=len(weights.layers)))
    sparsity, wanted = model.sparsity(), target()
    penalty = num_items * model.penalty(sparsity, wanted)
    terms |= {"penalty": penalty.detach(), "sparsity": num_items * sparsity.detach()}
    return loss + penalty, terms | {"target_sparsity": torch.full_like(terms["sparsity"], num_items * wanted)}


def count_items(batch: Batch, *, inputs: EncoderInputs, num_layers: int) -> Tensor:
    """Frames that the objective adds up, times layers; 0-dim, int64.

    Args:
        batch: of `collate_clips`.
        inputs: what student and teacher hear of clips.
        num_layers: that are compared.
    """
    return inputs.num_frames(torch.tensor(batch["num_samples"])).sum() * num_layers
