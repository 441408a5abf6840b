"""Encoders side by side: what is measured of each, in which order, and what does not fit."""

import json

import pytest
import torch
from transformers import HubertConfig, HubertModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from speechkd import bench_encoders as bench
from speechkd.bench_encoders import bench_encoders
from speechkd.bench_table import table_lines
from speechkd.export.encoder import export_encoder
from speechkd.models.speech_encoders import save_encoder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny random encoders: a HuBERT, the export of a Whisper with a window of 5 s, and one with 2 s."""
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions = {"conv_dim": [8] * 7, "num_conv_pos_embedding_groups": 2, "num_conv_pos_embeddings": 16}
    hubert = HubertModel(HubertConfig(**sizes, **convolutions)).eval()
    save_encoder(hubert, root / "hubert", normalize_input=False)
    sizes = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    whisper = WhisperEncoder(WhisperConfig(**sizes, max_source_positions=100)).eval()
    save_encoder(whisper, root / "whisper", normalize_input=False)
    longer = WhisperEncoder(WhisperConfig(**sizes, max_source_positions=250)).eval()
    export_encoder(longer, root / "program", "torch_export")
    return {name: str(root / name) for name in ("hubert", "program", "whisper")}


@pytest.fixture(scope="module")
def result(folders):
    return bench_encoders([folders["hubert"], folders["program"], folders["whisper"]], seconds=(1, 4.0), rounds=2)


def test_each_encoder_has_its_size_speed_and_memory(result, folders):
    (hubert, program, _), formats = result["models"], ("huggingface", "torch_export", "huggingface")
    for model, kind, format_name in zip(result["models"], folders, formats, strict=True):
        assert (model["name"], model["format"], model["precision"]) == (folders[kind], format_name, "float32")
        assert 0.01 < model["size_megabytes"] < 2 and model["load_seconds"] > 0
        assert 0 < model["latency_median_seconds_1s"] <= model["latency_p95_seconds_1s"]
        assert model["speed_ratio_1s"] == pytest.approx(
            hubert["latency_median_seconds_1s"] / model["latency_median_seconds_1s"]
        )
    parameters = HubertModel.from_pretrained(folders["hubert"]).num_parameters()
    assert hubert["parameters"] == parameters != program["parameters"] > 1_000
    assert hubert["speed_ratio_4s"] == 1 and hubert["rtfx_batched"] > 0 and program["rtfx_batched"] > 0
    assert hubert["peak_memory_megabytes"] is None or hubert["peak_memory_megabytes"] > 0
    assert (result["seconds"], result["rounds"]) == ([1, 4], 2)
    assert (result["batch_size"], result["batch_clip_seconds"]) == (8, 4)
    assert result["num_threads"] == torch.get_num_threads() and "core" in result["device"] and len(result["date"]) == 10
    assert json.loads(json.dumps(result)) == result


def test_a_whisper_is_measured_at_lengths_that_fit_its_window(result):
    whisper = result["models"][2]
    assert whisper["latency_median_seconds_1s"] > 0
    for key in ("latency_median_seconds_4s", "latency_p95_seconds_4s", "speed_ratio_4s", "rtfx_batched"):
        assert whisper[key] is None


def test_the_table_has_one_row_an_encoder_and_dashes_for_what_does_not_fit(result):
    header, hubert, program, whisper, conditions = table_lines(result)
    for title in ("disk MB", "parameters", "load s", "median 1 s", "speed 4 s", "RTFx batched", "memory MB"):
        assert title in header
    assert "WER" not in header and "-" not in hubert.split()[1:] and program.split()[0].endswith("program")
    assert whisper.split().count("-") >= 3
    assert conditions.startswith("noise, 2 rounds, batches of 8 clips of 4 s, ") and "speed beside" in conditions


def test_all_encoders_run_at_a_length_before_the_next_length_comes(folders, monkeypatch):
    order = []
    run = bench._run

    def recorded(runner, inputs):
        order.append((runner.name, tuple(inputs.shape)))
        run(runner, inputs)

    monkeypatch.setattr(bench, "_run", recorded)
    names = [folders["hubert"], folders["whisper"]]
    bench_encoders(names, seconds=(0.5, 1.0), rounds=2)
    half, whole, batched = (16_000 // 2,), (16_000,), (8, 64_000)
    one_round = [
        (names[0], (1, *half)),
        (names[1], (1, 80, 50)),
        (names[0], (1, *whole)),
        (names[1], (1, 80, 100)),
        (names[0], batched),
    ]
    assert order[-10:] == 2 * one_round
    assert len(order) == 10 + 4 + 3  # each warms up at every length, and once more for its memory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": []}, "nothing to measure in 0 models at 3 lengths"),
        ({"seconds": ()}, "nothing to measure in 1 models at 0 lengths"),
        ({"rounds": 0}, "rounds must be 1 or more, got 0"),
        ({"seconds": (1.0, 0.01)}, "seconds has 0.01; give lengths of 0.1 s or more"),
        ({"seconds": (float("nan"),)}, "seconds has nan"),
        ({"names": ["./missing"]}, "'./missing' does not exist"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, message, folders):
    arguments = {"names": [folders["hubert"]]} | changes
    with pytest.raises(ValueError, match=message):
        bench_encoders(arguments.pop("names"), **arguments)
