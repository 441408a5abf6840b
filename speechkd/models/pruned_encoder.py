"""Speech encoders whose layers differ in width: what structured pruning leaves, as a model that saves and loads.

DPHuBERT, Peng et al. 2023, https://arxiv.org/abs/2305.17651, prunes channels of the convolutions, heads and
feed-forward units, so that no stock configuration describes the result. `PrunedEncoderModel` runs the stock classes of
wav2vec 2.0, HuBERT, WavLM, data2vec-audio and of Whisper's encoder with narrower maps inside.

This file needs torch and transformers alone: `save_pretrained` puts it beside the weights, and
`AutoModel.from_pretrained(folder, trust_remote_code=True)` runs it where speechkd is not installed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.models.wavlm.modeling_wavlm import WavLMAttention
from transformers.models.whisper.modeling_whisper import WhisperEncoder

PRUNABLE_TYPES = ("wav2vec2", "hubert", "wavlm", "data2vec-audio", "whisper")
Model = TypeVar("Model", bound=nn.Module)
HEAD_PARTS = ("q_proj", "k_proj", "v_proj", "out_proj", "gru_rel_pos_const", "gru_rel_pos_linear")


@dataclass(frozen=True)
class EncoderParts:
    """Names of the modules of an encoder that pruning makes narrower.

    Args:
        convs: convolutions that lose output channels; each feeds the next.
        conv_norms: their normalisations, None where there is none.
        reader: what reads the channels of the last of them.
        reader_norm: the normalisation between the two, None where there is none.
        conv_scale: where the factors of the last channels stand; None where they go into the reader's weights.
        attentions: attention of each layer, with `q_proj`, `k_proj`, `v_proj` and `out_proj`.
        ffn_ins: first map of each layer's feed-forward.
        ffn_outs: second map.
    """

    convs: list[str]
    conv_norms: list[str | None]
    reader: str
    reader_norm: str | None
    conv_scale: str | None
    attentions: list[str]
    ffn_ins: list[str]
    ffn_outs: list[str]


class PrunedEncoderConfig(PreTrainedConfig):
    """Configuration of a pruned encoder.

    Args:
        encoder_config: that of the encoder before pruning, or its dict with a `model_type` of `PRUNABLE_TYPES`.
        conv_channels: output channels of each convolution, for Whisper of the first alone; None keeps all.
        heads: heads that each layer keeps, as numbers from 0; a layer without any has no attention branch.
        ffn_units: feed-forward units of each layer; one with 0 has no feed-forward branch.

    Raises:
        ValueError: the encoder is of another type, or a list does not fit it.
    """

    model_type = "speechkd_pruned_encoder"
    sub_configs_defaults = {"encoder_config": SubConfigSpec(config_class=AutoConfig, model_type="hubert")}

    encoder_config: dict | PreTrainedConfig | None = None
    conv_channels: list[int] | None = None
    heads: list[list[int]] | None = None
    ffn_units: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        encoder: Any = self.encoder_config
        check_type(encoder)
        is_whisper = encoder.model_type == "whisper"
        channels = [encoder.d_model] if is_whisper else list(encoder.conv_dim)
        num_heads = encoder.encoder_attention_heads if is_whisper else encoder.num_attention_heads
        num_units = encoder.encoder_ffn_dim if is_whisper else encoder.intermediate_size
        num_layers = encoder.encoder_layers if is_whisper else encoder.num_hidden_layers
        if self.conv_channels is None:
            self.conv_channels = channels
        if self.heads is None:
            self.heads = [list(range(num_heads)) for _ in range(num_layers)]
        if self.ffn_units is None:
            self.ffn_units = [num_units] * num_layers
        for name, given, expected in (
            ("conv_channels", self.conv_channels, len(channels)),
            ("heads", self.heads, num_layers),
            ("ffn_units", self.ffn_units, num_layers),
        ):
            if len(given) != expected:
                raise ValueError(f"{name} has {len(given)} entries, the {encoder.model_type} encoder needs {expected}")
        for layer, (kept, full) in enumerate(zip(self.conv_channels, channels, strict=True)):
            if not 1 <= kept <= full:
                raise ValueError(
                    f"conv_channels[{layer}]={kept}; the convolution has {full} channels, keep 1 to {full}"
                )
        for layer, kept_heads in enumerate(self.heads):
            if sorted(set(kept_heads) & set(range(num_heads))) != list(kept_heads):
                raise ValueError(f"heads[{layer}]={kept_heads}; give rising numbers from 0 to {num_heads - 1}")
        for layer, kept in enumerate(self.ffn_units):
            if not 0 <= kept <= num_units:
                raise ValueError(f"ffn_units[{layer}]={kept}; the layer has {num_units} units, keep 0 to {num_units}")

    @property
    def num_heads(self) -> list[int]:
        """Heads of each layer."""
        return [len(kept) for kept in self.heads or []]

    @property
    def use_attention(self) -> list[bool]:
        """Whether each layer has an attention branch."""
        return [kept > 0 for kept in self.num_heads]

    @property
    def use_ffn(self) -> list[bool]:
        """Whether each layer has a feed-forward branch."""
        return [kept > 0 for kept in self.ffn_units or []]


class PrunedEncoderModel(PreTrainedModel):
    """An encoder with layers of different widths, run by its stock class.

    Layers that lost a branch still run its normalisations. `encoder` is a HubertModel, WhisperEncoder and so on, for
    code that wants one; only this class can load its weights.

    Args:
        config: widths of the layers.
    """

    config_class = PrunedEncoderConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = True
    _no_split_modules = ["HubertEncoderLayer", "Wav2Vec2EncoderLayer", "WavLMEncoderLayer", "WhisperEncoderLayer"]

    def __init__(self, config: PrunedEncoderConfig) -> None:
        super().__init__(config)
        inner: Any = config.encoder_config
        if inner.model_type == "whisper":
            self.encoder: Any = WhisperEncoder(inner)
        else:
            self.encoder = AutoModel.from_config(inner)
        self.main_input_name = self.encoder.main_input_name
        _narrow(self.encoder, config)
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock encoder: arguments, masks, `output_hidden_states` and output are the same.

        The pruned WavLM gives no attention maps: an entry is None.
        """
        return self.encoder(*args, **kwargs)


