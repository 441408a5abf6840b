"""A recipe's code from outside: find it, and measure in a child process what a training step of it costs.

Each recipe's `train.py` defines exactly one dataclass whose name ends in `Config` and that has a `trainer` field, and a
`build_trainer(config)` that returns the trainer, alone or first of several values. That is how a recipe is found: no
list of recipes exists.
"""

import contextlib
import dataclasses
import importlib.util
import json
import math
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import torch
from transformers import TrainerCallback

from speechkd.checkpoints import checkpoint_bytes
from speechkd.config import parse_config
from speechkd.doctor import free_disk_gb, memory_gb
from speechkd.files import write_json


def find_recipe(config: Path) -> Path:
    """The `train.py` that a configuration belongs to.

    Args:
        config: a YAML beside it, or `exp/<method>/<dataset>/config.yaml` with `recipes/<method>` in the current folder.

    Raises:
        ValueError: the configuration does not exist, or there is no `train.py`; says where it was looked for.
    """
    if not config.is_file():
        raise ValueError(f"configuration {config} does not exist; the recipes' are recipes/<method>/<dataset>.yaml")
    places = [config.with_name("train.py")]
    if config.name == "config.yaml":
        places.append(Path("recipes") / config.resolve().parent.parent.name / "train.py")
    for place in places:
        if place.is_file():
            return place
    raise ValueError(
        f"no recipe for {config}: there is no {' and no '.join(map(str, places))}; keep the YAML in its recipe's "
        "folder, or run this where recipes/ is"
    )


def load_recipe(path: Path) -> ModuleType:
    """Import a recipe's `train.py` under a private name; it may import what lies beside it.

    Raises:
        ImportError: it, or what it imports, cannot be imported.
    """
    name = f"_speechkd_recipe_{path.resolve().parent.name}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ImportError(f"recipe {path} cannot be imported: {error}; install what it needs") from error
    finally:
        sys.path.remove(folder)
    return module


def recipe_config_class(module: ModuleType) -> type:
    """The configuration class of a recipe, found by the convention of this module.

    Raises:
        ValueError: there is none, or more than one.
    """
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and value.__module__ == module.__name__
        and value.__name__.endswith("Config")
        and dataclasses.is_dataclass(value)
        and "trainer" in {field.name for field in dataclasses.fields(value)}
    ]
    if len(classes) != 1:
        names = ", ".join(sorted(found.__name__ for found in classes)) or "none"
        raise ValueError(
            f"{module.__file__} must define one dataclass whose name ends in Config, with a field `trainer`; it has "
            f"{names}"
        )
    return classes[0]


def estimate_costs(
    config: Any, recipe: Path, path: Path, overrides: Sequence[str]
) -> tuple[dict[str, Any], list[str], list[str]]:
    """What training costs, from a trial of the costliest batch that leaves no trace.

    A recipe that decodes its clips once before training does so here too, if the run folder lacks the result.

    Args:
        config: as `parse_config` gave it.
        recipe: its `train.py`.
        path: its YAML.
        overrides: `--section.key value` arguments.

    Returns:
        Estimates in the units of their names, GB = 1e9 bytes; problems; advice.
    """
    with tempfile.TemporaryDirectory() as folder:
        run_dir, result_path = Path(folder) / "run", Path(folder) / "result.json"
        for check in Path(config.trainer.output_dir).glob("**/audio_check.json"):  # else every clip is decoded again
            copy = run_dir / check.relative_to(config.trainer.output_dir)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(check, copy)
        settings = {
            "output_dir": run_dir,
            "gradient_accumulation_steps": 2,  # two batches, and no optimizer step after the first
            "dataloader_num_workers": 0,
            "report_to": "none",
        }
        arguments = [
            "--config",
            str(path),
            *overrides,
            *(f"--trainer.{key}={value}" for key, value in settings.items()),
        ]
        child = subprocess.run(
            [sys.executable, "-m", "speechkd.estimate", str(recipe), str(result_path), *arguments],
            capture_output=True,
            text=True,
        )
        if child.returncode != 0 or not result_path.is_file():
            return _failed_trial(child)
        trial = json.loads(result_path.read_text(encoding="utf-8"))
    return _summarise(config, trial)


