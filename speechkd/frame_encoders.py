"""Frozen encoders as probing uses them: all layers of a clip's frames, from waveforms on, whatever the encoder is."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from speechkd.data.features import (
    HOP_LENGTH_SAMPLES,
    KALDI_FRAME_SAMPLES,
    SAMPLE_RATE_HZ,
    SAMPLES_PER_POSITION,
    KaldiFbank,
    WhisperLogMel,
    WhisperWindow,
    normalize_waveforms,
    padding_mask,
)
from speechkd.data.manifest import Manifest
from speechkd.export.encoder_runtime import load_encoder_runner
from speechkd.export.transcribers import read_export
from speechkd.models.distilhubert import compact_encoder
from speechkd.models.encoder_inputs import EncoderInputs, as_dtype, encoder_layers, encoder_output
from speechkd.models.pruned_encoder import PrunedEncoderConfig, PrunedEncoderModel
from speechkd.models.speech_encoders import load_encoder
from speechkd.models.whisper import shorten_encoder
from speechkd.teachers import freeze, resolve_model, teacher_identity

LOG_MEL = "log-mel"  # the name under which filter banks take the place of an encoder
LOG_MEL_MELS = 80
LOG_MEL_CENTRE, LOG_MEL_SCALE = -6.0, 4.0  # of speech in [-1, 1]; a head's steps suit values around 1
MAX_CLIP_SECONDS = 3600.0  # of encoders without a window


@dataclass(frozen=True)
class FrameEncoder:
    """A frozen encoder, or features without one, as probing uses it.

    Args:
        identity: as of `teacher_identity`.
        num_layers: states of a frame; blocks and what the first one hears, unless `layers` says which.
        width: of a state.
        frames_per_second: to foresee the disk space.
        min_samples: the shortest clip that has a frame.
        max_seconds: the longest clip.
        pads: whether clips of different lengths may stand in one batch, unless there is a grid.
        encode: from 16 kHz waveforms (batch, samples) and lengths (batch,) to states (batch, layers, frames, width)
            and frames of each clip (batch,).
        layers: which states these are, 0 what the first block hears; None for all.
        grid_seconds: of a Whisper that does not hear its whole window, see `WhisperWindow`.
    """

    identity: dict[str, Any]
    num_layers: int
    width: int
    frames_per_second: float
    min_samples: int
    max_seconds: float
    pads: bool
    encode: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    layers: tuple[int, ...] | None = None
    grid_seconds: float | None = None

    def hears_alike(self, num_samples: int, others: int) -> bool:
        """Whether clips of these lengths at 16 kHz may stand in one batch: each is then heard as it is alone."""
        if self.grid_seconds is None:
            return self.pads or num_samples == others
        grid_samples = round(self.grid_seconds * SAMPLE_RATE_HZ)
        return -(-num_samples // grid_samples) == -(-others // grid_samples)


def load_frame_encoder(
    name: str,
    *,
    fresh_seed: int | None = None,
    window_seconds: int | None = None,
    grid_seconds: float | None = None,
    layers: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> FrameEncoder:
    """An encoder for probing, its export, or Kaldi's filter banks under the name "log-mel".

    Filter banks are not normalised over a clip: the mean over frames, which most heads read, would be zero. An export
    gives its last states alone.

    Args:
        name: as of `load_encoder`, or the folder of `export_encoder`, or "log-mel".
        fresh_seed: take new weights in the same configuration, as `compact_encoder` makes them or the class of a pruned
            encoder; None keeps them.
        window_seconds: of a Whisper, to which clips are padded, if its own is not shorter; None keeps its own.
        grid_seconds: of a Whisper, which then hears batches up to their longest clip, see `WhisperWindow`.
        layers: of an encoder, see `frame_encoder`.
        device: where it runs.

    Raises:
        ValueError: see `load_encoder`, `frame_encoder` and `load_encoder_runner`, or new weights of log-mel or an
            export are asked for.
    """
    if name == LOG_MEL:
        if fresh_seed is not None:
            raise ValueError(f"{LOG_MEL} has no weights to draw anew; give the name of an encoder, or no seed")
        return _log_mel(device)
    if (read_export(name) or {}).get("format", "huggingface") != "huggingface":
        if fresh_seed is not None:
            raise ValueError(f"{name} is an export, whose weights are fixed; give the model that it was made of")
        return _exported_encoder(name, window_seconds, grid_seconds)
    # a checkpoint without the vector that SpecAugment writes gets a random one: it must not change the identity
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(fresh_seed or 0)
        encoder, normalize_input = load_encoder(name)
        if fresh_seed is not None:  # before the window is cut: the draws depend on its length
            encoder = _fresh_weights(name, encoder)
            name = f"{name} with fresh weights, seed {fresh_seed}"
        if window_seconds is not None and encoder.config.model_type == "whisper":
            own_seconds = encoder.config.max_source_positions * SAMPLES_PER_POSITION / SAMPLE_RATE_HZ
            if window_seconds < own_seconds:
                shorten_encoder(encoder, window_seconds)
    if encoder.config.model_type != "whisper":
        grid_seconds = None
    return frame_encoder(name, encoder, normalize_input, layers=layers, grid_seconds=grid_seconds, device=device)


def frame_encoder(
    name: str,
    encoder: PreTrainedModel,
    normalize_input: bool,
    *,
    layers: Sequence[int] | None = None,
    grid_seconds: float | None = None,
    device: torch.device | str = "cpu",
) -> FrameEncoder:
    """A loaded encoder, frozen, for probing or as a teacher; it moves to the device.

    Args:
        name: as the user gave it.
        encoder: of `load_encoder`.
        normalize_input: of `load_encoder`.
        layers: which states, see `FrameEncoder`; None for all.
        grid_seconds: of a Whisper, see `WhisperWindow`; None pads clips to its window.
        device: where it runs.

    Raises:
        ValueError: the encoder lacks a layer.
    """
    config: Any = encoder.config
    num_blocks = len(encoder_layers(encoder))
    if wrong := [layer for layer in layers or () if not 0 <= layer <= num_blocks]:
        raise ValueError(
            f"layer {wrong[0]} is not one of 0 to {num_blocks} of {name}; 0 is what its first block hears, "
            f"{num_blocks} its output"
        )
    identity = teacher_identity(name, encoder)
    freeze(encoder).to(device)  # type: ignore[arg-type]
    inputs = EncoderInputs(encoder, normalize_input=normalize_input, grid_seconds=grid_seconds).to(device)
    chosen = range(num_blocks + 1) if layers is None else layers

    def encode(waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        output = encoder_output(encoder, as_dtype(inputs(waveforms, num_samples), encoder.dtype))
        # the last after the norm that some encoders end with
        states = [*output.hidden_states[:-1], output.last_hidden_state]
        return torch.stack([states[layer] for layer in chosen], dim=1), inputs.num_frames(num_samples)

    # w2v-BERT and wav2vec 2.0 make a frame of 20 ms as Whisper does
    return FrameEncoder(
        identity=identity,
        num_layers=len(chosen),
        width=config.hidden_size,
        frames_per_second=SAMPLE_RATE_HZ / SAMPLES_PER_POSITION,
        min_samples=inputs.receptive_field_samples,
        max_seconds=MAX_CLIP_SECONDS if inputs.window is None else inputs.window.seconds,
        pads=getattr(config, "feat_extract_norm", "layer") != "group",
        encode=encode,
        layers=None if layers is None else tuple(layers),
        grid_seconds=grid_seconds,
    )


def _exported_encoder(folder: str, window_seconds: int | None, grid_seconds: float | None) -> FrameEncoder:
    runner, export = load_encoder_runner(folder), read_export(folder) or {}
    config: Any = AutoConfig.from_pretrained(folder)
    digest = hashlib.sha256()
    for path in sorted(Path(folder).expanduser().glob("model.*")):
        digest.update(path.read_bytes())
    max_seconds = MAX_CLIP_SECONDS
    if runner.input.mel_bins is not None and runner.input.longest is not None:
        own_seconds = runner.input.longest * HOP_LENGTH_SAMPLES / SAMPLE_RATE_HZ
        max_seconds = own_seconds if window_seconds is None else min(own_seconds, window_seconds)
        log_mel = WhisperLogMel(runner.input.mel_bins, max_seconds)
        window = WhisperWindow(max_seconds, grid_seconds)
    else:
        grid_seconds = None

    def encode(waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        device = waveforms.device
        if runner.input.mel_bins is not None:
            states = runner(log_mel(waveforms.cpu())[..., : 2 * int(window.num_positions(num_samples).max())])
            frames = (num_samples + SAMPLES_PER_POSITION - 1) // SAMPLES_PER_POSITION
        else:
            mask = padding_mask(num_samples, waveforms)
            if export["normalize_input"]:
                waveforms, mask = normalize_waveforms(waveforms, num_samples)
            states = runner(waveforms.cpu(), mask.bool().cpu())
            frames = runner.input.num_frames(num_samples)
        return states[:, None].to(device), frames

    return FrameEncoder(
        identity={"name": folder, "revision": None, "weights_sha256": digest.hexdigest()},
        num_layers=1,
        width=config.hidden_size,
        frames_per_second=SAMPLE_RATE_HZ / SAMPLES_PER_POSITION,
        min_samples=1 if runner.input.mel_bins is not None else runner.shortest,
        max_seconds=max_seconds,
        pads=getattr(config, "feat_extract_norm", "layer") != "group",
        encode=encode,
        grid_seconds=grid_seconds,
    )


def _fresh_weights(name: str, encoder: PreTrainedModel) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(resolve_model(name))
    if isinstance(config, PrunedEncoderConfig):  # the encoder's own configuration does not say how narrow it is
        return PrunedEncoderModel(config).encoder
    return compact_encoder(encoder, len(encoder_layers(encoder)), init="random")


def _log_mel(device: torch.device | str) -> FrameEncoder:
    features = KaldiFbank(LOG_MEL_MELS).to(device)

    def encode(waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        banks, num_frames = features(waveforms, num_samples)
        return ((banks - LOG_MEL_CENTRE) / LOG_MEL_SCALE)[:, None], num_frames

    settings = f"{LOG_MEL} {LOG_MEL_MELS} {LOG_MEL_CENTRE} {LOG_MEL_SCALE}"
    return FrameEncoder(
        identity={"name": LOG_MEL, "revision": None, "weights_sha256": hashlib.sha256(settings.encode()).hexdigest()},
        num_layers=1,
        width=LOG_MEL_MELS,
        frames_per_second=100.0,
        min_samples=KALDI_FRAME_SAMPLES,
        max_seconds=MAX_CLIP_SECONDS,
        pads=True,
        encode=encode,
    )


def fitting_window_seconds(manifests: Sequence[Manifest]) -> int:
    """The shortest window, in whole seconds, that holds all clips."""
    return math.ceil(max(float(manifest.durations_seconds.max()) for manifest in manifests))
