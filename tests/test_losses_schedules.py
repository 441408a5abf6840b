import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechkd.losses.logits import forward_kl, skew_kl, skew_reverse_kl, soft_cross_entropy
from speechkd.losses.schedules import (
    AdaptiveOffPolicy,
    LearnableTemperature,
    SkewCurriculum,
    TaidSchedule,
    cald_loss,
    ctkd_strength,
    gradual_beta,
    probability_gaps,
    taid_loss,
)

LABELS = torch.tensor([[0, 2, 4], [1, 3, -100]])
MASK = LABELS >= 0
TOLERANCES = {torch.float32: 1e-5, torch.float64: 2e-6}


def logits(dtype=torch.float64):
    """Student and teacher logits, (2, 3, 5), of the published reference values; the student takes a gradient."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5).to(dtype), torch.randn(2, 3, 5).to(dtype)
    return student.requires_grad_(), teacher


def random_logits(num_sequences=6, seed=1):
    """Student and teacher logits, (sequences, 4, 7), and a mask that scores some of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, num_sequences, 4, 7, generator=generator, dtype=torch.float64).unbind(0)
    mask = torch.rand(num_sequences, 4, generator=generator) < 0.7
    mask[:, 0] = True
    return student.requires_grad_(), teacher, mask


def taid(student, teacher, mask=None, **options):
    return taid_loss(student, teacher, mask, tau=0.4, **options)


LOSSES = pytest.mark.parametrize("loss", [taid, cald_loss])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("loss", "value", "gradient_norm"),
    [
        (taid, 1.501932, 0.078786),
        (lambda s, t, m: taid(s, t, m, subtract_entropy=True), 0.084156, 0.078786),
        (cald_loss, 0.706374, 0.269764),
    ],
    ids=["taid", "taid, KL", "cald"],
)
def test_values_and_gradients_equal_the_reference_numbers(loss, value, gradient_norm, dtype):
    student, teacher = logits(dtype)
    result = loss(student, teacher, MASK)
    result.backward()
    assert result.dtype == dtype
    assert result.item() == pytest.approx(value, abs=TOLERANCES[dtype])
    assert student.grad.norm().item() == pytest.approx(gradient_norm, abs=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_both_contrastive_terms_on_both_rows_equal_the_reference_number(dtype):
    student, teacher = logits(dtype)
    result = cald_loss(student.repeat(2, 1, 1), teacher.repeat(2, 1, 1), MASK.repeat(2, 1))
    assert result.item() == pytest.approx(0.713182, abs=TOLERANCES[dtype])


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(st.floats(0, 1), st.sampled_from([0.5, 1.0, 3.0]), st.integers(0, 100))
def test_taid_equals_its_formula(tau, temperature, seed):
    student, teacher, mask = random_logits(seed=seed)
    loss = taid_loss(student, teacher, mask, tau=tau, temperature=temperature, reduction="sum")
    q = (student / temperature).softmax(-1)
    p = (((1 - tau) * student + tau * teacher) / temperature).softmax(-1)
    torch.testing.assert_close(loss, (-(p * q.log()).sum(-1) * temperature**2)[mask].sum())
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, ((q - p) * temperature * mask[..., None]).detach())


def test_taid_is_the_forward_kl_for_tau_one_and_has_no_gradient_for_tau_zero():
    student, teacher, mask = random_logits()
    full = taid_loss(student, teacher, mask, tau=1.0)
    torch.testing.assert_close(full, soft_cross_entropy(student, teacher, mask))
    full = taid_loss(student, teacher, mask, tau=1.0, subtract_entropy=True)
    torch.testing.assert_close(full, forward_kl(student, teacher, mask))
    taid_loss(student, teacher, mask, tau=0.0).backward()
    assert student.grad.abs().max() < 1e-12


