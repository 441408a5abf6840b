"""What can be read off the states of a frozen encoder: SUPERB's heads, trained on states that are computed once.

SUPERB, Yang et al. 2021, https://arxiv.org/abs/2105.01051. Each function trains one head, which also learns the weights
of the layers, and returns what it says of clips that it has not seen; `speechkd.probing_tasks` scores that.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from speechkd.data.mini_superb import ProbeTask, QueryLists
from speechkd.features_store import FrameStates
from speechkd.metrics.query_by_example import QueryScores, match_scores, normalised_scores, score_detections
from speechkd.models.ctc_head import ctc_alphabet, ctc_greedy, ctc_loss, encode_symbols, frames_needed
from speechkd.models.superb_heads import CharacterHead, PhoneHead, SpeakerHead, UtteranceHead, am_softmax_loss
from speechkd.models.understanding import understanding_loss

logger = logging.getLogger(__name__)

EVALUATION_CLIPS = 32


@dataclass(frozen=True, kw_only=True)
class ProbeProtocol:
    """How a head is trained. Only the learning rate may be searched where scores are compared.

    Args:
        num_steps: updates.
        batch_size: clips of each.
        learning_rate: constant, of Adam.
        hidden_size: of the head.
        pooled_size: of a speaker head's last map before pooling.
        max_gradient_norm: longer gradients are shortened to it.
        weight_decay: above 0 takes AdamW.
        balanced: draw each class equally often.
        num_evaluations: times that a head is scored on dev data; the best one is kept.

    Raises:
        ValueError: a number is not positive.
    """

    num_steps: int
    batch_size: int = 32
    learning_rate: float = 1e-4
    hidden_size: int = 256
    pooled_size: int = 1500
    max_gradient_norm: float = 1.0
    weight_decay: float = 0.0
    balanced: bool = False
    num_evaluations: int = 20

    def __post_init__(self) -> None:
        counts = (self.num_steps, self.batch_size, self.hidden_size, self.pooled_size, self.num_evaluations)
        if min(counts) < 1 or not 0 < self.learning_rate < math.inf or self.weight_decay < 0:
            raise ValueError(
                f"num_steps, batch_size, sizes and num_evaluations must be 1 or more and the learning rate positive, "
                f"got {self}"
            )


def mean_and_deviation(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float | list[float]]]:
    """Scores of several seeds: their mean, sample standard deviation (0 of one seed), and each of them.

    Args:
        runs: scores by name, one mapping a seed, all with the same names.

    Raises:
        ValueError: there is no run.
    """
    if not runs:
        raise ValueError("there is no run to average; give one seed or more")
    table = {name: [run[name] for run in runs] for name in runs[0]}
    return {
        name: {"mean": mean(values), "deviation": stdev(values) if len(values) > 1 else 0.0, "values": values}
        for name, values in table.items()
    }


def probe_labels(
    states: FrameStates,
    task: ProbeTask,
    protocol: ProbeProtocol,
    *,
    seed: int,
    dev: Mapping[str, tuple[str, ...]] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, tuple[str, ...]]:
    """Labels of the clips of `task.test`, of which those without states are left out.

    Args:
        states: of all clips; their means over frames do as well as the frames, as the head is linear up to its mean.
        task: clips and their labels.
        protocol: of the training.
        seed: of first weights and batches.
        dev: id to labels; the head with the most labels right on these is kept. None keeps the last.
        device: where the head trains.

    Raises:
        ValueError: a part has no states.
        FloatingPointError: the loss is not finite.
    """
    classes = list(task.classes.values())
    numbers = [{label: number for number, label in enumerate(values)} for values in classes]
    train = _with_states(states, task.train, "to learn from")
    targets = {key: [number[label] for number, label in zip(numbers, task.train[key], strict=True)] for key in train}
    head = UtteranceHead(
        states.num_layers, states.width, list(map(len, classes)), seed=seed, hidden_size=protocol.hidden_size
    ).to(device)

    def loss_of(ids: Sequence[str]) -> Tensor:
        outputs = head(*_on(states.batch(ids), device))
        return understanding_loss(outputs, torch.tensor([targets[key] for key in ids], device=device))

    def predict(ids: Sequence[str]) -> dict[str, tuple[str, ...]]:
        found = {}
        for part in _parts(ids):
            best = [scores.argmax(dim=-1).tolist() for scores in head(*_on(states.batch(part), device))]
            for key, row in zip(part, zip(*best, strict=True), strict=True):
                found[key] = tuple(values[number] for values, number in zip(classes, row, strict=True))
        return found

    dev_score = None
    if dev is not None:
        dev_ids = _with_states(states, dev, "of the dev part")

        def dev_score() -> float:
            said = predict(dev_ids)
            return mean(float(a == b) for key in dev_ids for a, b in zip(said[key], dev[key], strict=True))

    balance = ["|".join(task.train[key]) for key in train] if protocol.balanced else None
    _train(head, loss_of, train, protocol, seed, balance=balance, dev_score=dev_score)
    with _evaluating(head):
        return predict(_with_states(states, task.test, "to test on"))


def probe_strings(
    states: FrameStates,
    train: Mapping[str, Sequence[str]],
    test: Sequence[str],
    protocol: ProbeProtocol,
    *,
    kind: Literal["phones", "characters"],
    seed: int,
    dev: Mapping[str, Sequence[str]] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, list[str]]:
    """What a CTC head hears in the clips of `test`: the symbols of each, of which those without states are left out.

    Clips with fewer frames than their string needs are not learnt from, and are counted in a warning.

    Args:
        states: of all clips, with all their frames.
        train: id to the symbols that are said.
        test: ids.
        protocol: of the training.
        kind: "phones" is a linear head, "characters" one of two bidirectional LSTM layers.
        seed: of first weights, batches and dropout.
        dev: id to symbols; the head with the least CTC loss on these is kept. None keeps the last.
        device: where the head trains.

    Raises:
        ValueError: a part has no states, or there is nothing to learn.
        FloatingPointError: the loss is not finite.
    """
    alphabet = ctc_alphabet(list(train.values()))
    targets = dict(zip(train, encode_symbols(list(train.values()), alphabet), strict=True))
    learnt = _long_enough(states, targets, _with_states(states, train, "to learn from"))
    make_head = PhoneHead if kind == "phones" else CharacterHead
    head = make_head(states.num_layers, states.width, len(alphabet), seed=seed, hidden_size=protocol.hidden_size).to(
        device
    )

    def loss_of(ids: Sequence[str]) -> Tensor:
        logits, num_frames = head(*_on(states.batch(ids), device))
        return ctc_loss(logits, num_frames, [targets[key] for key in ids])

    dev_score = None
    if dev is not None:
        known = {key: string for key, string in dev.items() if set(string) <= set(alphabet)}
        targets |= dict(zip(known, encode_symbols(list(known.values()), alphabet), strict=True))
        dev_ids = _long_enough(states, targets, _with_states(states, known, "of the dev part"))

        def dev_score() -> float:
            return -sum(loss_of(part).item() for part in _parts(dev_ids))

    _train(head, loss_of, learnt, protocol, seed, dev_score=dev_score)
    heard: dict[str, list[str]] = {}
    with _evaluating(head):
        for part in _parts(_with_states(states, test, "to test on")):
            logits, num_frames = head(*_on(states.batch(part), device))
            heard |= dict(zip(part, ctc_greedy(logits, num_frames, alphabet), strict=True))
    return heard


def probe_speakers(
    states: FrameStates,
    train: Mapping[str, str],
    test: Sequence[str],
    protocol: ProbeProtocol,
    *,
    seed: int,
    device: torch.device | str = "cpu",
) -> dict[str, np.ndarray]:
    """Speaker embeddings of the clips of `test`, (hidden size,) each, of which those without states are left out.

    Args:
        states: of all clips, with all their frames.
        train: id to speaker.
        test: ids, of other speakers.
        protocol: of the training, whose loss is the additive margin softmax.
        seed: of first weights and batches.
        device: where the head trains.

    Raises:
        ValueError: a part has no states, or `train` has one speaker only.
        FloatingPointError: the loss is not finite.
    """
    learnt = _with_states(states, train, "to learn from")
    numbers = {speaker: number for number, speaker in enumerate(sorted({train[key] for key in learnt}))}
    head = SpeakerHead(
        states.num_layers,
        states.width,
        len(numbers),
        seed=seed,
        hidden_size=protocol.hidden_size,
        pooled_size=protocol.pooled_size,
    ).to(device)

    def loss_of(ids: Sequence[str]) -> Tensor:
        cosines = head(*_on(states.batch(ids), device))
        return am_softmax_loss(cosines, torch.tensor([numbers[train[key]] for key in ids], device=device))

    _train(head, loss_of, learnt, protocol, seed)
    embeddings: dict[str, np.ndarray] = {}
    with _evaluating(head):
        for part in _parts(_with_states(states, test, "to test on")):
            vectors = head.embed(*_on(states.batch(part), device)).cpu().numpy()
            embeddings |= dict(zip(part, vectors, strict=True))
    return embeddings


def probe_queries(states: FrameStates, lists: QueryLists, is_dev: np.ndarray) -> tuple[int, QueryScores]:
    """Query by example, for which nothing is trained: the layer that is best on some queries, scored on the others.

    Args:
        states: of queries and documents, with all their frames.
        lists: queries and documents, all of them with states.
        is_dev: queries by which the layer is chosen, (queries,), bool.

    Returns:
        The layer, and scores of the other queries on it.

    Raises:
        ValueError: all queries are dev or none is, or one has no states.
    """
    if is_dev.all() or not is_dev.any():
        raise ValueError(
            f"{int(is_dev.sum())} of {len(is_dev)} queries choose the layer; take some, and leave some to score"
        )
    _with_states(states, lists.queries, "to look for", all_of_them=True)
    _with_states(states, lists.documents, "to search", all_of_them=True)
    chosen: tuple[tuple[float, float], int, QueryScores] | None = None
    for layer in range(states.num_layers):
        queries, documents = (
            {key: states.arrays[key][layer].float().numpy() for key in part}
            for part in (lists.queries, lists.documents)
        )
        table = normalised_scores(match_scores(queries, documents))
        dev = score_detections(table[is_dev], lists.is_target[is_dev])
        if chosen is None or (dev.mtwv, dev.top1) > chosen[0]:
            scores = score_detections(table[~is_dev], lists.is_target[~is_dev])
            chosen = ((dev.mtwv, dev.top1), layer, scores)
    assert chosen is not None  # there is a layer
    return chosen[1], chosen[2]


def _train(
    head: nn.Module,
    loss_of: Callable[[Sequence[str]], Tensor],
    ids: list[str],
    protocol: ProbeProtocol,
    seed: int,
    *,
    balance: Sequence[str] | None = None,
    dev_score: Callable[[], float] | None = None,
) -> None:
    """Train a head in place; with a dev score the best state of it is kept."""
    parameters = list(head.parameters())
    make_optimizer = torch.optim.AdamW if protocol.weight_decay else torch.optim.Adam
    optimizer = make_optimizer(parameters, lr=protocol.learning_rate, weight_decay=protocol.weight_decay, fused=True)
    every = max(1, protocol.num_steps // protocol.num_evaluations)
    best: tuple[float, dict[str, Tensor]] | None = None
    device = parameters[0].device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # of the dropouts
        head.train()
        for step, batch in zip(
            range(1, protocol.num_steps + 1), _batches(ids, protocol.batch_size, seed, balance), strict=False
        ):
            optimizer.zero_grad()
            loss = loss_of(batch) / len(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, protocol.max_gradient_norm)
            optimizer.step()
            if step % every and step < protocol.num_steps:
                continue
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"the loss of a {type(head).__name__} is {loss.item()} at step {step}; lower the learning rate, "
                    f"which is {protocol.learning_rate:g}"
                )
            if dev_score is not None:
                with _evaluating(head):
                    score = dev_score()
                if best is None or score > best[0]:
                    best = (score, deepcopy(head.state_dict()))
    if best is not None:
        head.load_state_dict(best[1])


def _batches(ids: list[str], batch_size: int, seed: int, balance: Sequence[str] | None) -> Iterator[list[str]]:
    """Endless batches: shuffled epochs that follow one another, or draws in which every class is as likely."""
    generator = np.random.default_rng(seed)
    if balance is not None:
        classes, counts = np.unique(np.asarray(balance), return_counts=True)
        share = dict(zip(classes.tolist(), (1 / counts / len(classes)).tolist(), strict=True))
        chances = np.array([share[label] for label in balance])
        while True:
            yield [ids[index] for index in generator.choice(len(ids), size=batch_size, p=chances / chances.sum())]
    waiting: list[str] = []
    while True:
        while len(waiting) < batch_size:
            waiting += [ids[index] for index in generator.permutation(len(ids))]
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


@contextmanager
def _evaluating(head: nn.Module) -> Iterator[None]:
    """The head in eval mode and without gradients."""
    head.eval()
    with torch.no_grad():
        yield
    head.train()


def _parts(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    return (ids[start : start + EVALUATION_CLIPS] for start in range(0, len(ids), EVALUATION_CLIPS))


def _on(tensors: tuple[Tensor, Tensor], device: torch.device | str) -> tuple[Tensor, Tensor]:
    return tensors[0].to(device), tensors[1].to(device)


def _with_states(
    states: FrameStates, ids: Mapping[str, object] | Sequence[str], part: str, *, all_of_them: bool = False
) -> list[str]:
    found = [key for key in ids if key in states]
    if not found or (all_of_them and len(found) < len(ids)):
        missing = next((key for key in ids if key not in states), None)
        raise ValueError(
            f"{len(found)} of {len(ids)} clips {part} have states, {missing!r} has none; compute them, or see "
            "skipped.jsonl in the folder of features"
        )
    return found


def _long_enough(states: FrameStates, targets: Mapping[str, Tensor], ids: list[str]) -> list[str]:
    """Clips with a frame for each symbol."""
    fitting = [key for key in ids if states.arrays[key].shape[1] >= frames_needed(targets[key])]
    if not fitting:
        raise ValueError(f"none of {len(ids)} clips has as many frames as its string needs; check texts and audio")
    if len(fitting) < len(ids):
        logger.warning("%d of %d clips have too few frames for their string", len(ids) - len(fitting), len(ids))
    return fitting
