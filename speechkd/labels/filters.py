"""Filters that keep the pseudo-labels worth training on."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Real
from types import NoneType
from typing import Any, Literal, get_args

import numpy as np

from speechkd.labels.score_store import read_scores
from speechkd.labels.scores import (
    all_caps,
    label_cer,
    label_wer,
    length_deviations,
    normalize_label,
    num_characters,
    repeated_ngrams,
)
from speechkd.labels.scores import compression_ratio as compression_ratio  # labelling imports it from here
from speechkd.metrics.normalizers import Normalizer

ScoreName = Literal[
    "wer",
    "cer",
    "proxy_wer",
    "speech_text_cosine",
    "confidence",
    "mean_entropy",
    "lm_nll",
    "words_per_second",
    "characters_per_second",
    "length_deviation",
    "compression_ratio",
    "repeated_5grams",
]
# Of every other score, low values are good
HIGHER_IS_BETTER: frozenset[ScoreName] = frozenset({"speech_text_cosine", "confidence"})
NEED_REFERENCES: frozenset[ScoreName] = frozenset({"wer", "cer"})
# The rows or `scores_file` must hold these, since they need more than a row: what computes each
STORED_SCORES: dict[ScoreName, str] = {
    "proxy_wer": "`speechkd scores --scores proxy_wer --proxy-labels DIR`",
    "speech_text_cosine": "`speechkd scores --scores speech_text_cosine --speech-encoder M --text-encoder M`",
    "mean_entropy": "`speechkd scores --scores mean_entropy`",
    "lm_nll": "`speechkd scores --scores lm_nll --language-model M`",
    "compression_ratio": "`speechkd label`",
    "confidence": "`speechkd label`",
}


@dataclass(kw_only=True)
class ScoreFilter:
    """One score and where it cuts; give either `threshold` or `keep_fraction`.

    Args:
        name: the score. Percent: wer and cer against the manifest's text, proxy_wer against another model's labels.
            Good when high: speech_text_cosine (-1 to 1) and confidence (geometric mean of token probabilities, 0 to
            1). Good when low: mean_entropy (0 to 1), lm_nll (nats per token), words_per_second, characters_per_second,
            length_deviation (|ln| of the characters per second over their median), compression_ratio, repeated_5grams.
        threshold: worst value that is kept.
        keep_fraction: share of the labels to keep, best first, above 0 and up to 1; equal ones in the order of their
            ids. Labels that have no reference to be judged by stay and are not counted.
        at_threshold: what becomes of a label exactly at the threshold. For wer, Distil-Whisper's code drops it.
    """

    name: ScoreName
    threshold: float | None = None
    keep_fraction: float | None = None
    at_threshold: Literal["keep", "drop"] = "keep"

    def __post_init__(self) -> None:
        if self.name not in get_args(ScoreName):
            raise ValueError(f"unknown score {self.name!r}; choose one of {', '.join(get_args(ScoreName))}")
        if (self.threshold is None) == (self.keep_fraction is None):
            raise ValueError(
                f"score {self.name} has threshold={self.threshold} and keep_fraction={self.keep_fraction}; "
                "set exactly one of them"
            )
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ValueError(f"the threshold of score {self.name} must be a finite number, got {self.threshold}")
        if self.keep_fraction is not None and not 0 < self.keep_fraction <= 1:
            raise ValueError(
                f"keep_fraction of score {self.name} must be above 0 and at most 1, got {self.keep_fraction}"
            )
        if self.at_threshold not in ("keep", "drop"):
            raise ValueError(f"at_threshold must be keep or drop, got {self.at_threshold!r}")


@dataclass(kw_only=True)
class FilterConfig:
    """Which pseudo-labels are kept; null switches a filter off.

    Args:
        max_wer: word error rate of the label against the manifest's text, in percent. Labels without such a text are
            not judged; labels whose text is empty after normalisation are dropped. Distil-Whisper takes 10 for
            English; for noisy text take the teacher's own error rate.
        wer_rule: "<" drops a label at exactly max_wer, as Distil-Whisper's code does; "<=" keeps it, as its paper says.
        wer_normalizer: applied to both sides of error rates. "basic" cuts Devanagari, Arabic and other words apart at
            their marks: use "keep_marks" for these and for scripts without spaces between words (it counts characters
            there), "arabic" to ignore vowel signs; see `speechkd.metrics.normalizers.get_normalizer`.
        min_mean_logprob: lowest mean natural log-probability of the label's tokens; -1 is Whisper's own threshold.
        max_compression_ratio: highest ratio of plain to zlib-compressed length; 2.4 is Whisper's own threshold.
        max_repeated_5grams: how many five-word (or five-digit) runs may repeat an earlier one. 1 leaves one phrase said
            twice and drops loops, also short ones such as seven times the same digit.
        drop_all_caps: drop labels in capitals only; those without any cased letter stay.
        drop_empty: drop labels without a word, which would teach a student to be silent.
        drop_unfinished: drop labels that the length limit cut off; without an end token they teach a student to run on.
        scores: further filters, each on one score.
        combine_scores: whether a label must pass all of `scores` ("and") or any one of them ("or"). The filters above
            hold in both cases.
        scores_file: `scores.jsonl` of `speechkd scores`, with scores that the label store lacks.
    """

    max_wer: float | None = None
    wer_rule: Literal["<", "<="] = "<"
    wer_normalizer: Normalizer = "english"
    min_mean_logprob: float | None = -1.0
    max_compression_ratio: float | None = 2.4
    max_repeated_5grams: int | None = 1
    drop_all_caps: bool = True
    drop_empty: bool = True
    drop_unfinished: bool = True
    scores: list[ScoreFilter] = field(default_factory=list)
    combine_scores: Literal["and", "or"] = "and"
    scores_file: str | None = None

    def __post_init__(self) -> None:
        if self.wer_rule not in ("<", "<="):
            raise ValueError(f"wer_rule must be '<' or '<=', got {self.wer_rule!r}")
        if self.wer_normalizer not in get_args(Normalizer):
            raise ValueError(
                f"wer_normalizer must be one of {', '.join(get_args(Normalizer))}, got {self.wer_normalizer!r}"
            )
        if self.max_wer is not None and not self.max_wer >= 0:
            raise ValueError(f"max_wer must be 0 or more percent, got {self.max_wer}; null switches the filter off")
        if self.max_wer == 0 and self.wer_rule == "<":
            raise ValueError("max_wer 0 with wer_rule '<' keeps nothing; use '<=' to keep only labels without an error")
        if self.min_mean_logprob is not None and not self.min_mean_logprob <= 0:
            raise ValueError(f"min_mean_logprob is a log-probability, 0 or less, got {self.min_mean_logprob}")
        if self.max_compression_ratio is not None and not self.max_compression_ratio > 0:
            raise ValueError(
                f"max_compression_ratio must be above 0, got {self.max_compression_ratio}; Whisper uses 2.4"
            )
        if self.max_repeated_5grams is not None and self.max_repeated_5grams < 0:
            raise ValueError(
                f"max_repeated_5grams must be 0 or more, got {self.max_repeated_5grams}; null switches the filter off"
            )
        names = [score.name for score in self.scores]
        if len(set(names)) < len(names):
            raise ValueError(f"scores names {', '.join(names)}: a score may stand there once; keep the stricter one")
        if self.combine_scores not in ("and", "or"):
            raise ValueError(f"combine_scores must be and or or, got {self.combine_scores!r}")


@dataclass(frozen=True)
class Kept:
    """What a filter lets pass.

    Args:
        kept_utterances: labels kept.
        kept_hours: their audio.
        kept_share: kept over all utterances, 0 to 1.
    """

    kept_utterances: int
    kept_hours: float
    kept_share: float


@dataclass(frozen=True)
class FilterReport:
    """What the filters did.

    Args:
        num_utterances: labels before filtering.
        hours: their audio.
        num_without_reference: labels that the WER filter cannot judge.
        filters: for every active filter what it alone keeps.
        kept: what all of them together keep.
        dropped: number of dropped labels by the first reason that applies to each, "no_text" before the filters in
            their order; scores combined with "or" are one reason.
    """

    num_utterances: int
    hours: float
    num_without_reference: int
    filters: dict[str, Kept]
    kept: Kept
    dropped: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report for a reader, one line a filter and a last one for all."""
        named = [(f"{name} alone keeps", kept) for name, kept in self.filters.items()]
        lines = [
            f"{what} {kept.kept_utterances} of {self.num_utterances} labels ({100 * kept.kept_share:.1f} %), "
            f"{kept.kept_hours:.2f} of {self.hours:.2f} h"
            for what, kept in [*named, ("all filters keep", self.kept)]
        ]
        judging = " and ".join(name for name in ("max_wer", "wer", "cer") if name in self.filters)
        if judging and self.num_without_reference:
            lines.insert(
                -1, f"{judging} left {self.num_without_reference} labels unjudged: they have no reference text"
            )
        if self.dropped:
            lines[-1] += "; dropped by " + ", ".join(f"{reason}: {count}" for reason, count in self.dropped.items())
        return lines