@pytest.mark.parametrize("tau", [0.0, 0.4, 1.0, None], ids=["tau 0", "tau 0.4", "tau 1", "cald"])
def test_an_id_that_both_models_rule_out_adds_nothing(tau):
    def loss(student, teacher):
        return cald_loss(student, teacher) if tau is None else taid_loss(student, teacher, tau=tau)

    student, teacher, _ = random_logits()
    ruled_out = [torch.cat([x.detach(), torch.full((6, 4, 1), -torch.inf)], dim=-1) for x in (student, teacher)]
    ruled_out[0].requires_grad_()
    result = loss(*ruled_out)
    result.backward()
    torch.testing.assert_close(result, loss(student, teacher))
    assert ruled_out[0].grad.isfinite().all() and ruled_out[0].grad[..., -1].abs().max() == 0


@LOSSES
def test_ids_that_one_model_rules_out_leave_loss_and_gradient_finite(loss):
    student, teacher, _ = random_logits()
    student, teacher = student.detach().clone(), teacher.clone()
    student[..., 1] = teacher[..., 2] = -torch.inf
    student.requires_grad_()
    result = loss(student, teacher)
    result.backward()
    assert result.isfinite() and student.grad.isfinite().all()


def test_equal_logits_give_no_loss_and_no_gradient():
    student, _, mask = random_logits()
    for loss in (lambda t: taid(student, t, mask, subtract_entropy=True), lambda t: cald_loss(student, t, mask)):
        value = loss(student.detach() + 3)
        (gradient,) = torch.autograd.grad(value, student)
        assert abs(value.item()) < 1e-12 and gradient.abs().max() < 1e-12


@LOSSES
def test_a_constant_on_a_row_and_an_order_of_the_ids_change_nothing(loss):
    student, teacher, mask = random_logits()
    expected = loss(student, teacher, mask)
    shift = torch.randn(*mask.shape, 1, dtype=torch.float64)
    order = torch.randperm(7)
    torch.testing.assert_close(loss(student + shift, teacher - 2 * shift, mask), expected)
    torch.testing.assert_close(loss(student[..., order], teacher[..., order], mask), expected)


@LOSSES
def test_masked_tokens_may_be_nan_and_get_exactly_no_gradient(loss):
    student, teacher, mask = random_logits()
    expected = loss(student, teacher, mask)
    (expected_gradient,) = torch.autograd.grad(expected, student)
    broken, broken_teacher = student.detach().clone(), teacher.clone()
    broken[~mask] = broken_teacher[~mask] = torch.nan
    broken.requires_grad_()
    broken_teacher.requires_grad_()
    result = loss(broken, broken_teacher, mask)
    result.backward()
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(broken.grad, expected_gradient)
    assert broken.grad[~mask].abs().max() == 0 and broken_teacher.grad is None


@LOSSES
def test_a_batch_without_scored_tokens_gives_zero_with_a_live_graph(loss):
    student, teacher, mask = random_logits()
    result = loss(student, teacher, torch.zeros_like(mask))
    result.backward()
    assert result.item() == 0 and student.grad.abs().max() == 0


@LOSSES
def test_bfloat16_logits_are_computed_in_float32(loss):
    student, teacher = logits(torch.bfloat16)
    result = loss(student, teacher, MASK)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, loss(student.float(), teacher.float(), MASK))


@LOSSES
def test_extreme_logits_stay_finite(loss):
    student = torch.tensor([[[1e4, -1e4, 0.0]], [[-1e4, 0.0, 1e4]]], requires_grad=True)
    result = loss(student, -student.detach())
    result.backward()
    assert result.isfinite() and student.grad.isfinite().all()


def test_taid_of_micro_batches_with_num_items_adds_up_to_the_whole():
    student, teacher, mask = random_logits()
    parts = [taid(student[i], teacher[i], mask[i], num_items=mask.sum()) for i in (slice(2), slice(2, 6))]
    torch.testing.assert_close(sum(parts), taid(student, teacher, mask))


def test_contrastive_loss_of_micro_batches_with_num_items_adds_up_to_the_whole():
    student, teacher, mask = random_logits()
    parts = [cald_loss(student[i], teacher[i], mask[i], num_items=3) for i in ([0, 3], [1, 2, 4, 5])]
    torch.testing.assert_close(sum(parts), cald_loss(student, teacher, mask))


