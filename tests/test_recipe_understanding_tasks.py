"""recipes/segue, understanding: settings, labels of a task, k-shot choices and scores."""

import logging
import math
import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "recipes/segue"))  # behind the others: its train.py is loaded by path

from understanding_orders import DRINKS, SIZES, config, orders, slots, write_rows
from understanding_tasks import (
    UnderstandingConfig,
    class_targets,
    few_positions,
    k_shot_label,
    label_classes,
    read_labels,
    score_labels,
)

from speechkd.config import parse_config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "labels"}, "labels and regression need the names"),
        ({"task": "slots", "label_names": ["size"]}, "the other tasks take none"),
        ({"task": "regression", "label_names": ["a", "b"], "modes": ["ridge"]}, "regression learns one number"),
        ({"task": "regression", "label_names": ["a"], "modes": ["frozen"]}, "ridge for regression"),
        ({"task": "intent", "k_shot_by": "size"}, "intent needs no choice"),
        ({"task": "asr", "modes": ["frozen", "k_shot"]}, r"asr has the modes frozen and fine_tune, not \['k_shot'\]"),
        ({"task": "slots", "k": [4, 4]}, r"understanding.k must hold one value or more, each once, got \[4, 4\]"),
        ({"task": "slots", "seeds": []}, "understanding.seeds must hold one value"),
        ({"task": "slots", "modes": []}, "understanding.modes must hold one value"),
        ({"task": "slots", "k": [0]}, "k >= 1"),
        ({"task": "slots", "seeds": [-1]}, "seeds >= 0"),
        ({"task": "slots", "head_learning_rate": math.nan}, "head_learning_rate must be a positive number, got nan"),
        ({"task": "slots", "ridge_alpha": 0.0}, "ridge_alpha must be a positive number, got 0.0"),
        ({"task": "slots", "fine_tune_steps": 0}, "fine_tune_steps must be 1 or more, got 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        UnderstandingConfig(**arguments)


def test_settings_are_read_from_the_command_line():
    read, _ = parse_config(UnderstandingConfig, ["--task=slots", "--modes=[frozen,k_shot]", "--k=[1,8]"])
    assert read.modes == ["frozen", "k_shot"] and read.k == [1, 8] and read.seeds == [37, 38, 39, 40, 41]
    with pytest.raises(SystemExit):
        parse_config(UnderstandingConfig, ["--task=slots", "--modes=[thawed]"])


def test_slots_are_stripped_and_one_that_comes_twice_has_both_values(tmp_path):
    twice = [{"name": "date", "value": " today"}, {"name": "place", "value": "rome"}, {"name": "date", "value": "noon"}]
    manifest = write_rows(tmp_path, {"slots": twice}, {"slots": []})
    assert read_labels(manifest, config()) == {"row-0": {"date": "today, noon", "place": "rome"}, "row-1": {}}


def test_words_are_slots_by_their_position(tmp_path):
    manifest = write_rows(tmp_path, {"text": "Four  two"}, {"text": "nine"})
    labels = read_labels(manifest, config("words"))
    assert labels == {"row-0": {"word_1": "four", "word_2": "two"}, "row-1": {"word_1": "nine"}}
    assert label_classes(config("words"), list(labels.values())) == {
        "word_1": ["four", "nine"],
        "word_2": ["none", "two"],
    }
    many = [{f"word_{number}": "one" for number in range(1, 12)}]
    assert list(label_classes(config("words"), many))[-3:] == ["word_9", "word_10", "word_11"]


def test_labels_may_name_the_intent_and_slots_that_are_not_said(tmp_path):
    manifest = write_rows(tmp_path, {"intent": "joy", **slots(sentiment="positive")}, {"intent": "anger", **slots()})
    task = config("labels", label_names=["sentiment", "intent"])
    assert list(read_labels(manifest, task).values()) == [
        {"sentiment": "positive", "intent": "joy"},
        {"sentiment": "none", "intent": "anger"},
    ]
    assert list(read_labels(manifest, config("intent")).values()) == [{"intent": "joy"}, {"intent": "anger"}]


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        ({"task": "intent"}, {"text": "no intent"}, "1 of 2 utterances have no intent, 'row-1' first"),
        ({"task": "words"}, {"text": " "}, "1 of 2 utterances have no text, 'row-1' first"),
        ({"task": "regression"}, slots(mood="nan"), "have no number in the slot 'mood', 'row-1' first"),
        ({"task": "regression"}, slots(mood="glad"), "have no number in the slot 'mood'"),
        ({"task": "regression"}, slots(), "have no number in the slot 'mood'"),
    ],
)
def test_an_utterance_without_what_the_task_needs_is_named(tmp_path, task, fields, message):
    manifest = write_rows(tmp_path, {"intent": "x", "text": "y", **slots(mood="-1.5")}, fields)
    if task["task"] == "regression":
        task |= {"label_names": ["mood"], "modes": ["ridge"]}
    with pytest.raises(ValueError, match=message):
        read_labels(manifest, config(**task))


