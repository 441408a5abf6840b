"""Understanding on top of a speech encoder: one linear head for each label, learnt together with the encoder."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from speechkd.models.segue import SegueEncoder

Kind = Literal["classes", "values"]


class SegueForUnderstanding(PreTrainedModel):
    """A SEGUE encoder and linear heads on its embedding, without an activation or dropout between, as in SEGUE.

    Tan et al. 2023, https://arxiv.org/abs/2305.12301. The dropouts that SEGUE switches off while it distils are on.

    Args:
        encoder: becomes a part of this model, and learns with it but for its frozen layers.
        heads: linear maps of (..., embedding_dim), one a label.

    Raises:
        ValueError: there is no head, or one of another width.
    """

    main_input_name = "waveforms"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = True

    def __init__(self, encoder: SegueEncoder, heads: nn.ModuleList) -> None:
        widths = [head.in_features for head in heads if isinstance(head, nn.Linear)]
        if not widths or len(widths) < len(heads) or set(widths) != {encoder.embedding_dim}:
            raise ValueError(
                f"heads of widths {widths} do not fit embeddings of {encoder.embedding_dim}; give one linear layer for "
                "each label, of the embeddings' width"
            )
        super().__init__(encoder.config)
        self.encoder = encoder
        self.heads = heads
        encoder.set_last_ffn_dropout(True)
        heads.requires_grad_(True)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass  # encoder and heads come with weights

    def forward(
        self, waveforms: Tensor | None = None, num_samples: Tensor | None = None, states: Tensor | None = None
    ) -> list[Tensor]:
        """Outputs of each head, (batch, outputs), float32; arguments are those of `SegueEncoder.forward`."""
        embeddings = self.encoder(waveforms, num_samples, states)
        return [head(embeddings.to(head.weight.dtype)).float() for head in self.heads]


def understanding_loss(outputs: list[Tensor], targets: Tensor, kind: Kind = "classes") -> Tensor:
    """Loss of several heads, summed over heads and items: divide by the items of the whole step.

    Args:
        outputs: of each head, (batch, outputs); for values one head.
        targets: "classes": numbers of the right classes, (batch, heads), int64, for cross entropy. "values": numbers,
            (batch, outputs), for the squared error, its mean over outputs.
        kind: of the targets.

    Returns:
        0-dim, float32.

    Raises:
        ValueError: shapes or dtype do not fit.
    """
    if kind == "values":
        if len(outputs) != 1 or outputs[0].shape != targets.shape:
            raise ValueError(
                f"outputs {[tuple(scores.shape) for scores in outputs]} do not fit values {tuple(targets.shape)}; "
                "values need one head, with an output for each"
            )
        return (outputs[0].float() - targets.float()).square().mean(dim=-1).sum()
    if targets.shape != (len(outputs[0]), len(outputs)) or targets.dtype != torch.int64:
        raise ValueError(
            f"targets {tuple(targets.shape)} of {targets.dtype} do not fit {len(outputs)} heads and "
            f"{len(outputs[0])} items; they must be (items, heads) of torch.int64"
        )
    losses = [F.cross_entropy(scores.float(), targets[:, i], reduction="sum") for i, scores in enumerate(outputs)]
    return torch.stack(losses).sum()
