"""Speed of loading on one CPU thread. Launch: python tests/benchmarks/loader.py [--audio-dir DIR] [--output FILE]

Audio-hours per CPU-second on generated clips of 12 s, and on the FLAC and WAV files below --audio-dir, each the best of
several rounds. Targets: WAV 15, FLAC 0.8, log-mel with 80 bins 0.5, codes 300, and from files to log-mel batches at
least 3 times as fast as a map over a `datasets` dataset that decodes with soundfile and calls WhisperFeatureExtractor.
(`datasets.Audio` itself decodes with torchcodec, which is not a dependency of speechkd.)
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the targets are for a CPU

import datasets
import numpy as np
import soundfile
import torch
import torchaudio
from features import CLIP_SECONDS, NUM_CLIPS, speechlike_clips
from transformers import WhisperFeatureExtractor

from speechkd.data.audio import load_audio, pcm16_to_float
from speechkd.data.features import SAMPLE_RATE_HZ, WhisperLogMel
from speechkd.data.loader import pad_waveforms, train_loader

BATCH_SIZE = 8
MAX_SAMPLES = 480_000
CODES_PER_SECOND, NUM_CODEBOOKS = 50, 8
TARGETS = {"WAV to int16": 15.0, "WAV to float32": 15.0, "FLAC to int16": 0.8, "log-mel 80": 0.5, "codes to int64": 300}
TARGET_RATIO = 3.0
FORMS = ("map", "transform")


def best_cpu_seconds(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Least processor time of each; they take turns, and the first round warms up."""
    best = dict.fromkeys(steps, float("inf"))
    for number in range(rounds + 1):
        for name, step in steps.items():
            started = time.process_time()
            step()
            if number:
                best[name] = min(best[name], time.process_time() - started)
    return best


