"""Taking units out of a speech encoder for good: masks of its units become a smaller model."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from speechkd.models.pruned_encoder import (
    EncoderParts,
    PrunedEncoderConfig,
    PrunedEncoderModel,
    encoder_parts,
    mark_initialized,
)

HEAD_PARTS = ("q_proj", "k_proj", "v_proj", "out_proj", "gru_rel_pos_const", "gru_rel_pos_linear")


@dataclass(frozen=True)
class EncoderMasks:
    """Factors of the units of an encoder, 0 for those to remove, as evaluation uses them.

    Args:
        conv: for each convolution, (channels,).
        heads: for each layer, (heads,).
        ffn_units: for each layer, (units,).
        attention: whole attention branches, (layers,).
        ffn: whole feed-forward branches, (layers,).
    """

    conv: list[Tensor]
    heads: list[Tensor]
    ffn_units: list[Tensor]
    attention: Tensor
    ffn: Tensor


def prune_encoder(encoder: PreTrainedModel, masks: EncoderMasks) -> PrunedEncoderModel:
    """A model without the units whose factor is 0; the other factors go into the map that reads the unit.

    DPHuBERT's code. It equals the encoder with its units scaled, but where channels of a convolution go before a
    layer normalisation over all of them: the last one in most encoders, every one with `feat_extract_norm="layer"`.
    There the second step of training repairs the difference.

    Args:
        encoder: stays as it is; the new model shares no weights with it. Layer drop and SpecAugment are off in the
            new one.
        masks: factors of its units.

    Returns:
        In eval mode, in the dtype and on the device of the encoder.

    Raises:
        ValueError: the encoder or the masks do not fit, or a convolution would lose all channels.
    """
    parts = encoder_parts(encoder)
    modules: Any = encoder.get_submodule
    _check_masks(modules, parts, masks)
    state = {key: weight.detach() for key, weight in encoder.state_dict().items() if key != "masked_spec_embed"}
    channels = [mask.nonzero().flatten() for mask in masks.conv]
    readers = [*parts.convs[1:], parts.reader]
    for index, (conv, norm, kept) in enumerate(zip(parts.convs, parts.conv_norms, channels, strict=True)):
        factors = masks.conv[index][kept]
        _take_rows(state, conv, kept)
        if norm is not None:
            _take_rows(state, norm, kept)
        if index == len(channels) - 1 and parts.conv_scale is not None:
            state[f"{parts.conv_scale}.scale"] = factors.to(state[f"{conv}.weight"])
            factors = torch.ones_like(factors)
        _take_columns(state, readers[index], kept, factors)
    if parts.reader_norm is not None:
        _take_rows(state, parts.reader_norm, channels[-1])

    heads: list[list[int]] = []
    for attention, mask, branch in zip(parts.attentions, masks.heads, masks.attention, strict=True):
        kept = (mask * branch).nonzero().flatten()
        heads.append(kept.tolist())
        if not len(kept):
            _drop(state, [f"{attention}.{name}" for name in HEAD_PARTS])
            continue
        head_dim = modules(attention).head_dim
        units = (kept[:, None] * head_dim + torch.arange(head_dim, device=kept.device)).flatten()
        for name in ("q_proj", "k_proj", "v_proj"):
            _take_rows(state, f"{attention}.{name}", units)
        _take_columns(state, f"{attention}.out_proj", units, mask[kept].repeat_interleave(head_dim), branch)
        if f"{attention}.gru_rel_pos_const" in state:
            state[f"{attention}.gru_rel_pos_const"] = state[f"{attention}.gru_rel_pos_const"][:, kept]
    ffn_units: list[int] = []
    for first, second, mask, branch in zip(parts.ffn_ins, parts.ffn_outs, masks.ffn_units, masks.ffn, strict=True):
        kept = (mask * branch).nonzero().flatten()
        ffn_units.append(len(kept))
        if not len(kept):
            _drop(state, [first, second])
            continue
        _take_rows(state, first, kept)
        _take_columns(state, second, kept, mask[kept], branch)

    config = PrunedEncoderConfig(
        encoder_config=_plain_config(encoder.config),
        conv_channels=[len(kept) for kept in channels],
        heads=heads,
        ffn_units=ffn_units,
    )
    with torch.device("meta"):  # all weights are assigned
        model = PrunedEncoderModel(config)
    model.encoder.load_state_dict({key: weight.clone() for key, weight in state.items()}, assign=True)
    return mark_initialized(model).eval()


def _plain_config(config: PreTrainedConfig) -> dict[str, Any]:
    """The configuration without what acts at random on whole layers or frames, and without the vector for that."""
    plain = copy.deepcopy(config).to_dict()
    plain.pop("architectures", None)
    without: dict[str, float] = {"layerdrop": 0.0, "encoder_layerdrop": 0.0, "mask_time_prob": 0.0}
    return plain | {key: value for key, value in (without | {"mask_feature_prob": 0.0}).items() if key in plain}


def _check_masks(modules: Any, parts: EncoderParts, masks: EncoderMasks) -> None:
    expected = {
        "conv": [modules(name).out_channels for name in parts.convs],
        "heads": [modules(name).num_heads for name in parts.attentions],
        "ffn_units": [modules(name).out_features for name in parts.ffn_ins],
        "attention": [1] * len(parts.attentions),
        "ffn": [1] * len(parts.attentions),
    }
    for name, sizes in expected.items():
        given = [mask.numel() for mask in getattr(masks, name)]
        if given != sizes:
            raise ValueError(f"masks.{name} has {given} factors, the encoder {sizes} units; give one for each")
    for index, mask in enumerate(masks.conv):
        if not mask.any():
            raise ValueError(
                f"{parts.convs[index]} would lose all of its {len(mask)} channels, and no signal would pass; lower the "
                "target sparsity, or leave 'conv' out of the gates"
            )


def _take_rows(state: dict[str, Tensor], name: str, kept: Tensor) -> None:
    for key in (f"{name}.weight", f"{name}.bias"):
        if key in state:
            state[key] = state[key][kept]


def _take_columns(
    state: dict[str, Tensor], name: str, kept: Tensor, factors: Tensor, branch: Tensor | float = 1.0
) -> None:
    weight = state[f"{name}.weight"]
    factors = factors.view(1, -1, *[1] * (weight.ndim - 2)) * branch
    state[f"{name}.weight"] = (weight[:, kept] * factors).to(weight.dtype)
    if f"{name}.bias" in state:
        state[f"{name}.bias"] = (state[f"{name}.bias"] * branch).to(weight.dtype)


def _drop(state: dict[str, Tensor], names: Sequence[str]) -> None:
    for key in [key for key in state if key.startswith(tuple(names))]:
        del state[key]
