"""SEGUE: a speech encoder learns to give the vectors that a sentence encoder has for what is said.

Tan et al. 2023, https://arxiv.org/abs/2305.12301. Launch: python recipes/segue/train.py --config FILE
[--section.key value ...], under torchrun or accelerate too. A killed run carries on from its last checkpoint.
"""

import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from embedding_objective import LossConfig, count_items, loss_terms
from sentence_corpora import DataConfig, SentenceSet, build_set, collate_sentences
from transformers import set_seed
from understanding_tasks import UnderstandingConfig

from speechkd.cli import run_command
from speechkd.config import parse_config
from speechkd.data.sampler import DurationBatchSampler
from speechkd.files import atomic_folder, write_json
from speechkd.labels.decoding import DecodingConfig
from speechkd.labels.filters import FilterConfig
from speechkd.model_card import card_head, data_section, licence_section, teacher_section, training_section
from speechkd.models.segue import SegueEncoder
from speechkd.models.speech_embedder import load_segue
from speechkd.run_folder import training_facts, training_run
from speechkd.teachers_text import Pooling, SentenceTeacher, load_sentence_teacher
from speechkd.trainer import DistillationArguments, DistillationTrainer

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TeacherConfig:
    """The sentence encoder whose vectors are learnt.

    Args:
        name: a sentence-transformers model: Hub id, folder or `bundled:minilm-l6`.
        pooling: mean over all tokens; compat_gather is what the paper's public code computes instead.
        normalize: scale its vectors to length 1; the paper does not.
        embeddings_dir: folder of the label stores `train`, `dev` and `test` with its vectors, which the embed stage
            writes; null runs the teacher in every step.
        license: licence of the student's weights, for its model card.
    """

    name: str
    pooling: Pooling = "mean"
    normalize: bool = False
    embeddings_dir: str | None = None
    license: str | None = None


@dataclass(kw_only=True)
class StudentConfig:
    """The speech encoder that learns.

    Args:
        name: wav2vec 2.0, HuBERT, WavLM, data2vec-audio or Whisper, whose encoder is taken, or a student of this
            recipe: Hub id, folder or `bundled:<name>`.
        num_layers: keep only this many of its first layers; null keeps all.
        num_frozen_layers: lower layers, and all before them, that do not learn.
        grid_seconds: a Whisper hears each clip rounded up to a multiple of this; null is 30 s, as it was trained.
        lower_states_dir: folder of the label stores `train` and `dev` with the states after the frozen layers, which
            the embed stage writes; null runs these layers in every step.
    """

    name: str
    num_layers: int | None = None
    num_frozen_layers: int = 0
    grid_seconds: float | None = None
    lower_states_dir: str | None = None

    def __post_init__(self) -> None:
        if self.lower_states_dir is not None and self.num_frozen_layers < 1:
            raise ValueError(
                f"student.lower_states_dir={self.lower_states_dir} keeps the states of frozen layers, but "
                "student.num_frozen_layers=0; freeze 1 or more, or set the folder to null"
            )


