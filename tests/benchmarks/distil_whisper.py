"""Claims of the Distil-Whisper recipe, as ratios in one run. Launch: python tests/benchmarks/distil_whisper.py

Real weights (bundled:whisper-base), random audio: time does not depend on what is said.
"""

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from measure import median_seconds, peak_extra_mib, pin_allocator
from torch import Tensor
from transformers import WhisperForConditionalGeneration

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes/distil_whisper"))

from train import LossConfig, loss_terms  # noqa: E402

from speechkd.data.features import WhisperLogMel  # noqa: E402
from speechkd.doctor import hardware_name  # noqa: E402
from speechkd.losses.logits import hinton_kd  # noqa: E402
from speechkd.metrics.latency import decode_seconds_per_token  # noqa: E402
from speechkd.models.whisper import freeze_student, student_from_teacher  # noqa: E402
from speechkd.teachers import load_whisper  # noqa: E402

NUM_CLIPS, NUM_TOKENS, NUM_ROUNDS = 8, 32, 3


def training_step(
    student: WhisperForConditionalGeneration, teacher: WhisperForConditionalGeneration | None, *, cached: bool
) -> Callable[[], None]:
    """Forward and backward of one batch, with the encoder's output at hand or with the encoder run."""
    labels = torch.randint(0, 50_000, (NUM_CLIPS, NUM_TOKENS))
    batch = {"labels": labels, "decoder_input_ids": labels.roll(1, dims=1)}
    batch |= {"encoder_states": torch.randn(NUM_CLIPS, 1500, 512)} if cached else {"waveforms": torch.randn(8, 80_000)}
    log_mel = WhisperLogMel()

    def step() -> None:
        weights = LossConfig(kl=1.0 if teacher is not None else 0.0)
        total, _ = loss_terms(
            student, teacher, batch, weights=weights, log_mel=log_mel, shared_encoder=student.model.encoder
        )
        total.backward()
        student.zero_grad()

    return step


def plain_step(
    student: WhisperForConditionalGeneration, teacher: WhisperForConditionalGeneration
) -> Callable[[], None]:
    """The same step from full logits of both models."""
    labels = torch.randint(0, 50_000, (NUM_CLIPS, NUM_TOKENS))
    states = (torch.randn(NUM_CLIPS, 1500, 512),)

    def logits(model: WhisperForConditionalGeneration) -> Tensor:
        return model(encoder_outputs=states, decoder_input_ids=labels.roll(1, dims=1), use_cache=False).logits

    def step() -> None:
        with torch.no_grad():
            teacher_logits = logits(teacher)
        loss = hinton_kd(
            logits(student),
            teacher_logits,
            labels=labels,
            temperature=2.0,
            label_weight=0.8,
            kd_weight=1.0,
            reduction="sum",
        )
        loss.backward()
        student.zero_grad()

    return step


def main() -> None:
    teacher = load_whisper("bundled:whisper-base")
    student = student_from_teacher(teacher, decoder_layers=2)
    freeze_student(student)
    print(hardware_name())
    for batch_size in (1, 8):
        states = torch.randn(batch_size, 1500, 512)
        slow, fast = decode_seconds_per_token([teacher, student], states)
        print(f"decode, batch {batch_size}: 2 layers are {slow / fast:.2f} times as fast per token as 6")
    steps = {
        "cached states": training_step(student, teacher, cached=True),
        "cached states, full logits": plain_step(student, teacher),
        "live encoder": training_step(student, teacher, cached=False),
        "cached states, no teacher": training_step(student, None, cached=True),
    }
    seconds, memory = median_seconds(steps, NUM_ROUNDS), {name: peak_extra_mib(step) for name, step in steps.items()}
    base = seconds["cached states"]
    for name, value in seconds.items():
        print(
            f"training step, {name}: {value / base:.2f} of the time with cached states ({value:.2f} processor s), "
            f"{memory[name]:.0f} MiB above the models"
        )


if __name__ == "__main__":
    pin_allocator()
    logging.getLogger("transformers.generation").setLevel(logging.ERROR)  # it repeats that max_new_tokens wins
    main()
