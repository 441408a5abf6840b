"""The model of a run's first stage: a vision tower and a decoder, pretrained or new, with a new projector."""

from dataclasses import dataclass
from typing import Any

from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)

from speechkd.data.conversations import IMAGE_PLACEHOLDER
from speechkd.models import open_clip_tower
from speechkd.models.llava import build_llava, image_processor, load_vision_tower, make_processor
from speechkd.teachers import resolve_model


@dataclass(kw_only=True)
class TowerConfig:
    """A vision tower: a pretrained one, or a new ViT of these sizes.

    Args:
        name: CLIP or SigLIP, Hub id or folder, or `open_clip:MODEL:WEIGHTS` for one of open_clip's ViTs; null makes a
            new one, for which the rest holds.
        hidden_size: its width.
        num_layers: its depth.
        num_heads: of its attention.
        intermediate_size: of its feed-forward blocks.
        image_size: side of its pictures.
        patch_size: side of what becomes one visual token.
        mean: of colours from 0 to 1, which is subtracted.
        std: by which the rest is divided.
    """

    name: str | None = None
    hidden_size: int = 16
    num_layers: int = 1
    num_heads: int = 2
    intermediate_size: int = 32
    image_size: int = 36
    patch_size: int = 12
    mean: float = 0.5
    std: float = 64 / 255

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is no multiple of patch_size={self.patch_size}; choose another of them"
            )


@dataclass(kw_only=True)
class DecoderConfig:
    """A decoder: a pretrained one, or a new Llama of these sizes.

    Args:
        name: causal language model, Hub id, folder or `bundled:<name>`; null makes a new one, for which the rest holds.
        hidden_size: its width, and the projector's.
        num_layers: its depth.
        num_heads: of its attention.
        intermediate_size: of its feed-forward blocks.
    """

    name: str | None = None
    hidden_size: int = 24
    num_layers: int = 2
    num_heads: int = 2
    intermediate_size: int = 48


@dataclass(kw_only=True)
class StudentConfig:
    """The model that the first stage starts from.

    Args:
        tower: what sees.
        decoder: what answers.
        tokenizer: Hub id or folder: the teacher's, where there is one.
        feature_layer: layer of the tower that the projector takes; -1 is the last, -2 as in LLaVA the one before.
    """

    tokenizer: str
    tower: TowerConfig
    decoder: DecoderConfig
    feature_layer: int = -2


def new_student(config: StudentConfig) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model before any training; new parts depend on torch's seed.

    Raises:
        ValueError: a name is not found, or the tokenizer has more tokens than a pretrained decoder knows and `<image>`.
    """
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(config.tokenizer))
    if IMAGE_PLACEHOLDER not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_PLACEHOLDER], special_tokens=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tower, strategy, pictures = _tower(config.tower)
    model = build_llava(
        tower,
        _decoder(config.decoder, tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER),
        feature_layer=config.feature_layer,
        strategy=strategy,
    )
    return model, make_processor(model, tokenizer, pictures)


def _tower(config: TowerConfig) -> tuple[PreTrainedModel, Any, Any]:
    """Tower, which of its tokens to take, and its image processor."""
    if config.name is not None and config.name.startswith(open_clip_tower.PREFIX):
        tower, pictures = open_clip_tower.load_open_clip_tower(config.name)
        return tower, "default", pictures
    if config.name is not None:
        pictures = AutoImageProcessor.from_pretrained(resolve_model(config.name))
        return *load_vision_tower(config.name), pictures
    sizes = CLIPVisionConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_act="gelu",
    )
    pictures = image_processor(config.image_size, mean=[config.mean] * 3, std=[config.std] * 3)
    return CLIPVisionModel(sizes), "default", pictures


def _decoder(config: DecoderConfig, tokenizer: Any) -> PreTrainedModel:
    if config.name is None:
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_heads,
                max_position_embeddings=2048,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    decoder = AutoModelForCausalLM.from_pretrained(resolve_model(config.name))
    if len(tokenizer) > decoder.get_input_embeddings().weight.shape[0]:
        decoder.resize_token_embeddings(len(tokenizer))
    return decoder
