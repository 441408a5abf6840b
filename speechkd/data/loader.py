"""From clips to padded batches: labelling sets bad clips aside, training gets seeded workers and a copy ahead."""

import logging
import os
import pickle
import random
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._utils import ExceptionWrapper
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from speechkd.data.audio import AudioError
from speechkd.data.manifest import Manifest
from speechkd.data.packing import load_pack
from speechkd.files import write_jsonl

logger = logging.getLogger(__name__)

GRID_SAMPLES = 10_240  # 64 frames of 10 ms at 16 kHz
PREFETCH_FACTOR = 4  # batches that each worker has ready
DEAD_WORKER = re.compile(r"DataLoader worker \(pid")


@dataclass
class ClipBatch:
    """Decoded clips.

    Args:
        utterances: manifest rows of the clips that could be decoded.
        waveforms: their samples, zero-padded, (batch, samples), float32.
        skipped: `id`, `audio` and `reason` of the others.
    """

    utterances: list[dict[str, Any]] = field(default_factory=list)
    waveforms: Tensor = field(default_factory=lambda: torch.zeros(0, 1))
    skipped: list[dict[str, Any]] = field(default_factory=list)


class _Clips(Dataset):
    def __init__(self, manifest: Manifest, indices: Sequence[int], sample_rate_hz: int, max_seconds: float) -> None:
        self.manifest, self.indices = manifest, indices
        self.sample_rate_hz, self.max_seconds = sample_rate_hz, max_seconds

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[dict[str, Any], Tensor | str]:
        utterance = self.manifest[self.indices[position]]
        try:
            check_length(utterance, self.max_seconds)
            waveform = load_pack(utterance, self.sample_rate_hz)
        except AudioError as error:
            return utterance, str(error)
        return utterance, waveform[: round(self.max_seconds * self.sample_rate_hz)]


def _collate(items: list[tuple[dict[str, Any], Tensor | str]]) -> ClipBatch:
    good = [(utterance, clip) for utterance, clip in items if isinstance(clip, Tensor)]
    skipped = [skipped_row(utterance, reason) for utterance, reason in items if isinstance(reason, str)]
    if not good:
        return ClipBatch(skipped=skipped)
    utterances, waveforms = zip(*good, strict=True)
    return ClipBatch(list(utterances), pad_sequence(list(waveforms), batch_first=True), skipped)


