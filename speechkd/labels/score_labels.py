"""Scores of all labels of a store, as `speechkd scores` computes them: once, for the filters and to look at."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from speechkd.data.collate import WhisperTokens
from speechkd.data.features import SAMPLE_RATE_HZ, WINDOW_SAMPLES, WhisperLogMel
from speechkd.data.hub import read_utterances
from speechkd.data.loader import pad_waveforms
from speechkd.data.manifest import Manifest
from speechkd.data.packing import load_pack
from speechkd.data.whisper import clip_ids
from speechkd.files import folder_lock, read_jsonl
from speechkd.labels.encoders import load_speech_encoder, load_text_encoder
from speechkd.labels.filter_plots import kept_hours_curve, plot_score
from speechkd.labels.filters import HIGHER_IS_BETTER, ScoreName, label_scores
from speechkd.labels.score_store import SCORES_NAME, read_scores, record_origin, write_scores
from speechkd.labels.scores import (
    language_model_nll,
    proxy_wer,
    speech_text_scores,
    whisper_label_entropy,
)
from speechkd.labels.teacher_cache import LabelStore, check_teacher
from speechkd.metrics.normalizers import Normalizer
from speechkd.models.whisper import encode
from speechkd.preemption import Preempted, sigterm_requests
from speechkd.teachers import load_processor, load_whisper, resolve_model, teacher_identity

logger = logging.getLogger(__name__)

SAVE_SECONDS = 30.0  # a kill loses at most this much work
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
KEEP_FRACTIONS = (0.95, 0.9, 0.8, 0.7, 0.5)
NUM_WORST = 5
NEEDED: dict[ScoreName, tuple[str, ...]] = {
    "proxy_wer": ("proxy_labels",),
    "lm_nll": ("language_model",),
    "speech_text_cosine": ("speech_encoder", "text_encoder"),
}

Row = dict[str, Any]
BatchScorer = Callable[[list[Row]], np.ndarray]


def score_labels(
    labels_dir: str | Path,
    manifest_path: str | Path,
    output_dir: str | Path,
    names: Sequence[ScoreName],
    *,
    proxy_labels: str | Path | None = None,
    language_model: str | None = None,
    speech_encoder: str | None = None,
    text_encoder: str | None = None,
    normalizer: Normalizer = "english",
    batch_size: int = 8,
    plot: bool = False,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Compute scores of all labels, write them to `scores.jsonl` and sum them up.

    A score that a model computes is saved as it goes; the same call carries on where an earlier one stopped. Several
    label stores of one teacher, of training and development or of several languages, share an output folder, since
    filters judge all of a run by one file.

    Args:
        labels_dir: label store.
        manifest_path: manifest of its utterances.
        output_dir: gets `scores.jsonl`, which `filters.scores_file` names, `scores.json` with the models behind the
            scores, and the pictures.
        names: which scores; `speechkd.labels.filters.ScoreFilter` gives units and directions.
        proxy_labels: label store that another model made of the manifest, for proxy_wer. A model that was trained on
            these labels agrees with their errors too, and tells nothing about them.
        language_model: Hub id, folder or `bundled:smollm2-135m`, for lm_nll.
        speech_encoder: see `load_speech_encoder`, for speech_text_cosine.
        text_encoder: see `load_text_encoder`; of the same space as `speech_encoder`.
        normalizer: of texts, for wer, cer and proxy_wer.
        batch_size: labels that a model scores together.
        plot: draw each score to `<score>.png`.
        device: where models run; by default CUDA if there is one.

    Returns:
        `scores_file`, `num_labels`, `hours` and, under `scores`, `summarize_score` of each.

    Raises:
        ValueError: a score is unknown or lacks its model, the store has no label of the manifest, another model than
            this one computed what `output_dir` holds, or one of the models cannot be loaded.
        Preempted: SIGTERM came; what was computed before it is saved.
    """
    models = {
        "proxy_labels": proxy_labels,
        "language_model": language_model,
        "speech_encoder": speech_encoder,
        "text_encoder": text_encoder,
    }
    _check_names(names, models)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    store, manifest = LabelStore(labels_dir), read_utterances(manifest_path)
    rows = _labelled_rows(store, manifest)
    labels, path = _origin(store), Path(output_dir) / SCORES_NAME
    with folder_lock(output_dir):
        for name in names:
            if name == "mean_entropy":
                origin, score_batch = _entropy_scorer(store, manifest, device)
            elif name == "lm_nll":
                origin, score_batch = _language_model_scorer(str(language_model), device)
            elif name == "speech_text_cosine":
                origin, score_batch = _cosine_scorer(str(speech_encoder), str(text_encoder), manifest, device)
            elif name == "proxy_wer":
                proxy = LabelStore(str(proxy_labels))
                record_origin(output_dir, labels, name, {"proxy": _origin(proxy), "normalizer": normalizer})
                write_scores(path, _ids(rows), {name: proxy_wer(rows, proxy.rows(), normalizer)})
                continue
            else:
                record_origin(output_dir, labels, name, {"normalizer": normalizer})
                write_scores(path, _ids(rows), {name: label_scores(rows, name, normalizer)})
                continue
            record_origin(output_dir, labels, name, origin)
            _score_in_batches(path, name, rows, score_batch, batch_size)
    scored = read_scores(path, rows)
    for name in names if plot else ():
        plot_score(scored, name, Path(output_dir) / f"{name}.png", normalizer=normalizer)
    return {
        "scores_file": str(path),
        "num_labels": len(rows),
        "hours": sum(row["duration_seconds"] for row in rows) / 3600,
        "scores": {name: summarize_score(scored, name, normalizer) for name in names},
    }


