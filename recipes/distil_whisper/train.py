"""Distil-Whisper: a student with the teacher's encoder and a few of its decoder layers, trained on the teacher's words.

Gandhi et al. 2023, https://arxiv.org/abs/2311.00430. Launch: python recipes/distil_whisper/train.py --config FILE
[--section.key value ...], under torchrun or accelerate too. A killed run carries on from its last checkpoint.
"""

import logging
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from corpora import build_set
from objective import LossConfig, count_items, loss_terms
from students import StudentConfig, build_models
from transformers import WhisperForConditionalGeneration, WhisperProcessor, set_seed

from speechkd.cli import exit_codes
from speechkd.config import DataConfig, EvaluationConfig, TeacherConfig, parse_config, save_config
from speechkd.data.augment import WaveformAugment
from speechkd.data.collate import WhisperTokens
from speechkd.data.features import SAMPLE_RATE_HZ, WhisperLogMel
from speechkd.data.sampler import DurationBatchSampler
from speechkd.data.whisper import WhisperTrainSet, collate_whisper
from speechkd.doctor import hardware_name
from speechkd.export.huggingface import model_card, save_student
from speechkd.files import folder_lock, write_json
from speechkd.labels.filters import FilterConfig
from speechkd.labels.pseudo_label import DecodingConfig
from speechkd.models.whisper import choose_layers
from speechkd.teachers import load_processor
from speechkd.trainer import DistillationArguments, DistillationTrainer

logger = logging.getLogger(__name__)

WINDOW_SECONDS = 30.0


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
        if self.teacher is None and (self.student.init_from is None or self.loss.kl > 0):
            raise ValueError("without a teacher set student.init_from to a checkpoint and loss.kl to 0")
        if self.teacher is not None and self.teacher.cache_encoder_states:
            if not self.student.freeze_encoder or self.student.encoder_layers is not None:
                raise ValueError(
                    "teacher.cache_encoder_states needs the teacher's whole encoder, frozen; set "
                    "student.freeze_encoder=true and student.encoder_layers=null"
                )
            if self.data.labels_dir is None:
                raise ValueError("teacher.cache_encoder_states needs data.labels_dir, the label store that holds them")
            if self.data.augment is not None:
                raise ValueError("data.augment changes the audio; set teacher.cache_encoder_states=false for it")
        if self.trainer.dataloader_num_workers not in (0, self.data.num_workers):
            raise ValueError(
                f"trainer.dataloader_num_workers={self.trainer.dataloader_num_workers} is not data.num_workers="
                f"{self.data.num_workers}; set data.num_workers alone"
            )
        self.trainer.dataloader_num_workers = self.data.num_workers
        if self.trainer.eval_strategy != "no" and self.data.dev_manifest is None:
            raise ValueError(f"trainer.eval_strategy={self.trainer.eval_strategy.value} needs data.dev_manifest")


def describe_run(
    config: DistilWhisperConfig,
    student: WhisperForConditionalGeneration,
    teacher: WhisperForConditionalGeneration | None,
    identity: dict[str, Any] | None,
    train_set: WhisperTrainSet,
    filter_report: dict[str, Any],
) -> dict[str, Any]:
    """Facts of the training for `run.json`, the model card and the tables."""
    kept = config.student.decoder_layers_numbers
    if kept is None and teacher is not None and config.student.init_from is None:
        kept = choose_layers(teacher.config.decoder_layers, student.config.decoder_layers)
    weights = config.loss
    kl = f" + {weights.kl:g} KL(teacher, T={weights.temperature:g}, T^2)" if weights.kl and identity else ""
    return {
        "title": f"distil-whisper {Path(config.trainer.output_dir).name}",
        "teacher": identity,
        "license": config.teacher.license if config.teacher else None,
        "language": config.decoding.language,
        "encoder_layers": student.config.encoder_layers,
        "decoder_layers": student.config.decoder_layers,
        "decoder_layers_kept": kept,
        "parameters": student.num_parameters(),
        "train_manifest": config.data.train_manifest,
        "train_utterances": len(train_set),
        "train_hours": float(train_set.manifest.durations_seconds.sum()) / 3600,
        "labels": "the manifest's text" if config.data.labels_dir is None else "greedy transcripts of the teacher",
        "synthetic": "synthetic" in config.data.train_manifest,
        "filters": filter_report,
        "loss": f"{weights.cross_entropy:g} CE{kl}",
        "steps": config.trainer.max_steps,
        "learning_rate": config.trainer.learning_rate,
        "seed": config.trainer.seed,
        "device": hardware_name(config.trainer.device),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "speechkd_version": version("speechkd"),
    }


def build_trainer(config: DistilWhisperConfig) -> tuple[DistillationTrainer, WhisperProcessor, dict[str, Any]]:
    """Everything of a run before its first step: the trainer, the processor, and the facts for `run.json`."""
    set_seed(config.trainer.seed)
    output_dir = Path(config.trainer.output_dir)
    student, teacher, identity = build_models(config.teacher, config.student, config.trainer.device)
    processor = load_processor(config.teacher.name if config.teacher else str(config.student.init_from))
    tokens = WhisperTokens.from_tokenizer(
        processor.tokenizer, language=config.decoding.language, task=config.decoding.task
    )
    with config.trainer.main_process_first(desc="preparing the data"):
        split_set = partial(
            build_set,
            config.data,
            filters=config.filters,
            identity=identity,
            cached_encoder_states=config.teacher is not None and config.teacher.cache_encoder_states,
            tokenizer=processor.tokenizer,
            tokens=tokens,
            output_dir=output_dir,
        )
        train_set, filter_report = split_set("train")
        dev_set = None if config.data.dev_manifest is None else split_set("dev")[0]
    if config.data.augment is not None:
        train_set.augment = WaveformAugment(config.data.augment, SAMPLE_RATE_HZ, config.trainer.seed)
    run = describe_run(config, student, teacher, identity, train_set, filter_report)
    encoder = student.model.encoder
    shared = config.student.freeze_encoder and (teacher is None or teacher.model.encoder is encoder)
    trainer = DistillationTrainer(
        student,
        teacher if config.loss.kl > 0 else None,
        args=config.trainer,
        train_dataset=train_set,
        collate=partial(collate_whisper, tokens=tokens),
        sampler=DurationBatchSampler(
            np.full(len(train_set), WINDOW_SECONDS),  # Whisper pads every clip to its window
            config.data.max_batch_seconds,
            seed=config.trainer.seed,
            rank=config.trainer.process_index,
            world_size=config.trainer.world_size,
        ),
        loss_terms=partial(
            loss_terms,
            weights=config.loss,
            log_mel=WhisperLogMel(student.config.num_mel_bins).to(config.trainer.device),
            shared_encoder=encoder if shared else None,
        ),
        count_items=count_items,
        eval_dataset=dev_set,
        eval_sampler=None
        if dev_set is None
        else DurationBatchSampler(np.full(len(dev_set), WINDOW_SECONDS), config.data.max_batch_seconds),
    )
    return trainer, processor, run


def main(argv: list[str] | None = None) -> None:
    config, resolved_yaml = parse_config(DistilWhisperConfig, argv)
    output_dir = Path(config.trainer.output_dir)
    is_main = config.trainer.process_index == 0
    with folder_lock(output_dir) if is_main else nullcontext():
        if is_main:
            save_config(resolved_yaml, output_dir)
        if (output_dir / "run.json").exists():
            logger.info("%s holds a finished training", output_dir)
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
    with exit_codes():
        main()
