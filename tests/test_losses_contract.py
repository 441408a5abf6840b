"""What every logit loss keeps, whichever it is: one batch, one list of losses, one property a test."""

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechkd.losses.contract import check_fraction, kl_rows, log_mix, log_probs, reduce_rows
from speechkd.losses.logits import (
    adaptive_kl,
    atkd,
    cross_entropy,
    dac_kl,
    decoupled_kd,
    forward_kl,
    generalized_jsd,
    hinton_kd,
    jeffreys,
    js,
    logit_mse,
    luminet,
    reverse_kl,
    self_evolution_kd,
    sinkhorn_kd,
    skew_kl,
    skew_reverse_kl,
    soft_cross_entropy,
    standardized_kl,
    token_scaled_kd,
    total_variation,
)


def fixed_bounds(log_p, log_q):
    return log_p.new_full((len(log_p),), 0.05), log_p.new_full((len(log_p),), 0.9)


def label_cross_entropy(student, teacher, mask=None, *, labels, **options):
    options.pop("temperature", None)
    return cross_entropy(student, labels if mask is None else labels.masked_fill(~mask, -100), **options)


UNLABELLED = {
    "forward_kl": forward_kl,
    "soft_cross_entropy": soft_cross_entropy,
    "reverse_kl": reverse_kl,
    "jeffreys": jeffreys,
    "generalized_jsd": partial(generalized_jsd, beta=0.2),
    "js": js,
    "total_variation": total_variation,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "skew_reverse_kl, mixture held": partial(skew_reverse_kl, detach_mixture=True),
    "adaptive_kl": adaptive_kl,
    "adaptive_kl, live weight": partial(adaptive_kl, detach_weight=False),
    "logit_mse": logit_mse,
    "logit_mse, raw": partial(logit_mse, center=False),
    "standardized_kl": standardized_kl,
    "luminet": luminet,
    "sinkhorn_kd": sinkhorn_kd,
    "sinkhorn_kd, plan held": partial(sinkhorn_kd, detach_plan=True),
}
LABELLED = {
    "cross_entropy": label_cross_entropy,
    "hinton_kd": hinton_kd,
    "decoupled_kd": decoupled_kd,
    "atkd": atkd,
    "token_scaled_kd": token_scaled_kd,
    "self_evolution_kd": self_evolution_kd,
    "self_evolution_kd, threshold": partial(self_evolution_kd, threshold=1.0),
    "dac_kl": partial(dac_kl, bounds=fixed_bounds),
}
NAMES = [*UNLABELLED, *LABELLED]
WITH_TEACHER = [name for name in NAMES if name != "cross_entropy"]
READ_RAW_LOGITS = {"logit_mse, raw", "luminet"}
HOLD_A_WEIGHT = {"skew_reverse_kl, mixture held", "adaptive_kl", "sinkhorn_kd, plan held"}
COUPLE_THE_BATCH = {"luminet", "sinkhorn_kd", "sinkhorn_kd, plan held", "atkd", "self_evolution_kd"}
NOT_ZERO_AT_EQUAL = {"soft_cross_entropy", "token_scaled_kd"} | {n for n in NAMES if "sinkhorn" in n or "self_ev" in n}
NOT_ZERO_AT_EQUAL |= {"cross_entropy", "hinton_kd"}
REDUCTIONS = ("token_mean", "sum", "seq_mean", "none")

each_loss = pytest.mark.parametrize("name", NAMES)
each_loss_with_teacher = pytest.mark.parametrize("name", WITH_TEACHER)
few_examples = settings(max_examples=7, deadline=None, derandomize=True, database=None)


def evaluate(name, student, teacher, mask, labels, **options):
    if name in LABELLED:
        return LABELLED[name](student, teacher, mask, labels=labels, **options)
    return UNLABELLED[name](student, teacher, mask, **options)


