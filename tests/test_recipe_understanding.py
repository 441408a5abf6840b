"""recipes/segue, understanding: the comparison of systems, and the stage as a whole."""

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import pytest
import torch
from conftest import ROOT
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
)

sys.path.append(str(ROOT / "recipes/segue"))  # behind the others: its train.py is loaded by path

import tabulate_understanding
from comparison import Split, System, compare, read_split
from understand import CASCADE, STUDENT, UNTOUCHED, text_vectors, understand
from understand import main as understand_main
from understanding_orders import (
    CPU,
    DRINKS,
    SIZES,
    config,
    orders,
    perfect_vectors,
    slots,
    whisper_student,
    write_orders,
    write_rows,
)
from understanding_tasks import (
    read_labels,
)

from speechkd.data.manifest import write_manifest
from speechkd.labels.embeddings import cache_lower_states
from speechkd.labels.teacher_cache import LabelStoreError
from speechkd.teachers_text import load_sentence_teacher


@pytest.fixture
def splits(tmp_path):
    """Splits of 24 and 12 orders whose audio is never decoded."""
    found = {}
    for name, num in (("train", 24), ("test", 12)):
        path = write_orders(tmp_path / "data", name, orders(num), audio=False)
        found[name] = read_split(config(), str(path))
    return found["train"], found["test"]


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
