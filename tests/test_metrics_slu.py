import pytest

from speechkd.metrics.slu import slot_recall


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
