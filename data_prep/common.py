"""What the corpus scripts share: reading clips, noting what was skipped, and the command line."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import soundfile
from torch import Tensor

from speechkd.data.audio import AudioError, load_audio
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
