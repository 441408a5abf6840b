"""recipes/segue, understanding: labels of a task, heads on vectors, fine-tuning, and the comparison of systems."""

import json
import logging
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, write_tone
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperModel,
)

sys.path.append(str(ROOT / "recipes/segue"))  # behind the others: its train.py is loaded by path

import tabulate_understanding
from comparison import Split, System, compare, read_split
from frame_heads import fit_ctc, labels_of, read_strings, string_of
from heads import (
    Machine,
    TargetClips,
    collate_targets,
    fine_tune,
    fit_heads,
    fit_ridge,
    predicted_labels,
    speech_vectors,
)
from understand import CASCADE, STUDENT, UNTOUCHED, text_vectors, understand
from understand import main as understand_main
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
from speechkd.data.manifest import read_manifest, write_manifest
from speechkd.labels.embeddings import cache_lower_states
from speechkd.labels.teacher_cache import LabelStoreError
from speechkd.models.ctc_head import (
    SegueForCTC,
    ctc_alphabet,
    ctc_greedy,
    ctc_loss,
    encode_symbols,
    entities_of,
    entity_symbols,
)
from speechkd.models.segue import SegueEncoder
from speechkd.models.understanding import SegueForUnderstanding, understanding_loss
from speechkd.teachers_text import load_sentence_teacher

DRINKS, SIZES = ("mocha", "latte", "espresso"), ("small", "large")
RATE_HZ = 16_000
CPU = Machine(use_cpu=True)


def config(task="slots", **changes):
    return UnderstandingConfig(**{"task": task, "head_steps": 60, "seeds": [37, 38], "k": [1, 2], **changes})


