import dataclasses

import pytest

from speechkd.metrics.normalizers import get_normalizer
from speechkd.metrics.wer import digit_error_rate, error_rates, spell_digits, utterance_errors

CARD_REFERENCES = ["we will meet at noon", "good morning everyone"]
CARD_HYPOTHESES = ["we will eat at noon thank you", "good everyone"]


@pytest.mark.parametrize("name", ["english", "basic"])
def test_case_punctuation_and_special_tokens_do_not_count(name):
    normalize = get_normalizer(name)
    assert normalize(" <|startoftranscript|><|en|><|0.00|> HELLO WORLD.<|endoftext|> ") == "hello world"
    assert normalize("<|nospeech|>") == ""


def test_english_normalizer_unifies_numbers_spelling_and_contractions():
    normalize = get_normalizer("english")
    assert normalize("Mr. Smith isn't grey") == "mister smith is not gray"
    assert normalize("twenty one dollars") == normalize("$21") == "$21"


def test_final_ellipsis_leaves_a_lone_point_as_in_the_published_normalizer():
    assert get_normalizer("english")("Well...") == "well ."


def test_basic_normalizer_keeps_spelled_numbers_and_cuts_devanagari_apart():
    assert get_normalizer("basic")("Twenty-one, please!") == "twenty one please"
    assert get_normalizer("basic")("हिन्दी में") == "ह न द म"


def test_none_changes_white_space_only():
    assert get_normalizer("none")("  Hello,\n <|en|>  World ") == "Hello, <|en|> World"


def test_words_of_hindi_stay_whole_and_chinese_characters_count_as_words():
    assert error_rates(["यह हिन्दी में है"], ["यह हिन्दी मे है"], "keep_marks").wer == 25.0
    assert error_rates(["我要咖啡"], ["我要加啡"], "keep_marks").wer == 25.0
    assert error_rates(["مُحَمَّد هنا"], ["محمد هنا"], "arabic").wer == 0.0


def test_unknown_normalizer_is_refused():
    with pytest.raises(ValueError, match="'hindi'.*english, basic, none, keep_marks, arabic"):
        get_normalizer("hindi")


def test_number_of_thousands_of_digits_is_normalised():
    runaway = "0" * 6000
    assert get_normalizer("english")(runaway) != ""
    assert spell_digits(runaway) == " ".join(runaway)


def test_rates_are_over_corpus_totals_not_a_mean_over_utterances():
    rates = error_rates(CARD_REFERENCES, CARD_HYPOTHESES, "basic")
    counts = [rates.substitutions, rates.deletions, rates.insertions]
    assert (*counts, rates.num_reference_words) == (1, 1, 2, 8)
    assert [100 * count / rates.num_reference_words for count in counts] == [12.5, 12.5, 25.0]
    assert rates.wer == 50.0

    per_utterance = [
        error_rates([reference], [hypothesis], "basic").wer
        for reference, hypothesis in zip(CARD_REFERENCES, CARD_HYPOTHESES, strict=True)
    ]
    assert sum(per_utterance) / 2 == pytest.approx(46.67, abs=0.01)


def test_utterance_errors_add_up_to_the_corpus_counts():
    rates = dataclasses.asdict(error_rates(CARD_REFERENCES, CARD_HYPOTHESES, "basic"))
    rows = [utterance_errors(*pair, "basic") for pair in zip(CARD_REFERENCES, CARD_HYPOTHESES, strict=True)]
    assert {key: sum(row[key] for row in rows) for key in rows[0]} == {key: rates[key] for key in rows[0]}


def test_character_errors_are_counted_over_corpus_totals():
    rates = error_rates(["abcd", "abcdef"], ["abcx", "abcdef"], "none")
    assert rates.cer == pytest.approx(10.0)
    assert rates.wer == 50.0


@pytest.mark.parametrize(
    ("reference", "hypothesis", "wer"),
    [
        ("Thank you, Sir.", "thank you sir", 0.0),
        ("thank you", "thank you thank you thank you", 200.0),
        ("thank you", "", 100.0),
    ],
)
def test_single_utterance_rates(reference, hypothesis, wer):
    assert error_rates([reference], [hypothesis], "basic").wer == wer


