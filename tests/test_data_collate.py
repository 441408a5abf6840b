import pytest
from conftest import TOKENS

from speechkd.data.collate import LabelDraws, collate_labels, draw_label, prepend_prompt, strip_timestamps

A = [50258, 50259, 50359, 50363, 400, 401, 50257]
B = [50361, 11, 12, *A]


def test_labels_are_shifted_and_padding_is_masked_by_position():
    inputs, labels = collate_labels([A, B], TOKENS, pad_to=12)
    assert labels[0].tolist() == [50259, 50359, 50363, 400, 401, 50257, *[-100] * 5]
    assert labels[1].tolist() == [-100, -100, -100, 50259, 50359, 50363, 400, 401, 50257, -100, -100]
    assert inputs[1, :4].tolist() == [50361, 11, 12, 50258]
    assert (labels == TOKENS.end_of_text).sum(dim=1).tolist() == [1, 1]  # the end is scored once


def test_an_empty_prompt_is_masked_too():
    _, labels = collate_labels([[50361, *A]], TOKENS)
    assert labels[0].tolist() == [-100, 50259, 50359, 50363, 400, 401, 50257]


@pytest.mark.parametrize("length", [0, 449])
def test_labels_outside_the_context_are_refused(length):
    with pytest.raises(ValueError, match=f"has {length} tokens"):
        collate_labels([[50258] * length, A], TOKENS)


def test_timestamps_give_way_to_one_token():
    stamped = [50258, 50259, 50359, 50364, 400, 401, 50464, 50464, 402, 50514, 50257]
    assert strip_timestamps(stamped, TOKENS) == [50258, 50259, 50359, 50363, 400, 401, 402, 50257]


@pytest.mark.parametrize(
    ("num_previous", "num_label", "num_prompt", "total"),
    [
        (300, 100, 224, 324),
        (300, 300, 148, 448),
        (300, 446, 2, 448),
        (100, 300, 101, 401),
        (224, 223, 225, 448),
        (225, 223, 224, 447),
        (50, 420, 28, 448),
        (300, 447, 0, 447),
    ],
)
def test_prompts_keep_what_fits(num_previous, num_label, num_prompt, total):
    label = [50258] + [7] * (num_label - 1)
    sequence = prepend_prompt(list(range(num_previous)), label, TOKENS)
    assert (len(sequence), len(sequence) - num_label) == (total, num_prompt)
    assert sequence[num_prompt:] == label
    if num_prompt:
        assert sequence[1:num_prompt] == list(range(num_previous))[-(num_prompt - 1) :]


def test_special_tokens_are_stripped_from_a_prompt():
    assert prepend_prompt([50258, 5, 50257], A, TOKENS) == [50361, 5, *A]


def test_timestamps_of_a_prompt_stay_only_where_asked_for():
    previous = [50258, 50259, 50359, 50364, 5, 50414, 50257]
    assert prepend_prompt(previous, A, TOKENS) == [50361, 5, *A]
    assert prepend_prompt(previous, A, TOKENS, keep_timestamps=True) == [50361, 50364, 5, 50414, *A]


@pytest.mark.parametrize(
    ("timestamps", "previous_text", "expected"),
    [
        (0, 0, A),
        (1, 0, [50258, 50259, 50359, 50364, 400, 401, 50464, 50257]),
        (0, 1, [50361, 5, *A]),
        (1, 1, [50361, 50364, 5, 50414, 50258, 50259, 50359, 50364, 400, 401, 50464, 50257]),
    ],
)
def test_a_label_is_drawn_with_or_without_timestamps_and_prompt(timestamps, previous_text, expected):
    stamped = [50258, 50259, 50359, 50364, 400, 401, 50464, 50257]
    draws = LabelDraws(timestamp_probability=timestamps, previous_text_probability=previous_text)
    previous = [50258, 50259, 50359, 50364, 5, 50414, 50257]
    for epoch in range(20):
        assert draw_label(stamped, previous, TOKENS, draws, utterance_id="u", epoch=epoch) == expected


def test_a_label_without_text_that_was_decoded_with_timestamps_says_that_it_has_none():
    label = draw_label([50258, 50259, 50359, 50257], None, TOKENS, LabelDraws(1.0, 1.0), utterance_id="u", epoch=0)
    assert label == [50258, 50259, 50359, 50363, 50257]
