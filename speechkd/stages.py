"""Stages of a recipe: finished ones are skipped, and a stage whose inputs changed is refused.

A recipe's run.sh calls `python -m speechkd.stages begin STAMP --inputs TEXT` before a stage and `... end` after it. The
stamp beside the stage's output remembers what the stage depended on and how long it took.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from speechkd.files import write_json

SKIP_EXIT_CODE = 10


def begin(
    stamp: Path, inputs: dict[str, Any], *, force: bool, outputs: list[Path], extras: Collection[str] = ()
) -> bool:
    """Decide whether a stage has to run.

    Args:
        stamp: JSON file of the stage.
        inputs: everything that the stage's result depends on, flat or nested.
        force: rerun a stage whose inputs changed, after removing its outputs.
        outputs: what the stage writes.
        extras: flat names of inputs that only add to the result. A run that no longer asks for one takes the result
            with it.

    Returns:
        False if it finished with the same inputs.

    Raises:
        ValueError: it was begun with other inputs, and `force` is not set; the message names them.
    """
    known = json.loads(stamp.read_text(encoding="utf-8")) if stamp.is_file() else None
    before, now = ({} if known is None else _set_values(known["inputs"])), _set_values(inputs)
    before = {key: value for key, value in before.items() if key in now or key not in extras}
    if known is not None and before != now:
        old, new = _flat(known["inputs"]), _flat(inputs)
        changed = [
            f"{key} was {old.get(key)!r}, now {new.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if not force and (known["finished"] or any(_has_content(output) for output in outputs)):
            raise ValueError(
                f"{stamp.parent} was made with another configuration: {'; '.join(changed[:8])}. Add --force to make it "
                "again, which removes it, or choose another --trainer.output_dir or --data.labels_dir"
            )
        for output in outputs:
            shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
        known = None
    if known is not None and known["finished"]:
        return False
    seconds = known["wall_seconds"] if known is not None else 0.0
    content = {"inputs": inputs, "finished": False, "started": time.time(), "wall_seconds": seconds}
    write_json(stamp, content)
    return True


def end(stamp: Path) -> None:
    """Mark a stage as finished; its time adds to that of killed attempts whose end was seen."""
    content = json.loads(stamp.read_text(encoding="utf-8"))
    content["wall_seconds"] += time.time() - content.pop("started")
    write_json(stamp, {**content, "finished": True})


def _has_content(output: Path) -> bool:
    """Whether a stage left anything here but its stamp; one that failed at once need not be forced."""
    if not output.is_dir():
        return output.exists()
    return any(not entry.name.startswith((".stage-", ".lock")) for entry in output.iterdir())


def _set_values(inputs: dict[str, Any]) -> dict[str, Any]:
    """What is not null, off, zero or empty, flat: such a setting changes nothing where an older version lacked it."""
    return {key: value for key, value in _flat(inputs).items() if value}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        path: leaf
        for key, inner in value.items()
        for path, leaf in _flat(inner, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def main(argv: list[str] | None = None) -> None:
    """Command line of run.sh; exit code 10 says that the stage is finished already, 2 that it is refused."""
    parser = argparse.ArgumentParser(description="Begin or end a stage of a recipe.")
    parser.add_argument("action", choices=("begin", "end"))
    parser.add_argument("stamp", type=Path)
    parser.add_argument("--config", type=Path, help="resolved YAML of the run")
    parser.add_argument(
        "--sections",
        nargs="*",
        default=[],
        help="sections or section.key that the stage depends on; section.key? if it only adds to the result",
    )
    parser.add_argument("--corpus-dir", default="", help="also part of the inputs")
    parser.add_argument("--outputs", nargs="*", type=Path, default=[])
    parser.add_argument("--force", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.action == "end":
        end(arguments.stamp)
        return
    config = _flat(yaml.safe_load(arguments.config.read_text(encoding="utf-8")))
    extras = [name.removesuffix("?") for name in arguments.sections if name.endswith("?")]
    wanted = [name.removesuffix("?") for name in arguments.sections]
    inputs = {
        key: value for key, value in config.items() if any(key == name or key.startswith(f"{name}.") for name in wanted)
    }
    if arguments.corpus_dir:
        inputs["corpus_dir"] = arguments.corpus_dir
    try:
        must_run = begin(arguments.stamp, inputs, force=arguments.force, outputs=arguments.outputs, extras=extras)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error
    raise SystemExit(0 if must_run else SKIP_EXIT_CODE)


if __name__ == "__main__":
    main()
