"""Worked values of LLaVA-KD and LLaVA-MoD: logits, relations of visual tokens, routing of experts, preference."""

import math

import pytest
import torch
import torch.nn.functional as F

from speechkd.losses.logits import cross_entropy, forward_kl, reverse_kl, soft_cross_entropy
from speechkd.losses.preference import ddpo, dpkd, paired_kto
from speechkd.losses.relation import fused_linear_rdist, rdist
from speechkd.losses.routing import balance_loss, top_k_gates
from speechkd.losses.weighting import UncertaintyWeights

TEACHER_ROWS = torch.tensor([[2.0, 1, 0], [0, 0, 3], [5, 0, 0]])
STUDENT_ROWS = torch.tensor([[1.0, 1, 1], [0, 1, 2], [0, 5, 0]])
LABELS = torch.tensor([[-100, 1, 2]])
A, B = torch.eye(2), torch.tensor([[1.0, 0], [1, 0]])
C, D = torch.tensor([[1.0, 0], [-1, 0]]), torch.diag(torch.tensor([3.0, 1]))


def near(value, abs=1e-5):
    return pytest.approx(value, abs=abs)


def log_probs(*values):
    return [torch.tensor([float(value)], dtype=torch.float64) for value in values]


def tokens(num_images=2, num_tokens=5, dim=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_images, num_tokens, dim, generator=generator, dtype=torch.float64)


# logits


def test_divergences_of_one_row():
    student, teacher = STUDENT_ROWS[:1].clone().requires_grad_(), TEACHER_ROWS[:1].clone().requires_grad_()
    loss = forward_kl(student, teacher)
    loss.backward()
    assert loss.item() == near(0.266217) and teacher.grad is None
    assert student.grad[0].tolist() == near([-0.331908, 0.088605, 0.243303])
    assert reverse_kl(student, teacher).item() == near(0.308994)
    assert forward_kl(student, teacher, temperature=2.0, scale_t2=False).item() == near(0.078421)
    assert forward_kl(student, teacher, temperature=2.0).item() == near(0.313684)
    assert soft_cross_entropy(student, teacher).item() == near(1.098612)


def test_response_loss_takes_the_rows_that_predict_labels():
    student, teacher, mask = STUDENT_ROWS[None, :-1], TEACHER_ROWS[None, :-1], LABELS[:, 1:] != -100
    assert forward_kl(student, teacher, mask).item() == near(0.221532)
    late = forward_kl(STUDENT_ROWS[None], TEACHER_ROWS[None], LABELS != -100)  # one position late, as in some code
    assert late.item() == near(2.538561)
    rows = forward_kl(STUDENT_ROWS, TEACHER_ROWS, reduction="none")
    assert rows.tolist() == near([0.266217, 0.176848, 4.900275])


def test_constants_and_ignored_rows_change_nothing():
    mask = torch.tensor([True, True, False])
    changed = STUDENT_ROWS + torch.tensor([[7.0], [-3], [0]])
    changed[2] = torch.tensor([9.0, -9, 1])
    assert forward_kl(changed, TEACHER_ROWS, mask).item() == near(0.221532)


def test_a_batch_axis_is_no_divisor():
    expected = near(1.781113)
    assert forward_kl(STUDENT_ROWS, TEACHER_ROWS).item() == expected
    assert forward_kl(STUDENT_ROWS[None], TEACHER_ROWS[None]).item() == expected
    batchmean = F.kl_div(
        STUDENT_ROWS[None].log_softmax(-1), TEACHER_ROWS[None].softmax(-1), reduction="batchmean"
    )  # divides by the one sequence
    assert batchmean.item() == near(5.343338)


def test_the_teacher_itself_costs_nothing():
    assert forward_kl(TEACHER_ROWS, TEACHER_ROWS).item() == near(0)
    assert rdist(TEACHER_ROWS[None], TEACHER_ROWS[None]).item() == near(0)


# relations of visual tokens


@pytest.mark.parametrize("normalize", [False, True])
def test_rotated_scaled_and_padded_tokens_cost_nothing(normalize):
    vectors = tokens()
    rotation = torch.linalg.qr(tokens(1, 4, 4, seed=1)[0]).Q
    for same in (vectors @ rotation, -vectors, 3.5 * vectors, F.pad(vectors, (0, 3))):
        assert rdist(same, vectors, normalize=normalize).abs().item() < 1e-12


