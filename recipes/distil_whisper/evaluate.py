"""Score teacher, student before training and student after it on the test manifest, and time their decoders.

Launch: python recipes/distil_whisper/evaluate.py --config FILE [--section.key value ...]
Writes results.json, metrics.json (the student's), hypotheses.jsonl and the student's model card.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from tabulate_results import format_table
from train import DistilWhisperConfig

from speechkd.cli import run_command
from speechkd.config import parse_config
from speechkd.data.features import SAMPLE_RATE_HZ, WhisperLogMel
from speechkd.data.loader import clip_batches
from speechkd.data.manifest import read_manifest
from speechkd.doctor import hardware_name
from speechkd.evaluate import evaluate_asr
from speechkd.export.huggingface import read_run, update_card
from speechkd.files import write_json
from speechkd.metrics.latency import decode_seconds_per_token
from speechkd.teachers import load_whisper, resolve_model

DECODE_BATCH_SIZES = (1, 8)


def score(config: DistilWhisperConfig, model: str, output_dir: Path, decoded_dir: Path | None = None) -> dict[str, Any]:
    """metrics.json of one model, with its size."""
    metrics = evaluate_asr(
        model,
        config.data.test_manifest,
        output_dir,
        decoding=config.decoding,
        normalizer=config.evaluation.normalizer,
        reference=config.evaluation.reference,
        labels_dir=test_labels(config) if config.evaluation.reference == "teacher" else None,
        decoded_dir=decoded_dir,
        digit_errors=config.evaluation.digit_error_rate,
        max_skipped_fraction=config.data.max_skipped_fraction,
        device=config.trainer.device,
    )
    weights = load_whisper(model)
    folder = Path(resolve_model(model))
    return {
        **metrics,
        "parameters": weights.num_parameters(),
        "decoder_parameters": weights.model.decoder.num_parameters(),
        "float32_megabytes": weights.num_parameters() * 4 / 1e6,
        "file_megabytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6,
    }


def test_labels(config: DistilWhisperConfig) -> Path:
    """Label store of the teacher's transcripts of the test manifest."""
    return Path(str(config.data.labels_dir)) / "test"


def decode_speed(config: DistilWhisperConfig, names: list[str]) -> dict[str, Any]:
    """Seconds per decoding step of each model by batch size, in one process, in turns."""
    device = config.trainer.device
    models = [load_whisper(name, device=device) for name in names]
    manifest = read_manifest(config.data.test_manifest)
    log_mel = WhisperLogMel.for_model(models[0].config).to(device)
    speed: dict[str, Any] = {}
    for batch_size in DECODE_BATCH_SIZES:
        clips = next(
            clip_batches(
                manifest,
                range(min(batch_size, len(manifest))),
                sample_rate_hz=SAMPLE_RATE_HZ,
                batch_size=batch_size,
                device=device,
            )
        )
        with torch.no_grad():
            states = models[0].model.encoder(log_mel(clips.waveforms)).last_hidden_state
        speed[str(batch_size)] = decode_seconds_per_token(models, states)
    return speed


def main(argv: list[str] | None = None) -> None:
    config, _ = parse_config(DistilWhisperConfig, argv)
    output_dir = Path(config.trainer.output_dir)
    run = read_run(output_dir)
    results: dict[str, Any] = {}
    if config.teacher is not None:
        results["teacher"] = score(
            config, config.teacher.name, output_dir / "teacher", test_labels(config) if config.data.labels_dir else None
        )
    results["student before"] = score(config, str(output_dir / "student_init"), output_dir / "before")
    results["student after"] = score(config, str(output_dir / "student"), output_dir)
    update_card(output_dir / "student", run, results)
    results = {"models": results, "run": run, "device": hardware_name(config.trainer.device)}
    if config.teacher is not None:
        results["decode_seconds_per_step"] = decode_speed(config, [config.teacher.name, str(output_dir / "student")])
    write_json(output_dir / "results.json", results)
    print(format_table(results))
    print(f"student: {output_dir / 'student'}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("transformers.generation").setLevel(logging.ERROR)  # it repeats that max_new_tokens wins
    run_command(main)
