"""Codes of teachers' frames on disk: fixed bytes a frame, an utterance's codes one array of a label store.

A frame has the bytes of each quantizer side by side, in the order of the header. There is one quantizer for each layer
of the store's teacher; each further teacher has a store of its own.

    header["mvq"] = mvq_header([quantizer], frame_rate_hz=50)
    store.write_shard(rows, {mvq_key(utterance_id): quantizer.encode(states)})
    codes = read_codes(store, utterance_id, quantizer)
    batch = align_codes(collate_codes([codes]), num_frames, teacher_rate_hz=50, student_rate_hz=25)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from speechkd.labels.teacher_cache import LabelStore, LabelStoreError
from speechkd.losses.contract import IGNORE_INDEX
from speechkd.models.quantizer import Quantizer, unpack_codes

MVQ_PREFIX = "mvq/"
RATE_TOLERANCE = 1e-3


def mvq_key(utterance_id: str) -> str:
    """Under which a store keeps the codes of an utterance."""
    return f"{MVQ_PREFIX}{utterance_id}"


def mvq_header(quantizers: Sequence[Quantizer], frame_rate_hz: float) -> dict[str, Any]:
    """What a store's header holds under "mvq"; `read_codes` needs it.

    Args:
        quantizers: each with its `source`.
        frame_rate_hz: of the teacher.
    """
    entries = [
        {
            "id": quantizer.id,
            "layer": (quantizer.source or {}).get("layer"),
            "dim": quantizer.dim,
            "num_codebooks": quantizer.num_codebooks,
            "codebook_size": quantizer.codebook_size,
            "bytes_per_frame": quantizer.bytes_per_frame,
            "storage_ratio": quantizer.storage_ratio,
        }
        for quantizer in quantizers
    ]
    size = sum(quantizer.bytes_per_frame for quantizer in quantizers)
    return {"quantizers": entries, "frame_rate_hz": frame_rate_hz, "bytes_per_frame": size}


def mvq_settings(
    store: LabelStore, quantizer: Quantizer | str | None = None, *, frame_rate_hz: float | None = None
) -> tuple[dict[str, Any], int]:
    """The quantizer of a store that is to be read, as the header describes it, and its first byte of a frame.

    Args:
        store: opened store.
        quantizer: one, or its id; None is the only one of the store.
        frame_rate_hz: that the caller counts on; None takes any.

    Raises:
        LabelStoreError: the store keeps no codes, none of this quantizer, or of another rate.
    """
    if "mvq" not in store.header:
        raise LabelStoreError(
            f"label store {store.folder} keeps no codes; its targets: {store.header['targets']}. Label its manifest "
            "with `speechkd label --targets mvq` into another folder"
        )
    settings = store.header["mvq"]
    entries = settings["quantizers"]
    known = ", ".join(f"{entry['id']} (layer {entry['layer']})" for entry in entries)
    if frame_rate_hz is not None and abs(settings["frame_rate_hz"] - frame_rate_hz) > RATE_TOLERANCE * frame_rate_hz:
        raise LabelStoreError(
            f"label store {store.folder} has codes at {settings['frame_rate_hz']:g} Hz, but {frame_rate_hz:g} Hz are "
            "asked for; give its own rate to align_codes, or label with a teacher of the other rate"
        )
    if quantizer is None:
        if len(entries) > 1:
            raise LabelStoreError(f"label store {store.folder} has codes of quantizers {known}; say which to read")
        return entries[0], 0
    wanted = quantizer if isinstance(quantizer, str) else quantizer.id
    first = 0
    for entry in entries:
        if entry["id"] == wanted:
            return entry, first
        first += entry["bytes_per_frame"]
    raise LabelStoreError(
        f"label store {store.folder} has codes of quantizer {known}, but this is quantizer {wanted}; load that of the "
        "store, or label again with this one"
    )


def read_codes(
    store: LabelStore,
    utterance_id: str,
    quantizer: Quantizer | str | None = None,
    *,
    frame_rate_hz: float | None = None,
) -> Tensor:
    """Codes of one utterance, (frames, num_codebooks), int64.

    Args:
        store: opened store; `check_teacher` compares its teacher with another.
        utterance_id: of the manifest.
        quantizer, frame_rate_hz: see `mvq_settings`.

    Raises:
        LabelStoreError: see there; or the store has no codes of this utterance, or damaged ones.
    """
    entry, first = mvq_settings(store, quantizer, frame_rate_hz=frame_rate_hz)
    try:
        packed = store.array(mvq_key(utterance_id))
    except LabelStoreError as error:
        raise LabelStoreError(
            f"label store {store.folder} holds no codes of utterance {utterance_id!r}; label its manifest"
        ) from error
    if not is_codes(packed, store.header):
        raise LabelStoreError(
            f"label store {store.folder}, utterance {utterance_id!r}: its codes are {tuple(packed.shape)} "
            f"{packed.dtype}, but the store's are (frames, {store.header['mvq']['bytes_per_frame']}) torch.uint8: they "
            "are damaged; remove the shard and label again"
        )
    own = packed[:, first : first + entry["bytes_per_frame"]]
    return unpack_codes(own, entry["num_codebooks"], entry["codebook_size"])


def is_codes(packed: Tensor, header: dict[str, Any], num_frames: int | None = None) -> bool:
    """Whether an array has the dtype and shape that a header promises, and so many frames."""
    has_shape = packed.ndim == 2 and packed.shape[1] == header["mvq"]["bytes_per_frame"]
    return has_shape and packed.dtype == torch.uint8 and num_frames in (None, len(packed))


def collate_codes(codes: Sequence[Tensor]) -> Tensor:
    """Codes of a batch, (batch, frames, num_codebooks), int64, padded on the right with -100.

    Args:
        codes: of each utterance, (frames, num_codebooks).
    """
    return pad_sequence([row.long() for row in codes], batch_first=True, padding_value=IGNORE_INDEX)
