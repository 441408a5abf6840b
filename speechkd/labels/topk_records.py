"""Top-k teacher targets on disk: one fixed-size record per token, an utterance's records one array of a label store.

A record is k ids, k log-probabilities and the log of the tail's mass, packed and little-endian: uint16 ids where the
vocabulary has up to 65,536, else uint32; float16 log-probabilities; a float32 tail. k = 64 takes 260 bytes a token for
Whisper's 51,865 ids and 388 for a vocabulary above 65,536. Above -16 a float16 log-probability is off by 0.0039 at
most, and by less for likelier ids: this moves the divergence of a token by some 5e-5, up or down, and the mean of
thousands by less than 1e-6.

    header["topk"] = topk_header(k, vocabulary)
    store.write_shard(rows, {topk_key(utterance_id): encode_topk(topk_targets(logits, k), vocabulary)})
    targets = read_topk(store, utterance_id)
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speechkd.labels.teacher_cache import LabelStore, LabelStoreError
from speechkd.losses.sparse import TopK, check_ids, check_k, check_targets

UINT16_VOCABULARY = 65_536
TOPK_PREFIX = "topk/"


def topk_key(utterance_id: str) -> str:
    """Under which a store keeps the records of an utterance; its encoder states are under the id itself."""
    return f"{TOPK_PREFIX}{utterance_id}"


def bytes_per_token(k: int, vocabulary: int) -> int:
    """Exact size of a record.

    Raises:
        ValueError: k is not 1 to vocabulary.
    """
    return _record_dtype(k, vocabulary).itemsize


def topk_header(k: int, vocabulary: int, temperature: float = 1.0) -> dict[str, Any]:
    """What a store's header holds under "topk"; `read_topk` needs it.

    Args:
        k: ids kept per token.
        vocabulary: ids of the teacher's tokenizer.
        temperature: at which the targets were made.

    Raises:
        ValueError: k is not 1 to vocabulary.
    """
    size = bytes_per_token(k, vocabulary)
    return {"k": k, "vocabulary": vocabulary, "temperature": temperature, "bytes_per_token": size}


def encode_topk(targets: TopK, vocabulary: int) -> Tensor:
    """Targets of one utterance as records.

    Args:
        targets: one entry per token, (tokens, k).
        vocabulary: ids of the teacher's tokenizer.

    Returns:
        (tokens, bytes per token), uint8, on the CPU.

    Raises:
        ValueError: the targets are not (tokens, k), do not fit together or not the vocabulary, or hold NaN.
    """
    check_targets(targets, vocabulary)
    if targets.ids.ndim != 2:
        raise ValueError(f"records are written per utterance: ids must be (tokens, k), got {tuple(targets.ids.shape)}")
    check_ids(targets.ids, vocabulary)
    if targets.log_probs.isnan().any() or targets.log_tail.isnan().any():
        raise ValueError("targets hold NaN; leave out padded tokens, and look for NaN in the teacher's logits")
    ids, log_probs, log_tail = (field.detach().cpu() for field in targets)
    num_tokens, k = ids.shape
    records = np.empty(num_tokens, _record_dtype(k, vocabulary))
    records["ids"] = ids.numpy()
    records["log_probs"] = log_probs.half().numpy()
    records["log_tail"] = log_tail.float().numpy()
    return torch.from_numpy(records.view(np.uint8).reshape(num_tokens, records.itemsize))


def decode_topk(records: Tensor, k: int, vocabulary: int) -> TopK:
    """Targets from records.

    Args:
        records: (tokens, bytes per token), uint8.
        k: with which they were written.
        vocabulary: likewise.

    Returns:
        Targets, (tokens, k), int64 ids and float32.

    Raises:
        ValueError: the records have another size, or an id is not in the vocabulary.
    """
    dtype = _record_dtype(k, vocabulary)
    if records.dtype != torch.uint8 or records.ndim != 2 or records.shape[1] != dtype.itemsize:
        raise ValueError(
            f"top-k records are {tuple(records.shape)} {records.dtype}, but k={k} and a vocabulary of {vocabulary} ids "
            f"need (tokens, {dtype.itemsize}) torch.uint8: they are damaged or were written with other settings"
        )
    table = np.ascontiguousarray(records.cpu().numpy()).reshape(-1).view(dtype)
    ids = torch.from_numpy(table["ids"].astype(np.int64))
    check_ids(ids, vocabulary)
    log_probs, log_tail = (torch.from_numpy(table[name].astype(np.float32)) for name in ("log_probs", "log_tail"))
    return TopK(ids, log_probs, log_tail)


def topk_settings(store: LabelStore) -> dict[str, Any]:
    """What `topk_header` wrote.

    Raises:
        LabelStoreError: the store keeps no top-k targets.
    """
    if "topk" not in store.header:
        raise LabelStoreError(
            f"label store {store.folder} keeps no top-k targets; its targets: {store.header['targets']}. Label its "
            "manifest with `speechkd label --targets text topk` into another folder"
        )
    return store.header["topk"]


def read_topk(store: LabelStore, utterance_id: str) -> TopK:
    """Targets of one utterance, (tokens, k).

    Raises:
        LabelStoreError: the store keeps no top-k targets, none of this utterance, or damaged ones.
    """
    header = topk_settings(store)
    try:
        records = store.array(topk_key(utterance_id))
    except LabelStoreError as error:
        raise LabelStoreError(
            f"label store {store.folder} holds no top-k targets of utterance {utterance_id!r}; label its manifest"
        ) from error
    try:
        return decode_topk(records, header["k"], header["vocabulary"])
    except ValueError as error:
        raise LabelStoreError(f"label store {store.folder}, utterance {utterance_id!r}: {error}") from error


def collate_topk(targets: Sequence[TopK], num_tokens: Sequence[int], width: int) -> dict[str, Tensor]:
    """Targets of a batch, padded on the right like its labels.

    Args:
        targets: of each utterance, (tokens, k).
        num_tokens: length of each label, whose first token is no target.
        width: to pad to.

    Returns:
        `topk_ids` and `topk_log_probs`, (batch, width, k), and `topk_log_tail`, (batch, width); padding is 0.

    Raises:
        ValueError: an utterance has another number of targets than its label.
    """
    check_label_lengths("top-k targets", [len(target.ids) for target in targets], num_tokens)
    k = targets[0].ids.shape[-1]
    ids = torch.zeros(len(targets), width, k, dtype=torch.int64)
    log_probs, log_tail = torch.zeros(len(targets), width, k), torch.zeros(len(targets), width)
    for row, target in enumerate(targets):
        length = len(target.ids)
        ids[row, :length], log_probs[row, :length], log_tail[row, :length] = target
    return {"topk_ids": ids, "topk_log_probs": log_probs, "topk_log_tail": log_tail}


def check_label_lengths(what: str, lengths: Sequence[int], num_tokens: Sequence[int]) -> None:
    """Refuse stored outputs of a teacher that are of other labels than a batch has.

    Args:
        what: their name in the message.
        lengths: stored tokens of each utterance.
        num_tokens: length of each label, whose first token has no output.

    Raises:
        ValueError: an utterance has another number than its label.
    """
    for row, (found, length) in enumerate(zip(lengths, num_tokens, strict=True)):
        if found != length - 1:
            raise ValueError(
                f"utterance {row} of the batch has {what} of {found} tokens for a label of {length}, whose first has "
                "none: they are of another label. Train on labels as they are stored, or set "
                "teacher.stored_outputs=null"
            )


def _record_dtype(k: int, vocabulary: int) -> np.dtype:
    check_k(k, vocabulary)
    id_type = "<u2" if vocabulary <= UINT16_VOCABULARY else "<u4"
    return np.dtype([("ids", id_type, (k,)), ("log_probs", "<f2", (k,)), ("log_tail", "<f4")])
