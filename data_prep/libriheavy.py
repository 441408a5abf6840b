"""Libriheavy: segments of long recordings, cased and punctuated (Kang et al. 2023, https://arxiv.org/abs/2309.08105).

Layout: libriheavy_cuts_<subset>.jsonl or .jsonl.gz (lhotse cuts, one a line) and the recordings that they name, as in
librilight/<subset>/<speaker>/<book>/<chapter>.flac. Other corpora in this form work too: every file with `cuts` in its
name is read. `--download` fetches the audio of --subsets (Libri-Light, public domain; small is 35 GB, medium 321 GB,
large 3 TB) and their cuts (Apache-2.0); the cuts of dev and test are fetched by hand.
"""

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from common import corpus_parser, finish, probe_clip, report, require_corpus_dir, require_output_dir
from download import fetch, unpack
from tqdm import tqdm

from speechkd.data.audio import DURATION_TOLERANCE_SECONDS
from speechkd.data.manifest import write_manifest

LAYOUT = "libriheavy_cuts_<subset>.jsonl.gz and librilight/<subset>/"
LANGUAGES = {"English": "en"}
AUDIO_URL = "https://dl.fbaipublicfiles.com/librilight/data"
AUDIO_MD5 = {  # https://github.com/facebookresearch/libri-light/tree/main/data_preparation
    "small": "c49207eb86a8e8ac895561c37232041e",
    "medium": "c75e7ac62471bfbf2db77528d62a9b74",
    "large": "4dfbac018f50b99797ece101fc9f0c30",
}
CUTS_URL = "https://huggingface.co/datasets/pkufool/libriheavy/resolve/1cf8c43c9971703480c0e8fb686efb4e7aee656a"
CUTS_SHA256 = {
    "small": "08a399233caf3f969818dc011db5a7793e5be68c0819d0b16a7de0eb4cf5e5a6",
    "medium": "d9543afdb1bbe4d67ea72fc0080bf389be241a3811e1701b084f9d0502b14a9e",
    "large": "3add95b5e68e0046b9cc38805e627db13dba70f0de2e337c88afb444bae679a3",
}

Recording = tuple[Path, float, int]  # file, duration in seconds, rate in Hz


def prepare_libriheavy(corpus_dir: str | Path | None, output_dir: str | Path) -> dict[str, Any]:
    """Write <subset>.jsonl for every file of cuts; its utterances are parts of long recordings, by `offset_seconds`.

    Args:
        corpus_dir: folder with the cuts and the recordings. A recording is looked for under the path that the cut
            gives, then under that path without its first folder, and so on: Libriheavy's begin with download/.
        output_dir: folder for the manifests, which refer to the audio in place.

    Returns:
        Utterances per manifest, and skipped cuts.

    Raises:
        ValueError: there are no cuts, a file of cuts is truncated, or no cut can be used.
    """
    corpus_dir = require_corpus_dir(corpus_dir, LAYOUT).resolve()
    cut_files = {_subset(path): path for path in sorted(corpus_dir.glob("*cuts*.jsonl*")) if _subset(path)}
    if not cut_files:
        raise ValueError(f"no *cuts*.jsonl or *cuts*.jsonl.gz in {corpus_dir}; it needs {LAYOUT}")
    output_dir = require_output_dir(output_dir)
    if output_dir.resolve() == corpus_dir:
        raise ValueError(f"output folder {output_dir} holds the cuts, which manifests could replace; choose another")
    skipped: list[dict[str, str]] = []

    @cache
    def find(source: str) -> Recording:
        return _find_recording(source, corpus_dir)

    counts: dict[str, Any] = {
        subset: write_manifest(output_dir / f"{subset}.jsonl", _utterances(path, find, output_dir.resolve(), skipped))
        for subset, path in cut_files.items()
    }
    return finish(output_dir, counts, skipped)


def _subset(path: Path) -> str:
    """Name of the manifest: libriheavy_cuts_small.jsonl.gz is small; "" for a file that is not JSONL."""
    stem = path.name.removesuffix(".gz")
    return stem.removesuffix(".jsonl").removeprefix("libriheavy_cuts_") if stem.endswith(".jsonl") else ""


