"""Compact speech encoders: a student of a few layers learns what the layers of its teacher make of speech.

DistilHuBERT, Chang et al. 2022, https://arxiv.org/abs/2110.01900, or CoLLD, Chang et al. 2024,
https://arxiv.org/abs/2309.07707. Launch: python recipes/distilhubert/train.py --config FILE [--section.key value ...],
under torchrun or accelerate too. A killed run carries on from its last checkpoint.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from encoder_objective import LossConfig, SharedFrames, count_items, loss_terms
from head_frames import start_student_heads
from transformers import PreTrainedModel, set_seed

from speechkd.cli import run_command
from speechkd.config import parse_config
from speechkd.data.encoder_clips import (
    ClipSet,
    DataConfig,
    SpanDraws,
    TrainingClips,
    clip_sets,
    collate_clips,
    training_clips,
)
from speechkd.data.mini_superb import ProbeConfig
from speechkd.features_store import open_states
from speechkd.files import atomic_folder, write_json
from speechkd.frame_encoders import FrameEncoder, frame_encoder
from speechkd.losses.layerwise import LayerProjections, PredictionHeads, colld_layers
from speechkd.model_card import card_head, data_section, licence_section, teacher_section, training_section
from speechkd.models.distilhubert import CompactStudent, check_target_layers, compact_encoder
from speechkd.models.encoder_inputs import WAVEFORM_ENCODERS, EncoderInputs, encoder_layers
from speechkd.models.speech_encoders import load_encoder
from speechkd.run_folder import training_facts, training_run
from speechkd.teachers import freeze, teacher_identity
from speechkd.trainer import DistillationArguments, DistillationTrainer

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TeacherConfig:
    """The encoder whose layers are learnt.

    Args:
        name: HuBERT, wav2vec 2.0, WavLM, data2vec-audio, w2v-BERT or Whisper, whose encoder is taken: Hub id, folder or
            `bundled:<name>`.
        layers: target layers of distilhubert, from 1; null for colld, which pairs every layer of the student.
        window_seconds: of a Whisper, the longest clip that it is to hear instead of 30 s; null for 30 s and others.
        grid_seconds: of a Whisper; it and the student compute a batch on its longest clip, rounded up to a multiple of
            this; null for the whole window and others.
        states_dir: folder of the label stores of its target layers, of `store_teacher_states.py`; null runs it in each
            step.
        dtype: in which it computes, whatever the student does.
        dropout: leave its dropouts on, as the published code of DistilHuBERT does by accident.
        license: licence of its weights, for the student's model card.
    """

    name: str
    layers: list[int] | None = None
    window_seconds: int | None = None
    grid_seconds: float | None = None
    states_dir: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    dropout: bool = False
    license: str | None = None

    def __post_init__(self) -> None:
        if self.dropout and self.states_dir is not None:
            raise ValueError(
                f"teacher.dropout draws new targets in every step, and teacher.states_dir={self.states_dir} keeps one "
                "for each frame; leave one of the two out"
            )


@dataclass(kw_only=True)
class StudentConfig:
    """The encoder that learns.

    Args:
        num_layers: its depth.
        init: teacher takes the convolutions and the first layers of the teacher, random none.
        init_from: an encoder to start from instead, folder or Hub id, that hears what the teacher hears; null for none.
        heads: of distilhubert; random as in the paper, or least_squares: the best linear maps from the student as it
            starts. For short runs, in which random ones teach it nothing.
        feature_grad_mult: factor of the gradient into the convolutions; 0 freezes them, w2v-BERT has none and takes 1.
        conv_dim: channels of its convolutions, one number for all or a list with one for each; null for the teacher's.
            Not for Whisper and w2v-BERT.
        intermediate_size: units of its feed-forward layers; null for the teacher's. Not for w2v-BERT.
    """

    num_layers: int = 2
    init: Literal["teacher", "random"] = "teacher"
    init_from: str | None = None
    heads: Literal["random", "least_squares"] = "random"
    feature_grad_mult: float = 0.1
    conv_dim: int | list[int] | None = None
    intermediate_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("conv_dim", "intermediate_size"):
            if self.init_from is not None and getattr(self, name) is not None:
                raise ValueError(
                    f"student.{name}={getattr(self, name)} is for a student made of the teacher, but the encoder of "
                    f"student.init_from={self.init_from} comes with its widths; leave one of the two out"
                )


@dataclass(kw_only=True)
class DistilHubertConfig:
    """Distil a deep speech encoder into a shallow one.

    Args:
        teacher: the deep one.
        data: audio; labels are not used.
        student: the shallow one.
        loss: what it learns.
        probe: what the last stage scores the student on; null for nothing.
        trainer: arguments of transformers' Trainer.
    """

    teacher: TeacherConfig
    data: DataConfig
    student: StudentConfig = field(default_factory=StudentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    probe: ProbeConfig | None = None
    trainer: DistillationArguments

    def __post_init__(self) -> None:
        if (self.loss.method == "distilhubert") != (self.teacher.layers is not None):
            raise ValueError(
                f"teacher.layers={self.teacher.layers} with loss.method={self.loss.method}: distilhubert needs target "
                "layers, such as [4, 8, 12] of HuBERT Base, and colld takes null"
            )
        if self.loss.method == "colld" and self.student.heads != "random":
            raise ValueError(
                f"student.heads={self.student.heads} is for loss.method=distilhubert; the maps of colld start as the "
                "identity, leave it out"
            )
        self.trainer.follow_data(self.data.num_workers, self.data.dev_manifest)


def load_teacher(config: DistilHubertConfig) -> tuple[PreTrainedModel, bool]:
    """The deep encoder, frozen, and whether it expects waveforms of mean 0 and variance 1."""
    teacher, normalize_input = load_encoder(
        config.teacher.name,
        dtype=getattr(torch, config.teacher.dtype),
        window_seconds=config.teacher.window_seconds,
    )
    return freeze(teacher), normalize_input


def stored_teacher(
    config: DistilHubertConfig, teacher: PreTrainedModel, normalize_input: bool, layers: Sequence[int]
) -> FrameEncoder:
    """The teacher as `teacher.states_dir` keeps it: these layers of each clip alone."""
    return frame_encoder(
        config.teacher.name,
        teacher,
        normalize_input,
        layers=layers,
        grid_seconds=config.teacher.grid_seconds,
        device=config.trainer.device,
    )


def add_states(clips: ClipSet, encoder: FrameEncoder, config: DistilHubertConfig) -> None:
    """Give clips the states that are stored of them.

    Raises:
        ValueError: some have none, or are longer than `data.crop_seconds`.
    """
    longest, crop = float(clips.manifest.durations_seconds.max()), config.data.crop_seconds
    if longest > crop:
        raise ValueError(
            f"teacher.states_dir keeps states of whole clips, and the longest of {clips.manifest.path} has "
            f"{longest:.1f} s, which data.crop_seconds={crop:g} would crop; raise it, or set teacher.states_dir to null"
        )
    try:
        clips.states = open_states(encoder, clips.manifest, str(config.teacher.states_dir)).arrays
    except ValueError as error:
        raise ValueError(
            f"{error}: python recipes/distilhubert/store_teacher_states.py makes teacher.states_dir"
        ) from error


def build_student(
    config: DistilHubertConfig, teacher: PreTrainedModel, normalize_input: bool
) -> tuple[CompactStudent, list[int]]:
    """The student with its heads, and the teacher's layer of each head, from 1.

    Args:
        config: of the run.
        teacher: the deep encoder.
        normalize_input: whether it expects waveforms of mean 0 and variance 1.

    Raises:
        ValueError: the teacher lacks a layer, the student is deeper or wider than it can be, or `init_from` hears
            something else.
    """
    if config.student.init_from is None:
        encoder = compact_encoder(
            teacher,
            config.student.num_layers,
            init=config.student.init,
            conv_dim=config.student.conv_dim,
            intermediate_size=config.student.intermediate_size,
        )
    else:
        encoder = load_start(config, teacher, normalize_input)
    widths = (encoder.config.hidden_size, teacher.config.hidden_size)
    is_colld = config.loss.method == "colld"
    if is_colld:
        layers = colld_layers(len(encoder_layers(encoder)), len(encoder_layers(teacher)))
    else:
        layers = list(config.teacher.layers or [])
        check_target_layers(teacher, layers)
    student = CompactStudent(
        encoder,
        LayerProjections(len(layers), *widths) if is_colld else PredictionHeads(*widths, len(layers)),
        feature_grad_mult=config.student.feature_grad_mult,
        mask_spans=is_colld,
        normalize_input=normalize_input,
        grid_seconds=config.teacher.grid_seconds,
    )
    return student, layers


def load_start(config: DistilHubertConfig, teacher: PreTrainedModel, normalize_input: bool) -> PreTrainedModel:
    """The encoder of `student.init_from`.

    Raises:
        ValueError: it cannot be loaded, or does not hear what the teacher hears.
    """
    name = str(config.student.init_from)
    encoder, normalizes = load_encoder(name, window_seconds=config.teacher.window_seconds)
    ours, theirs = hearing(encoder, normalizes), hearing(teacher, normalize_input)
    if different := [f"{key} {ours[key]}, of the teacher {theirs[key]}" for key in ours if ours[key] != theirs[key]]:
        raise ValueError(
            f"student.init_from={name} hears other input than the teacher: {'; '.join(different)}; take an encoder "
            "that was distilled from such a teacher"
        )
    return encoder


def hearing(encoder: PreTrainedModel, normalize_input: bool) -> dict[str, Any]:
    """What decides about the input of an encoder; teacher and student share theirs."""
    config: Any = encoder.config
    names = ("model_type", "num_mel_bins", "max_source_positions", "feature_projection_input_dim")
    facts = {name: getattr(config, name, None) for name in names}
    return facts | {"do_normalize": normalize_input and config.model_type in WAVEFORM_ENCODERS}


def describe_run(
    config: DistilHubertConfig,
    identity: dict[str, Any],
    student: CompactStudent,
    layers: list[int],
    clips: TrainingClips,
) -> dict[str, Any]:
    """Facts of the training for `run.json`, the model card and the tables."""
    encoder = student.encoder
    return {
        "title": f"compact encoder {Path(config.trainer.output_dir).name}",
        "teacher": identity,
        "teacher_layers": layers,
        "teacher_states": "live" if config.teacher.states_dir is None else "stored in float16",
        "grid_seconds": config.teacher.grid_seconds,
        "encoder_layers": len(encoder_layers(encoder)),
        "is_whisper": student.inputs.kind == "whisper",
        "parameters": encoder.num_parameters(),
        "head_parameters": sum(weight.numel() for weight in student.heads.parameters()),
        "init": config.student.init_from or config.student.init,
        "heads": config.student.heads,
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


def model_card(run: dict[str, Any]) -> str:
    """Model card of a compact encoder."""
    name, layers = run["teacher"]["name"], ", ".join(map(str, run["teacher_layers"]))
    lines = [
        *card_head(run, "feature-extraction", "speech"),
        f"A speech encoder of {run['encoder_layers']} layers, {run['parameters'] / 1e6:.1f} M parameters, which learnt "
        f"layers {layers} of {name}. Made by speechkd {run['speechkd_version']}.",
        "",
        f"`AutoModel.from_pretrained` loads it{', as the `encoder` of a Whisper' if run['is_whisper'] else ''}. "
        "`AutoFeatureExtractor` makes its input of 16 kHz waveforms.",
        "",
        *teacher_section(run),
        *data_section(run, ", audio alone."),
        *training_section(run),
        *licence_section(run, "That of the teacher and of the data."),
    ]
    return "\n".join(lines)


def save_student(student: CompactStudent, run: dict[str, Any], output_dir: Path) -> None:
    """Write the encoder without its heads, and its card; the folder is complete or absent."""
    with atomic_folder(output_dir, replace=True) as temporary:
        student.save_encoder(temporary)
        (temporary / "README.md").write_text(model_card(run), encoding="utf-8")


def build_trainer(config: DistilHubertConfig) -> tuple[DistillationTrainer, dict[str, Any]]:
    """Everything of a run before its first step: the trainer, and the facts for `run.json`."""
    set_seed(config.trainer.seed)
    teacher, normalize_input = load_teacher(config)
    identity = teacher_identity(config.teacher.name, teacher)
    student, layers = build_student(config, teacher, normalize_input)
    frames = SharedFrames(student.inputs, EncoderInputs(teacher, normalize_input=normalize_input))
    loss, spans = config.loss, None
    if loss.method == "colld":
        spans = SpanDraws(frames, loss.span_start_probability, loss.span_frames)
    shortest = max(inputs.receptive_field_samples for inputs in (frames.student, frames.teacher))
    clips = training_clips(config.data, config.trainer, shortest_samples=shortest, window=student.inputs.window)
    is_stored = config.teacher.states_dir is not None
    if is_stored:
        encoder = stored_teacher(config, teacher, normalize_input, layers)
        for part in clip_sets(clips.train_set, clips.dev_set):
            add_states(part, encoder, config)
    if config.student.heads == "least_squares":
        start_student_heads(
            student,
            None if is_stored else teacher,
            clips.train_set,
            frames=frames,
            layers=layers,
            normalize_targets=loss.normalize_targets,
            seed=config.trainer.seed,
            device=config.trainer.device,
        )
    trainer = DistillationTrainer(
        student,
        None if is_stored else teacher,
        args=config.trainer,
        train_dataset=clips.train_set,
        collate=partial(collate_clips, window=student.inputs.window, spans=spans),
        sampler=clips.sampler,
        loss_terms=partial(
            loss_terms, frames=frames, layers=layers, weights=loss, teacher_dropout=config.teacher.dropout
        ),
        count_items=partial(count_items, num_frames=frames, num_layers=len(layers)),
        eval_dataset=clips.dev_set,
        eval_sampler=clips.dev_sampler,
    )
    return trainer, describe_run(config, identity, student, layers, clips)


def main(argv: list[str] | None = None) -> None:
    config, resolved_yaml = parse_config(DistilHubertConfig, argv)
    output_dir = Path(config.trainer.output_dir)
    is_main = config.trainer.process_index == 0
    with training_run(config.trainer, resolved_yaml) as is_finished:
        if is_finished:
            return
        trainer, run = build_trainer(config)
        trainer.train(resume_from_checkpoint=True)
        if is_main:
            run["steps"] = trainer.state.global_step
            save_student(trainer.model, run, output_dir / "student")
            write_json(output_dir / "run.json", run)
            logger.info("student: %s", output_dir / "student")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_command(main)
