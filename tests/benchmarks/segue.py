"""Claims of the SEGUE recipe, as ratios in one run: what a training step costs as work is taken out of it.

Launch: python tests/benchmarks/segue.py [--manifest FILE [--labels DIR]]. Real weights on real clips with their texts,
or on random audio with invented orders, on which steps take as long.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import median_seconds, peak_extra_mib, pin_allocator, write_measurements

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes/segue"))

from embedding_objective import LossConfig, count_items, loss_terms  # noqa: E402
from sentence_corpora import collate_sentences, heard_seconds  # noqa: E402

from speechkd.data.audio import load_utterance, pcm16_to_float  # noqa: E402
from speechkd.data.features import SAMPLE_RATE_HZ  # noqa: E402
from speechkd.data.hub import read_utterances  # noqa: E402
from speechkd.doctor import hardware_name  # noqa: E402
from speechkd.labels.embeddings import manifest_texts  # noqa: E402
from speechkd.models.segue import SegueEncoder  # noqa: E402
from speechkd.models.speech_embedder import load_segue  # noqa: E402
from speechkd.teachers_text import SentenceTeacher, load_sentence_teacher  # noqa: E402

TEACHER, STUDENT = "bundled:minilm-l6", "bundled:whisper-base"
BATCH_CLIPS, GRID_SECONDS, NUM_FROZEN = 8, 0.64, 4
SIZES, DRINKS, MILKS = ("small", "large", "twelve ounce"), ("mocha", "latte", "iced coffee"), ("soy", "whole", "skim")


def random_clips(number: int) -> list[dict[str, Any]]:
    """Noise of 6 to 12 s with orders of about twelve words."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(6 * SAMPLE_RATE_HZ, 12 * SAMPLE_RATE_HZ, (number,), generator=generator).tolist()
    orders = itertools.cycle(itertools.product(SIZES, DRINKS, MILKS))
    return [
        {
            "id": str(index),
            "duration_seconds": length / SAMPLE_RATE_HZ,
            "waveform": torch.randint(-3000, 3000, (length,), generator=generator, dtype=torch.int16),
            "text": "may i have a {} {} with lots of {} milk please".format(*order),
        }
        for index, length, order in zip(range(number), lengths, orders, strict=False)
    ]


def real_clips(number: int, manifest: str, labels: str | None) -> list[dict[str, Any]]:
    """The first clips of a manifest that have a text."""
    utterances, texts = read_utterances(manifest), dict(manifest_texts(manifest, labels))
    spoken = [index for index, key in enumerate(utterances.ids) if (texts[key] or "").strip()][:number]
    return [
        {
            "id": utterances.ids[index],
            "duration_seconds": utterances[index]["duration_seconds"],
            "waveform": load_utterance(utterances[index], SAMPLE_RATE_HZ, torch.int16),
            "text": texts[utterances.ids[index]],
        }
        for index in spoken
    ]


