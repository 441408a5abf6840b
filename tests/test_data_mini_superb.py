import json
from collections import Counter

import numpy as np
import pytest
from barista import split_of
from conftest import ROOT
from fsdd import DIGIT_WORDS, RECORDING

from speechkd.data.mini_superb import (
    SLOTS,
    ProbeTask,
    Trial,
    keyword_folds,
    keyword_task,
    query_lists,
    slot_task,
    speaker_task,
    string_task,
    verification_folds,
)

SHARED = ROOT.parent / "shared/data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the recordings in ../shared/data")
SPEAKERS = ("ann", "bob", "cy", "di", "ed")


def digit_rows(speakers=SPEAKERS, num_digits=10, numbers=range(7)):
    return [
        {"id": f"{digit}_{speaker}_{number}", "text": DIGIT_WORDS[digit], "speaker": speaker}
        for digit in range(num_digits)
        for speaker in speakers
        for number in numbers
    ]


def string_rows(texts, speaker="fay"):
    return [{"id": f"string-{index}", "text": text, "speaker": speaker} for index, text in enumerate(texts)]


def order(key, **slots):
    return {"id": key, "slots": [{"name": name, "value": value} for name, value in slots.items()]}


def test_numbers_below_five_are_test():
    task = keyword_task(digit_rows())
    assert (len(task.train), len(task.test)) == (10 * 5 * 2, 10 * 5 * 5)
    assert task.test["3_bob_4"] == task.train["3_bob_5"] == ("three",)
    assert "3_bob_5" not in task.test
    assert task.classes == {"text": sorted(DIGIT_WORDS)}


def test_speakers_are_told_on_the_same_split():
    task = speaker_task(digit_rows())
    assert task.train.keys() == keyword_task(digit_rows()).train.keys()
    assert task.test["0_di_0"] == ("di",)
    assert task.classes == {"speaker": list(SPEAKERS)}


def test_every_speaker_is_held_out_once():
    folds = keyword_folds(digit_rows())
    assert list(folds) == list(SPEAKERS)
    for held_out, fold in folds.items():
        assert {key.split("_")[1] for key in fold.test} == {held_out}
        assert {key.split("_")[1] for key in fold.train} == set(SPEAKERS) - {held_out}
        assert fold.test[f"7_{held_out}_6"] == ("seven",)
    assert sum(len(fold.test) for fold in folds.values()) == len(digit_rows())


def test_strings_keep_their_text():
    train = [{"id": "a", "text": "one two", "speaker": "ann"}]
    task = string_task(train, string_rows(["six"]))
    assert (task.label_names, task.train, task.test) == (("text",), {"a": ("one two",)}, {"string-0": ("six",)})


def test_slots_of_an_order_are_six_labels():
    train = [
        order("a", size="large", coffeeDrink="mocha", sugarAmount="a lot of sugar"),
        order("b", milkAmount=" cream"),
    ]
    task = slot_task(train, [order("c")])
    assert task.label_names == SLOTS
    assert task.train == {
        "a": ("mocha", "none", "none", "large", "yes", "none"),
        "b": ("none", "none", "none", "none", "none", "yes"),
    }
    assert task.test == {"c": ("none",) * 6}
    assert task.classes["coffeeDrink"] == ["mocha", "none"]
    assert task.classes["roast"] == ["none"]


def test_each_half_of_the_speakers_is_held_out_once():
    first, second = verification_folds(digit_rows(), num_trials=80, seed=0)
    assert set(first.train.values()) | set(second.train.values()) == set(SPEAKERS)
    assert not set(first.train.values()) & set(second.train.values())
    assert sorted(len(set(fold.train.values())) for fold in (first, second)) == [2, 3]


