"""What SEGUE's student understands, against the same encoder untouched and against text, with the same heads.

Launch: python recipes/segue/understand.py --config FILE [--section.key value ...]
Writes understanding.json, understanding_hypotheses.jsonl and pictures into the run folder. The text cascade reads the
transcripts of `data.labels_dir`, or the manifest's own text where there is none, with the sentence encoder.
"""

import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from comparison import Split, System, check_fits, compare, read_split
from heads import Machine, speech_vectors
from sentence_corpora import open_states
from tabulate_understanding import format_table
from torch import Tensor
from understanding_tasks import CTC_TASKS, UnderstandingConfig

from speechkd.cli import run_command
from speechkd.config import parse_config
from speechkd.data.loader import report_skipped
from speechkd.doctor import made_on
from speechkd.estimate import load_recipe, recipe_config_class
from speechkd.files import write_json
from speechkd.labels.embeddings import manifest_texts
from speechkd.models.segue import SegueEncoder
from speechkd.models.speech_embedder import load_segue
from speechkd.teachers_text import SentenceTeacher, load_sentence_teacher

logger = logging.getLogger(__name__)

STUDENT, UNTOUCHED, CASCADE = "SEGUE", "untouched encoder", "text cascade"
TEXT_BATCH = 64


def text_vectors(teacher: SentenceTeacher, texts: Iterable[tuple[str, str | None]]) -> tuple[dict[str, Tensor], int]:
    """Embeddings of transcripts by id, zeros for an empty or a missing one; how many of those there are."""
    given = dict(texts)
    usable = [(key, text) for key, text in given.items() if text is not None and text.strip()]
    vectors = {key: torch.zeros(teacher.dim) for key in given}
    num_cut = 0
    for start in range(0, len(usable), TEXT_BATCH):
        keys, batch = zip(*usable[start : start + TEXT_BATCH], strict=True)
        num_cut += sum(length > teacher.max_tokens for length in teacher.num_tokens(batch))
        vectors |= dict(zip(keys, teacher(batch).cpu(), strict=True))
    if num_cut:
        logger.warning(
            "%d transcripts are longer than the teacher's %d tokens and were cut", num_cut, teacher.max_tokens
        )
    return vectors, len(given) - len(usable)


def _speech_system(
    name: str, load: Callable[[], SegueEncoder], splits: Sequence[Split], facts: dict[str, Any]
) -> tuple[System, list[dict[str, Any]]]:
    """An encoder with its vectors of all clips; rows of the clips that were skipped."""
    started = time.perf_counter()
    student = load()
    vectors: dict[str, Tensor] = {}
    skipped: list[dict[str, Any]] = []
    for split in splits:
        of_split, skipped_here = speech_vectors(student, split.manifest)
        vectors |= of_split
        skipped += skipped_here
    seconds = time.perf_counter() - started
    return System(name, vectors, load, {**facts, "dim": student.embedding_dim, "encode_seconds": seconds}), skipped


def _cascade(config: Any, sources: dict[str, str]) -> System | None:
    """Transcripts through the sentence encoder; None where no clip has one."""
    started = time.perf_counter()
    labels_dir = config.data.labels_dir
    texts = [pair for split, source in sources.items() for pair in manifest_texts(source, config.data.labels_of(split))]
    if not any(text and text.strip() for _, text in texts):
        logger.warning("no clip has a transcript, so there is no text cascade; set data.labels_dir")
        return None
    teacher = load_sentence_teacher(
        config.teacher.name,
        pooling=config.teacher.pooling,
        normalize=config.teacher.normalize,
        device=config.trainer.device,
    )
    vectors, num_empty = text_vectors(teacher, texts)
    if num_empty:
        logger.warning("%d of %d clips have no transcript; the cascade gets zeros for them", num_empty, len(texts))
    return System(
        CASCADE,
        vectors,
        None,
        {
            "teacher": config.teacher.name,
            "transcripts": "the manifest's text" if labels_dir is None else str(labels_dir),
            "num_without_transcript": num_empty,
            "dim": teacher.dim,
            "encode_seconds": time.perf_counter() - started,
        },
    )


def _loader(name: str, task: UnderstandingConfig, device: torch.device, **arguments: Any) -> Callable[[], SegueEncoder]:
    def load() -> SegueEncoder:
        student = load_segue(name, **arguments)
        if task.vectors == "pooled" and student.projection is not None:
            student.projection, student.embedding_dim = None, student.config.hidden_size
        return student.to(device)  # type: ignore[arg-type]

    return load


def understand(config: Any) -> dict[str, Any]:
    """Compare the systems that a run of this recipe gives, and write understanding.json beside its student.

    Args:
        config: resolved `SegueConfig`.

    Returns:
        What understanding.json holds.

    Raises:
        ValueError: the run has no student yet, or no `understanding`; see `compare`.
    """
    started = time.perf_counter()
    task: UnderstandingConfig | None = config.understanding
    output_dir = Path(config.trainer.output_dir)
    if task is None:
        raise ValueError("understanding is null: there is nothing to learn on the encoder; set understanding.task")
    if not (output_dir / "student").is_dir():
        raise ValueError(f"{output_dir} has no student to understand with; train it first")
    sources = {
        "train": task.train_manifest or config.data.train_manifest,
        "test": task.test_manifest or config.data.test_manifest,
    }
    splits = {name: read_split(task, source) for name, source in sources.items()}
    check_fits(task, splits["train"])
    shape = {"num_frozen_layers": config.student.num_frozen_layers, "grid_seconds": config.student.grid_seconds}
    folder, device = str(output_dir / "student"), config.trainer.device
    student, skipped = _speech_system(
        STUDENT, _loader(folder, task, device, **shape), list(splits.values()), {"encoder": folder}
    )
    num_clips = sum(len(split.ids) for split in splits.values())
    report_skipped(skipped, num_clips, output_dir / "understanding", config.data.max_skipped_fraction)
    dropped = {row["id"] for row in skipped}
    train, test = (split.without(dropped) for split in splits.values())
    name = config.student.name
    load = _loader(name, task, device, num_layers=config.student.num_layers, **shape)
    untouched, _ = _speech_system(UNTOUCHED, load, [train, test], {"encoder": name})
    systems = [student, untouched, *filter(None, [_cascade(config, sources)])]
    machine = Machine(config.trainer.use_cpu, config.trainer.bf16, config.data.num_workers)
    states = None
    trains_on_clips = "fine_tune" in task.modes or task.task in CTC_TASKS
    if trains_on_clips and config.student.lower_states_dir is not None and task.train_manifest is None:
        # one store for both encoders: SEGUE left the frozen layers as they were
        states = open_states(Path(config.student.lower_states_dir) / "train", load(), name)
    outcome = compare(task, systems, train, test, output_dir=output_dir, states=states, machine=machine)
    return {
        "task": task.task,
        "config": asdict(task),
        "manifests": {name: str(source) for name, source in sources.items()},
        "num_train": len(train.ids),
        "num_test": len(test.ids),
        "num_skipped": len(skipped),
        "systems": {system.name: system.facts for system in systems},
        **outcome,
        **made_on(device),
        "wall_seconds": time.perf_counter() - started,
    }


def main(argv: list[str] | None = None) -> None:
    # under a private name: other recipes have a train.py too
    recipe = load_recipe(Path(__file__).with_name("train.py"))
    config: Any = parse_config(recipe_config_class(recipe), argv)[0]
    output_dir = Path(config.trainer.output_dir)
    arguments = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "recipes/segue/understand.py", *arguments])
    write_json(output_dir / "understanding.json", {**understand(config), "command": command})
    print(format_table([output_dir]))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_command(main)