def orders(num=24):
    """Drinks, each in both sizes or in none, in turn."""
    rows = [{"drink": DRINKS[index % 3], "size": (*SIZES, None)[index // 3 % 3]} for index in range(num)]
    return [{name: value for name, value in row.items() if value} for row in rows]


def write_orders(folder, name, labels, seconds=0.3, audio=True):
    """A manifest of tones whose pitch tells the drink and whose length the size."""
    rows = []
    for index, slots in enumerate(labels):
        drink, size = DRINKS.index(slots["drink"]), (*SIZES, None).index(slots.get("size"))
        key, length = f"{name}-{index:02d}", seconds + 0.1 * size
        path = folder / f"audio/{key}.wav"
        if audio:
            write_tone(path, length, pitch_hz=200 * (1 + drink) + index)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        rows.append(
            {
                "id": key,
                "audio": f"audio/{key}.wav",
                "duration_seconds": length,
                "sample_rate_hz": RATE_HZ,
                "intent": "order",
                "text": " ".join(slots.values()),
                "slots": [{"name": slot, "value": value} for slot, value in slots.items()],
            }
        )
    write_manifest(folder / f"{name}.jsonl", rows)
    return folder / f"{name}.jsonl"


def write_rows(folder, *fields):
    """A manifest of one shared tone with these fields."""
    write_tone(folder / "tone.wav", 0.2)
    shared = {"audio": "tone.wav", "duration_seconds": 0.2, "sample_rate_hz": RATE_HZ}
    write_manifest(folder / "rows.jsonl", [{"id": f"row-{i}", **shared, **row} for i, row in enumerate(fields)])
    return read_manifest(folder / "rows.jsonl")


def slots(**values):
    return {"slots": [{"name": name, "value": value} for name, value in values.items()]}


def whisper_student(num_frozen_layers=0, **arguments):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 9}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 8, "begin_suppress_tokens": None}
    model = WhisperModel(WhisperConfig(**sizes, **ids))
    return SegueEncoder(model.encoder, grid_seconds=0.2, num_frozen_layers=num_frozen_layers, **arguments).eval()


def perfect_vectors(ids, labels, dim=12, seed=0):
    """One direction for each value of each slot, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    values = sorted({value for row in labels for value in row.values()})
    vectors = {}
    for key, row in zip(ids, labels, strict=True):
        vector = 0.05 * torch.randn(dim, generator=generator)
        for value in row.values():
            vector[values.index(value)] += 3.0
        vectors[key] = vector
    return vectors


def weights_of(module):
    return {name: weight.clone() for name, weight in module.state_dict().items()}


@pytest.fixture
def splits(tmp_path):
    """Splits of 24 and 12 orders whose audio is never decoded."""
    found = {}
    for name, num in (("train", 24), ("test", 12)):
        path = write_orders(tmp_path / "data", name, orders(num), audio=False)
        found[name] = read_split(config(), str(path))
    return found["train"], found["test"]


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


def test_heads_see_neither_the_scale_nor_the_place_of_the_vectors():
    labels = orders()
    classes = label_classes(config(), labels)
    targets, _ = class_targets(labels, classes)
    ids = [str(index) for index in range(len(labels))]
    vectors = torch.stack(list(perfect_vectors(ids, labels).values()))
    moved = 300 * vectors + 7
    sizes = [len(values) for values in classes.values()]
    for fit in (lambda x: fit_heads(x, targets, sizes, config(), 0), lambda x: fit_ridge(x, targets, sizes, 100.0)):
        for plain, far in zip(fit(vectors), fit(moved), strict=True):
            torch.testing.assert_close(plain(vectors), far(moved), rtol=1e-3, atol=1e-3)


def test_ridge_of_values_is_that_of_the_scaled_vectors():
    vectors = torch.tensor([[1.0, 0], [0, 1], [1, 1]]) * 4 - 2
    values = torch.tensor([[1.0], [2], [4]])
    (head,) = fit_ridge(vectors, values, [], 0.5)
    centred = (vectors - vectors.mean(0)).double()
    scaled = centred / centred.square().mean().sqrt()
    gram = scaled.T @ scaled + 0.5 * torch.eye(2, dtype=torch.float64)
    weight = torch.linalg.solve(gram, scaled.T @ (values.double() - values.double().mean()))
    expected = scaled @ weight + values.double().mean()
    torch.testing.assert_close(head(vectors).double(), expected, rtol=0, atol=1e-5)
    (said,) = predicted_labels(nn.ModuleList([head]), vectors[:1], {"mood": []})
    assert float(said["mood"]) == pytest.approx(float(expected[0]), abs=1e-5)


def test_one_item_and_equal_items_can_be_learnt_from():
    heads = fit_heads(torch.ones(3, 4), torch.tensor([[0], [0], [0]]), [2], config(), 0)
    assert predicted_labels(heads, torch.ones(1, 4), {"drink": ["mocha", "latte"]}) == [{"drink": "mocha"}]
    assert torch.isfinite(heads[0].weight).all()


def test_worked_example_of_the_loss_of_two_heads():
    outputs = [torch.tensor([[2.0, 0, 0]]), torch.tensor([[0.0, 1]])]
    first = understanding_loss(outputs[:1], torch.tensor([[0]]))
    assert first.item() == pytest.approx(0.2395448, abs=5e-8)
    assert understanding_loss(outputs[1:], torch.tensor([[0]])).item() == pytest.approx(1.3132616, abs=1e-7)
    assert understanding_loss(outputs, torch.tensor([[0, 0]])).item() == pytest.approx(1.5528065, abs=1e-7)
    twice = [scores.repeat(2, 1) for scores in outputs]  # a sum over items too
    assert understanding_loss(twice, torch.zeros(2, 2, dtype=torch.int64)).item() == pytest.approx(3.105613, abs=1e-6)


def test_loss_of_values_is_the_sum_over_items_of_the_squared_error():
    outputs, targets = torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [0.0]])
    assert understanding_loss([outputs], targets, "values").item() == 10
    assert understanding_loss([outputs.bfloat16()], targets, "values").dtype == torch.float32


@pytest.mark.parametrize(
    ("outputs", "targets", "kind", "message"),
    [
        ([torch.zeros(2, 3)], torch.zeros(2, 2, dtype=torch.int64), "classes", "do not fit 1 heads and 2 items"),
        ([torch.zeros(2, 3)], torch.zeros(2, 1), "classes", "of torch.float32 do not fit"),
        ([torch.zeros(2, 1)], torch.zeros(3, 1), "values", r"do not fit values \(3, 1\)"),
        ([torch.zeros(2, 1)] * 2, torch.zeros(2, 1), "values", "values need one head"),
    ],
)
def test_targets_that_do_not_fit_the_heads_are_refused(outputs, targets, kind, message):
    with pytest.raises(ValueError, match=message):
        understanding_loss(outputs, targets, kind)


@pytest.mark.parametrize("heads", [[], [nn.Linear(31, 2)], [nn.Linear(32, 2), nn.Linear(16, 2)], [nn.Identity()]])
def test_heads_of_another_width_are_refused(heads):
    with pytest.raises(ValueError, match="do not fit embeddings of 32"):
        SegueForUnderstanding(whisper_student(), nn.ModuleList(heads))


def test_fine_tuning_switches_the_dropouts_on_that_segue_has_off():
    student = whisper_student()
    student.config.dropout = 0.1
    assert student.stack.layers[-1].dropout == 0
    SegueForUnderstanding(student, nn.ModuleList([nn.Linear(32, 2)]))
    assert student.stack.layers[-1].dropout == 0.1


def test_encoding_leaves_the_encoder_as_it_was_and_does_not_depend_on_the_others(tmp_path):
    manifest = read_manifest(write_orders(tmp_path, "train", orders(5)[::-1]))
    soundfile.write(tmp_path / "audio/train-00.wav", np.zeros(6400), RATE_HZ)  # silence has a vector too
    student = whisper_student().train()
    before = weights_of(student)
    vectors, skipped = speech_vectors(student, manifest)
    assert student.training and not skipped and list(vectors) != manifest.ids  # shortest first
    assert all(torch.equal(before[name], weight) for name, weight in student.state_dict().items())
    alone, _ = speech_vectors(student, manifest.select([4]))
    torch.testing.assert_close(alone["train-04"], vectors["train-04"], rtol=0, atol=1e-5)
    assert torch.stack(list(vectors.values())).isfinite().all()


def test_clips_too_short_for_ten_frames_are_lengthened_when_encoded_and_when_learnt_from(tmp_path):
    write_tone(tmp_path / "tone.wav", 0.02)
    row = {
        "id": "short",
        "audio": "tone.wav",
        "duration_seconds": 0.02,
        "sample_rate_hz": RATE_HZ,
        **slots(drink="tea"),
    }
    write_manifest(tmp_path / "short.jsonl", [row])
    manifest = read_manifest(tmp_path / "short.jsonl")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    convolutions = {"conv_dim": [16] * 7, "num_conv_pos_embedding_groups": 2, "num_conv_pos_embeddings": 16}
    torch.manual_seed(0)
    student = SegueEncoder(Wav2Vec2Model(Wav2Vec2Config(**sizes, **convolutions)))
    vectors, skipped = speech_vectors(student, manifest)
    assert not skipped and vectors["short"].isfinite().all()
    assert TargetClips(manifest, torch.zeros(1, 1), min_samples=3280)[0]["waveform"].shape == (3280,)
    settings = config(fine_tune_steps=1)
    targets, classes = torch.zeros(1, 1, dtype=torch.int64), {"drink": ["tea"]}
    fine_tune(student, None, manifest, targets, classes, settings, output_dir=tmp_path / "run", seed=0, machine=CPU)


def test_fine_tuning_moves_encoder_and_heads_but_no_frozen_layer(tmp_path):
    labels = orders(6)
    manifest = read_manifest(write_orders(tmp_path, "train", labels))
    classes = label_classes(config(), labels)
    targets, _ = class_targets(labels, classes)
    task = config(fine_tune_steps=2, fine_tune_batch_seconds=1.2, fine_tune_learning_rate=1e-3)
    student = whisper_student(num_frozen_layers=1)
    before = weights_of(student)
    model = fine_tune(student, None, manifest, targets, classes, task, output_dir=tmp_path / "run", seed=0, machine=CPU)
    moved = {name for name, weight in model.encoder.state_dict().items() if not weight.equal(before[name])}
    assert moved and not any("layers.0." in name or "conv" in name for name in moved)
    assert any("layers.1." in name for name in moved) and not model.training
    log = [json.loads(line) for line in (tmp_path / "run/train_log.jsonl").read_text().splitlines()]
    assert model.heads[0].weight.requires_grad and log


def test_fine_tuning_lowers_the_loss_and_its_seed_repeats(tmp_path):
    labels = orders(6)
    manifest = read_manifest(write_orders(tmp_path, "train", labels))
    classes = label_classes(config(), labels)
    targets, _ = class_targets(labels, classes)
    task = config(fine_tune_steps=15, fine_tune_batch_seconds=10, fine_tune_learning_rate=1e-2)
    runs = [
        fine_tune(
            whisper_student(), None, manifest, targets, classes, task, output_dir=tmp_path / "run", seed=3, machine=CPU
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*(run.state_dict().values() for run in runs), strict=True))

    def loss(model):
        batch = collate_targets([TargetClips(manifest, targets)[index] for index in range(6)])
        with torch.no_grad():
            return understanding_loss(model(batch["waveforms"], batch["num_samples"]), targets).item()

    start = fine_tune(
        whisper_student(), None, manifest, targets, classes, config(fine_tune_steps=1, fine_tune_learning_rate=1e-9),
        output_dir=tmp_path / "start", seed=3, machine=CPU,
    )  # fmt: skip
    assert loss(runs[0]) < 0.7 * loss(start)


def test_stored_states_of_frozen_layers_stand_for_the_audio(tmp_path):
    labels = orders(4)
    path = write_orders(tmp_path, "train", labels)
    student = whisper_student(num_frozen_layers=1)
    store = cache_lower_states(student, "tiny", path, tmp_path / "states")
    manifest, targets = read_manifest(path), torch.zeros(4, 1, dtype=torch.int64)
    model = SegueForUnderstanding(student, nn.ModuleList([nn.Linear(32, 2)])).eval()
    outputs = []
    for states in (None, store):
        batch = collate_targets([TargetClips(manifest, targets, states=states)[index] for index in range(4)])
        outputs.append(model(batch.get("waveforms"), batch["num_samples"], batch.get("states"))[0])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=5e-3)  # states are kept in float16
    with pytest.raises(ValueError, match="4 utterances and 3 targets differ"):
        TargetClips(manifest, targets[:3])


def systems_of(train, test, **changes):
    labels = [*train.labels, *test.labels]
    ids = [*train.ids, *test.ids]
    generator = torch.Generator().manual_seed(9)
    noise = {key: torch.randn(12, generator=generator) for key in ids}
    return [System("perfect", perfect_vectors(ids, labels), None, {}), System("noise", noise, None, {})]


def scores_of(outcome, system, mode, k=None):
    found = [r for r in outcome["results"] if (r["system"], r["mode"], r["k"]) == (system, mode, k)]
    assert len(found) == 1
    return found[0]


def test_perfect_vectors_are_understood_and_noise_is_not(splits, tmp_path):
    task = config(modes=["frozen", "ridge", "k_shot"], k=[2, 4], head_steps=200)
    outcome = compare(task, systems_of(*splits), *splits, output_dir=tmp_path, machine=CPU)
    for mode in ("frozen", "ridge"):
        perfect, noise = (scores_of(outcome, name, mode) for name in ("perfect", "noise"))
        assert perfect["mean"]["mean_slot_accuracy"] == perfect["mean"]["strict_match"] == 100
        assert noise["mean"]["mean_slot_accuracy"] < 80
        assert perfect["num_train"] == 24
    assert scores_of(outcome, "perfect", "frozen")["deviation"]["strict_match"] == 0
    assert scores_of(outcome, "perfect", "ridge")["deviation"]["strict_match"] is None  # nothing is drawn
    assert [run["seed"] for run in scores_of(outcome, "noise", "frozen")["runs"]] == [37, 38]
    assert scores_of(outcome, "noise", "k_shot", 4)["num_train"] == 12
    assert outcome["labels"] == {"drink": 3, "size": 3} and outcome["unseen"] == {}


def test_systems_share_seeds_and_clips(splits, tmp_path):
    train, test = splits
    (perfect, _) = systems_of(train, test)
    # equal vectors under two names give equal runs only where heads, seeds and chosen clips are the same
    twins = [System(name, perfect.vectors, None, {}) for name in ("one", "two")]
    outcome = compare(config(modes=["k_shot"], k=[1]), twins, train, test, output_dir=tmp_path, machine=CPU)
    one, two = (scores_of(outcome, name, "k_shot", 1)["runs"] for name in ("one", "two"))
    assert one == two and one[0] != {**one[1], "seed": 37}


def test_a_comparison_repeats_itself(splits, tmp_path):
    task = config(modes=["frozen", "k_shot"])
    outcomes = [
        compare(task, systems_of(*splits), *splits, output_dir=tmp_path / name, machine=CPU) for name in ("a", "b")
    ]
    for outcome in outcomes:
        for result in outcome["results"]:
            assert result.pop("wall_seconds") >= 0
    assert outcomes[0] == outcomes[1]
    files = [(tmp_path / name / "understanding_hypotheses.jsonl").read_text() for name in ("a", "b")]
    assert files[0] == files[1]


def test_pictures_and_hypotheses_are_written(splits, tmp_path):
    (tmp_path / "understanding_confusion_of_an_earlier_call.png").touch()
    compare(config(modes=["frozen", "k_shot"]), systems_of(*splits), *splits, output_dir=tmp_path, machine=CPU)
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == [
        "understanding_confusion_noise_frozen.png",
        "understanding_confusion_perfect_frozen.png",
        "understanding_k_shot.png",
    ]
    for name in pictures:
        assert matplotlib.image.imread(tmp_path / name).std() > 0.01
    rows = [json.loads(line) for line in (tmp_path / "understanding_hypotheses.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == splits[1].ids
    assert set(rows[0]["predicted"]) == {
        f"{name}, {mode}" for name in ("perfect", "noise") for mode in ("frozen", "k_shot, k=1", "k_shot, k=2")
    }
    assert rows[2]["gold"] == splits[1].labels[2] == {"drink": "espresso", "size": "small"}
    assert rows[6]["gold"] == {"drink": "mocha"}
    assert rows[6]["predicted"]["perfect, frozen"] == {"drink": "mocha", "size": "none"}


def test_a_k_above_a_class_is_refused_before_anything_is_fitted(splits, tmp_path):
    with pytest.raises(ValueError, match="k=9 is more than 3 of 3 classes hold"):
        compare(config(modes=["frozen", "k_shot"], k=[1, 9]), [], *splits, output_dir=tmp_path, machine=CPU)
    assert not list(tmp_path.glob("understanding*"))


def test_a_clip_longer_than_a_batch_is_refused_before_anything_is_fitted(splits, tmp_path):
    with pytest.raises(
        ValueError, match=r"'train-06' lasts 0.5 s, longer than understanding.fine_tune_batch_seconds=0.4"
    ):
        compare(config(modes=["fine_tune"], fine_tune_batch_seconds=0.4), [], *splits, output_dir=tmp_path, machine=CPU)


def test_clips_without_a_vector_or_with_a_broken_one_are_named(splits, tmp_path):
    system = systems_of(*splits)[0]
    system.vectors["train-03"][0] = torch.nan
    with pytest.raises(ValueError, match="perfect gives 1 of 24 clips a vector with NaN .* 'train-03' first"):
        compare(config(), [system], *splits, output_dir=tmp_path, machine=CPU)
    del system.vectors["train-03"]
    with pytest.raises(ValueError, match="perfect has no vector of 1 of 24 clips, 'train-03' first"):
        compare(config(), [system], *splits, output_dir=tmp_path, machine=CPU)


def test_a_test_value_unseen_in_training_is_counted_and_always_wrong(splits, tmp_path):
    train, test = splits
    test = Split(test.manifest, [{**test.labels[0], "drink": "tea"}, *test.labels[1:]])
    outcome = compare(
        config(head_steps=200), systems_of(train, test)[:1], train, test, output_dir=tmp_path, machine=CPU
    )
    assert outcome["unseen"] == {"drink": 1}
    assert scores_of(outcome, "perfect", "frozen")["mean"]["accuracy/drink"] <= 100 * 11 / 12 + 1e-9


def test_regression_learns_numbers_and_has_null_where_no_correlation_exists(tmp_path):
    rows = [{**slots(mood=str(value))} for value in (-2, -1, 0.5, 1, 2, 3)]
    manifest = write_rows(tmp_path, *rows)
    task = config("regression", label_names=["mood"], modes=["ridge", "k_shot"], k=[1], ridge_alpha=1e-6)
    labels = list(read_labels(manifest, task).values())
    split = Split(manifest, labels)
    line = {key: torch.tensor([float(row["mood"]), 1.0]) for key, row in zip(split.ids, labels, strict=True)}
    flat = dict.fromkeys(split.ids, torch.ones(2))
    systems = [System("line", line, None, {}), System("flat", flat, None, {})]
    outcome = compare(task, systems, split, split, output_dir=tmp_path / "run", machine=CPU)
    assert scores_of(outcome, "line", "ridge")["mean"]["mae"] < 1e-3
    assert scores_of(outcome, "line", "k_shot", 1)["num_train"] == 6
    assert scores_of(outcome, "flat", "ridge")["mean"]["pearson_r"] is None
    assert scores_of(outcome, "flat", "ridge")["mean"]["mae"] > 1
    assert (tmp_path / "run/understanding_k_shot.png").is_file()


@pytest.fixture
def sentence_folder(tmp_path):
    """A random BERT in the layout of sentence-transformers."""
    folder, words = tmp_path / "bert", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *DRINKS, *SIZES]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(**sizes, vocab_size=len(words), max_position_embeddings=6)).save_pretrained(folder)
    return str(folder)


def test_an_empty_transcript_is_a_zero_vector_and_a_long_one_is_told(sentence_folder, caplog):
    teacher = load_sentence_teacher(sentence_folder)
    texts = [("a", "mocha"), ("b", None), ("c", "  "), ("d", "mocha latte small large espresso mocha")]
    with caplog.at_level(logging.WARNING):
        vectors, num_empty = text_vectors(teacher, iter(texts))
    assert num_empty == 2 and list(vectors) == ["a", "b", "c", "d"]
    assert vectors["b"].count_nonzero() == vectors["c"].count_nonzero() == 0 and vectors["b"].shape == (16,)
    torch.testing.assert_close(vectors["a"], teacher(["mocha"])[0], rtol=0, atol=1e-6)
    assert "1 transcripts are longer than the teacher's 6 tokens" in caplog.text


def recipe_config(tmp_path, sentence_folder, task, **data) -> Any:
    paths = {name: str(write_orders(tmp_path / "data", name, orders(num))) for name, num in (("train", 9), ("test", 6))}
    whisper_student().save_encoder(tmp_path / "untouched")
    torch.manual_seed(1)
    student = whisper_student(embedding_dim=16)
    with torch.no_grad():
        student.stack.layers[1].fc1.weight.add_(0.1)
    student.save_encoder(tmp_path / "run/student")
    (tmp_path / "untouched/pooling.json").unlink()  # a plain encoder has none
    data = {
        "train_manifest": paths["train"],
        "test_manifest": paths["test"],
        "labels_dir": None,
        "labels_of": lambda split: None,
        "max_skipped_fraction": 0.0,
        "num_workers": 0,
        **data,
    }
    encoder = {"name": str(tmp_path / "untouched"), "num_layers": None, "num_frozen_layers": 1, "grid_seconds": 0.2}
    return SimpleNamespace(
        understanding=task,
        teacher=SimpleNamespace(name=sentence_folder, pooling="mean", normalize=False),
        data=SimpleNamespace(**data),
        student=SimpleNamespace(**encoder, lower_states_dir=None),
        trainer=SimpleNamespace(output_dir=str(tmp_path / "run"), device=torch.device("cpu"), use_cpu=True, bf16=False),
    )


def test_student_untouched_encoder_and_text_are_compared_in_one_run(tmp_path, sentence_folder):
    task = config(modes=["frozen", "fine_tune"], seeds=[37], fine_tune_steps=2, fine_tune_batch_seconds=2.0)
    recipe = recipe_config(tmp_path, sentence_folder, task)
    before = {path: path.read_bytes() for path in (tmp_path / "run/student").iterdir()}
    results = understand(recipe)
    assert list(results["systems"]) == [STUDENT, UNTOUCHED, CASCADE]
    assert [results["systems"][name]["dim"] for name in results["systems"]] == [16, 32, 16]
    assert results["systems"][CASCADE]["transcripts"] == "the manifest's text"
    modes = [(result["system"], result["mode"]) for result in results["results"]]
    assert modes == [
        (STUDENT, "frozen"),
        (STUDENT, "fine_tune"),
        (UNTOUCHED, "frozen"),
        (UNTOUCHED, "fine_tune"),
        (CASCADE, "frozen"),
    ]
    assert results["num_train"] == 9 and results["num_test"] == 6 and results["wall_seconds"] > 0
    assert results["date"] and results["device"]
    json.dumps(results, allow_nan=False)
    assert {path: path.read_bytes() for path in (tmp_path / "run/student").iterdir()} == before


def test_fine_tuning_reads_the_stored_states_and_refuses_those_of_other_windows(tmp_path, sentence_folder):
    task = config(modes=["fine_tune"], seeds=[37], fine_tune_steps=1, fine_tune_batch_seconds=2.0)
    recipe = recipe_config(tmp_path, sentence_folder, task)
    encoder = whisper_student(num_frozen_layers=1)  # the untouched one
    store = cache_lower_states(encoder, "tiny", recipe.data.train_manifest, tmp_path / "states/train")
    assert len(list(store.rows())) == 9
    recipe.student.lower_states_dir = str(tmp_path / "states")
    modes = [(result["system"], result["mode"]) for result in understand(recipe)["results"]]
    assert modes == [(STUDENT, "fine_tune"), (UNTOUCHED, "fine_tune")]
    recipe.student.grid_seconds = 0.4
    with pytest.raises(LabelStoreError, match="the states in .* were made with"):
        understand(recipe)


def test_pooled_vectors_leave_the_map_to_the_teacher_out(tmp_path, sentence_folder):
    results = understand(recipe_config(tmp_path, sentence_folder, config(seeds=[37], vectors="pooled")))
    assert results["systems"][STUDENT]["dim"] == results["systems"][UNTOUCHED]["dim"] == 32


def test_without_any_transcript_there_is_no_cascade(tmp_path, sentence_folder, caplog):
    recipe = recipe_config(tmp_path, sentence_folder, config(seeds=[37]))
    for name in ("train", "test"):
        path = tmp_path / f"data/{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        write_manifest(path, [{**row, "text": None} for row in rows])
    results = understand(recipe)
    assert CASCADE not in results["systems"] and "no clip has a transcript" in caplog.text


def test_a_clip_that_cannot_be_decoded_is_left_out_of_every_system(tmp_path, sentence_folder):
    recipe = recipe_config(tmp_path, sentence_folder, config(seeds=[37]), max_skipped_fraction=0.1)
    (tmp_path / "data/audio/train-04.wav").write_bytes(b"no audio")
    results = understand(recipe)
    assert results["num_skipped"] == 1 and {result["num_train"] for result in results["results"]} == {8}
    recipe.data.max_skipped_fraction = 0.0
    with pytest.raises(ValueError, match="train-04"):
        understand(recipe)


def test_the_command_reads_the_recipe_and_writes_its_scores(tmp_path, sentence_folder, capsys):
    recipe_config(tmp_path, sentence_folder, config())
    settings = {
        "teacher": {"name": sentence_folder},
        "data": {f"{name}_manifest": str(tmp_path / f"data/{name}.jsonl") for name in ("train", "test")},
        "student": {"name": str(tmp_path / "untouched"), "num_frozen_layers": 1, "grid_seconds": 0.2},
        "understanding": {
            "task": "slots",
            "modes": ["ridge", "k_shot"],
            "k": [1, 2],
            "seeds": [37, 38],
            "head_steps": 5,
        },
        "trainer": {"output_dir": str(tmp_path / "run"), "use_cpu": True, "report_to": "none"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))  # YAML takes JSON as it is
    understand_main(["--config", str(tmp_path / "recipe.yaml"), "--understanding.k=[1,3]"])
    content = json.loads((tmp_path / "run/understanding.json").read_text())
    assert content["config"]["k"] == [1, 3] and content["manifests"]["test"].endswith("data/test.jsonl")
    assert content["command"].endswith(f"--config {tmp_path}/recipe.yaml '--understanding.k=[1,3]'")
    table = capsys.readouterr().out
    assert f"| ridge | {STUDENT} | 9 |" in table and f"| 3-shot | {CASCADE} | 9 |" in table
    assert (tmp_path / "run/understanding_k_shot.png").is_file()


def test_a_run_without_a_student_or_without_a_task_is_refused(tmp_path):
    trainer = SimpleNamespace(output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="understanding is null"):
        understand(SimpleNamespace(understanding=None, trainer=trainer))
    with pytest.raises(ValueError, match="has no student to understand with"):
        understand(SimpleNamespace(understanding=config(), trainer=trainer))


def write_results(folder: Path, accuracies: list[float | None], **changes) -> str:
    runs = [{"seed": seed, "mean_slot_accuracy": value} for seed, value in enumerate(accuracies)]
    result = {"mode": "frozen", "k": None, "num_train": 24, "mean": {"mean_slot_accuracy": 0.0}, "runs": runs}
    few = {**result, "mode": "k_shot", "k": 4, "num_train": 12, "runs": runs[:1]}
    content = {
        "task": "slots",
        "config": {"seeds": [0, 1]},
        "manifests": {"train": "data/x/train.jsonl", "test": "data/x/test.jsonl"},
        "num_test": 12,
        "systems": {"SEGUE": {"encoder": "a/student"}, "text": {"transcripts": "labels", "teacher": "minilm"}},
        "results": [{**item, "system": system} for system in ("SEGUE", "text") for item in (result, few)],
        "unseen": {"milk": 1},
        "device": "a processor",
        "date": "2026-11-24",
        "wall_seconds": 10.0,
        **changes,
    }
    folder.mkdir()
    (folder / "understanding.json").write_text(json.dumps(content))
    return str(folder)


def test_the_table_has_mean_and_deviation_over_the_seeds_of_all_runs(tmp_path, capsys):
    runs = [write_results(tmp_path / "a", [80.0, 84.0]), write_results(tmp_path / "b", [82.0, 82.0])]
    tabulate_understanding.main(runs)
    table = capsys.readouterr().out
    assert "| frozen | SEGUE | 24 | 82.00 ± 1.63 |" in table and "| 4-shot | text | 12 | 81.00 ± 1.41 |" in table
    lines = table.splitlines()
    assert [line.split(" | ")[1] for line in lines[2:6]] == ["SEGUE", "text"] * 2  # systems of a mode stand together
    assert (
        "2 trained encoders" in table
        and "SEGUE: a/student." in table
        and "Text: transcripts of labels through minilm" in table
    )
    assert "unseen in training, which are always wrong: milk 1" in table and "20 s" in table


def test_one_value_has_no_deviation_and_none_is_a_dash(tmp_path, capsys):
    tabulate_understanding.main([write_results(tmp_path / "a", [80.0])])
    assert "| frozen | SEGUE | 24 | 80.00 |" in capsys.readouterr().out
    tabulate_understanding.main([write_results(tmp_path / "b", [None])])
    assert "| frozen | SEGUE | 24 | - |" in capsys.readouterr().out


def test_the_table_goes_between_its_markers(tmp_path):
    run = write_results(tmp_path / "a", [80.0])
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- x -->\nold\n<!-- /x -->\nafter\n")
    tabulate_understanding.main([run, "--readme", str(readme), "--marker", "x"])
    text = readme.read_text()
    assert text.startswith("before\n<!-- x -->\n| learnt |") and text.endswith("<!-- /x -->\nafter\n")
    assert "old" not in text
    with pytest.raises(SystemExit, match="lacks <!-- y -->"):
        tabulate_understanding.main([run, "--readme", str(readme), "--marker", "y"])
    with pytest.raises(SystemExit, match="2"):
        tabulate_understanding.main([run, "--readme", str(readme)])


def test_runs_that_do_not_belong_together_are_refused(tmp_path):
    one = write_results(tmp_path / "a", [80.0])
    other = write_results(tmp_path / "b", [80.0], task="intent")
    with pytest.raises(SystemExit, match="the runs are of intent on data/x/test.jsonl and slots on"):
        tabulate_understanding.main([one, other])
    with pytest.raises(SystemExit, match="no understanding.json in nowhere"):
        tabulate_understanding.main(["nowhere"])


def test_worked_example_of_ctc():
    logits = torch.zeros(1, 3, 2)
    loss = ctc_loss(logits, torch.tensor([3]), [torch.tensor([1])])
    assert loss.item() == pytest.approx(0.2876821, abs=5e-8)  # 6 of 8 paths spell "a"
    twice = ctc_loss(logits.repeat(2, 1, 1), torch.tensor([3, 3]), [torch.tensor([1])] * 2)
    assert twice.item() == pytest.approx(2 * 0.2876821, abs=1e-7)


def test_padded_frames_change_no_ctc_loss_and_get_no_gradient():
    logits = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    targets = [torch.tensor([1, 2]), torch.tensor([], dtype=torch.int64)]
    padded = logits.clone().requires_grad_()
    with torch.no_grad():
        padded[1, 4:] = 50.0
    loss = ctc_loss(padded, torch.tensor([6, 4]), targets)
    loss.backward()
    alone = ctc_loss(logits[:1], torch.tensor([6]), targets[:1]) - logits[1, :4].log_softmax(-1)[:, 0].sum()
    torch.testing.assert_close(loss.detach(), alone)
    assert padded.grad[1, 4:].abs().max() == 0 and padded.grad[1, :4].abs().max() > 0
    assert ctc_loss(logits.bfloat16(), torch.tensor([6, 4]), targets).dtype == torch.float32


@pytest.mark.parametrize(
    ("target", "num_frames", "message"),
    [
        ([0], 3, "target 0 holds 0; symbols have numbers 1 to 1, 0 is the blank"),
        ([2], 3, "target 0 holds 2"),
        ([1, 1], 2, "clip 0 has 2 frames, and its 2 symbols need 3"),
    ],
)
def test_strings_that_ctc_cannot_spell_are_refused(target, num_frames, message):
    with pytest.raises(ValueError, match=message):
        ctc_loss(torch.zeros(1, 3, 2), torch.tensor([num_frames]), [torch.tensor(target)])
    with pytest.raises(ValueError, match="and 2 targets do not fit"):
        ctc_loss(torch.zeros(1, 3, 2), torch.tensor([num_frames]), [torch.tensor(target)] * 2)


def test_greedy_reading_takes_repeats_together_and_drops_blanks_and_padding():
    best = torch.tensor([[1, 1, 0, 1, 2, 2], [2, 0, 0, 1, 1, 1]])
    logits = torch.nn.functional.one_hot(best, 3).float()
    assert ctc_greedy(logits, torch.tensor([6, 3]), ["a", "b"]) == [["a", "a", "b"], ["b"]]


def test_symbols_have_numbers_from_one_and_unknown_ones_are_named():
    strings = [list("cab"), ["<size>", "b"]]
    alphabet = ctc_alphabet(strings)
    assert alphabet == ["<size>", "a", "b", "c"]
    assert [target.tolist() for target in encode_symbols(strings, alphabet)] == [[4, 2, 3], [1, 3]]
    with pytest.raises(ValueError, match=r"symbols \['z'\] are not among the 4"):
        encode_symbols([["z"]], alphabet)


def test_entities_come_back_out_of_their_string():
    labels = {"date": "noon, today", "size": "large <one>"}
    symbols = entity_symbols(labels)
    assert symbols[:3] == ["<date>", "n", "o"] and entities_of(symbols) == labels
    assert entities_of(["x", "<size>", "<date>", " ", "a", "<size>", "b", "<size>", "c"]) == {
        "date": "a",
        "size": "b, c",
    }
    assert entity_symbols({}) == [] and entities_of([]) == entities_of(["a"]) == {}


@pytest.mark.parametrize(("task", "mode"), [("entities", "frozen"), ("asr", "fine_tune")])
def test_ctc_learns_strings_and_a_frozen_encoder_stays(tmp_path, task, mode):
    labels = [{"drink": "mocha"}, {"drink": "latte"}]
    manifest = read_manifest(write_orders(tmp_path, "train", labels, seconds=0.6))
    settings = config(task, modes=[mode], head_steps=120, fine_tune_steps=80, head_learning_rate=5e-2)
    settings.fine_tune_learning_rate, settings.fine_tune_batch_seconds = 1e-2, 10.0
    wanted = list(read_labels(manifest, settings).values())
    student = whisper_student(embedding_dim=16)
    before = weights_of(student)
    model, alphabet = fit_ctc(
        student, manifest, wanted, settings, mode, output_dir=tmp_path / "run", seed=0, machine=CPU
    )
    moved = {name for name, weight in model.encoder.state_dict().items() if not weight.equal(before[name])}
    assert bool(moved) == (mode == "fine_tune") and not any("projection" in name for name in moved)
    said = read_strings(model, alphabet, manifest, settings)
    assert said == wanted
    scores = score_labels(settings, wanted, said, [] if task == "asr" else ["drink"])
    assert scores["wer" if task == "asr" else "slot_f1"] == (0 if task == "asr" else 100)


def test_strings_and_labels_are_inverse():
    for task, labels in (("asr", {"text": "four two"}), ("entities", {"drink": "mocha", "size": "small"})):
        settings = config(task)
        assert labels_of(settings, string_of(settings, labels)) == labels
    with pytest.raises(ValueError, match="needs one symbol or more, got 0"):
        SegueForCTC(whisper_student(), 0, seed=0)


def test_letters_are_scored_as_words_and_entities_as_slots():
    asr, entities = config("asr"), config("entities")
    scores = score_labels(asr, [{"text": "four two"}, {"text": "nine"}], [{"text": "four too"}, {}], [])
    assert scores["wer"] == pytest.approx(100 * 2 / 3) and scores["cer"] > 0
    scores = score_labels(entities, [{"drink": "mocha"}], [{"drink": "mocha", "size": "small"}], ["drink", "size"])
    assert scores["slot_f1"] == pytest.approx(100 * 2 / 3) and scores["acceptance"] == 100
    assert scores["strict_match"] == 0 and scores["mean_slot_accuracy"] == 50


def test_ctc_compares_the_encoders_alone_and_leaves_clips_out_that_are_too_short(tmp_path, caplog):
    found = {name: write_orders(tmp_path / "data", name, orders(3)) for name in ("train", "test")}
    settings = config("entities", modes=["frozen"], head_steps=2, fine_tune_batch_seconds=10.0)
    train, test = (read_split(settings, str(path)) for path in found.values())
    systems = [System("speech", {}, whisper_student, {}), System("text", {}, None, {})]
    outcome = compare(settings, systems, train, test, output_dir=tmp_path / "run", machine=CPU)
    # "espresso" and its size take 17 frames with a blank between equal letters, 0.3 s have 15
    assert "1 of 3 clips have fewer frames than their strings have symbols" in caplog.text
    assert "'train-02' with 15 frames for 15 symbols" in caplog.text
    (result,) = outcome["results"]
    assert [key for key in result["mean"] if key.startswith("accuracy/")] == ["accuracy/drink", "accuracy/size"]
    assert (result["system"], result["mode"]) == ("speech", "frozen") and set(result["mean"]) >= {"slot_f1"}
    assert len((tmp_path / "run/understanding_hypotheses.jsonl").read_text().splitlines()) == 3
