"""SLURP: English commands to a home assistant, 16 kHz (Bastianelli et al. 2020, https://arxiv.org/abs/2011.13205).

Layout: dataset/slurp/{train,devel,test,train_synthetic}.jsonl, one sentence a line with all of its recordings, and
metadata.json with the speakers; audio/slurp_real/*.flac, and audio/slurp_synth/*.flac for train_synthetic (or both
beside dataset/). An utterance is one recording. Names that end in -headset are of the close microphone, the others of
the distant one.

The intent is scenario_action, which the official scorer uses too; the `intent` field of the annotations disagrees with
it now and then. A slot value is made of the tokens of its span, in lower case, as in the scorer.

`--download` fetches the annotations (CC BY 4.0) from GitHub and the audio (CC BY-NC 4.0) from Zenodo record 4274930,
whose MD5 are checked.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from common import (
    corpus_parser,
    finish,
    probe_transcribed,
    read_json,
    read_lines,
    report,
    require_corpus_dir,
    require_output_dir,
    write_unique,
)
from tqdm import tqdm

AUDIO_FOLDERS = {
    "train": "slurp_real",
    "devel": "slurp_real",
    "test": "slurp_real",
    "train_synthetic": "slurp_synth",
}
ANNOTATIONS_COMMIT = "8eb16545762be97ace75334109d73824217311f1"
ANNOTATIONS_URL = f"https://raw.githubusercontent.com/pswietojanski/slurp/{ANNOTATIONS_COMMIT}/dataset/slurp"
RECORD_URL = "https://zenodo.org/api/records/4274930"
ARCHIVES_URL = "https://zenodo.org/records/4274930/files"


def prepare_slurp(corpus_dir: str | Path | None, output_dir: str | Path) -> dict[str, Any]:
    """Write <split>.jsonl for every annotated split that is there; the manifests refer to the audio in place.

    Args:
        corpus_dir: the repository's folder.
        output_dir: folder for the manifests.

    Returns:
        Utterances per split, and skipped recordings and lines.

    Raises:
        ValueError: the folder is not the corpus, or has no usable recording; skipped.jsonl then names them all.
    """
    corpus_dir = require_corpus_dir(corpus_dir, "dataset/slurp/*.jsonl and audio/slurp_real/").resolve()
    annotations = corpus_dir / "dataset/slurp"
    splits = [split for split in AUDIO_FOLDERS if (annotations / f"{split}.jsonl").is_file()]
    if not splits:
        raise ValueError(f"{annotations} has none of {', '.join(f'{split}.jsonl' for split in AUDIO_FOLDERS)}")
    beside = any((corpus_dir / folder).is_dir() for folder in AUDIO_FOLDERS.values())
    audio_dir = corpus_dir if beside else corpus_dir / "audio"
    speakers = read_speakers(annotations / "metadata.json")
    output_dir = require_output_dir(output_dir).resolve()
    skipped: list[dict[str, str]] = []
    counts: dict[str, Any] = {}
    for split in splits:
        sentences = read_sentences(annotations / f"{split}.jsonl", skipped)
        progress = tqdm(sentences, desc=f"slurp {split}", unit="sentence")
        utterances = _utterances(progress, audio_dir / AUDIO_FOLDERS[split], speakers, output_dir, skipped)
        counts[split] = write_unique(output_dir / f"{split}.jsonl", utterances, skipped)
    return finish(output_dir, counts, skipped)


def read_sentences(path: Path, skipped: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """Annotated sentences of one split: `text`, `intent`, `slots` and `files`, the names of the recordings.

    A line that is not a whole annotation is added to `skipped` under "<file name>:<line number>".
    """
    for place, line in read_lines(path, skipped):
        try:
            yield _parse_sentence(json.loads(line))
        except (KeyError, TypeError, ValueError) as error:
            skipped.append({"id": place, "reason": f"not an annotated sentence: {type(error).__name__}: {error}"})


def _parse_sentence(annotation: dict[str, Any]) -> dict[str, Any]:
    for name in ("sentence", "scenario", "action"):
        if not isinstance(annotation[name], str) or not annotation[name].strip():
            raise ValueError(f"{name} is {annotation[name]!r}")
    surfaces = {token["id"]: token["surface"] for token in annotation["tokens"]}
    slots = [
        {"name": entity["type"], "value": " ".join(surfaces[index] for index in entity["span"]).lower()}
        for entity in annotation["entities"]
    ]
    if not all(slot["value"] for slot in slots):
        raise ValueError("an entity spans no token")
    return {
        "text": annotation["sentence"].strip(),
        "intent": f"{annotation['scenario']}_{annotation['action']}",
        "slots": slots,
        "files": [str(recording["file"]) for recording in annotation["recordings"]],
    }


def read_speakers(path: Path) -> dict[str, str]:
    """Speaker by recording name, from metadata.json; empty where the file is missing.

    Raises:
        ValueError: the file is not the corpus's metadata.
    """
    if not path.is_file():
        return {}
    try:
        return {
            file: recording["usrid"]
            for sentence in read_json(path).values()
            for file, recording in sentence["recordings"].items()
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not map sentences to recordings with their usrid ({error!r}); copy it again from the corpus"
        ) from error


def _utterances(
    sentences: Iterable[dict[str, Any]],
    audio_dir: Path,
    speakers: dict[str, str],
    manifest_dir: Path,
    skipped: list[dict[str, str]],
) -> Iterator[dict[str, Any]]:
    for sentence in sentences:
        for file in sentence["files"]:
            path = audio_dir / file
            probed = probe_transcribed(path.stem, path, sentence["text"], skipped)
            if probed is None:
                continue
            yield {
                "id": path.stem,
                "audio": os.path.relpath(path, manifest_dir),
                "duration_seconds": probed[0],
                "sample_rate_hz": probed[1],
                "text": sentence["text"],
                "speaker": speakers.get(file),
                "language": "en",
                "intent": sentence["intent"],
                "slots": sentence["slots"],
            }


def download_slurp(corpus_dir: Path) -> None:
    """Fetch the annotations and both audio archives, as far as they are not there yet.

    Raises:
        ValueError: a server cannot be reached, Zenodo lists no MD5 of an archive, or an archive has another one.
    """
    from download import fetch, unpack

    for name in (*(f"{split}.jsonl" for split in AUDIO_FOLDERS), "metadata.json"):
        fetch(f"{ANNOTATIONS_URL}/{name}", corpus_dir / "dataset/slurp" / name)
    audio_dir = corpus_dir / "audio"
    folders = sorted(folder for folder in set(AUDIO_FOLDERS.values()) if not (audio_dir / folder).is_dir())
    if not folders:
        return
    with tempfile.TemporaryDirectory() as temporary:
        record = read_json(fetch(RECORD_URL, Path(temporary) / "record.json"))
    checksums = {file["key"]: file["checksum"] for file in record.get("files", [])}
    for folder in folders:
        name = f"{folder}.tar.gz"
        if name not in checksums:
            raise ValueError(f"{RECORD_URL} lists no {name}, only {sorted(checksums)}; fetch the audio by hand")
        archive = fetch(f"{ARCHIVES_URL}/{name}", corpus_dir / name, checksum=checksums[name])
        unpack(archive, audio_dir / folder, inner=folder)
        archive.unlink()


def main(argv: list[str] | None = None) -> None:
    arguments = corpus_parser(__doc__).parse_args(argv)

    def prepare() -> dict[str, Any]:
        if arguments.download:
            if arguments.corpus_dir is None:
                raise ValueError("--download needs --corpus-dir, the folder to put dataset/ and audio/ into")
            download_slurp(arguments.corpus_dir)
        return prepare_slurp(arguments.corpus_dir, arguments.output_dir)

    report(prepare, arguments.json)


if __name__ == "__main__":
    main()
