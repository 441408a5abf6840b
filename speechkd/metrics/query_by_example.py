"""Query by example: does a spoken query occur in a spoken document? Frames are compared, nothing is trained.

The task of SUPERB, Yang et al. 2021, https://arxiv.org/abs/2105.01051, as its toolkit s3prl defines it: every query
is aligned with every document by dynamic time warping that may begin and end anywhere in the document.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

MIN_QUERY_FRAMES = 5  # shorter queries match everything, so they are not looked for
DETECTION_THRESHOLD = 2.0  # deviations above the mean of the query's scores
DOCUMENTS_AT_ONCE = 256  # their distances to a query of 100 frames take 100 MB where documents have 500
QUESST_BETA = 12.49  # of QUESST: a false alarm costs 1, a miss 100, and the prior is 0.0008: (1 / 0.0008 - 1) / 100


@dataclass(frozen=True)
class QueryScores:
    """How well queries are found. Values of 1 are perfect.

    Args:
        mtwv: term weighted value at the best threshold; 0 at least, which is what finding nothing scores.
        atwv: the same at the fixed threshold of 2 deviations; may be below 0.
        threshold: the best one, infinite where finding nothing is best.
        top1: share of queries whose best document holds them; ties count in part.
        chance: the same for random scores.
        num_queries: queries scored.
        num_documents: documents searched for each.
        num_short: queries scored as never found, as they are too short.
    """

    mtwv: float
    atwv: float
    threshold: float
    top1: float
    chance: float
    num_queries: int
    num_documents: int
    num_short: int


def query_by_example(
    queries: Mapping[str, ArrayLike], documents: Mapping[str, ArrayLike], is_target: ArrayLike
) -> QueryScores:
    """Score one layer's frames on a list of queries and documents. SUPERB takes the layer that is best on dev data.

    Args:
        queries: frames of each query, (frames, dim).
        documents: frames of each document, (frames, dim).
        is_target: whether the document holds the query, (queries, documents), bool, in the order of both mappings.

    Raises:
        ValueError: as of `match_scores` and `score_detections`.
    """
    num_short = sum(len(np.asarray(frames)) < MIN_QUERY_FRAMES for frames in queries.values())
    detections = normalised_scores(match_scores(queries, documents))
    return score_detections(detections, is_target, num_short=num_short)


def match_scores(queries: Mapping[str, ArrayLike], documents: Mapping[str, ArrayLike]) -> np.ndarray:
    """How well each query matches some stretch of each document, higher is better, 0 at most.

    Every dimension gets mean 0 and variance 1 over all frames of queries and documents. The distance of two frames is
    exp(1 - cosine) - 1, scaled for every query frame to 0 to 1 over the document. The score is minus the
    distance along the best path, a mean over query frames: see `open_ended_dtw`.

    Args:
        queries: as of `query_by_example`.
        documents: as of `query_by_example`.

    Returns:
        (queries, documents), float64; rows of queries below 5 frames are 0.

    Raises:
        ValueError: there is no query or no document, one has no frame, another width, or NaN or infinite values.
    """
    query_frames, document_frames = _frames(queries, "query"), _frames(documents, "document")
    widths = {frames.shape[1] for frames in query_frames + document_frames}
    if len(widths) > 1:
        raise ValueError(f"frames have the widths {sorted(widths)}; take queries and documents of one layer")
    centre, spread = _centre_and_spread(query_frames + document_frames)
    unit_queries = [_unit_rows((frames - centre) / spread) for frames in query_frames]
    scores = np.zeros((len(query_frames), len(document_frames)))
    for start in range(0, len(document_frames), DOCUMENTS_AT_ONCE):
        chunk = document_frames[start : start + DOCUMENTS_AT_ONCE]
        lengths = np.array([len(frames) for frames in chunk])
        unit_documents = _unit_rows((np.concatenate(chunk) - centre) / spread)
        real = np.arange(lengths.max()) < lengths[:, None]  # (documents, frames)
        for row, query in enumerate(unit_queries):
            if len(query) < MIN_QUERY_FRAMES:
                continue
            distances = np.full((*real.shape, len(query)), math.inf)
            distances[real] = np.exp(1 - unit_documents @ query.T) - 1
            lowest = distances.min(axis=1, keepdims=True)
            highest = distances.max(axis=1, keepdims=True, initial=-math.inf, where=real[:, :, None])
            scaled = (distances - lowest) / np.maximum(highest - lowest, 1e-9)
            scores[row, start : start + len(chunk)] = -open_ended_dtw(scaled.transpose(0, 2, 1))
    return scores


def open_ended_dtw(distances: ArrayLike) -> np.ndarray:
    """Least mean distance of a query along a path through any stretch of each document, (documents,), float64.

    With every query frame the path stays at its document frame, or goes on by one or two; it may begin and end
    anywhere. Giorgino 2009, https://doi.org/10.18637/jss.v031.i07, calls these steps asymmetric.

    Args:
        distances: of every query frame to every document frame, (documents, query frames, document frames); infinite
            where a document is padded at its end.

    Raises:
        ValueError: it has another shape, or no query frame or document frame.
    """
    table = np.asarray(distances, dtype=np.float64)
    if table.ndim != 3 or 0 in table.shape:
        raise ValueError(
            f"distances are {table.shape}; alignment needs (documents, query frames, document frames), one or more of "
            "each"
        )
    cost = table[:, 0]
    for step in range(1, table.shape[1]):
        best = cost.copy()
        np.minimum(best[:, 1:], cost[:, :-1], out=best[:, 1:])
        np.minimum(best[:, 2:], cost[:, :-2], out=best[:, 2:])
        cost = best + table[:, step]
    return cost.min(axis=1) / table.shape[1]


def normalised_scores(scores: ArrayLike) -> np.ndarray:
    """Scores of each query less their mean, over their standard deviation; 0 where all are equal.

    Args:
        scores: (queries, documents).
    """
    table = np.asarray(scores, dtype=np.float64)
    return (table - table.mean(axis=1, keepdims=True)) / np.maximum(table.std(axis=1, keepdims=True), 1e-9)


def term_weighted_value(
    scores: ArrayLike, is_target: ArrayLike, threshold: float, *, beta: float = QUESST_BETA
) -> float:
    """1 - the mean over queries of (misses + beta * false alarms), both as shares of what they can be.

    Spoken term detection evaluation of NIST, Fiscus et al. 2007. A document is detected where its score is above the
    threshold. 1 is perfect, 0 what detecting nothing scores, and detecting everything scores 1 - beta.

    Args:
        scores: (queries, documents).
        is_target: whether the document holds the query, (queries, documents), bool.
        threshold: of the scores.
        beta: weight of false alarms.

    Raises:
        ValueError: shapes do not fit, there is no query, a score is NaN or infinite, or a query has no target or
            nothing but targets.
    """
    table, targets = _checked(scores, is_target)
    detected = table > threshold
    return float(1 - _costs(detected & targets, detected & ~targets, targets, beta).mean())


def best_threshold(scores: ArrayLike, is_target: ArrayLike, *, beta: float = QUESST_BETA) -> float:
    """The threshold of the highest term weighted value, infinite where detecting nothing is best.

    Args:
        scores, is_target, beta: as of `term_weighted_value`.

    Raises:
        ValueError: as of `term_weighted_value`.
    """
    table, targets = _checked(scores, is_target)
    # what a detection adds to the mean value: a hit of a query with few targets more than one of a query with many
    num_targets = targets.sum(axis=1, keepdims=True)
    gains = np.where(targets, 1 / num_targets, -beta / (targets.shape[1] - num_targets)).ravel() / len(targets)
    order = np.argsort(-table.ravel(), kind="stable")
    values, totals = table.ravel()[order], np.cumsum(gains[order])
    last_of_score = np.append(np.flatnonzero(np.diff(values)), len(values) - 1)  # equal scores are detected together
    best = int(np.argmax(totals[last_of_score]))
    if totals[last_of_score[best]] <= 1e-12:
        return math.inf
    end = last_of_score[best]
    return float((values[end] + values[end + 1]) / 2) if end + 1 < len(values) else -math.inf


def score_detections(
    scores: ArrayLike, is_target: ArrayLike, *, num_short: int = 0, beta: float = QUESST_BETA
) -> QueryScores:
    """Term weighted values and top-1 of scores that are comparable across queries, such as `normalised_scores`.

    Args:
        scores, is_target, beta: as of `term_weighted_value`.
        num_short: queries that were not looked for; it is reported.

    Raises:
        ValueError: as of `term_weighted_value`.
    """
    table, targets = _checked(scores, is_target)
    threshold = best_threshold(table, targets, beta=beta)
    best = table == table.max(axis=1, keepdims=True)
    return QueryScores(
        mtwv=term_weighted_value(table, targets, threshold, beta=beta),
        atwv=term_weighted_value(table, targets, DETECTION_THRESHOLD, beta=beta),
        threshold=threshold,
        top1=float(((best & targets).sum(axis=1) / best.sum(axis=1)).mean()),
        chance=float(targets.mean()),
        num_queries=len(table),
        num_documents=table.shape[1],
        num_short=num_short,
    )


def _costs(hits: np.ndarray, false_alarms: np.ndarray, targets: np.ndarray, beta: float) -> np.ndarray:
    """What each query loses, (queries,)."""
    num_targets = targets.sum(axis=1)
    missed = 1 - hits.sum(axis=1) / num_targets
    return missed + beta * false_alarms.sum(axis=1) / (targets.shape[1] - num_targets)


def _frames(clips: Mapping[str, ArrayLike], kind: str) -> list[np.ndarray]:
    if not clips:
        raise ValueError(f"there is no {kind}; check the lists")
    frames = []
    for name, values in clips.items():
        table = np.asarray(values)  # no copy of memory-mapped frames
        if table.ndim != 2 or 0 in table.shape or not np.isfinite(table).all():
            raise ValueError(
                f"{kind} {name!r} has frames {table.shape}, or NaN or infinite values in them; give (frames, dim), one "
                "frame or more, encoded in float32"
            )
        frames.append(table)
    return frames


def _centre_and_spread(clips: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each dimension over all frames, (dim,), without a copy of all frames."""
    num_frames = sum(len(frames) for frames in clips)
    centre = np.sum([frames.sum(axis=0, dtype=np.float64) for frames in clips], axis=0) / num_frames
    variance = np.sum([np.square(frames - centre).sum(axis=0) for frames in clips], axis=0) / num_frames
    return centre, np.maximum(np.sqrt(variance), 1e-9)


