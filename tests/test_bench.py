import json
import logging

import pytest
import torch
from conftest import tiny_whisper

from speechkd import bench
from speechkd.bench import bench_models
from speechkd.bench_table import COLUMNS, table_lines
from speechkd.cli import main
from speechkd.data.manifest import read_manifest, write_manifest
from speechkd.export import export_model
from speechkd.labels.pseudo_label import DecodingConfig
from speechkd.models.whisper import student_from_teacher
from speechkd.resources import peak_megabytes
from speechkd.teachers import load_processor, load_whisper

DECODING = DecodingConfig(batch_size=4, max_new_tokens=4)


@pytest.fixture(scope="module")
def student_folder(tiny_teacher, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("student")
    student_from_teacher(load_whisper(tiny_teacher), decoder_layers=2).save_pretrained(folder)
    load_processor(tiny_teacher).save_pretrained(folder)
    return str(folder)


def test_bench_prints_a_table_with_one_row_for_each_model_and_the_assisted_one(
    tiny_teacher, student_folder, tone_manifest, capsys
):
    arguments = ["bench", "--models", tiny_teacher, student_folder, "--manifest", str(tone_manifest)]
    main([*arguments, "--assistant", student_folder, "--max-clips", "2", "--max-new-tokens", "4"])
    header, teacher, student, assisted, conditions, speculative = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "model" and "RTFx" in header and "WER %" in header
    assert teacher.startswith(f"{tiny_teacher}  ") and student.startswith(f"{student_folder}  ")
    assert assisted.startswith(f"{tiny_teacher} + {student_folder}  ")
    assert conditions.startswith("2 clips, 2 s (0 skipped)")
    assert "2 of 2 texts identical" in speculative


def test_json_holds_what_the_models_are_and_how_they_did(tiny_teacher, student_folder, tone_manifest, capsys):
    arguments = ["bench", "--models", tiny_teacher, student_folder, "--manifest", str(tone_manifest)]
    main([*arguments, "--assistant", student_folder, "--max-clips", "3", "--max-new-tokens", "4", "--json"])
    result = json.loads(capsys.readouterr().out)
    teacher, student, assisted = result["models"]
    assert result["num_clips"] == 3 and result["audio_seconds"] == pytest.approx(1.0 + 1.2 + 1.4)
    assert teacher["parameters"] == load_whisper(tiny_teacher).num_parameters()
    decoder = load_whisper(student_folder).model.decoder.num_parameters()
    assert assisted["parameters"] == teacher["parameters"] + decoder
    assert assisted["size_megabytes"] == pytest.approx(teacher["size_megabytes"] + student["size_megabytes"])
    assert teacher["wer"] == assisted["wer"]
    for row in (teacher, student, assisted):
        assert 0 < row["latency_median_seconds"] <= row["latency_p95_seconds"] and row["rtfx"] > 0
    found = result["speculative"]
    assert found["num_identical_texts"] == 3 and 0 <= found["acceptance_rate"] <= 1
    assert found["tokens_per_step"] >= 1 and found["speed_ratio"] > 0


def test_without_text_models_are_scored_against_the_first_ones_transcripts(tiny_teacher, tone_manifest):
    rows = [row | {"text": None} for row in read_manifest(tone_manifest)]
    manifest = tone_manifest.with_name("untranscribed.jsonl")
    write_manifest(manifest, [{key: row[key] for key in row if row[key] is not None} for row in rows])
    result = bench_models([tiny_teacher], manifest, decoding=DECODING, max_clips=1)
    assert result["reference"] == f"the transcripts of {tiny_teacher}"
    assert result["models"][0]["wer"] in (0.0, None)  # None where the random model says nothing that counts as a word


def test_every_clip_goes_through_all_models_before_the_next(tiny_teacher, student_folder, tone_manifest, monkeypatch):
    order = []
    encode = bench.encode

    def recorded(model, features):
        order.append((model.config.decoder_layers, len(features)))
        return encode(model, features)

    monkeypatch.setattr(bench, "encode", recorded)
    bench_models([tiny_teacher, student_folder], tone_manifest, decoding=DECODING, max_clips=2)
    timed = order[4:]  # each warms up twice, for its kernels and for its memory
    assert timed == [(3, 1), (2, 1), (3, 1), (2, 1), (3, 2), (2, 2)]


def test_peak_memory_is_what_a_call_takes_beyond_what_is_held():
    held = torch.ones(8_000_000)
    megabytes = peak_megabytes(lambda: torch.ones(16_000_000).sum().item(), torch.device("cpu"))
    assert megabytes is None or megabytes == pytest.approx(64, abs=8)
    assert held.numel() == 8_000_000


def test_a_clip_that_cannot_be_decoded_is_named_and_left_out(tiny_teacher, tone_manifest, caplog):
    (tone_manifest.parent / "audio/1.wav").write_bytes(b"no audio")
    with caplog.at_level(logging.WARNING):
        result = bench_models([tiny_teacher], tone_manifest, decoding=DECODING, max_clips=2)
    assert (result["num_clips"], result["num_skipped"]) == (1, 1)
    assert "tone-1" in caplog.text
    (tone_manifest.parent / "audio/0.wav").write_bytes(b"no audio")
    with pytest.raises(ValueError, match="none of the 2 clips"):
        bench_models([tiny_teacher], tone_manifest, decoding=DECODING, max_clips=2)


def test_no_clips_asked_for_and_a_foreign_assistant_are_refused_before_any_decoding(
    tiny_teacher, tone_manifest, tmp_path
):
    with pytest.raises(ValueError, match="max_clips must be 1 or more, got 0"):
        bench_models([tiny_teacher], tone_manifest, decoding=DECODING, max_clips=0)
    tiny_whisper(vocab_size=51866).save_pretrained(tmp_path / "v3")
    with pytest.raises(ValueError, match="51866 tokens and the teacher 51865"):
        bench_models([tiny_teacher], tone_manifest, decoding=DECODING, assistant_name=str(tmp_path / "v3"))


def test_exports_stand_beside_the_model_that_they_were_made_of(tiny_teacher, tone_manifest, tmp_path, capsys):
    pytest.importorskip("ctranslate2", exc_type=ImportError)
    folder = str(tmp_path / "int8")
    export_model(tiny_teacher, "ctranslate2", folder, precision="int8")
    arguments = ["bench", "--models", tiny_teacher, folder, "--manifest", str(tone_manifest), "--max-clips", "2"]
    main([*arguments, "--max-new-tokens", "4", "--json"])
    source, export = json.loads(capsys.readouterr().out)["models"]
    assert export["name"] == folder and export["parameters"] == source["parameters"]
    assert 0 < export["latency_median_seconds"] <= export["latency_p95_seconds"]
    assert export["rtfx"] > 0 and export["rtfx_batched"] > 0 and export["size_megabytes"] > 1
    assert export["load_seconds"] > 0 and export["wer"] is not None
    with pytest.raises(ValueError, match="is an export, which takes no assistant"):
        bench_models([folder], tone_manifest, decoding=DECODING, assistant_name=tiny_teacher)


def test_a_format_that_takes_one_clip_at_a_time_has_no_batched_throughput(
    tiny_teacher, tone_manifest, tmp_path, monkeypatch
):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx/export.json").write_text('{"format": "onnx", "parameters": 7}')
    said = []  # a runtime that only counts
    monkeypatch.setattr(
        bench, "load_transcriber", lambda name, **options: lambda clip: said.append(len(clip)) or "a tone"
    )
    found = bench_models([tiny_teacher, str(tmp_path / "onnx")], tone_manifest, decoding=DECODING, max_clips=2)
    _, export = found["models"]
    assert export["rtfx_batched"] is None and export["rtfx"] > 0 and export["parameters"] == 7
    assert export["wer"] == 0.0
    assert said == [16000] + 4 * [19200]  # loading, warm-up twice, each clip once; padded to the batch for all alike


def test_bench_has_help(capsys):
    with pytest.raises(SystemExit) as error:
        main(["bench", "--help"])
    assert error.value.code == 0 and "--assistant" in capsys.readouterr().out


def test_missing_values_stand_as_dashes_in_the_table():
    measures = dict.fromkeys(COLUMNS, 1) | {"name": "m", "peak_memory_megabytes": None}
    result = {"models": [measures], "num_clips": 1, "audio_seconds": 2.0, "num_skipped": 0, "batch_size": 8}
    lines = list(table_lines(result | {"device": "cpu", "num_threads": 1, "reference": "the manifest's text"}))
    assert lines[1].split() == ["m", "1", "1", "1.00", "1.000", "1.000", "1.0", "1.0", "-", "1.00"]
