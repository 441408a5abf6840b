"""The quantizer and its losses on CUDA against the CPU; skipped with a reason where there is no GPU."""

import pytest
import torch

from speechkd.losses.codebook import CodebookPredictor, codebook_loss
from speechkd.models.quantizer import Quantizer
from speechkd.models.quantizer_fit import FitConfig, fit

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("autocast", [False, True])
def test_codes_on_the_device_decode_as_well_as_those_of_the_cpu(autocast):
    torch.manual_seed(0)
    quantizer, frames = Quantizer(128, 8), torch.randn(2000, 128)
    with torch.no_grad():
        quantizer.centers.normal_()
    on_cpu = quantizer.encode(frames)
    quantizer.cuda()
    with torch.autocast("cuda", dtype=torch.float16, enabled=autocast):
        on_cuda = quantizer.encode(frames.cuda())
        decoded = quantizer.decode(on_cuda)
    assert (on_cuda.cpu() == on_cpu).all(dim=-1).float().mean() > 0.98  # ties of float32 may break either way
    assert decoded.dtype == torch.float32
    expected = quantizer.cpu().decode(on_cpu)
    errors = [(each.detach().cpu() - frames).square().sum().item() for each in (decoded, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_the_search_holds_no_more_for_many_frames_than_for_few():
    quantizer = Quantizer(256, 8).cuda()
    peaks = []
    for num_frames in (20_000, 60_000):
        frames = torch.randn(num_frames, 256, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        quantizer.encode(frames)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < peaks[0] + 40_000 * 256 * 2  # twice a byte for each value: what says which are finite


def test_a_fit_on_the_device_is_as_good_as_on_the_cpu():
    frames = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    config = FitConfig(bytes_per_frame=2, phase1_steps=50, phase2_steps=50)
    _, on_cpu = fit(frames, config)
    quantizer, on_cuda = fit(frames.cuda(), config)
    assert quantizer.centers.is_cuda
    assert on_cuda.relative_errors[5] == pytest.approx(on_cpu.relative_errors[5], abs=0.02)


@pytest.mark.parametrize("mode", ["independent", "joint"])
def test_losses_under_autocast_equal_those_of_the_cpu(mode):
    torch.manual_seed(0)
    predictor = CodebookPredictor(64, 8, mode=mode, hidden_dim=32)
    hidden, codes = torch.randn(2, 30, 64), torch.randint(256, (2, 30, 8))
    codes[1, 20:] = -100
    expected = codebook_loss(hidden, codes, predictor)
    predictor.cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = codebook_loss(hidden.cuda(), codes.cuda(), predictor)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
