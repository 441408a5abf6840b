"""Configuration of LLaVA-KD's runs, and what its scripts derive from it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import LlavaForConditionalGeneration, LlavaProcessor
from visual_objective import LossConfig
from visual_students import StudentConfig

from speechkd.data.visual_sequences import SequenceFormat
from speechkd.models.llava import Part, check_pair, load_llava, num_visual_tokens
from speechkd.teachers import freeze, teacher_identity
from speechkd.trainer import DistillationArguments


@dataclass(kw_only=True)
class TeacherConfig:
    """The model to distil.

    Args:
        name: a LLaVA: Hub id or folder.
        stored: read its states from `data.labels_dir` instead of running it; `store_states.py` writes them.
    """

    name: str
    stored: bool = False


@dataclass(kw_only=True)
class DataConfig:
    """Conversations and batches.

    Args:
        train_manifest: what a stage trains on that names no other.
        test_manifest: what the student is scored on.
        comp_manifest: a second one to score on, of what training never had; null for none.
        labels_dir: folder of the teacher's stored states, one store for each manifest; null for none.
        prompt: a question's text, with {question}; the answer follows.
        independent: questions of a picture see the picture and themselves alone; false for dialogues.
        max_tokens: longest sequence.
        batch_size: conversations per device and step.
        in_memory: keep decoded pictures, for small ones.
        num_workers: processes that prepare batches.
    """

    train_manifest: str
    test_manifest: str
    comp_manifest: str | None = None
    labels_dir: str | None = None
    prompt: str = "{question}"
    independent: bool = False
    max_tokens: int = 2048
    batch_size: int = 32
    in_memory: bool = False
    num_workers: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"data.batch_size must be 1 or more, got {self.batch_size}")


@dataclass(kw_only=True)
class StageConfig:
    """One stage.

    Args:
        name: of its folder in the run folder.
        train: parts that learn: vision, projector, decoder.
        max_steps: its length.
        learning_rate: its highest.
        train_manifest: what it trains on; null for `data.train_manifest`.
        loss: its objective.
    """

    name: str
    train: list[Part]
    max_steps: int
    learning_rate: float
    train_manifest: str | None = None
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        if not self.name.replace("_", "").isalnum() or self.name == "student":
            raise ValueError(f"stage name {self.name!r} must be letters, digits and _, and not 'student'")
        if self.max_steps < 1:
            raise ValueError(f"stage {self.name} has max_steps={self.max_steps}; leave out a stage that is not wanted")


@dataclass(kw_only=True)
class LlavaKdConfig:
    """Distil a multimodal language model into a smaller one, in stages.

    Args:
        teacher: the large one; null trains on the answers alone, as for a teacher.
        data: conversations.
        student: the small one.
        stages: what happens to it, in this order.
        trainer: arguments of transformers' Trainer; `max_steps` and `learning_rate` are the stages'.
    """

    teacher: TeacherConfig | None = None
    data: DataConfig
    student: StudentConfig
    stages: list[StageConfig]
    trainer: DistillationArguments

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"stages must be one or more with different names, got {names}")
        for stage in self.stages:
            if stage.loss.needs_teacher and self.teacher is None:
                raise ValueError(f"stage {stage.name} has the loss {stage.loss.describe()}, which needs a teacher")
            if stage.loss.relation_source == "projector" and self.teacher is not None and self.teacher.stored:
                raise ValueError(
                    f"stage {stage.name} has relation_source=projector, which is not stored; set teacher.stored=false"
                )
        if self.teacher is not None and self.teacher.stored and self.data.labels_dir is None:
            raise ValueError("teacher.stored=true needs data.labels_dir")
        self.trainer.follow_data(self.data.num_workers, None)

    def manifest_of(self, stage: StageConfig) -> str:
        return stage.train_manifest or self.data.train_manifest

    def store_of(self, stage: StageConfig) -> Path:
        """Folder of the teacher's states for what a stage trains on."""
        return Path(str(self.data.labels_dir)) / Path(self.manifest_of(stage)).stem


def sequence_format(
    config: LlavaKdConfig, model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> SequenceFormat:
    """How a run's conversations become sequences."""
    return SequenceFormat(
        processor=processor,
        num_visual_tokens=num_visual_tokens(model),
        prompt=config.data.prompt,
        independent=config.data.independent,
        max_tokens=config.data.max_tokens,
    )


def load_teacher(
    config: LlavaKdConfig, student: LlavaForConditionalGeneration
) -> tuple[LlavaForConditionalGeneration, dict[str, Any]]:
    """The frozen teacher and its identity.

    Raises:
        ValueError: it cannot be loaded, or its logits cannot be compared with the student's.
    """
    assert config.teacher is not None
    teacher, _ = load_llava(config.teacher.name)
    check_pair(student, teacher)
    return freeze(teacher), teacher_identity(config.teacher.name, teacher)
