"""Whisper students: fewer layers of a teacher, copied, and what is needed to run them."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from speechkd.data.collate import WhisperTokens
from speechkd.data.features import SAMPLE_RATE_HZ, SAMPLES_PER_POSITION
from speechkd.losses.layers import stack_layers
from speechkd.models.greedy import greedy_tokens


def shorten_window(model: WhisperForConditionalGeneration, window_seconds: int) -> None:
    """Let a model hear shorter clips than 30 s, in place: `shorten_encoder` of its encoder.

    What it says of clips that fit changes a little, as it was trained with silence up to 30 s. Stock transformers runs
    it, with features of a `WhisperFeatureExtractor(chunk_length=window_seconds)`.

    Raises:
        ValueError: see there.
    """
    shorten_encoder(model.model.encoder, window_seconds)
    model.config.max_source_positions = model.model.encoder.max_source_positions


def shorten_encoder(encoder: Any, window_seconds: int) -> None:
    """Take the positions after a window from a Whisper's encoder, in place.

    Its work falls faster than the window, because attention is quadratic in it.

    Args:
        encoder: of teacher or student.
        window_seconds: new window, 1 to the present one.

    Raises:
        ValueError: the window is not shorter than the present one, or below 1 s.
    """
    embedding = encoder.embed_positions
    present_seconds = embedding.num_embeddings * SAMPLES_PER_POSITION / SAMPLE_RATE_HZ
    if not 1 <= window_seconds <= present_seconds:
        raise ValueError(
            f"a window of {window_seconds} s cannot be cut from the model's {present_seconds:g} s; choose 1 to "
            f"{present_seconds:g} whole seconds"
        )
    num_positions = window_seconds * SAMPLE_RATE_HZ // SAMPLES_PER_POSITION
    embedding.weight = nn.Parameter(
        embedding.weight[:num_positions].detach().clone(), requires_grad=embedding.weight.requires_grad
    )
    embedding.num_embeddings = num_positions
    encoder.config.max_source_positions = encoder.max_source_positions = num_positions


def choose_layers(num_teacher_layers: int, num_student_layers: int) -> list[int]:
    """Teacher layers that a student keeps: evenly spaced, first and last included.

    Gandhi et al. 2023, https://arxiv.org/abs/2311.00430, section 4, with the rounding of the published checkpoints:
    positions are truncated, then the last one is set to the teacher's last layer.

    Args:
        num_teacher_layers: depth of the teacher.
        num_student_layers: depth of the student, 1 to the teacher's.

    Returns:
        Layer indices from 0, one per student layer.

    Raises:
        ValueError: the student is deeper than the teacher, or has no layer.
    """
    if not 1 <= num_student_layers <= num_teacher_layers:
        raise ValueError(
            f"a student of {num_student_layers} layers cannot be cut from a teacher of {num_teacher_layers}; "
            f"choose 1 to {num_teacher_layers}"
        )
    layers = np.linspace(0, num_teacher_layers - 1, num_student_layers).astype(int).tolist()
    layers[-1] = num_teacher_layers - 1
    return layers


def resolve_layers(num_teacher_layers: int, num_student_layers: int | None, layers: list[int] | None) -> list[int]:
    """Layer indices from a count, or from a user's list whose negative entries count from the end.

    Raises:
        ValueError: the list has another length than the count, repeats a layer, or names one that the teacher lacks.
    """
    if layers is None:
        return choose_layers(num_teacher_layers, num_student_layers or num_teacher_layers)
    if num_student_layers is not None and len(layers) != num_student_layers:
        raise ValueError(
            f"{len(layers)} layers are listed ({layers}) for a student of {num_student_layers}; give as many"
        )
    resolved = [layer + num_teacher_layers if layer < 0 else layer for layer in layers]
    wrong = [layer for layer, index in zip(layers, resolved, strict=True) if not 0 <= index < num_teacher_layers]
    if wrong or len(set(resolved)) != len(resolved) or not resolved:
        raise ValueError(f"layers {layers} must name different layers of a teacher of {num_teacher_layers}")
    return resolved


def student_from_teacher(
    teacher: WhisperForConditionalGeneration,
    *,
    decoder_layers: int | None = 2,
    encoder_layers: int | None = None,
    decoder_layers_numbers: list[int] | None = None,
    encoder_layers_numbers: list[int] | None = None,
) -> WhisperForConditionalGeneration:
    """A student that copies everything but the dropped layers; nothing is randomly initialised.

    Args:
        teacher: any Whisper.
        decoder_layers: kept decoder layers; None keeps all, or as many as are listed.
        encoder_layers: kept encoder layers; None keeps all, or as many as are listed.
        decoder_layers_numbers: which decoder layers, instead of the rule of `choose_layers`; see `resolve_layers`.
        encoder_layers_numbers: likewise which encoder layers.

    Returns:
        The student in float32, with a generation config that fits its depth.
    """
    config: WhisperConfig = copy.deepcopy(teacher.config)
    decoder_kept = resolve_layers(config.decoder_layers, decoder_layers, decoder_layers_numbers)
    encoder_kept = resolve_layers(config.encoder_layers, encoder_layers, encoder_layers_numbers)
    config.decoder_layers, config.encoder_layers = len(decoder_kept), len(encoder_kept)
    config.num_hidden_layers = len(encoder_kept)
    config.dtype = torch.float32
    with torch.device(teacher.device):
        student = WhisperForConditionalGeneration(config)
    kept = {"model.decoder.layers.": decoder_kept, "model.encoder.layers.": encoder_kept}
    weights = {
        name: teacher_weights
        for name, teacher_weights in _renumber(teacher.state_dict(), kept).items()
        if name in student.state_dict()
    }
    student.load_state_dict(weights, strict=True)  # a missing or an extra key is an error
    student.generation_config = student_generation_config(teacher, decoder_kept)
    return student.float()


def _renumber(state_dict: dict[str, Tensor], kept: dict[str, list[int]]) -> dict[str, Tensor]:
    """Teacher weights under the names that the student's layers have; dropped layers are left out."""
    renamed = {}
    for name, weight in state_dict.items():
        prefix = next((prefix for prefix in kept if name.startswith(prefix)), None)
        if prefix is None:
            renamed[name] = weight
            continue
        layer, rest = name.removeprefix(prefix).split(".", 1)
        if int(layer) in kept[prefix]:
            renamed[f"{prefix}{kept[prefix].index(int(layer))}.{rest}"] = weight
    return renamed


