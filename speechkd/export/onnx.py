"""Whisper models as ONNX graphs with key/value caches, under the names of Optimum, and a transcriber that runs them."""

import hashlib
import importlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from speechkd.data.collate import WhisperTokens
from speechkd.data.features import WhisperLogMel
from speechkd.models.greedy import ruled_out_tokens
from speechkd.teachers import load_processor, load_whisper

ONNX_PRECISIONS = ("float32", "int8")

ENCODER, DECODER, DECODER_WITH_PAST = "encoder_model", "decoder_model", "decoder_with_past_model"
OPSET = 18
INT8_LEVELS = 63  # with 127, sums of two products overflow on processors that have AVX2 but no VNNI
LAST_AXIS = "last_axis"  # name of a constant
INLINE_BYTES = 1024  # smaller weights stay in the graph
DATA_ALIGNMENT_BYTES = 4096  # a page, so that the file can be mapped into memory
BATCH, DECODER_LENGTH, PAST_LENGTH, ENCODER_LENGTH = (
    "batch_size",
    "decoder_sequence_length",
    "past_decoder_sequence_length",
    "encoder_sequence_length",
)


def export_onnx(model_folder: Path, output_dir: Path, *, precision: str) -> None:
    """Write a Whisper as three ONNX graphs that ONNX Runtime and Optimum's tools read, with its tokenizer and configs.

    `encoder_model.onnx` makes the encoder states, `decoder_model.onnx` reads them and the first tokens and makes the
    caches of self- and cross-attention, `decoder_with_past_model.onnx` goes on from the caches, one token at a time.
    Weights lie beside the graphs in `.onnx_data` files; those that the two decoders share are stored once.

    Args:
        model_folder: Hugging Face folder of a Whisper.
        output_dir: an empty folder.
        precision: `float32`, or `int8` for int8 weights of all linear layers and of the token embedding, one scale a
            channel; activations are quantised as they come.

    Raises:
        ValueError: an unknown precision, no Whisper, or a library is missing.
    """
    if precision not in ONNX_PRECISIONS:
        raise ValueError(f"ONNX precision {precision!r} is unknown; choose one of {', '.join(ONNX_PRECISIONS)}")
    for library in ("onnx", "onnxscript", "onnxruntime"):
        _require(library)
    model = load_whisper(str(model_folder), dtype=torch.float32)
    model.set_attn_implementation("eager")  # plain matrix products, which ONNX Runtime knows how to fuse
    decoder_places: dict[bytes, tuple[int, int]] = {}
    for name, graph in _graphs(model):
        if precision == "int8":
            quantize_weights(graph)
        if name == ENCODER:
            _save(graph, output_dir / f"{name}.onnx", output_dir / f"{ENCODER}.onnx_data", {})
        else:
            _save(graph, output_dir / f"{name}.onnx", output_dir / f"{DECODER}.onnx_data", decoder_places)
    model.config.save_pretrained(output_dir)
    model.generation_config.save_pretrained(output_dir)
    load_processor(str(model_folder)).save_pretrained(output_dir)


