import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from speechkd.losses.logits import (
    adaptive_kl,
    cross_entropy,
    forward_kl,
    generalized_jsd,
    hinton_kd,
    jeffreys,
    js,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    soft_cross_entropy,
    total_variation,
)

TEACHER = torch.tensor([[2.0, 1, 0], [0, 0, 0], [5, 0, 0]])
STUDENT = torch.tensor([[0.0, 1, 2], [0, 0, 0], [0, 5, 0]])
LABELS = torch.tensor([0, 1, -100])
MASK = LABELS >= 0

# Logits of methods/losses.md section 9: values and gradient norms there come from the losses' published code.
torch.manual_seed(0)
REFERENCE_STUDENT, REFERENCE_TEACHER = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
REFERENCE_LABELS = torch.tensor([[0, 2, 4], [1, 3, -100]])
REFERENCE_MASK = REFERENCE_LABELS >= 0


def masked(loss, **options):
    return lambda student, teacher: loss(student, teacher, REFERENCE_MASK, **options)


def distillm_2(student, teacher):
    skew = skew_kl(student[:1], teacher[:1], reduction="seq_mean")
    return skew + skew_reverse_kl(student[1:], teacher[1:], REFERENCE_MASK[1:], detach_mixture=True)


def distillm_2_on_both_rows(student, teacher):
    skew = masked(skew_kl, reduction="seq_mean")(student, teacher)
    return skew + masked(skew_reverse_kl, reduction="seq_mean", detach_mixture=True)(student, teacher)


REFERENCES = {  # loss: value, gradient norm
    "forward KL": (masked(forward_kl), 0.537224, 0.203011),
    "forward KL, T=2": (masked(forward_kl, temperature=2.0), 0.646965, 0.226548),
    "forward KL, T=4": (masked(forward_kl, temperature=4.0), 0.682217, 0.232647),
    "forward KL, T=1000, twice": (lambda *x: 2 * masked(forward_kl, temperature=1000.0)(*x), 1.386342, None),
    "cross entropy": (lambda student, _: cross_entropy(student, REFERENCE_LABELS), 2.858837, 0.478231),
    "Hinton, T=2": (partial(hinton_kd, labels=REFERENCE_LABELS, temperature=2.0), 1.752901, 0.288926),
    "soft cross entropy": (masked(soft_cross_entropy), 1.778363, 0.203011),
    "forward KL with entropy": (masked(forward_kl, subtract_entropy=False), 1.778363, 0.203011),
    "reverse KL": (masked(reverse_kl), 0.526199, 0.194917),
    "reverse KL, T=2, no T2": (masked(reverse_kl, temperature=2.0, scale_t2=False), 0.158160, None),
    "Jeffreys sum": (lambda *x: masked(forward_kl)(*x) + masked(reverse_kl)(*x), 1.063423, 2 * 0.188330),
    "Jeffreys": (masked(jeffreys), 0.531711, 0.188330),
    "Jeffreys .1": (masked(jeffreys, forward_weight=0.1), 0.527301, None),
    "DistiLLM symmetric": (masked(jeffreys, forward_weight=0.1, subtract_entropy=False), 0.651415, None),
    "GJSD .1": (masked(generalized_jsd, beta=0.1), 0.045244, 0.015534),
    "GJSD .5": (masked(generalized_jsd), 0.115612, 0.037307),
    "JS": (masked(js), 0.115612, 0.037307),
    "GJSD .9": (masked(generalized_jsd, beta=0.9), 0.044624, 0.015393),
    "GJSD .5, T=2, no T2": (masked(generalized_jsd, temperature=2.0, scale_t2=False), 0.038520, None),
    "GJSD 1e-4 / 1e-4": (lambda *x: masked(generalized_jsd, beta=1e-4)(*x) / 1e-4, 0.537122, None),
    "TVD": (masked(total_variation), 0.385611, 0.093985),
    "SKL": (masked(skew_kl), 0.386911, 0.126076),
    "SKL with entropy": (masked(skew_kl, subtract_entropy=False), 1.628050, 0.126076),
    "SRKL": (masked(skew_reverse_kl), 0.383900, 0.126846),
    "DistiLLM-2": (distillm_2, 0.706374, 0.269764),
    "DistiLLM-2, both rows": (distillm_2_on_both_rows, 0.713182, None),
    "AKL": (masked(adaptive_kl), 0.530460, 0.187409),
    "AKL, live weight": (masked(adaptive_kl, detach_weight=False), 0.530460, 0.187354),
}
ROUNDED_AWAY_IN_FLOAT32 = {"GJSD 1e-4 / 1e-4", "forward KL, T=1000, twice"}
CASES = [(name, torch.float64, 2e-6) for name in REFERENCES]
CASES += [(name, torch.float32, 1e-5) for name in REFERENCES if name not in ROUNDED_AWAY_IN_FLOAT32]


