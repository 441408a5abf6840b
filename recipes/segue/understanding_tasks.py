"""What an encoder is asked to understand: labels of a manifest, the classes of each, and how answers are scored."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch
from torch import Tensor

from speechkd.data.manifest import Manifest
from speechkd.data.subsets import k_shot_positions
from speechkd.metrics.classification import accuracy, macro_f1, mosei_scores, weighted_f1
from speechkd.metrics.slu import NO_VALUE, benchmark_acceptance, slot_accuracy, slot_f1, strict_match
from speechkd.metrics.wer import error_rates
from speechkd.models.probes import encode_classes

Task = Literal["slots", "words", "intent", "labels", "regression", "asr", "entities"]
Mode = Literal["frozen", "k_shot", "ridge", "fine_tune"]
Labels = dict[str, str]
INTENT = "intent"
TEXT = "text"
CTC_TASKS = ("asr", "entities")
MAIN_SCORES = {
    "slots": "mean_slot_accuracy",
    "words": "mean_slot_accuracy",
    "intent": "accuracy",
    "labels": "mean_weighted_f1",
    "regression": "pearson_r",
    "asr": "wer",
    "entities": "slot_f1",
}


@dataclass(kw_only=True)
class UnderstandingConfig:
    """What is learnt on top of the encoder, and how.

    Args:
        task: slots: one softmax for each slot of the manifest, "none" where it is not said. words: the same for each
            word of the text, by its position. intent: one softmax. labels: one for each of `label_names`. regression:
            the number that the slot `label_names` holds. Several softmaxes learn together, by the sum of their losses.
            asr: the letters of the text, by CTC on the frames. entities: the slots as one string, by CTC as well; the
            manifest should have them in the order in which they are said.
        label_names: of labels and regression: slots, or `intent` for the manifest's intent; null for other tasks.
        modes: frozen: heads on the vectors of an encoder that does not learn. k_shot: the same from k items of each
            class, or ridge from them for regression. ridge: closed form on the same vectors. fine_tune: encoder and
            heads learn together. asr and entities have frozen and fine_tune.
        k: items of each class.
        k_shot_by: label whose classes are counted for k_shot; null takes the one said most often, and of several such
            the one with the most values. Of regression it is the rounded number.
        seeds: of the heads' first weights and of the choice of k items.
        vectors: embedding is what SEGUE trained, in the width of the sentence encoder; pooled is the encoder's own
            width, before the map to it. The same where there is no map.
        head_learning_rate: peak, for frozen and k_shot.
        head_steps: steps on all training items at once, for frozen and k_shot; for a frozen encoder with CTC steps on
            batches as of fine_tune.
        ridge_alpha: weight of the penalty of ridge.
        fine_tune_learning_rate: peak, of encoder and heads.
        fine_tune_steps: steps of the optimizer.
        fine_tune_batch_seconds: padded audio seconds of a step.
        fine_tune_start: heads begin as those of the frozen encoder (probe), or at random as in the paper and as those
            of CTC always do.
        train_manifest: utterances to learn from; null is that of `data`.
        test_manifest: utterances to score on; null is that of `data`.
    """

    task: Task
    label_names: list[str] | None = None
    modes: list[Mode] = field(default_factory=lambda: ["frozen"])
    k: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    k_shot_by: str | None = None
    seeds: list[int] = field(default_factory=lambda: [37, 38, 39, 40, 41])
    vectors: Literal["embedding", "pooled"] = "embedding"
    head_learning_rate: float = 1e-2
    head_steps: int = 500
    ridge_alpha: float = 100.0
    fine_tune_learning_rate: float = 3e-5
    fine_tune_steps: int = 200
    fine_tune_batch_seconds: float = 160.0
    fine_tune_start: Literal["probe", "random"] = "probe"
    train_manifest: str | None = None
    test_manifest: str | None = None

    def __post_init__(self) -> None:
        wants_names = self.task in ("labels", "regression")
        if wants_names != bool(self.label_names):
            raise ValueError(
                f"understanding.task={self.task} with understanding.label_names={self.label_names}; labels and "
                "regression need the names of their slots, the other tasks take none"
            )
        if self.task == "regression" and len(self.label_names or []) > 1:
            raise ValueError(f"regression learns one number, got label_names={self.label_names}; name one slot")
        for name in ("modes", "k", "seeds", "label_names"):
            values = getattr(self, name)
            if values is not None and (not values or len(set(values)) < len(values)):
                raise ValueError(f"understanding.{name} must hold one value or more, each once, got {values}")
        if min(self.k) < 1 or min(self.seeds) < 0:
            raise ValueError(f"understanding needs k >= 1 and seeds >= 0, got k={self.k} and seeds={self.seeds}")
        if self.task == "regression" and "frozen" in self.modes:
            raise ValueError("the probe of a frozen encoder is ridge for regression: name it in understanding.modes")
        if self.task in CTC_TASKS and (others := set(self.modes) - {"frozen", "fine_tune"}):
            raise ValueError(f"understanding.task={self.task} has the modes frozen and fine_tune, not {sorted(others)}")
        if self.k_shot_by is not None and self.task in ("intent", "regression", *CTC_TASKS):
            raise ValueError(f"understanding.k_shot_by={self.k_shot_by!r}: {self.task} needs no choice; leave it out")
        for name in ("head_learning_rate", "ridge_alpha", "fine_tune_learning_rate", "fine_tune_batch_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"understanding.{name} must be a positive number, got {getattr(self, name)}")
        for name in ("head_steps", "fine_tune_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"understanding.{name} must be 1 or more, got {getattr(self, name)}")


def read_labels(manifest: Manifest, config: UnderstandingConfig) -> dict[str, Labels]:
    """Labels of each utterance by its id, in the manifest's order.

    A slot that comes twice has both values, in their order and with a comma between them.

    Raises:
        ValueError: the task needs an intent, a text or a number that an utterance lacks.
    """
    rows = manifest.rows
    columns = (rows[name][:] for name in ("id", "intent", "text", "slots"))
    labels: dict[str, Labels] = {}
    lacking: list[str] = []
    for key, intent, text, pairs in zip(*columns, strict=True):
        values: dict[str, list[str]] = {}
        for pair in pairs or []:
            values.setdefault(pair["name"], []).append(pair["value"].strip() or NO_VALUE)
        slots = {name: ", ".join(several) for name, several in values.items()}
        found = _labels_of(config, intent, text, slots)
        if found is None:
            lacking.append(key)
        else:
            labels[key] = found
    if lacking:
        raise ValueError(
            f"{manifest.path}: {len(lacking)} of {len(manifest)} utterances have no {_needs(config)}, {lacking[0]!r} "
            "first; leave them out of the manifest, or choose another understanding.task"
        )
    return labels


def label_classes(config: UnderstandingConfig, train: Sequence[Labels]) -> dict[str, list[str]]:
    """Labels to learn and the classes of each, sorted, "none" among them where an utterance has no such slot.

    Args:
        config: its task.
        train: labels of each utterance to learn from.

    Returns:
        Label to classes, in the order of the heads; no classes for regression.

    Raises:
        ValueError: there is no utterance, or none of them has a slot of a label.
    """
    if config.task == "regression":
        return {name: [] for name in config.label_names or []}
    names = config.label_names or names_in_order(train)
    if not names:
        raise ValueError(f"none of {len(train)} utterances to learn from has a slot; check the training manifest")
    classes = {name: sorted({labels.get(name, NO_VALUE) for labels in train}) for name in names}
    empty = [name for name, values in classes.items() if values == [NO_VALUE]]
    if empty:
        raise ValueError(
            f"no utterance to learn from has a slot {empty[0]!r}; its slots are {', '.join(names_in_order(train))}. "
            "Mend understanding.label_names"
        )
    return classes


def class_targets(
    labels: Sequence[Labels], classes: Mapping[str, Sequence[str]], *, for_training: bool = False
) -> tuple[Tensor, dict[str, int]]:
    """Numbers of the right classes, (items, labels), int64, -1 for one unseen in training; how many of those by label.

    Raises:
        ValueError: see `encode_classes`.
    """
    columns, unseen = [], {}
    for name, values in classes.items():
        numbers, num_unseen = encode_classes(_values(labels, name), values, for_training=for_training)
        columns.append(numbers)
        if num_unseen:
            unseen[name] = num_unseen
    return torch.stack(columns, dim=1), unseen


def few_positions(
    config: UnderstandingConfig, ids: Sequence[str], train: Sequence[Labels], k: int, seed: int
) -> list[int]:
    """Positions of k items of each class of the label that `k_shot_label` names; see `k_shot_positions`."""
    name = k_shot_label(config, train)
    values = _values(train, name)
    if config.task == "regression":
        values = [str(round(float(value))) for value in values]
    try:
        return k_shot_positions(ids, values, k, seed)
    except ValueError as error:
        raise ValueError(f"understanding.k for the values of {name!r}: {error}") from error


def k_shot_label(config: UnderstandingConfig, train: Sequence[Labels]) -> str:
    """The label whose classes k_shot takes k items of.

    Without `k_shot_by` it is the one that most utterances have; of several such the one with the most values, and of
    those the first.

    Raises:
        ValueError: no utterance to learn from has `k_shot_by`.
    """
    names = list(label_classes(config, train))
    if config.k_shot_by is None:
        said = {name: [labels[name] for labels in train if labels.get(name, NO_VALUE) != NO_VALUE] for name in names}
        return max(names, key=lambda name: (len(said[name]), len(set(said[name]))))
    if config.k_shot_by not in names:
        raise ValueError(f"understanding.k_shot_by={config.k_shot_by!r} is none of the labels {', '.join(names)}")
    return config.k_shot_by


def score_labels(
    config: UnderstandingConfig, gold: Sequence[Labels], predicted: Sequence[Labels], names: Sequence[str]
) -> dict[str, float]:
    """Scores of predictions, in percent but for the error and the correlation of regression.

    Args:
        config: its task.
        gold: labels of each utterance.
        predicted: in the same order.
        names: labels that were learnt; none for asr. A slot that only `gold` has counts as well, as one never found.

    Raises:
        ValueError: see the metrics.
    """
    if config.task == "regression":
        (name,) = names
        truth, guess = ([float(labels[name]) for labels in side] for side in (gold, predicted))
        scores = asdict(mosei_scores(truth, guess))
        kept = {key: scores[key] for key in ("mae", "pearson_r")}
        return kept | {key: 100 * scores[key] for key in ("weighted_f1", "accuracy_2", "accuracy_7")}
    if config.task == "asr":
        rates = error_rates(_values(gold, TEXT), [labels.get(TEXT, "") for labels in predicted], "basic")
        return {"wer": rates.wer, "cer": rates.cer}
    if config.task in ("slots", "words", "entities"):
        by_slot = slot_accuracy(gold, predicted, [*names, *(n for n in names_in_order(gold) if n not in set(names))])
        return {
            "mean_slot_accuracy": sum(by_slot.values()) / len(by_slot),
            "strict_match": strict_match(gold, predicted),
            "acceptance": benchmark_acceptance(gold, predicted),
            "slot_f1": slot_f1(gold, predicted).f1,
            **{f"accuracy/{name}": value for name, value in by_slot.items()},
        }
    by_label = {name: _class_scores(_values(gold, name), _values(predicted, name)) for name in names}
    if config.task == INTENT:
        return by_label[INTENT]
    rows = [zip(*(_values(side, name) for name in names), strict=True) for side in (gold, predicted)]
    right = [truth == guess for truth, guess in zip(*rows, strict=True)]
    return {
        "mean_weighted_f1": sum(scores["weighted_f1"] for scores in by_label.values()) / len(by_label),
        "exact_match": 100 * sum(right) / len(right),
        **{f"{key}/{name}": value for name, scores in by_label.items() for key, value in scores.items()},
    }


def names_in_order(items: Sequence[Labels]) -> list[str]:
    """Names that occur, sorted, but word_10 after word_9."""
    names = {name for labels in items for name in labels}
    return sorted(names, key=lambda name: (len(name) if name.startswith("word_") else 0, name))


def _values(items: Sequence[Labels], name: str) -> list[str]:
    return [labels.get(name, NO_VALUE) for labels in items]


def _class_scores(truth: list[str], guess: list[str]) -> dict[str, float]:
    return {
        "accuracy": 100 * accuracy(truth, guess),
        "weighted_f1": 100 * weighted_f1(truth, guess),
        "macro_f1": 100 * macro_f1(truth, guess),
    }


def _labels_of(config: UnderstandingConfig, intent: str | None, text: str | None, slots: Labels) -> Labels | None:
    """The labels that the task asks for; None where the utterance lacks what it needs."""
    if config.task == "slots":
        return slots
    if config.task == "entities":
        return {name: value.lower() for name, value in slots.items() if value != NO_VALUE}
    if config.task == "asr":
        return {TEXT: " ".join(text.lower().split())} if text and text.strip() else None
    if config.task == "words":
        words = (text or "").split()
        return {f"word_{number}": word.lower() for number, word in enumerate(words, start=1)} or None
    names = config.label_names or [INTENT]
    if INTENT in names:
        if intent is None:
            return None
        slots = slots | {INTENT: intent}
    if config.task == "regression":
        return {names[0]: slots[names[0]]} if _is_number(slots.get(names[0])) else None
    return {name: slots.get(name, NO_VALUE) for name in names}


def _needs(config: UnderstandingConfig) -> str:
    if config.task in ("words", "asr"):
        return "text"
    return f"number in the slot {(config.label_names or [''])[0]!r}" if config.task == "regression" else "intent"


def _is_number(value: str | None) -> bool:
    try:
        return value is not None and math.isfinite(float(value))
    except ValueError:
        return False