def _failed_trial(child: subprocess.CompletedProcess[str]) -> tuple[dict[str, Any], list[str], list[str]]:
    if child.returncode == -signal.SIGKILL:
        reason = "the system ended it, as it does when memory runs out; lower data.max_batch_seconds"
    else:
        reason = (child.stderr.strip().splitlines() or [f"it ended with code {child.returncode}"])[-1]
    return (
        {"not_made": f"time, memory and checkpoint size: the trial failed, {reason}"},
        [f"a trial of the largest batch failed: {reason}"],
        [],
    )


def _summarise(config: Any, trial: dict[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """From the trial to the whole run."""
    args = config.trainer
    loading_seconds = trial["loading_seconds"] if args.dataloader_num_workers == 0 else 0.0
    step_seconds = args.gradient_accumulation_steps * (trial["batch_seconds"] + loading_seconds)
    steps_per_epoch = math.ceil(trial["batches_per_epoch"] / args.gradient_accumulation_steps)
    total_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    memory_bytes = trial["peak_bytes"] + trial["optimizer_bytes"] + trial["missing_gradient_bytes"]
    kept = _checkpoints_kept(args, total_steps, steps_per_epoch)
    checkpoints_gb = kept * trial["checkpoint_bytes"] / 1e9
    estimates = {
        "device": trial["device"],
        "seconds_per_step": step_seconds,
        "steps_per_epoch": steps_per_epoch,
        "minutes_per_epoch": step_seconds * steps_per_epoch / 60,
        "total_steps": total_steps,
        "hours_in_all": step_seconds * total_steps / 3600,
        "peak_memory_gb": memory_bytes / 1e9,
        "device_memory_gb": trial["device_bytes"] / 1e9,
        "checkpoint_gb": trial["checkpoint_bytes"] / 1e9,
        "checkpoints_kept": kept,
        "checkpoints_gb": checkpoints_gb,
        "basis": (
            f"estimated from one forward and backward pass of the largest batch ({trial['batch_size']} utterances, "
            f"{trial['padded_seconds']:g} padded seconds) in one process, without optimizer step, evaluation and "
            f"saving; memory is the peak of {trial['memory_basis']} plus two float32 values a trainable parameter for "
            "the optimizer"
        ),
    }
    problems, advice = [], []
    needed_gb, device_gb, free_gb = (n / 1e9 for n in (memory_bytes, trial["device_bytes"], trial["free_bytes"]))
    if needed_gb > device_gb:
        problems.append(
            f"training needs about {needed_gb:.1f} GB of memory and {trial['device']} has {device_gb:.1f} GB; lower "
            "data.max_batch_seconds"
        )
    elif needed_gb > free_gb:
        advice.append(
            f"training needs about {needed_gb:.1f} GB of memory and {free_gb:.1f} GB are free; end other programs, or "
            "lower data.max_batch_seconds"
        )
    free_disk = free_disk_gb(args.output_dir)
    if checkpoints_gb > free_disk:
        problems.append(
            f"{kept} checkpoints take about {checkpoints_gb:.1f} GB and {free_disk} GB are free where "
            f"{args.output_dir} is; free some space, or lower trainer.save_total_limit"
        )
    return estimates, problems, advice


def _checkpoints_kept(args: Any, total_steps: int, steps_per_epoch: int) -> int:
    if args.save_strategy == "no":
        return 0
    if args.save_strategy == "epoch":
        steps_per_save = float(steps_per_epoch)
    else:
        steps_per_save = args.save_steps if args.save_steps >= 1 else math.ceil(total_steps * args.save_steps)
    saves = max(1, math.ceil(total_steps / steps_per_save))
    return saves if args.save_total_limit is None else min(saves, args.save_total_limit)


class _Enough(Exception):
    """Ends the trial before the optimizer acts."""


class _TimeSecondBatch(TrainerCallback):
    """Takes the time from the end of the first of two accumulated batches to the end of the second."""

    def __init__(self) -> None:
        self.started = self.seconds = 0.0

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.started = _now()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = _now() - self.started
        raise _Enough


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_step(recipe: Path, arguments: list[str]) -> dict[str, Any]:
    """Build a recipe's trainer and run its costliest batch twice, in a process that does nothing else.

    Args:
        recipe: its `train.py`.
        arguments: of its command line, with an output folder that may be thrown away and two accumulated batches.
    """
    module = load_recipe(recipe)
    config: Any = parse_config(recipe_config_class(module), arguments)[0]
    built = module.build_trainer(config)
    trainer = built[0] if isinstance(built, tuple) else built
    batches_per_epoch = len(trainer.sampler)
    indices, batch, loading_seconds = _costliest_batch(trainer)
    padded_seconds = float(batch["padded_seconds"])
    del batch
    timer = _TimeSecondBatch()
    trainer.add_callback(timer)
    trainer.sampler = [indices, indices]
    with contextlib.suppress(_Enough):
        trainer.train()
    device = trainer.args.device
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device)
        basis = "the memory that torch allocated"
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        memory = memory_gb()
        total, free = (
            round(memory["total_gb"] * 1e9),
            round(memory["free_gb"] * 1e9) + psutil.Process().memory_info().rss,
        )
        basis = "the process's resident memory"
    trainable = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    average = 0 if trainer.args.ema_decay is None else 4 * sum(parameter.numel() for parameter in trainable)
    return {
        "device": str(device),
        "batch_size": len(indices),
        "padded_seconds": padded_seconds,
        "batch_seconds": timer.seconds,
        "loading_seconds": loading_seconds,
        "batches_per_epoch": batches_per_epoch,
        "peak_bytes": peak,
        "optimizer_bytes": 8 * sum(parameter.numel() for parameter in trainable),
        "missing_gradient_bytes": sum(parameter.nbytes for parameter in trainable if parameter.grad is None),
        "device_bytes": total,
        "free_bytes": free,
        "checkpoint_bytes": checkpoint_bytes(trainer.model) + average,
        "memory_basis": basis,
    }


def _costliest_batch(trainer: Any) -> tuple[list[int], dict[str, Any], float]:
    """Indices of the batch with most padded seconds, then most label tokens; the batch; the seconds of loading it."""
    batches = list(trainer.sampler)
    corpora = getattr(trainer.train_dataset, "datasets", [trainer.train_dataset])  # those of a mixture
    durations = _joined([getattr(getattr(corpus, "manifest", None), "durations_seconds", None) for corpus in corpora])
    label_lengths = _joined([getattr(corpus, "label_lengths", None) for corpus in corpora])

    def longest(batch: list[int]) -> float:
        return 0.0 if durations is None else float(durations[batch].max())

    def label_cost(batch: list[int]) -> float:
        return 0.0 if label_lengths is None else len(batch) * float(label_lengths[batch].max())

    def cost(entry: tuple[list[int], dict[str, Any], float]) -> tuple[float, int]:
        labels = entry[1].get("labels")
        return entry[1]["padded_seconds"], 0 if labels is None else labels.numel()

    by_size = sorted(batches, key=lambda batch: (len(batch), longest(batch)))[-2:]
    by_seconds = sorted(batches, key=lambda batch: len(batch) * longest(batch))[-2:]  # where clips are padded alike
    by_labels = sorted(batches, key=label_cost)[-2:]
    return max(_loaded(trainer, [*by_size, *by_seconds, *by_labels]), key=cost)


def _joined(arrays: list[np.ndarray | None]) -> np.ndarray | None:
    """One array of all; None where one is missing."""
    known = [array for array in arrays if array is not None]
    return np.concatenate(known) if known and len(known) == len(arrays) else None


def _loaded(trainer: Any, batches: list[list[int]]) -> Iterator[tuple[list[int], dict[str, Any], float]]:
    for indices in batches:
        started = time.perf_counter()
        batch = trainer.data_collator([trainer.train_dataset[index] for index in indices])
        yield indices, batch, time.perf_counter() - started


def _main(recipe: str, result_path: str, *arguments: str) -> None:
    try:
        result = measure_step(Path(recipe), list(arguments))
    except torch.OutOfMemoryError:
        raise SystemExit("the device has too little memory for it; lower data.max_batch_seconds") from None
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        raise SystemExit(" ".join(str(error).split("\n"))) from error
    write_json(result_path, result)


if __name__ == "__main__":
    _main(*sys.argv[1:])