def summarize_score(rows: Sequence[Row], name: ScoreName, normalizer: Normalizer = "english") -> dict[str, Any]:
    """How a score spreads, what thresholds would keep, and the labels to look at first.

    Args:
        rows: label rows as for `label_scores`.
        name: the score.
        normalizer: for wer and cer.

    Returns:
        `without_value`, `percentiles`, `keep` (for shares of the labels the threshold, and the hours that it keeps,
        those at the threshold included) and `worst`, the worst labels as "value id: text".
    """
    values = label_scores(rows, name, normalizer)
    usable = np.flatnonzero(np.isfinite(values))
    summary: dict[str, Any] = {"without_value": len(values) - len(usable)}
    if not len(usable):
        return summary
    higher_is_better = name in HIGHER_IS_BETTER
    summary["percentiles"] = {str(percent): float(np.percentile(values[usable], percent)) for percent in PERCENTILES}
    seconds = [row["duration_seconds"] for row in rows]
    thresholds, hours = kept_hours_curve(values, seconds, higher_is_better=higher_is_better)
    best_first = usable[np.argsort(-values[usable] if higher_is_better else values[usable], kind="stable")]
    summary["keep"] = {}
    for fraction in KEEP_FRACTIONS:
        threshold = values[best_first[max(1, round(fraction * len(usable))) - 1]]
        kept_hours = float(hours[int(np.flatnonzero(thresholds == threshold)[0])])
        summary["keep"][str(fraction)] = {"threshold": float(threshold), "kept_hours": kept_hours}
    summary["worst"] = [
        f"{values[index]:.4g} {rows[index]['id']}: {rows[index]['text']}" for index in best_first[::-1][:NUM_WORST]
    ]
    return summary


def _check_names(names: Sequence[ScoreName], models: dict[str, Any]) -> None:
    unknown = sorted(set(names) - set(get_args(ScoreName)))
    if unknown or not names:
        raise ValueError(
            f"unknown scores {', '.join(unknown) or '(none given)'}; choose from {', '.join(get_args(ScoreName))}"
        )
    for name in names:
        missing = [f"--{model.replace('_', '-')}" for model in NEEDED.get(name, ()) if models[model] is None]
        if missing:
            raise ValueError(f"score {name} needs {' and '.join(missing)}")


def _labelled_rows(store: LabelStore, manifest: Manifest) -> list[Row]:
    """Label rows as training filters them: with the manifest's text as `reference`, which windows do not have."""
    references = dict(zip(manifest.ids, manifest.rows["text"][:], strict=True))
    rows = [
        {**row, "reference": references.get(row["id"])}
        for row in store.rows()
        if all(key in references for key in clip_ids(row))
    ]
    if not rows:
        raise ValueError(
            f"label store {store.folder} holds no utterance of {manifest.path}; run `speechkd label` on this manifest"
        )
    if len({key for row in rows for key in clip_ids(row)}) < len(references):
        logger.warning("%s has labels of a part of %s only", store.folder, manifest.path)
    return rows


def _origin(store: LabelStore) -> dict[str, Any]:
    """Who made the labels, and how; corpora of several languages may differ in that alone."""
    decoding = {key: value for key, value in store.header["decoding"].items() if key != "language"}
    return {"teacher": store.header["teacher"], "decoding": decoding}


def _ids(rows: Sequence[Row]) -> list[str]:
    return [row["id"] for row in rows]


