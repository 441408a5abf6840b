"""Configuration: nested dataclasses, filled from YAML and then from the command line."""

import argparse
import dataclasses
import difflib
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from speechkd.data.augment import WaveformAugmentConfig
from speechkd.files import atomic_write
from speechkd.metrics.normalizers import Normalizer

ConfigT = TypeVar("ConfigT")
StoredOutputs = Literal["topk", "decoder_states"]

MAX_CONFIG_DEPTH = 20
MAX_CONFIG_VALUES = 10_000
MAX_INTEGER = 2**63 - 1


@dataclass(kw_only=True)
class TeacherConfig:
    """The model to distil.

    Args:
        name: Hub id, local folder or `bundled:<name>`.
        dtype: of its weights; null is float32 on a CPU and the checkpoint's own elsewhere. The student is float32.
        cache_encoder_states: read the frozen encoder's output from the label store instead of running the encoder.
        stored_outputs: what of the label store stands for the teacher's decoder, which is not run then: decoder_states,
            its last states at each token, which give all its logits, or topk, its likeliest ids there, in less space.
            Null runs the decoder.
        license: licence of its weights, which the student's model card repeats.
    """

    name: str
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    license: str | None = None
    cache_encoder_states: bool = False
    stored_outputs: StoredOutputs | None = None


@dataclass(kw_only=True)
class CorpusConfig:
    """One more corpus to train on.

    Args:
        train_manifest: its utterances, a manifest or `hub:NAME[:CONFIG]:SPLIT`.
        labels_dir: folder of its label store `train`; null trains on the manifest's own text.
        weight: its share of the batches, against `data.weight` and the other corpora's.
        language: language code of its audio; null is that of `decoding.language`.
    """

    train_manifest: str
    labels_dir: str | None = None
    weight: float = 1.0
    language: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(
                f"the weight of {self.train_manifest} is {self.weight}; it must be a positive number, leave out a "
                "corpus that is not wanted"
            )


@dataclass(kw_only=True)
class DataConfig:
    """Manifests, labels and batches.

    Args:
        train_manifest: utterances to train on, a manifest or `hub:NAME[:CONFIG]:SPLIT`.
        test_manifest: utterances to score on.
        dev_manifest: utterances for `trainer.eval_strategy`, by which a student may be chosen; null for none.
        labels_dir: folder of the label stores `train`, `test` and `dev`, written by the teacher; null trains on the
            manifest's own text.
        weight: share of the batches that `train_manifest` gives, against the weights of `extra_corpora`.
        extra_corpora: further corpora to train on, each batch from one of them; null for none.
        pack: join clips of one speaker to windows of up to 30 s; the labels are then those of windows.
        timestamp_probability: how often a label that has timestamps keeps them, 0 to 1; drawn anew in each epoch.
        previous_text_probability: how often the label of the window or segment before is the prompt, 0 to 1; drawn
            anew in each epoch.
        augment: speed, noise and reverberation of the training audio; null for none.
        max_batch_seconds: padded audio seconds per device and step; Whisper pads every clip to 30 s.
        max_skipped_fraction: share of clips that may be undecodable before a run fails.
        num_workers: processes that prepare batches; 0 prepares them in the main process.
    """

    train_manifest: str
    test_manifest: str
    dev_manifest: str | None = None
    labels_dir: str | None = None
    weight: float = 1.0
    extra_corpora: list[CorpusConfig] | None = None
    pack: bool = False
    timestamp_probability: float = 0.0
    previous_text_probability: float = 0.0
    augment: WaveformAugmentConfig | None = None
    max_batch_seconds: float = 240.0
    max_skipped_fraction: float = 0.01
    num_workers: int = 0

    @property
    def corpora(self) -> list[CorpusConfig]:
        """What is trained on, `train_manifest` first."""
        first = CorpusConfig(train_manifest=self.train_manifest, labels_dir=self.labels_dir, weight=self.weight)
        return [first, *(self.extra_corpora or [])]

    def __post_init__(self) -> None:
        if not 0 < self.max_batch_seconds < math.inf:
            raise ValueError(f"data.max_batch_seconds must be a positive number, got {self.max_batch_seconds}")
        if not 0 <= self.max_skipped_fraction <= 1:
            raise ValueError(f"data.max_skipped_fraction must be 0 to 1, got {self.max_skipped_fraction}")
        for name in ("timestamp_probability", "previous_text_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name} must be 0 to 1, got {getattr(self, name)}")
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers must be 0 or more, got {self.num_workers}")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"data.weight must be a positive number, got {self.weight}")


