"""Checks of a configuration before any training: its keys, teacher, manifests and labels; all problems at once."""

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, PreTrainedConfig

from speechkd.config_problems import read_config
from speechkd.data.collate import WhisperTokens
from speechkd.data.features import SAMPLE_RATE_HZ, SAMPLES_PER_POSITION, WINDOW_SAMPLES
from speechkd.data.hub import read_utterances
from speechkd.data.manifest import Manifest
from speechkd.data.whisper import clip_ids
from speechkd.doctor import free_disk_gb
from speechkd.estimate import estimate_costs, find_recipe, load_recipe, recipe_config_class
from speechkd.labels.teacher_cache import LabelStore, LabelStoreError
from speechkd.teachers import load_processor, resolve_model

SPLITS = ("train", "dev", "test")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


@dataclasses.dataclass
class _Findings:
    """What is wrong or worth knowing, and what keeps the estimates from being made."""

    problems: list[str] = dataclasses.field(default_factory=list)
    advice: list[str] = dataclasses.field(default_factory=list)
    blocking: list[str] = dataclasses.field(default_factory=list)

    def block(self, problem: str, reason: str) -> None:
        self.problems.append(problem)
        self.blocking.append(reason)


@dataclasses.dataclass
class _Source:
    """One manifest of a configuration and its label store, with the keys that they stand under."""

    name: str
    manifest_key: str
    manifest: str
    labels_key: str
    labels_dir: str | None
    split: str
    language: str | None

    @property
    def store(self) -> Path:
        return Path(str(self.labels_dir)) / self.split


@dataclasses.dataclass(frozen=True)
class _Limits:
    """What a clip must fit into, in seconds; None where there is no such limit."""

    window_seconds: float | None
    crop_seconds: float | None = None
    pads_to_window: bool = True
    batch_seconds: float | None = None

    def without_batches(self) -> "_Limits":
        return dataclasses.replace(self, batch_seconds=None)