def with_gradient(name, student, teacher, mask, labels, **options):
    student = student.clone().requires_grad_()
    loss = evaluate(name, student, teacher, mask, labels, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach(), gradient


@st.composite
def batches(draw):
    """Student and teacher logits in steps of 1/8, so that adding an integer rounds nothing; mask, labels, T."""
    batch, length, vocabulary = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(2, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    logits = torch.randn(2, batch, length, vocabulary, generator=generator, dtype=torch.float64)
    student, teacher = (logits * draw(st.sampled_from([0.5, 1, 5])) * 8).round() / 8
    mask = torch.rand(batch, length, generator=generator) < draw(st.sampled_from([0.3, 0.7, 1.1]))
    labels = torch.randint(vocabulary, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) < 0.2] = -100
    return student, teacher, mask, labels, draw(st.sampled_from([0.5, 1.0, 2.0, 7.3]))


def fixed_batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    student, teacher = torch.randn(2, 3, 4, 6, generator=generator, dtype=torch.float64).mul(2).to(dtype)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1], [1, 1, 0, 0]]).bool()
    labels = torch.tensor([[0, 5, 2, 1], [3, 3, 4, -100], [1, 2, -100, 0]])
    return student, teacher, mask, labels


@pytest.mark.parametrize("name", [name for name in NAMES if name not in READ_RAW_LOGITS])
@few_examples
@given(batches())
def test_gradients_of_a_row_add_up_to_zero(name, batch):
    *tensors, temperature = batch
    _, gradient = with_gradient(name, *tensors, temperature=temperature, reduction="sum")
    assert gradient.sum(dim=-1).abs().max() < 1e-10 * max(1, gradient.abs().max())


@pytest.mark.parametrize("name", [name for name in NAMES if name not in READ_RAW_LOGITS])
@few_examples
@given(batches(), st.integers(-50, 50), st.integers(-50, 50))
def test_a_constant_on_all_logits_of_a_row_changes_nothing(name, batch, ours, theirs):
    student, teacher, mask, labels, temperature = batch
    row = torch.arange(mask.numel()).view(*mask.shape, 1)
    moved = with_gradient(name, student + ours * row, teacher + theirs * row, mask, labels, temperature=temperature)
    torch.testing.assert_close(moved, with_gradient(name, student, teacher, mask, labels, temperature=temperature))


@each_loss
@few_examples
@given(batches(), st.randoms(use_true_random=False))
def test_the_order_of_the_ids_does_not_matter(name, batch, random):
    student, teacher, mask, labels, temperature = batch
    student = student + torch.linspace(0, 0.01, student.shape[-1])  # no ties, which a sort may break either way
    teacher = teacher + torch.linspace(0, 0.02, student.shape[-1])
    order = random.sample(range(student.shape[-1]), student.shape[-1])
    new_id = torch.tensor(order).argsort()
    moved_labels = torch.where(labels >= 0, new_id[labels.clamp(min=0)], labels)
    loss, gradient = with_gradient(name, student, teacher, mask, labels, temperature=temperature)
    moved = with_gradient(name, student[..., order], teacher[..., order], mask, moved_labels, temperature=temperature)
    torch.testing.assert_close(moved, (loss, gradient[..., order]))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_ZERO_AT_EQUAL])
@few_examples
@given(batches(), st.integers(-20, 20))
def test_equal_distributions_give_no_loss_and_no_gradient(name, batch, constant):
    _, teacher, _, labels, _ = batch
    labels = labels.clamp(min=0)
    equal = teacher + (0 if name in READ_RAW_LOGITS else constant)
    loss, gradient = with_gradient(name, equal, teacher, None, labels, temperature=2.0)
    assert loss.abs() < 1e-12 and gradient.abs().max() < 1e-9


@each_loss
def test_different_distributions_give_a_loss_and_a_gradient_on_every_scored_token(name):
    student, teacher, mask, labels = fixed_batch()
    loss, gradient = with_gradient(name, student, teacher, mask, labels, reduction="none")
    scored = mask & (labels >= 0) if name in LABELLED else mask
    assert (loss[scored] > 0).all() and (gradient[scored].abs().amax(dim=-1) > 0).all()


