"""CUDA against CPU; skipped with a reason where there is no GPU."""

import numpy as np
import pytest
import torch
from conftest import TOKENS, tiny_whisper
from train import LossConfig, loss_terms

from speechkd.data.collate import collate_labels
from speechkd.data.features import WhisperLogMel
from speechkd.losses.fused import fused_linear_distillation, fused_linear_divergence
from speechkd.models.whisper import freeze_student, greedy_decode, student_from_teacher

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_features_on_the_device_equal_those_of_the_cpu():
    waveforms = torch.from_numpy(np.random.default_rng(0).normal(0, 0.1, (2, 32_000)).astype(np.float32))
    device = WhisperLogMel().cuda()(waveforms.cuda()).cpu()
    torch.testing.assert_close(device, WhisperLogMel()(waveforms), atol=1e-3, rtol=0)


def test_greedy_labels_on_the_device_equal_those_of_the_cpu():
    model, states = tiny_whisper(decoder_layers=2), torch.randn(3, 1500, 16)
    on_cpu = greedy_decode(model, states, TOKENS, max_new_tokens=8)
    on_cuda = greedy_decode(model.cuda(), states.cuda(), TOKENS, max_new_tokens=8)
    assert [result.token_ids for result in on_cpu] == [result.token_ids for result in on_cuda]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_under_autocast_is_close_to_float32(dtype):
    teacher = tiny_whisper(decoder_layers=2).cuda()
    student = student_from_teacher(teacher, decoder_layers=1)
    freeze_student(student)
    inputs, labels = collate_labels([[*TOKENS.prefix, 400, 401, TOKENS.end_of_text]], TOKENS)
    batch = {"decoder_input_ids": inputs.cuda(), "labels": labels.cuda()}
    batch["encoder_states"] = torch.randn(1, 1500, 16, device="cuda")
    losses = []
    for enabled in (False, True):
        with torch.autocast("cuda", dtype=dtype, enabled=enabled):
            total, _ = loss_terms(
                student, teacher, batch, weights=LossConfig(), log_mel=WhisperLogMel(), shared_encoder=None
            )
        losses.append(total.item())
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def fused_inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    """Hidden states and heads of student and teacher, and labels; 300 ids, half of the tokens scored."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 40, 32), (300, 32), (4, 40, 24), (300, 24)]
    tensors = [torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes]
    labels = torch.randint(0, 300, (4, 40), generator=generator).masked_fill(torch.arange(40) % 2 == 0, -100)
    return [tensors[0].requires_grad_(), tensors[1].requires_grad_(), *tensors[2:], labels.cuda()]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_the_fused_loss_equals_that_of_the_cpu(autocast):
    inputs = fused_inputs(torch.float32)
    with torch.autocast("cuda", dtype=autocast, enabled=autocast is not None):
        total, _ = fused_linear_distillation(*inputs, temperature=2.0)
    ours = torch.autograd.grad(total, inputs[:2])
    on_cpu = [tensor.detach().cpu().requires_grad_(tensor.requires_grad) for tensor in inputs]
    expected, _ = fused_linear_distillation(*on_cpu, temperature=2.0)
    theirs = torch.autograd.grad(expected, on_cpu[:2])
    limit = 1e-3 if autocast is None else 3e-2
    assert total.item() == pytest.approx(expected.item(), rel=limit)
    for mine, right in zip(ours, theirs, strict=True):
        assert (mine.cpu() - right).norm() < limit * right.norm()


def test_the_fused_loss_holds_less_than_the_plain_one():
    hidden, head = torch.randn(2048, 256, device="cuda", requires_grad=True), torch.randn(51_865, 256, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused_linear_divergence(hidden, head, hidden.detach(), head, chunk_size=256).backward()
    assert torch.cuda.max_memory_allocated() - before < 2048 * 51_865 * 4  # one full logit tensor
