"""Barista: spoken coffee orders of the Picovoice speech-to-intent benchmark.

Layout: data/label/label.json (file name to intent and slots) and data/speech/clean/<stem>.wav or .flac. Labels without
audio are left out. There are no transcripts and no speaker names, so speakers may be on both sides of the split.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

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
from tqdm import tqdm

from speechkd.data.audio import AudioError
from speechkd.data.manifest import write_manifest


def label_key(slots: dict[str, str]) -> str:
    """Slot pairs sorted by name, values stripped: `name=value|name=value`."""
    return "|".join(f"{name}={value.strip()}" for name, value in sorted(slots.items()))


def split_bucket(key: str) -> int:
    """Bucket 0 to 99 of a label: equal labels always fall together."""
    return int(hashlib.sha256(key.encode("utf-8")).hexdigest()[:8], 16) % 100


def split_of(slots: dict[str, str]) -> str:
    """Label-disjoint split: buckets below 60 train, below 80 dev, the others test."""
    bucket = split_bucket(label_key(slots))
    return "train" if bucket < 60 else "dev" if bucket < 80 else "test"


def read_labels(path: Path) -> dict[str, Any]:
    """Labels by file name, checked.

    Raises:
        ValueError: the file is not JSON, or an entry lacks its intent or its slots.
    """
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it again from the corpus") from error
    if not isinstance(labels, dict):
        raise ValueError(f"{path} holds a {type(labels).__name__}; it should map file names to intent and slots")
    for name, label in labels.items():
        if not (
            isinstance(label, dict) and isinstance(label.get("intent"), str) and isinstance(label.get("slots"), dict)
        ):
            raise ValueError(f"{path}: the label of {name!r} is {label!r}; it should have an intent and slots")
    return labels


def prepare_barista(corpus_dir: str | Path | None, output_dir: str | Path) -> dict[str, Any]:
    """Write train.jsonl, dev.jsonl and test.jsonl, which refer to the audio in place.

    Args:
        corpus_dir: the benchmark's folder.
        output_dir: folder for the manifests.

    Returns:
        Number of utterances per split, of labels without audio and of skipped clips.

    Raises:
        ValueError: the folder is not the corpus.
    """
    corpus_dir = require_corpus_dir(corpus_dir, "data/label/label.json and data/speech/clean/").resolve()
    label_file, audio_dir = corpus_dir / "data/label/label.json", corpus_dir / "data/speech/clean"
    if not label_file.is_file() or not audio_dir.is_dir():
        raise ValueError(
            f"{corpus_dir} is not the barista corpus; it needs data/label/label.json and data/speech/clean/"
        )
    labels = read_labels(label_file)
    output_dir = require_output_dir(output_dir)
    audio = audio_by_stem(audio_dir)
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "dev": [], "test": []}
    skipped: list[dict[str, str]] = []
    without_audio = 0
    for name, label in tqdm(sorted(labels.items()), desc="barista", unit="clip"):
        stem = Path(name).stem
        if stem not in audio:
            without_audio += 1
            continue
        try:
            samples, rate_hz = read_clip(audio[stem])
        except AudioError as error:
            skipped.append({"id": stem, "reason": str(error)})
            continue
        slots = [{"name": slot, "value": value.strip()} for slot, value in sorted(label["slots"].items())]
        splits[split_of(label["slots"])].append(
            {
                "id": stem,
                "audio": os.path.relpath(audio[stem], output_dir.resolve()),
                "duration_seconds": len(samples) / rate_hz,
                "sample_rate_hz": rate_hz,
                "language": "en",
                "intent": label["intent"],
                "slots": slots,
            }
        )
    if not any(splits.values()):
        raise ValueError(f"no label of {label_file} has audio in {audio_dir}; expected <stem>.wav or <stem>.flac there")
    counts: dict[str, Any] = {
        name: write_manifest(output_dir / f"{name}.jsonl", utterances) for name, utterances in splits.items()
    }
    write_skipped(output_dir, skipped)
    return {**counts, "labels_without_audio": without_audio, "skipped": len(skipped)}


def main(argv: list[str] | None = None) -> None:
    arguments = corpus_parser(__doc__).parse_args(argv)

    def prepare() -> dict[str, Any]:
        refuse_download(arguments.download, "Picovoice/speech-to-intent-benchmark")
        return prepare_barista(arguments.corpus_dir, arguments.output_dir)

    report(prepare, arguments.json)


if __name__ == "__main__":
    main()
