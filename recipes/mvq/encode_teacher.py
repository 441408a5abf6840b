"""Run once what the training would run in every step: the teacher. Fit its quantizer where there is none.

Launch: python recipes/mvq/encode_teacher.py --config FILE [--section.key value ...]
Writes `teacher.quantizer_dir`, and the label stores of `teacher.codes_dir` or `teacher.states_dir`, as `loss.kd` wants;
one that was begun is continued.
"""

import logging
from pathlib import Path
from typing import Any

from speechkd.cli import run_command
from speechkd.config import parse_config
from speechkd.data.hub import read_utterances
from speechkd.estimate import load_recipe, recipe_config_class
from speechkd.features_store import fill_states
from speechkd.frame_encoders import load_frame_encoder
from speechkd.labels.mvq_labels import codes_summary, fit_quantizer, label_codes
from speechkd.models.quantizer import QuantizerError, load_quantizer

logger = logging.getLogger(__name__)


def check_size(folder: str, bytes_per_frame: int) -> None:
    """Refuse a quantizer of another size than is asked for.

    Raises:
        QuantizerError: names its id and both sizes.
    """
    quantizer = load_quantizer(folder)
    if quantizer.bytes_per_frame != bytes_per_frame:
        raise QuantizerError(
            f"quantizer {quantizer.id} in {folder} makes {quantizer.bytes_per_frame} bytes a frame, but "
            f"quantizer.bytes_per_frame={bytes_per_frame}; set it to its own, or choose another teacher.quantizer_dir "
            "and teacher.codes_dir"
        )


def main(argv: list[str] | None = None) -> None:
    recipe = load_recipe(Path(__file__).with_name("train.py"))
    config: Any = parse_config(recipe_config_class(recipe), argv)[0]
    data, teacher, kd = config.data, config.teacher, config.loss.kd
    if kd == "none":
        logger.info("loss.kd=none: no teacher, nothing to encode")
        return
    options = {
        "num_workers": data.num_workers,
        "max_skipped_fraction": data.max_skipped_fraction,
        "device": config.trainer.device,
    }
    if kd == "mvq" and not (Path(teacher.quantizer_dir) / "config.json").is_file():
        fitted = fit_quantizer(
            teacher.name,
            teacher.layer,
            data.train_manifest,
            teacher.quantizer_dir,
            config=config.quantizer.fit(),
            max_frames=config.quantizer.max_frames,
            **options,
        )
        logger.info(
            "%s: quantizer %s, %d bytes a frame, relative error %.4f",
            teacher.quantizer_dir,
            fitted["id"],
            fitted["bytes_per_frame"],
            fitted["relative_errors"][-1],
        )
    if kd == "mvq":
        check_size(teacher.quantizer_dir, config.quantizer.bytes_per_frame)
    folder = teacher.store_dir(kd)
    if folder is None:
        logger.info("no folder for the targets of %s: the teacher runs in every step", kd)
        return
    for split, source in (("train", data.train_manifest), ("dev", data.dev_manifest)):
        if source is None:
            continue
        output_dir = Path(folder) / split
        if kd == "mvq":
            store = label_codes(teacher.name, [teacher.quantizer_dir], source, output_dir, **options)
            facts = codes_summary(store)
            logger.info("%s: %d bytes, a %d-th of float32", output_dir, facts["code_bytes"], facts["storage_ratio"])
        else:
            encoder = load_frame_encoder(teacher.name, layers=[teacher.layer], device=config.trainer.device)
            fill_states(encoder, read_utterances(source), output_dir, **options)
            logger.info("%s: states of layer %d", output_dir, teacher.layer)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_command(main)
