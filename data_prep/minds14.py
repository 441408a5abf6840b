"""MInDS-14: spoken e-banking requests with 14 intents in 14 locales, 8 kHz (Gerz et al. 2021, arXiv:2104.08524).

Layouts: the original MInDS-14/ with audio.zip and text.zip, or with both unpacked into audio/<locale>~<INTENT>/*.wav
and text/<locale>.csv (file, transcript, English translation, intent); or the Hugging Face Hub's
<locale>/*.parquet of PolyAI/minds14. What is packed is unpacked into the output folder. The corpus has no split:
by the hash of the utterance id 60 % are train, 20 % dev and 20 % test, in <locale>/<split>.jsonl. The transcripts
were made by machine. Licence CC BY 4.0.

`--download` fetches the parquet files of --languages from the Hub, at one revision, which lists no checksums.
"""

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from barista import split_bucket
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

from speechkd.files import atomic_write

INTENTS = (  # in the order of the class numbers of PolyAI/minds14
    "abroad",
    "address",
    "app_error",
    "atm_limit",
    "balance",
    "business_loan",
    "card_issues",
    "cash_deposit",
    "direct_debit",
    "freeze",
    "high_value_payment",
    "joint_account",
    "latest_transactions",
    "pay_bill",
)
HUB_URL = "https://huggingface.co/datasets/PolyAI/minds14/resolve/40ce77cb32a384e4d50a568e1ec39ac804019d33"
HUB_FILE = "train-00000-of-00001.parquet"
NUM_COLUMNS = 4


class Clip(NamedTuple):
    """One row of the corpus; `name` is its file as the corpus calls it, `<locale>~<INTENT>/<clip>.wav`."""

    name: str
    path: Path
    text: str
    intent: str


def utterance_id(name: str) -> str:
    """`en-US~ABROAD/1a2b.wav` as `en-US-ABROAD-1a2b`, which can be a file name too."""
    return name.removesuffix(".wav").replace("~", "-").replace("/", "-")


def split_of(key: str) -> str:
    """Split of an utterance id: buckets below 60 of 100 are train, below 80 dev, the others test."""
    bucket = split_bucket(key)
    return "train" if bucket < 60 else "dev" if bucket < 80 else "test"


def prepare_minds14(
    corpus_dir: str | Path | None, output_dir: str | Path, *, languages: list[str] | None = None
) -> dict[str, Any]:
    """Write <locale>/train.jsonl, dev.jsonl and test.jsonl, with intents and transcripts.

    Args:
        corpus_dir: the corpus in one of the layouts above, or the folder around MInDS-14/.
        output_dir: folder for the manifests, and for audio that was packed.
        languages: locales such as "en-US"; None takes all that are there.

    Returns:
        Utterances per manifest, and skipped rows.

    Raises:
        ValueError: the folder is not the corpus, lacks a locale, numbers its intents otherwise, or has no usable clip.
    """
    corpus_dir = require_corpus_dir(corpus_dir, "audio.zip and text.zip, or <locale>/*.parquet").resolve()
    root = corpus_dir / "MInDS-14" if (corpus_dir / "MInDS-14").is_dir() else corpus_dir
    output_dir = require_output_dir(output_dir).resolve()
    skipped: list[dict[str, str]] = []
    counts: dict[str, Any] = {}
    for locale, clips in _locales(root, output_dir, languages, skipped).items():
        splits: dict[str, list[dict[str, Any]]] = {"train": [], "dev": [], "test": []}
        for clip in tqdm(clips, desc=locale, unit="clip"):
            utterance = _utterance(clip, locale, output_dir / locale, skipped)
            if utterance is not None:
                splits[split_of(utterance["id"])].append(utterance)
        for split, utterances in splits.items():
            counts[f"{locale}/{split}"] = write_unique(output_dir / locale / f"{split}.jsonl", utterances, skipped)
    return finish(output_dir, counts, skipped)


def _locales(
    root: Path, output_dir: Path, languages: list[str] | None, skipped: list[dict[str, str]]
) -> dict[str, Iterator[Clip]]:
    """Rows of each wanted locale, from either layout."""
    text_dir, audio_dir = (_unpacked(root, name, output_dir) for name in ("text", "audio"))
    if text_dir is None or audio_dir is None:
        folders = language_folders(root, "*.parquet", languages)
        folders.pop("all", None)  # the Hub's copy of all locales in one
        return {
            locale: _parquet_clips(sorted(folder.glob("*.parquet")), output_dir / "audio")
            for locale, folder in folders.items()
        }
    tables = {path.stem: path for path in sorted(text_dir.glob("*.csv"))}
    missing = sorted(set(languages or []) - tables.keys())
    if missing:
        raise ValueError(f"languages {missing} are not in {text_dir}, only {sorted(tables)}; see --languages")
    return {locale: _csv_clips(tables[locale], audio_dir, skipped) for locale in languages or tables}