def apply_filters(rows: Sequence[dict[str, Any]], config: FilterConfig) -> tuple[list[dict[str, Any]], FilterReport]:
    """Keep the labels that pass every filter.

    Args:
        rows: label rows with `text, mean_logprob, compression_ratio, duration_seconds`, for error rates `reference`
            (text or None), and the fields of other scores. A row whose label text is None passes no filter, a score
            that is NaN, infinite or null neither.
        config: the filters.

    Returns:
        The kept rows in their order, and the report.

    Raises:
        ValueError: there are no rows, an error rate has no reference at all, a score is missing, or nothing is kept.
    """
    passes, reasons = _judge(rows, config)
    report = FilterReport(
        num_utterances=len(rows),
        hours=_hours(rows),
        num_without_reference=sum(row.get("reference") is None for row in rows),
        filters={name: _count(rows, flags) for name, flags in passes.items()},
        kept=_count(rows, [reason is None for reason in reasons]),
        dropped=dict(Counter(reason for reason in reasons if reason is not None)),
    )
    kept = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
    if not kept:
        counts = ", ".join(f"{name} keeps {alone.kept_utterances}" for name, alone in report.filters.items())
        raise ValueError(
            f"the filters keep none of {len(rows)} labels; alone, {counts or 'no filter acts, all texts are null'}; "
            "loosen the filter that keeps fewest or set it to null, and look at the labels' text"
        )
    return kept, report