def student_generation_config(teacher: WhisperForConditionalGeneration, decoder_kept: list[int]) -> GenerationConfig:
    """The teacher's generation config without what the student's depth makes invalid.

    Alignment heads of dropped layers go, the others move to their new layer. Where none is left, every head of the
    upper half of the layers counts, which is Whisper's own default.
    """
    generation: Any = copy.deepcopy(teacher.generation_config)
    generation.forced_decoder_ids = None
    heads = getattr(generation, "alignment_heads", None) or []
    moved = [[decoder_kept.index(layer), head] for layer, head in heads if layer in decoder_kept]
    if not moved:
        depth = len(decoder_kept)
        moved = [
            [layer, head]
            for layer in range(depth // 2, depth)
            for head in range(teacher.config.decoder_attention_heads)
        ]
    generation.alignment_heads = moved
    return generation


def freeze_student(
    student: WhisperForConditionalGeneration,
    *,
    encoder: bool = True,
    decoder: bool = False,
    embed_positions: bool = True,
) -> None:
    """Stop gradients into parts of a student, which then stay exactly the teacher's.

    Args:
        student: changed in place.
        encoder: the whole encoder.
        decoder: the decoder but for the token embedding, which is the output head too.
        embed_positions: the decoder's positions.
    """
    if encoder:
        student.model.encoder.requires_grad_(False).eval()
    if decoder:
        student.model.decoder.requires_grad_(False)
        student.get_output_embeddings().requires_grad_(True)
    if embed_positions:
        student.model.decoder.embed_positions.requires_grad_(False)


def encoders_equal(first: WhisperForConditionalGeneration, second: WhisperForConditionalGeneration) -> bool:
    """Whether two models have equal encoders, whatever their dtypes, so that one can stand for both while frozen."""
    ours, theirs = first.model.encoder.state_dict(), second.model.encoder.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name].float(), theirs[name].float()) for name in ours)


@torch.no_grad()
def encode(model: WhisperForConditionalGeneration, input_features: Tensor) -> Tensor:
    """Encoder output of a batch, (batch, frames, dim), without gradients.

    On a CPU the clips go through one by one: a batch of 16 falls out of the processor's caches and takes a fifth longer
    for each clip. The numbers then do not depend on the batch either.

    Args:
        model: teacher or student.
        input_features: log-mel, (batch, mel bins, frames), on the model's device.
    """
    parts = input_features.to(model.dtype).split(1 if model.device.type == "cpu" else len(input_features))
    return torch.cat([model.model.encoder(part).last_hidden_state for part in parts])


