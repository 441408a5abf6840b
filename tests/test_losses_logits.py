import pytest
import torch

from speechkd.losses.logits import cross_entropy, forward_kl

TEACHER = torch.tensor([[2.0, 1, 0], [0, 0, 0], [5, 0, 0]])
STUDENT = torch.tensor([[0.0, 1, 2], [0, 0, 0], [0, 5, 0]])
LABELS = torch.tensor([0, 1, -100])


def test_losses_equal_the_published_numbers():
    mask = LABELS >= 0
    kl_1 = forward_kl(STUDENT, TEACHER, mask)
    kl_2 = forward_kl(STUDENT, TEACHER, mask, temperature=2.0)
    ce = cross_entropy(STUDENT, LABELS)
    assert kl_1.item() == pytest.approx(0.575210, abs=1e-6)
    assert kl_2.item() == pytest.approx(0.640313, abs=1e-6)
    assert ce.item() == pytest.approx(1.753109, abs=1e-6)
    assert (0.8 * ce + 1.0 * kl_2).item() == pytest.approx(2.042801, abs=1e-6)
    assert (1.0 * ce + 0.8 * kl_2).item() == pytest.approx(2.265360, abs=1e-6)


def test_equal_logits_give_no_kl_and_no_gradient():
    student = TEACHER.clone().requires_grad_()
    loss = forward_kl(student, TEACHER, temperature=2.0)
    loss.backward()
    assert abs(loss.item()) < 1e-6 and student.grad.abs().max() < 1e-6


def test_masked_rows_change_nothing():
    mask = LABELS >= 0
    other = STUDENT.clone()
    other[2] = torch.tensor([9.0, -9, 100])
    other.requires_grad_()
    total = cross_entropy(other, LABELS) + forward_kl(other, TEACHER, mask)
    total.backward()
    torch.testing.assert_close(
        total, cross_entropy(STUDENT, LABELS) + forward_kl(STUDENT, TEACHER, mask), rtol=0, atol=0
    )
    assert other.grad[2].abs().max() == 0


def test_an_empty_batch_gives_zero_with_a_live_graph():
    student = STUDENT.clone().requires_grad_()
    labels = torch.full((3,), -100)
    total = cross_entropy(student, labels) + forward_kl(student, TEACHER, labels >= 0)
    total.backward()
    assert total.item() == 0 and student.grad.abs().max() == 0


def test_an_id_that_the_teacher_rules_out_adds_nothing():
    teacher = torch.tensor([[2.0, 1.0, -torch.inf]])
    student = torch.tensor([[0.0, 1.0, -torch.inf]], requires_grad=True)
    loss = forward_kl(student, teacher)
    loss.backward()
    torch.testing.assert_close(loss, forward_kl(student[:, :2], teacher[:, :2]))
    assert student.grad.isfinite().all()


def test_the_teacher_gets_no_gradient():
    teacher = TEACHER.clone().requires_grad_()
    forward_kl(STUDENT.clone().requires_grad_(), teacher).backward()
    assert teacher.grad is None


def test_bfloat16_logits_are_computed_in_float32():
    loss = forward_kl(STUDENT.bfloat16(), TEACHER.bfloat16(), temperature=2.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, forward_kl(STUDENT, TEACHER, temperature=2.0))


def test_micro_batches_with_num_items_add_up_to_the_whole():
    whole = cross_entropy(STUDENT, torch.tensor([0, 1, 2]))
    parts = cross_entropy(STUDENT[:1], torch.tensor([0]), num_items=3) + cross_entropy(
        STUDENT[1:], torch.tensor([1, 2]), num_items=3
    )
    torch.testing.assert_close(whole, parts)


def test_different_vocabularies_and_bad_temperatures_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 3\) and teacher logits \(3, 2\) differ"):
        forward_kl(STUDENT, TEACHER[:, :2])
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        forward_kl(STUDENT, TEACHER, temperature=0)
