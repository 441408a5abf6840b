"""What SEGUE trains on, kept in a label store: embeddings of texts, and states of frozen lower layers.

store, counts = embed_texts(teacher, manifest_texts("train.jsonl"), "labels/embeddings")
targets = read_embeddings(store, ["utterance-1", "utterance-2"])
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speechkd.data.features import SAMPLE_RATE_HZ
from speechkd.data.hub import read_utterances
from speechkd.data.loader import clip_batches
from speechkd.files import folder_lock
from speechkd.labels.pseudo_label import ShardWriter, pending_positions
from speechkd.labels.teacher_cache import LabelStore, LabelStoreError, create_store
from speechkd.models.segue import SegueEncoder
from speechkd.preemption import Preempted, sigterm_requests
from speechkd.teachers_text import SentenceTeacher

logger = logging.getLogger(__name__)

SHARD_TEXTS = 1024  # a kill loses at most as many
EMBEDDING_PREFIX, STATES_PREFIX = "embedding/", "lower_states/"


@dataclass(frozen=True)
class EmbeddingCounts:
    """What became of the texts.

    Args:
        num_texts: texts that were given.
        num_embedded: of them in the store now, those of earlier calls included.
        num_skipped: empty or missing ones; the store has no row for them.
        num_cut: embedded ones that were longer than the teacher reads.
    """

    num_texts: int
    num_embedded: int
    num_skipped: int
    num_cut: int


def embed_texts(
    teacher: SentenceTeacher,
    texts: Iterable[tuple[str, str | None]],
    output_dir: str | Path,
    *,
    batch_size: int = 64,
) -> tuple[LabelStore, EmbeddingCounts]:
    """Embed each text once, carrying on where an earlier call stopped.

    A row holds `id, text, num_tokens, is_cut`; `num_tokens` counts before the cut. The header names the teacher, the
    hash of its weights, and the pooling.

    Args:
        teacher: of the embeddings.
        texts: utterance ids and what is said, such as `manifest_texts` gives.
        output_dir: label store; created or continued.
        batch_size: texts that run together. With pooling compat_gather each runs alone, as padding changes it.

    Returns:
        The finished store, and what became of the texts.

    Raises:
        LabelStoreError: the store is of another teacher, or holds another text of an utterance.
        ValueError: an id comes twice, no text is left, or an embedding is not finite.
        Preempted: SIGTERM came; what was embedded before it is stored.
    """
    given = list(texts)
    for key, times in Counter(key for key, _ in given).items():
        if times > 1:
            raise ValueError(f"utterance {key!r} comes {times} times among the texts; ids must be unique")
    usable = {key: text for key, text in given if text is not None and text.strip()}
    _tell_skipped([key for key, _ in given if key not in usable], len(given))
    if not usable:
        raise ValueError(
            f"none of {len(given)} utterances has a text to embed; label the manifest with a teacher first"
        )
    with folder_lock(output_dir):
        store = create_store(output_dir, embedding_header(teacher))
        known = {row["id"]: row for row in store.rows()}
        for key in usable.keys() & known.keys():
            if known[key]["text"] != usable[key]:
                raise LabelStoreError(
                    f"{store.folder} holds the embedding of {known[key]['text']!r} for utterance {key!r}, whose text "
                    f"is now {usable[key]!r}; choose another output folder"
                )
        pending = {key: text for key, text in usable.items() if key not in known}
        for rows, arrays in _embedded_shards(teacher, pending, 1 if teacher.pooling == "compat_gather" else batch_size):
            store.write_shard(rows, arrays)
            known |= {row["id"]: row for row in rows}
    cut = [known[key] for key in usable if known[key]["is_cut"]]
    if cut:
        logger.warning(
            "%d of %d texts are longer than the teacher's %d tokens and were cut; first: utterance %r with %d",
            len(cut),
            len(usable),
            teacher.max_tokens,
            cut[0]["id"],
            cut[0]["num_tokens"],
        )
    return store, EmbeddingCounts(len(given), len(usable), len(given) - len(usable), len(cut))


def embedding_header(teacher: SentenceTeacher) -> dict[str, Any]:
    """What a store of embeddings must know about its origin; two runs with equal headers give equal embeddings."""
    return {
        "teacher": teacher.identity,
        "targets": ["embeddings"],
        "embeddings": {
            "pooling": teacher.pooling,
            "normalize": teacher.normalize,
            "max_tokens": teacher.max_tokens,
            "dim": teacher.dim,
            "dtype": "float32",
            "bytes_per_utterance": 4 * teacher.dim,
        },
    }


def manifest_texts(source: str | Path, labels_dir: str | Path | None = None) -> Iterator[tuple[str, str | None]]:
    """Ids and texts of a manifest's utterances, in its order.

    Args:
        source: JSONL manifest, or `hub:NAME[:CONFIG]:SPLIT`.
        labels_dir: label store whose transcripts are taken instead of the manifest's own text.

    Raises:
        ManifestError, LabelStoreError: see their modules.
    """
    manifest = read_utterances(source)
    if labels_dir is None:
        return zip(manifest.ids, manifest.rows["text"][:], strict=True)
    spoken = {row["id"]: row.get("text") for row in LabelStore(labels_dir).rows()}
    return ((key, spoken.get(key)) for key in manifest.ids)


def read_embeddings(store: LabelStore, utterance_ids: Sequence[str]) -> Tensor:
    """Embeddings of utterances, (utterances, dim), float32.

    Raises:
        LabelStoreError: the store keeps no embeddings, or none of an utterance.
    """
    check_embeddings(store)
    if not utterance_ids:
        return torch.zeros(0, store.header["embeddings"]["dim"])
    return torch.stack([_array(store, EMBEDDING_PREFIX, key, "embedding") for key in utterance_ids])


def check_embeddings(store: LabelStore) -> None:
    """Refuse a store that keeps no embeddings.

    Raises:
        LabelStoreError: it keeps others.
    """
    if "embeddings" not in store.header:
        raise LabelStoreError(
            f"label store {store.folder} keeps no embeddings; its targets: {store.header['targets']}. Embed the texts "
            "of its manifest into another folder"
        )


def cache_lower_states(
    student: SegueEncoder,
    name: str,
    source: str | Path,
    output_dir: str | Path,
    *,
    batch_size: int = 8,
    num_workers: int = 0,
    max_skipped_fraction: float = 0.01,
) -> LabelStore:
    """Run the frozen lower layers of a student once, carrying on where an earlier call stopped.

    Args:
        student: with `num_frozen_layers` of 1 or more, on the device where it shall run.
        name: of its encoder, for messages.
        source: JSONL manifest, or `hub:NAME[:CONFIG]:SPLIT`.
        output_dir: label store; created or continued.
        batch_size: clips that are decoded together; they run one by one, as group norms hear the padding.
        num_workers: decoding processes.
        max_skipped_fraction: share of clips that may be undecodable, 0 to 1.

    Returns:
        The finished store, with states (frames, width), float16, and `num_samples`, which belongs to them, in each row.

    Raises:
        ManifestError, LabelStoreError, AudioError: see their modules.
        ValueError: no layer is frozen, or a clip is too short for one frame.
        Preempted: SIGTERM came; the batches before it are stored.
    """
    manifest, output_dir = read_utterances(source), Path(output_dir)
    header = lower_states_header(student, name)
    with folder_lock(output_dir):
        store = create_store(output_dir, header)
        pending = pending_positions(manifest, store)
        batches = clip_batches(
            manifest, pending, sample_rate_hz=SAMPLE_RATE_HZ, batch_size=batch_size, num_workers=num_workers
        )
        with sigterm_requests() as termination, ShardWriter(store, manifest, pending, max_skipped_fraction) as writer:
            for batch in batches:
                rows, arrays = _lower_rows(student, batch.utterances, batch.waveforms)
                writer.add(rows, arrays, batch.skipped, write_now=termination.received)
                if termination.received:
                    raise Preempted(f"stopped by SIGTERM; what is done is in {store.folder}, the same command resumes")
    return store


def lower_states_header(student: SegueEncoder, name: str) -> dict[str, Any]:
    """What a store of lower states must know about its origin.

    Raises:
        ValueError: the student has no frozen layer.
    """
    if not student.num_frozen_layers:
        raise ValueError("num_frozen_layers=0: no states can be kept, since every layer learns; freeze 1 or more")
    width = student.config.hidden_size
    return {
        "teacher": student.lower_identity(name),
        "targets": ["lower_states"],
        "lower_states": {
            "layer": student.num_frozen_layers,
            "grid_seconds": student.grid_seconds,
            "normalize_input": student.normalize_input,
            "dtype": "float16",
            "bytes_per_frame": 2 * width,
        },
    }


def read_lower_states(store: LabelStore, utterance_id: str) -> Tensor:
    """States of one utterance, (frames, width), float16; pad them on the right to a batch for `SegueEncoder.forward`.

    Raises:
        LabelStoreError: the store has none of it.
    """
    return _array(store, STATES_PREFIX, utterance_id, "lower states")


def _embedded_shards(
    teacher: SentenceTeacher, pending: dict[str, str], batch_size: int
) -> Iterator[tuple[list[dict[str, Any]], dict[str, Tensor]]]:
    """Rows and embeddings shard by shard, in the order given; inside a shard texts of like length run together."""
    keys = list(pending)
    with sigterm_requests() as termination:
        for start in range(0, len(keys), SHARD_TEXTS):
            shard = keys[start : start + SHARD_TEXTS]
            lengths = dict(zip(shard, teacher.num_tokens([pending[key] for key in shard]), strict=True))
            by_length = sorted(shard, key=lengths.__getitem__)
            arrays: dict[str, Tensor] = {}
            for first in range(0, len(by_length), batch_size):
                batch = by_length[first : first + batch_size]
                vectors = teacher([pending[key] for key in batch]).cpu()
                arrays |= {
                    f"{EMBEDDING_PREFIX}{key}": vector.clone() for key, vector in zip(batch, vectors, strict=True)
                }
            for key in shard:
                if not arrays[f"{EMBEDDING_PREFIX}{key}"].isfinite().all():
                    raise ValueError(
                        f"the embedding of utterance {key!r}, {pending[key]!r}, holds NaN or infinite values; look at "
                        "the teacher's weights"
                    )
            rows = [
                {
                    "id": key,
                    "text": pending[key],
                    "num_tokens": lengths[key],
                    "is_cut": lengths[key] > teacher.max_tokens,
                }
                for key in shard
            ]
            yield rows, arrays
            if termination.received:
                raise Preempted("stopped by SIGTERM; what is embedded is stored, the same command resumes")


def _lower_rows(
    student: SegueEncoder, utterances: list[dict[str, Any]], waveforms: Tensor
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    rows, arrays = [], {}
    for utterance, padded in zip(utterances, waveforms, strict=True):
        num_samples = torch.tensor([round(utterance["duration_seconds"] * SAMPLE_RATE_HZ)]).clamp(max=len(padded))
        states = student.lower_states(padded[None, : int(num_samples)].to(student.device), num_samples)[0]
        arrays[f"{STATES_PREFIX}{utterance['id']}"] = states.half().cpu()
        rows.append(
            {
                "id": utterance["id"],
                "duration_seconds": utterance["duration_seconds"],
                "num_samples": int(num_samples),
                "num_frames": len(states),
            }
        )
    return rows, arrays


def _array(store: LabelStore, prefix: str, utterance_id: str, what: str) -> Tensor:
    try:
        return store.array(f"{prefix}{utterance_id}")
    except LabelStoreError as error:
        raise LabelStoreError(
            f"label store {store.folder} holds no {what} of utterance {utterance_id!r}: it had no text, was skipped or "
            "is of another manifest; leave it out, or run its manifest"
        ) from error


def _tell_skipped(skipped: list[str], num_texts: int) -> None:
    if skipped:
        logger.warning(
            "%d of %d utterances have an empty or missing text and are skipped; first: %r",
            len(skipped),
            num_texts,
            skipped[0],
        )
