"""Encoders of speech and of text into one space, by which `speech_text_cosine` judges labels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoModel

from speechkd.data.features import SAMPLE_RATE_HZ
from speechkd.teachers import resolve_model, teacher_identity


def load_speech_encoder(
    name: str, device: torch.device | str = "cpu"
) -> tuple[Callable[[list[Tensor]], Tensor], dict[str, Any]]:
    """An encoder of waveforms whose mean over frames lies in a text encoder's space.

    That is what SEGUE trains, Tan et al. 2023, https://arxiv.org/abs/2305.12301: a wav2vec 2.0 whose mean is the
    sentence embedding of the transcript. An encoder that was not trained so gives cosines without meaning.

    Args:
        name: Hub id or folder of a wav2vec 2.0, HuBERT or WavLM with its feature extractor.
        device: where it runs.

    Returns:
        A function from 16 kHz waveforms, each (samples,), to (batch, dim), float32; and the model's identity.

    Raises:
        ValueError: it cannot be loaded, or takes something else than 16 kHz waveforms.
    """
    folder = resolve_model(name)
    try:
        model = AutoModel.from_pretrained(folder).to(device).eval()
        extractor = AutoFeatureExtractor.from_pretrained(folder)
    except OSError as error:
        raise ValueError(f"speech encoder {name!r} cannot be loaded: {error}; give a folder or a Hub id") from error
    rate_hz = getattr(extractor, "sampling_rate", None)
    if model.main_input_name != "input_values" or rate_hz != SAMPLE_RATE_HZ:
        raise ValueError(
            f"speech encoder {name!r} takes {model.main_input_name} at {rate_hz} Hz; give one that takes input_values, "
            f"a waveform at {SAMPLE_RATE_HZ} Hz, such as a SEGUE student"
        )

    @torch.no_grad()
    def encode(waveforms: list[Tensor]) -> Tensor:
        means = []
        for waveform in waveforms:  # one at a time: padding changes what an encoder with group norm hears
            inputs = extractor(waveform.cpu().numpy(), sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt")
            means.append(model(inputs.input_values.to(device)).last_hidden_state[0].float().mean(dim=0))
        return torch.stack(means)

    return encode, teacher_identity(name, model)


def load_text_encoder(
    name: str, device: torch.device | str = "cpu"
) -> tuple[Callable[[list[str]], Tensor], dict[str, Any]]:
    """A sentence encoder of the sentence-transformers library.

    Args:
        name: Hub id, folder or `bundled:minilm-l6`.
        device: where it runs.

    Returns:
        A function from texts to (batch, dim), float32; and the model's identity.

    Raises:
        ValueError: it cannot be loaded, or the library is not installed.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ValueError('text encoders need sentence-transformers: pip install "speechkd[bundled]"') from error
    try:
        model: Any = SentenceTransformer(resolve_model(name), device=str(device))
    except OSError as error:
        raise ValueError(f"text encoder {name!r} cannot be loaded: {error}; give a folder or a Hub id") from error

    def encode(texts: list[str]) -> Tensor:
        return model.encode(texts, convert_to_tensor=True, show_progress_bar=False).float()

    return encode, teacher_identity(name, model[0].auto_model)
