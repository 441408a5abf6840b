"""Speech encoders as callables from inputs to states, whatever runs them: PyTorch, ONNX Runtime or `torch.export`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from speechkd.export.onnx import _require, _session
from speechkd.export.program_file import load_program
from speechkd.export.transcribers import EXPORT_FILE, read_export
from speechkd.models.speech_encoders import load_encoder
from speechkd.models.whisper_states import whisper_output
from speechkd.teachers import resolve_model

ONNX_FILE, ONNX_DATA_FILE, PROGRAM_FILE = "model.onnx", "model.onnx_data", "model.pt2"
STATES = "last_hidden_state"
GRAPH_FRAMES = 2  # torch.export takes a size of 1 for a constant, so its programs have at least these


@dataclass(frozen=True)
class EncoderInput:
    """What an encoder takes, and how many frames it makes of it.

    Args:
        name: `input_values`, waveforms of (batch, samples) at 16 kHz, or `input_features`, Whisper's log-mel of
            (batch, mel bins, frames).
        kernels: of the convolutions along time.
        strides: of the same.
        padding: of each of them, on either side.
        mel_bins: of the log-mel; None for waveforms.
        longest: most log-mel frames that there are positions for; None for waveforms.
    """

    name: str
    kernels: list[int]
    strides: list[int]
    padding: int = 0
    mel_bins: int | None = None
    longest: int | None = None

    @classmethod
    def for_model(cls, encoder: PreTrainedModel) -> "EncoderInput":
        """That of an encoder.

        Raises:
            ValueError: it takes neither waveforms nor Whisper's log-mel, has an adapter, or is more than an encoder.
        """
        config: Any = encoder.config
        if config.model_type == "whisper":
            if not isinstance(encoder, WhisperEncoder):
                raise ValueError(f"of a Whisper only the encoder fits, got {type(encoder).__name__}; give its encoder")
            return cls("input_features", [3, 3], [1, 2], 1, config.num_mel_bins, 2 * config.max_source_positions)
        if encoder.main_input_name != "input_values" or not hasattr(config, "conv_stride"):
            raise ValueError(
                f"an encoder of type {config.model_type!r} takes {encoder.main_input_name}, and exports are for "
                "waveforms and Whisper's log-mel; take a HuBERT, wav2vec 2.0, WavLM, data2vec-audio or Whisper"
            )
        if not hasattr(encoder, "feature_extractor"):
            raise ValueError(f"{type(encoder).__name__} has a head around its encoder; give its base_model")
        if getattr(config, "add_adapter", False):
            raise ValueError("the encoder has an adapter that shortens its output (add_adapter); take one without")
        return cls("input_values", list(config.conv_kernel), list(config.conv_stride))

    @property
    def unit(self) -> str:
        """What lengths count."""
        return "samples" if self.mel_bins is None else "log-mel frames"

    def num_frames(self, lengths: Tensor) -> Tensor:
        """Frames of inputs of these lengths, in samples or log-mel frames; same shape, int64."""
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            lengths = torch.div(lengths + 2 * self.padding - kernel, stride, rounding_mode="floor") + 1
        return lengths

    def shortest(self, num_frames: int) -> int:
        """The shortest input that gives so many frames: 400 samples for one of HuBERT's, 720 for two."""
        length = num_frames
        for kernel, stride in zip(reversed(self.kernels), reversed(self.strides), strict=True):
            length = (length - 1) * stride + kernel - 2 * self.padding
        return length

    def check(self, inputs: Tensor, mask: Tensor | None, shortest: int) -> None:
        """Refuse what the encoder cannot take.

        Args:
            inputs: see `name`.
            mask: True on real samples, False on padding at the end, same shape, bool; None where all are real.
            shortest: samples or log-mel frames that a clip must have.

        Raises:
            ValueError: a shape does not fit, a clip is too short or too long, or Whisper was given a mask.
        """
        expected = "(batch, samples)" if self.mel_bins is None else f"(batch, {self.mel_bins}, frames)"
        fits = inputs.ndim == 2 if self.mel_bins is None else inputs.ndim == 3 and inputs.shape[1] == self.mel_bins
        if not fits or not len(inputs):
            raise ValueError(f"{self.name} are {tuple(inputs.shape)}, the encoder takes {expected} of one clip or more")
        length = inputs.shape[-1]
        if self.longest is not None and length > self.longest:
            raise ValueError(
                f"{self.name} have {length} {self.unit}, and the encoder has positions for {self.longest}; cut the "
                "clips into shorter ones"
            )
        if mask is not None and self.mel_bins is not None and not mask.all():
            raise ValueError("Whisper takes no mask: it hears padding as silence; give clips of one length, or alone")
        if mask is not None and self.mel_bins is None and (mask.shape != inputs.shape or mask.dtype != torch.bool):
            raise ValueError(
                f"mask is {tuple(mask.shape)} of {mask.dtype}, inputs {tuple(inputs.shape)} need the same shape and "
                "torch.bool, True on real samples"
            )
        lengths = torch.full((len(inputs),), length) if mask is None or self.mel_bins is not None else mask.sum(dim=-1)
        if (lengths < shortest).any():
            row = int((lengths < shortest).nonzero()[0])
            raise ValueError(
                f"clip {row} of the batch has {int(lengths[row])} {self.unit}, but this encoder needs {shortest}; "
                "leave clips out that are shorter, or pad them with silence"
            )


