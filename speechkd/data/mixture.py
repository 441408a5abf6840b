"""Weighted mixtures of corpora: each batch comes from one corpus, in shares that hold from the first batch on."""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

from torch.utils.data import ConcatDataset, Sampler

from speechkd.data.sampler import DurationBatchSampler


class Mixture(ConcatDataset):
    """Corpora one behind the other; each is told the epoch.

    An utterance that comes again within an epoch of the mixture, since its corpus is small for its weight, has the same
    augmentation and the same draws.
    """

    def set_epoch(self, epoch: int) -> None:
        """Choose what the corpora draw."""
        for corpus in self.datasets:
            corpus.set_epoch(epoch)  # type: ignore[attr-defined]


class MixtureSampler(Sampler[list[int]]):
    """Batches of several corpora, over a `Mixture` of them in the same order.

    The weights are shares of batches, so about of padded seconds, and not of utterances: a corpus of short clips gives
    more of them per batch. After any number of batches each corpus has given its share of them to within one, by the
    quota method of Balinski and Young 1975, "The quota method of apportionment", Amer. Math. Monthly 82; always taking
    the corpus that is furthest behind would miss that bound. Nothing is drawn, so all ranks take the same corpus at
    the same step.

    An epoch is as many batches as the corpora have together. A corpus that has given all of its batches begins its
    next own epoch, reshuffled; at the end of an epoch of the mixture the corpora stay where they are and go on from
    there. Everything follows from (epoch, position), so a resumed run sees the batches it would have seen.

    Args:
        samplers: one per corpus, of the same rank and number of processes; this object moves them.
        weights: one per corpus, in any unit: 3 and 1 are the same as 0.75 and 0.25.

    Raises:
        ValueError: there is no corpus, the numbers of samplers and weights differ, a weight is not a positive finite
            number, or the samplers are of different processes.
    """

    def __init__(self, samplers: Sequence[DurationBatchSampler], weights: Sequence[float]) -> None:
        if not samplers or len(samplers) != len(weights):
            raise ValueError(
                f"a mixture needs corpora and one weight for each, got {len(samplers)} corpora and {len(weights)} "
                f"weights {list(weights)}"
            )
        for index, weight in enumerate(weights):
            if not 0 < weight < math.inf:
                raise ValueError(
                    f"weight {index} of the mixture is {weight}; it must be a positive number, leave out a corpus that "
                    "is not wanted"
                )
        processes = sorted({(sampler.rank, sampler.world_size) for sampler in samplers})
        if len(processes) > 1:
            raise ValueError(
                f"the samplers of a mixture have different (rank, world_size), {processes}; make all of them for this "
                "process"
            )
        self.samplers, self.weights = list(samplers), _whole_numbers(weights)
        sizes = [sum(map(len, sampler.buckets)) for sampler in samplers]
        self.offsets = [sum(sizes[:index]) for index in range(len(sizes))]
        self.num_steps = sum(map(len, samplers))
        self.epoch, self.position, self._start = 0, 0, 0

    def __len__(self) -> int:
        return self.num_steps

    def set_epoch(self, epoch: int) -> None:
        """Begin this epoch: each corpus goes on where it stands after the batches of the epochs before."""
        self.epoch, self.position, self._start = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch stands; the same on every rank, a few numbers per corpus however long the run.

        `position` counts the batches handed out, as in `DurationBatchSampler.state_dict`.
        """
        return {"epoch": self.epoch, "position": self.position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration give the rest of the epoch; no batch is made to be dropped.

        Raises:
            ValueError: the state is of other corpora, weights, seeds, limits or of another number of processes.
        """
        own = self._identity()
        if state.get("weights") != own["weights"]:
            raise ValueError(
                f"the mixture's state has weights={state.get('weights')}, this run has {own['weights']} (in whole "
                "numbers); resume with the corpora and weights of the run that saved it"
            )
        for index, (saved, corpus) in enumerate(zip(state["corpora"], own["corpora"], strict=True)):
            for name, value in corpus.items():
                if saved.get(name) != value:
                    raise ValueError(
                        f"corpus {index} of the mixture's state has {name}={saved.get(name)}, this run has {value}; "
                        "resume with the data, seed, number of processes and data.max_batch_seconds of the run that "
                        "saved it"
                    )
        if not 0 <= state["position"] <= self.num_steps:
            raise ValueError(f"the mixture's state has position={state['position']}, outside 0 to {self.num_steps}")
        self.set_epoch(state["epoch"])
        self.position = self._start = state["position"]

    def __iter__(self) -> Iterator[list[int]]:
        start, self._start = self._start, 0  # a second iteration is a whole epoch again
        num_taken = self.epoch * self.num_steps + start
        counts = batch_counts(self.weights, num_taken)
        batches = [_batches_from(sampler, count) for sampler, count in zip(self.samplers, counts, strict=True)]
        for position in range(start, self.num_steps):
            self.position = position + 1
            num_taken += 1
            corpus = _next_corpus(self.weights, counts, num_taken)
            counts[corpus] += 1
            yield [self.offsets[corpus] + index for index in next(batches[corpus])]

    def _identity(self) -> dict[str, Any]:
        states = [sampler.state_dict() for sampler in self.samplers]
        where = ("epoch", "position")
        return {
            "weights": self.weights,
            "corpora": [{name: value for name, value in state.items() if name not in where} for state in states],
        }


def batch_counts(weights: Sequence[int], num_batches: int) -> list[int]:
    """How many of the first batches of a mixture come from each corpus.

    Args:
        weights: shares as positive whole numbers, (corpora,).
        num_batches: how many.

    Returns:
        Counts, (corpora,), each within one of `num_batches * weight / sum(weights)`.
    """
    # after sum(weights) batches every count is exact and the same choices come again, so at most one round is counted
    rounds, rest = divmod(num_batches, sum(weights))
    counts = [0] * len(weights)
    for number in range(1, rest + 1):
        counts[_next_corpus(weights, counts, number)] += 1
    return [rounds * weight + count for weight, count in zip(weights, counts, strict=True)]


def _next_corpus(weights: Sequence[int], counts: Sequence[int], number: int) -> int:
    """The corpus of batch `number`, counted from 1, where `counts` came before.

    Of those that stay below their share rounded up, it is the one whose next batch is due first; ties by position.
    """
    total = sum(weights)
    below = [index for index, weight in enumerate(weights) if counts[index] * total < number * weight]
    return min(below, key=lambda index: (counts[index] + 1) / weights[index])


def _batches_from(sampler: DurationBatchSampler, num_taken: int) -> Iterator[list[int]]:
    """Endless batches of one corpus after its first `num_taken`, epoch after epoch."""
    epoch, position = divmod(num_taken, len(sampler))
    sampler.load_state_dict({**sampler.state_dict(), "epoch": epoch, "position": position})
    while True:
        yield from sampler
        epoch += 1
        sampler.set_epoch(epoch)


def _whole_numbers(weights: Sequence[float]) -> list[int]:
    """Weights in the ratio that their decimals say, in lowest terms: 0.7 and 0.3 become 7 and 3."""
    fractions = [Fraction(str(weight)) for weight in weights]
    denominator = math.lcm(*(fraction.denominator for fraction in fractions))
    numerators = [int(fraction * denominator) for fraction in fractions]
    divisor = math.gcd(*numerators)
    return [numerator // divisor for numerator in numerators]
