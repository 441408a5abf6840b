"""Loading speech encoders, with or without the rest of the model that they come from."""

from typing import Any

import torch
from transformers import AutoFeatureExtractor, AutoModel, PreTrainedModel

from speechkd.models.whisper import shorten_encoder
from speechkd.teachers import resolve_model


def load_encoder(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    window_seconds: int | None = None,
    revision: str | None = None,
) -> tuple[PreTrainedModel, bool]:
    """A speech encoder in eval mode, on the CPU.

    Args:
        name: Hub id, folder or `bundled:<name>` of a HuBERT, wav2vec 2.0, WavLM, data2vec-audio, w2v-BERT or Whisper,
            with or without a head, which is dropped; of a Whisper only the encoder is taken.
        dtype: of its weights.
        window_seconds: of a Whisper, the longest clip that it is to hear; None is its own window.
        revision: branch, tag or commit of a Hub id.

    Returns:
        The encoder, and whether it expects waveforms of mean 0 and variance 1.

    Raises:
        ValueError: it cannot be found or loaded, lacks weights, or has no such window.
    """
    resolved, at = resolve_model(name), revision or "main"
    try:
        loaded: Any = AutoModel.from_pretrained(resolved, revision=at, dtype=dtype, output_loading_info=True)
        extractor = AutoFeatureExtractor.from_pretrained(resolved, revision=at)
    except (OSError, ValueError) as error:
        raise ValueError(f"speech encoder {name!r} cannot be loaded: {error}; give a folder or a Hub id") from error
    model, info = loaded
    is_whisper = model.config.model_type == "whisper"
    # checkpoints with a head often lack the vector that SpecAugment writes
    missing = sorted(
        key for key in info["missing_keys"] if key != "masked_spec_embed" and not key.startswith("decoder.")
    )
    if missing:
        raise ValueError(
            f"speech encoder {name!r} has no weights for {len(missing)} parameters, first {', '.join(missing[:3])}; "
            "save it again with save_pretrained"
        )
    encoder = model.encoder if is_whisper else model
    if window_seconds is not None:
        if not is_whisper:
            raise ValueError(
                f"window_seconds={window_seconds} is for a Whisper; {name!r} is a {model.config.model_type}, which "
                "hears each clip as it is"
            )
        shorten_encoder(encoder, window_seconds)
    return encoder.eval(), bool(getattr(extractor, "do_normalize", False))