class ChannelScale(nn.Module):
    """Factors of the channels of the last convolution, which no later weight can hold: a normalisation comes next.

    The frozen vector of ones in DPHuBERT's code, where pruning leaves the soft masks.

    Args:
        num_channels: length of the vector.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(num_channels))  # loading would make a frozen parameter learn
        self.scale: Tensor

    def forward(self, states: Tensor) -> Tensor:
        """Scaled states, (batch, channels, frames)."""
        return states * self.scale[:, None]


class SkippedAttention(nn.Module):
    """In place of an attention branch that pruning emptied: adds nothing."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Zeros of the shape of `hidden_states`, and no attention maps."""
        return torch.zeros_like(hidden_states), None


class SkippedLinear(nn.Module):
    """In place of the last map of a feed-forward branch that pruning emptied: adds nothing."""

    def forward(self, states: Tensor) -> Tensor:
        """Zeros of the shape of `states`."""
        return torch.zeros_like(states)


class SomeHeadsWavLMAttention(WavLMAttention):
    """WavLM's attention with some of its heads, and with its output map called as a module, so that hooks see it.

    Chen et al. 2022, https://arxiv.org/abs/2110.13900, section III. Each head's share of the input gates the position
    bias that the first layer has for all heads, and hands on.

    Args:
        config: of the WavLM.
        heads: numbers of the heads that are kept.
        has_relative_position_bias: the first layer's attention, which keeps the table even without heads.
    """

    def __init__(self, config: Any, heads: Sequence[int], has_relative_position_bias: bool) -> None:
        super().__init__(
            embed_dim=config.hidden_size,
            num_heads=config.num_attention_heads,
            dropout=config.attention_dropout,
            num_buckets=config.num_buckets,
            max_distance=config.max_bucket_distance,
            has_relative_position_bias=has_relative_position_bias,
        )
        self.heads = list(heads)
        self.gru_rel_pos_const = nn.Parameter(torch.ones(1, len(self.heads), 1, 1))
        if self.heads:
            _narrow_attention(self, len(self.heads) * self.head_dim)
        else:
            for name in HEAD_PARTS:
                delattr(self, name)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        index: int = 0,
        **kwargs: Any,
    ) -> Any:
        """Output (batch, frames, width), None for attention maps, and the bias (batch * all heads, frames, frames).

        Args:
            hidden_states: (batch, frames, width).
            attention_mask: True on real frames, (batch, frames), bool.
            position_bias: what the first layer gave; None in that layer.
            index: number of the layer.
        """
        batch, frames, _ = hidden_states.shape
        if position_bias is None:
            position_bias = self.compute_bias(frames, frames).repeat(batch, 1, 1)
        if not self.heads:
            return torch.zeros_like(hidden_states), None, position_bias
        shares = hidden_states.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)[:, self.heads]
        reset, update = self.gru_rel_pos_linear(shares).unflatten(-1, (2, 4)).sum(dim=-1).sigmoid().unbind(dim=-1)
        gate = reset[..., None] * (update[..., None] * self.gru_rel_pos_const - 1) + 2  # (batch, kept, frames, 1)
        bias = gate * position_bias.unflatten(0, (batch, self.num_heads))[:, self.heads]
        if attention_mask is not None:
            bias = bias.masked_fill(~attention_mask.bool()[:, None, None], -torch.inf)
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype), dropout_p=dropout)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None, position_bias


