"""Text normalisation before words are compared: Whisper's own, and two for scripts that these spoil."""

import re
from collections.abc import Callable
from functools import cache
from typing import Literal, get_args

import regex
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

Normalizer = Literal["english", "basic", "none", "keep_marks", "arabic"]

# Python refuses to read integers above 4,300 digits, on which the English normaliser fails an assertion
OVERLONG_NUMBER = re.compile(r"\d{4000}")
# Scripts without spaces between words: every character, with its marks, stands for a word
UNSPACED = regex.compile(r"(?=[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Myanmar}\p{Khmer}])\X")
INVISIBLE = regex.compile(r"\p{Cf}")  # joiners and direction marks: nobody hears them
NOT_ARABIC = re.compile(r"[^\u0621-\u064A0-9%@\s]")  # once digits are ASCII and wasla is an alef
ARABIC_LETTERS_AND_DIGITS = str.maketrans("أإآٱ٠١٢٣٤٥٦٧٨٩", "اااا0123456789")


@cache
def get_normalizer(name: Normalizer) -> Callable[[str], str]:
    """Text normalisation of one kind.

    Args:
        name: "english" is Whisper's English normaliser: lower case, no punctuation, spelled numbers to digits,
            British to American spelling; it is kept as published, down to the lone "." that a final "..." leaves and
            that counts as a word. "basic" is Whisper's for other languages: lower case, no punctuation; it
            replaces combining marks by spaces and so cuts Devanagari, Arabic and other words apart. Both delete
            `<...>`, `[...]` and `(...)`. "none" only collapses white space. "keep_marks" is "basic" that leaves vowel
            signs and other marks with their letters, and writes scripts without spaces, such as Thai, Chinese and
            Japanese, one character a word, so that a word error rate there is one over characters. "arabic" is
            uDistil-Whisper's: Arabic letters, digits, % and @ only, without vowel signs, alef in one form, digits
            as in ASCII; Latin words vanish.

    Returns:
        A function from text to normalised text without surrounding space.

    Raises:
        ValueError: the name is unknown.
    """
    if name == "english":
        english = EnglishTextNormalizer()
        return lambda text: english(OVERLONG_NUMBER.sub(r"\g<0> ", text)).strip()
    if name == "basic":
        basic = BasicTextNormalizer(remove_diacritics=False, split_letters=False)
        return lambda text: basic(text).strip()
    if name == "none":
        return lambda text: " ".join(text.split())
    if name == "keep_marks":
        keeping = BasicTextNormalizer(preserve_marks=True)
        return lambda text: " ".join(UNSPACED.sub(r" \g<0> ", keeping(INVISIBLE.sub("", text))).split())
    if name == "arabic":
        return lambda text: " ".join(NOT_ARABIC.sub("", text.translate(ARABIC_LETTERS_AND_DIGITS)).split())
    raise ValueError(f"unknown normalizer {name!r}; choose one of {', '.join(get_args(Normalizer))}")
