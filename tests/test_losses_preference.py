import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechkd.losses.preference import ddpo, dpkd, plad_ranking, sequence_log_probs, token_log_probs

LABELS = torch.tensor([[0, 2, 4], [1, 3, -100]])
TOLERANCES = {torch.float32: 1e-5, torch.float64: 2e-6}


def logits(dtype=torch.float64):
    """Student and teacher logits, (2, 3, 5), of the published reference values; the student takes a gradient."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5).to(dtype), torch.randn(2, 3, 5).to(dtype)
    return student.requires_grad_(), teacher


def one_pair(student, teacher, length_normalize):
    """Chosen and rejected log-probabilities, (1,): of the student, then of the teacher."""
    both = [sequence_log_probs(x, LABELS, length_normalize=length_normalize) for x in (student, teacher)]
    return [x[i : i + 1] for x in both for i in (0, 1)]


def plad(chosen, rejected, _reference_chosen, _reference_rejected, *mask, **options):
    return plad_ranking(chosen, rejected, *mask, **options)


def random_pairs(num_pairs=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(num_pairs, generator=generator).to(dtype) for _ in range(4)]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("loss", "length_normalize", "value", "gradient_norm"),
    [
        (ddpo, False, 0.603649, 0.108364),
        (dpkd, False, 0.603649, 0.108364),
        (dpkd, True, 0.648567, 0.046290),
        (plad, True, 0.919537, 0.970014),
    ],
    ids=["ddpo", "dpkd of sums", "dpkd length-normalised", "plad"],
)
def test_values_and_gradients_equal_the_reference_numbers(loss, length_normalize, value, gradient_norm, dtype):
    student, teacher = logits(dtype)
    result = loss(*one_pair(student, teacher, length_normalize))
    result.backward()
    assert result.dtype == dtype
    assert result.item() == pytest.approx(value, abs=TOLERANCES[dtype])
    assert student.grad.norm().item() == pytest.approx(gradient_norm, abs=TOLERANCES[dtype])


def test_sequence_log_probs_equal_a_plain_loop():
    student, _ = logits()
    sums, means = [], []
    for rows, ids in zip(student.softmax(-1), LABELS.tolist(), strict=True):
        values = [math.log(row[i]) for row, i in zip(rows.tolist(), ids, strict=True) if i >= 0]
        sums.append(sum(values))
        means.append(sum(values) / len(values))
    torch.testing.assert_close(sequence_log_probs(student, LABELS).tolist(), sums)
    torch.testing.assert_close(sequence_log_probs(student, LABELS, length_normalize=True).tolist(), means)


def test_a_constant_on_the_logits_changes_no_log_probability():
    student, _ = logits()
    torch.testing.assert_close(token_log_probs(student + 100, LABELS), token_log_probs(student, LABELS))


def test_unscored_tokens_may_be_nan_and_get_no_gradient():
    student, _ = logits()
    broken = student.detach().clone()
    broken[1, 2] = torch.nan
    broken.requires_grad_()
    log_q = sequence_log_probs(broken, LABELS)
    log_q.sum().backward()
    torch.testing.assert_close(log_q, sequence_log_probs(student, LABELS))
    assert broken.grad[1, 2].abs().max() == 0 and broken.grad.isfinite().all()


def test_a_sequence_without_labels_has_log_probability_zero_and_a_graph():
    student, _ = logits()
    log_q = sequence_log_probs(student, torch.full_like(LABELS, -100), length_normalize=True)
    log_q.sum().backward()
    assert log_q.tolist() == [0, 0] and student.grad.abs().max() == 0


def test_a_label_that_both_models_rule_out_leaves_the_margin_finite():
    student, teacher = logits()
    student, teacher = student.detach().clone(), teacher.clone()
    student[0, 0, 0] = teacher[0, 0, 0] = -torch.inf
    student.requires_grad_()
    loss = ddpo(*one_pair(student, teacher, False))
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_extreme_logits_have_finite_log_probabilities_and_gradients():
    student = torch.tensor([[[1e4, -1e4, 0.0]]], requires_grad=True)
    log_q = sequence_log_probs(student, torch.tensor([[1]]))
    log_q.sum().backward()
    assert log_q.item() == -2e4 and student.grad.isfinite().all()


def test_bfloat16_logits_are_computed_in_float32():
    student, _ = logits(torch.bfloat16)
    log_q = sequence_log_probs(student, LABELS)
    assert log_q.dtype == torch.float32
    torch.testing.assert_close(log_q, sequence_log_probs(student.float(), LABELS))
    assert ddpo(*random_pairs(dtype=torch.bfloat16)).dtype == torch.float32


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 6), st.sampled_from([0.05, 0.1, 1.0, 5.0]), st.integers(0, 1000))
def test_losses_equal_plain_loops(num_pairs, strength, seed):
    pairs = random_pairs(num_pairs, seed=seed)
    rows = list(zip(*(x.tolist() for x in pairs), strict=True))
    dpo = [math.log1p(math.exp(-strength * ((w - rw) - (r - rr)))) for w, r, rw, rr in rows]
    hinge = [max(0.0, strength - w + r) for w, r, _, _ in rows]
    assert ddpo(*pairs, beta=strength).item() == pytest.approx(sum(dpo) / num_pairs)
    assert dpkd(*pairs, beta=strength, reduction="none").tolist() == pytest.approx(dpo)
    assert plad_ranking(*pairs[:2], margin=strength, reduction="sum").item() == pytest.approx(sum(hinge))


def test_a_student_that_agrees_with_its_reference_loses_log_two():
    chosen, rejected, *_ = random_pairs()
    assert ddpo(chosen, rejected, chosen, rejected).item() == pytest.approx(math.log(2))


def test_gradients_on_chosen_and_rejected_are_opposite():
    chosen, rejected, *reference = (x.requires_grad_() for x in random_pairs())
    ddpo(chosen, rejected, *reference).backward()
    assert (chosen.grad < 0).all()
    torch.testing.assert_close(rejected.grad, -chosen.grad)
    assert reference[0].grad is None and reference[1].grad is None


def test_plad_has_no_gradient_once_the_margin_is_kept():
    chosen = torch.tensor([-1.0, -1.0], requires_grad=True)
    loss = plad_ranking(chosen, torch.tensor([-3.0, -1.5]), reduction="none")
    loss.sum().backward()
    assert loss.tolist() == [0, 0.5] and chosen.grad.tolist() == [0, -1]


def test_plad_takes_a_score_gap_for_each_pair():
    chosen, rejected = torch.tensor([-1.0, -1.0]), torch.tensor([-3.0, -1.5])
    gaps = torch.tensor([2.5, 0.25])
    assert plad_ranking(chosen, rejected, margin=gaps, reduction="none").tolist() == [0.5, 0]


@pytest.mark.parametrize("loss", [ddpo, dpkd, plad])
def test_masked_pairs_may_be_nan_and_change_nothing(loss):
    pairs = random_pairs()
    mask = torch.tensor([True, False, True, True])
    expected = loss(*(x[mask] for x in pairs))
    broken = [x.clone() for x in pairs]
    for x in broken:
        x[1] = torch.nan
    broken[0].requires_grad_()
    result = loss(*broken, mask)
    result.backward()
    torch.testing.assert_close(result, expected)
    assert broken[0].grad[1] == 0 and broken[0].grad.isfinite().all()


@pytest.mark.parametrize("loss", [ddpo, plad])
def test_a_batch_without_any_pair_that_counts_gives_zero_with_a_live_graph(loss):
    pairs = random_pairs()
    pairs[0].requires_grad_()
    result = loss(*pairs, torch.zeros(4, dtype=torch.bool))
    result.backward()
    assert result.item() == 0 and pairs[0].grad.abs().max() == 0


@pytest.mark.parametrize("loss", [ddpo, plad])
def test_micro_batches_with_num_items_add_up_to_the_whole(loss):
    pairs = random_pairs(5)
    parts = [loss(*(x[part] for x in pairs), num_items=5) for part in (slice(2), slice(2, 5))]
    torch.testing.assert_close(sum(parts), loss(*pairs))


def test_gradients_pass_gradcheck():
    student, teacher = logits()
    for length_normalize in (False, True):
        torch.autograd.gradcheck(lambda x, n=length_normalize: ddpo(*one_pair(x, teacher, n), beta=1.0), student)
        torch.autograd.gradcheck(lambda x, n=length_normalize: plad_ranking(*one_pair(x, teacher, n)[:2]), student)


def test_bad_input_is_refused_with_its_values():
    student, _ = logits()
    pairs = random_pairs(2)
    with pytest.raises(ValueError, match=r"must all be \(pairs,\), got \[\(2,\), \(2,\), \(2,\), \(1,\)\]"):
        ddpo(*pairs[:3], pairs[3][:1])
    with pytest.raises(ValueError, match=r"must all be \(pairs,\), got \[\(2, 1\), \(2, 1\), \(2, 1\)\]"):
        plad_ranking(pairs[0][:, None], pairs[1][:, None])
    with pytest.raises(ValueError, match=r"must all be \(pairs,\), got \[\(2,\), \(2,\), \(3,\)\]"):
        plad_ranking(*pairs[:2], margin=torch.ones(3))
    with pytest.raises(ValueError, match="beta must be positive, got 0"):
        ddpo(*pairs, beta=0)
    with pytest.raises(ValueError, match="must be pair_mean, sum or none, got 'token_mean'"):
        dpkd(*pairs, reduction="token_mean")
    with pytest.raises(ValueError, match="mask must be bool"):
        ddpo(*pairs, torch.ones(2))
    with pytest.raises(ValueError, match="the batch is empty"):
        ddpo(*random_pairs(0))
    with pytest.raises(ValueError, match=r"must be \(batch, length, vocabulary\), got \(3, 5\)"):
        sequence_log_probs(student[0], LABELS[0])
    with pytest.raises(ValueError, match="label 5 is not in the vocabulary of 5 ids"):
        token_log_probs(student, LABELS + 1)
