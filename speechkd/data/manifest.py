"""Manifests: JSONL files with one utterance a line, read memory-mapped through `datasets`."""

import codecs
import hashlib
import json
import math
import reprlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np

FIELDS = {
    "id": datasets.Value("string"),
    "audio": datasets.Value("string"),
    "duration_seconds": datasets.Value("float64"),
    "sample_rate_hz": datasets.Value("int64"),
    "offset_seconds": datasets.Value("float64"),
    "text": datasets.Value("string"),
    "speaker": datasets.Value("string"),
    "language": datasets.Value("string"),
    "dialect": datasets.Value("string"),
    "intent": datasets.Value("string"),
    "slots": datasets.List({"name": datasets.Value("string"), "value": datasets.Value("string")}),
}
REQUIRED = {"id": str, "audio": str, "duration_seconds": (int, float), "sample_rate_hz": int}
OPTIONAL = {
    "offset_seconds": (int, float),
    "text": str,
    "speaker": str,
    "language": str,
    "dialect": str,
    "intent": str,
    "slots": list,
}
MAX_PROBLEMS_SHOWN = 20
MAX_SAMPLE_RATE_HZ = 10_000_000


class ManifestError(ValueError):
    """A manifest cannot be used; the message lists every problem with file and line."""


class Manifest:
    """Utterances of one manifest, memory-mapped.

    `manifest[i]` is a dict with the fields of `FIELDS` (None where absent); `audio` is an absolute path, or that of a
    tar and `#member`.

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
        utterance = self.rows[int(index)]
        utterance["audio"] = str(self.path.parent / utterance["audio"])
        return utterance

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    @property
    def ids(self) -> list[str]:
        """Utterance ids in file order."""
        return self.rows["id"][:]

    @property
    def durations_seconds(self) -> np.ndarray:
        """Utterance lengths in seconds, (utterances,), float64."""
        return np.asarray(self.rows["duration_seconds"][:], dtype=np.float64)

    def select(self, indices: Iterable[int]) -> "Manifest":
        """The utterances at these positions, in this order."""
        return Manifest(self.path, self.rows.select(list(indices)))


def read_manifest(path: str | Path, max_problems_shown: int = MAX_PROBLEMS_SHOWN) -> Manifest:
    """Validate a manifest completely, then open it memory-mapped.

    Args:
        path: JSONL file; audio paths in it are relative to its folder.
        max_problems_shown: how many problems the error message spells out; all are counted.

    Returns:
        The utterances in file order.

    Raises:
        ManifestError: the file is missing, empty or not UTF-8, or lines are malformed, lack a field, repeat an id,
            or name audio that does not exist, as a file or in its tar. One message lists all of it.
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
        utterance, line_problems = _parse_line(line, path.parent)
        problems += [f"{path}:{number}: {problem}" for problem in line_problems]
        if utterance is not None:
            id_hashes.append(id_hash(utterance["id"]))
            line_numbers.append(number)
    problems += duplicate_ids(path, id_hashes, line_numbers)
    if problems:
        raise ManifestError(all_problems(path, problems, max_problems_shown))
    if not line_numbers:
        raise ManifestError(
            f"manifest {path} holds no utterance; check the corpus folder and rerun its data_prep script"
        )
    rows = datasets.Dataset.from_generator(
        _rows,
        features=datasets.Features(FIELDS),
        gen_kwargs={"path": path, "sha256": digest.hexdigest()},  # a changed file must not hit the Arrow cache
    )
    return Manifest(path, rows)


def all_problems(path: Path, problems: list[str], max_shown: int = MAX_PROBLEMS_SHOWN) -> str:
    """One message for all problems of a manifest."""
    hidden = len(problems) - max_shown
    more = f"\n... and {hidden} more" if hidden > 0 else ""
    return f"{len(problems)} problem(s) in manifest {path}:\n" + "\n".join(problems[:max_shown]) + more


