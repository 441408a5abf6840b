import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechkd.losses.logits import forward_kl, generalized_jsd, reverse_kl, total_variation
from speechkd.losses.sparse import TopK, first_kd, topk_divergence, topk_targets

MODES = ("bucket", "zero", "renorm_teacher", "renorm_both", "uniform_tail")
DENSE = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "generalized_jsd": generalized_jsd,
    "total_variation": total_variation,
}
MASK = torch.tensor([[True, True, True], [True, True, False]])


def reference_logits(dtype=torch.float64):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def random_logits(seed, num_tokens, vocabulary, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, num_tokens, vocabulary, generator=generator, dtype=torch.float64) * 3
    return student.to(dtype), teacher.to(dtype)


def one_token(student, teacher, k, mode, temperature=1.0, target_temperature=1.0):
    """One token's loss without T**2, id by id: targets from the whole softmax, the approximations of the docstring."""

    def softmax(logits):
        powers = [math.exp(x) for x in logits]
        return [x / sum(powers) for x in powers]

    def powered(masses):
        powers = [x ** (target_temperature / temperature) for x in masses]
        return [x / sum(powers) for x in powers]

    p = softmax([x / target_temperature for x in teacher.tolist()])
    ids = sorted(range(len(p)), key=lambda i: -p[i])
    kept, rest = ids[:k], ids[k:]
    tail = sum(p[i] for i in rest)
    q = softmax([x / temperature for x in student.tolist()])
    if mode == "uniform_tail":
        p = powered([p[i] for i in kept] + [tail / len(rest)] * len(rest))
        q = [q[i] for i in kept + rest]
    elif mode == "renorm_teacher":
        p, q = powered([p[i] for i in kept]), [q[i] for i in kept]
    elif mode == "renorm_both":
        p, q = powered([p[i] for i in kept]), [q[i] / sum(q[j] for j in kept) for i in kept]
    else:
        q = softmax([x / target_temperature for x in student.tolist()])
        q = powered([q[i] for i in kept] + [sum(q[i] for i in rest)])
        p = powered([p[i] for i in kept] + [tail])
        if mode == "zero":
            p, q = p[:-1], q[:-1]
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("mode", "value", "norm"),
    [
        ("bucket", 0.459882, 0.191146),
        ("zero", 0.574956, 0.206133),
        ("uniform_tail", 0.494650, 0.197744),
        ("renorm_teacher", 1.166824, 0.283039),
        ("renorm_both", 0.403633, 0.240905),
    ],
)
def test_two_ids_give_the_reference_values(mode, value, norm, dtype, tolerance):
    student, teacher = reference_logits(dtype)
    loss = topk_divergence(student, topk_targets(teacher, 2), MASK, mode=mode)
    loss.backward()
    assert loss.item() == pytest.approx(value, abs=tolerance)
    assert student.grad.norm().item() == pytest.approx(norm, abs=tolerance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("temperature", "target_temperature"), [(1.0, 1.0), (2.0, 2.0), (3.0, 1.0), (0.5, 2.0)])
def test_every_mode_equals_a_loop_over_ids(mode, temperature, target_temperature):
    student, teacher = random_logits(3, 4, 9)
    loss = topk_divergence(
        student,
        topk_targets(teacher, 4, temperature=target_temperature),
        mode=mode,
        temperature=temperature,
        target_temperature=target_temperature,
        reduction="none",
    )
    expected = [
        one_token(s, t, 4, mode, temperature, target_temperature) * temperature**2
        for s, t in zip(student, teacher, strict=True)
    ]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))


def test_targets_are_the_likeliest_ids_under_the_whole_softmax():
    teacher = random_logits(0, 6, 11)[1].view(2, 3, 11)
    targets = topk_targets(teacher, 4, temperature=2.0)
    log_p = (teacher / 2).log_softmax(dim=-1)
    assert torch.equal(targets.ids, log_p.argsort(dim=-1, descending=True)[..., :4])
    torch.testing.assert_close(targets.log_probs, log_p.gather(-1, targets.ids))
    torch.testing.assert_close(targets.log_probs.exp().sum(dim=-1) + targets.log_tail.exp(), torch.ones(2, 3).double())