def drop_reasons(rows: Sequence[dict[str, Any]], config: FilterConfig) -> list[str | None]:
    """Why each label is dropped, as in `FilterReport.dropped`; None for those that are kept.

    Args:
        rows: as for `apply_filters`.
        config: the filters.

    Returns:
        One reason a row.

    Raises:
        ValueError: as `apply_filters`, but keeping nothing is no error.
    """
    return _judge(rows, config)[1]


def label_scores(rows: Sequence[Mapping[str, Any]], name: ScoreName, normalizer: Normalizer = "english") -> np.ndarray:
    """One score of every label, for a filter or a picture.

    Args:
        rows: label rows with `text, duration_seconds`, and what the score needs: `reference` for wer and cer,
            `mean_logprob` for confidence, a field of the score's own name for the others in STORED_SCORES.
        name: the score; `ScoreFilter` gives units and directions.
        normalizer: for wer and cer.

    Returns:
        (rows,), float64. NaN where there is no text, no reference, or null in the row; infinite where the reference
        is empty after normalisation.

    Raises:
        ValueError: a row lacks a field that the score needs.
    """
    if name in STORED_SCORES:
        column = "mean_logprob" if name == "confidence" else name
        lacking = [row.get("id") for row in rows if not isinstance(row.get(column, ""), (Real, NoneType))]
        if lacking:
            raise ValueError(
                f"{len(lacking)} of {len(rows)} labels have no number as {column}, the first is {lacking[0]!r}; "
                f"{STORED_SCORES[name]} computes it"
                + (", and filters.scores_file names its scores.jsonl" if "scores" in STORED_SCORES[name] else "")
            )
        values = np.array([row[column] for row in rows], dtype=np.float64)  # None becomes NaN
        return np.exp(values) if name == "confidence" else values
    if name == "length_deviation":
        return length_deviations([row["text"] for row in rows], [row["duration_seconds"] for row in rows])
    return np.array([_row_score(row, name, normalizer) for row in rows], dtype=np.float64)


def _row_score(row: Mapping[str, Any], name: ScoreName, normalizer: Normalizer) -> float:
    text, reference, seconds = row["text"], row.get("reference"), row["duration_seconds"]
    if text is None:
        return math.nan
    if name in NEED_REFERENCES:
        if reference is None:
            return math.nan
        error_rate = (label_wer if name == "wer" else label_cer)(reference, text, normalizer)
        return math.inf if error_rate is None else error_rate
    if name == "words_per_second":
        return len(normalize_label(text, "keep_marks").split()) / seconds
    if name == "characters_per_second":
        return num_characters(text) / seconds
    return repeated_ngrams(text)[0]


