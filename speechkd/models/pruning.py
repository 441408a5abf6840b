"""DPHuBERT: a speech encoder learns which of its parts to lose while it is distilled.

Peng et al. 2023, https://arxiv.org/abs/2305.17651. Step one trains a copy of the teacher with gates on its parts, under
a penalty that holds its expected size to a target; `GatedEncoder.extract` then gives the small model that step two
trains on. Formulas are those of the authors' code where the paper leaves them open.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from speechkd.losses.hidden import hidden_projection
from speechkd.models.encoder_extraction import EncoderMasks, prune_encoder
from speechkd.models.encoder_inputs import encoder_output
from speechkd.models.hard_concrete import HardConcreteGates
from speechkd.models.pruned_encoder import PrunedEncoderModel, SomeHeadsWavLMAttention, encoder_parts, mark_initialized

GateKind = Literal["conv", "heads", "ffn_units", "attention", "ffn"]
DROP_RATES: dict[GateKind, float] = {"conv": 0.01, "heads": 0.01, "ffn_units": 0.5, "attention": 0.01, "ffn": 0.01}
PUBLISHED_GATES: tuple[GateKind, ...] = ("conv", "heads", "ffn_units")


class SparsityPenalty(nn.Module):
    """Lagrangian term that holds an expected sparsity to a target.

    Its two multipliers start at 0 and climb while all else descends: see `parameter_groups`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Parameter(torch.zeros(1))
        self.quadratic = nn.Parameter(torch.zeros(1))

    def forward(self, sparsity: Tensor, target: float) -> Tensor:
        """linear * (sparsity - target) + quadratic * (sparsity - target)^2; 0-dim, float32.

        The linear one falls below 0 while the sparsity is below the target; the other can only grow.

        Args:
            sparsity: expected share of parameters that are gone, 0-dim; see `GatedEncoder.sparsity`.
            target: see `target_sparsity`.
        """
        excess = sparsity.float() - target
        return (self.linear * excess + self.quadratic * excess.square()).sum()


class LayerProjections(nn.Module):
    """Maps of the student's layers to the teacher's, which start as the identity.

    Layer 0 has one of its own, all others share one, as in DPHuBERT's code. Step two goes on with those of step one.

    Args:
        dim: width of the encoder.
        layers: those that are compared, see `layer_states`.

    Raises:
        ValueError: there is no layer.
    """

    def __init__(self, dim: int, layers: Sequence[int] = (0, 4, 8, 12)) -> None:
        super().__init__()
        if not layers:
            raise ValueError("there is no layer to compare; give one or more, such as (0, 4, 8, 12)")
        self.layers = list(layers)
        self.first = hidden_projection(dim, dim, bias=True) if 0 in self.layers else None
        self.shared = hidden_projection(dim, dim, bias=True) if any(self.layers) else None

    def forward(self, states: Tensor) -> Tensor:
        """Mapped states, (batch, layers, frames, dim), of the same shape as `states`.

        Raises:
            ValueError: the layers are not as many as this has.
        """
        if states.ndim != 4 or states.shape[1] != len(self.layers):
            raise ValueError(
                f"states {tuple(states.shape)} do not hold the layers {self.layers}; give (batch, {len(self.layers)}, "
                "frames, dim), for one from layer_states"
            )
        maps: list[Any] = [self.first if layer == 0 else self.shared for layer in self.layers]
        return torch.stack([map_(layer) for map_, layer in zip(maps, states.unbind(dim=1), strict=True)], dim=1)


