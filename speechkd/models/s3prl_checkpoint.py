"""DistilHuBERT checkpoints of s3prl: read into Hugging Face's class, and written so that s3prl reads them.

Such a file is a dictionary: `Distiller` holds the weights with the heads, `Config` the model's YAML; s3prl's training
adds `Optimizer`, `Step` and `Args`, which are not needed here. Both directions keep every bit.
"""

import argparse
import ast
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import HubertConfig, HubertModel

from speechkd.files import atomic_write
from speechkd.losses.layerwise import PredictionHeads

EXTRACTORS = {"default": "group", "layer_norm": "layer"}  # s3prl's name: Hugging Face's
CONVOLUTIONS = "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"
LAYER_NORM_EPS = 1e-5  # of torch; s3prl's layers know no other
LAYER_NAMES = {
    "self_attn.q_proj": "attention.q_proj",
    "self_attn.k_proj": "attention.k_proj",
    "self_attn.v_proj": "attention.v_proj",
    "self_attn.out_proj": "attention.out_proj",
    "self_attn_layer_norm": "layer_norm",
    "fc1": "feed_forward.intermediate_dense",
    "fc2": "feed_forward.output_dense",
    "final_layer_norm": "final_layer_norm",
}
POSITIONS = {
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
    "bias": "bias",
}


@dataclass(frozen=True)
class S3prlDistiller:
    """What a checkpoint holds.

    Args:
        encoder: in float32 and eval mode.
        heads: its prediction heads, likewise.
        layers: the teacher's layer of each head, from 1.
        feature_grad_mult: see `speechkd.models.distilhubert.CompactStudent`.
    """

    encoder: HubertModel
    heads: PredictionHeads
    layers: list[int]
    feature_grad_mult: float


def read_s3prl(path: str | Path) -> S3prlDistiller:
    """Read a checkpoint of s3prl's `distiller`; Python objects in it are not run.

    Raises:
        ValueError: it is no such file, its architecture is another, or a weight is missing, too many or of another
            shape; the message names which.
    """
    states = _load(path)
    config = states["Config"].get("distiller", {})
    encoder_config = _encoder_config(path, config)
    width = encoder_config.hidden_size
    num_heads = int(config.get("n_tasks", 12))
    layers = [int(layer) for layer in config.get("pred_layer_id", range(1, num_heads + 1))]
    if len(layers) != num_heads:
        raise ValueError(f"{path}: n_tasks={num_heads} heads, but pred_layer_id names layers {layers}; one for each")
    inner_dim = int(config.get("out_layer_inter_dim", -1))
    heads = PredictionHeads(width, int(config.get("final_dim", 768)), num_heads, inner_dim if inner_dim > 0 else None)
    encoder = HubertModel(encoder_config)
    names = _s3prl_names(encoder_config, num_heads)
    found: dict[str, Tensor] = states["Distiller"]
    ours = _weights(encoder, heads)
    missing, extra = sorted(names.keys() - found.keys()), sorted(found.keys() - names.keys())
    if missing or extra:
        raise ValueError(
            f"{path} is of another architecture than its Config says: {_listed('missing', missing)}"
            f"{'; ' if missing and extra else ''}{_listed('not known', extra)}; give a DistilHuBERT checkpoint of s3prl"
        )
    for theirs, name in names.items():
        value = _to_ours(theirs, found[theirs])
        if value.shape != ours[name].shape:
            raise ValueError(
                f"{path}: {theirs} is {tuple(found[theirs].shape)}, but its Config gives {name} the shape "
                f"{tuple(ours[name].shape)}; the two do not belong together"
            )
        ours[name].copy_(value)
    grad_mult = float(config.get("feature_grad_mult", 1.0))
    encoder.eval()
    return S3prlDistiller(encoder, heads.eval(), layers, grad_mult)


