"""Vision transformers of open_clip as stock `CLIPVisionModel`s, so that a student needs no open_clip."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from speechkd.models.llava import image_processor

PREFIX = "open_clip:"


def load_open_clip_tower(name: str) -> tuple[CLIPVisionModel, CLIPImageProcessorPil]:
    """The picture half of an open_clip model, with the preparation of its pictures.

    Args:
        name: `open_clip:MODEL` or `open_clip:MODEL:WEIGHTS`, as open_clip names them; weights are a tag or a file.

    Raises:
        ImportError: open_clip is not installed.
        ValueError: open_clip does not know the model, or a `CLIPVisionModel` cannot be it.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(f'{name} needs open_clip; pip install "speechkd[open_clip]"') from error
    model_name, _, weights = name.removeprefix(PREFIX).partition(":")
    try:
        visual: Any = open_clip.create_model(model_name, pretrained=weights or None).visual
    except RuntimeError as error:
        raise ValueError(f"{name}: open_clip cannot make it ({error}); see open_clip.list_pretrained()") from error
    tower = clip_vision_model(visual, name)
    side: Any = tower.config.image_size
    return tower, image_processor(side, mean=list(visual.image_mean), std=list(visual.image_std))


def clip_vision_model(visual: Any, name: str = "open_clip model") -> CLIPVisionModel:
    """A `CLIPVisionModel` with the weights of an open_clip `VisionTransformer`; its projection is left out.

    Args:
        visual: `visual` of an open_clip model.
        name: for messages.

    Raises:
        ValueError: it is another kind of tower, or has parts that `CLIPVisionModel` lacks.
    """
    if type(visual).__name__ != "VisionTransformer" or getattr(visual, "attn_pool", None) is not None:
        raise ValueError(
            f"{name} has a tower of type {type(visual).__name__}, or one with attention pooling, which CLIPVisionModel "
            "cannot be; take one of its ViT-* models, or a SigLIP of the Hub"
        )
    blocks = visual.transformer.resblocks
    activation = blocks[0].mlp.gelu
    config = CLIPVisionConfig(
        hidden_size=visual.conv1.out_channels,
        intermediate_size=blocks[0].mlp.c_fc.out_features,
        num_hidden_layers=len(blocks),
        num_attention_heads=blocks[0].attn.num_heads,
        image_size=visual.image_size[0],
        patch_size=visual.patch_size[0],
        hidden_act="gelu" if isinstance(activation, nn.GELU) else "quick_gelu",
        layer_norm_eps=visual.ln_post.eps,
    )
    tower = CLIPVisionModel(config)
    weights = _renamed(visual.state_dict())
    wanted = set(tower.state_dict())
    if set(weights) != wanted:
        differing = sorted(set(weights) ^ wanted)
        raise ValueError(
            f"{name} has other weights than a CLIPVisionModel, first {', '.join(differing[:3])}; take one of the plain "
            "ViT-* models"
        )
    tower.load_state_dict(weights)
    return tower.eval()


NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1": "embeddings.patch_embedding",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under transformers' names, with query, key and value apart; those that have no place keep theirs."""
    weights: dict[str, Tensor] = {}
    for key, value in state.items():
        if key == "proj":
            continue
        head, block, rest = key.partition("transformer.resblocks.")
        number, _, rest = rest.partition(".") if block else ("", "", key)
        place = f"encoder.layers.{number}." if block else ""
        if rest.startswith("attn.in_proj_"):
            kind = rest.removeprefix("attn.in_proj_")
            for name, part in zip("qkv", torch.chunk(value, 3), strict=True):
                weights[f"{place}self_attn.{name}_proj.{kind}"] = part
            continue
        stem, dot, kind = (rest, "", "") if rest in NAMES else rest.rpartition(".")
        weights[f"{place}{NAMES.get(stem, stem)}{dot}{kind}"] = value
    return weights