@each_loss
@few_examples
@given(batches())
def test_masked_tokens_may_hold_nan_and_get_exactly_no_gradient(name, batch):
    student, teacher, mask, labels, temperature = batch
    scored = mask & (labels >= 0) if name in LABELLED else mask
    hole = ~scored.unsqueeze(-1)
    broken = student.masked_fill(hole, torch.nan), teacher.masked_fill(hole, torch.nan)
    loss, gradient = with_gradient(name, *broken, mask, labels, temperature=temperature, reduction="none")
    whole = with_gradient(name, student, teacher, mask, labels, temperature=temperature, reduction="none")
    torch.testing.assert_close((loss, gradient), whole, rtol=0, atol=0)
    assert (gradient[~scored] == 0).all() and (loss[~scored] == 0).all()


@each_loss
def test_a_batch_with_all_tokens_masked_gives_zero_with_a_live_graph(name):
    student, teacher, mask, labels = fixed_batch()
    batch = student, teacher, torch.zeros_like(mask), labels
    for reduction, num_items in itertools.product(REDUCTIONS, (None, 0, torch.tensor(0), 7)):
        loss, gradient = with_gradient(name, *batch, reduction=reduction, num_items=num_items)
        assert (loss == 0).all() and (gradient == 0).all()
        assert loss.shape == (mask.shape if reduction == "none" else ())


@each_loss
@few_examples
@given(batches(), st.integers(1, 9))
def test_reductions_equal_a_plain_loop(name, batch, num_items):
    student, teacher, mask, labels, temperature = batch
    compute = partial(evaluate, name, student, teacher, mask, labels, temperature=temperature)
    per_token = compute(reduction="none").tolist()
    scored = mask & (labels >= 0) if name in LABELLED else mask
    rows = [[x for x, keep in zip(*pair, strict=True) if keep] for pair in zip(per_token, scored.tolist(), strict=True)]
    rows = [row for row in rows if row]
    total = sum(sum(row) for row in rows)
    means = sum(sum(row) / len(row) for row in rows)
    num_tokens = sum(len(row) for row in rows)
    close = partial(pytest.approx, rel=1e-9, abs=1e-12)
    assert compute(reduction="sum").item() == close(total)
    assert compute(reduction="token_mean").item() == close(total / max(num_tokens, 1))
    assert compute(reduction="seq_mean").item() == close(means / max(len(rows), 1))
    assert compute(reduction="token_mean", num_items=num_items).item() == close(total / num_items)
    assert compute(reduction="seq_mean", num_items=torch.tensor(num_items)).item() == close(means / num_items)


@pytest.mark.parametrize("reduction", ["token_mean", "seq_mean"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in COUPLE_THE_BATCH])
def test_micro_batches_with_num_items_add_up_to_the_whole(name, reduction):
    student, teacher, mask, labels = fixed_batch()
    whole = with_gradient(name, student, teacher, mask, labels, reduction=reduction)
    num_tokens = (mask & (labels >= 0) if name in LABELLED else mask).sum()
    num_items = num_tokens if reduction == "token_mean" else 3
    loss, gradients = 0, []
    for part in (slice(0, 1), slice(1, 3)):
        tensors = [x[part] for x in (student, teacher, mask, labels)]
        value, gradient = with_gradient(name, *tensors, reduction=reduction, num_items=num_items)
        loss, gradients = loss + value, [*gradients, gradient]
    torch.testing.assert_close((loss, torch.cat(gradients)), whole)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in HOLD_A_WEIGHT])
