import json
import shutil

import pytest
import torch
from conftest import tiny_whisper

from speechkd.cli import main
from speechkd.data.manifest import write_manifest
from speechkd.evaluate import evaluate_asr, real_time_factor_inverse
from speechkd.labels.pseudo_label import DecodingConfig, label_manifest
from speechkd.labels.teacher_cache import LabelStoreError
from speechkd.metrics.hallucination import five_gram_duplicates
from speechkd.metrics.intervals import paired_difference, wer_interval
from speechkd.metrics.latency import decode_seconds_per_token
from speechkd.teachers import load_processor, load_whisper

DECODING = DecodingConfig(max_new_tokens=5)


def rewrite(manifest, **fields):
    """Set fields of all utterances of a manifest, each from a list of values."""
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for name, values in fields.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    write_manifest(manifest, rows)


def hypothesis_rows(folder):
    return [json.loads(line) for line in (folder / "hypotheses.jsonl").read_text().splitlines()]


def heard_by(model, manifest, folder):
    """What a random model makes of a tone, which is the same for all of them."""
    evaluate_asr(model, manifest, folder, decoding=DECODING)
    return hypothesis_rows(folder)[0]["hypothesis"]


def errors_of(rows):
    return [row["substitutions"] + row["deletions"] + row["insertions"] for row in rows]


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
    load_processor(tiny_teacher).save_pretrained(tmp_path / "other")
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


def test_kinds_of_errors_add_up_to_the_wer_and_the_interval_holds_it(tiny_teacher, tone_manifest, tmp_path):
    heard = heard_by(tiny_teacher, tone_manifest, tmp_path / "out")
    rewrite(tone_manifest, text=[heard, heard[1:], "one long tone that goes on", "", f"{heard} {heard}", "a tone"])
    metrics = evaluate_asr(tiny_teacher, tone_manifest, tmp_path / "out", decoding=DECODING, normalizer="none")
    assert min(metrics["insertions"], metrics["substitutions"], metrics["deletions"]) > 0
    kinds = [metrics[f"{kind}_error_rate"] for kind in ("insertion", "substitution", "deletion")]
    assert sum(kinds) == pytest.approx(metrics["wer"]) and metrics["num_empty_references"] == 1
    assert metrics["insertion_error_rate"] == 100 * metrics["insertions"] / metrics["num_reference_words"]

    rows = hypothesis_rows(tmp_path / "out")
    (empty,) = (row for row in rows if not row["num_reference_words"])
    assert metrics["num_words_on_empty_references"] == empty["insertions"] > 0
    rows.remove(empty)  # what it holds is in no rate and in no 5-Dup
    duplicates = five_gram_duplicates([row["hypothesis"] for row in rows], "none")
    assert duplicates[0] > 0
    assert (metrics["five_gram_duplicates"], metrics["num_five_grams"]) == duplicates
    interval = wer_interval(errors_of(rows), [row["num_reference_words"] for row in rows])
    assert (metrics["wer_low"], metrics["wer_high"]) == interval
    assert metrics["wer_low"] < metrics["wer"] < metrics["wer_high"] and metrics["num_resamples"] == 1000
    assert "wer_low_by_speaker" not in metrics and "groups" not in metrics


def test_an_interval_by_speaker_is_given_where_every_utterance_names_one(tiny_teacher, tone_manifest, tmp_path):
    heard = heard_by(tiny_teacher, tone_manifest, tmp_path / "out")
    texts = [heard, "a", f"{heard} {heard}", "a tone", heard, "a tone"]
    rewrite(tone_manifest, text=texts, speaker=["ann", "bob", "ann", "cy", "bob", "cy"])
    metrics = evaluate_asr(tiny_teacher, tone_manifest, tmp_path / "out", decoding=DECODING, num_resamples=200)
    rows = hypothesis_rows(tmp_path / "out")
    errors, words = errors_of(rows), [row["num_reference_words"] for row in rows]
    expected = wer_interval(errors, words, units=["ann", "bob", "ann", "cy", "bob", "cy"], num_resamples=200)
    assert (metrics["wer_low_by_speaker"], metrics["wer_high_by_speaker"]) == expected
    assert expected[0] < metrics["wer"] < expected[1] and expected != (metrics["wer_low"], metrics["wer_high"])
    assert metrics["num_speakers"] == 3 and metrics["num_resamples"] == 200

    rewrite(tone_manifest, speaker=["ann", "bob", None, "cy", "bob", "cy"])
    metrics = evaluate_asr(tiny_teacher, tone_manifest, tmp_path / "out", decoding=DECODING, num_resamples=0)
    assert not [key for key in metrics if "low" in key or "high" in key or "speaker" in key]


