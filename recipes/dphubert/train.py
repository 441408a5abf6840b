"""DPHuBERT: a speech encoder is pruned while it is distilled, and what is left is distilled once more.

Peng et al. 2023, https://arxiv.org/abs/2305.17651. Launch, under torchrun or accelerate too:
python recipes/dphubert/train.py --config FILE [--section.key value ...], and again with --step distil.
A killed run carries on from its last checkpoint.
"""

import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pruned_students import (
    FinalStudent,
    check_layers,
    gated_student,
    load_step_one,
    model_card,
    save_student,
    widths,
)
from pruning_objective import LossConfig, SparsityTarget, count_items, loss_terms
from transformers import PreTrainedModel, set_seed

from speechkd.cli import run_command
from speechkd.config import parse_config
from speechkd.data.encoder_clips import DataConfig, TrainingClips, collate_clips, training_clips
from speechkd.data.mini_superb import ProbeConfig
from speechkd.files import write_json
from speechkd.models.encoder_inputs import EncoderInputs
from speechkd.models.pruning import PUBLISHED_GATES, GatedEncoder, GateKind, parameter_groups
from speechkd.models.speech_encoders import load_encoder
from speechkd.run_folder import training_facts, training_run
from speechkd.teachers import freeze, teacher_identity
from speechkd.trainer import DistillationArguments, DistillationTrainer

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TeacherConfig:
    """The encoder that is copied, pruned and learnt.

    Args:
        name: HuBERT, wav2vec 2.0, WavLM, data2vec-audio or Whisper, whose encoder is taken: Hub id, folder or
            `bundled:<name>`.
        window_seconds: of a Whisper, the longest clip that it is to hear instead of 30 s; null for 30 s and others.
        grid_seconds: of a Whisper; it and the student compute a batch on its longest clip, rounded up to a multiple of
            this; null for the whole window and others.
        dtype: in which it computes, whatever the student does.
        license: licence of its weights, for the student's model card.
    """

    name: str
    window_seconds: int | None = None
    grid_seconds: float | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    license: str | None = None


@dataclass(kw_only=True)
class PruningConfig:
    """What step one takes away.

    Args:
        sparsity: share of the teacher's parameters that is to go.
        ramp_steps: updates in which the target rises from 0 to that.
        gates: what can go: conv, channels of the convolutions, of a Whisper those of the first alone; heads; ffn_units,
            units of the feed-forward; attention and ffn, whole branches of a layer.
        learning_rate: of the gates and of the penalty's multipliers, under the schedule of the weights.
    """

    sparsity: float = 0.75
    ramp_steps: int = 5000
    gates: list[GateKind] = field(default_factory=lambda: list(PUBLISHED_GATES))
    learning_rate: float = 0.02

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise ValueError(f"pruning.sparsity={self.sparsity:g}; give the share to remove, above 0 and below 1")
        if self.ramp_steps < 1:
            raise ValueError(f"pruning.ramp_steps must be 1 or more, got {self.ramp_steps}")
        if not self.gates or len(set(self.gates)) < len(self.gates):
            raise ValueError(f"pruning.gates={self.gates}; give one or more, each once")
        if not self.learning_rate > 0:
            raise ValueError(f"pruning.learning_rate must be above 0, got {self.learning_rate:g}, or no gate shuts")


@dataclass(kw_only=True)
class FinalConfig:
    """What step two has instead of the `trainer` section's.

    Args:
        max_steps: updates.
        learning_rate: highest one.
        warmup_steps: updates until then.
    """

    max_steps: int = 25_000
    learning_rate: float = 1e-4
    warmup_steps: int = 5000

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ValueError(f"final.max_steps must be 1 or more, got {self.max_steps}")


