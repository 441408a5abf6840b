import math

import pytest

from speechkd.metrics.slu import (
    FSC_SLOTS,
    benchmark_acceptance,
    fsc_scores,
    slot_accuracy,
    slot_f1,
    slot_recall,
    strict_match,
)

ORDER = {"coffeeDrink": "latte", "size": "small", "milkAmount": " soy milk"}
SCORES = (strict_match, benchmark_acceptance, slot_accuracy, slot_f1)


def slots(*values):
    return [{"name": "slot", "value": value} for value in values]


def test_recall_counts_slot_values_over_all_utterances():
    result = slot_recall(
        [slots("large", "iced coffee"), slots("latte"), []],
        ["A large iced coffee, please.", "get me a lager", "never mind"],
    )
    assert (result.num_found, result.num_slots) == (2, 3)
    assert result.recall == pytest.approx(200 / 3)


def test_values_and_transcripts_are_normalised():
    assert slot_recall([slots("twelve ounce", " soy milk", "grey")], ["12-ounce, Soy Milk; gray!"]).recall == 100.0


def test_only_whole_words_match():
    assert slot_recall([slots("art", "cup")], ["start two cups"]).num_found == 0


@pytest.mark.parametrize("transcript", ["coffee iced", "iced black coffee", "iced", ""])
def test_words_of_a_value_must_be_contiguous_and_in_order(transcript):
    assert slot_recall([slots("iced coffee")], [transcript]).recall == 0.0


def test_value_at_either_end_of_the_transcript_is_found():
    assert slot_recall([slots("mocha", "now")], ["mocha now"]).recall == 100.0


def test_part_of_a_merged_number_is_not_found():
    assert slot_recall([slots("eight")], ["eight four"]).num_found == 0


def test_values_without_a_word_are_left_out():
    assert slot_recall([slots(" ", "[noise]", "tea")], ["tea"]).num_slots == 1


def test_no_slot_at_all_is_refused():
    with pytest.raises(ValueError, match="none of 2 utterances has a slot value"):
        slot_recall([[], slots("")], ["tea", "coffee"])


def test_differing_numbers_are_refused():
    with pytest.raises(ValueError, match="1 utterances and 2 transcripts"):
        slot_recall([slots("tea")], ["tea", "coffee"])


def test_a_further_slot_is_accepted_by_the_benchmark_and_fails_the_strict_match():
    predicted = {**ORDER, "roast": "dark roast"}
    assert benchmark_acceptance([ORDER], [predicted]) == 100
    assert strict_match([ORDER], [predicted]) == 0


@pytest.mark.parametrize("predicted", [{"coffeeDrink": "latte", "size": "small"}, {**ORDER, "size": "large"}, {}])
def test_a_missing_or_wrong_slot_is_neither_accepted_nor_a_strict_match(predicted):
    assert benchmark_acceptance([ORDER], [predicted]) == strict_match([ORDER], [predicted]) == 0


def test_space_around_values_does_not_count():
    predicted = {**ORDER, "milkAmount": "soy milk ", "size": "\tsmall"}
    for score in (strict_match, benchmark_acceptance):
        assert score([ORDER], [predicted]) == 100
    assert slot_f1([ORDER], [predicted]).f1 == 100


def test_none_is_the_same_as_a_slot_left_out():
    named = {**ORDER, "roast": "none"}
    assert strict_match([ORDER], [named]) == strict_match([named], [ORDER]) == 100
    assert benchmark_acceptance([named], [ORDER]) == 100
    assert slot_f1([named], [named]).num_gold == 3


def test_rates_are_over_all_utterances():
    gold = [ORDER] * 4
    predicted = [ORDER, {**ORDER, "roast": "dark roast"}, {}, {"size": "small"}]
    assert (strict_match(gold, predicted), benchmark_acceptance(gold, predicted)) == (25, 50)


def test_slot_accuracy_counts_rightly_absent_slots():
    gold = [{"size": "small"}, {"size": "large"}, {}, {"roast": "dark roast"}]
    predicted = [{"size": "small"}, {"roast": "dark roast"}, {}, {"size": "small", "roast": "light roast"}]
    assert slot_accuracy(gold, predicted) == {"roast": 50, "size": 50}


