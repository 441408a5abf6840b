"""Run a teacher once over what the distilled stages of a configuration train on, and keep its states.

Launch: python recipes/llava_kd/store_states.py --config FILE [--section.key value ...], with the options of train.py. A
killed run carries on; a store of another teacher or of other sequences is refused.
"""

import logging

import torch
from transformers import set_seed
from visual_config import LlavaKdConfig, load_teacher, sequence_format
from visual_students import new_student

from speechkd.cli import run_command
from speechkd.config import parse_config
from speechkd.data.conversations import read_conversations
from speechkd.labels.visual_states import store_visual_states


def main(argv: list[str] | None = None) -> None:
    config, _ = parse_config(LlavaKdConfig, argv)
    if config.teacher is None or config.data.labels_dir is None:
        raise ValueError("nothing to store: the configuration has no teacher, or no data.labels_dir")
    set_seed(config.trainer.seed)
    student, processor = new_student(config.student)
    teacher, _ = load_teacher(config, student)
    form = sequence_format(config, student, processor)
    teacher.to(torch.device(config.trainer.device))
    for stage in config.stages:
        if stage.loss.needs_teacher:  # two stages with one manifest share a store, which is finished the second time
            store_visual_states(
                teacher,
                config.teacher.name,
                read_conversations(config.manifest_of(stage)),
                form,
                config.store_of(stage),
                batch_size=config.data.batch_size,
            )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_command(main)