class Clips(torch.utils.data.Dataset):
    """Files as int16."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return load_audio(self.paths[index], SAMPLE_RATE_HZ, dtype=torch.int16)


def ours(paths: list[Path], log_mel: WhisperLogMel) -> Callable[[], None]:
    """Files to log-mel batches as a training run makes them, in one process."""
    batches = [list(range(start, min(start + BATCH_SIZE, len(paths)))) for start in range(0, len(paths), BATCH_SIZE)]
    collate = partial(pad_waveforms, max_samples=MAX_SAMPLES)
    loader = train_loader(Clips(paths), batches, collate, num_workers=0, seed=0, rank=0)

    def step() -> None:
        for waveforms, _ in loader:
            log_mel(pcm16_to_float(waveforms))

    return step


def reference_batch(batch: dict[str, list[str]], extractor: WhisperFeatureExtractor) -> dict[str, Any]:
    """The same for one batch with what is commonly used."""
    clips = []
    for path in batch["audio"]:
        samples, rate = soundfile.read(path, dtype="float32")
        if rate != SAMPLE_RATE_HZ:
            samples = torchaudio.functional.resample(torch.from_numpy(samples), rate, SAMPLE_RATE_HZ).numpy()
        clips.append(samples)
    return {"input_features": extractor(clips, sampling_rate=SAMPLE_RATE_HZ, return_tensors="np").input_features}


def reference(paths: list[Path], form: str) -> Callable[[], None]:
    """Log-mel batches of a map-style dataset: by `map`, which keeps them as Arrow, or a transform as they are read."""
    rows = datasets.Dataset.from_dict({"audio": [str(path) for path in paths]})
    prepare = partial(reference_batch, extractor=WhisperFeatureExtractor(feature_size=80))

    def mapped() -> None:
        made = rows.map(prepare, batched=True, batch_size=BATCH_SIZE, remove_columns="audio", keep_in_memory=True)
        for batch in made.with_format("torch").iter(BATCH_SIZE):
            assert batch["input_features"].shape[1:] == (80, 3000)

    def transformed() -> None:
        for batch in rows.with_transform(prepare).iter(BATCH_SIZE):
            torch.from_numpy(np.asarray(batch["input_features"]))

    return mapped if form == "map" else transformed


def code_step(folder: Path) -> Callable[[], None]:
    """Clips of memory-mapped uint8 codes, (frames, codebooks), as padded int64 batches would take them."""
    frames = round(CLIP_SECONDS * CODES_PER_SECOND)
    codes = np.random.default_rng(0).integers(0, 256, (NUM_CLIPS * frames, NUM_CODEBOOKS), dtype=np.uint8)
    codes.tofile(folder / "codes.bin")
    # as a plain array: each slice of a np.memmap costs more than its codes
    mapped = np.asarray(np.memmap(folder / "codes.bin", np.uint8, mode="r", shape=codes.shape))

    def step() -> None:
        for row in range(NUM_CLIPS):
            torch.from_numpy(mapped[row * frames : (row + 1) * frames].astype(np.int64))

    return step


def decoding(paths: list[Path], dtype: torch.dtype) -> Callable[[], None]:
    def step() -> None:
        for path in paths:
            load_audio(path, SAMPLE_RATE_HZ, dtype=dtype)

    return step


def measured(
    name: str, steps: dict[str, Callable[[], Any]], hours: dict[str, float] | float, rounds: int
) -> dict[str, float]:
    """Audio-hours per CPU-second of each step, printed as a table."""
    seconds = best_cpu_seconds(steps, rounds)
    rates = {step: (hours[step] if isinstance(hours, dict) else hours) / seconds[step] for step in steps}
    print(f"\n{name}\n\n| step | audio-hours per CPU-second | target |\n|---|---|---|")
    for step, rate in rates.items():
        print(f"| {step} | {rate:.2f} | {TARGETS.get(step, '')} |")
    return rates


def printed_ratios(rates: dict[str, float], kinds: list[str]) -> dict[str, float]:
    ratios = {}
    for kind in kinds:
        for form in FORMS:
            ratios[f"{kind}, datasets {form}"] = rates[f"{kind} to log-mel"] / rates[f"datasets {form}, {kind}"]
    print("\n| files to log-mel batches | times as fast | target |\n|---|---|---|")
    for name, ratio in ratios.items():
        print(f"| {name} | {ratio:.2f} | {TARGET_RATIO} |")
    return ratios


def end_to_end_steps(files: dict[str, list[Path]]) -> dict[str, Callable[[], Any]]:
    log_mel = WhisperLogMel(80)
    steps: dict[str, Callable[[], Any]] = {}
    for kind, paths in files.items():
        steps[f"{kind} to log-mel"] = ours(paths, log_mel)
        for form in FORMS:
            steps[f"datasets {form}, {kind}"] = reference(paths, form)
    return steps


def on_generated_clips(rounds: int) -> dict[str, Any]:
    clips = speechlike_clips()
    hours = NUM_CLIPS * CLIP_SECONDS / 3600
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, list[Path]] = {"WAV": [], "FLAC": [], "OGG": []}
        for kind, paths in files.items():
            for row, clip in enumerate(clips):
                paths.append(Path(folder) / f"{row}.{kind.lower()}")
                soundfile.write(paths[-1], clip.numpy(), SAMPLE_RATE_HZ)
        batch, log_mel = torch.stack(clips), WhisperLogMel(80)
        steps: dict[str, Callable[[], Any]] = {
            f"{kind} to {str(dtype).removeprefix('torch.')}": decoding(paths, dtype)
            for kind, paths in files.items()
            for dtype in (torch.int16, torch.float32)
        }
        steps |= {"log-mel 80": lambda: log_mel(batch), "codes to int64": code_step(Path(folder))}
        steps |= end_to_end_steps({kind: files[kind] for kind in ("WAV", "FLAC")})
        rates = measured(f"{NUM_CLIPS} generated clips of {CLIP_SECONDS:.0f} s", steps, hours, rounds)
    return {"audio_hours_per_cpu_second": rates, "times_as_fast": printed_ratios(rates, ["WAV", "FLAC"])}


def on_recordings(folder: Path, rounds: int) -> dict[str, Any]:
    """The first 64 FLAC and WAV files of each rate, of at most 30 s."""
    files: dict[str, list[Path]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".wav", ".flac")):
        info = soundfile.info(path)
        resampled = "" if info.samplerate == SAMPLE_RATE_HZ else f" {info.samplerate} Hz"  # no target: it costs more
        kind = f"{path.suffix[1:].upper()}{resampled}"
        if info.duration <= 30 and len(files.setdefault(kind, [])) < 64:
            files[kind].append(path)
    hours: dict[str, float] = {}
    steps: dict[str, Callable[[], Any]] = {}
    for kind, paths in files.items():
        kind_hours = sum(soundfile.info(path).duration for path in paths) / 3600
        of_kind = {f"{kind} to int16": decoding(paths, torch.int16)} | end_to_end_steps({kind: paths})
        steps |= of_kind
        hours |= dict.fromkeys(of_kind, kind_hours)
    counts = ", ".join(f"{len(paths)} {kind}" for kind, paths in files.items())
    rates = measured(f"{folder.name}: {counts}", steps, hours, rounds)
    return {"audio_hours_per_cpu_second": rates, "times_as_fast": printed_ratios(rates, list(files))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--audio-dir", type=Path, action="append", default=[], help="real recordings; may be repeated")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="where the figures go as JSON; printed where it is not given")
    args = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_caching()  # map would answer the second round from its cache
    datasets.disable_progress_bars()
    results = {"generated": on_generated_clips(args.rounds)}
    for folder in args.audio_dir:
        results[folder.name] = on_recordings(folder, args.rounds)
    text = json.dumps(results, indent=2)
    if args.output:
        args.output.write_text(text + "\n")
    else:
        print(f"\n{text}")


if __name__ == "__main__":
    main()
