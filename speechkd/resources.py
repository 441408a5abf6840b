"""What a benchmark reads off the machine: time, memory, and room on the disk."""

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from transformers.utils import cached_file

from speechkd.teachers import resolve_model

CLEAR_REFS = Path("/proc/self/clear_refs")


def size_bytes(name: str) -> int:
    """All files of a model's folder; of a Hub id, those that were downloaded."""
    folder = Path(resolve_model(name))
    if not folder.is_dir():
        folder = Path(str(cached_file(str(folder), "config.json"))).parent
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def peak_megabytes(step: Callable[[], None], device: torch.device) -> float | None:
    """Most memory that a call takes beyond what is held before it; resident set on a CPU, None where it is unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    resident = resident_bytes()
    if resident is None:
        return None
    step()
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return (peak - resident) / 1e6


def resident_bytes() -> int | None:
    """Resident set of the process, which becomes its peak too; None where it is unknown."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or what an earlier model freed would be used again and not be seen
        CLEAR_REFS.write_text("5")  # the peak becomes the present value
    except (OSError, AttributeError, TypeError):  # no Linux, or another C library
        return None
    return psutil.Process().memory_info().rss


def now(device: torch.device) -> float:
    """Seconds on a clock that only rises, once all that was sent to a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
