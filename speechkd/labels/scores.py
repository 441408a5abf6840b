"""Scores of pseudo-labels, with a reference (Distil-Whisper) and without one (uDistil-Whisper).

Gandhi et al. 2023, https://arxiv.org/abs/2311.00430; Waheed et al. 2025, https://arxiv.org/abs/2407.01257. Those that
need another model are computed once for a whole label store, by `speechkd.labels.score_labels`.
"""

import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rapidfuzz.distance import Levenshtein
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, WhisperForConditionalGeneration
from whisper_normalizer.basic import BasicTextNormalizer

from speechkd.metrics.normalizers import Normalizer, get_normalizer

SPECIAL_TOKEN = re.compile(r"<\|[^|]*\|>")
WRITTEN_NUMBER = re.compile(r"\d[\d,]*")
QUANTITY = re.compile(r"\d{1,3}(?:,\d{3})+,?")


def normalize_label(text: str, normalizer: Normalizer) -> str:
    """A text as words are compared, separated by single spaces; special tokens are dropped, timestamps too.

    Args:
        text: transcript.
        normalizer: see `get_normalizer`.
    """
    return " ".join(get_normalizer(normalizer)(SPECIAL_TOKEN.sub(" ", text)).split())


def label_wer(reference: str, label: str, normalizer: Normalizer) -> float | None:
    """Word error rate of a label in percent, or None where the normalised reference holds no word."""
    words = normalize_label(reference, normalizer).split()
    if not words:
        return None
    return 100 * Levenshtein.distance(words, normalize_label(label, normalizer).split()) / len(words)


def label_cer(reference: str, label: str, normalizer: Normalizer) -> float | None:
    """Character error rate of a label in percent, or None where the normalised reference is empty.

    Characters are code points, so a vowel sign counts as one; white space does not count, since scripts without
    spaces between words are written with or without some.
    """
    characters = normalize_label(reference, normalizer).replace(" ", "")
    if not characters:
        return None
    return 100 * Levenshtein.distance(characters, normalize_label(label, normalizer).replace(" ", "")) / len(characters)


def proxy_wer(
    rows: Sequence[Mapping[str, Any]], proxy_rows: Iterable[Mapping[str, Any]], normalizer: Normalizer
) -> np.ndarray:
    """Word error rate of labels against another model's, which stands in for the missing reference.

    Args:
        rows: label rows with `id, text`.
        proxy_rows: rows of the other model's label store, in any order.
        normalizer: applied to both.

    Returns:
        Percent, (rows,): 0 where both say the same. Where the other model hears nothing, its silence counts as one
        word, so three words there are 300. NaN where either text is None.

    Raises:
        ValueError: the other store lacks utterances.
    """
    proxies = {row["id"]: row["text"] for row in proxy_rows}
    lacking = [row["id"] for row in rows if row["id"] not in proxies]
    if lacking:
        raise ValueError(
            f"the proxy model's labels lack {len(lacking)} of {len(rows)} utterances, the first is {lacking[0]!r}; "
            "run `speechkd label` with the proxy model on the same manifest"
        )
    values = []
    for row in rows:
        proxy, text = proxies[row["id"]], row["text"]
        if proxy is None or text is None:
            values.append(math.nan)
            continue
        proxy_words = normalize_label(proxy, normalizer).split()
        errors = Levenshtein.distance(proxy_words, normalize_label(text, normalizer).split())
        values.append(100 * errors / max(1, len(proxy_words)))
    return np.array(values, dtype=np.float64)


def num_characters(text: str) -> int:
    """Characters of a text without white space, punctuation and special tokens."""
    return len(normalize_label(text, "keep_marks").replace(" ", ""))


