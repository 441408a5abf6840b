"""Table of what it costs and brings to train more or less of the student, on more or less audio.

Launch: python recipes/segue/tabulate_variants.py RUN_DIR [RUN_DIR ...] [--readme FILE --marker NAME]
One row for each run of run.sh, from its results.json. With --readme the table replaces what stands between
`<!-- NAME -->` and `<!-- /NAME -->` there.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from speechkd.readme_tables import parse_table_arguments, require_results, show_table

COLUMNS = ["learning layers", "heard", "states below", "store targets s", "train s", "top-1 %", "cosine with own text"]


def format_table(run_dirs: Sequence[Path]) -> str:
    """Markdown table with one row for each run.

    Args:
        run_dirs: run folders.

    Raises:
        SystemExit: a run was not evaluated, or the runs differ in steps, seed or data.
    """
    require_results(list(run_dirs))
    contents = [json.loads((run / "results.json").read_text(encoding="utf-8")) for run in run_dirs]
    for key in ("steps", "seed", "train_manifest", "texts"):
        if len(values := sorted({str(content["run"][key]) for content in contents})) > 1:
            raise SystemExit(f"error: the runs differ in {key}: {', '.join(values)}; give runs that share it")
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---|---|" + "---:|" * 4]
    for content in contents:
        run, seconds, scores = content["run"], content["wall_seconds"], content["models"]["SEGUE"]
        cells = [
            f"{run['encoder_layers'] - run['frozen_layers']} of {run['encoder_layers']}",
            f"clip, to {run['grid_seconds']:g} s" if run["grid_seconds"] else "30 s",
            run["lower_states"] if run["frozen_layers"] else "-",
            f"{seconds['embed']:.0f}",
            f"{seconds['train']:.0f}",
            f"{100 * scores['top1']:.1f}",
            f"{scores['positive_cosine']:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    first = contents[0]
    notes = (
        f"{first['run']['steps']} steps on {first['run']['train_manifest']}, seed {first['run']['seed']}; "
        f"{first['models']['SEGUE']['num_clips']} test clips. {first['device']}, {first['date']}."
    )
    return "\n".join([*lines, "", notes])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Table of runs that differ in what learns and what is heard.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    arguments = parse_table_arguments(parser, argv)
    show_table(format_table(arguments.runs), arguments)


if __name__ == "__main__":
    main()
