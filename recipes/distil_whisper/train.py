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
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, WhisperForConditionalGeneration, WhisperProcessor, set_seed

from speechkd.cli import exit_codes
from speechkd.config import DataConfig, EvaluationConfig, TeacherConfig, parse_config, save_config
from speechkd.data.audio import pcm16_to_float
from speechkd.data.augment import WaveformAugment
from speechkd.data.collate import WhisperTokens
from speechkd.data.features import SAMPLE_RATE_HZ, WhisperLogMel
from speechkd.data.hub import read_utterances
from speechkd.data.sampler import DurationBatchSampler
from speechkd.data.whisper import WhisperTrainSet, collate_whisper, pseudo_labelled_set, reference_set
from speechkd.doctor import hardware_name
from speechkd.export.huggingface import model_card, save_student
from speechkd.files import folder_lock, write_json
from speechkd.labels.filters import FilterConfig
from speechkd.labels.pseudo_label import DecodingConfig
from speechkd.labels.teacher_cache import LabelStore, check_teacher
from speechkd.losses.fused import fused_linear_cross_entropy, fused_linear_distillation
from speechkd.models.whisper import choose_layers, decoder_states, encoders_equal, freeze_student, student_from_teacher
from speechkd.teachers import check_vocabularies, load_processor, load_whisper, teacher_identity
from speechkd.trainer import Batch, DistillationArguments, DistillationTrainer

logger = logging.getLogger(__name__)

WINDOW_SECONDS = 30.0


@dataclass(kw_only=True)
class StudentConfig:
    """What the student keeps of the teacher.

    Args:
        init_from: start from this checkpoint instead of cutting layers out of the teacher.
        decoder_layers: number of decoder layers.
        encoder_layers: number of encoder layers; null keeps all.
        decoder_layers_numbers: which decoder layers, negative ones from the end; null spaces them evenly.
        freeze_encoder: keep the encoder as it is; teacher and student then share it.
        freeze_embed_positions: keep the decoder's positions, so that contexts longer than the training labels work.
    """

    init_from: str | None = None
    decoder_layers: int = 2
    encoder_layers: int | None = None
    decoder_layers_numbers: list[int] | None = None
    freeze_encoder: bool = True
    freeze_embed_positions: bool = True


@dataclass(kw_only=True)
class LossConfig:
    """Weights of the objective. The paper prints 0.8 KL + 1.0 CE; its code, and so its checkpoints, have these.

    Args:
        cross_entropy: weight of the cross entropy on the labels.
        kl: weight of KL(teacher || student); 0 trains without a live teacher.
        temperature: of the KL term, which carries its square.
    """

    cross_entropy: float = 0.8
    kl: float = 1.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if min(self.cross_entropy, self.kl) < 0 or self.cross_entropy + self.kl == 0:
            raise ValueError(
                f"loss weights must be >= 0 and not both 0, got cross_entropy={self.cross_entropy}, kl={self.kl}"
            )


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