@dataclass(kw_only=True)
class DPHubertConfig:
    """Prune a speech encoder while it is distilled, then distil what is left.

    Args:
        step: prune is step one, in the folder `trainer.output_dir` with "-pruned" behind it; distil is step two.
        teacher: the encoder.
        data: audio; labels are not used.
        pruning: of step one.
        loss: of both steps.
        final: of step two.
        probe: what the last stage scores the student on; null for nothing.
        trainer: arguments of transformers' Trainer; the numbers of steps and the learning rate are those of step one.
    """

    step: Literal["prune", "distil"] = "prune"
    teacher: TeacherConfig
    data: DataConfig
    pruning: PruningConfig = field(default_factory=PruningConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    final: FinalConfig = field(default_factory=FinalConfig)
    probe: ProbeConfig | None = None
    trainer: DistillationArguments

    def __post_init__(self) -> None:
        if 0 < self.trainer.max_steps < self.pruning.ramp_steps:
            raise ValueError(
                f"pruning.ramp_steps={self.pruning.ramp_steps} is more than trainer.max_steps="
                f"{self.trainer.max_steps}, so the target is never reached; lower it, a tenth of the steps is usual"
            )
        if self.step == "prune" and self.trainer.load_best_model_at_end:
            raise ValueError(
                "trainer.load_best_model_at_end=true with step=prune would keep an early student, whose loss is low "
                "because little is gone; leave it to --step distil"
            )
        self.trainer.follow_data(self.data.num_workers, self.data.dev_manifest)
        self.step_one_dir = f"{self.trainer.output_dir}-pruned"
        if self.step == "prune":
            self.trainer.output_dir = self.step_one_dir
        else:
            self.trainer.max_steps, self.trainer.learning_rate = self.final.max_steps, self.final.learning_rate
            self.trainer.warmup_steps = self.final.warmup_steps


def describe_run(
    config: DPHubertConfig, identity: dict[str, Any], teacher: PreTrainedModel, clips: TrainingClips
) -> dict[str, Any]:
    """Facts of the training for `run.json`, the model card and the tables."""
    return {
        "title": f"pruned encoder {Path(config.trainer.output_dir).name}",
        "step": config.step,
        "teacher": identity,
        "teacher_parameters": teacher.num_parameters(),
        "layers": config.loss.layers,
        "grid_seconds": config.teacher.grid_seconds,
        "gates": config.pruning.gates,
        "target_sparsity": config.pruning.sparsity,
        **training_facts(
            config.trainer,
            license=config.teacher.license,
            train_manifest=", ".join(config.data.train_manifests),
            train_utterances=len(clips.train_set),
            train_seconds=float(clips.train_set.durations_seconds.sum()),
            loss=config.loss.describe(),
        ),
        "left_out": clips.left_out,
    }


def build_trainer(config: DPHubertConfig) -> tuple[DistillationTrainer, dict[str, Any], EncoderInputs]:
    """Everything of a step before its first update: the trainer, the facts for `run.json`, and what encoders hear."""
    set_seed(config.trainer.seed)
    name, loss, pruning = config.teacher.name, config.loss, config.pruning
    teacher, normalize_input = load_encoder(name, window_seconds=config.teacher.window_seconds)
    check_layers(teacher, loss.layers)
    student: GatedEncoder | FinalStudent
    if config.step == "prune":
        student = gated_student(teacher, pruning.gates, loss.layers, pruning.sparsity)
    teacher.to(getattr(torch, config.teacher.dtype))
    freeze(teacher)
    identity = teacher_identity(name, teacher)
    if config.step == "distil":
        student = load_step_one(Path(config.step_one_dir), identity, loss.layers)
    inputs = EncoderInputs(teacher, normalize_input=normalize_input, grid_seconds=config.teacher.grid_seconds)
    inputs.to(config.trainer.device)
    clips = training_clips(
        config.data,
        config.trainer,
        shortest_samples=inputs.receptive_field_samples,
        window=inputs.window,
    )
    groups = partial(
        parameter_groups, learning_rate=config.trainer.learning_rate, gate_learning_rate=pruning.learning_rate
    )
    trainer = DistillationTrainer(
        student,
        teacher,
        args=config.trainer,
        train_dataset=clips.train_set,
        collate=partial(collate_clips, window=inputs.window),
        sampler=clips.sampler,
        loss_terms=partial(
            loss_terms,
            inputs=inputs,
            weights=loss,
            target=SparsityTarget(pruning.sparsity, pruning.ramp_steps, lambda: trainer.state.global_step),
        ),
        count_items=partial(count_items, inputs=inputs, num_layers=len(loss.layers)),
        eval_dataset=clips.dev_set,
        eval_sampler=clips.dev_sampler,
        parameter_groups=groups if config.step == "prune" else None,
    )
    return trainer, describe_run(config, identity, teacher, clips), inputs


def main(argv: list[str] | None = None) -> None:
    config, resolved_yaml = parse_config(DPHubertConfig, argv)
    output_dir = Path(config.trainer.output_dir)
    is_main = config.trainer.process_index == 0
    with training_run(config.trainer, resolved_yaml) as is_finished:
        if is_finished:
            return
        trainer, run, inputs = build_trainer(config)
        trainer.train(resume_from_checkpoint=True)
        if is_main:
            student, projections = trainer.model, None
            run["steps"] = trainer.state.global_step
            if config.step == "prune":
                run |= {
                    "sparsity": student.sparsity().item(),
                    "counted_parameters": student.expected_parameters().item(),
                }
                encoder, projections = student.extract(), student.projections
            else:
                encoder = student.encoder
            run |= widths(encoder)
            save_student(
                encoder, projections, model_card(run), output_dir / "student", normalize_input=inputs.normalize_input
            )
            write_json(output_dir / "run.json", run)
            logger.info("student: %s, %.1f M parameters", output_dir / "student", run["parameters"] / 1e6)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_command(main)
