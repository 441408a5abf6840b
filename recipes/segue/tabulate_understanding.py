"""Table of what encoders and text understand, out of the understanding.json of finished runs.

Launch: python recipes/segue/tabulate_understanding.py RUN_DIR [RUN_DIR ...] [--readme FILE --marker NAME]
Several runs, such as those of several seeds, are taken together. With --readme the table replaces what stands between
`<!-- NAME -->` and `<!-- /NAME -->` there.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speechkd.readme_tables import parse_table_arguments, require_results, show_table

COLUMNS = [
    ("mean_slot_accuracy", "mean slot accuracy %"),
    ("strict_match", "strict match %"),
    ("acceptance", "acceptance %"),
    ("slot_f1", "slot F1 %"),
    ("accuracy", "accuracy %"),
    ("mean_weighted_f1", "mean weighted F1 %"),
    ("exact_match", "exact match %"),
    ("wer", "WER %"),
    ("cer", "CER %"),
    ("mae", "MAE"),
    ("pearson_r", "Pearson r"),
    ("weighted_f1", "weighted F1 %"),
    ("macro_f1", "macro F1 %"),
    ("accuracy_2", "2-class accuracy %"),
    ("accuracy_7", "7-class accuracy %"),
]
MODES = {"frozen": "frozen", "k_shot": "{k}-shot", "ridge": "ridge", "fine_tune": "fine-tuned"}
PREFIXES = ("weighted_f1/",)  # scores of one label that stand in the table too


def format_table(run_dirs: Sequence[Path]) -> str:
    """Markdown table with one row for each mode and system: mean, and deviation over the seeds of all runs.

    Args:
        run_dirs: run folders.

    Raises:
        SystemExit: a run has no understanding.json, or the runs differ in task or test manifest.
    """
    require_results(list(run_dirs), "understanding.json")
    contents = [json.loads((run / "understanding.json").read_text(encoding="utf-8")) for run in run_dirs]
    origins = sorted({f"{content['task']} on {content['manifests']['test']}" for content in contents})
    if len(origins) > 1:
        raise SystemExit(f"error: the runs are of {' and '.join(origins)}; give those of one task and test manifest")
    groups: dict[tuple[str, Any, str], list[dict[str, Any]]] = {}
    for content in contents:
        for result in content["results"]:
            groups.setdefault((result["mode"], result["k"], result["system"]), []).append(result)
    order = {key: index for index, key in enumerate(dict.fromkeys(key[:2] for key in groups))}
    rows = sorted(groups.items(), key=lambda row: order[row[0][:2]])  # systems of one mode stand together
    scores = contents[0]["results"][0]["mean"]
    columns = [(key, title) for key, title in COLUMNS if key in scores]
    columns += [(key, f"weighted F1 of {key.partition('/')[2]} %") for key in scores if key.startswith(PREFIXES)]
    lines = [
        f"| learnt | system | clips | {' | '.join(title for _, title in columns)} |",
        "|---|---|---:|" + "---:|" * len(columns),
    ]
    for (mode, k, system), results in rows:
        cells = [_cell([run[key] for result in results for run in result["runs"]], key) for key, _ in columns]
        clips = sorted({result["num_train"] for result in results})
        lines.append(f"| {MODES[mode].format(k=k)} | {system} | {', '.join(map(str, clips))} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _notes(contents, len(run_dirs))])


def _cell(values: list[float | None], key: str) -> str:
    present = [value for value in values if value is not None]
    if not present:
        return "-"
    digits = 3 if key in ("mae", "pearson_r") else 2
    mean = f"{statistics.mean(present):.{digits}f}"
    return mean if len(present) == 1 else f"{mean} ± {statistics.stdev(present):.{digits}f}"


def _notes(contents: list[dict[str, Any]], num_runs: int) -> str:
    first = contents[0]
    parts = [
        f"{first['num_test']} clips of {first['manifests']['test']}, task {first['task']}; heads learnt from "
        f"{first['manifests']['train']}, seeds {', '.join(map(str, first['config']['seeds']))}",
        f"{num_runs} trained encoders" if num_runs > 1 else "",
    ]
    for name, facts in first["systems"].items():
        if "encoder" in facts:
            parts.append(f"{name}: {facts['encoder']}")
        if "transcripts" in facts:
            parts.append(f"{name}: transcripts of {facts['transcripts']} through {facts['teacher']}")
    if any("synthetic" in source for source in first["manifests"].values()):
        parts.append("the voices are synthetic: this says nothing about human speech")
    unseen = ", ".join(f"{name} {count}" for name, count in first["unseen"].items())
    parts.append(f"test clips with a value unseen in training, which are always wrong: {unseen}" if unseen else "")
    parts.append(f"{first['device']}, {first['date']}, {sum(item['wall_seconds'] for item in contents):.0f} s")
    return ". ".join(part[0].upper() + part[1:] for part in parts if part) + "."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Tables out of understanding.json files.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    arguments = parse_table_arguments(parser, argv)
    show_table(format_table(arguments.runs), arguments)


if __name__ == "__main__":
    main()
