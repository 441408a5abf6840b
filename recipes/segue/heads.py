"""Heads on SEGUE's encoder: fitted to the vectors of one that does not learn, or trained together with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sentence_corpora import MIN_SAMPLES, lengthened
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedModel
from understanding_tasks import Labels, UnderstandingConfig

from speechkd.arguments import DistillationArguments
from speechkd.data.audio import load_utterance
from speechkd.data.features import SAMPLE_RATE_HZ
from speechkd.data.loader import clip_batches, length_sorted, pad_waveforms
from speechkd.data.manifest import Manifest
from speechkd.data.sampler import DurationBatchSampler
from speechkd.labels.embeddings import read_lower_states
from speechkd.labels.teacher_cache import LabelStore
from speechkd.models.probes import linear_heads, predict_classes, ridge_probe, softmax_probe
from speechkd.models.segue import SegueEncoder
from speechkd.models.speech_embedder import SpeechEmbedder
from speechkd.models.understanding import Kind, SegueForUnderstanding, understanding_loss
from speechkd.trainer import DistillationTrainer, LossTerms

ENCODE_BATCH = 16


@dataclass(frozen=True)
class Machine:
    """Where encoders learn with their heads, as the `trainer` and `data` sections say it.

    Args:
        use_cpu: stay on the CPU.
        bf16: compute in bfloat16 where it is safe.
        num_workers: processes that prepare batches.
    """

    use_cpu: bool = False
    bf16: bool = False
    num_workers: int = 0


def speech_vectors(student: SegueEncoder, manifest: Manifest) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Vectors of a manifest's clips by id, each (embedding_dim,), on the CPU; rows of the clips that were skipped.

    The encoder runs in eval mode and is left as it was. Clips are lengthened and cut as when SEGUE was trained.
    """
    was_training, min_samples = student.training, shortest_clip(student)
    embedder = SpeechEmbedder(student)
    vectors: dict[str, Tensor] = {}
    skipped: list[dict[str, Any]] = []
    order = length_sorted(manifest, range(len(manifest)))
    for batch in clip_batches(manifest, order, sample_rate_hz=SAMPLE_RATE_HZ, batch_size=ENCODE_BATCH):
        skipped += batch.skipped
        lengths = [round(row["duration_seconds"] * SAMPLE_RATE_HZ) for row in batch.utterances]
        clips = [lengthened(clip[:length], min_samples) for clip, length in zip(batch.waveforms, lengths, strict=True)]
        encoded = torch.from_numpy(embedder.encode(clips, batch_size=ENCODE_BATCH))
        vectors |= {row["id"]: vector for row, vector in zip(batch.utterances, encoded, strict=True)}
    student.train(was_training)
    return vectors, skipped


def shortest_clip(student: SegueEncoder) -> int:
    """Samples that shorter clips are lengthened to with silence; Whisper pads by itself."""
    return 1 if student.is_whisper else MIN_SAMPLES


def fit_heads(
    vectors: Tensor, targets: Tensor, num_classes: Sequence[int], config: UnderstandingConfig, seed: int
) -> nn.ModuleList:
    """Softmax heads, fitted by gradient descent; see `softmax_probe`.

    Encoders differ a hundredfold in the spread of their vectors. So that one learning rate suits all of them, vectors
    are centred and divided by one number, both from the items to learn from; the heads that come back take them as
    they are, and each is one linear map as in the paper.

    Args:
        vectors: (items, dim), float32.
        targets: (items, labels), int64.
        num_classes: of each label.
        config: steps and learning rate.
        seed: of the first weights.
    """
    centre, spread = _centre_and_spread(vectors)
    heads = softmax_probe(
        (vectors - centre) / spread,
        targets,
        num_classes,
        num_steps=config.head_steps,
        learning_rate=config.head_learning_rate,
        seed=seed,
    )
    return _for_raw_vectors(heads, centre, spread)


