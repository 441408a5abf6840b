"""Compact speech encoders: the students of DistilHuBERT and CoLLD, of any Hugging Face speech encoder.

DistilHuBERT, Chang et al. 2022, https://arxiv.org/abs/2110.01900: heads on a student of two layers predict layers of
the teacher. CoLLD, Chang et al. 2024, https://arxiv.org/abs/2309.07707: each layer of a student that hears spans masked
is compared with one of the teacher. Both are a `CompactStudent`, with other heads; what is left of it is its encoder,
which stock transformers loads. The losses are in `speechkd.losses.layerwise`.

An encoder here is a HubertModel, Wav2Vec2Model, WavLMModel, Data2VecAudioModel, Wav2Vec2BertModel or WhisperEncoder.
"""

import copy
import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from speechkd.losses.layers import stack_layers
from speechkd.losses.layerwise import LayerProjections, PredictionHeads
from speechkd.models.encoder_inputs import EncoderInputs, as_dtype, encoder_layers, encoder_output
from speechkd.models.speech_encoders import save_encoder
from speechkd.models.thinner_encoder import fitted_weights, set_widths


def compact_encoder(
    teacher: PreTrainedModel,
    num_layers: int,
    *,
    init: Literal["teacher", "random"] = "teacher",
    conv_dim: int | Sequence[int] | None = None,
    intermediate_size: int | None = None,
) -> PreTrainedModel:
    """An encoder of the teacher's class with fewer layers, in float32; no layer is ever dropped, nothing masked.

    For a HuBERT as in DistilHuBERT's code: there is no LayerNorm before the projection, and the encoder's LayerNorm
    starts at weight 1 and bias 0. From the teacher come the convolutions, the projection, the positional convolution
    and the first layers. The other classes always have the norm before the projection, and what their layers hear is
    what the teacher's hear: all that a student has comes from the teacher, norms too.

    Args:
        teacher: any encoder; it is not changed.
        num_layers: layers of the student, 1 to the teacher's.
        init: "random" starts as the class does, with N(0, 0.02) in the layers' linear maps, but for the positional
            convolution of HuBERT, wav2vec 2.0 and WavLM: N(0, sqrt(4 / (kernel * width))), as in the paper's code.
        conv_dim: channels of the convolutions over the waveform, one number for all or one for each; None keeps the
            teacher's. Of fewer, those that weigh most are taken; see `fitted_weights`.
        intermediate_size: feed-forward units of each layer, more or fewer than the teacher's; None keeps them.

    Raises:
        ValueError: no such encoder, more layers than the teacher has, or widths that it cannot have.
    """
    num_teacher_layers = len(encoder_layers(teacher))
    if not 1 <= num_layers <= num_teacher_layers:
        raise ValueError(
            f"num_layers={num_layers}, but the teacher has {num_teacher_layers} layers; choose 1 to "
            f"{num_teacher_layers} for a student"
        )
    if init not in ("teacher", "random"):
        raise ValueError(f"init must be teacher or random, got {init!r}")
    config: Any = copy.deepcopy(teacher.config)
    config.num_hidden_layers = num_layers
    set_widths(config, conv_dim, intermediate_size)
    config.mask_time_prob = config.mask_feature_prob = 0.0
    config.apply_spec_augment = False
    if config.model_type == "whisper":
        config.encoder_layerdrop = 0.0
    else:
        config.layerdrop = 0.0
    fresh: tuple[str, ...] = ()
    if config.model_type == "hubert":
        config.feat_proj_layer_norm = False
        fresh = ("encoder.layer_norm.weight", "encoder.layer_norm.bias")
    student = type(teacher)(config)
    if init == "teacher":
        taken = student.state_dict().keys() - set(fresh)
        is_resized = conv_dim is not None or intermediate_size is not None
        weights = fitted_weights(teacher, student) if is_resized else teacher.state_dict()
        weights = {key: value for key, value in weights.items() if key in taken}
        student.load_state_dict(weights, strict=not fresh)
    elif config.model_type in ("hubert", "wav2vec2", "wavlm"):
        _start_positions(student)
    return student


