"""Common Voice: read sentences in more than 100 languages, mp3 (Ardila et al. 2020, https://arxiv.org/abs/1912.06670).

Layout: cv-corpus-<release>/<language>/clips/*.mp3 beside train.tsv, dev.tsv, test.tsv, validated.tsv and
clip_durations.tsv; --corpus-dir is any of these folders or the one around them. Each language gets a folder in the
output: train.jsonl, dev.jsonl, test.jsonl, and validated.jsonl, which is validated.tsv without the speakers of dev and
test, so that it can be trained on. Mozilla gives the archives only to people who agree to its terms: no --download.
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

DIALECT_COLUMNS = ("variant", "accents", "accent")  # what speakers said of themselves; each release has others
COLUMNS = ("client_id", "path", "sentence")
SPLITS = ("train", "dev", "test", "validated")
DURATION_TOLERANCE_SECONDS = 0.5  # mp3 frames and the padding of encoders take less


def prepare_common_voice(
    corpus_dir: str | Path | None, output_dir: str | Path, *, languages: list[str] | None = None
) -> dict[str, Any]:
    """Write <language>/<split>.jsonl for each table that is there; the manifests refer to the clips in place.

    A clip that is not as long as clip_durations.tsv says is skipped.

    Args:
        corpus_dir: one release, the folder around it, or one language of it.
        output_dir: folder for the manifests.
        languages: folder names such as "en" or "zh-CN"; None takes all that are there.

    Returns:
        Utterances per manifest, and skipped rows.

    Raises:
        ValueError: the folder is not the corpus, lacks a language, a table or a column, or has no usable clip.
    """
    corpus_dir = require_corpus_dir(corpus_dir, "cv-corpus-<release>/<language>/clips/").resolve()
    folders = language_folders(corpus_dir, "clips", languages)
    output_dir = require_output_dir(output_dir).resolve()
    skipped: list[dict[str, str]] = []
    counts: dict[str, Any] = {}
    for folder in folders.values():
        counts.update(_prepare_language(folder, output_dir, skipped))
    return finish(output_dir, counts, skipped)


def unquote(sentence: str) -> str:
    """The sentence without the quotation marks that CSV export put around it; those of the sentence stay.

    `"He said ""no""."` becomes `He said "no".`, and `"Yes" or "no"` is left as it is.
    """
    sentence = sentence.strip()
    inner = sentence[1:-1].replace('""', "\0")
    if len(sentence) > 2 and sentence[0] == sentence[-1] == '"' and '"' not in inner:
        return inner.replace("\0", '"').strip()
    return sentence


def _prepare_language(folder: Path, output_dir: Path, skipped: list[dict[str, str]]) -> dict[str, int]:
    """Manifests of one language; their counts by <language>/<split>."""
    tables = {split: folder / f"{split}.tsv" for split in SPLITS if (folder / f"{split}.tsv").is_file()}
    if not tables:
        raise ValueError(f"{folder} has none of {', '.join(f'{split}.tsv' for split in SPLITS)}; unpack it again")
    tests = [tables[split] for split in ("dev", "test") if split in tables]
    held_out = {row["client_id"] for table in tests for row in read_tsv(table, COLUMNS, [])}
    listed_seconds = _listed_durations(folder / "clip_durations.tsv", skipped)
    probed: dict[str, tuple[float, int] | None] = {}  # validated.tsv repeats the clips of the other tables
    counts = {}
    for split, table in tables.items():
        rows: Iterator[dict[str, str]] = tqdm(
            read_tsv(table, COLUMNS, skipped), desc=f"{folder.name} {split}", unit="clip"
        )
        if split == "validated":
            rows = (row for row in rows if row["client_id"] not in held_out)
        manifest = output_dir / folder.name / f"{split}.jsonl"
        utterances = _utterances(rows, folder, manifest.parent, listed_seconds, probed, skipped)
        counts[f"{folder.name}/{split}"] = write_unique(manifest, utterances, skipped)
    return counts


def _listed_durations(table: Path, skipped: list[dict[str, str]]) -> dict[str, float]:
    """Seconds by clip name; {} where the release has no such table."""
    if not table.is_file():
        return {}
    durations = {}
    for row in read_tsv(table, ("clip", "duration[ms]"), skipped):
        try:
            durations[row["clip"]] = float(row["duration[ms]"]) / 1000
        except ValueError:
            skipped.append({"id": row["clip"], "reason": f"{table.name} has duration[ms]={row['duration[ms]']!r}"})
    return durations


def _utterances(
    rows: Iterator[dict[str, str]],
    folder: Path,
    manifest_dir: Path,
    listed_seconds: dict[str, float],
    probed: dict[str, tuple[float, int] | None],
    skipped: list[dict[str, str]],
) -> Iterator[dict[str, Any]]:
    """Utterances of one table; each clip is opened once and its outcome kept in `probed`."""
    for row in rows:
        name, text = row["path"], unquote(row["sentence"])
        key, path = Path(name).stem, folder / "clips" / name
        if name not in probed:
            probed[name] = _probe(key, path, text, listed_seconds.get(name), skipped)
        clip = probed[name]
        if clip is not None:
            yield {
                "id": key,
                "audio": os.path.relpath(path, manifest_dir),
                "duration_seconds": clip[0],
                "sample_rate_hz": clip[1],
                "text": text,
                "speaker": row["client_id"],
                "dialect": next((row[column] for column in DIALECT_COLUMNS if row.get(column)), None),
                "language": folder.name.split("-")[0],
            }


def _probe(
    key: str, path: Path, text: str, listed_seconds: float | None, skipped: list[dict[str, str]]
) -> tuple[float, int] | None:
    clip = probe_transcribed(key, path, text, skipped)
    if clip is None or listed_seconds is None or abs(clip[0] - listed_seconds) <= DURATION_TOLERANCE_SECONDS:
        return clip
    reason = f"{path} lasts {clip[0]:.2f} s where clip_durations.tsv has {listed_seconds:.2f} s; copy it again"
    skipped.append({"id": key, "reason": reason})
    return None


def main(argv: list[str] | None = None) -> None:
    parser = corpus_parser(__doc__)
    parser.add_argument("--languages", nargs="+", help="such as en or zh-CN; without it all that are there")
    arguments = parser.parse_args(argv)

    def prepare() -> dict[str, Any]:
        if arguments.download:
            raise ValueError(
                "--download is not available for Common Voice; agree to the terms and get the archive of a language "
                "at https://datacollective.mozillafoundation.org, unpack it and pass the folder with --corpus-dir"
            )
        return prepare_common_voice(arguments.corpus_dir, arguments.output_dir, languages=arguments.languages)

    report(prepare, arguments.json)


if __name__ == "__main__":
    main()