def fit_ridge(vectors: Tensor, targets: Tensor, num_classes: Sequence[int], alpha: float) -> nn.ModuleList:
    """Heads in closed form, on vectors scaled as in `fit_heads`: a value each, or 1 for the right class and 0 else.

    Args:
        vectors: (items, dim), float32.
        targets: classes (items, labels), int64, or values (items, 1), float32.
        num_classes: of each label; none for values.
        alpha: weight of the penalty.
    """
    centre, spread = _centre_and_spread(vectors)
    scaled = (vectors - centre) / spread
    if not num_classes:
        return _for_raw_vectors(nn.ModuleList([ridge_probe(scaled, targets, alpha)]), centre, spread)
    one_hot = [F.one_hot(targets[:, label], count).float() for label, count in enumerate(num_classes)]
    heads = nn.ModuleList(ridge_probe(scaled, columns, alpha) for columns in one_hot)
    return _for_raw_vectors(heads, centre, spread)


def predicted_labels(heads: nn.ModuleList, vectors: Tensor, classes: Mapping[str, Sequence[str]]) -> list[Labels]:
    """What the heads say of each vector: the likeliest class of each label, or its value.

    Args:
        heads: in the order of the labels.
        vectors: (items, dim).
        classes: label to classes, as of `label_classes`.
    """
    if not any(classes.values()):
        (name,) = classes
        with torch.no_grad():
            return [{name: repr(value)} for value in heads[0](vectors)[:, 0].tolist()]
    numbers = predict_classes(heads, vectors).tolist()
    named = list(classes.items())
    return [{name: values[index] for (name, values), index in zip(named, row, strict=True)} for row in numbers]


class TargetClips(Dataset):
    """Items are dicts with `id`, `duration_seconds`, `target`, and `waveform` or `states`.

    Args:
        manifest: the utterances.
        targets: of each, (items, labels), or tensors of any lengths.
        min_samples: shorter clips get silence on both sides.
        states: label store with the states of the encoder's frozen layers; None decodes the audio.

    Raises:
        ValueError: utterances and targets differ in number.
    """

    def __init__(
        self,
        manifest: Manifest,
        targets: Tensor | Sequence[Tensor],
        *,
        min_samples: int = 1,
        states: LabelStore | None = None,
    ) -> None:
        if len(manifest) != len(targets):
            raise ValueError(
                f"{len(manifest)} utterances and {len(targets)} targets differ in number; give one for each"
            )
        self.manifest, self.targets, self.min_samples, self.states = manifest, targets, min_samples, states
        self.num_samples = {} if states is None else {row["id"]: row["num_samples"] for row in states.rows()}

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int) -> dict[str, Any]:
        utterance = self.manifest[index]
        item = {"id": utterance["id"], "duration_seconds": utterance["duration_seconds"]}
        item["target"] = self.targets[index]
        if self.states is None:
            return {**item, "waveform": lengthened(load_utterance(utterance, SAMPLE_RATE_HZ), self.min_samples)}
        states = read_lower_states(self.states, utterance["id"])
        return {**item, "states": states, "num_samples": self.num_samples[utterance["id"]]}


