"""What a user may switch on in `trainer:`; each option against the run without it."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from test_trainer import CachedItems, make_trainer, weights_of

from speechkd.blocks import transformer_blocks
from speechkd.checkpoints import last_complete_checkpoint
from speechkd.preemption import Preempted
from speechkd.progress import progress_text, throughput_logs
from speechkd.trainer import DistillationArguments

EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 9}
EVALUATION = {"eval_items": 7, "eval_strategy": "steps", "eval_steps": 1, **EVERY_STEP}


@pytest.fixture(autouse=True)
def precision_of_its_own(monkeypatch):
    """accelerate keeps the first one of a process, in its state and in the environment."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["loss/total"] for row in read_log(folder) if "loss/total" in row]


def test_gradient_checkpointing_gives_the_same_weights(tmp_path):
    plain = make_trainer(tmp_path / "plain", max_steps=3)
    plain.train()
    checkpointed = make_trainer(tmp_path / "checkpointed", max_steps=3, gradient_checkpointing=True)
    checkpointed.train()
    assert checkpointed.model.is_gradient_checkpointing and not plain.model.is_gradient_checkpointing
    for name, weight in weights_of(plain).items():
        torch.testing.assert_close(checkpointed.model.state_dict()[name], weight, rtol=0, atol=1e-6)


def test_bfloat16_autocast_covers_the_whole_loss_and_stays_near_float32(tmp_path):
    make_trainer(tmp_path / "f32").train()
    AcceleratorState._reset_state()
    seen = []
    trainer = make_trainer(tmp_path / "bf16", bf16=True)
    trainer.model.model.decoder.layers[0].fc1.register_forward_hook(lambda module, i, output: seen.append(output.dtype))
    inner = trainer.loss_terms

    def loss_terms(*arguments):
        seen.append(torch.is_autocast_enabled("cpu"))
        return inner(*arguments)

    trainer.loss_terms = loss_terms
    trainer.train()
    assert set(seen) == {True, torch.bfloat16}
    assert not torch.is_autocast_enabled("cpu")  # afterwards
    assert all(weight.dtype == torch.float32 for weight in trainer.model.parameters())
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "f32"), rel=1e-2)
    assert losses(tmp_path / "bf16") != losses(tmp_path / "f32")


def test_a_teacher_keeps_its_own_dtype(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, teacher_dtype=torch.bfloat16, bf16=True)
    trainer.train()
    assert {weight.dtype for weight in trainer.teacher.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}


def test_a_compiled_run_has_the_losses_of_a_plain_one(tmp_path):
    make_trainer(tmp_path / "plain", max_steps=2).train()
    compiled = make_trainer(tmp_path / "compiled", max_steps=2, torch_compile=True, torch_compile_backend="aot_eager")
    compiled.train()
    names = compiled.model.state_dict().keys()
    assert not any("_orig_mod" in name for name in names)
    for model in (compiled.model, compiled.teacher):
        assert all(block._compiled_call_impl is not None for block in transformer_blocks(model))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


def test_the_student_becomes_the_moving_average_which_is_also_what_is_evaluated(tmp_path):
    trainer = make_trainer(tmp_path, ema_decay=0.5, **EVALUATION)
    trainer.train()
    stored = load_file(tmp_path / "checkpoint-6/ema.safetensors")
    raw = load_file(tmp_path / "checkpoint-6/model.safetensors")
    moved = 0.0
    for name, average in stored.items():
        assert torch.equal(trainer.model.state_dict()[name], average), name
        moved = max(moved, (average - raw[name]).abs().max().item())
    assert moved > 1e-5
    averaged = [row["eval_loss"] for row in read_log(tmp_path) if "eval_loss" in row][-1]
    trainer.ema = None  # the student's own weights are the averages now
    assert trainer.evaluate()["eval_loss"] == pytest.approx(averaged, rel=1e-6)


def test_a_resumed_moving_average_is_bit_equal(tmp_path):
    options = {"ema_decay": 0.9, "save_strategy": "steps", "save_steps": 4}
    whole = make_trainer(tmp_path, **options)
    whole.train()
    resumed = make_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-4")
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_the_student_becomes_the_mean_of_the_last_checkpoints(tmp_path):
    trainer = make_trainer(tmp_path, average_last=3, save_strategy="steps", save_steps=1, save_total_limit=3)
    trainer.train()
    name = "model.decoder.layers.0.fc1.weight"
    saved = [load_file(tmp_path / f"checkpoint-{step}/model.safetensors")[name] for step in (4, 5, 6)]
    torch.testing.assert_close(trainer.model.state_dict()[name], torch.stack(saved).mean(dim=0))
    assert not torch.equal(trainer.model.state_dict()[name], saved[-1])


