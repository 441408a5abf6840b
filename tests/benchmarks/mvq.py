"""Claims of the MVQ recipe, as ratios in one run: a training step with stored codes against one with the live teacher.

Launch: python tests/benchmarks/mvq.py [--manifest FILE]. Real weights of the teacher on real clips, or on random audio,
on which steps take as long; the quantizer is fitted for a few steps only, which changes its codes and not its costs.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import median_seconds, peak_extra_mib, pin_allocator, write_measurements

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes/mvq"))

from recognition_corpora import collate_recognition  # noqa: E402
from recognition_objective import LossConfig, count_items, loss_terms, make_head  # noqa: E402
from teacher_targets import Distillation, FrameAlignment, Targets, layer_of_clips  # noqa: E402

from speechkd.data.audio import load_utterance  # noqa: E402
from speechkd.data.features import SAMPLE_RATE_HZ  # noqa: E402
from speechkd.data.hub import read_utterances  # noqa: E402
from speechkd.doctor import hardware_name  # noqa: E402
from speechkd.frame_encoders import FrameEncoder, load_frame_encoder  # noqa: E402
from speechkd.models.quantizer import Quantizer  # noqa: E402
from speechkd.models.quantizer_fit import FitConfig, fit  # noqa: E402
from speechkd.models.recognizer import (  # noqa: E402
    BUDGETS,
    DistilledRecognizer,
    RecognizerConfig,
    RecognizerInputs,
    RecognizerModel,
)

TEACHER, LAYER, NUM_SYMBOLS, BATCH_CLIPS = "bundled:whisper-base", 5, 28, 8
QUICK = FitConfig(bytes_per_frame=8, phase1_steps=20, phase2_steps=20)
Step = Callable[[], float]


def random_clips(number: int) -> list[dict[str, Any]]:
    """Noise of 2 to 8 s."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2 * SAMPLE_RATE_HZ, 8 * SAMPLE_RATE_HZ, (number,), generator=generator).tolist()
    return [
        {"id": str(index), "waveform": torch.randint(-3000, 3000, (length,), generator=generator, dtype=torch.int16)}
        for index, length in enumerate(lengths)
    ]


def real_clips(number: int, manifest: str) -> list[dict[str, Any]]:
    """The first clips of a manifest."""
    utterances = read_utterances(manifest)
    return [
        {"id": utterances.ids[index], "waveform": load_utterance(utterances[index], SAMPLE_RATE_HZ, torch.int16)}
        for index in range(min(number, len(utterances)))
    ]


def items_of(clips: list[dict[str, Any]], config: RecognizerConfig) -> list[dict[str, Any]]:
    """What the recipe's data set gives, with random symbols, two a second."""
    generator = torch.Generator().manual_seed(1)
    items = []
    for clip in clips:
        seconds = len(clip["waveform"]) / SAMPLE_RATE_HZ
        target = torch.randint(1, NUM_SYMBOLS + 1, (max(1, round(2 * seconds)),), generator=generator)
        num_frames = int(config.num_frames(torch.tensor([len(clip["waveform"])])))
        items.append({**clip, "duration_seconds": seconds, "num_frames": num_frames, "target": target, "epoch": 0})
    return items


def targets_of(encoder: FrameEncoder, quantizer: Quantizer | None, config: RecognizerConfig) -> Targets:
    """A live teacher."""
    return Targets(
        teacher=encoder.identity,
        alignment=FrameAlignment(encoder.frames_per_second, config.frame_rate_hz),
        store=None,
        encoder=encoder,
        layer=LAYER,
        quantizer=quantizer,
        width=encoder.width,
    )


