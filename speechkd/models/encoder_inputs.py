"""What speech encoders hear of clips, and how many frames they make of them: one interface for all kinds."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from speechkd.data.features import (
    HOP_LENGTH_SAMPLES,
    KALDI_FRAME_SAMPLES,
    SAMPLE_RATE_HZ,
    SAMPLES_PER_POSITION,
    KaldiFbank,
    WhisperLogMel,
    WhisperWindow,
    kaldi_num_frames,
    normalize_waveforms,
    padding_mask,
)
from speechkd.models.whisper_states import whisper_output

WAVEFORM_ENCODERS = ("wav2vec2", "hubert", "wavlm", "data2vec-audio")
KALDI_SCALE = 32768.0  # w2v-BERT hears samples as 16-bit integers


def encoder_layers(encoder: PreTrainedModel) -> nn.ModuleList:
    """The transformer or Conformer layers of an encoder.

    Raises:
        ValueError: it is of another kind, has a head or an adapter.
    """
    kind = encoder.config.model_type
    if kind not in (*WAVEFORM_ENCODERS, "wav2vec2-bert", "whisper"):
        raise ValueError(
            f"speech encoder of type {kind!r} is not known here; take {', '.join(WAVEFORM_ENCODERS)}, wav2vec2-bert or "
            "the encoder of a Whisper"
        )
    if not hasattr(encoder, "conv1" if kind == "whisper" else "feature_projection"):
        way_out = "model.get_encoder()" if kind == "whisper" else "model.base_model"
        raise ValueError(f"{type(encoder).__name__} is more than an encoder; give {way_out} of it")
    if getattr(encoder.config, "add_adapter", False):
        raise ValueError("the encoder has an adapter that shortens its output (add_adapter); take one without")
    stack: Any = encoder if kind == "whisper" else encoder.encoder
    return stack.layers


class EncoderInputs(nn.Module):
    """What an encoder hears of a batch of clips, and how many frames it makes of them.

    One for teacher and student of the same kind: they share its output.

    Args:
        encoder: any encoder; of a Whisper whose window was shortened, clips are padded to that window.
        normalize_input: scale each waveform to mean 0 and variance 1, as `do_normalize` of the encoder's feature
            extractor says: not for HuBERT Base. Whisper and w2v-BERT have their own features, whatever it is.
        grid_seconds: a batch of a Whisper is as long as its longest clip, rounded up to a multiple of this, which
            `encoder_output` takes; None is its window, for the stock forward pass.

    Raises:
        ValueError: see `encoder_layers`, or the grid does not fit.
    """

    def __init__(self, encoder: PreTrainedModel, *, normalize_input: bool, grid_seconds: float | None = None) -> None:
        super().__init__()
        encoder_layers(encoder)
        config: Any = encoder.config
        self.config, self.kind = config, config.model_type
        self.normalize_input = normalize_input
        self.features: Any = None
        self.window: WhisperWindow | None = None  # of encoders that hear clips as they are
        if self.kind == "whisper":
            self.features = WhisperLogMel.for_model(self.config)
            window_seconds = config.max_source_positions * SAMPLES_PER_POSITION / SAMPLE_RATE_HZ
            self.window = WhisperWindow(window_seconds, grid_seconds)
        elif grid_seconds is not None:
            raise ValueError(f"grid_seconds={grid_seconds} is for Whisper; a {self.kind} hears each clip as it is")
        if self.kind == "wav2vec2-bert":
            self.features = KaldiFbank()
            self.stride = self.config.feature_projection_input_dim // self.features.filters.shape[-1]

    def forward(self, waveforms: Tensor, num_samples: Tensor) -> dict[str, Tensor]:
        """Keyword arguments of the encoder, in float32.

        A HuBERT, wav2vec 2.0 or WavLM with `feat_extract_norm="group"` hears padding in its first convolution, mask or
        not: bucket clips by length, or crop them to one.

        Args:
            waveforms: 16 kHz samples, padded to a common length, (batch, samples).
            num_samples: length of each clip, (batch,), int64.

        Raises:
            ValueError: lengths do not fit, a clip is too short for one frame, or too long for Whisper's window.
        """
        self.num_frames(num_samples)  # refuses short clips
        if self.window is not None:
            real = padding_mask(num_samples, waveforms)
            features = self.features(waveforms.float().masked_fill(~real, 0.0))
            return {"input_features": features[..., : 2 * int(self.window.num_positions(num_samples).max())]}
        if self.kind == "wav2vec2-bert":
            return self._stacked_banks(waveforms, num_samples)
        if self.normalize_input:
            values, mask = normalize_waveforms(waveforms, num_samples)
        else:
            mask = padding_mask(num_samples, waveforms)
            values = waveforms.float().masked_fill(~mask, 0.0)
        return {"input_values": values} if mask.all() else {"input_values": values, "attention_mask": mask}

    def num_frames(self, num_samples: Tensor) -> Tensor:
        """Frames of clips with these lengths at 16 kHz; same shape, int64.

        Raises:
            ValueError: a clip is too short for one.
        """
        if self.kind == "whisper":
            frames = (num_samples + SAMPLES_PER_POSITION - 1) // SAMPLES_PER_POSITION
        elif self.kind == "wav2vec2-bert":
            frames = kaldi_num_frames(num_samples) // self.stride
        else:
            frames = num_samples
            for kernel, stride in zip(self.config.conv_kernel, self.config.conv_stride, strict=True):
                frames = torch.div(frames - kernel, stride, rounding_mode="floor") + 1
        if not frames.numel():
            raise ValueError("the batch has no clip; leave such a batch out")
        if (frames < 1).any():
            row = int((frames < 1).nonzero()[0])
            raise ValueError(
                f"clip {row} of the batch has {int(num_samples[row])} samples, but one frame needs "
                f"{self.receptive_field_samples}; leave clips out that are shorter, or pad them with silence"
            )
        return frames

    @property
    def receptive_field_samples(self) -> int:
        """The shortest clip that gives a frame: 400 samples for HuBERT and its like."""
        if self.kind == "whisper":
            return 1
        if self.kind == "wav2vec2-bert":
            return KALDI_FRAME_SAMPLES + (self.stride - 1) * HOP_LENGTH_SAMPLES
        return convolutions_field_samples(self.config)

    def _stacked_banks(self, waveforms: Tensor, num_samples: Tensor) -> dict[str, Tensor]:
        """As SeamlessM4TFeatureExtractor: each filter scaled over its clip, and neighbouring frames side by side."""
        banks, counts = self.features(waveforms * KALDI_SCALE, num_samples)
        inside = padding_mask(counts, banks[..., 0])[..., None]
        counts = counts.to(banks.device)[:, None, None]
        centered = (banks - banks.sum(dim=1, keepdim=True) / counts) * inside
        variance = centered.square().sum(dim=1, keepdim=True) / (counts - 1)
        banks = centered / (variance + 1e-7).sqrt()
        width = banks.shape[1] // self.stride
        stacked = banks[:, : width * self.stride].unflatten(1, (width, self.stride)).flatten(2)
        mask = padding_mask(self.num_frames(num_samples), stacked[..., 0])
        return {"input_features": stacked * mask[..., None], "attention_mask": mask}


def as_dtype(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs of `EncoderInputs` in the dtype of an encoder; masks stay as they are."""
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}


