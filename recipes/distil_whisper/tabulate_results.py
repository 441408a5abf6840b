"""Tables of the recipe's README, out of the results.json of finished runs or other measurements in JSON.

Launch: python recipes/distil_whisper/tabulate_results.py exp/distil_whisper/fsdd-seed* [--readme FILE --marker NAME]
With --readme the table replaces what stands between `<!-- NAME -->` and `<!-- /NAME -->` there. --group-by layers has
one row for each depth of the students, --group-by name one for each folder name without its -seedN; with --bench their
RTFx is that of a `speechkd bench --json`, in which the models took turns. One JSON file in
place of the folders, such as the output of `speechkd bench --json`, is written out as it is; several such outputs with
an --assistant become a row each, of what their assistants are worth.
"""

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any, Literal

from speechkd.readme_tables import parse_table_arguments, require_results, show_table

COLUMNS = [
    ("wer", "WER %"),
    ("digit_error_rate", "digit errors %"),
    ("slot_recall", "slot recall %"),
    ("parameters", "parameters M"),
    ("decoder_parameters", "decoder M"),
    ("rtfx", "RTFx"),
    ("file_megabytes", "file MB"),
]


GROUP_COLUMNS = [
    *COLUMNS,
    ("train_hours", "trained on h"),
    ("decoding_1", "decoding, batch 1"),
    ("decoding_8", "batch 8"),
]
Group = tuple[str, list[dict[str, float]]]


def format_table(*runs: dict[str, Any]) -> str:
    """Markdown table of teacher, student before and after; mean and deviation where there are several runs."""
    models = list(runs[0]["models"])
    present = [(key, title) for key, title in COLUMNS if any(key in run["models"][models[-1]] for run in runs)]
    lines = ["| model | " + " | ".join(title for _, title in present) + " |", "|---|" + "---:|" * len(present)]
    for model in models:
        cells = []
        for key, _ in present:
            scale = 1e-6 if key.endswith("parameters") else 1.0
            cells.append(_mean_and_deviation([run["models"][model][key] * scale for run in runs]))
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_notes(runs)])