def test_gradients_pass_gradcheck():
    student, teacher = logits()
    # a detached student inside the loss is no part of a numeric derivative: the target of tau 1 holds none
    torch.autograd.gradcheck(lambda x: taid_loss(x, teacher, MASK, tau=1.0), student)
    torch.autograd.gradcheck(lambda x: cald_loss(x, teacher, MASK, beta=1.3, detach_mixture=False), student)


def test_tau_follows_the_published_trace():
    schedule = TaidSchedule(1000)
    taus, trends = [], []
    for step, loss in enumerate([2.0, 1.8, 1.9, 1.5]):
        taus.append(schedule.update(torch.tensor(loss, dtype=torch.float64), step))
        trends.append(schedule.trend)
    assert taus == pytest.approx([0.4, 0.40060, 0.40120, 0.40180], abs=1e-9)
    assert trends == pytest.approx([0, 0.001, 0.00043444, 0.00253536], abs=5e-9)


def test_tau_rises_faster_than_linearly_while_the_loss_falls():
    falling, rising = TaidSchedule(10**9, step_size=0.1, momentum=0.5), TaidSchedule(10**9, step_size=0.1, momentum=0.5)
    for step in range(6):
        falling.update(0.5**step, step)
        rising.update(2.0**step, step)
    tau, trend = 0.4, 0.0
    for _ in range(5):
        trend = 0.5 * trend + 0.5 * 0.5
        tau += 0.1 / (1 + math.exp(-trend)) * (1 - tau)
    assert falling.tau == pytest.approx(tau, abs=1e-8)
    assert 0.4 < rising.tau < falling.tau


def test_tau_reaches_its_end_and_stays_there():
    schedule = TaidSchedule(10, start=0.2, end=0.9)
    assert [schedule.update(1.0, step) for step in range(13)][-3:] == pytest.approx([0.9] * 3)


def test_a_loss_of_zero_does_not_break_the_schedule():
    schedule = TaidSchedule(100)
    for step, loss in enumerate([0.0, 1.0, 0.5]):
        schedule.update(loss, step)
    assert 0.4 < schedule.tau < 1


def test_a_restored_taid_schedule_continues_identically(tmp_path):
    losses = torch.rand(40, generator=torch.Generator().manual_seed(0)).tolist()
    schedule = TaidSchedule(10**6, step_size=0.1, momentum=0.9)
    for step in range(20):
        schedule.update(losses[step], step)
    torch.save(schedule.state_dict(), tmp_path / "state.pt")
    restored = TaidSchedule(10**6, step_size=0.1, momentum=0.9)
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(20, 40):
        assert schedule.update(losses[step], step) == restored.update(losses[step], step)
    assert restored.state_dict() == schedule.state_dict()


def test_the_temperature_starts_as_in_the_published_code():
    assert LearnableTemperature()().item() == pytest.approx(1 + 20 / (1 + math.exp(-1)), abs=1e-5)


@pytest.mark.parametrize(("adversarial", "sign"), [(True, -1), (False, 1)])
def test_the_gradient_of_the_temperature_is_reversed_unless_asked_not_to(adversarial, sign):
    student, teacher = logits()
    plain = torch.ones((), dtype=torch.float64, requires_grad=True)
    forward_kl(student, teacher, MASK, temperature=1 + 20 * plain.sigmoid()).backward()
    module = LearnableTemperature(adversarial=adversarial).double()
    student.grad = None
    loss = forward_kl(student, teacher, MASK, temperature=module(strength=0.5))
    loss.backward()
    torch.testing.assert_close(module.theta.grad, sign * 0.5 * plain.grad)
    (unreversed,) = torch.autograd.grad(forward_kl(student, teacher, MASK, temperature=module().item()), student)
    torch.testing.assert_close(student.grad, unreversed)


