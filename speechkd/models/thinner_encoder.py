"""Widths of a compact encoder's convolutions and feed-forward layers other than its teacher's, and weights that fit.

Most of what a shallow HuBERT costs is its first convolutions, which run over the longest sequences and hold few of its
parameters. A thinner stack, with what it saves given to the layers, is faster at the same size. Stock classes have a
width for each convolution and one for all layers; for layers that differ there is `speechkd.models.pruned_encoder`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from speechkd.models.encoder_inputs import WAVEFORM_ENCODERS
from speechkd.models.pruned_encoder import encoder_parts


def set_widths(config: Any, conv_dim: int | Sequence[int] | None, intermediate_size: int | None) -> None:
    """Change the widths in a copy of the teacher's configuration.

    Args:
        config: of an encoder; changed in place.
        conv_dim: channels of its convolutions, one number for all or one for each; None keeps them.
        intermediate_size: feed-forward units of each layer, more or fewer than the teacher's; None keeps them.

    Raises:
        ValueError: the encoder has no such convolutions or units, or a width does not fit.
    """
    kind = config.model_type
    if conv_dim is not None:
        if kind not in WAVEFORM_ENCODERS:
            raise ValueError(
                f"conv_dim={conv_dim}, but a {kind} has no convolutions over the waveform to make thinner; leave it "
                f"out, or take a teacher of type {', '.join(WAVEFORM_ENCODERS)}"
            )
        widest = list(config.conv_dim)
        widths = [conv_dim] * len(widest) if isinstance(conv_dim, int) else list(conv_dim)
        if len(widths) != len(widest):
            raise ValueError(
                f"conv_dim={widths} has {len(widths)} widths, but the teacher has {len(widest)} convolutions; give one "
                "number for all, or one for each"
            )
        for index, (width, most) in enumerate(zip(widths, widest, strict=True)):
            if not 1 <= width <= most:
                raise ValueError(
                    f"conv_dim={conv_dim}: convolution {index} would have {width} channels, and the teacher's has "
                    f"{most}; choose 1 to {most}"
                )
        config.conv_dim = widths
    if intermediate_size is not None:
        if kind == "wav2vec2-bert":
            raise ValueError(
                f"intermediate_size={intermediate_size}, but the layers of a w2v-BERT keep their widths here; leave it "
                "out"
            )
        if intermediate_size < 1:
            raise ValueError(f"intermediate_size={intermediate_size}; give 1 unit or more, or leave it out")
        setattr(config, "encoder_ffn_dim" if kind == "whisper" else "intermediate_size", intermediate_size)


@torch.no_grad()
def fitted_weights(teacher: PreTrainedModel, student: PreTrainedModel) -> dict[str, Tensor]:
    """The teacher's weights with the student's widths; equal to the teacher's where these are.

    Channels that go are those that weigh least: the norm of the weights that write a channel, or the gain where a
    normalisation of its own follows, times the norm of those that read it. They go with their bias and normalisation.
    Feed-forward units alike. Units beyond the teacher's read with the student's own weights and write 0 at first, so
    that the layer computes what the teacher's does.

    Args:
        teacher: stays as it is.
        student: of the same class, of `set_widths`, with as many layers as the teacher or fewer.

    Returns:
        A state dict with all names of the teacher; entries of layers that the student lacks have the teacher's widths.
    """
    parts = encoder_parts(teacher)
    weights, ours = dict(teacher.state_dict()), student.state_dict()
    readers = [*parts.convs[1:], parts.reader]
    norms_before_readers = [*[None] * (len(parts.convs) - 1), parts.reader_norm]
    kept = [
        _largest(
            _written(teacher, weights, conv, norm) * _read(weights, reader, reader_norm), len(ours[f"{conv}.weight"])
        )
        for conv, norm, reader, reader_norm in zip(
            parts.convs, parts.conv_norms, readers, norms_before_readers, strict=True
        )
    ]
    for conv, norm, reader, channels in zip(parts.convs, parts.conv_norms, readers, kept, strict=True):
        _take(weights, [conv, norm], reader, channels)
    if parts.reader_norm is not None:
        _take(weights, [parts.reader_norm], None, kept[-1])
    for first, second in zip(parts.ffn_ins, parts.ffn_outs, strict=True):
        if f"{first}.weight" not in ours:
            continue  # a layer that the student lacks
        num_teacher_units, num_units = len(weights[f"{first}.weight"]), len(ours[f"{first}.weight"])
        if num_units <= num_teacher_units:
            importance = _written(teacher, weights, first, None) * _read(weights, second, None)
            _take(weights, [first], second, _largest(importance, num_units))
            continue
        for key in (f"{first}.weight", f"{first}.bias"):
            weights[key] = torch.cat([weights[key], ours[key][num_teacher_units:].to(weights[key].device)])
        written = weights[f"{second}.weight"]
        weights[f"{second}.weight"] = torch.cat(
            [written, written.new_zeros(len(written), num_units - num_teacher_units)], dim=1
        )
    return weights


def _written(teacher: PreTrainedModel, weights: dict[str, Tensor], name: str, norm: str | None) -> Tensor:
    """How large each unit that a map writes is, (units,), float32."""
    norms = weights[f"{name}.weight"].float().flatten(1).norm(dim=1)
    if norm is None:
        return norms
    gains = weights[f"{norm}.weight"].float().abs()
    # one group a channel: the size of its weights is divided out
    return gains if isinstance(teacher.get_submodule(norm), nn.GroupNorm) else norms * gains


def _read(weights: dict[str, Tensor], name: str, norm: str | None) -> Tensor:
    """How much a map takes of each unit, behind the normalisation between, (units,), float32."""
    taken = weights[f"{name}.weight"].float().transpose(0, 1).flatten(1).norm(dim=1)
    return taken if norm is None else taken * weights[f"{norm}.weight"].float().abs()


def _largest(importance: Tensor, number: int) -> Tensor:
    return importance.topk(number).indices.sort().values


def _take(weights: dict[str, Tensor], writers: Sequence[str | None], reader: str | None, units: Tensor) -> None:
    """Leave only some units of what writes them, weights and biases, and of the columns of what reads them."""
    for name in writers:
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in weights:
                weights[key] = weights[key][units]
    if reader is not None:
        weights[f"{reader}.weight"] = weights[f"{reader}.weight"][:, units]
