"""Training batches from tar shards, numbered, so that any of them can be made again after a restart.

A map-style dataset over batch numbers needs no state in the workers: skipping numbers is all that a resume does.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from speechkd.data.audio import AudioError, load_utterance
from speechkd.data.sampler import BatchLimits, StreamBatcher, bucket_edges
from speechkd.data.shards import Utterance, check_ends, read_shard

logger = logging.getLogger(__name__)

NUM_EDGE_UTTERANCES = 10_000  # as many durations as lhotse estimates its buckets from
MIN_READ_UTTERANCES = 100  # below that a share of skipped ones says little
MAX_HELD_BYTES = 1 << 29  # of encoded audio per stream

Held = tuple[Utterance, bytes | Callable[[], bytes]]
Prepare = Callable[[Utterance, Tensor], dict[str, Any] | None]


class StreamSteps(Sampler[list[int]]):
    """Batch numbers 0, 1, ... for a DataLoader over a `ShardStream`, as its batch sampler.

    Args:
        num_steps: batches per rank in the whole run: a stream has no epochs.

    Raises:
        ValueError: `num_steps` is below 1.
    """

    def __init__(self, num_steps: int) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps must be 1 or more, got {num_steps}")
        self.num_steps = num_steps

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[list[int]]:
        return ([number] for number in range(self.num_steps))

    def set_epoch(self, epoch: int) -> None:
        """Nothing to reshuffle: a stream does it at each of its passes."""


class ShardStream(Dataset[list[dict[str, Any]]]):
    """Endless batches of utterances of similar durations, read from shards in order.

    `stream[k]` is batch k of this rank, a list of items. Batch k is the (k // num_streams)-th of the virtual stream
    k % num_streams. A DataLoader with `num_streams` workers, which hands out numbers in turn, gives each worker one
    stream, hence one shard at a time. At each pass the shards are shuffled by (seed, pass) and dealt out over ranks and
    streams, so that each is read once. A stream whose next number lies ahead draws the batches in between from
    durations alone, seeks past the audio and decodes none. The batches follow from the arguments, however many
    workers there are; keep `num_streams` when a run goes on with another number of them.

    An utterance that cannot be decoded, or is longer than a batch may be, is left out and named once per process in the
    log. Where nothing of a batch can be used, an utterance of a later one takes its place.

    The shards should be shuffled inside: a batch mixes the `buffer_size` utterances that follow one another.

    Args:
        paths: the shards; their order does not matter, which may differ between machines.
        prepare: makes an item of an utterance and its samples, (samples,), int16; None leaves it out. The utterance has
            the fields of a manifest, and `epoch`, the number of its pass. The item must not be longer.
        max_batch_seconds: padded seconds per batch; never passed.
        sample_rate_hz: rate of the samples.
        num_streams: virtual streams per rank: the number of workers, at least 1.
        seed: of the shuffling, 0 or more.
        rank: index of this process.
        world_size: number of processes.
        num_buckets: upper bound of the number of buckets. All ranks prefer the same one at the same step.
        buffer_size: utterances held per stream, with up to 512 MiB of their encoded audio.
        quadratic_duration_seconds: see `BatchLimits`.
        max_batch_size: utterances per batch at most; None leaves it to the seconds.
        max_skipped_fraction: share of what a stream has read that may be left out.

    Raises:
        ValueError: there are fewer shards than streams, one is missing or cut short, none of the first holds an
            utterance that fits into a batch, or an argument is out of its range.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        prepare: Prepare,
        *,
        max_batch_seconds: float,
        sample_rate_hz: int,
        num_streams: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_buckets: int = 30,
        buffer_size: int = 2_000,
        quadratic_duration_seconds: float | None = None,
        max_batch_size: int | None = None,
        max_skipped_fraction: float = 0.01,
    ) -> None:
        if num_streams < 1:
            raise ValueError(f"num_streams must be 1 or more, got {num_streams}")
        if not 0 <= max_skipped_fraction <= 1:
            raise ValueError(f"max_skipped_fraction must be 0 to 1, got {max_skipped_fraction}")
        self.paths = sorted({Path(path) for path in paths})
        if len(self.paths) < world_size * num_streams:
            raise ValueError(
                f"{len(self.paths)} shards cannot be dealt out over {world_size} processes x {num_streams} streams; "
                f"lower data.num_workers, or write {world_size * num_streams} shards or more with fewer utterances each"
            )
        check_ends(self.paths)
        self.prepare, self.sample_rate_hz = prepare, sample_rate_hz
        self.num_streams, self.seed, self.rank, self.world_size = num_streams, seed, rank, world_size
        self.max_skipped_fraction = max_skipped_fraction
        limits = BatchLimits(max_batch_seconds, quadratic_duration_seconds, max_batch_size)
        self.edges_seconds = bucket_edges(_first_durations(self.paths, limits), num_buckets)
        self.batcher_settings: dict[str, Any] = {
            "max_batch_seconds": max_batch_seconds,
            "buffer_size": buffer_size,
            "seed": seed,
            "quadratic_duration_seconds": quadratic_duration_seconds,
            "max_batch_size": max_batch_size,
        }
        self.batcher(0)  # refuses its settings here, not in a worker
        self._streams: dict[int, _Stream] = {}
        self._process_id = os.getpid()
        self._reported: set[str] = set()

    def __getitem__(self, number: int) -> list[dict[str, Any]]:
        """Batch `number`.

        Raises:
            AudioError: too much of what the stream has read was left out, or nothing at hand can be used.
            ValueError: a shard is damaged; names it and the member.
        """
        if self._process_id != os.getpid():  # after a fork: open files would share their positions
            self._streams, self._process_id = {}, os.getpid()
        position, stream_number = divmod(number, self.num_streams)
        stream = self._streams.get(stream_number)
        if stream is None or stream.position > position:
            stream = self._streams[stream_number] = _Stream(self, stream_number)
        return stream.batch(position)

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Items of these batches in one list: what a DataLoader over `StreamSteps` hands to `collate_fn`."""
        return [item for number in numbers for item in self[number]]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_streams": {}}  # for workers that are spawned

    def batcher(self, stream_number: int) -> StreamBatcher[Held]:
        """A batcher of one stream of this rank, with a shuffle of its own."""
        batcher: StreamBatcher[Held] = StreamBatcher(self.edges_seconds, **self.batcher_settings)
        batcher.set_epoch(self.rank * self.num_streams + stream_number)
        return batcher

    def dealt_shards(self, stream_number: int, epoch: int) -> list[Path]:
        """Shards of one stream of this rank in one pass, in the order of reading."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.paths))
        first = self.rank * self.num_streams + stream_number
        return [self.paths[index] for index in order[first :: self.world_size * self.num_streams]]

    def report(self, message: str) -> None:
        """Log why an utterance is left out, once per process."""
        if message not in self._reported:
            self._reported.add(message)
            logger.warning("%s", message)


