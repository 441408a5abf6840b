"""Claims of the Distil-Whisper recipe, as ratios in one run: what a training step costs as work is taken out of it.

Launch: python tests/benchmarks/distil_whisper.py [--manifest FILE --labels DIR]. Real weights (bundled:whisper-base) on
real clips with the teacher's labels of a store, or on random audio and random labels, on which steps take as long.
"""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import median_seconds, peak_extra_mib, pin_allocator, write_measurements
from torch import Tensor
from transformers import WhisperForConditionalGeneration

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes/distil_whisper"))

from objective import LossConfig, loss_terms  # noqa: E402

from speechkd.data.audio import pcm16_to_float  # noqa: E402
from speechkd.data.collate import WhisperTokens  # noqa: E402
from speechkd.data.features import SAMPLE_RATE_HZ, WINDOW_SAMPLES, WhisperLogMel  # noqa: E402
from speechkd.data.hub import read_utterances  # noqa: E402
from speechkd.data.packing import load_pack  # noqa: E402
from speechkd.data.whisper import collate_whisper  # noqa: E402
from speechkd.doctor import hardware_name  # noqa: E402
from speechkd.labels.decoder_state_labels import decoder_states_of_labels  # noqa: E402
from speechkd.labels.teacher_cache import LabelStore  # noqa: E402
from speechkd.labels.topk_labels import topk_of_labels  # noqa: E402
from speechkd.labels.topk_records import decode_topk  # noqa: E402
from speechkd.losses.logits import hinton_kd  # noqa: E402
from speechkd.metrics.latency import decode_seconds_per_token  # noqa: E402
from speechkd.models.whisper import freeze_student, student_from_teacher  # noqa: E402
from speechkd.teachers import load_processor, load_whisper  # noqa: E402

TEACHER = "bundled:whisper-base"
BATCH_CLIPS, TOPK = 8, 32
WEIGHTS = LossConfig(temperature=1.0)  # stored top-k targets are made at 1; times do not depend on it

Step = Callable[[], float]