def test_the_evaluation_is_the_mean_loss_over_all_items_of_the_set(tmp_path):
    trainer = make_trainer(tmp_path, **EVALUATION)
    logs = trainer.evaluate()
    batch = trainer.data_collator([CachedItems()[index] for index in range(7)])
    with torch.no_grad():
        total, terms = trainer.loss_terms(trainer.model.eval(), trainer.teacher, batch)
    count = trainer.count_items(batch).item()
    assert logs["eval_loss"] == pytest.approx(total.item() / count, rel=1e-5)
    assert logs["eval_loss/kl"] == pytest.approx(terms["kl"].item() / count, rel=1e-4)


def test_the_best_weights_by_the_metric_are_the_student_and_training_stops_early(tmp_path):
    values = iter([3.0, 1.0, 2.0, 2.5, 2.6, 2.7])
    trainer = make_trainer(
        tmp_path,
        load_best_model_at_end=True,
        metric_for_best_model="wer",
        greater_is_better=False,
        early_stopping_patience=2,
        **EVALUATION,
    )
    trainer.eval_metrics = lambda model: {"wer": next(values)}
    trainer.train()
    assert trainer.state.global_step == 4  # two evaluations without a better one
    best = load_file(tmp_path / "checkpoint-2/model.safetensors")
    assert all(torch.equal(trainer.model.state_dict()[name], weight) for name, weight in best.items())


def test_evaluation_without_data_says_what_to_set(tmp_path):
    with pytest.raises(ValueError, match="set data.dev_manifest"):
        make_trainer(tmp_path).evaluate()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema_decay": 1.0}, "ema_decay must be between 0 and 1, got 1.0"),
        ({"average_last": 3}, "average_last=3 needs as many checkpoints, but save_total_limit=2"),
        ({"average_last": 2, "ema_decay": 0.9}, "choose one"),
        ({"average_last": -1}, "average_last must be 0 or more, got -1"),
        ({"early_stopping_patience": 2}, "needs load_best_model_at_end"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DistillationArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)


def test_sigterm_saves_the_step_and_the_same_command_ends_bit_equal(tmp_path):
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    stopped = make_trainer(tmp_path / "stopped")
    inner, calls = stopped.loss_terms, []

    def loss_terms(*arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(*arguments)

    stopped.loss_terms = loss_terms
    with pytest.raises(Preempted, match="step 3 is saved"):
        stopped.train()
    checkpoint = last_complete_checkpoint(tmp_path / "stopped")
    assert checkpoint.name == "checkpoint-3"
    resumed = make_trainer(tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == 6
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_the_log_has_waiting_padding_and_speed(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    inner = trainer.data_collator
    trainer.data_collator = lambda items: {**inner(items), "audio_seconds": 90.0, "padded_seconds": 120.0}
    trainer.train()
    first = read_log(tmp_path)[0]
    assert first["padding"] == pytest.approx(0.25)
    assert 0 <= first["data_wait"] < 1 and first["audio_hours_per_second"] > 0
    assert {"loss/kl", "learning_rate", "grad_norm"} <= first.keys()


def test_throughput_of_two_processes_is_that_of_both_together():
    logs = throughput_logs([20.0, 2.0, 7200.0, 9000.0], num_processes=2)  # ten seconds on each
    assert logs == pytest.approx({"data_wait": 0.1, "padding": 0.2, "audio_hours_per_second": 0.2})
    shown = progress_text({"loss/kl": 1.5, "learning_rate": 1e-3, **logs})
    assert shown == "kl 1.5, data-wait 10.0 %, padding 20.0 %, 0.2 audio-h/s"


def test_tensorboard_gets_the_loss_terms(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make_trainer(tmp_path, max_steps=2, report_to="tensorboard").train()
    events = next(tmp_path.rglob("events.out.tfevents*"))
    accumulator = EventAccumulator(str(events)).Reload()
    assert {"train/loss/kl", "train/data_wait"} <= set(accumulator.Tags()["scalars"])
