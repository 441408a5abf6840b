"""What this machine is good for: versions, devices, arithmetic, and whether a configuration or a manifest is sound."""

import importlib.metadata
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "torchaudio", "transformers", "datasets", "accelerate", "jiwer", "soundfile", "jsonargparse")


def hardware_name(device: torch.device | str = "cpu") -> str:
    """The GPU, or the processor and its cores."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"


def matmul_gflops(dtype: torch.dtype, device: torch.device | str = "cpu", size: int = 512) -> float:
    """Measured speed of a square matrix product in GFLOP/s, at most half a second long."""
    a = torch.randn(size, size, device=device).to(dtype)
    _ = a @ a
    count, started = 0, time.perf_counter()
    while count < 3 or (time.perf_counter() - started < 0.2 and count < 1000):
        _ = a @ a
        if a.is_cuda:
            torch.cuda.synchronize()
        count += 1
        if time.perf_counter() - started > 0.5:
            break
    return 2 * size**3 * count / (time.perf_counter() - started) / 1e9


def examine(manifest: str | None = None) -> dict[str, Any]:
    """Facts and advice about this machine.

    Args:
        manifest: also validate this manifest.

    Returns:
        JSON-serialisable facts; `advice` is a list of sentences.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    speeds = {name: matmul_gflops(getattr(torch, name), device) for name in ("float32", "bfloat16")}
    ratio = speeds["float32"] / speeds["bfloat16"]
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "device": hardware_name(device),
        "matmul_gflops": {name: round(speed, 1) for name, speed in speeds.items()},
        "free_disk_gb": round(shutil.disk_usage(".").free / 1e9, 1),
        "advice": [],
    }
    if device == "cpu" and ratio > 1:
        facts["advice"].append(
            f"this processor multiplies bfloat16 {ratio:.0f} times slower than float32; keep float32, the CPU default"
        )
    elif device == "cpu":
        facts["advice"].append(
            f"this processor multiplies bfloat16 {1 / ratio:.1f} times as fast as float32; a CPU run stays in float32 "
            "all the same, so that its numbers are those of any other machine"
        )
    elif device == "cuda":
        facts["advice"].append(
            f"bfloat16 is {1 / ratio:.1f} times as fast as float32 here; train with --trainer.bf16 true"
        )
    if facts["free_disk_gb"] < 5:
        facts["advice"].append(
            f"only {facts['free_disk_gb']} GB of disk are free; cached encoder states take 1.5 MB a clip"
        )
    if manifest is not None:
        from speechkd.data.manifest import read_manifest

        utterances = read_manifest(manifest)
        seconds = utterances.durations_seconds
        facts["manifest"] = {
            "path": str(utterances.path),
            "num_utterances": len(utterances),
            "hours": round(float(seconds.sum()) / 3600, 3),
            "longest_seconds": round(float(seconds.max()), 2),
        }
        if seconds.max() > 30:
            facts["advice"].append(
                f"{int((seconds > 30).sum())} utterances are longer than Whisper's 30 s and will be skipped; cut them"
            )
    return facts
