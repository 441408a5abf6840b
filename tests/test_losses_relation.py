import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from speechkd.losses.relation import cka, rkd_angle, rkd_distance, sample_mask, spkd, token_graph

torch.manual_seed(1)
STUDENT, TEACHER = torch.randn(4, 6), torch.randn(4, 6)
EVERY = {
    "rkd distance": rkd_distance,
    "rkd angle": rkd_angle,
    "spkd": spkd,
    "cka": cka,
    "token graph": partial(token_graph, num_neighbors=2),
}
every_loss = pytest.mark.parametrize("loss", EVERY.values(), ids=EVERY)


def make_vectors(num_frames=(4, 2), widths=(3, 5), dtype=torch.float64, seed=0):
    """Student and teacher, (batch, frames, dim), with NaN on padding, and the mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(num_frames) + 1) < torch.tensor(num_frames)[:, None]
    student, teacher = (torch.randn(*mask.shape, width, generator=generator, dtype=dtype) for width in widths)
    padding = ~mask[..., None]
    return student.masked_fill(padding, torch.nan).requires_grad_(), teacher.masked_fill(padding, torch.nan), mask


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-6), (torch.float32, 1e-5)])
def test_reference_values(dtype, tolerance):
    student, teacher = STUDENT.to(dtype), TEACHER.to(dtype)
    assert rkd_distance(student, teacher).item() == pytest.approx(0.033428, abs=tolerance)
    assert rkd_angle(student, teacher).item() == pytest.approx(0.033727, abs=tolerance)
    assert spkd(student, teacher).item() == pytest.approx(0.140062, abs=tolerance)
    assert cka(student, teacher).item() == pytest.approx(1 - 0.642475, abs=tolerance)


def smooth_l1(a, b):
    return 0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5


def test_distances_and_angles_equal_loops():
    student, teacher, mask = make_vectors()
    vectors = [student.detach()[mask].tolist(), teacher[mask].tolist()]
    distances = [[[math.dist(a, b) for b in rows] for a in rows] for rows in vectors]
    means = [sum(map(sum, table)) / 30 for table in distances]
    expected = sum(
        smooth_l1(distances[0][i][j] / means[0], distances[1][i][j] / means[1])
        for i, j in itertools.product(range(6), repeat=2)
    )
    assert rkd_distance(student, teacher, mask).item() == pytest.approx(expected / 36)

    def cosine(rows, i, j, k):
        if i in (j, k):
            return 0.0
        left, right = ([x - y for x, y in zip(rows[other], rows[i], strict=True)] for other in (j, k))
        return sum(x * y for x, y in zip(left, right, strict=True)) / math.hypot(*left) / math.hypot(*right)

    expected = sum(
        smooth_l1(cosine(vectors[0], i, j, k), cosine(vectors[1], i, j, k))
        for i, j, k in itertools.product(range(6), repeat=3)
    )
    assert rkd_angle(student, teacher, mask).item() == pytest.approx(expected / 216)


def test_cka_equals_the_form_of_gram_matrices():
    student, teacher, mask = make_vectors()
    grams = []
    for vectors in (student.detach()[mask], teacher[mask]):
        centred = vectors - vectors.mean(dim=0)
        grams.append(centred @ centred.T)
    alignment = (grams[0] * grams[1]).sum() / grams[0].norm() / grams[1].norm()
    torch.testing.assert_close(cka(student, teacher, mask).detach(), 1 - alignment)
    assert cka(student, teacher, mask, reduction="sum").item() == pytest.approx(6 * (1 - alignment.item()))


def test_cka_of_independent_vectors_nears_one_as_they_grow_in_number():
    student, teacher = torch.randn(2, 4000, 4, generator=torch.Generator().manual_seed(0))
    assert cka(student[:5], teacher[:5]) < 0.8 and cka(student, teacher) > 0.99


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(0.01, 100), seed=st.integers(0, 1000))
def test_losses_are_blind_to_what_their_docstrings_say(scale, seed):
    student, teacher, mask = make_vectors(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    turned = scale * teacher @ rotation
    for loss in (rkd_distance, rkd_angle, spkd, cka):
        torch.testing.assert_close(loss(student, turned, mask), loss(student, teacher, mask))
        if loss is not spkd:
            torch.testing.assert_close(loss(student, turned + scale, mask), loss(student, teacher, mask))
        assert loss(student, student.detach() * scale, mask).abs().item() < 1e-12
        assert loss(student, teacher, mask) > 0
    assert cka(student, teacher, mask) <= 1


@every_loss
def test_padding_adds_no_loss_and_no_gradient(loss):
    student, teacher, mask = make_vectors(num_frames=(4, 2))
    value = loss(student, teacher, mask)
    value.backward()
    assert student.grad[~mask].abs().max() == 0 and student.grad[mask].abs().sum(dim=-1).min() > 0
    cut = loss(student[:, :4], teacher[:, :4], mask[:, :4])
    torch.testing.assert_close(value, cut)
    values = loss(student, teacher, mask, reduction="none")
    assert values.shape == mask.shape and values[~mask].abs().max() == 0
    torch.testing.assert_close(values.sum() / 6, value)
    torch.testing.assert_close(loss(student, teacher, mask, reduction="sum"), 6 * value)
    torch.testing.assert_close(loss(student, teacher, mask, num_items=12), value / 2)


@every_loss
@pytest.mark.parametrize("num_scored", [0, 1])
def test_none_or_one_vector_has_no_relations_and_a_finite_gradient(loss, num_scored):
    student, teacher, mask = make_vectors()
    mask = torch.zeros_like(mask)
    mask[0, :num_scored] = True
    value = loss(student, teacher, mask)
    value.backward()
    assert value.item() == (num_scored if loss is cka else pytest.approx(0, abs=1e-12))
    assert student.grad.abs().max() < 1e-12


@every_loss
def test_the_teacher_gets_no_gradient_and_the_student_the_right_one(loss):
    student, teacher, _ = make_vectors(num_frames=(3, 3))
    student, teacher = student[:, :3].detach().requires_grad_(), teacher[:, :3].requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert torch.autograd.gradcheck(lambda vectors: loss(vectors, teacher), student)


@every_loss
def test_bfloat16_vectors_are_computed_in_float32_also_under_autocast(loss):
    student, teacher, mask = make_vectors(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher, mask)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(student.float(), teacher.float(), mask), rtol=0, atol=0)


@every_loss
def test_equal_vectors_keep_the_gradient_finite(loss):
    _, teacher, mask = make_vectors(num_frames=(4, 4))
    student = torch.ones(*mask.shape, 3, dtype=torch.float64, requires_grad=True)
    loss(student, teacher, mask).backward()
    zeros = torch.zeros_like(student).requires_grad_()
    loss(zeros, teacher, mask).backward()
    assert student.grad.isfinite().all() and zeros.grad.isfinite().all()


def test_nearly_equal_vectors_keep_their_distances_in_float32():
    base = torch.full((1, 8), 100.0)
    student = base + 1e-3 * torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    exact = rkd_distance(student.double(), STUDENT.double()[[0, 1, 2, 3, 0, 1]])
    torch.testing.assert_close(rkd_distance(student, STUDENT[[0, 1, 2, 3, 0, 1]]).double(), exact, rtol=1e-4, atol=0)


def test_the_graph_equals_a_loop():
    student, teacher, mask = make_vectors(num_frames=(3, 2))
    s, t, utterance = student.detach()[mask], teacher[mask], mask.nonzero()[:, 0]
    cosines = [F.cosine_similarity(x[:, None], x[None], dim=-1) for x in (s, t)]
    local = context = contrast = 0.0
    for i in range(5):
        near = sorted((j for j in range(5) if j != i), key=lambda j: -cosines[1][i, j].item())[:2]
        log_q, log_p = ((table[i, near] / 0.2).log_softmax(0) for table in cosines)
        local += (log_p.exp() * (log_p - log_q)).sum().item()
        scores = F.cosine_similarity(cosines[0][i][None], cosines[1], dim=-1) / 0.2
        contrast -= scores.log_softmax(0)[i].item()
        same = (utterance == utterance[i]).nonzero()[:, 0]
        rows = [(x[same] @ x[i] / math.sqrt(len(x[i]))).softmax(0) for x in (s, t)]
        context += (rows[0] - rows[1]).square().mean().item()
    loss = partial(token_graph, student, teacher, mask, num_neighbors=2, temperature=0.2)
    nothing = {"local_weight": 0.0, "global_weight": 0.0, "context_weight": 0.0}
    assert loss(**nothing | {"local_weight": 1.0}).item() == pytest.approx(local / 5)
    assert loss(**nothing | {"global_weight": 1.0}).item() == pytest.approx(contrast / 5)
    assert loss(**nothing | {"context_weight": 1.0}).item() == pytest.approx(context / 5)
    assert loss(local_weight=2.0).item() == pytest.approx((2 * local + contrast + context) / 5)


def test_equal_graphs_leave_only_the_contrast():
    student, _, mask = make_vectors()
    value = token_graph(student, student.detach(), mask, global_weight=0.0)
    value.backward()
    assert abs(value.item()) < 1e-12 and student.grad.abs().max() < 1e-12


def test_a_sampled_mask_holds_some_of_the_positions():
    _, _, mask = make_vectors()
    generator = torch.Generator().manual_seed(0)
    draws = [sample_mask(mask, 3, generator) for _ in range(50)]
    assert all(draw.shape == mask.shape and draw.sum() == 3 and not (draw & ~mask).any() for draw in draws)
    assert torch.equal(torch.stack(draws).any(dim=0), mask)
    assert torch.equal(sample_mask(mask, 100), mask)
    with pytest.raises(ValueError, match="a limit of 1 or more are needed, got torch.bool and 0"):
        sample_mask(mask, 0)


def test_bad_input_is_named():
    student, teacher, mask = make_vectors()
    with pytest.raises(ValueError, match=r"student \(2, 5, 3\) and teacher \(2, 4, 5\) differ in shape"):
        spkd(student, teacher[:, :4], mask)
    with pytest.raises(ValueError, match=r"mask is \(2, 4\), vectors \(2, 5, 3\) need \(2, 5\)"):
        cka(student, teacher, mask[:, :4])
    with pytest.raises(ValueError, match=r"token_graph needs frames of utterances, .* got \(4, 6\)"):
        token_graph(STUDENT, TEACHER)
    with pytest.raises(ValueError, match="num_neighbors must be 1 or more and temperature positive, got 0 and 0.1"):
        token_graph(student, teacher, mask, num_neighbors=0)
    with pytest.raises(ValueError, match="the batch is empty"):
        rkd_distance(STUDENT[:0], TEACHER[:0])
