"""Decoder states of a teacher in a label store: made, checked, carried on and brought together."""

import pytest
import torch
from conftest import TOKENS, tiny_whisper

from speechkd.data.whisper import collate_whisper
from speechkd.labels import pseudo_label
from speechkd.labels.decoder_state_labels import (
    collate_decoder_states,
    decoder_states_header,
    decoder_states_key,
    decoder_states_of_labels,
    read_decoder_states,
)
from speechkd.labels.pseudo_label import DecodingConfig, label_manifest
from speechkd.labels.teacher_cache import LabelStore, LabelStoreError, create_store
from speechkd.labels.verify import merge_stores, verify_store

TEACHER = {"name": "tiny", "revision": None, "weights_sha256": "0" * 64}
LABELS = [[*TOKENS.prefix, 400, 401, 402, TOKENS.end_of_text], [*TOKENS.prefix, 500, TOKENS.end_of_text]]
DECODING = DecodingConfig(batch_size=2, max_new_tokens=6)
TARGETS = ("text", "decoder_states")


def written_store(folder, arrays: dict[str, torch.Tensor]) -> LabelStore:
    """Rows with labels of five tokens, and these arrays."""
    header = {"teacher": TEACHER, "targets": sorted(TARGETS), "decoding": {"language": "en", "dtype": "float32"}}
    store = create_store(folder, header | {"decoder_states": decoder_states_header(3)})
    row = {"duration_seconds": 1.0, "text": "a", "token_ids": [*TOKENS.prefix, TOKENS.end_of_text]}
    row |= {"no_speech_prob": 0.1, "finished": True}
    store.write_shard([row | {"id": key} for key in arrays], {decoder_states_key(key): arrays[key] for key in arrays})
    return LabelStore(folder)


def test_a_labels_states_times_the_head_are_the_teachers_logits():
    model, states = tiny_whisper(decoder_layers=2), torch.randn(2, 1500, 16)
    together = decoder_states_of_labels(model, states, LABELS, TOKENS)
    for row, (label, found) in enumerate(zip(LABELS, together, strict=True)):
        inputs = {"encoder_outputs": (states[row : row + 1],), "decoder_input_ids": torch.tensor([label[:-1]])}
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[0]
        assert found.shape == (len(label) - 1, 16) and found.dtype == torch.float16
        torch.testing.assert_close(found.float() @ model.proj_out.weight.T, logits, rtol=1e-3, atol=1e-3)


def test_states_that_float16_cannot_hold_are_refused():
    model, states = tiny_whisper(decoder_layers=1), torch.randn(2, 1500, 16)
    with torch.no_grad():
        model.model.decoder.layer_norm.weight.mul_(1e5)
    with pytest.raises(ValueError, match=r"clip 0 of the batch reach \d+, .*float16, which ends at 65504; .*text topk"):
        decoder_states_of_labels(model, states, LABELS, TOKENS)
    with torch.no_grad():
        model.model.decoder.layer_norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="reach nan, .* look at its weights"):
        decoder_states_of_labels(model, states, LABELS, TOKENS)


def test_a_store_keeps_the_states_of_every_token_and_its_header_says_their_size(tiny_teacher, tone_manifest, tmp_path):
    store = label_manifest(tiny_teacher, tone_manifest, tmp_path / "labels", decoding=DECODING, targets=TARGETS)
    expected = {"layer": "last", "dtype": "float16", "dim": 16, "bytes_per_token": 32}
    assert store.header["decoder_states"] == expected and store.header["targets"] == ["decoder_states", "text"]
    for row in store.rows():
        states = read_decoder_states(store, row["id"])
        assert states.nbytes == 32 * (len(row["token_ids"]) - 1)
    assert verify_store(store.folder, tone_manifest)["problems"] == []