class _Stream:
    """One virtual stream of a `ShardStream`, at the place that it has reached."""

    def __init__(self, source: ShardStream, number: int) -> None:
        self.source, self.number = source, number
        self.position = 0
        self.is_replaying = False
        self.held_bytes = self.num_read = self.num_left_out = 0
        self.batcher = source.batcher(number)
        self.batches = self.batcher.batches(self._utterances(), self._wanted_buckets())

    def batch(self, position: int) -> list[dict[str, Any]]:
        """Items of the batch at `position`, which must not lie behind."""
        self.is_replaying = True
        for _ in range(position - self.position):
            self._draw()
        self.is_replaying = False
        items = [item for held in self._draw() if (item := self._item(held)) is not None]
        if items:
            return items
        spare = [held for bucket in self.batcher.held for held in bucket]
        for index in np.random.default_rng((self.source.seed, self.number, position)).permutation(len(spare)):
            item = self._item(spare[index])
            if item is not None:
                return [item]
        raise AudioError(
            f"no utterance of batch {position * self.source.num_streams + self.number} can be used, nor any of the "
            f"{len(spare)} that are held for later ones; see the log for the reasons"
        )

    def _draw(self) -> list[Held]:
        batch = next(self.batches)
        self.position += 1
        self.held_bytes -= sum(len(audio) for _, audio in batch if isinstance(audio, bytes))
        return batch

    def _wanted_buckets(self) -> Iterator[int]:
        """A bucket for each batch that depends on its number alone: then all ranks want the same."""
        for number in count(self.number, self.source.num_streams):
            yield int(np.random.default_rng((self.source.seed, number)).integers(len(self.source.edges_seconds)))

    def _utterances(self) -> Iterator[tuple[Held, float]]:
        """Utterances of all passes with their seconds; their audio is read in passing unless it may not be needed."""
        limits = self.batcher.limits
        for epoch in count():
            shards, num_utterances = self.source.dealt_shards(self.number, epoch), 0
            for utterance, read in chain.from_iterable(read_shard(path, self._leave_out_unread) for path in shards):
                seconds = utterance["duration_seconds"]
                if limits.batch_size(seconds) == 0:
                    self._leave_out_unread(
                        f"{utterance['audio']}: left out, {seconds:.1f} s are longer than a batch may be"
                    )
                    continue
                num_utterances += 1
                self.num_read += not self.is_replaying
                audio: bytes | Callable[[], bytes] = read
                if not self.is_replaying and self.held_bytes < MAX_HELD_BYTES:
                    audio = read()
                    self.held_bytes += len(audio)
                yield ({**utterance, "epoch": epoch}, audio), seconds
            if num_utterances == 0:
                raise AudioError(
                    f"the shards {', '.join(map(str, shards))} hold no utterance that can be used; see the log for the "
                    "reasons"
                )

    def _item(self, held: Held) -> dict[str, Any] | None:
        utterance, audio = held
        encoded = audio if isinstance(audio, bytes) else audio()
        try:
            waveform = load_utterance({**utterance, "audio": encoded}, self.source.sample_rate_hz, dtype=torch.int16)
        except AudioError as error:
            self._leave_out(f"{utterance['audio']}: left out, {error}")
            return None
        return self.source.prepare(utterance, waveform)

    def _leave_out_unread(self, message: str) -> None:
        if self.is_replaying:
            self.source.report(message)  # counted only where the good ones beside it are
            return
        self.num_read += 1
        self._leave_out(message)

    def _leave_out(self, message: str) -> None:
        self.source.report(message)
        self.num_left_out += 1
        limit = self.source.max_skipped_fraction
        if self.num_read >= MIN_READ_UTTERANCES and self.num_left_out > limit * self.num_read:
            raise AudioError(
                f"{self.num_left_out} of {self.num_read} utterances were left out; at most {100 * limit:.1f} % may be "
                f"(max_skipped_fraction). Last: {message}"
            )


def _first_durations(paths: list[Path], limits: BatchLimits) -> np.ndarray:
    """Durations in seconds of the first utterances of the shards that fit into a batch, (utterances,)."""
    # a broken one is reported where it is read to be trained on
    utterances = chain.from_iterable(read_shard(path, lambda message: None) for path in paths)
    durations = (utterance["duration_seconds"] for utterance, _ in islice(utterances, NUM_EDGE_UTTERANCES))
    fitting = [seconds for seconds in durations if limits.batch_size(seconds) > 0]
    if not fitting:
        raise ValueError(
            f"the first of {len(paths)} shards, {paths[0]}, hold no utterance of at most max_batch_seconds="
            f"{limits.max_batch_seconds:.1f}; raise data.max_batch_seconds, or look at the shards"
        )
    return np.array(fitting)