def check_type(config: Any) -> None:
    """Refuse an encoder that cannot be pruned here.

    Raises:
        ValueError: its type is none of `PRUNABLE_TYPES`.
    """
    if config.model_type not in PRUNABLE_TYPES:
        raise ValueError(
            f"an encoder of type {config.model_type!r} cannot be pruned here; take one of {', '.join(PRUNABLE_TYPES)}"
        )


def encoder_parts(encoder: PreTrainedModel) -> EncoderParts:
    """What can be made narrower in an encoder.

    Of Whisper's two convolutions only the first: the second one's channels are the width of all layers.

    Raises:
        ValueError: it is none of `PRUNABLE_TYPES`, a whole Whisper, or a model with a head.
    """
    config: Any = encoder.config
    check_type(config)
    if config.model_type == "whisper":
        if not isinstance(encoder, WhisperEncoder):
            raise ValueError(
                f"of a Whisper only the encoder can be pruned, got {type(encoder).__name__}; give .encoder"
            )
        layers = [f"layers.{layer}" for layer in range(config.encoder_layers)]
        attention, ffn_in, ffn_out = "self_attn", "fc1", "fc2"
        convs: list[str] = ["conv1"]
        conv_norms: list[str | None] = [None]
        reader, reader_norm, conv_scale = "conv2", None, None
    else:
        layers = [f"encoder.layers.{layer}" for layer in range(config.num_hidden_layers)]
        attention, ffn_in, ffn_out = "attention", "feed_forward.intermediate_dense", "feed_forward.output_dense"
        if not hasattr(encoder, "feature_extractor"):
            raise ValueError(f"{type(encoder).__name__} has a head around its encoder; give .base_model")
        stack: Any = encoder.get_submodule("feature_extractor.conv_layers")
        indices = range(len(config.conv_dim))
        convs = [f"feature_extractor.conv_layers.{index}.conv" for index in indices]
        conv_norms = [
            f"feature_extractor.conv_layers.{index}.layer_norm" if hasattr(stack[index], "layer_norm") else None
            for index in indices
        ]
        has_norm = hasattr(encoder.get_submodule("feature_projection"), "layer_norm")
        reader, reader_norm = "feature_projection.projection", "feature_projection.layer_norm" if has_norm else None
        conv_scale = f"feature_extractor.conv_layers.{len(convs)}"
    return EncoderParts(
        convs=convs,
        conv_norms=conv_norms,
        reader=reader,
        reader_norm=reader_norm,
        conv_scale=conv_scale,
        attentions=[f"{layer}.{attention}" for layer in layers],
        ffn_ins=[f"{layer}.{ffn_in}" for layer in layers],
        ffn_outs=[f"{layer}.{ffn_out}" for layer in layers],
    )


