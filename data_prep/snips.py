"""Snips SLU: spoken commands to lights and to a loudspeaker (Saade et al. 2018, https://arxiv.org/abs/1810.12735).

One run takes one data set. Layout of smart-lights-en-close-field/ (-far-field/ is the same): dataset.json has the
queries with intent and slots, speech_corpus/metadata.json the recordings with text and worker, and
speech_corpus/audio/*.wav the sound. Layout of smart-speaker-*: training_dataset.json, test_dataset.json, metadata.json
with the text and path_file of each recording, and the sound. A recording gets its labels from the query of its text.

The lights have no official split, the paper uses five-fold cross-validation. As in later work 80 % of the queries are
train, 10 % dev and 10 % test, here by the SHA-256 of the text: no text is on two sides, speakers are. The loudspeaker
keeps its own test set; a tenth of its training queries is dev by the same rule.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from barista import split_bucket
from common import (
    corpus_parser,
    finish,
    probe_transcribed,
    read_json,
    report,
    require_corpus_dir,
    require_output_dir,
    write_unique,
)
from tqdm import tqdm

LAYOUT = "dataset.json and speech_corpus/, such as snips_slu_data_v1.0/smart-lights-en-close-field"
WHERE = "https://github.com/sonos/spoken-language-understanding-research-datasets"


def prepare_snips(corpus_dir: str | Path | None, output_dir: str | Path) -> dict[str, Any]:
    """Write train.jsonl, dev.jsonl and test.jsonl, which refer to the audio in place.

    Args:
        corpus_dir: folder of one data set.
        output_dir: folder for the manifests.

    Returns:
        Utterances per split, and skipped recordings.

    Raises:
        ValueError: the folder is no data set of the corpus, a file of it is broken, or no recording can be used.
    """
    corpus_dir = require_corpus_dir(corpus_dir, LAYOUT).resolve()
    queries, language = read_queries(corpus_dir)
    output_dir = require_output_dir(output_dir).resolve()
    skipped: list[dict[str, str]] = []
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "dev": [], "test": []}
    for recording in tqdm(read_recordings(corpus_dir, skipped), desc=corpus_dir.name, unit="clip"):
        path, text = recording["path"], recording["text"]
        key = f"{corpus_dir.name}-{path.stem}"
        if text and text not in queries:
            skipped.append({"id": key, "reason": f"no query has the text {text!r}"})
            continue
        probed = probe_transcribed(key, path, text, skipped)
        if probed is None:
            continue
        query = queries[text]
        splits[query["split"]].append(
            {
                "id": key,
                "audio": os.path.relpath(path, output_dir),
                "duration_seconds": probed[0],
                "sample_rate_hz": probed[1],
                "text": text,
                "speaker": recording["speaker"],
                "language": language,
                "intent": query["intent"],
                "slots": query["slots"],
            }
        )
    counts: dict[str, Any] = {
        name: write_unique(output_dir / f"{name}.jsonl", utterances, skipped) for name, utterances in splits.items()
    }
    return finish(output_dir, counts, skipped)


def query_split(text: str, dataset: str) -> str:
    """Split of a query: `dataset` is the stem of the file that lists it."""
    bucket = split_bucket(text)
    if dataset == "test_dataset":
        return "test"
    if dataset == "training_dataset":
        return "train" if bucket < 90 else "dev"
    return "train" if bucket < 80 else "dev" if bucket < 90 else "test"


def read_queries(corpus_dir: Path) -> tuple[dict[str, dict[str, Any]], str]:
    """Queries by text, each with `split`, `intent` and `slots`, and their language.

    A text that stands under several intents counts for the first; one that is in training and test for test.

    Raises:
        ValueError: there is no such file, or it is not in Snips' format.
    """
    names = ("test_dataset", "training_dataset", "dataset")
    files = [corpus_dir / f"{name}.json" for name in names if (corpus_dir / f"{name}.json").is_file()]
    if not files:
        raise ValueError(f"{corpus_dir} has neither dataset.json nor training_dataset.json; expected {LAYOUT}")
    queries: dict[str, dict[str, Any]] = {}
    for file in files:
        content = read_json(file)
        try:
            language = content["language"]
            for intent, utterances in content["intents"].items():
                for utterance in utterances["utterances"]:
                    text = _plain("".join(chunk["text"] for chunk in utterance["data"]))
                    slots = [
                        {"name": chunk["slot_name"], "value": _plain(chunk["text"])}
                        for chunk in utterance["data"]
                        if "slot_name" in chunk
                    ]
                    query = {"split": query_split(text, file.stem), "intent": intent, "slots": slots}
                    queries.setdefault(text, query)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no Snips data set ({error!r}); copy it again from the corpus") from error
    return queries, language


def read_recordings(corpus_dir: Path, skipped: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """Recordings of a data set: `path`, `text` and `speaker`, which is None where the corpus does not name one.

    An entry that names no file or no text is added to `skipped` under "metadata.json:<key or position>".

    Raises:
        ValueError: there is no list of recordings.
    """
    speech_corpus = corpus_dir / "speech_corpus"
    file = (speech_corpus if speech_corpus.is_dir() else corpus_dir) / "metadata.json"
    if not file.is_file():
        raise ValueError(f"{file} does not exist; expected {LAYOUT}")
    content = read_json(file)
    if not isinstance(content, dict | list):
        raise ValueError(f"{file} holds a {type(content).__name__}, not the recordings; copy it again from the corpus")
    for key, entry in content.items() if isinstance(content, dict) else enumerate(content):
        try:
            yield {
                "path": file.parent / (f"audio/{entry['filename']}" if "filename" in entry else entry["path_file"]),
                "text": _plain(entry["text"]),
                "speaker": entry["worker"]["id"] if entry.get("worker") else None,
            }
        except (AttributeError, KeyError, TypeError) as error:
            skipped.append({"id": f"{file.name}:{key}", "reason": f"not a recording: {type(error).__name__}: {error}"})


def _plain(text: str) -> str:
    return " ".join(text.split())


def main(argv: list[str] | None = None) -> None:
    arguments = corpus_parser(__doc__).parse_args(argv)

    def prepare() -> dict[str, Any]:
        if arguments.download:
            raise ValueError(
                "--download is not available, the data sets are for research and given out on request; ask for them at "
                f"{WHERE} and pass the folder of one of them with --corpus-dir"
            )
        return prepare_snips(arguments.corpus_dir, arguments.output_dir)

    report(prepare, arguments.json)


if __name__ == "__main__":
    main()
