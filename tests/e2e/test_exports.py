"""CTranslate2 exports of whisper-base and of a student, on real recordings, through faster-whisper too."""

import json
from pathlib import Path

import pytest
from barista import prepare_barista
from conftest import ROOT

from speechkd.data.audio import load_audio
from speechkd.data.features import SAMPLE_RATE_HZ
from speechkd.data.manifest import write_manifest
from speechkd.export import export_model
from speechkd.export.transcribers import load_transcriber
from speechkd.labels.decoding import DecodingConfig
from speechkd.models.whisper import student_from_teacher
from speechkd.teachers import load_processor, load_whisper

DATA = ROOT.parent / "shared/data"
TEACHER = "bundled:whisper-base"
DECODING = DecodingConfig(max_new_tokens=64)
pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not DATA.is_dir(), reason="no real recordings beside the checkout")]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    prepare_barista(DATA / "barista", folder)
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()][:2]
    write_manifest(folder / "few.jsonl", rows)
    return folder / "few.jsonl"


@pytest.mark.parametrize("decoder_layers", [6, 5])
def test_float32_equals_pytorch_and_faster_whisper_reads_it_with_word_times(manifest, tmp_path, decoder_layers):
    faster_whisper = pytest.importorskip("faster_whisper", exc_type=ImportError)
    model_name = TEACHER
    if decoder_layers < 6:
        model_name = str(tmp_path / "student")
        student_from_teacher(load_whisper(TEACHER), decoder_layers=decoder_layers).save_pretrained(model_name)
        load_processor(TEACHER).save_pretrained(model_name)
    folder = tmp_path / "export"
    export = export_model(
        model_name, "ctranslate2", folder, precision="float32", manifest_path=manifest, decoding=DECODING
    )
    assert (export["encoder_layers"], export["decoder_layers"]) == (6, decoder_layers)
    assert export["parity"]["num_equal"] == export["parity"]["num_clips"] == 2, (folder / "parity.json").read_text()
    ours = load_transcriber(str(folder), language="en", task="transcribe", max_new_tokens=64)
    theirs = faster_whisper.WhisperModel(str(folder), device="cpu", cpu_threads=2)
    options = {"language": "en", "beam_size": 1, "temperature": 0.0, "condition_on_previous_text": False}
    for row in map(json.loads, manifest.read_text().splitlines()):
        clip = load_audio(manifest.parent / row["audio"], SAMPLE_RATE_HZ).numpy()
        segments, _ = theirs.transcribe(clip, without_timestamps=True, **options)
        assert "".join(segment.text for segment in segments).strip() == ours(clip)
    # the first segment alone: from its last word on, faster-whisper decodes the rest of the clip once more
    segments, _ = theirs.transcribe(clip, without_timestamps=True, word_timestamps=True, **options)
    words = next(iter(segments)).words
    times = [time for word in words for time in (word.start, word.end)]
    assert "".join(word.word for word in words).strip() == ours(clip)
    assert times == sorted(times) and 0 <= times[0] and times[-1] <= row["duration_seconds"] + 0.1
    assert times[-1] > row["duration_seconds"] / 4  # the clip ends in silence
