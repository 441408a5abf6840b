import json
import math
import zlib
from dataclasses import dataclass, field
from typing import get_args

import numpy as np
import pytest

from speechkd.config import parse_config
from speechkd.labels.filters import (
    FilterConfig,
    ScoreFilter,
    ScoreName,
    all_caps,
    apply_filters,
    compression_ratio,
    drop_reasons,
    label_scores,
    label_wer,
    repeated_ngrams,
)
from speechkd.labels.score_store import write_scores

TEN_WORDS = "one day we will all go home to sleep well"
OFF = {
    "min_mean_logprob": None,
    "max_compression_ratio": None,
    "max_repeated_5grams": None,
    "drop_all_caps": False,
    "drop_empty": False,
    "drop_unfinished": False,
}


def label(text, reference=None, mean_logprob=-0.2, seconds=3.6, key="utt"):
    return {
        "id": key,
        "text": text,
        "token_ids": [1, 2, 3],
        "mean_logprob": mean_logprob,
        "compression_ratio": compression_ratio(text or ""),
        "no_speech_prob": 0.0,
        "duration_seconds": seconds,
        "reference": reference,
    }


GOOD = label("all is well", reference="all is well", key="good")


def is_kept(row, **config):
    kept, _ = apply_filters([GOOD, row], FilterConfig(**config))
    return row in kept


@pytest.mark.parametrize(
    ("reference", "text", "wer", "kept", "kept_by_paper"),
    [
        ("Good morning, everyone!", "good Morning everyone", 0.0, True, True),
        (TEN_WORDS, TEN_WORDS.replace("sleep", "sheep"), 10.0, False, True),
        (TEN_WORDS + " tonight", TEN_WORDS.replace("sleep", "sheep") + " tonight", 100 / 11, True, True),
        ("thank you", "thank you thank you thank you", 200.0, False, False),
        ("thank you", "", 100.0, False, False),
        ("", "thank you", None, False, False),
        ("[noise]", "", None, False, False),
    ],
)
def test_wer_filter_at_ten_percent(reference, text, wer, kept, kept_by_paper):
    assert label_wer(reference, text, "basic") == (wer if wer is None else pytest.approx(wer))
    config = {**OFF, "max_wer": 10.0, "wer_normalizer": "basic"}
    assert is_kept(label(text, reference), **config) is kept
    assert is_kept(label(text, reference), **config, wer_rule="<=") is kept_by_paper


def test_null_label_passes_no_filter():
    assert not is_kept(label(None, "thank you"), **OFF)
    assert not is_kept(label(None, "thank you"), max_wer=10.0)


def test_wer_filter_leaves_labels_without_reference_and_says_so():
    row = label("anything at all")
    kept, report = apply_filters([GOOD, row], FilterConfig(max_wer=10.0))
    assert kept == [GOOD, row]
    assert report.num_without_reference == 1
    assert any("max_wer left 1 labels unjudged" in line for line in report.lines())


def test_wer_filter_without_any_reference_is_refused():
    with pytest.raises(ValueError, match="none of the 2 labels has one.*set max_wer to null"):
        apply_filters([label("a"), label("b")], FilterConfig(max_wer=10.0))


def test_wer_normalizer_decides_whether_written_numbers_are_errors():
    row = label("twenty one cups", "21 cups")
    assert is_kept(row, max_wer=10.0, wer_normalizer="english")
    assert not is_kept(row, max_wer=10.0, wer_normalizer="basic")


def test_filter_on_mean_logprob_keeps_the_threshold_and_drops_nan():
    assert is_kept(label("fine", mean_logprob=-1.0))
    assert not is_kept(label("fine", mean_logprob=-1.01))
    assert not is_kept(label("fine", mean_logprob=float("nan")))


def test_compression_ratio_is_plain_over_compressed_bytes():
    text = "ह ह " * 30
    assert compression_ratio(text) == len(text.encode()) / len(zlib.compress(text.encode()))
    assert 0 < compression_ratio("turn it up") < 1
    assert compression_ratio("") == 0.0


def test_filter_on_compression_ratio_drops_loops():
    loop = label("thank you for watching " * 20)
    assert loop["compression_ratio"] > 2.4
    assert not is_kept(loop, max_repeated_5grams=None)
    assert is_kept(label(TEN_WORDS), max_repeated_5grams=None)


