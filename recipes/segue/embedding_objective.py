"""The objective of SEGUE: the vector of a clip comes near the sentence teacher's vector of what is said in it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechkd.data.audio import pcm16_to_float
from speechkd.losses.contract import check_temperature
from speechkd.models.segue import Objective, embedding_loss
from speechkd.teachers_text import SentenceTeacher
from speechkd.trainer import Batch


@dataclass(kw_only=True)
class LossConfig:
    """What pulls the vectors together.

    Args:
        objective: mse, as in the paper, is the mean over the width of the squared difference. cosine looks at the
            direction alone. info_nce finds the right vector among those of the batch; it wants many different texts in
            a batch, and under several processes sees those of its own.
        temperature: of info_nce.
    """

    objective: Objective = "mse"
    temperature: float = 0.05

    def __post_init__(self) -> None:
        check_temperature(self.temperature, "loss.temperature")

    def describe(self) -> str:
        """The objective in a few words, for the model card."""
        return f"info_nce(T={self.temperature:g})" if self.objective == "info_nce" else self.objective


def loss_terms(
    model: nn.Module, teacher: SentenceTeacher | None, batch: Batch, *, weights: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed objective of a batch, and for the log the cosines of each clip's vector with the teacher's.

    Their mean follows how well the encoder serves later tasks, for every objective; the paper chose mse because its
    loss does so too.

    Args:
        model: the student.
        teacher: None where the batch carries its vectors.
        batch: of `collate_sentences`.
        weights: the objective.
    """
    num_samples = torch.tensor(batch["num_samples"])  # on the CPU, where the checks of lengths wait for no device
    if "states" in batch:
        student = model(num_samples=num_samples, states=batch["states"])
    else:
        student = model(pcm16_to_float(batch["waveforms"]), num_samples)
    if "embeddings" in batch:
        targets = batch["embeddings"]
    elif teacher is not None:
        targets = teacher(batch["texts"])
    else:
        raise ValueError("the batch carries no vectors of the teacher and there is no teacher; give one of them")
    loss = embedding_loss(student, targets, weights.objective, weights.temperature)
    cosine = F.cosine_similarity(student.detach().float(), targets.float(), dim=-1).sum()
    return loss, {weights.objective: loss.detach(), "positive_cosine": cosine}


def count_items(batch: Batch) -> Tensor:
    """Clips of a batch, 0-dim, int64."""
    return torch.tensor(len(batch["ids"]))