def _require(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ValueError(
            f'the ONNX format needs {library}, which is not installed; pip install "speechkd[export]"'
        ) from error


class _Encoder(nn.Module):
    def __init__(self, model: WhisperForConditionalGeneration) -> None:
        super().__init__()
        self.encoder = model.model.encoder

    def forward(self, input_features: Tensor) -> Tensor:
        return self.encoder(input_features).last_hidden_state


class _Decoder(nn.Module):
    """Logits and caches after the first tokens."""

    def __init__(self, model: WhisperForConditionalGeneration) -> None:
        super().__init__()
        self.decoder, self.head = model.model.decoder, model.proj_out

    def forward(self, input_ids: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        logits, cache = self.decode(
            input_ids, encoder_hidden_states, EncoderDecoderCache(DynamicCache(), DynamicCache())
        )
        layers = zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True)
        return (
            logits,
            *(state for ours, cross in layers for state in (ours.keys, ours.values, cross.keys, cross.values)),
        )

    def decode(self, input_ids: Tensor, encoder_hidden_states: Tensor, cache: Any) -> tuple[Tensor, Any]:
        states = self.decoder(
            input_ids=input_ids, encoder_hidden_states=encoder_hidden_states, cache=cache, use_cache=True
        ).last_hidden_state
        return self.head(states), cache


class _DecoderWithPast(_Decoder):
    """Logits and grown self-attention caches after one more token."""

    def forward(self, input_ids: Tensor, past_key_values: list[Tensor]) -> tuple[Tensor, ...]:  # type: ignore[override]
        own, cross = DynamicCache(), DynamicCache()
        for layer in range(len(past_key_values) // 4):
            keys, values, cross_keys, cross_values = past_key_values[4 * layer : 4 * layer + 4]
            own.update(keys, values, layer)
            cross.update(cross_keys, cross_values, layer)
        # with a filled cache the layers only ask whether there are encoder states
        logits, cache = self.decode(input_ids, past_key_values[2], EncoderDecoderCache(own, cross))
        return (logits, *(state for layer in cache.self_attention_cache.layers for state in (layer.keys, layer.values)))


def cache_names(prefix: str, num_layers: int, kinds: tuple[str, ...] = ("decoder", "encoder")) -> list[str]:
    """Names of the caches in the order of the graphs' inputs and outputs, such as `present.0.decoder.key`."""
    return [
        f"{prefix}.{layer}.{kind}.{part}" for layer in range(num_layers) for kind in kinds for part in ("key", "value")
    ]


def _graphs(model: WhisperForConditionalGeneration) -> Iterator[tuple[str, Any]]:
    """Name and `onnx.ModelProto` of the three graphs, weights inside, one at a time."""
    config = model.config
    # two of each: torch.export takes a size of 1 for a constant
    input_ids = torch.full((2, 4), config.decoder_start_token_id)
    features = torch.zeros(2, config.num_mel_bins, 2 * config.max_source_positions)
    states = torch.zeros(2, config.max_source_positions, config.d_model)
    head_width = config.d_model // config.decoder_attention_heads
    # each its own tensor: torch.export makes one input of a tensor that comes twice
    past = [
        torch.zeros(2, config.decoder_attention_heads, length, head_width)
        for _ in range(config.decoder_layers)
        for length in (4, 4, config.max_source_positions, config.max_source_positions)
    ]
    own_axes, cross_axes = {0: BATCH, 2: PAST_LENGTH}, {0: BATCH, 2: ENCODER_LENGTH}
    past_axes = [own_axes, own_axes, cross_axes, cross_axes] * config.decoder_layers
    yield ENCODER, _to_onnx(_Encoder(model), (features,), ({0: BATCH},), ["input_features"], ["last_hidden_state"])
    yield (
        DECODER,
        _to_onnx(
            _Decoder(model),
            (input_ids, states),
            ({0: BATCH, 1: DECODER_LENGTH}, {0: BATCH, 1: ENCODER_LENGTH}),
            ["input_ids", "encoder_hidden_states"],
            ["logits", *cache_names("present", config.decoder_layers)],
        ),
    )
    yield (
        DECODER_WITH_PAST,
        _to_onnx(
            _DecoderWithPast(model),
            (input_ids[:, :1], past),
            ({0: BATCH}, past_axes),
            ["input_ids", *cache_names("past_key_values", config.decoder_layers)],
            ["logits", *cache_names("present", config.decoder_layers, ("decoder",))],
        ),
    )


def _to_onnx(
    module: nn.Module, args: tuple[Any, ...], axes: tuple[Any, ...], input_names: list[str], output_names: list[str]
) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that inputs share an axis, as they should
        program: Any = torch.onnx.export(
            module.eval(),
            args,
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes=axes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    graph = program.model_proto
    for node in graph.graph.node:
        del node.metadata_props[:]  # stack traces with the paths of this machine
    del graph.graph.value_info[:]
    return graph


def quantize_weights(graph: Any) -> None:
    """Make the linear layers of a graph int8, in place: int8 weights, activations quantised as they come.

    The nodes are those of ONNX Runtime's dynamic quantisation. Its own tool would store a token embedding that is also
    the output head twice, and takes no graph above 2 GiB, which the encoder of a large Whisper is.

    Args:
        graph: an `onnx.ModelProto` as `torch.onnx.export` makes it, weights inside.
    """
    to_tensor, to_array = _require("onnx").numpy_helper.from_array, _require("onnx").numpy_helper.to_array
    weights = {weight.name: weight for weight in graph.graph.initializer}
    # the output head is the token embedding, transposed
    heads = {
        node.output[0]: node.input[0]
        for node in graph.graph.node
        if node.op_type == "Transpose" and node.input[0] in weights
    }
    quantized: dict[str, list[Any]] = {}
    quantized_inputs: set[str] = set()

    def quantize(name: str) -> None:
        if name not in quantized:
            weight = to_array(weights[name])
            values, scales = quantize_channels(weight.T if name in heads.values() else weight)
            quantized[name] = [to_tensor(values, f"{name}_int8"), to_tensor(scales, f"{name}_scale")]

    nodes = []
    for node in graph.graph.node:
        if node.output[0] in heads:
            continue
        if node.op_type == "Gather" and node.input[0] in heads.values():
            quantize(node.input[0])
            nodes += _int8_embedding(node)
        elif node.op_type == "MatMul" and (name := heads.get(node.input[1], node.input[1])) in weights:
            quantize(name)
            nodes += _int8_product(node, name, is_input_quantized=node.input[0] in quantized_inputs)
            quantized_inputs.add(node.input[0])
        else:
            nodes.append(node)
    kept = [weight for name, weight in weights.items() if name not in quantized]
    graph.graph.ClearField("node")
    graph.graph.node.extend(nodes)
    graph.graph.ClearField("initializer")
    graph.graph.initializer.extend([*kept, to_tensor(np.array([-1]), LAST_AXIS), *sum(quantized.values(), [])])


def _int8_embedding(node: Any) -> list[Any]:
    """Nodes in place of a Gather of rows; the int8 weight is stored as the output head wants it, (dim, vocabulary)."""
    (name, token_ids), output = node.input, node.output[0]
    make_node = _require("onnx").helper.make_node
    return [
        make_node("Gather", [f"{name}_int8", token_ids], [f"{output}_columns"], axis=1),  # (dim, batch, length)
        make_node("Transpose", [f"{output}_columns"], [f"{output}_int8"], perm=[1, 2, 0]),
        make_node("Cast", [f"{output}_int8"], [f"{output}_unscaled"], to=_require("onnx").TensorProto.FLOAT),
        make_node("Gather", [f"{name}_scale", token_ids], [f"{output}_scale"]),
        make_node("Unsqueeze", [f"{output}_scale", LAST_AXIS], [f"{output}_scales"]),
        make_node("Mul", [f"{output}_unscaled", f"{output}_scales"], [output]),
    ]


def _int8_product(node: Any, name: str, *, is_input_quantized: bool) -> list[Any]:
    """Nodes in place of a MatMul with a weight; products of one input share its quantisation."""
    source, output = node.input[0], node.output[0]
    make_node = _require("onnx").helper.make_node
    uint8, scale, zero_point = f"{source}_uint8", f"{source}_uint8_scale", f"{source}_uint8_zero_point"
    nodes = [
        make_node("DynamicQuantizeLinear", [source], [uint8, scale, zero_point]),
        make_node("MatMulInteger", [uint8, f"{name}_int8", zero_point], [f"{output}_int32"]),
        make_node("Cast", [f"{output}_int32"], [f"{output}_unscaled"], to=_require("onnx").TensorProto.FLOAT),
        make_node("Mul", [scale, f"{name}_scale"], [f"{output}_scale"]),
        make_node("Mul", [f"{output}_unscaled", f"{output}_scale"], [output]),
    ]
    return nodes[1:] if is_input_quantized else nodes


def quantize_channels(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric integers and the scale of each output channel.

    Args:
        weight: (in, out), float32.

    Returns:
        Values of -63 to 63, (in, out), int8, and scales, (out,), float32; the weight is about their product.
    """
    largest = np.abs(weight).max(axis=0)
    scales = np.where(largest > 0, largest, 1).astype(np.float32) / np.float32(INT8_LEVELS)
    return np.ascontiguousarray(np.rint(weight / scales).astype(np.int8)), scales


def _save(graph: Any, path: Path, data_path: Path, places: dict[bytes, tuple[int, int]]) -> None:
    """Write a graph and append its weights to the data file, but for those that lie there already.

    Args:
        graph: an `onnx.ModelProto`; its weights are taken out.
        path: of the graph.
        data_path: of the weights, in the same folder.
        places: offset and length in the data file by the hash of the content; completed.
    """
    set_external_data = importlib.import_module("onnx.external_data_helper").set_external_data
    with data_path.open("ab") as data:
        for weight in graph.graph.initializer:
            if len(weight.raw_data) < INLINE_BYTES:
                continue
            digest = hashlib.sha256(weight.raw_data).digest()
            if digest not in places:
                data.write(bytes(-data.tell() % DATA_ALIGNMENT_BYTES))
                places[digest] = data.tell(), len(weight.raw_data)
                data.write(weight.raw_data)
            offset, length = places[digest]
            set_external_data(weight, data_path.name, offset=offset, length=length)
            weight.ClearField("raw_data")
    path.write_bytes(graph.SerializeToString())


def onnx_transcriber(
    folder: Path, *, language: str | None, task: str, max_new_tokens: int
) -> Callable[[np.ndarray], str]:
    """Greedy transcription by ONNX Runtime on the CPU, without timestamps and with Whisper's suppressed tokens.

    Args:
        folder: made by `export_onnx`.
        language: language code; None for English-only models.
        task: "transcribe" or "translate".
        max_new_tokens: limit of decoded tokens, end token included.

    Returns:
        From 16 kHz samples, at most 30 s, (samples,), float32, to the text.

    Raises:
        ValueError: ONNX Runtime is not installed, a file is missing, or the vocabulary lacks the language.
    """
    tokenizer = load_processor(str(folder)).tokenizer
    decode = onnx_decoder(
        folder, WhisperTokens.from_tokenizer(tokenizer, language=language, task=task), max_new_tokens=max_new_tokens
    )
    return lambda waveform: tokenizer.decode(decode(waveform), skip_special_tokens=True).strip()


def onnx_decoder(folder: Path, tokens: WhisperTokens, *, max_new_tokens: int) -> Callable[[np.ndarray], list[int]]:
    """As `onnx_transcriber`, but to the token ids of `greedy_decode`: with the prefix, and the end token if reached."""
    runtime = _require("onnxruntime")
    encoder, decoder, decoder_with_past = (
        _session(runtime, folder / f"{name}.onnx") for name in (ENCODER, DECODER, DECODER_WITH_PAST)
    )
    config = WhisperConfig.from_pretrained(folder)
    log_mel = WhisperLogMel.for_model(config)
    generation = GenerationConfig.from_pretrained(folder)
    ruled_out, ruled_out_first = ruled_out_tokens(generation, config.vocab_size, tokens, timestamps=False).numpy()
    made = ["logits", *cache_names("present", config.decoder_layers)]
    grown = ["logits", *cache_names("present", config.decoder_layers, ("decoder",))]
    longest = min(len(tokens.prefix) + max_new_tokens, config.max_target_positions)

    def to_runtime(array: np.ndarray) -> Any:
        return runtime.OrtValue.ortvalue_from_numpy(array)

    def decode(waveform: np.ndarray) -> list[int]:
        features = log_mel(torch.from_numpy(waveform).unsqueeze(0)).numpy()
        (states,) = encoder.run_with_ort_values(["last_hidden_state"], {"input_features": to_runtime(features)})
        token_ids = list(tokens.prefix)
        inputs = {"input_ids": to_runtime(np.array([token_ids])), "encoder_hidden_states": states}
        logits, *caches = decoder.run_with_ort_values(made, inputs)
        past = {name.replace("present", "past_key_values"): cache for name, cache in zip(made[1:], caches, strict=True)}
        scores = logits.numpy()[0, -1] + ruled_out_first
        while True:
            token_ids.append(int((scores + ruled_out).argmax()))
            if token_ids[-1] == tokens.end_of_text or len(token_ids) >= longest:
                return token_ids
            inputs = {"input_ids": to_runtime(np.array([token_ids[-1:]])), **past}
            logits, *caches = decoder_with_past.run_with_ort_values(grown, inputs)
            past |= {n.replace("present", "past_key_values"): cache for n, cache in zip(grown[1:], caches, strict=True)}
            scores = logits.numpy()[0, -1]

    return decode


def _session(runtime: Any, path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; make it with `speechkd export --format onnx`")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
