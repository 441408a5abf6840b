"""Language experts in a Whisper: a second feed-forward block per layer and language, and gates that choose per token.

Multilingual DistilWhisper, Ferraz et al. 2024, https://arxiv.org/abs/2311.01070, with the conditional language-specific
routing of Zhang et al. 2021, https://openreview.net/forum?id=Wj4ODo0uyCF.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, WhisperForConditionalGeneration

from speechkd.files import atomic_write, write_json
from speechkd.teachers import teacher_identity

GATE_DIM = 64
GATE_INPUT_DROPOUT = 0.1
EXPERT_DROPOUT = 0.3
SKIP_PROBABILITY = 0.2  # of leaving a layer's expert out of a training step
MAX_GATE_NOISE = 5.0


class FeedForward(nn.Module):
    """The feed-forward block of a Whisper layer, (..., dim) to (..., dim)."""

    def __init__(self, fc1: nn.Module, activation: nn.Module, fc2: nn.Module, activation_dropout: float) -> None:
        super().__init__()
        self.fc1, self.activation, self.fc2 = fc1, activation, fc2
        self.activation_dropout = activation_dropout

    def forward(self, states: Tensor) -> Tensor:
        hidden = F.dropout(self.activation(self.fc1(states)), self.activation_dropout, self.training)
        return self.fc2(hidden)


class LanguageExpert(nn.Module):
    """One language's block, at first a copy of the shared one, and its gate W2 relu(W1 x), at first 0."""

    def __init__(self, shared: FeedForward) -> None:
        super().__init__()
        self.feed_forward = copy.deepcopy(shared)
        weight = cast(nn.Linear, shared.fc1).weight
        self.gate_in = nn.Linear(weight.shape[1], GATE_DIM, device=weight.device, dtype=weight.dtype)
        self.gate_out = nn.Linear(GATE_DIM, 1, bias=False, device=weight.device, dtype=weight.dtype)
        nn.init.normal_(self.gate_in.weight, std=0.01)
        nn.init.zeros_(self.gate_in.bias)
        nn.init.zeros_(self.gate_out.weight)
        self.requires_grad_(True)

    def gate_logits(self, states: Tensor) -> Tensor:
        """(..., dim) to (...); the expert is chosen where this is 0 or more."""
        states = F.dropout(states, GATE_INPUT_DROPOUT, self.training)
        return self.gate_out(F.relu(self.gate_in(states))).squeeze(-1)


class GatedFeedForward(nn.Module):
    """The shared block and the experts of one layer.

    `gates` holds the last call's gate of each token, (batch, tokens): 0 to 1 in training, bool otherwise, None where
    no language is chosen.
    """

    def __init__(self, shared: FeedForward) -> None:
        super().__init__()
        self.shared = shared
        self.experts = nn.ModuleDict()
        self.language: str | None = None
        self.gate_noise = 0.0
        self.gates: Tensor | None = None

    def forward(self, states: Tensor) -> Tensor:
        if self.language is None:
            self.gates = None
            return self.shared(states)
        expert = cast(LanguageExpert, self.experts[self.language])
        logits = expert.gate_logits(states)
        if not self.training:
            self.gates = logits >= 0
            return self._chosen(states, expert.feed_forward, self.gates)
        self.gates = torch.sigmoid(logits + self.gate_noise * torch.randn_like(logits))
        # a skipped expert is multiplied by 0, not left out: every weight must have a gradient on every process
        kept = torch.rand((), device=states.device) >= SKIP_PROBABILITY
        gates = (self.gates * kept).unsqueeze(-1)
        return gates * F.dropout(expert.feed_forward(states), EXPERT_DROPOUT) + (1 - gates) * self.shared(states)

    def _chosen(self, states: Tensor, expert: FeedForward, is_open: Tensor) -> Tensor:
        """Each token through its own block alone."""
        if is_open.all():
            return expert(states)
        if not is_open.any():
            return self.shared(states)
        from_expert = expert(states[is_open])
        mixed = from_expert.new_empty(states.shape)
        mixed[is_open] = from_expert
        mixed[~is_open] = self.shared(states[~is_open])
        return mixed


