"""Augmentation of training audio: speed, reverberation, noise and SpecAugment.

What is drawn depends on the seed, the epoch and the utterance id alone: a resumed run, another batch composition and
another number of workers draw the same. No global random state is read or left changed.
"""

import hashlib
import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import soundfile
import torch
import torchaudio
from torch import Tensor

from speechkd.data.audio import AudioError, load_audio
from speechkd.data.features import padding_mask

logger = logging.getLogger(__name__)

AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".mp3"}
MAX_DRAWS = 10  # of a noise or impulse response file, where the drawn ones cannot be decoded


@dataclass(kw_only=True)
class WaveformAugmentConfig:
    """Augmentation of waveforms; by default there is none.

    Args:
        speed_factors: speeds of which each utterance gets one, as [0.9, 1.0, 1.1]; in steps of 0.01.
        noise_dir: folder of noise recordings, subfolders included.
        noise_probability: share of the utterances that get noise.
        min_snr_db: loudest noise, as signal-to-noise ratio over the clip.
        max_snr_db: quietest noise.
        impulse_response_dir: folder of room impulse responses, subfolders included.
        reverberation_probability: share of the utterances that get reverberation.
    """

    speed_factors: list[float] = field(default_factory=list)
    noise_dir: str | None = None
    noise_probability: float = 0.5
    min_snr_db: float = 10.0
    max_snr_db: float = 20.0
    impulse_response_dir: str | None = None
    reverberation_probability: float = 0.5

    def __post_init__(self) -> None:
        for factor in self.speed_factors:
            speed_percent(factor)
        for name in ("noise_probability", "reverberation_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be 0 to 1, got {getattr(self, name)}")
        if not -math.inf < self.min_snr_db <= self.max_snr_db < math.inf:
            raise ValueError(
                f"min_snr_db={self.min_snr_db} and max_snr_db={self.max_snr_db} must be finite and in this order"
            )


@dataclass(kw_only=True)
class SpecAugmentConfig:
    """Masks on features. Park et al. 2019, https://arxiv.org/abs/1904.08779, without time warping.

    Args:
        num_time_masks: masks along time per utterance; 0 for none.
        max_time_mask_frames: each is shorter than this.
        max_time_mask_fraction: and at most this share of the utterance, 0 to 1.
        num_frequency_masks: masks along frequency per utterance; 0 for none.
        max_frequency_mask_bins: each is narrower than this.
    """

    num_time_masks: int = 2
    max_time_mask_frames: int = 100
    max_time_mask_fraction: float = 0.2
    num_frequency_masks: int = 2
    max_frequency_mask_bins: int = 27

    def __post_init__(self) -> None:
        for name in ("num_time_masks", "max_time_mask_frames", "num_frequency_masks", "max_frequency_mask_bins"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}; 0 masks nothing")
        if not 0 <= self.max_time_mask_fraction <= 1:
            raise ValueError(f"max_time_mask_fraction must be 0 to 1, got {self.max_time_mask_fraction}")


