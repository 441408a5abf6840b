import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import tiny_whisper, write_tone

from speechkd.data.audio import AudioError
from speechkd.data.manifest import write_manifest
from speechkd.labels.pseudo_label import DecodingConfig, label_manifest
from speechkd.labels.teacher_cache import LabelStoreError, create_store
from speechkd.models.whisper import shorten_window
from speechkd.teachers import load_processor, load_whisper

DECODING = DecodingConfig(batch_size=2, max_new_tokens=6)


def test_rows_carry_text_tokens_and_scores(tiny_teacher, tone_manifest, tmp_path):
    store = label_manifest(tiny_teacher, tone_manifest, tmp_path / "labels", decoding=DECODING)
    rows = list(store.rows())
    assert sorted(row["id"] for row in rows) == [f"tone-{index}" for index in range(6)]
    for row in rows:
        assert row["token_ids"][:4] == [50258, 50259, 50359, 50363]
        assert row["mean_logprob"] < 0 and 0 <= row["no_speech_prob"] <= 1 and row["compute_seconds"] > 0
        assert set(row) >= {"text", "compression_ratio", "finished", "duration_seconds"}


def test_cached_encoder_states_are_the_encoders_output(tiny_teacher, tone_manifest, tmp_path):
    from speechkd.data.audio import load_utterance
    from speechkd.data.features import WhisperLogMel
    from speechkd.data.manifest import read_manifest

    targets = ("text", "encoder_states")
    store = label_manifest(tiny_teacher, tone_manifest, tmp_path / "labels", decoding=DECODING, targets=targets)
    assert store.header["encoder_states"]["bytes_per_frame"] == 32
    model = load_whisper(tiny_teacher)
    utterance = read_manifest(tone_manifest)[3]
    with torch.no_grad():
        features = WhisperLogMel()(load_utterance(utterance, 16_000)[None])
        expected = model.model.encoder(features).last_hidden_state[0]
    cached = store.array("tone-3")
    assert cached.dtype == torch.float16 and cached.shape == (1500, 16)
    torch.testing.assert_close(cached.float(), expected, rtol=2e-3, atol=2e-3)
    with pytest.raises(LabelStoreError, match="no encoder states of utterance 'other'"):
        store.array("other")


def test_a_killed_run_carries_on_with_no_row_lost_and_none_twice(tiny_teacher, tmp_path):
    rows = []
    for index in range(40):
        write_tone(tmp_path / f"{index}.wav", 1.0 + index / 100, pitch_hz=200 + index)
        rows.append({"id": f"{index}", "audio": f"{index}.wav", "duration_seconds": 1.0 + index / 100})
        rows[-1]["sample_rate_hz"] = 16_000
    write_manifest(tmp_path / "m.jsonl", rows)
    code = (
        "import sys, speechkd.labels.pseudo_label as p\n"
        "p.SHARD_UTTERANCES = 2\n"  # many shards, so that the kill falls between two of them
        "p.label_manifest(*sys.argv[1:], decoding=p.DecodingConfig(batch_size=1, max_new_tokens=30))"
    )
    command = [sys.executable, "-c", code, tiny_teacher, str(tmp_path / "m.jsonl"), str(tmp_path / "labels")]
    process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "labels").glob("shard-*.jsonl"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(list((tmp_path / "labels").glob("shard-*.jsonl")))
    assert 3 <= before < 20  # it was killed in the middle
    store = label_manifest(
        tiny_teacher,
        tmp_path / "m.jsonl",
        tmp_path / "labels",
        decoding=DecodingConfig(batch_size=1, max_new_tokens=30),
    )
    assert sorted(int(row["id"]) for row in store.rows()) == list(range(40))


def test_a_finished_store_is_not_made_again(tiny_teacher, tone_manifest, tmp_path):
    label_manifest(tiny_teacher, tone_manifest, tmp_path / "labels", decoding=DECODING)
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "labels").glob("shard-*")}
    label_manifest(tiny_teacher, tone_manifest, tmp_path / "labels", decoding=DECODING)
    assert shards == {path: path.stat().st_mtime_ns for path in (tmp_path / "labels").glob("shard-*")}


