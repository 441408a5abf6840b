"""The student of a run: a Whisper with language experts, with LoRA, or fine-tuned; and what is kept of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gated_objective import frame_mask
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import WhisperForConditionalGeneration

from speechkd.data.audio import pcm16_to_float
from speechkd.data.features import WhisperLogMel
from speechkd.files import write_json
from speechkd.models.language_experts import add_experts, gate_totals, merged_whisper, save_experts, train_only

LORA_RANK = 64  # this and the next two as in the paper's baseline
LORA_ALPHA = 64
LORA_DROPOUT = 0.05
MEASURED_UTTERANCES = 64  # tens of thousands of frames: enough for a share
MEASURED_BATCH_SIZE = 8


@dataclass(kw_only=True)
class StudentConfig:
    """The model that is adapted to a language.

    Args:
        init_from: Hub id, folder or `bundled:<name>`.
        adapter: experts adds gated blocks for `decoding.language`; lora adds low-rank updates to the same blocks;
            none trains all weights.
    """

    init_from: str
    adapter: Literal["experts", "lora", "none"] = "experts"


def adapt(student: WhisperForConditionalGeneration, adapter: str, language: str | None) -> Any:
    """Add what is trained, in place, and freeze the rest.

    Returns:
        peft's wrapper of the student with "lora", else None.

    Raises:
        ValueError: experts without a language, or peft is not installed.
    """
    if adapter == "experts":
        if language is None:
            raise ValueError("student.adapter=experts needs decoding.language: experts belong to one")
        add_experts(student, [language])
        train_only(student, language)
    elif adapter == "lora":
        try:
            import peft
        except ImportError as error:
            raise ValueError('student.adapter=lora needs peft: pip install "speechkd[lora]"') from error
        options = {"r": LORA_RANK, "lora_alpha": LORA_ALPHA, "lora_dropout": LORA_DROPOUT}
        return peft.get_peft_model(student, peft.LoraConfig(target_modules=["fc1", "fc2"], **options))
    return None


def save_adapter(
    student: WhisperForConditionalGeneration,
    wrapper: Any,
    adapter: str,
    *,
    language: str | None,
    base: dict[str, Any],
    output_dir: Path,
    open_shares: Callable[[], list[float]],
) -> WhisperForConditionalGeneration:
    """Save what was added to the base model, and merge both to a stock Whisper.

    Merged LoRA is exact. Merged experts are not: see `merged_whisper`; the shares behind it go to `gates.json`.

    Args:
        student: as `adapt` left it, trained.
        wrapper: what `adapt` returned.
        adapter: its kind.
        language: of the experts.
        base: identity of the model before `adapt`.
        output_dir: run folder; gets `experts/` or `lora/`.
        open_shares: measures the share of open gates per layer.

    Returns:
        The stock Whisper.
    """
    if adapter == "lora":
        wrapper.save_pretrained(output_dir / "lora")
        return wrapper.merge_and_unload()
    if adapter == "none" or language is None:
        return student
    save_experts(student, output_dir / "experts", language, base)
    shares = open_shares()
    depth = student.config.encoder_layers
    write_json(output_dir / "gates.json", {"open_shares": {"encoder": shares[:depth], "decoder": shares[depth:]}})
    return merged_whisper(student, language, shares)


@torch.no_grad()
def measure_open_shares(
    student: WhisperForConditionalGeneration,
    dataset: Dataset,
    collate: Callable[[Sequence[Any]], dict[str, Any]],
    log_mel: WhisperLogMel,
) -> list[float]:
    """Share of the tokens of some utterances, spread over the data, whose gate is open; one per layer, encoder first.

    The decoder sees the labels, as in training.
    """
    num_items = len(dataset)  # type: ignore[arg-type]
    chosen = np.unique(np.linspace(0, num_items - 1, min(num_items, MEASURED_UTTERANCES)).astype(int)).tolist()
    student.eval()
    batches = [chosen[start : start + MEASURED_BATCH_SIZE] for start in range(0, len(chosen), MEASURED_BATCH_SIZE)]
    totals = []
    for indices in tqdm(batches, desc="gates", unit="batch"):
        batch = collate([dataset[index] for index in indices])
        batch = {name: value.to(student.device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
        features = log_mel(pcm16_to_float(batch["waveforms"]))
        student(input_features=features, decoder_input_ids=batch["decoder_input_ids"], use_cache=False)
        valid_frames = frame_mask(batch["num_samples"], student.config.max_source_positions)
        totals.append(torch.stack(gate_totals(student, valid_frames, batch["labels"] >= 0)))
    sums, counts = torch.stack(totals).sum(dim=0)
    return (sums / counts).tolist()