def clip_batches(
    manifest: Manifest,
    indices: Sequence[int],
    *,
    sample_rate_hz: int,
    batch_size: int,
    max_seconds: float = 30.0,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[ClipBatch]:
    """Decode utterances in batches.

    Args:
        manifest: the utterances.
        indices: which of them, in the order wanted.
        sample_rate_hz: rate of the waveforms.
        batch_size: clips per batch.
        max_seconds: longer clips are set aside.
        num_workers: decoding processes; 0 decodes in this one.
        device: where the waveforms go.

    Yields:
        Batches with waveforms on `device`.
    """
    on_cuda = torch.device(device).type == "cuda"
    loader = DataLoader(
        _Clips(manifest, indices, sample_rate_hz, max_seconds),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=on_cuda,
        worker_init_fn=ignore_sigterm_of_others,
        generator=torch.Generator(),  # without one, each pass draws from the global random state
    )
    with explain_dead_workers():
        for batch in loader:
            batch.waveforms = batch.waveforms.to(device, non_blocking=on_cuda)
            yield batch


def check_length(utterance: dict[str, Any], max_seconds: float) -> None:
    """Refuse an utterance that lasts longer than `max_seconds`.

    Raises:
        AudioError: it does.
    """
    if utterance["duration_seconds"] > max_seconds:
        raise AudioError(
            f"utterance {utterance['id']!r}: lasts {utterance['duration_seconds']:.1f} s, longer than the "
            f"{max_seconds:.0f} s that the model takes; cut it into shorter clips, or score it with "
            "`speechkd evaluate --long-form`"
        )


def skipped_row(utterance: dict[str, Any], reason: str) -> dict[str, Any]:
    """A row of `skipped.jsonl`; `audio` is None where the utterance carries the bytes themselves."""
    audio = utterance["audio"]
    return {"id": utterance["id"], "audio": audio if isinstance(audio, str) else None, "reason": reason}


def report_skipped(
    skipped: list[dict[str, Any]], num_utterances: int, output_dir: str | Path, max_skipped_fraction: float
) -> None:
    """Name skipped clips in `skipped.jsonl`, and stop when there are too many.

    Args:
        skipped: rows with `id`, `audio` and `reason`.
        num_utterances: clips that were asked for.
        output_dir: folder of `skipped.jsonl`; without skipped clips the file is removed.
        max_skipped_fraction: share of clips that may be missing, 0 to 1.

    Raises:
        AudioError: more were skipped.
    """
    path = Path(output_dir) / "skipped.jsonl"
    if not skipped:
        path.unlink(missing_ok=True)
        return
    write_jsonl(path, skipped)
    fraction = len(skipped) / num_utterances
    for row in skipped[1:]:  # the message below names the first
        logger.warning("skipped: %s", row["reason"])
    summary = f"{len(skipped)} of {num_utterances} clips ({100 * fraction:.1f} %) were skipped and are named in {path}"
    if fraction > max_skipped_fraction:
        raise AudioError(
            f"{summary}; at most {100 * max_skipped_fraction:.1f} % may be (max_skipped_fraction). "
            f"First: {skipped[0]['reason']}"
        )
    logger.warning("%s. First: %s", summary, skipped[0]["reason"])


def length_sorted(manifest: Manifest, indices: Sequence[int]) -> list[int]:
    """These positions ordered by duration, so that batches pad little and decode equally long."""
    durations = manifest.durations_seconds
    return sorted(indices, key=lambda index: (durations[index], index))


def pad_waveforms(
    waveforms: Sequence[Tensor], grid_samples: int = GRID_SAMPLES, max_samples: int | None = None
) -> tuple[Tensor, Tensor]:
    """Clips as one batch whose length is a multiple of a grid, so that compiled graphs and cuDNN see few shapes.

    Args:
        waveforms: clips, each (samples,), all int16 or all float32.
        grid_samples: step of the padded length.
        max_samples: window of the model, which rounding up never passes (Whisper 480,000); None has no such bound.

    Returns:
        Zero-padded (batch, samples) in the clips' dtype, and `num_samples`, (batch,), int64, both on the CPU.

    Raises:
        ValueError: no clip, dtypes that differ, `grid_samples` below 1, or a clip above `max_samples`.
    """
    if grid_samples < 1:
        raise ValueError(f"grid_samples must be 1 or more, got {grid_samples}; 1 pads to the longest clip")
    dtypes = {clip.dtype for clip in waveforms}
    if len(dtypes) != 1:
        raise ValueError(f"a batch takes clips of one dtype, got {sorted(map(str, dtypes)) or 'no clip'}")
    num_samples = torch.tensor([len(clip) for clip in waveforms])
    longest = int(num_samples.max())
    padded_samples = -(-longest // grid_samples) * grid_samples
    if max_samples is not None:
        if longest > max_samples:
            raise ValueError(
                f"clip {int(num_samples.argmax())} of the batch has {longest} samples, more than max_samples="
                f"{max_samples}; cut it into shorter clips"
            )
        padded_samples = min(padded_samples, max_samples)
    batch = torch.zeros(len(waveforms), padded_samples, dtype=dtypes.pop())
    for row, clip in zip(batch, waveforms, strict=True):
        row[: len(clip)] = clip
    return batch, num_samples


def train_loader(
    dataset: Dataset,
    sampler: Sampler[list[int]],
    collate: Callable[[list[Any]], Any],
    *,
    num_workers: int,
    seed: int,
    rank: int,
) -> DataLoader:
    """Batches of a map-style dataset in the sampler's order, decoded ahead by worker processes.

    `random`, numpy and torch are seeded in each worker from (seed, rank, epoch of the sampler, worker number). The
    random state of this process is never drawn from. What the dataset or `collate` raises in a worker is raised here
    as it was, with the worker's traceback as its cause. All this holds as well for the loader that accelerate's
    `skip_first_batches` makes of this one. The loop around it belongs into `explain_dead_workers`.

    Args:
        dataset: its items go through `collate`, in the workers.
        sampler: batches of item indices; its `epoch`, where it has one, is read whenever iteration begins.
        collate: items to a batch.
        num_workers: decoding processes; 0 decodes in this one, and seeds nothing.
        seed: 0 or more.
        rank: index of this process.
    """
    return DataLoader(
        _CollatedBatches(dataset, collate),
        batch_sampler=sampler,
        collate_fn=_same,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=PREFETCH_FACTOR if num_workers else None,
        worker_init_fn=partial(_seed_worker, seed=seed, rank=rank, sampler=sampler),
        generator=torch.Generator().manual_seed(seed),
        persistent_workers=False,  # workers must see the sampler's epoch
    )


class _CollatedBatches(Dataset):
    """Makes whole batches, so that one place catches what goes wrong in a worker."""

    def __init__(self, dataset: Dataset, collate: Callable[[list[Any]], Any]) -> None:
        self.dataset, self.collate = dataset, collate

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: list[int]) -> Any:
        try:
            fetch = getattr(self.dataset, "__getitems__", None)  # a stream's: one index is a whole batch
            return self.collate(fetch(indices) if fetch else [self.dataset[index] for index in indices])
        except Exception as error:
            worker = get_worker_info()
            if worker is None:
                raise
            return _WorkerError(_sendable(error), worker.id)


class _WorkerError(ExceptionWrapper):
    """Stands for a batch on the way out of a worker, where torch lets it raise.

    torch's own wrapper makes a new exception whose message begins with its words and a traceback.
    """

    def __init__(self, error: Exception, worker_id: int) -> None:
        super().__init__(where=f"in DataLoader worker process {worker_id}")
        self.error: Any = error

    def reraise(self) -> None:
        error, self.error = self.error, None
        try:
            raise error from RuntimeError(f"{self.where}\n{self.exc_msg}")
        finally:
            del error  # in a cycle with its traceback the loader would outlive it, and then wait 10 s for its workers


def _sendable(error: Exception) -> Exception:
    """The same, or its text where it does not survive pickling; what the queue cannot send is waited for for ever."""
    try:
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    except Exception:
        logger.debug("%s cannot be pickled", type(error).__name__, exc_info=True)
    return RuntimeError(f"{type(error).__name__}: {error}")


def _same(batch: Any) -> Any:
    return batch


def ignore_sigterm_of_others(worker_id: int) -> None:
    """Let SIGTERM end this worker only if its parent sent it; a `worker_init_fn` of all our loaders.

    Schedulers send the signal to all processes of a job. The worker has to live until the parent has finished its
    step and saved it; then the parent ends it.
    """

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait, daemon=True).start()


def _seed_worker(worker_id: int, *, seed: int, rank: int, sampler: Sampler) -> None:
    ignore_sigterm_of_others(worker_id)
    epoch = getattr(sampler, "epoch", 0)  # endless streams have none
    words = np.random.SeedSequence([seed, rank, epoch, worker_id]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]))
    torch.set_num_threads(1)  # workers share the processors already


@contextmanager
def explain_dead_workers() -> Iterator[None]:
    """Say what to do when a loader's worker is killed; the signal may interrupt any line of the training loop.

    Raises:
        RuntimeError: a worker ended; torch's message and the way out.
    """
    try:
        yield
    except RuntimeError as error:
        if not DEAD_WORKER.search(str(error)):
            raise
        raise RuntimeError(
            f"a process that loads audio was ended from outside ({str(error).strip()}). Mostly the machine ran out of "
            "memory (`dmesg` says so): lower data.num_workers, then run the same command again, it resumes from the "
            "last checkpoint"
        ) from error