@dataclass(kw_only=True)
class SegueConfig:
    """Distil a sentence encoder into a speech encoder, then ask the student what it understands.

    Args:
        teacher: the sentence encoder.
        data: manifests, where the texts come from, and batches.
        student: the speech encoder.
        loss: what pulls their vectors together.
        decoding: how `data.label_teacher` transcribes.
        filters: which of its transcripts are trained on.
        understanding: tasks on the student's vectors; null for none.
        trainer: arguments of transformers' Trainer.
    """

    teacher: TeacherConfig
    data: DataConfig
    student: StudentConfig
    loss: LossConfig = field(default_factory=LossConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    understanding: UnderstandingConfig | None = None
    trainer: DistillationArguments

    def __post_init__(self) -> None:
        self.trainer.follow_data(self.data.num_workers, self.data.dev_manifest)


def load_teacher(config: SegueConfig) -> SentenceTeacher:
    """The sentence encoder on the device of the run."""
    return load_sentence_teacher(
        config.teacher.name,
        pooling=config.teacher.pooling,
        normalize=config.teacher.normalize,
        device=config.trainer.device,
    )


def load_student(config: StudentConfig, embedding_dim: int | None) -> SegueEncoder:
    """The speech encoder with vectors of this width; None is its own."""
    return load_segue(
        config.name,
        embedding_dim=embedding_dim,
        num_layers=config.num_layers,
        num_frozen_layers=config.num_frozen_layers,
        grid_seconds=config.grid_seconds,
    )


def describe_run(
    config: SegueConfig,
    teacher: SentenceTeacher,
    student: SegueEncoder,
    train_set: SentenceSet,
    report: dict[str, Any],
) -> dict[str, Any]:
    """Facts of the training for `run.json`, the model card and the tables."""
    return {
        "title": f"segue {Path(config.trainer.output_dir).name}",
        "teacher": teacher.identity,
        "teacher_outputs": "live" if config.teacher.embeddings_dir is None else "stored",
        "pooling": teacher.pooling,
        "normalize": teacher.normalize,
        "encoder": config.student.name,
        "encoder_layers": student.num_layers,
        "frozen_layers": student.num_frozen_layers,
        "lower_states": "live" if config.student.lower_states_dir is None else "stored",
        "grid_seconds": student.grid_seconds,
        "embedding_dim": student.embedding_dim,
        "has_projection": student.projection is not None,
        "parameters": student.num_parameters(),
        "trainable_parameters": student.num_parameters(only_trainable=True),
        "texts": f"transcripts of {config.data.label_teacher}" if config.data.labels_dir else "the manifest's text",
        "left_out": report,
        **training_facts(
            config.trainer,
            license=config.teacher.license,
            train_manifest=config.data.train_manifest,
            train_utterances=len(train_set),
            train_seconds=float(train_set.manifest.durations_seconds.sum()),
            loss=config.loss.describe(),
        ),
    }


def model_card(run: dict[str, Any], scores: dict[str, Any] | None = None) -> str:
    """Model card of a SEGUE student.

    Args:
        run: facts of the training, of `run.json`.
        scores: of retrieval on the test manifest; None before evaluation.
    """
    lines = [
        *card_head(run, "feature-extraction", "sentence-similarity, speech"),
        f"A speech encoder of {run['encoder_layers']} layers, {run['parameters'] / 1e6:.1f} M parameters. The mean of "
        f"its last hidden states over the frames of a clip{', after a linear map,' if run['has_projection'] else ''} "
        f"is the vector, {run['embedding_dim']} wide, that {run['teacher']['name']} has for what is said. Made from "
        f"{run['encoder']} by speechkd {run['speechkd_version']}.",
        "",
        "`pooling.json` says how to pool. With speechkd: "
        "`SpeechEmbedder.from_pretrained(folder).encode(list_of_waveforms)`.",
        "",
        *teacher_section(
            run,
            f"; {run['pooling']} over its tokens, {'scaled to length 1' if run['normalize'] else 'not normalised'}. "
            "Its vectors were "
            f"{'stored before the training' if run['teacher_outputs'] == 'stored' else 'computed in each step'}.",
        ),
        *data_section(run, f". Texts: {run['texts']}."),
        *training_section(run, more=f"{run['frozen_layers']} lower layers frozen, "),
    ]
    if scores is not None:
        lines += [
            "## Evaluation",
            "",
            f"{scores['num_clips']} clips of {scores['manifest']} and their {scores['num_texts']} different texts: "
            f"{100 * scores['top1']:.1f} % of the clips find their own text first, by cosine; mean cosine with it "
            f"{scores['positive_cosine']:.3f}.",
            "",
        ]
    lines += licence_section(run, "That of the encoder, of the teacher and of the data.")
    return "\n".join(lines)


def save_student(student: SegueEncoder, run: dict[str, Any], output_dir: Path) -> None:
    """Write the encoder, its pooling note and its card; the folder is complete or absent."""
    with atomic_folder(output_dir, replace=True) as temporary:
        student.save_encoder(temporary, teacher=run["teacher"])
        (temporary / "README.md").write_text(model_card(run), encoding="utf-8")


def build_trainer(config: SegueConfig) -> tuple[DistillationTrainer, dict[str, Any]]:
    """Everything of a run before its first step: the trainer, and the facts for `run.json`."""
    set_seed(config.trainer.seed)
    teacher = load_teacher(config)
    student = load_student(config.student, teacher.dim).to(config.trainer.device)
    build = partial(
        build_set,
        data=config.data,
        filters=config.filters,
        student=student,
        student_name=config.student.name,
        teacher=teacher,
        embeddings_dir=config.teacher.embeddings_dir,
        states_dir=config.student.lower_states_dir,
        output_dir=Path(config.trainer.output_dir),
    )
    with config.trainer.main_process_first(desc="preparing the data"):
        train_set, report = build("train")
        dev_set = None if config.data.dev_manifest is None else build("dev")[0]
    limits = {"max_batch_seconds": config.data.max_batch_seconds, "max_batch_size": config.data.max_batch_size}
    trainer = DistillationTrainer(
        student,
        teacher if config.teacher.embeddings_dir is None else None,
        args=config.trainer,
        train_dataset=train_set,
        collate=collate_sentences,
        sampler=DurationBatchSampler(
            train_set.heard_seconds,
            **limits,
            seed=config.trainer.seed,
            rank=config.trainer.process_index,
            world_size=config.trainer.world_size,
        ),
        loss_terms=partial(loss_terms, weights=config.loss),
        count_items=count_items,
        eval_dataset=dev_set,
        eval_sampler=None if dev_set is None else DurationBatchSampler(dev_set.heard_seconds, **limits),
    )
    return trainer, describe_run(config, teacher, student, train_set, report)


def main(argv: list[str] | None = None) -> None:
    config, resolved_yaml = parse_config(SegueConfig, argv)
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
