"""Speech encoders in formats that run without speechkd: Hugging Face, ONNX and `torch.export`."""

import copy
import logging
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm
from transformers import PreTrainedModel

from speechkd.data.features import SAMPLE_RATE_HZ, padding_mask
from speechkd.data.hub import read_utterances
from speechkd.data.loader import clip_batches
from speechkd.export.encoder_runtime import (
    GRAPH_FRAMES,
    ONNX_DATA_FILE,
    ONNX_FILE,
    PROGRAM_FILE,
    STATES,
    EncoderInput,
    EncoderRunner,
    huggingface_runner,
    load_encoder_runner,
    states_module,
)
from speechkd.export.onnx import BATCH, _require, _save, _to_onnx, quantize_weights
from speechkd.export.transcribers import EXPORT_FILE, read_export
from speechkd.files import atomic_folder, write_json
from speechkd.frame_encoders import MAX_CLIP_SECONDS
from speechkd.models.encoder_inputs import EncoderInputs
from speechkd.models.pruned_encoder import PrunedEncoderModel
from speechkd.models.speech_encoders import feature_extractor, load_encoder, save_encoder
from speechkd.teachers import teacher_identity

logger = logging.getLogger(__name__)

EncoderFormat = Literal["huggingface", "onnx", "torch_export"]
PRECISIONS: dict[EncoderFormat, tuple[str, ...]] = {
    "huggingface": ("float32",),
    "onnx": ("float32", "int8"),
    "torch_export": ("float32",),
}
MAX_FLOAT32_DIFFERENCE = 1e-4
USUAL_STATE = 4.0  # largest after a layer norm; Whisper's reach 22, where float32 itself is off by 1.6e-4
MIN_INT8_COSINE = 0.99
PARITY_SAMPLES = ((1, 16_000), (3, 23_456), (2, 1_200))  # batch, length
PARITY_LOG_MEL_FRAMES = ((1, 100), (3, 147), (2, 8))
SAMPLE_FRAMES = 49  # of the clips that graphs are traced with