def test_what_else_changes_the_relations():
    vectors = tokens()
    scaled = vectors * torch.arange(1.0, 6)[:, None]
    assert rdist(scaled, vectors).item() > 1e-3 and rdist(scaled, vectors, normalize=True).abs().item() < 1e-12
    for other in (vectors + 1, vectors[:, [1, 0, 3, 4, 2]], vectors @ tokens(1, 4, 4, seed=2)[0]):
        assert all(1 >= rdist(other, vectors, normalize=normalize).item() > 1e-3 for normalize in (False, True))


@pytest.mark.parametrize(
    ("left", "right", "raw", "normalized"),
    [(A, B, 0.292893, 0.292893), (A, C, 0.292893, 0.292893), (B, C, 1.0, 1.0), (D, A, 0.219131, 0.0)],
    ids=["A B", "A C", "B C", "D A"],
)
def test_relations_of_two_tokens(left, right, raw, normalized):
    assert rdist(left[None], right[None]).item() == near(raw)
    assert rdist(left[None], right[None], normalize=True).item() == near(normalized)


def test_relations_are_a_mean_over_images():
    student, teacher = torch.stack([A, B]), torch.stack([A, A])
    assert rdist(student, teacher).item() == near(0.146447)
    assert rdist(student, teacher, reduction="none").tolist() == near([0.0, 0.292893])
    assert rdist(student, teacher, reduction="sum").item() == near(0.292893)
    grams = [(stack @ stack.mT).flatten() for stack in (student, teacher)]
    assert 1 - F.cosine_similarity(*grams, dim=0).item() == near(0.183503)  # what a batch in one vector would give


def test_the_gradient_of_relations_knows_no_scale_and_no_rotation():
    vectors = tokens(1).requires_grad_()
    rdist(vectors, tokens(1, dim=6, seed=3)).backward()
    gradient, values = vectors.grad[0], vectors.detach()[0]
    assert (gradient * values).sum().abs().item() < 1e-15
    turned = values.T @ gradient
    assert (turned - turned.T).abs().max().item() < 1e-15 and gradient.abs().max() > 1e-4


def test_zero_tokens_give_a_finite_loss_and_gradient():
    for normalize in (False, True):
        student = torch.zeros(1, 3, 2, requires_grad=True)
        loss = rdist(student, torch.zeros(1, 3, 4), normalize=normalize)
        loss.backward()
        assert loss.item() == 1 and student.grad.isfinite().all()


def test_masked_tokens_and_images_count_nothing():
    student, teacher = tokens(3), tokens(3, seed=5)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [False] * 5])
    broken = student.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    loss = rdist(broken, teacher, mask)
    loss.backward()
    apart = [rdist(student[:1], teacher[:1]), rdist(student[1:2, :3], teacher[1:2, :3])]
    torch.testing.assert_close(loss, sum(apart) / 2)
    assert broken.grad.isfinite().all() and broken.grad[~mask].abs().max() == 0


def test_a_batch_without_images_has_losses_of_zero():
    student = torch.randn(2, 5, 3, requires_grad=True)
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    loss = rdist(student, torch.randn(2, 5, 3), nothing) + forward_kl(student, torch.randn(2, 5, 3), nothing)
    loss.backward()
    assert loss.item() == 0 and student.grad.abs().max() == 0


def test_relations_are_float32_and_finite_on_bfloat16_logits():
    student = (30 * torch.randn(2, 20, 300)).bfloat16().requires_grad_()
    loss = rdist(student, (30 * torch.randn(2, 20, 300)).bfloat16())
    loss.backward()
    assert loss.dtype == torch.float32 and 0 <= loss.item() <= 1 and student.grad.isfinite().all()


@pytest.mark.parametrize("normalize", [False, True])
def test_relations_of_logits_need_no_logits(normalize):
    states = [tokens(3).requires_grad_(), tokens(3, dim=6, seed=1)]
    heads = [tokens(1, 11, 4, seed=2)[0].requires_grad_(), tokens(1, 11, 6, seed=3)[0].requires_grad_()]
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [False] * 5])
    plain = rdist(states[0] @ heads[0].T, states[1] @ heads[1].T, mask, normalize=normalize)
    expected = torch.autograd.grad(plain, (states[0], heads[0]))
    fused = fused_linear_rdist(states[0], heads[0], states[1], heads[1], mask, normalize=normalize)
    torch.testing.assert_close(fused, plain)
    fused.backward()
    for tensor, gradient in zip((states[0], heads[0]), expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)
    assert heads[1].grad is None


def test_unequal_numbers_of_visual_tokens_are_refused():
    with pytest.raises(
        ValueError, match=r"student \(2, 5, 4\) and teacher \(2, 6, 4\) must be \(images, tokens, dim\)"
    ):
        rdist(tokens(), tokens(num_tokens=6))


# routing