def test_empty_references_are_left_out_and_counted():
    rates = error_rates(["good morning", "", "<|nospeech|>"], ["good evening", "thank you", ""], "english")
    assert rates.wer == 50.0
    assert (rates.num_utterances, rates.num_empty_references, rates.insertions) == (1, 2, 0)


def test_empty_reference_of_one_utterance_counts_hypothesis_words_as_insertions():
    expected = {"substitutions": 0, "deletions": 0, "insertions": 2, "num_reference_words": 0}
    assert utterance_errors("[noise]", "thank you", "english") == expected


def test_references_without_any_word_are_refused():
    with pytest.raises(ValueError, match="all 2 references are empty"):
        error_rates(["", "..."], ["a", "b"], "basic")
    with pytest.raises(ValueError, match="all 0 references are empty"):
        error_rates([], [], "basic")


def test_differing_numbers_of_texts_are_refused():
    with pytest.raises(ValueError, match="2 references and 1 hypotheses"):
        error_rates(["a", "b"], ["a"], "english")
    with pytest.raises(ValueError, match="1 references and 2 hypotheses"):
        digit_error_rate(["8"], ["8", "4"])


@pytest.mark.parametrize(
    "text",
    [
        "848339",
        "8, 4, 8, 3, 3, 9.",
        "8,4,8,3,3,9",
        "8 4 8 3 3 9",
        "8-4-8-3-3-9",
        "848-339",
        "848,339",
        "84 83 39",
        "Eight four eight three three nine.",
        "eight, four, eight, three, three, nine",
        "eighty-four eighty-three thirty-nine",
        "8 four 8 double 3 9",
        "<|en|> $848.339",
        "８４８３３９",
    ],
)
def test_every_way_to_write_a_digit_string_gives_the_same_digits(text):
    assert spell_digits(text) == "8 4 8 3 3 9"


@pytest.mark.parametrize(
    ("text", "digits"),
    [
        ("zero zero seven", "0 0 7"),
        ("oh oh seven", "0 0 7"),
        ("007", "0 0 7"),  # the normaliser alone: "7"
        ("0-0-7", "0 0 7"),
        ("0 two", "0 2"),  # the normaliser alone: "2"
        ("4 0 two", "4 0 2"),
        ("40 two", "4 0 2"),
        ("8 oh 3", "8 0 3"),
        ("one o one", "1 0 1"),
        ("1 2 3", "1 2 3"),  # the normaliser alone: "one 2 3"
        ("One.", "1"),
        ("double seven", "7 7"),
        ("two million", "2 0 0 0 0 0 0"),
        ("$2.5 million", "2 5 0 0 0 0 0"),
        ("eighty four dollars", "8 4"),
        ("$84", "8 4"),
        ("10%", "1 0"),
        ("ten percent", "1 0"),
        ("$0.05", "0 0 5"),
        ("three point one four", "3 1 4"),
        ("4:30", "4 3 0"),
        ("twenty first", "2 1"),
        ("21st", "2 1"),
        ("minus five", "5"),
        ("8, 4...", "8 4"),
        ("ate for dinner", "ate for dinner"),
        ("", ""),
    ],
)
def test_numbers_become_single_digits(text, digits):
    assert spell_digits(text) == digits


def test_digit_errors_are_counted_over_single_digits():
    rates = digit_error_rate(["eight four eight three three nine", "seven one"], ["8484339", "71."])
    assert (rates.substitutions, rates.deletions, rates.insertions) == (0, 0, 1)
    assert rates.num_reference_words == 8
    assert rates.wer == 12.5


def test_words_that_are_no_digits_count_as_digit_errors():
    rates = digit_error_rate(["eight", "two"], ["ate", "the 2"])
    assert (rates.substitutions, rates.deletions, rates.insertions) == (1, 0, 1)
    assert rates.wer == 100.0


def test_digit_error_rate_does_not_see_how_numbers_are_written_and_wer_does():
    reference, hypothesis = ["one two three four"], ["1, 2, 3, 4"]
    assert digit_error_rate(reference, hypothesis).wer == 0.0
    assert error_rates(reference, hypothesis, "english").wer == 400.0