def _unit_rows(frames: np.ndarray) -> np.ndarray:
    """Rows of length 1; a zero row stays, so its cosine with all is 0."""
    lengths = np.linalg.norm(frames, axis=1, keepdims=True)
    return frames / np.where(lengths > 0, lengths, 1)


def _checked(scores: Any, is_target: Any) -> tuple[np.ndarray, np.ndarray]:
    table, targets = np.asarray(scores, dtype=np.float64), np.asarray(is_target)
    if table.ndim != 2 or table.shape != targets.shape or 0 in table.shape or targets.dtype != bool:
        raise ValueError(
            f"scores {table.shape} and targets {targets.shape} of {targets.dtype} do not fit; both must be (queries, "
            "documents), one or more of each, the targets of bool"
        )
    broken = np.argwhere(~np.isfinite(table))
    if len(broken):
        raise ValueError(
            f"query {broken[0][0]} scores {table[tuple(broken[0])]} on document {broken[0][1]}; look at it"
        )
    counts: Sequence[int] = targets.sum(axis=1).tolist()
    for query, count in enumerate(counts):
        if not 0 < count < table.shape[1]:
            raise ValueError(
                f"query {query} occurs in {count} of {table.shape[1]} documents, so its misses or false alarms have no "
                "rate; leave the query out"
            )
    return table, targets
