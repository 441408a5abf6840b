import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_whisper
from transformers import GenerationConfig, WhisperForConditionalGeneration, WhisperProcessor

from speechkd.bundled import bundled_path
from speechkd.data.collate import WhisperTokens
from speechkd.data.features import WhisperLogMel
from speechkd.export.onnx import (
    cache_names,
    export_onnx,
    onnx_decoder,
    onnx_transcriber,
    quantize_channels,
    quantize_weights,
)
from speechkd.models.whisper import greedy_decode
from speechkd.teachers import load_processor, load_whisper

onnx = pytest.importorskip("onnx", exc_type=ImportError)
onnxruntime = pytest.importorskip("onnxruntime", exc_type=ImportError)
pytest.importorskip("onnxscript", exc_type=ImportError)

GRAPHS = ("encoder_model", "decoder_model", "decoder_with_past_model")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """Two decoder layers with weights so large that the greedy text is no repetition of one token."""
    folder = tmp_path_factory.mktemp("model")
    bundled = bundled_path("whisper-base")
    model = tiny_whisper(decoder_layers=2)
    torch.manual_seed(1)
    with torch.no_grad():
        model.model.decoder.embed_tokens.weight.normal_()
        model.model.decoder.embed_positions.weight.normal_(std=3)
        for weight in model.model.decoder.layers.parameters():
            weight.normal_(std=0.4)
    model.generation_config = GenerationConfig.from_pretrained(bundled)
    model.save_pretrained(folder)
    WhisperProcessor.from_pretrained(bundled).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(model_folder) -> WhisperForConditionalGeneration:
    return load_whisper(str(model_folder))


@pytest.fixture(scope="module")
def tokens(model_folder) -> WhisperTokens:
    return WhisperTokens.from_tokenizer(load_processor(str(model_folder)).tokenizer)