def test_groups_are_tables_of_corpus_totals_and_their_mean_is_named_macro(
    tiny_teacher, tone_manifest, tmp_path, caplog
):
    heard = heard_by(tiny_teacher, tone_manifest, tmp_path / "out")
    texts = [heard, "a", f"{heard} {heard}", "a tone", heard, "a tone"]
    speakers = ["ann", "bob", "ann", None, "bob", "ann"]
    dialects = ["north", "south"] * 3
    rewrite(tone_manifest, text=texts, speaker=speakers, language=["en"] * 6, dialect=dialects)
    fields = ["speaker", "language", "dialect"]
    metrics = evaluate_asr(tiny_teacher, tone_manifest, tmp_path / "out", decoding=DECODING, group_by=fields)
    rows = hypothesis_rows(tmp_path / "out")
    table = metrics["groups"]["speaker"]
    assert list(table) == ["ann", "bob"] and "1 of 6 utterances have no speaker" in caplog.text
    for name in table:
        own = [row for row, speaker in zip(rows, speakers, strict=True) if speaker == name]
        words = sum(row["num_reference_words"] for row in own)
        assert table[name]["wer"] == 100 * sum(errors_of(own)) / words
        assert table[name]["num_utterances"] == len(own) and table[name]["num_reference_words"] == words
    assert table["ann"]["wer"] != table["bob"]["wer"]
    north = metrics["groups"]["dialect"]["north"]
    assert north["wer"] == 100 * sum(errors_of(rows[::2])) / north["num_reference_words"]
    assert metrics["macro_mean_wer"]["speaker"] == (table["ann"]["wer"] + table["bob"]["wer"]) / 2
    assert metrics["groups"]["language"]["en"]["wer"] == metrics["macro_mean_wer"]["language"] == metrics["wer"]
    assert metrics["groups"]["language"]["en"]["wer_low"] == metrics["wer_low"]
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == metrics


def test_a_field_that_forms_no_groups_is_refused_before_decoding(tiny_teacher, tone_manifest, tmp_path):
    for field, message in [
        ("accent", "'accent' is no field with names; those of a manifest are .*speaker, language, dialect"),
        ("slots", "'slots' is no field with names"),
        ("speaker", "no utterance of .*tones.jsonl has the field 'speaker'"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate_asr(tiny_teacher, tone_manifest, tmp_path / "out", decoding=DECODING, group_by=[field])
    assert not (tmp_path / "out").exists()


def test_two_systems_are_compared_on_the_same_utterances(tiny_teacher, tone_manifest, tmp_path):
    other = load_whisper(tiny_teacher)
    other.model.decoder.layer_norm.bias.data += torch.randn(16)
    shutil.copytree(tiny_teacher, tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    models = {"first": tiny_teacher, "second": str(tmp_path / "other")}
    heard = {name: heard_by(model, tone_manifest, tmp_path / name) for name, model in models.items()}
    speakers = ["ann", "ann", "bob", "bob", "cy", "cy"]
    rewrite(tone_manifest, text=[*[heard["second"]] * 4, heard["first"], "a tone"], speaker=speakers)
    options = {"decoding": DECODING, "normalizer": "none"}
    first = evaluate_asr(models["first"], tone_manifest, tmp_path / "first", **options)
    second = evaluate_asr(
        models["second"], tone_manifest, tmp_path / "second", compare_with=tmp_path / "first", **options
    )
    comparison = second["comparison"]
    assert comparison["wer_difference"] == pytest.approx(second["wer"] - first["wer"]) and second["wer"] < first["wer"]
    assert comparison["low"] < comparison["wer_difference"] < comparison["high"]
    assert 0.5 < comparison["probability_of_improvement"] < 1 and comparison["num_utterances"] == 6
    rows = [hypothesis_rows(tmp_path / name) for name in ("first", "second")]
    words = [row["num_reference_words"] for row in rows[0]]
    by_speaker = paired_difference(errors_of(rows[0]), errors_of(rows[1]), words, units=speakers)
    assert (comparison["low_by_speaker"], comparison["high_by_speaker"]) == (by_speaker.low, by_speaker.high)
    assert (by_speaker.low, by_speaker.high) != (comparison["low"], comparison["high"])
    assert comparison["baseline"] == str(tmp_path / "first")


def test_evaluations_that_cannot_be_compared_are_refused_before_decoding(tiny_teacher, tone_manifest, tmp_path):
    evaluate_asr(tiny_teacher, tone_manifest, tmp_path / "first", decoding=DECODING, normalizer="basic")

    def compare(folder, **options):
        evaluate_asr(
            tiny_teacher, tone_manifest, tmp_path / "out", decoding=DECODING, compare_with=tmp_path / folder, **options
        )

    with pytest.raises(ValueError, match="absent holds no evaluation to compare with"):
        compare("absent")
    with pytest.raises(ValueError, match="scored with normalizer 'basic', this run uses 'english'"):
        compare("first")
    with pytest.raises(ValueError, match="is a bootstrap; set num_resamples to 1 or more"):
        compare("first", num_resamples=0)
    with pytest.raises(ValueError, match="must be 0 or more, got -1 and 0"):
        compare("first", num_resamples=-1)
    rewrite(tone_manifest, text=["a tone"] * 5 + ["other"])
    with pytest.raises(ValueError, match="'tone-5' has the reference 'a tone' in .*first and 'other' here"):
        compare("first", normalizer="basic")
    assert not (tmp_path / "out").exists()


def test_the_command_reports_groups_intervals_and_words_on_noise(tiny_teacher, tone_manifest, tmp_path, capsys):
    rewrite(tone_manifest, speaker=["ann", "bob"] * 3)
    common = ["evaluate", "--model", tiny_teacher, "--manifest", str(tone_manifest), "--max-new-tokens", "5"]
    common += ["--group-by", "speaker", "--bootstrap", "50", "--non-speech-clips", "1"]
    main([*common, "--output-dir", str(tmp_path / "first"), "--json"])
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["num_resamples"] == 50 and set(metrics["groups"]["speaker"]) == {"ann", "bob"}
    assert metrics["non_speech"]["num_clips"] == 3 and metrics["non_speech"]["num_words"] > 0

    main([*common, "--output-dir", str(tmp_path / "second"), "--compare-with", str(tmp_path / "first")])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("    ann: wer ") for line in lines)
    assert any(line.startswith("wer_low: ") for line in lines)
    assert any("wer_difference 0, low 0, high 0, probability_of_improvement 0" in line for line in lines)