def decoder_states(model: nn.Module, **inputs: Any) -> tuple[Tensor, Tensor]:
    """What the output head would be applied to, and its weight, for losses that never make all logits.

    The head is skipped inside the model's own forward pass, which is what data-parallel wrappers need to see.

    Args:
        model: a Whisper, wrapped or not.
        inputs: of its forward pass.

    Returns:
        Last decoder states, (batch, length, dim), and the head's weight, (vocabulary, dim).
    """
    output, weight = _without_head(model, **inputs)
    return output.logits, weight


def decoder_layer_states(model: nn.Module, layers: Sequence[int], **inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What `decoder_states` gives, and the outputs of some decoder layers.

    Args:
        model: a Whisper, wrapped or not.
        layers: 1 is the first layer; the last one's output comes after the decoder's final norm.
        inputs: of its forward pass.

    Returns:
        Last decoder states, the head's weight, and (batch, layers, length, dim).
    """
    output, weight = _without_head(model, **inputs, output_hidden_states=True)
    return output.logits, weight, stack_layers(output.decoder_hidden_states, layers)


def _without_head(model: nn.Module, **inputs: Any) -> tuple[Any, Tensor]:
    head = extract_model_from_parallel(model).get_output_embeddings()
    head.forward = lambda states: states
    try:
        return model(**inputs, use_cache=False), head.weight
    finally:
        del head.forward


@torch.no_grad()
def sample_tokens(
    model: WhisperForConditionalGeneration,
    encoder_states: Tensor,
    prompt: Tensor,
    *,
    end_of_text: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """What a model itself writes, without any suppression rule: draws from the distribution that is trained.

    Args:
        model: teacher or student.
        encoder_states: last hidden states of the encoder, (batch, frames, dim).
        prompt: ids to continue, (batch, length), int64, without padding.
        end_of_text: ends a row, which then repeats it until all have ended.
        max_new_tokens: limit of the continuation.
        temperature: of the softmax; 0 takes the likeliest id.
        generator: source of the draws, on the device of the states.

    Returns:
        Prompt and continuation, (batch, length + at most max_new_tokens), int64.
    """
    decoder, head = model.model.decoder, model.get_output_embeddings()
    was_training = decoder.training
    decoder.eval()  # dropout would draw from another model, and gradient checkpointing switches the caches off
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    ids = new_ids = prompt
    has_ended = torch.zeros(len(prompt), 1, dtype=torch.bool, device=prompt.device)
    for _ in range(max_new_tokens):
        states = decoder(
            input_ids=new_ids, encoder_hidden_states=encoder_states, cache=cache, use_cache=True
        ).last_hidden_state
        logits = head(states[:, -1]).float()
        if temperature == 0:
            new_ids = logits.argmax(dim=-1, keepdim=True)
        else:
            new_ids = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)
        new_ids = new_ids.masked_fill(has_ended, end_of_text)
        ids = torch.cat([ids, new_ids], dim=1)
        has_ended |= new_ids == end_of_text
        if has_ended.all():
            break
    decoder.train(was_training)
    return ids


@dataclass(frozen=True)
class Decoded:
    """One decoded clip.

    Args:
        token_ids: the whole label, from `<|startoftranscript|>` to `<|endoftext|>` if it was reached.
        mean_logprob: mean natural log-probability of the decoded tokens, end token included.
        no_speech_prob: probability of `<|nospeech|>` at the first position.
        finished: the model ended by itself, not at the length limit.
    """

    token_ids: list[int]
    mean_logprob: float
    no_speech_prob: float
    finished: bool


def greedy_decode(
    model: WhisperForConditionalGeneration,
    encoder_states: Tensor,
    tokens: WhisperTokens,
    *,
    max_new_tokens: int = 224,
    timestamps: bool = False,
) -> list[Decoded]:
    """Greedy transcripts.

    Args:
        model: teacher or student.
        encoder_states: last hidden states of the encoder, (batch, frames, dim).
        tokens: of the model's vocabulary; its prefix names language and task.
        max_new_tokens: limit of decoded tokens, end token included.
        timestamps: put each segment between timestamps, under Whisper's rules for them.

    Returns:
        One result per clip, in order.
    """
    prefix = tokens.prefix[:-1] if timestamps else tokens.prefix
    return [
        Decoded(
            token_ids=[*prefix, *result.token_ids],
            mean_logprob=sum(result.logprobs) / len(result.logprobs),
            no_speech_prob=result.no_speech_prob,
            finished=result.token_ids[-1] == tokens.end_of_text,
        )
        for result in greedy_tokens(model, encoder_states, tokens, max_new_tokens=max_new_tokens, timestamps=timestamps)
    ]
