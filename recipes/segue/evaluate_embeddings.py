"""Search a test set's texts with its speech: does the vector of a clip find what was said in it?

Launch: python recipes/segue/evaluate_embeddings.py --config FILE [--section.key value ...]
Writes results.json, retrieval.json, which is a table for the README, and the student's model card.
"""

import json
import logging
import shlex
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from heads import speech_vectors
from sentence_corpora import spoken_texts, tell_cut, text_vectors

from speechkd.cli import run_command
from speechkd.config import parse_config
from speechkd.data.hub import read_utterances
from speechkd.data.loader import report_skipped
from speechkd.data.manifest import Manifest
from speechkd.doctor import hardware_name
from speechkd.estimate import load_recipe, recipe_config_class
from speechkd.export.huggingface import read_run
from speechkd.files import atomic_write, write_json
from speechkd.metrics.retrieval import retrieval_scores
from speechkd.models.segue import SegueEncoder
from speechkd.models.speech_embedder import load_segue

logger = logging.getLogger(__name__)

COMMAND = ["python", "recipes/segue/evaluate_embeddings.py", "--config"]
STUDENT, UNTOUCHED = "SEGUE", "untouched encoder"
STAGES = {"prepare": "data", "transcribe": "labels", "embed": "run", "train": "run"}


def score_encoder(
    student: SegueEncoder, manifest: Manifest, texts: dict[str, str], targets: torch.Tensor
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`retrieval_scores` of one encoder with its times, and rows of the clips that were skipped.

    Args:
        student: vectors as wide as the targets.
        manifest: the clips to score.
        texts: what is said in them, by id.
        targets: the teacher's vectors of these texts, in their order.
    """
    started = time.perf_counter()
    vectors, skipped = speech_vectors(student, manifest)
    seconds = time.perf_counter() - started
    row_of = {key: row for row, key in enumerate(texts)}
    scored = [key for key in texts if key in vectors]
    if not scored:
        raise ValueError(f"no clip of {manifest.path} can be decoded; first: {skipped[0]['reason']}")
    durations = dict(zip(manifest.ids, manifest.durations_seconds.tolist(), strict=True))
    audio_seconds = sum(durations[key] for key in scored)
    scores = retrieval_scores(
        torch.stack([vectors[key] for key in scored]).numpy(),
        targets[[row_of[key] for key in scored]].numpy(),
        [texts[key] for key in scored],
    )
    return {
        **scores,
        "audio_seconds": audio_seconds,
        "encode_seconds": seconds,
        "rtfx": audio_seconds / seconds,
    }, skipped


def stage_seconds(config: Any) -> dict[str, float]:
    """Wall time of the stages of run.sh that are finished, from their stamps."""
    folders = {
        "data": Path(config.data.train_manifest).parent,
        "labels": None if config.data.labels_dir is None else Path(config.data.labels_dir),
        "run": Path(config.trainer.output_dir),
    }
    seconds = {}
    for name, place in STAGES.items():
        folder = folders[place]
        stamp = None if folder is None else folder / f".stage-{name}.json"
        if stamp is not None and stamp.is_file():
            seconds[name] = round(json.loads(stamp.read_text(encoding="utf-8"))["wall_seconds"], 1)
    return seconds


def format_table(models: dict[str, dict[str, Any]]) -> str:
    """Markdown table of encoders."""
    lines = ["| encoder | top-1 % | chance % | cosine with own text | MSE | RTFx |", "|---|---:|---:|---:|---:|---:|"]
    for name, scores in models.items():
        lines.append(
            f"| {name} | {100 * scores['top1']:.1f} | {100 * scores['chance']:.1f} | {scores['positive_cosine']:.3f} | "
            f"{scores['mse']:.4f} | {scores['rtfx']:.1f} |"
        )
    return "\n".join(lines)


def evaluate(config: Any, recipe: Any) -> dict[str, Any]:
    """Scores of the student, and of the encoder that it began as where that has the teacher's width."""
    output_dir, device = Path(config.trainer.output_dir), config.trainer.device
    run = read_run(output_dir)
    source = config.data.test_manifest
    manifest = read_utterances(source)
    texts, left_out = spoken_texts(config.data, "test", manifest)
    manifest = manifest.select([position for position, key in enumerate(manifest.ids) if key in texts])
    teacher = recipe.load_teacher(config)
    left_out["num_cut"] = tell_cut(teacher, list(texts.values()))
    embeddings_dir = config.teacher.embeddings_dir
    targets = text_vectors(teacher, texts, None if embeddings_dir is None else Path(embeddings_dir) / "test")
    models: dict[str, Any] = {}
    scores, skipped = score_encoder(load_segue(str(output_dir / "student")).to(device), manifest, texts, targets)
    models[STUDENT] = {**scores, "manifest": source}
    report_skipped(skipped, len(manifest), output_dir / "test", config.data.max_skipped_fraction)
    untouched = recipe.load_student(config.student, None)
    not_scored = {}
    if untouched.embedding_dim == teacher.dim:
        models[UNTOUCHED] = {**score_encoder(untouched.to(device), manifest, texts, targets)[0], "manifest": source}
    else:
        not_scored[UNTOUCHED] = (
            f"its vectors are {untouched.embedding_dim} wide, the teacher's {teacher.dim}: without training there is "
            "no map between them"
        )
        logger.info("%s is not scored: %s", UNTOUCHED, not_scored[UNTOUCHED])
    return {"models": models, "not_scored": not_scored, "left_out": left_out, "run": run}


def main(argv: list[str] | None = None) -> None:
    recipe = load_recipe(Path(__file__).with_name("train.py"))
    config, _ = parse_config(recipe_config_class(recipe), argv)
    output_dir = Path(config.trainer.output_dir)
    started = time.perf_counter()
    results = evaluate(config, recipe)
    facts = {
        "device": hardware_name(config.trainer.device),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": shlex.join(COMMAND + [str(output_dir / "config.yaml")]),  # run.sh hands over a temporary copy of it
    }
    seconds = {**stage_seconds(config), "evaluate": round(time.perf_counter() - started, 1)}
    write_json(output_dir / "results.json", {**results, **facts, "wall_seconds": seconds})
    columns = ("top1", "chance", "positive_cosine", "mse", "rtfx")
    rows = [{"encoder": name, **{key: scores[key] for key in columns}} for name, scores in results["models"].items()]
    student, run = results["models"][STUDENT], results["run"]
    notes = {
        "clips": student["num_clips"],
        "texts": student["num_texts"],
        "manifest": student["manifest"],
        "training_clips": run["train_utterances"],
        "steps": run["steps"],
        "seed": run["seed"],
        **{f"{name}_seconds": value for name, value in seconds.items()},
    }
    write_json(output_dir / "retrieval.json", {"measurements": rows, **notes, **facts})
    with atomic_write(output_dir / "student" / "README.md") as temporary:
        temporary.write_text(recipe.model_card(run, student), encoding="utf-8")
    print(format_table(results["models"]))
    print(f"student: {output_dir / 'student'}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_command(main)
