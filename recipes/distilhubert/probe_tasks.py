"""The small SUPERB of compact encoders: its tasks on fsdd and barista, and the scores of one seed on all of them.

Steps are few, so that all tasks of an encoder take minutes on two cores: the corpora are small, and heads are as good
after them as they get. There is no dev data: the last head is scored, and nothing is searched.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from speechkd.data.manifest import Manifest, read_manifest
from speechkd.data.mini_superb import (
    ProbeTask,
    QueryLists,
    VerificationFold,
    keyword_folds,
    keyword_task,
    query_lists,
    slot_task,
    speaker_task,
    string_task,
    verification_folds,
)
from speechkd.features_store import FrameStates
from speechkd.probing import ProbeProtocol, probe_labels, probe_queries, probe_speakers, probe_strings
from speechkd.probing_tasks import label_scores, speaker_scores, string_scores

SCORES = {
    "keyword_accuracy": "keyword %",
    "stranger_accuracy": "keyword of a stranger %",
    "speaker_accuracy": "speaker %",
    "eer": "verification EER %",
    "min_dcf": "verification minDCF",
    "mtwv": "query MTWV",
    "top1": "query top-1 %",
    "slot_accuracy": "slots, mean %",
    "slot_exact_match": "slots, all right %",
    "cer": "digit strings CER %",
    "wer": "digit strings WER %",
}
ERRORS = ("eer", "min_dcf", "cer", "wer")  # less is better
DIGITS, STRINGS, ORDERS = "digits", "strings", "orders"  # clips of similar lengths


@dataclass(frozen=True, kw_only=True)
class MiniProtocol:
    """How the small tasks are done, with Adam at 1e-3, the upper end of what SUPERB searches for its heads.

    Args:
        labels: of keywords, speakers and slots; 1,000 steps of 32 clips are 14 epochs of the digits.
        strings: two linear maps, as for SUPERB's phones: its recurrent head for characters has 40 million weights, and
            would take hours here. It costs most of all, as it reads all frames of all layers: so batches of 8.
        speakers: a network of 128 channels, not 512, as there are two or three speakers to learn from. Gradients of its
            loss are long; the limit is SUPERB's.
        num_trials: of each fold of verification.
        queries_per_word: every other one of them is dev.
        grid_seconds: of a Whisper, which hears a batch up to its longest clip, rounded up to a multiple of this.
    """

    labels: ProbeProtocol = ProbeProtocol(num_steps=1000, learning_rate=1e-3)
    strings: ProbeProtocol = ProbeProtocol(num_steps=400, learning_rate=1e-3, batch_size=8)
    speakers: ProbeProtocol = ProbeProtocol(
        num_steps=150, learning_rate=1e-3, hidden_size=128, pooled_size=256, max_gradient_norm=1000.0
    )
    num_trials: int = 2000
    queries_per_word: int = 6
    grid_seconds: float = 0.64


@dataclass(frozen=True)
class MiniTasks:
    """Items of all tasks, the same for every encoder.

    Args:
        keyword: which digit.
        strangers: which digit a speaker says that was not learnt from; a task for each speaker.
        speaker: who of the known speakers.
        verification: two folds of speakers.
        queries: digits looked for in strings, a choice of queries for each seed.
        strings: characters of digit strings.
        slots: of orders.
    """

    keyword: ProbeTask
    strangers: list[ProbeTask]
    speaker: ProbeTask
    verification: list[VerificationFold]
    queries: dict[int, QueryLists]
    strings: ProbeTask
    slots: ProbeTask


def read_corpora(fsdd_dir: str | Path, barista_dir: str | Path) -> dict[str, list[Manifest]]:
    """Manifests of both corpora: digits and strings to learn from and to test on, and orders with a dev part.

    Raises:
        ManifestError: one is missing or broken.
    """
    digits, orders = Path(fsdd_dir), Path(barista_dir)
    paths = {
        DIGITS: [digits / "digits_train.jsonl", digits / "digits_test.jsonl"],
        STRINGS: [digits / "train.jsonl", digits / "test.jsonl"],
        ORDERS: [orders / "train.jsonl", orders / "dev.jsonl", orders / "test.jsonl"],
    }
    return {kind: [read_manifest(path) for path in of_kind] for kind, of_kind in paths.items()}


def make_tasks(corpora: dict[str, list[Manifest]], protocol: MiniProtocol, seeds: Sequence[int]) -> MiniTasks:
    """All tasks, without a look at any audio.

    Args:
        corpora: of `read_corpora`.
        protocol: numbers of trials and queries.
        seeds: of the choices of queries.

    Raises:
        ValueError: a manifest lacks what a task needs, or there are too few speakers or recordings.
    """
    train, dev, test = (list(manifest) for manifest in corpora[ORDERS])
    strings_train, strings_test = (list(manifest) for manifest in corpora[STRINGS])
    learnt, held_out = (list(manifest) for manifest in corpora[DIGITS])
    digits = learnt + held_out
    return MiniTasks(
        keyword=keyword_task(digits),
        strangers=list(keyword_folds(digits).values()),
        speaker=speaker_task(digits),
        verification=verification_folds(digits, num_trials=protocol.num_trials, seed=0),
        queries={
            seed: query_lists(digits, strings_test, num_per_word=protocol.queries_per_word, seed=seed) for seed in seeds
        },
        strings=string_task(strings_train, strings_test),
        slots=slot_task(train + dev, test),
    )


def score_seed(
    tasks: MiniTasks,
    frames: FrameStates,
    means: FrameStates,
    protocol: MiniProtocol,
    *,
    seed: int,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, float], dict[str, float]]:
    """Train the heads of one seed and score them.

    Args:
        tasks: of `make_tasks`, this seed among its own.
        frames: states of digits and strings.
        means: means over frames of digits and orders.
        protocol: of the heads.
        seed: of heads, batches and the choice of queries.
        device: where heads train.

    Returns:
        The scores of `SCORES`, and seconds by task.
    """
    options = {"seed": seed, "device": device}

    def labels(task: ProbeTask) -> dict[str, float]:
        return label_scores(task.test, probe_labels(means, task, protocol.labels, **options))

    def strings() -> dict[str, float]:
        train, gold = ({key: list(text) for key, (text,) in part.items()} for part in _parts(tasks.strings))
        heard = probe_strings(frames, train, list(gold), protocol.strings, kind="phones", **options)
        return string_scores("asr", gold, heard)

    def verification() -> list[dict[str, float]]:
        folds = []
        for fold in tasks.verification:
            trials = [(trial.enrolment, trial.test, trial.same_speaker) for trial in fold.trials]
            tested = sorted({key for trial in trials for key in trial[:2]})
            folds.append(
                speaker_scores(probe_speakers(frames, fold.train, tested, protocol.speakers, **options), trials)
            )
        return folds

    def queries() -> dict[str, float]:
        lists = tasks.queries[seed]
        _, found = probe_queries(frames, lists, np.arange(len(lists.queries)) % 2 == 0)
        return {"mtwv": found.mtwv, "top1": 100 * found.top1}

    def slots() -> dict[str, float]:
        scores = labels(tasks.slots)
        return {"slot_accuracy": scores["label_accuracy"], "slot_exact_match": scores["exact_match"]}

    # scores of two folds come from two heads, whose cosines do not compare: a mean of rates, not a rate of all trials
    steps: dict[str, Callable[[], dict[str, float]]] = {
        "keyword": lambda: {"keyword_accuracy": labels(tasks.keyword)["accuracy"]},
        "stranger": lambda: {"stranger_accuracy": mean(labels(task)["accuracy"] for task in tasks.strangers)},
        "speaker": lambda: {"speaker_accuracy": labels(tasks.speaker)["accuracy"]},
        "verification": lambda: _mean_of_folds(verification()),
        "queries": queries,
        "slots": slots,
        "strings": strings,
    }
    scores: dict[str, float] = {}
    seconds = {}
    for name, step in steps.items():
        started = time.perf_counter()
        scores |= step()
        seconds[name] = time.perf_counter() - started
    return {name: scores[name] for name in SCORES}, seconds


def _parts(task: ProbeTask) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    return task.train, task.test


def _mean_of_folds(folds: list[dict[str, float]]) -> dict[str, float]:
    return {"eer": mean(fold["eer"] for fold in folds), "min_dcf": mean(fold["min_dcf_0.05"] for fold in folds)}
