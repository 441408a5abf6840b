"""Heads of a student that is yet to be trained, fitted on frames of the first clips of a drawn order."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from encoder_objective import SharedFrames, live_or_stored
from torch import Tensor
from transformers import PreTrainedModel

from speechkd.data.audio import pcm16_to_float
from speechkd.data.encoder_clips import ClipSet, JoinedClips, collate_clips
from speechkd.losses.layerwise import normalize_frames
from speechkd.models.distilhubert import CompactStudent
from speechkd.models.head_start import start_heads
from speechkd.trainer import Batch

MAX_FRAMES, BATCH_CLIPS = 20_000, 4


def start_student_heads(
    student: CompactStudent,
    teacher: PreTrainedModel | None,
    clips: ClipSet | JoinedClips,
    *,
    frames: SharedFrames,
    layers: Sequence[int],
    normalize_targets: bool,
    seed: int,
    device: torch.device,
) -> None:
    """Set the heads to least squares, the same on all processes; see `start_heads`.

    Args:
        student: moves to the device.
        teacher: moves too; None where the clips have its states.
        clips: to train on.
        frames: of both.
        layers: of the teacher.
        normalize_targets: as in the objective.
        seed: of the order in which clips are taken.
        device: where both run.
    """
    for model in (student, teacher):
        if model is not None:
            model.to(device)  # type: ignore[arg-type]
    order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(seed)).tolist()

    def batches() -> Iterator[Batch]:
        for start in range(0, len(order), BATCH_CLIPS):
            items: list[dict[str, Any]] = [clips[index] for index in order[start : start + BATCH_CLIPS]]
            batch = collate_clips(items, window=student.inputs.window)
            yield {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    states, targets = frames_to_fit(student, teacher, batches(), frames=frames, layers=layers)
    heads: Any = student.heads
    start_heads(heads, states, normalize_frames(targets) if normalize_targets else targets)


@torch.no_grad()
def frames_to_fit(
    model: CompactStudent,
    teacher: PreTrainedModel | None,
    batches: Iterable[Batch],
    *,
    frames: SharedFrames,
    layers: Sequence[int],
    max_frames: int = MAX_FRAMES,
) -> tuple[Tensor, Tensor]:
    """The student's last states and the teacher's layers on real frames, for `start_heads`.

    Args:
        model: the student as it starts; in eval mode meanwhile.
        teacher: see `loss_terms`.
        batches: of `collate_clips`, on the model's device.
        frames: of both.
        layers: of the teacher.
        max_frames: to stop at.

    Returns:
        (frames, student_dim) and (frames, layers, teacher_dim), float32.
    """
    ours, theirs, count = [], [], 0
    was_training = model.training
    model.eval()
    for batch in batches:
        num_samples = torch.tensor(batch["num_samples"])
        inputs = model.inputs(pcm16_to_float(batch["waveforms"]), num_samples)
        targets = live_or_stored(teacher, inputs, batch, layers, False)
        states, targets, inside = frames.align(model.states(inputs)[-1][:, None], targets, num_samples)
        ours.append(states[:, 0][inside].float())
        theirs.append(targets.transpose(1, 2)[inside].float())
        count += len(ours[-1])
        if count >= max_frames:
            break
    model.train(was_training)
    return torch.cat(ours), torch.cat(theirs)