def test_gradients_equal_finite_differences(name):
    student, teacher, mask, labels = (x[:2, :3] for x in fixed_batch())
    for reduction in ("token_mean", "seq_mean", "none"):
        loss = partial(evaluate, name, teacher=teacher, mask=mask, labels=labels, temperature=1.7, reduction=reduction)
        assert torch.autograd.gradcheck(lambda logits, loss=loss: loss(student=logits), student.requires_grad_())


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(name, dtype):
    student, teacher, mask, labels = fixed_batch(dtype)
    loss, gradient = with_gradient(name, student, teacher, mask, labels, temperature=2.0)
    full_loss, full_gradient = with_gradient(name, student.float(), teacher.float(), mask, labels, temperature=2.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close((loss, gradient), (full_loss, full_gradient.to(dtype)), rtol=0, atol=0)
    assert evaluate(name, *fixed_batch(torch.float64)).dtype == torch.float64


@each_loss
def test_autocast_changes_nothing(name):
    batch = fixed_batch(torch.float32)
    plain = with_gradient(name, *batch, temperature=2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(with_gradient(name, *batch, temperature=2.0), plain, rtol=0, atol=0)


@each_loss
@settings(few_examples, max_examples=25)
@given(st.integers(0, 10_000), st.integers(2, 6), st.sampled_from([0.1, 1.0, 2.0, 100.0]), st.booleans())
def test_extreme_logits_stay_finite(name, seed, vocabulary, temperature, in_float64):
    generator = torch.Generator().manual_seed(seed)
    choices = torch.tensor([-torch.inf, -torch.inf, -1e4, -1.0, 0.0, 2.5, 1e4], dtype=torch.float64)
    logits = choices[torch.randint(len(choices), (2, 2, 3, vocabulary), generator=generator)]
    finite = torch.randint(vocabulary, (2, 2, 3, 1), generator=generator)
    logits = logits.scatter(-1, finite, logits.gather(-1, finite).nan_to_num(neginf=-1e4))
    student, teacher = logits if in_float64 else logits.float()
    labels = finite[0, ..., 0]  # the student never rules out the label, where a cross entropy is rightly infinite
    loss, gradient = with_gradient(name, student, teacher, None, labels, temperature=temperature)
    assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("logit_mse")])
@few_examples
@given(batches())
def test_an_id_that_both_models_rule_out_changes_nothing(name, batch):
    student, teacher, mask, labels, temperature = batch
    never = student.new_full((*mask.shape, 1), -torch.inf)
    loss, gradient = with_gradient(name, student, teacher, mask, labels, temperature=temperature)
    student, teacher = torch.cat([student, never], dim=-1), torch.cat([teacher, never], dim=-1)
    longer, longer_gradient = with_gradient(name, student, teacher, mask, labels, temperature=temperature)
    torch.testing.assert_close((longer, longer_gradient[..., :-1]), (loss, gradient))
    assert (longer_gradient[..., -1] == 0).all()


@each_loss_with_teacher
def test_the_teacher_gets_no_gradient(name):
    student, teacher, mask, labels = fixed_batch()
    teacher.requires_grad_()
    evaluate(name, student.requires_grad_(), teacher, mask, labels).backward()
    assert teacher.grad is None and student.grad.abs().max() > 0


@pytest.mark.parametrize("name", [name for name in NAMES if name != "token_scaled_kd"])
def test_a_list_of_tokens_equals_a_batch_of_sequences(name):
    student, teacher, mask, labels = fixed_batch()
    flat = evaluate(name, student.flatten(0, 1), teacher.flatten(0, 1), mask.flatten(), labels.flatten())
    torch.testing.assert_close(flat, evaluate(name, student, teacher, mask, labels))


@each_loss_with_teacher
@pytest.mark.parametrize("sizes", [(60, 64), (64, 60)])
def test_padding_of_the_larger_vocabulary_is_cut(name, sizes):
    torch.manual_seed(0)
    student, teacher = (torch.randn(1, 2, size) for size in sizes)
    labels = torch.tensor([[0, 59]])
    loss, gradient = with_gradient(name, student, teacher, None, labels)
    cut = with_gradient(name, student[..., :60], teacher[..., :60], None, labels)
    torch.testing.assert_close((loss, gradient[..., :60]), cut, rtol=0, atol=0)
    assert (gradient[..., 60:] == 0).all()


def test_padding_of_an_embedding_matrix_differs_from_another_tokenizer():
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 151_936), torch.randn(1, 152_064)
    torch.testing.assert_close(forward_kl(student, teacher), forward_kl(student, teacher[:, :151_936]))
    with pytest.raises(ValueError, match=r"51865 and 51866 ids are not one tokenizer.*cross_tokenizer"):
        forward_kl(torch.zeros(1, 51_865), torch.zeros(1, 51_866))
    with pytest.raises(ValueError, match="64 and 576 ids"):
        forward_kl(torch.zeros(1, 64), torch.zeros(1, 576))


