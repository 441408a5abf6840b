import json

import pytest
from tabulate_results import format_table, main


def result(seed: int, wer: float) -> dict:
    scores = {"wer": wer, "rtfx": 2.0, "parameters": 55_780_000, "num_utterances": 9, "manifest": "data/x/test.jsonl"}
    scores |= {"num_reference_words": 90, "reference": "the manifest's text", "normalizer": "english"}
    run = {
        "train_utterances": 5,
        "train_hours": 0.1,
        "steps": 3,
        "seed": seed,
        "date": "2026-11-24",
        "synthetic": False,
    }
    run["train_manifest"] = "data/x/train.jsonl"
    models = {"teacher": {**scores, "wer": 5.0}, "student after": scores}
    return {"models": models, "run": run, "device": "a processor", "decode_seconds_per_step": {"8": [0.4, 0.2]}}


def test_several_seeds_give_mean_and_deviation():
    table = format_table(result(0, 4.0), result(1, 5.0), result(2, 6.0))
    assert "| student after | 5.00 ± 1.00 | 55.78 | 2.00 |" in table
    assert "| teacher | 5.00 | 55.78 | 2.00 |" in table
    assert "seed(s) 0, 1, 2" in table and "batch 8: the student is 2.00 times as fast" in table


def test_a_table_replaces_the_old_one_in_a_readme_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/results.json").write_text(json.dumps(result(0, 4.0)))
    (tmp_path / "run/.stage-train.json").write_text('{"wall_seconds": 61.4}')
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- x -->\nold\n<!-- /x -->\nafter\n")
    main(["run", "--readme", str(readme), "--marker", "x"])
    text = readme.read_text()
    assert text.startswith("before\n<!-- x -->\n| model |") and text.endswith("<!-- /x -->\nafter\n")
    assert "old" not in text and "Wall time, run: train 61 s." in text
    with pytest.raises(SystemExit, match="lacks <!-- y -->"):
        main(["run", "--readme", str(readme), "--marker", "y"])
    with pytest.raises(SystemExit, match="no results.json in nowhere"):
        main(["nowhere"])
