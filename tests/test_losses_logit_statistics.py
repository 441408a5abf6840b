import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechkd.losses.logit_statistics import logit_mse, luminet, sinkhorn_kd, standardized_kl
from speechkd.losses.logits import forward_kl, total_variation

# Logits of methods/losses.md section 9: values and gradient norms there come from the losses' published code.
torch.manual_seed(0)
REFERENCE_STUDENT, REFERENCE_TEACHER = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
MASK = torch.tensor([[True, True, True], [True, True, False]])

REFERENCES = {  # loss: value, gradient norm
    "standardised KL, T=2": (partial(standardized_kl, temperature=2.0), 0.548639, 0.176548),
    "logit MSE, raw": (partial(logit_mse, center=False), 1.684506, 0.519154),
    "logit MSE": (logit_mse, 1.386334, None),
    "LumiNet": (luminet, 0.697574, 0.118042),
    "SinKD, T=2": (partial(sinkhorn_kd, temperature=2.0), 1.842798, 0.405257),
    "SinKD, T=2, plan held": (partial(sinkhorn_kd, temperature=2.0, detach_plan=True), 1.842798, 0.339140),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-6), (torch.float32, 1e-5)])
def test_values_and_gradient_norms_equal_the_reference_numbers(name, dtype, tolerance):
    loss, value, norm = REFERENCES[name]
    student = REFERENCE_STUDENT.to(dtype, copy=True).requires_grad_()
    result = loss(student, REFERENCE_TEACHER.to(dtype), MASK)
    result.backward()
    assert result.item() == pytest.approx(value, abs=tolerance)
    if norm is not None:
        assert student.grad.norm().item() == pytest.approx(norm, abs=tolerance)


def mean(values):
    return sum(values) / len(values)


def softmax(logits):
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def kl(a, b):
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


def plain_mse(student, teacher, temperature):
    differences = [(s - t) / temperature for s, t in zip(student, teacher, strict=True)]
    return mean([(x - mean(differences)) ** 2 for x in differences])


def plain_standardized_kl(student, teacher, temperature):
    def standardize(row):
        deviation = math.sqrt(sum((x - mean(row)) ** 2 for x in row) / (len(row) - 1))
        return softmax([(x - mean(row)) / (deviation + 1e-7) / temperature for x in row])

    return kl(standardize(teacher), standardize(student))


def plain_luminet(student, teacher, temperature):
    def perceive(rows):
        columns = list(zip(*rows, strict=True))
        scales = [math.sqrt(mean([(x - mean(column)) ** 2 for x in column]) + 1e-5) for column in columns]
        return [
            softmax([(x - mean(c)) / scale / temperature for x, c, scale in zip(row, columns, scales, strict=True)])
            for row in rows
        ]

    return [kl(p, q) for p, q in zip(perceive(teacher), perceive(student), strict=True)]


def plain_sinkhorn(student, teacher, temperature, epsilon, iterations):
    q, p = ([softmax([x / temperature for x in row]) for row in rows] for rows in (student, teacher))
    cost = [[sum(abs(x - y) for x, y in zip(a, b, strict=True)) for b in p] for a in q]
    plan = [[math.exp(-x / epsilon) for x in row] for row in cost]
    for _ in range(iterations):
        plan = [[x / sum(row) for x in row] for row in plan]
        sums = [sum(column) for column in zip(*plan, strict=True)]
        plan = [[x / total for x, total in zip(row, sums, strict=True)] for row in plan]
    return [sum(x * y for x, y in zip(*rows, strict=True)) for rows in zip(plan, cost, strict=True)]


def random_rows(seed, tokens=4, vocabulary=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, tokens, vocabulary, generator=generator, dtype=torch.float64) * 2


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(2, 7), st.sampled_from([0.7, 1.0, 3.0]))
def test_losses_equal_a_plain_loop(seed, tokens, vocabulary, temperature):
    student, teacher = random_rows(seed, tokens, vocabulary)
    options = {"temperature": temperature, "reduction": "none"}
    rows = student.tolist(), teacher.tolist()
    pairs = list(zip(*rows, strict=True))
    close = partial(pytest.approx, rel=1e-8, abs=1e-10)
    mse = logit_mse(student, teacher, scale_t2=False, **options).tolist()
    assert mse == close([plain_mse(s, t, temperature) for s, t in pairs])
    standardized = standardized_kl(student, teacher, scale_t2=False, **options).tolist()
    assert standardized == close([plain_standardized_kl(s, t, temperature) for s, t in pairs])
    assert luminet(student, teacher, **options).tolist() == close(plain_luminet(*rows, temperature))
    transport = sinkhorn_kd(student, teacher, epsilon=0.3, iterations=4, **options).tolist()
    assert transport == close(plain_sinkhorn(*rows, temperature, 0.3, 4))


def test_the_centred_error_is_twice_the_forward_kl_at_a_high_temperature():
    student, teacher = random_rows(0)
    limit = 2 * forward_kl(student, teacher, temperature=1e4)
    torch.testing.assert_close(logit_mse(student, teacher), limit, rtol=1e-3, atol=0)


def test_the_temperature_cancels_in_the_error_unless_its_square_is_left_out():
    student, teacher = random_rows(1)
    torch.testing.assert_close(logit_mse(student, teacher, temperature=3.0), logit_mse(student, teacher))
    halved = logit_mse(student, teacher, temperature=2.0, scale_t2=False)
    torch.testing.assert_close(halved, logit_mse(student, teacher) / 4)