def _unpacked(root: Path, name: str, output_dir: Path) -> Path | None:
    """Folder `name` of the corpus, unpacked if need be; None where the corpus has neither it nor its zip file."""
    if (root / name).is_dir():
        return root / name
    archive, folder = root / f"{name}.zip", output_dir / "unpacked" / name
    if archive.is_file() and not folder.is_dir():
        from download import unpack

        unpack(archive, folder)
    return folder if archive.is_file() else None


def _csv_clips(table: Path, audio_dir: Path, skipped: list[dict[str, str]]) -> Iterator[Clip]:
    """Rows of one locale; each line is parsed alone, so that a stray quotation mark costs one row only."""
    lines = read_lines(table, skipped)
    next(lines, None)  # the header
    for place, line in lines:
        try:
            name, text, _, intent = next(csv.reader([line], skipinitialspace=True, strict=True))
        except (csv.Error, ValueError) as error:
            skipped.append({"id": place, "reason": f"not a row of {NUM_COLUMNS} columns ({error})"})
            continue
        yield Clip(name, audio_dir / name, text.strip(), intent.strip().lower())


def _parquet_clips(files: list[Path], audio_dir: Path) -> Iterator[Clip]:
    """Rows of one locale, their audio written below `audio_dir`."""
    names_of_files = [str(path) for path in files]
    try:
        rows = datasets.load_dataset("parquet", data_files=names_of_files, split="train", streaming=True)
    except ValueError as error:
        raise ValueError(f"{names_of_files} cannot be read as parquet ({error}); fetch the files again") from error
    names = tuple(getattr(rows.features.get("intent_class"), "names", ()))
    if names != INTENTS:
        raise ValueError(f"{files[0]} numbers the intents {names}, not {INTENTS}; take the files of PolyAI/minds14")
    rows = rows.cast_column("audio", datasets.Audio(decode=False))
    for row in rows:
        # the folders before the last two parts are those of the machine that made the file
        name = "/".join(Path(row["path"]).parts[-2:])
        path = audio_dir / f"{utterance_id(name)}.wav"
        with atomic_write(path) as temporary:
            temporary.write_bytes((row["audio"] or {}).get("bytes") or b"")
        index = row["intent_class"]
        intent = names[index] if index in range(len(names)) else str(index)
        yield Clip(name, path, (row["transcription"] or "").strip(), intent)


def _utterance(clip: Clip, locale: str, manifest_dir: Path, skipped: list[dict[str, str]]) -> dict[str, Any] | None:
    """The manifest's row, or None where the clip cannot be used."""
    key = utterance_id(clip.name)
    if clip.intent not in INTENTS:
        skipped.append({"id": key, "reason": f"its intent {clip.intent!r} is none of the {len(INTENTS)}"})
        return None
    header = probe_transcribed(key, clip.path, clip.text, skipped)
    if header is None:
        return None
    return {
        "id": key,
        "audio": os.path.relpath(clip.path, manifest_dir),
        "duration_seconds": header[0],
        "sample_rate_hz": header[1],
        "text": clip.text,
        "language": locale.split("-")[0],
        "intent": clip.intent,
    }


def download_minds14(corpus_dir: Path, languages: list[str]) -> None:
    """Fetch the parquet files that are not there yet.

    Raises:
        ValueError: the Hub cannot be reached or lacks a locale.
    """
    from download import fetch

    for locale in languages:
        fetch(f"{HUB_URL}/{locale}/{HUB_FILE}", corpus_dir / locale / HUB_FILE)


def main(argv: list[str] | None = None) -> None:
    parser = corpus_parser(__doc__)
    parser.add_argument("--languages", nargs="+", help="such as en-US; without it all that are there")
    arguments = parser.parse_args(argv)

    def prepare() -> dict[str, Any]:
        if arguments.download:
            if arguments.corpus_dir is None or arguments.languages is None:
                raise ValueError("--download needs --corpus-dir, the folder to fetch into, and --languages")
            download_minds14(arguments.corpus_dir, arguments.languages)
        return prepare_minds14(arguments.corpus_dir, arguments.output_dir, languages=arguments.languages)

    report(prepare, arguments.json)


if __name__ == "__main__":
    main()
