"""Losses on how vectors lie to each other, within the student and within the teacher; their widths may differ.

All take `(student, teacher, mask=None, *, reduction="token_mean", num_items=None)`:

- student, teacher: (..., student_dim) and (..., teacher_dim), for one (batch, dim) embeddings or (batch, frames, dim)
  hidden states of one layer. The teacher gets no gradient.
- mask: True on the vectors to compare, (...), bool; None takes all. All of them are compared with all others, whatever
  utterance they are from: draw a few hundred with `sample_mask`, or pool the utterances first.
- reduction, num_items: see `contract.reduce_rows`. The loss of a vector is a mean over its relations, so "token_mean"
  is a mean over all; each part of a batch knows only its own relations, so parts do not add up to the whole.

They raise ValueError, with the values, on shapes, masks or arguments that do not fit. Everything is computed in
float32, also under autocast; float64 stays.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from speechkd.losses.contract import NEVER, Number, Reduction, as_float, kl_rows, reduce_rows
from speechkd.losses.hidden import inner_products, position_mask, scored_vectors, unit_vectors

SHORTEST = 1e-6  # distance that two vectors have at least, so that its square has 1e-12 as in the published code


def sample_mask(mask: Tensor, limit: int, generator: torch.Generator | None = None) -> Tensor:
    """The mask with `limit` of its positions, drawn at random, or with all where it has fewer.

    Args:
        mask: True on real positions, bool.
        limit: positions to keep, 1 or more.
        generator: of random numbers, on the mask's device.

    Raises:
        ValueError: the limit is below 1, or the mask not bool.
    """
    if limit < 1 or mask.dtype != torch.bool:
        raise ValueError(f"a bool mask and a limit of 1 or more are needed, got {mask.dtype} and {limit}")
    positions = mask.flatten().nonzero()[:, 0]
    chosen = positions[torch.randperm(len(positions), generator=generator, device=mask.device)[:limit]]
    return torch.zeros_like(mask).flatten().index_fill(0, chosen, True).view(mask.shape)


def rkd_distance(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
) -> Tensor:
    """Smooth L1 between the distances of all pairs, each model's over their mean; blind to scale, shift and rotation.

    RKD, Park et al. 2019, https://arxiv.org/abs/1904.05068: weight 25, beside 50 times `rkd_angle`. As in its code the
    mean is over all n**2 pairs, those of a vector with itself included.
    """
    student, teacher, mask = scored_vectors(student, teacher, mask, same_width=False)
    loss = F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher), reduction="none")
    return reduce_rows(loss.sum(dim=-1) / max(len(loss), 1), mask, reduction, num_items)


def _relative_distances(vectors: Tensor) -> Tensor:
    """Distances over the mean of those between different vectors, (n, n)."""
    other = ~torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    with torch.autocast(vectors.device.type, enabled=False):
        # products of vectors would lose the small distances
        distances = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
    distances = torch.where(other, distances.clamp(min=SHORTEST), 0.0)
    return distances / (distances.sum() / other.sum().clamp(min=1)).clamp(min=SHORTEST)


def rkd_angle(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
) -> Tensor:
    """Smooth L1 between the cosines of the angles at each vector to all pairs of others; blind to similarity maps.

    RKD, Park et al. 2019, https://arxiv.org/abs/1904.05068: weight 50. Memory grows with n**3, so pass at most 64.
    """
    student, teacher, mask = scored_vectors(student, teacher, mask, same_width=False)
    loss = F.smooth_l1_loss(_cosines_at(student), _cosines_at(teacher), reduction="none")
    return reduce_rows(loss.sum(dim=(1, 2)) / max(len(loss), 1) ** 2, mask, reduction, num_items)


def _cosines_at(vectors: Tensor) -> Tensor:
    """Cosine of the angle at i between j and k, (n, n, n); 0 where j or k is i."""
    directions = unit_vectors(vectors[None] - vectors[:, None])
    return inner_products(directions, directions)


def spkd(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
) -> Tensor:
    """Squared difference of the similarity matrices X X^T, with rows of norm 1, over n**2; blind to scale and rotation.

    Similarity-preserving KD, Tung and Mori 2019, https://arxiv.org/abs/1907.09682: weight 1,000 to 3,000 on images.
    """
    student, teacher, mask = scored_vectors(student, teacher, mask, same_width=False)
    ours, theirs = (unit_vectors(inner_products(vectors, vectors)) for vectors in (student, teacher))
    loss = (ours - theirs).square().sum(dim=-1) / max(len(ours), 1)
    return reduce_rows(loss, mask, reduction, num_items)


def cka(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
) -> Tensor:
    """1 - linear centred kernel alignment, 0 to 1; blind to rotation, shift and scale.

    Kornblith et al. 2019, https://arxiv.org/abs/1905.00414. Fewer vectors than dimensions look alike whatever they are:
    compare many. It is one number for the batch, which every vector carries: "token_mean" gives it, "sum" n times it.
    Where all vectors of a model are equal, for one because there is only one, it is 1, without gradient.
    """
    student, teacher, mask = scored_vectors(student, teacher, mask, same_width=False)
    ours, theirs = (_centred_columns(vectors) for vectors in (student, teacher))
    common = inner_products(ours, theirs).square().sum()
    norms = [torch.linalg.vector_norm(inner_products(columns, columns)) for columns in (ours, theirs)]
    product = norms[0] * norms[1]
    alignment = common / torch.where(product > 0, product, 1.0)
    return reduce_rows((1 - alignment).expand(len(student)), mask, reduction, num_items)


def _centred_columns(vectors: Tensor) -> Tensor:
    """(dim, n), each row with mean 0."""
    return (vectors - vectors.sum(dim=0) / max(len(vectors), 1)).transpose(0, 1)


def token_graph(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    local_weight: float = 1.0,
    global_weight: float = 1.0,
    context_weight: float = 1.0,
    num_neighbors: int = 8,
    temperature: float = 0.1,
) -> Tensor:
    """Three losses on a graph of frames, which is finer than the other relations here and dearer.

    TRG, Zhang et al. 2023, *Knowledge Distillation via Token-level Relationship Graph*,
    https://arxiv.org/abs/2306.12442, in our reading, which needs no equal widths. With cosine similarities:

    - local: KL(teacher || student) of a softmax over the frame's neighbours, those nearest to it in the teacher. The
      paper takes Gaussian kernels of distances, whose width depends on the model's scale.
    - global: InfoNCE that picks the teacher's row of the same frame from its similarity matrix. The paper contrasts the
      frames themselves behind a projection, and lowers the temperature in training: for that, add `embedding.info_nce`
      with `global_weight=0`.
    - context: squared difference of softmax(X X^T / sqrt(dim)) over the frames of the same utterance, as in the paper.

    Args:
        student: (batch, frames, student_dim).
        teacher: (batch, frames, teacher_dim).
        mask: True on the frames to compare, (batch, frames), bool; at most 256, see `sample_mask`.
        reduction: see `contract.reduce_rows`.
        num_items: divisor of a mean.
        local_weight: of the first.
        global_weight: of the second.
        context_weight: of the third.
        num_neighbors: of a frame in the graph, 1 or more; fewer where there are not as many.
        temperature: divides the similarities of the first two.
    """
    if student.ndim != 3:
        raise ValueError(f"token_graph needs frames of utterances, (batch, frames, dim), got {tuple(student.shape)}")
    if num_neighbors < 1 or not temperature > 0:
        raise ValueError(
            f"num_neighbors must be 1 or more and temperature positive, got {num_neighbors} and {temperature}"
        )
    student, teacher, mask = scored_vectors(student, teacher, mask, same_width=False)
    ours, theirs = (inner_products(units, units) for units in (unit_vectors(student), unit_vectors(teacher)))
    itself = torch.eye(len(ours), dtype=torch.bool, device=ours.device)
    neighbors = theirs.masked_fill(itself, -torch.inf).topk(min(num_neighbors, max(len(ours) - 1, 0)), dim=-1).indices
    linked = torch.zeros_like(itself).scatter(-1, neighbors, True)
    log_q, log_p = ((cosines / temperature).masked_fill(~linked, NEVER).log_softmax(-1) for cosines in (ours, theirs))
    contrast = inner_products(unit_vectors(ours), unit_vectors(theirs)) / temperature
    utterance = mask.nonzero()[:, 0]
    together = utterance[:, None] == utterance
    contexts = [
        (inner_products(vectors, vectors) / math.sqrt(vectors.shape[-1])).masked_fill(~together, NEVER).softmax(dim=-1)
        for vectors in (student, teacher)
    ]
    context = (contexts[0] - contexts[1]).square().sum(dim=-1) / together.sum(dim=-1)
    loss = local_weight * kl_rows(log_p, log_q) + context_weight * context
    loss = loss - global_weight * contrast.log_softmax(dim=-1).diagonal()
    return reduce_rows(loss, mask, reduction, num_items)


def rdist(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    normalize: bool = False,
) -> Tensor:
    """1 - cosine of the Gram matrices Y Y^T of an image's visual tokens, 0 to 1; blind to rotation and scale.

    RDist of LLaVA-KD, Cai et al. 2024, https://arxiv.org/abs/2410.16236: weight 0.5, on the logits at the visual
    positions. Unlike the other relations here, vectors are compared within their image alone, and the reduction is over
    images: "token_mean" is their mean, "none" gives (images,). A cosine over a batch in one vector is another number.

    Args:
        student: (images, tokens, student_dim).
        teacher: (images, tokens, teacher_dim).
        mask: True on the tokens to compare, (images, tokens), bool; an image without any counts nothing.
        reduction: see `contract.reduce_rows`.
        num_items: divisor of a mean.
        normalize: give each vector length 1 first, so that only angles count.

    Returns:
        0-dim, or (images,).
    """
    student, teacher, mask = _images(student, teacher, mask)
    grams = [inner_products(vectors, vectors) for vectors in (student, teacher)]
    return _gram_distance(grams[0], grams[1], mask, reduction, num_items, normalize)


def fused_linear_rdist(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
    normalize: bool = False,
) -> Tensor:
    """`rdist` of logits H W^T, from H (W^T W) H^T, so that no logits ever exist.

    Args:
        student_hidden: last states at visual positions, (images, tokens, student_dim).
        student_weight: the student's head, (vocabulary, student_dim).
        teacher_hidden: (images, tokens, teacher_dim).
        teacher_weight: the teacher's head, (vocabulary, teacher_dim).
        mask: see `rdist`, likewise the rest.

    Returns:
        0-dim, or (images,).
    """
    student_hidden, teacher_hidden, mask = _images(student_hidden, teacher_hidden, mask)
    grams = []
    for hidden, weight in ((student_hidden, student_weight), (teacher_hidden, teacher_weight.detach())):
        columns = weight.to(hidden.dtype).transpose(0, 1)
        grams.append(inner_products(inner_products(hidden, inner_products(columns, columns)), hidden))
    return _gram_distance(grams[0], grams[1], mask, reduction, num_items, normalize)


def _images(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors of images after all checks, with 0 where the mask is False."""
    if student.ndim != 3 or student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be (images, tokens, dim) with "
            "equal images and tokens; give both models the same image and towers with equal numbers of visual tokens"
        )
    mask = position_mask(mask, student)
    student = as_float(student).masked_fill(~mask[..., None], 0.0)
    return student, teacher.detach().to(student.dtype).masked_fill(~mask[..., None], 0.0), mask


def _gram_distance(
    ours: Tensor, theirs: Tensor, mask: Tensor, reduction: Reduction, num_items: Number, normalize: bool
) -> Tensor:
    """1 - cosine of matrices (images, tokens, tokens), of those of unit vectors with `normalize`."""
    units = []
    for gram in (ours, theirs):
        if normalize:
            squares = gram.diagonal(dim1=-2, dim2=-1)
            norms = torch.where(squares > 0, squares, 1.0).sqrt()
            gram = gram / (norms[..., None] * norms[..., None, :])
        units.append(unit_vectors(gram.flatten(1)))
    counted = mask.any(dim=-1)
    return reduce_rows(1 - (units[0] * units[1]).sum(dim=-1)[counted], counted, reduction, num_items)
