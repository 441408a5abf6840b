"""LLaVA-KD: answers learn from labels and the teacher's logits, visual positions from its logits and relations."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from speechkd.data.visual_sequences import predicting
from speechkd.losses.contract import IGNORE_INDEX
from speechkd.losses.fused import fused_linear_cross_entropy, fused_linear_distillation, fused_linear_divergence
from speechkd.losses.relation import fused_linear_rdist, rdist
from speechkd.models.llava import decoder_states
from speechkd.trainer import Batch


@dataclass(kw_only=True)
class LossConfig:
    """Weights of the terms; the three that are the teacher's are 0 in a stage without distillation.

    Args:
        labels: cross entropy of the answers, L_reg.
        response: KL(teacher || student) at the tokens that predict the answers, L_res.
        visual: KL(teacher || student) at the visual positions, L_vis.
        relation: distance of the Gram matrices of the visual positions, L_rel.
        relation_source: what the Gram matrices are of: logits, the decoder's last states, or the projector's output.
        relation_normalize: give each vector length 1 first.
    """

    labels: float = 1.0
    response: float = 0.0
    visual: float = 0.0
    relation: float = 0.0
    relation_source: Literal["logits", "last_hidden", "projector"] = "logits"
    relation_normalize: bool = False

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in ("labels", "response", "visual", "relation")}
        if min(weights.values()) < 0 or not any(weights.values()):
            raise ValueError(f"loss weights must be 0 or more and not all 0, got {weights}")

    @property
    def needs_teacher(self) -> bool:
        return max(self.response, self.visual, self.relation) > 0

    def describe(self) -> str:
        """The objective in a few words."""
        source = f"{self.relation_source}{', normalised' if self.relation_normalize else ''}"
        terms = {
            "CE": self.labels,
            "KL of answers": self.response,
            "KL of visual positions": self.visual,
            f"RDist of visual positions ({source})": self.relation,
        }
        return " + ".join(f"{weight:g} {name}" for name, weight in terms.items() if weight)


class ChosenStates(NamedTuple):
    """States that the objective compares.

    Args:
        response: those that predict a label, (answer tokens, width).
        visual: those at visual positions, (images, visual tokens, width); None without a picture.
        projected: the projector's output, likewise.
    """

    response: Tensor
    visual: Tensor | None
    projected: Tensor | None


def chosen_states(model: LlavaForConditionalGeneration, batch: Batch) -> ChosenStates:
    """Run a model and choose; every picture has equally many visual positions."""
    states = decoder_states(model, batch)
    visual = None
    if "pixel_values" in batch:
        visual = states.last[batch["visual"]].view(len(batch["pixel_values"]), -1, states.last.shape[-1])
    return ChosenStates(states.last[predicting(batch["labels"])], visual, states.projected)


def loss_terms(
    model: LlavaForConditionalGeneration,
    teacher: PreTrainedModel | None,
    batch: Batch,
    *,
    weights: LossConfig,
    teacher_head: Tensor | None = None,
    needs_picture: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed objective over answer tokens, and its terms.

    The terms at visual positions are means over a picture, and count as often as it has answer tokens, so that the sum
    over the step's answer tokens is a mean of both; without a picture they are 0.

    Args:
        model: the student.
        teacher: the live one, or None where there is none or `teacher_head` stands for it.
        batch: of `visual_sequences.collate`, with `teacher_response` and `teacher_visual` where the teacher is stored.
        weights: the objective.
        teacher_head: of the stored states, (vocabulary, teacher width).
        needs_picture: whether nothing could learn from text alone.

    Returns:
        0-dim, float32; the terms that have a weight.

    Raises:
        ValueError: there is no picture where one is needed.
    """
    if needs_picture and "pixel_values" not in batch:
        raise ValueError(
            f"a batch has no picture ({', '.join(batch['ids'][:3])}), and this stage trains what leads from pictures "
            "to the decoder alone, which cannot learn from text; leave text alone out of its manifest"
        )
    ours, head = chosen_states(model, batch), model.lm_head.weight
    theirs = None
    if weights.needs_teacher:
        if teacher is not None:
            with torch.no_grad():
                theirs, teacher_head = chosen_states(teacher, batch), teacher.lm_head.weight
        else:
            theirs = ChosenStates(batch["teacher_response"], batch.get("teacher_visual"), None)
    labels = batch["labels"][:, 1:][batch["labels"][:, 1:] != IGNORE_INDEX]
    if theirs is None or not weights.response:
        cross_entropy = fused_linear_cross_entropy(ours.response, head, labels, reduction="sum")
        total, terms = weights.labels * cross_entropy, {"labels": cross_entropy.detach()}
    else:
        total, both = fused_linear_distillation(
            ours.response,
            head,
            theirs.response,
            teacher_head,
            labels,
            label_weight=weights.labels,
            kd_weight=weights.response,
            reduction="sum",
        )
        terms = {"labels": both["cross_entropy"].detach(), "response": both["divergence"].detach()}
    if theirs is not None and max(weights.visual, weights.relation) > 0:
        for name, term in _visual_terms(ours, theirs, head, teacher_head, batch, weights).items():
            total = total + getattr(weights, name) * term
            terms[name] = term.detach()
    return total, terms


def _visual_terms(
    ours: ChosenStates,
    theirs: ChosenStates,
    head: Tensor,
    teacher_head: Tensor | None,
    batch: Batch,
    weights: LossConfig,
) -> dict[str, Tensor]:
    """Summed `visual` and `relation`, those that have a weight."""
    names = [name for name in ("visual", "relation") if getattr(weights, name)]
    if ours.visual is None or theirs.visual is None:
        return {name: ours.response.new_zeros((), dtype=torch.float32) for name in names}
    counts = predicting(batch["labels"]).sum(dim=1)[batch["visual"].any(dim=1)]  # answer tokens of each picture
    terms = {}
    if weights.visual:
        shares = (counts / ours.visual.shape[1])[:, None].expand(ours.visual.shape[:2])
        terms["visual"] = fused_linear_divergence(
            ours.visual, head, theirs.visual, teacher_head, reduction="sum", token_weights=shares
        )
    if weights.relation:
        normalize = weights.relation_normalize
        if weights.relation_source == "logits":
            distances = fused_linear_rdist(
                ours.visual, head, theirs.visual, teacher_head, reduction="none", normalize=normalize
            )
        else:
            is_projector = weights.relation_source == "projector"
            pair = (ours.projected, theirs.projected) if is_projector else (ours.visual, theirs.visual)
            distances = rdist(*pair, reduction="none", normalize=normalize)
        terms["relation"] = (distances * counts).sum()
    return terms


def count_items(batch: Batch) -> Tensor:
    """Answer tokens; 0-dim, int64."""
    return predicting(batch["labels"]).sum()
