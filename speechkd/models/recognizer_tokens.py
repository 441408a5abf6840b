"""What a recogniser writes: characters, or pieces of words, in a file beside its weights.

tokens = Tokens.characters(texts)
numbers = tokens.encode("two small coffees")     # from 1, as 0 is the blank of CTC
tokens.save(folder)
text = Tokens.load(folder).decode(numbers)
"""

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from speechkd.files import atomic_write
from speechkd.metrics.normalizers import Normalizer, get_normalizer

TOKENS_FILE = "tokens.json"


class Tokens:
    """Symbols of a recogniser, numbered from 1.

    Args:
        tokenizer: of Hugging Face's tokenizers; its ids from 0 are the symbols.
        normalizer: applied to texts before they become symbols.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, normalizer: Normalizer) -> None:
        self.tokenizer, self.normalizer = tokenizer, normalizer

    @classmethod
    def characters(cls, texts: Iterable[str], normalizer: Normalizer = "basic") -> "Tokens":
        """Each character of these texts is a symbol, the space too.

        Raises:
            ValueError: there is none.
        """
        found = sorted({character for text in _normalized(texts, normalizer) for character in text})
        if not found:
            raise ValueError("the texts hold no character; look at the manifest, or label it with a teacher")
        tokenizer = tokenizers.Tokenizer(models.WordLevel({character: n for n, character in enumerate(found)}))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        return cls(tokenizer, normalizer)

    @classmethod
    def bpe(cls, texts: Iterable[str], num_symbols: int, normalizer: Normalizer = "basic") -> "Tokens":
        """Pieces of words by byte pair encoding, Sennrich et al. 2016, https://arxiv.org/abs/1508.07909.

        Args:
            texts: from which the pieces are learnt.
            num_symbols: of them, at most.
            normalizer: see `Tokens`.

        Raises:
            ValueError: the texts hold no character, or more than there are to be symbols.
        """
        lines = _normalized(texts, normalizer)
        num_characters = len({character for text in lines for character in text} - {" "}) + 1
        if num_characters < 2 or num_symbols < num_characters:
            raise ValueError(
                f"{num_symbols} symbols for texts of {num_characters} characters, the space included; give texts, and "
                "more symbols than characters: 500 is usual for LibriSpeech"
            )
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=num_symbols, special_tokens=[], show_progress=False)
        tokenizer.train_from_iterator(lines, trainer)
        return cls(tokenizer, normalizer)

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    @cached_property
    def _known(self) -> set[str]:
        return {character for symbol in self.tokenizer.get_vocab() for character in symbol} | {" "}

    def unknown(self, text: str) -> list[str]:
        """Characters of a text that the symbols cannot write."""
        return sorted(set(get_normalizer(self.normalizer)(text)) - self._known)

    def encode(self, text: str) -> Tensor:
        """Numbers of the symbols of a text, (symbols,), int64; empty where the normaliser leaves nothing.

        Raises:
            ValueError: the text has a character that the symbols lack.
        """
        if unknown := self.unknown(text):
            raise ValueError(
                f"characters {unknown} of {text!r} are not among the {len(self)} symbols; make the symbols of all "
                "texts that are trained on"
            )
        normalized = get_normalizer(self.normalizer)(text)
        return torch.tensor(self.tokenizer.encode(normalized).ids, dtype=torch.int64) + 1

    def decode(self, numbers: Sequence[int]) -> str:
        """The text of symbols."""
        return self.tokenizer.decode([number - 1 for number in numbers])

    def save(self, folder: str | Path) -> None:
        """Write `tokens.json` into a folder."""
        content = {"normalizer": self.normalizer, "tokenizer": json.loads(self.tokenizer.to_str())}
        with atomic_write(Path(folder) / TOKENS_FILE) as temporary:
            temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "Tokens":
        """What `save` wrote.

        Raises:
            ValueError: the folder has none.
        """
        path = Path(folder) / TOKENS_FILE
        if not path.is_file():
            raise ValueError(f"{folder} has no {TOKENS_FILE}; give the folder of a recogniser that recipes/mvq made")
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(tokenizers.Tokenizer.from_str(json.dumps(content["tokenizer"])), content["normalizer"])


def _normalized(texts: Iterable[str], normalizer: Normalizer) -> list[str]:
    normalize = get_normalizer(normalizer)
    return [normalize(text) for text in texts]
