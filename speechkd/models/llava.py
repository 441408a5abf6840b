"""Multimodal models in LLaVA's shape: a vision tower, a projector of two layers, a decoder that reads its output.

All are transformers' own `LlavaForConditionalGeneration`, so that a student needs nothing of this package. LLaVA-1.5,
Liu et al. 2023, https://arxiv.org/abs/2310.03744; LLaVA-KD, Cai et al. 2024, https://arxiv.org/abs/2410.16236.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from speechkd.data.conversations import IMAGE_PLACEHOLDER
from speechkd.teachers import resolve_model

Part = Literal["vision", "projector", "decoder"]
Strategy = Literal["default", "full"]
PARTS: tuple[Part, ...] = ("vision", "projector", "decoder")
TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "siglip2": "siglip2_vision_model"}


def load_vision_tower(name: str) -> tuple[PreTrainedModel, Strategy]:
    """The picture half of a CLIP or SigLIP model, and which of its tokens to take.

    Args:
        name: Hub id or local folder of the whole model, or of the half alone.

    Returns:
        The tower, and "default", without the class token, or "full" where it has none.

    Raises:
        ValueError: not found, or another kind of model.
    """
    resolved = resolve_model(name)
    try:
        kind = AutoConfig.from_pretrained(resolved).model_type
        if kind not in TOWERS and kind not in TOWERS.values():
            raise ValueError(f"model {name!r} is of type {kind!r}; a vision tower is one of {', '.join(TOWERS)}")
        config = AutoConfig.from_pretrained(resolved)
        tower = AutoModel.from_pretrained(resolved, config=getattr(config, "vision_config", config))
    except OSError as error:
        raise ValueError(f"vision tower {name!r} cannot be loaded ({error}); give a Hub id or a folder") from error
    return tower, "default" if tower.config.model_type == TOWERS["clip"] else "full"


def build_llava(
    tower: PreTrainedModel,
    decoder: PreTrainedModel,
    *,
    image_token_id: int,
    feature_layer: int = -2,
    strategy: Strategy = "default",
) -> LlavaForConditionalGeneration:
    """A model of these parts, whose projector is new: Linear, GELU, Linear, as wide as the decoder.

    Args:
        tower: CLIP's or SigLIP's picture half, or one with its interface.
        decoder: causal language model with a head without bias; its embeddings have a row for `image_token_id`.
        image_token_id: token that stands for one visual token.
        feature_layer: layer of the tower, -1 the last one, -2 as in LLaVA the one before.
        strategy: "default" leaves the first token out, a class token; "full" takes all.

    Raises:
        ValueError: the decoder's head has a bias, or there is no embedding for the token.
    """
    head = cast(nn.Linear, decoder.get_output_embeddings())
    if getattr(head, "bias", None) is not None:
        raise ValueError(f"decoder {decoder.config.model_type!r} has a head with a bias; LLaVA's heads have none")
    if not 0 <= image_token_id < head.weight.shape[0]:
        raise ValueError(
            f"image_token_id={image_token_id} has no embedding, the decoder has {head.weight.shape[0]}; call "
            "decoder.resize_token_embeddings first"
        )
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=decoder.config,
        image_token_index=image_token_id,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=bool(decoder.config.tie_word_embeddings),
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.language_model = decoder.base_model
    model.lm_head = head
    config.image_seq_length = num_visual_tokens(model)
    return model


def load_llava(
    name: str, *, dtype: str | torch.dtype = torch.float32
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA with its processor, in eval mode: a teacher, or a student of an earlier stage.

    Args:
        name: Hub id or local folder.
        dtype: of its weights.

    Raises:
        ValueError: not found, no LLaVA, or a checkpoint that lacks weights.
    """
    resolved = resolve_model(name)
    try:
        config = AutoConfig.from_pretrained(resolved)
        if config.model_type != "llava":
            raise ValueError(
                f"model {name!r} is of type {config.model_type!r}, but this needs 'llava', whose pictures all have the "
                "same number of visual tokens"
            )
        loaded: Any = LlavaForConditionalGeneration.from_pretrained(
            resolved, config=config, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
        processor = AutoProcessor.from_pretrained(resolved)
    except OSError as error:
        raise ValueError(
            f"model {name!r} cannot be loaded ({error}); give the Hub id of a LLaVA, or a folder with config.json, "
            "weights and the processor's files"
        ) from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):  # from_pretrained fills these with random numbers and only warns
        raise ValueError(
            f"model {name!r} has no weights for {len(missing)} parameters, first {', '.join(missing[:3])}; "
            "save it again with save_pretrained"
        )
    return model.eval(), processor


