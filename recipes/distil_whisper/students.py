"""Teacher and student of a run, as its configuration asks for them."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import WhisperForConditionalGeneration

from speechkd.config import TeacherConfig
from speechkd.data.augment import SpecAugmentConfig
from speechkd.models.whisper import encoders_equal, freeze_student, resolve_layers, student_from_teacher
from speechkd.teachers import check_vocabularies, load_whisper, teacher_identity


@dataclass(kw_only=True)
class StudentConfig:
    """What the student keeps of the teacher.

    Args:
        init_from: start from this checkpoint, such as another student, instead of cutting layers out of the teacher.
        decoder_layers: number of decoder layers.
        encoder_layers: number of encoder layers; null keeps all, or as many as are listed.
        decoder_layers_numbers: which decoder layers, negative ones from the end; null spaces them evenly.
        encoder_layers_numbers: likewise of the encoder. One that lost layers should be trained: freeze_encoder=false.
        freeze_encoder: keep the encoder as it is; teacher and student then share it.
        freeze_decoder: keep the decoder as it is, but for the embedding, which is the output head too.
        freeze_embed_positions: keep the decoder's positions, so that contexts longer than the training labels work.
        spec_augment: masks on the log-mel that the student hears in training; the teacher hears it whole. Null for
            none.
    """

    init_from: str | None = None
    decoder_layers: int = 2
    encoder_layers: int | None = None
    decoder_layers_numbers: list[int] | None = None
    encoder_layers_numbers: list[int] | None = None
    freeze_encoder: bool = True
    freeze_decoder: bool = False
    freeze_embed_positions: bool = True
    spec_augment: SpecAugmentConfig | None = None

    def __post_init__(self) -> None:
        if self.spec_augment is not None and self.freeze_encoder:
            raise ValueError(
                "student.spec_augment masks what the student's encoder hears, and a frozen encoder is shared with the "
                "teacher, who must hear it whole; set student.freeze_encoder=false and "
                "teacher.cache_encoder_states=false, or student.spec_augment=null"
            )

    @property
    def keeps_whole_encoder(self) -> bool:
        """Whether no encoder layer is cut out."""
        return self.encoder_layers is None and self.encoder_layers_numbers is None


class Models(NamedTuple):
    """Student, live teacher, the teacher's identity, the decoder layers that the student was cut from, and a head.

    The teacher is None without one, and where its stored outputs stand for it. The layers are None for a student that
    starts from a checkpoint. The head is the weight of the teacher's, (vocabulary, dim), where its stored decoder
    states need it; the rest of the teacher is not held then.
    """

    student: WhisperForConditionalGeneration
    teacher: WhisperForConditionalGeneration | None
    identity: dict[str, Any] | None
    decoder_layers_kept: list[int] | None
    teacher_head: Tensor | None = None


def build_models(
    teacher_config: TeacherConfig | None,
    student_config: StudentConfig,
    device: torch.device,
    *,
    needs_hidden_states: bool = False,
) -> Models:
    """Load the teacher, make the student and freeze what stays; a frozen encoder that both have is held once.

    Args:
        teacher_config: null fine-tunes `init_from` alone.
        student_config: what the student keeps.
        device: of the training.
        needs_hidden_states: the loss compares hidden states, so both must have one width.

    Raises:
        ValueError: a model is not found, layers do not exist, or a student from a checkpoint does not fit the teacher.
    """
    teacher, identity, kept = None, None, None
    if teacher_config is not None:
        # a teacher whose outputs are stored only has to give its layers, and its identity, which covers the dtype
        dtype = teacher_config.dtype or (None if device.type == "cpu" else "auto")
        teacher_device = device if teacher_config.stored_outputs is None else torch.device("cpu")
        teacher = load_whisper(teacher_config.name, dtype=dtype, device=teacher_device)
        identity = teacher_identity(teacher_config.name, teacher)
    if student_config.init_from is not None or teacher is None:
        student = load_whisper(str(student_config.init_from), device=device)
    else:
        layers = student_config.decoder_layers, student_config.decoder_layers_numbers
        kept = resolve_layers(teacher.config.decoder_layers, *layers)
        student = student_from_teacher(
            teacher,
            decoder_layers=student_config.decoder_layers,
            encoder_layers=student_config.encoder_layers,
            decoder_layers_numbers=student_config.decoder_layers_numbers,
            encoder_layers_numbers=student_config.encoder_layers_numbers,
        ).to(device)
    student.float()  # a large teacher may come in half precision, in which small updates are lost
    freeze_student(
        student,
        encoder=student_config.freeze_encoder,
        decoder=student_config.freeze_decoder,
        embed_positions=student_config.freeze_embed_positions,
    )
    if teacher is None or teacher_config is None:
        return Models(student, None, identity, kept)
    _check_pair(teacher, student, teacher_config, student_config, needs_hidden_states)
    if teacher_config.stored_outputs is not None:
        head = None
        if teacher_config.stored_outputs == "decoder_states":  # not the student's head, a copy which is trained
            head = teacher.get_output_embeddings().weight.detach().to(device)
        return Models(student, None, identity, kept, head)
    if student_config.freeze_encoder and encoders_equal(teacher, student):
        teacher.model.encoder = student.model.encoder
    return Models(student, teacher, identity, kept)


def _check_pair(
    teacher: WhisperForConditionalGeneration,
    student: WhisperForConditionalGeneration,
    teacher_config: TeacherConfig,
    student_config: StudentConfig,
    needs_hidden_states: bool,
) -> None:
    """Refuse a student from a checkpoint that cannot learn from this teacher in the way that is asked for.

    Raises:
        ValueError: vocabularies, mel bins, widths, depths or encoders differ.
    """
    check_vocabularies(teacher, student)
    ours, theirs = student.config, teacher.config
    source = f"student.init_from={student_config.init_from}"
    if ours.num_mel_bins != theirs.num_mel_bins:
        raise ValueError(
            f"the teacher hears {theirs.num_mel_bins} mel bins and {source} {ours.num_mel_bins}; take a student made "
            "from a teacher with as many"
        )
    if needs_hidden_states and (ours.d_model != theirs.d_model or ours.decoder_layers > theirs.decoder_layers):
        raise ValueError(
            f"loss.hidden_mse compares layers of one width: the teacher has {theirs.decoder_layers} decoder layers of "
            f"width {theirs.d_model}, {source} has {ours.decoder_layers} of width {ours.d_model}; set it to 0, or "
            "start from a student of this teacher"
        )
    if teacher_config.cache_encoder_states and not encoders_equal(teacher, student):
        widths = f" (widths {ours.d_model} and {theirs.d_model})" if ours.d_model != theirs.d_model else ""
        raise ValueError(
            f"teacher.cache_encoder_states: the encoder of {source} is not the teacher's{widths}; set it to false"
        )