@pytest.mark.parametrize(
    ("texts", "counts"),
    [
        ("a b c d e f", (0, 2)),
        ("thank you for watching now " * 4, (11, 16)),
        (["one two three", "four five one two three four five"], (1, 6)),
        ("Thank you, for watching now! <|0.00|> thank you for watching NOW", (1, 6)),
        ("8 4 8 8 8 8 8 8 8", (2, 5)),
        ("848888888", (2, 5)),
        ("888888888888", (7, 8)),
        ("8,8,8,8,8,8,8", (2, 3)),
        ("it cost 1,000,000,000 dollars", (0, 0)),
        ("हिन्दी में", (0, 0)),
        ("too short", (0, 0)),
        ("", (0, 0)),
        ([], (0, 0)),
    ],
)
def test_repeated_5grams(texts, counts):
    assert repeated_ngrams(texts) == counts


def test_repeated_ngrams_of_another_length():
    assert repeated_ngrams("no no no", n=2) == (1, 2)


@pytest.mark.parametrize("text", ["8 4 8 8 8 8 8 8 8", "888888888888", "eight " * 8])
def test_short_loops_that_hardly_compress_are_dropped_by_repeats(text):
    row = label(text)
    assert row["compression_ratio"] < 2.4 or text.startswith("eight")
    assert not is_kept(row)


@pytest.mark.parametrize("text", ["8483390215", "call 07700 900123", "one million is 1,000,000", "no no no no no no"])
def test_ordinary_digit_strings_and_short_repeats_are_kept(text):
    assert is_kept(label(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HELLO WORLD.", True),
        ("<|startoftranscript|><|en|><|notimestamps|> HELLO WORLD.<|endoftext|>", True),
        ("Hello WORLD", False),
        ("नमस्ते दुनिया", False),
        ("<|hi|> नमस्ते दुनिया", False),
        ("848 339", False),
        ("", False),
    ],
)
def test_all_caps_needs_cased_letters_and_only_capitals(text, expected):
    assert all_caps(text) is expected
    assert is_kept(label(text), drop_empty=False) is not expected
    assert is_kept(label(text), drop_all_caps=False, drop_empty=False)


@pytest.mark.parametrize("text", ["", " "])
def test_labels_without_a_word_are_dropped(text):
    assert not is_kept(label(text), drop_empty=True)
    assert is_kept(label(text), drop_empty=False)


def test_report_counts_what_each_filter_alone_keeps_and_all_together():
    rows = [
        GOOD,
        label("all was well", "all is well", key="wrong", seconds=7.2),
        label("ALL IS WELL", "all is well", key="caps", seconds=3.6),
        label("all is well", "all is well", mean_logprob=-2.0, key="unsure", seconds=36.0),
    ]
    kept, report = apply_filters(rows, FilterConfig(max_wer=10.0, max_compression_ratio=None))
    assert kept == [GOOD]
    counts = json.loads(json.dumps(report.as_dict()))
    assert list(counts["filters"]) == [
        "max_wer",
        "min_mean_logprob",
        "max_repeated_5grams",
        "drop_all_caps",
        "drop_empty",
        "drop_unfinished",
    ]
    assert [one["kept_utterances"] for one in counts["filters"].values()] == [3, 3, 4, 3, 4, 4]
    assert counts["filters"]["max_wer"]["kept_hours"] == pytest.approx(0.012)
    assert counts["filters"]["max_wer"]["kept_share"] == 0.75
    assert counts["kept"] == {"kept_utterances": 1, "kept_hours": pytest.approx(0.001), "kept_share": 0.25}
    assert counts["hours"] == pytest.approx(0.014)
    lines = report.lines()
    assert len(lines) == 7
    assert lines[0] == "max_wer alone keeps 3 of 4 labels (75.0 %), 0.01 of 0.01 h"
    assert lines[-1].startswith("all filters keep 1 of 4 labels (25.0 %)")


def test_without_filters_everything_is_kept_in_order():
    rows = [label("B"), label("A", key="other"), label("")]
    kept, report = apply_filters(rows, FilterConfig(**OFF))
    assert kept == rows
    assert report.filters == {} and report.kept.kept_share == 1.0


