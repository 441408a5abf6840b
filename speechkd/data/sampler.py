"""Batches bounded in padded seconds, the same number on every rank and in every epoch.

Buckets hold equal seconds, as in lhotse's DynamicBucketingSampler, https://github.com/lhotse-speech/lhotse; the bound
here is hard: no batch passes it.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

import numpy as np
from torch.utils.data import Sampler

Item = TypeVar("Item")

SORTED_STEPS = 16  # as many at most are sorted together: more sort better and mix worse
MIN_SORTED_GROUPS = 4  # of an epoch; sorted as a whole, a small corpus would give the same batches in every epoch


def bucket_edges(durations_seconds: np.ndarray, num_buckets: int) -> np.ndarray:
    """Edges between buckets that hold about equal total seconds.

    Args:
        durations_seconds: utterance lengths or a sample of them, (utterances,).
        num_buckets: upper bound of the number of buckets; equal durations share one.

    Returns:
        Longest duration of each bucket in seconds, ascending, at most (num_buckets,), float64. Bucket i holds the
        durations above edge i - 1 and up to edge i; the last edge is the longest duration.

    Raises:
        ValueError: no duration, one that is not a positive number, or `num_buckets` below 1.
    """
    durations = _checked_durations(durations_seconds)
    if num_buckets < 1:
        raise ValueError(f"num_buckets must be 1 or more, got {num_buckets}")
    ordered = np.sort(durations)
    seconds_up_to = np.cumsum(ordered)
    shares = seconds_up_to[-1] * np.arange(1, num_buckets) / num_buckets
    return np.unique([*ordered[np.searchsorted(seconds_up_to, shares)], ordered[-1]])


class BatchLimits:
    """How many utterances of a duration fit into a batch.

    An utterance costs its seconds, or d + d**2 / quadratic_duration_seconds where the memory of attention counts, as
    in lhotse. A batch costs its number of utterances times the cost of its longest one.

    Args:
        max_batch_seconds: bound of that product.
        quadratic_duration_seconds: 15 to 40 is usual for attention models; None counts seconds alone.
        max_batch_size: bound of the number of utterances; None leaves it to the seconds.

    Raises:
        ValueError: a bound is not positive.
    """

    def __init__(
        self,
        max_batch_seconds: float,
        quadratic_duration_seconds: float | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        if not 0 < max_batch_seconds < math.inf:
            raise ValueError(f"max_batch_seconds must be a positive number, got {max_batch_seconds}")
        if quadratic_duration_seconds is not None and not quadratic_duration_seconds > 0:
            raise ValueError(
                f"quadratic_duration_seconds must be positive, got {quadratic_duration_seconds}; None has no such term"
            )
        if max_batch_size is not None and max_batch_size < 1:
            raise ValueError(f"max_batch_size must be 1 or more, got {max_batch_size}; None sets no bound")
        self.max_batch_seconds = max_batch_seconds
        self.quadratic_duration_seconds = quadratic_duration_seconds
        self.max_batch_size = max_batch_size

    def cost_seconds(self, duration_seconds: float) -> float:
        """Cost of one utterance."""
        if self.quadratic_duration_seconds is None:
            return duration_seconds
        return duration_seconds + duration_seconds**2 / self.quadratic_duration_seconds

    def batch_size(self, duration_seconds: float) -> int:
        """Utterances that fit where the longest lasts `duration_seconds`; 0 where not even one does."""
        # floor division of floats is exact, so the rounded product never passes the bound either
        size = int(self.max_batch_seconds // self.cost_seconds(duration_seconds))
        return size if self.max_batch_size is None else min(size, self.max_batch_size)

    def check(self, name: str, duration_seconds: float) -> None:
        """Refuse an utterance that fills more than a batch alone.

        Raises:
            ValueError: it does; the message calls it `name`.
        """
        if self.batch_size(duration_seconds) > 0:
            return
        if self.quadratic_duration_seconds is None:
            raise ValueError(
                f"{name} lasts {duration_seconds:.1f} s, longer than max_batch_seconds={self.max_batch_seconds:.1f}; "
                "raise data.max_batch_seconds"
            )
        raise ValueError(
            f"{name} lasts {duration_seconds:.1f} s and costs {self.cost_seconds(duration_seconds):.1f} s with "
            f"quadratic_duration_seconds={self.quadratic_duration_seconds:g}, more than "
            f"max_batch_seconds={self.max_batch_seconds:.1f}; raise either"
        )


class DurationBatchSampler(Sampler[list[int]]):
    """Shuffled batches of similar durations, over a map-style dataset.

    Each bucket is cut into nearly equal batches, as many as its longest utterance asks for, rounded up to whole steps
    of all ranks. At one step all ranks get batches of one bucket, which differ by one utterance at most. An utterance
    comes twice in an epoch only to complete a step: where its bucket holds fewer than `world_size`, or its batches hold
    one. Each epoch reshuffles inside the buckets and shuffles the steps, both from (seed, epoch) alone, so a resumed
    run sees the batches it would have seen.

    Args:
        durations_seconds: padded length of each utterance, (utterances,).
        max_batch_seconds: padded seconds per batch and device; never passed.
        seed: of the shuffling, 0 or more.
        rank: index of this process.
        world_size: number of processes.
        num_buckets: upper bound of the number of buckets.
        quadratic_duration_seconds: see `BatchLimits`.
        max_batch_size: utterances per batch and device at most; None leaves it to the seconds.
        sort_keys: utterances of a bucket with similar ones share batches, such as label lengths where all clips are
            padded alike, (utterances,). Number and sizes of the batches stay the same.

    Raises:
        ValueError: no utterance, a duration that is not positive, an utterance above `max_batch_seconds`, or an
            argument out of its range.
    """

    def __init__(
        self,
        durations_seconds: np.ndarray,
        max_batch_seconds: float,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_buckets: int = 30,
        quadratic_duration_seconds: float | None = None,
        max_batch_size: int | None = None,
        sort_keys: np.ndarray | None = None,
    ) -> None:
        _check_ranks(seed, rank, world_size)
        limits = BatchLimits(max_batch_seconds, quadratic_duration_seconds, max_batch_size)
        durations = _checked_durations(durations_seconds)
        limits.check(f"utterance {int(durations.argmax())}", float(durations.max()))
        edges = bucket_edges(durations, num_buckets)
        bucket_of = np.searchsorted(edges, durations)
        order = np.argsort(bucket_of, kind="stable")
        if sort_keys is not None and len(sort_keys) != len(durations):
            raise ValueError(f"there are {len(durations)} durations and {len(sort_keys)} sort_keys; give one each")
        self.sort_keys = None if sort_keys is None else np.asarray(sort_keys)
        self.seed, self.rank, self.world_size, self.epoch = seed, rank, world_size, 0
        self.buckets = np.split(order, np.cumsum(np.bincount(bucket_of, minlength=len(edges)))[:-1])
        self.batch_sizes = [limits.batch_size(edge) for edge in edges.tolist()]
        steps = [-(-len(b) // (size * world_size)) for b, size in zip(self.buckets, self.batch_sizes, strict=True)]
        self.last_steps = np.cumsum(steps)  # step number s of the unshuffled epoch is in the first bucket above s
        self.num_steps = int(self.last_steps[-1])
        self.position, self._start = 0, 0

    def __len__(self) -> int:
        return self.num_steps

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle of this epoch and begin it; the same (seed, epoch) always gives the same batches."""
        self.epoch, self.position, self._start = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        """Where the epoch stands; the same on every rank, a few numbers however long the run.

        `position` counts the batches handed out. A loader that prefetches has handed out more than were trained on:
        the training loop then puts its own count there.
        """
        return {"epoch": self.epoch, "position": self.position, **self._identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration give the rest of the epoch; no dataset is read and no batch is made to be dropped.

        Raises:
            ValueError: the state is of another dataset, seed, world size or limit, whose batches differ from these.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(
                    f"the sampler's state has {name}={state.get(name)}, this run has {value}; resume with the data, "
                    "seed, number of processes and data.max_batch_seconds of the run that saved it"
                )
        if not 0 <= state["position"] <= self.num_steps:
            raise ValueError(f"the sampler's state has position={state['position']}, outside 0 to {self.num_steps}")
        self.set_epoch(state["epoch"])
        self.position = self._start = state["position"]

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng((self.seed, self.epoch))
        shuffled = [self._sorted(generator.permutation(bucket), number) for number, bucket in enumerate(self.buckets)]
        steps = generator.permutation(self.num_steps)
        start, self._start = self._start, 0  # a second iteration is a whole epoch again
        for position in range(start, self.num_steps):
            self.position = position + 1
            bucket = int(np.searchsorted(self.last_steps, steps[position], side="right"))
            first, num_batches = self._batches_of(bucket)
            number = (int(steps[position]) - first) * self.world_size + self.rank
            yield _part(shuffled[bucket], number, num_batches).tolist()

    def _batches_of(self, bucket: int) -> tuple[int, int]:
        """First step of a bucket, and the number of its batches on all ranks."""
        first = int(self.last_steps[bucket - 1]) if bucket else 0
        return first, (int(self.last_steps[bucket]) - first) * self.world_size

    def _sorted(self, shuffled: np.ndarray, bucket: int) -> np.ndarray:
        """The utterances of a bucket, sorted within groups of steps."""
        if self.sort_keys is None:
            return shuffled
        num_batches = self._batches_of(bucket)[1]
        num_steps = num_batches // self.world_size
        num_groups = min(num_steps, max(MIN_SORTED_GROUPS, -(-num_steps // SORTED_STEPS)))
        firsts = [group * num_steps // num_groups * self.world_size for group in range(1, num_groups)]
        ends = [batch * len(shuffled) // num_batches for batch in firsts]
        parts = [part[np.argsort(self.sort_keys[part], kind="stable")] for part in np.split(shuffled, ends)]
        return np.concatenate(parts)

    def _identity(self) -> dict[str, int]:
        num_utterances = sum(len(bucket) for bucket in self.buckets)
        return {
            "seed": self.seed,
            "world_size": self.world_size,
            "num_utterances": num_utterances,
            "num_steps": self.num_steps,
        }


class StreamBatcher(Generic[Item]):
    """Shuffled batches of similar durations, over a stream that is read once and held in part.

    Every rank reads the same stream and draws the same groups of `world_size` batches from one bucket, so that counts
    and buckets agree without a word between them; each keeps its own batch. Items should be small references, such as
    manifest rows: they are held, and they are part of the state. While the stream lasts, batches are full or, where
    the buffer is too small for that, the fullest; at its end the rest goes out, and only there may an item come twice,
    when fewer than `world_size` are left of a bucket.

    Args:
        edges_seconds: of `bucket_edges`, from a sample of the durations, (buckets,). Longer items go to the last.
        max_batch_seconds: padded seconds per batch and device; never passed.
        buffer_size: items held at most; more mix better and pad less.
        seed: of the shuffling, 0 or more.
        rank: index of this process.
        world_size: number of processes.
        quadratic_duration_seconds: see `BatchLimits`.
        max_batch_size: utterances per batch and device at most; None leaves it to the seconds.

    Raises:
        ValueError: an argument is out of its range, or the buffer cannot hold `world_size` items of every bucket.
    """

    def __init__(
        self,
        edges_seconds: np.ndarray,
        max_batch_seconds: float,
        *,
        buffer_size: int = 20_000,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        quadratic_duration_seconds: float | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        _check_ranks(seed, rank, world_size)
        self.limits = BatchLimits(max_batch_seconds, quadratic_duration_seconds, max_batch_size)
        self.edges_seconds: list[float] = np.unique(_checked_durations(edges_seconds)).tolist()
        self.limits.check("the last of edges_seconds", self.edges_seconds[-1])
        if buffer_size < len(self.edges_seconds) * world_size:
            raise ValueError(
                f"buffer_size={buffer_size} is below {len(self.edges_seconds)} buckets x {world_size} processes; "
                f"raise it to {len(self.edges_seconds) * world_size} or more"
            )
        self.buffer_size, self.seed, self.rank, self.world_size = buffer_size, seed, rank, world_size
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Forget what is held and choose the shuffle of this epoch."""
        self.epoch, self.num_read = epoch, 0
        self.generator = np.random.default_rng((self.seed, epoch))
        self.held: list[list[Item]] = [[] for _ in self.edges_seconds]
        self.longest_seconds = list(self.edges_seconds)  # the last grows with what comes

    def batches(
        self, stream: Iterable[tuple[Item, float]], wanted_buckets: Iterator[int] | None = None
    ) -> Iterator[list[Item]]:
        """Batches of this rank.

        Args:
            stream: items with their padded length in seconds; after `load_state_dict`, without the first `num_read`.
            wanted_buckets: for each batch the bucket that it should come from; the nearest one that holds a full batch
                gives it. Batchers of different streams that want the same pad alike. None draws one at random.

        Raises:
            ValueError: a duration is not a positive number or above `max_batch_seconds`; names the item's position.
        """
        for item, duration_seconds in stream:
            self._hold(item, duration_seconds)
            while sum(map(len, self.held)) >= self.buffer_size:
                yield self._draw(wanted_buckets)
        while any(self.held):
            yield self._draw(wanted_buckets)

    def state_dict(self) -> dict[str, Any]:
        """What continues the epoch: the items held, the generator and `num_read`; its size is that of the buffer."""
        return {
            "epoch": self.epoch,
            "num_read": self.num_read,
            "world_size": self.world_size,
            "held": [list(items) for items in self.held],
            "longest_seconds": list(self.longest_seconds),
            "generator": self.generator.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue an epoch; the stream must then begin after its first `num_read` items.

        Raises:
            ValueError: the state has another number of buckets or processes.
        """
        for name, saved, own in (
            ("buckets", len(state["held"]), len(self.held)),
            ("processes", state["world_size"], self.world_size),
        ):
            if saved != own:
                raise ValueError(
                    f"the batcher's state has {saved} {name}, this run has {own}; resume with the edges and the "
                    "number of processes of the run that saved it"
                )
        self.set_epoch(state["epoch"])
        self.num_read = state["num_read"]
        self.held = [list(items) for items in state["held"]]
        self.longest_seconds = list(state["longest_seconds"])
        self.generator.bit_generator.state = state["generator"]

    def _hold(self, item: Item, duration_seconds: float) -> None:
        name = f"item {self.num_read} of the stream"
        if not 0 < duration_seconds < math.inf:
            raise ValueError(f"{name} has a duration of {duration_seconds} s; it must be a positive number")
        self.limits.check(name, duration_seconds)
        bucket = min(bisect_left(self.edges_seconds, duration_seconds), len(self.held) - 1)
        self.held[bucket].append(item)
        self.longest_seconds[bucket] = max(self.longest_seconds[bucket], duration_seconds)
        self.num_read += 1

    def _draw(self, wanted_buckets: Iterator[int] | None) -> list[Item]:
        """Take one group of batches out of a bucket and return this rank's."""
        counts = np.array([len(items) for items in self.held])
        full = np.array([self.limits.batch_size(seconds) for seconds in self.longest_seconds]) * self.world_size
        ready = np.flatnonzero(counts >= full)
        wanted = None if wanted_buckets is None else next(wanted_buckets)
        if len(ready):
            bucket = int(self.generator.choice(ready) if wanted is None else ready[np.abs(ready - wanted).argmin()])
        else:
            enough = counts >= self.world_size
            bucket = int(np.argmax(counts / full * (enough if enough.any() else 1)))
        order = self.generator.permutation(int(counts[bucket]))
        items, taken = self.held[bucket], order[: full[bucket]]
        self.held[bucket] = [items[index] for index in np.sort(order[full[bucket] :])]
        return [items[index] for index in _part(taken, self.rank, self.world_size)]


def _part(items: np.ndarray, number: int, num_parts: int) -> np.ndarray:
    """One of `num_parts` nearly equal parts; where there are fewer items than parts, they come again."""
    count = len(items)
    if count < num_parts:
        return items[[number % count]]
    return items[number * count // num_parts : (number + 1) * count // num_parts]


def _checked_durations(durations_seconds: np.ndarray) -> np.ndarray:
    durations = np.asarray(durations_seconds, dtype=np.float64)
    if durations.size == 0:
        raise ValueError("there is no utterance to batch; check the manifest and the label filters")
    if durations.ndim != 1:
        raise ValueError(f"durations must be (utterances,), got an array of shape {durations.shape}")
    wrong = np.flatnonzero(~(np.isfinite(durations) & (durations > 0)))
    if len(wrong):
        raise ValueError(
            f"utterance {wrong[0]} has a duration of {durations[wrong[0]]} s; it must be a positive number, correct "
            "the manifest"
        )
    return durations


def _check_ranks(seed: int, rank: int, world_size: int) -> None:
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be 0 to world_size - 1, got rank={rank} with world_size={world_size}")