def write_s3prl(
    path: str | Path,
    encoder: HubertModel,
    heads: PredictionHeads,
    layers: Sequence[int],
    *,
    feature_grad_mult: float = 0.1,
) -> None:
    """Write a checkpoint from which s3prl extracts features (`distiller_local`); to resume it needs its own.

    Args:
        path: of the file.
        encoder: as `speechkd.models.distilhubert.compact_encoder` makes it of a HuBERT. A vector for masked frames is
            left out: s3prl has no place for it.
        heads: trained with it.
        layers: the teacher's layer of each head, from 1.
        feature_grad_mult: for the record; only s3prl's training reads it.

    Raises:
        ValueError: s3prl's class cannot express the encoder, or the layers are not as many as the heads.
    """
    config = encoder.config
    _check_expressible(config)
    if len(layers) != heads.num_heads:
        raise ValueError(f"layers {list(layers)} do not fit {heads.num_heads} heads; name the teacher's layer of each")
    convolutions = list(zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True))
    distiller = {
        "extractor_mode": next(key for key, value in EXTRACTORS.items() if value == config.feat_extract_norm),
        "extractor_conv_feature_layers": str(convolutions),
        "extractor_dropout": 0.0,
        "feature_grad_mult": feature_grad_mult,
        "conv_pos": config.num_conv_pos_embeddings,
        "conv_pos_groups": config.num_conv_pos_embedding_groups,
        "encoder_layers": config.num_hidden_layers,
        "encoder_embed_dim": config.hidden_size,
        "encoder_ffn_embed_dim": config.intermediate_size,
        "encoder_attention_heads": config.num_attention_heads,
        "activation_fn": "gelu",
        "layer_norm_first": config.do_stable_layer_norm,
        "attention_type": "original",
        "dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "activation_dropout": config.activation_dropout,
        "encoder_layerdrop": config.layerdrop,
        "final_dim": heads.split.bias.shape[-1],
        "out_layer_type": "expand-last",
        "out_layer_inter_dim": heads.split.weight.shape[1],
        "n_tasks": heads.num_heads,
        "task_emb_type": "expand-last",
        "pred_layer_id": list(layers),
    }
    ours = _weights(encoder, heads)
    names = _s3prl_names(config, heads.num_heads)
    weights = {theirs: _to_theirs(theirs, ours[name]) for theirs, name in names.items()}
    with atomic_write(path) as temporary:
        torch.save({"Distiller": weights, "Config": {"distiller": distiller}}, temporary)


def _load(path: str | Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # of `Args`; it runs nothing
            states = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"s3prl checkpoint {path} cannot be opened: {error}; check the path") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is not read as an s3prl checkpoint: it is no file of torch.save, or holds Python objects, which "
            "are not run. Load it with s3prl and save {'Distiller': ..., 'Config': ...} of it alone"
        ) from error
    is_checkpoint = isinstance(states, dict) and all(
        isinstance(states.get(key), dict) for key in ("Distiller", "Config")
    )
    if not is_checkpoint:
        keys = sorted(map(str, states)) if isinstance(states, dict) else type(states).__name__
        raise ValueError(
            f"{path} lacks the dictionaries Distiller and Config of an s3prl distiller; it has {keys}. Give the .ckpt "
            "file of s3prl, or load a Hugging Face folder with from_pretrained"
        )
    return states


def _encoder_config(path: str | Path, config: dict[str, Any]) -> HubertConfig:
    """Hugging Face's configuration of s3prl's, whose defaults for missing keys are those of its class."""
    needed = {
        "attention_type": ("original",),
        "task_emb_type": ("expand-last",),
        "out_layer_type": ("expand-last",),
        "extractor_mode": tuple(EXTRACTORS),
        "activation_fn": ("gelu",),
    }
    for key, values in needed.items():
        if config.get(key, values[0]) not in values:
            raise ValueError(
                f"{path}: {key}={config[key]!r} has no counterpart in a HubertModel with prediction heads; only "
                f"{' or '.join(values)} has"
            )
    convolutions = _parse_convolutions(path, config.get("extractor_conv_feature_layers", CONVOLUTIONS))
    return HubertConfig(
        feat_extract_norm=EXTRACTORS[config.get("extractor_mode", "default")],
        conv_dim=[layer[0] for layer in convolutions],
        conv_kernel=[layer[1] for layer in convolutions],
        conv_stride=[layer[2] for layer in convolutions],
        conv_bias=False,
        feat_proj_layer_norm=False,
        feat_proj_dropout=0.0,
        num_conv_pos_embeddings=int(config.get("conv_pos", 128)),
        num_conv_pos_embedding_groups=int(config.get("conv_pos_groups", 16)),
        num_hidden_layers=int(config.get("encoder_layers", 1)),
        hidden_size=int(config.get("encoder_embed_dim", 768)),
        intermediate_size=int(config.get("encoder_ffn_embed_dim", 3072)),
        num_attention_heads=int(config.get("encoder_attention_heads", 12)),
        do_stable_layer_norm=bool(config.get("layer_norm_first", False)),
        hidden_dropout=float(config.get("dropout", 0.1)),
        attention_dropout=float(config.get("attention_dropout", 0.1)),
        activation_dropout=float(config.get("activation_dropout", 0.1)),
        layerdrop=float(config.get("encoder_layerdrop", 0.0)),
        layer_norm_eps=LAYER_NORM_EPS,
        mask_time_prob=0.0,
        mask_feature_prob=0.0,
        apply_spec_augment=False,
    )