def test_the_optimizer_moves_the_temperature_to_where_the_loss_is_larger():
    student, teacher = logits()
    for adversarial in (True, False):
        module = LearnableTemperature(adversarial=adversarial).double()
        optimizer = torch.optim.SGD(module.parameters(), lr=50.0)

        def loss(module=module):
            return forward_kl(student.detach(), teacher, MASK, temperature=module())

        before = loss()
        before.backward()
        optimizer.step()
        assert (loss() > before) == adversarial


def test_a_restored_temperature_is_the_same():
    module, restored = LearnableTemperature(), LearnableTemperature()
    with torch.no_grad():
        module.theta.fill_(-0.7)
    restored.load_state_dict(module.state_dict())
    assert restored() == module() != LearnableTemperature()()


def test_the_strength_rises_along_a_cosine():
    strengths = [ctkd_strength(epoch) for epoch in (0, 2.5, 5, 10, 30)]
    assert strengths == pytest.approx([0, 0.5 - 0.5 * math.sqrt(0.5), 0.5, 1, 1])
    assert ctkd_strength(2, ramp_epochs=4) == pytest.approx(0.5)


def test_the_share_of_student_text_grows_when_the_validation_loss_gets_worse():
    policy = AdaptiveOffPolicy(100)
    losses = [2.0, 1.5, 2.05, 2.11, 2.15, 2.30, 1.0, 2.41]
    assert [policy.observe_validation(x) for x in losses] == pytest.approx([0, 0, 0, 0.1, 0.1, 0.2, 0.2, 0.3])
    assert policy.previous_loss == 2.41
    assert [policy.observe_validation(torch.tensor(10.0 + i)) for i in range(9)][-1] == 1


@pytest.mark.parametrize(
    ("schedule", "step", "fresh"), [("decreasing", 25, 0.75), ("constant", 25, 0.5), ("increasing", 25, 0.25)]
)
def test_sources_have_their_shares_once_the_buffer_is_full(schedule, step, fresh):
    policy = AdaptiveOffPolicy(100, capacity=4, schedule=schedule)
    policy.phi = 0.6
    policy.remember(range(4))
    sources = [policy.choose(step) for _ in range(2000)]
    for source, share in (("dataset", 0.4), ("student", 0.6 * fresh), ("buffer", 0.6 * (1 - fresh))):
        assert sources.count(source) / 2000 == pytest.approx(share, abs=0.035)  # over 3 standard deviations


def test_only_the_dataset_is_used_until_the_loss_gets_worse_and_the_buffer_only_when_full():
    policy = AdaptiveOffPolicy(100, capacity=4)
    assert {policy.choose(0) for _ in range(100)} == {"dataset"}
    policy.phi = 0.5
    policy.remember(range(3))
    assert {policy.choose(100) for _ in range(100)} == {"dataset", "student"}
    policy.remember([3])
    assert {policy.choose(100) for _ in range(100)} == {"dataset", "buffer"}


def test_the_buffer_forgets_the_oldest_and_gives_different_items_uniformly():
    policy = AdaptiveOffPolicy(100, capacity=5)
    policy.remember(range(4))
    policy.remember(range(4, 8))
    batches = [policy.recall(3) for _ in range(1000)]
    assert all(len(set(batch)) == 3 for batch in batches)
    drawn = [item for batch in batches for item in batch]
    assert set(drawn) == {3, 4, 5, 6, 7}
    for item in range(3, 8):
        assert drawn.count(item) == pytest.approx(600, abs=60)  # nearly 4 standard deviations


def test_a_restored_off_policy_state_continues_identically(tmp_path):
    def run(policy, steps):
        trace = []
        for step in steps:
            source = policy.choose(step)
            trace.append((source, [x["ids"].tolist() for x in policy.recall(2)] if source == "buffer" else None))
            if source == "student":
                policy.remember([{"ids": torch.tensor([step, i])} for i in range(2)])
            trace.append(policy.observe_validation(1.0 + step % 7))
        return trace

    policy = AdaptiveOffPolicy(200, capacity=6, schedule="constant", seed=5)
    run(policy, range(60))
    torch.save(policy.state_dict(), tmp_path / "state.pt")
    continued = run(policy, range(60, 120))
    restored = AdaptiveOffPolicy(200, capacity=6, schedule="constant", seed=77)
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert run(restored, range(60, 120)) == continued
    assert {"student", "buffer"} <= {entry[0] for entry in continued if isinstance(entry, tuple)}


