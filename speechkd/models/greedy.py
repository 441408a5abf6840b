"""Greedy decoding of a batch of clips by Whisper, with the cross-attention keys computed once.

transformers' `generate` gives the same tokens, but keeps finished clips in the batch to the end, and says nothing about
speech unless the decoder runs a second time.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    WhisperForConditionalGeneration,
    WhisperTimeStampLogitsProcessor,
)

from speechkd.data.collate import WhisperTokens

COMPACT_BELOW = 0.75  # copying the caches costs about what a step reads, so it must save several steps' worth


@dataclass
class GreedyTokens:
    """What one clip was decoded to.

    Args:
        no_speech_prob: probability of `<|nospeech|>` after `<|startoftranscript|>`.
        token_ids: decoded tokens without the prefix, `<|endoftext|>` included if it was reached.
        logprobs: natural log-probability of each.
    """

    no_speech_prob: float
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@torch.no_grad()
def greedy_tokens(
    model: WhisperForConditionalGeneration,
    encoder_states: Tensor,
    tokens: WhisperTokens,
    *,
    max_new_tokens: int,
    timestamps: bool = False,
) -> list[GreedyTokens]:
    """The most likely token at each step, under the suppression rules of the model's generation config.

    Args:
        model: teacher or student.
        encoder_states: last hidden states of the encoder, (batch, frames, dim).
        tokens: of the model's vocabulary; its prefix is the prompt, without `<|notimestamps|>` for timestamps.
        max_new_tokens: limit of decoded tokens, end token included.
        timestamps: Whisper's rules for timestamps hold; else there are none.

    Returns:
        One result per clip, in order.
    """
    prompt = list(tokens.prefix[:-1] if timestamps else tokens.prefix)
    rules = _LogitRules(model, tokens, len(prompt), timestamps)
    decoder = _BatchDecoder(model, encoder_states)
    states = decoder.step(torch.tensor([prompt] * len(encoder_states), device=encoder_states.device))
    # the first position sees the start token alone, so this is what a pass over it alone would give
    no_speech = model.proj_out(states[:, 0]).float().softmax(dim=-1)[:, tokens.no_speech]
    results = [GreedyTokens(probability) for probability in no_speech.tolist()]
    rows = list(range(len(results)))  # which clip each row of the batch is
    for step in range(max_new_tokens):
        sequences = [[*prompt, *results[clip].token_ids] for clip in rows] if timestamps else []
        scores = rules(model.proj_out(states[:, -1]).float(), sequences, is_first=step == 0)
        best, chosen = scores.max(dim=-1)
        logprobs = (best - scores.logsumexp(dim=-1)).tolist()
        unfinished = []
        for row, (clip, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            result = results[clip]
            if result.token_ids and result.token_ids[-1] == tokens.end_of_text:
                continue  # it waits in its row until enough others have ended
            result.token_ids.append(token)
            result.logprobs.append(logprobs[row])
            if token != tokens.end_of_text:
                unfinished.append(row)
        if not unfinished or step + 1 == max_new_tokens:
            break
        if len(unfinished) <= COMPACT_BELOW * len(rows):
            kept = torch.tensor(unfinished, device=chosen.device)
            decoder.select(kept)
            chosen, rows = chosen[kept], [rows[row] for row in unfinished]
        states = decoder.step(chosen[:, None])
    return results


def ruled_out_tokens(generation: Any, vocab_size: int, tokens: WhisperTokens, *, timestamps: bool) -> Tensor:
    """What `generate` adds to all logits, and to those of the first text token as well: minus infinity where ruled out.

    Args:
        generation: the model's generation config.
        vocab_size: of the model.
        tokens: of its vocabulary.
        timestamps: whether they are asked for; if not they are ruled out, as a weak student may emit them all the same.

    Returns:
        Both, (2, vocab_size), float32.
    """
    added = torch.zeros(2, vocab_size)
    added[0, getattr(generation, "suppress_tokens", None) or []] = -torch.inf
    added[1, getattr(generation, "begin_suppress_tokens", None) or []] = -torch.inf
    if not timestamps:
        added[0, tokens.no_timestamps + 1 :] = -torch.inf
    return added


class _LogitRules:
    """What `generate` rules out, by minus infinity, in its order: at the start, always, then by timestamps."""

    def __init__(
        self, model: WhisperForConditionalGeneration, tokens: WhisperTokens, prompt_length: int, timestamps: bool
    ) -> None:
        generation: Any = model.generation_config
        added = ruled_out_tokens(generation, model.config.vocab_size, tokens, timestamps=timestamps)
        self.always, self.first = added.to(model.device)
        self.timestamps = WhisperTimeStampLogitsProcessor(generation, prompt_length) if timestamps else None

    def __call__(self, scores: Tensor, sequences: list[list[int]], *, is_first: bool) -> Tensor:
        scores = scores + self.always
        if is_first:
            scores += self.first
        if self.timestamps is None:
            return scores
        # rows of finished clips are shorter; the rules read each row by itself, and theirs are not used
        longest = max(map(len, sequences))
        padded = [[*sequence, *sequence[-1:] * (longest - len(sequence))] for sequence in sequences]
        return self.timestamps(torch.tensor(padded), scores)


class _BatchDecoder:
    """A decoder with its caches; rows of finished clips can be dropped."""

    def __init__(self, model: WhisperForConditionalGeneration, encoder_states: Tensor) -> None:
        self.decoder, self.encoder_states = model.model.decoder, encoder_states
        self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

    def step(self, input_ids: Tensor) -> Tensor:
        """States of the new tokens, (batch, tokens, dim)."""
        return self.decoder(
            input_ids=input_ids,
            encoder_hidden_states=self.encoder_states,
            cache=self.cache,
            use_cache=True,
        ).last_hidden_state

    def select(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.encoder_states = self.encoder_states[: len(rows)]  # only read for the keys, which the cache has by now
