"""Scores of labels on disk: `scores.jsonl`, one line a label, and `scores.json`, what they were computed from."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from speechkd.files import read_jsonl, write_json, write_jsonl

SCORES_NAME = "scores.jsonl"
ORIGINS_NAME = "scores.json"


def write_scores(path: str | Path, ids: Sequence[str], scores: Mapping[str, Sequence[float] | np.ndarray]) -> None:
    """Keep scores for `FilterConfig.scores_file`: JSONL with `id` and one field a score.

    Args:
        path: written atomically; scores that the file already has for these ids stay unless they are given anew.
        ids: of the utterances.
        scores: name to one value an id; NaN and infinity are written as null and no filter on them lets them pass.

    Raises:
        ValueError: a score has another number of values than there are ids.
    """
    columns = {}
    for name, values in scores.items():
        if len(values) != len(ids):
            raise ValueError(f"score {name!r} has {len(values)} values for {len(ids)} utterances; give one each")
        columns[name] = [float(value) if math.isfinite(value) else None for value in values]
    rows = {row["id"]: row for row in read_jsonl(path)}
    for index, key in enumerate(ids):
        rows[key] = {**rows.get(key, {"id": key}), **{name: values[index] for name, values in columns.items()}}
    write_jsonl(path, list(rows.values()))


def read_scores(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Label rows with the scores of a file that `write_scores` wrote; what a row holds already stays.

    Raises:
        ValueError: there is no such file, it is not JSONL with ids, or it lacks utterances.
    """
    if not Path(path).is_file():
        raise ValueError(f"scores_file {path} does not exist; write it with `speechkd scores`")
    try:
        scores = {row["id"]: row for row in read_jsonl(path)}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"scores_file {path} is not JSONL with an id in every line: {error!r}; write it again"
        ) from error
    lacking = [row["id"] for row in rows if row["id"] not in scores]
    if lacking:
        raise ValueError(
            f"scores_file {path} lacks {len(lacking)} of {len(rows)} labels, the first is {lacking[0]!r}; "
            "compute the scores of all labels"
        )
    return [{**scores[row["id"]], **row} for row in rows]


def record_origin(folder: str | Path, labels: Mapping[str, Any], name: str, origin: Mapping[str, Any]) -> None:
    """Note what a score is computed from, so that a run that carries on does not mix two models.

    Args:
        folder: of the scores.
        labels: whose labels are scored, such as the header of their store.
        name: of the score.
        origin: what computes it: models, settings.

    Raises:
        ValueError: the folder's scores are of other labels, or this score there was computed from something else.
    """
    path = Path(folder) / ORIGINS_NAME
    labels, origin = json.loads(json.dumps([labels, origin]))  # as they are read back: a tuple is a list there
    known: dict[str, Any] = {"labels": labels, "scores": {}}
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
    way_out = f"choose another output folder, or remove {path.parent}"
    if known["labels"] != labels:
        raise ValueError(f"{path.parent} holds scores of other labels, made by {known['labels']}; {way_out}")
    if known["scores"].get(name, origin) != origin:
        raise ValueError(
            f"{path.parent} holds {name} computed from {known['scores'][name]}, this run has {origin}; {way_out}"
        )
    if name not in known["scores"]:
        known["scores"][name] = origin
        write_json(path, known)
