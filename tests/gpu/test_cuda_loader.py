"""Batches copied ahead on a side stream; skipped with a reason where there is no GPU."""

import pytest
import torch
from torch.utils.data import Dataset

from speechkd.data.audio import AudioError, pcm16_to_float
from speechkd.data.loader import pad_waveforms, train_loader
from speechkd.data.prefetch import prefetch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NUM_CLIPS = 24


class Clips(Dataset):
    """Seeded int16 noise of 1 to 1.5 s."""

    def __len__(self):
        return NUM_CLIPS

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randint(-32768, 32767, (16_000 + 350 * index,), generator=generator).to(torch.int16)


def collate(clips):
    waveforms, num_samples = pad_waveforms(clips)
    return {"ids": [str(len(clip)) for clip in clips], "waveforms": waveforms, "more": [{"num_samples": num_samples}]}


def loader(num_workers=2):
    batches = [[index, index + 1, index + 2] for index in range(0, NUM_CLIPS, 3)]
    return train_loader(Clips(), batches, collate, num_workers=num_workers, seed=0, rank=0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_prefetched_batches_equal_those_of_the_cpu(num_workers):
    expected = list(loader(num_workers))
    assert all(batch["waveforms"].is_pinned() for batch in expected)
    num_batches = 0
    for batch, on_cpu in zip(prefetch(iter(loader(num_workers)), "cuda"), expected, strict=True):
        assert batch["waveforms"].is_cuda and batch["waveforms"].dtype == torch.int16
        assert batch["more"][0]["num_samples"].is_cuda and batch["ids"] == on_cpu["ids"]
        as_float = pcm16_to_float(batch["waveforms"])
        assert torch.equal(as_float.cpu(), pcm16_to_float(on_cpu["waveforms"]))
        assert torch.equal(batch["more"][0]["num_samples"].cpu(), on_cpu["more"][0]["num_samples"])
        num_batches += 1
    assert num_batches == NUM_CLIPS // 3


def test_a_copy_does_not_wait_for_the_step_before_it():
    pinned = [{"waveforms": torch.full((1 << 20,), number, dtype=torch.int16).pin_memory()} for number in range(3)]
    batches, free_stream = prefetch(iter(pinned), "cuda"), torch.cuda.Stream()
    with torch.cuda.stream(free_stream):  # kernels are loaded before the clock runs
        next(batches)["waveforms"].float().mean().item()
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second of the main stream
    slept = torch.cuda.Event()
    slept.record()
    with torch.cuda.stream(free_stream):
        next(batches)  # copied before the sleep; the copy of the third begins now
        mean = next(batches)["waveforms"].float().mean().item()
    assert not slept.query(), "the copy waited for the main stream"
    assert mean == 2.0


def test_memory_of_a_batch_is_not_reused_while_the_main_stream_reads_it():
    pinned = ({"waveforms": torch.full((1 << 20,), number).pin_memory()} for number in range(12))
    sums = []
    for batch in prefetch(pinned, "cuda"):
        torch.cuda._sleep(50_000_000)  # the copies run far ahead of what reads them
        sums.append(batch["waveforms"].sum())
        del batch
    assert [int(total) >> 20 for total in sums] == list(range(12))


def test_an_error_comes_at_its_own_batch():
    def batches():
        yield {"waveforms": torch.zeros(4)}
        yield {"waveforms": torch.ones(4)}
        raise AudioError("the third")

    taken = []
    with pytest.raises(AudioError, match="the third"):
        for batch in prefetch(batches(), "cuda"):
            taken.append(batch["waveforms"].sum().item())
    assert taken == [0.0, 4.0]
