"""Small speech recognisers out of torchaudio's models: Conformer or Emformer, with CTC or a transducer behind it.

Conformer, Gulati et al. 2020, https://arxiv.org/abs/2005.08100; Emformer, Shi et al. 2020,
https://arxiv.org/abs/2010.10759. What stands behind a clip's end changes nothing: it is masked before each convolution
and in attention, and no norm looks at other frames or clips.

    config = RecognizerConfig(num_symbols=28, **BUDGETS["tiny"])
    model, inputs = RecognizerModel(config), RecognizerInputs(config.num_mels)
    states, num_frames = model(*inputs(waveforms, num_samples))
    loss = model.loss(states[-1], num_frames, targets)
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from speechkd.data.features import HOP_LENGTH_SAMPLES, SAMPLE_RATE_HZ, KaldiFbank, kaldi_num_frames, padding_mask
from speechkd.models.ctc_head import ctc_loss
from speechkd.models.transducer import Joiner, Predictor, transducer_loss

EncoderKind = Literal["conformer", "emformer"]
HeadKind = Literal["ctc", "transducer"]
FEATURES_HZ = SAMPLE_RATE_HZ / HOP_LENGTH_SAMPLES
LOG_MEL_CENTRE, LOG_MEL_SCALE = -6.0, 4.0  # of speech in [-1, 1], as in features_store

# Widths for a number of parameters: tiny for hours of speech and two cores; the others as large as the Zipformers of
# those names, 23 M and 65 M
BUDGETS: dict[str, dict[str, int]] = {
    "tiny": {"width": 144, "num_layers": 4, "num_heads": 4, "ffn_width": 576, "kernel_size": 15},
    "small": {"width": 256, "num_layers": 15, "num_heads": 4, "ffn_width": 1024, "kernel_size": 31},
    "medium": {"width": 448, "num_layers": 14, "num_heads": 8, "ffn_width": 1792, "kernel_size": 31},
    # that of the paper's Conformer
    "paper": {"width": 512, "num_layers": 12, "num_heads": 8, "ffn_width": 2048, "kernel_size": 31},
}


class RecognizerConfig(PreTrainedConfig):
    """Configuration of a recogniser.

    Args:
        num_symbols: of the alphabet, without the blank.
        encoder: conformer hears whole clips, emformer segments of them with what was before and a little after.
        head: ctc, or a transducer.
        num_mels: filters of the log-mel input.
        subsampling: 100 frames a second become this many times fewer, 2 or 4.
        width: of the encoder's states.
        num_layers: its depth.
        num_heads: of attention.
        ffn_width: units of the feed-forward layers.
        kernel_size: frames of a Conformer's convolutions, odd.
        segment_frames: frames that an Emformer computes at once, after subsampling.
        left_context_frames: before the segment.
        right_context_frames: after it: its latency.
        joint_width: of a transducer's predictor and joiner.
        dropout: in the encoder.

    Raises:
        ValueError: a size does not fit.
    """

    model_type = "speechkd_recognizer"

    num_symbols: int = 28
    encoder: str = "conformer"
    head: str = "ctc"
    num_mels: int = 80
    subsampling: int = 4
    width: int = 144
    num_layers: int = 4
    num_heads: int = 4
    ffn_width: int = 576
    kernel_size: int = 15
    segment_frames: int = 16
    left_context_frames: int = 32
    right_context_frames: int = 4
    joint_width: int = 256
    dropout: float = 0.1

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.encoder not in get_args(EncoderKind) or self.head not in get_args(HeadKind):
            raise ValueError(
                f"encoder must be conformer or emformer and head ctc or transducer, got {self.encoder!r} and "
                f"{self.head!r}"
            )
        if self.subsampling not in (2, 4):
            raise ValueError(f"subsampling must be 2 or 4, got {self.subsampling}; 4 gives 25 frames a second")
        for name in ("num_symbols", "width", "num_layers", "num_heads", "ffn_width", "segment_frames", "joint_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.width % self.num_heads or self.kernel_size % 2 == 0:
            raise ValueError(
                f"width={self.width} must be a multiple of num_heads={self.num_heads}, and kernel_size="
                f"{self.kernel_size} odd"
            )

    @property
    def frame_rate_hz(self) -> float:
        """States a second."""
        return FEATURES_HZ / self.subsampling

    def num_frames(self, num_samples: Tensor) -> Tensor:
        """States of clips with these lengths at 16 kHz, same shape, int64."""
        return (kaldi_num_frames(num_samples) + self.subsampling - 1) // self.subsampling


class RecognizerInputs(nn.Module):
    """Log-mel filter banks, in float32 on the device of the waveforms, about 0 and 1 wide.

    Args:
        num_mels: number of filters.
    """

    def __init__(self, num_mels: int = 80) -> None:
        super().__init__()
        self.fbank = KaldiFbank(num_mels)

    def forward(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        """Features (batch, frames, mels), float32, 0 on padding, and frames of each clip, (batch,), int64.

        Arguments and errors are those of `KaldiFbank.forward`.
        """
        log_mel, num_frames = self.fbank(waveforms, num_samples)
        scaled = (log_mel - LOG_MEL_CENTRE) / LOG_MEL_SCALE
        return _cleared(scaled, num_frames), num_frames


class RecognizerModel(PreTrainedModel):
    """A recogniser; `RecognizerInputs` makes its input.

    Args:
        config: its sizes.
    """

    config_class = RecognizerConfig
    base_model_prefix = "recognizer"
    main_input_name = "features"
    config: RecognizerConfig

    def __init__(self, config: RecognizerConfig) -> None:
        super().__init__(config)
        self.subsampling = _Subsampling(config)
        self.encoder: Any = (_Conformer if config.encoder == "conformer" else _Emformer)(config)
        num_classes = config.num_symbols + 1
        if config.head == "ctc":
            self.output = nn.Linear(config.width, num_classes)
        else:
            self.source = nn.Linear(config.width, config.joint_width)
            self.predictor = Predictor(num_classes, config.joint_width)
            self.joiner = Joiner(config.joint_width, num_classes)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass  # torch's and torchaudio's own starts

    def forward(self, features: Tensor, num_frames: Tensor) -> tuple[list[Tensor], Tensor]:
        """States after each layer, (batch, frames, width), and their number for each clip, (batch,), int64, on the CPU.

        Args:
            features: of `RecognizerInputs`, (batch, frames, mels).
            num_frames: of each clip, (batch,), int64; see `padding_mask`.

        Raises:
            ValueError: a clip has no frame, or lengths do not fit.
        """
        num_frames = num_frames.cpu()
        if len(num_frames) == 0 or int(num_frames.min()) < 1:
            raise ValueError(
                f"clips of {num_frames.tolist()} feature frames: each needs one or more, 25 ms of audio; leave "
                "shorter ones out"
            )
        states, num_frames = self.subsampling(features[:, : int(num_frames.max())], num_frames)
        return self.encoder(states, num_frames), num_frames

    def ctc_logits(self, states: Tensor) -> Tensor:
        """Logits of a CTC head, (batch, frames, symbols + 1), the blank first.

        Args:
            states: of the last layer.
        """
        return self.output(states)

    def loss(self, states: Tensor, num_frames: Tensor, targets: Sequence[Tensor]) -> Tensor:
        """-log p(target | clip) by CTC or the transducer, summed over clips; 0-dim, float32.

        Args:
            states: of the last layer, (batch, frames, width).
            num_frames: of each clip, (batch,), int64.
            targets: numbers of the symbols of each clip, from 1, (symbols,), int64.

        Raises:
            ValueError: see `ctc_loss` and `transducer_loss`.
        """
        targets = [target.cpu() for target in targets]
        if self.config.head == "ctc":
            return ctc_loss(self.ctc_logits(states), num_frames, targets)
        return transducer_loss(self.predictor, self.joiner, self.source(states), num_frames, targets)


class DistilledRecognizer(PreTrainedModel):
    """A recogniser in training, with a head by which one of its layers learns from a teacher; only the former is kept.

    Args:
        recognizer: becomes a part of this model.
        head: of the layer's states; None learns from no teacher.
    """

    config_class = RecognizerConfig
    main_input_name = "features"

    def __init__(self, recognizer: RecognizerModel, head: nn.Module | None) -> None:
        super().__init__(recognizer.config)
        self.recognizer, self.head = recognizer, head
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass  # both come with weights

    def forward(self, features: Tensor, num_frames: Tensor) -> tuple[list[Tensor], Tensor]:
        """See `RecognizerModel.forward`."""
        return self.recognizer(features, num_frames)


class _Subsampling(nn.Module):
    """Convolutions over time, each of which halves the rate."""

    def __init__(self, config: RecognizerConfig) -> None:
        super().__init__()
        halvings = config.subsampling.bit_length() - 1
        widths = [config.num_mels, *[config.width] * halvings]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(before, after, 3, stride=2, padding=1)
            for before, after in zip(widths[:-1], widths[1:], strict=True)
        )
        self.projection = nn.Linear(config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, features: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        states = _cleared(features.to(self.projection.weight.dtype), num_frames)
        for convolution in self.convolutions:
            num_frames = (num_frames + 1) // 2
            states = F.gelu(convolution(states.transpose(1, 2))).transpose(1, 2)
            states = _cleared(states, num_frames)
        return _cleared(self.dropout(self.projection(states)), num_frames), num_frames


class _Conformer(nn.Module):
    def __init__(self, config: RecognizerConfig) -> None:
        super().__init__()
        self.conformer = torchaudio.models.Conformer(
            config.width,
            config.num_heads,
            config.ffn_width,
            config.num_layers,
            config.kernel_size,
            dropout=config.dropout,
            convolution_first=True,  # attention has no positions but those that convolutions give
        )
        for layer in self.conformer.conformer_layers:  # instead of a batch norm, which hears padding and other clips
            layer.conv_module.sequential[3] = _ChannelNorm(config.width)

    def forward(self, states: Tensor, num_frames: Tensor) -> list[Tensor]:
        padding = ~padding_mask(num_frames, states[..., 0])
        states, found = states.transpose(0, 1), []
        for layer in self.conformer.conformer_layers:
            states = _conformer_layer(layer, states, padding)
            found.append(states.transpose(0, 1))
        return found


def _conformer_layer(layer: Any, states: Tensor, padding: Tensor) -> Tensor:
    """torchaudio's layer on (frames, batch, width), with nothing but 0 behind a clip's end before its convolution."""
    states = states + 0.5 * layer.ffn1(states)
    convolve = layer.conv_module.sequential
    gated = convolve[:2](layer.conv_module.layer_norm(states).permute(1, 2, 0))
    states = states + convolve[2:](gated.masked_fill(padding[:, None], 0.0)).permute(2, 0, 1)
    normed = layer.self_attn_layer_norm(states)
    attended, _ = layer.self_attn(normed, normed, normed, key_padding_mask=padding, need_weights=False)
    states = states + layer.self_attn_dropout(attended)
    return layer.final_layer_norm(states + 0.5 * layer.ffn2(states))


class _ChannelNorm(nn.LayerNorm):
    """Layer norm of each frame of (batch, width, frames)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


class _Emformer(nn.Module):
    def __init__(self, config: RecognizerConfig) -> None:
        super().__init__()
        self.right_context_frames = config.right_context_frames
        self.emformer = torchaudio.models.Emformer(
            config.width,
            config.num_heads,
            config.ffn_width,
            config.num_layers,
            config.segment_frames,
            dropout=config.dropout,
            activation="gelu",
            left_context_length=config.left_context_frames,
            right_context_length=config.right_context_frames,
        )

    def forward(self, states: Tensor, num_frames: Tensor) -> list[Tensor]:
        found: list[Tensor] = []  # torchaudio returns the last layer's alone
        hooks = [
            layer.register_forward_hook(lambda module, inputs, outputs: found.append(outputs[0].transpose(0, 1)))
            for layer in self.emformer.emformer_layers
        ]
        try:
            self.emformer(F.pad(states, (0, 0, 0, self.right_context_frames)), num_frames.to(states.device))
        finally:
            for hook in hooks:
                hook.remove()
        return found


def _cleared(states: Tensor, num_frames: Tensor) -> Tensor:
    """0 behind each clip's end; (batch, frames, width)."""
    return states.masked_fill(~padding_mask(num_frames, states[..., 0])[..., None], 0.0)
