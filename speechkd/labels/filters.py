"""Filters that keep the pseudo-labels worth training on."""

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

from whisper_normalizer.basic import BasicTextNormalizer

from speechkd.metrics.wer import Normalizer, utterance_errors

SPECIAL_TOKEN = re.compile(r"<\|[^|]*\|>")
WRITTEN_NUMBER = re.compile(r"\d[\d,]*")
QUANTITY = re.compile(r"\d{1,3}(?:,\d{3})+,?")


@dataclass(kw_only=True)
class FilterConfig:
    """Which pseudo-labels are kept; null switches a filter off.

    Args:
        max_wer: word error rate of the label against the manifest's text, in percent. Labels without such a text are
            not judged; labels whose text is empty after normalisation are dropped. Distil-Whisper takes 10 for
            English; for noisy text take the teacher's own error rate.
        wer_rule: "<" drops a label at exactly max_wer, as Distil-Whisper's code does; "<=" keeps it, as its paper says.
        wer_normalizer: applied to both sides of the WER. Use "none" for scripts with vowel signs, such as Devanagari.
        min_mean_logprob: lowest mean natural log-probability of the label's tokens; -1 is Whisper's own threshold.
        max_compression_ratio: highest ratio of plain to zlib-compressed length; 2.4 is Whisper's own threshold.
        max_repeated_5grams: how many five-word (or five-digit) runs may repeat an earlier one. 1 leaves one phrase said
            twice and drops loops, also short ones such as seven times the same digit.
        drop_all_caps: drop labels in capitals only; those without any cased letter stay.
        drop_unfinished: drop labels that the length limit cut off; without an end token they teach a student to run on.
    """

    max_wer: float | None = None
    wer_rule: Literal["<", "<="] = "<"
    wer_normalizer: Normalizer = "english"
    min_mean_logprob: float | None = -1.0
    max_compression_ratio: float | None = 2.4
    max_repeated_5grams: int | None = 1
    drop_all_caps: bool = True
    drop_unfinished: bool = True

    def __post_init__(self) -> None:
        if self.wer_rule not in ("<", "<="):
            raise ValueError(f"wer_rule must be '<' or '<=', got {self.wer_rule!r}")
        if self.wer_normalizer not in ("english", "basic", "none"):
            raise ValueError(f"wer_normalizer must be english, basic or none, got {self.wer_normalizer!r}")
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
    """

    num_utterances: int
    hours: float
    num_without_reference: int
    filters: dict[str, Kept]
    kept: Kept

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
        if "max_wer" in self.filters and self.num_without_reference:
            lines.insert(-1, f"max_wer left {self.num_without_reference} labels unjudged: they have no reference text")
        return lines


def apply_filters(rows: Sequence[dict[str, Any]], config: FilterConfig) -> tuple[list[dict[str, Any]], FilterReport]:
    """Keep the labels that pass every filter.

    Args:
        rows: label rows with `text, mean_logprob, compression_ratio, duration_seconds` and, for the WER filter,
            `reference` (text or None). A row whose label text is None passes no filter.
        config: the filters.

    Returns:
        The kept rows in their order, and the report.

    Raises:
        ValueError: there are no rows, the WER filter has no reference at all, or nothing is kept.
    """
    if not rows:
        raise ValueError("there are no labels to filter; run `speechkd label` on the training manifest first")
    num_without_reference = sum(row.get("reference") is None for row in rows)
    if config.max_wer is not None and num_without_reference == len(rows):
        raise ValueError(
            f"max_wer={config.max_wer} needs reference texts and none of the {len(rows)} labels has one; "
            "add `text` to the manifest or set max_wer to null and rely on the other filters"
        )
    passes = {
        name: [row["text"] is not None and passes_filter(row) for row in rows]
        for name, passes_filter in _active_filters(config).items()
    }
    passes_all = [
        row["text"] is not None and all(flags[index] for flags in passes.values()) for index, row in enumerate(rows)
    ]
    report = FilterReport(
        num_utterances=len(rows),
        hours=_hours(rows),
        num_without_reference=num_without_reference,
        filters={name: _count(rows, flags) for name, flags in passes.items()},
        kept=_count(rows, passes_all),
    )
    kept = [row for row, passed in zip(rows, passes_all, strict=True) if passed]
    if not kept:
        counts = ", ".join(f"{name} keeps {alone.kept_utterances}" for name, alone in report.filters.items())
        raise ValueError(
            f"the filters keep none of {len(rows)} labels; alone, {counts or 'no filter acts, all texts are null'}; "
            "loosen the filter that keeps fewest or set it to null, and look at the labels' text"
        )
    return kept, report


def label_wer(reference: str, label: str, normalizer: Normalizer) -> float | None:
    """Word error rate of a label in percent, or None where the normalised reference holds no word."""
    errors = utterance_errors(reference, label, normalizer)
    if errors["num_reference_words"] == 0:
        return None
    total = errors["substitutions"] + errors["deletions"] + errors["insertions"]
    return 100 * total / errors["num_reference_words"]


def compression_ratio(text: str) -> float:
    """Length of a text in UTF-8 bytes over its zlib-compressed length, as in Whisper; high where text repeats.

    Below 1 for texts of a few words, which zlib makes longer; 0 for an empty text.
    """
    plain = text.encode("utf-8")
    return len(plain) / len(zlib.compress(plain))


def repeated_ngrams(texts: str | Sequence[str], n: int = 5) -> tuple[int, int]:
    """How many runs of n words have occurred before, a sign of a decoder caught in a loop.

    Words are lower-cased and without punctuation. Digit runs count as single digits, so that "88888888" is a loop as
    "8 8 8 8 8 8 8 8" is; a quantity with thousands separators, "1,000,000", is one word. Scripts that put no spaces
    between words need `compression_ratio` instead.

    Args:
        texts: one text, or parts of one that are read on without a break.
        n: words in a run.

    Returns:
        Number of runs beyond the first of their kind, and number of all runs.
    """
    text = texts if isinstance(texts, str) else " ".join(texts)
    words = _word_splitter()(WRITTEN_NUMBER.sub(_split_digits, text)).split()
    runs = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return len(runs) - len(set(runs)), len(runs)


def all_caps(text: str) -> bool:
    """Whether a label has cased letters and all of them are capitals; special tokens do not count."""
    return SPECIAL_TOKEN.sub("", text).isupper()


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
    if config.drop_unfinished:
        filters["drop_unfinished"] = lambda row: row.get("finished", True)
    return filters


@cache
def _word_splitter() -> BasicTextNormalizer:
    return BasicTextNormalizer(preserve_marks=True)  # vowel signs belong to their words


def _split_digits(match: re.Match[str]) -> str:
    digits = match[0].replace(",", "")
    return f" {digits} " if QUANTITY.fullmatch(match[0]) else f" {' '.join(digits)} "


def _hours(rows: Sequence[dict[str, Any]]) -> float:
    return sum(row["duration_seconds"] for row in rows) / 3600


def _count(rows: Sequence[dict[str, Any]], flags: Sequence[bool]) -> Kept:
    kept = [row for row, passed in zip(rows, flags, strict=True) if passed]
    return Kept(kept_utterances=len(kept), kept_hours=_hours(kept), kept_share=len(kept) / len(rows))
