import json

import pytest
import torch
from conftest import tiny_whisper

from speechkd.data.manifest import write_manifest
from speechkd.evaluate import evaluate_asr, real_time_factor_inverse
from speechkd.labels.pseudo_label import DecodingConfig, label_manifest
from speechkd.labels.teacher_cache import LabelStoreError
from speechkd.metrics.latency import decode_seconds_per_token
from speechkd.teachers import load_whisper

DECODING = DecodingConfig(max_new_tokens=5)


def test_real_time_factor_of_the_published_example():
    assert real_time_factor_inverse(12.5, 3600.0) == pytest.approx(288)
    assert 1 / real_time_factor_inverse(12.5, 3600.0) == pytest.approx(0.003472, abs=1e-6)


def test_metrics_and_hypotheses_agree(tiny_teacher, tone_manifest, tmp_path):
    metrics = evaluate_asr(tiny_teacher, tone_manifest, tmp_path / "out", decoding=DECODING)
    rows = [json.loads(line) for line in (tmp_path / "out/hypotheses.jsonl").read_text().splitlines()]
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == metrics
    errors = sum(row["substitutions"] + row["deletions"] + row["insertions"] for row in rows)
    words = sum(row["num_reference_words"] for row in rows)
    assert metrics["num_reference_words"] == words
    assert metrics["wer"] == pytest.approx(100 * errors / words)
    assert metrics["rtfx"] == pytest.approx(metrics["audio_seconds"] / metrics["compute_seconds"])
    assert metrics["audio_seconds"] == pytest.approx(9.0)


def test_a_teacher_scored_against_its_own_transcripts_makes_no_error(tiny_teacher, tone_manifest, tmp_path):
    label_manifest(tiny_teacher, tone_manifest, tmp_path / "labels", decoding=DECODING)
    metrics = evaluate_asr(
        tiny_teacher,
        tone_manifest,
        tmp_path / "out",
        decoding=DECODING,
        normalizer="none",
        reference="teacher",
        labels_dir=tmp_path / "labels",
    )
    assert metrics["wer"] == 0 and metrics["cer"] == 0 and metrics["num_reference_words"] > 0


def test_missing_references_are_named(tiny_teacher, tone_manifest, tmp_path):
    rows = [json.loads(line) for line in tone_manifest.read_text().splitlines()]
    del rows[1]["text"]
    write_manifest(tone_manifest, rows)
    with pytest.raises(ValueError, match="1 utterances of .* have no text, the first is 'tone-1'.*--reference teacher"):
        evaluate_asr(tiny_teacher, tone_manifest, tmp_path / "out", decoding=DECODING)
    with pytest.raises(ValueError, match="reference 'teacher' and labels_dir None do not fit"):
        evaluate_asr(tiny_teacher, tone_manifest, tmp_path / "out", decoding=DECODING, reference="teacher")


def test_an_output_folder_of_another_model_is_refused(tiny_teacher, tone_manifest, tmp_path):
    evaluate_asr(tiny_teacher, tone_manifest, tmp_path / "out", decoding=DECODING)
    other = load_whisper(tiny_teacher)
    other.model.decoder.layer_norm.bias.data += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(LabelStoreError, match="come from teacher .*but this run has"):
        evaluate_asr(str(tmp_path / "other"), tone_manifest, tmp_path / "out", decoding=DECODING)


def test_decoding_is_timed_for_exactly_the_tokens_asked_for():
    models = [tiny_whisper(decoder_layers=2), tiny_whisper(decoder_layers=1)]
    steps = [0, 0]

    def count(index: int) -> None:
        steps[index] += 1

    for index, model in enumerate(models):
        model.model.decoder.register_forward_hook(lambda *_, index=index: count(index))
    seconds = decode_seconds_per_token(models, torch.randn(2, 1500, 16), num_tokens=8, num_rounds=2)
    assert len(seconds) == 2 and min(seconds) > 0
    assert steps == [8 * 3, 8 * 3]  # a round that is not counted, and two that are
