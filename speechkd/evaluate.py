"""Score a speech recogniser on a manifest."""

from pathlib import Path
from typing import Any, Literal

import torch

from speechkd.data.hub import read_utterances
from speechkd.data.manifest import Manifest
from speechkd.files import write_json, write_jsonl
from speechkd.labels.pseudo_label import DecodingConfig, label_manifest
from speechkd.labels.teacher_cache import LabelStore
from speechkd.metrics.slu import slot_recall
from speechkd.metrics.wer import Normalizer, digit_error_rate, error_rates, utterance_errors


def evaluate_asr(
    model_name: str,
    manifest_path: str | Path,
    output_dir: str | Path,
    *,
    decoding: DecodingConfig,
    normalizer: Normalizer = "english",
    reference: Literal["text", "teacher"] = "text",
    labels_dir: str | Path | None = None,
    decoded_dir: str | Path | None = None,
    digit_errors: bool = False,
    max_skipped_fraction: float = 0.01,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Transcribe a manifest and count errors; a killed evaluation carries on where it stopped.

    Args:
        model_name: Hub id, folder or `bundled:<name>`.
        manifest_path: utterances to score on.
        output_dir: gets `metrics.json`, `hypotheses.jsonl` and the transcripts in `decoded/`.
        decoding: language and limits.
        normalizer: applied to references and hypotheses before counting.
        reference: score against the manifest's text, or against the transcripts of a teacher.
        labels_dir: label store of the teacher, for `reference="teacher"`.
        decoded_dir: label store of this model's transcripts; by default `output_dir/decoded`.
        digit_errors: also count errors over single digits.
        max_skipped_fraction: share of clips that may be undecodable, 0 to 1.
        device: where the model runs; by default CUDA if there is one.

    Returns:
        The content of `metrics.json`; rates in percent, over corpus totals.

    Raises:
        ValueError: a reference is missing, or the folders hold results of another model.
    """
    if (reference == "teacher") != (labels_dir is not None):
        raise ValueError(
            f"reference {reference!r} and labels_dir {labels_dir} do not fit: a teacher's labels need both"
        )
    output_dir = Path(output_dir)
    manifest = read_utterances(manifest_path)
    references = _references(manifest, labels_dir)
    store = label_manifest(
        model_name,
        manifest_path,
        decoded_dir or output_dir / "decoded",
        decoding=decoding,
        max_skipped_fraction=max_skipped_fraction,
        device=device,
    )
    decoded = {row["id"]: row for row in store.rows()}
    scored = [key for key in manifest.ids if key in decoded and key in references]
    texts, hypotheses = [references[key] for key in scored], [decoded[key]["text"] for key in scored]
    rates = error_rates(texts, hypotheses, normalizer)
    audio_seconds = sum(decoded[key]["duration_seconds"] for key in scored)
    compute_seconds = sum(decoded[key]["compute_seconds"] for key in scored)
    metrics: dict[str, Any] = {
        "wer": rates.wer,
        "cer": rates.cer,
        "substitutions": rates.substitutions,
        "deletions": rates.deletions,
        "insertions": rates.insertions,
        "num_reference_words": rates.num_reference_words,
        "num_utterances": rates.num_utterances,
        "num_empty_references": rates.num_empty_references,
        "num_skipped": len(manifest) - len(scored),
        "audio_seconds": audio_seconds,
        "compute_seconds": compute_seconds,
        "rtfx": real_time_factor_inverse(compute_seconds, audio_seconds),
        "normalizer": normalizer,
        "reference": "the teacher's transcripts" if reference == "teacher" else "the manifest's text",
        "manifest": str(manifest_path),
        "model": model_name,
        "weights_sha256": store.header["teacher"]["weights_sha256"],
    }
    if digit_errors:
        metrics["digit_error_rate"] = digit_error_rate(texts, hypotheses).wer
    metrics.update(_slot_scores(manifest, decoded))
    write_jsonl(
        output_dir / "hypotheses.jsonl",
        [
            {"id": key, "reference": text, "hypothesis": hypothesis, **utterance_errors(text, hypothesis, normalizer)}
            for key, text, hypothesis in zip(scored, texts, hypotheses, strict=True)
        ],
    )
    write_json(output_dir / "metrics.json", metrics)
    return metrics


def real_time_factor_inverse(compute_seconds: float, audio_seconds: float) -> float:
    """RTFx: seconds of audio per second of computation."""
    return audio_seconds / compute_seconds


def _references(manifest: Manifest, labels_dir: str | Path | None) -> dict[str, str]:
    if labels_dir is not None:
        return {row["id"]: row["text"] for row in LabelStore(labels_dir).rows()}
    texts = manifest.rows["text"][:]
    missing = [key for key, text in zip(manifest.ids, texts, strict=True) if text is None]
    if missing:
        raise ValueError(
            f"{len(missing)} utterances of {manifest.path} have no text, the first is {missing[0]!r}; "
            "score against a teacher with --reference teacher --labels-dir DIR"
        )
    return dict(zip(manifest.ids, texts, strict=True))


def _slot_scores(manifest: Manifest, decoded: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Share of gold slot values found in the transcripts, where the manifest has slots."""
    pairs = [
        (row["slots"], decoded[row["id"]]["text"]) for row in manifest.rows if row["slots"] and row["id"] in decoded
    ]
    if not pairs:
        return {}
    slots, texts = zip(*pairs, strict=True)
    recall = slot_recall(slots, texts)
    return {"slot_recall": recall.recall, "num_slots": recall.num_slots}
