"""Probe a frozen encoder on one task of SUPERB: states once on disk, a head for each seed, scores in `metrics.json`."""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from speechkd.data.manifest import read_manifest
from speechkd.doctor import made_on
from speechkd.features_store import FrameStates, store_states, stored_states
from speechkd.files import folder_lock, read_jsonl, write_json, write_jsonl
from speechkd.frame_encoders import fitting_window_seconds, load_frame_encoder
from speechkd.probing import ProbeProtocol, mean_and_deviation
from speechkd.probing_tasks import LABEL_TASKS, SUPERB, Task, TaskData, check_task, read_trials, score_task

logger = logging.getLogger(__name__)

FACTS = ("num_items", "layer")  # of the scores of a run, not averaged: they do not depend on the seed
RUNS_FILE = "probe_runs.jsonl"


def evaluate_probe(
    task: Task,
    model_name: str,
    manifest_path: str | Path,
    output_dir: str | Path,
    *,
    train_manifest: str | Path | None = None,
    dev_manifest: str | Path | None = None,
    trials: str | Path | None = None,
    queries: str | Path | None = None,
    dev_queries: str | Path | None = None,
    features_dir: str | Path | None = None,
    seeds: Sequence[int] = (0,),
    num_steps: int | None = None,
    learning_rate: float | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    max_skipped_fraction: float = 0.01,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Train heads on the states of a frozen encoder and score them; a killed run goes on with what is missing.

    All inputs are checked before the encoder is loaded. States that are on disk are not computed again, seeds that
    are done are not trained again.

    Args:
        task: of SUPERB; what each reads from its manifests is in `speechkd.probing_tasks`.
        model_name: as of `load_frame_encoder`; "log-mel" is the baseline.
        manifest_path: what is scored; of "qbe" the documents.
        output_dir: gets `metrics.json`, and the scores of each seed as they come.
        train_manifest: what heads learn from; all tasks but "qbe" need it.
        dev_manifest: by which the best head is kept; the last one if not given, and of "sv".
        trials: of "sv", as of `read_trials`.
        queries: of "qbe", manifest of what is looked for.
        dev_queries: of "qbe", manifest by which the layer is chosen.
        features_dir: where states are kept, which other tasks can share; by default `output_dir/features`.
        seeds: of the heads; "qbe" trains none.
        num_steps: updates of a head; None takes SUPERB's.
        learning_rate: of a head; None takes SUPERB's.
        batch_size: clips encoded together.
        num_workers: processes that decode audio.
        max_skipped_fraction: share of clips that may be unusable, 0 to 1.
        device: where encoder and heads run; by default CUDA if there is one.

    Returns:
        The content of `metrics.json`; `scores` holds mean, deviation and values over the seeds.

    Raises:
        ValueError: a file is missing, lacks what the task needs or is of no use to it, an id is in two manifests, a
            setting is out of range, or the folder holds results of other settings.
        AudioError: too many clips were skipped.
        FloatingPointError: a head's loss is not finite.
    """
    sources = {
        "train": train_manifest,
        "dev": dev_manifest,
        "test": manifest_path,
        "queries": queries,
        "dev_queries": dev_queries,
    }
    given = {name: Path(source) for name, source in sources.items() if source is not None}
    _check_use(task, {*given, *(["trials"] if trials is not None else [])})
    protocol = _protocol(task, seeds, num_steps, learning_rate)
    data = TaskData(
        **{name: read_manifest(path) for name, path in given.items()},
        trials=None if trials is None else read_trials(trials),
    )
    _check_distinct(data)
    check_task(task, data)
    output_dir = Path(output_dir)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    encoder = load_frame_encoder(model_name, window_seconds=fitting_window_seconds(data.manifests), device=device)
    settings = {
        "task": task,
        "weights_sha256": encoder.identity["weights_sha256"],
        "protocol": None if protocol is None else asdict(protocol),
        "files_sha256": {name: _sha256(path) for name, path in given.items()},
        "trials_sha256": None if trials is None else _sha256(Path(trials)),
    }
    with folder_lock(output_dir):
        runs = _open_runs(output_dir / RUNS_FILE, settings)
        started = time.perf_counter()
        features = Path(features_dir or output_dir / "features")
        stores = [
            store_states(
                encoder,
                manifest,
                features,
                mean=task in LABEL_TASKS,
                batch_size=batch_size,
                num_workers=num_workers,
                max_skipped_fraction=max_skipped_fraction,
                device=device,
            )
            for manifest in data.manifests
        ]
        states = stored_states(stores)
        states_seconds = time.perf_counter() - started
        scored = _run_seeds(
            output_dir / RUNS_FILE,
            runs,
            seeds,
            lambda seed: score_task(task, states, data, protocol, seed=seed, device=device),
        )
        scores = [run["scores"] for run in scored]
        metrics = {
            "task": task,
            "model": model_name,
            "revision": encoder.identity["revision"],
            "weights_sha256": encoder.identity["weights_sha256"],
            "num_layers": encoder.num_layers,
            "width": encoder.width,
            "protocol": settings["protocol"],
            "seeds": list(seeds),
            "scores": mean_and_deviation([_without_facts(run) for run in scores]),
            **{name: scores[0][name] for name in FACTS if name in scores[0]},
            "num_skipped": _num_without_states(data, states),
            "manifests": {name: str(path) for name, path in given.items()},
            "trials": None if trials is None else str(trials),
            "features_dir": str(features),
            "states_seconds": states_seconds,
            "head_seconds": [run["seconds"] for run in scored],
            **made_on(device),
        }
        write_json(output_dir / "metrics.json", metrics)
    return metrics


def _check_use(task: Task, given: set[str]) -> None:
    """Refuse files that a task would not read. What it lacks is for `check_task` to say."""
    used = {"test", "train", "dev"}
    if task == "qbe":
        used = {"test", "queries", "dev_queries"}
    elif task == "sv":
        used = {"test", "train", "trials"}
    useless = sorted(given - used)
    if useless:
        names = {"train": "--train-manifest", "dev": "--dev-manifest", "dev_queries": "--dev-queries"}
        shown = " and ".join(names.get(name, f"--{name}") for name in useless)
        raise ValueError(f"task {task} does not use {shown}; leave out, or choose another task")


def _protocol(
    task: Task, seeds: Sequence[int], num_steps: int | None, learning_rate: float | None
) -> ProbeProtocol | None:
    """SUPERB's protocol with what was asked for; None where nothing is trained."""
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds must be different numbers of 0 or more, one at least, got {list(seeds)}")
    changes: dict[str, Any] = {}
    if num_steps is not None:
        changes["num_steps"] = num_steps
    if learning_rate is not None:
        changes["learning_rate"] = learning_rate
    if task == "qbe":
        if changes or len(seeds) > 1:
            raise ValueError(
                f"task qbe trains nothing, so {len(seeds)} seeds and {changes} change nothing; leave --seeds, "
                "--num-steps and --learning-rate out"
            )
        return None
    return replace(SUPERB[task], **changes)


def _check_distinct(data: TaskData) -> None:
    """States are found by id, and what was learnt from is no test."""
    owners: dict[str, Path] = {}
    for manifest in data.manifests:
        for key in manifest.ids:
            if key in owners:
                raise ValueError(
                    f"utterance {key!r} is in {owners[key]} and in {manifest.path}; give manifests of different clips, "
                    "with different ids"
                )
            owners[key] = manifest.path


def _open_runs(path: Path, settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Seed to what was kept of its run; the file begins with the settings of all of them.

    Raises:
        ValueError: they are not these.
    """
    rows = read_jsonl(path)
    if not rows:
        write_jsonl(path, [settings])
        return {}
    changed = [key for key in settings if rows[0].get(key) != settings[key]]
    if changed:
        raise ValueError(
            f"{path.parent} holds results of other settings: "
            + "; ".join(f"{key} was {rows[0].get(key)}, now {settings[key]}" for key in changed)
            + f". Choose another output folder, or remove {path.name} there"
        )
    return {row["seed"]: row for row in rows[1:]}


def _run_seeds(
    path: Path,
    runs: Mapping[int, dict[str, Any]],
    seeds: Sequence[int],
    score: Callable[[int], dict[str, float]],
) -> list[dict[str, Any]]:
    """Rows of all seeds in order; each is written as it comes."""
    done = []
    for seed in seeds:
        if seed in runs:
            done.append(runs[seed])
            continue
        started = time.perf_counter()
        scores = score(seed)
        row = {"seed": seed, "scores": scores, "seconds": time.perf_counter() - started}
        write_jsonl(path, [*read_jsonl(path), row])
        logger.info("seed %d: %s", seed, ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
        done.append(row)
    return done


def _without_facts(scores: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in scores.items() if name not in FACTS}


def _num_without_states(data: TaskData, states: FrameStates) -> dict[str, int]:
    """Clips of each manifest that were skipped; those without any are left out."""
    counts: Counter[str] = Counter()
    for manifest in data.manifests:
        counts[str(manifest.path)] += sum(key not in states for key in manifest.ids)
    return {path: count for path, count in counts.items() if count}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