def _judge(rows: Sequence[dict[str, Any]], config: FilterConfig) -> tuple[dict[str, list[bool]], list[str | None]]:
    """For every filter which rows it alone keeps, and for every row why it is dropped."""
    if not rows:
        raise ValueError("there are no labels to filter; run `speechkd label` on the training manifest first")
    needing = [] if config.max_wer is None else [f"max_wer={config.max_wer}"]
    needing += [f"score {score.name}" for score in config.scores if score.name in NEED_REFERENCES]
    if needing and all(row.get("reference") is None for row in rows):
        raise ValueError(
            f"{needing[0]} needs reference texts and none of the {len(rows)} labels has one; "
            "add `text` to the manifest, or set max_wer to null, leave wer and cer out of scores and rely on the others"
        )
    if config.scores_file is not None:
        rows = read_scores(config.scores_file, rows)
    has_text = [row["text"] is not None for row in rows]
    passes = {
        name: [known and passes_filter(row) for known, row in zip(has_text, rows, strict=True)]
        for name, passes_filter in _active_filters(config).items()
    }
    verdicts = [_judge_score(rows, score, config.wer_normalizer) for score in config.scores]
    by_score: dict[str, list[bool]] = {
        score.name: (passed | unjudged).tolist()
        for score, (passed, unjudged) in zip(config.scores, verdicts, strict=True)
    }
    decisive = {"no_text": has_text, **passes}
    if config.combine_scores == "or" and verdicts:
        # a score that cannot judge a label must not let it pass where another can
        passes_any = np.logical_or.reduce([passed for passed, _ in verdicts])
        judged_by_none = np.logical_and.reduce([unjudged for _, unjudged in verdicts])
        decisive[" or ".join(by_score)] = (passes_any | judged_by_none).tolist()
    else:
        decisive |= by_score
    reasons = [next((name for name, flags in decisive.items() if not flags[index]), None) for index in range(len(rows))]
    return {**passes, **by_score}, reasons


def _judge_score(
    rows: Sequence[dict[str, Any]], score: ScoreFilter, normalizer: Normalizer
) -> tuple[np.ndarray, np.ndarray]:
    """Which rows pass, and which cannot be judged for want of a reference; both (rows,), bool."""
    values = label_scores(rows, score.name, normalizer)
    badness = -values if score.name in HIGHER_IS_BETTER else values
    has_text = np.array([row["text"] is not None for row in rows])
    unjudged = np.zeros(len(rows), dtype=bool)
    if score.name in NEED_REFERENCES:
        unjudged = has_text & np.array([row.get("reference") is None for row in rows])
    usable = has_text & np.isfinite(badness)
    if score.threshold is not None:
        worst = -score.threshold if score.name in HIGHER_IS_BETTER else score.threshold
        return usable & ((badness <= worst) if score.at_threshold == "keep" else (badness < worst)), unjudged
    num_kept = max(1, round((score.keep_fraction or 0) * int((~unjudged).sum())))
    order = sorted(np.flatnonzero(usable).tolist(), key=lambda index: (badness[index], str(rows[index].get("id"))))
    return np.isin(np.arange(len(rows)), order[:num_kept]), unjudged


def _active_filters(config: FilterConfig) -> dict[str, Callable[[dict[str, Any]], bool]]:
    filters: dict[str, Callable[[dict[str, Any]], bool]] = {}
    max_wer, min_mean_logprob = config.max_wer, config.min_mean_logprob
    max_compression_ratio, max_repeated = config.max_compression_ratio, config.max_repeated_5grams
    if max_wer is not None:

        def passes_wer(row: dict[str, Any]) -> bool:
            if row.get("reference") is None:
                return True
            wer = label_wer(row["reference"], row["text"], config.wer_normalizer)
            return wer is not None and (wer < max_wer or (config.wer_rule == "<=" and wer == max_wer))

        filters["max_wer"] = passes_wer
    if min_mean_logprob is not None:
        filters["min_mean_logprob"] = lambda row: row["mean_logprob"] >= min_mean_logprob
    if max_compression_ratio is not None:
        filters["max_compression_ratio"] = lambda row: row["compression_ratio"] <= max_compression_ratio
    if max_repeated is not None:
        filters["max_repeated_5grams"] = lambda row: repeated_ngrams(row["text"])[0] <= max_repeated
    if config.drop_all_caps:
        filters["drop_all_caps"] = lambda row: not all_caps(row["text"])
    if config.drop_empty:
        filters["drop_empty"] = lambda row: bool(row["text"].strip())
    if config.drop_unfinished:
        filters["drop_unfinished"] = lambda row: row.get("finished", True)
    return filters


def _hours(rows: Sequence[dict[str, Any]]) -> float:
    return sum(row["duration_seconds"] for row in rows) / 3600


def _count(rows: Sequence[dict[str, Any]], flags: Sequence[bool]) -> Kept:
    kept = [row for row, passed in zip(rows, flags, strict=True) if passed]
    return Kept(kept_utterances=len(kept), kept_hours=_hours(kept), kept_share=len(kept) / len(rows))
