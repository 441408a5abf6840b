"""TED-LIUM release 3: TED talks in English, 16 kHz (Hernandez et al. 2018, https://www.openslr.org/51).

Layout: legacy/{train,dev,test}/sph/<talk>.sph with stm/<talk>.stm; the legacy split is the one that results are
reported on. An utterance is a segment of a talk, given by `offset_seconds` and `duration_seconds`. Two kinds of lines
are no speech to learn from and are left out and counted, not skipped: `ignore_time_segment_in_scoring` and the
speaker `inter_segment_gap`. `clean_text` says what is done to the transcripts.

`--download` is refused: the archive (about 50 GB, CC BY-NC-ND 3.0) holds links from legacy/ into data/, which are not
unpacked unseen.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common import (
    corpus_parser,
    finish,
    probe_clip,
    read_lines,
    report,
    require_corpus_dir,
    require_output_dir,
    write_unique,
)
from tqdm import tqdm

from speechkd.data.audio import DURATION_TOLERANCE_SECONDS, AudioError

SPLITS = ("train", "dev", "test")
IGNORED_TEXT = "ignore_time_segment_in_scoring"
GAP_SPEAKER = "inter_segment_gap"
# unknown words and silences, pronunciation variants, noises
MARKS = re.compile(r"<(unk|sil)>|\([0-9]+\)|[{\[][A-Z]+[}\]]")
SPLIT_CONTRACTION = re.compile(r"(?<=\w) '(?=(?:s|re|ve|ll|d|m|t|clock)\b)|(?<=s) '(?= |$)")


class Segment(NamedTuple):
    """One line of an STM file; times in seconds from the start of the talk."""

    speaker: str
    start_seconds: float
    end_seconds: float
    text: str


def clean_text(text: str) -> str:
    """A transcript as one would write it.

    Marks are dropped: `<unk>` for a word outside of the corpus's vocabulary (it is spoken, but nobody knows which word
    it is), `<sil>`, noises such as `{NOISE}`, and the number of a pronunciation such as `(2)`. Contractions and
    genitives, which the corpus splits before the apostrophe, are joined: `it 's` becomes `it's`; `get 'em` stays.
    """
    return SPLIT_CONTRACTION.sub("'", " ".join(MARKS.sub(" ", text).split()))


def prepare_tedlium(corpus_dir: str | Path | None, output_dir: str | Path) -> dict[str, Any]:
    """Write train.jsonl, dev.jsonl and test.jsonl, as far as they are there; they refer to the talks in place.

    Args:
        corpus_dir: folder that holds TEDLIUM_release-3/, that folder itself, or its legacy/.
        output_dir: folder for the manifests.

    Returns:
        Utterances per split, lines that are no speech, and skipped lines or talks.

    Raises:
        ValueError: the folder is not the corpus, or has no usable segment.
    """
    corpus_dir = require_corpus_dir(corpus_dir, "TEDLIUM_release-3/legacy/{train,dev,test}/{sph,stm}/").resolve()
    roots = [corpus_dir / "TEDLIUM_release-3/legacy", corpus_dir / "legacy", corpus_dir]
    root = next((root for root in roots if any(root.glob("*/stm/*.stm"))), None)
    if root is None:
        raise ValueError(f"no legacy/<split>/stm/*.stm in {corpus_dir}; give the folder that holds legacy/")
    output_dir = require_output_dir(output_dir).resolve()
    skipped: list[dict[str, str]] = []
    counts: dict[str, Any] = {}
    not_speech: list[str] = []
    for split in SPLITS:
        if (root / split / "stm").is_dir():
            utterances = _utterances(root / split, output_dir, not_speech, skipped)
            counts[split] = write_unique(output_dir / f"{split}.jsonl", utterances, skipped)
    return {**finish(output_dir, counts, skipped), "not_speech": len(not_speech)}


def _utterances(
    folder: Path, manifest_dir: Path, not_speech: list[str], skipped: list[dict[str, str]]
) -> Iterator[dict[str, Any]]:
    """Utterances of one split; places of lines that are no speech go to `not_speech`."""
    tables = {path.stem: path for path in sorted((folder / "stm").glob("*.stm"))}
    talks = {path.stem: path for path in sorted((folder / "sph").glob("*.sph"))}
    skipped += [{"id": talk, "reason": f"no {talk}.stm in {folder / 'stm'}"} for talk in talks if talk not in tables]
    for talk, table in tqdm(tables.items(), desc=folder.name, unit="talk"):
        try:
            if talk not in talks:
                raise AudioError(f"no {talk}.sph in {folder / 'sph'}")
            talk_seconds, rate_hz = probe_clip(talks[talk])
        except AudioError as error:
            skipped.append({"id": talk, "reason": str(error)})
            continue
        for segment in _segments(table, talk_seconds, not_speech, skipped):
            start, end = segment.start_seconds, segment.end_seconds
            yield {
                "id": f"{talk}-{round(100 * start):07d}-{round(100 * end):07d}",
                "audio": os.path.relpath(talks[talk], manifest_dir),
                "offset_seconds": start,
                "duration_seconds": round(min(end, talk_seconds) - start, 6),
                "sample_rate_hz": rate_hz,
                "text": segment.text,
                "speaker": segment.speaker,
                "language": "en",
            }


def _segments(
    table: Path, talk_seconds: float, not_speech: list[str], skipped: list[dict[str, str]]
) -> Iterator[Segment]:
    """Usable segments of one talk, texts cleaned."""
    for place, line in read_lines(table, skipped):
        if line.startswith(";;"):
            continue
        # talk, channel, speaker, start, end, <condition>, text
        values = line.split(maxsplit=6)
        text = values[6].strip() if len(values) == 7 else ""
        if len(values) > 2 and (values[2].lower() == GAP_SPEAKER or text.lower() == IGNORED_TEXT):
            not_speech.append(place)
            continue
        try:
            segment = Segment(values[2], float(values[3]), float(values[4]), clean_text(text))
        except (IndexError, ValueError):
            reason = f"{line!r} is not `talk channel speaker start end <condition> text`"
            skipped.append({"id": place, "reason": reason})
            continue
        reason = _problem(segment, talk_seconds)
        if reason is None:
            yield segment
        else:
            skipped.append({"id": place, "reason": reason})


def _problem(segment: Segment, talk_seconds: float) -> str | None:
    """Why a segment cannot be used."""
    if not segment.text:
        return "no word is left of its transcript"
    inside = 0 <= segment.start_seconds < min(segment.end_seconds, talk_seconds)  # NaN is not inside either
    if not (inside and segment.end_seconds <= talk_seconds + DURATION_TOLERANCE_SECONDS):
        return (
            f"segment {segment.start_seconds:.2f} to {segment.end_seconds:.2f} s is not inside of the talk's "
            f"{talk_seconds:.2f} s"
        )
    return None


def main(argv: list[str] | None = None) -> None:
    arguments = corpus_parser(__doc__).parse_args(argv)

    def prepare() -> dict[str, Any]:
        if arguments.download:
            raise ValueError(
                "--download is not available for TED-LIUM; fetch "
                "https://www.openslr.org/resources/51/TEDLIUM_release-3.tgz (about 50 GB, CC BY-NC-ND 3.0), unpack it "
                "with `tar -xzf`, and pass the folder with --corpus-dir"
            )
        return prepare_tedlium(arguments.corpus_dir, arguments.output_dir)

    report(prepare, arguments.json)


if __name__ == "__main__":
    main()
