import json

import numpy as np
import pytest
import torch
from conftest import tiny_whisper
from torch.nn import functional as F
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

from speechkd.bench import bench_models
from speechkd.data.features import WhisperLogMel
from speechkd.export import export_model
from speechkd.export.ggml import ggml_transcriber
from speechkd.export.transcribers import load_transcriber
from speechkd.labels.decoding import DecodingConfig
from speechkd.models.whisper import shorten_window

SETTINGS = {"language": "en", "task": "transcribe", "max_new_tokens": 8}
WINDOW_SECONDS = 2


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=0.1, size=round(seconds * 16_000)).astype(np.float32)


@pytest.fixture(scope="module")
def short(tiny_teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("window") / "short"
    export_model(tiny_teacher, "huggingface", folder, window_seconds=WINDOW_SECONDS)
    return folder


def test_the_shorter_encoder_is_the_same_one_on_the_first_positions():
    model, whole = tiny_whisper(), tiny_whisper()
    shorten_window(model, WINDOW_SECONDS)
    features = WhisperLogMel.for_model(model.config)(torch.from_numpy(noise(1.5))[None])
    assert features.shape == (1, 80, 200)
    encoder = whole.model.encoder
    states = F.gelu(encoder.conv2(F.gelu(encoder.conv1(features)))).transpose(1, 2)
    states = states + encoder.embed_positions.weight[:100]
    for layer in encoder.layers:
        states = layer(states, None)
        states = states[0] if isinstance(states, tuple) else states
    torch.testing.assert_close(model.model.encoder(features).last_hidden_state, encoder.layer_norm(states))


def test_a_short_log_mel_is_whispers_own_of_that_chunk_length():
    wave = noise(1.3)
    expected = WhisperFeatureExtractor(chunk_length=WINDOW_SECONDS)(
        wave, sampling_rate=16_000, return_tensors="pt"
    ).input_features
    torch.testing.assert_close(WhisperLogMel(80, WINDOW_SECONDS)(torch.from_numpy(wave)[None]), expected)


def test_stock_transformers_runs_the_folder(short):
    model = WhisperForConditionalGeneration.from_pretrained(short)
    features = WhisperFeatureExtractor.from_pretrained(short)(noise(1.5), sampling_rate=16_000, return_tensors="pt")
    assert model.config.max_source_positions == 100 and features.input_features.shape[-1] == 200
    assert model.generate(features.input_features, max_new_tokens=3, language="en").shape[1] >= 1
    assert json.loads((short / "export.json").read_text())["window_seconds"] == WINDOW_SECONDS


@pytest.mark.parametrize("format_name", ["ctranslate2", "onnx"])
def test_other_formats_say_what_the_shorter_model_says(tiny_teacher, short, format_name, tmp_path):
    export_model(tiny_teacher, format_name, tmp_path / "out", window_seconds=WINDOW_SECONDS)
    export = json.loads((tmp_path / "out/export.json").read_text())
    whole_model = tiny_whisper(decoder_layers=3)
    lost = 0 if format_name == "ctranslate2" else (1500 - 100) * 16
    assert export["parameters"] == whole_model.num_parameters() - lost
    ours = load_transcriber(str(tmp_path / "out"), **SETTINGS)
    whole = load_transcriber(tiny_teacher, **SETTINGS)
    shorter = load_transcriber(str(short), **SETTINGS)
    clips = [noise(seconds, seed) for seed, seconds in enumerate((0.5, 1.0, 2.0))]
    assert [ours(clip) for clip in clips] == [shorter(clip) for clip in clips]
    assert [ours(clip) for clip in clips] != [whole(clip) for clip in clips]
    with pytest.raises(ValueError, match="2.50 s is longer than the model's window of 2 s"):
        ours(noise(2.5))


def test_whisper_cpp_gets_the_shorter_window_from_the_file(tmp_path):
    from test_export_ggml import save_model

    from speechkd.export.ggml import GGML_FILE, export_ggml
    from speechkd.export.huggingface import export_short_window

    save_model(tmp_path / "model")
    export_short_window(tmp_path / "model", tmp_path / "short", WINDOW_SECONDS)
    (tmp_path / "out").mkdir()
    export_ggml(tmp_path / "short", tmp_path / "out", precision="f16")
    assert int.from_bytes((tmp_path / "out" / GGML_FILE).read_bytes()[8:12], "little") == 100
    transcribe = ggml_transcriber(tmp_path / "out", language="en", task="transcribe", max_new_tokens=4)
    assert isinstance(transcribe(noise(1.0)), str)
    with pytest.raises(ValueError, match="longer than the model's window of 2 s"):
        transcribe(noise(2.5))


@pytest.mark.parametrize("window_seconds", [0, 31])
def test_a_window_that_the_model_lacks_is_refused(tiny_teacher, window_seconds, tmp_path):
    with pytest.raises(ValueError, match=f"window of {window_seconds} s cannot be cut from the model's 30 s; choose 1"):
        export_model(tiny_teacher, "huggingface", tmp_path / "out", window_seconds=window_seconds)
    assert not list(tmp_path.iterdir())


def test_clips_longer_than_the_window_are_counted_before_any_work(tiny_teacher, tone_manifest, tmp_path):
    message = "5 of 6 clips of .* are longer than the export's window of 1 s, the longest has 2.00 s"
    with pytest.raises(ValueError, match=message):
        export_model(tiny_teacher, "onnx", tmp_path / "out", window_seconds=1, manifest_path=tone_manifest)
    assert not (tmp_path / "out").exists()
    export_model(tiny_teacher, "huggingface", tmp_path / "one", window_seconds=1)
    with pytest.raises(ValueError, match=message):
        bench_models([tiny_teacher, str(tmp_path / "one")], tone_manifest, decoding=DecodingConfig(max_new_tokens=2))
    measured = bench_models(
        [tiny_teacher, str(tmp_path / "one")], tone_manifest, decoding=DecodingConfig(max_new_tokens=2), max_clips=1
    )
    assert [model["name"] for model in measured["models"]] == [tiny_teacher, str(tmp_path / "one")]
