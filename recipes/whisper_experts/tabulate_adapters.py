"""Table of base model, experts and LoRA, out of the results.json of finished runs.

Launch: python recipes/whisper_experts/tabulate_adapters.py RUN_DIR [RUN_DIR ...] [--readme FILE --marker NAME]
Runs of one adapter with several seeds are one row. With --readme the table replaces what stands between
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
    ("wer", "WER %"),
    ("cer", "CER %"),
    ("digit_error_rate", "digit errors %"),
    ("slot_recall", "slot recall %"),
    ("rtfx", "RTFx"),
]
ROWS = {  # adapter and model to the row's name
    ("experts", "gated"): "experts, gated (exact)",
    ("experts", "merged"): "experts, merged",
    ("lora", "merged"): "LoRA, merged (exact)",
    ("none", "merged"): "all weights",
}


def format_table(run_dirs: Sequence[Path]) -> str:
    """Markdown table; mean and deviation where an adapter has several runs."""
    runs = [json.loads((run_dir / "results.json").read_text(encoding="utf-8")) for run_dir in run_dirs]
    groups: dict[str, list[tuple[dict[str, Any], Any]]] = {"base": [(runs[0]["models"]["base"], None)]}
    for (adapter, model), name in ROWS.items():
        chosen = [run for run in runs if run["run"]["adapter"] == adapter]
        if chosen:
            groups[name] = [(run["models"][model], run["run"]["trainable_parameters"] / 1e6) for run in chosen]
    present = [
        (key, title) for key, title in COLUMNS if any(key in scores for group in groups.values() for scores, _ in group)
    ]
    lines = [
        f"| model | {' | '.join(title for _, title in present)} | trained M |",
        f"|---|{'---:|' * len(present)}---:|",
    ]
    for name, group in groups.items():
        cells = [_mean_and_deviation([scores[key] for scores, _ in group if key in scores]) for key, _ in present]
        trained = "" if group[0][1] is None else f"{group[0][1]:.2f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {trained} |")
    return "\n".join([*lines, "", *_notes(runs), *_gate_notes(run_dirs, runs)])


def _mean_and_deviation(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 and len(set(values)) > 1 else mean


def _notes(runs: list[dict[str, Any]]) -> list[str]:
    run, merged = runs[0]["run"], runs[0]["models"]["merged"]
    seeds = sorted({item["run"]["seed"] for item in runs})
    return [
        f"{merged['num_utterances']} utterances of {merged['manifest']}, {merged['num_reference_words']} words of "
        f"{merged['reference']}, normaliser {merged['normalizer']}. Base {run['base_model']['name']}, trained on "
        f"{run['train_utterances']} utterances ({run['train_hours']:.2f} h), {run['steps']} steps, loss {run['loss']}, "
        f"seed(s) {', '.join(map(str, seeds))}. {runs[0]['device']}, {run['date']}."
    ]


def _gate_notes(run_dirs: Sequence[Path], runs: list[dict[str, Any]]) -> list[str]:
    """What merging the experts changed, and why."""
    notes = []
    for run_dir, run in zip(run_dirs, runs, strict=True):
        if "parity" not in run:
            continue
        parity = run["parity"]
        wer = f", WER {parity['wer_against_gated']:.2f} % between them" if "wer_against_gated" in parity else ""
        gates = json.loads((run_dir / "gates.json").read_text(encoding="utf-8"))["open_shares"]
        shares = "; ".join(f"{half} {' '.join(f'{share:.2f}' for share in gates[half])}" for half in gates)
        notes.append(
            f"{run_dir.name}: the merged student writes {parity['num_differing']} of {parity['num_utterances']} "
            f"utterances otherwise than the gated model{wer}. Share of open gates by layer: {shares}."
        )
    return notes


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Table out of results.json files.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of one dataset")
    arguments = parse_table_arguments(parser, argv)
    require_results(arguments.runs)
    show_table(format_table(arguments.runs), arguments)


if __name__ == "__main__":
    main()
