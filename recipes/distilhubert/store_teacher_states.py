"""Run the teacher once over all clips: what `teacher.states_dir` keeps serves all epochs, and runs of other seeds.

Launch: python recipes/distilhubert/store_teacher_states.py --config FILE [--section.key value ...]
A store that was begun is continued.
"""

import logging
from pathlib import Path

from speechkd.cli import run_command
from speechkd.config import parse_config
from speechkd.data.hub import read_utterances
from speechkd.estimate import load_recipe, recipe_config_class
from speechkd.features_store import store_states

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> None:
    recipe = load_recipe(Path(__file__).with_name("train.py"))
    config, _ = parse_config(recipe_config_class(recipe), argv)
    data, device = config.data, config.trainer.device
    if config.teacher.states_dir is None:
        logger.info("teacher.states_dir is null: the teacher runs in every step, nothing to store")
        return
    teacher, normalize_input = recipe.load_teacher(config)
    _, layers = recipe.build_student(config, teacher, normalize_input)
    encoder = recipe.stored_teacher(config, teacher, normalize_input, layers)
    for source in (*data.train_manifests, data.dev_manifest):
        if source is not None:
            store = store_states(
                encoder,
                read_utterances(source),
                config.teacher.states_dir,
                num_workers=data.num_workers,
                max_skipped_fraction=data.max_skipped_fraction,
                device=device,
            )
            logger.info("%s: layers %s", store.folder, ", ".join(map(str, layers)))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_command(main)
