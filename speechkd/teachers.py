"""Find, load and freeze a teacher: a Hub id, a local folder or `bundled:<name>`."""

import hashlib
import logging
import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel, WhisperForConditionalGeneration, WhisperProcessor

from speechkd.bundled import BUNDLED, bundled_path

logger = logging.getLogger(__name__)

BUNDLED_PREFIX = "bundled:"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
ModelT = TypeVar("ModelT", bound=nn.Module)


def resolve_model(name: str) -> str:
    """What `from_pretrained` takes for a model name.

    Args:
        name: Hub id, local folder or `bundled:<name>`.

    Returns:
        The folder of a bundled or local model, the Hub id unchanged otherwise; the Hub is not asked.

    Raises:
        ValueError: no such bundled teacher, a path that does not exist, or neither a path nor a Hub id.
    """
    if name.startswith(BUNDLED_PREFIX):
        return str(bundled_path(name.removeprefix(BUNDLED_PREFIX)))
    path = Path(name).expanduser()
    if name and path.is_dir():
        return str(path)
    if path.is_file():
        raise ValueError(f"model {name!r} is a file; give the folder that holds config.json and the weights")
    looks_like_path = name.startswith(("/", ".", "~")) or (path.parent != Path(".") and path.parent.is_dir())
    if looks_like_path:
        raise ValueError(
            f"model folder {name!r} does not exist; check the path, or give a Hub id or {_bundled_names()}"
        )
    if not HUB_ID.fullmatch(name):
        raise ValueError(
            f"model {name!r} is neither an existing folder nor a Hub id (owner/name) nor {_bundled_names()}"
        )
    return name


def load_whisper(
    name: str,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> WhisperForConditionalGeneration:
    """Load a Whisper model in eval mode, with scaled-dot-product attention.

    Args:
        name: Hub id, local folder or `bundled:<name>`.
        dtype: parameter dtype; None is float32 on a CPU and the checkpoint's own elsewhere.
        device: where it goes; None is the CPU.
        revision: branch, tag or commit of a Hub id.

    Raises:
        ValueError: not found, no Whisper model, or a checkpoint that lacks weights.
        ImportError: a bundled teacher whose packages are not installed.
    """
    device = torch.device(device if device is not None else "cpu")
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else "auto"
    resolved = resolve_model(name)
    try:
        config = AutoConfig.from_pretrained(resolved, revision=revision or "main")
        if config.model_type != "whisper":
            raise ValueError(f"model {name!r} is of type {config.model_type!r}, but this needs a Whisper model")
        loaded: Any = WhisperForConditionalGeneration.from_pretrained(
            resolved,
            config=config,
            revision=revision or "main",
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except OSError as error:
        raise ValueError(_not_found(name, resolved, revision)) from error
    model, info = loaded
    # from_pretrained fills these with random numbers and only warns.
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"model {name!r} has no weights for {len(missing)} parameters, first {', '.join(missing[:3])}; "
            "save it again with save_pretrained"
        )
    return model.to(device).eval()


def load_processor(name: str, *, revision: str | None = None) -> WhisperProcessor:
    """Feature extractor and tokenizer of a Whisper model.

    Raises:
        ValueError: not found.
    """
    resolved = resolve_model(name)
    try:
        return WhisperProcessor.from_pretrained(resolved, revision=revision or "main")
    except OSError as error:
        raise ValueError(_not_found(name, resolved, revision)) from error


def freeze(model: ModelT) -> ModelT:
    """Take a teacher out of training, in place: no gradients, no dropout."""
    return model.requires_grad_(False).eval()


def teacher_identity(name: str, model: PreTrainedModel, revision: str | None = None) -> dict[str, Any]:
    """What labels made by this teacher are kept under.

    Args:
        name: as the user gave it.
        model: the loaded teacher.
        revision: as the user gave it; None takes the commit that the Hub served.

    Returns:
        `name`, `revision` (None for a folder) and `weights_sha256`, which covers the names, dtypes, shapes and bytes
        of the state dict, so the same weights in another dtype are another teacher.
    """
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # Through uint8, because numpy has no bfloat16; flattened first, because a 0-dim tensor has no such view.
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return {
        "name": name,
        "revision": revision or getattr(model.config, "_commit_hash", None),
        "weights_sha256": digest.hexdigest(),
    }


def check_vocabularies(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Refuse a pair whose token distributions cannot be compared.

    Raises:
        ValueError: the vocabularies differ in size.
    """
    teacher_size, student_size = teacher.config.vocab_size, student.config.vocab_size
    if teacher_size != student_size:
        raise ValueError(
            f"the teacher has {teacher_size} tokens and the student {student_size}, so their token distributions "
            "cannot be compared; make the student from this teacher, take a teacher with the student's vocabulary "
            "(Whisper large-v3 has one token more than the earlier models), or train on the teacher's text alone"
        )


def _bundled_names() -> str:
    return " or ".join(f"{BUNDLED_PREFIX}{known}" for known in sorted(BUNDLED))


def _not_found(name: str, resolved: str, revision: str | None) -> str:
    if Path(resolved).is_dir():
        return f"model folder {name!r} cannot be loaded; it needs config.json, weights and the processor's files"
    at_revision = f" at revision {revision!r}" if revision else ""
    return (
        f"model {name!r}{at_revision} is neither in the local cache nor reachable on the Hub; connect to a network, "
        f"give a local folder, or take {_bundled_names()}, which needs no network"
    )
