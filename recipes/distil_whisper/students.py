"""Teacher and student of a run, as its configuration asks for them."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import WhisperForConditionalGeneration

from speechkd.config import TeacherConfig
from speechkd.models.whisper import encoders_equal, freeze_student, student_from_teacher
from speechkd.teachers import check_vocabularies, load_whisper, teacher_identity


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


def build_models(
    teacher_config: TeacherConfig | None, student_config: StudentConfig, device: torch.device
) -> tuple[WhisperForConditionalGeneration, WhisperForConditionalGeneration | None, dict[str, Any] | None]:
    """Student, teacher (None without one) and the teacher's identity; a frozen encoder that both have is held once."""
    teacher, identity = None, None
    if teacher_config is not None:
        teacher = load_whisper(teacher_config.name, dtype=teacher_config.dtype, device=device)
        identity = teacher_identity(teacher_config.name, teacher)
    if student_config.init_from is not None or teacher is None:
        student = load_whisper(str(student_config.init_from), device=device)
    else:
        student = student_from_teacher(
            teacher,
            decoder_layers=student_config.decoder_layers,
            encoder_layers=student_config.encoder_layers,
            decoder_layers_numbers=student_config.decoder_layers_numbers,
        )
    student.float()  # a large teacher may come in half precision, in which small updates are lost
    freeze_student(
        student, encoder=student_config.freeze_encoder, embed_positions=student_config.freeze_embed_positions
    )
    if teacher is not None:
        check_vocabularies(teacher, student)
        if student_config.freeze_encoder and encoders_equal(teacher, student):
            teacher.model.encoder = student.model.encoder
        elif teacher_config is not None and teacher_config.cache_encoder_states:
            raise ValueError(
                f"teacher.cache_encoder_states: the encoder of student.init_from={student_config.init_from} is not the "
                f"teacher's; set it to false"
            )
    return student, teacher, identity
