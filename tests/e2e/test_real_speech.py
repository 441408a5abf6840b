"""The real teacher on real recordings: whisper-base on LJ Speech, and a short distillation on barista orders."""

import json
from pathlib import Path

import pytest
import soundfile
import train
from barista import prepare_barista
from conftest import ROOT

from speechkd.data.manifest import write_manifest
from speechkd.evaluate import evaluate_asr
from speechkd.labels.pseudo_label import DecodingConfig, label_manifest

DATA = ROOT.parent / "shared/data"
pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not DATA.is_dir(), reason="no real recordings beside the checkout")]


def ljspeech_rows(suffix: str, number: int) -> list[dict]:
    lines = (DATA / "ljspeech/metadata.csv").read_text(encoding="utf-8").splitlines()
    rows = []
    for line in lines[:number]:
        key, _, text = line.split("|")
        path = next((DATA / "ljspeech").rglob(f"{key}{suffix}"))
        info = soundfile.info(path)
        seconds = info.frames / info.samplerate
        rows.append({"id": key, "audio": str(path), "duration_seconds": seconds, "text": text})
        rows[-1]["sample_rate_hz"] = info.samplerate
    return rows


def test_the_teacher_reads_lj_speech_well_in_every_format(tmp_path):
    scores = {}
    for suffix in (".wav", ".flac", ".mp3"):
        manifest = tmp_path / f"lj{suffix}.jsonl"
        write_manifest(manifest, ljspeech_rows(suffix, 4))
        scores[suffix] = evaluate_asr(
            "bundled:whisper-base", manifest, tmp_path / suffix, decoding=DecodingConfig(batch_size=4)
        )
    assert scores[".wav"]["wer"] < 10 and scores[".mp3"]["wer"] < 10
    assert scores[".wav"]["wer"] == scores[".flac"]["wer"]


def test_a_student_of_two_layers_nears_its_teacher_on_orders_in_a_few_steps(tmp_path: Path):
    prepare_barista(DATA / "barista", tmp_path / "data")
    for split, number in (("train", 32), ("test", 8)):
        path = tmp_path / f"data/{split}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        write_manifest(path, rows[:number])
    decoding = DecodingConfig(max_new_tokens=48)
    labels = tmp_path / "labels"
    for split, targets in (("train", ("text", "encoder_states", "decoder_states")), ("test", ("text",))):
        label_manifest(
            "bundled:whisper-base",
            tmp_path / f"data/{split}.jsonl",
            labels / split,
            decoding=decoding,
            targets=targets,  # type: ignore[arg-type]
        )
    train.main(
        [
            "--config",
            str(ROOT / "recipes/distil_whisper/barista.yaml"),
            f"--data.train_manifest={tmp_path / 'data/train.jsonl'}",
            f"--data.test_manifest={tmp_path / 'data/test.jsonl'}",
            f"--data.labels_dir={labels}",
            f"--trainer.output_dir={tmp_path / 'run'}",
            "--trainer.max_steps=40",
            "--trainer.warmup_steps=4",
        ]
    )
    rates = {
        name: evaluate_asr(
            str(tmp_path / "run" / name),
            tmp_path / "data/test.jsonl",
            tmp_path / "scores" / name,
            decoding=decoding,
            reference="teacher",
            labels_dir=labels / "test",
        )["wer"]
        for name in ("student_init", "student")
    }
    assert rates["student_init"] > 80  # cut, not yet trained
    assert rates["student"] < 50
