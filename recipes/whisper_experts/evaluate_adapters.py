"""Score the base model, the model with its experts, and the merged student on the test manifest.

Launch: python recipes/whisper_experts/evaluate_adapters.py --config FILE [--section.key value ...]
Writes results.json, metrics.json (the merged student's), hypotheses.jsonl and the student's model card.
"""

import logging
from pathlib import Path
from typing import Any

from tabulate_adapters import format_table

from speechkd.cli import run_command
from speechkd.config import parse_config
from speechkd.data.features import SAMPLE_RATE_HZ
from speechkd.data.hub import read_utterances
from speechkd.data.loader import clip_batches
from speechkd.doctor import hardware_name
from speechkd.estimate import load_recipe, recipe_config_class
from speechkd.evaluate import evaluate_asr, real_time_factor_inverse
from speechkd.export.huggingface import read_run, update_card
from speechkd.files import read_jsonl, write_json
from speechkd.labels.labeller import Labeller
from speechkd.labels.pseudo_label import ShardWriter, pending_positions, store_header
from speechkd.labels.teacher_cache import LabelStore, create_store
from speechkd.metrics.wer import digit_error_rate, error_rates
from speechkd.models.language_experts import load_experts
from speechkd.teachers import load_whisper


def score(config: Any, model: str, output_dir: Path, decoded_dir: Path | None = None) -> dict[str, Any]:
    """metrics.json of a stock model."""
    by_teacher = config.evaluation.reference == "teacher"
    return evaluate_asr(
        model,
        config.data.test_manifest,
        output_dir,
        decoding=config.decoding,
        normalizer=config.evaluation.normalizer,
        reference=config.evaluation.reference,
        labels_dir=Path(str(config.data.labels_dir)) / "test" if by_teacher else None,
        decoded_dir=decoded_dir,
        digit_errors=config.evaluation.digit_error_rate,
        max_skipped_fraction=config.data.max_skipped_fraction,
        device=config.trainer.device,
    )


def score_gated(config: Any, output_dir: Path, merged: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores of the model with gates, and how far the merged student is from it.

    Args:
        config: of the run.
        output_dir: its folder, with the merged student's `hypotheses.jsonl`; gets the transcripts in `gated/`.
        merged: the merged student's scores.
    """
    decoded = {row["id"]: row for row in transcribe_gated(config, output_dir).rows()}
    pairs = [(row, decoded[row["id"]]) for row in read_jsonl(output_dir / "hypotheses.jsonl") if row["id"] in decoded]
    references = [row["reference"] for row, _ in pairs]
    hypotheses = [gated["text"] for _, gated in pairs]
    rates = error_rates(references, hypotheses, config.evaluation.normalizer)
    audio_seconds = sum(gated["duration_seconds"] for _, gated in pairs)
    compute_seconds = sum(gated["compute_seconds"] for _, gated in pairs)
    scores: dict[str, Any] = {name: merged[name] for name in ("manifest", "reference", "normalizer", "num_utterances")}
    scores |= {"wer": rates.wer, "cer": rates.cer, "rtfx": real_time_factor_inverse(compute_seconds, audio_seconds)}
    if config.evaluation.digit_error_rate:
        scores["digit_error_rate"] = digit_error_rate(references, hypotheses).wer
    differing = [row["id"] for row, gated in pairs if row["hypothesis"] != gated["text"]]
    parity: dict[str, Any] = {"num_utterances": len(pairs), "num_differing": len(differing), "differing": differing}
    if any(text.strip() for text in hypotheses):
        of_gated = error_rates(hypotheses, [row["hypothesis"] for row, _ in pairs], config.evaluation.normalizer)
        parity["wer_against_gated"] = of_gated.wer
    return scores, parity


def transcribe_gated(config: Any, output_dir: Path) -> LabelStore:
    """Transcripts by the base model with its experts; a killed call carries on where it stopped."""
    name, decoding = config.student.init_from, config.decoding
    model = load_whisper(name, dtype="float32")
    load_experts(model, output_dir / "experts", [decoding.language])
    labeller = Labeller(name, model.to(config.trainer.device).eval(), decoding)
    manifest = read_utterances(config.data.test_manifest)
    header = store_header(f"{name} with experts", model, ("text",), decoding)  # its hash covers the experts
    store = create_store(output_dir / "gated", header)
    pending = pending_positions(manifest, store)
    batches = clip_batches(
        manifest,
        pending,
        sample_rate_hz=SAMPLE_RATE_HZ,
        batch_size=labeller.num_clips,
        num_workers=decoding.num_workers,
        device=config.trainer.device,
    )
    with ShardWriter(store, manifest, pending, config.data.max_skipped_fraction) as writer:
        for batch in batches:
            rows, arrays = labeller.label(batch)
            writer.add(rows, arrays, batch.skipped)
    return store


def main(argv: list[str] | None = None) -> None:
    # under a private name: other recipes have a train.py too
    recipe = load_recipe(Path(__file__).with_name("train.py"))
    config: Any = parse_config(recipe_config_class(recipe), argv)[0]
    output_dir = Path(config.trainer.output_dir)
    run = read_run(output_dir)
    # the base model is the same for every adapter, so it is decoded once
    base_dir = output_dir.with_name(output_dir.name.removesuffix(f"-{config.student.adapter}") + "-base")
    results: dict[str, Any] = {
        "base": score(config, config.student.init_from, base_dir),
        "merged": score(config, str(output_dir / "student"), output_dir),
    }
    facts: dict[str, Any] = {"run": run, "device": hardware_name(config.trainer.device)}
    if config.student.adapter == "experts":
        results["gated"], facts["parity"] = score_gated(config, output_dir, results["merged"])
    update_card(output_dir / "student", run, results)
    write_json(output_dir / "results.json", {"models": results, **facts})
    print(format_table([output_dir]))
    print(f"student: {output_dir / 'student'}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("transformers.generation").setLevel(logging.ERROR)  # it repeats that max_new_tokens wins
    run_command(main)