@dataclass(kw_only=True)
class EvaluationConfig:
    """How a student is scored.

    Args:
        normalizer: text normaliser before counting errors. english and basic are Whisper's; keep_marks is for scripts
            that basic cuts apart, or that have no spaces between words.
        reference: the manifest's text, or the teacher's transcripts.
        digit_error_rate: also score with every number split into single digits.
    """

    normalizer: Normalizer = "english"
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
    known_keys = list(parser.get_defaults().keys())
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", action="append", default=[])
    try:
        for path in files.parse_known_args(argv)[0].config:
            if Path(path).is_file():
                _check_file(path, known_keys)
        namespace = parser.parse_args(argv)
        del namespace["config"]
        _check_section(config_class, namespace)
        values = parser.instantiate_classes(namespace).as_dict()
        # dumped twice: the first pass may write 0 where the file, read back, gives 0.0
        return config_class(**values), parser.dump(parser.parse_string(parser.dump(namespace)))
    except (ArgumentError, ValueError, OSError) as error:
        sys.stderr.write(f"error: {_with_full_path(str(error), known_keys)}\n")
        raise SystemExit(2) from None


def _check_file(path: str, known_keys: list[str]) -> None:
    """Refuse by file, line and key what YAML allows and jsonargparse drops, or stumbles over without a place.

    Raises:
        ValueError: the file is not UTF-8, not YAML, or no mapping; it is nested or expanded without end, a key is not
            text, comes twice or is unknown and empty, or a value cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        # the C loader, which jsonargparse takes, crashes the process on the endless nesting that the first one refuses
        for loader in (yaml.SafeLoader, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            root = yaml.compose(text, Loader=loader)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{path}: not UTF-8 (byte 0x{byte:02x} at offset {error.start}); convert the file") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply; a configuration has sections, settings and short lists") from None
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path} holds no sections; write `section: {{key: value}}`, as in the files of recipes/")
    waiting: list[tuple[yaml.Node, str, int]] = [(root, "", 0)]
    num_values = 0
    while waiting:
        node, key, depth = waiting.pop()
        num_values += 1
        place = f"{path}:{node.start_mark.line + 1}: {key}"
        if depth > MAX_CONFIG_DEPTH or num_values > MAX_CONFIG_VALUES:  # an alias may hold itself, or more aliases
            raise ValueError(f"{place} is nested too deeply or repeated by aliases too often; write the values out")
        if isinstance(node, yaml.ScalarNode):
            _check_scalar(node, place)
        elif node.tag not in ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"):
            raise ValueError(f"{place} has the tag {node.tag}; remove it, a configuration holds plain values")
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(child, f"{key}[{index}]", depth + 1) for index, child in enumerate(node.value)]
        else:
            seen = set()
            for name, child in node.value:
                is_text = name.tag in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
                if not is_text or not re.fullmatch(r"[^\s.]+(\.[^\s.]+)*", name.value):
                    raise ValueError(f"{place} has a key that is not a name: {name.value!r:.100}; correct it")
                if name.value in seen:
                    raise ValueError(f"{place} has the key {name.value!r:.100} twice; remove one")
                seen.add(name.value)
                is_empty = isinstance(child, yaml.ScalarNode) and child.tag == "tag:yaml.org,2002:null"
                if depth == 0 and is_empty and name.value.split(".")[0] not in {k.split(".")[0] for k in known_keys}:
                    raise ValueError(f"Option '{name.value}' is not accepted")  # jsonargparse names no key here
                waiting.append((child, f"{key}.{name.value}" if key else name.value, depth + 1))
            if not seen and not any(f"{key}.".startswith(f"{k}.") or k.startswith(f"{key}.") for k in known_keys):
                raise ValueError(f"Option '{key}' is not accepted")


def _check_scalar(node: yaml.ScalarNode, place: str) -> None:
    try:
        value = yaml.SafeLoader("").construct_object(node)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(
            f"{place} is {node.value!r:.100}, which cannot be read ({error}); quote or correct it"
        ) from error
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise ValueError(f"{place} is a number of {len(node.value)} digits, too large to compute with")


def _check_section(section_class: type, values: Namespace, section: str = "") -> None:
    """Refuse what jsonargparse lets through: null for "not given", NaN, infinity and a bare value for a section.

    Raises:
        ValueError: names the full path of the key.
    """
    hints = get_type_hints(section_class)
    for setting in dataclasses.fields(section_class):
        key, hint, value = f"{section}{setting.name}", hints[setting.name], values.get(setting.name)
        kinds = get_args(hint) or (hint,)
        if value is None and setting.name in values and type(None) not in kinds and setting.default is not None:
            raise ValueError(f"{key} is null; give it a value or leave it out for the default")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{key} is {number}; it must be a finite number")
        if dataclasses.is_dataclass(hint) and value is not None and not isinstance(value, Namespace):
            raise ValueError(
                f"{key} is {value!r:.100}; it must be a section with the keys {', '.join(get_type_hints(hint))}"
            )
        for kind in kinds:
            if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, Namespace):
                _check_section(kind, value, f"{key}.")


def _with_full_path(message: str, known_keys: list[str]) -> str:
    """Name an unknown key by its full path, with the nearest known one."""
    match = re.search(r"(?:Group '(?P<group>[^']+)' does not accept option|Option) '(?P<key>.+)'", message, re.DOTALL)
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