class WaveformAugment:
    """Speed, then reverberation, then noise, each drawn per utterance and epoch.

    Args:
        config: what to do.
        sample_rate_hz: rate of the waveforms; noise and impulse responses of other rates are resampled.
        seed: of the run.

    Raises:
        ValueError: a folder holds no audio.
    """

    def __init__(self, config: WaveformAugmentConfig, sample_rate_hz: int, seed: int) -> None:
        self.config, self.sample_rate_hz, self.seed = config, sample_rate_hz, seed
        self.noises = find_audio(config.noise_dir) if config.noise_dir else []
        self.impulse_responses = find_audio(config.impulse_response_dir) if config.impulse_response_dir else []

    def speed_factor(self, utterance_id: str, epoch: int) -> float:
        """Speed of this utterance in this epoch, known without its audio: it then lasts `duration / factor`."""
        factors = self.config.speed_factors
        return utterance_random(self.seed, epoch, utterance_id, "speed").choice(factors) if factors else 1.0

    def __call__(self, waveform: Tensor, utterance_id: str, epoch: int) -> Tensor:
        """Augment one clip.

        Args:
            waveform: samples in [-1, 1], (samples,), float32.
            utterance_id: of the manifest.
            epoch: number of the pass over the data.

        Returns:
            Samples in [-1, 1], scaled down if they would leave it, (samples / speed factor,), float32.

        Raises:
            AudioError: the clip has no samples, or no drawn noise or impulse response can be decoded.
        """
        if waveform.numel() == 0:
            raise AudioError(f"utterance {utterance_id!r} has no samples to augment; remove it from the manifest")
        waveform = change_speed(waveform, self.speed_factor(utterance_id, epoch))
        draw = utterance_random(self.seed, epoch, utterance_id, "reverberation")
        if self.impulse_responses and draw.random() < self.config.reverberation_probability:
            waveform = reverberate(waveform, self._impulse_response(draw))
        draw = utterance_random(self.seed, epoch, utterance_id, "noise")
        if self.noises and draw.random() < self.config.noise_probability:
            snr_db = draw.uniform(self.config.min_snr_db, self.config.max_snr_db)
            waveform = mix_noise(waveform, self._noise(draw, len(waveform)), snr_db)
        return waveform / waveform.abs().max().clamp(min=1.0)

    def _noise(self, draw: random.Random, num_samples: int) -> Tensor:
        """A random part of a random recording, repeated where the recording is shorter."""
        for path in draw.choices(self.noises, k=MAX_DRAWS):
            position = draw.random()
            try:
                return load_noise(path, self.sample_rate_hz, num_samples, position)
            except AudioError as error:
                _warn_once(str(error))
        raise AudioError(f"{MAX_DRAWS} noises drawn from {self.config.noise_dir} cannot be decoded; see the warnings")

    def _impulse_response(self, draw: random.Random) -> Tensor:
        for path in draw.choices(self.impulse_responses, k=MAX_DRAWS):
            try:
                impulse_response = load_audio(path, self.sample_rate_hz)
                if not impulse_response.any():
                    raise AudioError(f"{path}: impulse response is silent; remove it")
                return impulse_response
            except AudioError as error:
                _warn_once(str(error))
        raise AudioError(
            f"{MAX_DRAWS} impulse responses drawn from {self.config.impulse_response_dir} cannot be used; "
            "see the warnings"
        )


def change_speed(waveform: Tensor, factor: float) -> Tensor:
    """Play a clip faster, which also raises its pitch. Ko et al. 2015, "Audio augmentation for speech recognition".

    Args:
        waveform: samples, (samples,).
        factor: speed, 1.0 for no change, in steps of 0.01.

    Returns:
        The clip, (ceil(samples / factor),).

    Raises:
        ValueError: the factor is not of that form.
    """
    return torchaudio.functional.resample(waveform, speed_percent(factor), 100)


def speed_percent(factor: float) -> int:
    """A speed factor in whole percent, so that resampling is exact and its filters are short.

    Raises:
        ValueError: it is not a multiple of 0.01, or outside 0.5 to 2.
    """
    if not 0.5 <= factor <= 2 or abs(factor * 100 - round(factor * 100)) > 1e-6:
        raise ValueError(f"speed factor {factor} must be 0.5 to 2 in steps of 0.01; 0.9, 1.0 and 1.1 are usual")
    return round(factor * 100)


def mix_noise(waveform: Tensor, noise: Tensor, snr_db: float) -> Tensor:
    """Add noise so that the energies over the whole clip have a ratio of `snr_db`.

    Args:
        waveform: samples, (samples,).
        noise: same shape; its level does not matter.
        snr_db: signal-to-noise ratio.

    Returns:
        The mix, (samples,); unchanged where either is silent, since no ratio is then defined.
    """
    if waveform.norm().square() == 0 or noise.norm().square() == 0:
        return waveform
    return torchaudio.functional.add_noise(waveform, noise, torch.tensor(snr_db))


def reverberate(waveform: Tensor, impulse_response: Tensor) -> Tensor:
    """Convolve with a room impulse response, aligned by its loudest sample.

    Args:
        waveform: samples, (samples,).
        impulse_response: at the same rate, (taps,).

    Returns:
        The clip in that room, as loud and as long as before, (samples,).
    """
    loudest = int(impulse_response.abs().argmax())
    reverberant = torchaudio.functional.fftconvolve(waveform, impulse_response)[loudest : loudest + len(waveform)]
    return reverberant * (waveform.abs().mean() / reverberant.abs().mean().clamp(min=1e-14))


