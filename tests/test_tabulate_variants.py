"""The table of SEGUE runs that differ in what learns and what is heard."""

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "recipes/segue"))

import tabulate_variants


def write_run(folder: Path, accuracies: list[float], mode: str = "frozen", **changes) -> str:
    run = {"steps": 60, "seed": 0, "train_manifest": "train.jsonl", "texts": "the manifest's text"}
    run |= {"encoder_layers": 6, "frozen_layers": 4, "lower_states": "stored", "grid_seconds": 0.64, **changes}
    results = {"run": run, "models": {"SEGUE": {"top1": 0.5}}, "wall_seconds": {"embed": 30.2, "train": 90.6}}
    rows = [{"seed": seed, "mean_slot_accuracy": value} for seed, value in enumerate(accuracies)]
    others = [{"seed": seed, "mean_slot_accuracy": 1.0} for seed in range(2)]
    understanding = {
        "config": {"seeds": [37, 38]},
        "results": [
            {"system": "untouched encoder", "mode": "frozen", "runs": others},
            {"system": "SEGUE", "mode": mode, "runs": rows},
        ],
    }
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({**results, "device": "a processor", "date": "2026-12-01"}))
    (folder / "understanding.json").write_text(json.dumps(understanding))
    return str(folder)


def test_a_row_says_what_a_run_trained_and_what_came_of_it(tmp_path, capsys):
    base = write_run(tmp_path / "base", [80.0, 84.0])
    whole = write_run(tmp_path / "whole", [90.0], frozen_layers=0, lower_states="live", grid_seconds=None)
    tabulate_variants.main([base, whole])
    table = capsys.readouterr().out
    assert "| mean slot accuracy % |" in table
    assert "| 2 of 6 | clip, to 0.64 s | stored | 30 | 91 | 50.0 | 82.00 ± 2.83 |" in table
    assert "| 6 of 6 | 30 s | - | 30 | 91 | 50.0 | 90.00 |" in table
    assert table.endswith("seeds 37, 38. a processor, 2026-12-01.\n")


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    base = write_run(tmp_path / "base", [80.0])
    with pytest.raises(SystemExit, match="the runs differ in steps: 60, 61"):
        tabulate_variants.main([base, write_run(tmp_path / "longer", [80.0], steps=61)])
    with pytest.raises(SystemExit, match="few was not asked on the frozen encoder; add frozen to understanding.modes"):
        tabulate_variants.main([base, write_run(tmp_path / "few", [80.0], mode="k_shot")])