@pytest.mark.parametrize(("name", "dtype", "tolerance"), CASES)
def test_values_and_gradient_norms_equal_the_reference_numbers(name, dtype, tolerance):
    loss, value, norm = REFERENCES[name]
    student = REFERENCE_STUDENT.to(dtype, copy=True).requires_grad_()
    result = loss(student, REFERENCE_TEACHER.to(dtype))
    result.backward()
    assert result.item() == pytest.approx(value, abs=tolerance)
    if norm is not None:
        assert student.grad.norm().item() == pytest.approx(norm, abs=tolerance)


def test_losses_equal_the_published_numbers():
    kl_1 = forward_kl(STUDENT, TEACHER, MASK)
    kl_2 = forward_kl(STUDENT, TEACHER, MASK, temperature=2.0)
    ce = cross_entropy(STUDENT, LABELS)
    assert kl_1.item() == pytest.approx(0.575210, abs=1e-6)
    assert kl_2.item() == pytest.approx(0.640313, abs=1e-6)
    assert ce.item() == pytest.approx(1.753109, abs=1e-6)
    hinton = partial(hinton_kd, STUDENT, TEACHER, labels=LABELS, temperature=2.0)
    assert hinton(label_weight=0.8, kd_weight=1.0).item() == pytest.approx(2.042801, abs=1e-6)
    assert hinton(label_weight=1.0, kd_weight=0.8).item() == pytest.approx(2.265360, abs=1e-6)
    torch.testing.assert_close(0.8 * ce + 1.0 * kl_2, hinton(label_weight=0.8, kd_weight=1.0))


def kl(a, b):
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


def cross(a, b):
    return -sum(x * math.log(y) for x, y in zip(a, b, strict=True))


def mix(weight, a, b):
    return [weight * x + (1 - weight) * y for x, y in zip(a, b, strict=True)]


def plain_jsd(p, q, beta):
    middle = mix(beta, p, q)
    return beta * kl(p, middle) + (1 - beta) * kl(q, middle)


def plain_adaptive(p, q, mu):
    mass = head = tail = 0.0
    for index in sorted(range(len(p)), key=lambda i: -p[i]):
        gap = abs(p[index] - q[index])
        head, tail = (head + gap, tail) if mass < mu else (head, tail + gap)
        mass += p[index]
    weight = head / (head + tail)
    return weight * kl(p, q) + (1 - weight) * kl(q, p)


