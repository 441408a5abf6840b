"""Decoding and resampling of audio files."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor

DURATION_TOLERANCE_SECONDS = 0.1  # mp3 and ogg pad a little at both ends


class AudioError(ValueError):
    """A clip cannot be used; the message names the file and the reason."""


def load_audio(
    path: str | Path,
    sample_rate_hz: int,
    *,
    offset_seconds: float | None = None,
    duration_seconds: float | None = None,
) -> Tensor:
    """Decode one clip to mono at the wanted rate.

    Args:
        path: flac, wav, ogg or mp3 file.
        sample_rate_hz: rate of the result; any input rate is resampled to it.
        offset_seconds: start inside the file; None reads the whole file.
        duration_seconds: expected length. With an offset it also limits what is read.

    Returns:
        Samples in [-1, 1], channels averaged, (samples,), float32.

    Raises:
        AudioError: the file is missing, empty, undecodable, not as long as `duration_seconds`, or has NaN or infinity.
    """
    path = Path(path)
    if not path.is_file():
        raise AudioError(f"{path}: audio file does not exist")
    if path.stat().st_size == 0:
        raise AudioError(f"{path}: audio file is empty (0 bytes); copy it again from the corpus")
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            num_frames = -1
            if offset_seconds is not None:
                file.seek(min(round(offset_seconds * rate), file.frames))
                num_frames = -1 if duration_seconds is None else round(duration_seconds * rate)
            # 16-bit samples are read as they are: the same values as float32, at a third of the time
            dtype = "int16" if file.subtype == "PCM_16" else "float32"
            samples = file.read(num_frames, dtype=dtype, always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise AudioError(f"{path}: cannot be decoded ({error}); the file is corrupt or not audio") from error
    if len(samples) == 0:
        raise AudioError(f"{path}: holds no samples at offset {offset_seconds or 0.0:.2f} s")
    length_seconds = len(samples) / rate
    if duration_seconds is not None and length_seconds < duration_seconds - DURATION_TOLERANCE_SECONDS:
        raise AudioError(
            f"{path}: truncated, {length_seconds:.2f} s of {duration_seconds:.2f} s could be read; "
            "copy it again from the corpus or rerun its data_prep script"
        )
    if duration_seconds is not None and length_seconds > duration_seconds + DURATION_TOLERANCE_SECONDS:
        raise AudioError(
            f"{path}: lasts {length_seconds:.2f} s where {duration_seconds:.2f} s are expected; "
            "the file changed after its manifest was written, rerun the data_prep script"
        )
    if dtype == "float32" and not np.isfinite(samples).all():
        raise AudioError(f"{path}: {int((~np.isfinite(samples)).sum())} samples are NaN or infinite")
    waveform = _mono(torch.from_numpy(samples))
    return waveform if rate == sample_rate_hz else _resampler(rate, sample_rate_hz)(waveform)


def _mono(samples: Tensor) -> Tensor:
    """Channels averaged, (samples,), float32 in [-1, 1]; int16 of (samples, channels) is scaled."""
    if samples.dtype == torch.int16:
        samples = samples.float().mul_(1 / 32768)
    return samples[:, 0] if samples.shape[1] == 1 else samples.mean(dim=1)


def load_utterance(utterance: dict[str, Any], sample_rate_hz: int) -> Tensor:
    """`load_audio` for one utterance of a manifest; (samples,), float32. The error names the utterance."""
    try:
        return load_audio(
            utterance["audio"],
            sample_rate_hz,
            offset_seconds=utterance["offset_seconds"],
            duration_seconds=utterance["duration_seconds"],
        )
    except AudioError as error:
        raise AudioError(f"utterance {utterance['id']!r}: {error}") from error


@lru_cache(maxsize=16)
def _resampler(from_hz: int, to_hz: int) -> torchaudio.transforms.Resample:
    return torchaudio.transforms.Resample(from_hz, to_hz)
