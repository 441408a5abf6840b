"""MELD: emotion and sentiment in television dialogues (Poria et al. 2019, https://arxiv.org/abs/1810.02508).

Layout: MELD.Raw/{train,dev,test}_sent_emo.csv and the clips dia<dialogue>_utt<utterance>.mp4 in train_splits/,
dev_splits_complete/ and output_repeated_splits_test/, or in train/, dev/ and test/. This script takes sound only, .wav
or .flac beside the videos or in place of them. To make it, in each folder:

    for clip in dia*.mp4; do ffmpeg -i "$clip" -vn -ac 1 -ar 16000 "${clip%.mp4}.wav"; done

The intent is the emotion; the slots hold both labels, emotion and sentiment. Dialogues are numbered anew in each split,
so ids start with the split. Test clips whose name starts with final_videos_test are left aside.
"""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from common import (
    audio_by_stem,
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

CLIP_FOLDERS = {"train": "train_splits", "dev": "dev_splits_complete", "test": "output_repeated_splits_test"}
COLUMNS = ("Utterance", "Speaker", "Emotion", "Sentiment", "Dialogue_ID", "Utterance_ID")
EMOTIONS = ("neutral", "joy", "sadness", "anger", "surprise", "fear", "disgust")
SENTIMENTS = ("negative", "neutral", "positive")
C1_CONTROLS = re.compile("[\x80-\x9f]")


def prepare_meld(corpus_dir: str | Path | None, output_dir: str | Path) -> dict[str, Any]:
    """Write train.jsonl, dev.jsonl and test.jsonl, which refer to the audio in place.

    Args:
        corpus_dir: folder that holds MELD.Raw/, or that folder itself.
        output_dir: folder for the manifests.

    Returns:
        Utterances per split, and skipped rows.

    Raises:
        ValueError: the folder is not the corpus, or has no usable clip.
    """
    corpus_dir = require_corpus_dir(corpus_dir, "MELD.Raw/*_sent_emo.csv and the clips").resolve()
    root = corpus_dir / "MELD.Raw" if (corpus_dir / "MELD.Raw").is_dir() else corpus_dir
    tables = {split: root / f"{split}_sent_emo.csv" for split in CLIP_FOLDERS}
    missing = [table.name for table in tables.values() if not table.is_file()]
    if missing:
        raise ValueError(f"{root} lacks {', '.join(missing)}; unpack the archives inside MELD.Raw.tar.gz there, too")
    output_dir = require_output_dir(output_dir).resolve()
    skipped: list[dict[str, str]] = []
    counts: dict[str, Any] = {}
    for split, table in tables.items():
        folders = [folder for folder in (root / CLIP_FOLDERS[split], root / split) if folder.is_dir()]
        rows = tqdm(read_csv(table, COLUMNS, skipped), desc=f"meld {split}", unit="clip")
        utterances = _utterances(rows, split, folders, output_dir, skipped)
        counts[split] = write_unique(output_dir / f"{split}.jsonl", utterances, skipped)
    return finish(output_dir, counts, skipped)


def mend_text(text: str) -> str:
    """Text with the quotation marks and dashes that were left as control characters U+0080 to U+009F.

    Windows-1252 has these signs at the same numbers; what it has not is dropped.
    """
    return C1_CONTROLS.sub(lambda match: match[0].encode("latin-1").decode("cp1252", errors="ignore"), text)


def _utterances(
    rows: Iterable[dict[str, str]],
    split: str,
    folders: list[Path],
    manifest_dir: Path,
    skipped: list[dict[str, str]],
) -> Iterator[dict[str, Any]]:
    audio = {stem: path for folder in folders for stem, path in audio_by_stem(folder).items()}
    videos = {path.stem: path for folder in folders for path in folder.glob("*.mp4")}
    for row in rows:
        stem = f"dia{row['Dialogue_ID']}_utt{row['Utterance_ID']}"
        key = f"{split}-{stem}"
        reason = _unusable(row, stem, audio, videos, split)
        if reason:
            skipped.append({"id": key, "reason": reason})
            continue
        probed = probe_transcribed(key, audio[stem], row["Utterance"], skipped)
        if probed is None:
            continue
        yield {
            "id": key,
            "audio": os.path.relpath(audio[stem], manifest_dir),
            "duration_seconds": probed[0],
            "sample_rate_hz": probed[1],
            "text": mend_text(row["Utterance"]),
            "speaker": row["Speaker"],
            "language": "en",
            "intent": row["Emotion"],
            "slots": [
                {"name": "emotion", "value": row["Emotion"]},
                {"name": "sentiment", "value": row["Sentiment"]},
            ],
        }


def _unusable(row: dict[str, str], stem: str, audio: dict[str, Path], videos: dict[str, Path], split: str) -> str:
    """Why a row has no clip or no known label; "" where it has both."""
    if row["Emotion"] not in EMOTIONS:
        return f"emotion {row['Emotion']!r} is none of {', '.join(EMOTIONS)}"
    if row["Sentiment"] not in SENTIMENTS:
        return f"sentiment {row['Sentiment']!r} is none of {', '.join(SENTIMENTS)}"
    if stem in audio:
        return ""
    if stem in videos:
        return f"{videos[stem]} is a video; take its sound out with ffmpeg, as --help says"
    return f"no {stem}.wav or .flac in {CLIP_FOLDERS[split]}/ or {split}/"


def main(argv: list[str] | None = None) -> None:
    arguments = corpus_parser(__doc__).parse_args(argv)

    def prepare() -> dict[str, Any]:
        if arguments.download:
            raise ValueError(
                "--download is not available, the clips are from a television series and may not be passed on; "
                "https://affective-meld.github.io says where to get MELD.Raw.tar.gz, unpack it and the archives in it, "
                "take the sound out of the videos as --help says, and pass the folder with --corpus-dir"
            )
        return prepare_meld(arguments.corpus_dir, arguments.output_dir)

    report(prepare, arguments.json)


if __name__ == "__main__":
    main()
