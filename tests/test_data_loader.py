import json
import os
import random
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch
from accelerate.data_loader import skip_first_batches
from conftest import write_tone
from torch.utils.data import Dataset

from speechkd.data import audit
from speechkd.data.audio import AudioError, load_utterance
from speechkd.data.audit import usable_clips
from speechkd.data.loader import (
    GRID_SAMPLES,
    clip_batches,
    explain_dead_workers,
    pad_waveforms,
    train_loader,
)
from speechkd.data.manifest import read_manifest, write_manifest
from speechkd.data.prefetch import _one_ahead, prefetch
from speechkd.data.sampler import DurationBatchSampler

NUM_ITEMS = 12
IN_ORDER = [[index, index + 1] for index in range(0, NUM_ITEMS, 2)]


class Clips(Dataset):
    """Waveforms of a manifest, int16."""

    def __init__(self, manifest):
        self.manifest = manifest

    def __len__(self):
        return len(self.manifest)

    def __getitem__(self, index):
        return load_utterance(self.manifest[index], 16_000, torch.int16)


class Draws(Dataset):
    """What the three random generators of a worker give, its process id and number of threads."""

    def __len__(self):
        return NUM_ITEMS

    def __getitem__(self, index):
        return random.random(), np.random.random(), torch.rand(()).item(), os.getpid(), torch.get_num_threads()


