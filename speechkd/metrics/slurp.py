"""SLURP's scores of scenario, action, intent and entities, as its official scorer counts them; fractions, 0 to 1.

Bastianelli et al. 2020, *SLURP: A Spoken Language Understanding Resource Package*, https://arxiv.org/abs/2011.13205.
An entity is a dict with `type` and `filler`, its words. A near match counts as one hit and adds its distance to the
errors of both sides: a word distance above 1 thus costs more than a miss. An utterance without a prediction costs
nothing, as in the official scorer: read `coverage` beside every score.

`count_labels`, `count_entities` and `count_near_entities` take two lists, what is right and what was predicted, with
one label or one list of entities for each utterance, and return the counts of every label or entity type. They raise
ValueError where the lists differ in length.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rapidfuzz.distance import Levenshtein

from speechkd.data.slurp import Entity, Frame, read_gold, read_predictions
from speechkd.files import write_json

logger = logging.getLogger(__name__)

MAX_IDS_SHOWN = 3


@dataclass
class Counts:
    """Hits and errors of one label, or of several together; near matches add fractions of errors.

    Args:
        true_positives: hits.
        false_positives: predicted in vain.
        false_negatives: missed.
    """

    true_positives: float = 0.0
    false_positives: float = 0.0
    false_negatives: float = 0.0

    @property
    def precision(self) -> float:
        """Hits among what was predicted; 0 where nothing was."""
        return _ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float:
        """Hits among what is there; 0 where nothing is."""
        return _ratio(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 0 where both are."""
        return _ratio(2 * self.precision * self.recall, self.precision + self.recall)


def evaluate_slurp(
    predictions_path: str | Path, gold_path: str | Path, output_dir: str | Path | None = None
) -> dict[str, Any]:
    """Score a prediction file against SLURP's annotations.

    Args:
        predictions_path: as of `read_predictions`.
        gold_path: as of `read_gold`, for one dataset/slurp/test.jsonl.
        output_dir: gets `metrics.json`; None writes nothing.

    Returns:
        The scores of `score_frames`, `num_unknown` and `num_duplicates` (predictions that were not scored), `ids`,
        and both paths.

    Raises:
        ValueError: a file is missing or has broken lines, or no prediction is of an utterance of the gold file.
    """
    predicted = read_predictions(predictions_path)
    gold = read_gold(gold_path, predicted.id_key)
    unknown = [key for key in predicted.frames if key not in gold]
    if len(unknown) == len(predicted.frames):
        raise ValueError(
            f"none of the {len(unknown)} ids of {predictions_path} is in {gold_path}: the first is {unknown[0]!r}, "
            f"there it is {next(iter(gold))!r}; give the split that was predicted, {predicted.id_key} spelled as there"
        )
    missing = [key for key in gold if key not in predicted.frames]
    if unknown:
        logger.warning("left out, for %s lacks them: %d predictions, %s", gold_path, len(unknown), _shown(unknown))
    if missing:
        logger.warning("no prediction, at no cost: %d utterances of %d, %s", len(missing), len(gold), _shown(missing))
    if predicted.num_duplicates:
        logger.warning("replaced by later lines of the same id: %d predictions", predicted.num_duplicates)
    metrics = {
        **score_frames(gold, predicted.frames),
        "num_unknown": len(unknown),
        "num_duplicates": predicted.num_duplicates,
        "ids": predicted.id_key,
        "predictions": str(predictions_path),
        "gold": str(gold_path),
    }
    if output_dir is not None:
        write_json(Path(output_dir) / "metrics.json", metrics)
    return metrics


def score_frames(gold: Mapping[str, Frame], predicted: Mapping[str, Frame]) -> dict[str, float]:
    """All scores over the utterances that both have.

    Args:
        gold: by id; fillers must hold a word.
        predicted: by id; those unknown to `gold` are left out.

    Returns:
        `scenario_accuracy`, `action_accuracy`, `intent_accuracy` and `macro_<the same>_f1`. For `entity` (exact),
        `word`, `char` (near matches) and `slu` (the counts of the two together): `<name>_precision, <name>_recall,
        <name>_f1` over summed counts, and `macro_<name>_...`, the plain mean over entity types. `num_scored`,
        `num_missing` and `coverage`, the scored share of `gold`.

    Raises:
        ValueError: no id is in both, or a gold filler holds no word.
    """
    scored = [key for key in gold if key in predicted]
    if not scored:
        raise ValueError(f"none of {len(predicted)} predictions is of one of {len(gold)} utterances; compare their ids")
    pairs = [(gold[key], predicted[key]) for key in scored]
    metrics: dict[str, float] = {}
    for name in ("scenario", "action", "intent"):
        counts = count_labels([getattr(g, name) for g, _ in pairs], [getattr(p, name) for _, p in pairs])
        metrics[f"{name}_accuracy"] = total(counts).precision  # recall and F1 are the same
        metrics[f"macro_{name}_f1"] = macro_mean(counts)[2]
    for name, counts in entity_counts([g.entities for g, _ in pairs], [p.entities for _, p in pairs]).items():
        micro = total(counts)
        both = {"": (micro.precision, micro.recall, micro.f1), "macro_": macro_mean(counts)}
        for prefix, values in both.items():
            for part, value in zip(("precision", "recall", "f1"), values, strict=True):
                metrics[f"{prefix}{name}_{part}"] = value
    metrics["num_scored"] = len(scored)
    metrics["num_missing"] = len(gold) - len(scored)
    metrics["coverage"] = len(scored) / len(gold)
    return metrics