def test_another_teacher_is_refused_and_both_are_named(tiny_teacher, tone_manifest, tmp_path):
    label_manifest(tiny_teacher, tone_manifest, tmp_path / "labels", decoding=DECODING)
    other = tmp_path / "other-teacher"
    model = load_whisper(tiny_teacher)
    with torch.no_grad():
        model.model.decoder.layer_norm.bias += 1
    model.save_pretrained(other)
    load_processor(tiny_teacher).save_pretrained(other)
    with pytest.raises(LabelStoreError, match=r"come from teacher .*tiny-teacher.*but this run has .*other-teacher"):
        label_manifest(str(other), tone_manifest, tmp_path / "labels", decoding=DECODING)


def test_other_settings_and_other_audio_are_refused(tiny_teacher, tone_manifest, tmp_path):
    label_manifest(tiny_teacher, tone_manifest, tmp_path / "labels", decoding=DECODING)
    with pytest.raises(LabelStoreError, match="made with other settings: decoding was"):
        label_manifest(tiny_teacher, tone_manifest, tmp_path / "labels", decoding=DecodingConfig(max_new_tokens=7))
    rows = [json.loads(line) for line in tone_manifest.read_text().splitlines()]
    rows[0]["duration_seconds"] = 5.0
    write_manifest(tone_manifest, rows)
    with pytest.raises(LabelStoreError, match="'tone-0' of 1.00 s, the manifest has 5.00 s"):
        label_manifest(tiny_teacher, tone_manifest, tmp_path / "labels", decoding=DECODING)


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(LabelStoreError, match="is not empty and holds no label store"):
        create_store(tmp_path, {"teacher": {"name": "t", "weights_sha256": "0" * 64}})


def test_too_many_bad_clips_fail_the_run_but_keep_the_good_labels(tiny_teacher, tone_manifest, tmp_path):
    (tone_manifest.parent / "audio/3.wav").write_bytes(b"broken")
    with pytest.raises(AudioError, match=r"1 of 6 clips \(16.7 %\) were skipped.*tone-3"):
        label_manifest(tiny_teacher, tone_manifest, tmp_path / "labels", decoding=DECODING)
    store = label_manifest(
        tiny_teacher, tone_manifest, tmp_path / "labels", decoding=DECODING, max_skipped_fraction=0.2
    )
    assert len(list(store.rows())) == 5
    assert json.loads((tmp_path / "labels/skipped.jsonl").read_text())["id"] == "tone-3"


def test_clips_beyond_a_shortened_window_are_set_aside_by_name(tiny_teacher, tmp_path):
    model = load_whisper(tiny_teacher)
    shorten_window(model, 2)
    model.save_pretrained(tmp_path / "short")
    load_processor(tiny_teacher).save_pretrained(tmp_path / "short")
    rows = []
    for name, seconds in (("long", 2.5), ("fits", 2.0)):
        write_tone(tmp_path / f"{name}.wav", seconds)
        rows.append({"id": name, "audio": f"{name}.wav", "duration_seconds": seconds, "sample_rate_hz": 16_000})
    write_manifest(tmp_path / "clips.jsonl", rows)
    store = label_manifest(
        str(tmp_path / "short"),
        tmp_path / "clips.jsonl",
        tmp_path / "labels",
        decoding=DECODING,
        max_skipped_fraction=0.5,
    )
    assert [row["id"] for row in store.rows()] == ["fits"]
    skipped = json.loads((tmp_path / "labels/skipped.jsonl").read_text())
    assert skipped["id"] == "long" and "longer than the 2 s that the model takes" in skipped["reason"]


def test_batches_do_not_change_labels(tiny_teacher, tone_manifest, tmp_path):
    one = label_manifest(
        tiny_teacher, tone_manifest, tmp_path / "one", decoding=DecodingConfig(batch_size=1, max_new_tokens=6)
    )
    many = label_manifest(
        tiny_teacher, tone_manifest, tmp_path / "many", decoding=DecodingConfig(batch_size=6, max_new_tokens=6)
    )
    texts = [{row["id"]: row["token_ids"] for row in store.rows()} for store in (one, many)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("field", "value"), [("batch_size", 0), ("max_new_tokens", 445)])
def test_decoding_limits_are_checked(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*got {value}"):
        DecodingConfig(**{field: value})


def test_vocabularies_that_differ_are_refused_with_both_sizes():
    from speechkd.teachers import check_vocabularies

    with pytest.raises(ValueError, match=r"(?s)51865.*51866|51866.*51865"):
        check_vocabularies(tiny_whisper(1), tiny_whisper(1, vocab_size=51866))
