"""Time and peak memory of functions that take turns in one process."""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from speechkd.doctor import hardware_name


def pin_allocator() -> None:
    """Start this script again with large buffers mapped one by one, so that freed memory leaves the resident set."""
    if os.environ.get("MALLOC_MMAP_THRESHOLD_") is None:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
        os.execv(sys.executable, [sys.executable, *sys.argv])


def median_seconds(
    steps: dict[str, Callable[[], None]], rounds: int = 5, clock: Callable[[], float] | None = None
) -> dict[str, float]:
    """Median seconds of each, after a round to warm up: wall time on a GPU, processor time of all threads on a CPU.

    Args:
        steps: what is measured, in turns.
        rounds: how often each is measured.
        clock: another one, such as `time.perf_counter` for wall time on a CPU too.
    """
    clock = clock or (time.perf_counter if torch.cuda.is_available() else time.process_time)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(rounds + 1):
        for name, step in steps.items():
            _synchronize()
            started = clock()
            step()
            _synchronize()
            if round_number:
                times[name].append(clock() - started)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def peak_extra_mib(step: Callable[[], None]) -> float:
    """Most memory that was held above what was held before, in MiB; resident set on a CPU, allocated on a GPU."""
    step()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present value
    before = _status_kib("VmRSS")
    step()
    return (_status_kib("VmHWM") - before) / 2**10


def write_measurements(path: Path, measurements: list[dict[str, Any]], **facts: Any) -> None:
    """JSON for recipes/distil_whisper/tabulate_results.py: rows of a table, and what follows it."""
    content = {
        "measurements": measurements,
        **facts,
        "command": " ".join(["python", *sys.argv]),
        "hardware": hardware_name(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
