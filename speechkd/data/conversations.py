"""Manifests of conversations about pictures: JSONL with one picture, or none, and its questions and answers a line.

A row has `id`, `conversation` (turns {"from": "human" | "gpt", "value": text}, human first and in turn, as LLaVA's
files have them), `image` (path relative to the manifest; left out for text alone) and, for scores by kind, `kinds`
(one text for each answer). A row with a picture has one `<image>`, in its first turn.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from PIL import Image, UnidentifiedImageError

from speechkd.data.manifest import (
    ManifestError,
    all_problems,
    duplicate_ids,
    id_hash,
    is_text,
    numbered_lines,
    parse_object,
    shown,
)

IMAGE_PLACEHOLDER = "<image>"
FIELDS = {
    "id": datasets.Value("string"),
    "image": datasets.Value("string"),
    "conversation": datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")}),
    "kinds": datasets.List(datasets.Value("string")),
}
SPEAKERS = ("human", "gpt")


class ImageError(ValueError):
    """A picture cannot be decoded; the message names it."""


class Conversations:
    """Rows of one manifest, memory-mapped; `conversations[i]` is a dict of `FIELDS` with an absolute `image` or None.

    Args:
        path: the JSONL file.
        rows: its validated rows.
    """

    def __init__(self, path: Path, rows: datasets.Dataset) -> None:
        self.path = path
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[int(index)]
        if row["image"] is not None:
            row["image"] = str(self.path.parent / row["image"])
        return row

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    @property
    def ids(self) -> list[str]:
        """Ids in file order."""
        return self.rows["id"][:]


def read_conversations(path: str | Path) -> Conversations:
    """Validate a manifest completely, then open it memory-mapped.

    Raises:
        ManifestError: the file is missing, empty or not UTF-8, or lines are malformed, repeat an id, name a picture
            that does not exist, have turns out of order, or not the one placeholder. One message lists all of it.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise ManifestError(f"manifest {path} does not exist; write it with a script of data_prep/")
    problems: list[str] = []
    id_hashes: list[int] = []
    line_numbers: list[int] = []
    digest = hashlib.sha256(str(path).encode())
    for number, line in numbered_lines(path):
        digest.update(line)
        row, line_problems = parse_object(line)
        if row is not None:
            line_problems = row_problems(row, path.parent)
            if isinstance(row.get("id"), str) and is_text(row["id"]):
                id_hashes.append(id_hash(row["id"]))
                line_numbers.append(number)
        problems += [f"{path}:{number}: {problem}" for problem in line_problems]
    problems += duplicate_ids(path, id_hashes, line_numbers)
    if problems:
        raise ManifestError(all_problems(path, problems))
    if not line_numbers:
        raise ManifestError(f"manifest {path} holds no conversation; rerun its data_prep script")
    rows = datasets.Dataset.from_generator(
        _rows,
        features=datasets.Features(FIELDS),
        gen_kwargs={"path": path, "sha256": digest.hexdigest()},  # a changed file must not hit the Arrow cache
    )
    return Conversations(path, rows)


def row_problems(row: dict[str, Any], folder: Path) -> list[str]:
    """What is wrong with a row whose picture is in this folder; [] where nothing is."""
    name = f"conversation {shown(row.get('id'))}"
    problems = [f"{name} has the unknown field {shown(f)}; known are {', '.join(FIELDS)}" for f in row.keys() - FIELDS]
    for field in ("id", "image"):
        if (field == "id" or field in row) and not (is_text(row.get(field)) and row[field]):
            problems.append(f"{name} has {field}={shown(row.get(field))}; it must be text")
    turns = row.get("conversation")
    if not (isinstance(turns, list) and turns and all(map(_is_turn, turns))):
        problems.append(
            f"{name} has conversation={shown(turns)}; it must be a list of turns with the texts from and value"
        )
    if problems:
        return problems
    turns = row["conversation"]
    if len(turns) % 2 or any(turn["from"] != SPEAKERS[number % 2] for number, turn in enumerate(turns)):
        speakers = [turn["from"] for turn in turns]
        problems.append(f"{name} has turns of {shown(speakers)}; they must be human, gpt and so on, gpt last")
    kinds = row.get("kinds")
    is_list = isinstance(kinds, list) and all(map(is_text, kinds))
    if kinds is not None and not (is_list and len(kinds) == len(turns) // 2):
        problems.append(
            f"{name} has kinds={shown(kinds)}; there must be one text for each of {len(turns) // 2} answers"
        )
    return problems + _image_problems(name, row, folder)


def _image_problems(name: str, row: dict[str, Any], folder: Path) -> list[str]:
    places = [turn["value"].count(IMAGE_PLACEHOLDER) for turn in row["conversation"]]
    image = row.get("image")
    if image is None:
        if not any(places):
            return []
        return [f"{name} has {sum(places)} {IMAGE_PLACEHOLDER} and no image; name its picture or remove them"]
    problems = []
    if sum(places) != 1 or not places[0]:
        problems.append(
            f"{name} has an image and {sum(places)} {IMAGE_PLACEHOLDER}, {places[0]} of them in its first turn; it "
            "needs one, there"
        )
    try:
        if not (folder / image).is_file():
            problems.append(f"{name}: image file {folder / image} does not exist")
    except (OSError, ValueError) as error:  # a name that the file system cannot hold
        problems.append(f"{name}: image={shown(image)} cannot be looked up ({error})")
    return problems


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and set(turn) == {"from", "value"} and all(map(is_text, turn.values()))


def _rows(path: Path, sha256: str) -> Iterator[dict[str, Any]]:
    for _, line in numbered_lines(path):
        yield dict.fromkeys(FIELDS) | json.loads(line)


def load_image(path: str | Path) -> Image.Image:
    """Decode a picture as RGB.

    Raises:
        ImageError: it is missing, truncated, far too large or no picture.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(
            f"image {path} cannot be decoded ({error}); copy it again, or take its row out of the manifest"
        ) from error