def batches_of(
    clips: list[dict[str, Any]], student: SegueEncoder, teacher: SentenceTeacher, *, states: bool, vectors: bool
) -> list[dict[str, Any]]:
    """Batches of the clips in their order; with states and vectors as a label store keeps them, if asked for."""
    items = []
    for clip in clips:
        num_samples = len(clip["waveform"])
        item = {key: clip[key] for key in ("id", "duration_seconds")} | {"num_samples": num_samples}
        item["heard_seconds"] = float(heard_seconds(student, torch.tensor([clip["duration_seconds"]]).numpy())[0])
        if vectors:
            item["embedding"] = teacher([clip["text"]])[0]
        else:
            item["text"] = clip["text"]
        if states:
            waveform = pcm16_to_float(clip["waveform"])[None].to(student.device)
            item["states"] = student.lower_states(waveform, torch.tensor([num_samples]))[0].half()
        else:
            item["waveform"] = clip["waveform"]
        items.append(item)
    batches = [collate_sentences(items[start : start + BATCH_CLIPS]) for start in range(0, len(items), BATCH_CLIPS)]
    for batch in batches:
        batch |= {key: value.to(student.device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
    return batches


def recipe_step(
    student: SegueEncoder, teacher: SentenceTeacher | None, batches: list[dict[str, Any]]
) -> Callable[[], float]:
    """Loss and gradients of all batches, as the recipe computes them; returns the loss of a clip."""

    def step() -> float:
        total = 0.0
        for batch in batches:
            loss, _ = loss_terms(student, teacher, batch, weights=LossConfig())
            loss.backward()
            student.zero_grad()
            total += loss.item()
        return total / sum(int(count_items(batch)) for batch in batches)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of a SEGUE step at 8 clips.")
    parser.add_argument("--manifest", help="real clips; random audio if not given")
    parser.add_argument("--labels", help="label store with their transcripts; the manifest's text if not given")
    parser.add_argument("--teacher", default=TEACHER, help="sentence-transformers model")
    parser.add_argument("--num-batches", type=int, default=1, help="batches per measurement")
    parser.add_argument("--num-rounds", type=int, default=3, help="measurements of each step")
    parser.add_argument("--output", type=Path, help="also write the numbers here, as JSON")
    arguments = parser.parse_args()
    if arguments.labels is not None and arguments.manifest is None:
        parser.error("--labels needs --manifest")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(hardware_name(device))
    teacher = load_sentence_teacher(arguments.teacher, device=device)
    number = BATCH_CLIPS * arguments.num_batches
    clips = real_clips(number, arguments.manifest, arguments.labels) if arguments.manifest else random_clips(number)

    def student(num_frozen_layers: int, grid_seconds: float | None) -> SegueEncoder:
        torch.manual_seed(0)  # of the map to the teacher's width
        loaded = load_segue(
            STUDENT, embedding_dim=teacher.dim, num_frozen_layers=num_frozen_layers, grid_seconds=grid_seconds
        )
        return loaded.train().to(device)

    full, rounded, frozen = student(0, None), student(0, GRID_SECONDS), student(NUM_FROZEN, GRID_SECONDS)

    def step(model: SegueEncoder, *, states: bool = False, vectors: bool = False) -> Callable[[], float]:
        return recipe_step(
            model, None if vectors else teacher, batches_of(clips, model, teacher, states=states, vectors=vectors)
        )

    steps = {
        "windows of 30 s, live teacher": step(full),
        f"windows rounded up to {GRID_SECONDS} s, live teacher": step(rounded),
        "the same, stored vectors": step(rounded, vectors=True),
        f"{NUM_FROZEN} of 6 layers frozen, live teacher": step(frozen),
        "the same with stored states, live teacher": step(frozen, states=True),
        "the same with stored states and stored vectors": step(frozen, states=True, vectors=True),
    }
    losses = {name: one() for name, one in steps.items()}
    for name, loss in losses.items():
        print(f"loss of a clip, {name}: {loss:.6f}", flush=True)  # a CPU needs minutes for the times
    seconds = median_seconds(steps, arguments.num_rounds)
    memory = {name: peak_extra_mib(one) for name, one in steps.items()}
    names = list(steps)
    slowest = seconds[names[0]]
    live_and_stored = [(names[1], names[2]), (names[4], names[5])]
    for live, stored in live_and_stored:
        print(
            f"stored against live vectors, {live}: {seconds[live] / seconds[stored]:.2f} times the steps/s, loss "
            f"{losses[stored] / losses[live] - 1:+.1e}"
        )
    rows = [
        {
            "step": name,
            "steps_per_second_ratio": slowest / value,
            "processor_seconds": value / arguments.num_batches,
            "loss_of_a_clip": losses[name],
            "extra_memory_MiB": memory[name],
        }
        for name, value in seconds.items()
    ]
    if arguments.output is not None:
        ratios = [seconds[live] / seconds[stored] for live, stored in live_and_stored]
        write_measurements(
            arguments.output,
            rows,
            clips_per_step=BATCH_CLIPS,
            teacher=arguments.teacher,
            stored_vectors_ratio=ratios[0],
            stored_vectors_ratio_with_stored_states=ratios[1],
        )
    for row in rows:
        print(
            f"{row['step']}: {row['steps_per_second_ratio']:.2f} times the steps/s ({row['processor_seconds']:.2f} s a "
            f"batch), {row['extra_memory_MiB']:.0f} MiB above the models"
        )


if __name__ == "__main__":
    pin_allocator()
    main()