@pytest.mark.parametrize(
    ("field", "loose_to_strict"),
    [
        ("max_wer", [1000.0, 100.0, 40.0, 20.0, 5.0]),
        ("min_mean_logprob", [-9.0, -1.5, -0.7, -0.25, -0.1]),
        ("max_compression_ratio", [9.0, 2.0, 0.9, 0.7]),
        ("max_repeated_5grams", [20, 5, 1, 0]),
    ],
)
def test_stricter_thresholds_keep_subsets(field, loose_to_strict):
    words = TEN_WORDS.split()
    rows = [GOOD | {"text": "ok", "mean_logprob": 0.0, "compression_ratio": 0.5, "reference": "ok"}]
    for count in range(11):
        text = " ".join(["x"] * count + words[count:])
        rows.append(label(text, TEN_WORDS, mean_logprob=-0.2 * count, key=str(count)))
    previous = {row["id"] for row in rows}
    for threshold in loose_to_strict:
        kept, _ = apply_filters(rows, FilterConfig(**{**OFF, field: threshold}))
        ids = {row["id"] for row in kept}
        assert ids <= previous
        previous = ids
    assert len(previous) < len(rows)


def test_keeping_nothing_is_refused_with_the_counts():
    rows = [label("HELLO"), label("fine", mean_logprob=-3.0)]
    with pytest.raises(ValueError, match="none of 2 labels.*min_mean_logprob keeps 1.*drop_all_caps keeps 1.*loosen"):
        apply_filters(rows, FilterConfig())


def test_no_labels_are_refused():
    with pytest.raises(ValueError, match="no labels to filter"):
        apply_filters([], FilterConfig())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_wer": -1.0}, "max_wer must be 0 or more"),
        ({"max_wer": float("nan")}, "max_wer must be 0 or more"),
        ({"max_wer": 0.0}, "keeps nothing; use '<='"),
        ({"min_mean_logprob": 0.5}, "min_mean_logprob is a log-probability"),
        ({"max_compression_ratio": 0.0}, "max_compression_ratio must be above 0"),
        ({"max_repeated_5grams": -1}, "max_repeated_5grams must be 0 or more"),
        ({"wer_rule": "=<"}, "wer_rule must be '<' or '<='"),
        ({"wer_normalizer": "hindi"}, "wer_normalizer must be one of english, basic, none, keep_marks"),
    ],
)
def test_impossible_thresholds_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        FilterConfig(**config)


def test_only_labels_without_an_error_pass_a_wer_of_zero():
    row = label(TEN_WORDS.replace("sleep", "sheep"), TEN_WORDS)
    kept, _ = apply_filters([GOOD, row], FilterConfig(max_wer=0.0, wer_rule="<="))
    assert kept == [GOOD]


def test_a_label_that_the_length_limit_cut_off_is_dropped():
    row = {"text": "a b", "mean_logprob": -0.1, "compression_ratio": 0.5, "duration_seconds": 1.0, "reference": None}
    rows = [{**row, "id": "ended", "finished": True}, {**row, "id": "cut", "finished": False}]
    assert [kept["id"] for kept in apply_filters(rows, FilterConfig())[0]] == ["ended"]
    assert len(apply_filters(rows, FilterConfig(drop_unfinished=False))[0]) == 2


def scored(**columns):
    """Rows with texts of their own and the given fields; ids are "0", "1", ..."""
    count = len(next(iter(columns.values())))
    return [
        label(f"text {index}", key=str(index)) | {name: values[index] for name, values in columns.items()}
        for index in range(count)
    ]


def kept_ids(rows, *scores, **config):
    kept, report = apply_filters(rows, FilterConfig(**{**OFF, **config}, scores=[ScoreFilter(**one) for one in scores]))
    assert sum(report.dropped.values()) == len(rows) - len(kept)
    return "".join(row["id"] for row in kept)


@pytest.mark.parametrize(
    ("probabilities", "confidence"), [((0.9, 0.8, 0.5), 0.711379), ((1.0, 1.0), 1.0), ((0.25, 1.0), 0.5)]
)
def test_confidence_is_the_geometric_mean_of_token_probabilities(probabilities, confidence):
    mean_logprob = float(np.mean(np.log(probabilities)))
    assert probabilities != (0.9, 0.8, 0.5) or mean_logprob == pytest.approx(-0.340550, abs=1e-6)
    values = label_scores([label("text", mean_logprob=mean_logprob)], "confidence")
    assert values[0] == pytest.approx(confidence, abs=1e-6)


def test_wer_score_at_the_threshold_is_kept_by_the_paper_and_dropped_by_the_code():
    rows = [GOOD, label(TEN_WORDS.replace("sleep", "sheep"), TEN_WORDS, key="ten percent")]
    wer = {"name": "wer", "threshold": 10.0}
    assert kept_ids(rows, wer) == "goodten percent"
    assert kept_ids(rows, {**wer, "at_threshold": "drop"}) == "good"


