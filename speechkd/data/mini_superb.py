"""SUPERB in small: tasks on spoken digits and on spoken orders, from the rows of their manifests.

Rows are dicts as `data_prep/fsdd.py` and `data_prep/barista.py` write them; iterating over a `Manifest` gives such
rows. Nothing here reads audio.

- Digits: `digits_train.jsonl` and `digits_test.jsonl` hold single recordings with the id `<digit>_<speaker>_<number>`,
  the digit's word as `text`, and `speaker`; `train.jsonl` and `test.jsonl` hold strings of digits.
- Orders: every row has the same intent, so only `slots` can be told. They name no speaker: one may be in training and
  test.
"""

import hashlib
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, product
from typing import Any

import numpy as np

from speechkd.metrics.slu import NO_VALUE

Row = Mapping[str, Any]
RECORDING = re.compile(r"[0-9]_.+_([0-9]+)")
NUM_TEST_RECORDINGS = 5  # the corpus's own split: numbers 0 to 4 of each speaker and digit are test
SLOTS = ("coffeeDrink", "numberOfShots", "roast", "size", "sugarAmount", "milkAmount")
SPARSE_SLOTS = (
    "sugarAmount",
    "milkAmount",
)  # dozens of values of a few items each: only whether they are there is asked
SOME_VALUE = "yes"


@dataclass(kw_only=True)
class ProbeConfig:
    """Where the manifests of the small SUPERB are, for recipes that end with it.

    Args:
        fsdd_dir: those of `data_prep/fsdd.py`.
        barista_dir: those of `data_prep/barista.py`.
    """

    fsdd_dir: str
    barista_dir: str