PLAIN = {  # the loss, and the same of one token from lists of probabilities: p of the teacher, q of the student
    "forward_kl": (forward_kl, kl),
    "soft_cross_entropy": (soft_cross_entropy, cross),
    "reverse_kl": (reverse_kl, lambda p, q: kl(q, p)),
    "jeffreys": (partial(jeffreys, forward_weight=0.3), lambda p, q: 0.3 * kl(p, q) + 0.7 * kl(q, p)),
    "generalized_jsd": (partial(generalized_jsd, beta=0.2), lambda p, q: plain_jsd(p, q, 0.2)),
    "js": (js, lambda p, q: plain_jsd(p, q, 0.5)),
    "total_variation": (total_variation, lambda p, q: sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2),
    "skew_kl": (partial(skew_kl, alpha=0.3), lambda p, q: kl(p, mix(0.3, p, q))),
    "skew_reverse_kl": (partial(skew_reverse_kl, alpha=0.3), lambda p, q: kl(q, mix(0.7, p, q))),
    "adaptive_kl": (partial(adaptive_kl, mu=0.6), lambda p, q: plain_adaptive(p, q, 0.6)),
}
few_examples = settings(max_examples=10, deadline=None, derandomize=True, database=None)


def random_rows(seed, tokens=4, vocabulary=5, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, tokens, vocabulary, generator=generator, dtype=torch.float64) * scale


@pytest.mark.parametrize("name", PLAIN)
@few_examples
@given(st.integers(0, 10_000), st.integers(2, 9), st.floats(0.4, 8), st.booleans())
def test_losses_equal_a_plain_loop(name, seed, vocabulary, temperature, scale_t2):
    loss, plain = PLAIN[name]
    student, teacher = random_rows(seed, vocabulary=vocabulary)
    results = loss(student, teacher, temperature=temperature, scale_t2=scale_t2, reduction="none").tolist()
    factor = temperature**2 if scale_t2 else 1
    for q, p, result in zip(
        (student / temperature).softmax(-1), (teacher / temperature).softmax(-1), results, strict=True
    ):
        assert result == pytest.approx(factor * plain(p.tolist(), q.tolist()), rel=1e-9, abs=1e-12)


def through_softmax(q, slope):
    """Gradient for the logits of a function whose derivative by q is `slope`, at temperature 1."""
    return q * (slope - (q * slope).sum(-1, keepdim=True))


GRADIENTS = {  # dF/dq of each divergence
    "forward_kl": lambda p, q: -p / q,
    "soft_cross_entropy": lambda p, q: -p / q,
    "reverse_kl": lambda p, q: (q / p).log() + 1,
    "jeffreys": lambda p, q: -0.3 * p / q + 0.7 * (q / p).log(),
    "generalized_jsd": lambda p, q: 0.8 * (q / (0.2 * p + 0.8 * q)).log(),
    "js": lambda p, q: 0.5 * (q / (0.5 * p + 0.5 * q)).log(),
    "total_variation": lambda p, q: 0.5 * (q - p).sign(),
    "skew_kl": lambda p, q: -0.7 * p / (0.3 * p + 0.7 * q),
    "skew_reverse_kl": lambda p, q: (q / (0.7 * p + 0.3 * q)).log() - 0.3 * q / (0.7 * p + 0.3 * q),
}


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradients_equal_the_closed_forms(name, temperature):
    student, teacher = random_rows(1)
    student.requires_grad_()
    PLAIN[name][0](student, teacher, temperature=temperature, scale_t2=False, reduction="sum").backward()
    p, q = (teacher / temperature).softmax(-1), (student.detach() / temperature).softmax(-1)
    torch.testing.assert_close(student.grad, through_softmax(q, GRADIENTS[name](p, q)) / temperature)


def same(loss, other):
    """Both losses have one value and one gradient on random logits."""
    student, teacher = random_rows(2)
    student.requires_grad_()
    values = loss(student, teacher), other(student, teacher)
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in values))


def nothing(student, teacher):
    return 0.0 * student.sum()


def test_losses_have_the_published_ones_as_limits():
    same(partial(skew_kl, alpha=0.0), forward_kl)
    same(partial(skew_kl, alpha=1.0), nothing)
    same(partial(skew_reverse_kl, alpha=0.0), reverse_kl)
    same(partial(skew_reverse_kl, alpha=1.0), nothing)
    same(partial(jeffreys, forward_weight=1.0), forward_kl)
    same(partial(jeffreys, forward_weight=0.0), reverse_kl)
    same(partial(adaptive_kl, mu=1.0), forward_kl)
    same(partial(adaptive_kl, mu=0.0), reverse_kl)


