import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TOKENS, tiny_whisper
from safetensors.torch import load_file
from torch.utils.data import Dataset
from train import LossConfig, count_items, loss_terms

from speechkd.data.features import WhisperLogMel
from speechkd.data.sampler import DurationBatchSampler
from speechkd.data.whisper import collate_whisper
from speechkd.models.whisper import freeze_student, student_from_teacher
from speechkd.trainer import DistillationArguments, DistillationTrainer

NUM_ITEMS = 16


class CachedItems(Dataset):
    """Random encoder states with labels of different lengths."""

    def __init__(self, poison: int | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        self.states = torch.randn(NUM_ITEMS, 1500, 16, generator=generator)
        if poison is not None:
            self.states[poison, 0, 0] = torch.nan

    def __len__(self) -> int:
        return NUM_ITEMS

    def __getitem__(self, index: int) -> dict:
        text = [500 + index] * (1 + index % 5)
        return {
            "id": f"clip-{index}",
            "duration_seconds": 10.0,
            "token_ids": [*TOKENS.prefix, *text, TOKENS.end_of_text],
            "encoder_states": self.states[index],
        }


def make_trainer(
    output_dir: Path,
    *,
    batch: int = 4,
    items: Dataset | None = None,
    kl: float = 1.0,
    rank: int = 0,
    world_size: int = 1,
    teacher_dtype: torch.dtype = torch.float32,
    eval_items: int = 0,
    **arguments,
):
    teacher = tiny_whisper(decoder_layers=2)
    student = student_from_teacher(teacher, decoder_layers=1)
    with torch.no_grad():
        student.model.decoder.embed_tokens.weight[:1000] += 0.02  # a difference for the KL term to see
    freeze_student(student)
    teacher.to(teacher_dtype)
    settings = {"max_steps": 6, "learning_rate": 1e-3, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    settings["report_to"] = "none"
    return DistillationTrainer(
        student,
        teacher if kl else None,
        args=DistillationArguments(output_dir=str(output_dir), **({"use_cpu": True} | settings | arguments)),
        train_dataset=items or CachedItems(),
        collate=partial(collate_whisper, tokens=TOKENS),
        sampler=DurationBatchSampler(np.full(NUM_ITEMS, 30.0), 30.0 * batch, seed=3, rank=rank, world_size=world_size),
        loss_terms=partial(loss_terms, weights=LossConfig(kl=kl), log_mel=WhisperLogMel(), shared_encoder=None),
        count_items=count_items,
        eval_dataset=CachedItems() if eval_items else None,
        eval_sampler=DurationBatchSampler(np.full(eval_items, 30.0), 90.0) if eval_items else None,
    )


def weights_of(trainer: DistillationTrainer) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in trainer.model.state_dict().items()}


def test_accumulated_small_batches_train_like_one_large_batch(tmp_path):
    # plain gradient descent: Adam would turn rounding differences of tiny gradients into full steps
    settings = {"optim": "sgd", "max_steps": 2, "max_grad_norm": 0.0, "learning_rate": 1.0}
    large = make_trainer(tmp_path / "large", batch=8, **settings)
    small = make_trainer(tmp_path / "small", batch=4, gradient_accumulation_steps=2, **settings)
    # the same items in the same order, cut into halves
    order = list(large.sampler)
    small.sampler.__class__ = _Fixed
    small.sampler.batches = [half for batch in order for half in (batch[:4], batch[4:])]
    large.sampler.__class__ = _Fixed
    large.sampler.batches = order
    start = weights_of(large)
    large.train()
    small.train()
    moved = 0.0
    for name, weight in weights_of(large).items():
        torch.testing.assert_close(weight, small.model.state_dict()[name], rtol=1e-4, atol=1e-6)
        moved = max(moved, (weight - start[name]).abs().max().item())
    assert moved > 1e-3


class _Fixed(DurationBatchSampler):
    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def test_a_run_resumed_inside_a_later_epoch_ends_bit_equal(tmp_path):
    whole = make_trainer(tmp_path / "whole", save_strategy="steps", save_steps=5)  # 4 steps an epoch
    whole.train()
    resumed = make_trainer(tmp_path / "whole", save_strategy="steps", save_steps=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-5"))
    assert resumed.state.global_step == 6
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_the_teacher_is_in_no_checkpoint_and_in_no_optimizer(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    before = {name: weight.clone() for name, weight in trainer.teacher.state_dict().items()}
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-2/model.safetensors")
    assert not any("decoder.layers.1." in name or "teacher" in name for name in saved)
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in trainer.teacher.parameters()}
    assert all(torch.equal(before[name], weight) for name, weight in trainer.teacher.state_dict().items())
    assert all(p.grad is None for p in trainer.teacher.parameters())


def test_groups_of_a_method_have_their_own_learning_rates_under_one_schedule(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, lr_scheduler_type="linear", optim="sgd", max_grad_norm=0.0)

    def groups(student):
        first, *others = [weight for weight in student.parameters() if weight.requires_grad]
        return [{"params": [first], "lr": 0.0}, {"params": others, "lr": 0.5, "maximize": True}]

    trainer.parameter_groups = groups
    before, rates = weights_of(trainer), []
    trainer.optimizer = trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[1]["lr"]))
    trainer.train()
    assert rates == pytest.approx([0.5, 0.375, 0.25, 0.125])
    losses = [row["loss/total"] for row in trainer.state.log_history if "loss/total" in row]
    assert losses[-1] > losses[0]  # it climbed
    first = next(name for name, weight in trainer.model.named_parameters() if weight.requires_grad)
    after = weights_of(trainer)
    assert after[first].equal(before[first]) and any(not after[name].equal(before[name]) for name in before)


def test_a_frozen_encoder_is_unchanged_after_training(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    before = {name: weight.clone() for name, weight in trainer.model.model.encoder.state_dict().items()}
    trainer.train()
    assert all(torch.equal(before[name], w) for name, w in trainer.model.model.encoder.state_dict().items())


def test_a_loss_that_is_not_finite_stops_the_run_with_the_utterance_ids(tmp_path):
    trainer = make_trainer(tmp_path, items=CachedItems(poison=7))
    with pytest.raises(
        FloatingPointError, match=r"the loss is nan at step \d+ .*clip-7\b.*lower trainer.learning_rate"
    ):
        trainer.train()


def test_every_term_is_logged_and_the_total_is_their_weighted_sum(tmp_path):
    make_trainer(tmp_path, max_steps=2).train()
    log = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    first = log[0]
    assert first["loss/kl"] > 0
    assert first["loss/total"] == pytest.approx(0.8 * first["loss/cross_entropy"] + first["loss/kl"], rel=1e-5)
    assert first["loss"] == pytest.approx(first["loss/total"], rel=1e-3)


def test_training_without_a_teacher_has_cross_entropy_alone(tmp_path):
    make_trainer(tmp_path, kl=0.0, max_steps=2).train()
    first = json.loads((tmp_path / "train_log.jsonl").read_text().splitlines()[0])
    assert "loss/kl" not in first and math.isfinite(first["loss/cross_entropy"])


def test_the_sampler_is_reshuffled_at_each_epoch(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=8)
    seen = []
    trainer.loss_terms = _recording(trainer.loss_terms, seen)
    trainer.train()
    assert sorted(sum(seen[:4], [])) == sorted(sum(seen[4:], [])) and seen[:4] != seen[4:]


def _recording(terms, seen):
    def record(model, teacher, batch):
        seen.append(batch["ids"])
        return terms(model, teacher, batch)

    return record