def test_a_good_score_at_the_threshold_is_kept_or_dropped_too():
    rows = scored(speech_text_cosine=[0.5, 0.4, 0.6])
    assert kept_ids(rows, {"name": "speech_text_cosine", "threshold": 0.5}) == "02"
    assert kept_ids(rows, {"name": "speech_text_cosine", "threshold": 0.5, "at_threshold": "drop"}) == "2"


@pytest.mark.parametrize("name", get_args(ScoreName))
def test_every_score_prefers_the_good_label(name):
    good = label("all is well", "all is well", mean_logprob=-0.1, seconds=2.0, key="good") | {
        "proxy_wer": 0.0,
        "speech_text_cosine": 0.9,
        "mean_entropy": 0.1,
        "lm_nll": 2.0,
    }
    looping = "thank you for watching " * 12
    bad = label(looping, "all is well", mean_logprob=-2.0, seconds=2.0, key="bad") | {
        "proxy_wer": 700.0,
        "speech_text_cosine": -0.1,
        "mean_entropy": 0.6,
        "lm_nll": 7.0,
    }
    rows = [bad, good, good | {"id": "good too"}]
    values = label_scores(rows, name)
    assert np.isfinite(values).all() and values[0] != values[1]
    assert kept_ids(rows, {"name": name, "keep_fraction": 0.34}) == "good"
    assert kept_ids(rows, {"name": name, "threshold": float(values[1])}) == "goodgood too"
    assert kept_ids(rows, {"name": name, "threshold": float(values[0])}) == "badgoodgood too"


def test_rates_are_words_and_characters_per_second_of_audio():
    row = label("Hello, wide world!", seconds=2.0)
    assert label_scores([row], "words_per_second") == 1.5
    assert label_scores([row], "characters_per_second") == 7.0
    assert label_scores([label("你好 吗", seconds=2.0)], "words_per_second") == 1.5


def test_keep_fraction_keeps_the_best_share_and_breaks_ties_by_id():
    rows = scored(lm_nll=[3.0, 1.0, 2.0, 2.0, 5.0, 4.0, 9.0, 8.0, 7.0, 6.0])
    for fraction, expected in [(0.1, "1"), (0.2, "12"), (0.3, "123"), (0.7, "0123459"), (1.0, "0123456789")]:
        assert kept_ids(rows, {"name": "lm_nll", "keep_fraction": fraction}) == expected
    shuffled = [rows[index] for index in (3, 9, 2, 1, 0, 8, 7, 6, 5, 4)]
    assert kept_ids(shuffled, {"name": "lm_nll", "keep_fraction": 0.2}) == "21"
    assert kept_ids(rows, {"name": "lm_nll", "keep_fraction": 0.001}) == "1"


@pytest.mark.parametrize("name", ["proxy_wer", "speech_text_cosine"])
def test_looser_score_filters_keep_supersets(name):
    values = np.random.default_rng(0).uniform(0, 1, size=40).round(1)  # with ties
    rows = scored(**{name: values.tolist()})
    for field_name, steps in [
        ("threshold", np.arange(0.1, 1.0, 0.1)[:: -1 if name == "speech_text_cosine" else 1]),
        ("keep_fraction", np.arange(0.05, 1.01, 0.05)),
    ]:
        previous = set()
        for step in steps:
            kept, _ = apply_filters(
                rows, FilterConfig(**OFF, scores=[ScoreFilter(name=name, **{field_name: min(1.0, float(step))})])
            )
            ids = {row["id"] for row in kept}
            assert previous <= ids
            previous = ids
        assert len(previous) > 30


def test_scores_combine_by_and_or_beside_the_other_filters():
    rows = scored(proxy_wer=[0, 0, 90, 90, 0], speech_text_cosine=[0.9, 0.1, 0.9, 0.1, 0.9])
    rows[4]["mean_logprob"] = -3.0
    scores = [{"name": "proxy_wer", "threshold": 80.0}, {"name": "speech_text_cosine", "threshold": 0.5}]
    assert kept_ids(rows, *scores, min_mean_logprob=-1.0) == "0"
    assert kept_ids(rows, *scores, min_mean_logprob=-1.0, combine_scores="or") == "012"