def check_config(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Check a configuration with its manifests, label stores and teacher, and estimate what training costs.

    Nothing is written into the run folder or the label stores; see `speechkd.estimate` for how the recipe is found.

    Args:
        path: YAML beside a recipe's `train.py`, or the resolved `config.yaml` of a run.
        overrides: `--section.key value` arguments.

    Returns:
        JSON-serialisable facts: `config`, `output_dir`, `free_disk_gb`, `manifests`, `labels`, `estimates`, `problems`,
        `advice`; only the last two where the configuration cannot be read.
    """
    path, found = Path(path), _Findings()
    facts: dict[str, Any] = {}
    try:
        recipe = find_recipe(path)
        config_class = recipe_config_class(load_recipe(recipe))
    except (ValueError, ImportError) as error:
        return {"problems": [str(error)], "advice": []}
    facts["config"] = {"path": str(path), "recipe": str(recipe), "class": config_class.__name__}
    config, wrong = read_config(config_class, path, overrides)
    for problem in wrong:
        found.block(problem, "the configuration has errors")
    if config is not None:
        facts["output_dir"] = str(config.trainer.output_dir)
        facts["free_disk_gb"] = free_disk_gb(config.trainer.output_dir)
        model = _check_model(config, found)
        run_sh = _stage_command(recipe, path)
        manifests, facts["manifests"] = _check_manifests(config, model, run_sh, found)
        facts["labels"] = _check_labels(config, model, manifests, found)
        if found.blocking:
            facts["estimates"] = {
                "not_made": f"time, memory and checkpoint size: {'; '.join(dict.fromkeys(found.blocking))}"
            }
        else:
            facts["estimates"], problems, advice = estimate_costs(config, recipe, path, overrides)
            found.problems += problems
            found.advice += advice
    return {**facts, "problems": found.problems, "advice": found.advice}


def check_manifest(path: str) -> tuple[dict[str, Any], list[str], list[str]]:
    """Facts of a manifest, its problems and the advice on it."""
    try:
        facts = _manifest_facts(read_utterances(path), _Limits(WINDOW_SAMPLES / SAMPLE_RATE_HZ))
    except ValueError as error:
        return {"path": path}, [str(error)], []
    count = facts["longer_than_window"]
    advice = [f"{count} utterances are longer than Whisper's 30 s and will be skipped; cut them"] if count else []
    return facts, [], advice


def _check_model(config: Any, found: _Findings) -> PreTrainedConfig | None:
    """The configuration of the teacher, or of the student where there is no teacher."""
    names = {
        "teacher.name": getattr(getattr(config, "teacher", None), "name", None),
        "student.init_from": getattr(getattr(config, "student", None), "init_from", None),
    }
    models: list[PreTrainedConfig] = []
    for key, name in names.items():
        if name is None:
            continue
        try:
            resolved = resolve_model(name)
            models.append(AutoConfig.from_pretrained(resolved))
        except (ValueError, OSError, ImportError) as error:
            reason = str(error)
            if isinstance(error, OSError):  # transformers' own, of several lines
                reason = (
                    f"model {name!r} is neither complete on this disk nor reachable on the Hub; connect to a network, "
                    "or give the folder of a model"
                )
            found.block(f"{key}: {reason}", f"{key}={name} is missing")
            continue
        if not Path(resolved).is_dir() and not any(
            isinstance(try_to_load_from_cache(resolved, file), str) for file in WEIGHT_FILES
        ):
            found.blocking.append(f"the weights of {name} are not here yet; fetch them with `hf download {name}`")
    return models[0] if models else None


def _stage_command(recipe: Path, config: Path) -> str | None:
    """The command of the recipe's first stage, which prepares the data."""
    script = recipe.with_name("run.sh")
    dataset = config.resolve().parent.name if config.name == "config.yaml" else config.stem
    return f"bash {script} {dataset} --corpus-dir DIR --stop-stage 1" if script.is_file() else None


def _limits(config: Any, model: PreTrainedConfig | None) -> _Limits:
    data, teacher = getattr(config, "data", None), getattr(config, "teacher", None)
    window = None
    if model is not None and model.model_type == "whisper":
        own_seconds = model.max_source_positions * SAMPLES_PER_POSITION / SAMPLE_RATE_HZ
        window = getattr(teacher, "window_seconds", None) or own_seconds
    return _Limits(
        window,
        crop_seconds=getattr(data, "crop_seconds", None),
        pads_to_window=getattr(teacher, "grid_seconds", None) is None,
        batch_seconds=getattr(data, "max_batch_seconds", None),
    )


def _check_manifests(
    config: Any, model: PreTrainedConfig | None, run_sh: str | None, found: _Findings
) -> tuple[dict[str, Manifest], dict[str, Any]]:
    data = getattr(config, "data", None)
    limits = _limits(config, model)
    allowed = getattr(data, "max_skipped_fraction", 0.0)
    manifests: dict[str, Manifest] = {}
    facts: dict[str, Any] = {}
    for source in _sources(config):
        name, key, is_trained = source.name, source.manifest_key, source.split != "test"
        try:
            manifests[name] = read_utterances(source.manifest)
        except ValueError as error:
            command = f" (`{run_sh}`)" if run_sh and not Path(source.manifest).exists() and name in SPLITS else ""
            found.problems.append(f"{key}: {error}{command}")
            if is_trained:
                found.blocking.append(f"{key} cannot be read")
            continue
        facts[name] = _manifest_facts(manifests[name], limits if is_trained else limits.without_batches())
        if too_long := facts[name].get("longer_than_window"):
            message = f"{key}: {too_long} utterances are longer than the model's {limits.window_seconds:g} s"
            if too_long > allowed * len(manifests[name]):
                found.problems.append(f"{message}, above data.max_skipped_fraction={allowed}; cut them")
            else:
                found.advice.append(f"{message} and will be skipped; cut them")
        if too_long := facts[name].get("longer_than_batch"):
            found.block(
                f"{key}: {too_long} utterances fill more than data.max_batch_seconds={limits.batch_seconds:g} alone; "
                "raise it",
                "utterances are longer than a batch",
            )
    for source in _sources(config):
        for split in ("dev", "test"):
            if source.split == "train" and source.name in manifests and split in manifests:
                _check_overlap(manifests[source.name], source.manifest_key, manifests[split], split, found)
    return manifests, facts


def _sources(config: Any) -> list[_Source]:
    data, language = getattr(config, "data", None), getattr(getattr(config, "decoding", None), "language", None)
    labels_dir = getattr(data, "labels_dir", None)
    sources = [
        _Source(split, f"data.{split}_manifest", manifest, "data.labels_dir", labels_dir, split, language)
        for split in SPLITS
        if (manifest := getattr(data, f"{split}_manifest", None)) is not None
    ]
    for number, corpus in enumerate(getattr(data, "extra_corpora", None) or []):
        key, spoken = f"data.extra_corpora[{number}]", corpus.language or language
        name, labels = f"train, {key}", (f"{key}.labels_dir", corpus.labels_dir)
        sources.append(_Source(name, f"{key}.train_manifest", corpus.train_manifest, *labels, "train", spoken))
    for number, manifest in enumerate(getattr(data, "extra_manifests", ())):
        key = f"data.extra_manifests[{number}]"
        sources.append(_Source(f"train, {key}", key, manifest, "", None, "train", None))
    return sources


def _manifest_facts(manifest: Manifest, limits: _Limits) -> dict[str, Any]:
    seconds = manifest.durations_seconds
    facts = {
        "path": str(manifest.path),
        "num_utterances": len(manifest),
        "hours": round(float(seconds.sum()) / 3600, 3),
        "shortest_seconds": round(float(seconds.min()), 2),
        "median_seconds": round(float(np.median(seconds)), 2),
        "longest_seconds": round(float(seconds.max()), 2),
    }
    window = limits.window_seconds
    heard = seconds if limits.crop_seconds is None else np.minimum(seconds, limits.crop_seconds)
    if window is not None:
        facts["longer_than_window"] = int((heard > window).sum())
    if limits.batch_seconds is not None:
        padded = heard if window is None or not limits.pads_to_window else np.full(len(heard), window)
        facts["longer_than_batch"] = int((padded > limits.batch_seconds).sum())
    return facts


def _check_overlap(train: Manifest, train_key: str, other: Manifest, split: str, found: _Findings) -> None:
    ids = sorted(set(train.ids) & set(other.ids))
    if ids:
        found.problems.append(
            f"{len(ids)} utterance ids are both in {train_key} and data.{split}_manifest, the first is "
            f"{ids[0]!r}; scores on clips that were trained on mean nothing, split them anew"
        )
    speakers = sorted((set(train.rows["speaker"][:]) & set(other.rows["speaker"][:])) - {None})
    if speakers:
        found.advice.append(
            f"{len(speakers)} speakers are both in {train_key} and data.{split}_manifest, among them "
            f"{', '.join(speakers[:3])}; scores then say little about new speakers"
        )


def _check_labels(
    config: Any, model: PreTrainedConfig | None, manifests: dict[str, Manifest], found: _Findings
) -> dict[str, Any]:
    """Label stores where the configuration has them, else the lengths of the manifests' texts."""
    limit = getattr(model, "max_target_positions", None)
    reads_test = getattr(getattr(config, "evaluation", None), "reference", None) == "teacher"
    facts: dict[str, Any] = {}
    for source in _sources(config):
        manifest = manifests.get(source.name)
        if source.split == "test" and not (reads_test and source.labels_dir is not None):
            continue
        if source.labels_dir is None:
            reads_texts = getattr(model, "model_type", None) == "whisper" and hasattr(config, "decoding")
            if manifest is not None and reads_texts and limit is not None:
                facts[source.name] = _check_texts(config, source, manifest, limit, found)
            continue
        folder, command = source.store, _label_command(config, source)
        try:
            store = LabelStore(folder)
            rows = list(store.rows())
        except (LabelStoreError, json.JSONDecodeError, OSError) as error:
            found.problems.append(f"{source.labels_key}: {error}; make it with `{command}`")
            if source.split != "test":
                found.blocking.append(f"the labels in {folder} are missing")
            continue
        lengths = [len(row.get("token_ids", ())) for row in rows]
        facts[source.name] = {"num_labels": len(rows), "longest_tokens": max(lengths, default=0)}
        if limit is not None:
            facts[source.name]["over_limit"] = _count_long(lengths, limit, f"labels in {folder}", 0.0, found)
        for target, setting in _stored_targets(config, source).items():
            if target not in store.header.get("targets", ()):
                lacking = f"{folder} holds no {target.replace('_', ' ')}"
                found.block(
                    f"{lacking}, which {setting} reads; label into another folder with `{command}`, or take that out",
                    lacking,
                )
        if manifest is not None:
            missing = len(set(manifest.ids) - {key for row in rows for key in clip_ids(row)})
            if missing == len(manifest):
                found.block(
                    f"{folder} has a label of no utterance of {source.manifest_key}; make them with `{command}`",
                    f"the labels in {folder} are missing",
                )
            elif missing:
                found.advice.append(
                    f"{missing} utterances of {source.manifest_key} have no label in {folder}; `{command}` adds them"
                )
    return facts


def _check_texts(config: Any, source: _Source, manifest: Manifest, limit: int, found: _Findings) -> dict[str, Any]:
    tokenizer = load_processor(config.teacher.name if config.teacher else str(config.student.init_from)).tokenizer
    tokens = WhisperTokens.from_tokenizer(tokenizer, language=source.language, task=config.decoding.task)
    texts = [text for text in manifest.rows["text"][:] if text]
    if len(texts) < len(manifest):
        found.block(
            f"{len(manifest) - len(texts)} utterances of {source.manifest_key} have no text; set {source.labels_key} "
            "to train on a teacher's labels",
            "texts are missing",
        )
    encoded = tokenizer([f" {text.strip()}" for text in texts], add_special_tokens=False)["input_ids"] if texts else []
    lengths = [len(tokens.prefix) + len(ids) + 1 for ids in encoded]
    name, allowed = f"texts of {source.manifest_key}", config.data.max_skipped_fraction
    return {
        "num_labels": len(texts),
        "longest_tokens": max(lengths, default=0),
        "over_limit": _count_long(lengths, limit, name, allowed, found),
    }


def _count_long(lengths: list[int], limit: int, name: str, allowed_fraction: float, found: _Findings) -> int:
    count = sum(length > limit for length in lengths)
    if count > allowed_fraction * len(lengths):
        found.block(
            f"{count} {name} are longer than the model's {limit} tokens, the longest has {max(lengths)}; cut the clips "
            "or take these out of the manifest",
            "labels are too long",
        )
    elif count:
        found.advice.append(f"{count} {name} are longer than the model's {limit} tokens and will be skipped")
    return count


def _stored_targets(config: Any, source: _Source) -> dict[str, str]:
    """What a training reads of a label store beside the text, and the setting that asks for it."""
    teacher = None if source.split == "test" else getattr(config, "teacher", None)
    is_cached, outputs = getattr(teacher, "cache_encoder_states", False), getattr(teacher, "stored_outputs", None)
    targets = {"encoder_states": "teacher.cache_encoder_states=true"} if is_cached else {}
    return targets | ({outputs: f"teacher.stored_outputs={outputs}"} if outputs else {})


def _label_command(config: Any, source: _Source) -> str:
    """The `speechkd label` that makes a label store of this configuration."""
    teacher, decoding = getattr(config, "teacher", None), getattr(config, "decoding", None)
    name = getattr(config.data, "label_teacher", None) or (teacher.name if teacher else "TEACHER")
    words = ["speechkd", "label", "--teacher", name]
    words += ["--manifest", source.manifest, "--output-dir", str(source.store)]
    if targets := _stored_targets(config, source):
        words += ["--targets", "text", *targets]
    if decoding is not None:
        words += ["--language", source.language or "none", "--whisper-task", decoding.task]
        words += ["--max-new-tokens", str(decoding.max_new_tokens)]
        words += ["--timestamps"] if decoding.timestamps else []
    if source.split != "test" and getattr(config.data, "pack", False):
        words += ["--pack"]
    return shlex.join(words)