def test_targets_are_float32_and_have_no_graph():
    teacher = reference_logits(torch.bfloat16)[1].requires_grad_()
    targets = topk_targets(teacher, 2)
    assert targets.log_probs.dtype == targets.log_tail.dtype == torch.float32
    assert not targets.log_probs.requires_grad and not targets.log_tail.requires_grad


def test_small_tails_survive_float32():
    sure, unsure = torch.tensor([[40.0, 0.0, -5.0]]), torch.tensor([[3.0, 0.0, -1.0]])
    tails = [topk_targets(teacher, 1).log_tail.double() for teacher in (sure, sure.double())]
    torch.testing.assert_close(*tails, rtol=1e-6, atol=0)
    results = []
    for student in (sure.clone(), sure.double()):
        loss = topk_divergence(student.requires_grad_(), topk_targets(unsure.to(student), 1))
        loss.backward()
        results.append((loss.detach().double(), student.grad.double()))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)
    assert results[0][0] > 2.3  # the tail is 0.06 of the teacher and exp(-40) of the student


@pytest.mark.parametrize("mode", MODES)
def test_all_ids_give_the_dense_forward_kl(mode):
    student, teacher = reference_logits()
    targets = topk_targets(teacher, 5)
    assert (targets.log_tail == -torch.inf).all()
    for temperature in (1.0, 2.0):
        loss = topk_divergence(student, targets, MASK, mode=mode, temperature=temperature)
        dense = forward_kl(student, teacher, MASK, temperature=temperature)
        torch.testing.assert_close(loss, dense)
        (gradient,) = torch.autograd.grad(loss, student)
        torch.testing.assert_close(gradient, torch.autograd.grad(dense, student)[0])


def test_the_bucket_lacks_the_kl_within_the_tail():
    student, teacher = random_logits(5, 7, 10)
    targets = topk_targets(teacher, 3)
    rest = torch.ones_like(teacher, dtype=torch.bool).scatter(-1, targets.ids, False)
    within = forward_kl(student[rest].view(7, 7), teacher[rest].view(7, 7), reduction="none")
    bucket = topk_divergence(student, targets, reduction="none")
    dense = forward_kl(student, teacher, reduction="none")
    torch.testing.assert_close(dense - bucket, targets.log_tail.exp() * within)


@pytest.mark.parametrize("divergence", DENSE)
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 30), st.floats(0.5, 4.0), st.floats(0.0, 1.0))
def test_buckets_never_exceed_the_dense_divergence(divergence, seed, vocabulary, temperature, share):
    student, teacher = random_logits(seed, 5, vocabulary)
    k = 1 + int(share * (vocabulary - 1))
    targets = topk_targets(teacher, k, temperature=temperature)
    arguments = {"temperature": temperature, "reduction": "none"}
    bucket = topk_divergence(student, targets, divergence=divergence, target_temperature=temperature, **arguments)
    dense = DENSE[divergence](student, teacher, **arguments)
    assert (bucket >= -1e-12).all() and (bucket <= dense + 1e-12).all()
    if k >= vocabulary - 1:
        torch.testing.assert_close(bucket, dense)


@pytest.mark.parametrize("divergence", DENSE)
def test_buckets_equal_the_dense_divergence_of_merged_logits(divergence):
    student, teacher = random_logits(1, 6, 8)
    targets = topk_targets(teacher, 3)
    order = teacher.argsort(dim=-1, descending=True)
    merged_student, merged_teacher = (
        torch.cat([x.gather(-1, order[:, :3]), x.gather(-1, order[:, 3:]).logsumexp(-1, keepdim=True)], dim=-1)
        for x in (student, teacher)
    )
    for options in ({}, {"reduction": "none"}, {"scale_t2": False}):
        loss = topk_divergence(student, targets, divergence=divergence, temperature=2.0, **options)
        torch.testing.assert_close(loss, DENSE[divergence](merged_student, merged_teacher, temperature=2.0, **options))


def test_beta_is_that_of_the_generalized_jsd():
    student, teacher = reference_logits()
    for beta in (0.0, 0.1, 0.9, 1.0):
        loss = topk_divergence(student, topk_targets(teacher, 5), MASK, divergence="generalized_jsd", beta=beta)
        torch.testing.assert_close(loss, generalized_jsd(student, teacher, MASK, beta=beta))


