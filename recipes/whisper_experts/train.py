"""Multilingual DistilWhisper: a Whisper learns a language with gated experts in its layers, or with LoRA, to compare.

Ferraz et al. 2024, https://arxiv.org/abs/2311.01070. Launch: python recipes/whisper_experts/train.py --config FILE
[--section.key value ...], under torchrun or accelerate too. A killed run carries on from its last checkpoint.
"""

import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from adapters import StudentConfig, adapt, measure_open_shares, save_adapter
from gated_objective import LossConfig, collate_with_lengths, count_items, loss_terms
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    set_seed,
)

from speechkd.cli import run_command
from speechkd.config import DataConfig, EvaluationConfig, TeacherConfig, parse_config
from speechkd.data.augment import WaveformAugment
from speechkd.data.collate import WhisperTokens
from speechkd.data.features import SAMPLE_RATE_HZ, WhisperLogMel
from speechkd.data.hub import read_utterances
from speechkd.data.sampler import DurationBatchSampler
from speechkd.data.whisper import WhisperTrainSet, pseudo_labelled_set, reference_set
from speechkd.export.huggingface import model_card, save_student
from speechkd.files import write_json
from speechkd.labels.decoding import DecodingConfig, decoding_tokens
from speechkd.labels.filters import FilterConfig
from speechkd.labels.teacher_cache import LabelStore, check_teacher
from speechkd.models.language_experts import set_gate_noise
from speechkd.run_folder import training_facts, training_run
from speechkd.teachers import check_vocabularies, load_processor, load_whisper, teacher_identity
from speechkd.trainer import DistillationArguments, DistillationTrainer

logger = logging.getLogger(__name__)

# experts of several languages share no weights: one run each gives what a run of all would
UNUSED_DATA_SETTINGS = ("extra_corpora", "pack", "timestamp_probability", "previous_text_probability")