def _parse_convolutions(path: str | Path, text: str) -> list[tuple[int, int, int]]:
    """(channels, kernel, stride) of each layer, from the sum of lists that s3prl evaluates as Python."""

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return value(node.left) + value(node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            layers, times = value(node.left), value(node.right)
            if isinstance(layers, list) and isinstance(times, int) and 0 < times <= 100:
                return layers * times
            raise ValueError("not a list times a number")
        return ast.literal_eval(node)

    try:
        layers = value(ast.parse(str(text).strip(), mode="eval").body)
        return [(int(channels), int(kernel), int(stride)) for channels, kernel, stride in layers]
    except (ValueError, TypeError, SyntaxError) as error:
        raise ValueError(
            f"{path}: extractor_conv_feature_layers={text!r} is not of the form {CONVOLUTIONS!r}, lists of (channels, "
            "kernel, stride)"
        ) from error


def _check_expressible(config: Any) -> None:
    needed = {
        "model_type": "hubert",
        "feat_proj_layer_norm": False,
        "conv_bias": False,
        "conv_pos_batch_norm": False,
        "hidden_act": "gelu",
        "feat_extract_activation": "gelu",
        "layer_norm_eps": LAYER_NORM_EPS,
    }
    for key, value in needed.items():
        if getattr(config, key, value) != value:
            raise ValueError(
                f"s3prl's distiller cannot express {key}={getattr(config, key)!r}, only {value!r}; save the encoder "
                "with save_pretrained"
            )
    if config.conv_dim[-1] == config.hidden_size:
        raise ValueError(
            f"s3prl's distiller has no projection where the convolutions are as wide as the encoder, "
            f"{config.hidden_size}; save the encoder with save_pretrained"
        )


def _weights(encoder: HubertModel, heads: PredictionHeads) -> dict[str, Tensor]:
    """Those of both, by name, sharing memory with them."""
    return dict(encoder.state_dict()) | {f"heads.{name}": value for name, value in heads.state_dict().items()}


def _s3prl_names(config: Any, num_heads: int) -> dict[str, str]:
    """Our name of every weight of s3prl's `DistillerModel`, by its name there."""
    names = {}
    for layer in range(len(config.conv_dim)):
        theirs, ours = f"feature_extractor.conv_layers.{layer}", f"feature_extractor.conv_layers.{layer}"
        names[f"{theirs}.0.weight"] = f"{ours}.conv.weight"
        if config.feat_extract_norm == "layer":  # between two transpositions
            names |= {f"{theirs}.2.1.{part}": f"{ours}.layer_norm.{part}" for part in ("weight", "bias")}
        elif layer == 0:
            names |= {f"{theirs}.2.{part}": f"{ours}.layer_norm.{part}" for part in ("weight", "bias")}
    for part in ("weight", "bias"):
        names[f"post_extract_proj.{part}"] = f"feature_projection.projection.{part}"
        names[f"encoder.layer_norm.{part}"] = f"encoder.layer_norm.{part}"
        names[f"output_layer.0.{part}"] = f"heads.expand.{part}"
        # a single head is a plain Linear
        names[f"output_layer.2.{'layer.' if num_heads == 1 else ''}{part}"] = f"heads.split.{part}"
        for layer in range(config.num_hidden_layers):
            prefix = f"encoder.layers.{layer}"
            names |= {f"{prefix}.{theirs}.{part}": f"{prefix}.{ours}.{part}" for theirs, ours in LAYER_NAMES.items()}
    return names | {
        f"encoder.pos_conv.0.{key}": f"encoder.pos_conv_embed.conv.{ours}" for key, ours in POSITIONS.items()
    }


def _to_ours(theirs: str, value: Tensor) -> Tensor:
    """s3prl's weight in the shape of ours: the heads' last map alone differs."""
    if theirs == "output_layer.2.layer.weight":
        return value.T[None]
    if theirs == "output_layer.2.layer.bias":
        return value[None]
    return value[0, 0] if theirs == "output_layer.2.bias" and value.ndim == 4 else value


def _to_theirs(theirs: str, value: Tensor) -> Tensor:
    value = value.detach().cpu()
    if theirs == "output_layer.2.layer.weight":
        return value[0].T.contiguous()
    if theirs == "output_layer.2.layer.bias":
        return value[0].clone()
    return value[None, None].clone() if theirs == "output_layer.2.bias" else value.clone()


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{what} {', '.join(names[:4])}{more}"
