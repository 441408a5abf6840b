"""Teachers of text: frozen sentence encoders, whose embeddings a speech encoder learns to give."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from speechkd.losses.hidden import unit_vectors
from speechkd.teachers import freeze, resolve_model, teacher_identity

logger = logging.getLogger(__name__)

Pooling = Literal["mean", "compat_gather"]
POOLINGS = ("mean", "compat_gather")
MASKED_MEAN_MODULES = ("Transformer", "Pooling", "Normalize")
# No sentence embedding uses them, and some checkpoints leave them out.
UNUSED_WEIGHTS = ("pooler.", "decoder.")


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Mean of the real vectors of each row; what is padded may hold NaN and gets a gradient of exactly 0.

    Args:
        states: (batch, length, dim), of any floating dtype.
        mask: True or 1 on real vectors, (batch, length), bool or int.

    Returns:
        (batch, dim), float32; float64 stays.

    Raises:
        ValueError: the mask has another shape, or a row has no real vector.
    """
    if states.ndim != 3 or mask.shape != states.shape[:2]:
        raise ValueError(
            f"mask {tuple(mask.shape)} does not fit states {tuple(states.shape)}; give states as (batch, length, dim) "
            "and a mask (batch, length) of the same frames or tokens, not of samples or characters"
        )
    real = mask.bool()
    counts = real.sum(dim=1)
    if (counts == 0).any():
        empty = int((counts == 0).nonzero()[0])
        raise ValueError(f"row {empty} of the batch has nothing to average: its mask is all 0; leave this row out")
    states = states if states.dtype == torch.float64 else states.float()
    return torch.where(real[..., None], states, 0.0).sum(dim=1) / counts[:, None]


def compat_gather(states: Tensor, mask: Tensor) -> Tensor:
    """What the public code of SEGUE took for the mean: (padding * h[0] + real * h[1]) / length of the padded row.

    Its mask is used as indices there. The value depends on the padding, so on the batch; alone, a text has the state of
    its first word piece. Only for comparing with `declare-lab/segue-w2v2-base`.

    Args:
        states: (batch, length, dim) with a length of 2 or more.
        mask: True or 1 on real tokens, (batch, length), bool or int.

    Returns:
        (batch, dim), float32.
    """
    share = mask.bool().float().mean(dim=1, keepdim=True)
    return (1 - share) * states[:, 0].float() + share * states[:, 1].float()


class SentenceTeacher(nn.Module):
    """A frozen sentence encoder: its transformer, and a pooling over all tokens, the special ones included.

    Tan et al. 2023, https://arxiv.org/abs/2305.12301. It stays in eval mode whatever the module around it does.

    Args:
        encoder: gives `last_hidden_state`.
        tokenizer: of the encoder.
        max_tokens: longer texts are cut, special tokens included.
        pooling: "mean", or "compat_gather"; see there.
        normalize: give vectors of length 1. SEGUE's targets are not normalised.
        lower_case: lower the texts first, for models whose tokenizer leaves this to sentence-transformers.
        identity: of the encoder, as of `teacher_identity`.

    Raises:
        ValueError: the pooling is unknown.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
        pooling: Pooling = "mean",
        normalize: bool = False,
        lower_case: bool = False,
        identity: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be {' or '.join(POOLINGS)}, got {pooling!r}")
        self.encoder = freeze(encoder)
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.pooling, self.normalize, self.lower_case = pooling, normalize, lower_case
        self.identity = identity or teacher_identity(encoder.name_or_path or "", encoder)
        self._no_split_modules = encoder._no_split_modules  # the trainer compiles and shards by them
        self.eval()

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self.encoder.config.hidden_size

    def train(self, mode: bool = True) -> "SentenceTeacher":
        """Stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts; longer ones than `max_tokens` are cut without a word, see `num_tokens`.

        Args:
            texts: one a row.

        Returns:
            (texts, dim), float32, on the encoder's device.

        Raises:
            ValueError: there is no text, or an empty one.
        """
        self._check(texts)
        inputs = self.tokenizer(
            self._lowered(texts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.encoder.device)
        with torch.autocast(self.encoder.device.type, enabled=False):
            states = self.encoder(**inputs).last_hidden_state
        pool = masked_mean if self.pooling == "mean" else compat_gather
        embeddings = pool(states, inputs["attention_mask"])
        return unit_vectors(embeddings) if self.normalize else embeddings

    def num_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text with its special ones, before any cut; more than `max_tokens` means that it is cut.

        Raises:
            ValueError: there is no text, or an empty one.
        """
        self._check(texts)
        return [len(ids) for ids in self.tokenizer(self._lowered(texts), verbose=False)["input_ids"]]

    def _lowered(self, texts: Sequence[str]) -> list[str]:
        return [text.lower() if self.lower_case else text for text in texts]

    @staticmethod
    def _check(texts: Sequence[str]) -> None:
        if isinstance(texts, str) or not len(texts):
            raise ValueError(f"a sentence teacher takes a list of texts with at least one, got {texts!r}")
        for position, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(
                    f"text {position} of the batch is {text!r}: an empty or missing text has no meaning to teach; "
                    "leave such utterances out"
                )


