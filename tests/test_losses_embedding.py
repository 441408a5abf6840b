import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from speechkd.losses.embedding import (
    ClassMeans,
    PairCritic,
    TeacherQueue,
    info_nce,
    mutual_information,
    norm_direction,
    pkd,
)
from speechkd.losses.hidden import hidden_cosine

torch.manual_seed(1)
STUDENT, TEACHER = torch.randn(4, 6), torch.randn(4, 6)
CENTER = torch.linspace(-1, 2, 6, dtype=torch.float64)


def bilinear_critic(student, teacher):
    return student @ teacher.T / 2, teacher[:, 0] / 3


EVERY = {
    "pkd": pkd,
    "info nce": partial(info_nce, temperature=0.5),
    "mutual information": lambda s, t, *args, **kwargs: mutual_information(s, t, bilinear_critic, *args, **kwargs),
    "norm and direction": partial(norm_direction, centers=CENTER),
}
every_loss = pytest.mark.parametrize("loss", EVERY.values(), ids=EVERY)


def make_vectors(dtype=torch.float64, seed=0):
    """Student and teacher, (5, 6), with NaN in the last row, and the mask of the others."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 5, 6, generator=generator, dtype=dtype)
    mask = torch.tensor([True, True, True, True, False])
    student, teacher = (vectors.masked_fill(~mask[:, None], torch.nan) for vectors in (student, teacher))
    return student.requires_grad_(), teacher, mask


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-6), (torch.float32, 1e-5)])
def test_reference_values(dtype, tolerance):
    student, teacher = STUDENT.to(dtype), TEACHER.to(dtype)
    assert pkd(student, teacher).item() == pytest.approx(2.624355, abs=tolerance)
    assert info_nce(student, teacher).item() == pytest.approx(14.444944, abs=tolerance)
    assert info_nce(student, teacher, temperature=1.0).item() == pytest.approx(1.748776, abs=tolerance)
    nd = norm_direction(student, teacher, centers=teacher.mean(dim=0))
    assert nd.item() == pytest.approx(1.036497, abs=tolerance)


@every_loss
def test_masked_vectors_add_no_loss_and_no_gradient(loss):
    student, teacher, mask = make_vectors()
    value = loss(student, teacher, mask)
    value.backward()
    torch.testing.assert_close(value, loss(student[:4], teacher[:4]))
    assert student.grad[4].abs().max() == 0 and student.grad[:4].abs().sum(dim=-1).min() > 0
    values = loss(student, teacher, mask, reduction="none")
    assert values.shape == (5,) and values[4] == 0
    torch.testing.assert_close(values.sum() / 4, value)
    torch.testing.assert_close(loss(student, teacher, mask, reduction="sum", num_items=3), 4 * value)
    torch.testing.assert_close(loss(student, teacher, mask, num_items=8), value / 2)


@every_loss
def test_nothing_scored_gives_zero_with_a_live_graph(loss):
    student, teacher, mask = make_vectors()
    value = loss(student, teacher, torch.zeros_like(mask))
    value.backward()
    assert value.item() == 0 and student.grad.abs().max() == 0


@every_loss
def test_the_teacher_gets_no_gradient_and_the_student_the_right_one(loss):
    student, teacher, _ = make_vectors()
    student, teacher = student[:4].detach().requires_grad_(), teacher[:4].requires_grad_()
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
def test_zero_vectors_keep_the_gradient_finite(loss):
    _, teacher, mask = make_vectors()
    student = torch.zeros_like(teacher).requires_grad_()
    loss(student, torch.zeros_like(teacher), mask).backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("loss", [pkd, EVERY["norm and direction"]])
def test_micro_batches_with_num_items_add_up_to_the_whole(loss):
    student, teacher, mask = make_vectors()
    parts = [loss(student[part], teacher[part], mask[part], num_items=4) for part in (slice(0, 3), slice(3, 5))]
    torch.testing.assert_close(sum(parts), loss(student, teacher, mask))


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(0.01, 100), seed=st.integers(0, 1000))
def test_the_distance_of_unit_vectors_is_twice_the_cosine_distance(scale, seed):
    student, teacher, mask = make_vectors(seed=seed)
    value = pkd(scale * student, teacher, mask)
    torch.testing.assert_close(value, 2 * hidden_cosine(student, teacher, mask))
    torch.testing.assert_close(pkd(student, teacher, mask, divide_by_dim=True), value / 6)
    assert pkd(student, scale * student.detach(), mask).item() < 1e-12


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(0.01, 100), temperature=st.floats(0.05, 2), seed=st.integers(0, 1000))
def test_the_contrast_equals_a_loop_over_candidates_and_is_blind_to_length(scale, temperature, seed):
    student, teacher, mask = make_vectors(seed=seed)
    queue = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    candidates = [*teacher[mask], *queue]
    total = 0.0
    for i in range(4):
        s = student[i].detach()
        exps = [math.exp((s @ t / s.norm() / t.norm()).item() / temperature) for t in candidates]
        total -= math.log(exps[i] / sum(exps))
    value = info_nce(scale * student, teacher / scale, mask, temperature=temperature, queue=queue)
    assert value.item() == pytest.approx(total / 4)


def test_a_queue_holds_the_latest_vectors():
    queue = TeacherQueue(4, 1)
    assert queue.vectors().shape == (0, 1)
    seen = torch.arange(9.0)[:, None]
    for start, stop in ((0, 3), (3, 5), (5, 9)):
        queue.push(seen, (torch.arange(9) >= start) & (torch.arange(9) < stop))
        assert sorted(queue.vectors()[:, 0].tolist()) == list(range(max(0, stop - 4), stop))
    queue.push(seen, torch.zeros(9, dtype=torch.bool))
    queue.push(seen + 10)
    assert sorted(queue.vectors()[:, 0].tolist()) == [15, 16, 17, 18]


def test_a_queue_comes_back_from_a_checkpoint():
    queue, other = TeacherQueue(4, 2), TeacherQueue(4, 2)
    queue.push(torch.randn(3, 2))
    other.load_state_dict(queue.state_dict())
    for each in (queue, other):
        each.push(torch.ones(2, 2))
    torch.testing.assert_close(other.vectors(), queue.vectors(), rtol=0, atol=0)


def test_a_queue_may_be_pushed_before_the_backward_pass_and_carries_no_gradient():
    queue = TeacherQueue(4, 6)
    queue.push(torch.randn(4, 6))
    student = STUDENT.clone().requires_grad_()
    teacher = TEACHER.clone().requires_grad_()
    loss = info_nce(student, teacher, queue=queue.vectors())
    expected = torch.autograd.grad(loss, student, retain_graph=True)[0]
    queue.push(teacher)
    loss.backward()
    torch.testing.assert_close(student.grad, expected, rtol=0, atol=0)
    assert teacher.grad is None and not queue.stored.requires_grad


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_information_bound_equals_a_loop(alpha):
    student, teacher, mask = make_vectors()
    scores, log_baseline = bilinear_critic(student[mask].detach(), teacher[mask])
    f, q = scores.exp(), log_baseline.exp()
    joint = marginal = 0.0
    for j in range(4):
        joint += math.log(f[j, j] / (alpha * f[:, j].mean() + (1 - alpha) * q[j])) / 4
        others = [f[i, j].item() for i in range(4) if i != j]
        mean_others = sum(others) / 3
        marginal += sum(other / (alpha * mean_others + (1 - alpha) * q[j].item()) for other in others) / 12
    value = mutual_information(student, teacher, bilinear_critic, mask, alpha=alpha)
    assert value.item() == pytest.approx(-(1 + joint - marginal))


def test_with_alpha_one_the_information_is_that_of_the_contrast():
    student, teacher, mask = make_vectors()
    scores = bilinear_critic(student[mask], teacher[mask])[0]
    contrast = F.cross_entropy(scores.T, torch.arange(4))
    value = mutual_information(student, teacher, bilinear_critic, mask, alpha=1.0)
    torch.testing.assert_close(value, contrast - math.log(4))
    assert value >= -math.log(4)


def test_a_learned_critic_finds_shared_information():
    torch.manual_seed(0)
    critic = PairCritic(6, 6, hidden=16)
    optimizer = torch.optim.Adam(critic.parameters(), lr=0.02)
    noise = torch.randn(2, 64, 6)
    student, teacher = noise[0], noise[0] + 0.3 * noise[1]
    for _ in range(60):
        optimizer.zero_grad()
        mutual_information(student, teacher, critic).backward()
        optimizer.step()
    related = mutual_information(student, teacher, critic)
    shuffled = mutual_information(student, teacher.roll(1, 0), critic)
    assert related < -1 and shuffled > 0
    assert all(weight.grad.abs().max() > 0 for weight in critic.parameters())


def test_a_vector_alone_shares_no_information():
    student, teacher, mask = make_vectors()
    value = mutual_information(student[:1], teacher[:1], bilinear_critic)
    value.backward()
    assert value.item() == 0 and student.grad[:4].abs().max() == 0


def test_norm_and_direction_equal_their_definition_and_are_zero_only_along_the_center():
    student, teacher, mask = make_vectors()
    center = CENTER / CENTER.norm()
    expected = [
        1 - (student[i] @ center).item() / max(student[i].norm().item(), teacher[i].norm().item()) for i in range(4)
    ]
    values = norm_direction(student, teacher, mask, centers=CENTER, reduction="none")
    assert values[:4].tolist() == pytest.approx(expected)
    along = 2 * CENTER[None]
    assert norm_direction(along, along / 3, centers=CENTER).item() == pytest.approx(0, abs=1e-12)
    assert norm_direction(along, along * 2, centers=CENTER).item() == pytest.approx(0.5)


def test_class_means_are_those_of_the_batches_seen():
    means = ClassMeans(4, 6)
    teacher, labels = torch.randn(2, 5, 6), torch.tensor([[0, 1, 1, -100, 2], [0, 0, 2, 2, -100]])
    for vectors, ids in zip(teacher.bfloat16(), labels, strict=True):
        means.add(vectors, ids)
    rounded = teacher.bfloat16().float()
    for label in range(3):
        torch.testing.assert_close(means(torch.tensor(label)), rounded[labels == label].mean(dim=0))
    assert means(torch.tensor([3, -100])).abs().max() == 0
    value = norm_direction(teacher, teacher, centers=means(labels))
    directions = F.normalize(means(labels), dim=-1)
    expected = 1 - (directions * F.normalize(teacher, dim=-1)).sum(dim=-1)
    torch.testing.assert_close(value, expected.mean())


def test_bad_input_is_named():
    student, teacher, mask = make_vectors()
    with pytest.raises(ValueError, match="have 5 values, the teacher's 6"):
        pkd(student[:, :5], teacher, mask)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        info_nce(student, teacher, mask, temperature=0)
    with pytest.raises(ValueError, match=r"queue is \(3, 5\), vectors of width 6 need"):
        info_nce(student, teacher, mask, queue=torch.zeros(3, 5))
    with pytest.raises(ValueError, match="a queue holds 1 vector or more, got size=0"):
        TeacherQueue(0, 6)
    with pytest.raises(ValueError, match=r"vectors \(5, 6\) do not fit a queue of width 4"):
        TeacherQueue(3, 4).push(teacher)
    with pytest.raises(ValueError, match="alpha must be 0 to 1, got 2"):
        mutual_information(student, teacher, bilinear_critic, mask, alpha=2)
    with pytest.raises(ValueError, match=r"centers are \(4, 6\), vectors \(5, 6\) need the same shape or \(6,\)"):
        norm_direction(student, teacher, mask, centers=torch.zeros(4, 6))
    means = ClassMeans(4, 6)
    with pytest.raises(ValueError, match="label 4 is not one of 4 classes, 0 to 3"):
        means(torch.tensor([4]))
    with pytest.raises(ValueError, match="label -1 is not one of 4 classes"):
        means.add(teacher, torch.tensor([0, 1, 2, 3, -1]))
    with pytest.raises(ValueError, match=r"vectors \(5, 6\) and labels \(4,\) do not fit width 6"):
        means.add(teacher, torch.zeros(4, dtype=torch.int64))