@pytest.mark.parametrize("mode", ["bucket", "renorm_both"])
@pytest.mark.parametrize("divergence", DENSE)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_equal_models_give_no_loss_and_no_gradient(mode, divergence, temperature):
    _, teacher = reference_logits()
    student = (teacher + 7).requires_grad_()
    loss = topk_divergence(student, topk_targets(teacher, 2), mode=mode, divergence=divergence, temperature=temperature)
    loss.backward()
    assert abs(loss.item()) < 1e-12
    if divergence != "total_variation":  # its slope is that of |x|, so rounding around 0 decides
        assert student.grad.abs().max() < 1e-12


def test_the_gradient_of_zero_is_the_closed_form():
    student, teacher = reference_logits()
    targets = topk_targets(teacher, 2)
    topk_divergence(student, targets, mode="zero", reduction="sum").backward()
    kept = torch.zeros_like(teacher).scatter(-1, targets.ids, targets.log_probs.exp())
    expected = student.detach().softmax(dim=-1) * (1 - targets.log_tail.exp()[..., None]) - kept
    torch.testing.assert_close(student.grad, expected)


def test_zero_can_be_negative_and_the_others_cannot():
    teacher, student = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[3.0, 0.0, 0.0]])
    losses = {mode: topk_divergence(student, topk_targets(teacher, 1), mode=mode).item() for mode in MODES}
    assert losses["zero"] < -0.1
    assert min(losses[mode] for mode in MODES if mode != "zero") >= 0


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), shift=st.floats(-50, 50), temperature=st.floats(0.5, 4.0))
def test_shifts_and_renamed_ids_change_nothing_and_gradient_rows_sum_to_zero(mode, seed, shift, temperature):
    student, teacher = random_logits(seed, 4, 12)
    student.requires_grad_()
    loss = topk_divergence(student, topk_targets(teacher, 5), mode=mode, temperature=temperature)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.sum(dim=-1).abs().max() < 1e-10
    names = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    other = topk_divergence(
        student[:, names] + shift, topk_targets(teacher[:, names] - shift, 5), mode=mode, temperature=temperature
    )
    torch.testing.assert_close(loss, other)


def losses_of(student, targets, mask, **options):
    """Every loss of the module that sees fit to run on these."""
    for mode in MODES:
        yield topk_divergence(student, targets, mask, mode=mode, **options)
    for divergence in DENSE:
        yield topk_divergence(student, targets, mask, divergence=divergence, **options)
    yield first_kd(student, targets, mask, k=2, **options)


def test_masked_tokens_may_hold_anything_and_get_no_gradient():
    clean, teacher = reference_logits()
    targets = topk_targets(teacher, 3)
    student = clean.detach().clone()
    student[1, 2] = torch.nan
    student.requires_grad_()
    damaged = TopK(*(field.clone() for field in targets))
    damaged.ids[1, 2], damaged.log_probs[1, 2], damaged.log_tail[1, 2] = -100, torch.nan, torch.nan
    for loss, expected in zip(losses_of(student, damaged, MASK), losses_of(clean, targets, MASK), strict=True):
        torch.testing.assert_close(loss, expected, rtol=0, atol=0)
        (gradient,) = torch.autograd.grad(loss, student)
        assert (gradient[1, 2] == 0).all() and gradient[0].abs().max() > 0


@pytest.mark.parametrize("reduction", ["token_mean", "sum", "seq_mean", "none"])
def test_a_batch_that_is_all_masked_gives_zero_with_a_live_graph(reduction):
    student, teacher = reference_logits()
    for loss in losses_of(student, topk_targets(teacher, 3), torch.zeros_like(MASK), reduction=reduction):
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        assert (loss == 0).all() and (gradient == 0).all()


def test_reductions_are_those_of_the_contract():
    student, teacher = reference_logits()
    targets = topk_targets(teacher, 3)
    by_reduction = [
        list(losses_of(student, targets, MASK, reduction=name)) for name in ("none", "sum", "token_mean", "seq_mean")
    ]
    for rows, total, token_mean, seq_mean in zip(*by_reduction, strict=True):
        assert rows.shape == (2, 3) and rows[1, 2] == 0
        torch.testing.assert_close(total, rows.sum())
        torch.testing.assert_close(token_mean, rows.sum() / 5)
        torch.testing.assert_close(seq_mean, (rows[0].sum() / 3 + rows[1].sum() / 2) / 2)


