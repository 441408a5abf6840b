"""Tables of the recipe's README, out of the results.json of finished runs.

Launch: python recipes/distil_whisper/tabulate_results.py exp/distil_whisper/fsdd-seed* [--readme FILE --marker NAME]
With --readme the table replaces what stands between `<!-- NAME -->` and `<!-- /NAME -->` there.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

COLUMNS = [
    ("wer", "WER %"),
    ("digit_error_rate", "digit errors %"),
    ("slot_recall", "slot recall %"),
    ("parameters", "parameters M"),
    ("decoder_parameters", "decoder M"),
    ("rtfx", "RTFx"),
    ("file_megabytes", "file MB"),
]


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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Tables out of results.json files.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders; several seeds of one dataset")
    parser.add_argument("--readme", type=Path, help="file to put the table into")
    parser.add_argument("--marker", help="name of the place in that file")
    arguments = parser.parse_args(argv)
    missing = [str(run) for run in arguments.runs if not (run / "results.json").is_file()]
    if missing:
        raise SystemExit(f"error: no results.json in {', '.join(missing)}; run the evaluate stage first")
    results = [json.loads((run / "results.json").read_text(encoding="utf-8")) for run in arguments.runs]
    table = f"{format_table(*results)}\n{stage_times(arguments.runs)}"
    if arguments.readme is None:
        print(table)
        return
    start, end = f"<!-- {arguments.marker} -->", f"<!-- /{arguments.marker} -->"
    text = arguments.readme.read_text(encoding="utf-8")
    if start not in text or end not in text:
        raise SystemExit(f"error: {arguments.readme} lacks {start} or {end}")
    before, rest = text.split(start)
    arguments.readme.write_text(f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