def length_deviations(texts: Sequence[str | None], durations_seconds: Sequence[float]) -> np.ndarray:
    """How far the characters per second of each label lie from their median, up or down.

    Too many are a loop or an invention, too few are words left out.

    Args:
        texts: labels of one language.
        durations_seconds: their audio.

    Returns:
        |natural log of rate over median|, (texts,): 0.69 is half or twice the usual. Infinite for an empty text, NaN
        for None and where every text is empty.
    """
    rates = np.array(
        [
            math.nan if text is None else num_characters(text) / seconds
            for text, seconds in zip(texts, durations_seconds, strict=True)
        ]
    )
    spoken = rates[rates > 0]
    if not len(spoken):
        return np.full(len(rates), math.nan)
    with np.errstate(divide="ignore"):
        return np.abs(np.log(rates / np.median(spoken)))


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
    words = _keeping_marks()(WRITTEN_NUMBER.sub(_split_digits, text)).split()
    runs = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return len(runs) - len(set(runs)), len(runs)


def all_caps(text: str) -> bool:
    """Whether a label has cased letters and all of them are capitals; special tokens do not count."""
    return SPECIAL_TOKEN.sub("", text).isupper()


def speech_text_cosine(speech_embeddings: np.ndarray | Tensor, text_embeddings: np.ndarray | Tensor) -> np.ndarray:
    """Cosine of what was heard and what the label says, in one space for speech and text, such as SONAR's.

    Args:
        speech_embeddings: of the clips, (rows, dim).
        text_embeddings: of their labels, same shape and order.

    Returns:
        -1 to 1, (rows,); NaN where an embedding is zero or not finite.

    Raises:
        ValueError: the shapes differ or are not (rows, dim).
    """
    speech = torch.as_tensor(speech_embeddings).detach().double().cpu()
    text = torch.as_tensor(text_embeddings).detach().double().cpu()
    if speech.shape != text.shape or speech.ndim != 2:
        raise ValueError(
            f"speech {tuple(speech.shape)} and text {tuple(text.shape)} embeddings must both be (rows, dim), one row a "
            "label, from encoders that share a space"
        )
    lengths = speech.norm(dim=-1) * text.norm(dim=-1)
    return ((speech * text).sum(dim=-1) / lengths).clamp(-1, 1).numpy()


def speech_text_scores(
    waveforms: Iterable[Tensor],
    texts: Sequence[str | None],
    encode_speech: Callable[[list[Tensor]], np.ndarray | Tensor],
    encode_text: Callable[[list[str]], np.ndarray | Tensor],
    batch_size: int = 16,
) -> np.ndarray:
    """`speech_text_cosine` of clips and labels in batches, so that audio may come from a generator.

    Args:
        waveforms: one a label, (samples,), at the rate that `encode_speech` expects.
        texts: the labels, in the same order; None is read as an empty text.
        encode_speech: waveforms to (batch, dim).
        encode_text: texts to (batch, dim).
        batch_size: clips encoded together.

    Returns:
        (texts,), float64.

    Raises:
        ValueError: there are more or fewer waveforms than texts.
    """
    clips = iter(waveforms)
    cosines = [np.zeros(0)]
    for start in range(0, len(texts), batch_size):
        batch = [text or "" for text in texts[start : start + batch_size]]
        heard = list(islice(clips, len(batch)))
        if len(heard) < len(batch):
            raise ValueError(f"{start + len(heard)} waveforms for {len(texts)} texts; give one each, in the same order")
        cosines.append(speech_text_cosine(encode_speech(heard), encode_text(batch)))
    if next(clips, None) is not None:
        raise ValueError(f"more waveforms than the {len(texts)} texts; give one each, in the same order")
    return np.concatenate(cosines)


def token_entropies(logits: Tensor) -> Tensor:
    """Entropy of each predicted distribution in nats, computed in float32.

    Args:
        logits: (..., vocabulary).

    Returns:
        (...).
    """
    logprobs = logits.float().log_softmax(dim=-1)
    return torch.special.entr(logprobs.exp()).sum(dim=-1)  # a ruled-out token adds 0, not NaN


