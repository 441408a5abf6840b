"""A teacher's states as codes in a label store, and the quantizer that makes them, fitted on a manifest."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from speechkd.data.features import SAMPLE_RATE_HZ
from speechkd.data.hub import read_utterances
from speechkd.data.loader import clip_batches, report_skipped
from speechkd.data.manifest import Manifest
from speechkd.features_store import Clip, clip_groups
from speechkd.files import folder_lock, write_json
from speechkd.frame_encoders import FrameEncoder, load_frame_encoder
from speechkd.labels.mvq_codes import mvq_header, mvq_key
from speechkd.labels.pseudo_label import ShardWriter, pending_positions
from speechkd.labels.teacher_cache import LabelStore, create_store
from speechkd.models.quantizer import Quantizer, QuantizerError, load_quantizer, save_quantizer
from speechkd.models.quantizer_fit import FitConfig, fit
from speechkd.preemption import Preempted, sigterm_requests

logger = logging.getLogger(__name__)


def label_codes(
    teacher_name: str,
    quantizers: Sequence[str | Path],
    manifest_path: str | Path,
    output_dir: str | Path,
    *,
    batch_size: int = 8,
    num_workers: int = 0,
    max_skipped_fraction: float = 0.01,
    device: torch.device | str | None = None,
) -> LabelStore:
    """Quantize a teacher's states of a manifest, carrying on where an earlier call stopped.

    Rows hold `id, duration_seconds, num_frames, compute_seconds`; `mvq_codes.read_codes` reads the codes.

    Args:
        teacher_name: see `load_frame_encoder`.
        quantizers: folders of `fit_quantizer`, one for each layer of the teacher that is to be kept.
        manifest_path: JSONL manifest.
        output_dir: label store; created or continued.
        batch_size: clips encoded together.
        num_workers: processes that decode audio.
        max_skipped_fraction: share of clips that may be undecodable, 0 to 1.
        device: where the teacher runs; by default CUDA if there is one.

    Returns:
        The finished store.

    Raises:
        QuantizerError: a quantizer is of another teacher, width or rate, or states are not finite.
        ManifestError, LabelStoreError, AudioError: see their modules.
        Preempted: SIGTERM came; the batches before it are stored.
    """
    if not quantizers:
        raise QuantizerError("no quantizer is given; fit one with `speechkd fit-quantizer` and give its folder")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    manifest = read_utterances(manifest_path)
    loaded = [(str(path), load_quantizer(path)) for path in quantizers]
    encoder = load_frame_encoder(teacher_name, device=device)
    for path, quantizer in loaded:
        _check_source(path, quantizer, encoder)
    models = [quantizer.to(device) for _, quantizer in loaded]
    header = {
        "teacher": encoder.identity,
        "targets": ["mvq"],
        "mvq": mvq_header(models, encoder.frames_per_second),
    }
    with folder_lock(Path(output_dir)):
        store = create_store(output_dir, header)
        pending = pending_positions(manifest, store)
        if not pending:
            logger.info("%s already holds all %d utterances of %s", output_dir, len(manifest), manifest_path)
            return store
        with sigterm_requests() as termination, ShardWriter(store, manifest, pending, max_skipped_fraction) as writer:
            for clips, skipped in _clips(manifest, pending, encoder, batch_size, num_workers):
                rows, arrays = _codes_of(encoder, models, clips, device) if clips else ([], {})
                writer.add(rows, arrays, skipped, write_now=termination.received)
                if termination.received:
                    raise Preempted(
                        f"stopped by SIGTERM; finished codes are in {store.folder}, the same command resumes"
                    )
    return store


def fit_quantizer(
    teacher_name: str,
    layer: int,
    manifest_path: str | Path,
    output_dir: str | Path,
    *,
    config: FitConfig | None = None,
    max_frames: int = 500_000,
    batch_size: int = 8,
    num_workers: int = 0,
    max_skipped_fraction: float = 0.01,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Fit a quantizer on one layer of a teacher, and write it with `report.json` beside it.

    Args:
        teacher_name: see `load_frame_encoder`.
        layer: 0 is what the first block hears, 1 the output of the first block.
        manifest_path: JSONL manifest; clips are drawn until there are enough frames.
        output_dir: the quantizer's folder; absent or empty.
        config: of the fit.
        max_frames: frames to fit on, kept in float16 where it holds them.
        batch_size: clips encoded together.
        num_workers: processes that decode audio.
        max_skipped_fraction: share of clips that may be undecodable, 0 to 1.
        device: where teacher and fit run; by default CUDA if there is one.

    Returns:
        The id, the sizes and the report.

    Raises:
        QuantizerError: the teacher has no such layer, there are too few frames, or one is not finite.
        ValueError: the folder is not empty.
    """
    config, output_dir = config or FitConfig(), Path(output_dir)
    if output_dir.is_dir() and any(entry.name != ".lock" for entry in output_dir.iterdir()):
        raise ValueError(f"{output_dir} is not empty, and codes may depend on a quantizer in it; choose another folder")
    if max_frames < 1:
        raise ValueError(f"max_frames must be 1 or more, got {max_frames}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    manifest = read_utterances(manifest_path)
    encoder = load_frame_encoder(teacher_name, device=device)
    _check_layer(layer, encoder)
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(manifest), generator=generator).tolist()
    frames, skipped_rows, num_frames = [], [], 0
    with folder_lock(output_dir):
        for clips, skipped in _clips(manifest, order, encoder, batch_size, num_workers):
            skipped_rows += skipped
            for states in _states_of(encoder, clips, device)[0] if clips else ():
                half = states[layer].half()
                frames.append((half if half.isfinite().all() else states[layer]).cpu())  # all become what one needs
                num_frames += len(frames[-1])
            if num_frames >= max_frames:
                break
        report_skipped(skipped_rows, len(manifest), output_dir, max_skipped_fraction)
        if not frames:
            raise QuantizerError(f"{manifest_path} has no clip that the teacher can hear; look at skipped.jsonl")
        pool = torch.cat(frames)[:max_frames].to(device)
        logger.info("fitting on %d frames of %d clips", len(pool), len(frames))
        quantizer, report = fit(pool, config)
        quantizer.source = {
            "teacher": encoder.identity,
            "layer": layer,
            "frame_rate_hz": encoder.frames_per_second,
        }
        facts = {
            "id": quantizer.id,
            "bytes_per_frame": quantizer.bytes_per_frame,
            "storage_ratio": quantizer.storage_ratio,
            **asdict(report),
        }
        write_json(output_dir / "report.json", {**facts, "config": asdict(config)})
        save_quantizer(quantizer, output_dir)
    return {"output_dir": str(output_dir), **facts}


