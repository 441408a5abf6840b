"""One layer of a teacher's states in a label store, in float16: what a student regresses on.

For several layers, or means over frames, there is `speechkd.features_store`.

    store = label_states("facebook/hubert-base-ls960", 8, "train.jsonl", "labels/states")
    states = read_states(store, utterance_id)                            # (frames, width), float16
"""

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speechkd.data.features import SAMPLE_RATE_HZ
from speechkd.data.hub import read_utterances
from speechkd.data.loader import clip_batches
from speechkd.features_store import FrameEncoder, clip_groups, load_frame_encoder
from speechkd.files import folder_lock
from speechkd.labels.pseudo_label import ShardWriter, pending_positions
from speechkd.labels.teacher_cache import LabelStore, LabelStoreError, create_store
from speechkd.preemption import Preempted, sigterm_requests

STATES_PREFIX = "layer_states/"


def label_states(
    teacher_name: str,
    layer: int,
    manifest_path: str | Path,
    output_dir: str | Path,
    *,
    batch_size: int = 8,
    num_workers: int = 0,
    max_skipped_fraction: float = 0.01,
    device: torch.device | str | None = None,
) -> LabelStore:
    """Store one layer of a teacher's states of a manifest, carrying on where an earlier call stopped.

    Rows hold `id, duration_seconds, num_frames`.

    Args:
        teacher_name: see `load_frame_encoder`.
        layer: 0 is what the first block hears, 1 the output of the first block.
        manifest_path: JSONL manifest.
        output_dir: label store; created or continued.
        batch_size: clips encoded together.
        num_workers: processes that decode audio.
        max_skipped_fraction: share of clips that may be undecodable, 0 to 1.
        device: where the teacher runs; by default CUDA if there is one.

    Returns:
        The finished store.

    Raises:
        ValueError: the teacher has no such layer, states do not fit float16, or the disk is too small.
        ManifestError, LabelStoreError, AudioError: see their modules.
        Preempted: SIGTERM came; the batches before it are stored.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    manifest, output_dir = read_utterances(manifest_path), Path(output_dir)
    encoder = load_frame_encoder(teacher_name, device=device)
    header = {"teacher": encoder.identity, "targets": ["layer_states"], "layer_states": states_header(layer, encoder)}
    with folder_lock(output_dir):
        store = create_store(output_dir, header)
        pending = pending_positions(manifest, store)
        if not pending:
            return store
        frames = float(manifest.durations_seconds[pending].sum()) * encoder.frames_per_second
        needed, free = math.ceil(2 * encoder.width * frames), shutil.disk_usage(output_dir).free
        if needed > free:
            raise ValueError(
                f"states of {len(pending)} clips need {needed / 1e9:.1f} GB in {output_dir}, where {free / 1e9:.1f} GB "
                "are free; choose a larger disk, or codes of them (`speechkd label --targets mvq`)"
            )
        batches = clip_batches(
            manifest,
            pending,
            sample_rate_hz=SAMPLE_RATE_HZ,
            batch_size=1,  # so that nothing is padded and lengths are known
            max_seconds=encoder.max_seconds,
            num_workers=num_workers,
        )
        with sigterm_requests() as termination, ShardWriter(store, manifest, pending, max_skipped_fraction) as writer:
            for clips, skipped in clip_groups(batches, encoder, batch_size):
                rows, arrays = [], {}
                states = layer_of_clips(encoder, layer, [waveform for _, waveform in clips], device)
                for (utterance, _), clip in zip(clips, states, strict=True):
                    half = clip.half().cpu()
                    if not half.isfinite().all():
                        raise ValueError(
                            f"states of utterance {utterance['id']!r} reach {clip.abs().max().item():g} in layer "
                            f"{layer} of {teacher_name}, beyond float16; take another layer, or codes of them"
                        )
                    arrays[f"{STATES_PREFIX}{utterance['id']}"] = half
                    row = {name: utterance[name] for name in ("id", "duration_seconds")}
                    rows.append({**row, "num_frames": len(half)})
                writer.add(rows, arrays, skipped, write_now=termination.received)
                if termination.received:
                    raise Preempted(f"stopped by SIGTERM; what is done is in {store.folder}, the same command resumes")
    return store


def states_header(layer: int, encoder: FrameEncoder) -> dict[str, Any]:
    """What a store of one layer's states must know besides its teacher.

    Raises:
        ValueError: the teacher has no such layer.
    """
    if not 0 <= layer < encoder.num_layers:
        raise ValueError(
            f"layer {layer} is not one of 0 to {encoder.num_layers - 1} of {encoder.identity['name']}; 0 is what its "
            f"first block hears, {encoder.num_layers - 1} its output"
        )
    return {
        "layer": layer,
        "dim": encoder.width,
        "frame_rate_hz": encoder.frames_per_second,
        "dtype": "float16",
        "bytes_per_frame": 2 * encoder.width,
    }


@torch.no_grad()
def layer_of_clips(
    encoder: FrameEncoder, layer: int, waveforms: list[Tensor], device: torch.device | str
) -> list[Tensor]:
    """States of one layer for each clip, (frames, width), float32.

    Args:
        encoder: the teacher.
        layer: which of its states.
        waveforms: 16 kHz samples of each clip, (samples,); of clips of different lengths the encoder must take padding.
        device: where it is.
    """
    if not waveforms:
        return []
    padded = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
    num_samples = torch.tensor([len(waveform) for waveform in waveforms])
    states, num_frames = encoder.encode(padded.to(device), num_samples)
    return [clip[layer, :frames].float() for clip, frames in zip(states, num_frames.tolist(), strict=True)]


def read_states(store: LabelStore, utterance_id: str) -> Tensor:
    """States of one utterance, (frames, width), float16.

    Raises:
        LabelStoreError: the store has none of it.
    """
    try:
        return store.array(f"{STATES_PREFIX}{utterance_id}")
    except LabelStoreError as error:
        raise LabelStoreError(
            f"label store {store.folder} holds no states of utterance {utterance_id!r}; label its manifest"
        ) from error