def recipe_step(
    kd: Distillation,
    targets: Targets | None,
    items: list[dict[str, Any]],
    config: RecognizerConfig,
    device: torch.device,
    *,
    stored: bool,
) -> Step:
    """Loss and gradients of all batches, as the recipe computes them; returns the loss of a frame."""
    torch.manual_seed(0)
    weights = LossConfig(kd=kd)
    student = DistilledRecognizer(RecognizerModel(config), make_head(weights, config.width, targets)).to(device)
    inputs = RecognizerInputs(config.num_mels).to(device)
    batches = []
    for start in range(0, len(items), BATCH_CLIPS):
        batch = collate_recognition(items[start : start + BATCH_CLIPS])
        batch["waveforms"] = batch["waveforms"].to(device)
        if targets is not None and stored:
            waveforms = batch["waveforms"].float() / 32768
            batch |= targets.live(waveforms, batch["num_samples"], batch["num_frames"])
        batches.append(batch)
    live = targets if targets is not None and not stored else None

    def step() -> float:
        total = 0.0
        for batch in batches:
            loss, _ = loss_terms(student, None, batch, weights=weights, inputs=inputs, live=live)
            loss.backward()
            student.zero_grad()
            total += loss.item()
        return total / sum(int(count_items(batch)) for batch in batches)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of a training step of MVQ at 8 clips.")
    parser.add_argument("--manifest", help="real clips; random audio if not given")
    parser.add_argument("--teacher", default=TEACHER, help="speech encoder")
    parser.add_argument("--size", default="tiny", choices=list(BUDGETS), help="of the student")
    parser.add_argument("--num-batches", type=int, default=2, help="batches per measurement")
    parser.add_argument("--num-rounds", type=int, default=3, help="measurements of each step")
    parser.add_argument("--output", type=Path, help="also write the numbers here, as JSON")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(hardware_name(device))
    number = BATCH_CLIPS * arguments.num_batches
    clips = real_clips(number, arguments.manifest) if arguments.manifest else random_clips(number)
    config = RecognizerConfig(num_symbols=NUM_SYMBOLS, dropout=0.0, **BUDGETS[arguments.size])
    items = items_of(clips, config)
    longest = max(item["duration_seconds"] for item in items)
    whole = load_frame_encoder(arguments.teacher, layers=[LAYER], device=device)
    with torch.no_grad():
        states = [layer_of_clips(whole, [item["waveform"].to(device) / 32768], device)[0] for item in items]
    quantizer = fit(torch.cat(states), QUICK)[0]
    codes, regression = targets_of(whole, quantizer, config), targets_of(whole, None, config)
    steps: dict[str, Step] = {
        "no teacher": recipe_step("none", None, items, config, device, stored=True),
        "stored codes": recipe_step("mvq", codes, items, config, device, stored=True),
        "stored float16 states": recipe_step("l2", regression, items, config, device, stored=True),
        "live teacher, codes": recipe_step("mvq", codes, items, config, device, stored=False),
        "live teacher, states": recipe_step("l2", regression, items, config, device, stored=False),
    }
    if whole.max_seconds <= 30:  # a Whisper, which hears 30 s of every clip
        cut = load_frame_encoder(arguments.teacher, layers=[LAYER], window_seconds=int(longest) + 1, device=device)
        name = f"live teacher with a window of {int(longest) + 1} s, codes"
        steps[name] = recipe_step("mvq", targets_of(cut, quantizer, config), items, config, device, stored=False)
    losses = {name: one() for name, one in steps.items()}
    for name, loss in losses.items():
        print(f"loss of a frame, {name}: {loss:.6f}", flush=True)  # a CPU needs minutes for the times
    seconds = median_seconds(steps, arguments.num_rounds)
    memory = {name: peak_extra_mib(one) for name, one in steps.items()}
    stored_seconds = seconds["stored codes"]
    rows = [
        {
            "step": name,
            "times_stored_codes": value / stored_seconds,
            "processor_seconds": value / arguments.num_batches,
            "loss_of_a_frame": losses[name],
            "extra_memory_MiB": memory[name],
        }
        for name, value in seconds.items()
    ]
    if arguments.output is not None:
        write_measurements(
            arguments.output,
            rows,
            clips_per_step=BATCH_CLIPS,
            audio_seconds_per_step=sum(item["duration_seconds"] for item in items) / arguments.num_batches,
            teacher=arguments.teacher,
            layer=LAYER,
            student=arguments.size,
        )
    for row in rows:
        print(
            f"{row['step']}: {row['times_stored_codes']:.2f} times the time of stored codes "
            f"({row['processor_seconds']:.2f} s a batch), {row['extra_memory_MiB']:.0f} MiB above the models"
        )


if __name__ == "__main__":
    pin_allocator()
    main()
