"""Stored outputs against the live teacher, on real recordings with the real teacher."""

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
from speechkd.labels.decoder_state_labels import read_decoder_states
from speechkd.labels.pseudo_label import DecodingConfig, label_manifest
from speechkd.labels.topk_records import read_topk
from speechkd.models.whisper import student_from_teacher
from speechkd.teachers import load_processor, load_whisper

DATA = ROOT.parent / "shared/data"
TEACHER = "bundled:whisper-base"
pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not DATA.is_dir(), reason="no real recordings beside the checkout")]


def test_stored_ids_give_nearly_and_stored_decoder_states_just_the_loss_of_the_live_teacher(tmp_path):
    prepare_barista(DATA / "barista", tmp_path / "data")
    manifest = tmp_path / "data/train.jsonl"
    write_manifest(manifest, [json.loads(line) for line in manifest.read_text().splitlines()][:4])
    store = label_manifest(
        TEACHER,
        manifest,
        tmp_path / "labels",
        decoding=DecodingConfig(max_new_tokens=64),
        targets=("text", "encoder_states", "topk", "decoder_states"),
    )
    rows = [row | {"encoder_states": store.array(row["id"])} for row in store.rows()]
    tokens = WhisperTokens.from_tokenizer(load_processor(TEACHER).tokenizer)
    teacher = load_whisper(TEACHER)
    head, settings = teacher.proj_out.weight.detach(), {"log_mel": WhisperLogMel(), "shared_encoder": None}
    for depth, floor in ((2, 0.98), (5, 0.9)):  # far from the teacher, and near
        student = student_from_teacher(teacher, decoder_layers=depth).eval()
        batch = collate_whisper(rows, tokens)
        with_topk = collate_whisper([row | {"topk": read_topk(store, row["id"])} for row in rows], tokens)
        with_states = collate_whisper(
            [row | {"teacher_decoder_states": read_decoder_states(store, row["id"])} for row in rows], tokens
        )
        with torch.no_grad():
            at_1, at_2 = LossConfig(temperature=1.0), LossConfig(temperature=2.0, divergence="reverse_kl")
            _, stored = loss_terms(student, None, with_topk, weights=at_1, **settings)
            _, live = loss_terms(student, teacher, batch, weights=at_1, **settings)
            _, exact = loss_terms(student, None, with_states, weights=at_2, teacher_head=head, **settings)
            _, live_at_2 = loss_terms(student, teacher, batch, weights=at_2, **settings)
        torch.testing.assert_close(stored["cross_entropy"], live["cross_entropy"])
        assert floor < stored["kl"] / live["kl"] <= 1.0, (stored["kl"], live["kl"])
        torch.testing.assert_close(exact["reverse_kl"], live_at_2["reverse_kl"], rtol=2e-4, atol=0)  # 2e-5 apart
