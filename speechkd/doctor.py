"""What this machine is good for: versions, devices, arithmetic, and whether a configuration or a manifest is sound."""

import importlib.metadata
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = ("torch", "torchaudio", "transformers", "datasets", "accelerate", "jiwer", "soundfile", "jsonargparse")
OPTIONAL_PACKAGES = (
    "tensorboard",
    "wandb",
    "ray",
    "ctranslate2",
    "onnxruntime",
    "speechbrain",
    "sentence-transformers",
    "open_clip_torch",
)
MIN_FREE_DISK_GB = 5.0


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
    return f"{model}, {num_cores()} cores"


def made_on(device: torch.device | str = "cpu") -> dict[str, str]:
    """`device`, `date` and `speechkd_version` of a result, for its JSON file."""
    return {
        "device": hardware_name(device),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "speechkd_version": importlib.metadata.version("speechkd"),
    }


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def matmul_gflops(dtype: torch.dtype, device: torch.device | str = "cpu", size: int = 512) -> float:
    """Measured speed of a square matrix product in GFLOP/s, at most half a second long."""
    a = torch.randn(size, size, device=device).to(dtype)
    seconds = _mean_seconds(lambda: a @ a, device)
    return 2 * size**3 / seconds / 1e9


def autocast_speedup(device: torch.device | str = "cpu") -> float:
    """How many times as fast forward and backward of two linear layers are under bfloat16 autocast as in float32."""
    layers = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 256)).to(device)
    inputs = torch.randn(256, 256, device=device)

    def step(enabled: bool) -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled):
            loss = layers(inputs).float().sum()
        loss.backward()

    return _mean_seconds(lambda: step(False), device) / _mean_seconds(lambda: step(True), device)


def _mean_seconds(work: Callable[[], Any], device: torch.device | str) -> float:
    def run() -> None:
        work()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)

    run()  # the first call chooses kernels
    count, started = 0, time.perf_counter()
    while count < 3 or (time.perf_counter() - started < 0.2 and count < 1000):
        run()
        count += 1
        if time.perf_counter() - started > 0.5:
            break
    return (time.perf_counter() - started) / count


def examine(manifest: str | None = None, config: str | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Facts and advice about this machine, and whether a training would run on it.

    Args:
        manifest: also validate this manifest.
        config: also check this recipe configuration, without training; see `speechkd.check_config`.
        overrides: `--section.key value` arguments that go with it.

    Returns:
        JSON-serialisable facts in GB = 1e9 bytes. `problems` are sentences on what would end a run or spoil its result,
        `advice` is the rest that is worth knowing; both may be empty.

    Raises:
        ValueError: overrides without a configuration.
    """
    if overrides and config is None:
        raise ValueError(f"{' '.join(overrides)}: settings belong to a configuration; add --config FILE")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    speeds = {name: matmul_gflops(getattr(torch, name), device) for name in ("float32", "bfloat16", "float16")}
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES + OPTIONAL_PACKAGES},
        "device": hardware_name(device),
        "devices": _devices(),
        "cores": num_cores(),
        "memory": memory_gb(),
        "matmul_gflops": {name: round(speed, 1) for name, speed in speeds.items()},
        "precision": {
            "tf32": "off" if torch.get_float32_matmul_precision() == "highest" else "on",
            "bfloat16_autocast_speedup": round(autocast_speedup(device), 3),
        },
        "output_dir": ".",
        "free_disk_gb": free_disk_gb("."),
        "caches": _caches(),
        "problems": [],
        "advice": _precision_advice(device, speeds["bfloat16"] / speeds["float32"]),
    }
    from speechkd.check_config import check_config, check_manifest

    if manifest is not None:
        facts["manifest"], problems, advice = check_manifest(manifest)
        facts["problems"] += problems
        facts["advice"] += advice
    if config is not None:
        checked = check_config(config, overrides)
        facts["problems"] += checked.pop("problems")
        facts["advice"] += checked.pop("advice")
        facts.update(checked)
    if facts["free_disk_gb"] < MIN_FREE_DISK_GB:
        facts["advice"].append(
            f"only {facts['free_disk_gb']} GB of disk are free; cached encoder states take 1.5 MB a clip"
        )
    facts.update({name: facts.pop(name) for name in ("problems", "advice")})  # read last, printed last
    return facts


def report_lines(facts: dict[str, Any]) -> Iterator[str]:
    """The facts of `examine` for people: a line each, under their sections, named as in the JSON."""
    for name, value in facts.items():
        if isinstance(value, dict):
            yield f"{name}:"
            yield from (f"  {key}: {_readable(item)}" for key, item in value.items())
        elif isinstance(value, list):
            yield f"{name}:" if value else f"{name}: none"
            yield from (f"  - {item}" for item in value)
        else:
            yield f"{name}: {_readable(value)}"


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_readable(item)}" for key, item in value.items())
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def free_disk_gb(folder: str | Path) -> float:
    """Free space where a folder is, or would be."""
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    return round(shutil.disk_usage(path).free / 1e9, 1)


def memory_gb() -> dict[str, float]:
    """Total and free memory of this machine, or of the container where that is less."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    group = Path("/sys/fs/cgroup")
    try:  # "max" where there is no limit
        limit = int((group / "memory.max").read_text())
        total, free = min(total, limit), min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return {"total_gb": round(total / 1e9, 2), "free_gb": round(free / 1e9, 2)}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, Any]:
    devices: dict[str, Any] = {"cpu": {"name": hardware_name(), "memory_gb": memory_gb()["total_gb"]}}
    driver = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module(?: for \S+)?\s+([\d.]+)", driver.read_text()) if driver.is_file() else None
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = {
            "name": properties.name,
            "memory_gb": round(properties.total_memory / 1e9, 2),
            "free_gb": round(torch.cuda.mem_get_info(index)[0] / 1e9, 2),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "driver": found[1] if found else "unknown",
        }
    devices["cuda_of_torch"] = torch.version.cuda or "none, this is a CPU build"
    return devices


def _caches() -> dict[str, dict[str, Any]]:
    import datasets
    from huggingface_hub.constants import HF_HOME

    from speechkd.bundled import cache_folder

    folders = {
        "hf_home": HF_HOME,
        "datasets": datasets.config.HF_DATASETS_CACHE,
        "torch": torch.hub.get_dir(),
        "bundled_teachers": cache_folder(),
    }
    return {
        name: {"path": str(folder), "used_gb": round(_used_bytes(folder) / 1e9, 2), "free_gb": free_disk_gb(folder)}
        for name, folder in folders.items()
    }


def _used_bytes(folder: str | Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:  # a link of the Hub's cache counts where its file is; another process may remove files meanwhile
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _precision_advice(device: str, bfloat16_speedup: float) -> list[str]:
    if device == "cuda":
        return [f"bfloat16 is {bfloat16_speedup:.1f} times as fast as float32 here; train with --trainer.bf16 true"]
    if bfloat16_speedup < 1:
        return [
            f"this processor multiplies bfloat16 {1 / bfloat16_speedup:.0f} times slower than float32; keep float32, "
            "the CPU default"
        ]
    return [
        f"this processor multiplies bfloat16 {bfloat16_speedup:.1f} times as fast as float32; a CPU run stays in "
        "float32 all the same, so that its numbers are those of any other machine"
    ]
