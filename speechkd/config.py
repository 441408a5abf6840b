"""Configuration: nested dataclasses, filled from YAML and then from the command line."""

import difflib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from jsonargparse import ArgumentError, ArgumentParser

from speechkd.files import atomic_write

ConfigT = TypeVar("ConfigT")


@dataclass(kw_only=True)
class TeacherConfig:
    """The model to distil.

    Args:
        name: Hub id, local folder or `bundled:<name>`.
        cache_encoder_states: read the frozen encoder's output from the label store instead of running the encoder.
        license: licence of its weights, which the student's model card repeats.
    """

    name: str
    license: str | None = None
    cache_encoder_states: bool = False


@dataclass(kw_only=True)
class DataConfig:
    """Manifests, labels and batches.

    Args:
        train_manifest: utterances to train on.
        test_manifest: utterances to score on.
        labels_dir: folder of the label stores `train` and `test`, written by the teacher; null trains on the
            manifest's own text.
        max_batch_seconds: padded audio seconds per device and step; Whisper pads every clip to 30 s.
        max_skipped_fraction: share of clips that may be undecodable before a run fails.
        num_workers: processes that prepare batches; 0 prepares them in the main process.
    """

    train_manifest: str
    test_manifest: str
    labels_dir: str | None = None
    max_batch_seconds: float = 240.0
    max_skipped_fraction: float = 0.01
    num_workers: int = 0

    def __post_init__(self) -> None:
        if self.max_batch_seconds <= 0:
            raise ValueError(f"data.max_batch_seconds must be positive, got {self.max_batch_seconds}")
        if not 0 <= self.max_skipped_fraction <= 1:
            raise ValueError(f"data.max_skipped_fraction must be 0 to 1, got {self.max_skipped_fraction}")


@dataclass(kw_only=True)
class EvaluationConfig:
    """How a student is scored.

    Args:
        normalizer: text normaliser before counting errors; english and basic are Whisper's.
        reference: the manifest's text, or the teacher's transcripts.
        digit_error_rate: also score with every number split into single digits.
    """

    normalizer: Literal["english", "basic", "none"] = "english"
    reference: Literal["text", "teacher"] = "text"
    digit_error_rate: bool = False


def parse_config(config_class: type[ConfigT], argv: list[str] | None = None) -> tuple[ConfigT, str]:
    """Read `--config FILE` and `--section.key value` overrides, the later ones winning.

    Args:
        config_class: dataclass whose fields are sections, themselves dataclasses.
        argv: arguments; None takes those of the process.

    Returns:
        The configuration and its resolved YAML, which `--config` accepts back.

    Raises:
        SystemExit: with code 2, after naming the full path of an unknown key or of a value of a wrong type.
    """
    description = (config_class.__doc__ or "").split("\n")[0]
    # without abbreviations: a misspelt option that begins like a known one would silently be that one
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file; may be given several times, later files win")
    parser.add_class_arguments(config_class)
    try:
        namespace = parser.parse_args(argv)
        del namespace["config"]
        values = parser.instantiate_classes(namespace).as_dict()
        # dumped twice: the first pass may write 0 where the file, read back, gives 0.0
        return config_class(**values), parser.dump(parser.parse_string(parser.dump(namespace)))
    except (ArgumentError, ValueError, OSError) as error:
        sys.stderr.write(f"error: {_with_full_path(str(error), list(parser.get_defaults().keys()))}\n")
        raise SystemExit(2) from None


def _with_full_path(message: str, known_keys: list[str]) -> str:
    """Name an unknown key by its full path, with the nearest known one."""
    match = re.search(r"(?:Group '(?P<group>[^']+)' does not accept option|Option) '(?P<key>[^']+)'", message)
    if match is None:
        return message
    key = f"{match['group']}.{match['key']}" if match["group"] else match["key"]
    nearest = difflib.get_close_matches(key, known_keys, n=1)
    sections = ", ".join(dict.fromkeys(known.split(".")[0] for known in known_keys))
    return f"unknown key {key!r}" + (
        f"; did you mean {nearest[0]!r}?" if nearest else f"; known sections are {sections}"
    )


def save_config(resolved_yaml: str, output_dir: str | Path) -> None:
    """Write `config.yaml` into the run folder.

    Raises:
        ValueError: the folder holds a run with another configuration.
    """
    path = Path(output_dir) / "config.yaml"
    if path.exists() and path.read_text(encoding="utf-8") != resolved_yaml:
        old, new = path.read_text(encoding="utf-8").splitlines(), resolved_yaml.splitlines()
        changed = [
            f"{line.strip()} (was {before.strip()})" for before, line in zip(old, new, strict=False) if before != line
        ]
        raise ValueError(
            f"{output_dir} holds another run; changed: {'; '.join(changed[:5]) or 'number of settings'}. "
            "Choose another trainer.output_dir, or remove that folder"
        )
    with atomic_write(path) as temporary:
        temporary.write_text(resolved_yaml, encoding="utf-8")
