"""CUDA against CPU; skipped with a reason where there is no GPU."""

import numpy as np
import pytest
import torch
from conftest import TOKENS, tiny_whisper
from train import LossConfig, loss_terms

from speechkd.data.collate import collate_labels
from speechkd.data.features import WhisperLogMel
from speechkd.models.whisper import freeze_student, greedy_decode, student_from_teacher

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_features_on_the_device_equal_those_of_the_cpu():
    waveforms = torch.from_numpy(np.random.default_rng(0).normal(0, 0.1, (2, 32_000)).astype(np.float32))
    device = WhisperLogMel().cuda()(waveforms.cuda()).cpu()
    torch.testing.assert_close(device, WhisperLogMel()(waveforms), atol=1e-3, rtol=0)


def test_greedy_labels_on_the_device_equal_those_of_the_cpu():
    model, states = tiny_whisper(decoder_layers=2), torch.randn(3, 1500, 16)
    on_cpu = greedy_decode(model, states, TOKENS, language=None, max_new_tokens=8)
    on_cuda = greedy_decode(model.cuda(), states.cuda(), TOKENS, language=None, max_new_tokens=8)
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
