import logging
import pickle
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from accelerate.data_loader import skip_first_batches
from benchmarks.padding import simulated_durations
from torch.utils.data import DataLoader

from speechkd.data import shards
from speechkd.data.audio import AudioError
from speechkd.data.manifest import read_manifest, write_manifest
from speechkd.data.sampler import StreamBatcher, bucket_edges
from speechkd.data.shards import write_shards
from speechkd.data.stream import ShardStream, StreamSteps

NUM_UTTERANCES = 120
MAX_BATCH_SECONDS = 2.0
SETTINGS = {"max_batch_seconds": MAX_BATCH_SECONDS, "sample_rate_hz": 8_000, "num_buckets": 4, "buffer_size": 40}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[Path]:
    """Twelve shards of ten clips of 0.1 to 0.9 s."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    rows = []
    for number, num_samples in enumerate(generator.integers(800, 7_200, NUM_UTTERANCES).tolist()):
        soundfile.write(folder / f"{number}.wav", generator.normal(0, 0.1, num_samples), 8_000)
        seconds = num_samples / 8_000
        rows.append({"id": str(number), "audio": f"{number}.wav", "duration_seconds": seconds, "sample_rate_hz": 8_000})
    write_manifest(folder / "all.jsonl", rows)
    return write_shards(read_manifest(folder / "all.jsonl"), folder, prefix="s", utterances_per_shard=10)


def prepare(utterance: dict, waveform: torch.Tensor) -> dict:
    assert waveform.dtype == torch.int16
    return {**utterance, "waveform": waveform}


def names(items: list[dict]) -> list[tuple[str, int]]:
    return [(item["id"], item["epoch"]) for item in items]


def spoil(source: list[Path], folder: Path, ids: set[str]) -> list[Path]:
    """A copy of the shards in which the audio of these utterances is overwritten."""
    folder.mkdir()
    for path in source:
        content = bytearray(path.read_bytes())
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".wav") and str(int(member.name[:9])) in ids:
                    content[member.offset_data : member.offset_data + member.size] = b"#" * member.size
        (folder / path.name).write_bytes(content)
    return [folder / path.name for path in source]


def read_names(monkeypatch) -> list[str]:
    """A list that grows by the id of each utterance whose audio is read from now on."""
    found: list[str] = []
    read_at = shards._read_at

    def record(path, file, name, offset, num_bytes):
        if name.endswith(".wav"):
            found.append(str(int(name[:9])))
        return read_at(path, file, name, offset, num_bytes)

    monkeypatch.setattr(shards, "_read_at", record)
    return found


def test_batches_hold_the_samples_of_their_utterances_within_the_cap(corpus):
    stream = ShardStream(corpus, prepare, num_streams=1, **SETTINGS)
    real_seconds = padded_seconds = 0.0
    for number in range(60):
        items = stream[number]
        seconds = [item["duration_seconds"] for item in items]
        assert len(items) * max(seconds) <= MAX_BATCH_SECONDS
        real_seconds, padded_seconds = real_seconds + sum(seconds), padded_seconds + len(items) * max(seconds)
        for item in items:
            original = corpus[0].parent / f"{item['id']}.wav"
            assert item["waveform"].tolist() == soundfile.read(original, dtype="int16")[0].tolist()
            assert item["audio"].startswith(f"{corpus[0].parent}/s-0000") and item["text"] is None
    assert padded_seconds / 60 > 0.75 * MAX_BATCH_SECONDS  # batches are full, though 60 of them are several passes
    assert real_seconds / padded_seconds > 0.8


@pytest.mark.parametrize(("num_streams", "num_workers"), [(2, 1), (2, 2), (1, 2)])
def test_any_number_of_workers_gives_the_same_batches(corpus, num_streams, num_workers):
    stream = ShardStream(corpus, prepare, num_streams=num_streams, **SETTINGS)
    expected = [names(stream[number]) for number in range(12)]
    assert len({name for batch in expected for name in batch}) > 30
    # the workers are forked from a process that has read already
    loader = DataLoader(stream, batch_sampler=StreamSteps(12), collate_fn=names, num_workers=num_workers)
    assert list(loader) == expected
    assert list(DataLoader(stream, batch_sampler=StreamSteps(12), collate_fn=names)) == expected


def test_a_worker_reads_one_shard_at_a_time(corpus, monkeypatch):
    opened: list[Path] = []
    read_shard = shards.read_shard
    stream = ShardStream(corpus, prepare, num_streams=2, **SETTINGS)
    monkeypatch.setattr(
        "speechkd.data.stream.read_shard", lambda path, report: opened.append(path) or read_shard(path, report)
    )
    for number in range(1, 81, 2):  # what the second of two workers is given
        stream[number]
    passes = [path for epoch in range(len(opened) // 6 + 1) for path in stream.dealt_shards(1, epoch)]
    assert len(opened) >= 12 and opened == passes[: len(opened)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_gives_the_rest_without_the_audio_of_what_is_done(corpus, tmp_path, caplog, num_workers):
    def loader(paths: list[Path]) -> DataLoader:
        stream = ShardStream(paths, prepare, num_streams=2, max_skipped_fraction=0.0, **SETTINGS)
        return DataLoader(stream, batch_sampler=StreamSteps(14), collate_fn=list, num_workers=num_workers)

    whole = list(loader(corpus))
    for num_done in (5, 8):  # the streams stand at different batches, and at the same
        done = {item["id"] for batch in whole[:num_done] for item in batch}
        done -= {item["id"] for batch in whole[num_done:] for item in batch}
        assert len(done) > 3
        spoilt = spoil(corpus, tmp_path / f"spoilt-{num_done}", done)
        rest = list(skip_first_batches(loader(spoilt), num_done))
        assert [names(batch) for batch in rest] == [names(batch) for batch in whole[num_done:]]
        for batch, expected in zip(rest, whole[num_done:], strict=True):
            for item, other in zip(batch, expected, strict=True):
                torch.testing.assert_close(item["waveform"], other["waveform"], rtol=0, atol=0)
    assert "left out" not in caplog.text


def test_a_fast_forward_reads_no_audio(corpus, monkeypatch):
    stream = ShardStream(corpus, prepare, num_streams=1, **SETTINGS)
    expected = names(stream[50])
    resumed = ShardStream(corpus, prepare, num_streams=1, **SETTINGS)
    read = read_names(monkeypatch)
    assert names(resumed[50]) == expected
    # what the batch before had made room for, and the batch itself
    assert len(read) <= 2 * MAX_BATCH_SECONDS / 0.1
    assert {key for key, _ in expected} <= set(read)


def test_a_number_that_lies_behind_is_made_again(corpus):
    stream = ShardStream(corpus, prepare, num_streams=1, **SETTINGS)
    seventh = names(stream[7])
    assert names(stream[3]) != seventh and names(stream[7]) == seventh
    assert names(pickle.loads(pickle.dumps(stream))[7]) == seventh
    assert names(ShardStream(corpus[::-1], prepare, num_streams=1, **SETTINGS)[7]) == seventh
    assert names(ShardStream(corpus, prepare, num_streams=1, seed=1, **SETTINGS)[7]) != seventh


def test_each_pass_deals_every_shard_once_over_ranks_and_streams(corpus):
    streams = [ShardStream(corpus, prepare, num_streams=2, rank=rank, world_size=3, **SETTINGS) for rank in range(3)]
    orders = []
    for epoch in range(3):
        dealt = [path for stream in streams for number in range(2) for path in stream.dealt_shards(number, epoch)]
        assert sorted(dealt) == corpus
        orders.append(dealt)
    assert orders[0] != orders[1] != orders[2]


def test_ranks_and_streams_train_on_every_utterance_once_a_pass(corpus):
    drawn: Counter[tuple[str, int]] = Counter()
    held: Counter[tuple[str, int]] = Counter()
    for rank in range(2):
        stream = ShardStream(corpus, prepare, num_streams=2, rank=rank, world_size=2, **SETTINGS)
        for number in range(60):
            drawn.update(names(stream[number]))
        for virtual in stream._streams.values():
            held.update(names([utterance for bucket in virtual.batcher.held for utterance, _ in bucket]))
    assert max(drawn.values()) == 1  # so the ranks are disjoint within a pass
    assert max((drawn + held).values()) == 1
    whole_passes = min(max(epoch for _, epoch in drawn), 3)
    assert whole_passes == 3
    for epoch in range(whole_passes):
        assert {key for key, number in drawn + held if number == epoch} == {str(n) for n in range(NUM_UTTERANCES)}


def test_ranks_prefer_the_same_bucket_in_the_same_step(corpus):
    streams = [ShardStream(corpus, prepare, num_streams=1, rank=rank, world_size=2, **SETTINGS) for rank in range(2)]
    np.testing.assert_array_equal(streams[0].edges_seconds, streams[1].edges_seconds)
    same = 0
    for number in range(80):
        first, second = (
            np.searchsorted(stream.edges_seconds, max(item["duration_seconds"] for item in stream[number]))
            for stream in streams
        )
        same += first == second
    assert same > 60  # 20 by chance


@pytest.mark.parametrize(("kind", "limit"), [("read", 0.035), ("conversational", 0.06)])
def test_full_batches_of_wanted_buckets_pad_little(kind, limit):
    """Figures of `ShardStream`'s defaults on the padding benchmark's durations, half of them for each of two ranks."""
    durations = simulated_durations(kind)
    edges = bucket_edges(durations[:10_000], 30)
    buckets = []
    for rank in range(2):
        batcher = StreamBatcher(edges, 200.0, buffer_size=2_000)
        batcher.set_epoch(rank)
        wanted = (int(np.random.default_rng((0, number)).integers(len(edges))) for number in range(10**6))
        batches = batcher.batches(zip(durations[rank::2], durations[rank::2].tolist(), strict=True), wanted)
        full = [batch for batch in batches if batcher.num_read < len(durations) // 2]  # the end is never reached
        lengths = np.array([len(batch) for batch in full])
        longest = np.array([max(batch) for batch in full])
        padded = lengths * longest
        assert padded.max() <= 200.0
        assert 1 - sum(map(sum, full)) / padded.sum() <= limit
        buckets.append(np.searchsorted(edges, longest))
    num_steps = min(map(len, buckets))
    assert np.mean(buckets[0][:num_steps] == buckets[1][:num_steps]) > 0.4


def test_a_clip_that_cannot_be_decoded_is_left_out_and_named_once(corpus, tmp_path, caplog):
    spoilt = spoil(corpus, tmp_path / "spoilt", {"17", "99"})
    stream = ShardStream(spoilt, prepare, num_streams=1, max_skipped_fraction=0.05, **SETTINGS)
    whole = ShardStream(corpus, prepare, num_streams=1, **SETTINGS)
    with caplog.at_level(logging.WARNING):
        for number in range(60):
            expected = [name for name in names(whole[number]) if name[0] not in ("17", "99")]
            assert names(stream[number]) == expected
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2 and all("cannot be decoded" in message for message in messages)
    assert sorted(re.findall(r"s-0000\d\d\.tar#0000000\d\d\.wav: left out, utterance '(\d+)'", "".join(messages))) == [
        "17",
        "99",
    ]


def test_too_many_clips_that_cannot_be_decoded_end_the_run(corpus, tmp_path):
    spoilt = spoil(corpus, tmp_path / "spoilt", {str(number) for number in range(0, NUM_UTTERANCES, 8)})
    stream = ShardStream(spoilt, prepare, num_streams=1, max_skipped_fraction=0.05, **SETTINGS)
    message = r"(\d+) of (\d+) utterances were left out; at most 5.0 % may be .* Last: .*s-0000\d\d.tar#"
    with pytest.raises(AudioError, match=message) as error:
        for number in range(200):
            stream[number]
    num_left_out, num_read = map(int, re.search(message, str(error.value)).groups())
    assert 100 <= num_read < 200 and num_left_out > 0.05 * num_read


def test_a_batch_of_which_nothing_is_left_gets_another_utterance(corpus):
    single = {**SETTINGS, "max_batch_size": 1}
    whole = ShardStream(corpus, prepare, num_streams=1, **single)
    dropped = names(whole[20])[0][0]

    def without(utterance: dict, waveform: torch.Tensor) -> dict | None:
        return None if utterance["id"] == dropped else utterance

    stream = ShardStream(corpus, without, num_streams=1, **single)
    twenty = names(stream[20])
    assert len(twenty) == 1 and twenty[0][0] != dropped
    assert names(stream[21]) == names(whole[21])  # it changes nothing that follows
    assert names(ShardStream(corpus, without, num_streams=1, **single)[20]) == twenty
    with pytest.raises(AudioError, match=r"no utterance of batch 3 can be used, nor any of the \d+ that are held"):
        ShardStream(corpus, lambda utterance, waveform: None, num_streams=1, **SETTINGS)[3]


def test_clips_longer_than_a_batch_are_left_out(corpus, caplog):
    short = {**SETTINGS, "max_batch_seconds": 0.6}
    stream = ShardStream(corpus, prepare, num_streams=1, max_skipped_fraction=1.0, **short)
    assert all(item["duration_seconds"] <= 0.6 for number in range(60) for item in stream[number])
    assert re.search(r"#0000000\d\d\.wav: left out, 0\.\d s are longer than a batch may be", caplog.text)
    with pytest.raises(AudioError, match="utterances were left out; at most 1.0 % may be"):
        ShardStream(corpus, prepare, num_streams=1, **{**short, "buffer_size": 200})[0]
    with pytest.raises(ValueError, match="hold no utterance of at most max_batch_seconds=0.0"):
        ShardStream(corpus, prepare, num_streams=1, **{**SETTINGS, "max_batch_seconds": 0.01})


def test_bad_arguments_and_shards_are_refused_before_training(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"12 shards cannot be dealt out over 4 processes x 4 streams; lower .* 16 sh"):
        ShardStream(corpus, prepare, num_streams=4, world_size=4, **SETTINGS)
    with pytest.raises(ValueError, match="no.tar' cannot be opened"):
        ShardStream([*corpus, tmp_path / "no.tar"], prepare, num_streams=1, **SETTINGS)
    (tmp_path / "cut.tar").write_bytes(corpus[0].read_bytes()[:-12_000])
    with pytest.raises(ValueError, match="cut.tar: does not end as a tar does"):
        ShardStream([*corpus, tmp_path / "cut.tar"], prepare, num_streams=1, **SETTINGS)
    with pytest.raises(ValueError, match="buffer_size=2 is below 4 buckets"):
        ShardStream(corpus, prepare, num_streams=1, **{**SETTINGS, "buffer_size": 2})
    with pytest.raises(ValueError, match="num_streams must be 1 or more, got 0"):
        ShardStream(corpus, prepare, num_streams=0, **SETTINGS)
    with pytest.raises(ValueError, match="max_skipped_fraction must be 0 to 1, got 2"):
        ShardStream(corpus, prepare, num_streams=1, max_skipped_fraction=2, **SETTINGS)
    with pytest.raises(ValueError, match="num_steps must be 1 or more, got 0"):
        StreamSteps(0)


def test_steps_are_the_batch_numbers_in_every_epoch():
    steps = StreamSteps(3)
    steps.set_epoch(4)
    assert len(steps) == 3 and list(steps) == [[0], [1], [2]] == list(steps)