def mean_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean entropy of an utterance's predictions, over the log of the vocabulary's size; low is certain.

    Args:
        logits: (batch, tokens, vocabulary).
        mask: True on the label's own tokens, (batch, tokens), bool.

    Returns:
        0 to 1, (batch,); NaN where no token is left.

    Raises:
        ValueError: the shapes do not belong together.
    """
    if logits.shape[:-1] != mask.shape:
        raise ValueError(f"mask {tuple(mask.shape)} does not cover logits {tuple(logits.shape)}: one flag a token")
    # utterance by utterance: the float32 copies of a whole batch would take gigabytes
    means = [token_entropies(row[flags]).mean() for row, flags in zip(logits, mask, strict=True)]
    return torch.stack(means) / math.log(logits.shape[-1])


@torch.no_grad()
def whisper_label_entropy(
    model: WhisperForConditionalGeneration,
    encoder_states: Tensor,
    token_ids: Sequence[Sequence[int]],
    num_prefix_tokens: int,
) -> Tensor:
    """`mean_entropy` of labels under the Whisper that made them, all tokens in one forward pass.

    Args:
        model: the teacher.
        encoder_states: last hidden states, (batch, frames, dim), of any dtype: stores keep float16.
        token_ids: of the labels, as the label store has them.
        num_prefix_tokens: leading tokens that were forced, `len(WhisperTokens.prefix)`.

    Returns:
        (batch,), float32.
    """
    lengths = torch.tensor([len(ids) for ids in token_ids], device=model.device)
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in token_ids], batch_first=True)
    padded, states = padded.to(model.device), encoder_states.to(model.device, model.dtype)
    logits = model(encoder_outputs=(states,), decoder_input_ids=padded[:, :-1], use_cache=False).logits
    positions = torch.arange(1, padded.shape[1], device=model.device)  # of the predicted tokens
    return mean_entropy(logits, (positions >= num_prefix_tokens) & (positions < lengths[:, None]))


@torch.no_grad()
def language_model_nll(
    texts: Sequence[str | None], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8
) -> np.ndarray:
    """Mean negative log-likelihood per token of each text under a causal language model; low is likely language.

    What separates documents in the model's training precedes a text, so that its first token counts too: the token
    `<|endoftext|>` where there is one, else the start token, else the end token. The start token of a chat model
    announces a role, after which no sentence is likely.

    Args:
        texts: labels; at most the model's context of each is read.
        model: any causal language model of transformers, in eval mode.
        tokenizer: of the model.
        batch_size: texts scored together.

    Returns:
        Nats per token, (texts,), float64; NaN for None and for a text without a token.

    Raises:
        ValueError: the tokenizer has neither a start nor an end token.
    """
    candidates = (tokenizer.get_vocab().get("<|endoftext|>"), tokenizer.bos_token_id, tokenizer.eos_token_id)
    start = next((token for token in candidates if token is not None), None)
    if start is None:
        raise ValueError(f"{type(tokenizer).__name__} has no bos_token and no eos_token; set one to precede each text")
    context = getattr(model.config, "max_position_embeddings", None)
    ids = [[start, *tokenizer.encode(text or "", add_special_tokens=False)][:context] for text in texts]
    values = np.full(len(texts), math.nan)
    order = sorted((index for index, tokens in enumerate(ids) if len(tokens) > 1), key=lambda index: len(ids[index]))
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        rows = [torch.tensor(ids[index]) for index in chosen]
        inputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=start).to(model.device)
        lengths = torch.tensor([len(row) for row in rows], device=model.device)
        mask = torch.arange(inputs.shape[1], device=model.device) < lengths[:, None]
        logits = model(input_ids=inputs, attention_mask=mask.long(), use_cache=False).logits
        losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), inputs[:, 1:], reduction="none")
        sums = (losses * mask[:, 1:]).sum(dim=-1)
        values[chosen] = (sums / (lengths - 1)).double().cpu().numpy()
    return values


@cache
def _keeping_marks() -> BasicTextNormalizer:
    return BasicTextNormalizer(preserve_marks=True)  # and words without spaces stay words, or few runs would be long


def _split_digits(match: re.Match[str]) -> str:
    digits = match[0].replace(",", "")
    return f" {digits} " if QUANTITY.fullmatch(match[0]) else f" {' '.join(digits)} "
