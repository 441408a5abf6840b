"""Size, load time, latency, throughput and memory of speech encoders and their exports, measured in turns on noise."""

import logging
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speechkd.data.features import HOP_LENGTH_SAMPLES, SAMPLE_RATE_HZ, WhisperLogMel
from speechkd.doctor import hardware_name
from speechkd.evaluate import real_time_factor_inverse
from speechkd.export.encoder_runtime import EncoderRunner, load_encoder_runner
from speechkd.export.transcribers import read_export
from speechkd.resources import now, peak_megabytes, resident_bytes, size_bytes
from speechkd.teachers import resolve_model

logger = logging.getLogger(__name__)

SHORTEST_SECONDS = 0.1
BATCH_SIZE, BATCH_CLIP_SECONDS = 8, 4.0  # of the throughput
BATCHED = "batched"


@dataclass
class _Contender:
    """One row of the table, and what was measured of it."""

    name: str
    runner: EncoderRunner
    load_seconds: float
    weights_megabytes: float | None
    steps: dict[str, Callable[[], None]]  # what is measured: "4s" is one clip of 4 s; those that fit alone
    working_megabytes: float | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)  # that the steps took


def bench_encoders(
    names: list[str],
    *,
    seconds: Sequence[float] = (1.0, 4.0, 15.0),
    rounds: int = 5,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Measure encoders and their exports on the same noise, all in turns, so that ratios hold on a busy machine.

    A latency is that of one clip, from its waveform to the last states: of a Whisper with the log-mel, of the clip
    alone and not of its whole window. Memory is the weights plus the most that the longest of the clips took beyond
    them; None where the system does not tell. Exports run on the CPU, with as many threads as torch has.

    Args:
        names: Hub ids, Hugging Face folders, `bundled:<name>` and folders of `export_encoder`, in any mix; of a Whisper
            only the encoder is loaded, while `size_megabytes` counts all of its files. Ratios are to the first one.
        seconds: lengths of the clips; a Whisper with a shorter window has None for those that do not fit.
        rounds: how often all of them run at each length.
        device: where Hugging Face models run; by default CUDA if there is one.

    Returns:
        `models`, one dict for each: `name`, `format`, `precision`, `size_megabytes`, `parameters`, `load_seconds` with
        the files in the system's cache; for each length, such as 4 s, `latency_median_seconds_4s`,
        `latency_p95_seconds_4s` and `speed_ratio_4s` (2 is twice as fast as the first model); `rtfx_batched`, seconds
        of audio a second in batches of 8 clips of 4 s; `peak_memory_megabytes`. And the conditions.

    Raises:
        ValueError: nothing to measure, a length or a number of rounds that makes no sense, or no such encoder.
    """
    lengths = {f"{length:g}s": float(length) for length in seconds}
    if not names or not lengths:
        raise ValueError(f"nothing to measure in {len(names)} models at {len(lengths)} lengths; give one or more each")
    if rounds < 1:
        raise ValueError(f"rounds must be 1 or more, got {rounds}")
    for length in lengths.values():
        if not SHORTEST_SECONDS <= length < math.inf:
            raise ValueError(f"seconds has {length:g}; give lengths of {SHORTEST_SECONDS:g} s or more")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    contenders = [_load(name, device, lengths) for name in names]
    for contender in contenders:
        _warm_up(contender)
    for number in range(rounds):
        for key in (*lengths, BATCHED):
            for contender in contenders:
                if key in contender.steps:
                    started = now(contender.runner.device)
                    contender.steps[key]()
                    contender.seconds.setdefault(key, []).append(now(contender.runner.device) - started)
        logger.info("round %d of %d", number + 1, rounds)
    return {
        "models": [_measures(contender, contenders[0], list(lengths)) for contender in contenders],
        "seconds": list(lengths.values()),
        "rounds": rounds,
        "batch_size": BATCH_SIZE,
        "batch_clip_seconds": BATCH_CLIP_SECONDS,
        "device": hardware_name(device),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "num_threads": torch.get_num_threads(),
    }


def _load(name: str, device: torch.device, lengths: dict[str, float]) -> _Contender:
    is_export = (read_export(name) or {}).get("format", "huggingface") != "huggingface"
    device = torch.device("cpu") if is_export else device
    resolve_model(name)  # converts a bundled model on its first use, which is no part of loading
    load_encoder_runner(name, device=device)  # nor is importing its libraries
    before_bytes = resident_bytes()
    started = now(device)
    runner = load_encoder_runner(name, device=device)
    load_seconds = now(device) - started
    steps = {
        key: _step(runner, batch_size, length)
        for key, batch_size, length in (
            *((key, 1, length) for key, length in lengths.items()),
            (BATCHED, BATCH_SIZE, BATCH_CLIP_SECONDS),
        )
        if runner.input.longest is None or length * SAMPLE_RATE_HZ / HOP_LENGTH_SAMPLES <= runner.input.longest
    }
    if runner.module is not None:
        weights_megabytes: float | None = sum(w.numel() * w.element_size() for w in runner.module.parameters()) / 1e6
    else:  # what a runtime holds shows in the process alone, after a run because some read weights when they use them
        _step(runner, 1, SHORTEST_SECONDS)()
        after_bytes = resident_bytes()
        weights_megabytes = None if before_bytes is None or after_bytes is None else (after_bytes - before_bytes) / 1e6
    return _Contender(name, runner, load_seconds, weights_megabytes, steps)


def _step(runner: EncoderRunner, batch_size: int, length_seconds: float) -> Callable[[], None]:
    """Run an encoder on noise of this length in seconds, from waveforms on."""
    generator = torch.Generator().manual_seed(0)
    num_samples = round(length_seconds * SAMPLE_RATE_HZ)
    waveforms: Tensor = 0.1 * torch.randn(batch_size, num_samples, generator=generator)
    if runner.input.mel_bins is None:
        return lambda: _run(runner, waveforms)
    log_mel = WhisperLogMel(runner.input.mel_bins, length_seconds).to(runner.device)
    return lambda: _run(runner, log_mel(waveforms.to(runner.device)))


def _run(runner: EncoderRunner, inputs: Tensor) -> None:
    runner(inputs)


def _warm_up(contender: _Contender) -> None:
    """Let it choose its kernels at each length, untimed, and then see what memory it takes."""
    for step in contender.steps.values():
        step()
    clips = [key for key in contender.steps if key != BATCHED]
    if clips:
        longest = max(clips, key=lambda key: float(key.removesuffix("s")))
        contender.working_megabytes = peak_megabytes(contender.steps[longest], contender.runner.device)


def _measures(contender: _Contender, first: _Contender, keys: list[str]) -> dict[str, Any]:
    medians, of_first = ({key: statistics.median(s) for key, s in c.seconds.items()} for c in (contender, first))
    measures: dict[str, Any] = {
        "name": contender.name,
        "format": contender.runner.format_name,
        "precision": contender.runner.precision,
        "size_megabytes": size_bytes(contender.name) / 1e6,
        "parameters": contender.runner.parameters,
        "load_seconds": contender.load_seconds,
    }
    for key in keys:
        taken = contender.seconds.get(key)
        measures[f"latency_median_seconds_{key}"] = None if taken is None else medians[key]
        measures[f"latency_p95_seconds_{key}"] = None if taken is None else float(np.percentile(taken, 95))
        measures[f"speed_ratio_{key}"] = of_first[key] / medians[key] if key in medians and key in of_first else None
    weights, working = contender.weights_megabytes, contender.working_megabytes
    audio_seconds = BATCH_SIZE * BATCH_CLIP_SECONDS
    return measures | {
        "rtfx_batched": real_time_factor_inverse(medians[BATCHED], audio_seconds) if BATCHED in medians else None,
        "peak_memory_megabytes": None if working is None or weights is None else weights + working,
    }
