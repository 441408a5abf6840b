"""Heads on stored states find what is in them, equal seeds give equal results, and what is missing is named."""

import numpy as np
import pytest
import torch

from speechkd.data.manifest import read_manifest, write_manifest
from speechkd.data.mini_superb import ProbeTask, QueryLists
from speechkd.features_store import FrameStates
from speechkd.probing import (
    ProbeProtocol,
    mean_and_deviation,
    probe_labels,
    probe_queries,
    probe_speakers,
    probe_strings,
)
from speechkd.probing_tasks import (
    SUPERB,
    TaskData,
    check_task,
    label_scores,
    read_trials,
    score_task,
    speaker_scores,
    string_scores,
)

LAYERS, WIDTH = 3, 8
QUICK = ProbeProtocol(num_steps=60, batch_size=8, learning_rate=1e-2, hidden_size=8, pooled_size=8)


def spoken(labels, num_frames=6, seed=0, layer=1):
    """States in which one layer tells the label of each clip."""
    generator = torch.Generator().manual_seed(seed)
    arrays = {}
    for key, label in labels.items():
        arrays[key] = torch.randn(LAYERS, num_frames, WIDTH, generator=generator)
        arrays[key][layer, :, label] += 4
    return arrays


LABELS = {f"clip{index}": index % 3 for index in range(48)}
TASK = ProbeTask(
    ("word",),
    train={key: (str(label),) for key, label in LABELS.items() if int(key[4:]) < 30},
    test={key: (str(label),) for key, label in LABELS.items() if int(key[4:]) >= 30},
)


def test_labels_are_found_by_frames_and_by_their_means_alike():
    states = FrameStates(spoken(LABELS))
    said = probe_labels(states, TASK, QUICK, seed=0)
    assert label_scores(TASK.test, said) == {"accuracy": 100.0, "num_items": 18}
    assert probe_labels(states.means(LABELS), TASK, QUICK, seed=0) == said


def test_equal_seeds_give_equal_answers_and_the_global_generator_stays():
    states = FrameStates(spoken(LABELS, layer=0))
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    once = ProbeProtocol(num_steps=2, batch_size=4, hidden_size=8)
    first, again = (probe_labels(states, TASK, once, seed=7) for _ in range(2))
    assert first == again and torch.equal(before, torch.random.get_rng_state())


def test_the_head_that_is_best_on_dev_is_kept():
    """Labels to learn are a rule turned round: every step takes the head further from it, so the first is best."""
    states = FrameStates(spoken(LABELS))
    turned = ProbeTask(
        ("word",),
        {key: (str((LABELS[key] + 1) % 3),) for key in TASK.train},
        {key: TASK.test[key] for key in TASK.test},
    )
    last = label_scores(TASK.test, probe_labels(states, turned, QUICK, seed=0))["accuracy"]
    best = label_scores(TASK.test, probe_labels(states, turned, QUICK, seed=0, dev=TASK.test))["accuracy"]
    assert last == 0 and best > 0


def test_balanced_batches_draw_rare_classes_as_often():
    from speechkd.probing import _batches

    ids, classes = [f"c{index}" for index in range(100)], ["rare"] * 5 + ["common"] * 95
    batches = _batches(ids, 100, 0, classes)
    drawn = [int(key[1:]) < 5 for _ in range(20) for key in next(batches)]
    assert 0.45 < np.mean(drawn) < 0.55
    epoch = _batches(ids, 10, 0, None)
    assert sorted(key for _ in range(10) for key in next(epoch)) == sorted(ids)


@pytest.mark.parametrize("kind", ["phones", "characters"])
def test_strings_are_heard(kind):
    strings = {f"s{index}": ["a", "b", "c"][: 1 + index % 3] for index in range(24)}
    arrays = {}
    for key, string in strings.items():
        arrays[key] = torch.zeros(LAYERS, 4 * len(string), WIDTH)
        for position, symbol in enumerate(string):
            arrays[key][1, 4 * position : 4 * position + 2, "abc".index(symbol)] = 4
    train = {key: string for key, string in strings.items() if int(key[1:]) < 18}
    test = [key for key in strings if key not in train]
    protocol = ProbeProtocol(num_steps=200, batch_size=6, learning_rate=2e-2, hidden_size=16)
    heard = probe_strings(FrameStates(arrays), train, test, protocol, kind=kind, seed=0, dev=train)
    assert string_scores("pr", strings, heard) == {"per": 0.0, "num_items": 6}


def test_strings_longer_than_their_frames_are_refused():
    states = FrameStates({"a": torch.zeros(LAYERS, 2, WIDTH)})
    with pytest.raises(ValueError, match="none of 1 clips has as many frames as its string needs"):
        probe_strings(states, {"a": ["x", "x"]}, ["a"], QUICK, kind="phones", seed=0)


def test_strangers_are_told_apart_after_learning_from_others():
    labels = {f"clip{index}": index % 4 for index in range(64)}
    states = FrameStates(spoken(labels, num_frames=20))
    train = {key: str(label) for key, label in labels.items() if int(key[4:]) < 40}
    test = [key for key in labels if key not in train]
    embeddings = probe_speakers(states, train, test, QUICK, seed=0)
    assert embeddings.keys() == set(test) and embeddings[test[0]].shape == (8,)
    trials = [(a, b, labels[a] == labels[b]) for a in test for b in test if a < b]
    assert speaker_scores(embeddings, trials)["eer"] < 15