class WaveformStates(nn.Module):
    """Last states of an encoder of waveforms; the mask is one of samples."""

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(batch, samples) and the same to (batch, frames, dim)."""
        return self.encoder(input_values, attention_mask=attention_mask).last_hidden_state


class LogMelStates(nn.Module):
    """Last states of Whisper's encoder for clips of any length up to its window, where the stock class takes only that.

    See `speechkd.models.whisper_states`.
    """

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder: Any = encoder

    def forward(self, input_features: Tensor) -> Tensor:
        """(batch, mel bins, frames) to (batch, half the frames, dim)."""
        output: Any = whisper_output(self.encoder, input_features)
        return output.last_hidden_state


def states_module(encoder: PreTrainedModel) -> nn.Module:
    """The tensors-in, tensor-out form of an encoder, in eval mode: layerdrop's random branch would stop any export."""
    is_whisper = getattr(encoder.config, "model_type", None) == "whisper"
    return (LogMelStates(encoder) if is_whisper else WaveformStates(encoder)).eval()


@dataclass(frozen=True)
class EncoderRunner:
    """An encoder that is ready to run.

    Args:
        name: as the user gave it.
        format_name: `huggingface`, `onnx` or `torch_export`.
        precision: of its weights.
        parameters: of the PyTorch encoder.
        input: what it takes.
        shortest: samples or log-mel frames that a clip must have.
        device: where it runs; exports run on the CPU.
        run: from checked inputs and mask to states.
        module: what runs it in PyTorch; None for exports.
    """

    name: str
    format_name: str
    precision: str
    parameters: int
    input: EncoderInput
    shortest: int
    device: torch.device
    run: Callable[[Tensor, Tensor | None], Tensor]
    module: nn.Module | None = None

    def __call__(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Last hidden states, (batch, frames, dim), float32, on the runner's device.

        Frames after the end of a clip hold nothing of use; `input.num_frames` counts the others. Where the first
        convolution has a GroupNorm, as in HuBERT Base, no mask undoes that it averages over the padding: give clips of
        one length, or one at a time.

        Args:
            inputs: waveforms as the model's feature extractor makes them, (batch, samples), 0 after a clip's end; or
                Whisper's log-mel, (batch, mel bins, frames), of any length up to its window.
            mask: True on real samples, (batch, samples), bool; None where all are. Not for Whisper.

        Raises:
            ValueError: see `EncoderInput.check`.
        """
        self.input.check(inputs, mask, self.shortest)
        with torch.inference_mode():
            mask = None if mask is None or self.input.mel_bins is not None or mask.all() else mask.to(self.device)
            return self.run(inputs.to(self.device, torch.float32), mask)


def is_encoder(name: str) -> bool:
    """Whether a model has states and no text: no Whisper, or one that `save_encoder` left without decoder layers.

    Args:
        name: folder, Hub id or `bundled:<name>`; an export is what `export_encoder` wrote, or not.

    Raises:
        ValueError: there is no such model.
    """
    export = read_export(name)
    if export is not None and export["format"] != "huggingface":
        return "input" in export
    try:
        config: Any = AutoConfig.from_pretrained(resolve_model(name))
    except OSError as error:
        raise ValueError(f"model {name!r} cannot be found: {error}; give a folder or a Hub id") from error
    return config.model_type != "whisper" or config.decoder_layers == 0


def load_encoder_runner(name: str, *, compiled: bool = False, device: torch.device | str = "cpu") -> EncoderRunner:
    """An encoder as a callable `(waveforms or features, mask) -> states`, by the runtime of its format.

    A `.pt2` file that holds more than tensors and a graph is refused; see `program_file.load_program`.

    Args:
        name: folder that `export_encoder` wrote, or a Hugging Face folder, a Hub id or `bundled:<name>`.
        compiled: run a Hugging Face model through `torch.compile`, for any batch and length. The first call of each
            kind takes a minute.
        device: of a Hugging Face model; exports run on the CPU, with as many threads as torch has.

    Raises:
        ValueError: it cannot be loaded, is no encoder, a library is missing, the runtime lacks an operator, or
            `compiled` or `device` does not fit the format.
    """
    export = read_export(name)
    format_name = "huggingface" if export is None else export["format"]
    device = torch.device(device)
    if format_name == "huggingface":
        encoder: Any = load_encoder(name)[0]
        return huggingface_runner(name, encoder.to(device), compiled=compiled)
    if export is None or "input" not in export:
        raise ValueError(f"{name} is no encoder that `export_encoder` wrote: {EXPORT_FILE} does not say what it takes")
    if compiled or device.type != "cpu":
        wish = "torch.compile" if compiled else str(device)
        raise ValueError(
            f"{name} is in the format {format_name}, which {wish} does not run; give a Hugging Face folder"
        )
    folder = Path(name).expanduser()
    spec = EncoderInput(**export["input"])
    if format_name == "onnx":
        run, shortest = _onnx_run(folder / ONNX_FILE, spec), spec.shortest(1)
    elif format_name == "torch_export":
        run, shortest = _program_run(folder / PROGRAM_FILE, spec), spec.shortest(GRAPH_FRAMES)
    else:
        raise ValueError(f"{folder / EXPORT_FILE} names the format {format_name!r}, which no encoder has; export anew")
    return EncoderRunner(name, format_name, export["precision"], export["parameters"], spec, shortest, device, run)


def huggingface_runner(name: str, encoder: PreTrainedModel, *, compiled: bool = False) -> EncoderRunner:
    """A loaded encoder as a runner, on its own device; `load_encoder_runner` says the rest."""
    spec = EncoderInput.for_model(encoder)
    module = states_module(encoder)
    runs: Any = torch.compile(module, dynamic=True) if compiled else module

    def run(inputs: Tensor, mask: Tensor | None) -> Tensor:
        states: Tensor = runs(inputs) if mask is None else runs(inputs, mask)
        return states.float()

    runner = EncoderRunner(
        name,
        "huggingface",
        str(encoder.dtype).removeprefix("torch."),
        encoder.num_parameters(),
        spec,
        spec.shortest(1),
        encoder.device,
        run,
        module,
    )
    if compiled:
        length = spec.shortest(GRAPH_FRAMES)
        try:
            runner(torch.zeros((1, length) if spec.mel_bins is None else (1, spec.mel_bins, length)))
        except Exception as error:  # whatever the compiler raises
            raise ValueError(
                f"torch.compile cannot run {name}: {error}; install a C++ compiler (g++), or load it uncompiled"
            ) from error
    return runner


def _onnx_run(path: Path, spec: EncoderInput) -> Callable[[Tensor, Tensor | None], Tensor]:
    runtime = _require("onnxruntime")
    if not path.is_file():
        raise ValueError(f"{path} does not exist; export the encoder anew")
    try:
        session = _session(runtime, path)
    except Exception as error:  # ONNX Runtime's own have no other base
        raise ValueError(
            f"ONNX Runtime {runtime.__version__} cannot run {path}: {error}; update it, or export the encoder anew"
        ) from error

    def run(inputs: Tensor, mask: Tensor | None) -> Tensor:
        feed = {spec.name: inputs.numpy()}
        if spec.mel_bins is None:
            feed["attention_mask"] = _whole_mask(inputs, mask).numpy()
        return torch.from_numpy(session.run([STATES], feed)[0])

    return run


def _program_run(path: Path, spec: EncoderInput) -> Callable[[Tensor, Tensor | None], Tensor]:
    # guards also hold what the tracer took for granted of its sample, such as more than one clip; the parity check and
    # `EncoderInput.check` say what the program really takes
    module = load_program(path).module(check_guards=False)

    def run(inputs: Tensor, mask: Tensor | None) -> Tensor:
        states: Tensor = module(inputs, _whole_mask(inputs, mask)) if spec.mel_bins is None else module(inputs)
        return states

    return run


def _whole_mask(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """The mask as graphs take it, int64 as of Hugging Face's feature extractors."""
    return torch.ones_like(inputs, dtype=torch.int64) if mask is None else mask.long()
