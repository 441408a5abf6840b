"""LLaVA-KD: a multimodal language model learns from a larger one with the same tokenizer and visual tokens.

Cai et al. 2024, https://arxiv.org/abs/2410.16236. Launch: python recipes/llava_kd/train.py --config FILE
[--section.key value ...], under torchrun or accelerate too. The stages of the file run one after the other, each from
where the last one ended; a killed run carries on from its last checkpoint.
"""

import copy
import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from transformers import LlavaProcessor, PreTrainedModel, set_seed
from visual_config import LlavaKdConfig, StageConfig, load_teacher, sequence_format
from visual_objective import count_items, loss_terms
from visual_students import new_student

from speechkd.cli import run_command
from speechkd.config import parse_config
from speechkd.data.conversations import Conversations, read_conversations
from speechkd.data.sampler import DurationBatchSampler
from speechkd.data.visual_sequences import EncodedConversations, collate
from speechkd.doctor import made_on
from speechkd.files import atomic_folder, write_json
from speechkd.labels.visual_states import WithTeacherStates, collate_with_states, open_visual_states
from speechkd.models.llava import load_llava, save_llava, train_only
from speechkd.run_folder import training_run
from speechkd.trainer import DistillationArguments, DistillationTrainer

logger = logging.getLogger(__name__)


def stage_arguments(config: LlavaKdConfig, stage: StageConfig) -> DistillationArguments:
    """The trainer's arguments for one stage, whose folder is inside the run folder."""
    arguments = copy.copy(config.trainer)
    arguments.output_dir = str(Path(config.trainer.output_dir) / stage.name)
    arguments.max_steps, arguments.learning_rate = stage.max_steps, stage.learning_rate
    return arguments


def stage_yaml(resolved_yaml: str, number: int) -> str:
    """What decides about a stage: all but the stages after it."""
    values = yaml.safe_load(resolved_yaml)
    return yaml.safe_dump({**values, "stages": values["stages"][: number + 1]}, sort_keys=False)


def build_trainer(
    config: LlavaKdConfig, number: int = 0, start: Path | None = None
) -> tuple[DistillationTrainer, LlavaProcessor, dict[str, Any]]:
    """Everything of a stage before its first step: the trainer, the processor, and the facts for `run.json`.

    Args:
        config: of the run.
        number: of the stage, from 0.
        start: folder of the last stage's model; None for a new one.
    """
    stage = config.stages[number]
    arguments = stage_arguments(config, stage)
    set_seed(arguments.seed)
    student, processor = new_student(config.student) if start is None else load_llava(str(start))
    train_only(student, stage.train)
    form = sequence_format(config, student, processor)
    with arguments.main_process_first(desc="reading the manifest"):
        rows = read_conversations(config.manifest_of(stage))
    items: Any = EncodedConversations(rows, form, in_memory=config.data.in_memory)
    teacher: PreTrainedModel | None = None
    teacher_head, identity, collator = None, None, collate
    if stage.loss.needs_teacher and config.teacher is not None:
        live, identity = load_teacher(config, student)
        if config.teacher.stored:
            store = open_visual_states(config.store_of(stage), identity, form, rows.ids)
            items, collator = WithTeacherStates(items, store), collate_with_states
            teacher_head = live.lm_head.weight.detach().to(arguments.device)
        else:
            teacher = live
    trainer = DistillationTrainer(
        student.train(),
        teacher,
        args=arguments,
        train_dataset=items,
        collate=partial(collator, form=form),
        sampler=picture_batches(rows, config, arguments),
        loss_terms=partial(
            loss_terms, weights=stage.loss, teacher_head=teacher_head, needs_picture="decoder" not in stage.train
        ),
        count_items=count_items,
    )
    facts = {
        "stage": stage.name,
        "start": None if start is None else str(start),
        "teacher": identity,
        "stored_teacher": teacher_head is not None,
        "loss": stage.loss.describe(),
        "trained_parts": list(stage.train),
        "parameters": student.num_parameters(),
        "vision_parameters": student.model.vision_tower.num_parameters(),
        "visual_tokens": form.num_visual_tokens,
        "train_manifest": config.manifest_of(stage),
        "conversations": len(rows),
        "learning_rate": arguments.learning_rate,
        "seed": arguments.seed,
        **made_on(arguments.device),
    }
    return trainer, processor, facts


def picture_batches(
    rows: Conversations, config: LlavaKdConfig, arguments: DistillationArguments
) -> DurationBatchSampler:
    """Shuffled batches of `data.batch_size` conversations, each of which counts as one second."""
    return DurationBatchSampler(
        np.ones(len(rows)),
        float(config.data.batch_size),
        seed=arguments.seed,
        rank=arguments.process_index,
        world_size=arguments.world_size,
    )


def train_stage(config: LlavaKdConfig, number: int, start: Path | None, resolved_yaml: str) -> Path:
    """Train one stage, unless it is finished; the folder of its model."""
    stage = config.stages[number]
    arguments = stage_arguments(config, stage)
    folder = Path(arguments.output_dir)
    with training_run(arguments, stage_yaml(resolved_yaml, number)) as is_finished:
        if not is_finished:
            trainer, processor, facts = build_trainer(config, number, start)
            trainer.train(resume_from_checkpoint=True)
            if arguments.process_index == 0:
                facts["steps"] = trainer.state.global_step
                with atomic_folder(folder / "student", replace=True) as temporary:
                    save_llava(trainer.model, processor, temporary)
                write_json(folder / "run.json", facts)
                logger.info("stage %s: %s", stage.name, folder / "student")
            trainer.accelerator.wait_for_everyone()
    return folder / "student"


def main(argv: list[str] | None = None) -> None:
    config, resolved_yaml = parse_config(LlavaKdConfig, argv)
    start: Path | None = None
    for number in range(len(config.stages)):
        start = train_stage(config, number, start, resolved_yaml)
    if config.trainer.process_index == 0 and start is not None:
        run_dir = Path(config.trainer.output_dir)
        model, processor = load_llava(str(start))
        with atomic_folder(run_dir / "student", replace=True) as temporary:
            save_llava(model, processor, temporary)
        logger.info("student: %s", run_dir / "student")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_command(main)
