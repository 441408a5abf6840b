"""Padding of the batch sampler on simulated durations. Launch: python tests/benchmarks/padding.py

50,000 durations each of read and of conversational speech, 200 s a batch. Targets with 30 buckets: at most 3.5 % of the
padded seconds of read speech and 6 % of conversational, and no batch above 200 s.
"""

import time
from collections.abc import Iterable

import numpy as np

from speechkd.data.sampler import DurationBatchSampler, StreamBatcher, bucket_edges

NUM_UTTERANCES = 50_000
MAX_BATCH_SECONDS = 200.0
MAX_PADDING = {"read": 0.035, "conversational": 0.06}


def simulated_durations(kind: str) -> np.ndarray:
    """Seconds of each utterance, (utterances,): `read` like LibriSpeech, or `conversational`."""
    generator = np.random.default_rng(7)
    share = generator.random(NUM_UTTERANCES)
    long, short = 14.5 + 1.2 * generator.standard_normal(NUM_UTTERANCES), 2 + 14 * generator.random(NUM_UTTERANCES)
    if kind == "read":
        return np.clip(np.where(share < 0.75, long, short), 1, 35)
    return np.clip(np.exp(np.log(4) + 0.8 * generator.standard_normal(NUM_UTTERANCES)), 0.5, 30)


def padded_seconds(batches: Iterable[list[int]], durations_seconds: np.ndarray) -> np.ndarray:
    """Number of utterances times the longest, of each batch, (batches,)."""
    return np.array([len(batch) * durations_seconds[batch].max() for batch in batches])


def padding_share(batches: list[list[int]], durations_seconds: np.ndarray) -> float:
    """1 - real / padded seconds."""
    real = sum(float(durations_seconds[batch].sum()) for batch in batches)
    return 1 - real / float(padded_seconds(batches, durations_seconds).sum())


def random_batches(durations_seconds: np.ndarray) -> list[list[int]]:
    """What bucketing is measured against: one size for all, as many as the mean duration fits."""
    size = int(MAX_BATCH_SECONDS // durations_seconds.mean())
    order = np.random.default_rng(0).permutation(len(durations_seconds))
    return [order[start : start + size].tolist() for start in range(0, len(order), size)]


def row(name: str, batches: list[list[int]], durations_seconds: np.ndarray, cpu_seconds: float) -> str:
    padded = padded_seconds(batches, durations_seconds)
    share = 100 * padding_share(batches, durations_seconds)
    above = int((padded > MAX_BATCH_SECONDS).sum())
    return f"| {name} | {len(batches)} | {share:.2f} % | {padded.max():.1f} | {above} | {cpu_seconds:.2f} |"


def main() -> None:
    for kind, target in MAX_PADDING.items():
        durations = simulated_durations(kind)
        print(f"\n{kind}, mean {durations.mean():.2f} s, target {100 * target:.1f} % with 30 buckets\n")
        print("| batches | number | padding | longest, padded s | above 200 s | CPU s |\n|---|---|---|---|---|---|")
        print(row("one size, random", random_batches(durations), durations, 0.0))
        for num_buckets in (10, 30, 50):
            started = time.process_time()
            batches = list(DurationBatchSampler(durations, MAX_BATCH_SECONDS, num_buckets=num_buckets))
            print(row(f"{num_buckets} buckets", batches, durations, time.process_time() - started))
        started = time.process_time()
        batcher: StreamBatcher[int] = StreamBatcher(bucket_edges(durations[:10_000], 30), MAX_BATCH_SECONDS)
        batches = list(batcher.batches(enumerate(durations.tolist())))
        print(row("30 buckets, stream", batches, durations, time.process_time() - started))


if __name__ == "__main__":
    main()
