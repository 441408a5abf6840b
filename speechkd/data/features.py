"""Model inputs from padded waveforms, in float32 on whatever device holds them.

Whisper's log-mel, Kaldi's filter banks, and the normalised waveforms of wav2vec 2.0, HuBERT and WavLM.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn
from torchaudio.compliance.kaldi import get_mel_banks

if TYPE_CHECKING:
    from transformers import WhisperConfig

SAMPLE_RATE_HZ = 16_000
WINDOW_SAMPLES = 30 * SAMPLE_RATE_HZ
SAMPLES_PER_POSITION = 320  # of Whisper's encoder: the second convolution halves the rate
FFT_SAMPLES = 400
HOP_LENGTH_SAMPLES = 160
KALDI_FRAME_SAMPLES = 400
KALDI_FFT_SAMPLES = 512
KALDI_PREEMPHASIS = 0.97
KALDI_LOWEST_HZ = 20.0


@dataclass(frozen=True)
class WhisperWindow:
    """How much a Whisper's encoder computes of a clip: its whole window, or the clip rounded up to a grid.

    Args:
        seconds: the whole window.
        grid_seconds: a clip is rounded up to a multiple of this; None computes the whole window of every clip.

    Raises:
        ValueError: the grid is longer than the window, or not of whole positions.
    """

    seconds: float = WINDOW_SAMPLES / SAMPLE_RATE_HZ
    grid_seconds: float | None = None

    def __post_init__(self) -> None:
        grid = self.grid_seconds
        if grid is None:
            return
        positions = grid * SAMPLE_RATE_HZ / SAMPLES_PER_POSITION
        if not 0 < grid <= self.seconds or not math.isclose(positions, round(positions)):
            raise ValueError(
                f"grid_seconds must be a multiple of 0.02 up to {self.seconds:g}, got {grid}; 1.0 is a good choice"
            )

    def num_positions(self, num_samples: Tensor) -> Tensor:
        """Positions of clips with these lengths at 16 kHz, with the silence behind them; same shape, int64."""
        window = round(self.seconds * SAMPLE_RATE_HZ)
        grid = window if self.grid_seconds is None else round(self.grid_seconds * SAMPLE_RATE_HZ)
        return ((num_samples + grid - 1) // grid * grid).clamp(max=window) // SAMPLES_PER_POSITION

    def heard_seconds(self, durations_seconds: np.ndarray) -> np.ndarray:
        """The same of durations, in seconds; (clips,)."""
        num_samples = torch.from_numpy(np.round(durations_seconds * SAMPLE_RATE_HZ).astype(np.int64))
        return self.num_positions(num_samples).numpy() * SAMPLES_PER_POSITION / SAMPLE_RATE_HZ


class WhisperLogMel(nn.Module):
    """Log-mel spectrogram as Whisper was trained on it.

    Radford et al. 2022, https://arxiv.org/abs/2212.04356, section 2.2. Equal to `WhisperFeatureExtractor`, but batched
    and on the device.

    Args:
        num_mels: 80, or 128 for large-v3 and its descendants.
        window_seconds: to which each clip is padded; below 30 for models of `models.whisper.shorten_window`.
    """

    filters: Tensor
    window: Tensor

    def __init__(self, num_mels: int = 80, window_seconds: float = WINDOW_SAMPLES / SAMPLE_RATE_HZ) -> None:
        super().__init__()
        self.max_samples = round(window_seconds * SAMPLE_RATE_HZ)
        filters = torchaudio.functional.melscale_fbanks(
            FFT_SAMPLES // 2 + 1, 0.0, SAMPLE_RATE_HZ / 2, num_mels, SAMPLE_RATE_HZ, norm="slaney", mel_scale="slaney"
        )
        self.register_buffer("filters", filters.T.contiguous(), persistent=False)
        self.register_buffer("window", torch.hann_window(FFT_SAMPLES), persistent=False)

    @classmethod
    def for_model(cls, config: "WhisperConfig") -> "WhisperLogMel":
        """That of a model, by its `WhisperConfig`."""
        return cls(config.num_mel_bins, config.max_source_positions * SAMPLES_PER_POSITION / SAMPLE_RATE_HZ)

    @torch.no_grad()
    def forward(self, waveforms: Tensor) -> Tensor:
        """Features of a batch of clips.

        Args:
            waveforms: 16 kHz samples, zero-padded to a common length of at most the window, (batch, samples).

        Returns:
            `input_features`, (batch, mels, 100 a second of the window: 3000), float32.

        Raises:
            ValueError: the clips are longer than the window, or there is none.
        """
        num_samples = waveforms.shape[-1]
        if num_samples > self.max_samples:
            raise ValueError(
                f"a clip of {num_samples / SAMPLE_RATE_HZ:.2f} s is longer than the model's window of "
                f"{self.max_samples / SAMPLE_RATE_HZ:g} s; cut it into shorter clips"
            )
        with torch.autocast(waveforms.device.type, enabled=False):
            return clip_by_clip_on_cpu(self._log_mel, waveforms.float())

    def _log_mel(self, waveforms: Tensor) -> Tensor:
        total_frames = self.max_samples // HOP_LENGTH_SAMPLES
        # beyond the third frame after the clip a window sees zeros only
        num_frames = min(waveforms.shape[-1] // HOP_LENGTH_SAMPLES + 3, total_frames)
        waveforms = F.pad(waveforms, (0, num_frames * HOP_LENGTH_SAMPLES - waveforms.shape[-1]))
        spectrum = torch.stft(waveforms, FFT_SAMPLES, HOP_LENGTH_SAMPLES, window=self.window, return_complex=True)
        log_mel = (self.filters @ power(spectrum[..., :-1])).clamp(min=1e-10).log10()
        log_mel = F.pad(log_mel, (0, total_frames - num_frames), value=-10.0)
        loudest = log_mel.amax(dim=(1, 2), keepdim=True)
        return (torch.maximum(log_mel, loudest - 8.0) + 4.0) / 4.0


class KaldiFbank(nn.Module):
    """Log mel filter banks as Kaldi's `compute-fbank-feats` computes them.

    Equal to `torchaudio.compliance.kaldi.fbank` with its defaults: frames of 25 ms every 10 ms that lie wholly inside
    the clip, Povey window, pre-emphasis 0.97, 20 Hz to 8 kHz, no dither. Kaldi itself reads samples in [-32768, 32767];
    for features on its scale multiply the waveforms by 32768. Where a filter's energy is tiny beside its neighbours',
    float32 leaves an error of up to 0.01, in torchaudio's features as in these; devices may differ by that.

    Args:
        num_mels: number of filters, 4 or more.

    Raises:
        ValueError: there are fewer filters.
    """

    filters: Tensor
    window: Tensor

    def __init__(self, num_mels: int = 80) -> None:
        super().__init__()
        if num_mels < 4:
            raise ValueError(f"num_mels={num_mels} is too few for Kaldi's filter banks; ask for 4 or more, 80 is usual")
        banks, _ = get_mel_banks(num_mels, KALDI_FFT_SAMPLES, SAMPLE_RATE_HZ, KALDI_LOWEST_HZ, 0.0, 100.0, -500.0, 1.0)
        # Kaldi leaves the Nyquist bin out
        self.register_buffer("filters", F.pad(banks, (0, 1)).T.contiguous(), persistent=False)
        window = torch.hann_window(KALDI_FRAME_SAMPLES, periodic=False).pow(0.85)
        self.register_buffer("window", window, persistent=False)

    @torch.no_grad()
    def forward(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        """Features of a batch of clips.

        Args:
            waveforms: 16 kHz samples, padded to a common length, (batch, samples).
            num_samples: length of each clip, (batch,), int64; see `padding_mask`.

        Returns:
            `input_features`, (batch, frames, mels), float32, 0 after the end of a clip, and the number of frames of
            each clip, (batch,), int64, where `num_samples` is. A clip under 25 ms has no frame.

        Raises:
            ValueError: a length does not fit the waveforms, or there is no clip.
        """
        waveforms = waveforms.float().masked_fill(~padding_mask(num_samples, waveforms), 0.0)
        waveforms = F.pad(waveforms, (0, max(0, KALDI_FRAME_SAMPLES - waveforms.shape[-1])))
        num_frames = kaldi_num_frames(num_samples)
        with torch.autocast(waveforms.device.type, enabled=False):
            log_mel = clip_by_clip_on_cpu(self._log_mel, waveforms)
        frames_mask = padding_mask(num_frames, log_mel[..., 0])
        return log_mel.masked_fill(~frames_mask.unsqueeze(-1), 0.0), num_frames

    def _log_mel(self, waveforms: Tensor) -> Tensor:
        frames = waveforms.unfold(-1, KALDI_FRAME_SAMPLES, HOP_LENGTH_SAMPLES)
        frames = frames - frames.mean(dim=-1, keepdim=True)
        # the first sample has no predecessor in its frame, but the window is 0 there
        frames = (frames - KALDI_PREEMPHASIS * frames.roll(1, dims=-1)) * self.window
        energies = power(torch.fft.rfft(frames, n=KALDI_FFT_SAMPLES)) @ self.filters
        return energies.clamp(min=torch.finfo(torch.float32).eps).log()


def kaldi_num_frames(num_samples: Tensor) -> Tensor:
    """Frames that `KaldiFbank` makes of clips with these lengths, same shape."""
    return (1 + (num_samples - KALDI_FRAME_SAMPLES).div(HOP_LENGTH_SAMPLES, rounding_mode="floor")).clamp(min=0)


@torch.no_grad()
def normalize_waveforms(waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
    """Zero mean and unit variance of each clip, as wav2vec 2.0, HuBERT and WavLM with `do_normalize` expect.

    Equal to `Wav2Vec2FeatureExtractor`, but batched and on the device. Models with `feat_extract_norm="group"` were
    trained without a mask: give them `input_values` alone.

    Args:
        waveforms: samples, padded to a common length, (batch, samples).
        num_samples: length of each clip, (batch,), int64; see `padding_mask`.

    Returns:
        `input_values`, (batch, samples), float32, exactly 0 on padding, and `attention_mask`, True on real samples,
        same shape, bool.

    Raises:
        ValueError: a length does not fit the waveforms.
    """
    mask = padding_mask(num_samples, waveforms)
    padding, count = ~mask, mask.sum(dim=-1, keepdim=True).clamp(min=1)
    with torch.autocast(waveforms.device.type, enabled=False):
        values = waveforms.float().masked_fill(padding, 0.0)
        values.sub_(values.sum(dim=-1, keepdim=True) / count).masked_fill_(padding, 0.0)
        variance = values.square().sum(dim=-1, keepdim=True) / count
        return values.div_((variance + 1e-7).sqrt()), mask


def padding_mask(lengths: Tensor, padded: Tensor) -> Tensor:
    """True on the real part of each row.

    Args:
        lengths: length of each row, (batch,), int64. Keep it on the CPU: its range is checked, and for lengths on a GPU
            the check waits for all that runs there.
        padded: what the mask is for, (batch, width).

    Returns:
        Mask on the device of `padded`, (batch, width), bool.

    Raises:
        ValueError: there is not one length per row, or a length is negative or above the width.
    """
    batch_size, width = padded.shape
    if lengths.shape != (batch_size,):
        raise ValueError(f"lengths of shape {tuple(lengths.shape)} for {batch_size} rows; give one length per row")
    outside = lengths[(lengths < 0) | (lengths > width)].tolist()
    if outside:
        raise ValueError(f"length {outside[0]} does not fit rows padded to {width}; pass lengths without padding")
    return torch.arange(width, device=padded.device) < lengths.to(padded.device, non_blocking=True).unsqueeze(1)


def power(spectrum: Tensor) -> Tensor:
    """Squared magnitude of complex numbers, same shape; several times as fast on a CPU as `abs().square()`."""
    return spectrum.real.square() + spectrum.imag.square()


def clip_by_clip_on_cpu(compute: Callable[[Tensor], Tensor], waveforms: Tensor) -> Tensor:
    """`compute` on a batch, (batch, samples); on a CPU on one row at a time, whose intermediate values fit its caches.

    Raises:
        ValueError: the batch is empty.
    """
    if len(waveforms) == 0:
        raise ValueError("a batch of 0 clips has no features; leave out batches in which every clip was skipped")
    if waveforms.device.type != "cpu":
        return compute(waveforms)
    return torch.cat([compute(row) for row in waveforms.split(1)])
