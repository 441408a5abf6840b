"""Whisper's log-mel features, computed in float32 on whatever device holds the waveforms."""

import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn

SAMPLE_RATE_HZ = 16_000
WINDOW_SAMPLES = 30 * SAMPLE_RATE_HZ
FFT_SAMPLES = 400
HOP_LENGTH_SAMPLES = 160


class WhisperLogMel(nn.Module):
    """Log-mel spectrogram as Whisper was trained on it.

    Radford et al. 2022, https://arxiv.org/abs/2212.04356, section 2.2. Equal to `WhisperFeatureExtractor`, but batched
    and on the device.

    Args:
        num_mels: 80, or 128 for large-v3 and its descendants.
    """

    filters: Tensor
    window: Tensor

    def __init__(self, num_mels: int = 80) -> None:
        super().__init__()
        filters = torchaudio.functional.melscale_fbanks(
            FFT_SAMPLES // 2 + 1, 0.0, SAMPLE_RATE_HZ / 2, num_mels, SAMPLE_RATE_HZ, norm="slaney", mel_scale="slaney"
        )
        self.register_buffer("filters", filters.T.contiguous(), persistent=False)
        self.register_buffer("window", torch.hann_window(FFT_SAMPLES), persistent=False)

    @torch.no_grad()
    def forward(self, waveforms: Tensor) -> Tensor:
        """Features of a batch of clips.

        Args:
            waveforms: 16 kHz samples, zero-padded to a common length of at most 30 s, (batch, samples).

        Returns:
            `input_features`, (batch, mels, 3000), float32.

        Raises:
            ValueError: the clips are longer than 30 s.
        """
        num_samples = waveforms.shape[-1]
        if num_samples > WINDOW_SAMPLES:
            raise ValueError(
                f"a clip of {num_samples / SAMPLE_RATE_HZ:.2f} s is longer than Whisper's window of 30 s; "
                "cut it into shorter clips"
            )
        waveforms = F.pad(waveforms.float(), (0, WINDOW_SAMPLES - num_samples))
        with torch.autocast(waveforms.device.type, enabled=False):
            spectrum = torch.stft(waveforms, FFT_SAMPLES, HOP_LENGTH_SAMPLES, window=self.window, return_complex=True)[
                ..., :-1
            ]
            log_mel = (self.filters @ spectrum.abs().square()).clamp(min=1e-10).log10()
        loudest = log_mel.amax(dim=(1, 2), keepdim=True)
        return (torch.maximum(log_mel, loudest - 8.0) + 4.0) / 4.0