def test_micro_batches_with_num_items_add_up_to_the_whole():
    student, teacher = reference_logits()
    targets = topk_targets(teacher, 3)
    halves = [TopK(*(field[rows] for field in targets)) for rows in (slice(0, 1), slice(1, 2))]
    first = losses_of(student[:1], halves[0], MASK[:1], num_items=5)
    second = losses_of(student[1:], halves[1], MASK[1:], num_items=5)
    for whole, one, other in zip(losses_of(student, targets, MASK), first, second, strict=True):
        torch.testing.assert_close(whole, one + other)


def test_bfloat16_logits_are_computed_in_float32():
    student, teacher = (x.detach().bfloat16() for x in reference_logits())
    targets = topk_targets(teacher, 3)
    for loss, expected in zip(
        losses_of(student, targets, MASK), losses_of(student.float(), targets, MASK), strict=True
    ):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=0, atol=0)


def test_gradients_are_those_of_finite_differences():
    student, teacher = reference_logits()
    targets = topk_targets(teacher, 3)
    assert torch.autograd.gradcheck(lambda x: tuple(losses_of(x, targets, MASK, temperature=1.5)), student)


def test_targets_get_no_gradient():
    student, teacher = reference_logits()
    targets = topk_targets(teacher, 3)
    log_probs = targets.log_probs.requires_grad_()
    topk_divergence(student, targets).backward()
    assert log_probs.grad is None and student.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_give_finite_losses_and_gradients(dtype):
    rows = [[1e4, -1e4, 0, 3, 2], [-1e4, 1e4, 1e4, -torch.inf, 0], [0, 1, -torch.inf, -torch.inf, -torch.inf]]
    rows = torch.tensor(rows, dtype=dtype)
    for teacher in (rows, rows.flip(0), rows.flip(1)):
        student = rows.clone().requires_grad_()
        for loss in losses_of(student, topk_targets(teacher, 2), None):
            (gradient,) = torch.autograd.grad(loss, student)
            assert loss.isfinite() and gradient.isfinite().all()


def test_an_id_that_the_student_rules_out_adds_nothing():
    teacher = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    targets = topk_targets(teacher, 2)
    p = teacher.softmax(dim=-1)[0]
    no_top = topk_divergence(torch.tensor([[-torch.inf, 0.0, 0.0, 0.0]]), targets)
    assert no_top.item() == pytest.approx(
        (p[1] * (p[1] * 3).log() + (p[2] + p[3]) * ((p[2] + p[3]) * 1.5).log()).item(), abs=1e-6
    )
    no_tail = topk_divergence(torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]]), targets)
    assert no_tail.item() == pytest.approx((p[0] * (2 * p[0]).log() + p[1] * (2 * p[1]).log()).item(), abs=1e-6)


def test_first_compares_softmaxes_of_probabilities():
    student, teacher = random_logits(2, 3, 9)
    p, q = teacher.softmax(dim=-1), student.softmax(dim=-1)
    expected = 0.0
    for row in range(3):
        ids = p[row].argsort(descending=True)[:5]
        a, b = (p[row, ids] / 0.5).softmax(dim=0), (q[row, ids] / 0.5).softmax(dim=0)
        expected += sum((a[i] * (a[i] / b[i]).log()).item() for i in range(5))
    loss = first_kd(student, topk_targets(teacher, 7), temperature=0.5, num_items=2)  # 7 kept, the first 5 used
    assert loss.item() == pytest.approx(expected / 2, abs=1e-12)


def test_first_moves_smoothed_probability_from_the_likeliest_id_to_the_others():
    student, teacher = random_logits(4, 3, 9)
    targets = topk_targets(teacher, 5)
    loss = first_kd(student, targets, label_smoothing=0.1)
    p = targets.log_probs.exp() + torch.tensor([-0.1, 0.025, 0.025, 0.025, 0.025])
    q = student.softmax(dim=-1).gather(-1, targets.ids)
    torch.testing.assert_close(loss, forward_kl(q, p))


