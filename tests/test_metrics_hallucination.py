import shutil
from dataclasses import asdict

import numpy as np
import pytest
import soundfile

from speechkd.data.audio import load_utterance
from speechkd.data.manifest import read_manifest
from speechkd.labels.pseudo_label import DecodingConfig
from speechkd.labels.teacher_cache import LabelStore, LabelStoreError
from speechkd.metrics.hallucination import (
    NON_SPEECH_KINDS,
    error_kind_rates,
    five_gram_duplicates,
    non_speech_clip,
    non_speech_output,
    write_non_speech,
)
from speechkd.metrics.normalizers import get_normalizer
from speechkd.metrics.wer import error_rates
from speechkd.teachers import load_whisper

DECODING = DecodingConfig(max_new_tokens=5)


@pytest.mark.parametrize(
    ("hypotheses", "duplicates", "num_runs"),
    [
        (["a b c d e f"], 0, 2),
        (["thank you for watching now"] * 4, 11, 16),
        (["thank you for watching now " * 4], 11, 16),
        (["one two three", "four five one two three four five"], 1, 6),  # crosses the border
        (["a b c d"], 0, 0),
        (["", ""], 0, 0),
        ([], 0, 0),
    ],
)
def test_repeated_runs_of_five_words_are_counted_over_the_joined_transcripts(hypotheses, duplicates, num_runs):
    assert five_gram_duplicates(hypotheses, "basic") == (duplicates, num_runs)


def test_five_grams_are_counted_after_normalisation():
    hypotheses = ["Thank you, for watching now!", "thank you for WATCHING now."]
    assert five_gram_duplicates(hypotheses, "basic") == (1, 6)
    assert five_gram_duplicates(hypotheses, "none") == (0, 6)
    spelled = ["eight eight eight eight eight eight eight eight"]
    assert five_gram_duplicates(spelled, "basic") == (3, 4)
    assert five_gram_duplicates(spelled, "english") == (0, 0)  # one word, "88888888"


def test_five_grams_count_as_a_plain_loop_counts_them():
    generator = np.random.default_rng(0)
    hypotheses = [" ".join(generator.choice(["a", "b", "c"], size=size)) for size in generator.integers(0, 12, 60)]
    words = " ".join(hypotheses).split()
    seen, repeated = [], 0
    for start in range(len(words) - 4):
        run = words[start : start + 5]
        repeated += run in seen
        seen.append(run)
    assert five_gram_duplicates(hypotheses, "none") == (repeated, len(seen)) and repeated > 0


def test_kinds_of_errors_of_the_method_card():
    rates = error_rates(
        ["we will meet at noon", "good morning everyone"],
        ["we will eat at noon thank you", "good everyone"],
        "english",
    )
    kinds = error_kind_rates(rates)
    assert asdict(kinds) == {
        "insertion_error_rate": 25.0,
        "substitution_error_rate": 12.5,
        "deletion_error_rate": 12.5,
    }
    assert sum(asdict(kinds).values()) == rates.wer == 50.0


def test_clips_are_the_same_for_the_same_seed_and_kind_and_number_only():
    clip = non_speech_clip("white_noise", 1, seed=3)
    assert np.array_equal(clip, non_speech_clip("white_noise", 1, seed=3))
    others = [
        non_speech_clip("white_noise", 1, seed=4),
        non_speech_clip("white_noise", 2, seed=3),
        non_speech_clip("pink_noise", 1, seed=3),
    ]
    assert not any(np.array_equal(clip[:16_000], other[:16_000]) for other in others)


def test_silence_is_digital_zero_or_the_last_bit():
    assert not non_speech_clip("silence", 0).any()
    steps = non_speech_clip("silence", 1) * 32768
    assert set(steps) == {-1.0, 0.0, 1.0}


