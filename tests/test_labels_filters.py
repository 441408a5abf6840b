import json
import zlib

import pytest

from speechkd.labels.filters import (
    FilterConfig,
    all_caps,
    apply_filters,
    compression_ratio,
    label_wer,
    repeated_ngrams,
)

TEN_WORDS = "one day we will all go home to sleep well"
OFF = {
    "min_mean_logprob": None,
    "max_compression_ratio": None,
    "max_repeated_5grams": None,
    "drop_all_caps": False,
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


@pytest.mark.parametrize(
    "text", ["8483390215", "call 07700 900123", "one million is 1,000,000", "no no no no no no", ""]
)
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
    assert is_kept(label(text)) is not expected
    assert is_kept(label(text), drop_all_caps=False)


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
        "drop_unfinished",
    ]
    assert [one["kept_utterances"] for one in counts["filters"].values()] == [3, 3, 4, 3, 4]
    assert counts["filters"]["max_wer"]["kept_hours"] == pytest.approx(0.012)
    assert counts["filters"]["max_wer"]["kept_share"] == 0.75
    assert counts["kept"] == {"kept_utterances": 1, "kept_hours": pytest.approx(0.001), "kept_share": 0.25}
    assert counts["hours"] == pytest.approx(0.014)
    lines = report.lines()
    assert len(lines) == 6
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
        ({"wer_normalizer": "arabic"}, "wer_normalizer must be english, basic or none"),
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