@torch.no_grad()
def _start_positions(student: Any) -> None:
    """The class leaves torch's start in a convolution with weight norm: it fills a weight that is computed anew."""
    convolution = student.encoder.pos_conv_embed.conv
    std = math.sqrt(4 / (convolution.kernel_size[0] * convolution.in_channels))
    if parametrize.is_parametrized(convolution):
        convolution.weight = torch.empty_like(convolution.weight).normal_(std=std)
    else:
        convolution.weight.normal_(std=std)
    convolution.bias.zero_()


def check_target_layers(teacher: PreTrainedModel, layers: Sequence[int]) -> None:
    """Refuse target layers that the teacher does not have; 1 is its first block's output.

    Raises:
        ValueError: there is none, or one outside 1 to the number of layers.
    """
    num_layers = len(encoder_layers(teacher))
    wrong = [layer for layer in layers if not 1 <= layer <= num_layers]
    if wrong or not layers:
        raise ValueError(
            f"target layers {list(layers)}: {wrong or 'an empty list'} cannot be taken from a teacher of {num_layers} "
            f"layers; name some of 1 to {num_layers}"
        )


@torch.no_grad()
def teacher_targets(
    teacher: PreTrainedModel, inputs: dict[str, Tensor], layers: Sequence[int], *, dropout: bool = False
) -> Tensor:
    """Outputs of the teacher's blocks, as in its `hidden_states`, (batch, layers, frames, width), in its own dtype.

    Args:
        teacher: any encoder; it is left in eval mode.
        inputs: of `EncoderInputs`, nothing masked.
        layers: from 1; see `check_target_layers`. DistilHuBERT takes 4, 8 and 12 of HuBERT Base.
        dropout: whether the dropouts inside the blocks are on, for noisy targets; no block is dropped, nothing masked.

    Raises:
        ValueError: the teacher lacks a layer.
    """
    check_target_layers(teacher, layers)
    teacher.eval()
    try:
        encoder_layers(teacher).train(dropout)
        states = encoder_output(teacher, as_dtype(inputs, teacher.dtype)).hidden_states
    finally:
        teacher.eval()
    return stack_layers(states, layers)