def test_queries_are_found_on_the_layer_that_dev_queries_choose():
    generator = torch.Generator().manual_seed(0)
    words = {word: torch.randn(8, WIDTH, generator=generator) for word in "ab"}
    arrays, lists = {}, {"q": {}, "d": {}}
    for index in range(8):
        word = "ab"[index % 2]
        arrays[f"q{index}"] = torch.randn(LAYERS, 8, WIDTH, generator=generator)
        arrays[f"q{index}"][2] = words[word]
        lists["q"][f"q{index}"] = word
        arrays[f"d{index}"] = torch.randn(LAYERS, 20, WIDTH, generator=generator)
        arrays[f"d{index}"][2, 5:13] = words[word]
        lists["d"][f"d{index}"] = (word,)
    is_target = np.array([[word in said for said in lists["d"].values()] for word in lists["q"].values()])
    queries = QueryLists(lists["q"], lists["d"], is_target)
    layer, scores = probe_queries(FrameStates(arrays), queries, np.arange(8) < 4)
    assert layer == 2 and scores.mtwv == 1 and scores.top1 == 1 and scores.num_queries == 4
    with pytest.raises(ValueError, match="8 of 8 queries choose the layer"):
        probe_queries(FrameStates(arrays), queries, np.ones(8, dtype=bool))


def test_mean_and_deviation_of_three_seeds():
    scores = mean_and_deviation([{"x": 1.0}, {"x": 2.0}, {"x": 3.0}])
    assert scores == {"x": {"mean": 2.0, "deviation": 1.0, "values": [1.0, 2.0, 3.0]}}
    assert mean_and_deviation([{"x": 1.0}])["x"]["deviation"] == 0


def test_the_protocol_is_that_of_the_card():
    steps = {task: protocol.num_steps for task, protocol in SUPERB.items()}
    assert steps == {
        "ks": 200_000, "ic": 200_000, "sid": 200_000, "er": 30_000, "pr": 100_000, "asr": 200_000, "sf": 200_000,
        "sv": 200_000,
    }  # fmt: skip
    assert SUPERB["pr"].learning_rate == 1e-2 and SUPERB["asr"].hidden_size == 1024
    assert (SUPERB["sv"].max_gradient_norm, SUPERB["ks"].max_gradient_norm) == (1000, 1)
    assert [task for task in SUPERB if SUPERB[task].balanced] == ["ks"]


def test_slots_are_scored_by_name_and_value():
    gold = {"a": ["<size>", *"big"], "b": ["<size>", *"small", "<milk>", *"oat"]}
    heard = {"a": ["<size>", *"bag"], "b": ["<size>", *"small"]}
    scores = string_scores("sf", gold, heard)
    assert scores["slot_f1"] == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert scores["slot_cer"] == pytest.approx(100 * (1 + 3) / (3 + 5 + 3))


def test_several_labels_count_together_and_one_by_one():
    gold, said = {"a": ("x", "y"), "b": ("x", "z")}, {"a": ("x", "y"), "b": ("x", "y")}
    assert label_scores(gold, said) == {"exact_match": 50, "label_accuracy": 75, "num_items": 2}


def test_bad_protocols_and_missing_states_are_refused():
    with pytest.raises(ValueError, match="num_steps"):
        ProbeProtocol(num_steps=0)
    with pytest.raises(ValueError, match="0 of 30 clips to learn from have states, 'clip0' has none"):
        probe_labels(FrameStates({"other": torch.zeros(LAYERS, 1, WIDTH)}), TASK, QUICK, seed=0)


def save_rows(folder, name, rows):
    (folder / "a.wav").write_bytes(b"")
    common = {"audio": "a.wav", "duration_seconds": 1.0, "sample_rate_hz": 16_000}
    write_manifest(folder / name, [{**common, **row} for row in rows])
    return read_manifest(folder / name)


def test_a_task_is_scored_by_its_manifests_and_says_what_they_lack(tmp_path):
    rows = [{"id": key, "intent": str(label)} for key, label in LABELS.items()]
    data = TaskData(train=save_rows(tmp_path, "train.jsonl", rows[:30]), test=save_rows(tmp_path, "t.jsonl", rows[30:]))
    check_task("ks", data)
    states = FrameStates(spoken(LABELS)).means(LABELS)
    assert score_task("ks", states, data, QUICK, seed=0) == {"accuracy": 100.0, "num_items": 18}
    with pytest.raises(ValueError, match="30 utterances of .* have no speaker, 'clip0' first"):
        check_task("sid", data)
    with pytest.raises(ValueError, match="task asr trains a head; give --train-manifest"):
        check_task("asr", TaskData(test=data.test))
    with pytest.raises(ValueError, match="give --queries, and --dev-queries"):
        check_task("qbe", TaskData(test=data.test))


def test_trial_lists_are_read_and_checked(tmp_path):
    (tmp_path / "trials.txt").write_text("1 a b\n\n0 a c\n")
    assert read_trials(tmp_path / "trials.txt") == [("a", "b", True), ("a", "c", False)]
    (tmp_path / "bad.txt").write_text("1 a b\nyes a b\n")
    with pytest.raises(ValueError, match="bad.txt:2: 'yes a b' is no trial"):
        read_trials(tmp_path / "bad.txt")