def image_processor(pixels: int, *, mean: list[float], std: list[float]) -> CLIPImageProcessorPil:
    """Pictures as squares of this side, with values (x / 255 - mean) / std per colour."""
    side = {"height": pixels, "width": pixels}
    return CLIPImageProcessorPil(size=side, do_center_crop=False, image_mean=mean, image_std=std)


def make_processor(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, pictures: Any
) -> LlavaProcessor:
    """The processor that stock tools use with a model; it writes a picture's `<image>` once for each visual token.

    Args:
        model: a LLaVA.
        tokenizer: of its decoder, which knows `<image>` as one token.
        pictures: image processor of its tower.

    Raises:
        ValueError: `<image>` is not the model's image token.
    """
    token = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    if token != model.config.image_token_id:
        raise ValueError(
            f"the tokenizer's {IMAGE_PLACEHOLDER} is token {token}, the model's image token is "
            f"{model.config.image_token_id}; add it to the tokenizer, and build the model with its id"
        )
    tower: Any = model.config.vision_config
    strategy = model.config.vision_feature_select_strategy
    patches = (tower.image_size // tower.patch_size) ** 2
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=tower.patch_size,
        vision_feature_select_strategy=strategy,
        image_token=IMAGE_PLACEHOLDER,
        # a tower without a class token has none to drop
        num_additional_image_tokens=num_visual_tokens(model) - patches + (strategy == "default"),
    )


def save_llava(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: str | Path) -> None:
    """Write a folder that `LlavaForConditionalGeneration` and `AutoProcessor` load."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def image_pixels(model: LlavaForConditionalGeneration) -> int:
    """Side of the pictures that a model takes."""
    tower: Any = model.config.vision_config
    return int(tower.image_size)


@torch.no_grad()
def num_visual_tokens(model: LlavaForConditionalGeneration) -> int:
    """Visual tokens of one picture, counted on an empty one."""
    weight = next(model.model.vision_tower.parameters())
    side = image_pixels(model)
    empty = torch.zeros(1, 3, side, side, dtype=weight.dtype, device=weight.device)
    return visual_tokens(model, empty).shape[1]


def visual_tokens(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """The projector's output, (images, tokens, width), for (images, 3, side, side)."""
    return torch.stack(list(model.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output))


def check_pair(student: LlavaForConditionalGeneration, teacher: LlavaForConditionalGeneration) -> None:
    """Refuse a pair whose logits cannot be compared position by position.

    Raises:
        ValueError: vocabularies, numbers of visual tokens or image tokens differ; names both.
    """
    sizes = [model.lm_head.weight.shape[0] for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the student has {sizes[0]} tokens and the teacher {sizes[1]}, so their logits cannot be compared; take "
            "decoders of one family with one tokenizer"
        )
    numbers = [num_visual_tokens(model) for model in (student, teacher)]
    if numbers[0] != numbers[1]:
        raise ValueError(
            f"the student has {numbers[0]} visual tokens for a picture and the teacher {numbers[1]}, so they have no "
            "positions in common; take the same vision tower, or one with the same picture and patch size"
        )
    tokens = [model.config.image_token_id for model in (student, teacher)]
    if tokens[0] != tokens[1]:
        raise ValueError(
            f"the student's image token is {tokens[0]} and the teacher's {tokens[1]}; build the student with the "
            "teacher's"
        )


def train_only(model: LlavaForConditionalGeneration, parts: Sequence[Part]) -> None:
    """Let these parts learn and freeze the others; the head belongs to the decoder.

    Raises:
        ValueError: no part, or an unknown one.
    """
    if not parts or set(parts) - set(PARTS):
        raise ValueError(f"parts to train must be some of {', '.join(PARTS)}, got {list(parts)}")
    model.requires_grad_(False)
    for part in parts:
        modules = {
            "vision": [model.model.vision_tower],
            "projector": [model.model.multi_modal_projector],
            "decoder": [model.model.language_model, model.lm_head],
        }[part]
        for module in modules:
            module.requires_grad_(True)


class DecoderStates(NamedTuple):
    """What a decoder made of a batch.

    Args:
        last: its last states, (batch, tokens, width), which `lm_head` turns into logits.
        projected: the projector's output, (images, visual tokens, width); None without a picture.
    """

    last: Tensor
    projected: Tensor | None


def decoder_states(model: LlavaForConditionalGeneration, batch: dict[str, Any]) -> DecoderStates:
    """Run a model without its head.

    Args:
        model: a LLaVA.
        batch: of `visual_sequences.collate`.
    """
    outputs = model.model(
        input_ids=batch["input_ids"],
        pixel_values=batch.get("pixel_values"),
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        use_cache=False,
        return_dict=True,
    )
    pictures = outputs.image_outputs
    return DecoderStates(
        outputs.last_hidden_state, None if pictures is None else torch.stack(list(pictures.pooler_output))
    )