def test_every_dropped_label_is_counted_by_its_first_reason():
    rows = [
        GOOD | {"lm_nll": 1.0, "proxy_wer": 0.0},
        label(None, "a", key="null") | {"lm_nll": 1.0, "proxy_wer": 0.0},
        label("HELLO", "hello", key="caps") | {"lm_nll": 9.0, "proxy_wer": 0.0},
        label("b", "a", key="wrong") | {"lm_nll": 1.0, "proxy_wer": 0.0},
        label("a", "a", key="unlikely") | {"lm_nll": 9.0, "proxy_wer": 0.0},
        label("a", "a", key="disputed") | {"lm_nll": 9.0, "proxy_wer": 90.0},
    ]
    scores = [ScoreFilter(name="lm_nll", threshold=5.0), ScoreFilter(name="proxy_wer", threshold=80.0)]
    config = FilterConfig(max_wer=10.0, max_repeated_5grams=None, scores=scores)
    kept, report = apply_filters(rows, config)
    assert kept == rows[:1]
    assert report.dropped == {"no_text": 1, "drop_all_caps": 1, "max_wer": 1, "lm_nll": 2}
    assert drop_reasons(rows, config) == [None, "no_text", "drop_all_caps", "max_wer", "lm_nll", "lm_nll"]
    assert report.filters["lm_nll"].kept_utterances == 2 and report.filters["proxy_wer"].kept_utterances == 4
    assert report.lines()[-1].endswith("; dropped by no_text: 1, drop_all_caps: 1, max_wer: 1, lm_nll: 2")
    either = FilterConfig(max_wer=10.0, max_repeated_5grams=None, scores=scores, combine_scores="or")
    assert drop_reasons(rows, either)[4:] == [None, "lm_nll or proxy_wer"]


def test_labels_without_reference_stay_unless_another_score_of_an_or_judges_them():
    rows = [
        label("a", "a", key="0") | {"proxy_wer": 90.0},
        label("b", "a", key="1") | {"proxy_wer": 90.0},
        label("c", key="2") | {"proxy_wer": 90.0},
        label("d", key="3") | {"proxy_wer": 0.0},
    ]
    wer, proxy = {"name": "wer", "threshold": 10.0}, {"name": "proxy_wer", "threshold": 80.0}
    assert kept_ids(rows, wer) == "023"
    assert kept_ids(rows, {"name": "wer", "keep_fraction": 0.5}) == "023"
    assert kept_ids(rows, wer, proxy, combine_scores="or") == "03"
    assert kept_ids(rows, wer, {"name": "cer", "threshold": 10.0}, combine_scores="or") == "023"
    _, report = apply_filters(rows, FilterConfig(**OFF, scores=[ScoreFilter(**wer)]))
    assert "wer left 2 labels unjudged: they have no reference text" in report.lines()


@pytest.mark.parametrize("cut", [{"threshold": 1e9}, {"keep_fraction": 1.0}])
def test_labels_without_a_value_never_pass(cut):
    rows = scored(lm_nll=[1.0, None, math.nan, math.inf])
    assert kept_ids(rows, {"name": "lm_nll", **cut}) == "0"
    rows = [label("a", "a", key="0"), label("a", "", key="1"), label("a", "[noise]", key="2")]
    assert kept_ids(rows, {"name": "wer", **cut}) == kept_ids(rows, {"name": "cer", **cut}) == "0"


def test_cer_and_marks_keep_hindi_labels_that_word_errors_would_drop():
    row = label("मैं हिन्दी बोलता हूँ", "मैं हिन्दी बोलती हूँ", key="0")  # one vowel sign of four words
    assert label_scores([row], "wer", "keep_marks") == 25.0
    assert kept_ids([row], {"name": "cer", "threshold": 10.0}, wer_normalizer="keep_marks") == "0"
    assert not is_kept(row, **OFF, max_wer=10.0, wer_normalizer="keep_marks")
    assert is_kept(label("मैं हिन्दी।", "मैं हिन्दी"), **OFF, max_wer=10.0, wer_normalizer="keep_marks")


