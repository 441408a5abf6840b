"""The tasks of SUPERB on full corpora, by their manifests: what is learnt from which field, and how it is scored.

SUPERB, Yang et al. 2021, https://arxiv.org/abs/2105.01051. Rates are in percent, values of query by example at most 1.
From its toolkit differ: speakers are told from whole clips where it crops 8 s in training; there is no SpecAugment on
states; slots are read as a string of their names and values, without the words between them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import numpy as np
import torch

from speechkd.data.manifest import Manifest
from speechkd.data.mini_superb import ProbeTask, QueryLists
from speechkd.features_store import FrameStates
from speechkd.metrics.slu import NO_VALUE
from speechkd.metrics.verification import trial_scores, verification_scores
from speechkd.metrics.wer import error_rates
from speechkd.models.ctc_head import entities_of, entity_symbols
from speechkd.probing import ProbeProtocol, probe_labels, probe_queries, probe_speakers, probe_strings

Task = Literal["ks", "ic", "sid", "sf", "er", "sv", "asr", "pr", "qbe"]
SUPERB = {
    "ks": ProbeProtocol(num_steps=200_000, balanced=True),
    "ic": ProbeProtocol(num_steps=200_000),
    "sid": ProbeProtocol(num_steps=200_000),
    "er": ProbeProtocol(num_steps=30_000),
    "pr": ProbeProtocol(num_steps=100_000, learning_rate=1e-2),
    "asr": ProbeProtocol(num_steps=200_000, hidden_size=1024),
    "sf": ProbeProtocol(num_steps=200_000, hidden_size=1024),
    "sv": ProbeProtocol(num_steps=200_000, batch_size=50, hidden_size=512, max_gradient_norm=1000.0, weight_decay=0.01),
}
LABEL_TASKS = ("ks", "ic", "sid", "er")  # their heads read the mean over frames
STRING_TASKS = ("pr", "asr", "sf")
LABEL_FIELDS = {"ks": "intent", "ic": "intent", "sid": "speaker", "er": "intent", "sv": "speaker"}


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """Manifests of one task, opened.

    Args:
        test: what is scored; of "qbe" the documents.
        train: what heads learn from.
        dev: by which the best head is kept.
        trials: of "sv", pairs of ids in `test` and whether they are of one speaker.
        queries: of "qbe", whose text is looked for.
        dev_queries: of "qbe", by which the layer is chosen.
    """

    test: Manifest
    train: Manifest | None = None
    dev: Manifest | None = None
    trials: list[tuple[str, str, bool]] | None = None
    queries: Manifest | None = None
    dev_queries: Manifest | None = None

    @property
    def manifests(self) -> list[Manifest]:
        """All whose states are needed."""
        parts = (self.train, self.dev, self.test, self.queries, self.dev_queries)
        return [part for part in parts if part is not None]


def read_trials(path: str | Path) -> list[tuple[str, str, bool]]:
    """Trials as VoxCeleb lists them: `<1 same speaker, 0 other> <id> <id>` a line.

    Raises:
        ValueError: the file is missing or empty, or a line is none.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"trial list {path} does not exist; data_prep/voxceleb1.py writes verification_trials.txt")
    trials = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 3 or fields[0] not in ("0", "1"):
            raise ValueError(f"{path}:{number}: {line[:100]!r} is no trial; write 1 or 0 and two ids")
        trials.append((fields[1], fields[2], fields[0] == "1"))
    if not trials:
        raise ValueError(f"trial list {path} is empty; write 1 or 0 and two ids a line")
    return trials


def check_task(task: Task, data: TaskData) -> None:
    """Refuse manifests that lack what a task needs, before anything is encoded.

    Raises:
        ValueError: names the manifest, the first utterance and the field.
    """
    if task == "qbe":
        _query_lists(data)
        return
    if data.train is None:
        raise ValueError(f"task {task} trains a head; give --train-manifest")
    if task in LABEL_TASKS:
        labels, _ = _label_task(task, data)
        if all(len(values) < 2 for values in labels.classes.values()):
            raise ValueError(
                f"all utterances of {data.train.path} have the same {' and '.join(labels.label_names)}, so there is "
                f"nothing to learn; choose another task than {task}, or add utterances of other classes"
            )
    elif task in STRING_TASKS:
        for manifest in data.manifests:
            _strings(task, manifest)
    else:
        speakers = set(_texts(data.train, "speaker").values())
        if len(speakers) < 2:
            raise ValueError(
                f"{data.train.path} has the speaker {min(speakers)!r} alone; task sv learns from two or more"
            )
        if data.trials is None:
            raise ValueError("task sv scores pairs of clips; give --trials, a line of <1 or 0> <id> <id> each")
        num_same = sum(same for _, _, same in data.trials)
        if not 0 < num_same < len(data.trials):
            raise ValueError(f"{num_same} of {len(data.trials)} trials are of one speaker; error rates need both kinds")
        unknown = {key for first, second, _ in data.trials for key in (first, second)} - set(data.test.ids)
        if unknown:
            raise ValueError(
                f"{len(unknown)} clips of the trials are not in {data.test.path}, {min(unknown)!r} first; give the "
                "manifest that belongs to the list"
            )


