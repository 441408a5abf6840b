"""Table of what it costs and brings to train more or less of the student, on more or less audio.

Launch: python recipes/segue/tabulate_variants.py RUN_DIR [RUN_DIR ...] [--readme FILE --marker NAME]
One row for each run of run.sh, from its results.json and understanding.json. With --readme the table replaces what
stands between `<!-- NAME -->` and `<!-- /NAME -->` there.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate_understanding import COLUMNS as SCORES
from tabulate_understanding import format_cell

from speechkd.readme_tables import parse_table_arguments, require_results, show_table

MODE = "frozen"


def format_table(run_dirs: Sequence[Path]) -> str:
    """Markdown table with one row for each run.

    Args:
        run_dirs: run folders.

    Raises:
        SystemExit: a run was not evaluated, has no frozen mode, or the runs differ in steps, seed or manifests.
    """
    contents = []
    for file_name in ("results.json", "understanding.json"):
        require_results(list(run_dirs), file_name)
        contents.append([json.loads((run / file_name).read_text(encoding="utf-8")) for run in run_dirs])
    runs = [results["run"] for results in contents[0]]
    for key in ("steps", "seed", "train_manifest", "texts"):
        if len(values := sorted({str(run[key]) for run in runs})) > 1:
            raise SystemExit(f"error: the runs differ in {key}: {', '.join(values)}; give runs that share it")
    name, title = next((key, title) for key, title in SCORES if key in _frozen(contents[1][0], run_dirs[0])[0])
    header = ["learning layers", "heard", "states below", "store targets s", "train s", "top-1 %", title]
    lines = [f"| {' | '.join(header)} |", "|---|---|---|" + "---:|" * 4]
    for run_dir, results, understanding in zip(run_dirs, *contents, strict=True):
        run, seconds = results["run"], results["wall_seconds"]
        cells = [
            f"{run['encoder_layers'] - run['frozen_layers']} of {run['encoder_layers']}",
            f"clip, to {run['grid_seconds']:g} s" if run["grid_seconds"] else "30 s",
            run["lower_states"] if run["frozen_layers"] else "-",
            f"{seconds['embed']:.0f}",
            f"{seconds['train']:.0f}",
            f"{100 * results['models']['SEGUE']['top1']:.1f}",
            format_cell([scores[name] for scores in _frozen(understanding, run_dir)], name),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    first, seeds = runs[0], ", ".join(map(str, contents[1][0]["config"]["seeds"]))
    notes = (
        f"{first['steps']} steps on {first['train_manifest']}, seed {first['seed']}; heads on the frozen encoder, "
        f"seeds {seeds}. {contents[0][0]['device']}, {contents[0][0]['date']}."
    )
    return "\n".join([*lines, "", notes])


def _frozen(understanding: dict[str, Any], run_dir: Path) -> list[dict[str, Any]]:
    """Scores of the student's heads for each seed."""
    for result in understanding["results"]:
        if (result["system"], result["mode"]) == ("SEGUE", MODE):
            return result["runs"]
    raise SystemExit(f"error: {run_dir} was not asked on the frozen encoder; add {MODE} to understanding.modes")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Table of runs that differ in what learns and what is heard.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    arguments = parse_table_arguments(parser, argv)
    show_table(format_table(arguments.runs), arguments)


if __name__ == "__main__":
    main()