def _utterances(
    cut_file: Path, find: Callable[[str], Recording], manifest_dir: Path, skipped: list[dict[str, str]]
) -> Iterator[dict[str, Any]]:
    """Utterances of one file, streamed: the large subset has millions; what cannot be used is added to `skipped`."""
    opener: Any = gzip.open if cut_file.suffix == ".gz" else open
    with opener(cut_file, "rb") as file:
        try:
            for number, line in enumerate(tqdm(file, desc=cut_file.name, unit="cut"), start=1):
                key = f"{cut_file.name}:{number}"
                try:
                    cut = json.loads(line)
                    key = str(cut["id"])
                    utterance = _utterance(cut, key, find, manifest_dir)
                except (LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
                    skipped.append({"id": key, "reason": f"is not a lhotse cut with one source ({error!r})"})
                except ValueError as error:
                    skipped.append({"id": key, "reason": str(error)})
                else:
                    yield utterance
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{cut_file} is truncated or damaged ({error}); fetch it again") from error


def _utterance(cut: dict[str, Any], key: str, find: Callable[[str], Recording], manifest_dir: Path) -> dict[str, Any]:
    start, duration = float(cut["start"]), float(cut["duration"])
    if len(cut["supervisions"]) != 1:
        raise ValueError(f"has {len(cut['supervisions'])} supervisions where one is needed")
    supervision = cut["supervisions"][0]
    # `custom.texts` holds the book's text, then that of the recogniser which aligned it
    text = (supervision.get("text") or (supervision.get("custom") or {}).get("texts", [""])[0]).strip()
    if not text:
        raise ValueError("has no text")
    text.encode()  # raises where it has half a surrogate pair, which no manifest can hold
    audio, recording_seconds, rate_hz = find(cut["recording"]["sources"][0]["source"])
    if not (0 <= start < recording_seconds and 0 < duration <= recording_seconds - start + DURATION_TOLERANCE_SECONDS):
        raise ValueError(
            f"goes from {start:.2f} s to {start + duration:.2f} s, but {audio} lasts {recording_seconds:.2f} s"
        )
    speaker, language = supervision.get("speaker"), supervision.get("language")
    return {
        "id": key,
        "audio": os.path.relpath(audio, manifest_dir),
        "duration_seconds": duration,
        "sample_rate_hz": rate_hz,
        "offset_seconds": start,
        "text": text,
        "speaker": None if speaker is None else str(speaker),
        "language": LANGUAGES.get(language, language),
    }


def _find_recording(source: str, corpus_dir: Path) -> Recording:
    """The file that a cut names, wherever the corpus was moved to.

    Raises:
        ValueError: there is none; AudioError: it cannot be opened.
    """
    parts = PurePosixPath(source).parts
    for first in range(len(parts)):
        path = corpus_dir.joinpath(*parts[first:])
        if path.is_file() and ".." not in parts:
            return (path, *probe_clip(path))
    raise ValueError(f"recording {source} does not exist in {corpus_dir}")


def download_libriheavy(corpus_dir: Path, subsets: list[str]) -> None:
    """Fetch and unpack the audio of subsets into librilight/ and fetch their cuts, unless they are there.

    Raises:
        ValueError: a server cannot be reached, or a file has another checksum.
    """
    for subset in subsets:
        cuts = f"libriheavy_cuts_{subset}.jsonl.gz"
        fetch(f"{CUTS_URL}/{cuts}", corpus_dir / cuts, checksum=f"sha256:{CUTS_SHA256[subset]}")
        folder = corpus_dir / "librilight" / subset
        if not folder.is_dir():
            archive = fetch(
                f"{AUDIO_URL}/{subset}.tar", corpus_dir / f"{subset}.tar", checksum=f"md5:{AUDIO_MD5[subset]}"
            )
            # a tar that is not compressed holds no more than its own size
            unpack(archive, folder, inner=subset, max_bytes=archive.stat().st_size)
            archive.unlink()


def main(argv: list[str] | None = None) -> None:
    parser = corpus_parser(__doc__)
    parser.add_argument("--subsets", nargs="+", choices=list(AUDIO_MD5), default=["small"], help="for --download")
    arguments = parser.parse_args(argv)

    def prepare() -> dict[str, Any]:
        if arguments.download:
            if arguments.corpus_dir is None:
                raise ValueError("--download needs --corpus-dir, the folder to fetch Libriheavy into")
            download_libriheavy(arguments.corpus_dir, arguments.subsets)
        return prepare_libriheavy(arguments.corpus_dir, arguments.output_dir)

    report(prepare, arguments.json)


if __name__ == "__main__":
    main()
