"""recipes/segue/slurp_predictions.py: runs of the recipe become a file that SLURP's scorer takes."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "recipes/segue"))  # behind the others: its train.py is loaded by path

import slurp_predictions

from speechkd.files import write_jsonl
from speechkd.metrics.slurp import evaluate_slurp

GOLD = [
    {
        "scenario": "iot",
        "action": "hue_lightoff",
        "entities": [("house_place", "kitchen")],
        "files": ["a-1.flac", "a-2.flac"],
    },
    {"scenario": "alarm", "action": "set", "entities": [("time", "seven"), ("time", "nine")], "files": ["b.flac"]},
]


def write_run(folder, labels, system="SEGUE, fine_tune"):
    folder.mkdir()
    rows = [{"id": key, "gold": {}, "predicted": {system: said}} for key, said in labels.items()]
    write_jsonl(folder / "understanding_hypotheses.jsonl", rows)
    return str(folder)


def write_gold(path):
    lines = []
    for number, row in enumerate(GOLD):
        surfaces = [value for _, value in row["entities"]]
        lines.append(
            {
                "slurp_id": number,
                "sentence": " ".join(surfaces),
                "scenario": row["scenario"],
                "action": row["action"],
                "tokens": [{"id": index, "surface": surface} for index, surface in enumerate(surfaces)],
                "entities": [{"type": kind, "span": [index]} for index, (kind, _) in enumerate(row["entities"])],
                "recordings": [{"file": file} for file in row["files"]],
            }
        )
    write_jsonl(path, lines)
    return path


def test_intents_and_entities_of_two_runs_are_scored_as_slurp_scores_them(tmp_path, capsys):
    intents = {"a-1": "iot_hue_lightoff", "a-2": "iot_hue_lightoff", "b": "alarm_remove"}
    entities = {"a-1": {"house_place": "Kitchen"}, "a-2": {"house_place": "none"}, "b": {"time": "seven, nine"}}
    runs = [
        write_run(tmp_path / "intents", {key: {"intent": intent} for key, intent in intents.items()}),
        write_run(tmp_path / "entities", entities),
    ]
    output = tmp_path / "predictions.jsonl"
    slurp_predictions.main([*runs, "--output", str(output)])
    assert "3 predictions" in capsys.readouterr().out
    scores = evaluate_slurp(output, write_gold(tmp_path / "gold.jsonl"))
    assert scores["num_missing"] == 0
    assert scores["scenario_accuracy"] == 1.0 and scores["action_accuracy"] == scores["intent_accuracy"] == 2 / 3
    assert scores["entity_f1"] == pytest.approx(2 * 1.0 * 0.75 / 1.75)  # one filler of four is missed


def test_without_entities_none_is_predicted(tmp_path):
    output = tmp_path / "predictions.jsonl"
    run = write_run(tmp_path / "intents", {"b": {"intent": "alarm_set"}}, system="text cascade, frozen")
    slurp_predictions.main([run, "--system", "text cascade, frozen", "--output", str(output)])
    assert json.loads(output.read_text()) == {"file": "b.flac", "scenario": "alarm", "action": "set", "entities": []}


def test_runs_that_cannot_be_used_are_named(tmp_path):
    output = ["--output", str(tmp_path / "predictions.jsonl")]
    run = write_run(tmp_path / "intents", {"b": {"intent": "alarm_set"}})
    with pytest.raises(ValueError, match="run the understand stage"):
        slurp_predictions.main([str(tmp_path / "nowhere"), *output])
    with pytest.raises(ValueError, match="no system 'SEGUE, frozen'; it has: 'SEGUE, fine_tune'"):
        slurp_predictions.main([run, "--system", "SEGUE, frozen", *output])
    with pytest.raises(ValueError, match="has nothing on 1 of 1 clips, 'b' first"):
        slurp_predictions.main([run, write_run(tmp_path / "others", {"c": {}}), *output])
    with pytest.raises(ValueError, match="no intent; give a run of understanding.task=intent"):
        slurp_predictions.main([write_run(tmp_path / "slots", {"b": {"size": "small"}}), *output])
