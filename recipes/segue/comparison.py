"""The same heads, seeds and clips on several ways from a clip to a vector: runs, scores, pictures and hypotheses."""

import logging
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from frame_heads import fit_ctc, read_strings
from heads import Machine, fine_tune, fit_heads, fit_ridge, predicted_labels, speech_vectors
from torch import Tensor, nn
from understanding_tasks import (
    CTC_TASKS,
    MAIN_SCORES,
    Labels,
    UnderstandingConfig,
    class_targets,
    few_positions,
    k_shot_label,
    label_classes,
    names_in_order,
    read_labels,
    score_labels,
)

from speechkd.data.hub import read_utterances
from speechkd.data.manifest import Manifest
from speechkd.files import write_jsonl
from speechkd.labels.teacher_cache import LabelStore
from speechkd.metrics.classification import confusion_counts
from speechkd.metrics.classification_plots import plot_confusion, plot_k_shot
from speechkd.metrics.slu import NO_VALUE
from speechkd.models.segue import SegueEncoder

logger = logging.getLogger(__name__)


@dataclass
class System:
    """One way from a clip to a vector.

    Args:
        name: for tables.
        vectors: of all clips by id, each (dim,), on the CPU.
        load: the encoder before it learns, for fine-tuning; None cannot be fine-tuned.
        facts: for understanding.json.
    """

    name: str
    vectors: dict[str, Tensor]
    load: Callable[[], SegueEncoder] | None
    facts: dict[str, Any]


@dataclass
class Split:
    """Clips to learn from or to score on, with their labels in the manifest's order.

    Args:
        manifest: the clips.
        labels: of each.
    """

    manifest: Manifest
    labels: list[Labels]

    @property
    def ids(self) -> list[str]:
        """Ids in the manifest's order."""
        return self.manifest.ids

    def without(self, skipped: set[str]) -> "Split":
        """The clips that could be decoded."""
        kept = [index for index, key in enumerate(self.ids) if key not in skipped]
        return Split(self.manifest.select(kept), [self.labels[index] for index in kept])


@dataclass(frozen=True)
class Run:
    """One fitted set of heads, and what it says of the test clips.

    Args:
        mode: as of `UnderstandingConfig`.
        k: items of each class; None takes all.
        seed: None where nothing is drawn.
        num_train: clips it learnt from.
        predicted: labels of each test clip.
    """

    mode: str
    k: int | None
    seed: int | None
    num_train: int
    predicted: list[Labels]


def read_split(config: UnderstandingConfig, source: str) -> Split:
    """A manifest with the labels of the task."""
    manifest = read_utterances(source)
    labels = read_labels(manifest, config)
    return Split(manifest, [labels[key] for key in manifest.ids])


def check_fits(config: UnderstandingConfig, train: Split) -> None:
    """Refuse what does not fit the clips to learn from before any of them is encoded.

    Raises:
        ValueError: a k is above a class's size, see `few_positions`, or a clip is longer than a batch may be.
    """
    if "k_shot" in config.modes:
        few_positions(config, train.ids, train.labels, max(config.k), config.seeds[0])
    trains_on_batches = "fine_tune" in config.modes or config.task in CTC_TASKS
    durations = train.manifest.durations_seconds
    if trains_on_batches and durations.max() > config.fine_tune_batch_seconds:
        raise ValueError(
            f"utterance {train.ids[int(durations.argmax())]!r} lasts {durations.max():.1f} s, longer than "
            f"understanding.fine_tune_batch_seconds={config.fine_tune_batch_seconds:g}; raise it"
        )


