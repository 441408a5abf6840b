"""Decoding and resampling of audio: files, members of tar shards, and encoded bytes."""

import io
import math
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor

from speechkd.data.shards import read_member, split_member

DURATION_TOLERANCE_SECONDS = 0.1  # mp3 and ogg pad a little at both ends
MAX_SAMPLES_PER_BYTE = 1500  # FLAC of silence: a block of 16,384 samples in 12 bytes
MAX_RESAMPLING_KERNEL = 2**24  # values, 64 MiB, kept for the next clip; 44,056 to 16,000 Hz takes 11 million
# libsndfile notes a chunk that promises more bytes than the file has; writers into a pipe promise the most there is
SHORT_CHUNK = re.compile(r"(?:data|SSND|Data Size) : (\d+) \(should be (\d+)\)")
UNKNOWN_CHUNK_BYTES = 0x7FFF0000


class AudioError(ValueError):
    """A clip cannot be used; the message names the file and the reason."""


def load_audio(
    source: str | Path | bytes,
    sample_rate_hz: int,
    *,
    offset_seconds: float | None = None,
    duration_seconds: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Decode one clip to mono at the wanted rate.

    Args:
        source: flac, wav, ogg or mp3: a file, a member of a tar shard as `shard.tar#member`, or the encoded bytes.
        sample_rate_hz: rate of the result; any input rate is resampled to it.
        offset_seconds: start inside the clip; None reads all of it.
        duration_seconds: expected length. With an offset it also limits what is read.
        dtype: float32, or int16 for 16-bit PCM, half of the bytes that a worker sends.

    Returns:
        Channels averaged, (samples,): float32 in [-1, 1], or int16. 16-bit mono at the wanted rate is copied as int16
        sample by sample; everything else goes through float32 and is rounded and clamped.

    Raises:
        AudioError: the clip is missing, empty, undecodable, not as long as `duration_seconds` or as its own header
            says, or has NaN or infinity.
        ValueError: another dtype.
    """
    if dtype not in (torch.float32, torch.int16):
        raise ValueError(f"audio is loaded as torch.float32 or torch.int16, got dtype={dtype}")
    name, encoded, num_bytes = _opened(source)
    try:
        with soundfile.SoundFile(encoded) as file:
            rate, promised_frames = file.samplerate, _promised_frames(file)
            _check_frames(name, file.frames, num_bytes)
            if offset_seconds is None and duration_seconds is not None:
                _check_not_longer(name, file.frames / rate, duration_seconds)
            num_frames = -1
            if offset_seconds is not None:
                file.seek(min(round(offset_seconds * rate), file.frames))
                num_frames = -1 if duration_seconds is None else round(duration_seconds * rate)
            # 16-bit samples are read as they are: the same values as float32, at a third of the time
            is_pcm16 = file.subtype == "PCM_16"
            samples = file.read(num_frames, dtype="int16" if is_pcm16 else "float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError) as error:
        reason = getattr(error, "error_string", str(error))  # without the name, which stands in front
        raise AudioError(f"{name}: cannot be decoded ({reason}); the file is corrupt or not audio") from error
    if len(samples) == 0:
        raise AudioError(f"{name}: holds no samples at offset {offset_seconds or 0.0:.2f} s")
    length_seconds = len(samples) / rate
    promised_seconds = promised_frames / rate if offset_seconds is None else 0.0
    expected_seconds = max(duration_seconds or 0.0, promised_seconds)
    if length_seconds < expected_seconds - DURATION_TOLERANCE_SECONDS:
        raise AudioError(
            f"{name}: truncated, {length_seconds:.2f} s of {expected_seconds:.2f} s could be read; "
            "copy it again from the corpus or rerun its data_prep script"
        )
    if not is_pcm16 and not np.isfinite(samples).all():
        raise AudioError(f"{name}: {int((~np.isfinite(samples)).sum())} samples are NaN or infinite")
    waveform = torch.from_numpy(samples)
    if waveform.shape[1] == 1:
        waveform = waveform[:, 0]
        if rate == sample_rate_hz and waveform.dtype == dtype:
            return waveform
    waveform = pcm16_to_float(waveform)
    if waveform.ndim == 2:
        waveform = waveform.mean(dim=1)
    if rate != sample_rate_hz:
        _check_ratio(name, rate, sample_rate_hz)
        waveform = _resampler(rate, sample_rate_hz)(waveform)
    if dtype == torch.float32:
        return waveform
    return waveform.mul(32768).round_().clamp_(-32768, 32767).to(torch.int16)


def load_utterance(utterance: dict[str, Any], sample_rate_hz: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """`load_audio` for one utterance of a manifest; (samples,). The error names the utterance."""
    try:
        return load_audio(
            utterance["audio"],
            sample_rate_hz,
            offset_seconds=utterance["offset_seconds"],
            duration_seconds=utterance["duration_seconds"],
            dtype=dtype,
        )
    except AudioError as error:
        raise AudioError(f"utterance {utterance['id']!r}: {error}") from error


def pcm16_to_float(waveforms: Tensor) -> Tensor:
    """Samples as float32 in [-1, 1), of any shape, on the device where they are; float32 is returned as it is.

    Raises:
        ValueError: neither int16 nor float32.
    """
    if waveforms.dtype == torch.float32:
        return waveforms
    if waveforms.dtype != torch.int16:
        raise ValueError(f"waveforms must be torch.int16 or torch.float32, got {waveforms.dtype}")
    return waveforms.float().mul_(1 / 32768)


def _opened(source: str | Path | bytes) -> tuple[str, Path | io.BytesIO, int]:
    """What messages call the source, what soundfile takes, and its size in bytes."""
    if isinstance(source, bytes):
        if not source:
            raise AudioError("audio is empty (0 bytes); copy it again from the corpus")
        return f"audio of {len(source)} bytes", io.BytesIO(source), len(source)
    member = split_member(str(source))
    if member is not None:
        try:
            content = read_member(*member)
        except ValueError as error:
            raise AudioError(f"{source}: {error}") from error
        return str(source), io.BytesIO(content), len(content)
    path = Path(source)
    if not path.is_file():
        raise AudioError(f"{path}: audio file does not exist")
    num_bytes = path.stat().st_size
    if num_bytes == 0:
        raise AudioError(f"{path}: audio file is empty (0 bytes); copy it again from the corpus")
    return str(path), path, num_bytes


def _promised_frames(file: soundfile.SoundFile) -> float:
    """Length by the header; `file.frames` of a cut WAV is what is left."""
    for declared, actual in SHORT_CHUNK.findall(file.extra_info):
        if int(actual) < int(declared) < UNKNOWN_CHUNK_BYTES and int(actual) > 0:
            return file.frames * int(declared) / int(actual)
    return file.frames


def _check_not_longer(name: str, length_seconds: float, duration_seconds: float) -> None:
    if length_seconds > duration_seconds + DURATION_TOLERANCE_SECONDS:
        raise AudioError(
            f"{name}: lasts {length_seconds:.2f} s where {duration_seconds:.2f} s are expected; "
            "the file changed after its manifest was written, rerun the data_prep script"
        )


def _check_frames(name: str, num_frames: int, num_bytes: int) -> None:
    """Refuse a header that asks for more memory than its samples can need."""
    if num_frames > num_bytes * MAX_SAMPLES_PER_BYTE:
        raise AudioError(
            f"{name}: its header does not say how many samples there are, or more than {num_bytes} bytes can hold; "
            "write it again, not into a pipe: ffmpeg -i IN OUT.flac"
        )


def _check_ratio(name: str, rate_hz: int, wanted_hz: int) -> None:
    """Refuse a rate, mostly of a corrupt header, for which the resampling filter would fill the memory."""
    common = math.gcd(rate_hz, wanted_hz)
    if (rate_hz // common) * (wanted_hz // common) > MAX_RESAMPLING_KERNEL:
        raise AudioError(
            f"{name}: has {rate_hz} samples a second, which cannot be resampled to {wanted_hz} Hz; "
            f"if that is true, convert it beforehand: ffmpeg -i IN -ar {wanted_hz} OUT.flac"
        )


@lru_cache(maxsize=16)
def _resampler(from_hz: int, to_hz: int) -> torchaudio.transforms.Resample:
    return torchaudio.transforms.Resample(from_hz, to_hz)