def count_labels(gold: Sequence[str], predicted: Sequence[str]) -> dict[str, Counts]:
    """One label an utterance: a wrong one is a false positive of its own and a miss of the right one."""
    table: dict[str, Counts] = {}
    for right, guess in _paired(gold, predicted):
        if right == guess:
            _of(table, guess).true_positives += 1
        else:
            _of(table, guess).false_positives += 1
            _of(table, right).false_negatives += 1
    return table


def entity_counts(
    gold: Sequence[Sequence[Entity]], predicted: Sequence[Sequence[Entity]]
) -> dict[str, dict[str, Counts]]:
    """Entities counted in the four ways of `score_frames`: `entity`, `word`, `char` and `slu`."""
    word = count_near_entities(gold, predicted, word_distance)
    char = count_near_entities(gold, predicted, char_distance)
    slu: dict[str, Counts] = {}
    for table in (word, char):
        for label, counts in table.items():
            _add(_of(slu, label), counts)
    return {"entity": count_entities(gold, predicted), "word": word, "char": char, "slu": slu}


def count_entities(gold: Sequence[Sequence[Entity]], predicted: Sequence[Sequence[Entity]]) -> dict[str, Counts]:
    """Entities of which only equal ones match, each once."""
    table: dict[str, Counts] = {}
    for entities, guesses in _paired(gold, predicted):
        remaining = list(entities)
        for guess in guesses:
            if guess in remaining:
                remaining.remove(guess)
                _of(table, guess["type"]).true_positives += 1
            else:
                _of(table, guess["type"]).false_positives += 1
        for entity in remaining:
            _of(table, entity["type"]).false_negatives += 1
    return table


def count_near_entities(
    gold: Sequence[Sequence[Entity]],
    predicted: Sequence[Sequence[Entity]],
    distance: Callable[[str, str], float],
) -> dict[str, Counts]:
    """Entities whose fillers may differ.

    A predicted entity takes the nearest gold one of its type that is left, the first of equally near ones: a hit, and
    its distance is added to the false positives and to the false negatives. So the order of predictions matters.

    Args:
        gold: entities of each utterance.
        predicted: in the same order.
        distance: of a gold and a predicted filler, 0 where they are equal; `word_distance` or `char_distance`.
    """
    table: dict[str, Counts] = {}
    for entities, guesses in _paired(gold, predicted):
        remaining = list(entities)
        for guess in guesses:
            counts = _of(table, guess["type"])
            candidates = [
                (distance(entity["filler"], guess["filler"]), index)
                for index, entity in enumerate(remaining)
                if entity["type"] == guess["type"]
            ]
            if not candidates:
                counts.false_positives += 1
                continue
            nearest, index = min(candidates)
            del remaining[index]
            _add(counts, Counts(1, nearest, nearest))
        for entity in remaining:
            _of(table, entity["type"]).false_negatives += 1
    return table


@lru_cache(maxsize=1 << 16)
def word_distance(gold: str, predicted: str) -> float:
    """Word edits per gold word; above 1 where the prediction is much longer.

    Raises:
        ValueError: `gold` holds no word.
    """
    words = gold.split()
    if not words:
        raise ValueError(f"gold filler {gold!r} holds no word, so its word distance to {predicted!r} does not exist")
    return Levenshtein.distance(words, predicted.split()) / len(words)


@lru_cache(maxsize=1 << 16)
def char_distance(gold: str, predicted: str) -> float:
    """Character edits per character of the longer text, spaces included, 0 to 1."""
    return Levenshtein.normalized_distance(gold, predicted)


def total(table: Mapping[str, Counts]) -> Counts:
    """The counts of all labels together, for micro scores."""
    result = Counts()
    for counts in table.values():
        _add(result, counts)
    return result


def macro_mean(table: Mapping[str, Counts]) -> tuple[float, float, float]:
    """Plain means over the labels of precision, recall and F1, each by itself; 0 where there is no label."""
    rows = [(counts.precision, counts.recall, counts.f1) for counts in table.values()]
    precision, recall, f1 = (sum(column) / len(rows) for column in zip(*rows, strict=True)) if rows else (0.0, 0.0, 0.0)
    return precision, recall, f1


def _shown(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - MAX_IDS_SHOWN} more" if len(ids) > MAX_IDS_SHOWN else ""
    return ", ".join(map(repr, ids[:MAX_IDS_SHOWN])) + more


def _paired(gold: Sequence[Any], predicted: Sequence[Any]) -> Iterable[tuple[Any, Any]]:
    if len(gold) != len(predicted):
        raise ValueError(
            f"{len(gold)} gold items and {len(predicted)} predictions differ in number; "
            "pass one prediction for every gold item, in the same order"
        )
    return zip(gold, predicted, strict=True)


def _of(table: dict[str, Counts], label: str) -> Counts:
    return table.setdefault(label, Counts())


def _add(counts: Counts, more: Counts) -> None:
    counts.true_positives += more.true_positives
    counts.false_positives += more.false_positives
    counts.false_negatives += more.false_negatives


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
