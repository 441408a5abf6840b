"""VoxCeleb1: 1,251 celebrities in interviews, 16 kHz (Nagrani et al. 2017, https://arxiv.org/abs/1706.08612).

Layout: wav/<speaker>/<video>/<number>.wav, or dev/wav/ and test/wav/ as the archives unpack, with iden_split.txt
(`<1 train, 2 dev, 3 test> <file>`) for speaker identification and veri_test.txt (`<1 same, 0 other> <file> <file>`) for
speaker verification; one of the two lists is enough. The label of identification is `speaker`.
"""

import os
import re
from pathlib import Path
from typing import Any

from common import (
    corpus_parser,
    finish,
    probe_clip,
    read_lines,
    report,
    require_corpus_dir,
    require_output_dir,
    write_unique,
)
from tqdm import tqdm

from speechkd.data.audio import AudioError
from speechkd.data.manifest import write_manifest
from speechkd.files import atomic_write

LAYOUT = "wav/<speaker>/<video>/<number>.wav and iden_split.txt or veri_test.txt"
WAV_FOLDERS = ("wav", "dev/wav", "test/wav")
SPLITS = {"1": "train", "2": "dev", "3": "test"}
IDENTIFICATION_LINE = re.compile(r"([123])\s+(\S+)\.wav")
TRIAL_LINE = re.compile(r"([01])\s+(\S+)\.wav\s+(\S+)\.wav")


def prepare_voxceleb1(corpus_dir: str | Path | None, output_dir: str | Path) -> dict[str, Any]:
    """Write the manifests of both tasks, as far as their lists are there.

    Identification: train.jsonl, dev.jsonl and test.jsonl, all with the same speakers. Verification:
    verification_train.jsonl with the speakers that no trial names, verification_test.jsonl with each utterance of a
    trial once, and verification_trials.txt with a trial a line, `<1 same speaker, 0 other> <id> <id>`.

    Args:
        corpus_dir: folder with the audio and the lists.
        output_dir: folder for the manifests, which refer to the audio in place.

    Returns:
        Utterances per manifest, trials, and skipped clips and lines; a trial is skipped if one of its clips is.

    Raises:
        ValueError: there is no audio, no list, or nothing that the lists name.
    """
    corpus_dir = require_corpus_dir(corpus_dir, LAYOUT).resolve()
    audio = {
        path.relative_to(corpus_dir / folder).with_suffix("").as_posix(): path
        for folder in WAV_FOLDERS
        for path in sorted((corpus_dir / folder).glob("*/*/*.wav"))
    }
    identification_list, trial_list = corpus_dir / "iden_split.txt", corpus_dir / "veri_test.txt"
    if not audio or not (identification_list.is_file() or trial_list.is_file()):
        raise ValueError(f"{corpus_dir} is not VoxCeleb1; it needs {LAYOUT}")
    output_dir = require_output_dir(output_dir)
    skipped: list[dict[str, str]] = []
    utterances = _utterances(audio, output_dir.resolve(), skipped)
    counts: dict[str, Any] = {}
    if identification_list.is_file():
        entries = _read_list(identification_list, IDENTIFICATION_LINE, utterances, skipped)
        for number, split in SPLITS.items():
            rows = [utterances[key] for value, key in entries if value == number and key in utterances]
            counts[split] = write_unique(output_dir / f"{split}.jsonl", rows, skipped)
    if trial_list.is_file():
        trials = _read_list(trial_list, TRIAL_LINE, utterances, skipped)
        counts |= _write_verification(output_dir, trials, utterances)
    return finish(output_dir, counts, skipped)


def _utterances(audio: dict[str, Path], manifest_dir: Path, skipped: list[dict[str, str]]) -> dict[str, dict[str, Any]]:
    """Manifest rows by id; what cannot be opened is added to `skipped`."""
    utterances = {}
    for key, path in tqdm(audio.items(), desc="voxceleb1", unit="clip"):
        try:
            duration_seconds, rate_hz = probe_clip(path)
        except AudioError as error:
            skipped.append({"id": key, "reason": str(error)})
            continue
        utterances[key] = {
            "id": key,
            "audio": os.path.relpath(path, manifest_dir),
            "duration_seconds": duration_seconds,
            "sample_rate_hz": rate_hz,
            "speaker": key.split("/")[0],
        }
    return utterances


def _read_list(
    path: Path, line_form: re.Pattern[str], utterances: dict[str, Any], skipped: list[dict[str, str]]
) -> list[tuple[str, ...]]:
    """Fields of each well-formed line; malformed ones, and those whose files are not usable, are added to `skipped`."""
    entries = []
    for place, line in read_lines(path, skipped):
        match = line_form.fullmatch(line.strip())
        if match:
            entries.append(match.groups())
            unusable = [key for key in match.groups()[1:] if key not in utterances]
            reason = f"{unusable[0]}.wav does not exist or cannot be opened" if unusable else ""
        else:
            reason = f"{line!r} is not a line of this list"
        if reason:
            skipped.append({"id": place, "reason": reason})
    return entries


def _write_verification(
    output_dir: Path, trials: list[tuple[str, ...]], utterances: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    usable = [trial for trial in trials if trial[1] in utterances and trial[2] in utterances]
    # also the speakers of trials that were skipped: the training set must not depend on what is broken
    held_out = {key.split("/")[0] for trial in trials for key in trial[1:]}
    train = [utterance for utterance in utterances.values() if utterance["speaker"] not in held_out]
    test = [utterances[key] for key in sorted({key for trial in usable for key in trial[1:]})]
    with atomic_write(output_dir / "verification_trials.txt") as temporary:
        temporary.write_text("".join(" ".join(trial) + "\n" for trial in usable), encoding="utf-8")
    return {
        "verification_train": write_manifest(output_dir / "verification_train.jsonl", train),
        "verification_test": write_manifest(output_dir / "verification_test.jsonl", test),
        "trials": len(usable),
    }


def main(argv: list[str] | None = None) -> None:
    arguments = corpus_parser(__doc__).parse_args(argv)

    def prepare() -> dict[str, Any]:
        if arguments.download:
            raise ValueError(
                "--download is not available for this corpus, its audio is given out on request; ask at "
                "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/ and pass the folder with --corpus-dir"
            )
        return prepare_voxceleb1(arguments.corpus_dir, arguments.output_dir)

    report(prepare, arguments.json)


if __name__ == "__main__":
    main()