def test_trials_are_of_held_out_speakers_and_balanced():
    rows = {row["id"]: row for row in digit_rows()}
    for fold in verification_folds(rows.values(), num_trials=80, seed=0):
        assert len({frozenset((trial.enrolment, trial.test)) for trial in fold.trials}) == len(fold.trials) == 80
        assert set(Counter((trial.same_speaker, trial.same_text) for trial in fold.trials).values()) == {20}
        for trial in fold.trials:
            one, other = rows[trial.enrolment], rows[trial.test]
            assert trial.enrolment != trial.test
            assert not {one["speaker"], other["speaker"]} & set(fold.train.values())
            assert trial.same_speaker == (one["speaker"] == other["speaker"])
            assert trial.same_text == (one["text"] == other["text"])


def test_trials_depend_on_the_seed_and_not_on_the_order_of_rows():
    rows = digit_rows()
    first, again = (verification_folds(given, num_trials=40, seed=3) for given in (rows, rows[::-1]))
    other = verification_folds(rows, num_trials=40, seed=4)
    assert [fold.trials for fold in first] == [fold.trials for fold in again]
    assert [fold.trials for fold in first] != [fold.trials for fold in other]


def test_all_trials_of_a_kind_can_be_drawn():
    # each of two held-out speakers says one digit twice and another once, so has one pair of the same digit
    rows = digit_rows(SPEAKERS[:4], num_digits=1, numbers=range(2)) + digit_rows(
        SPEAKERS[:4], num_digits=2, numbers=[9]
    )
    rows = [row for row in rows if row["id"][0] != "0" or row["id"][-1] != "9"]
    fold = verification_folds(rows, num_trials=8, seed=0)[0]
    held_out = sorted(set(SPEAKERS[:4]) - set(fold.train.values()))
    expected = [Trial(f"0_{speaker}_0", f"0_{speaker}_1", True, True) for speaker in held_out]
    same = [trial for trial in fold.trials if trial.same_speaker and trial.same_text]
    assert sorted(same, key=lambda trial: trial.enrolment) == expected


def test_queries_are_of_speakers_without_strings():
    strings = string_rows(["one two", "three one four", "five"])
    lists = query_lists(digit_rows() + digit_rows(["fay"]), strings, num_per_word=3, seed=0)
    assert sorted(Counter(lists.queries.values()).items()) == [
        ("five", 3),
        ("four", 3),
        ("one", 3),
        ("three", 3),
        ("two", 3),
    ]
    assert not any("fay" in key for key in lists.queries)
    assert lists.documents["string-1"] == ("three", "one", "four")
    expected = [[word in row["text"].split() for row in strings] for word in lists.queries.values()]
    np.testing.assert_array_equal(lists.is_target, expected)
    assert lists.is_target.dtype == bool


def test_words_of_no_string_and_of_all_are_not_looked_for():
    lists = query_lists(digit_rows(), string_rows(["one two", "one three"]), num_per_word=1, seed=0)
    assert sorted(lists.queries.values()) == ["three", "two"]


def test_queries_are_whole_words_and_no_more_than_there_are():
    rows = [{"id": "1_ann_0", "text": "one", "speaker": "ann"}, {"id": "1_ann_1", "text": "one", "speaker": "ann"}]
    lists = query_lists(rows, string_rows(["stone", "one"]), num_per_word=9, seed=0)
    assert lists.is_target.tolist() == [[False, True], [False, True]]


def test_queries_depend_on_the_seed_and_not_on_the_order_of_rows():
    rows, strings = digit_rows(), string_rows(["one two three", "four five", "six"])
    first, again = (query_lists(given, strings, num_per_word=2, seed=5).queries for given in (rows, rows[::-1]))
    assert first == again
    assert first != query_lists(rows, strings, num_per_word=2, seed=6).queries


@needs_shared
def test_real_digits_have_the_published_split():
    names = sorted(path.stem for path in (SHARED / "fsdd/recordings").iterdir() if RECORDING.fullmatch(path.stem))
    rows = [{"id": name, "text": DIGIT_WORDS[int(name[0])], "speaker": name.split("_")[1]} for name in names]
    speakers = {row["speaker"] for row in rows}
    task = keyword_task(rows)
    assert len(task.test) == 5 * 10 * len(speakers)
    assert len(task.train) == 45 * 10 * len(speakers)
    assert len(keyword_folds(rows)) == len(speakers)
    folds = verification_folds(rows, num_trials=400, seed=0)
    assert [len(fold.trials) for fold in folds] == [400, 400]