def write_manifest(path: str | Path, utterances: Iterable[dict[str, Any]]) -> int:
    """Write utterances as JSONL, atomically: the file is complete or absent.

    Args:
        path: target; its folder is created.
        utterances: dicts with the manifest's fields; None values are left out.

    Returns:
        Number of utterances written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    count = 0
    with temporary.open("w", encoding="utf-8") as file:
        for utterance in utterances:
            present = {key: value for key, value in utterance.items() if value is not None}
            file.write(json.dumps(present, ensure_ascii=False) + "\n")
            count += 1
    temporary.replace(path)
    return count


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank, without the byte order mark that some editors write."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield number, line


def _parse_line(line: bytes, folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """One manifest line as a dict, or None, and what is wrong with it."""
    utterance, problems = parse_object(line)
    if utterance is None:
        return None, problems
    problems = _type_problems(utterance)
    if problems:
        return None, problems
    problems = _range_problems(utterance)
    try:
        missing = _missing_audio(folder / utterance["audio"])
        if missing:
            problems.append(f"{_name(utterance)}: {missing}")
    except OSError as error:  # a name that the file system cannot hold, a folder that may not be read
        problems.append(f"{_name(utterance)}: audio={shown(utterance['audio'])} cannot be looked up ({error.strerror})")
    return utterance, problems


def parse_object(line: bytes) -> tuple[dict[str, Any] | None, list[str]]:
    """The JSON object of a line, or None and what is wrong with the line."""
    try:
        utterance = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = line[error.start]
        return None, [f"not UTF-8 (byte 0x{byte:02x} at column {error.start + 1}); convert the file to UTF-8"]
    except json.JSONDecodeError as error:
        return None, [f"not JSON ({error.msg} at column {error.colno}); write one JSON object a line"]
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of open brackets
        return None, [f"not JSON that can be read ({error}); write one flat JSON object a line"]
    if not isinstance(utterance, dict):
        return None, [f"holds {type(utterance).__name__}, not a JSON object"]
    return utterance, []


def utterance_problems(utterance: dict[str, Any]) -> list[str]:
    """What is wrong with the fields of an utterance, without a look at its audio; [] where nothing is."""
    return _type_problems(utterance) or _range_problems(utterance)


def _name(utterance: dict[str, Any]) -> str:
    return f"utterance {shown(utterance['id'])}" if "id" in utterance else "utterance"


def _type_problems(utterance: dict[str, Any]) -> list[str]:
    name = _name(utterance)
    problems = [f"{name} lacks the field {field!r}" for field in REQUIRED if field not in utterance]
    for field, value in utterance.items():
        expected = REQUIRED.get(field) or OPTIONAL.get(field)
        if expected is None:
            problems.append(f"{name} has the unknown field {shown(field)}; known are {', '.join(FIELDS)}")
        elif not isinstance(value, expected) or isinstance(value, bool):  # type: ignore[arg-type]
            problems.append(f"{name} has {field}={shown(value)}, a {type(value).__name__} where another type belongs")
        elif isinstance(value, str) and not is_text(value):
            problems.append(f"{name} has {field}={shown(value)} with half a surrogate pair; write whole characters")
        elif field == "slots" and not all(map(_is_slot, value)):
            problems.append(f"{name} has slots={shown(value)}; each must hold the texts name and value, nothing else")
    return problems


def _range_problems(utterance: dict[str, Any]) -> list[str]:
    name, problems = _name(utterance), []
    duration, offset = _as_float(utterance["duration_seconds"]), _as_float(utterance.get("offset_seconds", 0.0))
    if not (math.isfinite(duration) and duration > 0):
        problems.append(f"{name} has duration_seconds={shown(utterance['duration_seconds'])}; it must be positive")
    if not (math.isfinite(offset) and offset >= 0):
        problems.append(f"{name} has offset_seconds={shown(utterance['offset_seconds'])}; it must be 0 or more")
    if not 0 < utterance["sample_rate_hz"] <= MAX_SAMPLE_RATE_HZ:
        problems.append(
            f"{name} has sample_rate_hz={shown(utterance['sample_rate_hz'])}; it must be 1 to {MAX_SAMPLE_RATE_HZ}"
        )
    return problems


def _missing_audio(path: Path) -> str | None:
    """Why there is no audio under this path, which may be `shard.tar#member`; None where there is."""
    from speechkd.data.shards import find_member, split_member  # here, because shards are written from manifests

    in_tar = split_member(str(path))
    if in_tar is None:
        return None if path.is_file() else f"audio file {path} does not exist"
    try:
        find_member(*in_tar)
    except ValueError as error:
        return str(error)
    return None


def shown(value: Any) -> str:
    """A value for a message, shortened: it may be junk of any size and depth."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 100
    return short.repr(value)


def is_text(value: Any) -> bool:
    """Whether this is a str that UTF-8 can hold."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _is_slot(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"name", "value"} and all(map(is_text, value.values()))


def _as_float(number: float) -> float:
    """Seconds as a float; infinity for whole numbers beyond it."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def id_hash(name: str) -> int:
    """64 bits instead of a string: millions of ids stay small."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def duplicate_ids(path: Path, id_hashes: list[int], line_numbers: list[int]) -> list[str]:
    """What is wrong with lines that repeat an id, from the `id_hash` of each line."""
    hashes = np.asarray(id_hashes, dtype=np.uint64)
    order = np.argsort(hashes, kind="stable")
    repeats = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    pairs = sorted((line_numbers[order[i + 1]], line_numbers[order[i]]) for i in repeats)
    return [f"{path}:{second}: repeats the id of line {first}; ids must be unique" for second, first in pairs]


def _rows(path: Path, sha256: str) -> Iterator[dict[str, Any]]:
    for _, line in numbered_lines(path):
        utterance = dict.fromkeys(FIELDS) | json.loads(line)
        for field in ("duration_seconds", "offset_seconds"):
            if utterance[field] is not None:
                utterance[field] = float(utterance[field])  # Arrow takes no whole number above 2**53 for a float
        yield utterance