class CompactStudent(PreTrainedModel):
    """An encoder with the heads that it is trained under; `save_encoder` leaves them out.

    Args:
        encoder: as `compact_encoder` makes it, or any other; it becomes a part of this model.
        heads: PredictionHeads or LayerProjections.
        feature_grad_mult: factor of the gradient into the convolutions before the projection, 0.1 in DistilHuBERT; 0
            freezes them. For Whisper these are its two convolutions; w2v-BERT has none, and takes 1.
        mask_spans: whether there is a learned vector in place of masked frames, as CoLLD needs it.
        normalize_input: see `EncoderInputs`.
        grid_seconds: see there.

    Raises:
        ValueError: an argument does not fit the encoder.
    """

    main_input_name = "inputs"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = True

    def __init__(
        self,
        encoder: PreTrainedModel,
        heads: PredictionHeads | LayerProjections,
        *,
        feature_grad_mult: float = 1.0,
        mask_spans: bool = False,
        normalize_input: bool,
        grid_seconds: float | None = None,
    ) -> None:
        config = encoder.config
        super().__init__(config)
        self.encoder: Any = encoder
        self.heads = heads
        self.inputs = EncoderInputs(encoder, normalize_input=normalize_input, grid_seconds=grid_seconds)
        self.mask_vector = nn.Parameter(torch.rand(config.hidden_size)) if mask_spans else None
        self.feature_grad_mult = feature_grad_mult
        if not 0 <= feature_grad_mult <= 1:
            raise ValueError(f"feature_grad_mult must be 0 to 1, got {feature_grad_mult}; 1 leaves the gradient")
        if config.model_type == "wav2vec2-bert" and feature_grad_mult != 1:
            raise ValueError(
                f"feature_grad_mult={feature_grad_mult}, but a w2v-BERT has no convolutions before its projection; "
                "set it to 1"
            )
        if feature_grad_mult == 0:
            self._freeze_front_end()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass  # the encoder and the heads come with weights

    def forward(self, inputs: dict[str, Tensor], masked: Tensor | None = None) -> Tensor:
        """Predictions of the teacher's states, (batch, heads, frames, teacher_dim); see `states`."""
        return self.heads(self.states(inputs, masked))

    def states(self, inputs: dict[str, Tensor], masked: Tensor | None = None) -> tuple[Tensor, ...]:
        """What the first layer hears and the output of each, (batch, frames, width), which the heads take.

        Args:
            inputs: of `EncoderInputs`.
            masked: True on the frames to hide, (batch, frames), bool; see `span_mask`. None hides nothing.

        Raises:
            ValueError: there is no vector to put in place of masked frames, or the mask does not fit.
        """
        front, projection = self._front_end()
        vector = self.mask_vector
        with ExitStack() as hooks:  # for this pass alone: the encoder itself stays plain
            if front is not None and 0 < self.feature_grad_mult < 1:
                hooks.callback(front.register_forward_hook(self._scale_gradient).remove)
            if masked is not None:
                if vector is None:
                    raise ValueError("masked frames need a vector in their place, but mask_spans=False; set it to True")
                hide = partial(_hide, masked=masked, vector=vector, is_convolution=projection is front)
                hooks.callback(projection.register_forward_hook(lambda *call: hide(call[-1])).remove)
            output = encoder_output(self.encoder, as_dtype(inputs, self.dtype))
        # the last is taken after the norm that some encoders end with, so that it learns too
        return (*output.hidden_states[:-1], output.last_hidden_state)

    def save_encoder(self, folder: str | Path) -> None:
        """Save what stock transformers loads: `AutoModel` gives the encoder, `AutoFeatureExtractor` makes its input.

        Of a Whisper it is a WhisperModel whose decoder has no layers and one token; the encoder is its `encoder`.

        Args:
            folder: created where it is missing.
        """
        save_encoder(self.encoder, folder, normalize_input=self.inputs.normalize_input)

    def _front_end(self) -> tuple[nn.Module | None, nn.Module]:
        """Where the convolutions end, if there are any, and where the frames begin that are masked."""
        if self.inputs.kind == "whisper":
            return self.encoder.conv2, self.encoder.conv2
        return getattr(self.encoder, "feature_extractor", None), self.encoder.feature_projection

    def _freeze_front_end(self) -> None:
        if self.inputs.kind == "whisper":
            self.encoder.conv1.requires_grad_(False)
            self.encoder.conv2.requires_grad_(False)
        else:
            self.encoder.feature_extractor._freeze_parameters()  # also tells it to keep no graph

    def _scale_gradient(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * self.feature_grad_mult)


def _hide(output: Any, masked: Tensor, vector: Tensor, is_convolution: bool) -> Any:
    """The output of a projection, (batch, frames, width), with the vector in masked frames.

    Or of Whisper's second convolution, (batch, width, frames), before its activation.
    """
    states = output[0] if isinstance(output, tuple) else output
    batch_size, num_frames = len(states), states.shape[-1 if is_convolution else 1]
    if masked.ndim != 2 or len(masked) != batch_size or masked.shape[1] > num_frames or masked.dtype != torch.bool:
        raise ValueError(
            f"masked is {tuple(masked.shape)} of {masked.dtype}; {batch_size} clips of up to {num_frames} frames need "
            f"({batch_size}, {num_frames}), or less for Whisper's silence, of torch.bool"
        )
    masked = F.pad(masked.to(states.device), (0, num_frames - masked.shape[1]))[..., None]
    vector = vector.to(states.dtype)
    if is_convolution:
        masked, vector = masked.transpose(1, 2), vector[:, None]
    states = torch.where(masked, vector, states)
    return (states, *output[1:]) if isinstance(output, tuple) else states
