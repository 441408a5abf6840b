"""The table of SEGUE runs that differ in what learns and what is heard."""

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "recipes/segue"))

import tabulate_variants


def write_run(folder: Path, **changes) -> str:
    run = {"steps": 60, "seed": 0, "train_manifest": "train.jsonl", "texts": "the manifest's text"}
    run |= {"encoder_layers": 6, "frozen_layers": 4, "lower_states": "stored", "grid_seconds": 0.64, **changes}
    models = {"SEGUE": {"top1": 0.5, "positive_cosine": 0.75, "num_clips": 9}, "untouched encoder": {"top1": 0.1}}
    results = {"run": run, "models": models, "wall_seconds": {"embed": 30.2, "train": 90.6}}
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({**results, "device": "a processor", "date": "2026-12-01"}))
    return str(folder)


def test_a_row_says_what_a_run_trained_and_what_came_of_it(tmp_path, capsys):
    base = write_run(tmp_path / "base")
    whole = write_run(tmp_path / "whole", frozen_layers=0, lower_states="live", grid_seconds=None)
    tabulate_variants.main([base, whole])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| 2 of 6 | clip, to 0.64 s | stored | 30 | 91 | 50.0 | 0.750 |"
    assert lines[3] == "| 6 of 6 | 30 s | - | 30 | 91 | 50.0 | 0.750 |"
    assert lines[-1] == "60 steps on train.jsonl, seed 0; 9 test clips. a processor, 2026-12-01."


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    base = write_run(tmp_path / "base")
    with pytest.raises(SystemExit, match="the runs differ in steps: 60, 61"):
        tabulate_variants.main([base, write_run(tmp_path / "longer", steps=61)])
    with pytest.raises(SystemExit, match="no results.json in nowhere"):
        tabulate_variants.main([base, "nowhere"])
