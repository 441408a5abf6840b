"""What the tests of several recipes share: small encoders, clips of noise, `run.sh`, and what a run leaves."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_models_distilhubert import make_teacher

from speechkd.data.manifest import write_manifest
from speechkd.models.speech_encoders import save_encoder

QUIET = dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0)


def saved_teacher(folder: Path, family: str, normalize_input: bool = False, **changes: Any) -> str:
    """Folder of a random encoder of width 32 with four layers; a Whisper hears 2 s."""
    save_encoder(make_teacher(family, **changes), folder, normalize_input=normalize_input)
    return str(folder)


def write_clips(folder: Path, num_samples: list[int], name: str = "clips") -> Path:
    """A manifest of noise of these lengths at 16 kHz."""
    generator, rows = np.random.default_rng(0), []
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    for index, length in enumerate(num_samples):
        path = folder / f"audio/{name}-{index}.wav"
        soundfile.write(path, generator.uniform(-0.3, 0.3, length), 16_000)
        row = {"id": f"{name}-{index}", "audio": f"audio/{path.name}", "duration_seconds": length / 16_000}
        rows.append({**row, "sample_rate_hz": 16_000})
    write_manifest(folder / f"{name}.jsonl", rows)
    return folder / f"{name}.jsonl"


def run_sh(
    recipe: str, folder: Path, *words: str, first_on_path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`run.sh` of a recipe, called in this folder."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    path = path if first_on_path is None else f"{first_on_path}:{path}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PATH": path}
    command = ["bash", str(ROOT / "recipes" / recipe / "run.sh"), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def facts_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def log_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]


def student_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student/model.safetensors")


def forget_the_end(run: Path, last_step: int) -> None:
    """Leave a finished run as if it had been killed after the checkpoint before the last."""
    shutil.rmtree(run / f"checkpoint-{last_step}")
    shutil.rmtree(run / "student")
    (run / "run.json").unlink()