def compare(
    config: UnderstandingConfig,
    systems: Sequence[System],
    train: Split,
    test: Split,
    *,
    output_dir: Path,
    machine: Machine,
    states: LabelStore | None = None,
) -> dict[str, Any]:
    """Fit the same heads with the same seeds and clips on each system; write pictures and hypotheses.

    Args:
        config: task and modes.
        systems: each with a vector of every clip.
        train: clips to learn from.
        test: clips to score on.
        output_dir: folder of what is written.
        machine: where encoders learn.
        states: label store with the states of the encoders' frozen layers, for fine-tuning; None runs them.

    Returns:
        `results`, one for each system, mode and k with its runs, mean and deviation; `labels`; `unseen`, how many test
        clips have a class that no training clip has, by label.

    Raises:
        ValueError: a clip has no vector or one that is not finite, or see the fitting functions.
    """
    check_fits(config, train)
    classes: dict[str, list[str]] = {}
    unseen: dict[str, int] = {}
    if config.task not in CTC_TASKS:
        classes = label_classes(config, train.labels)
        targets, unseen = _targets(config, train, test, classes)
    names = names_in_order(train.labels) if config.task == "entities" else list(classes)
    for picture in output_dir.glob("understanding_*.png"):
        picture.unlink()  # of an earlier call, which may have had other modes
    results: list[dict[str, Any]] = []
    hypotheses = [{"id": key, "gold": gold, "predicted": {}} for key, gold in zip(test.ids, test.labels, strict=True)]
    for system in systems:
        if config.task in CTC_TASKS:
            runs = _ctc_runs(config, system, train, test, output_dir, states, machine)
        else:
            runs = _runs(config, system, train, test, classes, targets, output_dir, states, machine)
        for group in _grouped(runs):
            result = _scored(config, system.name, group, test, names)
            results.append(result)
            place = ", ".join(filter(None, (system.name, result["mode"], f"k={result['k']}" if result["k"] else "")))
            for row, predicted in zip(hypotheses, group[0][0].predicted, strict=True):
                row["predicted"][place] = predicted
            _draw_confusion(config, place, group[0][0], train, test, output_dir)
            logger.info("%s: %s", place, _summary(result, MAIN_SCORES[config.task]))
    write_jsonl(output_dir / "understanding_hypotheses.jsonl", hypotheses)
    _draw_k_shot(config, results, train, output_dir)
    return {"results": results, "labels": {name: len(values) for name, values in classes.items()}, "unseen": unseen}


def _targets(
    config: UnderstandingConfig, train: Split, test: Split, classes: dict[str, list[str]]
) -> tuple[Tensor, dict[str, int]]:
    if config.task == "regression":
        (name,) = classes
        return torch.tensor([[float(labels[name])] for labels in train.labels]), {}
    targets, _ = class_targets(train.labels, classes, for_training=True)
    return targets, class_targets(test.labels, classes)[1]


def _runs(
    config: UnderstandingConfig,
    system: System,
    train: Split,
    test: Split,
    classes: dict[str, list[str]],
    targets: Tensor,
    output_dir: Path,
    states: LabelStore | None,
    machine: Machine,
) -> Iterator[Run]:
    learnt_from, scored_on = _stack(system, train.ids), _stack(system, test.ids)
    num_classes = [len(values) for values in classes.values() if values]

    def probe(seed: int, positions: Sequence[int] | None = None) -> nn.ModuleList:
        some = slice(None) if positions is None else list(positions)
        if not num_classes:
            return fit_ridge(learnt_from[some], targets[some], [], config.ridge_alpha)
        return fit_heads(learnt_from[some], targets[some], num_classes, config, seed)

    for mode in config.modes:
        if mode == "ridge":
            heads = fit_ridge(learnt_from, targets, num_classes, config.ridge_alpha)
            yield Run(mode, None, None, len(train.ids), predicted_labels(heads, scored_on, classes))
        elif mode == "frozen":
            for seed in config.seeds:
                yield Run(mode, None, seed, len(train.ids), predicted_labels(probe(seed), scored_on, classes))
        elif mode == "k_shot":
            for k in config.k:
                for seed in config.seeds:
                    positions = few_positions(config, train.ids, train.labels, k, seed)
                    predicted = predicted_labels(probe(seed, positions), scored_on, classes)
                    yield Run(mode, k, seed, len(positions), predicted)
        elif system.load is not None:
            for seed in config.seeds:
                model = fine_tune(
                    system.load(),
                    probe(seed) if config.fine_tune_start == "probe" else None,
                    train.manifest,
                    targets,
                    classes,
                    config,
                    output_dir=_training_dir(output_dir, system, mode, seed),
                    seed=seed,
                    states=states,
                    machine=machine,
                )
                vectors, _ = speech_vectors(model.encoder, test.manifest)
                after = _stack(System(system.name, vectors, None, {}), test.ids)
                yield Run(mode, None, seed, len(train.ids), predicted_labels(model.heads.cpu(), after, classes))


def _ctc_runs(
    config: UnderstandingConfig,
    system: System,
    train: Split,
    test: Split,
    output_dir: Path,
    states: LabelStore | None,
    machine: Machine,
) -> Iterator[Run]:
    if system.load is None:
        return  # text has no frames
    for mode in config.modes:
        for seed in config.seeds:
            model, alphabet = fit_ctc(
                system.load(),
                train.manifest,
                train.labels,
                config,
                mode,
                output_dir=_training_dir(output_dir, system, mode, seed),
                seed=seed,
                states=states,
                machine=machine,
            )
            predicted = read_strings(model, alphabet, test.manifest, config)
            yield Run(mode, None, seed, len(train.ids), predicted)


