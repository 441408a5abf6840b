"""The objective of Distil-Whisper: cross entropy on the labels and a divergence to the teacher, token by token."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import WhisperForConditionalGeneration

from speechkd.config import DataConfig, StoredOutputs, TeacherConfig
from speechkd.data.audio import pcm16_to_float
from speechkd.data.augment import SpecAugmentConfig, spec_augment, utterance_seed
from speechkd.data.collate import WhisperTokens
from speechkd.data.features import HOP_LENGTH_SAMPLES, WhisperLogMel
from speechkd.data.whisper import compares_references
from speechkd.labels.decoding import DecodingConfig
from speechkd.labels.filters import FilterConfig
from speechkd.losses.contract import check_fraction, check_temperature
from speechkd.losses.fused import fused_linear_cross_entropy, fused_linear_distillation, fused_linear_divergence
from speechkd.losses.hidden import hidden_mse
from speechkd.losses.layers import layer_map
from speechkd.losses.logits import adaptive_kl, cross_entropy
from speechkd.losses.on_policy import GkdPolicy
from speechkd.losses.sparse import TopK
from speechkd.models.whisper import decoder_layer_states, decoder_states, sample_tokens
from speechkd.trainer import Batch

Divergence = Literal[
    "forward_kl",
    "reverse_kl",
    "jeffreys",
    "js",
    "generalized_jsd",
    "total_variation",
    "skew_kl",
    "skew_reverse_kl",
    "adaptive_kl",
]


@dataclass(kw_only=True)
class LossConfig:
    """Weights of the objective. The paper prints 0.8 KL + 1.0 CE; its code, and so its checkpoints, have these.

    Args:
        cross_entropy: weight of the cross entropy on the labels.
        kl: weight of the divergence to the teacher; 0 trains without it.
        divergence: the loss of that name in `speechkd.losses.logits`; forward_kl is KL(teacher || student), and the
            skew ones mix in a tenth.
        beta: the teacher's weight in the mixture of generalized_jsd, 0 to 1.
        temperature: of the divergence, which carries its square.
        hidden_mse: weight of the squared difference of decoder states, evenly spaced layers of the teacher against all
            of the student; 0 leaves it out.
        on_policy_fraction: share of steps, 0 to 1, in which the student writes the text itself, as long as the batch's
            labels at most, and learns from the divergence alone.
        on_policy_temperature: of its draws; 0 takes the likeliest tokens.
    """

    cross_entropy: float = 0.8
    kl: float = 1.0
    divergence: Divergence = "forward_kl"
    beta: float = 0.5
    temperature: float = 2.0
    hidden_mse: float = 0.0
    on_policy_fraction: float = 0.0
    on_policy_temperature: float = 1.0

    def __post_init__(self) -> None:
        if min(self.cross_entropy, self.kl, self.hidden_mse) < 0 or self.cross_entropy + self.kl + self.hidden_mse == 0:
            raise ValueError(
                f"loss weights must be >= 0 and not all 0, got cross_entropy={self.cross_entropy}, kl={self.kl}, "
                f"hidden_mse={self.hidden_mse}"
            )
        check_fraction("loss.beta", self.beta)
        check_fraction("loss.on_policy_fraction", self.on_policy_fraction)
        check_temperature(self.temperature, "loss.temperature")
        if self.on_policy_temperature < 0:
            raise ValueError(f"loss.on_policy_temperature must be 0 or more, got {self.on_policy_temperature}")
        if self.on_policy_fraction > 0 and self.kl == 0:
            raise ValueError(
                f"loss.on_policy_fraction={self.on_policy_fraction} needs the teacher's opinion of what the student "
                "writes; set loss.kl above 0, or the fraction to 0"
            )

    @property
    def needs_teacher(self) -> bool:
        """Whether a term compares with the teacher."""
        return self.kl > 0 or self.hidden_mse > 0

    def describe(self, *, has_teacher: bool, stored_outputs: StoredOutputs | None) -> str:
        """The objective in a line, for the model card."""
        terms = [f"{self.cross_entropy:g} CE"]
        if has_teacher and self.kl:
            name = {"forward_kl": "KL", "generalized_jsd": f"generalized_jsd(beta={self.beta:g})"}.get(
                self.divergence, self.divergence
            )
            stored = {"topk": "stored top-k of the ", "decoder_states": "stored decoder states of the ", None: ""}
            source = f"{stored[stored_outputs]}teacher"
            terms.append(f"{self.kl:g} {name}({source}, T={self.temperature:g}, T^2)")
        if has_teacher and self.hidden_mse:
            terms.append(f"{self.hidden_mse:g} MSE(decoder states)")
        on_policy = f"; {self.on_policy_fraction:g} of the steps on-policy" if self.on_policy_fraction else ""
        return " + ".join(terms) + on_policy


@dataclass(frozen=True)
class StepDraws:
    """What is drawn anew in each step of the training, from seed and step, so that a resumed run draws the same.

    Args:
        seed: of the run.
        step: number of optimizer steps so far.
        tokens: special ids of the vocabulary.
        spec_augment: masks on what the student hears; None for none.
    """

    seed: int
    step: Callable[[], int]
    tokens: WhisperTokens
    spec_augment: SpecAugmentConfig | None = None


def check_stored_outputs(
    teacher: TeacherConfig | None, loss: LossConfig, data: DataConfig, decoding: DecodingConfig, filters: FilterConfig
) -> None:
    """Refuse settings that need a teacher at hand where its stored outputs are to stand for it.

    Args:
        teacher: its section; None and live teachers pass.
        loss: the objective.
        data: labels and what is drawn of them.
        decoding: how the labels are made.
        filters: which of them are trained on.

    Raises:
        ValueError: names the settings.
    """
    if teacher is None or teacher.stored_outputs is None:
        return
    setting = f"teacher.stored_outputs={teacher.stored_outputs}"
    asked = {
        "loss.hidden_mse": loss.hidden_mse > 0,
        "loss.on_policy_fraction": loss.on_policy_fraction > 0,
        "data.augment": data.augment is not None,
        "data.previous_text_probability": data.previous_text_probability > 0,
        # every other value drops the timestamps that the teacher had seen of some labels
        "data.timestamp_probability below 1": decoding.timestamps and data.timestamp_probability < 1,
        "data.pack with a WER or CER filter": data.pack and compares_references(filters),
    }
    if wrong := [name for name, is_on in asked.items() if is_on]:
        raise ValueError(
            f"{setting} has the teacher's word on its own labels of clean audio; {', '.join(wrong)} would need more: "
            "take these out, or set teacher.stored_outputs=null"
        )
    if loss.kl == 0:
        raise ValueError(
            f"{setting} serves the divergence to the teacher, and loss.kl is 0; set it above 0, or "
            "teacher.stored_outputs=null"
        )
    if teacher.stored_outputs == "topk" and (loss.divergence != "forward_kl" or loss.temperature != 1):
        raise ValueError(
            f"{setting} has loss.divergence=forward_kl and loss.temperature=1, got {loss.divergence} and "
            f"{loss.temperature:g}: at higher temperatures most of the probability is outside the stored ids; change "
            "these, or set teacher.stored_outputs=decoder_states"
        )
    if any(corpus.labels_dir is None for corpus in data.corpora):
        raise ValueError(f"{setting} needs data.labels_dir, and that of every extra corpus")


def loss_terms(
    model: nn.Module,
    teacher: WhisperForConditionalGeneration | None,
    batch: Batch,
    *,
    weights: LossConfig,
    log_mel: WhisperLogMel,
    shared_encoder: nn.Module | None,
    teacher_head: Tensor | None = None,
    draws: StepDraws | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed objective of a batch and its terms; section 3 of the paper.

    Teacher and student get the same `decoder_input_ids`. A shared encoder runs once, or not at all when the batch
    carries its states. A batch that the student wrote weighs as much as its labels would have. Where the batch carries
    top-k targets or decoder states of the teacher, they stand for it.

    Args:
        model: the student.
        teacher: None without one, or with stored outputs.
        batch: of `collate_whisper`.
        weights: of the terms.
        log_mel: makes features of waveforms.
        shared_encoder: that of both models; None where each has its own.
        teacher_head: weight of the teacher's head, (vocabulary, dim), for batches that carry its decoder states.
        draws: on-policy batches and SpecAugment; None, and evaluation, have neither.
    """
    labels, decoder_input_ids = batch["labels"], batch["decoder_input_ids"]
    if not model.training:
        draws = None
    clean = states = None
    if "encoder_states" in batch:
        states = batch["encoder_states"].float()
    else:
        clean = log_mel(pcm16_to_float(batch["waveforms"]))
        if shared_encoder is not None:
            with torch.no_grad():
                states = shared_encoder(clean).last_hidden_state
    heard = clean
    if clean is not None and draws is not None and draws.spec_augment is not None:
        num_frames = torch.tensor([-(-length // HOP_LENGTH_SAMPLES) for length in batch["num_samples"]])
        heard = spec_augment(clean, num_frames, batch["ids"], draws.spec_augment, seed=draws.seed, epoch=draws.step())
    inputs = {"input_features": heard} if states is None else {"encoder_outputs": (states,)}
    is_on_policy = False
    if draws is not None and weights.on_policy_fraction > 0:
        decoder_input_ids, labels, is_on_policy = on_policy_batch(model, inputs, batch, weights, draws)
    layers = range(1, extract_model_from_parallel(model).config.decoder_layers + 1) if weights.hidden_mse else None
    student = _decode(model, layers, **inputs, decoder_input_ids=decoder_input_ids)
    if "topk_ids" in batch:
        targets = TopK(batch["topk_ids"], batch["topk_log_probs"], batch["topk_log_tail"])
        total, terms = _distil(student, (targets, None), labels, weights, weights.cross_entropy)
    elif teacher_head is not None:
        stored = batch["teacher_decoder_states"].to(teacher_head.dtype), teacher_head
        total, terms = _distil(student, stored, labels, weights, weights.cross_entropy)
    elif teacher is None:
        loss = fused_linear_cross_entropy(student[0], student[1], labels, reduction="sum")
        return weights.cross_entropy * loss, {"cross_entropy": loss.detach()}
    else:
        if states is None:
            inputs = {"input_features": clean.to(teacher.dtype)}
        else:
            inputs = {"encoder_outputs": (states.to(teacher.dtype),)}
        if layers is not None:
            layers = layer_map(len(layers), extract_model_from_parallel(teacher).config.decoder_layers)
        with torch.no_grad():
            teacher_states = _decode(teacher, layers, **inputs, decoder_input_ids=decoder_input_ids)
        label_weight = 0.0 if is_on_policy else weights.cross_entropy
        total, terms = _distil(student, teacher_states[:2], labels, weights, label_weight)
        if layers is not None:
            mse = hidden_mse(student[2], teacher_states[2], labels >= 0, reduction="sum")
            total, terms = total + weights.hidden_mse * mse, {**terms, "hidden_mse": mse.detach()}
    if draws is not None and weights.on_policy_fraction > 0:
        num_labels = count_items(batch)
        if is_on_policy:
            scale = num_labels / (labels >= 0).sum().clamp(min=1)
            terms = {name: scale * term for name, term in terms.items()}
            total, terms["cross_entropy"] = scale * total, torch.zeros_like(total)
        terms["on_policy"] = num_labels.float() * is_on_policy  # its mean in the log is the share of such batches
    return total, terms


def _decode(model: nn.Module, layers: range | list[int] | None, **inputs: object) -> tuple[Tensor, ...]:
    """Last decoder states, the head's weight, and the outputs of layers where they are asked for."""
    return decoder_states(model, **inputs) if layers is None else decoder_layer_states(model, layers, **inputs)


def _distil(
    student: tuple[Tensor, ...],
    teacher: tuple[Tensor | TopK, Tensor | None],
    labels: Tensor,
    weights: LossConfig,
    label_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`label_weight` * CE + `kl` * divergence, summed over the scored tokens, and both terms."""
    (hidden, head), (teacher_hidden, teacher_head), name = student[:2], teacher, weights.divergence
    term = "kl" if name == "forward_kl" else name
    if name == "adaptive_kl":  # it sorts whole distributions, so the logits of the scored tokens have to exist
        scored = labels >= 0
        logits = F.linear(hidden[scored], head)
        entropy = cross_entropy(logits, labels[scored], reduction="sum")
        teacher_logits = F.linear(teacher_hidden[scored], teacher_head)
        value = adaptive_kl(logits, teacher_logits, temperature=weights.temperature, reduction="sum")
        total = label_weight * entropy + weights.kl * value
        return total, {"cross_entropy": entropy.detach(), term: value.detach()}
    parts = {"jeffreys": {"forward_kl": 0.5, "reverse_kl": 0.5}, "js": {"generalized_jsd": 1.0}}.get(name, {name: 1.0})
    (first, share), *rest = parts.items()
    options = {"temperature": weights.temperature, "beta": 0.5 if name == "js" else weights.beta, "reduction": "sum"}
    models = hidden, head, teacher_hidden, teacher_head
    total, terms = fused_linear_distillation(
        *models, labels, label_weight=label_weight, kd_weight=weights.kl * share, divergence=first, **options
    )
    value = share * terms["divergence"]
    for other, share in rest:
        more = share * fused_linear_divergence(*models, labels >= 0, divergence=other, **options)
        total, value = total + weights.kl * more, value + more.detach()
    return total, {"cross_entropy": terms["cross_entropy"], term: value}


def on_policy_batch(
    model: nn.Module, inputs: dict[str, object], batch: Batch, weights: LossConfig, draws: StepDraws
) -> tuple[Tensor, Tensor, bool]:
    """Decoder inputs and labels of this step: those of the data, or what the student itself says of the clips.

    GKD, Agarwal et al. 2023, https://arxiv.org/abs/2306.13649; with KL, reverse KL or total variation DistillSpec, Zhou
    et al. 2023, https://arxiv.org/abs/2310.08461. All ranks take the same kind of batch in a step. The student goes on
    from the label's prefix, without previous text; with timestamps its first one belongs to the prefix.

    Args:
        model: the student.
        inputs: `input_features`, or `encoder_outputs` with the encoder's states.
        batch: of `collate_whisper`.
        weights: share of the batches, and temperature.
        draws: seed and step.

    Returns:
        `decoder_input_ids` and `labels`, (batch, tokens), and whether the student wrote them.
    """
    student, tokens, step = extract_model_from_parallel(model), draws.tokens, draws.step()
    dataset = batch["decoder_input_ids"], batch["labels"]
    prompt_length = len(tokens.prefix)
    positions = torch.arange(prompt_length, device=dataset[0].device)
    starts = (dataset[0] == tokens.start_of_transcript).int().argmax(dim=1, keepdim=True)
    prompts = dataset[0].gather(1, starts + positions)

    def generate() -> Tensor:
        states = inputs["encoder_outputs"][0] if "encoder_outputs" in inputs else None
        if states is None:
            states = student.model.encoder(inputs["input_features"]).last_hidden_state
        seed = utterance_seed(draws.seed, step, batch["ids"][0], "on_policy_tokens")
        return sample_tokens(
            student,
            states,
            prompts,
            end_of_text=tokens.end_of_text,
            max_new_tokens=max(1, int((dataset[1] >= 0).sum(dim=1).max()) + 1 - prompt_length),
            temperature=weights.on_policy_temperature,
            generator=torch.Generator(prompts.device).manual_seed(seed),
        )

    seed = utterance_seed(draws.seed, step, "", "on_policy")
    policy = GkdPolicy(tokens.end_of_text, student_fraction=weights.on_policy_fraction, seed=seed)
    ids, labels, source = policy.batch(dataset, prompt_length, student=generate)
    if source == "dataset":
        return ids, labels, False
    return ids[:, :-1], labels[:, 1:], True


def count_items(batch: Batch) -> Tensor:
    """Scored tokens of a batch."""
    return (batch["labels"] >= 0).sum()
