"""Speed of decoding and features on one CPU thread. Launch: python tests/benchmarks/features.py

Audio-hours per CPU-second on generated clips of 12 s, beside the reference extractor on the same clips, and what
augmentation costs. Targets: WAV 15, FLAC 0.8, log-mel with 80 bins 0.5.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the targets are for a CPU, whose time is then what `measure` counts

import soundfile
import torch
from measure import median_seconds
from torch import Tensor
from torchaudio.compliance import kaldi
from transformers import Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from speechkd.data.audio import load_audio
from speechkd.data.augment import SpecAugmentConfig, change_speed, load_noise, mix_noise, reverberate, spec_augment
from speechkd.data.features import SAMPLE_RATE_HZ, KaldiFbank, WhisperLogMel, normalize_waveforms

NUM_CLIPS = 16
CLIP_SECONDS = 12.0
TARGETS = {"decode WAV": 15.0, "decode FLAC": 0.8, "log-mel 80": 0.5}


def speechlike_clips() -> list[Tensor]:
    """Noise with a falling spectrum that swells four times a second, so that FLAC compresses it like speech."""
    generator = torch.Generator().manual_seed(0)
    num_samples = round(CLIP_SECONDS * SAMPLE_RATE_HZ)
    noise = torch.randn(NUM_CLIPS, num_samples, generator=generator)
    spectrum = torch.fft.rfft(noise) / (1 + torch.arange(num_samples // 2 + 1) / 5000)
    swell = torch.sin(torch.pi * 4 * torch.arange(num_samples) / SAMPLE_RATE_HZ).square()
    clips = torch.fft.irfft(spectrum, n=num_samples) * swell
    return list(0.1 * clips / clips.std(dim=1, keepdim=True))


def decoding(files: list[Path]) -> Callable[[], None]:
    def step() -> None:
        for path in files:
            load_audio(path, SAMPLE_RATE_HZ)

    return step


def feature_steps(clips: list[Tensor]) -> dict[str, Callable[[], Any]]:
    """Ours, and the reference extractor under the same name with `reference` before it."""
    batch, arrays = torch.stack(clips), [clip.numpy() for clip in clips]
    num_samples = torch.full((len(clips),), batch.shape[1])
    steps: dict[str, Callable[[], Any]] = {}
    for num_mels in (80, 128):
        log_mel, extractor = WhisperLogMel(num_mels), WhisperFeatureExtractor(feature_size=num_mels)
        steps[f"log-mel {num_mels}"] = lambda log_mel=log_mel: log_mel(batch)
        steps[f"reference log-mel {num_mels}"] = lambda extractor=extractor: extractor(
            arrays, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt"
        )
    fbank, normalizer = KaldiFbank(80), Wav2Vec2FeatureExtractor(do_normalize=True)
    steps["fbank 80"] = lambda: fbank(batch, num_samples)
    steps["reference fbank 80"] = lambda: [kaldi.fbank(clip[None], num_mel_bins=80) for clip in clips]
    steps["normalise"] = lambda: normalize_waveforms(batch, num_samples)
    steps["reference normalise"] = lambda: normalizer(
        arrays, sampling_rate=SAMPLE_RATE_HZ, padding=True, return_tensors="pt"
    )
    return steps


def augmentation_steps(clips: list[Tensor], noise_file: Path) -> dict[str, Callable[[], Any]]:
    response = clips[0][: SAMPLE_RATE_HZ // 2] * torch.exp(-torch.arange(SAMPLE_RATE_HZ // 2) / 2000)
    features = WhisperLogMel()(torch.stack(clips))
    num_frames = torch.full((len(clips),), round(100 * CLIP_SECONDS))
    ids, config = [f"clip-{row}" for row in range(len(clips))], SpecAugmentConfig()

    def noise() -> None:
        for clip in clips:
            mix_noise(clip, load_noise(noise_file, SAMPLE_RATE_HZ, len(clip), 0.5), 10.0)

    return {
        "speed 0.9": lambda: [change_speed(clip, 0.9) for clip in clips],
        "noise, decoded": noise,
        "reverberation 0.5 s": lambda: [reverberate(clip, response) for clip in clips],
        "SpecAugment": lambda: spec_augment(features, num_frames, ids, config, seed=0, epoch=0),
    }


def main() -> None:
    torch.set_num_threads(1)
    clips = speechlike_clips()
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, list[Path]] = {"WAV": [], "FLAC": []}
        for kind, paths in files.items():
            for row, clip in enumerate(clips):
                paths.append(Path(folder) / f"{row}.{kind.lower()}")
                soundfile.write(paths[-1], clip.numpy(), SAMPLE_RATE_HZ, subtype="PCM_16")
        sizes = [sum(path.stat().st_size for path in paths) for paths in files.values()]
        steps: dict[str, Callable[[], Any]] = {f"decode {kind}": decoding(paths) for kind, paths in files.items()}
        steps |= feature_steps(clips) | augmentation_steps(clips, files["WAV"][0])
        seconds = median_seconds(steps)
    hours = NUM_CLIPS * CLIP_SECONDS / 3600
    print(f"{NUM_CLIPS} clips of {CLIP_SECONDS:.0f} s, FLAC {100 * sizes[1] / sizes[0]:.0f} % of the size of WAV\n")
    print("| step | audio-hours per CPU-second | target | times as fast as the reference |\n|---|---|---|---|")
    for name in steps:
        if not name.startswith("reference"):
            target = f"{TARGETS[name]:.1f}" if name in TARGETS else ""
            reference = seconds.get(f"reference {name}")
            ratio = f"{reference / seconds[name]:.1f}" if reference else ""
            print(f"| {name} | {hours / seconds[name]:.2f} | {target} | {ratio} |")


if __name__ == "__main__":
    main()