BAD_BATCHES = [
    ((2, 3, 5), (2, 3, 4), {}, "of 5 and 4 ids are not one tokenizer"),
    ((2, 3, 5), (2, 4, 5), {}, r"\(2, 3, 5\) and teacher logits \(2, 4, 5\) differ in shape"),
    ((5,), (5,), {}, r"\(5,\) and teacher logits \(5,\) differ in shape or are not"),
    ((2, 0, 5), (2, 0, 5), {}, r"the batch is empty: logits are \(2, 0, 5\)"),
    ((2, 3, 5), (2, 3, 5), {"mask": torch.ones(2, 3)}, r"mask must be bool.*torch.float32.*mask.bool"),
    ((2, 3, 5), (2, 3, 5), {"mask": torch.ones(3, 2).bool()}, r"mask is \(3, 2\).*need \(2, 3\)"),
    ((2, 3, 5), (2, 3, 5), {"reduction": "mean"}, "token_mean, sum, seq_mean or none, got 'mean'"),
    *(
        ((2, 3, 5), (2, 3, 5), {"temperature": value}, f"positive and finite, got {value}")
        for value in (0.0, -1.0, math.nan, math.inf)
    ),
]


@each_loss_with_teacher
def test_batches_that_do_not_fit_are_refused(name):
    for student_shape, teacher_shape, options, message in BAD_BATCHES:
        labels = torch.zeros(2, student_shape[1] if len(student_shape) > 1 else 1, dtype=torch.int64)
        student, teacher = torch.zeros(student_shape), torch.zeros(teacher_shape)
        with pytest.raises(ValueError, match=message):
            evaluate(name, student, teacher, labels=labels, **{"mask": None} | options)


BAD_LABELS = [
    (torch.tensor([[0, 5]]), "label 5 is not in the vocabulary of 5 ids; .* have -100"),
    (torch.tensor([[-1, 0]]), "label -1 is not in the vocabulary of 5 ids"),
    (torch.tensor([[0, 1, 2]]), r"labels are \(1, 3\), the logits \(1, 2, 5\) need \(1, 2\)"),
    (torch.tensor([[0.0, 1.0]]), r"labels must be int64 token ids, got torch.float32; pass labels.long"),
]


@pytest.mark.parametrize("name", LABELLED)
def test_labels_that_do_not_fit_are_refused(name):
    for labels, message in BAD_LABELS:
        with pytest.raises(ValueError, match=message):
            evaluate(name, torch.zeros(1, 2, 5), torch.zeros(1, 2, 5), None, labels)


def test_seq_mean_without_sequences_is_refused():
    with pytest.raises(ValueError, match=r"seq_mean needs logits \(batch, length, vocabulary\), got tokens \(3,\)"):
        reduce_rows(torch.zeros(3), torch.ones(3).bool(), "seq_mean")


def test_weights_outside_0_to_1_are_refused():
    for value in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"share must be 0 to 1, got {value}"):
            check_fraction("share", value)


def test_mixtures_stay_in_log_space():
    log_a, log_b = torch.tensor([0.3, 0.7]).log(), torch.tensor([0.9, 0.1]).log()
    torch.testing.assert_close(log_mix(0.2, log_a, log_b).exp(), torch.tensor([0.78, 0.22]))
    assert log_mix(0.0, log_a, log_b).equal(log_b) and log_mix(1.0, log_a, log_b).equal(log_a)
    tiny = torch.tensor([-1000.0])  # exp gives 0 here
    torch.testing.assert_close(log_mix(0.5, tiny, tiny), tiny)


def test_rows_have_the_divergence_of_a_closed_form():
    log_a, log_b = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    assert kl_rows(log_a, log_b).item() == pytest.approx(0.25 * math.log(2))


def test_ids_that_one_model_rules_out_have_no_probability_in_either():
    log_q, log_p = log_probs(torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[0.0, -torch.inf, 0.0]]))
    assert log_q.exp().tolist() == [pytest.approx([1 / 3, 0, 1 / 3])]
    assert log_p.exp().tolist() == [pytest.approx([1 / 2, 0, 1 / 2])]