def test_gates_of_the_chosen_experts_add_up_to_one():
    logits = torch.tensor([[2.0, 1, 0, -1]])
    assert logits.softmax(-1)[0].tolist() == near([0.643914, 0.236883, 0.087144, 0.032059])
    gates, experts = top_k_gates(logits, 2)
    assert gates[0].tolist() == near([0.731059, 0.268941]) and experts.tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="top_k must be 1 to 4, the number of experts, got 5"):
        top_k_gates(logits, 5)


def test_balance_of_experts():
    rows = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.6, 0.2, 0.1, 0.1], [0.25] * 4, [0.1, 0.1, 0.1, 0.7]]).log()
    assert balance_loss(rows).item() == near(1.525)
    assert balance_loss(torch.zeros(5, 4)).item() == near(1)
    collapsed = torch.tensor([[99.0, 0, 0, 0]]).expand(5, 4)
    assert balance_loss(collapsed).item() == near(4)


def test_balance_leaves_padding_out_and_pushes_tokens_away_from_the_crowd():
    logits = torch.tensor([[1.0, 0], [1.0, 0], [torch.nan, torch.nan]], requires_grad=True)
    mask = torch.tensor([True, True, False])
    loss = balance_loss(logits, mask)
    loss.backward()
    assert loss.item() == near(2 * torch.tensor([1.0, 0]).softmax(-1)[0].item())
    assert logits.grad[0, 0] > 0 and logits.grad[2].abs().max() == 0
    nothing = balance_loss(logits, torch.zeros(3, dtype=torch.bool))
    assert nothing.item() == 0 and nothing.requires_grad


# preference


def test_preference_against_the_teacher():
    pair = log_probs(-10, -12, -9, -10)
    assert dpkd(*pair, beta=0.1).item() == ddpo(*pair, beta=0.1).item() == near(0.644397)
    for beta in (0.1, 2.0):
        assert dpkd(*log_probs(-9, -10, -9, -10), beta=beta).item() == near(math.log(2))


def test_paired_kto_of_one_pair():
    pair = log_probs(-8, -12, -9, -10)
    assert paired_kto(*pair).item() == near((0.475021 + 0.425557) / 2)


def test_paired_kto_equals_a_loop_and_holds_the_means_fixed():
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(5, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(4)]
    mask = torch.tensor([True, True, False, True, True])
    loss = paired_kto(*values, mask, beta=0.5)
    loss.backward()
    better, worse = (
        (ours - theirs).detach()[mask] for ours, theirs in ((values[0], values[2]), (values[1], values[3]))
    )
    means = [max(0.0, r.mean().item()) for r in (better, worse)]
    lost = [1 - 1 / (1 + math.exp(-0.5 * (r - means[1]))) for r in better.tolist()]
    lost_too = [1 - 1 / (1 + math.exp(-0.5 * (means[0] - r))) for r in worse.tolist()]
    assert loss.item() == near((sum(lost) + sum(lost_too)) / 8)
    slopes = [-0.5 * x * (1 - x) / 8 for x in lost]
    assert values[0].grad[mask].tolist() == near(slopes) and values[0].grad[2] == 0 and values[2].grad is None
    with pytest.raises(ValueError, match="beta must be positive, got 0"):
        paired_kto(*values, beta=0)


# learnt weights


def test_learnt_weights_of_terms():
    weights = UncertaintyWeights(("labels", "visual"))
    terms = {"visual": torch.tensor(4.0), "labels": torch.tensor(1.0)}
    assert weights(terms).item() == near(2.5)
    optimizer = torch.optim.LBFGS(weights.parameters(), max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = weights(terms)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert weights.log_variances.tolist() == near([0.0, math.log(4)], abs=1e-3)
    with pytest.raises(ValueError, match=r"the terms are \['labels'\], the weights are for \['labels', 'visual'\]"):
        weights({"labels": terms["labels"]})


def test_learnt_weights_of_sums_are_count_times_those_of_means():
    weights = UncertaintyWeights(("labels", "visual"))
    with torch.no_grad():
        weights.log_variances.copy_(torch.tensor([0.3, -0.7]))
    means = {"labels": torch.tensor(1.5), "visual": torch.tensor(0.2)}
    sums = {name: 6 * value for name, value in means.items()}
    assert weights(sums, num_items=6).item() == near(6 * weights(means).item())


def test_labels_alone_are_the_usual_cross_entropy():
    logits = STUDENT_ROWS[None]
    ours = cross_entropy(logits[:, :-1], LABELS[:, 1:])
    torch.testing.assert_close(ours, F.cross_entropy(STUDENT_ROWS[:-1], LABELS[0, 1:]))