class Raises(Dataset):
    """Items are their index; number 3 raises."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return NUM_ITEMS

    def __getitem__(self, index):
        if index == 3:
            raise self.error
        return index


class TwoPartError(ValueError):
    """One that pickles but cannot be made again."""

    def __init__(self, clip, reason):
        super().__init__(f"{clip}: {reason}")


class Kills(Dataset):
    """Item 5 ends its process as the kernel does when memory is out."""

    def __len__(self):
        return NUM_ITEMS

    def __getitem__(self, index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def two_by_two(epoch=0):
    """Sampler of six batches of two."""
    sampler = DurationBatchSampler(np.ones(NUM_ITEMS), 2.0)
    sampler.set_epoch(epoch)
    return sampler


def loader_of(dataset, sampler=None, collate=list, *, num_workers=2, seed=0, rank=0):
    return train_loader(dataset, sampler or two_by_two(), collate, num_workers=num_workers, seed=seed, rank=rank)


def test_padding_rounds_up_to_the_grid_and_keeps_int16():
    clips = [torch.full((n,), n, dtype=torch.int16) for n in (3, 10, 7)]
    batch, num_samples = pad_waveforms(clips, grid_samples=8)
    assert batch.shape == (3, 16) and batch.dtype == torch.int16
    assert num_samples.tolist() == [3, 10, 7] and num_samples.dtype == torch.int64
    for row, clip in zip(batch, clips, strict=True):
        assert torch.equal(row[: len(clip)], clip) and not row[len(clip) :].any()
    assert pad_waveforms([torch.ones(8)], grid_samples=8)[0].shape == (1, 8)
    assert pad_waveforms([torch.ones(9)])[0].shape == (1, GRID_SAMPLES)


def test_rounding_never_passes_the_models_window():
    assert pad_waveforms([torch.ones(19)], grid_samples=8, max_samples=20)[0].shape == (1, 20)
    assert pad_waveforms([torch.ones(480_000)], max_samples=480_000)[0].shape == (1, 480_000)
    with pytest.raises(ValueError, match="clip 1 of the batch has 21 samples, more than max_samples=20"):
        pad_waveforms([torch.ones(3), torch.ones(21)], max_samples=20)


def test_what_cannot_be_padded_is_refused():
    with pytest.raises(ValueError, match=r"one dtype, got \['torch.float32', 'torch.int16'\]"):
        pad_waveforms([torch.ones(3), torch.ones(3, dtype=torch.int16)])
    with pytest.raises(ValueError, match="got no clip"):
        pad_waveforms([])
    with pytest.raises(ValueError, match="grid_samples must be 1 or more, got 0"):
        pad_waveforms([torch.ones(3)], grid_samples=0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_come_in_the_samplers_order_as_int16(tone_manifest, num_workers):
    manifest = read_manifest(tone_manifest)
    sampler = DurationBatchSampler(manifest.durations_seconds, 4.0)
    loader = loader_of(Clips(manifest), sampler, pad_waveforms, num_workers=num_workers)
    assert len(loader) == len(sampler)
    for (waveforms, num_samples), indices in zip(loader, list(sampler), strict=True):
        assert waveforms.dtype == torch.int16 and waveforms.shape[1] % GRID_SAMPLES == 0
        assert num_samples.tolist() == [round(16_000 * manifest[index]["duration_seconds"]) for index in indices]


def test_worker_seeds_differ_by_worker_epoch_seed_and_rank_and_repeat():
    def draws(epoch=0, **settings):
        return [item for batch in loader_of(Draws(), two_by_two(epoch), **settings) for item in batch]

    first = draws()
    assert len({item[3] for item in first}) == 2 and {item[4] for item in first} == {1}
    values = [item[:3] for item in first]
    assert [item[:3] for item in draws()] == values
    everything = values + [
        item[:3] for changed in ({"epoch": 1}, {"seed": 1}, {"rank": 1}) for item in draws(**changed)
    ]
    for column in zip(*everything, strict=True):
        assert len(set(column)) == 4 * NUM_ITEMS


@pytest.mark.parametrize("num_workers", [0, 2])
def test_iterating_draws_nothing_from_the_global_random_state(tone_manifest, tmp_path, num_workers):
    manifest = read_manifest(tone_manifest)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    loader = loader_of(Clips(manifest), DurationBatchSampler(manifest.durations_seconds, 4.0), num_workers=num_workers)
    assert list(loader) and list(skip_first_batches(loader, 1))
    assert list(clip_batches(manifest, range(6), sample_rate_hz=16_000, batch_size=3, num_workers=num_workers))
    usable_clips(manifest, tmp_path, max_seconds=30.0, max_skipped_fraction=0.0, num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_skipped", [0, 1])
def test_a_corrupt_clip_is_raised_as_it_was_naming_the_utterance(tone_manifest, num_workers, num_skipped):
    (tone_manifest.parent / "audio/3.wav").write_text("not audio")
    manifest = read_manifest(tone_manifest)
    loader = loader_of(Clips(manifest), IN_ORDER[:3], num_workers=num_workers)
    with pytest.raises(AudioError, match="^utterance 'tone-3': .*3.wav: cannot be decoded") as caught:
        list(skip_first_batches(loader, num_skipped) if num_skipped else loader)
    cause = str(caught.value.__cause__)
    del caught  # it holds the loader, whose workers wait for it
    assert num_workers == 0 or "in load_utterance" in cause  # the worker's own traceback


def test_an_error_of_collate_and_one_that_cannot_be_sent_surface_too():
    def refuse(items):
        raise KeyError("no such token")

    with pytest.raises(KeyError, match="^'no such token'$"):
        list(loader_of(Draws(), collate=refuse))
    with pytest.raises(RuntimeError, match="^TwoPartError: clip-3: broken$"):
        list(loader_of(Raises(TwoPartError("clip-3", "broken"))))


@pytest.mark.parametrize("num_skipped", [0, 1])
def test_a_killed_worker_ends_the_run_within_seconds_and_says_what_to_do(num_skipped):
    loader = loader_of(Kills(), IN_ORDER)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)ended from outside \(DataLoader worker.*lower data.num_workers"):
        with explain_dead_workers():
            for _ in skip_first_batches(loader, num_skipped) if num_skipped else loader:
                pass
    assert time.monotonic() - started < 60  # and not the 5 minutes after which PyTorch gives up


def test_other_errors_are_not_explained_as_dead_workers():
    with pytest.raises(RuntimeError, match="^out of range$"), explain_dead_workers():
        raise RuntimeError("out of range")


def test_a_loader_that_skips_batches_gives_the_rest_with_the_same_seeding():
    whole = list(loader_of(Draws(), num_workers=1))
    loader = loader_of(Draws(), num_workers=1)
    rest = list(skip_first_batches(loader, 2))
    assert len(rest) == len(whole) - 2
    assert [item[:3] for item in rest[0]] == [item[:3] for item in whole[0]]  # a fresh worker, seeded as the first was
    assert list(skip_first_batches(loader_of(range(NUM_ITEMS)), 3)) == list(two_by_two())[3:]


def test_prefetching_on_a_cpu_returns_the_iterator_itself():
    batches = iter([{"a": torch.ones(1)}])
    assert prefetch(batches, "cpu") is batches


def test_an_error_waits_until_the_batches_before_it_are_handed_out():
    def items():
        yield from (1, 2, 3)
        raise AudioError("the fourth")

    taken = []
    with pytest.raises(AudioError, match="the fourth"):
        for item in _one_ahead(items()):
            taken.append(item)
    assert taken == [1, 2, 3]


def test_one_item_ahead_is_taken_and_no_more():
    source = iter(range(5))
    ahead = _one_ahead(source)
    assert next(ahead) == 0 and next(source) == 2


@pytest.fixture
def spoilt_manifest(tmp_path):
    """Ten clips, of which 2 is text and 7 is too long for 1.5 s."""
    rows = []
    for index in range(10):
        seconds = 2.0 if index == 7 else 1.0
        write_tone(tmp_path / f"{index}.wav", seconds)
        rows.append({"id": f"c{index}", "audio": f"{index}.wav", "duration_seconds": seconds, "sample_rate_hz": 16_000})
    (tmp_path / "2.wav").write_text("not audio")
    write_manifest(tmp_path / "clips.jsonl", rows)
    return tmp_path / "clips.jsonl"


@pytest.fixture
def check(tmp_path, monkeypatch):
    """`usable_clips` of two clips a task into one folder; `check.decoded` collects the ids that it decodes."""
    decoded = []

    def spied(utterance, *arguments):
        decoded.append(utterance["id"])
        return load_utterance(utterance, *arguments)

    monkeypatch.setattr(audit, "load_utterance", spied)
    monkeypatch.setattr(audit, "CLIPS_PER_TASK", 2)
    call = partial(usable_clips, output_dir=tmp_path / "out", max_seconds=1.5, max_skipped_fraction=0.2, num_workers=0)
    call.decoded = decoded
    return call


def test_bad_clips_are_named_once_and_the_others_returned(spoilt_manifest, tmp_path):
    manifest = read_manifest(spoilt_manifest)
    usable = usable_clips(manifest, tmp_path / "out", max_seconds=1.5, max_skipped_fraction=0.2, num_workers=2)
    assert usable == [0, 1, 3, 4, 5, 6, 8, 9]
    skipped = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert [row["id"] for row in skipped] == ["c2", "c7"] and set(skipped[0]) == {"id", "audio", "reason"}
    assert "cannot be decoded" in skipped[0]["reason"] and "lasts 2.0 s, longer than" in skipped[1]["reason"]


def test_a_resumed_run_decodes_nothing_again(spoilt_manifest, check, tmp_path):
    first = check(read_manifest(spoilt_manifest))
    assert len(check.decoded) == 9  # the one that is too long is not read at all
    named = (tmp_path / "out/skipped.jsonl").read_text()
    check.decoded.clear()
    assert check(read_manifest(spoilt_manifest)) == first and check.decoded == []
    assert (tmp_path / "out/skipped.jsonl").read_text() == named


def test_a_changed_manifest_or_limit_is_decoded_again(spoilt_manifest, check):
    check(read_manifest(spoilt_manifest))
    check.decoded.clear()
    assert check(read_manifest(spoilt_manifest), max_seconds=2.5) == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    assert len(check.decoded) == 10
    check.decoded.clear()
    assert check(read_manifest(spoilt_manifest).select(range(5))) == [0, 1, 3, 4] and len(check.decoded) == 5
    rows = [json.loads(line) for line in spoilt_manifest.read_text().splitlines()]
    rows[0]["audio"] = "1.wav"
    write_manifest(spoilt_manifest, rows)
    check.decoded.clear()
    check(read_manifest(spoilt_manifest))
    assert len(check.decoded) == 9


def test_a_killed_check_goes_on_where_it_stood(spoilt_manifest, check, monkeypatch):
    manifest = read_manifest(spoilt_manifest)
    monkeypatch.setattr(audit, "SAVE_EVERY_SECONDS", 0.0)
    spied = audit.load_utterance

    def killed_at_c5(utterance, *arguments):
        if utterance["id"] == "c5":
            raise KeyboardInterrupt
        return spied(utterance, *arguments)

    monkeypatch.setattr(audit, "load_utterance", killed_at_c5)
    with pytest.raises(KeyboardInterrupt):
        check(manifest)
    assert check.decoded == ["c0", "c1", "c2", "c3", "c4"]
    check.decoded.clear()
    monkeypatch.setattr(audit, "load_utterance", spied)
    assert check(manifest) == [0, 1, 3, 4, 5, 6, 8, 9]
    assert check.decoded == ["c4", "c5", "c6", "c8", "c9"]


def test_too_many_bad_clips_stop_before_training_and_say_how_to_check_again(spoilt_manifest, check, tmp_path):
    with pytest.raises(AudioError, match=r"2 of 10 clips \(20.0 %\).*at most 10.0 %.*delete .*audio_check.json"):
        check(read_manifest(spoilt_manifest), max_skipped_fraction=0.1)
    assert (tmp_path / "out/skipped.jsonl").read_text().count("\n") == 2
    check.decoded.clear()
    assert (
        len(check(read_manifest(spoilt_manifest))) == 8 and check.decoded == []
    )  # a higher limit asks for no decoding