@pytest.fixture(scope="module")
def exported(model_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export_onnx(model_folder, folder, precision="float32")
    return folder


def run(source: Path | bytes, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(source if isinstance(source, bytes) else str(source), options)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def test_the_graphs_are_valid_and_have_the_names_and_free_axes_that_optimum_reads(exported):
    past, present = cache_names("past_key_values", 2), cache_names("present", 2)
    assert present[:3] == ["present.0.decoder.key", "present.0.decoder.value", "present.0.encoder.key"]
    expected = {
        "encoder_model": (["input_features"], ["last_hidden_state"]),
        "decoder_model": (["input_ids", "encoder_hidden_states"], ["logits", *present]),
        "decoder_with_past_model": (["input_ids", *past], ["logits", *cache_names("present", 2, ("decoder",))]),
    }
    for name, (inputs, outputs) in expected.items():
        onnx.checker.check_model(exported / f"{name}.onnx")
        graph = onnx.load(exported / f"{name}.onnx", load_external_data=False).graph
        assert ([value.name for value in graph.input], [value.name for value in graph.output]) == (inputs, outputs)
        assert all(value.type.tensor_type.shape.dim[0].dim_param == "batch_size" for value in graph.input)
        assert not any(node.metadata_props for node in graph.node)
    for file in ("config.json", "generation_config.json", "tokenizer.json", "processor_config.json"):
        assert (exported / file).is_file()


def test_weights_lie_outside_and_those_of_both_decoders_once(exported, model):
    decoder_bytes = 4 * sum(weight.numel() for weight in model.model.decoder.parameters())
    pages = 4096 * sum(1 for _ in model.model.decoder.parameters())
    assert decoder_bytes <= (exported / "decoder_model.onnx_data").stat().st_size < decoder_bytes + pages
    assert not (exported / "decoder_with_past_model.onnx_data").exists()
    assert (exported / "decoder_with_past_model.onnx").stat().st_size < 100_000


def test_batches_of_any_size_give_pytorchs_states_and_logits(exported, model):
    features = torch.randn(3, 80, 3000, generator=torch.Generator().manual_seed(0))
    input_ids = torch.tensor([[50258, 50259, 50359, 50363, 7]]).expand(3, -1).contiguous()
    with torch.no_grad():
        states = model.model.encoder(features).last_hidden_state
        short = states[:, :700]  # the length of the encoder states is free too
        logits = model(encoder_outputs=(short,), decoder_input_ids=input_ids).logits
    found = run(exported / "encoder_model.onnx", input_features=features.numpy())["last_hidden_state"]
    np.testing.assert_allclose(found, states, atol=1e-4)
    first = {"input_ids": input_ids[:, :2].numpy(), "encoder_hidden_states": short.numpy()}
    found = run(exported / "decoder_model.onnx", **first)
    np.testing.assert_allclose(found["logits"], logits[:, :2], atol=1e-3)
    for position in range(2, 5):
        past = {name.replace("present", "past_key_values"): found[name] for name in cache_names("present", 2)}
        one = {"input_ids": input_ids[:, position : position + 1].numpy()}
        found |= run(exported / "decoder_with_past_model.onnx", **one, **past)
        np.testing.assert_allclose(found["logits"][:, 0], logits[:, position], atol=1e-3)
    assert found["present.1.decoder.key"].shape == (3, 2, 5, 8)


@pytest.mark.parametrize("max_new_tokens", [1, 20])
def test_the_decoded_tokens_are_those_of_greedy_decoding(exported, model, tokens, max_new_tokens):
    decode = onnx_decoder(exported, tokens, max_new_tokens=max_new_tokens)
    for seed in range(3):
        waveform = 0.1 * torch.randn(16_000 + 4_000 * seed, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            states = model.model.encoder(WhisperLogMel()(waveform.unsqueeze(0))).last_hidden_state
        expected = greedy_decode(model, states, tokens, max_new_tokens=max_new_tokens)[0].token_ids
        assert decode(waveform.numpy()) == expected
        assert max_new_tokens == 1 or len(set(expected[len(tokens.prefix) :])) > 2


def test_the_text_has_no_special_tokens(exported, tokens):
    waveform = np.zeros(8_000, dtype=np.float32)
    token_ids = onnx_decoder(exported, tokens, max_new_tokens=12)(waveform)
    text = onnx_transcriber(exported, language="en", task="transcribe", max_new_tokens=12)(waveform)
    tokenizer = load_processor(str(exported)).tokenizer
    assert text == tokenizer.decode([token for token in token_ids if token < tokens.end_of_text]).strip() != ""


def test_int8_channels_are_off_by_half_a_step_at_most_and_never_use_the_eighth_bit():
    weight = np.random.default_rng(0).standard_normal((40, 5)).astype(np.float32) * [1, 10, 0.01, 0, 3]
    values, scales = quantize_channels(weight.astype(np.float32))
    assert (
        values.dtype == np.int8
        and values.shape == (40, 5)
        and np.abs(values).max(axis=0).tolist() == [63, 63, 63, 0, 63]
    )
    assert (np.abs(values * scales - weight) <= 0.501 * np.abs(weight).max(axis=0) / 63).all()


def test_int8_graphs_hold_the_embedding_once_and_stay_near_the_float_logits(exported, model):
    graph = onnx.load(exported / "decoder_model.onnx")
    inputs = {
        "input_ids": np.array([[50258, 50259, 50359, 50363], [50258, 1, 2, 3]]),
        "encoder_hidden_states": np.random.default_rng(0).standard_normal((2, 1500, 16)).astype(np.float32),
    }
    expected = run(graph.SerializeToString(), **inputs)
    quantize_weights(graph)
    found = run(graph.SerializeToString(), **inputs)
    kinds = {weight.name: (weight.data_type, tuple(weight.dims)) for weight in graph.graph.initializer}
    embeddings = [kind for kind in kinds.values() if 51865 in kind[1] and len(kind[1]) == 2]
    assert embeddings == [(onnx.TensorProto.INT8, (16, 51865))]
    matrices = sum(kind == onnx.TensorProto.INT8 for kind, _ in kinds.values())
    assert matrices == 1 + 2 * 10  # of each layer: two times four projections and the feed-forward's two
    for name in ("logits", "present.0.decoder.key", "present.1.encoder.value"):
        assert np.corrcoef(found[name].ravel(), expected[name].ravel())[0, 1] > 0.99, name
        assert not np.array_equal(found[name], expected[name])


def test_an_unknown_precision_and_a_missing_graph_are_refused(tmp_path, model_folder, tokens):
    with pytest.raises(ValueError, match="'float16' is unknown; choose one of float32, int8"):
        export_onnx(model_folder, tmp_path, precision="float16")
    with pytest.raises(ValueError, match="encoder_model.onnx does not exist"):
        onnx_decoder(tmp_path, tokens, max_new_tokens=4)


@pytest.mark.parametrize("library", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_library_is_named_with_the_extra_that_brings_it(monkeypatch, tmp_path, model_folder, library):
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    with pytest.raises(ValueError, match=rf"{library}, which is not installed; pip install \"speechkd\[export\]\""):
        export_onnx(model_folder, tmp_path, precision="float32")
