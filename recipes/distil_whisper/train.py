"""Distil-Whisper: a student with the teacher's encoder and a few of its decoder layers, trained on the teacher's words.

Gandhi et al. 2023, https://arxiv.org/abs/2311.00430. Launch: python recipes/distil_whisper/train.py --config FILE
[--section.key value ...], under torchrun or accelerate too. A killed run carries on from its last checkpoint.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from corpora import batch_sampler, build_sets, check_data, label_draws
from objective import LossConfig, StepDraws, check_stored_outputs, count_items, loss_terms
from students import Models, StudentConfig, build_models
from transformers import WhisperProcessor, set_seed

from speechkd.cli import run_command
from speechkd.config import DataConfig, EvaluationConfig, TeacherConfig, parse_config
from speechkd.data.augment import WaveformAugment
from speechkd.data.features import SAMPLE_RATE_HZ, WhisperLogMel
from speechkd.data.mixture import Mixture
from speechkd.data.whisper import WhisperTrainSet, collate_whisper
from speechkd.export.huggingface import model_card, save_student
from speechkd.files import write_json
from speechkd.labels.decoding import DecodingConfig, decoding_tokens
from speechkd.labels.filters import FilterConfig
from speechkd.run_folder import training_facts, training_run
from speechkd.teachers import load_processor
from speechkd.trainer import DistillationArguments, DistillationTrainer

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class DistilWhisperConfig:
    """Distil a Whisper into one with fewer layers.

    Args:
        teacher: the model to distil; null fine-tunes `student.init_from` on its labels alone.
        data: manifests, labels and batches.
        student: what the student keeps of the teacher.
        loss: weights of the objective.
        decoding: language and limits, for labelling and scoring.
        filters: which pseudo-labels are trained on.
        evaluation: how the student is scored.
        trainer: arguments of transformers' Trainer.
    """

    teacher: TeacherConfig | None
    data: DataConfig
    student: StudentConfig = field(default_factory=StudentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    trainer: DistillationArguments

    def __post_init__(self) -> None:
        if self.teacher is None and (self.student.init_from is None or self.loss.needs_teacher):
            raise ValueError(
                "without a teacher set student.init_from to a checkpoint, and loss.kl and loss.hidden_mse to 0"
            )
        cached_states = self.teacher is not None and self.teacher.cache_encoder_states
        if cached_states and not (self.student.freeze_encoder and self.student.keeps_whole_encoder):
            raise ValueError(
                "teacher.cache_encoder_states needs the teacher's whole encoder, frozen; set "
                "student.freeze_encoder=true, student.encoder_layers=null and student.encoder_layers_numbers=null"
            )
        check_stored_outputs(self.teacher, self.loss, self.data, self.decoding, self.filters)
        check_data(self.data, self.decoding, self.filters, cached_states)
        self.trainer.follow_data(self.data.num_workers, self.data.dev_manifest)


def describe_run(
    config: DistilWhisperConfig,
    models: Models,
    corpora: Sequence[WhisperTrainSet],
    filter_reports: dict[str, Any],
) -> dict[str, Any]:
    """Facts of the training for `run.json`, the model card and the tables."""
    student, stored_outputs = models.student, config.teacher.stored_outputs if config.teacher else None
    is_live = models.teacher is not None and config.loss.needs_teacher
    languages = [corpus.language or config.decoding.language for corpus in config.data.corpora]
    return {
        "title": f"distil-whisper {Path(config.trainer.output_dir).name}",
        "teacher": models.identity,
        "teacher_outputs": "stored" if stored_outputs else "live" if is_live else None,
        "language": languages[0] if len(set(languages)) == 1 else sorted({str(code) for code in languages}),
        "encoder_layers": student.config.encoder_layers,
        "decoder_layers": student.config.decoder_layers,
        "decoder_layers_kept": models.decoder_layers_kept,
        "parameters": student.num_parameters(),
        "labels": " and ".join(sorted({_label_source(corpus.labels_dir) for corpus in config.data.corpora})),
        "filters": filter_reports if len(corpora) > 1 else next(iter(filter_reports.values())),
        "steps": config.trainer.max_steps,
        **training_facts(
            config.trainer,
            license=config.teacher.license if config.teacher else None,
            train_manifest=", ".join(corpus.train_manifest for corpus in config.data.corpora),
            train_utterances=sum(map(len, corpora)),
            train_seconds=sum(float(corpus.manifest.durations_seconds.sum()) for corpus in corpora),
            loss=config.loss.describe(has_teacher=models.identity is not None, stored_outputs=stored_outputs),
        ),
    }


def _label_source(labels_dir: str | None) -> str:
    return "the manifest's text" if labels_dir is None else "greedy transcripts of the teacher"


def build_trainer(config: DistilWhisperConfig) -> tuple[DistillationTrainer, WhisperProcessor, dict[str, Any]]:
    """Everything of a run before its first step: the trainer, the processor, and the facts for `run.json`."""
    set_seed(config.trainer.seed)
    output_dir = Path(config.trainer.output_dir)
    models = build_models(
        config.teacher, config.student, config.trainer.device, needs_hidden_states=config.loss.hidden_mse > 0
    )
    student, teacher = models.student, models.teacher
    vocabulary_of = config.teacher.name if config.teacher else str(config.student.init_from)
    processor = load_processor(vocabulary_of)
    tokens_of = partial(decoding_tokens, vocabulary_of, student, processor.tokenizer)
    tokens = tokens_of(config.decoding)
    with config.trainer.main_process_first(desc="preparing the data"):
        corpora, dev_set, filter_reports = build_sets(
            config.data,
            config.decoding,
            config.filters,
            identity=models.identity,
            cached_encoder_states=config.teacher is not None and config.teacher.cache_encoder_states,
            stored_outputs=config.teacher.stored_outputs if config.teacher else None,
            tokenizer=processor.tokenizer,
            tokens_of=tokens_of,
            output_dir=output_dir,
        )
    draws = label_draws(config.data, corpora, tokens, config.trainer.seed)
    if config.data.augment is not None:
        for corpus in corpora:
            corpus.augment = WaveformAugment(config.data.augment, SAMPLE_RATE_HZ, config.trainer.seed)
    run = describe_run(config, models, corpora, filter_reports)
    encoder = student.model.encoder
    shared = config.student.freeze_encoder and (teacher is None or teacher.model.encoder is encoder)
    trainer = DistillationTrainer(
        student,
        teacher if config.loss.needs_teacher else None,
        args=config.trainer,
        train_dataset=corpora[0] if len(corpora) == 1 else Mixture(corpora),
        collate=partial(collate_whisper, tokens=tokens, draws=draws),
        sampler=batch_sampler(
            corpora,
            [corpus.weight for corpus in config.data.corpora],
            config.data.max_batch_seconds,
            seed=config.trainer.seed,
            rank=config.trainer.process_index,
            world_size=config.trainer.world_size,
        ),
        loss_terms=partial(
            loss_terms,
            weights=config.loss,
            log_mel=WhisperLogMel.for_model(student.config).to(config.trainer.device),
            shared_encoder=encoder if shared else None,
            teacher_head=models.teacher_head,
            draws=StepDraws(
                seed=config.trainer.seed,
                step=lambda: trainer.state.global_step,
                tokens=tokens,
                spec_augment=config.student.spec_augment,
            ),
        ),
        count_items=count_items,
        eval_dataset=dev_set,
        eval_sampler=None if dev_set is None else batch_sampler([dev_set], [1.0], config.data.max_batch_seconds),
    )
    return trainer, processor, run


def main(argv: list[str] | None = None) -> None:
    config, resolved_yaml = parse_config(DistilWhisperConfig, argv)
    output_dir = Path(config.trainer.output_dir)
    is_main = config.trainer.process_index == 0
    with training_run(config.trainer, resolved_yaml) as is_finished:
        if is_finished:
            return
        trainer, processor, run = build_trainer(config)
        if is_main and not (output_dir / "student_init").exists():
            save_student(trainer.model, processor, output_dir / "student_init", model_card(run))
        trainer.train(resume_from_checkpoint=True)
        if is_main:
            save_student(trainer.model, processor, output_dir / "student", model_card(run))
            write_json(output_dir / "run.json", run)
            logger.info("student: %s", output_dir / "student")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_command(main)