def load_noise(path: Path, sample_rate_hz: int, num_samples: int, position: float) -> Tensor:
    """Part of a noise recording; only that part is decoded.

    Args:
        path: audio file.
        sample_rate_hz: rate of the result.
        num_samples: its length.
        position: where it starts, 0 to 1 of the possible starts; a recording that is too short is repeated.

    Returns:
        Samples, (num_samples,), float32.

    Raises:
        AudioError: the file cannot be decoded.
    """
    try:
        available_seconds = soundfile.info(path).duration
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise AudioError(f"{path}: cannot be decoded ({error}); the file is corrupt or not audio") from error
    wanted_seconds = num_samples / sample_rate_hz + 0.01  # resampling may round down
    if available_seconds >= wanted_seconds:
        offset_seconds = position * (available_seconds - wanted_seconds)
        noise = load_audio(path, sample_rate_hz, offset_seconds=offset_seconds, duration_seconds=wanted_seconds)
        return noise[:num_samples]
    noise = load_audio(path, sample_rate_hz)
    start = int(position * len(noise))
    return noise.roll(-start).repeat(-(-num_samples // len(noise)))[:num_samples]


def spec_augment(
    features: Tensor,
    num_frames: Tensor,
    utterance_ids: Sequence[str],
    config: SpecAugmentConfig,
    *,
    seed: int,
    epoch: int,
) -> Tensor:
    """Mask random bands of frequency and stretches of time with the utterance's mean.

    Masks are drawn on the CPU, so that every device masks the same, and within the true length of each utterance.

    Args:
        features: (batch, mels, frames).
        num_frames: valid frames of each utterance, (batch,), int64, on the CPU.
        utterance_ids: of the manifest, one per row.
        config: number and size of the masks.
        seed: of the run.
        epoch: number of the pass over the data.

    Returns:
        Masked copy, same shape; padding is unchanged.

    Raises:
        ValueError: lengths or ids do not match the batch.
    """
    if len(utterance_ids) != len(features):
        raise ValueError(f"{len(utterance_ids)} utterance ids for a batch of {len(features)}; give one per row")
    valid = padding_mask(num_frames, features[:, 0])
    keep_bins = torch.ones(features.shape[:2])
    keep_frames = torch.ones(len(features), features.shape[2])
    time_masking = torchaudio.transforms.TimeMasking(
        config.max_time_mask_frames, iid_masks=True, p=config.max_time_mask_fraction
    )
    frequency_masking = torchaudio.transforms.FrequencyMasking(config.max_frequency_mask_bins, iid_masks=True)
    with torch.random.fork_rng(devices=[]):
        for row, (utterance_id, length) in enumerate(zip(utterance_ids, num_frames.tolist(), strict=True)):
            torch.default_generator.manual_seed(utterance_seed(seed, epoch, utterance_id, "spec_augment"))
            for _ in range(config.num_frequency_masks):
                keep_bins[row] = frequency_masking(keep_bins[row, None, :, None])[0, :, 0]
            for _ in range(config.num_time_masks):
                keep_frames[row, :length] = time_masking(keep_frames[row, None, None, :length])[0, 0]
    keep = (keep_bins.bool()[:, :, None] & keep_frames.bool()[:, None, :]).to(features.device)
    means = features.new_zeros(len(features), 1, 1)
    for row, length in enumerate(num_frames.tolist()):
        means[row] = features[row, :, :length].contiguous().mean()  # contiguous: the same sum however it is padded
    return torch.where(keep | ~valid[:, None, :], features, means)


def find_audio(folder: str | Path) -> list[Path]:
    """Audio files in a folder and its subfolders, sorted, so that draws do not depend on the file system.

    Raises:
        ValueError: the folder does not exist or holds none.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder; give one with noise or impulse responses, or null for none")
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    if not files:
        raise ValueError(
            f"{folder} holds no audio ({', '.join(sorted(AUDIO_SUFFIXES))}); "
            "unpack the noise or impulse responses there, or set the folder to null"
        )
    return files


def utterance_seed(seed: int, epoch: int, utterance_id: str, purpose: str) -> int:
    """Seed of one kind of augmentation of one utterance in one epoch, 0 to 2**63 - 1."""
    key = f"{seed}\n{epoch}\n{purpose}\n{utterance_id}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def utterance_random(seed: int, epoch: int, utterance_id: str, purpose: str) -> random.Random:
    """Source of random numbers seeded with `utterance_seed`."""
    return random.Random(utterance_seed(seed, epoch, utterance_id, purpose))


@lru_cache(maxsize=4096)
def _warn_once(message: str) -> None:
    logger.warning("%s", message)
