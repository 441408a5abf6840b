"""What the corpus scripts share: reading clips, noting what was skipped, and the command line."""

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import soundfile
from torch import Tensor

from speechkd.data.audio import AudioError, load_audio
from speechkd.data.manifest import write_manifest
from speechkd.files import write_jsonl

AUDIO_SUFFIXES = (".wav", ".flac")


def probe_clip(path: Path) -> tuple[float, int]:
    """Duration in seconds and rate in Hz from the file's header; the samples are not decoded.

    Raises:
        AudioError: the header cannot be read or promises no samples.
    """
    try:
        info = soundfile.info(path)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise AudioError(f"{path}: cannot be opened ({error}); the file is corrupt, empty or not audio") from error
    if info.frames <= 0:
        raise AudioError(f"{path}: holds no samples; copy it again from the corpus")
    return info.frames / info.samplerate, info.samplerate


def read_clip(path: Path, sample_rate_hz: int | None = None) -> tuple[Tensor, int]:
    """Decode a whole clip, which proves that training can read it.

    Args:
        path: wav or flac file.
        sample_rate_hz: rate of the result; None keeps the file's own.

    Returns:
        Mono samples, (samples,), float32, and the rate of the file in Hz.

    Raises:
        AudioError: the clip is empty, truncated or not audio.
    """
    duration_seconds, file_rate_hz = probe_clip(path)
    return load_audio(path, sample_rate_hz or file_rate_hz, duration_seconds=duration_seconds), file_rate_hz


def audio_by_stem(folder: Path) -> dict[str, Path]:
    """Wav and flac files of one folder under their names without suffix, sorted; of two forms the wav counts."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in AUDIO_SUFFIXES)
    return {path.stem: path for path in files}


def require_corpus_dir(corpus_dir: str | Path | None, expected: str) -> Path:
    """The corpus folder as a path.

    Args:
        corpus_dir: what the user gave; None where `--corpus-dir` was left out.
        expected: the layout that the folder should have, for the message.

    Raises:
        ValueError: it was left out or does not exist.
    """
    if corpus_dir is None:
        raise ValueError(f"this corpus needs --corpus-dir, a folder with {expected}")
    if not Path(corpus_dir).is_dir():
        raise ValueError(f"corpus folder {corpus_dir} does not exist; give --corpus-dir a folder with {expected}")
    return Path(corpus_dir)


def require_output_dir(output_dir: str | Path) -> Path:
    """Create the output folder.

    Raises:
        ValueError: something that is not a folder has this name.
    """
    output_dir = Path(output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"output folder {output_dir} cannot be made, a file is in its way; choose another") from error
    return output_dir


def write_skipped(output_dir: Path, skipped: list[dict[str, str]]) -> None:
    """Name every left-out item in skipped.jsonl; the file is empty when nothing was, so that none is stale."""
    write_jsonl(output_dir / "skipped.jsonl", skipped)


def read_lines(path: Path, skipped: list[dict[str, str]]) -> Iterator[tuple[str, str]]:
    """Lines of a text file that are not blank, each with its place "<file name>:<line number>".

    A line that is not UTF-8 is added to `skipped` under its place.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path.name}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                where = f"byte 0x{line[error.start]:02x} at column {error.start + 1} of {path}"
                skipped.append({"id": place, "reason": f"not UTF-8: {where}"})
                continue
            if text.strip():
                yield place, text


def read_tsv(path: Path, columns: tuple[str, ...], skipped: list[dict[str, str]]) -> Iterator[dict[str, str]]:
    """Rows of a tab-separated table by column name; quotation marks are characters like any other.

    A row that has not as many columns as the header is added to `skipped` under its place.

    Args:
        path: the table, its first line the header.
        columns: what the header must have.
        skipped: items left out so far.

    Raises:
        ValueError: a column is missing.
    """
    lines = read_lines(path, skipped)
    header = next(lines, ("", ""))[1].split("\t")
    missing = [column for column in columns if column not in header]
    if missing:
        raise ValueError(f"{path} lacks the columns {missing}, it has {header}; copy it again from the corpus")
    for place, line in lines:
        values = line.split("\t")
        if len(values) == len(header):
            yield dict(zip(header, values, strict=True))
        else:
            reason = f"{len(values)} columns where the header of {path} has {len(header)}"
            skipped.append({"id": place, "reason": reason})


