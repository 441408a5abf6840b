"""Tables of the small SUPERB, out of what probe.py wrote: scores, and how much of the teacher each encoder keeps.

Launch: python recipes/distilhubert/tabulate_probes.py PROBES_JSON [...] [--group-by name] [--readme FILE --marker NAME]
The first encoder is the teacher. Several files make one table, with an encoder that several of them have in it once.
--group-by name has one row for all encoders whose names differ in their -seedN alone. With --readme the tables replace
what stands between `<!-- NAME -->` and `<!-- /NAME -->` there.
"""

import argparse
import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

from probe_tasks import ERRORS, SCORES

from speechkd.frame_encoders import LOG_MEL
from speechkd.metrics.superb import retention
from speechkd.probing import mean_and_deviation
from speechkd.readme_tables import parse_table_arguments, show_table

FRACTIONS = ("min_dcf", "mtwv")  # not in percent


def retained(content: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """What each encoder keeps of the lead that the teacher, the first one, has over log-mel: name to score to fraction.

    None where the teacher does not lead, as there is nothing to keep. Empty where log-mel was not probed.

    Args:
        content: of probes.json.
    """
    encoders = content["encoders"]
    means = {
        name: {score: values["mean"] for score, values in encoder["scores"].items()}
        for name, encoder in encoders.items()
    }
    baseline = next((name for name, encoder in encoders.items() if encoder["source"] == LOG_MEL), None)
    if baseline is None:
        return {}
    teacher = next(iter(encoders))
    table: dict[str, dict[str, float | None]] = {}
    for name in encoders:
        if name in (teacher, baseline):
            continue
        table[name] = {}
        for score in SCORES:
            lead = means[teacher][score] - means[baseline][score]
            leads = lead < 0 if score in ERRORS else lead > 0
            table[name][score] = (
                retention(means[name][score], means[teacher][score], means[baseline][score]) if leads else None
            )
    return table


def join_probes(files: list[Path]) -> dict[str, Any]:
    """What several probes.json hold, in their order; of encoders with the same name and weights the first.

    Raises:
        SystemExit: a file is missing, their settings differ, or an encoder's name stands for different weights.
    """
    if missing := [str(path) for path in files if not path.is_file()]:
        raise SystemExit(f"error: {', '.join(missing)} does not exist; run recipes/distilhubert/probe.py first")
    contents = {path: json.loads(path.read_text(encoding="utf-8")) for path in files}
    joined: dict[str, Any] = {"settings": contents[files[0]]["settings"], "encoders": {}}
    for path, content in contents.items():
        if content["settings"] != joined["settings"]:
            raise SystemExit(f"error: {path} holds scores of other settings than {files[0]}; they do not compare")
        for name, encoder in content["encoders"].items():
            if joined["encoders"].setdefault(name, encoder)["weights_sha256"] != encoder["weights_sha256"]:
                raise SystemExit(
                    f"error: encoder {name!r} of {path} has other weights than that of an earlier file; give one of "
                    "them another name"
                )
    return joined


def group_by_name(content: dict[str, Any]) -> dict[str, Any]:
    """Encoders whose names differ in their -seedN alone as one; its scores are those of the means of each encoder.

    Encoders of equal weights count once.

    Args:
        content: of probes.json.

    Raises:
        SystemExit: those of one name differ in layers or width.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, encoder in content["encoders"].items():
        groups.setdefault(re.sub(r"-seed\d+$", "", name), {})[encoder["weights_sha256"]] = encoder
    grouped = {}
    for name, by_weights in groups.items():
        first, *others = members = list(by_weights.values())
        if any((other["num_layers"], other["width"]) != (first["num_layers"], first["width"]) for other in others):
            raise SystemExit(f"error: encoders of the name {name} differ in layers or width; give them different names")
        if others:
            means = [{score: member["scores"][score]["mean"] for score in SCORES} for member in members]
            seconds = [sum(member["head_seconds"].values()) for member in members]
            first = {
                **first,
                "source": ", ".join(member["source"] for member in members),
                "scores": mean_and_deviation(means),
                "head_seconds": {"mean": mean(seconds)},
                "num_encoders": len(members),
            }
        grouped[name] = first
    return {**content, "encoders": grouped}


def format_table(content: dict[str, Any]) -> str:
    """Markdown: a row for each encoder with mean and deviation over seeds, a row for what it keeps, and notes.

    Args:
        content: of probes.json, or of `group_by_name`.
    """
    encoders = content["encoders"]
    lines = [f"| encoder | layers x width | {' | '.join(SCORES.values())} |", "|---|---:|" + "---:|" * len(SCORES)]
    for name, encoder in encoders.items():
        cells = [_cell(encoder["scores"][score], score) for score in SCORES]
        lines.append(f"| {name} | {encoder['num_layers']} x {encoder['width']} | {' | '.join(cells)} |")
    kept = retained(content)
    if kept:
        lines += ["", f"| kept of the teacher's lead, % | {' | '.join(SCORES.values())} | mean |"]
        lines.append("|---|" + "---:|" * (len(SCORES) + 1))
    for name, shares in kept.items():
        present = [share for share in shares.values() if share is not None]
        cells = [_percent(share) for share in [*shares.values(), mean(present) if present else None]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _notes(content)])


def _cell(values: dict[str, Any], score: str) -> str:
    digits = 3 if score in FRACTIONS else 1
    text = f"{values['mean']:.{digits}f}"
    return text if len(values["values"]) == 1 else f"{text} ± {values['deviation']:.{digits}f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}"


def _notes(content: dict[str, Any]) -> str:
    encoders, settings = content["encoders"], content["settings"]
    protocol = settings["protocol"]
    steps = {kind: f"{protocol[kind]['num_steps']:,}" for kind in ("labels", "speakers", "strings")}
    seconds = [sum(encoder["head_seconds"].values()) for encoder in encoders.values()]
    facts = sorted({(encoder["device"], encoder["date"]) for encoder in encoders.values()})
    return " ".join(
        [
            f"Frozen encoders, heads of {len(settings['seeds'])} seeds: {steps['labels']} steps for labels, "
            f"{steps['speakers']} for verification, {steps['strings']} for CTC; the last head is scored.",
            f"Of verification the mean of two folds, {protocol['num_trials']} trials each, of strangers.",
            f"The teacher is {next(iter(encoders))}.",
            *(
                f"Of {name}: mean and deviation over {encoder['num_encoders']} encoders, not over heads."
                for name, encoder in encoders.items()
                if "num_encoders" in encoder
            ),
            "Orders name no speaker, so one may be on both sides.",
            "; ".join(f"{name}: `{encoder['source']}`" for name, encoder in encoders.items()) + ".",
            f"{min(seconds):.0f} to {max(seconds):.0f} s an encoder for all heads;",
            "; ".join(f"{device}, {date}" for device, date in facts) + ".",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Tables out of probes.json.")
    parser.add_argument("probes", nargs="+", type=Path, help="what probe.py wrote")
    parser.add_argument("--group-by", choices=("name",), help="one row for each name without its -seedN")
    arguments = parse_table_arguments(parser, argv)
    content = join_probes(arguments.probes)
    show_table(format_table(group_by_name(content) if arguments.group_by else content), arguments)


if __name__ == "__main__":
    main()
