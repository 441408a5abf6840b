"""Run once what SEGUE's training would run in every step: the sentence teacher, and the student's frozen layers.

Launch: python recipes/segue/store_targets.py --config FILE [--section.key value ...]
Writes the label stores of `teacher.embeddings_dir` and `student.lower_states_dir`; one that was begun is continued.
"""

import logging
from pathlib import Path

from sentence_corpora import SPLITS

from speechkd.cli import run_command
from speechkd.config import parse_config
from speechkd.estimate import load_recipe, recipe_config_class
from speechkd.labels.embeddings import cache_lower_states, embed_texts, manifest_texts

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> None:
    recipe = load_recipe(Path(__file__).with_name("train.py"))
    config, _ = parse_config(recipe_config_class(recipe), argv)
    data, sources = config.data, {split: config.data.manifest_of(split) for split in SPLITS}
    embeddings_dir, states_dir = config.teacher.embeddings_dir, config.student.lower_states_dir
    if embeddings_dir is not None:
        teacher = recipe.load_teacher(config)
        for split, source in sources.items():
            if source is not None:
                texts = manifest_texts(source, data.labels_of(split))
                store, counts = embed_texts(teacher, texts, Path(embeddings_dir) / split)
                logger.info("%s: vectors of %d of %d texts", store.folder, counts.num_embedded, counts.num_texts)
    if states_dir is not None:
        student = recipe.load_student(config.student, None).to(config.trainer.device)
        for split in ("train", "dev"):
            if (source := sources[split]) is not None:
                store = cache_lower_states(
                    student,
                    config.student.name,
                    source,
                    Path(states_dir) / split,
                    num_workers=data.num_workers,
                    max_skipped_fraction=data.max_skipped_fraction,
                )
                logger.info("%s: states after layer %d", store.folder, student.num_frozen_layers)
    if embeddings_dir is None and states_dir is None:
        logger.info("neither teacher.embeddings_dir nor student.lower_states_dir is set: nothing to store")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_command(main)