@dataclass(frozen=True)
class ProbeTask:
    """Items to learn from and to test on. All labels are texts.

    Args:
        label_names: of the labels of each item, in order.
        train: id to labels.
        test: id to labels.

    Raises:
        ValueError: a part is empty, or an item is in both.
    """

    label_names: tuple[str, ...]
    train: dict[str, tuple[str, ...]]
    test: dict[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        if not self.train or not self.test:
            raise ValueError(
                f"the task of {', '.join(self.label_names)} has {len(self.train)} items to learn from and "
                f"{len(self.test)} to test on; each part needs one, check the manifests"
            )
        both = sorted(self.train.keys() & self.test.keys())
        if both:
            raise ValueError(f"{len(both)} items are both to learn from and to test on, {both[0]!r} first")

    @property
    def classes(self) -> dict[str, list[str]]:
        """Label name to its values in training, sorted: the classes of a head."""
        columns = zip(*self.train.values(), strict=True)
        return {name: sorted(set(column)) for name, column in zip(self.label_names, columns, strict=True)}


@dataclass(frozen=True)
class Trial:
    """Two recordings to compare.

    Args:
        enrolment: id of the one.
        test: id of the other.
        same_speaker: what is to be told.
        same_text: whether both say the same digit, which makes strangers alike.
    """

    enrolment: str
    test: str
    same_speaker: bool
    same_text: bool


@dataclass(frozen=True)
class VerificationFold:
    """Speakers to learn from, and trials of all others.

    Args:
        train: id to speaker.
        trials: of speakers that are not in `train`.
    """

    train: dict[str, str]
    trials: list[Trial]


@dataclass(frozen=True)
class QueryLists:
    """Spoken words and the strings to look for them in; no speaker has both.

    Args:
        queries: id to word.
        documents: id to words.
        is_target: whether the document holds the query, (queries, documents), bool.
    """

    queries: dict[str, str]
    documents: dict[str, tuple[str, ...]]
    is_target: np.ndarray


def keyword_task(digits: Iterable[Row]) -> ProbeTask:
    """Which digit it is, on the corpus's own split: numbers 0 to 4 of each speaker and digit are test.

    Args:
        digits: rows of all single recordings.

    Raises:
        ValueError: an id is not that of a recording or stands twice, a row has no text, or a part is empty.
    """
    return _official_split(digits, "text")


def speaker_task(digits: Iterable[Row]) -> ProbeTask:
    """Who speaks, on the same split as `keyword_task`.

    Args:
        digits: rows of all single recordings.

    Raises:
        ValueError: as of `keyword_task`, with the speaker for the text.
    """
    return _official_split(digits, "speaker")


def keyword_folds(digits: Iterable[Row]) -> dict[str, ProbeTask]:
    """Which digit a stranger says: for each speaker, in sorted order, a task that tests on him and learns from others.

    Args:
        digits: rows of all single recordings.

    Raises:
        ValueError: an id stands twice, a row has no text or no speaker, or there are fewer than two speakers.
    """
    rows = _by_id(digits, "text", "speaker")
    return {
        held_out: ProbeTask(
            ("text",),
            train={key: (row["text"],) for key, row in rows.items() if row["speaker"] != held_out},
            test={key: (row["text"],) for key, row in rows.items() if row["speaker"] == held_out},
        )
        for held_out in sorted(_speakers(rows))
    }


def string_task(train: Iterable[Row], test: Iterable[Row]) -> ProbeTask:
    """What a string of digits says, for CTC: the label is the text, whose characters are the symbols.

    Args:
        train: rows of the strings to learn from.
        test: rows of those to test on.

    Raises:
        ValueError: an id stands twice, a row has no text, or a part is empty.
    """
    train_rows, test_rows = _by_id(train, "text"), _by_id(test, "text")
    return ProbeTask(
        ("text",),
        train={key: (row["text"],) for key, row in train_rows.items()},
        test={key: (row["text"],) for key, row in test_rows.items()},
    )


def slot_task(train: Iterable[Row], test: Iterable[Row]) -> ProbeTask:
    """The six slots of an order, a label each; "none" where an order has none, as in `metrics.slu`.

    Amounts of sugar and milk have few items a value, so their labels are "yes" and "none".

    Args:
        train: rows to learn from.
        test: rows to test on.

    Raises:
        ValueError: an id stands twice, a row has no slots, another slot or the same one twice, or a part is empty.
    """
    train_rows, test_rows = _by_id(train, "slots"), _by_id(test, "slots")
    return ProbeTask(
        SLOTS,
        train={key: _slot_labels(row) for key, row in train_rows.items()},
        test={key: _slot_labels(row) for key, row in test_rows.items()},
    )


def verification_folds(digits: Iterable[Row], *, num_trials: int, seed: int) -> list[VerificationFold]:
    """Is it the same speaker? Two folds, each with trials of the speakers that the other one learns from.

    Speakers are ranked by the SHA-256 of their names and cut in halves, so each is held out once. A quarter of the
    trials of a fold are of each kind, same or other speaker, same or other digit; none occurs twice. Scores of two
    folds come from two heads and do not compare: take the equal error rate of each.

    Args:
        digits: rows of all single recordings.
        num_trials: of each fold, a multiple of 4.
        seed: of the choice of trials.

    Raises:
        ValueError: as of `keyword_folds`, there are fewer than four speakers, `num_trials` is no multiple of 4, or a
            kind has fewer trials than asked for.
    """
    rows = _by_id(digits, "text", "speaker")
    if num_trials < 4 or num_trials % 4:
        raise ValueError(f"num_trials must be a multiple of 4, of which there are four kinds, got {num_trials}")
    ranked = sorted(_speakers(rows), key=lambda name: hashlib.sha256(name.encode("utf-8")).hexdigest())
    if len(ranked) < 4:
        raise ValueError(f"trials of held-out speakers need four speakers or more, two a fold, found {sorted(ranked)}")
    folds = []
    for held_out in (set(ranked[: len(ranked) // 2]), set(ranked[len(ranked) // 2 :])):
        train = {key: row["speaker"] for key, row in rows.items() if row["speaker"] not in held_out}
        generator = random.Random(f"{seed}-{'-'.join(sorted(held_out))}")
        strangers = {key: row for key, row in rows.items() if row["speaker"] in held_out}
        folds.append(VerificationFold(train, _draw_trials(strangers, num_trials // 4, generator)))
    return folds


def query_lists(digits: Iterable[Row], strings: Iterable[Row], *, num_per_word: int, seed: int) -> QueryLists:
    """Which strings hold a spoken digit? Queries are of speakers that say none of the strings.

    A string is made of recordings of its speaker: with queries of the same speaker, a recording could be looked for in
    itself. Words that are in no string or in all of them are left out, as their misses or false alarms have no rate.

    Args:
        digits: rows of single recordings, such as those to learn from.
        strings: rows of strings, such as those to test on.
        num_per_word: queries of each word, or as many as there are.
        seed: of the choice of queries.

    Raises:
        ValueError: an id stands twice, a row has no text or no speaker, `num_per_word` is below 1, or nothing is left
            to look for.
    """
    if num_per_word < 1:
        raise ValueError(f"num_per_word must be 1 or more, got {num_per_word}")
    documents = _by_id(strings, "text", "speaker")
    candidates = _by_id(digits, "text", "speaker")
    words = {key: tuple(row["text"].split()) for key, row in documents.items()}
    in_strings = {row["speaker"] for row in documents.values()}
    of_word: dict[str, list[str]] = {}
    for key in sorted(candidates):
        if candidates[key]["speaker"] not in in_strings:
            of_word.setdefault(candidates[key]["text"], []).append(key)
    generator = random.Random(seed)
    queries: dict[str, str] = {}
    for word, keys in sorted(of_word.items()):
        chosen = generator.sample(keys, min(num_per_word, len(keys)))
        if 0 < sum(word in said for said in words.values()) < len(words):
            queries |= dict.fromkeys(chosen, word)
    if not queries:
        raise ValueError(
            f"none of {len(candidates)} recordings is a query for {len(words)} strings of the speakers "
            f"{sorted(in_strings)}; give recordings of other speakers, of words that some of the strings hold and some "
            "do not"
        )
    is_target = np.array([[word in said for said in words.values()] for word in queries.values()])
    return QueryLists(queries, words, is_target)


def _official_split(digits: Iterable[Row], field: str) -> ProbeTask:
    rows = _by_id(digits, field)
    train: dict[str, tuple[str, ...]] = {}
    test: dict[str, tuple[str, ...]] = {}
    for key, row in rows.items():
        match = RECORDING.fullmatch(key)
        if not match:
            raise ValueError(
                f"utterance {key!r} is not a single recording, <digit>_<speaker>_<number>; give the rows of "
                "digits_train.jsonl and digits_test.jsonl"
            )
        (test if int(match[1]) < NUM_TEST_RECORDINGS else train)[key] = (row[field],)
    return ProbeTask((field,), train, test)


def _draw_trials(rows: Mapping[str, Row], num_of_kind: int, generator: random.Random) -> list[Trial]:
    groups: dict[tuple[str, str], list[str]] = {}
    for key in sorted(rows):
        groups.setdefault((rows[key]["speaker"], rows[key]["text"]), []).append(key)
    trials = []
    for same_speaker, same_text in product((True, False), repeat=2):
        pairs = [
            (one, other)
            for one, other in combinations_with_replacement(sorted(groups), 2)
            if (one[0] == other[0], one[1] == other[1]) == (same_speaker, same_text)
        ]
        sizes = [(len(groups[one]), len(groups[other]) - (one == other)) for one, other in pairs]
        num_possible = sum(first * second for first, second in sizes) // (2 if same_speaker and same_text else 1)
        if num_possible < num_of_kind:
            raise ValueError(
                f"{len(rows)} recordings of {sorted({row['speaker'] for row in rows.values()})} make {num_possible} "
                f"trials with same_speaker={same_speaker} and same_text={same_text}, and {num_of_kind} are asked for; "
                f"take num_trials={4 * num_possible} or less, or give more recordings"
            )
        drawn: dict[tuple[str, str], None] = {}  # keeps the order of drawing
        while len(drawn) < num_of_kind:
            one, other = generator.choice(pairs)
            first, second = sorted((generator.choice(groups[one]), generator.choice(groups[other])))
            if first != second:
                drawn[first, second] = None
        trials += [Trial(*pair, same_speaker, same_text) for pair in drawn]
    return trials


def _slot_labels(row: Row) -> tuple[str, ...]:
    slots: dict[str, str] = {}
    for slot in row["slots"]:
        name, value = slot["name"], slot["value"].strip()
        if name not in SLOTS or name in slots or not value:
            raise ValueError(
                f"utterance {row['id']!r} has the slot {name!r} with the value {value!r}; an order has each of "
                f"{', '.join(SLOTS)} once at most, with a value"
            )
        slots[name] = SOME_VALUE if name in SPARSE_SLOTS else value
    return tuple(slots.get(name, NO_VALUE) for name in SLOTS)


def _by_id(rows: Iterable[Row], *fields: str) -> dict[str, Row]:
    """Rows by their id, each with the fields asked for."""
    found: dict[str, Row] = {}
    for row in rows:
        key = row["id"]
        if key in found:
            raise ValueError(f"id {key!r} stands twice; give each utterance once, or it may be in two parts")
        missing: Sequence[str] = [field for field in fields if row.get(field) in (None, "")]
        if missing:
            raise ValueError(f"utterance {key!r} has no {' and no '.join(missing)}; run its data_prep script again")
        found[key] = row
    return found


def _speakers(rows: Mapping[str, Row]) -> set[str]:
    speakers = {row["speaker"] for row in rows.values()}
    if len(speakers) < 2:
        raise ValueError(f"a task on held-out speakers needs two speakers or more, found {sorted(speakers)}")
    return speakers