@pytest.mark.parametrize(("kind", "slope_db_per_octave"), [("white_noise", 0.0), ("pink_noise", -3.01)])
def test_noise_has_its_slope_and_stays_between_60_and_20_db_below_full_scale(kind, slope_db_per_octave):
    levels_db, slopes = [], []
    for index in range(8):
        samples = non_speech_clip(kind, index)
        assert 16_000 <= len(samples) <= 480_000 and np.abs(samples).max() <= 1
        levels_db.append(10 * np.log10(np.mean(samples**2)))
        frames = samples[: len(samples) // 2048 * 2048].reshape(-1, 2048) * np.hanning(2048)
        frequencies_hz = np.fft.rfftfreq(2048, 1 / 16_000)
        power = (np.abs(np.fft.rfft(frames)) ** 2).mean(axis=0)
        band = (frequencies_hz > 100) & (frequencies_hz < 7000)
        slopes.append(np.polyfit(np.log2(frequencies_hz[band]), 10 * np.log10(power[band]), 1)[0])
    assert -60.1 < min(levels_db) and max(levels_db) < -19.9 and max(levels_db) - min(levels_db) > 10
    assert np.mean(slopes) == pytest.approx(slope_db_per_octave, abs=0.2)


def test_written_clips_are_read_back_as_they_were_made(tmp_path):
    manifest = read_manifest(write_non_speech(tmp_path, num_clips=2, seed=5))
    assert [key.rsplit("-", 2)[0] for key in manifest.ids] == [kind for kind in NON_SPEECH_KINDS for _ in range(2)]
    for utterance, kind, index in zip(manifest, np.repeat(NON_SPEECH_KINDS, 2), [0, 1] * 3, strict=True):
        samples = load_utterance(utterance, 16_000).numpy()
        made = non_speech_clip(str(kind), index, seed=5)
        assert len(samples) == len(made) == round(utterance["duration_seconds"] * 16_000)
        assert np.abs(samples - made).max() <= 1 / 32768
    assert soundfile.info(manifest[3]["audio"]).subtype == "PCM_16"


def test_words_on_noise_and_silence_are_counted_per_kind(tiny_teacher, tmp_path):
    scores = non_speech_output(tiny_teacher, tmp_path, decoding=DECODING, normalizer="english", num_clips=2)
    normalize = get_normalizer("english")
    words = {row["id"]: len(normalize(row["text"]).split()) for row in LabelStore(tmp_path / "decoded").rows()}
    assert len(words) == scores["num_clips"] == 6 and scores["num_words"] == sum(words.values()) > 0
    assert scores["nonempty_rate"] == pytest.approx(100 * sum(count > 0 for count in words.values()) / 6)
    for kind in NON_SPEECH_KINDS:
        own = [count for key, count in words.items() if key.startswith(kind)]
        assert scores[kind]["num_words"] == sum(own) and scores[kind]["num_clips"] == 2
        assert scores[kind]["num_nonempty"] == sum(count > 0 for count in own)


def test_a_model_that_says_nothing_has_rate_zero(tiny_teacher, tmp_path):
    model = load_whisper(tiny_teacher)
    end = model.generation_config.eos_token_id
    model.get_output_embeddings().weight.data[end] *= 20  # the only likely token, whatever is heard
    model.model.decoder.layer_norm.weight.data.zero_()
    model.model.decoder.layer_norm.bias.data.copy_(model.get_output_embeddings().weight.data[end])
    model.generation_config.begin_suppress_tokens = None  # it may end at once
    shutil.copytree(tiny_teacher, tmp_path / "silent")
    model.save_pretrained(tmp_path / "silent")
    scores = non_speech_output(
        str(tmp_path / "silent"), tmp_path / "out", decoding=DECODING, normalizer="english", num_clips=2
    )
    assert (scores["nonempty_rate"], scores["num_words"], scores["num_clips"]) == (0.0, 0, 6)


def test_a_larger_collection_continues_a_smaller_one_and_a_smaller_one_reads_its_part(tiny_teacher, tmp_path):
    def output(folder, num_clips):
        return non_speech_output(
            tiny_teacher, tmp_path / folder, decoding=DECODING, normalizer="none", num_clips=num_clips
        )

    small = output("grown", 1)
    grown = output("grown", 2)
    assert grown["num_clips"] == 6 and len(list(LabelStore(tmp_path / "grown/decoded").rows())) == 6
    assert output("grown", 1) == small


def test_bad_requests_are_refused(tiny_teacher, tmp_path):
    with pytest.raises(ValueError, match="of each kind must be 1 or more, got 0"):
        write_non_speech(tmp_path, num_clips=0)
    with pytest.raises(ValueError, match="unknown kind of non-speech 'rain'; choose one of silence, white_noise"):
        non_speech_clip("rain", 0)
    non_speech_output(tiny_teacher, tmp_path, decoding=DECODING, normalizer="english", num_clips=1)
    other = load_whisper(tiny_teacher)
    other.model.decoder.layer_norm.bias.data += 1
    shutil.copytree(tiny_teacher, tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(LabelStoreError, match="come from teacher .*but this run has"):
        non_speech_output(str(tmp_path / "other"), tmp_path, decoding=DECODING, normalizer="english", num_clips=1)