def add_experts(model: WhisperForConditionalGeneration, languages: Sequence[str]) -> None:
    """Give every encoder and decoder layer an expert per language, in place; the model's own weights are frozen.

    In eval mode the logits stay the same to the bit until the experts are trained. No language is chosen yet; see
    `set_language`.

    Args:
        model: any Whisper, with experts of other languages or without.
        languages: language codes.

    Raises:
        ValueError: a language comes twice or is there already.
    """
    known = expert_languages(model)
    again = sorted({language for language in languages if language in known or list(languages).count(language) > 1})
    if again:
        raise ValueError(f"experts of {', '.join(again)} are added twice; the model has experts of {_names(known)}")
    model.requires_grad_(False)
    for layer in _layers(model):
        if not isinstance(layer.fc1, GatedFeedForward):
            shared = FeedForward(layer.fc1, layer.activation_fn, layer.fc2, layer.activation_dropout)
            # the layer goes on calling fc1, its activation and fc2 one after another; the first does it all
            layer.fc1, layer.activation_fn, layer.fc2 = GatedFeedForward(shared), nn.Identity(), nn.Identity()
            layer.activation_dropout = 0.0
        for language in languages:
            layer.fc1.experts[language] = LanguageExpert(layer.fc1.shared)
        layer.fc1.train(layer.training)


def expert_languages(model: nn.Module) -> list[str]:
    """Languages that a model has experts of."""
    blocks = gated_blocks(model)
    return list(blocks[0].experts) if blocks else []


def gated_blocks(model: nn.Module) -> list[GatedFeedForward]:
    """Blocks with experts, those of the encoder's layers first; [] for a stock model."""
    return [module for module in model.modules() if isinstance(module, GatedFeedForward)]


def set_language(model: nn.Module, language: str | None) -> None:
    """Choose whose experts run from now on; None lets only the shared blocks run, which is the base model.

    Raises:
        ValueError: the model has no experts of this language.
    """
    if language is not None and language not in (known := expert_languages(model)):
        raise ValueError(
            f"the model has no experts of {language!r}, only of {_names(known)}; load or add them, or choose None"
        )
    for block in gated_blocks(model):
        block.language = language


def train_only(model: nn.Module, language: str) -> None:
    """Choose a language and let its experts and gates alone have gradients.

    Raises:
        ValueError: the model has no experts of this language.
    """
    set_language(model, language)
    model.requires_grad_(False)
    for block in gated_blocks(model):
        block.experts[language].requires_grad_(True)


def set_gate_noise(model: nn.Module, progress: float) -> None:
    """Noise on the gates in training, standard deviation 5 * progress: it drives them to 0 or 1.

    Args:
        model: with experts.
        progress: finished share of the training; above 1 counts as 1. The published code takes 5 at its first step.
    """
    for block in gated_blocks(model):
        block.gate_noise = MAX_GATE_NOISE * min(progress, 1.0)