def test_slots_without_any_value_are_refused():
    with pytest.raises(ValueError, match="none of 2 utterances to learn from has a slot"):
        label_classes(config(), [{}, {}])
    task = config("labels", label_names=["mood"])
    with pytest.raises(ValueError, match="no utterance to learn from has a slot 'mood'; its slots are drink"):
        label_classes(task, [{"drink": "mocha"}])


def test_a_label_unseen_in_training_is_minus_one_and_told_once(caplog):
    classes = label_classes(config(), orders())
    with caplog.at_level(logging.WARNING):
        targets, unseen = class_targets([{"drink": "tea", "size": "small"}, {"drink": "mocha"}], classes)
    assert targets.tolist() == [[-1, classes["size"].index("small")], [classes["drink"].index("mocha"), 1]]
    assert classes["size"] == ["large", "none", "small"] and unseen == {"drink": 1}
    assert len(caplog.records) == 1 and "'tea'" in caplog.text


def test_worked_example_of_the_k_shot_choice():
    train = [{"intent": label} for label in "bbbbbbaaaaaa"]
    ids = [f"{row['intent']}{index % 6}" for index, row in enumerate(train)]
    chosen = few_positions(config("intent"), ids, train, 2, 37)
    assert [ids[position] for position in chosen] == ["b5", "b4", "a0", "a4"]


def test_k_shot_counts_the_label_said_most_often_and_then_the_one_of_most_values():
    assert k_shot_label(config(), orders()) == "drink"  # sizes are missing now and then
    always = [{"size": SIZES[index % 2], "taste": DRINKS[index % 3]} for index in range(6)]
    assert k_shot_label(config(), always) == "taste"
    assert k_shot_label(config(k_shot_by="size"), always) == "size"
    with pytest.raises(ValueError, match="k_shot_by='milk' is none of the labels size, taste"):
        k_shot_label(config(k_shot_by="milk"), always)


def test_regression_chooses_k_of_each_rounded_value():
    train = [{"mood": str(value)} for value in (-1.2, -0.9, 0.1, 0.2, 1.4, 0.6)]
    task = config("regression", label_names=["mood"], modes=["ridge", "k_shot"])
    chosen = few_positions(task, list("abcdef"), train, 1, 37)
    assert sorted(round(float(train[position]["mood"])) for position in chosen) == [-1, 0, 1]


def test_k_above_a_class_size_names_the_label_and_the_way_out():
    train = [{"drink": "mocha"}, {"drink": "mocha"}, {"drink": "latte"}]
    with pytest.raises(ValueError, match=r"values of 'drink': k=2 is more than 1 of 2 classes hold: 'latte' has 1"):
        few_positions(config(), list("abc"), train, 2, 37)


def test_a_further_slot_passes_the_benchmark_and_fails_the_strict_match():
    gold = [{"drink": "mocha"}, {"drink": "latte", "size": "small"}]
    said = [{"drink": "mocha", "size": "large"}, {"drink": "latte", "size": "small"}]
    scores = score_labels(config(), gold, said, ["drink", "size"])
    assert scores["acceptance"] == 100 and scores["strict_match"] == 50
    assert scores["accuracy/drink"] == 100 and scores["accuracy/size"] == 50
    assert scores["mean_slot_accuracy"] == 75
    assert scores["slot_f1"] == pytest.approx(100 * 6 / 7)


def test_a_slot_that_only_the_test_has_counts_as_never_found():
    scores = score_labels(config(), [{"drink": "mocha", "milk": "soy"}], [{"drink": "mocha"}], ["drink"])
    assert scores["accuracy/milk"] == 0 and scores["mean_slot_accuracy"] == 50 and scores["acceptance"] == 0


def test_worked_example_of_weighted_f1_of_intents_and_labels():
    gold, said = ([{"intent": digit} for digit in digits] for digits in ("000112", "001110"))
    scores = score_labels(config("intent"), gold, said, ["intent"])
    assert scores["weighted_f1"] == pytest.approx(60)
    assert scores["accuracy"] == pytest.approx(66.6667, abs=5e-5)
    both = config("labels", label_names=["intent", "mood"])
    gold, said = ([{**row, "mood": "same"} for row in rows] for rows in (gold, said))
    scores = score_labels(both, gold, said, ["intent", "mood"])
    assert scores["mean_weighted_f1"] == pytest.approx(80)
    assert scores["weighted_f1/intent"] == pytest.approx(60) and scores["accuracy/mood"] == 100
    assert scores["exact_match"] == pytest.approx(66.6667, abs=5e-5)


def test_worked_example_of_the_five_scores_of_sentiment():
    truth, guess = (-2, -0.4, 0, 0.6, 1.5, 3), (-1.2, 0.1, 0.3, 0.4, 2.5, 2.2)
    gold, said = ([{"mood": repr(value)} for value in values] for values in (truth, guess))
    task = config("regression", label_names=["mood"], modes=["ridge"])
    scores = score_labels(task, gold, said, ["mood"])
    assert scores["mae"] == pytest.approx(0.6) and scores["pearson_r"] == pytest.approx(0.9266294, abs=5e-8)
    assert scores["weighted_f1"] == pytest.approx(78.09524, abs=5e-6)
    assert scores["accuracy_2"] == pytest.approx(80) and scores["accuracy_7"] == pytest.approx(50)