def test_noisy_arabic_keeps_all_but_disasters_at_eighty_percent():
    reference = "ذهب الولد إلى المدرسة صباحا"
    rows = [
        label("ذَهَبَ الولدُ الى المدرسةِ صباحًا", reference, key="0"),  # vowel signs only: 0 %
        label("راح الولد المدرسة الصبح", reference, key="1"),  # dialect: 60 %
        label("شكرا للمشاهدة اشتركوا في القناة", reference, key="2"),  # invention: 100 %
    ]
    np.testing.assert_allclose(label_scores(rows, "wer", "arabic"), [0.0, 60.0, 100.0])
    assert kept_ids(rows, max_wer=80.0, wer_normalizer="arabic") == "01"
    assert kept_ids(rows, max_wer=10.0, wer_normalizer="arabic") == "0"


def test_scores_of_a_file_are_joined_by_id_and_leave_the_rows_as_they_are(tmp_path):
    rows = scored(mean_logprob=[-0.1, -0.1, -0.1])
    path = tmp_path / "scores.jsonl"
    write_scores(path, ["2", "1", "0", "another"], {"proxy_wer": [0.0, 90.0, math.inf, 0.0]})
    config = FilterConfig(**OFF, scores=[ScoreFilter(name="proxy_wer", threshold=80.0)], scores_file=str(path))
    kept, report = apply_filters(rows, config)
    assert kept == rows[2:]
    assert report.dropped == {"proxy_wer": 2}
    with pytest.raises(ValueError, match="scores_file .* lacks 1 of 4 labels, the first is 'good'"):
        apply_filters([GOOD, *rows], config)


def test_a_missing_score_is_named_with_what_computes_it():
    rows = scored(lm_nll=[1.0, 2.0])
    del rows[1]["lm_nll"]
    with pytest.raises(
        ValueError, match="1 of 2 labels have no number as lm_nll, the first is '1'; `speechkd scores .*language-model"
    ):
        kept_ids(rows, {"name": "lm_nll", "threshold": 3.0})
    with pytest.raises(ValueError, match="no number as lm_nll, the first is '0'"):
        label_scores(scored(lm_nll=["high"]), "lm_nll")


def test_error_rate_scores_without_any_reference_are_refused():
    with pytest.raises(ValueError, match="score cer needs reference texts and none of the 1 labels has one"):
        kept_ids([label("a")], {"name": "cer", "threshold": 3.0})


@dataclass(kw_only=True)
class OnlyFilters:
    """A configuration with filters.

    Args:
        filters: of the labels.
    """

    filters: FilterConfig = field(default_factory=FilterConfig)


def test_scores_are_read_from_yaml_and_written_back(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "filters:\n  max_wer: null\n  wer_normalizer: keep_marks\n  combine_scores: or\n  scores:\n"
        "  - {name: proxy_wer, threshold: 80.0, at_threshold: drop}\n  - {name: confidence, keep_fraction: 0.8}\n"
    )
    config, resolved = parse_config(OnlyFilters, ["--config", str(path)])
    assert config.filters.scores == [
        ScoreFilter(name="proxy_wer", threshold=80.0, at_threshold="drop"),
        ScoreFilter(name="confidence", keep_fraction=0.8),
    ]
    path.write_text(resolved)
    assert parse_config(OnlyFilters, ["--config", str(path)])[0] == config


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ({"name": "pesq", "threshold": 1.0}, "unknown score 'pesq'; choose one of wer, cer"),
        ({"name": "wer"}, "score wer has threshold=None and keep_fraction=None; set exactly one"),
        ({"name": "wer", "threshold": 1.0, "keep_fraction": 0.5}, "threshold=1.0 and keep_fraction=0.5; set exactly"),
        ({"name": "wer", "threshold": float("nan")}, "threshold of score wer must be a finite number, got nan"),
        ({"name": "wer", "keep_fraction": 0.0}, "keep_fraction of score wer must be above 0 and at most 1, got 0.0"),
        ({"name": "wer", "keep_fraction": 80.0}, "must be above 0 and at most 1, got 80.0"),
        ({"name": "wer", "threshold": 1.0, "at_threshold": "<"}, "at_threshold must be keep or drop, got '<'"),
    ],
)
def test_impossible_score_filters_are_refused(score, message):
    with pytest.raises(ValueError, match=message):
        ScoreFilter(**score)


def test_a_score_named_twice_or_an_unknown_combination_is_refused():
    twice = [ScoreFilter(name="wer", threshold=10.0), ScoreFilter(name="wer", keep_fraction=0.5)]
    with pytest.raises(ValueError, match="scores names wer, wer: a score may stand there once"):
        FilterConfig(scores=twice)
    with pytest.raises(ValueError, match="combine_scores must be and or or, got 'xor'"):
        FilterConfig(combine_scores="xor")
