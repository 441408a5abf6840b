"""VoxPopuli, transcribed part: European Parliament speech, 16 languages (Wang et al. 2021, arXiv:2101.00390).

Layout: transcribed_data/<language>/asr_{train,dev,test}.tsv and the clips in <language>/<year>/<id>.ogg, as the
corpus's own tool cuts them (https://github.com/facebookresearch/voxpopuli). The text is `normalized_text`, lower case
with numbers as words: `raw_text` can be empty. `--download` is refused, since the public archives hold whole
sessions, which that tool must cut.
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
    read_tsv,
    report,
    require_corpus_dir,
    require_output_dir,
    write_unique,
)
from tqdm import tqdm

COLUMNS = ("id", "normalized_text", "speaker_id")
SPLITS = ("train", "dev", "test")


def prepare_voxpopuli(
    corpus_dir: str | Path | None, output_dir: str | Path, *, languages: list[str] | None = None
) -> dict[str, Any]:
    """Write <language>/<split>.jsonl for each table that is there; the manifests refer to the clips in place.

    Args:
        corpus_dir: folder that holds transcribed_data/, that folder itself, or one language of it.
        output_dir: folder for the manifests.
        languages: folder names such as "en" or "en_accented"; None takes all that are there.

    Returns:
        Utterances per manifest, and skipped rows.

    Raises:
        ValueError: the folder is not the corpus, lacks a language or a column, or has no usable clip.
    """
    corpus_dir = require_corpus_dir(corpus_dir, "transcribed_data/<language>/asr_{train,dev,test}.tsv").resolve()
    folders = language_folders(corpus_dir, "asr_*.tsv", languages)
    output_dir = require_output_dir(output_dir).resolve()
    skipped: list[dict[str, str]] = []
    counts: dict[str, Any] = {}
    for language, folder in folders.items():
        for split in SPLITS:
            if (folder / f"asr_{split}.tsv").is_file():
                manifest = output_dir / language / f"{split}.jsonl"
                utterances = _utterances(folder, split, manifest.parent, skipped)
                counts[f"{language}/{split}"] = write_unique(manifest, utterances, skipped)
    return finish(output_dir, counts, skipped)


def _utterances(
    folder: Path, split: str, manifest_dir: Path, skipped: list[dict[str, str]]
) -> Iterator[dict[str, Any]]:
    """Utterances of one split of one language; an id begins with its session's date, so with its year."""
    rows = read_tsv(folder / f"asr_{split}.tsv", COLUMNS, skipped)
    for row in tqdm(rows, desc=f"{folder.name} {split}", unit="clip"):
        key, text = row["id"], row["normalized_text"].strip()
        path = folder / key[:4] / f"{key}.ogg"
        clip = probe_transcribed(key, path, text, skipped)
        if clip is not None:
            yield {
                "id": key,
                "audio": os.path.relpath(path, manifest_dir),
                "duration_seconds": clip[0],
                "sample_rate_hz": clip[1],
                "text": text,
                "speaker": None if row["speaker_id"] in ("", "None") else row["speaker_id"],
                "language": folder.name.split("_")[0],
            }


def main(argv: list[str] | None = None) -> None:
    parser = corpus_parser(__doc__)
    parser.add_argument("--languages", nargs="+", help="such as en; without it all that are there")
    arguments = parser.parse_args(argv)

    def prepare() -> dict[str, Any]:
        if arguments.download:
            raise ValueError(
                "--download is not available for VoxPopuli; install https://github.com/facebookresearch/voxpopuli, run "
                "`python -m voxpopuli.download_audios --root DIR --subset asr`, then `python -m voxpopuli.get_asr_data "
                "--root DIR --lang LANGUAGE`, and pass DIR with --corpus-dir"
            )
        return prepare_voxpopuli(arguments.corpus_dir, arguments.output_dir, languages=arguments.languages)

    report(prepare, arguments.json)


if __name__ == "__main__":
    main()
