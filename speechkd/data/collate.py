"""Label sequences of Whisper: timestamps, prompts, shifting and masking."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
MAX_LABEL_TOKENS = 448


@dataclass(frozen=True)
class WhisperTokens:
    """Special token ids of one Whisper vocabulary, looked up by name.

    Args:
        start_of_transcript: `<|startoftranscript|>`.
        start_of_prev: `<|startofprev|>`, opens a prompt.
        no_timestamps: `<|notimestamps|>`; every id above it is a timestamp.
        no_speech: `<|nospeech|>`, named `<|nocaptions|>` in older vocabularies.
        end_of_text: `<|endoftext|>`.
        prefix: what precedes the text when no timestamps are asked for.
    """

    start_of_transcript: int
    start_of_prev: int
    no_timestamps: int
    no_speech: int
    end_of_text: int
    prefix: tuple[int, ...]

    @property
    def first_special(self) -> int:
        """Lowest special id; ids from here on are not text."""
        return self.end_of_text

    @classmethod
    def from_tokenizer(
        cls, tokenizer: PreTrainedTokenizerBase, *, language: str | None = "en", task: str = "transcribe"
    ) -> "WhisperTokens":
        """Look every id up by name.

        Args:
            tokenizer: of the teacher.
            language: language code; None for English-only models, whose prefix names no language and no task.
            task: "transcribe" or "translate".

        Raises:
            ValueError: the vocabulary lacks a token.
        """
        known = tokenizer.get_vocab()

        def find(*names: str) -> int:
            for name in names:
                if name in known:
                    return known[name]
            raise ValueError(
                f"the tokenizer knows none of {', '.join(names)}; pass a Whisper tokenizer, and for the language one "
                "of Whisper's language codes"
            )

        start, no_timestamps = find("<|startoftranscript|>"), find("<|notimestamps|>")
        middle = () if language is None else (find(f"<|{language}|>"), find(f"<|{task}|>"))
        return cls(
            start_of_transcript=start,
            start_of_prev=find("<|startofprev|>"),
            no_timestamps=no_timestamps,
            no_speech=find("<|nospeech|>", "<|nocaptions|>"),
            end_of_text=find("<|endoftext|>"),
            prefix=(start, *middle, no_timestamps),
        )


def strip_timestamps(token_ids: Sequence[int], tokens: WhisperTokens) -> list[int]:
    """Remove timestamps and say so with `<|notimestamps|>` in its place after the prefix.

    Args:
        token_ids: a whole label, from `<|startoftranscript|>` to `<|endoftext|>`.
        tokens: of the vocabulary.

    Returns:
        The label without timestamps.
    """
    kept = [token for token in token_ids if token < tokens.no_timestamps]
    position = len(tokens.prefix) - 1
    return [*kept[:position], tokens.no_timestamps, *kept[position:]]


def prepend_prompt(
    previous_ids: Sequence[int], token_ids: Sequence[int], tokens: WhisperTokens, max_tokens: int = MAX_LABEL_TOKENS
) -> list[int]:
    """Put the text of the previous segment before a label, as far as there is room.

    A prompt above half the context keeps its last `max_tokens // 2 - 1` ids; where label and prompt still do not fit,
    the prompt keeps what remains, and none at all if nothing does. Special tokens in the prompt are removed.

    Args:
        previous_ids: token ids of the previous segment.
        token_ids: a whole label.
        tokens: of the vocabulary.
        max_tokens: length of the decoder's context.

    Returns:
        `<|startofprev|>`, prompt, label; or the label alone.
    """
    prompt = [token for token in previous_ids if token < tokens.first_special]
    if len(prompt) > max_tokens // 2:
        prompt = prompt[-(max_tokens // 2 - 1) :]
    room = max_tokens - 1 - len(token_ids)
    prompt = prompt[-room:] if room > 0 else []
    return [tokens.start_of_prev, *prompt, *token_ids] if prompt else list(token_ids)


def collate_labels(
    sequences: Sequence[Sequence[int]], tokens: WhisperTokens, *, max_tokens: int = MAX_LABEL_TOKENS, pad_to: int = 0
) -> tuple[Tensor, Tensor]:
    """Decoder inputs and shifted labels of a batch.

    Padding is masked by position, never by value, since the padding id of most Whisper vocabularies is the end token's.
    In rows with a prompt everything up to and including the `<|startoftranscript|>` label is masked.

    Args:
        sequences: whole labels, with prompts where wanted.
        tokens: of the vocabulary.
        max_tokens: longest allowed sequence.
        pad_to: pad to this many ids at least.

    Returns:
        `decoder_input_ids` and `labels`, both (batch, longest - 1), int64; labels are -100 where nothing is scored.

    Raises:
        ValueError: a sequence is empty or longer than `max_tokens`.
    """
    for index, sequence in enumerate(sequences):
        if not 0 < len(sequence) <= max_tokens:
            raise ValueError(
                f"label {index} of the batch has {len(sequence)} tokens; Whisper's decoder takes 1 to {max_tokens}. "
                "Filter such labels out before training"
            )
    width = max(pad_to, *(len(sequence) for sequence in sequences))
    ids = torch.full((len(sequences), width), tokens.end_of_text, dtype=torch.int64)
    labels = torch.full((len(sequences), width), IGNORE_INDEX, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.as_tensor(sequence)
        start = list(sequence).index(tokens.start_of_transcript) + 1
        labels[row, start : len(sequence)] = torch.as_tensor(sequence[start:])
    return ids[:, :-1], labels[:, 1:]
