"""Label sequences of Whisper: timestamps, prompts, shifting and masking."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from speechkd.data.augment import utterance_random

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


def has_timestamps(token_ids: Sequence[int], tokens: WhisperTokens) -> bool:
    """Whether a label has any timestamp."""
    return any(token > tokens.no_timestamps for token in token_ids)


def prepend_prompt(
    previous_ids: Sequence[int],
    token_ids: Sequence[int],
    tokens: WhisperTokens,
    max_tokens: int = MAX_LABEL_TOKENS,
    *,
    keep_timestamps: bool = False,
) -> list[int]:
    """Put the text of the previous segment before a label, as far as there is room.

    A prompt above half the context keeps its last `max_tokens // 2 - 1` ids; where label and prompt still do not fit,
    the prompt keeps what remains, and none at all if nothing does. Special tokens in the prompt are removed.

    Args:
        previous_ids: token ids of the previous segment.
        token_ids: a whole label.
        tokens: of the vocabulary.
        max_tokens: length of the decoder's context.
        keep_timestamps: leave timestamps in the prompt, as a decoder that writes them finds them there.

    Returns:
        `<|startofprev|>`, prompt, label; or the label alone.
    """
    prompt = [
        token
        for token in previous_ids
        if token < tokens.first_special or (keep_timestamps and token > tokens.no_timestamps)
    ]
    if len(prompt) > max_tokens // 2:
        prompt = prompt[-(max_tokens // 2 - 1) :]
    room = max_tokens - 1 - len(token_ids)
    prompt = prompt[-room:] if room > 0 else []
    return [tokens.start_of_prev, *prompt, *token_ids] if prompt else list(token_ids)


@dataclass(frozen=True)
class LabelDraws:
    """What is drawn for each label in each epoch, as in the training code of Distil-Whisper.

    Args:
        timestamp_probability: how often a label that has timestamps keeps them.
        previous_text_probability: how often the text before is the prompt.
        seed: of the run.
    """

    timestamp_probability: float = 0.0
    previous_text_probability: float = 0.0
    seed: int = 0


def draw_label(
    token_ids: Sequence[int],
    previous_ids: Sequence[int] | None,
    tokens: WhisperTokens,
    draws: LabelDraws,
    *,
    utterance_id: str,
    epoch: int,
) -> list[int]:
    """A label as it is trained on in one epoch: with its timestamps or without, with a prompt or without.

    The draws depend on the seed, the epoch and the utterance alone, so workers, ranks and resumed runs agree. The
    prompt has timestamps if the label keeps its own.

    Args:
        token_ids: a whole label.
        previous_ids: label of the window or segment before; None where there is none.
        tokens: of the vocabulary.
        draws: probabilities and seed.
        utterance_id: of the label.
        epoch: number of the pass over the data.
    """

    def drawn(probability: float, purpose: str) -> bool:
        return utterance_random(draws.seed, epoch, utterance_id, purpose).random() < probability

    label = list(token_ids)
    is_stamped = has_timestamps(label, tokens) and drawn(draws.timestamp_probability, "timestamps")
    if not is_stamped and tokens.no_timestamps not in label:
        label = strip_timestamps(label, tokens)
    if previous_ids is not None and drawn(draws.previous_text_probability, "previous_text"):
        label = prepend_prompt(previous_ids, label, tokens, keep_timestamps=is_stamped)
    return label


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