@needs_shared
def test_real_orders_have_the_classes_of_the_card():
    labels = json.loads((SHARED / "barista/data/label/label.json").read_text(encoding="utf-8"))
    parts = {"train": [], "dev": [], "test": []}
    for name, label in labels.items():
        parts[split_of(label["slots"])].append(order(name, **label["slots"]))
    task = slot_task(parts["train"] + parts["dev"], parts["test"])
    assert {name: len(values) for name, values in task.classes.items()} == {
        "coffeeDrink": 10,
        "numberOfShots": 4,
        "roast": 4,
        "size": 8,
        "sugarAmount": 2,
        "milkAmount": 2,
    }
    assert len(task.train) + len(task.test) == len(labels)


DIGITS = digit_rows()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: keyword_task([*DIGITS, DIGITS[0]]), "id '0_ann_0' stands twice"),
        (lambda: keyword_task(string_rows(["one"])), "utterance 'string-0' is not a single recording"),
        (lambda: keyword_task([{"id": "1_ann_7"}]), "utterance '1_ann_7' has no text; run its data_prep script again"),
        (lambda: keyword_task(digit_rows(numbers=[7])), "the task of text has 50 items to learn from and 0 to test on"),
        (lambda: speaker_task([{"id": "1_a_7", "text": "one", "speaker": None}]), "'1_a_7' has no speaker"),
        (lambda: keyword_folds([{"id": "x"}]), "utterance 'x' has no text and no speaker"),
        (lambda: keyword_folds(digit_rows(["ann"])), r"needs two speakers or more, found \['ann'\]"),
        (lambda: string_task([], string_rows(["one"])), "has 0 items to learn from and 1 to test on"),
        (lambda: string_task(string_rows(["one"]), string_rows(["two"])), "1 items are both .* 'string-0' first"),
        (lambda: slot_task([order("a", syrup="mint")], []), "utterance 'a' has the slot 'syrup' with the value 'mint'"),
        (lambda: slot_task([order("a", size=" ")], []), "'a' has the slot 'size' with the value ''"),
        (
            lambda: slot_task([{"id": "a", "slots": 2 * order("a", size="small")["slots"]}], []),
            "utterance 'a' has the slot 'size' .* once at most",
        ),
        (lambda: slot_task([{"id": "a", "slots": None}], []), "utterance 'a' has no slots"),
        (lambda: verification_folds(DIGITS, num_trials=6, seed=0), "must be a multiple of 4, .* got 6"),
        (lambda: verification_folds(digit_rows("abc"), num_trials=4, seed=0), "need four speakers or more"),
        (
            lambda: verification_folds(digit_rows("abcd", numbers=range(2)), num_trials=84, seed=0),
            "make 20 trials with same_speaker=True and same_text=True, and 21 are asked for; take num_trials=80",
        ),
        (lambda: query_lists(DIGITS, string_rows(["one"]), num_per_word=0, seed=0), "num_per_word must be 1 or more"),
        (
            lambda: query_lists(digit_rows(["fay"]), string_rows(["one", "two"]), num_per_word=1, seed=0),
            r"none of 70 recordings is a query for 2 strings of the speakers \['fay'\]",
        ),
        (lambda: query_lists(DIGITS, string_rows(["ten", "ten"]), num_per_word=1, seed=0), "none of 350 recordings"),
    ],
)
def test_rows_without_a_task_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_task_names_what_it_lacks():
    with pytest.raises(ValueError, match="the task of size, roast has 1 items to learn from and 0 to test on"):
        ProbeTask(("size", "roast"), {"a": ("small", "dark roast")}, {})