def collate_targets(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch: `ids`, the list `targets`, `num_samples` (batch,), and `waveforms` or `states`, padded."""
    longest = max(item["duration_seconds"] for item in items)
    batch = {
        "ids": [item["id"] for item in items],
        "targets": [item["target"] for item in items],
        "audio_seconds": sum(item["duration_seconds"] for item in items),
        "padded_seconds": longest * len(items),
    }
    if "states" in items[0]:
        states = pad_sequence([item["states"] for item in items], batch_first=True)
        return {**batch, "states": states, "num_samples": torch.tensor([item["num_samples"] for item in items])}
    waveforms, num_samples = pad_waveforms([item["waveform"] for item in items])
    return {**batch, "waveforms": waveforms, "num_samples": num_samples}


def loss_terms(
    model: nn.Module, teacher: PreTrainedModel | None, batch: dict[str, Any], *, names: Sequence[str], kind: Kind
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum over labels and clips, and each label's part."""
    outputs = model(batch.get("waveforms"), batch["num_samples"], batch.get("states"))
    targets = torch.stack(batch["targets"])
    if kind == "values":
        loss = understanding_loss(outputs, targets, kind)
        return loss, {names[0]: loss}
    terms = {
        name: understanding_loss([scores], targets[:, i, None])
        for i, (name, scores) in enumerate(zip(names, outputs, strict=True))
    }
    return torch.stack(list(terms.values())).sum(), terms


def count_clips(batch: dict[str, Any]) -> Tensor:
    """Clips of a batch, 0-dim, int64."""
    return torch.tensor(len(batch["ids"]))


def fine_tune(
    student: SegueEncoder,
    heads: nn.ModuleList | None,
    manifest: Manifest,
    targets: Tensor,
    classes: Mapping[str, Sequence[str]],
    config: UnderstandingConfig,
    *,
    output_dir: str | Path,
    seed: int,
    machine: Machine,
    states: LabelStore | None = None,
) -> SegueForUnderstanding:
    """Train an encoder and its heads together; see `train_model`.

    Args:
        student: learns in place, but for its frozen layers.
        heads: where they begin, learning in place too; None begins at random, as the paper does.
        manifest: the utterances to learn from.
        targets: of each, (items, labels).
        classes: label to classes.
        config: steps, learning rate and batches.
        output_dir: folder of `train_log.jsonl`.
        seed: of first weights, shuffling and dropout.
        machine: where, and in which precision.
        states: label store with the states of the student's frozen layers; None runs them.

    Returns:
        The trained model, in eval mode.
    """
    kind: Kind = "classes" if any(classes.values()) else "values"
    if heads is None:
        heads = linear_heads(student.embedding_dim, [max(1, len(values)) for values in classes.values()], seed=seed)
    model = SegueForUnderstanding(student, heads)
    train_model(
        model,
        TargetClips(manifest, targets, min_samples=shortest_clip(student), states=states),
        partial(loss_terms, names=list(classes), kind=kind),
        num_steps=config.fine_tune_steps,
        learning_rate=config.fine_tune_learning_rate,
        max_batch_seconds=config.fine_tune_batch_seconds,
        output_dir=output_dir,
        seed=seed,
        machine=machine,
    )
    return model.eval()


def train_model(
    model: PreTrainedModel,
    clips: TargetClips,
    terms: LossTerms,
    *,
    num_steps: int,
    learning_rate: float,
    max_batch_seconds: float,
    output_dir: str | Path,
    seed: int,
    machine: Machine,
) -> None:
    """AdamW without weight decay, linear warm-up over a tenth of the steps and linear decay; nothing is saved.

    Args:
        model: learns in place.
        clips: what from.
        terms: loss of a batch, as of `DistillationTrainer`.
        num_steps: steps of the optimizer.
        learning_rate: its peak.
        max_batch_seconds: padded audio seconds of a step.
        output_dir: folder of `train_log.jsonl`.
        seed: of shuffling and dropout.
        machine: where, and in which precision.
    """
    arguments = DistillationArguments(
        output_dir=str(output_dir),
        max_steps=num_steps,
        learning_rate=learning_rate,
        warmup_steps=round(0.1 * num_steps),
        weight_decay=0.0,
        save_strategy="no",
        report_to="none",
        seed=seed,
        use_cpu=machine.use_cpu,
        bf16=machine.bf16,
        dataloader_num_workers=machine.num_workers,
    )
    trainer = DistillationTrainer(
        model,
        None,
        args=arguments,
        train_dataset=clips,
        collate=collate_targets,
        sampler=DurationBatchSampler(clips.manifest.durations_seconds, max_batch_seconds, seed=seed),
        loss_terms=terms,
        count_items=count_clips,
    )
    trainer.train()


def _centre_and_spread(vectors: Tensor) -> tuple[Tensor, float]:
    """Mean vector, and the root of the mean squared distance from it per dimension; 1 where all are equal."""
    centre = vectors.mean(dim=0)
    spread = float((vectors - centre).square().mean().sqrt())
    return centre, spread if spread > 0 else 1.0


def _for_raw_vectors(heads: nn.ModuleList, centre: Tensor, spread: float) -> nn.ModuleList:
    """The same heads for vectors that are neither centred nor scaled: W (x - c) / s + b = (W / s) x + (b - W c / s)."""
    with torch.no_grad():
        for head in heads:
            head.weight.div_(spread)
            head.bias.sub_(head.weight @ centre)
    return heads