def mark_initialized(model: Model) -> Model:
    """Say that all modules have their weights: a PreTrainedModel put around them would draw new ones at random."""
    modules: Any = model.modules()
    for module in modules:
        module._is_hf_initialized = True
    return model


def _narrow(encoder: Any, config: PrunedEncoderConfig) -> None:
    """Replace the modules of a stock encoder by narrower ones with weights of their own."""
    parts = encoder_parts(encoder)
    convs, heads, ffn_units = config.conv_channels or [], config.heads or [], config.ffn_units or []
    inputs = [encoder.get_submodule(parts.convs[0]).in_channels, *convs]
    for index, (conv, norm) in enumerate(zip(parts.convs, parts.conv_norms, strict=True)):
        encoder.set_submodule(conv, _conv_like(encoder.get_submodule(conv), inputs[index], convs[index]))
        if norm is not None:
            encoder.set_submodule(norm, _norm_like(encoder.get_submodule(norm), convs[index]))
    reader = encoder.get_submodule(parts.reader)
    if parts.reader_norm is not None:
        encoder.set_submodule(parts.reader_norm, _norm_like(encoder.get_submodule(parts.reader_norm), convs[-1]))
    if parts.conv_scale is None:
        encoder.set_submodule(parts.reader, _conv_like(reader, convs[-1], reader.out_channels))
    else:
        encoder.set_submodule(parts.reader, nn.Linear(convs[-1], reader.out_features))
        encoder.feature_extractor.conv_layers.append(ChannelScale(convs[-1]))

    for layer, name in enumerate(parts.attentions):
        attention = encoder.get_submodule(name)
        if encoder.config.model_type == "wavlm":
            encoder.set_submodule(name, SomeHeadsWavLMAttention(encoder.config, heads[layer], layer == 0))
        elif heads[layer]:
            _narrow_attention(attention, len(heads[layer]) * attention.head_dim)
            attention.num_heads = len(heads[layer])
        else:
            encoder.set_submodule(name, SkippedAttention())
    for layer, (first, second) in enumerate(zip(parts.ffn_ins, parts.ffn_outs, strict=True)):
        width, units = encoder.get_submodule(first).in_features, ffn_units[layer]
        encoder.set_submodule(first, nn.Linear(width, units) if units else nn.Identity())
        encoder.set_submodule(second, nn.Linear(units, width) if units else SkippedLinear())


def _narrow_attention(attention: Any, units: int) -> None:
    for name in ("q_proj", "k_proj", "v_proj"):
        has_bias = getattr(attention, name).bias is not None
        setattr(attention, name, nn.Linear(attention.embed_dim, units, bias=has_bias))
    attention.out_proj = nn.Linear(units, attention.embed_dim, bias=attention.out_proj.bias is not None)


def _conv_like(conv: Any, num_inputs: int, num_outputs: int) -> nn.Conv1d:
    return nn.Conv1d(num_inputs, num_outputs, conv.kernel_size, conv.stride, conv.padding, bias=conv.bias is not None)


def _norm_like(norm: Any, num_channels: int) -> nn.Module:
    if isinstance(norm, nn.GroupNorm):  # one group a channel
        return nn.GroupNorm(num_channels, num_channels, eps=norm.eps)
    return nn.LayerNorm(num_channels, eps=norm.eps)


PrunedEncoderConfig.register_for_auto_class()
PrunedEncoderModel.register_for_auto_class("AutoModel")
if PrunedEncoderConfig.model_type not in CONFIG_MAPPING:  # a copy beside weights leaves speechkd's classes in place
    AutoConfig.register(PrunedEncoderConfig.model_type, PrunedEncoderConfig)
    AutoModel.register(PrunedEncoderConfig, PrunedEncoderModel)
