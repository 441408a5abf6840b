"""The teacher's last decoder states at every token of its own labels, which stand for its decoder in training.

Times the teacher's head they are its logits, all of them, so that any loss at any temperature is that of the live
teacher but for the rounding to float16: 2 * dim bytes a token, 1 KiB for whisper-base.

    header["decoder_states"] = decoder_states_header(dim)
    store.write_shard(rows, {decoder_states_key(utterance_id): states})
    states = read_decoder_states(store, utterance_id)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import WhisperForConditionalGeneration

from speechkd.data.collate import WhisperTokens, collate_labels
from speechkd.labels.teacher_cache import LabelStore, LabelStoreError
from speechkd.labels.topk_records import check_label_lengths
from speechkd.models.whisper import decoder_states

DECODER_STATES_PREFIX = "decoder/"


def decoder_states_key(utterance_id: str) -> str:
    """Under which a store keeps the decoder states of an utterance; its encoder states are under the id itself."""
    return f"{DECODER_STATES_PREFIX}{utterance_id}"


def decoder_states_header(dim: int) -> dict[str, Any]:
    """What a store's header holds under "decoder_states"; `read_decoder_states` needs it.

    Args:
        dim: width of the teacher's decoder.
    """
    return {"layer": "last", "dtype": "float16", "dim": dim, "bytes_per_token": 2 * dim}


@torch.no_grad()
def states_of_labels(
    model: WhisperForConditionalGeneration,
    encoder_states: Tensor,
    token_id_sequences: list[list[int]],
    tokens: WhisperTokens,
) -> tuple[list[Tensor], Tensor]:
    """Last decoder states of a teacher that is fed labels as a student gets them.

    Args:
        model: the teacher.
        encoder_states: last hidden states of its encoder, (batch, frames, dim).
        token_id_sequences: whole labels, one per clip, from `<|startoftranscript|>` on.
        tokens: of the model's vocabulary.

    Returns:
        For each label of n tokens (n - 1, dim), in the model's dtype and on its device; and the weight of its head,
        (vocabulary, dim).

    Raises:
        ValueError: a label is empty or too long.
    """
    decoder_input_ids, _ = collate_labels(token_id_sequences, tokens)
    states, head = decoder_states(
        model, encoder_outputs=(encoder_states,), decoder_input_ids=decoder_input_ids.to(encoder_states.device)
    )
    return [row[: len(label) - 1] for row, label in zip(states, token_id_sequences, strict=True)], head


def decoder_states_of_labels(
    model: WhisperForConditionalGeneration,
    encoder_states: Tensor,
    token_id_sequences: list[list[int]],
    tokens: WhisperTokens,
) -> list[Tensor]:
    """What a store keeps of `states_of_labels`, whose arguments these are.

    Returns:
        For each label of n tokens (n - 1, dim), float16, on the CPU.

    Raises:
        ValueError: see there; or a state is beyond float16, or not a number.
    """
    states, _ = states_of_labels(model, encoder_states, token_id_sequences, tokens)
    stored = [row.half().cpu() for row in states]
    for number, (row, half) in enumerate(zip(states, stored, strict=True)):
        if not half.isfinite().all():
            raise ValueError(
                f"the teacher's decoder states of clip {number} of the batch reach {row.abs().max().item():g}, and "
                f"they are stored in float16, which ends at {torch.finfo(torch.float16).max:g}; store its likeliest "
                "ids instead (--targets text topk), train with the live teacher, or, if this is nan or inf, look at "
                "its weights"
            )
    return stored


def decoder_states_settings(store: LabelStore) -> dict[str, Any]:
    """What `decoder_states_header` wrote.

    Raises:
        LabelStoreError: the store keeps no decoder states.
    """
    if "decoder_states" not in store.header:
        raise LabelStoreError(
            f"label store {store.folder} keeps no decoder states; its targets: {store.header['targets']}. Label its "
            "manifest with `speechkd label --targets text decoder_states` into another folder"
        )
    return store.header["decoder_states"]


def read_decoder_states(store: LabelStore, utterance_id: str) -> Tensor:
    """Decoder states of one utterance, (tokens, dim), float16.

    Raises:
        LabelStoreError: the store keeps no decoder states, none of this utterance, or damaged ones.
    """
    dim = decoder_states_settings(store)["dim"]
    try:
        states = store.array(decoder_states_key(utterance_id))
    except LabelStoreError as error:
        raise LabelStoreError(
            f"label store {store.folder} holds no decoder states of utterance {utterance_id!r}; label its manifest"
        ) from error
    if not is_decoder_states(states, dim):
        raise LabelStoreError(
            f"label store {store.folder}, utterance {utterance_id!r}: its decoder states are {tuple(states.shape)} "
            f"{states.dtype}, but the store's are (tokens, {dim}) torch.float16: they are damaged; remove the shard "
            "and label again"
        )
    return states


def is_decoder_states(states: Tensor, dim: int, num_tokens: int | None = None) -> bool:
    """Whether an array has the dtype and shape that a header promises, and one state for each of these tokens."""
    has_shape = states.ndim == 2 and states.shape[1] == dim and num_tokens in (None, len(states))
    return has_shape and states.dtype == torch.float16


def collate_decoder_states(states: Sequence[Tensor], num_tokens: Sequence[int], width: int) -> Tensor:
    """States of a batch, padded on the right like its labels.

    Args:
        states: of each utterance, (tokens, dim).
        num_tokens: length of each label, whose first token has no state.
        width: to pad to.

    Returns:
        (batch, width, dim), of the dtype of the states; padding is 0.

    Raises:
        ValueError: an utterance has another number of states than its label.
    """
    check_label_lengths("decoder states", list(map(len, states)), num_tokens)
    padded = states[0].new_zeros(len(states), width, states[0].shape[-1])
    for row, state in enumerate(states):
        padded[row, : len(state)] = state
    return padded