def _training_dir(output_dir: Path, system: System, mode: str, seed: int) -> Path:
    return output_dir / "understanding" / f"{_file_name(system.name)}-{mode}-seed{seed}"


def _stack(system: System, ids: Sequence[str]) -> Tensor:
    """Vectors of these clips, (clips, dim)."""
    missing = [key for key in ids if key not in system.vectors]
    if missing:
        raise ValueError(f"{system.name} has no vector of {len(missing)} of {len(ids)} clips, {missing[0]!r} first")
    vectors = torch.stack([system.vectors[key] for key in ids]).float()
    broken = (~vectors.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
    if broken:
        raise ValueError(
            f"{system.name} gives {len(broken)} of {len(ids)} clips a vector with NaN or infinite values, "
            f"{ids[broken[0]]!r} first; look at these clips and at the model's weights"
        )
    return vectors


def _grouped(runs: Iterable[Run]) -> Iterator[list[tuple[Run, float]]]:
    """Runs of one mode and k together, in the order they come, with the wall seconds of each."""
    group: list[tuple[Run, float]] = []
    started = time.perf_counter()
    for run in runs:
        seconds = time.perf_counter() - started
        if group and (run.mode, run.k) != (group[0][0].mode, group[0][0].k):
            yield group
            group = []
        group.append((run, seconds))
        started = time.perf_counter()
    if group:
        yield group


def _scored(
    config: UnderstandingConfig, system: str, group: list[tuple[Run, float]], test: Split, names: list[str]
) -> dict[str, Any]:
    runs: list[dict[str, Any]] = []
    for run, _ in group:
        scores = score_labels(config, test.labels, run.predicted, names)
        # a correlation may not exist, and JSON has no word for that but null
        runs.append(
            {"seed": run.seed, **{key: value if math.isfinite(value) else None for key, value in scores.items()}}
        )
    values = {key: [run[key] for run in runs if run[key] is not None] for key in runs[0] if key != "seed"}
    first = group[0][0]
    return {
        "system": system,
        "mode": first.mode,
        "k": first.k,
        "num_train": first.num_train,
        "mean": {key: statistics.mean(several) if several else None for key, several in values.items()},
        "deviation": {key: statistics.stdev(several) if len(several) > 1 else None for key, several in values.items()},
        "runs": runs,
        "wall_seconds": sum(seconds for _, seconds in group),
    }


def _summary(result: dict[str, Any], score: str) -> str:
    mean, deviation = result["mean"][score], result["deviation"][score]
    if mean is None:
        return f"{score.replace('_', ' ')} does not exist"
    return f"{score.replace('_', ' ')} {mean:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


def _draw_confusion(
    config: UnderstandingConfig, place: str, run: Run, train: Split, test: Split, output_dir: Path
) -> None:
    if config.task in ("regression", *CTC_TASKS) or run.mode == "k_shot":
        return
    name = k_shot_label(config, train.labels)
    truth, guess = ([labels.get(name, NO_VALUE) for labels in side] for side in (test.labels, run.predicted))
    counts, classes = confusion_counts(truth, guess)
    path = output_dir / f"understanding_confusion_{_file_name(place)}.png"
    plot_confusion(
        counts, classes, path, title=f"{name} by {place}" + ("" if run.seed is None else f", seed {run.seed}")
    )


def _draw_k_shot(config: UnderstandingConfig, results: list[dict[str, Any]], train: Split, output_dir: Path) -> None:
    score = MAIN_SCORES[config.task]
    curves: dict[str, dict[int, list[float]]] = {}
    for result in results:
        values = [run[score] for run in result["runs"] if run[score] is not None]
        if result["mode"] == "k_shot" and values:
            curves.setdefault(result["system"], {})[result["k"]] = values
    if not curves:
        return
    unit = "" if config.task == "regression" else ", %"
    plot_k_shot(
        curves,
        output_dir / "understanding_k_shot.png",
        score_name=score.replace("_", " ") + unit,
        title=f"learnt from k clips of each {k_shot_label(config, train.labels).replace('_', ' ')}",
    )


def _file_name(text: str) -> str:
    return re.sub(r"\W+", "_", text).strip("_").lower()