class GatedEncoder(PreTrainedModel):
    """A speech encoder with gates on its parts, and all that step one of DPHuBERT trains beside it.

    Args:
        encoder: wav2vec 2.0, HuBERT, WavLM, data2vec-audio or the encoder of a Whisper; give a copy of the teacher, for
            it becomes a part of this model. Its layer drop and SpecAugment go off, and the vector of the latter is
            removed.
        gates: "conv" are output channels of the convolutions, after their activation, in Whisper of the first alone;
            "heads" the output of each head; "ffn_units" the inner units of the feed-forward; "attention" and "ffn"
            whole branches.
        projections: maps for the loss between layers, so that they are trained and saved with the student.

    Raises:
        ValueError: another kind of encoder, or no or an unknown kind of gate.
    """

    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = True

    def __init__(
        self,
        encoder: PreTrainedModel,
        gates: Sequence[GateKind] = PUBLISHED_GATES,
        projections: LayerProjections | None = None,
    ) -> None:
        parts = encoder_parts(encoder)
        unknown = [kind for kind in gates if kind not in DROP_RATES]
        if unknown or not gates:
            raise ValueError(f"gates={list(gates)}; choose one or more of {', '.join(DROP_RATES)}")
        super().__init__(encoder.config)
        self.encoder: Any = encoder
        self.main_input_name = encoder.main_input_name
        self.parts = parts
        self.penalty = SparsityPenalty()
        self.projections = projections
        self._switch_off_randomness()
        if encoder.config.model_type == "wavlm":
            self._replace_wavlm_attentions()
        modules: Any = self.encoder.get_submodule
        self.num_units: dict[GateKind, list[int]] = {
            "conv": [modules(name).out_channels for name in parts.convs],
            "heads": [modules(name).num_heads for name in parts.attentions],
            "ffn_units": [modules(name).out_features for name in parts.ffn_ins],
            "attention": [1] * len(parts.attentions),
            "ffn": [1] * len(parts.attentions),
        }
        self.gates: Any = nn.ModuleDict(
            {
                kind: nn.ModuleList(HardConcreteGates(units, DROP_RATES[kind]) for units in self.num_units[kind])
                for kind in gates
            }
        )
        self._fixed_parameters = self._count_fixed()
        self.num_full_parameters = round(float(self._count(self.num_units)))
        self._attach()
        mark_initialized(self)
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the encoder's own; in training mode every call draws new factors, one for the whole batch."""
        return self.encoder(*args, **kwargs)

    def expected_parameters(self) -> Tensor:
        """Expected number of parameters that `extract` would leave; 0-dim, float64, with a graph to the gates.

        Counts of WavLM leave out what belongs to its position bias, as in DPHuBERT's code. The count of the extracted
        model differs by the rounding of each row of gates.
        """
        return self._count({kind: self._sizes(kind) for kind in self.num_units})

    def sparsity(self) -> Tensor:
        """Expected share of `num_full_parameters` that is gone; 0-dim, float32."""
        return (1 - self.expected_parameters() / self.num_full_parameters).float()

    def largest_sparsity(self) -> float:
        """The sparsity with every gate shut but one channel of each convolution: no target can be above it."""
        smallest: dict[GateKind, Any] = {
            kind: [float(kind == "conv") if kind in self.gates else units for units in self.num_units[kind]]
            for kind in self.num_units
        }
        return 1 - float(self._count(smallest)) / self.num_full_parameters

    def masks(self) -> EncoderMasks:
        """Factors of all units, as evaluation uses them; 1 where there are no gates."""
        device = self.encoder.device
        masks: dict[GateKind, list[Tensor]] = {
            kind: [gate.evaluation_mask() for gate in self.gates[kind]]
            if kind in self.gates
            else [torch.ones(units, device=device) for units in self.num_units[kind]]
            for kind in self.num_units
        }
        return EncoderMasks(
            conv=masks["conv"],
            heads=masks["heads"],
            ffn_units=masks["ffn_units"],
            attention=torch.cat(masks["attention"]),
            ffn=torch.cat(masks["ffn"]),
        )

    def extract(self) -> PrunedEncoderModel:
        """The small model; see `prune_encoder`.

        Raises:
            ValueError: a convolution would lose all its channels.
        """
        return prune_encoder(self.encoder, self.masks())

    def _sizes(self, kind: GateKind) -> list[Any]:
        if kind not in self.gates:
            return self.num_units[kind]
        return [gate.expected_size() for gate in self.gates[kind]]

    def _count(self, sizes: Mapping[GateKind, Sequence[Any]]) -> Tensor:
        """Parameters with so many units, as DPHuBERT's code counts them; numbers may be expectations."""
        modules, parts = self.encoder.get_submodule, self.parts
        total = torch.tensor(float(self._fixed_parameters), dtype=torch.float64)
        inputs: Any = modules(parts.convs[0]).in_channels
        for conv, norm, size in zip(parts.convs, parts.conv_norms, sizes["conv"], strict=True):
            outside = _count_bias(modules(conv)) + (2 if norm is not None else 0)
            total = total + inputs * size * math.prod(modules(conv).kernel_size) + outside * size
            inputs = size
        reader = modules(parts.reader).weight
        total = total + inputs * (reader.numel() // reader.shape[1])  # and its bias, which is fixed
        total = total + inputs * ((parts.reader_norm is not None) * 2 + (parts.conv_scale is not None))
        for layer, name in enumerate(parts.attentions):
            attention = modules(name)
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            per_unit = (
                sum(map_.in_features + _count_bias(map_) for map_ in projections) + attention.out_proj.out_features
            )
            bias = _count_bias(attention.out_proj) * attention.out_proj.out_features
            total = total + (sizes["heads"][layer] * attention.head_dim * per_unit + bias) * sizes["attention"][layer]
        for layer, name in enumerate(parts.ffn_outs):
            width = modules(name).out_features
            total = total + (sizes["ffn_units"][layer] * (2 * width + 1) + width) * sizes["ffn"][layer]
        return total

    def _count_fixed(self) -> int:
        """Parameters that no gate touches: position embeddings, normalisations, the bias of the reader."""
        parts = self.parts
        prunable = [*parts.convs, *parts.attentions, *parts.ffn_ins, *parts.ffn_outs, f"{parts.reader}.weight"]
        prunable += [norm for norm in (*parts.conv_norms, parts.reader_norm) if norm is not None]
        return sum(
            weight.numel()
            for key, weight in self.encoder.named_parameters()
            if not any(key == name or key.startswith(f"{name}.") for name in prunable)
        )

    def _attach(self) -> None:
        modules, parts = self.encoder.get_submodule, self.parts
        # the last convolution's channels are scaled before the normalisation that may come first
        last = modules("feature_projection") if parts.conv_scale is not None else modules(parts.reader)
        readers = [*(modules(name) for name in parts.convs[1:]), last]
        for index, gate in enumerate(self.gates["conv"] if "conv" in self.gates else ()):
            channels_first = isinstance(readers[index], nn.Conv1d)
            readers[index].register_forward_pre_hook(partial(_scale_input, gate, 1, channels_first))
        for layer, attention in enumerate(parts.attentions):
            out_proj = modules(f"{attention}.out_proj")
            if "heads" in self.gates:
                head_dim = modules(attention).head_dim
                out_proj.register_forward_pre_hook(partial(_scale_input, self.gates["heads"][layer], head_dim, False))
            if "attention" in self.gates:
                out_proj.register_forward_hook(partial(_scale_output, self.gates["attention"][layer]))
        for layer, name in enumerate(parts.ffn_outs):
            if "ffn_units" in self.gates:
                modules(name).register_forward_pre_hook(partial(_scale_input, self.gates["ffn_units"][layer], 1, False))
            if "ffn" in self.gates:
                modules(name).register_forward_hook(partial(_scale_output, self.gates["ffn"][layer]))

    def _switch_off_randomness(self) -> None:
        config = self.encoder.config
        if config.model_type == "whisper":
            config.encoder_layerdrop = self.encoder.layerdrop = 0.0
            return
        config.layerdrop = config.mask_time_prob = config.mask_feature_prob = 0.0
        if hasattr(self.encoder, "masked_spec_embed"):
            del self.encoder.masked_spec_embed

    def _replace_wavlm_attentions(self) -> None:
        """Attentions whose output map runs as a module, with the same weights."""
        for layer, name in enumerate(self.parts.attentions):
            old = self.encoder.get_submodule(name)
            with torch.device("meta"):
                new = SomeHeadsWavLMAttention(self.encoder.config, range(old.num_heads), layer == 0)
            new.load_state_dict(old.state_dict(), assign=True)
            self.encoder.set_submodule(name, new.train(old.training))


def layer_states(model: PreTrainedModel, layers: Sequence[int], **inputs: Any) -> Tensor:
    """States of an encoder after some of its layers, for the loss between layers of student and teacher.

    Args:
        model: teacher, `GatedEncoder` or `PrunedEncoderModel`.
        layers: 0 is what DPHuBERT compares there: what the convolutions give in the encoder's width, before positions
            are added, so not the first of `hidden_states`. The others are 1 for the first layer's output and so on,
            the last after the norm that some encoders end with, so that it learns too.
        inputs: of the encoder, such as `input_values` and `attention_mask`.

    Returns:
        (batch, layers, frames, dim).

    Raises:
        ValueError: the encoder does not have such a layer.
    """
    encoder: Any = model.encoder if isinstance(model, GatedEncoder | PrunedEncoderModel) else model
    num_layers = len(encoder_parts(encoder).attentions)
    if not layers or not set(layers) <= set(range(num_layers + 1)):
        raise ValueError(f"layers {list(layers)} of an encoder of {num_layers}; choose from 0 to {num_layers}")
    is_whisper = encoder.config.model_type == "whisper"
    first: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if is_whisper:
            first.append(F.gelu(output).transpose(1, 2))
        else:
            first.append(output[0] if isinstance(output, tuple) else output)

    hook = (encoder.conv2 if is_whisper else encoder.feature_projection).register_forward_hook(keep)
    try:
        output = encoder_output(encoder, inputs)
    finally:
        hook.remove()
    states = (first[0], *output.hidden_states[1:-1], output.last_hidden_state)
    return torch.stack([states[layer] for layer in layers], dim=1)


def target_sparsity(num_updates: int, final: float = 0.75, ramp_updates: int = 5000) -> float:
    """The target after so many updates: from 0 in a straight line to the final one, then constant.

    Args:
        num_updates: optimiser steps so far.
        final: share of parameters to remove, 0 or more and below 1.
        ramp_updates: steps until it is reached.

    Raises:
        ValueError: an argument is out of its range.
    """
    if not 0 <= final < 1 or ramp_updates < 1 or num_updates < 0:
        raise ValueError(
            f"num_updates={num_updates}, final={final}, ramp_updates={ramp_updates}; give a final sparsity in [0, 1), "
            "a ramp of 1 update or more and a count from 0"
        )
    return final * min(1.0, num_updates / ramp_updates)


def parameter_groups(
    model: GatedEncoder, learning_rate: float = 2e-4, gate_learning_rate: float = 0.02
) -> list[dict[str, Any]]:
    """Groups for AdamW, none with weight decay: weights and projections, logits of the gates, and multipliers.

    The multipliers maximise, which is the same as the negative learning rate in DPHuBERT's code.

    Args:
        model: what is frozen is left out.
        learning_rate: of weights and projections.
        gate_learning_rate: of gates and multipliers.
    """
    special = {*model.gates.parameters(), *model.penalty.parameters()}
    weights = [weight for weight in model.parameters() if weight.requires_grad and weight not in special]
    return [
        {"params": weights, "lr": learning_rate, "weight_decay": 0.0},
        {"params": list(model.gates.parameters()), "lr": gate_learning_rate, "weight_decay": 0.0},
        {
            "params": list(model.penalty.parameters()),
            "lr": gate_learning_rate,
            "weight_decay": 0.0,
            "maximize": True,
        },
    ]


def _count_bias(module: Any) -> int:
    return int(module.bias is not None)


def _scale_input(
    gate: HardConcreteGates, repeats: int, channels_first: bool, module: nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...]:
    factors = gate().repeat_interleave(repeats).to(args[0].dtype)
    return (args[0] * (factors[:, None] if channels_first else factors), *args[1:])


def _scale_output(gate: HardConcreteGates, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output * gate().to(output.dtype)
