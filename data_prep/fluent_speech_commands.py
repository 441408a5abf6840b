"""Fluent Speech Commands: English commands to a home, 16 kHz (Lugosch et al. 2019, https://arxiv.org/abs/1904.03670).

Layout: fluent_speech_commands_dataset/data/{train,valid,test}_data.csv and wavs/speakers/<speaker>/<uuid>.wav; no
speaker is in two splits. An utterance counts as understood when action, object and location are all right, so the
intent joins the three, as in `increase|heat|kitchen`, 31 in all. `none` stands for an object or a location that was not
said: it is part of the intent, but no slot.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from common import (
    corpus_parser,
    finish,
    probe_transcribed,
    read_csv,
    report,
    require_corpus_dir,
    require_output_dir,
    write_unique,
)
from tqdm import tqdm

SPLITS = ("train", "valid", "test")
ATTRIBUTES = ("action", "object", "location")
COLUMNS = ("path", "speakerId", "transcription", *ATTRIBUTES)
WHERE = "https://fluent.ai/fluent-speech-commands-a-dataset-for-spoken-language-understanding-research/"


def prepare_fluent_speech_commands(corpus_dir: str | Path | None, output_dir: str | Path) -> dict[str, Any]:
    """Write train.jsonl, valid.jsonl and test.jsonl, which refer to the audio in place.

    Args:
        corpus_dir: folder that holds fluent_speech_commands_dataset/, or that folder itself.
        output_dir: folder for the manifests.

    Returns:
        Utterances per split, and skipped rows.

    Raises:
        ValueError: the folder is not the corpus, or has no usable clip.
    """
    corpus_dir = require_corpus_dir(corpus_dir, "fluent_speech_commands_dataset/data/ and wavs/speakers/").resolve()
    inner = corpus_dir / "fluent_speech_commands_dataset"
    root = inner if inner.is_dir() else corpus_dir
    tables = {split: root / f"data/{split}_data.csv" for split in SPLITS}
    missing = [str(table.relative_to(root)) for table in tables.values() if not table.is_file()]
    if missing:
        raise ValueError(f"{root} lacks {', '.join(missing)}; give --corpus-dir the corpus in its public layout")
    output_dir = require_output_dir(output_dir).resolve()
    skipped: list[dict[str, str]] = []
    counts: dict[str, Any] = {}
    for split, table in tables.items():
        rows = tqdm(read_csv(table, COLUMNS, skipped), desc=f"fluent speech commands {split}", unit="clip")
        utterances = _utterances(rows, root, output_dir, skipped)
        counts[split] = write_unique(output_dir / f"{split}.jsonl", utterances, skipped)
    return finish(output_dir, counts, skipped)


def _utterances(
    rows: Iterable[dict[str, str]], root: Path, manifest_dir: Path, skipped: list[dict[str, str]]
) -> Iterator[dict[str, Any]]:
    for row in rows:
        path = root / row["path"]
        key = f"{row['speakerId']}-{path.stem}"
        probed = probe_transcribed(key, path, row["transcription"], skipped)
        if probed is None:
            continue
        yield {
            "id": key,
            "audio": os.path.relpath(path, manifest_dir),
            "duration_seconds": probed[0],
            "sample_rate_hz": probed[1],
            "text": row["transcription"],
            "speaker": row["speakerId"],
            "language": "en",
            "intent": "|".join(row[name] for name in ATTRIBUTES),
            "slots": [{"name": name, "value": row[name]} for name in ATTRIBUTES if row[name] != "none"],
        }


def main(argv: list[str] | None = None) -> None:
    arguments = corpus_parser(__doc__).parse_args(argv)

    def prepare() -> dict[str, Any]:
        if arguments.download:
            raise ValueError(
                "--download is not available, the corpus is for academic research under a license of its own; "
                f"get it from {WHERE} and pass the folder with --corpus-dir"
            )
        return prepare_fluent_speech_commands(arguments.corpus_dir, arguments.output_dir)

    report(prepare, arguments.json)


if __name__ == "__main__":
    main()