def test_the_ends_of_the_generalised_jsd_are_the_kls_or_by_the_formula_nothing():
    same(partial(generalized_jsd, beta=0.0), forward_kl)
    same(partial(generalized_jsd, beta=1.0), reverse_kl)
    same(partial(generalized_jsd, beta=0.0, endpoints="formula"), nothing)
    same(partial(generalized_jsd, beta=1.0, endpoints="formula"), nothing)
    student, teacher = random_rows(3)
    torch.testing.assert_close(
        generalized_jsd(student, teacher, beta=1e-6) / 1e-6, forward_kl(student, teacher), rtol=1e-3, atol=0
    )
    torch.testing.assert_close(
        generalized_jsd(student, teacher, beta=1 - 1e-6) / 1e-6, reverse_kl(student, teacher), rtol=1e-3, atol=0
    )


def test_swapping_the_models_swaps_the_direction():
    student, teacher = random_rows(4)
    torch.testing.assert_close(js(student, teacher), js(teacher, student))
    torch.testing.assert_close(forward_kl(student, teacher), reverse_kl(teacher, student))
    torch.testing.assert_close(generalized_jsd(student, teacher, beta=0.2), generalized_jsd(teacher, student, beta=0.8))


@settings(few_examples, max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from([0.1, 1.0, 30.0, 1e4]), st.floats(0.01, 0.99))
def test_bounded_losses_stay_within_their_bounds(seed, scale, beta):
    student, teacher = random_rows(seed, scale=scale)
    options = {"reduction": "none"}
    entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    variation = total_variation(student, teacher, **options)
    assert (js(student, teacher, **options) <= math.log(2) + 1e-12).all()
    assert (generalized_jsd(student, teacher, beta=beta, **options) <= entropy + 1e-12).all()
    assert (skew_kl(student, teacher, alpha=beta, **options) <= -math.log(beta) + 1e-12).all()
    assert ((variation >= 0) & (variation <= 1 + 1e-12)).all()
    assert (variation**2 <= 0.5 * forward_kl(student, teacher, **options) + 1e-12).all()  # Pinsker
    for loss in (forward_kl, reverse_kl, js, skew_kl, skew_reverse_kl, adaptive_kl):
        assert (loss(student, teacher, **options) >= -1e-12).all()


def test_a_held_mixture_changes_the_gradient_and_not_the_value():
    student, teacher = random_rows(5)
    student.requires_grad_()
    live = skew_reverse_kl(student, teacher, alpha=0.3, reduction="sum")
    held = skew_reverse_kl(student, teacher, alpha=0.3, reduction="sum", detach_mixture=True)
    torch.testing.assert_close(live, held)
    p, q = teacher.softmax(-1), student.detach().softmax(-1)
    expected = through_softmax(q, (q / (0.7 * p + 0.3 * q)).log())
    torch.testing.assert_close(torch.autograd.grad(held, student)[0], expected)
    assert not torch.allclose(torch.autograd.grad(live, student)[0], expected)


def test_cross_entropy_is_the_negative_log_probability_of_the_label():
    log_q = REFERENCE_STUDENT.log_softmax(-1)
    picked = [log_q[row, column, REFERENCE_LABELS[row, column]] for row, column in REFERENCE_MASK.nonzero().tolist()]
    torch.testing.assert_close(cross_entropy(REFERENCE_STUDENT, REFERENCE_LABELS, reduction="sum"), -sum(picked))
    flat = REFERENCE_STUDENT.flatten(0, 1), REFERENCE_LABELS.flatten()
    torch.testing.assert_close(cross_entropy(*flat), F.cross_entropy(*flat))


