"""Students as plain Hugging Face folders that load without speechkd, with a model card."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin, WhisperFeatureExtractor

from speechkd.files import atomic_folder, atomic_write
from speechkd.model_card import card_head, data_section, licence_section, teacher_section, training_section
from speechkd.models.whisper import shorten_window
from speechkd.teachers import load_processor, load_whisper

HUGGINGFACE_PRECISIONS = ("float32", "float16", "bfloat16")


def export_huggingface(model_folder: Path, output_dir: Path, *, precision: str) -> None:
    """Write a Whisper as a plain Hugging Face folder, with weights of another precision and its model card.

    Args:
        model_folder: Hugging Face folder of a Whisper.
        output_dir: an empty folder.
        precision: of the stored weights, one of `HUGGINGFACE_PRECISIONS`.

    Raises:
        ValueError: an unknown precision, or no Whisper.
    """
    if precision not in HUGGINGFACE_PRECISIONS:
        raise ValueError(
            f"Hugging Face precision {precision!r} is unknown; choose one of {', '.join(HUGGINGFACE_PRECISIONS)}"
        )
    load_whisper(str(model_folder), dtype=getattr(torch, precision)).save_pretrained(output_dir)
    load_processor(str(model_folder)).save_pretrained(output_dir)
    if (card := model_folder / "README.md").is_file():
        shutil.copyfile(card, output_dir / card.name)


def export_short_window(model_folder: Path, output_dir: Path, window_seconds: int) -> None:
    """Write a Whisper as a Hugging Face folder whose encoder hears clips up to `window_seconds`; see `shorten_window`.

    Raises:
        ValueError: the model has no such window.
    """
    model, processor = load_whisper(str(model_folder)), load_processor(str(model_folder))
    shorten_window(model, window_seconds)
    features = processor.feature_extractor
    processor.feature_extractor = WhisperFeatureExtractor(
        feature_size=features.feature_size,
        sampling_rate=features.sampling_rate,
        hop_length=features.hop_length,
        n_fft=features.n_fft,
        chunk_length=window_seconds,
    )
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    if (card := model_folder / "README.md").is_file():
        shutil.copyfile(card, output_dir / card.name)


def save_student(student: PreTrainedModel, processor: ProcessorMixin, output_dir: str | Path, card: str) -> None:
    """Write weights, configuration, processor and model card; the folder is complete or absent.

    Args:
        student: trained model; saved as float32 safetensors.
        processor: of the teacher, whose vocabulary and features the student shares.
        output_dir: final folder; an earlier one is replaced.
        card: text of its README.md, as of `model_card`.
    """
    with atomic_folder(output_dir, replace=True) as temporary:
        student.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def model_card(run: dict[str, Any], metrics: dict[str, dict[str, Any]] | None = None) -> str:
    """Model card of a Whisper student.

    Args:
        run: facts of the training, as `recipes/distil_whisper/train.py` keeps them in `run.json`.
        metrics: `metrics.json` of models by a printable name; None before evaluation.

    Returns:
        Markdown with the Hub's YAML header.
    """
    teacher, kept = run["teacher"], run["decoder_layers_kept"]
    language = [f"language: {run['language']}"] if run["language"] else []
    is_hub_id = teacher is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", teacher["name"])
    base_model = [f"base_model: {teacher['name']}"] if teacher is not None and is_hub_id else []
    lines = [
        *card_head(run, "automatic-speech-recognition", "whisper", [*language, *base_model]),
        f"A Whisper with {run['encoder_layers']} encoder and {run['decoder_layers']} decoder layers, "
        f"{run['parameters'] / 1e6:.1f} M parameters, trained by speechkd {run['speechkd_version']}.",
        "",
        *(
            ["## Teacher", "", "None; fine-tuned on its labels.", ""]
            if teacher is None
            else teacher_section(run, f", decoder layers {kept} kept." if kept else ".")
        ),
        *data_section(run, f" after filtering. Labels: {run['labels']}.", student="the model"),
        *training_section(run),
    ]
    if metrics:
        lines += ["## Evaluation", "", *_metrics_table(metrics), ""]
    lines += licence_section(run, "That of the teacher and of the data; see both.")
    return "\n".join(lines)


def _metrics_table(metrics: dict[str, dict[str, Any]]) -> list[str]:
    names = [
        ("wer", "WER %"),
        ("cer", "CER %"),
        ("digit_error_rate", "digit error rate %"),
        ("slot_recall", "slot recall %"),
        ("rtfx", "RTFx"),
    ]
    present = [(key, title) for key, title in names if any(key in scores for scores in metrics.values())]
    first = next(iter(metrics.values()))
    rows = [
        f"{first['num_utterances']} utterances of {first['manifest']}, reference: {first['reference']}, "
        f"normaliser: {first['normalizer']}, greedy decoding.",
        "",
        "| model | " + " | ".join(title for _, title in present) + " |",
        "|---|" + "---:|" * len(present),
    ]
    for name, scores in metrics.items():
        cells = [f"{scores[key]:.2f}" if key in scores else "" for key, _ in present]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return rows


def update_card(output_dir: str | Path, run: dict[str, Any], metrics: dict[str, dict[str, Any]]) -> None:
    """Write the card again, now with scores."""
    with atomic_write(Path(output_dir) / "README.md") as temporary:
        temporary.write_text(model_card(run, metrics), encoding="utf-8")


def read_run(run_dir: str | Path) -> dict[str, Any]:
    """`run.json` of a finished training.

    Raises:
        ValueError: there is none.
    """
    path = Path(run_dir) / "run.json"
    if not path.is_file():
        raise ValueError(f"{run_dir} holds no finished training (run.json is missing); run the train stage first")
    return json.loads(path.read_text(encoding="utf-8"))
