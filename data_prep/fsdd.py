"""Free Spoken Digit Dataset: single digits, and strings of three to six digits of one speaker.

Layout: recordings/{digit}_{speaker}_{index}.wav or .flac at 8 kHz. Speakers are ranked by the SHA-256 of their names;
the first quarter, at least one, is test: of george, jackson, lucas, nicolas and theo, george is test, the others train.
"""

import hashlib
import random
import re
from pathlib import Path
from typing import Any

import soundfile
import torch
from common import (
    audio_by_stem,
    corpus_parser,
    read_clip,
    refuse_download,
    report,
    require_corpus_dir,
    require_output_dir,
    write_skipped,
)
from torch import Tensor
from tqdm import tqdm

from speechkd.data.audio import AudioError
from speechkd.data.manifest import write_manifest
from speechkd.files import atomic_write

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RECORDING = re.compile(r"([0-9])_(.+)_([0-9]+)")
GAP_SECONDS = (0.1, 0.3)
STRING_DIGITS = (3, 6)


def test_speakers(speakers: set[str]) -> set[str]:
    """A quarter of the speakers, at least one, by the hash of the name.

    Raises:
        ValueError: there are fewer than two speakers.
    """
    if len(speakers) < 2:
        raise ValueError(f"a speaker-disjoint split needs two speakers or more, found {sorted(speakers)}")
    ranked = sorted(speakers, key=lambda name: hashlib.sha256(name.encode("utf-8")).hexdigest())
    return set(ranked[: max(1, round(0.25 * len(ranked)))])


def prepare_fsdd(
    corpus_dir: str | Path | None,
    output_dir: str | Path,
    *,
    num_train: int = 240,
    num_test: int = 100,
    seed: int = 0,
) -> dict[str, Any]:
    """Write train.jsonl and test.jsonl (strings), digits_train.jsonl and digits_test.jsonl (single recordings).

    Args:
        corpus_dir: the dataset's folder.
        output_dir: folder for manifests and audio, FLAC at the corpus's rate.
        num_train: digit strings of the training speakers.
        num_test: digit strings of the test speakers.
        seed: of the choice of digits, recordings and gaps.

    Returns:
        Number of utterances per manifest, test speakers and skipped recordings.

    Raises:
        ValueError: the folder is not the corpus, or has one speaker only.
    """
    corpus_dir = require_corpus_dir(corpus_dir, "recordings/{digit}_{speaker}_{index}.wav or .flac")
    output_dir = require_output_dir(output_dir)
    folder = corpus_dir / "recordings"
    found = audio_by_stem(folder) if folder.is_dir() else {}
    recordings, skipped = _read_recordings({stem: path for stem, path in found.items() if RECORDING.fullmatch(stem)})
    if not recordings:
        raise ValueError(
            f"no usable recordings in {folder}; expected {{digit}}_{{speaker}}_{{index}}.wav or .flac there"
        )
    held_out = test_speakers({speaker for _, speaker, _, _ in recordings.values()})
    counts: dict[str, Any] = {}
    for split, number in (("train", num_train), ("test", num_test)):
        chosen = {stem: rec for stem, rec in recordings.items() if (rec[1] in held_out) == (split == "test")}
        singles = [_single(output_dir, stem, recording) for stem, recording in chosen.items()]
        counts[f"digits_{split}"] = write_manifest(output_dir / f"digits_{split}.jsonl", singles)
        generator = random.Random(f"{seed}-{split}")
        strings = [
            _string(output_dir, f"fsdd-{split}-{index:05d}", chosen, generator)
            for index in tqdm(range(number), desc=f"fsdd {split} strings", unit="clip")
        ]
        counts[split] = write_manifest(output_dir / f"{split}.jsonl", strings)
    write_skipped(output_dir, skipped)
    return {**counts, "test_speakers": sorted(held_out), "skipped": len(skipped)}


Recording = tuple[int, str, Tensor, int]  # digit, speaker, samples, rate in Hz


def _read_recordings(paths: dict[str, Path]) -> tuple[dict[str, Recording], list[dict[str, str]]]:
    recordings: dict[str, Recording] = {}
    skipped = []
    for stem, path in tqdm(sorted(paths.items()), desc="fsdd", unit="clip"):
        digit, speaker, _ = RECORDING.fullmatch(stem).groups()  # type: ignore[union-attr]
        try:
            samples, rate_hz = read_clip(path)
        except AudioError as error:
            skipped.append({"id": stem, "reason": str(error)})
            continue
        recordings[stem] = (int(digit), speaker, samples, rate_hz)
    return recordings, skipped


def _single(output_dir: Path, stem: str, recording: Recording) -> dict[str, Any]:
    digit, speaker, samples, rate_hz = recording
    return _write(output_dir, stem, samples, rate_hz, DIGIT_WORDS[digit], speaker)


def _string(output_dir: Path, key: str, chosen: dict[str, Recording], generator: random.Random) -> dict[str, Any]:
    """One string: a speaker, then digits, then a recording and a gap for each."""
    speaker = generator.choice(sorted({recording[1] for recording in chosen.values()}))
    own = [recording for _, recording in sorted(chosen.items()) if recording[1] == speaker]
    available = sorted({recording[0] for recording in own})
    digits = [generator.choice(available) for _ in range(generator.randint(*STRING_DIGITS))]
    rate_hz = own[0][3]
    pieces: list[Tensor] = []
    for position, digit in enumerate(digits):
        if position:
            pieces.append(torch.zeros(round(generator.uniform(*GAP_SECONDS) * rate_hz)))
        pieces.append(generator.choice([recording[2] for recording in own if recording[0] == digit]))
    return _write(
        output_dir, key, torch.cat(pieces), rate_hz, " ".join(DIGIT_WORDS[digit] for digit in digits), speaker
    )


def _write(output_dir: Path, key: str, samples: Tensor, rate_hz: int, text: str, speaker: str) -> dict[str, Any]:
    path = output_dir / "audio" / f"{key}.flac"
    with atomic_write(path) as temporary:
        soundfile.write(temporary, samples.numpy(), rate_hz, format="FLAC")
    return {
        "id": key,
        "audio": f"audio/{path.name}",
        "duration_seconds": len(samples) / rate_hz,
        "sample_rate_hz": rate_hz,
        "text": text,
        "speaker": speaker,
        "language": "en",
    }


def main(argv: list[str] | None = None) -> None:
    parser = corpus_parser(__doc__)
    parser.add_argument("--num-train", type=int, default=240, help="digit strings for training")
    parser.add_argument("--num-test", type=int, default=100, help="digit strings for testing")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)

    def prepare() -> dict[str, Any]:
        refuse_download(arguments.download, "Jakobovski/free-spoken-digit-dataset")
        return prepare_fsdd(
            arguments.corpus_dir,
            arguments.output_dir,
            num_train=arguments.num_train,
            num_test=arguments.num_test,
            seed=arguments.seed,
        )

    report(prepare, arguments.json)


if __name__ == "__main__":
    main()
