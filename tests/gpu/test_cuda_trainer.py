"""The trainer on a GPU against float32, and its resume; skipped with a reason where there is none."""

import json
import time

import pytest
import torch
from accelerate.state import AcceleratorState
from test_trainer import CachedItems, make_trainer, weights_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def precision_of_its_own(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def losses(folder) -> list[float]:
    rows = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return [row["loss/total"] for row in rows if "loss/total" in row]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_loss_curve_in_half_precision_is_near_that_of_float32(tmp_path, precision):
    make_trainer(tmp_path / "float32", use_cpu=False, max_steps=12).train()
    AcceleratorState._reset_state()
    half = make_trainer(tmp_path / precision, use_cpu=False, max_steps=12, **{precision: True})
    half.train()
    assert losses(tmp_path / precision) == pytest.approx(losses(tmp_path / "float32"), rel=1e-2)
    assert all(weight.dtype == torch.float32 for weight in half.model.parameters())


def test_a_run_resumed_on_a_gpu_ends_bit_equal(tmp_path):
    options = {"use_cpu": False, "save_strategy": "steps", "save_steps": 5, "ema_decay": 0.9}
    whole = make_trainer(tmp_path, **options)
    whole.train()
    resumed = make_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-5")
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_loading_hides_behind_the_step(tmp_path):
    class SlowItems(CachedItems):
        def __getitem__(self, index):
            time.sleep(0.001)
            return super().__getitem__(index)

    trainer = make_trainer(tmp_path, use_cpu=False, items=SlowItems(), max_steps=12, dataloader_num_workers=2)
    inner = trainer.loss_terms

    def slow_step(*arguments):
        time.sleep(0.05)
        return inner(*arguments)

    trainer.loss_terms = slow_step
    trainer.args.logging_steps = 4
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    assert rows[1]["data_wait"] < 0.1  # the first entry has the start of the workers