def load_sentence_teacher(
    name: str,
    *,
    pooling: Pooling = "mean",
    normalize: bool = False,
    device: torch.device | str = "cpu",
    revision: str | None = None,
) -> SentenceTeacher:
    """A sentence-transformers model without what it does after the pooling; that library need not be installed.

    Args:
        name: Hub id, folder or `bundled:minilm-l6`.
        pooling: see `SentenceTeacher`; where the model's own is another, a warning says so.
        normalize: see `SentenceTeacher`.
        device: where it runs, in float32.
        revision: branch, tag or commit of a Hub id.

    Raises:
        ValueError: it cannot be found or loaded, or lacks weights.
    """
    resolved, at = resolve_model(name), revision or "main"
    modules = _read_json(resolved, "modules.json", at) or []
    subfolder = str(modules[0].get("path") or "") if modules else ""
    settings = _read_json(resolved, "sentence_bert_config.json", at, subfolder) or {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolved, revision=at, subfolder=subfolder)
        loaded: Any = AutoModel.from_pretrained(
            resolved, revision=at, subfolder=subfolder, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"sentence teacher {name!r} cannot be loaded: {error}; give a Hub id, a folder of sentence-transformers, "
            "or bundled:minilm-l6, which needs no network"
        ) from error
    model, info = loaded
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith(UNUSED_WEIGHTS)):
        raise ValueError(
            f"sentence teacher {name!r} has no weights for {len(missing)} parameters, first {', '.join(missing[:3])}; "
            "save it again with save_pretrained"
        )
    identity = teacher_identity(name, model, revision)  # of the whole checkpoint, before a decoder is dropped
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model
    _tell_differences(name, modules, _read_pooling(resolved, at, modules), pooling)
    limits = (settings.get("max_seq_length"), tokenizer.model_max_length, _positions(encoder))
    return SentenceTeacher(
        encoder.to(device),
        tokenizer,
        max_tokens=min(limit for limit in limits if limit is not None),
        pooling=pooling,
        normalize=normalize,
        lower_case=bool(settings.get("do_lower_case")),
        identity=identity,
    )


def _positions(encoder: PreTrainedModel) -> int | None:
    """How many tokens the encoder has positions for; RoBERTa and MPNet keep those up to the padding id for nothing."""
    positions = getattr(encoder.config, "max_position_embeddings", None)
    table = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    unused = 0 if getattr(table, "padding_idx", None) is None else table.padding_idx + 1  # type: ignore[union-attr]
    return None if positions is None else positions - unused


def _read_json(resolved: str, name: str, revision: str, subfolder: str = "") -> Any:
    """Content of a file of a model; None where the model has no such file."""
    try:
        path = cached_file(resolved, name, revision=revision, subfolder=subfolder)
    except OSError:
        return None  # where the whole model is missing, loading it says so
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def _read_pooling(resolved: str, revision: str, modules: list[dict[str, Any]]) -> list[str]:
    """Names of the model's own poolings, as its Pooling module has them; [] where it has none."""
    path = next((module["path"] for module in modules if module["type"].endswith(".Pooling")), None)
    config = None if path is None else _read_json(resolved, "config.json", revision, path)
    if not config:
        return []
    if modes := config.get("pooling_mode"):
        return [modes] if isinstance(modes, str) else list(modes)
    legacy = [key.removeprefix("pooling_mode_") for key, on in config.items() if key.startswith("pooling_mode_") and on]
    return [mode.removesuffix("_tokens").removesuffix("_token") for mode in legacy]


def _tell_differences(name: str, modules: list[dict[str, Any]], poolings: list[str], pooling: Pooling) -> None:
    if poolings and poolings != ["mean"]:
        logger.warning("%s pools by %s itself; it teaches with pooling %s here", name, " and ".join(poolings), pooling)
    left_out = [kind for module in modules if (kind := module["type"].rsplit(".")[-1]) not in MASKED_MEAN_MODULES]
    if left_out:
        logger.warning("%s has the modules %s after its pooling; they are left out", name, ", ".join(left_out))