def codes_summary(store: LabelStore) -> dict[str, Any]:
    """What a store of codes takes: utterances, hours, bytes a frame and in all, and what float32 states would take."""
    settings = store.header["mvq"]
    rows = list(store.rows())
    num_frames = sum(row["num_frames"] for row in rows)
    seconds = sum(row["duration_seconds"] for row in rows)
    compute_seconds = sum(row["compute_seconds"] for row in rows)
    state_bytes = 4 * sum(entry["dim"] for entry in settings["quantizers"])
    return {
        "output_dir": str(store.folder),
        "num_utterances": len(rows),
        "audio_hours": seconds / 3600,
        "rtfx": seconds / compute_seconds if compute_seconds else 0.0,
        "quantizers": [entry["id"] for entry in settings["quantizers"]],
        "num_frames": num_frames,
        "bytes_per_frame": settings["bytes_per_frame"],
        "code_bytes": num_frames * settings["bytes_per_frame"],
        "storage_ratio": state_bytes / settings["bytes_per_frame"],
    }


def _clips(manifest: Manifest, positions: list[int], encoder: FrameEncoder, batch_size: int, num_workers: int) -> Any:
    """Clips to encode together, and rows of those to skip."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    batches = clip_batches(
        manifest,
        positions,
        sample_rate_hz=SAMPLE_RATE_HZ,
        batch_size=1,  # so that nothing is padded and lengths are known
        max_seconds=encoder.max_seconds,
        num_workers=num_workers,
    )
    return clip_groups(batches, encoder, batch_size)


@torch.no_grad()
def _states_of(encoder: FrameEncoder, clips: list[Clip], device: torch.device) -> tuple[list[Tensor], float]:
    """States of each clip, (layers, frames, width), float32, all of them finite; and the seconds that it took."""
    started = time.perf_counter()
    waveforms = pad_sequence([waveform for _, waveform in clips], batch_first=True)
    num_samples = torch.tensor([len(waveform) for _, waveform in clips])
    states, num_frames = encoder.encode(waveforms.to(device), num_samples)
    found = []
    for (utterance, _), clip_states, length, frames in zip(
        clips, states, num_samples.tolist(), num_frames.tolist(), strict=True
    ):
        real = clip_states[:, :frames].float()
        if not real.isfinite().all():
            raise QuantizerError(
                f"states of utterance {utterance['id']!r} hold NaN or infinity in {encoder.identity['name']}; look at "
                "the teacher's weights, and leave the clip out of the manifest if it alone does so"
            )
        rate = encoder.frames_per_second / SAMPLE_RATE_HZ
        # all that the first frame hears is heard before the second one begins
        if not (length - encoder.min_samples) * rate - 1 <= frames <= length * rate + 1:
            raise QuantizerError(
                f"{encoder.identity['name']} makes {frames} frames of utterance {utterance['id']!r}, "
                f"{length / SAMPLE_RATE_HZ:.2f} s, {frames * SAMPLE_RATE_HZ / length:.1f} Hz, but its rate is taken "
                f"for {encoder.frames_per_second:g} Hz; take a teacher of that rate"
            )
        found.append(real)
    return found, time.perf_counter() - started


def _codes_of(
    encoder: FrameEncoder, quantizers: list[Quantizer], clips: list[Clip], device: torch.device
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    states, seconds = _states_of(encoder, clips, device)
    started = time.perf_counter()
    lengths = [clip.shape[1] for clip in states]
    joined = torch.cat(states, dim=1)
    packed = [quantizer.encode(joined[(quantizer.source or {})["layer"]]) for quantizer in quantizers]
    codes = torch.cat(packed, dim=-1).cpu().split(lengths)
    seconds = (seconds + time.perf_counter() - started) / len(clips)
    rows = [
        {
            "id": utterance["id"],
            "duration_seconds": utterance["duration_seconds"],
            "num_frames": length,
            "compute_seconds": seconds,
        }
        for (utterance, _), length in zip(clips, lengths, strict=True)
    ]
    # copies: a slice would be written with all of the batch
    return rows, {mvq_key(row["id"]): part.clone() for row, part in zip(rows, codes, strict=True)}


def _check_layer(layer: int, encoder: FrameEncoder) -> None:
    if not 0 <= layer < encoder.num_layers:
        raise QuantizerError(
            f"layer {layer} is not one of 0 to {encoder.num_layers - 1} of {encoder.identity['name']}; 0 is what its "
            f"first block hears, {encoder.num_layers - 1} its output"
        )


def _check_source(path: str, quantizer: Quantizer, encoder: FrameEncoder) -> None:
    source, teacher = quantizer.source, encoder.identity
    if source is None:
        raise QuantizerError(
            f"quantizer {path} does not say whose states it was fitted on; load it, set its `source` to "
            f"{json.dumps({'teacher': '...', 'layer': '...', 'frame_rate_hz': '...'})} and save it with save_quantizer"
        )
    fitted_on = source["teacher"]
    if fitted_on["weights_sha256"] != teacher["weights_sha256"]:
        raise QuantizerError(
            f"quantizer {quantizer.id} in {path} was fitted on teacher {fitted_on['name']} (weights "
            f"{fitted_on['weights_sha256'][:12]}), but this run has {teacher['name']} (weights "
            f"{teacher['weights_sha256'][:12]}); take its own teacher, or fit a quantizer on this one"
        )
    _check_layer(source["layer"], encoder)
    if source["frame_rate_hz"] != encoder.frames_per_second or quantizer.dim != encoder.width:
        raise QuantizerError(
            f"quantizer {quantizer.id} in {path} is for {quantizer.dim} dims at {source['frame_rate_hz']:g} Hz, but "
            f"{teacher['name']} has {encoder.width} at {encoder.frames_per_second:g} Hz; fit one on this teacher"
        )