def random_clips(number: int) -> list[dict[str, Any]]:
    """Noise of 30 s with labels of 10 to 60 tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 60, (number,), generator=generator).tolist()
    return [
        {
            "id": str(index),
            "duration_seconds": WINDOW_SAMPLES / SAMPLE_RATE_HZ,
            "waveform": torch.randint(-3000, 3000, (WINDOW_SAMPLES,), generator=generator, dtype=torch.int16),
            "token_ids": torch.randint(0, 50_000, (length,), generator=generator).tolist(),
        }
        for index, length in enumerate(lengths)
    ]


def real_clips(number: int, manifest: str, labels: str) -> list[dict[str, Any]]:
    """The first clips of a manifest that have a label."""
    utterances, rows = read_utterances(manifest), {row["id"]: row for row in LabelStore(labels).rows()}
    labelled = [index for index, key in enumerate(utterances.ids) if key in rows][:number]
    return [
        {
            "id": utterances.ids[index],
            "duration_seconds": rows[utterances.ids[index]]["duration_seconds"],
            "waveform": load_pack(utterances[index], SAMPLE_RATE_HZ, torch.int16),
            "token_ids": rows[utterances.ids[index]]["token_ids"],
        }
        for index in labelled
    ]


def add_stored(clips: list[dict[str, Any]], teacher: WhisperForConditionalGeneration, tokens: WhisperTokens) -> None:
    """What a label store would hold of the clips: encoder and decoder states in float16, and top-k targets."""
    log_mel = WhisperLogMel()
    for clip in clips:
        if "waveform" in clip:
            with torch.no_grad():
                states = teacher.model.encoder(log_mel(pcm16_to_float(clip["waveform"])[None])).last_hidden_state
            clip["encoder_states"] = states[0].half()
        label = teacher, clip["encoder_states"].float()[None], [clip["token_ids"]], tokens
        (clip["teacher_decoder_states"],) = decoder_states_of_labels(*label)
        (records,) = topk_of_labels(*label, TOPK)
        clip["topk"] = decode_topk(records, TOPK, teacher.config.vocab_size)


def batches_of(clips: list[dict[str, Any]], tokens: WhisperTokens, names: set[str]) -> list[dict[str, Any]]:
    """Batches of the clips in their order, with these of their inputs."""
    common = ("id", "duration_seconds", "token_ids")
    items = [{name: value for name, value in clip.items() if name in common or name in names} for clip in clips]
    return [collate_whisper(items[start : start + BATCH_CLIPS], tokens) for start in range(0, len(items), BATCH_CLIPS)]


def full_logits_step(
    student: WhisperForConditionalGeneration,
    teacher: WhisperForConditionalGeneration,
    batches: list[dict[str, Any]],
    *,
    shared: bool,
) -> Step:
    """The loop as one would write it first: all logits of both models, on padding too."""
    log_mel = WhisperLogMel()

    def logits(model: WhisperForConditionalGeneration, states: Tensor, batch: dict[str, Any]) -> Tensor:
        ids = batch["decoder_input_ids"]
        return model(encoder_outputs=(states,), decoder_input_ids=ids, use_cache=False).logits

    def step() -> float:
        loss = 0.0
        for batch in batches:
            if "encoder_states" in batch:
                states = [batch["encoder_states"].float()] * 2
            else:
                features = log_mel(pcm16_to_float(batch["waveforms"]))
                with torch.no_grad():
                    states = [teacher.model.encoder(features).last_hidden_state]
                    states += states if shared else [student.model.encoder(features).last_hidden_state]
            with torch.no_grad():
                teacher_logits = logits(teacher, states[0], batch)
            total = hinton_kd(
                logits(student, states[1], batch),
                teacher_logits,
                labels=batch["labels"],
                temperature=WEIGHTS.temperature,
                label_weight=WEIGHTS.cross_entropy,
                kd_weight=WEIGHTS.kl,
                reduction="sum",
            )
            total.backward()
            student.zero_grad()
            loss += total.item()
        return loss

    return step


def recipe_step(
    student: WhisperForConditionalGeneration,
    teacher: WhisperForConditionalGeneration | None,
    batches: list[dict[str, Any]],
    teacher_head: Tensor | None = None,
) -> Step:
    """What the recipe does: head and loss fused, on scored positions alone."""
    log_mel = WhisperLogMel()

    def step() -> float:
        loss = 0.0
        for batch in batches:
            total, _ = loss_terms(
                student,
                teacher,
                batch,
                weights=WEIGHTS,
                log_mel=log_mel,
                shared_encoder=student.model.encoder,
                teacher_head=teacher_head,
            )
            total.backward()
            student.zero_grad()
            loss += total.item()
        return loss

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of a distillation step at 8 clips of 30 s.")
    parser.add_argument("--manifest", help="real clips; random audio if not given")
    parser.add_argument("--labels", help="label store of the teacher for them")
    parser.add_argument("--num-batches", type=int, default=2, help="batches per measurement")
    parser.add_argument("--num-rounds", type=int, default=3, help="measurements of each step")
    parser.add_argument("--output", type=Path, help="also write the numbers here, as JSON")
    arguments = parser.parse_args()
    if (arguments.manifest is None) != (arguments.labels is None):
        parser.error("--manifest and --labels go together")
    teacher = load_whisper(TEACHER)
    student = student_from_teacher(teacher, decoder_layers=2)
    freeze_student(student)
    print(hardware_name())
    for batch_size in (1, 8):
        slow, fast = decode_seconds_per_token([teacher, student], torch.randn(batch_size, 1500, 512))
        print(f"decode, batch {batch_size}: 2 layers are {slow / fast:.2f} times as fast per token as 6")

    tokens = WhisperTokens.from_tokenizer(load_processor(TEACHER).tokenizer)
    number = BATCH_CLIPS * arguments.num_batches
    real = arguments.manifest is not None
    clips = real_clips(number, arguments.manifest, arguments.labels) if real else random_clips(number)
    if not real:  # a label begins with its special tokens, which the decoder inputs are made by
        for clip in clips:
            clip["token_ids"] = [*tokens.prefix, *clip["token_ids"], tokens.end_of_text]
    add_stored(clips, teacher, tokens)
    in_order = sorted(clips, key=lambda clip: len(clip["token_ids"]))
    heard = batches_of(clips, tokens, {"waveform"})
    cached = batches_of(clips, tokens, {"encoder_states"})
    in_order_cached = batches_of(in_order, tokens, {"encoder_states"})
    with_states = batches_of(in_order, tokens, {"encoder_states", "teacher_decoder_states"})
    with_topk = batches_of(in_order, tokens, {"encoder_states", "topk"})
    teacher_head = teacher.get_output_embeddings().weight.detach()
    steps = {
        "plain: both encoders, full logits": full_logits_step(student, teacher, heard, shared=False),
        "shared encoder, full logits": full_logits_step(student, teacher, heard, shared=True),
        "cached states, full logits": full_logits_step(student, teacher, cached, shared=True),
        "cached states, fused loss on scored positions": recipe_step(student, teacher, cached),
        "the same, labels sorted by length": recipe_step(student, teacher, in_order_cached),
        "the same, stored decoder states instead of the teacher": recipe_step(student, None, with_states, teacher_head),
        f"the same, stored top-{TOPK} instead of the teacher": recipe_step(student, None, with_topk),
    }
    losses = {}
    for name, step in steps.items():
        losses[name] = step()
        print(f"loss, {name}: {losses[name]:.4f}", flush=True)  # a CPU needs minutes for the times
    seconds = median_seconds(steps, arguments.num_rounds)
    memory = {name: peak_extra_mib(step) for name, step in steps.items()}
    (first, plain), *_ = seconds.items()
    num_scored = sum(int((batch["labels"] >= 0).sum()) for batch in cached)
    if arguments.output is not None:
        rows = [
            {
                "step": name,
                "steps_per_second_ratio": plain / value,
                "processor_seconds": value / len(cached),
                "loss_difference": losses[name] / losses[first] - 1,
                "extra_memory_MiB": memory[name],
            }
            for name, value in seconds.items()
        ]
        write_measurements(arguments.output, rows, clips_per_step=BATCH_CLIPS)
    for name, value in seconds.items():
        print(
            f"{name}: {plain / value:.2f} times the steps/s ({value / len(cached):.2f} s a batch), loss a token "
            f"{losses[name] / num_scored:.5f} ({losses[name] / losses[first] - 1:+.1e}), {memory[name]:.0f} MiB above "
            "the models"
        )


if __name__ == "__main__":
    pin_allocator()
    logging.getLogger("transformers.generation").setLevel(logging.ERROR)  # it repeats that max_new_tokens wins
    main()