@pytest.mark.parametrize("beta", [0.0, 1.0, 1.4, 2.0])
@pytest.mark.parametrize("detach_mixture", [True, False])
def test_the_contrastive_loss_is_the_weighted_sum_of_skew_losses_of_each_sequence(beta, detach_mixture):
    student, teacher, mask = random_logits()
    loss = cald_loss(
        student,
        teacher,
        mask,
        beta=beta,
        alpha_teacher=0.05,
        alpha_student=0.2,
        temperature=2.0,
        detach_mixture=detach_mixture,
    )
    options = {"temperature": 2.0, "reduction": "seq_mean"}
    forward = skew_kl(student[:3], teacher[:3], mask[:3], alpha=0.05, **options)
    reverse = skew_reverse_kl(student[3:], teacher[3:], mask[3:], alpha=0.2, detach_mixture=detach_mixture, **options)
    expected = (2 - beta) * forward + beta * reverse
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (loss, expected)))


def test_each_pair_may_have_its_own_skews():
    student, teacher, mask = random_logits()
    alphas = torch.tensor([0.0, 0.1, 1.0]), torch.tensor([0.3, 1.0, 0.0])
    loss = cald_loss(student, teacher, mask, alpha_teacher=alphas[0], alpha_student=alphas[1], reduction="none")
    pairs = [
        cald_loss(student[i::3], teacher[i::3], mask[i::3], alpha_teacher=a.item(), alpha_student=b.item())
        for i, (a, b) in enumerate(zip(*alphas, strict=True))
    ]
    torch.testing.assert_close(loss, torch.stack(pairs), rtol=1e-6, atol=1e-6)
    loss.sum().backward()
    assert student.grad.isfinite().all()


def test_a_pair_counts_if_one_of_its_texts_has_scored_tokens():
    student, teacher, mask = random_logits()
    mask[0] = mask[1] = mask[4] = False  # pair 0 keeps the student's text, pair 1 neither, pair 2 both
    loss = cald_loss(student, teacher, mask)
    reverse = skew_reverse_kl(student[3:4], teacher[3:4], mask[3:4])
    both = cald_loss(student[2::3], teacher[2::3], mask[2::3])
    torch.testing.assert_close(loss, (reverse + both) / 2)
    assert cald_loss(student, teacher, mask, reduction="none")[1] == 0


def test_beta_grows_until_the_middle_of_the_run():
    assert [gradual_beta(step, 100) for step in (0, 25, 50, 100)] == [1, 1.25, 1.5, 1.5]


def test_gaps_are_differences_of_geometric_mean_probabilities():
    student, teacher = logits()
    expected = []
    for i, ids in enumerate(LABELS.tolist()):
        places = [(j, y) for j, y in enumerate(ids) if y >= 0]
        p, q = (math.prod(x[i, j].softmax(-1)[y].item() for j, y in places) for x in (teacher, student))
        expected.append(p ** (1 / len(places)) - q ** (1 / len(places)))
    gaps = probability_gaps(student, teacher, LABELS)
    assert gaps.tolist() == pytest.approx(expected) and not gaps.requires_grad


def test_skews_shrink_with_the_gap_within_their_bounds():
    curriculum = SkewCurriculum(first_batches=2)
    for gaps in ([0.1, 0.3], [0.3, 0.5]):
        assert curriculum.alphas(torch.tensor(gaps)).tolist() == pytest.approx([0.1, 0.1])
    gaps = [0.5, 0.3, 0.285, 0.28, 0.1, -0.2]
    expected = [min(max(1 - 0.9 * 0.3 / (gap + 1e-5), 0.01), 0.1) for gap in gaps]
    assert curriculum.alphas(torch.tensor(gaps)).tolist() == pytest.approx(expected, abs=1e-6)
    assert 0.01 < expected[2] < 0.1 and expected[4] == 0.01 and expected[5] == 0.1


