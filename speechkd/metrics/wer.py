"""Word, character and digit error rates after text normalisation."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jiwer

from speechkd.metrics.normalizers import Normalizer, get_normalizer

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# A written number with its currency or percent sign; ordinals, "42k" and "mp3" are left to the normaliser
WRITTEN_NUMBER = re.compile(r"(?<!\w)[$€£¢]?(\d+(?:[.,]\d+)*)%?(?![.,]?\w)")


@dataclass(frozen=True)
class ErrorRates:
    """Errors of a whole corpus: total errors over total reference length, not a mean over utterances.

    Args:
        wer: word error rate in percent; above 100 where insertions abound.
        cer: character error rate in percent, spaces between words included.
        substitutions: words replaced.
        deletions: reference words missing from the hypotheses.
        insertions: hypothesis words beyond the references.
        num_reference_words: words the errors are counted against.
        num_utterances: utterances counted.
        num_empty_references: utterances left out because their normalised reference holds no word.
    """

    wer: float
    cer: float
    substitutions: int
    deletions: int
    insertions: int
    num_reference_words: int
    num_utterances: int
    num_empty_references: int


def error_rates(references: Sequence[str], hypotheses: Sequence[str], normalizer: Normalizer) -> ErrorRates:
    """Word and character error rates over corpus totals.

    Utterances whose normalised reference is empty are left out and counted, as in Whisper's evaluation.

    Args:
        references: what was said, one text an utterance.
        hypotheses: what was recognised, in the same order.
        normalizer: applied to both.

    Returns:
        Rates in percent and the counts behind them.

    Raises:
        ValueError: the sequences differ in length, or no reference holds a word.
    """
    return _corpus_rates(references, hypotheses, get_normalizer(normalizer))


def digit_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRates:
    """Error rate over single digits, whatever way a number is written; see `spell_digits`.

    Words that are no digits count too: "ate" for "eight" is a substitution, "the eight" holds an insertion.

    Args:
        references: digit strings, spelled or written.
        hypotheses: what was recognised, in the same order.

    Returns:
        `wer` is the digit error rate in percent, `num_reference_words` the number of reference digits.

    Raises:
        ValueError: the sequences differ in length, or no reference holds a digit or word.
    """
    return _corpus_rates(references, hypotheses, spell_digits)


def spell_digits(text: str) -> str:
    """Numbers as single digits: "848339", "8, 48-339" and "eight four eight three three nine" all become "8 4 8 3 3 9".

    The English normaliser alone reads written numbers as quantities ("007" becomes 7, "0 two" becomes 2) and writes
    1 as "one". So written numbers are first spelled out digit by digit; then it reads all of them alike. Zero may be
    "oh" or "o", "double seven" is 7 7, "two million" 2 0 0 0 0 0 0. Decimal points, signs, currencies, percent signs
    and ordinal endings are dropped from numbers; other words stay.

    Args:
        text: any transcript.

    Returns:
        Digits and words separated by single spaces.
    """
    words = get_normalizer("english")(WRITTEN_NUMBER.sub(_spell_out, text)).split()
    tokens: list[str] = []
    for word in words:
        if any(char.isdigit() for char in word):
            tokens += [char for char in word if char.isdigit()]
        elif word in ("one", "ones"):
            tokens.append("1")
        elif any(char.isalnum() for char in word):  # an ellipsis leaves a lone "." behind
            tokens.append(word)
    return " ".join(tokens)


def utterance_errors(reference: str, hypothesis: str, normalizer: Normalizer) -> dict[str, int]:
    """Word errors of one utterance.

    Args:
        reference: what was said.
        hypothesis: what was recognised.
        normalizer: applied to both.

    Returns:
        `substitutions, deletions, insertions, num_reference_words`; with an empty reference all words are insertions.
    """
    normalize = get_normalizer(normalizer)
    counts = jiwer.process_words(normalize(reference), normalize(hypothesis))
    return {
        "substitutions": counts.substitutions,
        "deletions": counts.deletions,
        "insertions": counts.insertions,
        "num_reference_words": len(counts.references[0]),
    }


def _corpus_rates(references: Sequence[str], hypotheses: Sequence[str], normalize: Callable[[str], str]) -> ErrorRates:
    if len(references) != len(hypotheses):
        raise ValueError(
            f"{len(references)} references and {len(hypotheses)} hypotheses differ in number; "
            "pass one hypothesis for every reference, in the same order"
        )
    pairs = [(normalize(text), hypothesis) for text, hypothesis in zip(references, hypotheses, strict=True)]
    scored = [(text, normalize(hypothesis)) for text, hypothesis in pairs if text]
    if not scored:
        raise ValueError(
            f"all {len(references)} references are empty after normalisation, so no error rate exists; "
            "check the manifest's text or choose another normalizer"
        )
    texts, recognised = [text for text, _ in scored], [hypothesis for _, hypothesis in scored]
    words = jiwer.process_words(texts, recognised)
    errors = words.substitutions + words.deletions + words.insertions
    num_words = sum(len(reference) for reference in words.references)
    return ErrorRates(
        wer=100 * errors / num_words,
        cer=100 * jiwer.process_characters(texts, recognised).cer,
        substitutions=words.substitutions,
        deletions=words.deletions,
        insertions=words.insertions,
        num_reference_words=num_words,
        num_utterances=len(scored),
        num_empty_references=len(references) - len(scored),
    )


def _spell_out(match: re.Match[str]) -> str:
    number = match[1].replace(",", "")
    return " ".join("point" if char == "." else DIGIT_NAMES[int(char)] for char in number)
