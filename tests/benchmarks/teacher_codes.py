"""A real teacher's frames as codes: error, size and speed for several numbers of bytes a frame.

Launch: python tests/benchmarks/teacher_codes.py --train FILE [FILE ...] --test FILE [FILE ...] [--output FILE]
A quantizer for each size is fitted on one layer's frames of the training manifests and measured on those of the test
manifests. `error` is the squared error over that of the mean after so many calls of the search. Real time is of the
search with five calls, the teacher excluded. Target: 8 bytes are a 256th of float32, encoded at 20 times real time.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from measure import write_measurements
from torch import Tensor

from speechkd.data.features import SAMPLE_RATE_HZ
from speechkd.data.hub import read_utterances
from speechkd.data.loader import clip_batches
from speechkd.doctor import hardware_name
from speechkd.features_store import clip_groups
from speechkd.frame_encoders import FrameEncoder, load_frame_encoder
from speechkd.models.quantizer import Quantizer
from speechkd.models.quantizer_fit import FitConfig, fit

TEACHER, LAYER, SIZES = "bundled:whisper-base", 5, [2, 4, 8, 16]
WINDOW_SECONDS, GRID_SECONDS = 15, 0.64
CALLS = range(6)


@torch.no_grad()
def frames_of(encoder: FrameEncoder, manifests: list[str], max_frames: int) -> Tensor:
    """Frames of the first clips of each manifest in equal parts, (frames, dim), float32."""
    found = []
    for path in manifests:
        manifest, part = read_utterances(path), 0
        batches = clip_batches(manifest, range(len(manifest)), sample_rate_hz=SAMPLE_RATE_HZ, batch_size=1)
        for clips, _ in clip_groups(batches, encoder, 8):
            waveforms = [waveform for _, waveform in clips]
            num_samples = torch.tensor([len(waveform) for waveform in waveforms])
            padded = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
            states, num_frames = encoder.encode(padded, num_samples)
            found += [clip[0, :frames] for clip, frames in zip(states, num_frames.tolist(), strict=True)]
            part += int(num_frames.sum())
            if part >= max_frames / len(manifests):
                break
    return torch.cat(found)


def errors_of(quantizer: Quantizer, frames: Tensor) -> dict[str, float]:
    """Squared error over that of the mean after each number of calls."""
    total = (frames - frames.mean(dim=0)).square().sum()
    decoded = {calls: quantizer.decode(quantizer.search(frames, calls)) for calls in CALLS}
    return {f"error_{calls}": ((found - frames).square().sum() / total).item() for calls, found in decoded.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="A real teacher's frames as codes.")
    parser.add_argument("--train", nargs="+", required=True, help="manifests to fit on")
    parser.add_argument("--test", nargs="+", required=True, help="manifests to measure on")
    parser.add_argument("--teacher", default=TEACHER, help="speech encoder")
    parser.add_argument("--layer", type=int, default=LAYER, help="0 is what its first block hears")
    parser.add_argument("--max-frames", type=int, default=40_000, help="to fit on; a tenth is measured on")
    parser.add_argument("--phase1-steps", type=int, default=600)
    parser.add_argument("--phase2-steps", type=int, default=400)
    parser.add_argument("--output", type=Path, help="also write the numbers here, as JSON")
    arguments = parser.parse_args()
    print(hardware_name(torch.device("cpu")))
    encoder = load_frame_encoder(
        arguments.teacher, window_seconds=WINDOW_SECONDS, grid_seconds=GRID_SECONDS, layers=[arguments.layer]
    )
    train = frames_of(encoder, arguments.train, arguments.max_frames)
    test = frames_of(encoder, arguments.test, arguments.max_frames // 10)
    print(f"{len(train):,} frames to fit on, {len(test):,} to measure on", flush=True)
    rows: list[dict[str, Any]] = []
    for num_bytes in SIZES:
        config = FitConfig(
            bytes_per_frame=num_bytes, phase1_steps=arguments.phase1_steps, phase2_steps=arguments.phase2_steps
        )
        started = time.perf_counter()
        quantizer = fit(train, config)[0]
        fit_seconds = time.perf_counter() - started
        started = time.perf_counter()
        quantizer.encode(test)
        seconds = time.perf_counter() - started
        rows.append(
            {
                "bytes_per_frame": num_bytes,
                "times_smaller": quantizer.storage_ratio,
                "MB_per_hour": 3600 * encoder.frames_per_second * num_bytes / 1e6,
                **errors_of(quantizer, test),
                "times_real_time": len(test) / encoder.frames_per_second / seconds,
                "fit_seconds": fit_seconds,
            }
        )
        print(", ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()), flush=True)
    if arguments.output is not None:
        facts = {name: getattr(arguments, name) for name in ("teacher", "layer", "phase1_steps", "phase2_steps")}
        write_measurements(arguments.output, rows, **facts, train_frames=len(train), test_frames=len(test))


if __name__ == "__main__":
    main()
