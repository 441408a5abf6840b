"""Stored top-k targets against the live teacher, on real recordings with the real teacher."""

import json

import pytest
import torch
from barista import prepare_barista
from conftest import ROOT
from objective import LossConfig, loss_terms

from speechkd.data.collate import WhisperTokens
from speechkd.data.features import WhisperLogMel
from speechkd.data.manifest import write_manifest
from speechkd.data.whisper import collate_whisper
from speechkd.labels.pseudo_label import DecodingConfig, label_manifest
from speechkd.labels.topk_records import read_topk
from speechkd.models.whisper import student_from_teacher
from speechkd.teachers import load_processor, load_whisper

DATA = ROOT.parent / "shared/data"
TEACHER = "bundled:whisper-base"
pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not DATA.is_dir(), reason="no real recordings beside the checkout")]


def test_stored_targets_give_nearly_the_loss_of_the_live_teacher(tmp_path):
    prepare_barista(DATA / "barista", tmp_path / "data")
    manifest = tmp_path / "data/train.jsonl"
    write_manifest(manifest, [json.loads(line) for line in manifest.read_text().splitlines()][:4])
    store = label_manifest(
        TEACHER,
        manifest,
        tmp_path / "labels",
        decoding=DecodingConfig(max_new_tokens=64),
        targets=("text", "encoder_states", "topk"),
    )
    rows = [
        row | {"encoder_states": store.array(row["id"]), "topk": read_topk(store, row["id"])} for row in store.rows()
    ]
    tokens = WhisperTokens.from_tokenizer(load_processor(TEACHER).tokenizer)
    teacher = load_whisper(TEACHER)
    settings = {"weights": LossConfig(temperature=1.0), "log_mel": WhisperLogMel(), "shared_encoder": None}
    for depth, floor in ((2, 0.98), (5, 0.9)):  # far from the teacher, and near
        student = student_from_teacher(teacher, decoder_layers=depth).eval()
        stored_batch = collate_whisper(rows, tokens)
        batch = {name: value for name, value in stored_batch.items() if not name.startswith("topk")}
        with torch.no_grad():
            _, stored = loss_terms(student, None, stored_batch, **settings)
            _, live = loss_terms(student, teacher, batch, **settings)
        torch.testing.assert_close(stored["cross_entropy"], live["cross_entropy"])
        assert floor < stored["kl"] / live["kl"] <= 1.0, (stored["kl"], live["kl"])
