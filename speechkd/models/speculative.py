"""Speculative decoding: a student drafts tokens, its teacher checks them all in one pass and keeps its own text.

transformers' assisted generation shares the encoder too, but drops the tokens that Whisper suppresses at the start, and
its whole `generate` call for every draft made a base-sized teacher slower than it is alone.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    DynamicCache,
    EncoderDecoderCache,
    WhisperForCausalLM,
    WhisperForConditionalGeneration,
)
from transformers.utils import cached_file

from speechkd.data.collate import WhisperTokens
from speechkd.models.greedy import ruled_out_tokens
from speechkd.teachers import resolve_model

NUM_DRAFT_TOKENS = 16
MIN_DRAFT_PROBABILITY = 0.5  # a draft ends with a token that its assistant doubts, or bad drafts would be long
FRAMES_PER_SECOND = 50
MARGIN_SECONDS = 0.5
ENCODER_PREFIX = "model.encoder."


class _DecoderOnly(WhisperForCausalLM):
    _keys_to_ignore_on_load_unexpected = [r"model\.encoder\."]  # or loading prints every encoder weight as a surprise


@dataclass(frozen=True)
class Speculated:
    """One clip decoded with an assistant.

    Args:
        token_ids: the whole label, from `<|startoftranscript|>` to `<|endoftext|>` if it was reached.
        finished: the teacher ended by itself, not at the length limit.
        num_steps: passes of the teacher's decoder.
        num_drafted: tokens that the assistant proposed.
        num_accepted: proposed tokens that the teacher chose as well.
    """

    token_ids: list[int]
    finished: bool
    num_steps: int
    num_drafted: int
    num_accepted: int


def load_assistant(name: str, teacher: WhisperForConditionalGeneration) -> WhisperForCausalLM:
    """The decoder of a student that was trained with its teacher's encoder frozen.

    The student's encoder is compared with the teacher's in the file, weight by weight, and never built. On a CPU in
    float32 the linear layers become int8: drafting is bound by reading weights, and a draft need not be exact.

    Args:
        name: Hub id or folder of the student.
        teacher: the model whose encoder states the assistant reads.

    Returns:
        The assistant in eval mode, on the teacher's device and in its dtype.

    Raises:
        ValueError: not found, no Whisper, another vocabulary, or an encoder that is not the teacher's.
    """
    resolved = resolve_model(name)
    try:
        config = AutoConfig.from_pretrained(resolved)
        if config.model_type != "whisper":
            raise ValueError(f"assistant {name!r} is of type {config.model_type!r}, but this needs a Whisper model")
        if config.vocab_size != teacher.config.vocab_size:
            raise ValueError(
                f"assistant {name!r} has {config.vocab_size} tokens and the teacher {teacher.config.vocab_size}, so "
                "its drafts mean something else; take a student of this teacher (Whisper large-v3 has one token more "
                "than the earlier models)"
            )
        difference = _encoder_difference(resolved, teacher)
        if difference:
            raise ValueError(
                f"the encoder of assistant {name!r} is not the teacher's ({difference}), so it would need encoder "
                "states of its own, which costs what speculation saves; take a student of this teacher whose encoder "
                "was kept whole and frozen (freeze_encoder)"
            )
        assistant: Any = _DecoderOnly.from_pretrained(resolved, dtype=teacher.dtype, attn_implementation="sdpa")
    except OSError as error:
        raise ValueError(
            f"assistant {name!r} cannot be loaded; it needs config.json and its weights as model.safetensors"
        ) from error
    return _prepared(assistant, teacher)


def assistant_from_student(
    student: WhisperForConditionalGeneration, teacher: WhisperForConditionalGeneration
) -> WhisperForCausalLM:
    """An assistant with the decoder weights that a student has now, copied; see `load_assistant`.

    Args:
        student: shares the teacher's vocabulary and encoder, which is not checked again.
        teacher: the model whose encoder states the assistant reads.
    """
    assistant: Any = _DecoderOnly(student.config)
    weights = {name: weight for name, weight in student.state_dict().items() if not name.startswith(ENCODER_PREFIX)}
    assistant.load_state_dict(weights, strict=True)
    return _prepared(assistant.to(teacher.dtype), teacher)


def _prepared(assistant: Any, teacher: WhisperForConditionalGeneration) -> WhisperForCausalLM:
    assistant = assistant.to(teacher.device).eval()
    return _quantize(assistant) if (teacher.device.type, teacher.dtype) == ("cpu", torch.float32) else assistant


def _encoder_difference(resolved: str, teacher: WhisperForConditionalGeneration) -> str:
    """The first encoder weight that differs between a checkpoint and the teacher, in words; empty where all agree."""
    expected = teacher.model.encoder.state_dict()
    for name, weight in _encoder_weights(resolved):
        if name not in expected:
            return f"{name} is unknown to the teacher"
        theirs = expected.pop(name)
        if weight.shape != theirs.shape:
            return f"{name} is {tuple(weight.shape)} instead of {tuple(theirs.shape)}"
        if not torch.equal(weight.to(theirs), theirs):
            return f"{name} differs"
    return f"{next(iter(expected))} is missing" if expected else ""


def _encoder_weights(resolved: str) -> Iterator[tuple[str, Tensor]]:
    """Encoder weights of a checkpoint under the encoder's own names, one at a time."""
    only = cached_file(
        resolved,
        "model.safetensors",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if only is not None:
        shards = [only]
    else:
        index = json.loads(Path(str(cached_file(resolved, "model.safetensors.index.json"))).read_text())
        shards = [str(cached_file(resolved, shard)) for shard in sorted(set(index["weight_map"].values()))]
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
                if key.startswith(ENCODER_PREFIX):
                    yield key.removeprefix(ENCODER_PREFIX), file.get_tensor(key)


def _quantize(assistant: WhisperForCausalLM) -> WhisperForCausalLM:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch points to torchao, which would be one package more for this one call
        return torch.ao.quantization.quantize_dynamic(assistant, {nn.Linear}, dtype=torch.qint8, inplace=True)


def speculate(
    draft: Callable[[list[int], int], list[int]],
    verify: Callable[[list[int], list[int]], list[int]],
    prefix: Sequence[int],
    *,
    end_of_text: int,
    num_draft_tokens: int,
    max_new_tokens: int,
) -> Speculated:
    """Greedy decoding in which every step checks several proposed tokens.

    Leviathan et al. 2023, https://arxiv.org/abs/2211.17192, for greedy decoding: what both models choose is kept, and
    then the teacher's own next token, so the result is the teacher's whatever is proposed.

    Args:
        draft: from the tokens so far and a count to at most that many proposed tokens.
        verify: from the tokens so far and n proposed ones to the teacher's n + 1 choices: at each proposed position,
            and after the last.
        prefix: tokens that precede the text.
        end_of_text: ends the text, and is kept.
        num_draft_tokens: proposed tokens a step; 0 is the teacher's own greedy decoding.
        max_new_tokens: limit of decoded tokens, end token included.

    Returns:
        The decoded tokens and what the drafts were worth.

    Raises:
        ValueError: a negative number of draft tokens, or no token may be decoded.
    """
    if num_draft_tokens < 0 or max_new_tokens < 1:
        raise ValueError(
            f"num_draft_tokens must be 0 or more and max_new_tokens 1 or more, got {num_draft_tokens} and "
            f"{max_new_tokens}"
        )
    token_ids, limit = list(prefix), len(prefix) + max_new_tokens
    num_steps = num_drafted = num_accepted = 0
    while len(token_ids) < limit and (num_steps == 0 or token_ids[-1] != end_of_text):
        room = limit - len(token_ids)
        drafted = draft(token_ids, min(num_draft_tokens, room))
        chosen = verify(token_ids, drafted)
        agreed = next((i for i, token in enumerate(drafted) if token != chosen[i]), len(drafted))
        new = chosen[: min(agreed + 1, room)]
        if end_of_text in new:
            new = new[: new.index(end_of_text) + 1]
        token_ids = token_ids + new
        num_steps += 1
        num_drafted += len(drafted)
        num_accepted += min(agreed, len(new))
    return Speculated(token_ids, token_ids[-1] == end_of_text, num_steps, num_drafted, num_accepted)


@torch.no_grad()
def speculative_decode(
    teacher: WhisperForConditionalGeneration,
    assistant: WhisperForCausalLM,
    encoder_states: Tensor,
    tokens: WhisperTokens,
    *,
    num_draft_tokens: int = NUM_DRAFT_TOKENS,
    max_new_tokens: int = 224,
    duration_seconds: float = 30.0,
    on_rejection: Callable[[int, Tensor], None] | None = None,
) -> Speculated:
    """The teacher's greedy transcript without timestamps, as `greedy_decode` gives it, with fewer passes.

    In half precision a tie of two tokens may fall the other way, as checking several tokens at once rounds otherwise
    than one at a time.

    Args:
        teacher: decides every token.
        assistant: proposes them; see `load_assistant`.
        encoder_states: the teacher's, of one clip, (1, frames, dim); the assistant reads the same.
        tokens: of both vocabularies; the prefix names language and task.
        num_draft_tokens: most proposed tokens a step; a draft ends early with a token that its assistant doubts.
        max_new_tokens: limit of decoded tokens, end token included.
        duration_seconds: of the clip. A draft need not be exact, so the assistant reads no frames of the silence that
            fills the window.
        on_rejection: called wherever the teacher chose otherwise than the draft, with the position in `token_ids` and
            its logits there, (vocabulary,), float32, -inf where `generate` rules ids out.

    Returns:
        The decoded clip.

    Raises:
        ValueError: more than one clip, or limits that `speculate` refuses.
    """
    if len(encoder_states) != 1:
        raise ValueError(
            f"speculative decoding takes one clip at a time, got {len(encoder_states)}; the clips of a batch would "
            "accept different numbers of tokens, use greedy_decode for batches"
        )
    ruled_out, ruled_out_first = ruled_out_tokens(
        teacher.generation_config, teacher.config.vocab_size, tokens, timestamps=False
    ).to(teacher.device)
    heard = encoder_states[:, : round((duration_seconds + MARGIN_SECONDS) * FRAMES_PER_SECOND)]
    ours, theirs = _CachedDecoder(teacher, encoder_states), _CachedDecoder(assistant, heard)

    def draft(token_ids: list[int], count: int) -> list[int]:
        drafted: list[int] = []
        is_sure = True
        while len(drafted) < count and is_sure and tokens.end_of_text not in drafted:
            logits = theirs.logits([*token_ids, *drafted], 1) + ruled_out
            if len(token_ids) + len(drafted) == len(tokens.prefix):
                logits += ruled_out_first
            best, token = logits[0].max(dim=-1)
            is_sure = bool((best - logits[0].logsumexp(dim=-1)).exp() >= MIN_DRAFT_PROBABILITY)
            drafted.append(int(token))
        return drafted

    def verify(token_ids: list[int], drafted: list[int]) -> list[int]:
        logits = ours.logits([*token_ids, *drafted], len(drafted) + 1) + ruled_out
        if len(token_ids) == len(tokens.prefix):
            logits[0] += ruled_out_first
        chosen = logits.argmax(dim=-1).tolist()
        if on_rejection is not None:
            wrong = next((i for i, token in enumerate(drafted) if token != chosen[i]), None)
            if wrong is not None:
                on_rejection(len(token_ids) + wrong, logits[wrong])
        return chosen

    return speculate(
        draft,
        verify,
        tokens.prefix,
        end_of_text=tokens.end_of_text,
        num_draft_tokens=num_draft_tokens,
        max_new_tokens=max_new_tokens,
    )


class _CachedDecoder:
    """A decoder on one clip that computes only what follows the longest beginning it has already seen."""

    def __init__(self, model: Any, encoder_states: Tensor) -> None:
        self.model, self.encoder_states = model, encoder_states
        self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self.seen: list[int] = []

    def logits(self, token_ids: list[int], num_last: int) -> Tensor:
        """Logits after each of the last `num_last` tokens, (num_last, vocabulary), float32."""
        most = min(len(self.seen), len(token_ids) - num_last)
        kept = next((i for i in range(most) if self.seen[i] != token_ids[i]), most)
        self.cache.crop(kept - len(self.seen))  # negative: so many tokens are taken away
        states = self.model.model.decoder(
            input_ids=torch.tensor([token_ids[kept:]], device=self.encoder_states.device),
            encoder_hidden_states=self.encoder_states,
            cache=self.cache,
            use_cache=True,
        ).last_hidden_state
        self.seen = list(token_ids)
        return self.model.proj_out(states[0, -num_last:]).float()
