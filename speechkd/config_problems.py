"""All that is wrong with the keys and values of a configuration, at once."""

import contextlib
import io
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from speechkd.config import parse_config


def read_config(config_class: type, path: Path, overrides: Sequence[str]) -> tuple[Any, list[str]]:
    """The configuration, and all that is wrong with its keys and values.

    A key at fault is taken out and the rest read again, so that one error does not hide the next.

    Returns:
        The configuration without the keys at fault, None where that is not possible, and a message for each.
    """
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        reduced = path
        while True:
            errors = io.StringIO()
            try:
                with contextlib.redirect_stderr(errors):
                    config: Any = parse_config(config_class, ["--config", str(reduced), *overrides])[0]
                return config, problems
            except SystemExit:
                message = errors.getvalue().strip().removeprefix("error: ").replace(str(reduced), str(path))
            if message in problems:
                return None, problems
            key = re.search(r"unknown key '(.+?)'|[Kk]ey \"(.+?)\"", message)
            name = None if key is None else key[1] or key[2]
            if "support bf16" in message:  # of transformers, which names no key
                name = "trainer.bf16"
                message = f"trainer.bf16=true: {message} Check it where it will run, or set trainer.bf16=false"
            problems.append(message)
            without = None if name is None else _without(reduced, name)
            if without is None:
                return None, problems
            reduced = Path(folder) / path.name
            reduced.write_text(without, encoding="utf-8")


def _without(path: Path, key: str) -> str | None:
    """The YAML without one key; None if it is not in there."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    *sections, name = key.split(".")
    inner = content
    for section in sections:
        inner = inner.get(section) if isinstance(inner, dict) else None
    if not isinstance(inner, dict) or name not in inner:
        return None
    del inner[name]
    return yaml.safe_dump(content)