def encoder_output(encoder: PreTrainedModel, inputs: dict[str, Tensor]) -> Any:
    """Output of an encoder with `hidden_states`; a Whisper may hear less than its window.

    Args:
        encoder: any encoder, not a model around it.
        inputs: of `EncoderInputs`, in the encoder's dtype.
    """
    if encoder.config.model_type == "whisper":
        return whisper_output(encoder, **inputs)
    return encoder(**inputs, output_hidden_states=True)


def align_frames(
    predictions: Tensor, targets: Tensor, student_frames: Tensor, teacher_frames: Tensor, num_samples: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions and targets over the frames that both models make of each clip.

    Encoders whose first convolutions differ may make one frame more or fewer of the same clip; the last is dropped.

    Args:
        predictions: (batch, layers, frames, dim), of the student.
        targets: the same of the teacher, with any number of frames.
        student_frames: of each clip, (batch,), int64; see `EncoderInputs.num_frames`.
        teacher_frames: the same.
        num_samples: length of each clip, (batch,), int64.

    Returns:
        Both with as many frames as the longest clip, and a mask that is True on valid ones, (batch, frames), bool.

    Raises:
        ValueError: they differ by more than one frame, or a model made fewer frames than these.
    """
    gap = (student_frames - teacher_frames).abs()
    if (gap > 1).any():
        row = int(gap.argmax())
        ours, theirs = int(student_frames[row]), int(teacher_frames[row])
        seconds = int(num_samples[row]) / SAMPLE_RATE_HZ
        raise ValueError(
            f"of clip {row}, {seconds:.2f} s, the student makes {ours} frames, {ours / seconds:.1f} Hz, and the "
            f"teacher {theirs}, {theirs / seconds:.1f} Hz; take a student with the teacher's frame rate, as "
            "compact_encoder makes it"
        )
    frames = torch.minimum(student_frames, teacher_frames)
    width = int(frames.max())
    if min(predictions.shape[2], targets.shape[2]) < width:
        raise ValueError(
            f"predictions {tuple(predictions.shape)} and targets {tuple(targets.shape)} are to have {width} frames; "
            "give the frames of the same clips"
        )
    predictions, targets = predictions[:, :, :width], targets[:, :, :width]
    return predictions, targets, padding_mask(frames, predictions[:, 0, :, 0])


def convolutions_field_samples(config: Any) -> int:
    """Samples that one frame of the convolutions needs: 400 for wav2vec 2.0 and its like."""
    field = 1
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        field = (field - 1) * stride + kernel
    return field