def test_only_the_raw_error_sees_a_constant():
    student, teacher = random_rows(2)
    student.requires_grad_()
    raw = logit_mse(student, teacher, center=False, reduction="sum")
    (gradient,) = torch.autograd.grad(raw, student)
    torch.testing.assert_close(gradient, 2 * (student.detach() - teacher) / 5)
    torch.testing.assert_close(logit_mse(teacher + 3, teacher, center=False).item(), 9.0)
    assert logit_mse(teacher + 3, teacher).item() == pytest.approx(0, abs=1e-12)


def test_the_error_leaves_out_ids_that_one_model_rules_out():
    student, teacher = random_rows(3)
    blocked = teacher.clone()
    blocked[:, -1] = -torch.inf
    for center in (True, False):
        known = logit_mse(student[:, :-1], teacher[:, :-1], center=center)
        torch.testing.assert_close(logit_mse(student, blocked, center=center), known * 4 / 5)


@pytest.mark.parametrize("loss", [standardized_kl, luminet])
def test_statistics_are_taken_over_the_ids_that_both_models_have(loss):
    student, teacher = random_rows(4)
    blocked = teacher.clone()
    blocked[:, -1] = -torch.inf
    torch.testing.assert_close(loss(student, blocked), loss(student[:, :-1], teacher[:, :-1]))


def test_luminet_takes_the_statistics_of_an_id_from_the_tokens_that_have_it():
    teacher = torch.tensor([[-torch.inf, 0.0], [1.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    student = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    loss = luminet(student, teacher, reduction="none")
    probability = torch.tensor(1 / math.sqrt(1 + 1e-5)).sigmoid().item()  # the two left are 1 deviation from their mean
    expected = kl([probability, 1 - probability], [0.5, 0.5])
    assert loss.tolist() == pytest.approx([0, expected, expected], abs=1e-6)


def test_standardised_logits_are_blind_to_shift_and_scale():
    student, teacher = random_rows(5)
    plain = standardized_kl(student, teacher, temperature=2.0)
    moved = standardized_kl(0.1 * student - 7, 30 * teacher + 2, temperature=2.0)
    torch.testing.assert_close(moved, plain, rtol=1e-5, atol=0)  # 1e-7 is added to the deviation
    torch.testing.assert_close(plain, 4 * standardized_kl(student, teacher, temperature=2.0, scale_t2=False))
    assert standardized_kl(5 * teacher + 1, teacher).item() == pytest.approx(0, abs=1e-9)


def test_constant_rows_stand_for_the_uniform_distribution():
    teacher = random_rows(6, tokens=1)[1]
    student = torch.full_like(teacher, 3.3, requires_grad=True)
    loss = standardized_kl(student, teacher)
    loss.backward()
    standardized = (teacher - teacher.mean()) / teacher.std()
    torch.testing.assert_close(loss, forward_kl(torch.zeros_like(teacher), standardized))
    assert student.grad.isfinite().all()


def test_rows_without_an_id_that_both_models_have_add_nothing():
    student = torch.tensor([[0.0, -torch.inf]], requires_grad=True)
    for loss in (standardized_kl, luminet, logit_mse):
        value = loss(student, torch.tensor([[-torch.inf, 0.0]]))
        (gradient,) = torch.autograd.grad(value, student)
        assert value.item() == 0 and (gradient == 0).all()


def test_one_token_alone_gives_luminet_nothing():
    student, teacher = random_rows(7, tokens=1)
    student.requires_grad_()
    loss = luminet(student, teacher)
    loss.backward()
    assert loss.item() == 0 and (student.grad == 0).all()


def test_luminet_has_the_square_of_alpha_as_factor():
    student, teacher = random_rows(8)
    torch.testing.assert_close(luminet(student, teacher, alpha=2.0), 4 * luminet(student, teacher))


def test_luminet_is_blind_to_scale_and_shift_of_an_id():
    student, teacher = random_rows(9)
    scale, shift = torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([7.0, 0, -3, 1, 2])
    torch.testing.assert_close(
        luminet(student * scale + shift, teacher), luminet(student, teacher), rtol=1e-4, atol=1e-5
    )


def test_transport_between_single_tokens_costs_their_distance():
    student, teacher = random_rows(10, tokens=1)
    torch.testing.assert_close(sinkhorn_kd(student, teacher), 2 * total_variation(student, teacher))


def test_transport_finds_tokens_in_another_order_and_equal_logits_are_not_quite_zero():
    teacher = 9 * torch.eye(4, dtype=torch.float64)
    assert 0 < sinkhorn_kd(teacher, teacher, epsilon=0.3) < 0.1
    shuffled = sinkhorn_kd(teacher[[2, 0, 3, 1]], teacher, epsilon=0.3)
    torch.testing.assert_close(shuffled, sinkhorn_kd(teacher, teacher, epsilon=0.3))


def test_a_held_plan_changes_the_gradient_and_not_the_value():
    student, teacher = random_rows(11)
    student.requires_grad_()
    live, held = sinkhorn_kd(student, teacher), sinkhorn_kd(student, teacher, detach_plan=True)
    torch.testing.assert_close(live, held)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (live, held)]
    assert not torch.allclose(*gradients)


def test_transport_costs_that_are_far_apart_underflow_nowhere():
    student, teacher = random_rows(12)
    student.requires_grad_()
    loss = sinkhorn_kd(student, teacher, epsilon=1e-3)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_transport_without_regularisation_or_iterations_is_refused():
    for options in ({"epsilon": 0.0}, {"iterations": 0}):
        with pytest.raises(ValueError, match="epsilon must be positive and iterations 1 or more, got"):
            sinkhorn_kd(REFERENCE_STUDENT, REFERENCE_TEACHER, **options)
