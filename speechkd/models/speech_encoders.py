"""Loading speech encoders out of the models that they come from, and saving them as stock transformers loads them."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    PreTrainedModel,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
    WhisperModel,
)

from speechkd.data.features import SAMPLE_RATE_HZ, SAMPLES_PER_POSITION
from speechkd.models.pruned_encoder import PrunedEncoderModel
from speechkd.models.whisper import shorten_encoder
from speechkd.teachers import resolve_model

FBANK_MELS = 80  # of w2v-BERT, which hears several frames side by side


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
            with or without a head, which is dropped; of a Whisper only the encoder is taken. Of a `PrunedEncoderModel`
            it is the stock class with narrower maps inside, which that model alone can save.
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
    is_pruned = isinstance(model, PrunedEncoderModel)
    kind = model.encoder.config.model_type if is_pruned else model.config.model_type
    is_whisper = kind == "whisper"
    # checkpoints with a head often lack the vector that SpecAugment writes
    missing = sorted(
        key for key in info["missing_keys"] if key != "masked_spec_embed" and not key.startswith("decoder.")
    )
    if missing:
        raise ValueError(
            f"speech encoder {name!r} has no weights for {len(missing)} parameters, first {', '.join(missing[:3])}; "
            "save it again with save_pretrained"
        )
    encoder = model.encoder if is_whisper or is_pruned else model
    if window_seconds is not None:
        if not is_whisper:
            raise ValueError(
                f"window_seconds={window_seconds} is for a Whisper; {name!r} is a {kind}, which "
                "hears each clip as it is"
            )
        shorten_encoder(encoder, window_seconds)
    return encoder.eval(), bool(getattr(extractor, "do_normalize", False))


def save_encoder(encoder: PreTrainedModel, folder: str | Path, *, normalize_input: bool) -> None:
    """Save what stock transformers loads: `AutoModel` gives the encoder, `AutoFeatureExtractor` makes its input.

    Of a Whisper it is a WhisperModel whose decoder has no layers and one token; the encoder is its `encoder`.

    Args:
        encoder: as `load_encoder` gives it, trained or not.
        folder: created where it is missing.
        normalize_input: see `load_encoder`.

    Raises:
        ValueError: it is the inside of a `PrunedEncoderModel`, whose widths no stock configuration describes.
    """
    _check_widths(encoder)
    config: Any = encoder.config
    model: Any = encoder
    if config.model_type == "whisper":
        model = WhisperModel(_without_decoder(config))
        model.encoder = encoder
    model.save_pretrained(folder)
    feature_extractor(config, normalize_input=normalize_input).save_pretrained(folder)


def feature_extractor(config: Any, *, normalize_input: bool) -> Any:
    """The stock feature extractor of an encoder with this configuration; see `load_encoder` for `normalize_input`."""
    if config.model_type == "whisper":
        seconds = config.max_source_positions * SAMPLES_PER_POSITION // SAMPLE_RATE_HZ
        return WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=seconds)
    if config.model_type == "wav2vec2-bert":
        return SeamlessM4TFeatureExtractor(stride=config.feature_projection_input_dim // FBANK_MELS)
    return Wav2Vec2FeatureExtractor(do_normalize=normalize_input)


def _check_widths(encoder: PreTrainedModel) -> None:
    with torch.device("meta"):
        stock = type(encoder)(encoder.config).state_dict()
    for name, weight in encoder.state_dict().items():
        if name in stock and stock[name].shape != weight.shape:
            raise ValueError(
                f"{name} is {tuple(weight.shape)}, but {type(encoder).__name__} with this configuration has "
                f"{tuple(stock[name].shape)}: the encoder is pruned; save the PrunedEncoderModel that it is part of"
            )


def _without_decoder(config: Any) -> Any:
    """Configuration of a Whisper whose decoder takes no room."""
    config = copy.deepcopy(config)
    config.decoder_layers, config.vocab_size, config.max_target_positions = 0, 1, 1
    config.pad_token_id = config.bos_token_id = config.eos_token_id = config.decoder_start_token_id = 0
    config.suppress_tokens = config.begin_suppress_tokens = None
    return config
