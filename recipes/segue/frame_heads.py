"""Strings out of SEGUE's frames by CTC: the letters of a text, or slots with the letters of their values."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from heads import Machine, TargetClips, shortest_clip, train_model
from sentence_corpora import lengthened
from torch import Tensor, nn
from transformers import PreTrainedModel
from understanding_tasks import TEXT, Labels, Mode, UnderstandingConfig

from speechkd.data.features import SAMPLE_RATE_HZ
from speechkd.data.loader import clip_batches
from speechkd.data.manifest import Manifest
from speechkd.labels.teacher_cache import LabelStore
from speechkd.models.ctc_head import (
    SegueForCTC,
    ctc_alphabet,
    ctc_greedy,
    ctc_loss,
    encode_symbols,
    entities_of,
    entity_symbols,
    frames_needed,
)
from speechkd.models.segue import SegueEncoder

logger = logging.getLogger(__name__)


def string_of(config: UnderstandingConfig, labels: Labels) -> list[str]:
    """Symbols that CTC learns for one utterance."""
    return list(labels[TEXT]) if config.task == "asr" else entity_symbols(labels)


def labels_of(config: UnderstandingConfig, symbols: Sequence[str]) -> Labels:
    """What symbols say; the inverse of `string_of`."""
    return {TEXT: "".join(symbols)} if config.task == "asr" else entities_of(symbols)


def loss_terms(
    model: nn.Module, teacher: PreTrainedModel | None, batch: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """CTC loss, summed over clips."""
    logits, num_frames = model(batch.get("waveforms"), batch["num_samples"], batch.get("states"))
    loss = ctc_loss(logits, num_frames, [target.cpu() for target in batch["targets"]])
    return loss, {"ctc": loss.detach()}


def fit_ctc(
    student: SegueEncoder,
    manifest: Manifest,
    labels: Sequence[Labels],
    config: UnderstandingConfig,
    mode: Mode,
    *,
    output_dir: str | Path,
    seed: int,
    machine: Machine,
    states: LabelStore | None = None,
) -> tuple[SegueForCTC, list[str]]:
    """Train a CTC head, alone or with its encoder.

    Args:
        student: learns in place with fine_tune, but for its frozen layers; with frozen it stays.
        manifest: the utterances to learn from.
        labels: of each.
        config: steps, learning rate and batches.
        mode: "frozen" or "fine_tune".
        output_dir: folder of `train_log.jsonl`.
        seed: of first weights, shuffling and dropout.
        machine: where, and in which precision.
        states: label store with the states of the student's frozen layers; None runs them.

    Returns:
        The trained model, in eval mode, and its alphabet.

    Raises:
        ValueError: no utterance has a symbol, or none has the frames that its string needs.
    """
    strings = [string_of(config, row) for row in labels]
    alphabet = ctc_alphabet(strings)
    is_frozen = mode == "frozen"
    if is_frozen:
        student.freeze()
    model = SegueForCTC(student, len(alphabet), seed=seed)
    targets = encode_symbols(strings, alphabet)
    fitting = _positions_that_fit(student, manifest, targets)
    train_model(
        model,
        TargetClips(
            manifest.select(fitting),
            [targets[position] for position in fitting],
            min_samples=shortest_clip(student),
            states=states,
        ),
        loss_terms,
        num_steps=config.head_steps if is_frozen else config.fine_tune_steps,
        learning_rate=config.head_learning_rate if is_frozen else config.fine_tune_learning_rate,
        max_batch_seconds=config.fine_tune_batch_seconds,
        output_dir=output_dir,
        seed=seed,
        machine=machine,
    )
    return model.eval(), alphabet


def _positions_that_fit(student: SegueEncoder, manifest: Manifest, targets: Sequence[Tensor]) -> list[int]:
    """Clips with the frames that their strings need; a warning counts the others."""
    num_samples = torch.tensor([round(seconds * SAMPLE_RATE_HZ) for seconds in manifest.durations_seconds])
    num_frames = student.num_frames(num_samples.clamp(min=shortest_clip(student))).tolist()
    fitting = [i for i, target in enumerate(targets) if frames_needed(target) <= num_frames[i]]
    if not fitting:
        raise ValueError(
            f"none of {len(targets)} clips of {manifest.path} has as many frames as its string has symbols; check "
            "durations and texts"
        )
    if len(fitting) < len(targets):
        first = next(i for i in range(len(targets)) if i not in set(fitting))
        logger.warning(
            "%d of %d clips have fewer frames than their strings have symbols and are not learnt from; first: %r with "
            "%d frames for %d symbols",
            len(targets) - len(fitting),
            len(targets),
            manifest.ids[first],
            num_frames[first],
            len(targets[first]),
        )
    return fitting


@torch.no_grad()
def read_strings(
    model: SegueForCTC, alphabet: Sequence[str], manifest: Manifest, config: UnderstandingConfig
) -> list[Labels]:
    """What the model hears in each clip, in the manifest's order; clips run one by one, as some encoders hear padding.

    Raises:
        ValueError: a clip cannot be decoded.
    """
    said: list[Labels] = []
    for batch in clip_batches(manifest, range(len(manifest)), sample_rate_hz=SAMPLE_RATE_HZ, batch_size=1):
        if batch.skipped:
            raise ValueError(f"{batch.skipped[0]['reason']}; leave this clip out")
        clip = lengthened(batch.waveforms[0], shortest_clip(model.encoder))[None].to(model.device)
        logits, num_frames = model(clip, torch.tensor([clip.shape[1]]))
        said.append(labels_of(config, ctc_greedy(logits, num_frames, alphabet)[0]))
    return said
