"""Transcribe the test manifest with the student and count errors.

Launch: python recipes/mvq/recognize.py --config FILE [--section.key value ...]
Writes metrics.json, hypotheses.jsonl, results.json, which tables are made of, and the student's model card.
"""

import logging
from pathlib import Path
from typing import Any

from speechkd.cli import run_command
from speechkd.config import parse_config
from speechkd.data.hub import read_utterances
from speechkd.doctor import hardware_name
from speechkd.estimate import load_recipe, recipe_config_class
from speechkd.evaluate import read_references, transcript_scores
from speechkd.export.huggingface import read_run
from speechkd.files import atomic_write, write_json, write_jsonl
from speechkd.models.recognizer_decoding import transcribe_manifest


def score(config: Any, run: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """metrics.json and hypotheses.jsonl of the student.

    Args:
        config: of the run.
        run: facts of its training.
    """
    student = Path(config.trainer.output_dir) / "student"
    by_teacher = config.evaluation.reference == "teacher"
    manifest = read_utterances(config.data.test_manifest)
    references = read_references(manifest, Path(config.data.labels_dir) / "test" if by_teacher else None)
    recognition = config.recognition
    how = "greedy" if recognition.method == "greedy" else f"beam-{recognition.beam_size}"
    store = transcribe_manifest(
        student,
        manifest,
        Path(config.trainer.output_dir) / f"decoded-{how}",
        recognition,
        max_skipped_fraction=config.data.max_skipped_fraction,
        device=config.trainer.device,
    )
    metrics, rows = transcript_scores(
        store,
        manifest,
        references,
        config.evaluation.normalizer,
        digit_errors=config.evaluation.digit_error_rate,
    )
    return {
        **metrics,
        "decoding": how,
        "reference": "the teacher's transcripts" if by_teacher else "the manifest's text",
        "manifest": config.data.test_manifest,
        "model": str(student),
        "parameters": run["parameters"],
        "file_megabytes": sum(path.stat().st_size for path in student.glob("*.safetensors")) / 1e6,
    }, rows


def main(argv: list[str] | None = None) -> None:
    recipe = load_recipe(Path(__file__).with_name("train.py"))
    config: Any = parse_config(recipe_config_class(recipe), argv)[0]
    output_dir = Path(config.trainer.output_dir)
    run = read_run(output_dir)
    metrics, rows = score(config, run)
    write_jsonl(output_dir / "hypotheses.jsonl", rows)
    write_json(output_dir / "metrics.json", metrics)
    results = {"models": {"student after": metrics}, "run": run, "device": hardware_name(config.trainer.device)}
    write_json(output_dir / "results.json", results)
    with atomic_write(output_dir / "student" / "README.md") as temporary:
        temporary.write_text(recipe.model_card(run, metrics), encoding="utf-8")
    print(f"WER {metrics['wer']:.2f} %, {run['kd']}, {metrics['decoding']}, RTFx {metrics['rtfx']:.1f}")
    print(f"student: {output_dir / 'student'}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_command(main)
