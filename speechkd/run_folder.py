"""The folder of a training run: one training at a time, and none again that is finished."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from speechkd.config import save_config
from speechkd.doctor import made_on
from speechkd.files import folder_lock

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"  # facts of the training; written last, so that it says the training is finished


@contextmanager
def training_run(arguments: TrainingArguments, resolved_yaml: str) -> Iterator[bool]:
    """Hold the run folder while a recipe trains, with `config.yaml` in it; the main process alone writes.

    Args:
        arguments: of the trainer; `output_dir` is the run folder.
        resolved_yaml: of `parse_config`.

    Yields:
        Whether the folder holds a finished training already, which is also logged.

    Raises:
        ValueError: another training runs in the folder, or its configuration is another one.
    """
    output_dir = Path(str(arguments.output_dir))
    is_main = arguments.process_index == 0
    with folder_lock(output_dir) if is_main else nullcontext():
        if is_main:
            save_config(resolved_yaml, output_dir)
        is_finished = (output_dir / RUN_FILE).exists()
        if is_finished:
            logger.info("%s holds a finished training", output_dir)
        yield is_finished


def training_facts(
    arguments: TrainingArguments,
    *,
    license: str | None,
    train_manifest: str,
    train_utterances: int,
    train_seconds: float,
    loss: str,
) -> dict[str, Any]:
    """Facts of a training that every recipe keeps in `run.json`; the model card reads them.

    Args:
        arguments: of the trainer.
        license: of the student's weights; None where it is not known.
        train_manifest: manifests, separated by commas.
        train_utterances: what is left of them.
        train_seconds: their audio.
        loss: the objective in words.
    """
    return {
        "license": license,
        "train_manifest": train_manifest,
        "train_utterances": train_utterances,
        "train_hours": train_seconds / 3600,
        "synthetic": "synthetic" in train_manifest,
        "loss": loss,
        "learning_rate": arguments.learning_rate,
        "seed": arguments.seed,
        **made_on(arguments.device),
    }
