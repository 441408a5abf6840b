"""Windows of real recordings: what the teacher says of each clip in them, and a step of training on them."""

import json

import pytest
import train
from barista import prepare_barista
from conftest import ROOT

from speechkd.data.collate import WhisperTokens
from speechkd.data.manifest import write_manifest
from speechkd.data.packing import split_label
from speechkd.labels.pseudo_label import DecodingConfig, label_manifest
from speechkd.teachers import load_processor

DATA = ROOT.parent / "shared/data"
TEACHER = "bundled:whisper-base"
pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not DATA.is_dir(), reason="no real recordings beside the checkout")]


def test_windows_of_real_clips_are_told_apart_and_trained_on_with_timestamps_and_prompts(tmp_path):
    prepare_barista(DATA / "barista", tmp_path / "data")
    manifest = tmp_path / "data/train.jsonl"
    write_manifest(manifest, [json.loads(line) for line in manifest.read_text().splitlines()][:9])
    decoding = DecodingConfig(timestamps=True, max_new_tokens=160, batch_size=4)
    store = label_manifest(TEACHER, manifest, tmp_path / "labels/train", decoding=decoding, pack=True)
    tokens = WhisperTokens.from_tokenizer(load_processor(TEACHER).tokenizer)
    rows = list(store.rows())
    known = [text for row in rows for text in split_label(row, row["token_ids"], tokens)]
    assert 3 <= len(rows) <= 4
    assert len(known) == 9 and sum(bool(text) for text in known) >= 6
    settings = {
        "data.train_manifest": manifest,
        "data.test_manifest": tmp_path / "data/test.jsonl",
        "data.labels_dir": tmp_path / "labels",
        "data.pack": "true",
        "data.timestamp_probability": 0.5,
        "data.previous_text_probability": 1.0,
        "data.max_batch_seconds": 60,
        "decoding.timestamps": "true",
        "teacher.cache_encoder_states": "false",
        "teacher.stored_outputs": "null",
        "trainer.output_dir": tmp_path / "run",
        "trainer.max_steps": 1,
        "trainer.logging_steps": 1,
        "trainer.save_strategy": "no",
        "trainer.use_cpu": "true",
    }
    config = ROOT / "recipes/distil_whisper/barista.yaml"
    train.main(["--config", str(config), *(f"--{key}={value}" for key, value in settings.items())])
    log = [json.loads(line) for line in (tmp_path / "run/train_log.jsonl").read_text().splitlines()]
    assert 0 < log[0]["loss/kl"] < 20 and log[0]["padding"] < 0.6  # single clips of 8 s leave 0.7 empty
