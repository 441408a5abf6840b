"""Labelling against transformers' pipeline, as ratios in one run of bundled:whisper-base.

The pipeline runs twice: as it comes, which is a beam search of 5, and greedily, as we label.
Launch: python tests/benchmarks/labelling.py --manifest data/barista/test.jsonl [--max-clips 64]
The text must be the same in float32 with and without batches; windows of joined clips are labelled for speed only.
"""

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import median_seconds, write_measurements
from transformers import pipeline

from speechkd.data.audio import load_utterance
from speechkd.data.features import SAMPLE_RATE_HZ
from speechkd.data.loader import clip_batches, length_sorted
from speechkd.data.manifest import Manifest, read_manifest
from speechkd.data.packing import pack_manifest
from speechkd.doctor import hardware_name
from speechkd.labels.decoding import DecodingConfig
from speechkd.labels.labeller import Labeller
from speechkd.teachers import load_processor, load_whisper

TEACHER, MAX_NEW_TOKENS, BATCH_SIZE = "bundled:whisper-base", 224, 16


def pipeline_texts(
    manifest: Manifest, device: str, texts: dict[str, str], **generation_settings: int
) -> Callable[[], None]:
    """transformers' pipeline, one clip at a time, without timestamps, audio decoded from the same files."""
    processor = load_processor(TEACHER)
    recognizer = pipeline(
        "automatic-speech-recognition",
        model=load_whisper(TEACHER, dtype=torch.float32, device=device),
        tokenizer=processor.tokenizer,
        feature_extractor=processor.feature_extractor,
        device=device,
        batch_size=1,
    )
    settings = {"language": "en", "task": "transcribe", **generation_settings}

    def step() -> None:
        for utterance in manifest:
            samples = load_utterance(utterance, SAMPLE_RATE_HZ).numpy()
            audio = {"raw": samples, "sampling_rate": SAMPLE_RATE_HZ}
            texts[utterance["id"]] = recognizer(audio, generate_kwargs=settings)["text"].strip()

    return step


def our_labels(manifest: Manifest, device: str, pack: bool, texts: dict[str, str]) -> Callable[[], None]:
    """What `speechkd label` does once the teacher is loaded."""
    decoding = DecodingConfig(batch_size=BATCH_SIZE, max_new_tokens=MAX_NEW_TOKENS)
    labeller = Labeller(TEACHER, load_whisper(TEACHER, dtype=torch.float32, device=device), decoding)

    def step() -> None:
        clips = pack_manifest(manifest) if pack else manifest
        order = length_sorted(clips, range(len(clips)))[::-1]
        for batch in clip_batches(
            clips, order, sample_rate_hz=SAMPLE_RATE_HZ, batch_size=BATCH_SIZE, device=labeller.model.device
        ):
            rows, _ = labeller.label(batch)
            texts.update((row["id"], row["text"]) for row in rows)

    return step


def timed(step: Callable[[], None], wall_seconds: list[float]) -> Callable[[], None]:
    """The same step, which notes its wall time as well."""

    def noting() -> None:
        started = time.perf_counter()
        step()
        wall_seconds.append(time.perf_counter() - started)

    return noting


def main() -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--manifest", type=Path, required=True, help="real speech, such as that of data_prep/barista.py"
    )
    parser.add_argument("--max-clips", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, help="also write the numbers here, as JSON")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    whole = read_manifest(arguments.manifest)
    # neighbours, so that speakers' clips can be joined
    some = whole.select(range(min(arguments.max_clips, len(whole))))
    expected: dict[str, str] = {}
    batched: dict[str, str] = {}
    steps = {
        "pipeline": pipeline_texts(some, device, {}),
        "greedy pipeline": pipeline_texts(some, device, expected, num_beams=1, max_new_tokens=MAX_NEW_TOKENS),
        "batched": our_labels(some, device, False, batched),
        "packed": our_labels(some, device, True, {}),
    }
    wall: dict[str, list[float]] = {name: [] for name in steps}
    measured = median_seconds({name: timed(step, wall[name]) for name, step in steps.items()}, arguments.rounds)
    audio_seconds = sum(some.durations_seconds)
    print(
        f"{hardware_name()}, {torch.get_num_threads()} threads; {len(some)} clips of "
        f"{audio_seconds / len(some):.1f} s on average, batches of {BATCH_SIZE}"
    )
    rows = []
    for name, seconds in measured.items():
        elapsed, theirs = statistics.median(wall[name][1:]), statistics.median(wall["pipeline"][1:])
        print(
            f"{name:15} {audio_seconds / elapsed:6.1f} x real time, {theirs / elapsed:.2f} x the pipeline "
            f"({measured['pipeline'] / seconds:.2f} x in processor time of all threads, or on a GPU in wall time)"
        )
        rows.append({"labelling": name, "rtfx": audio_seconds / elapsed, "pipeline_ratio": theirs / elapsed})
    differing = [key for key in expected if batched.get(key) != expected[key]]
    print(f"texts that differ from the greedy pipeline's: {len(differing)} of {len(expected)}")
    if arguments.output is not None:
        write_measurements(arguments.output, rows, clips=len(some), texts_unlike_greedy_pipeline=len(differing))
    for key in differing:
        print(f"  {key}\n    pipeline: {expected[key]}\n    batched:  {batched.get(key)}")
    assert not differing


if __name__ == "__main__":
    main()
