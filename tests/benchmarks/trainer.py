"""What the trainer costs beside a bare loop, and what two processes gain. Launch: python tests/benchmarks/trainer.py

The step is that of the Distil-Whisper recipe: bundled:whisper-base, two decoder layers kept, cached encoder states, all
batches ready in memory. Bare loop: forward, backward, clipping, AdamW, schedule. Target: at most 3 % more time a step.
Two processes share the cores that one has alone, at the same global batch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback, get_linear_schedule_with_warmup

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "recipes/distil_whisper"), str(ROOT / "tests")]

from train import LossConfig, count_items, loss_terms  # noqa: E402

from speechkd.arguments import DistillationArguments  # noqa: E402
from speechkd.data.collate import WhisperTokens, collate_labels  # noqa: E402
from speechkd.data.features import WhisperLogMel  # noqa: E402
from speechkd.doctor import hardware_name  # noqa: E402
from speechkd.models.whisper import freeze_student, student_from_teacher  # noqa: E402
from speechkd.teachers import load_processor, load_whisper  # noqa: E402
from speechkd.trainer import DistillationTrainer  # noqa: E402

TEACHER = "bundled:whisper-base"
STEPS, WARM_UP_STEPS, ROUNDS = 12, 3, 3
LEARNING_RATE = 1e-4
SCORING = {"weights": LossConfig(), "log_mel": WhisperLogMel(), "shared_encoder": None}


class ReadyBatches(Dataset):
    """The same few batches again and again, in memory."""

    def __init__(self, batch_size: int) -> None:
        tokens = WhisperTokens.from_tokenizer(load_processor(TEACHER).tokenizer)
        generator = torch.Generator().manual_seed(0)
        self.batches = []
        for number in range(3):
            labels = [[*tokens.prefix, *range(1000 + number, 1020 + number), tokens.end_of_text]] * batch_size
            decoder_input_ids, labels = collate_labels(labels, tokens)
            states = torch.randn(batch_size, 1500, 512, generator=generator)
            batch = {"ids": ["ready"] * batch_size, "decoder_input_ids": decoder_input_ids, "labels": labels}
            self.batches.append({**batch, "encoder_states": states})

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.batches[index % len(self.batches)]


class StepTimes(TrainerCallback):
    """Seconds from one end of a step to the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if self.seconds or hasattr(self, "last"):
            self.seconds.append(now - self.last)
        self.last = now


def only(items: list[Any]) -> Any:
    """The collate function of batches that are made already."""
    return items[0]


def make_models() -> tuple[Any, Any]:
    teacher = load_whisper(TEACHER).requires_grad_(False)
    student = student_from_teacher(teacher, decoder_layers=2)
    freeze_student(student)
    return student.train(), teacher


def trainer_seconds(data: ReadyBatches, folder: str, **arguments: Any) -> list[float]:
    student, teacher = make_models()
    settings = {"max_steps": STEPS, "learning_rate": LEARNING_RATE, "save_strategy": "no", "use_cpu": True}
    settings |= {"report_to": "none", "disable_tqdm": True, "logging_steps": STEPS, "weight_decay": 0.0}
    trainer = DistillationTrainer(
        student,
        teacher,
        args=DistillationArguments(output_dir=folder, **settings, **arguments),
        train_dataset=data,
        collate=only,
        sampler=[[step] for step in range(STEPS)],
        loss_terms=partial(loss_terms, **SCORING),
        count_items=count_items,
    )
    times = StepTimes()
    trainer.add_callback(times)
    trainer.train()
    return times.seconds[WARM_UP_STEPS:]


def bare_seconds(data: ReadyBatches) -> list[float]:
    student, teacher = make_models()
    weights = [weight for weight in student.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    seconds, started = [], time.perf_counter()
    for step in range(STEPS):
        batch = data[step]
        total, _ = loss_terms(student, teacher, batch, **SCORING)
        (total / count_items(batch)).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        now = time.perf_counter()
        seconds.append(now - started)
        started = now
    return seconds[WARM_UP_STEPS + 1 :]


def launch(processes: int, batch_size: int, threads: int) -> float:
    """Median seconds of a step in processes of their own."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"] if processes > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, *launcher, __file__, "--batch-size", str(batch_size), "--worker", folder],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            capture_output=True,
        )
        return float((Path(folder) / "seconds").read_text())


def work(folder: str, batch_size: int) -> None:
    distributed = {"ddp_backend": "gloo"} if int(os.environ.get("WORLD_SIZE", 1)) > 1 else {}
    seconds = statistics.median(trainer_seconds(ReadyBatches(batch_size), folder, **distributed))
    if int(os.environ.get("RANK", 0)) == 0:
        (Path(folder) / "seconds").write_text(str(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", type=Path, help="also write the numbers here, as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.batch_size)
        return
    data = ReadyBatches(arguments.batch_size)
    ours: list[float] = []
    bare: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS):
            bare += bare_seconds(data)
            ours += trainer_seconds(data, folder)
    cores = torch.get_num_threads()
    one, two = launch(1, arguments.batch_size, cores), launch(2, arguments.batch_size // 2, max(cores // 2, 1))
    result = {
        "hardware": hardware_name(),
        "bare_seconds": statistics.median(bare),
        "trainer_seconds": statistics.median(ours),
        "overhead": statistics.median(ours) / statistics.median(bare) - 1,
        "one_process_seconds": one,
        "two_processes_seconds": two,
        "throughput_ratio": one / two,
    }
    for name, value in result.items():
        print(f"{name:24} {value if isinstance(value, str) else f'{value:.4f}'}")
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