def _mean_and_deviation(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 and len(set(values)) > 1 else mean


def _notes(runs: tuple[dict[str, Any], ...]) -> list[str]:
    run, student = runs[0]["run"], runs[0]["models"]["student after"]
    notes = [
        f"{student['num_utterances']} utterances of {student['manifest']}, {student['num_reference_words']} words of "
        f"{student['reference']}, normaliser {student['normalizer']}. Trained on {run['train_utterances']} utterances "
        f"({run['train_hours']:.2f} h), {run['steps']} steps, seed(s) "
        f"{', '.join(str(item['run']['seed']) for item in runs)}. {runs[0]['device']}, {run['date']}."
    ]
    if run["synthetic"]:
        notes.append("The voices are synthetic: this says nothing about human speech.")
    for batch_size in runs[0].get("decode_seconds_per_step", {}):
        ratios = [item["decode_seconds_per_step"][batch_size] for item in runs]
        notes.append(
            f"Decoding, batch {batch_size}: the student is "
            f"{_mean_and_deviation([teacher / student for teacher, student in ratios])} times as fast per token."
        )
    return notes


def stage_times(run_dirs: list[Path]) -> str:
    """Wall time of each stage, from the stamps that run.sh keeps."""
    lines = []
    for run_dir in run_dirs:
        results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
        data_dir = Path(results["run"]["train_manifest"]).parent
        labels = sorted(data_dir.glob("*/.stage-label.json"))
        stamps = [
            data_dir / ".stage-prepare.json",
            *labels,
            run_dir / ".stage-train.json",
            run_dir / ".stage-evaluate.json",
        ]
        times = [
            f"{stamp.stem.removeprefix('.stage-')} {json.loads(stamp.read_text())['wall_seconds']:.0f} s"
            for stamp in stamps
            if stamp.exists()
        ]
        lines.append(f"Wall time, {run_dir.name}: {', '.join(times)}.")
    return "\n".join(lines)


def group_measures(run_dirs: list[Path], results: list[dict[str, Any]], by: Literal["layers", "name"]) -> list[Group]:
    """The teacher and the students of each group, by name, with the measures of each run.

    Args:
        run_dirs: run folders.
        results: their results.json.
        by: "layers" groups by the students' decoder layers, "name" by the folder's name without -seedN.

    Returns:
        Groups in the order of their depth, or of their first folder. "decoding_1" and "decoding_8" are how many times
        as fast as the teacher a student decodes, per token, in batches of 1 and 8.

    Raises:
        SystemExit: the runs are not scored on the same utterances.
    """
    manifests = sorted({result["models"]["student after"]["manifest"] for result in results})
    if len(manifests) > 1:
        raise SystemExit(f"error: the runs are scored on {' and '.join(manifests)}; give those of one test manifest")
    students: dict[Any, list[dict[str, float]]] = {}
    teachers = []
    for run_dir, result in zip(run_dirs, results, strict=True):
        speeds = {
            f"decoding_{batch_size}": teacher / student
            for batch_size, (teacher, student) in result.get("decode_seconds_per_step", {}).items()
        }
        key = result["run"]["decoder_layers"] if by == "layers" else re.sub(r"-seed\d+$", "", run_dir.name)
        measures = {**result["models"]["student after"], "train_hours": result["run"]["train_hours"], **speeds}
        students.setdefault(key, []).append(measures)
        if "teacher" in result["models"]:
            teachers.append({**result["models"]["teacher"], **dict.fromkeys(speeds, 1.0)})
    keys = sorted(students) if by == "layers" else list(students)
    names = {key: f"{key} layer{'s' if key > 1 else ''}" if by == "layers" else key for key in keys}
    return [*([("teacher", teachers)] if teachers else []), *((names[key], students[key]) for key in keys)]


def format_groups(groups: list[Group]) -> str:
    """Markdown table with one row a group: mean, and deviation over its runs."""
    present = [(key, title) for key, title in GROUP_COLUMNS if any(key in run for _, runs in groups for run in runs)]
    lines = ["| model | " + " | ".join(title for _, title in present) + " |", "|---|" + "---:|" * len(present)]
    for name, runs in groups:
        cells = []
        for key, _ in present:
            scale = 1e-6 if key.endswith("parameters") else 1.0
            values = [run[key] * scale for run in runs if key in run]
            times = " times" if key.startswith("decoding") else ""
            cells.append(_mean_and_deviation(values) + times if values else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_groups_with_notes(run_dirs: list[Path], results: list[dict[str, Any]], by: Literal["layers", "name"]) -> str:
    """`format_groups`, and what all runs have in common."""
    groups = group_measures(run_dirs, results, by)
    student = results[0]["models"]["student after"]
    runs = ", ".join(f"{name}: {len(of_group)}" for name, of_group in groups if name != "teacher")
    note = (
        f"{student['num_utterances']} utterances of {student['manifest']}, {student['num_reference_words']} words of "
        f"{student['reference']}, normaliser {student['normalizer']}. Runs: {runs}. {results[0]['device']}, "
        f"{results[0]['run']['date']}."
    )
    return f"{format_groups(groups)}\n\n{note}"


def format_measurements(content: dict[str, Any] | list[dict[str, Any]]) -> str:
    """Markdown table of measurements: one row an object.

    Args:
        content: a list of objects, an object of objects by name, an object with such a list as `models` (of `speechkd
            bench --json`) or as `measurements` (of `tests/benchmarks`), or an object of plain values. Plain values
            and objects beside the list follow the table.
    """
    rows = None if isinstance(content, list) else content.get("models", content.get("measurements"))
    if isinstance(content, dict) and isinstance(rows, list):
        notes = {key: value for key, value in content.items() if not isinstance(value, (dict, list))}
        more = [f"{key.capitalize()}: {_sentence(value)}" for key, value in content.items() if isinstance(value, dict)]
        return "\n\n".join([format_measurements(rows), *more, _sentence(notes)])
    if isinstance(content, dict):
        nested = all(isinstance(value, dict) for value in content.values())
        content = [
            {"name": key, **value} if nested else {"name": key, "value": value} for key, value in content.items()
        ]
    columns = list(dict.fromkeys(key for row in content for key in row))
    titles = [column.replace("_", " ") for column in columns]
    lines = ["| " + " | ".join(titles) + " |", "|" + "".join("---:|" if i else "---|" for i in range(len(titles)))]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in content]
    return "\n".join(lines)


def format_assistants(benches: list[dict[str, Any]]) -> str:
    """Markdown table of the `speculative` part of several benches, one row an assistant.

    Raises:
        SystemExit: a bench had no assistant, or other clips than the first.
    """
    shared = ("manifest", "num_clips", "device", "date")
    if any("speculative" not in bench for bench in benches):
        raise SystemExit("error: several JSON files make a table if all are of `speechkd bench --assistant`")
    if any(bench[key] != benches[0][key] for bench in benches for key in ("manifest", "num_clips")):
        raise SystemExit("error: the assistants were measured on other clips than the first; give them the same")
    notes = {key: benches[0][key] for key in shared if key in benches[0]}
    return f"{format_measurements([bench['speculative'] for bench in benches])}\n\n{_sentence(notes)}"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return str(value)


def _sentence(notes: dict[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {_cell(value)}" for key, value in notes.items()) + "."


def read_results(run_dirs: list[Path], bench: Path | None = None) -> list[dict[str, Any]]:
    """results.json of each run.

    Args:
        run_dirs: run folders.
        bench: output of `speechkd bench --json` with the teacher and all students, whose RTFx is taken; in a bench the
            models take turns, while runs are scored one after another. None keeps that of the runs.

    Raises:
        SystemExit: a run has no results, or the bench lacks a model; names them.
    """
    require_results(run_dirs)
    results = [json.loads((run / "results.json").read_text(encoding="utf-8")) for run in run_dirs]
    if bench is None:
        return results
    speeds = {row["name"]: row["rtfx"] for row in json.loads(bench.read_text(encoding="utf-8"))["models"]}
    for run_dir, result in zip(run_dirs, results, strict=True):
        names = {"teacher": result["run"]["teacher"]["name"], "student after": str(run_dir / "student")}
        for model, name in names.items():
            if name not in speeds:
                raise SystemExit(
                    f"error: {bench} has no model {name}; give it to `speechkd bench --models` by that name"
                )
            result["models"][model]["rtfx"] = speeds[name]
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Tables out of results.json files and other measurements.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or JSON files of measurements")
    parser.add_argument("--group-by", choices=("layers", "name"), help="one row for each group of runs")
    parser.add_argument("--bench", type=Path, help="output of `speechkd bench --json`, for the RTFx of grouped runs")
    arguments = parse_table_arguments(parser, argv)
    if arguments.bench is not None and arguments.group_by is None:
        parser.error("--bench is for --group-by")
    if all(run.is_file() for run in arguments.runs):
        contents = [json.loads(run.read_text(encoding="utf-8")) for run in arguments.runs]
        table = format_measurements(contents[0]) if len(contents) == 1 else format_assistants(contents)
    else:
        results = read_results(arguments.runs, arguments.bench)
        if arguments.group_by:
            table = format_groups_with_notes(arguments.runs, results, arguments.group_by)
        else:
            table = f"{format_table(*results)}\n{stage_times(arguments.runs)}"
    show_table(table, arguments)


if __name__ == "__main__":
    main()
