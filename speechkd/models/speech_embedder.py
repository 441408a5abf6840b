"""Loading SEGUE students, and speech as vectors that text can be searched with."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchaudio.functional import resample

from speechkd.data.features import SAMPLE_RATE_HZ
from speechkd.models.segue import POOLING_FILE, PROJECTION_FILE, SegueEncoder
from speechkd.models.speech_encoders import load_encoder
from speechkd.teachers import resolve_model


def load_segue(
    name: str,
    *,
    embedding_dim: int | None = None,
    num_layers: int | None = None,
    num_frozen_layers: int = 0,
    grid_seconds: float | None = None,
    revision: str | None = None,
) -> SegueEncoder:
    """A student from a speech encoder, or one that `SegueEncoder.save_encoder` saved, in float32 and eval mode.

    Args:
        name: Hub id, folder or `bundled:<name>` of a wav2vec 2.0, HuBERT, WavLM, data2vec-audio or Whisper, with or
            without a head, which is dropped.
        embedding_dim: the teacher's width; None is that of the encoder, or of the saved student.
        num_layers: keep only this many of the first layers; None keeps all.
        num_frozen_layers: see `SegueEncoder`.
        grid_seconds: see `SegueEncoder`; None takes what a saved student was trained with.
        revision: branch, tag or commit of a Hub id.

    Raises:
        ValueError: it cannot be found or loaded, lacks weights, or an argument does not fit it.
    """
    resolved = resolve_model(name)
    note = _read_note(resolved)
    loaded, normalize_input = load_encoder(name, revision=revision)
    encoder: Any = loaded
    if num_layers is not None:
        _keep_first_layers(getattr(encoder, "encoder", encoder), num_layers)
    student = SegueEncoder(
        encoder,
        embedding_dim=embedding_dim if embedding_dim is not None else note.get("embedding_dim"),
        num_frozen_layers=num_frozen_layers,
        normalize_input=note.get("normalize_input", normalize_input),
        grid_seconds=grid_seconds if grid_seconds is not None else note.get("grid_seconds"),
    )
    projection = Path(resolved) / PROJECTION_FILE
    if student.projection is not None and projection.is_file() and student.embedding_dim == note.get("embedding_dim"):
        student.projection.load_state_dict(load_file(projection))
    return student.eval()


class SpeechEmbedder:
    """Speech as vectors in the space of a sentence encoder, with the interface of sentence-transformers.

    Args:
        student: as saved or trained; its mode is set to eval.
    """

    def __init__(self, student: SegueEncoder) -> None:
        self.student = student.eval()

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: torch.device | str = "cpu") -> "SpeechEmbedder":
        """Load what `SegueEncoder.save_encoder` wrote.

        Raises:
            ValueError: the folder has no pooling note, or cannot be loaded.
        """
        if not (Path(folder) / POOLING_FILE).is_file():
            raise ValueError(f"{folder} has no {POOLING_FILE}; give a folder that SegueEncoder.save_encoder wrote")
        student: Any = load_segue(str(folder))
        return cls(student.to(device))

    @torch.no_grad()
    def encode(
        self, waveforms: Sequence[np.ndarray | Tensor], sample_rate_hz: int = SAMPLE_RATE_HZ, batch_size: int = 8
    ) -> np.ndarray:
        """Embeddings of clips; they do not depend on how the clips are put together.

        Args:
            waveforms: each (samples,), floats in [-1, 1].
            sample_rate_hz: of all; others than 16 kHz are resampled.
            batch_size: clips that run together; encoders that hear padding get clips of one length together.

        Returns:
            (clips, embedding_dim), float32.

        Raises:
            ValueError: a clip is not one channel of finite floats, is too short for one frame, or too long for Whisper.
        """
        clips = [_as_clip(waveform, index, sample_rate_hz) for index, waveform in enumerate(waveforms)]
        result = np.zeros((len(clips), self.student.embedding_dim), dtype=np.float32)
        for batch in _batches([len(clip) for clip in clips], batch_size, _padding_is_exact(self.student.config)):
            padded = pad_sequence([clips[index] for index in batch], batch_first=True).to(self.student.device)
            num_samples = torch.tensor([len(clips[index]) for index in batch])
            result[batch] = self.student(padded, num_samples).cpu().numpy()
        return result


def _keep_first_layers(stack: Any, num_layers: int) -> None:
    if not 1 <= num_layers <= len(stack.layers):
        raise ValueError(f"num_layers={num_layers} of an encoder of {len(stack.layers)}; choose 1 to that")
    stack.layers = stack.layers[:num_layers]
    stack.config.num_hidden_layers = num_layers


def _read_note(resolved: str) -> dict[str, Any]:
    path = Path(resolved) / POOLING_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _padding_is_exact(config: Any) -> bool:
    """Whether padding, with its mask, leaves the states of valid frames as they are."""
    if config.model_type == "whisper":
        return True
    # a group norm sees the whole row; data2vec has several convolutions over positions, a batch norm lifts zeros
    layer_norm = getattr(config, "feat_extract_norm", None) == "layer"
    return layer_norm and not getattr(config, "conv_pos_batch_norm", False)


def _batches(lengths: Sequence[int], batch_size: int, may_pad: bool) -> list[list[int]]:
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        fits = batches and len(batches[-1]) < batch_size
        if fits and (may_pad or lengths[batches[-1][0]] == lengths[index]):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _as_clip(waveform: np.ndarray | Tensor, index: int, sample_rate_hz: int) -> Tensor:
    clip = torch.as_tensor(waveform)
    if clip.ndim != 1 or not clip.is_floating_point():
        raise ValueError(
            f"clip {index} is {tuple(clip.shape)} {clip.dtype}; give one channel, (samples,), of floats in [-1, 1]"
        )
    if not clip.isfinite().all():
        raise ValueError(f"clip {index} holds NaN or infinite samples; leave it out, or decode it again")
    clip = clip.float()
    return clip if sample_rate_hz == SAMPLE_RATE_HZ else resample(clip, sample_rate_hz, SAMPLE_RATE_HZ)