def score_task(
    task: Task,
    states: FrameStates,
    data: TaskData,
    protocol: ProbeProtocol | None,
    *,
    seed: int,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Train one head and score it.

    Args:
        task: "qbe" trains nothing, and needs no protocol.
        states: of all clips of the manifests that can be used; means over frames for `LABEL_TASKS`.
        data: of the task.
        protocol: of the training.
        seed: of the head and its batches.
        device: where the head trains.

    Returns:
        Scores by name, and `num_items`, the clips, trials or queries behind them.

    Raises:
        ValueError: see `check_task` and the functions of `speechkd.probing`.
    """
    if task == "qbe":
        lists, is_dev = _query_lists(data, states)
        return query_scores(states, lists, is_dev)
    if protocol is None or data.train is None:
        raise ValueError(f"task {task} trains a head; give a protocol and a manifest to learn from")
    if task in LABEL_TASKS:
        labels, dev = _label_task(task, data)
        said = probe_labels(states, labels, protocol, seed=seed, dev=dev, device=device)
        return label_scores(labels.test, said)
    if task in STRING_TASKS:
        train, gold = _strings(task, data.train), _strings(task, data.test)
        heard = probe_strings(
            states,
            train,
            list(gold),
            protocol,
            kind="phones" if task == "pr" else "characters",
            seed=seed,
            dev=None if data.dev is None else _strings(task, data.dev),
            device=device,
        )
        return string_scores(task, gold, heard)
    trials = [trial for trial in data.trials or [] if trial[0] in states and trial[1] in states]
    tested = sorted({key for trial in trials for key in trial[:2]})
    speakers = _texts(data.train, "speaker")
    return speaker_scores(probe_speakers(states, speakers, tested, protocol, seed=seed, device=device), trials)


def label_scores(gold: Mapping[str, Sequence[str]], said: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """`accuracy` of one label; of several `exact_match`, all of them right, and `label_accuracy`, their mean."""
    exact = 100 * mean(tuple(gold[key]) == tuple(labels) for key, labels in said.items())
    if len(next(iter(said.values()))) == 1:
        return {"accuracy": exact, "num_items": len(said)}
    right = [a == b for key, labels in said.items() for a, b in zip(gold[key], labels, strict=True)]
    return {"exact_match": exact, "label_accuracy": 100 * mean(right), "num_items": len(said)}


def string_scores(task: str, gold: Mapping[str, Sequence[str]], heard: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Error rates of symbols: `per` of phones, `wer` and `cer` of characters, `slot_f1` and `slot_cer` of slots.

    As in SUPERB, F1 is that of the slots' names, a mean over clips, and the character error rate is that of the values,
    where a slot that was not heard has an empty one.
    """
    scores: dict[str, float] = {"num_items": len(heard)}
    if task == "sf":
        slots = [(entities_of(gold[key]), entities_of(symbols)) for key, symbols in heard.items()]
        values = [(value, said.get(name, "")) for right, said in slots for name, value in right.items()]
        rates = error_rates([right for right, _ in values], [said for _, said in values], "none")
        f1 = [_f1(set(right), set(said)) for right, said in slots]
        return scores | {"slot_f1": 100 * mean(f1), "slot_cer": rates.cer}
    separator = " " if task == "pr" else ""
    rates = error_rates(
        [separator.join(gold[key]) for key in heard], [separator.join(heard[key]) for key in heard], "none"
    )
    return scores | ({"per": rates.wer} if task == "pr" else {"wer": rates.wer, "cer": rates.cer})


def speaker_scores(embeddings: Mapping[str, np.ndarray], trials: Sequence[tuple[str, str, bool]]) -> dict[str, float]:
    """Equal error rate `eer` in percent, and `min_dcf_0.05`, normalised, with a prior of 0.05."""
    cosines = trial_scores(embeddings, [(first, second) for first, second, _ in trials])
    scores = verification_scores(cosines, [same for _, _, same in trials], target_prior=0.05)
    return {"eer": 100 * scores.eer, "min_dcf_0.05": scores.min_dcf, "num_items": len(trials)}


def query_scores(states: FrameStates, lists: QueryLists, is_dev: np.ndarray) -> dict[str, float]:
    """`mtwv`, at most 1, `top1` in percent, and the `layer` that was best on dev queries."""
    layer, scores = probe_queries(states, lists, is_dev)
    return {"mtwv": scores.mtwv, "top1": 100 * scores.top1, "layer": layer, "num_items": scores.num_queries}


def _f1(right: set[str], said: set[str]) -> float:
    return 2 * len(right & said) / (len(right) + len(said)) if right or said else 1.0


def _label_task(task: str, data: TaskData) -> tuple[ProbeTask, dict[str, tuple[str, ...]] | None]:
    if data.train is None:
        raise ValueError(f"task {task} trains a head; give --train-manifest")
    if task == "ic" and any(data.train.rows["slots"][:]):
        names = tuple(sorted({slot["name"] for slots in data.train.rows["slots"][:] for slot in slots or []}))
        parts = [_slot_labels(part, names) for part in (data.train, data.test)]
        dev = None if data.dev is None else _slot_labels(data.dev, names)
    else:
        names = (LABEL_FIELDS[task],)
        parts = [{key: (text,) for key, text in _texts(part, names[0]).items()} for part in (data.train, data.test)]
        dev = None if data.dev is None else {key: (text,) for key, text in _texts(data.dev, names[0]).items()}
    return ProbeTask(names, *parts), dev


def _slot_labels(manifest: Manifest, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    labels = {}
    for row in manifest.rows:
        slots = {slot["name"]: slot["value"] for slot in row["slots"] or []}
        labels[row["id"]] = tuple(slots.get(name, NO_VALUE) for name in names)
    return labels


def _strings(task: str, manifest: Manifest) -> dict[str, list[str]]:
    """Symbols of each clip: phones are separated by spaces in `text`."""
    if task == "sf":
        slots = dict(zip(manifest.ids, manifest.rows["slots"][:], strict=True))
        if not any(slots.values()):
            raise ValueError(f"no utterance of {manifest.path} has slots; task sf learns and scores them")
        return {
            key: entity_symbols({slot["name"]: slot["value"] for slot in values or []}) for key, values in slots.items()
        }
    texts = _texts(manifest, "text")
    return {key: text.split() if task == "pr" else list(text) for key, text in texts.items()}


def _texts(manifest: Manifest, field: str) -> dict[str, str]:
    values = dict(zip(manifest.ids, manifest.rows[field][:], strict=True))
    missing = [key for key, value in values.items() if not value]
    if missing:
        raise ValueError(
            f"{len(missing)} utterances of {manifest.path} have no {field}, {missing[0]!r} first; add it, or "
            "leave them out"
        )
    return values


def _query_lists(data: TaskData, states: FrameStates | None = None) -> tuple[QueryLists, np.ndarray]:
    """Queries of both kinds and the documents whose text has theirs as words, and which queries are dev.

    Clips without states are left out, then queries that are in no document or in all.
    """
    if data.queries is None or data.dev_queries is None:
        raise ValueError("task qbe looks for queries in --manifest; give --queries, and --dev-queries for its layer")

    def usable(manifest: Manifest) -> dict[str, str]:
        texts: dict[str, Any] = _texts(manifest, "text")
        return {key: text for key, text in texts.items() if states is None or key in states}

    documents = {key: tuple(text.split()) for key, text in usable(data.test).items()}
    queries, is_dev, is_target = {}, [], []
    for manifest in (data.queries, data.dev_queries):
        for key, text in usable(manifest).items():
            row = [f" {text.strip()} " in f" {' '.join(words)} " for words in documents.values()]
            if key in queries or not 0 < sum(row) < len(row):
                continue
            queries[key] = text
            is_dev.append(manifest is data.dev_queries)
            is_target.append(row)
    if not any(is_dev) or all(is_dev):
        raise ValueError(
            f"{len(is_dev) - sum(is_dev)} queries of {data.queries.path} and {sum(is_dev)} of {data.dev_queries.path} "
            f"are in some but not all of the {len(documents)} documents of {data.test.path}; each needs one or more"
        )
    return QueryLists(queries, documents, np.array(is_target)), np.array(is_dev)
