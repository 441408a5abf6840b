"""Score a speech recogniser on a manifest."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import torch

from speechkd.data.features import SAMPLE_RATE_HZ, WINDOW_SAMPLES
from speechkd.data.hub import read_utterances
from speechkd.data.manifest import Manifest
from speechkd.files import read_jsonl, write_json, write_jsonl
from speechkd.labels.pseudo_label import DecodingConfig, label_manifest
from speechkd.labels.teacher_cache import LabelStore
from speechkd.metrics.hallucination import error_kind_rates, five_gram_duplicates, non_speech_output
from speechkd.metrics.intervals import group_error_rates, macro_mean_wer, num_errors, paired_difference, wer_interval
from speechkd.metrics.normalizers import Normalizer
from speechkd.metrics.slu import slot_recall
from speechkd.metrics.wer import digit_error_rate, error_rates, utterance_errors
from speechkd.models.long_form import LongFormConfig, transcribe_long_manifest

logger = logging.getLogger(__name__)


def evaluate_asr(
    model_name: str,
    manifest_path: str | Path,
    output_dir: str | Path,
    *,
    decoding: DecodingConfig,
    long_form: LongFormConfig | None = None,
    normalizer: Normalizer = "english",
    reference: Literal["text", "teacher"] = "text",
    labels_dir: str | Path | None = None,
    decoded_dir: str | Path | None = None,
    digit_errors: bool = False,
    group_by: Sequence[str] = (),
    num_resamples: int = 1000,
    compare_with: str | Path | None = None,
    num_non_speech_clips: int = 0,
    max_skipped_fraction: float = 0.01,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Transcribe a manifest and count errors; a killed evaluation carries on where it stopped.

    Args:
        model_name: Hub id, folder or `bundled:<name>`.
        manifest_path: utterances to score on.
        output_dir: gets `metrics.json`, `hypotheses.jsonl` and the transcripts in `decoded/`.
        decoding: language and limits.
        long_form: how clips of any length are transcribed; None skips those above 30 s.
        normalizer: applied to references and hypotheses before counting.
        reference: score against the manifest's text, or against the transcripts of a teacher.
        labels_dir: label store of the teacher, for `reference="teacher"`.
        decoded_dir: label store of this model's transcripts; by default `output_dir/decoded`.
        digit_errors: also count errors over single digits.
        group_by: fields of the manifest, such as "speaker" and "language"; each gets a table of error rates.
        num_resamples: draws of the bootstrap behind the 95 % intervals; 0 leaves the intervals out.
        compare_with: `output_dir` of another system's evaluation on the same references, the baseline of a paired
            bootstrap.
        num_non_speech_clips: also decode so many clips of each kind of noise and silence, below `output_dir`.
        max_skipped_fraction: share of clips that may be undecodable, 0 to 1.
        device: where the model runs; by default CUDA if there is one.

    Returns:
        The content of `metrics.json`; rates in percent, over corpus totals.

    Raises:
        ValueError: a reference is missing, the folders hold results of another model, `group_by` names a field that
            the manifest lacks, or `compare_with` holds other references.
    """
    if (reference == "teacher") != (labels_dir is not None):
        raise ValueError(
            f"reference {reference!r} and labels_dir {labels_dir} do not fit: a teacher's labels need both"
        )
    if num_resamples < 0 or num_non_speech_clips < 0:
        raise ValueError(
            f"num_resamples and num_non_speech_clips must be 0 or more, got {num_resamples} and {num_non_speech_clips}"
        )
    if compare_with is not None and num_resamples == 0:
        raise ValueError(f"comparing with {compare_with} is a bootstrap; set num_resamples to 1 or more, 1000 is usual")
    output_dir = Path(output_dir)
    manifest = read_utterances(manifest_path)
    references = read_references(manifest, labels_dir)
    groups = {field: _group_values(manifest, field) for field in group_by}
    baseline = None if compare_with is None else _baseline(compare_with, normalizer, references)
    store_dir = Path(decoded_dir or output_dir / "decoded")
    if long_form is None:
        _warn_of_long_clips(manifest)
        store = label_manifest(
            model_name,
            manifest_path,
            store_dir,
            decoding=decoding,
            max_skipped_fraction=max_skipped_fraction,
            device=device,
        )
    else:
        store = transcribe_long_manifest(
            model_name,
            manifest,
            store_dir,
            decoding=decoding,
            long_form=long_form,
            max_skipped_fraction=max_skipped_fraction,
            device=device,
        )
    metrics, rows = transcript_scores(
        store, manifest, references, normalizer, digit_errors=digit_errors, num_resamples=num_resamples
    )
    metrics |= {
        "long_form": None if long_form is None else asdict(long_form),
        "reference": "the teacher's transcripts" if reference == "teacher" else "the manifest's text",
        "manifest": str(manifest_path),
        "model": model_name,
    }
    if groups:
        metrics.update(_group_tables(rows, groups, num_resamples))
    if baseline is not None:
        speakers = dict(zip(manifest.ids, manifest.rows["speaker"][:], strict=True))
        metrics["comparison"] = _comparison(rows, baseline, str(compare_with), speakers, num_resamples)
    if num_non_speech_clips:
        metrics["non_speech"] = non_speech_output(
            model_name,
            output_dir / "non_speech",
            decoding=decoding,
            normalizer=normalizer,
            num_clips=num_non_speech_clips,
            device=device,
        )
    write_jsonl(output_dir / "hypotheses.jsonl", rows)
    write_json(output_dir / "metrics.json", metrics)
    return metrics