def test_named_slots_are_scored_in_their_order_even_where_they_never_occur():
    accuracy = slot_accuracy([{"size": "small"}, {}], [{}, {}], ["size", "roast"])
    assert list(accuracy.items()) == [("size", 50), ("roast", 100)]


def test_slots_beyond_the_named_ones_are_refused():
    with pytest.raises(ValueError, match=r"slots \['milk', 'roast'\] are not among"):
        slot_accuracy([{"size": "small"}], [{"roast": "dark roast", "milk": "milk"}], ["size"])


def test_slot_accuracy_without_any_slot_is_refused():
    with pytest.raises(ValueError, match="none of 1 utterances has a slot"):
        slot_accuracy([{"size": "none"}], [{}])


def test_slot_f1_counts_names_with_values_over_the_whole_corpus():
    scores = slot_f1(
        [{"size": "small", "roast": "dark roast"}, {"size": "large"}],
        [{"size": "small"}, {"size": "small", "roast": "dark roast"}],
    )
    assert (scores.num_right, scores.num_predicted, scores.num_gold) == (1, 3, 3)
    assert scores.precision == scores.recall == scores.f1 == pytest.approx(100 / 3)


def test_slot_f1_is_the_harmonic_mean():
    scores = slot_f1([{"size": "small", "roast": "dark roast"}], [{"size": "small"}])
    assert (scores.precision, scores.recall, scores.f1) == (100, 50, pytest.approx(200 / 3))


@pytest.mark.parametrize(("gold", "predicted"), [({}, {}), ({}, ORDER), (ORDER, {})])
def test_slot_f1_without_a_right_slot_is_0(gold, predicted):
    assert slot_f1([gold], [predicted]).f1 == 0


@pytest.mark.parametrize("score", SCORES)
def test_nothing_to_score_and_unequal_numbers_of_utterances_are_refused(score):
    with pytest.raises(ValueError, match="no utterance to score"):
        score([], [])
    with pytest.raises(ValueError, match="1 utterances and predicted slots of 2"):
        score([ORDER], [ORDER, ORDER])


@pytest.mark.parametrize("value", ["", "  ", math.nan, None, 3])
@pytest.mark.parametrize("score", SCORES)
def test_values_that_are_empty_or_no_text_are_refused_with_their_place(score, value):
    with pytest.raises(ValueError, match="predicted slots of utterance 1: 'size' has the value"):
        score([ORDER, ORDER], [ORDER, {"size": value}])
    with pytest.raises(ValueError, match="gold slots of utterance 0: 'size' has the value"):
        score([{"size": value}], [ORDER])


def command(action, target, location):
    return {"action": action, "object": target, "location": location}


def test_fluent_speech_commands_are_right_only_if_all_three_parts_are():
    gold = [
        command("activate", "lights", "kitchen"),
        command("increase", "heat", "none"),
        command("bring", "juice", "none"),
        command("change language", "none", "none"),
    ]
    predicted = [
        gold[0],
        command("increase", "heat", "kitchen"),
        command("bring", "shoes", "none"),
        command("decrease", "volume", "none"),
    ]
    scores = fsc_scores(gold, predicted)
    assert (scores.exact_match, scores.num_utterances) == (25, 4)
    assert scores.slot_accuracy == {"action": 75, "object": 50, "location": 75}
    assert tuple(scores.slot_accuracy) == FSC_SLOTS


def test_fluent_speech_commands_need_all_three_slots_and_no_other():
    right = command("activate", "lights", "kitchen")
    with pytest.raises(ValueError, match=r"utterance 1 has the predicted slots \['action', 'object'\]"):
        fsc_scores([right, right], [right, {"action": "activate", "object": "lights"}])
    with pytest.raises(ValueError, match="utterance 0 has the gold slots .*'size'"):
        fsc_scores([{**right, "size": "small"}], [right])