def read_csv(path: Path, columns: tuple[str, ...], skipped: list[dict[str, str]]) -> Iterator[dict[str, str]]:
    """Rows of a comma-separated table by column name, cells stripped.

    A row is one line, so a quotation mark that is never closed spoils no other row. A row that cannot be parsed, has
    not as many columns as the header or leaves one of `columns` empty is added to `skipped` under its place.

    Args:
        path: the table, its first line the header.
        columns: what the header must have and every row must fill.
        skipped: items left out so far.

    Raises:
        ValueError: a column is missing.
    """
    lines = read_lines(path, skipped)
    header = [cell.strip() for cell in next(csv.reader([next(lines, ("", ""))[1]]))]
    missing = [column for column in columns if column not in header]
    if missing:
        raise ValueError(f"{path} lacks the columns {missing}, it has {header}; copy it again from the corpus")
    for place, line in lines:
        try:
            cells = [cell.strip() for cell in next(csv.reader([line], strict=True))]
        except csv.Error as error:
            skipped.append({"id": place, "reason": f"not a row of {path}: {error}"})
            continue
        row = dict(zip(header, cells, strict=False))
        empty = [column for column in columns if not row.get(column)]
        if len(cells) != len(header):
            reason = f"{len(cells)} columns where the header of {path} has {len(header)}"
            skipped.append({"id": place, "reason": reason})
        elif empty:
            skipped.append({"id": place, "reason": f"nothing in the columns {empty} of {path}"})
        else:
            yield row


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it again from the corpus") from error


def probe_transcribed(key: str, path: Path, text: str, skipped: list[dict[str, str]]) -> tuple[float, int] | None:
    """`probe_clip` for a clip that must have a transcript; None, and a line in `skipped`, where it cannot be used."""
    if not text:
        reason = "its transcript is empty"
    elif not path.is_file():
        reason = f"{path} does not exist"
    else:
        try:
            return probe_clip(path)
        except AudioError as error:
            reason = str(error)
    skipped.append({"id": key, "reason": reason})
    return None


def language_folders(corpus_dir: Path, marker: str, languages: list[str] | None) -> dict[str, Path]:
    """Folders of the languages by their names: `corpus_dir` itself, or folders one or two levels below it.

    Args:
        corpus_dir: the corpus, a folder around it, or one language of it.
        marker: glob pattern of a file or folder that each language has.
        languages: which ones; None takes all that are there.

    Raises:
        ValueError: there is no such folder, a wanted language is not there, or one is there twice.
    """
    for level in ([corpus_dir], corpus_dir.glob("*"), corpus_dir.glob("*/*")):
        folders = sorted(folder for folder in level if folder.is_dir() and any(folder.glob(marker)))
        if folders:
            break
    else:
        raise ValueError(f"{corpus_dir} has no <language>/{marker}; give --corpus-dir the corpus in its public layout")
    names = [folder.name for folder in folders]
    missing = sorted(set(languages or []) - set(names))
    if missing:
        raise ValueError(f"languages {missing} are not in {corpus_dir}, only {sorted(set(names))}; see --languages")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"languages {twice} are there twice: {[str(folder) for folder in folders]}; give one release")
    return {folder.name: folder for folder in folders if languages is None or folder.name in languages}


def write_unique(path: Path, utterances: Iterable[dict[str, Any]], skipped: list[dict[str, str]]) -> int:
    """`write_manifest` of the first utterance of each id; a repeated one is added to `skipped`."""
    seen: set[str] = set()

    def first_ones() -> Iterator[dict[str, Any]]:
        for utterance in utterances:
            if utterance["id"] in seen:
                skipped.append({"id": utterance["id"], "reason": f"its id is in {path.name} already"})
            else:
                seen.add(utterance["id"])
                yield utterance

    return write_manifest(path, first_ones())


def finish(output_dir: Path, counts: dict[str, Any], skipped: list[dict[str, str]]) -> dict[str, Any]:
    """Write skipped.jsonl; the counts, with that of the skipped items.

    Raises:
        ValueError: not one utterance could be used.
    """
    write_skipped(output_dir, skipped)
    if not any(counts.values()):
        raise ValueError(
            f"no utterance could be used, {len(skipped)} items were skipped; see {output_dir / 'skipped.jsonl'}"
        )
    return {**counts, "skipped": len(skipped)}


def corpus_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every corpus script has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus-dir", type=Path, help="folder of the corpus, in its public layout")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the manifests")
    parser.add_argument("--download", action="store_true", help="fetch the corpus first, where a script can")
    parser.add_argument("--json", action="store_true", help="print the counts as one JSON object")
    return parser


def refuse_download(download: bool, repository: str) -> None:
    """Raise for a corpus that is fetched with git.

    Raises:
        ValueError: `--download` was given; the message names the repository.
    """
    if download:
        raise ValueError(
            f"--download is not available for this corpus; run `git clone https://github.com/{repository}` "
            "and pass the folder with --corpus-dir"
        )


def report(prepare: Callable[[], dict[str, Any]], as_json: bool) -> None:
    """Run a preparation and print its counts; bad input ends the process with code 2 and its message on stderr."""
    try:
        counts = prepare()
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if as_json:
        print(json.dumps(counts))
    else:
        print("\n".join(f"{name}: {count}" for name, count in counts.items()))
