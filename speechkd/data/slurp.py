"""SLURP's annotations and files of predictions, as frames: scenario, action and entities of an utterance.

Bastianelli et al. 2020, *SLURP: A Spoken Language Understanding Resource Package*, https://arxiv.org/abs/2011.13205.
An entity is a dict with `type` and `filler`, its words.
"""

import codecs
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Entity = Mapping[str, str]
IdKey = Literal["file", "slurp_id"]
MAX_PROBLEMS_SHOWN = 20


@dataclass(frozen=True)
class Frame:
    """What an utterance means.

    Args:
        scenario: for one "calendar".
        action: for one "set".
        entities: dicts with `type` and `filler`.
    """

    scenario: str
    action: str
    entities: Sequence[Entity] = ()

    @property
    def intent(self) -> str:
        """Scenario and action as one label; the corpus's own field `intent` now and then disagrees with them."""
        return f"{self.scenario}_{self.action}"


@dataclass(frozen=True)
class Predictions:
    """A prediction file.

    Args:
        frames: by id, the last one of an id that stands there more than once.
        id_key: "file" where ids are names of recordings, "slurp_id" where they are sentences.
        num_duplicates: lines that a later one of the same id replaced.
    """

    frames: dict[str, Frame]
    id_key: IdKey
    num_duplicates: int


def read_gold(path: str | Path, id_key: IdKey = "file") -> dict[str, Frame]:
    """Frames of SLURP's annotations, JSONL with one sentence a line.

    The filler of an entity is made of the tokens of its span, in lower case.

    Args:
        path: the annotations.
        id_key: "file" gives every recording of a sentence its frame, "slurp_id" every sentence; the id is text.

    Raises:
        ValueError: the file is missing, empty, or has lines that are no annotated sentence; all are named.
    """
    frames: dict[str, Frame] = {}
    problems: list[str] = []
    for place, row in _rows(Path(path), problems):
        try:
            frame = _gold_frame(row)
            if id_key == "file":
                keys = [recording["file"] for recording in row["recordings"]]
            else:
                keys = [row["slurp_id"]]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            problems.append(f"{place}: not an annotated sentence ({type(error).__name__}: {error})")
        else:
            frames.update((str(key), frame) for key in keys)
    _refuse(problems, path, "copy it again from the corpus")
    if not frames:
        raise ValueError(f"{path} holds no annotated sentence; give one of dataset/slurp/*.jsonl")
    return frames


def read_predictions(path: str | Path) -> Predictions:
    """Frames of a prediction file, JSONL with `scenario`, `action`, `entities` and an id a line; other keys are free.

    The id is `file`, the name of a recording, or `slurp_id`, for systems that read text; the first line decides.
    Write fillers in lower case: they are compared as they are, and an entity with more than `type` and `filler` is no
    exact match, both as in the official scorer.

    Args:
        path: the predictions.

    Raises:
        ValueError: the file is missing, empty, or has broken lines; all are named.
    """
    frames: dict[str, Frame] = {}
    problems: list[str] = []
    id_key: IdKey | None = None
    num_lines = 0
    for place, row in _rows(Path(path), problems):
        if id_key is None:
            id_key = "slurp_id" if "slurp_id" in row and "file" not in row else "file"
        found = _prediction_problems(row, id_key)
        if found:
            problems.append(f"{place}: {'; '.join(found)}")
            continue
        num_lines += 1
        frames[str(row[id_key])] = Frame(row["scenario"], row["action"], row["entities"])
    _refuse(problems, path, 'write {"file": ..., "scenario": ..., "action": ..., "entities": [{"type", "filler"}]}')
    if id_key is None:
        raise ValueError(f"{path} holds no prediction; write one JSON object a line")
    return Predictions(frames=frames, id_key=id_key, num_duplicates=num_lines - len(frames))


def _rows(path: Path, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """JSON objects of a file with their "file:line"; lines that hold none go to `problems`."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is no file; give a JSONL file")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:  # broken UTF-8 and broken JSON are both ValueError
                problems.append(f"{place}: not JSON ({error})")
                continue
            if isinstance(row, dict):
                yield place, row
            else:
                problems.append(f"{place}: holds {type(row).__name__}, not a JSON object")


def _gold_frame(row: dict[str, Any]) -> Frame:
    surfaces = {token["id"]: token["surface"].lower() for token in row["tokens"]}
    entities = [
        {"type": entity["type"], "filler": " ".join(surfaces[index] for index in entity["span"])}
        for entity in row["entities"]
    ]
    if not all(entity["filler"].strip() for entity in entities):
        raise ValueError("an entity spans no word")
    if not isinstance(row["scenario"], str) or not isinstance(row["action"], str):
        raise ValueError(f"scenario {row['scenario']!r} and action {row['action']!r} are no texts")
    return Frame(row["scenario"], row["action"], entities)


def _prediction_problems(row: dict[str, Any], id_key: IdKey) -> list[str]:
    problems = []
    if not isinstance(row.get(id_key), (str, int)) or isinstance(row[id_key], bool):
        problems.append(f"{id_key} is {_value(row, id_key)}, not an id")
    problems += [
        f"{name} is {_value(row, name)}, not a text"
        for name in ("scenario", "action")
        if not isinstance(row.get(name), str)
    ]
    entities = row.get("entities")
    if not isinstance(entities, list):
        return [*problems, f"entities is {_value(row, 'entities')}, not a list"]
    for number, entity in enumerate(entities, start=1):
        if not isinstance(entity, dict):
            problems.append(f"entity {number} is {type(entity).__name__}, not a JSON object")
            continue
        for name in ("type", "filler"):
            value = entity.get(name)
            if not isinstance(value, str):
                problems.append(f"entity {number}: {name} is {_value(entity, name)}, not a text")
            elif not value.strip():
                problems.append(f"entity {number}: {name} is empty; leave the entity out")
    return problems


def _value(row: Mapping[str, Any], name: str) -> str:
    return repr(row[name])[:100] if name in row else "missing"


def _refuse(problems: list[str], path: str | Path, advice: str) -> None:
    if not problems:
        return
    hidden = len(problems) - MAX_PROBLEMS_SHOWN
    more = f"\n... and {hidden} more" if hidden > 0 else ""
    shown = "\n".join(problems[:MAX_PROBLEMS_SHOWN])
    raise ValueError(f"{len(problems)} broken line(s) in {path}; {advice}:\n{shown}{more}")