def _score_in_batches(path: Path, name: str, rows: Sequence[Row], score_batch: BatchScorer, batch_size: int) -> None:
    """Score the labels that the file has no value of; short ones first, so that batches pad little."""
    done = {row["id"] for row in read_jsonl(path) if name in row}
    pending = sorted((row for row in rows if row["id"] not in done), key=lambda row: len(row["token_ids"]))
    values: dict[str, float] = {}
    last_write = time.monotonic()
    with (
        sigterm_requests() as termination,
        tqdm(total=len(rows), initial=len(rows) - len(pending), desc=name, unit="label") as bar,
    ):
        for start in range(0, len(pending), batch_size):
            batch = pending[start : start + batch_size]
            values.update(zip(_ids(batch), score_batch(batch).tolist(), strict=True))
            if termination.received or time.monotonic() - last_write > SAVE_SECONDS:
                write_scores(path, list(values), {name: list(values.values())})
                values, last_write = {}, time.monotonic()
            if termination.received:
                raise Preempted(f"stopped by SIGTERM; the scores so far are in {path}, the same command resumes")
            bar.update(len(batch))
    write_scores(path, list(values), {name: list(values.values())})


def _entropy_scorer(store: LabelStore, manifest: Manifest, device: torch.device) -> tuple[dict[str, Any], BatchScorer]:
    """The labels' own teacher; the encoder runs only where the store does not hold its states."""
    teacher_name, decoding = store.header["teacher"]["name"], store.header["decoding"]
    model = load_whisper(teacher_name, dtype=decoding["dtype"], device=device)
    check_teacher(store, teacher_identity(teacher_name, model))
    tokens = WhisperTokens.from_tokenizer(
        load_processor(teacher_name).tokenizer, language=decoding["language"], task=decoding["task"]
    )
    # where timestamps are asked for, <|notimestamps|> is not forced and the first timestamp is a prediction
    num_prefix_tokens = len(tokens.prefix) - int(decoding.get("timestamps", False))
    log_mel = WhisperLogMel.for_model(model.config).to(device)
    waveforms = _Waveforms(manifest)

    @torch.no_grad()
    def score_batch(rows: list[Row]) -> np.ndarray:
        if "encoder_states" in store.header["targets"]:
            states = torch.stack([store.array(row["id"]) for row in rows])
        else:
            padded, _ = pad_waveforms(list(waveforms(rows)), max_samples=WINDOW_SAMPLES)
            states = encode(model, log_mel(padded.to(device)))
        entropies = whisper_label_entropy(model, states, [row["token_ids"] for row in rows], num_prefix_tokens)
        return entropies.double().cpu().numpy()

    return {}, score_batch


def _language_model_scorer(name: str, device: torch.device) -> tuple[dict[str, Any], BatchScorer]:
    folder = resolve_model(name)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except OSError as error:
        raise ValueError(
            f"language model {name!r} cannot be loaded: {error}; give a causal language model's folder or Hub id, or "
            "bundled:smollm2-135m"
        ) from error

    model = model.to(device).eval()

    def score_batch(rows: list[Row]) -> np.ndarray:
        return language_model_nll([row["text"] for row in rows], model, tokenizer, len(rows))

    return {"language_model": teacher_identity(name, model)}, score_batch


def _cosine_scorer(
    speech_name: str, text_name: str, manifest: Manifest, device: torch.device
) -> tuple[dict[str, Any], BatchScorer]:
    encode_speech, speech_identity = load_speech_encoder(speech_name, device)
    encode_text, text_identity = load_text_encoder(text_name, device)
    waveforms = _Waveforms(manifest)

    def score_batch(rows: list[Row]) -> np.ndarray:
        texts = [row["text"] for row in rows]
        values = speech_text_scores(waveforms(rows), texts, encode_speech, encode_text, len(rows))
        return np.where([text is None for text in texts], math.nan, values)

    return {"speech_encoder": speech_identity, "text_encoder": text_identity}, score_batch


class _Waveforms:
    """Audio of label rows, also of windows joined from clips."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.positions = {key: index for index, key in enumerate(manifest.ids)}

    def __call__(self, rows: Sequence[Row]) -> Iterator[torch.Tensor]:
        for row in rows:
            utterance = row
            if "parts" in row:
                parts = [self.manifest[self.positions[part["id"]]] | part for part in row["parts"]]
                utterance = {**row, "parts": parts}
            else:
                utterance = self.manifest[self.positions[row["id"]]]
            yield load_pack(utterance, SAMPLE_RATE_HZ)
