"""Batches bounded in padded seconds, the same number on every rank and in every epoch."""

from collections.abc import Iterator
from itertools import cycle, islice

import numpy as np
from torch.utils.data import Sampler


class DurationBatchSampler(Sampler[list[int]]):
    """Shuffled batches of similar durations.

    Utterances are sorted by duration and cut into buckets; the batch size of a bucket follows from its longest
    utterance. Each epoch reshuffles inside the buckets and shuffles the order of batches, both from (seed, epoch)
    alone, so a resumed run sees the batches it would have seen. At one step all ranks get batches of one bucket.

    Args:
        durations_seconds: padded length of each utterance, (utterances,).
        max_batch_seconds: padded seconds per batch and device.
        seed: of the shuffling.
        rank: index of this process.
        world_size: number of processes.
        num_buckets: upper bound of the number of buckets.

    Raises:
        ValueError: no utterance, or one longer than `max_batch_seconds`.
    """

    def __init__(
        self,
        durations_seconds: np.ndarray,
        max_batch_seconds: float,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_buckets: int = 20,
    ) -> None:
        durations = np.asarray(durations_seconds, dtype=np.float64)
        if len(durations) == 0:
            raise ValueError("there is no utterance to batch; check the manifest and the label filters")
        if durations.max() > max_batch_seconds:
            raise ValueError(
                f"utterance {int(durations.argmax())} lasts {durations.max():.1f} s, longer than "
                f"max_batch_seconds={max_batch_seconds:.1f}; raise data.max_batch_seconds"
            )
        self.seed, self.rank, self.world_size, self.epoch = seed, rank, world_size, 0
        order = np.argsort(durations, kind="stable")
        self.buckets = [bucket for bucket in np.array_split(order, min(num_buckets, len(order))) if len(bucket)]
        if durations.min() == durations.max():
            self.buckets = [order]  # nothing to gain from buckets, and one keeps the shuffle global
        self.batch_sizes = [int(max_batch_seconds // durations[bucket].max()) for bucket in self.buckets]
        num_batches = sum(-(-len(bucket) // size) for bucket, size in zip(self.buckets, self.batch_sizes, strict=True))
        self.num_steps = -(-num_batches // world_size)

    def __len__(self) -> int:
        return self.num_steps

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle of this epoch; the same (seed, epoch) always gives the same batches."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng((self.seed, self.epoch))
        batches: list[list[int]] = []
        for bucket, size in zip(self.buckets, self.batch_sizes, strict=True):
            shuffled = generator.permutation(bucket)
            batches += [shuffled[start : start + size].tolist() for start in range(0, len(shuffled), size)]
        batches = list(islice(cycle(batches), self.num_steps * self.world_size))  # repeats fill the last step
        for step in generator.permutation(self.num_steps):
            yield batches[step * self.world_size + self.rank]
