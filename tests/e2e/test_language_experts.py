"""Language experts in whisper-base, on real orders: what decodes is the base model until something is trained."""

from pathlib import Path

import pytest
import torch
from barista import prepare_barista
from conftest import ROOT

from speechkd.data.collate import WhisperTokens
from speechkd.data.features import SAMPLE_RATE_HZ, WhisperLogMel
from speechkd.data.loader import clip_batches
from speechkd.data.manifest import read_manifest
from speechkd.models.language_experts import (
    add_experts,
    gate_totals,
    gated_blocks,
    load_experts,
    merged_whisper,
    save_experts,
    set_language,
)
from speechkd.models.whisper import greedy_decode
from speechkd.teachers import load_processor, load_whisper, teacher_identity

DATA = ROOT.parent / "shared/data"
NAME = "bundled:whisper-base"
pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not DATA.is_dir(), reason="no real recordings beside the checkout")]


@torch.no_grad()
def test_experts_of_whisper_base_transcribe_as_it_does_and_merge_to_a_stock_model(tmp_path: Path):
    prepare_barista(DATA / "barista", tmp_path)
    clips = next(
        clip_batches(read_manifest(tmp_path / "test.jsonl"), range(2), sample_rate_hz=SAMPLE_RATE_HZ, batch_size=2)
    )
    model = load_whisper(NAME)
    tokens = WhisperTokens.from_tokenizer(load_processor(NAME).tokenizer, language="en")
    features = WhisperLogMel(model.config.num_mel_bins)(clips.waveforms)

    def transcripts(of: torch.nn.Module) -> list[list[int]]:
        states = of.model.encoder(features).last_hidden_state
        return [result.token_ids for result in greedy_decode(of, states, tokens, max_new_tokens=32)]

    expected, identity = transcripts(model), teacher_identity(NAME, model)
    add_experts(model, ["en"])
    set_language(model, "en")
    assert transcripts(model) == expected
    for block in gated_blocks(model):  # gates of either sign, experts a little off the shared blocks
        block.experts["en"].gate_out.weight.data.normal_()
        block.experts["en"].feed_forward.fc2.bias.data += 1e-3
    gated = transcripts(model)
    save_experts(model, tmp_path / "experts", "en", identity)
    again = load_whisper(NAME)
    load_experts(again, tmp_path / "experts", ["en"])
    assert transcripts(again) == gated
    ids = torch.tensor([list(tokens.prefix)] * 2)
    model(input_features=features, decoder_input_ids=ids, use_cache=False)
    sums, counts = gate_totals(model, torch.ones(2, 1500, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool))
    shares = (sums / counts).tolist()
    assert any(0 < share < 1 for share in shares)
    merged = merged_whisper(model, "en", shares)
    merged.save_pretrained(tmp_path / "merged")
    assert transcripts(load_whisper(str(tmp_path / "merged"))) == transcripts(merged)
    set_language(again, None)
    assert transcripts(again) == expected