def test_first_gives_equal_models_no_loss_and_no_gradient():
    _, teacher = random_logits(6, 3, 9)
    student = (teacher + 2).requires_grad_()
    loss = first_kd(student, topk_targets(teacher, 5), temperature=0.3)
    loss.backward()
    assert abs(loss.item()) < 1e-12 and student.grad.abs().max() < 1e-12


@pytest.mark.parametrize("k", [0, 6])
def test_as_many_ids_as_there_are_not_are_refused(k):
    with pytest.raises(ValueError, match=f"k must be 1 to the vocabulary of 5 ids, got {k}"):
        topk_targets(torch.zeros(2, 5), k)


def test_targets_that_do_not_fit_are_refused():
    student, teacher = reference_logits()
    ids, log_probs, log_tail = topk_targets(teacher, 2)
    with pytest.raises(ValueError, match=r"student logits \(2, 3, 5\) and target ids \(2, 2, 2\) do not belong"):
        topk_divergence(student, TopK(ids[:, :2], log_probs[:, :2], log_tail[:, :2]))
    with pytest.raises(ValueError, match=r"ids \(2, 3, 2\), log_probs \(2, 3, 1\) and log_tail \(2, 3\); they must be"):
        topk_divergence(student, TopK(ids, log_probs[..., :1], log_tail))
    with pytest.raises(ValueError, match=r"log_probs \(2, 3, 2\) and log_tail \(2, 3, 1\); they must be"):
        topk_divergence(student, TopK(ids, log_probs, log_tail[..., None]))
    with pytest.raises(ValueError, match="target ids must be integers, got torch.float64"):
        topk_divergence(student, TopK(log_probs, log_probs, log_tail))
    with pytest.raises(ValueError, match="k must be 1 to the vocabulary of 4 ids, got 5"):
        topk_divergence(student[..., :4], topk_targets(teacher, 5))
    for wrong in (5, -1):
        with pytest.raises(ValueError, match=f"target id {wrong} is not in the vocabulary of 5 ids"):
            topk_divergence(student, TopK(torch.full_like(ids, wrong), log_probs, log_tail))


def test_bad_arguments_are_refused():
    student, teacher = reference_logits()
    targets = topk_targets(teacher, 2)
    with pytest.raises(ValueError, match="mode must be bucket, .* got 'tail'"):
        topk_divergence(student, targets, mode="tail")
    with pytest.raises(ValueError, match="divergence must be forward_kl, .* got 'kl'"):
        topk_divergence(student, targets, divergence="kl")
    for mode in ("zero", "renorm_teacher"):
        with pytest.raises(ValueError, match=f"mode '{mode}' has the forward KL only, got divergence 'reverse_kl'"):
            topk_divergence(student, targets, mode=mode, divergence="reverse_kl")
    with pytest.raises(ValueError, match="beta must be 0 to 1, got 1.5"):
        topk_divergence(student, targets, divergence="generalized_jsd", beta=1.5)
    with pytest.raises(ValueError, match="target_temperature must be positive and finite, got 0"):
        topk_divergence(student, targets, target_temperature=0)
    with pytest.raises(ValueError, match="reduction must be"):
        topk_divergence(student, targets, reduction="mean")
    for function in (topk_divergence, first_kd):
        with pytest.raises(ValueError, match="temperature must be positive and finite, got -1.0"):
            function(student, targets, temperature=-1.0)
        with pytest.raises(ValueError, match=r"mask is \(2, 2\), the logits \(2, 3, 5\) need \(2, 3\)"):
            function(student, targets, MASK[:, :2])
        with pytest.raises(ValueError, match="mask must be bool"):
            function(student, targets, MASK.long())
        with pytest.raises(ValueError, match="the batch is empty"):
            function(student[:, :0], TopK(*(field[:, :0] for field in targets)))
    with pytest.raises(ValueError, match="temperature must be positive and finite, got nan"):
        topk_targets(teacher, 2, temperature=math.nan)
    with pytest.raises(ValueError, match="k must be 2 to the 2 ids of the targets, got 5"):
        first_kd(student, targets)
    with pytest.raises(ValueError, match="label_smoothing must be 0 to 1, got -0.1"):
        first_kd(student, targets, k=2, label_smoothing=-0.1)