def test_labelling_that_was_stopped_ends_with_the_same_states(tiny_teacher, tone_manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(pseudo_label, "SHARD_UTTERANCES", 2)
    settings = {"decoding": DECODING, "targets": TARGETS}
    store = label_manifest(tiny_teacher, tone_manifest, tmp_path / "labels", **settings)
    whole = {row["id"]: read_decoder_states(store, row["id"]).clone() for row in store.rows()}
    for path in store.row_files()[1:]:
        path.unlink()  # of the second and third shard only the arrays are there, as after a kill
    assert sum(1 for _ in store.rows()) == 2
    resumed = label_manifest(tiny_teacher, tone_manifest, tmp_path / "labels", **settings)
    assert sorted(row["id"] for row in resumed.rows()) == sorted(whole)
    assert all(torch.equal(read_decoder_states(resumed, key), states) for key, states in whole.items())


def test_states_of_another_store_or_utterance_are_refused_with_the_command_that_makes_them(tmp_path):
    store = written_store(tmp_path / "labels", {"a": torch.zeros(4, 3).half()})
    with pytest.raises(LabelStoreError, match="holds no decoder states of utterance 'c'; label its manifest"):
        read_decoder_states(store, "c")
    other = create_store(tmp_path / "text", {"teacher": TEACHER, "targets": ["text"]})
    with pytest.raises(LabelStoreError, match=r"its targets: \['text'\]\. .* --targets text decoder_states`"):
        read_decoder_states(other, "a")


@pytest.mark.parametrize("damaged", [torch.zeros(4, 2).half(), torch.zeros(4).half(), torch.zeros(4, 3)])
def test_damaged_states_are_refused_with_their_utterance(damaged, tmp_path):
    store = written_store(tmp_path / "labels", {"cut": damaged})
    with pytest.raises(
        LabelStoreError, match=r"utterance 'cut': its decoder states are .* \(tokens, 3\) torch.float16"
    ):
        read_decoder_states(store, "cut")


def test_verifying_finds_states_that_are_missing_damaged_or_of_another_label(tmp_path):
    good = torch.ones(4, 3).half()
    arrays = {"good": good, "short": good[:3].clone(), "narrow": good[:, :2].clone(), "wide type": good.float()}
    store = written_store(tmp_path / "labels", arrays | {"nan": good * torch.nan})
    row = next(store.rows())
    store.write_shard([row | {"id": "missing"}], {decoder_states_key("else"): good})
    (problem,) = verify_store(store.folder)["problems"]
    assert "5 utterance(s) have arrays that are missing, damaged or of another shape" in problem
    assert "'good'" not in problem and "'missing'" in problem and "'short'" in problem


def test_merged_stores_keep_the_states(tmp_path):
    states = {key: torch.randn(4, 3).half() for key in ("a", "b", "c")}
    written_store(tmp_path / "first", {key: states[key] for key in ("a", "b")})
    written_store(tmp_path / "second", {"c": states["c"]})
    merged = merge_stores([tmp_path / "first", tmp_path / "second"], tmp_path / "merged")
    assert all(torch.equal(read_decoder_states(merged, key), state) for key, state in states.items())


def test_a_batch_of_states_is_padded_like_its_labels():
    first, second = torch.randn(7, 3).half(), torch.randn(5, 3).half()
    audio = {"duration_seconds": 1.0, "encoder_states": torch.zeros(2, 3)}
    items = [
        {"id": str(row), "token_ids": label, "teacher_decoder_states": states, **audio}
        for row, (label, states) in enumerate(zip(LABELS, (first, second), strict=True))
    ]
    batch = collate_whisper(items, TOKENS)
    states = batch["teacher_decoder_states"]
    assert states.shape == (*batch["labels"].shape, 3) and states.dtype == torch.float16
    assert torch.equal(states[0], first) and torch.equal(states[1, :5], second) and not states[1, 5:].any()
    empty = collate_decoder_states([first[:0], second], [1, 6], 5)
    assert not empty[0].any() and torch.equal(empty[1], second)


def test_states_of_another_label_are_refused():
    states = [torch.zeros(3, 2), torch.zeros(5, 2)]
    expected = "utterance 1 of the batch has decoder states of 5 tokens for a label of 8, .*teacher.stored_outputs=null"
    with pytest.raises(ValueError, match=expected):
        collate_decoder_states(states, [4, 8], 7)