@dataclass(kw_only=True)
class ExpertsConfig:
    """Adapt a Whisper to the language `decoding.language`.

    Args:
        teacher: a larger Whisper with the same vocabulary; null trains on the labels alone.
        student: the model that is adapted, and how.
        data: manifests, labels and batches.
        loss: weights of the objective.
        decoding: language and limits.
        filters: which pseudo-labels are trained on.
        evaluation: how the student is scored.
        trainer: arguments of transformers' Trainer.
    """

    teacher: TeacherConfig | None
    student: StudentConfig
    data: DataConfig
    loss: LossConfig = field(default_factory=LossConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    trainer: DistillationArguments

    def __post_init__(self) -> None:
        if self.student.adapter == "experts" and self.decoding.language is None:
            raise ValueError("student.adapter=experts needs decoding.language: experts belong to one")
        if self.teacher is not None and (self.teacher.cache_encoder_states or self.teacher.stored_outputs):
            raise ValueError(
                "teacher.cache_encoder_states and teacher.stored_outputs do not fit: the student's encoder is trained "
                "and JS needs the whole teacher; set them to false and null"
            )
        for name in UNUSED_DATA_SETTINGS:
            if value := getattr(self.data, name):
                raise ValueError(f"data.{name}={value} is not for this recipe; leave it out")
        self.trainer.follow_data(self.data.num_workers, self.data.dev_manifest)


class GateNoise(TrainerCallback):
    """Sets the noise on the gates before each step; a resumed run goes on with that of its step."""

    def __init__(self, student: WhisperForConditionalGeneration) -> None:
        self.student = student

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        set_gate_noise(self.student, state.global_step / max(state.max_steps, 1))


def labelled_set(
    config: ExpertsConfig,
    split: Literal["train", "dev"],
    tokenizer: PreTrainedTokenizerBase,
    tokens: WhisperTokens,
    identity: dict[str, Any] | None,
    window_seconds: float,
) -> tuple[WhisperTrainSet, dict[str, Any]]:
    """The utterances of a split with their labels, and the report of the label filters.

    Raises:
        ValueError: labels of another teacher, of another language than `decoding.language`, or of clips that are longer
            than the student's window.
    """
    data, output_dir = config.data, Path(config.trainer.output_dir)
    manifest = read_utterances(str(data.train_manifest if split == "train" else data.dev_manifest))
    if data.labels_dir is None:
        folder = str(output_dir / ("dev" if split == "dev" else ""))
        limits: dict[str, Any] = {"max_skipped_fraction": data.max_skipped_fraction, "num_workers": data.num_workers}
        limits["window_seconds"] = window_seconds
        return reference_set(manifest, tokenizer, tokens, output_dir=folder, **limits), {}
    store = LabelStore(Path(data.labels_dir) / split)
    if identity is not None:
        check_teacher(store, identity)
    chosen, report = pseudo_labelled_set(
        manifest,
        store,
        config.filters,
        tokenizer=tokenizer,
        tokens=tokens,
        cached_encoder_states=False,
        max_skipped_fraction=data.max_skipped_fraction,
    )
    if (longest := float(chosen.manifest.durations_seconds.max(initial=0))) > window_seconds:
        raise ValueError(
            f"the longest labelled clip of {manifest.path} has {longest:.1f} s, and student.init_from="
            f"{config.student.init_from} hears {window_seconds:g} s; take a student with a longer window"
        )
    if wrong := sum(tokens.prefix[1] not in ids for ids in chosen.token_ids):
        raise ValueError(
            f"{wrong} of {len(chosen)} labels in {store.folder} are not of decoding.language={config.decoding.language}"
            "; a run trains one language, choose the language of the labels"
        )
    return chosen, report


def describe_run(
    config: ExpertsConfig,
    student: WhisperForConditionalGeneration,
    identity: dict[str, Any] | None,
    base: dict[str, Any],
    train_set: WhisperTrainSet,
    filter_report: dict[str, Any],
) -> dict[str, Any]:
    """Facts of the training for `run.json`, the model card and the tables."""
    weights = config.loss
    gate = " + gate" if config.student.adapter == "experts" else ""
    labels = f"CE(smoothing {weights.label_smoothing:g}){gate}"
    objective = f"0.5 [({labels}) / {weights.label_sigma:g}^2 + JS(teacher) / {weights.kd_sigma:g}^2]"
    num_trainable = sum(weight.numel() for weight in student.parameters() if weight.requires_grad)
    return {
        "title": f"whisper-experts {Path(config.trainer.output_dir).name}",
        "teacher": identity,
        "base_model": base,
        "adapter": config.student.adapter,
        "language": config.decoding.language,
        "encoder_layers": student.config.encoder_layers,
        "decoder_layers": student.config.decoder_layers,
        "decoder_layers_kept": None,
        "parameters": student.num_parameters() - (num_trainable if config.student.adapter != "none" else 0),
        "trainable_parameters": num_trainable,
        "labels": "the manifest's text" if config.data.labels_dir is None else "greedy transcripts of the teacher",
        "filters": filter_report,
        "steps": config.trainer.max_steps,
        **training_facts(
            config.trainer,
            license=config.teacher.license if config.teacher else None,
            train_manifest=config.data.train_manifest,
            train_utterances=len(train_set),
            train_seconds=float(train_set.manifest.durations_seconds.sum()),
            loss=objective if identity else labels,
        ),
    }


def build_trainer(config: ExpertsConfig) -> tuple[DistillationTrainer, WhisperProcessor, dict[str, Any], Any]:
    """Everything of a run before its first step: trainer, processor, facts for `run.json`, and peft's wrapper."""
    set_seed(config.trainer.seed)
    device, identity, teacher = config.trainer.device, None, None
    student = load_whisper(config.student.init_from, dtype="float32", device=device)
    log_mel = WhisperLogMel.for_model(student.config).to(device)
    window_seconds = log_mel.max_samples / SAMPLE_RATE_HZ  # Whisper pads every clip to its window
    if config.teacher is not None:
        teacher = load_whisper(config.teacher.name, dtype=config.teacher.dtype, device=device)
        check_vocabularies(teacher, student)
        if teacher.config.max_source_positions != student.config.max_source_positions:
            raise ValueError(
                f"teacher.name={config.teacher.name} has {teacher.config.max_source_positions} encoder positions and "
                f"student.init_from={config.student.init_from} {student.config.max_source_positions}, but both hear "
                "the same input; shorten both windows, or none"
            )
        identity = teacher_identity(config.teacher.name, teacher)
    base = teacher_identity(config.student.init_from, student)
    wrapper = adapt(student, config.student.adapter, config.decoding.language)
    processor = load_processor(config.student.init_from)
    tokens = decoding_tokens(config.student.init_from, student, processor.tokenizer, config.decoding)
    with config.trainer.main_process_first(desc="preparing the data"):
        labelled = partial(
            labelled_set,
            config,
            tokenizer=processor.tokenizer,
            tokens=tokens,
            identity=identity,
            window_seconds=window_seconds,
        )
        train_set, filter_report = labelled("train")
        dev_set = None
        if config.data.dev_manifest is not None:
            dev_set, _ = labelled("dev")
    if config.data.augment is not None:
        train_set.augment = WaveformAugment(config.data.augment, SAMPLE_RATE_HZ, config.trainer.seed)
        train_set.window_samples = log_mel.max_samples
    run = describe_run(config, student, identity, base, train_set, filter_report)
    trainer = DistillationTrainer(
        student,
        teacher,
        args=config.trainer,
        train_dataset=train_set,
        collate=partial(collate_with_lengths, tokens=tokens, window_seconds=window_seconds),
        sampler=DurationBatchSampler(
            np.full(len(train_set), window_seconds),
            config.data.max_batch_seconds,
            seed=config.trainer.seed,
            rank=config.trainer.process_index,
            world_size=config.trainer.world_size,
            sort_keys=train_set.label_lengths,
        ),
        loss_terms=partial(loss_terms, weights=config.loss, log_mel=log_mel),
        count_items=count_items,
        eval_dataset=dev_set,
        eval_sampler=None
        if dev_set is None
        else DurationBatchSampler(np.full(len(dev_set), window_seconds), config.data.max_batch_seconds),
    )
    trainer.add_callback(GateNoise(student))
    return trainer, processor, run, wrapper


def main(argv: list[str] | None = None) -> None:
    config, resolved_yaml = parse_config(ExpertsConfig, argv)
    output_dir = Path(config.trainer.output_dir)
    is_main = config.trainer.process_index == 0
    with training_run(config.trainer, resolved_yaml) as is_finished:
        if is_finished:
            return
        trainer, processor, run, wrapper = build_trainer(config)
        trainer.train(resume_from_checkpoint=True)
        if is_main:
            run["steps"] = trainer.state.global_step
            merged = save_adapter(
                trainer.model,
                wrapper,
                config.student.adapter,
                language=config.decoding.language,
                base=run["base_model"],
                output_dir=output_dir,
                open_shares=partial(
                    measure_open_shares,
                    trainer.model,
                    trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset,
                    trainer.data_collator,
                    WhisperLogMel.for_model(trainer.model.config).to(config.trainer.device),
                ),
            )
            save_student(merged, processor, output_dir / "student", model_card(run))
            write_json(output_dir / "run.json", run)
            logger.info("student: %s", output_dir / "student")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_command(main)