def test_hinton_weights_add_up_to_one_unless_both_are_given():
    hinton = partial(hinton_kd, STUDENT, TEACHER, labels=LABELS, temperature=2.0)
    ce, soft = cross_entropy(STUDENT, LABELS), forward_kl(STUDENT, TEACHER, MASK, temperature=2.0)
    torch.testing.assert_close(hinton(label_weight=0.3), 0.3 * ce + 0.7 * soft)
    torch.testing.assert_close(hinton(label_weight=0.3, kd_weight=2.0), 0.3 * ce + 2.0 * soft)
    torch.testing.assert_close(hinton(label_weight=0.3, scale_t2=False), 0.3 * ce + 0.7 * soft / 4)


def test_hinton_leaves_out_tokens_without_a_label_and_those_outside_the_mask():
    mask = torch.tensor([False, True, True])
    torch.testing.assert_close(
        hinton_kd(STUDENT, TEACHER, mask, labels=LABELS), hinton_kd(STUDENT[1:2], TEACHER[1:2], labels=LABELS[1:2])
    )


def test_a_learnable_temperature_gets_a_gradient():
    student, teacher = random_rows(6)
    temperature = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    for name, (loss, _) in PLAIN.items():
        if name != "adaptive_kl":  # its weight is held
            assert torch.autograd.gradcheck(
                lambda value, loss=loss: loss(student, teacher, temperature=value), temperature
            )


def test_equal_logits_give_no_kl_and_no_gradient():
    student = TEACHER.clone().requires_grad_()
    loss = forward_kl(student, TEACHER, temperature=2.0)
    loss.backward()
    assert abs(loss.item()) < 1e-6 and student.grad.abs().max() < 1e-6


def test_masked_rows_change_nothing():
    other = STUDENT.clone()
    other[2] = torch.tensor([9.0, -9, 100])
    other.requires_grad_()
    total = cross_entropy(other, LABELS) + forward_kl(other, TEACHER, MASK)
    total.backward()
    torch.testing.assert_close(
        total, cross_entropy(STUDENT, LABELS) + forward_kl(STUDENT, TEACHER, MASK), rtol=0, atol=0
    )
    assert other.grad[2].abs().max() == 0


def test_an_id_that_the_teacher_rules_out_adds_nothing():
    teacher = torch.tensor([[2.0, 1.0, -torch.inf]])
    student = torch.tensor([[0.0, 1.0, -torch.inf]], requires_grad=True)
    loss = forward_kl(student, teacher)
    loss.backward()
    torch.testing.assert_close(loss, forward_kl(student[:, :2], teacher[:, :2]))
    assert student.grad.isfinite().all()


def test_an_id_that_one_model_rules_out_is_left_out_of_the_sum_and_nothing_is_normalised_again():
    student, teacher = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[0.0, -torch.inf, 0.0]])
    third, half = 1 / 3, 1 / 2
    assert forward_kl(student, teacher).item() == pytest.approx(2 * half * math.log(half / third))
    assert reverse_kl(student, teacher).item() == pytest.approx(2 * third * math.log(third / half))
    assert total_variation(student, teacher).item() == pytest.approx(half - third)


@pytest.mark.parametrize(
    ("loss", "argument"),
    [
        (jeffreys, "forward_weight"),
        (generalized_jsd, "beta"),
        (skew_kl, "alpha"),
        (skew_reverse_kl, "alpha"),
        (adaptive_kl, "mu"),
    ],
)
def test_weights_outside_0_to_1_are_refused(loss, argument):
    for value in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"{argument} must be 0 to 1, got {value}"):
            loss(STUDENT, TEACHER, **{argument: value})


def test_an_unknown_reading_of_the_ends_is_refused():
    with pytest.raises(ValueError, match="endpoints must be 'kl' or 'formula', got 'limit'"):
        generalized_jsd(STUDENT, TEACHER, endpoints="limit")