def transcript_scores(
    store: LabelStore,
    manifest: Manifest,
    references: dict[str, str],
    normalizer: Normalizer,
    *,
    digit_errors: bool = False,
    num_resamples: int = 1000,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Errors of transcripts that are in a label store, whoever wrote them.

    Args:
        store: rows with `id, text, duration_seconds, compute_seconds`.
        manifest: the utterances to score.
        references: what is said, by id; see `read_references`.
        normalizer: applied to references and hypotheses before counting.
        digit_errors: also count errors over single digits.
        num_resamples: draws of the bootstrap behind the 95 % intervals; 0 leaves the intervals out.

    Returns:
        What `metrics.json` and `hypotheses.jsonl` hold of them; rates in percent, over corpus totals.
    """
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
        "weights_sha256": store.header["teacher"]["weights_sha256"],
    }
    if digit_errors:
        metrics["digit_error_rate"] = digit_error_rate(texts, hypotheses).wer
    metrics.update(_slot_scores(manifest, decoded))
    rows = [
        {"id": key, "reference": text, "hypothesis": hypothesis, **utterance_errors(text, hypothesis, normalizer)}
        for key, text, hypothesis in zip(scored, texts, hypotheses, strict=True)
    ]
    metrics |= asdict(error_kind_rates(rates)) | _hallucination_scores(rows, normalizer)
    speakers = dict(zip(manifest.ids, manifest.rows["speaker"][:], strict=True))
    metrics.update(_intervals(rows, speakers, num_resamples))
    return metrics, rows


def _warn_of_long_clips(manifest: Manifest) -> None:
    limit_seconds = WINDOW_SAMPLES / SAMPLE_RATE_HZ
    too_long = [
        key for key, seconds in zip(manifest.ids, manifest.durations_seconds, strict=True) if seconds > limit_seconds
    ]
    if too_long:
        logger.warning(
            "%d of %d clips last longer than the %.0f s that Whisper takes at once and are skipped, the first is %r; "
            "pass --long-form chunked or --long-form sequential to transcribe them",
            len(too_long),
            len(manifest),
            limit_seconds,
            too_long[0],
        )


def real_time_factor_inverse(compute_seconds: float, audio_seconds: float) -> float:
    """RTFx: seconds of audio per second of computation."""
    return audio_seconds / compute_seconds


def read_references(manifest: Manifest, labels_dir: str | Path | None = None) -> dict[str, str]:
    """What is said, by utterance id.

    Args:
        manifest: the utterances.
        labels_dir: label store whose transcripts are taken; None takes the manifest's text.

    Raises:
        ValueError: the manifest lacks a text.
    """
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


def _hallucination_scores(rows: list[dict[str, Any]], normalizer: Normalizer) -> dict[str, int]:
    """What the error rates do not show: loops, and words where the reference has none."""
    duplicates, num_five_grams = five_gram_duplicates(
        [row["hypothesis"] for row in rows if row["num_reference_words"]], normalizer
    )
    return {
        "five_gram_duplicates": duplicates,
        "num_five_grams": num_five_grams,
        "num_words_on_empty_references": sum(row["insertions"] for row in rows if not row["num_reference_words"]),
    }


def _intervals(
    rows: list[dict[str, Any]], speakers: dict[str, str | None], num_resamples: int
) -> dict[str, float | int]:
    """95 % intervals of the WER, drawn by utterance and, where all scored utterances name one, by speaker."""
    rows = [row for row in rows if row["num_reference_words"]]
    if num_resamples == 0 or len(rows) < 2:
        return {}
    errors, words = [num_errors(row) for row in rows], [row["num_reference_words"] for row in rows]
    low, high = wer_interval(errors, words, num_resamples=num_resamples)
    scores: dict[str, float | int] = {"wer_low": low, "wer_high": high}
    if units := _speaker_units(rows, speakers):
        low, high = wer_interval(errors, words, units=units, num_resamples=num_resamples)
        scores |= {"wer_low_by_speaker": low, "wer_high_by_speaker": high, "num_speakers": len(set(units))}
    return {**scores, "num_resamples": num_resamples}


def _speaker_units(rows: list[dict[str, Any]], speakers: dict[str, str | None]) -> list[str] | None:
    """The speaker of each row, or None where one has none or all have the same."""
    units = [speaker for row in rows if (speaker := speakers[row["id"]]) is not None]
    return units if len(units) == len(rows) and len(set(units)) > 1 else None


def _group_values(manifest: Manifest, field: str) -> dict[str, Any]:
    """The field of every utterance by its id."""
    features = manifest.rows.features
    known = [name for name, feature in features.items() if _names_groups(name, feature)]
    if field not in known:
        raise ValueError(f"group_by {field!r} is no field with names; those of a manifest are {', '.join(known)}")
    values = manifest.rows[field][:]
    if all(value is None for value in values):
        raise ValueError(
            f"no utterance of {manifest.path} has the field {field!r}, by which to group; add it or choose another"
        )
    return dict(zip(manifest.ids, values, strict=True))


def _names_groups(name: str, feature: Any) -> bool:
    # an id or a file is of one utterance, and numbers of seconds hardly ever repeat
    return name not in ("id", "audio") and isinstance(feature, datasets.Value) and not feature.dtype.startswith("float")


def _group_tables(
    rows: list[dict[str, Any]], groups: dict[str, dict[str, Any]], num_resamples: int
) -> dict[str, dict[str, Any]]:
    """`groups`, a table for each field, and `macro_mean_wer`, for each field the plain mean over its groups."""
    tables = {}
    for field, values in groups.items():
        of_rows = [values[row["id"]] for row in rows]
        if missing := sum(value is None for value in of_rows):
            logger.warning("%d of %d utterances have no %s and are in none of its groups", missing, len(rows), field)
        tables[field] = group_error_rates(rows, of_rows, num_resamples=num_resamples)
    return {"groups": tables, "macro_mean_wer": {field: macro_mean_wer(table) for field, table in tables.items()}}


def _baseline(folder: str | Path, normalizer: Normalizer, references: dict[str, str]) -> dict[str, int]:
    """Word errors of another evaluation on these references, by utterance id."""
    metrics_path = Path(folder) / "metrics.json"
    rows = [row for row in read_jsonl(Path(folder) / "hypotheses.jsonl") if row["num_reference_words"]]
    if not rows or not metrics_path.is_file():
        raise ValueError(f"{folder} holds no evaluation to compare with; run `speechkd evaluate --output-dir {folder}`")
    used = json.loads(metrics_path.read_text(encoding="utf-8"))["normalizer"]
    if used != normalizer:
        raise ValueError(
            f"{folder} was scored with normalizer {used!r}, this run uses {normalizer!r}; score both with the same one"
        )
    for row in rows:
        if references.get(row["id"], row["reference"]) != row["reference"]:
            raise ValueError(
                f"utterance {row['id']!r} has the reference {row['reference']!r} in {folder} and "
                f"{references[row['id']]!r} here; score both against the same references"
            )
    return {row["id"]: num_errors(row) for row in rows}


def _comparison(
    rows: list[dict[str, Any]],
    baseline: dict[str, int],
    folder: str,
    speakers: dict[str, str | None],
    num_resamples: int,
) -> dict[str, Any]:
    """Paired bootstrap over the utterances that both systems transcribed, and over their speakers where named."""
    shared = [row for row in rows if row["id"] in baseline]
    if len(shared) < 2:
        raise ValueError(
            f"{folder} shares {len(shared)} scored utterances with this run; evaluate both on the same manifest"
        )
    draw = partial(
        paired_difference,
        [baseline[row["id"]] for row in shared],
        [num_errors(row) for row in shared],
        [row["num_reference_words"] for row in shared],
        num_resamples=num_resamples,
    )
    comparison = {"baseline": folder, **asdict(draw()), "num_utterances": len(shared)}
    if units := _speaker_units(shared, speakers):
        by_speaker = draw(units=units)
        comparison |= {"low_by_speaker": by_speaker.low, "high_by_speaker": by_speaker.high}
    return comparison