def gate_totals(model: nn.Module, frame_mask: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the last forward pass's gates over valid tokens, with a graph in training.

    Args:
        model: with experts and a language.
        frame_mask: True on the encoder's frames that count, (batch, frames), bool.
        token_mask: True on the decoder's tokens that count, (batch, tokens), bool.

    Returns:
        Sums and counts of each layer, encoder first, both (layers,), float32.

    Raises:
        ValueError: no language is chosen, or no forward pass has run.
    """
    encoder = cast(Any, model).model.encoder
    num_encoder_blocks = len(gated_blocks(encoder))
    sums, counts = [], []
    for index, block in enumerate(gated_blocks(model)):
        if block.gates is None:
            raise ValueError("the gates are unknown; call set_language, then the model, then gate_totals")
        mask = frame_mask if index < num_encoder_blocks else token_mask
        sums.append((block.gates.float() * mask).sum())
        counts.append(mask.sum().float())
    return torch.stack(sums), torch.stack(counts)


def num_expert_parameters(model: nn.Module, language: str) -> int:
    """Parameters that one language adds: its blocks and gates."""
    return sum(weight.numel() for block in gated_blocks(model) for weight in block.experts[language].parameters())


def save_experts(
    model: WhisperForConditionalGeneration, folder: str | Path, language: str, base: Mapping[str, Any]
) -> None:
    """Write `<language>-experts.safetensors` and `<language>-experts.json`; several languages share a folder.

    Args:
        model: with experts of this language.
        folder: is created; files of the same language are replaced.
        language: which experts.
        base: `teacher_identity` of the model before experts were added.

    Raises:
        ValueError: the model has no experts of this language.
    """
    if language not in (known := expert_languages(model)):
        raise ValueError(f"the model has no experts of {language!r}, only of {_names(known)}")
    weights = {
        f"{place}.{name}": weight.contiguous()
        for place, block in _places(model).items()
        for name, weight in block.experts[language].state_dict().items()
    }
    path = _weights_path(folder, language)
    with atomic_write(path) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    description = {"language": language, "base_model": dict(base), "dtype": _dtype(model), **_sizes(model)}
    write_json(path.with_suffix(".json"), description)


def load_experts(model: WhisperForConditionalGeneration, folder: str | Path, languages: Sequence[str]) -> None:
    """Add saved experts to the model that they were trained on, in place; the first language is chosen.

    Args:
        model: the base model, without experts, in the dtype of the training.
        folder: of `save_experts`.
        languages: which of those in the folder.

    Raises:
        ValueError: no such experts, another base model, or a model that has experts already.
    """
    if gated_blocks(model):
        raise ValueError("the model has experts already; load all languages at once, into the base model")
    if not languages:
        raise ValueError("no language is given; name those whose experts to load")
    there = sorted(path.name.removesuffix("-experts.json") for path in Path(folder).glob("*-experts.json"))
    for language in languages:
        if language not in there:
            raise ValueError(f"{folder} holds no experts of {language!r}, only of {_names(there)}")
    for language in languages:
        _check_base(model, _weights_path(folder, language).with_suffix(".json"))
    add_experts(model, languages)
    for language in languages:
        weights = load_file(_weights_path(folder, language))
        for place, block in _places(model).items():
            prefix = f"{place}."
            own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
            block.experts[language].load_state_dict(own)
    set_language(model, languages[0])


def merged_whisper(
    model: WhisperForConditionalGeneration, language: str, open_shares: Sequence[float], *, min_open_share: float = 0.5
) -> WhisperForConditionalGeneration:
    """A stock Whisper with a language's expert in each layer whose gate is mostly open, and the shared block elsewhere.

    A stock layer has one block for all tokens, so this equals the gated model only where every share is 0 or 1.

    Args:
        model: with experts of this language; stays as it is.
        language: whose experts.
        open_shares: measured share of tokens with an open gate, 0 to 1, one per layer, encoder first.
        min_open_share: from this share on a layer gets the expert.

    Returns:
        A model that `save_pretrained` writes as any Whisper.

    Raises:
        ValueError: no such experts, or another number of shares than layers.
    """
    if language not in (known := expert_languages(model)):
        raise ValueError(f"the model has no experts of {language!r}, only of {_names(known)}")
    blocks = gated_blocks(model)
    if len(open_shares) != len(blocks):
        raise ValueError(f"{len(open_shares)} open shares for {len(blocks)} layers; give one each, encoder first")
    for block in blocks:
        block.gates = None  # what has a graph cannot be copied
    merged = copy.deepcopy(model).eval()
    for layer, share in zip(_layers(merged), open_shares, strict=True):
        gated = layer.fc1
        chosen = gated.experts[language].feed_forward if share >= min_open_share else gated.shared
        layer.fc1, layer.activation_fn, layer.fc2 = chosen.fc1, chosen.activation, chosen.fc2
        layer.activation_dropout = chosen.activation_dropout
    return merged


def _check_base(model: PreTrainedModel, path: Path) -> None:
    """Refuse experts of another base model.

    Raises:
        ValueError: sizes, dtype or weights differ; says which.
    """
    description = json.loads(path.read_text(encoding="utf-8"))
    trained_on = description["base_model"]
    for name, size in _sizes(model).items():
        if description[name] != size:
            raise ValueError(
                f"{path.stem} were trained on {trained_on['name']} with {name}={description[name]}, this model has "
                f"{size}; load them into {trained_on['name']}"
            )
    if description["dtype"] != _dtype(model):
        raise ValueError(
            f"{path.stem} were trained on {description['dtype']} weights, this model has {_dtype(model)}; load it in "
            f"{description['dtype']} and convert it after the experts are loaded"
        )
    here = teacher_identity(str(model.config._name_or_path), model)
    if here["weights_sha256"] != trained_on["weights_sha256"]:
        raise ValueError(
            f"{path.stem} were trained on {trained_on['name']} (weights SHA-256 {trained_on['weights_sha256'][:12]}), "
            f"this is {here['name'] or 'another model'} ({here['weights_sha256'][:12]}); load them into "
            f"{trained_on['name']}"
        )


def _layers(model: WhisperForConditionalGeneration) -> list[Any]:
    return [*model.model.encoder.layers, *model.model.decoder.layers]


def _places(model: WhisperForConditionalGeneration) -> dict[str, GatedFeedForward]:
    """Blocks by `encoder.layers.N` or `decoder.layers.N`."""
    return {
        f"{half}.layers.{index}": layer.fc1
        for half, module in (("encoder", model.model.encoder), ("decoder", model.model.decoder))
        for index, layer in enumerate(module.layers)
    }


def _sizes(model: PreTrainedModel) -> dict[str, int]:
    names = ("d_model", "encoder_layers", "decoder_layers", "encoder_ffn_dim", "decoder_ffn_dim", "vocab_size")
    return {name: getattr(model.config, name) for name in names}


def _dtype(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _weights_path(folder: str | Path, language: str) -> Path:
    return Path(folder) / f"{language}-experts.safetensors"


def _names(languages: Sequence[str]) -> str:
    return ", ".join(languages) or "no language"