def loss_terms(
    model: nn.Module,
    teacher: WhisperForConditionalGeneration | None,
    batch: Batch,
    *,
    weights: LossConfig,
    log_mel: WhisperLogMel,
    shared_encoder: nn.Module | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed objective of a batch and its terms; section 3 of the paper.

    Teacher and student get the same `decoder_input_ids`. A shared encoder runs once, or not at all when the batch
    carries its states.
    """
    labels, decoder_input_ids = batch["labels"], batch["decoder_input_ids"]
    features = states = None
    if "encoder_states" in batch:
        states = batch["encoder_states"].float()
    else:
        features = log_mel(pcm16_to_float(batch["waveforms"]))
        if shared_encoder is not None:
            with torch.no_grad():
                states = shared_encoder(features).last_hidden_state
    inputs = {"input_features": features} if states is None else {"encoder_outputs": (states,)}
    student, head = decoder_states(model, **inputs, decoder_input_ids=decoder_input_ids)
    if teacher is None:
        loss = fused_linear_cross_entropy(student, head, labels, reduction="sum")
        return weights.cross_entropy * loss, {"cross_entropy": loss.detach()}
    if states is None:
        inputs = {"input_features": features.to(teacher.dtype)}
    else:
        inputs = {"encoder_outputs": (states.to(teacher.dtype),)}
    with torch.no_grad():
        teacher_states = decoder_states(teacher, **inputs, decoder_input_ids=decoder_input_ids)
    total, terms = fused_linear_distillation(
        student,
        head,
        *teacher_states,
        labels,
        label_weight=weights.cross_entropy,
        kd_weight=weights.kl,
        temperature=weights.temperature,
        reduction="sum",
    )
    return total, {"cross_entropy": terms["cross_entropy"], "kl": terms["divergence"]}


def count_items(batch: Batch) -> Tensor:
    """Scored tokens of a batch."""
    return (batch["labels"] >= 0).sum()


def build_models(
    config: DistilWhisperConfig,
) -> tuple[WhisperForConditionalGeneration, WhisperForConditionalGeneration | None, dict[str, Any] | None]:
    """Student, teacher (None without one) and the teacher's identity; a frozen encoder that both have is held once."""
    device = config.trainer.device
    teacher, identity = None, None
    if config.teacher is not None:
        teacher = load_whisper(config.teacher.name, dtype=config.teacher.dtype, device=device)
        identity = teacher_identity(config.teacher.name, teacher)
    if config.student.init_from is not None or teacher is None:
        student = load_whisper(str(config.student.init_from), device=device)
    else:
        student = student_from_teacher(
            teacher,
            decoder_layers=config.student.decoder_layers,
            encoder_layers=config.student.encoder_layers,
            decoder_layers_numbers=config.student.decoder_layers_numbers,
        )
    student.float()  # a large teacher may come in half precision, in which small updates are lost
    freeze_student(
        student, encoder=config.student.freeze_encoder, embed_positions=config.student.freeze_embed_positions
    )
    if teacher is not None:
        check_vocabularies(teacher, student)
        if config.student.freeze_encoder and encoders_equal(teacher, student):
            teacher.model.encoder = student.model.encoder
        elif config.teacher is not None and config.teacher.cache_encoder_states:
            raise ValueError(
                f"teacher.cache_encoder_states: the encoder of student.init_from={config.student.init_from} is not the "
                f"teacher's; set it to false"
            )
    return student, teacher, identity


def build_set(
    config: DistilWhisperConfig,
    split: Literal["train", "dev"],
    identity: dict[str, Any] | None,
    tokenizer: PreTrainedTokenizerBase,
    tokens: WhisperTokens,
) -> tuple[WhisperTrainSet, dict[str, Any]]:
    """The utterances of a split with their labels, and the report of the label filters."""
    manifest = read_utterances(str(config.data.train_manifest if split == "train" else config.data.dev_manifest))
    if config.data.labels_dir is None:
        labelled_set = reference_set(
            manifest,
            tokenizer,
            tokens,
            output_dir=str(Path(config.trainer.output_dir) / ("dev" if split == "dev" else "")),
            max_skipped_fraction=config.data.max_skipped_fraction,
            num_workers=config.data.num_workers,
        )
        return labelled_set, {}
    store = LabelStore(Path(config.data.labels_dir) / split)
    if identity is not None:
        check_teacher(store, identity)
    cached = config.teacher is not None and config.teacher.cache_encoder_states
    return pseudo_labelled_set(
        manifest,
        store,
        config.filters,
        cached_encoder_states=cached,
        max_skipped_fraction=config.data.max_skipped_fraction,
    )


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
    student, teacher, identity = build_models(config)
    processor = load_processor(config.teacher.name if config.teacher else str(config.student.init_from))
    tokens = WhisperTokens.from_tokenizer(
        processor.tokenizer, language=config.decoding.language, task=config.decoding.task
    )
    with config.trainer.main_process_first(desc="preparing the data"):
        train_set, filter_report = build_set(config, "train", identity, processor.tokenizer, tokens)
        dev_set = None
        if config.data.dev_manifest is not None:
            dev_set, _ = build_set(config, "dev", identity, processor.tokenizer, tokens)
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