def test_a_restored_curriculum_continues_identically(tmp_path):
    batches = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    curriculum = SkewCurriculum(first_batches=3)
    for gaps in batches[:2]:
        curriculum.alphas(gaps)
    torch.save(curriculum.state_dict(), tmp_path / "state.pt")
    restored = SkewCurriculum(first_batches=3)
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for gaps in batches[2:]:
        torch.testing.assert_close(restored.alphas(gaps), curriculum.alphas(gaps), rtol=0, atol=0)
    assert restored.alphas(batches[5]).unique().numel() > 1


def test_bad_input_is_refused_with_its_values():
    student, teacher, mask = random_logits()
    for wrong, message in (
        (lambda: taid_loss(student, teacher, tau=1.2), "tau must be 0 to 1, got 1.2"),
        (lambda: TaidSchedule(0), "total_steps must be 1 or more, got 0"),
        (lambda: TaidSchedule(5, start=0.5, end=0.4), "within 0 to 1, got start=0.5 and end=0.4"),
        (lambda: TaidSchedule(5, momentum=-1), "momentum must be 0 to 1, got -1"),
        (lambda: TaidSchedule(5).update(math.nan, 0), "loss is nan; .* skip this step"),
        (lambda: LearnableTemperature(start=0.0), "must be positive, got 0.0 and 20.0"),
        (lambda: ctkd_strength(-1), "epoch must be 0 or more and ramp_epochs positive, got -1 and 10"),
        (lambda: AdaptiveOffPolicy(0), "total_steps must be 1 or more, got 0"),
        (lambda: AdaptiveOffPolicy(5, capacity=0), "capacity must be 1 sequence or more, got 0"),
        (lambda: AdaptiveOffPolicy(5, schedule="random"), "decreasing, constant or increasing, got 'random'"),
        (lambda: AdaptiveOffPolicy(5).observe_validation(math.inf), "validation loss is inf"),
        (lambda: AdaptiveOffPolicy(5).recall(2), "holds 0 sequences, fewer than the 2 of a batch"),
        (lambda: cald_loss(student[:3], teacher[:3]), r"\(2 \* pairs, length, vocabulary\), got \(3, 4, 7\)"),
        (lambda: cald_loss(student[0], teacher[0]), r"\(2 \* pairs, length, vocabulary\), got \(4, 7\)"),
        (lambda: cald_loss(student[:0], teacher[:0]), "the batch is empty"),
        (lambda: cald_loss(student, teacher[..., :5]), "differ in shape"),
        (lambda: cald_loss(student, teacher, mask.float()), "mask must be bool"),
        (lambda: cald_loss(student, teacher, temperature=0), "temperature must be positive"),
        (lambda: cald_loss(student, teacher, beta=2.5), "beta must be 0 to 2, got 2.5"),
        (lambda: cald_loss(student, teacher, alpha_teacher=1.5), "alpha_teacher must be 0 to 1.*got .*1.5"),
        (lambda: cald_loss(student, teacher, alpha_student=torch.ones(2)), r"alpha_student .* or 3, \(pairs,\)"),
        (lambda: cald_loss(student, teacher, reduction="seq_mean"), "pair_mean, sum or none, got 'seq_mean'"),
        (lambda: gradual_beta(3, 0), "total_steps must be 1 or more, got 0"),
        (lambda: SkewCurriculum(base=0.1, lowest=0.2), "got lowest=0.2 and base=0.1"),
        (lambda: SkewCurriculum(first_batches=0), "first_batches must be 1 or more, got 0"),
        (lambda: SkewCurriculum().alphas(torch.tensor([math.nan])), "mean gap is nan"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
