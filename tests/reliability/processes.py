"""Processes that the reliability tests start, kill and wait for, and what a finished run is compared by."""

import atexit
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from conftest import ROOT, write_tone

from speechkd.data.manifest import write_manifest
from speechkd.labels.teacher_cache import LabelStore

TIMEOUT_SECONDS = 300  # far above what anything takes; other jobs may have the processors
YAML = ROOT / "recipes/distil_whisper/quickstart.yaml"


class Process:
    """One command in a process group of its own."""

    def __init__(self, server: "ForkServer", pid: int, log: Path, log_start: int) -> None:
        self.server, self.pid, self.log, self.log_start = server, pid, log, log_start
        self.started_at = time.time()

    def is_running(self) -> bool:
        """Whether it has not ended by itself."""
        status = Path(f"/proc/{self.pid}/stat").read_text()  # its server has not waited for it, so it is there
        return status.rpartition(")")[2].split()[0] != "Z"

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Wait for something that the process does; it may not end before that."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not happened():
            assert self.is_running() and time.monotonic() < deadline, self.output()
            time.sleep(0.005)

    def sleep(self, seconds: float) -> bool:
        """Wait, at most until the process ends; whether it still runs."""
        end = time.monotonic() + seconds
        while self.is_running():
            left = end - time.monotonic()
            if left <= 0:
                return True
            time.sleep(min(left, 0.01))
        return False

    def send(self, number: signal.Signals, whole_group: bool = False) -> None:
        """Signal the process, or it and its workers."""
        (os.killpg if whole_group else os.kill)(self.pid, number)

    def wait(self) -> int:
        """Exit code, or the negative number of the signal that ended it."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while self.is_running():
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL, whole_group=True)
                raise AssertionError(f"still running after {TIMEOUT_SECONDS} s: {self.output()}")
            time.sleep(0.005)
        return int(self.server.ask(["wait", self.pid]))

    def output(self) -> str:
        """What it has logged and printed, stdout and stderr."""
        if not self.log.exists():
            return ""
        with self.log.open(encoding="utf-8", errors="replace") as file:
            file.seek(self.log_start)
            return file.read()


class ForkServer:
    """A running `fork_server.py`."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # the tensors are tiny
        )
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, request: list) -> str:
        """Send one request and read its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        return self._answer()

    def start(self, command: str, argv: list[str], log: Path) -> Process:
        """Start one of the commands of `fork_server.py`; its output is appended to `log`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        log_start = log.stat().st_size if log.exists() else 0
        return Process(self, int(self.ask([command, argv, str(log)])), log, log_start)

    def run(self, command: str, argv: list[str], log: Path) -> tuple[int, str]:
        """Exit code and output of a command that is left alone."""
        process = self.start(command, argv, log)
        return process.wait(), process.output()

    def close(self) -> None:
        """End the server; its children are expected to have ended."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=TIMEOUT_SECONDS)


@cache
def fork_server() -> ForkServer:
    """The one server of all test modules, which ends with pytest."""
    server = ForkServer()
    atexit.register(server.close)
    return server


def write_corpus(folder: Path, num_clips: int, seconds: float = 1.0, suffix: str = "wav") -> Path:
    """Tones of different pitch and length with texts; the path of their manifest."""
    rows = []
    for index in range(num_clips):
        duration_seconds = seconds + 0.02 * index
        name = f"audio/{index:03d}.{suffix}"
        write_tone(folder / name, duration_seconds, pitch_hz=150 + 10 * index)
        row = {"id": f"tone-{index:03d}", "audio": name, "duration_seconds": duration_seconds}
        rows.append({**row, "sample_rate_hz": 16_000, "text": f"tone number {index}"})
    write_manifest(folder / "tones.jsonl", rows)
    return folder / "tones.jsonl"


def train_arguments(teacher: str, manifest: Path, run_dir: Path, labels_dir: Path | None, **more: object) -> list[str]:
    """Command line of a small distillation; without labels, of a fine-tuning on the manifest's text."""
    options: dict[str, object] = {
        "data.train_manifest": manifest,
        "data.test_manifest": manifest,
        "data.max_batch_seconds": 60,
        "filters.max_wer": "null",
        "filters.min_mean_logprob": "null",
        "filters.max_compression_ratio": "null",
        "filters.max_repeated_5grams": "null",
        "filters.drop_unfinished": "false",  # a random teacher never ends
        "student.decoder_layers": 2,
        "trainer.output_dir": run_dir,
        "trainer.max_steps": 12,
        "trainer.save_steps": 3,
        "trainer.logging_steps": 1,
        "trainer.learning_rate": 1e-3,
        "trainer.use_cpu": "true",
        "trainer.report_to": "none",
        "trainer.disable_tqdm": "true",
    }
    if labels_dir is None:
        options |= {"teacher": "null", "data.labels_dir": "null", "student.init_from": teacher, "loss.kl": 0}
    else:
        options |= {
            "teacher.name": teacher,
            "data.labels_dir": labels_dir,
            "teacher.cache_encoder_states": "false",  # decode audio
        }
    options |= more
    return ["--config", str(YAML), *(f"--{key}={value}" for key, value in options.items())]


def label_arguments(teacher: str, manifest: Path, output_dir: Path, *more: str) -> list[str]:
    """Command line that labels a manifest."""
    argv = ["--teacher", teacher, "--manifest", str(manifest), "--output-dir", str(output_dir)]
    return [*argv, "--max-new-tokens", "12", "--batch-size", "2", "--device", "cpu", *more]


def result_of_training(run_dir: Path) -> dict[str, object]:
    """Contents of all files of the student, as digests, and the facts of `run.json`; without the date."""
    facts = json.loads((run_dir / "run.json").read_text())
    date = facts.pop("date")
    contents = {path.name: path.read_bytes() for path in (run_dir / "student").iterdir()}
    contents["README.md"] = contents["README.md"].replace(date.encode(), b"")
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()} | {"run.json": facts}


def labels_by_id(labels_dir: Path) -> dict[str, dict]:
    """What a finished label store says of each utterance, without the times; each is in it once."""
    rows = list(LabelStore(labels_dir).rows())
    labels = {row.pop("id"): row for row in rows}
    assert len(labels) == len(rows)
    return {key: {name: row[name] for name in row if name != "compute_seconds"} for key, row in labels.items()}


def complete_steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints that are marked as complete."""
    return sorted(int(path.parent.name.partition("-")[2]) for path in run_dir.glob("checkpoint-*/complete.json"))


def is_saving(run_dir: Path, since: float) -> bool:
    """Whether a checkpoint is half written that was begun after this time, in seconds since the epoch."""
    for folder in run_dir.glob("checkpoint-*"):
        try:
            if not (folder / "complete.json").exists() and folder.stat().st_mtime >= since:
                return True
        except FileNotFoundError:  # an old one, deleted in between
            continue
    return False


def last_logged_step(run_dir: Path) -> int:
    """The last step in `train_log.jsonl`; 0 where there is none."""
    log = run_dir / "train_log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def teacher_with_dropout(teacher: str, folder: Path) -> str:
    """A copy of a teacher whose students drop out, so that a resumed run needs the random state of the one before."""
    shutil.copytree(teacher, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dropout": 0.1}))
    return str(folder)
