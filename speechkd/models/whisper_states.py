"""Whisper's encoder on clips of any length up to its window: the stock forward pass takes its full window alone.

The positions are a fixed table, so a shorter input has the first of them. Silence up to 30 s is what Whisper was
trained on: states of a cut clip differ a little from those of the padded one.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput


def whisper_output(encoder: Any, input_features: Tensor) -> BaseModelOutput:
    """What the stock encoder gives with `output_hidden_states`, and the same at its full window.

    Modes, hooks and gradient checkpointing of the encoder act as in its own forward pass. Where layer drop skips a
    layer, its state is that of the layer before.

    Args:
        encoder: WhisperEncoder, or the inside of a `PrunedEncoderModel` that was one.
        input_features: (batch, mels, frames), an even number of frames, at most two for each position.

    Returns:
        `last_hidden_state`, (batch, frames / 2, width), and `hidden_states`: what the first layer hears, then the
        output of each, the last after the encoder's norm.
    """
    states = [embed_features(encoder, input_features)]
    states += run_layers(encoder.layers, states[0], layerdrop=encoder.layerdrop if encoder.training else 0.0)
    last = encoder.layer_norm(states[-1])
    return BaseModelOutput(last_hidden_state=last, hidden_states=(*states[:-1], last))


def embed_features(encoder: Any, input_features: Tensor, outside: Tensor | None = None) -> Tensor:
    """What the first layer hears: convolutions and positions, (batch, positions, width).

    Args:
        encoder: see `whisper_output`.
        input_features: (batch, mels, frames).
        outside: True on positions that are zero before each convolution, as the edge of a clip is when it is alone,
            (batch, positions), bool; None for none.
    """
    edge = None if outside is None else outside.repeat_interleave(2, dim=1)[:, None]
    states = F.gelu(encoder.conv1(_zeroed(input_features, edge)))
    states = F.gelu(encoder.conv2(_zeroed(states, edge))).transpose(1, 2)
    states = states + encoder.embed_positions.weight[: states.shape[1]]
    return F.dropout(states, p=encoder.dropout, training=encoder.training)


def run_layers(
    layers: Iterable[nn.Module], states: Tensor, *, mask: Tensor | None = None, layerdrop: float = 0.0, **options: Any
) -> Iterator[Tensor]:
    """The state after each of these layers, (batch, frames, width), as the encoder's own forward pass runs them.

    Args:
        layers: of any encoder.
        states: what the first of them hears.
        mask: attention mask as the layers want it.
        layerdrop: share of layers in training mode that are skipped.
        options: further arguments of a layer.
    """
    for layer in layers:
        if not (layer.training and layerdrop > 0 and torch.rand(()) < layerdrop):
            output = layer(states, attention_mask=mask, **options)
            states = output[0] if isinstance(output, tuple) else output  # WavLM's also holds the position bias
        yield states


def _zeroed(values: Tensor, edge: Tensor | None) -> Tensor:
    return values if edge is None else values.masked_fill(edge, 0.0)
