"""LibriSpeech: read English, 16 kHz, with transcripts (Panayotov et al. 2015, https://www.openslr.org/12).

Layout: LibriSpeech/<subset>/<speaker>/<chapter>/<speaker>-<chapter>-<number>.flac with <speaker>-<chapter>.trans.txt.
`--download` fetches the archives of --subsets from OpenSLR resource 12 and checks their MD5.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from common import corpus_parser, probe_clip, report, require_corpus_dir, require_output_dir, write_skipped
from download import UnreachableError, fetch, unpack
from tqdm import tqdm

from speechkd.data.audio import AudioError
from speechkd.data.manifest import write_manifest

ARCHIVES_URL = "https://www.openslr.org/resources/12"


def prepare_librispeech(corpus_dir: str | Path | None, output_dir: str | Path) -> dict[str, Any]:
    """Write <subset>.jsonl for every subset that is there, and train.jsonl with all of the train-* subsets.

    Args:
        corpus_dir: folder that holds LibriSpeech/, or LibriSpeech/ itself.
        output_dir: folder for the manifests, which refer to the audio in place.

    Returns:
        Utterances per manifest, transcripts without audio, audio without transcript, and skipped clips.

    Raises:
        ValueError: there is no subset with transcripts.
    """
    corpus_dir = require_corpus_dir(corpus_dir, "LibriSpeech/<subset>/<speaker>/<chapter>/").resolve()
    root = corpus_dir / "LibriSpeech" if (corpus_dir / "LibriSpeech").is_dir() else corpus_dir
    output_dir = require_output_dir(output_dir)
    skipped: list[dict[str, str]] = []
    subsets: dict[str, list[dict[str, Any]]] = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        transcripts = sorted(folder.glob("*/*/*.trans.txt"))
        if transcripts:
            progress = tqdm(transcripts, desc=folder.name, unit="chapter")
            chapters = [_chapter(path, output_dir.resolve(), skipped) for path in progress]
            subsets[folder.name] = [utterance for chapter in chapters for utterance in chapter]
    if not subsets:
        raise ValueError(
            f"no <subset>/<speaker>/<chapter>/*.trans.txt in {root}; give the folder that holds LibriSpeech/"
        )
    counts: dict[str, Any] = {
        name: write_manifest(output_dir / f"{name}.jsonl", rows) for name, rows in subsets.items()
    }
    train = [row for name, rows in subsets.items() if name.startswith("train-") for row in rows]
    if train:
        counts["train"] = write_manifest(output_dir / "train.jsonl", train)
    write_skipped(output_dir, skipped)
    return {**counts, "skipped": len(skipped)}


def _chapter(trans_file: Path, manifest_dir: Path, skipped: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Utterances of one chapter; what has no partner or cannot be opened is added to `skipped`."""
    lines = dict(line.split(" ", 1) for line in trans_file.read_text(encoding="utf-8").splitlines() if " " in line)
    audio = {path.stem: path for path in trans_file.parent.glob("*.flac")}
    skipped += [{"id": key, "reason": f"no line in {trans_file}"} for key in sorted(audio.keys() - lines.keys())]
    utterances = []
    for key, text in sorted(lines.items()):
        if key not in audio:
            skipped.append({"id": key, "reason": f"{trans_file.parent / key}.flac does not exist"})
            continue
        try:
            duration_seconds, rate_hz = probe_clip(audio[key])
        except AudioError as error:
            skipped.append({"id": key, "reason": str(error)})
            continue
        utterances.append(
            {
                "id": key,
                "audio": os.path.relpath(audio[key], manifest_dir),
                "duration_seconds": duration_seconds,
                "sample_rate_hz": rate_hz,
                "text": text.strip(),
                "speaker": key.split("-")[0],
                "language": "en",
            }
        )
    return utterances


def download_librispeech(corpus_dir: Path, subsets: list[str]) -> None:
    """Fetch and unpack subsets that are not there yet.

    Raises:
        UnreachableError: the server cannot be reached.
        ValueError: OpenSLR has no such subset, or an archive's MD5 is not the one that it lists.
    """
    with tempfile.TemporaryDirectory() as temporary:
        listing = fetch(f"{ARCHIVES_URL}/md5sum.txt", Path(temporary) / "md5sum.txt").read_text(encoding="utf-8")
    listed = {name: md5 for md5, name in (line.split() for line in listing.splitlines() if line)}
    for subset in subsets:
        folder, name = corpus_dir / "LibriSpeech" / subset, f"{subset}.tar.gz"
        if folder.is_dir():
            continue
        if name not in listed:
            raise ValueError(f"subset {subset!r} is not among {sorted(listed)} of {ARCHIVES_URL}; check --subsets")
        archive = fetch(f"{ARCHIVES_URL}/{name}", corpus_dir / name, checksum=f"md5:{listed[name]}")
        unpack(archive, folder, inner=f"LibriSpeech/{subset}")
        archive.unlink()


def main(argv: list[str] | None = None) -> None:
    parser = corpus_parser(__doc__)
    parser.add_argument("--subsets", nargs="+", default=["train-clean-100", "dev-clean", "test-clean"])
    arguments = parser.parse_args(argv)

    def prepare() -> dict[str, Any]:
        if arguments.download:
            if arguments.corpus_dir is None:
                raise ValueError("--download needs --corpus-dir, the folder to unpack LibriSpeech into")
            try:
                download_librispeech(arguments.corpus_dir, arguments.subsets)
            except UnreachableError as error:
                raise ValueError(
                    f"{ARCHIVES_URL} cannot be reached or lacks a subset ({error}); check the network and --subsets, "
                    "or fetch the archives by hand and pass their folder with --corpus-dir"
                ) from error
        return prepare_librispeech(arguments.corpus_dir, arguments.output_dir)

    report(prepare, arguments.json)


if __name__ == "__main__":
    main()
