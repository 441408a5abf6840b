"""FLEURS: the same sentences read in 102 languages, 16 kHz (Conneau et al. 2022, https://arxiv.org/abs/2205.12446).

Layout: <language>/{train,dev,test}.tsv without a header, with the columns sentence id, file name, raw transcription,
transcription, characters, number of samples and gender; the clips are in <language>/audio/<split>/, at any depth.
The text is the raw transcription, with case and punctuation: evaluation normalizes it. A sentence id is shared by its
readers, so the file names make the utterance ids; speakers are not named. Licence CC BY 4.0.

`--download` fetches the tables and archives of --languages from the Hugging Face Hub, which lists no checksums.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import (
    corpus_parser,
    finish,
    language_folders,
    probe_transcribed,
    read_lines,
    report,
    require_corpus_dir,
    require_output_dir,
    write_unique,
)
from tqdm import tqdm

HUB_URL = "https://huggingface.co/datasets/google/fleurs/resolve/main/data"
SPLITS = ("train", "dev", "test")
NUM_COLUMNS = 7
MAX_UNPACKED_BYTES = 20 << 30  # of one split
ISO_CODES = {"cmn": "zh"}  # the others are ISO 639-1, or 639-3 where that has no code


def prepare_fleurs(
    corpus_dir: str | Path | None, output_dir: str | Path, *, languages: list[str] | None = None
) -> dict[str, Any]:
    """Write <language>/<split>.jsonl for each table that is there; the manifests refer to the clips in place.

    Args:
        corpus_dir: the folder of the languages, the one around it, or one language.
        output_dir: folder for the manifests.
        languages: folder names such as "en_us"; None takes all that are there.

    Returns:
        Utterances per manifest, and skipped rows.

    Raises:
        ValueError: the folder is not the corpus, lacks a language, or has no usable clip.
    """
    corpus_dir = require_corpus_dir(corpus_dir, "<language>/{train,dev,test}.tsv and <language>/audio/").resolve()
    folders = language_folders(corpus_dir, "*.tsv", languages)
    output_dir = require_output_dir(output_dir).resolve()
    skipped: list[dict[str, str]] = []
    counts: dict[str, Any] = {}
    for language, folder in folders.items():
        for split in SPLITS:
            if (folder / f"{split}.tsv").is_file():
                manifest = output_dir / language / f"{split}.jsonl"
                utterances = _utterances(folder, split, manifest.parent, skipped)
                counts[f"{language}/{split}"] = write_unique(manifest, utterances, skipped)
    return finish(output_dir, counts, skipped)


def _utterances(
    folder: Path, split: str, manifest_dir: Path, skipped: list[dict[str, str]]
) -> Iterator[dict[str, Any]]:
    """Utterances of one split of one language."""
    language = folder.name.split("_")[0]
    audio_dir = folder / "audio" / split
    paths = {path.name: path for path in sorted(audio_dir.rglob("*.wav"))}
    lines = read_lines(folder / f"{split}.tsv", skipped)
    for place, line in tqdm(lines, desc=f"{folder.name} {split}", unit="clip"):
        values = line.split("\t")
        if len(values) != NUM_COLUMNS:
            reason = f"{len(values)} columns where {folder.name}/{split}.tsv has {NUM_COLUMNS}"
            skipped.append({"id": place, "reason": reason})
            continue
        name, text = values[1], values[2].strip()
        key, path = f"{folder.name}_{Path(name).stem}", paths.get(name, audio_dir / name)
        clip = probe_transcribed(key, path, text, skipped)
        if clip is not None:
            yield {
                "id": key,
                "audio": os.path.relpath(path, manifest_dir),
                "duration_seconds": clip[0],
                "sample_rate_hz": clip[1],
                "text": text,
                "language": ISO_CODES.get(language, language),
            }


def download_fleurs(corpus_dir: Path, languages: list[str]) -> None:
    """Fetch the tables and unpack the clips that are not there yet.

    Raises:
        ValueError: the Hub cannot be reached or lacks a language, or an archive is unsafe.
    """
    from download import fetch, unpack

    for language in languages:
        for split in SPLITS:
            folder = corpus_dir / language
            fetch(f"{HUB_URL}/{language}/{split}.tsv", folder / f"{split}.tsv")
            if not (folder / "audio" / split).is_dir():
                archive = fetch(f"{HUB_URL}/{language}/audio/{split}.tar.gz", folder / f"{split}.tar.gz")
                unpack(archive, folder / "audio" / split, max_bytes=MAX_UNPACKED_BYTES)
                archive.unlink()


def main(argv: list[str] | None = None) -> None:
    parser = corpus_parser(__doc__)
    parser.add_argument("--languages", nargs="+", help="such as en_us; without it all that are there")
    arguments = parser.parse_args(argv)

    def prepare() -> dict[str, Any]:
        if arguments.download:
            if arguments.corpus_dir is None or arguments.languages is None:
                raise ValueError("--download needs --corpus-dir, the folder to fetch into, and --languages")
            download_fleurs(arguments.corpus_dir, arguments.languages)
        return prepare_fleurs(arguments.corpus_dir, arguments.output_dir, languages=arguments.languages)

    report(prepare, arguments.json)


if __name__ == "__main__":
    main()
