"""Latency of compact encoders at full size: what DistilHuBERT gains over HuBERT Base, and thinner convolutions over it.

Launch: python tests/benchmarks/encoders.py [--seconds 4 15] [--num-rounds 5] [--output FILE]
Random weights and noise, which take as long. One clip at a time, all encoders in turns, wall time. Targets: the 2-layer
student 1.73 times as fast as its teacher, as in the paper, at 0.25 of its size; a thinner one at least 1.5 times as
fast as that, within 1 % of its parameters.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import median_seconds, write_measurements
from transformers import HubertConfig, HubertModel

from speechkd.data.features import SAMPLE_RATE_HZ
from speechkd.doctor import hardware_name
from speechkd.models.distilhubert import compact_encoder

TEACHER, STUDENT = "HuBERT Base, 12 layers", "2 layers"
STUDENTS: dict[str, dict[str, Any]] = {  # arguments of compact_encoder, options of the recipe's student
    STUDENT: {"num_layers": 2},
    "3 layers, 256 channels, FFN 2256": {"num_layers": 3, "conv_dim": 256, "intermediate_size": 2256},
    "2 layers, 256 channels, FFN 4160": {"num_layers": 2, "conv_dim": 256, "intermediate_size": 4160},
    "2 layers, 128-256-256-512 channels, FFN 3616": {
        "num_layers": 2,
        "conv_dim": [128, 256, 256, 512, 512, 512, 512],
        "intermediate_size": 3616,
    },
}
FRONT_END = ", front end"


def full_size_encoders(device: torch.device) -> dict[str, Any]:
    """The teacher and its students by name, in eval mode."""
    torch.manual_seed(0)
    teacher = HubertModel(HubertConfig())
    students = {name: compact_encoder(teacher, **arguments) for name, arguments in STUDENTS.items()}
    return {name: model.eval().to(device) for name, model in {TEACHER: teacher, **students}.items()}


def encoder_steps(encoders: dict[str, Any], length_seconds: float) -> dict[str, Callable[[], None]]:
    """A clip of this length through each encoder, and through its convolutions alone."""
    generator = torch.Generator().manual_seed(0)
    waveform = 0.1 * torch.randn(1, round(length_seconds * SAMPLE_RATE_HZ), generator=generator)

    def step(module: torch.nn.Module) -> Callable[[], None]:
        inputs = waveform.to(next(module.parameters()).device)

        def run() -> None:
            with torch.inference_mode():
                module(inputs)

        return run

    modules = {name: (encoder, encoder.feature_extractor) for name, encoder in encoders.items()}
    return {
        key: step(module)
        for name, (encoder, front) in modules.items()
        for key, module in ((name, encoder), (name + FRONT_END, front))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Latency of compact encoders at full size.")
    parser.add_argument("--seconds", type=float, nargs="+", default=[4.0, 15.0], help="lengths of the clip")
    parser.add_argument("--num-rounds", type=int, default=5, help="measurements of each encoder")
    parser.add_argument("--output", type=Path, help="also write the numbers here, as JSON")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(hardware_name(device))
    encoders = full_size_encoders(device)
    parameters = {name: sum(weight.numel() for weight in model.parameters()) for name, model in encoders.items()}
    rows = {
        name: {
            "encoder": name,
            "parameters": count,
            "size_ratio": count / parameters[TEACHER],
        }
        for name, count in parameters.items()
    }
    for length in arguments.seconds:
        seconds = median_seconds(encoder_steps(encoders, length), arguments.num_rounds, clock=time.perf_counter)
        for name, row in rows.items():
            row |= {
                f"ms_{length:g}s": 1000 * seconds[name],
                f"times_teacher_{length:g}s": seconds[TEACHER] / seconds[name],
                f"times_2_layers_{length:g}s": seconds[STUDENT] / seconds[name],
                f"front_end_%_{length:g}s": 100 * seconds[name + FRONT_END] / seconds[name],
            }
            print(
                f"{name}, {length:g} s: {1000 * seconds[name]:.0f} ms, {seconds[TEACHER] / seconds[name]:.2f} times as "
                f"fast as the teacher, {seconds[STUDENT] / seconds[name]:.2f} times as the student of {STUDENT}, "
                f"{row['parameters']:,} parameters ({row['size_ratio']:.3f}), "
                f"{row[f'front_end_%_{length:g}s']:.0f} % in the convolutions",
                flush=True,
            )
    if arguments.output is not None:
        write_measurements(
            arguments.output, list(rows.values()), rounds=arguments.num_rounds, torch_version=torch.__version__
        )


if __name__ == "__main__":
    main()
