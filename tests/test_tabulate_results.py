import json

import matplotlib.image
import pytest
from plot_depths import main as plot
from plot_depths import pareto_front
from tabulate_results import format_measurements, format_table, group_measures, main


def result(seed: int, wer: float, decoder_layers: int = 2) -> dict:
    scores = {"wer": wer, "rtfx": 2.0, "parameters": 55_780_000, "num_utterances": 9, "manifest": "data/x/test.jsonl"}
    scores |= {"num_reference_words": 90, "reference": "the manifest's text", "normalizer": "english"}
    run = {
        "train_utterances": 5,
        "train_hours": 0.1,
        "steps": 3,
        "seed": seed,
        "date": "2026-11-24",
        "synthetic": False,
        "decoder_layers": decoder_layers,
        "teacher": {"name": "bundled:whisper-base"},
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


def write_runs(folder, **results):
    for name, content in results.items():
        run = folder / name.replace("_", "-")
        run.mkdir()
        (run / "results.json").write_text(json.dumps(content))
    return [str(folder / name.replace("_", "-")) for name in results]


def test_students_of_one_depth_are_one_row_in_order_of_depth(tmp_path, capsys):
    runs = write_runs(
        tmp_path,
        x_layers4=result(0, 2.0, decoder_layers=4),
        x_layers1_seed0=result(0, 8.0, decoder_layers=1),
        x_layers1_seed1=result(1, 10.0, decoder_layers=1),
    )
    main([*runs, "--group-by", "layers"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| teacher", "| 1 layer", "| 4 layers"]
    assert rows[3].startswith("| 1 layer | 9.00 ± 1.41 | 55.78 | 2.00 |") and "| 2.00 times |" in rows[3]
    assert rows[2].startswith("| teacher | 5.00 |") and rows[2].endswith("| 1.00 times |")


def test_the_speed_of_grouped_runs_may_be_that_of_a_bench(tmp_path, capsys):
    runs = write_runs(tmp_path, layers1=result(0, 9.0, decoder_layers=1), layers2=result(0, 4.0))
    rows = [{"name": name, "rtfx": rtfx} for name, rtfx in zip(runs, (30.0, 20.0), strict=True)]
    models = [
        {"name": "bundled:whisper-base", "rtfx": 10.0},
        *({**row, "name": f"{row['name']}/student"} for row in rows),
    ]
    (tmp_path / "bench.json").write_text(json.dumps({"models": models}))
    main([*runs, "--group-by", "layers", "--bench", str(tmp_path / "bench.json")])
    table = capsys.readouterr().out
    assert "| teacher | 5.00 | 55.78 | 10.00 |" in table
    assert "| 1 layer | 9.00 | 55.78 | 30.00 |" in table and "| 2 layers | 4.00 | 55.78 | 20.00 |" in table
    (tmp_path / "bench.json").write_text(json.dumps({"models": models[:2]}))
    with pytest.raises(SystemExit, match="bench.json has no model .*layers2/student"):
        main([*runs, "--group-by", "layers", "--bench", str(tmp_path / "bench.json")])
    with pytest.raises(SystemExit, match="2"):
        main([*runs, "--bench", str(tmp_path / "bench.json")])


def test_students_are_grouped_by_the_name_of_their_folder_without_the_seed(tmp_path):
    names = ["none-seed0", "proxy-seed0", "none-seed1"]
    results = [result(0, 8.0), result(0, 6.0), result(1, 10.0)]
    groups = group_measures([tmp_path / name for name in names], results, "name")
    assert [(name, [run["wer"] for run in runs]) for name, runs in groups] == [
        ("teacher", [5.0, 5.0, 5.0]),
        ("none", [8.0, 10.0]),
        ("proxy", [6.0]),
    ]


def test_runs_on_different_test_sets_are_not_put_into_one_table(tmp_path):
    other = result(0, 1.0)
    other["models"]["student after"] = {**other["models"]["student after"], "manifest": "data/y/test.jsonl"}
    with pytest.raises(SystemExit, match="scored on data/x/test.jsonl and data/y/test.jsonl; give those of one"):
        group_measures([tmp_path / "a", tmp_path / "b"], [result(0, 1.0), other], "layers")


def test_measurements_become_a_table_of_their_objects(tmp_path):
    table = format_measurements({"pipeline": {"rtfx": 3.7}, "batched": {"rtfx": 8.8123, "windows": 12}})
    assert table.splitlines() == [
        "| name | rtfx | windows |",
        "|---|---:|---:|",
        "| pipeline | 3.7 | - |",
        "| batched | 8.812 | 12 |",
    ]
    assert "| ratio | 1.5 |" in format_measurements({"ratio": 1.5})
    bench = {"models": [{"name": "a", "wer": 1.0}], "num_clips": 9, "speculative": {"speed_ratio": 1.2}}
    assert format_measurements(bench).splitlines()[2:] == [
        "| a | 1 |",
        "",
        "Speculative: speed ratio 1.2.",
        "",
        "num clips 9.",
    ]
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    readme = tmp_path / "README.md"
    readme.write_text("<!-- exports -->\n<!-- /exports -->\n")
    main([str(tmp_path / "bench.json"), "--readme", str(readme), "--marker", "exports"])
    assert readme.read_text().startswith("<!-- exports -->\n| name | wer |")


def test_the_pareto_front_leaves_out_what_another_point_beats():
    assert pareto_front([1.0, 2.0, 3.0, 2.5], [9.0, 5.0, 4.0, 5.5]) == [0, 1, 2]
    assert pareto_front([1.0, 1.0, 2.0], [5.0, 4.0, 4.0]) == [1]


def test_depths_are_drawn(tmp_path):
    runs = write_runs(tmp_path, a=result(0, 2.0, decoder_layers=4), b=result(0, 8.0, decoder_layers=1))
    plot([*runs, "--output", str(tmp_path / "new/depths.png")])
    pixels = matplotlib.image.imread(tmp_path / "new/depths.png")
    assert pixels.shape[1] == 1200 and pixels[..., :3].std() > 0.02


def test_several_assistants_are_a_row_each_if_they_were_measured_alike(tmp_path, capsys):
    shared = {"models": [], "manifest": "test.jsonl", "num_clips": 48, "device": "a CPU", "date": "2026-11-25"}
    paths = []
    for name, rate in (("before", 0.8), ("after", 0.85)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps({**shared, "speculative": {"assistant": name, "acceptance_rate": rate}}))
    main(list(map(str, paths)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:4] == ["| before | 0.8 |", "| after | 0.85 |"]
    assert lines[-1] == "manifest test.jsonl, num clips 48, device a CPU, date 2026-11-25."
    paths[1].write_text(json.dumps({**shared, "num_clips": 12, "speculative": {"assistant": "after"}}))
    with pytest.raises(SystemExit, match="other clips"):
        main(list(map(str, paths)))
    paths[1].write_text(json.dumps(shared))
    with pytest.raises(SystemExit, match="bench --assistant"):
        main(list(map(str, paths)))