def export_encoder(
    model: str | PreTrainedModel,
    output_dir: str | Path,
    format_name: EncoderFormat,
    precision: str = "float32",
    *,
    normalize_input: bool = False,
    manifest_path: str | Path | None = None,
    max_clips: int = 20,
) -> dict[str, Any]:
    """Write an encoder in another format, for any batch and length, and compare its states with PyTorch's.

    Every folder has `config.json`, `preprocessor_config.json` and `export.json`: what was made of what, what it takes,
    and the parity. `model.onnx` (weights in `model.onnx_data`) and `model.pt2` take `input_values` and an int64
    `attention_mask` of (batch, samples), or `input_features` of (batch, mel bins, frames), and give
    `last_hidden_state`. The folder stands under its name when all is done, or not at all.

    Args:
        model: Hub id, folder or `bundled:<name>` of a HuBERT, wav2vec 2.0, WavLM, data2vec-audio or Whisper, or the
            encoder itself. A pruned one, `PrunedEncoderModel`, goes into graphs alone: its own folder is what
            transformers reads.
        output_dir: absent or empty.
        format_name: `huggingface` (safetensors), `onnx` or `torch_export` (`.pt2`).
        precision: `float32`, or for ONNX `int8`: linear layers alone, with activations quantised as they come.
            Convolutions stay in float32, because ONNX Runtime runs int8 ones more slowly.
        normalize_input: of an encoder that is given as such, whether it expects waveforms of mean 0 and variance 1; a
            folder says so itself.
        manifest_path: clips on which to compare too; None compares on noise alone.
        max_clips: only the first so many of them.

    Returns:
        Content of `export.json`, `output_dir` and `size_megabytes`.

    Raises:
        ValueError: an unknown format or precision, no such encoder, a folder that is not empty, a missing library, or
            states that differ too much.
    """
    if format_name not in PRECISIONS:
        raise ValueError(f"encoders have no format {format_name!r}; choose one of {', '.join(PRECISIONS)}")
    if precision not in PRECISIONS[format_name]:
        choices = ", ".join(PRECISIONS[format_name])
        raise ValueError(f"{format_name} has no precision {precision!r} for encoders; choose one of {choices}")
    output_dir = Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"output folder {output_dir} is not empty; choose another one or remove it")
    if format_name == "onnx":
        for library in ("onnx", "onnxscript", "onnxruntime"):
            _require(library)
    name = model if isinstance(model, str) else type(model).__name__
    if isinstance(model, str):
        if (read_export(model) or {}).get("format", "huggingface") != "huggingface":
            raise ValueError(f"{model} is an export already; give the Hugging Face folder that it was made of")
        encoder, normalize_input = load_encoder(model)
    else:
        encoder = copy.deepcopy(model.encoder if isinstance(model, PrunedEncoderModel) else model).float().cpu().eval()
    reference = huggingface_runner(name, encoder)
    spec = reference.input
    export: dict[str, Any] = {
        "format": format_name,
        "precision": precision,
        "model": teacher_identity(name, encoder),
        "parameters": reference.parameters,
        "input": asdict(spec),
        "normalize_input": normalize_input and spec.mel_bins is None,
        "shortest": spec.shortest(GRAPH_FRAMES if format_name == "torch_export" else 1),
        "speechkd_version": version("speechkd"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "parity": None,
    }
    with atomic_folder(output_dir) as written:
        if format_name == "huggingface":
            save_encoder(encoder, written, normalize_input=normalize_input)
        else:
            encoder.config.save_pretrained(written)
            feature_extractor(encoder.config, normalize_input=normalize_input).save_pretrained(written)
            _write_graph(encoder, spec, written, precision if format_name == "onnx" else None)
        write_json(written / EXPORT_FILE, export)  # the runner reads it
        runner = load_encoder_runner(str(written))
        export["parity"] = check_encoder_parity(reference, runner)
        if manifest_path is not None:
            inputs = EncoderInputs(encoder, normalize_input=normalize_input)
            export["parity"].append(compare_on_clips(reference, runner, inputs, manifest_path, max_clips=max_clips))
        write_json(written / EXPORT_FILE, export)
    size_bytes = sum(path.stat().st_size for path in output_dir.rglob("*") if path.is_file())
    return {"output_dir": str(output_dir), "size_megabytes": size_bytes / 1e6} | export


def check_encoder_parity(reference: EncoderRunner, exported: EncoderRunner) -> list[dict[str, Any]]:
    """Compare states on noise of several batch sizes and lengths; clips of a batch differ in length.

    Args:
        reference: of the model in float32 PyTorch.
        exported: of the export.

    Returns:
        For each comparison `batch`, `length` in samples or log-mel frames, and over the valid frames `max_difference`
        and `mean_cosine`.

    Raises:
        ValueError: float32 states differ by more than 1e-4, in proportion more where the largest is above 4, or int8
            ones have a mean cosine below 0.99.
    """
    spec, results = reference.input, []
    shapes = PARITY_SAMPLES if spec.mel_bins is None else PARITY_LOG_MEL_FRAMES
    # the shortest clip too, and a whole window
    lengths = dict.fromkeys([*shapes, (1, exported.shortest), *([(1, spec.longest)] if spec.longest else [])])
    for batch, wanted in lengths:
        length = max(wanted if spec.longest is None else min(wanted, spec.longest), exported.shortest)
        inputs, mask = _noise(spec, batch, length, exported.shortest)
        expected, found = reference(inputs, mask), exported(inputs, mask)
        if expected.shape != found.shape:
            raise ValueError(
                f"{exported.format_name} gives states {tuple(found.shape)} for {batch} clips of {length} {spec.unit}, "
                f"PyTorch {tuple(expected.shape)}; choose another format"
            )
        counts = torch.full((batch,), length) if mask is None else mask.sum(dim=-1)
        valid = padding_mask(spec.num_frames(counts), expected[..., 0])
        difference = float((found - expected)[valid].abs().max())
        limit = MAX_FLOAT32_DIFFERENCE * max(1.0, float(expected[valid].abs().max()) / USUAL_STATE)
        cosine = float(F.cosine_similarity(found[valid], expected[valid], dim=-1).mean())
        where = f"{exported.format_name} {exported.precision} on {batch} clips of {length} {spec.unit}"
        if exported.precision == "int8" and not cosine >= MIN_INT8_COSINE:
            raise ValueError(
                f"{where}: mean frame cosine with PyTorch is {cosine:.4f}, below {MIN_INT8_COSINE}; export float32"
            )
        if exported.precision != "int8" and not difference <= limit:
            raise ValueError(
                f"{where}: states differ from PyTorch's by up to {difference:.2e}, more than {limit:.1e}; choose "
                "another format"
            )
        results.append({"batch": batch, "length": length, "max_difference": difference, "mean_cosine": cosine})
    return results


def compare_on_clips(
    reference: EncoderRunner,
    exported: EncoderRunner,
    inputs: EncoderInputs,
    manifest_path: str | Path,
    *,
    max_clips: int = 20,
) -> dict[str, Any]:
    """Compare states on real clips, one at a time.

    Args:
        reference: of the model in float32 PyTorch.
        exported: of the export.
        inputs: of the model.
        manifest_path: the clips; those that cannot be decoded, or do not fit, are named in the log and left out.
        max_clips: only the first so many.

    Returns:
        `manifest`, `clips`, and over all their frames `max_difference` and `mean_cosine`.

    Raises:
        ValueError: `max_clips` is below 1, or no clip is left.
    """
    if max_clips < 1:
        raise ValueError(f"max_clips must be 1 or more, got {max_clips}")
    manifest = read_utterances(manifest_path)
    manifest = manifest.select(range(min(max_clips, len(manifest))))
    longest = MAX_CLIP_SECONDS if inputs.window is None else inputs.window.seconds
    batches = clip_batches(
        manifest, range(len(manifest)), sample_rate_hz=SAMPLE_RATE_HZ, batch_size=1, max_seconds=longest
    )
    cosines, differences = [], []
    for batch in tqdm(batches, total=len(manifest), desc="parity", unit="clip"):
        for skipped in batch.skipped:
            logger.warning("%s", skipped["reason"])
        for waveform in batch.waveforms:
            num_samples = torch.tensor([len(waveform)])
            values = inputs(waveform[None], num_samples)[reference.input.name]
            frames = int(inputs.num_frames(num_samples))
            expected, found = (runner(values)[0, :frames] for runner in (reference, exported))
            cosines.append(F.cosine_similarity(found, expected, dim=-1))
            differences.append(float((found - expected).abs().max()))
    if not cosines:
        raise ValueError(f"none of the {len(manifest)} clips of {manifest_path} could be used; see the log")
    return {
        "manifest": str(manifest_path),
        "clips": len(cosines),
        "max_difference": max(differences),
        "mean_cosine": float(torch.cat(cosines).mean()),
    }


def _noise(spec: EncoderInput, batch: int, length: int, shortest: int) -> tuple[Tensor, Tensor | None]:
    """Inputs of clips that get shorter from row to row, and their mask; Whisper's are equally long, without a mask."""
    generator = torch.Generator().manual_seed(length)
    if spec.mel_bins is not None:
        return torch.randn(batch, spec.mel_bins, length, generator=generator), None
    lengths = (length * torch.arange(batch, 0, -1) // batch).clamp(min=shortest)
    waveforms = 0.1 * torch.randn(batch, length, generator=generator)
    mask = padding_mask(lengths, waveforms)
    return waveforms.masked_fill(~mask, 0.0), mask


def _write_graph(encoder: PreTrainedModel, spec: EncoderInput, folder: Path, onnx_precision: str | None) -> None:
    """Trace a copy of the encoder for any batch and length and write it, as ONNX or, without a precision, as `.pt2`."""
    plain: Any = without_parametrizations(encoder)
    length = spec.shortest(SAMPLE_FRAMES)
    if spec.longest is not None:
        length = min(length, spec.longest // 2)  # short of the window, or the tracer takes it for the only length
    args: tuple[Tensor, ...]
    if spec.mel_bins is None:
        names = [spec.name, "attention_mask"]
        mask = torch.ones(2, length, dtype=torch.int64)
        mask[1, length // 2 :] = 0
        args = torch.zeros(2, length), mask
    else:
        names, args = [spec.name], (torch.zeros(2, spec.mel_bins, length),)
    time_axis = args[0].ndim - 1
    if onnx_precision is None:
        auto = torch.export.Dim.AUTO
        program = torch.export.export(
            states_module(plain), args, dynamic_shapes=({0: auto, time_axis: auto},) * len(args)
        )
        program.example_inputs = None
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths of this machine
        torch.export.save(program, folder / PROGRAM_FILE)
        return
    if plain.config.model_type != "wavlm":  # which has one attention alone
        plain.set_attn_implementation("eager")  # plain matrix products, which ONNX Runtime knows how to fuse
    time_name = "num_samples" if spec.mel_bins is None else "num_frames"
    graph = _to_onnx(states_module(plain), args, ({0: BATCH, time_axis: time_name},) * len(args), names, [STATES])
    if onnx_precision == "int8":
        split_gemms(graph)
        quantize_weights(graph)
    _save(graph, folder / ONNX_FILE, folder / ONNX_DATA_FILE, {})


def without_parametrizations(encoder: PreTrainedModel) -> PreTrainedModel:
    """A copy whose positional convolution holds its weight, where the original computes it from two at each call.

    `remove_parametrizations` on a copy would break the original, because both share a class; the convolution is
    replaced instead. The states are the same.
    """
    plain = copy.deepcopy(encoder)
    for module in list(plain.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv1d) and parametrize.is_parametrized(child, "weight"):
                conv = nn.Conv1d(
                    child.in_channels,
                    child.out_channels,
                    child.kernel_size[0],
                    stride=child.stride[0],
                    padding=child.padding[0],
                    groups=child.groups,
                    bias=child.bias is not None,
                )
                conv.weight = nn.Parameter(child.weight.detach().clone())
                conv.bias = child.bias
                setattr(module, name, conv)
    return plain.eval()


def split_gemms(graph: Any) -> None:
    """Make the Gemm nodes that have a weight a product and a sum, in place, so that `quantize_weights` sees them.

    WavLM's attention ends in one. Those with factors or a transposed input are left alone.

    Args:
        graph: an `onnx.ModelProto`, weights inside.
    """
    make_node = _require("onnx").helper.make_node
    weights = {weight.name for weight in graph.graph.initializer}
    nodes = []
    for node in graph.graph.node:
        options = {attribute.name: attribute.f or attribute.i for attribute in node.attribute}
        is_transposed = bool(options.pop("transB", 0))
        is_plain = options.pop("alpha", 1.0) == options.pop("beta", 1.0) == 1.0 and not options.get("transA", 0)
        if node.op_type != "Gemm" or node.input[1] not in weights or not is_plain:
            nodes.append(node)
            continue
        source, weight, *bias = node.input
        output = node.output[0]
        product = f"{output}_product" if bias else output
        if is_transposed:
            nodes.append(make_node("Transpose", [weight], [f"{output}_weight"], perm=[1, 0]))
            weight = f"{output}_weight"
        nodes.append(make_node("MatMul", [source, weight], [product]))
        if bias:
            nodes.append(make_node("Add", [product, *bias], [output]))
    graph.graph.ClearField("node")
    graph.graph.node.extend(nodes)
