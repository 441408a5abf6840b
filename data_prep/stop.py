"""STOP: spoken task-oriented parsing, English, 16 kHz (Tomasello et al. 2022, https://arxiv.org/abs/2207.10643).

Layout: stop/manifests/{train,eval,test}.tsv, whose file_id is a path below stop/. Every sentence of eval and test was
recorded twice: test_0/alarm_test_0/00003470.wav and test_1/alarm_test_1/00003470.wav. On disk the inner folder may lack
the last number (test_0/alarm_test/), both are looked for.

Text is the normalised utterance, intent and slots come from the decoupled normalised parse. A manifest's slots are a
flat list while parses nest, so that the slots of

    [IN:GET_DIRECTIONS [SL:DESTINATION [IN:GET_EVENT [SL:NAME_EVENT Eagles ] [SL:CAT_EVENT game ] ] ] ]

are named DESTINATION/GET_EVENT/NAME_EVENT and DESTINATION/GET_EVENT/CAT_EVENT. Exact match of whole parses needs the
table itself.
"""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from common import (
    corpus_parser,
    finish,
    probe_transcribed,
    read_tsv,
    report,
    require_corpus_dir,
    require_output_dir,
    write_unique,
)
from tqdm import tqdm

SPLITS = ("train", "eval", "test")
COLUMNS = ("file_id", "normalized_utterance", "decoupled_normalized_seqlogical")
TOKEN = re.compile(r"\[(?:IN|SL):[^\s\[\]]+|[\[\]]|[^\s\[\]]+")


def prepare_stop(corpus_dir: str | Path | None, output_dir: str | Path) -> dict[str, Any]:
    """Write train.jsonl, eval.jsonl and test.jsonl, as far as their tables are there; they refer to the audio in place.

    Args:
        corpus_dir: folder that holds stop/, or that folder itself.
        output_dir: folder for the manifests.

    Returns:
        Utterances per split, and skipped rows.

    Raises:
        ValueError: the folder is not the corpus, or has no usable clip.
    """
    corpus_dir = require_corpus_dir(corpus_dir, "stop/manifests/ and the folders of wav files beside it").resolve()
    root = corpus_dir / "stop" if (corpus_dir / "stop/manifests").is_dir() else corpus_dir
    tables = {split: root / f"manifests/{split}.tsv" for split in SPLITS}
    if not any(table.is_file() for table in tables.values()):
        raise ValueError(f"{root} has none of {', '.join(f'manifests/{split}.tsv' for split in SPLITS)}")
    output_dir = require_output_dir(output_dir).resolve()
    skipped: list[dict[str, str]] = []
    counts: dict[str, Any] = {}
    for split, table in tables.items():
        if table.is_file():
            rows = tqdm(read_tsv(table, COLUMNS, skipped), desc=f"stop {split}", unit="clip")
            utterances = _utterances(rows, root, output_dir, skipped)
            counts[split] = write_unique(output_dir / f"{split}.jsonl", utterances, skipped)
    return finish(output_dir, counts, skipped)


def parse_seqlogical(parse: str) -> tuple[str, list[dict[str, str]]]:
    """Intent and slots of a linearised parse.

    Args:
        parse: such as "[IN:GET_WEATHER [SL:LOCATION seattle ] ]".

    Returns:
        The outermost label, and one slot for every inner label that has words of its own, outer before inner. Its name
        is that label after those around it, without the outermost, joined by "/"; its value are the words.

    Raises:
        ValueError: brackets do not match, or the outermost label is no intent.
    """
    labels: list[tuple[str, list[str]]] = []  # all that were opened: name and words
    opened: list[tuple[str, list[str]]] = []
    for token in TOKEN.findall(parse):
        if labels and not opened:
            raise ValueError(f"parse {parse!r} goes on after its last bracket")
        if token.startswith("["):
            if token == "[" or (not opened and not token.startswith("[IN:")):
                raise ValueError(f"parse {parse!r} opens {token!r} where a label [IN: or [SL: belongs")
            outer = opened[-1][0] if len(opened) > 1 else ""
            opened.append((f"{outer}/{token[4:]}".lstrip("/"), []))
            labels.append(opened[-1])
        elif not opened:
            raise ValueError(f"parse {parse!r} does not start with an intent")
        elif token == "]":
            opened.pop()
        else:
            opened[-1][1].append(token)
    if not labels:
        raise ValueError("there is no parse")
    if opened:
        raise ValueError(f"parse {parse!r} ends before its last bracket")
    return labels[0][0], [{"name": name, "value": " ".join(words)} for name, words in labels[1:] if words]


def find_clip(root: Path, file_id: str) -> Path:
    """File of a row: as the table names it, or in the folder without the recording's number where that exists."""
    renamed = root / re.sub(r"_\d/([^/]+)$", r"/\1", file_id)
    return renamed if not (root / file_id).is_file() and renamed.is_file() else root / file_id


def _utterances(
    rows: Iterable[dict[str, str]], root: Path, manifest_dir: Path, skipped: list[dict[str, str]]
) -> Iterator[dict[str, Any]]:
    for row in rows:
        key = str(PurePosixPath(row["file_id"]).with_suffix("")).replace("/", "-")
        try:
            intent, slots = parse_seqlogical(row["decoupled_normalized_seqlogical"])
        except ValueError as error:
            skipped.append({"id": key, "reason": str(error)})
            continue
        path, text = find_clip(root, row["file_id"]), row["normalized_utterance"].strip()
        probed = probe_transcribed(key, path, text, skipped)
        if probed is None:
            continue
        yield {
            "id": key,
            "audio": os.path.relpath(path, manifest_dir),
            "duration_seconds": probed[0],
            "sample_rate_hz": probed[1],
            "text": text,
            "language": "en",
            "intent": intent,
            "slots": slots,
        }


def main(argv: list[str] | None = None) -> None:
    arguments = corpus_parser(__doc__).parse_args(argv)

    def prepare() -> dict[str, Any]:
        if arguments.download:
            raise ValueError(
                "--download is not available, the corpus has a license agreement of its own: read "
                "https://dl.fbaipublicfiles.com/stop/LICENSE.txt, then fetch and unpack "
                "https://dl.fbaipublicfiles.com/stop/stop.tar.gz and pass the folder with --corpus-dir"
            )
        return prepare_stop(arguments.corpus_dir, arguments.output_dir)

    report(prepare, arguments.json)


if __name__ == "__main__":
    main()
