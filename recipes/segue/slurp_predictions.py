"""SLURP's prediction file out of what runs of this recipe understood, for `speechkd evaluate --task slurp`.

Launch: python recipes/segue/slurp_predictions.py RUN_DIR [RUN_DIR_OF_ENTITIES] [--system NAME] --output FILE
The first run had the task intent, the second, if any, the task entities; without it no entity is predicted.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from speechkd.cli import run_command
from speechkd.files import write_jsonl
from speechkd.metrics.slu import NO_VALUE

DEFAULT_SYSTEM = "SEGUE, fine_tune"


def read_hypotheses(run_dir: Path, system: str) -> dict[str, dict[str, str]]:
    """What a system, named with its mode, said of each test clip, by id.

    Raises:
        ValueError: the run has no hypotheses, or none of this system.
    """
    path = run_dir / "understanding_hypotheses.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} is missing; run the understand stage of this run first")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not rows or system not in rows[0]["predicted"]:
        known = ", ".join(map(repr, rows[0]["predicted"])) if rows else "none, it is empty"
        raise ValueError(f"{path} has no system {system!r}; it has: {known}")
    return {row["id"]: row["predicted"][system] for row in rows}


def prediction(recording: str, labels: dict[str, str], entities: dict[str, str]) -> dict[str, Any]:
    """A line of the file.

    Args:
        recording: id of the clip, the name of its FLAC file.
        labels: with the `intent`, scenario_action; scenarios have no underscore, actions may.
        entities: values by type, with commas between those of one type.

    Raises:
        ValueError: there is no intent.
    """
    if "intent" not in labels:
        raise ValueError(
            f"clip {recording!r} has {sorted(labels)} and no intent; give a run of understanding.task=intent"
        )
    scenario, _, action = labels["intent"].partition("_")
    fillers = [
        {"type": name, "filler": value.lower()}
        for name, values in entities.items()
        for value in values.split(", ")
        if value != NO_VALUE
    ]
    return {"file": f"{recording}.flac", "scenario": scenario, "action": action, "entities": fillers}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="run folder with understanding.task=intent")
    parser.add_argument("entities_run_dir", type=Path, nargs="?", help="run folder with understanding.task=entities")
    parser.add_argument("--system", default=DEFAULT_SYSTEM, help=f"system and mode, {DEFAULT_SYSTEM!r} if not given")
    parser.add_argument("--output", type=Path, required=True, help="JSONL file to write")
    arguments = parser.parse_args(argv)
    intents = read_hypotheses(arguments.run_dir, arguments.system)
    entities: dict[str, dict[str, str]] = {}
    if arguments.entities_run_dir is not None:
        entities = read_hypotheses(arguments.entities_run_dir, arguments.system)
        if missing := [key for key in intents if key not in entities]:
            raise ValueError(
                f"{arguments.entities_run_dir} has nothing on {len(missing)} of {len(intents)} clips, {missing[0]!r} "
                "first; both runs must have the same test manifest"
            )
    write_jsonl(arguments.output, [prediction(key, labels, entities.get(key, {})) for key, labels in intents.items()])
    print(f"{len(intents)} predictions: {arguments.output}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_command(main)
