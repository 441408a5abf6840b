import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechkd.losses.labelled import QuantileBounds, atkd, dac_kl, decoupled_kd, self_evolution_kd, token_scaled_kd
from speechkd.losses.logits import cross_entropy, forward_kl, soft_cross_entropy

# Logits of methods/losses.md section 9: values and gradient norms there come from the losses' published code.
torch.manual_seed(0)
REFERENCE_STUDENT, REFERENCE_TEACHER = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
LABELS = torch.tensor([[0, 2, 4], [1, 3, -100]])

REFERENCES = {  # loss: value, gradient norm
    "TCKD": (partial(decoupled_kd, target_weight=1.0, non_target_weight=0.0), 0.131560, 0.071605),
    "NCKD": (partial(decoupled_kd, target_weight=0.0, non_target_weight=1.0), 0.454470, 0.202758),
    "DKD": (decoupled_kd, 3.767318, 1.632901),
    "DKD, T=4": (partial(decoupled_kd, temperature=4.0), 4.741275, 1.893136),
    "ATKD": (atkd, 0.559601, 0.249959),
    "TSLD": (token_scaled_kd, 1.740561, 0.184373),
    "TSLD, equal weights": (partial(token_scaled_kd, scale_temperature=1e9), 1.777508, None),
    "Self-Evolution": (self_evolution_kd, 0.568464, 0.191693),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-6), (torch.float32, 1e-5)])
def test_values_and_gradient_norms_equal_the_reference_numbers(name, dtype, tolerance):
    loss, value, norm = REFERENCES[name]
    student = REFERENCE_STUDENT.to(dtype, copy=True).requires_grad_()
    result = loss(student, REFERENCE_TEACHER.to(dtype), labels=LABELS)
    result.backward()
    assert result.item() == pytest.approx(value, abs=tolerance)
    if norm is not None:
        assert student.grad.norm().item() == pytest.approx(norm, abs=tolerance)


def kl(a, b):
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


def cross(a, b):
    return -sum(x * math.log(y) for x, y in zip(a, b, strict=True))


def decoupled(p, q, label):
    """TCKD and NCKD of one token, from lists of probabilities."""
    rest_p, rest_q = 1 - p[label], 1 - q[label]
    others = [i for i in range(len(p)) if i != label]
    target = kl([p[label], rest_p], [q[label], rest_q])
    return target, kl([p[i] / rest_p for i in others], [q[i] / rest_q for i in others])


def middle(values):
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def plain_dkd(rows, target_weight, non_target_weight):
    pairs = [decoupled(p, q, label) for p, q, _, label in rows]
    return [target_weight * target + non_target_weight * rest for target, rest in pairs]


def plain_atkd_mean(rows, easy_weight):
    doubts = [1 - p[label] for p, _, _, label in rows]
    pairs = [decoupled(p, q, label) for p, q, _, label in rows]
    limit = middle(doubts)
    easy = [pair[1] for pair, doubt in zip(pairs, doubts, strict=True) if doubt < limit]
    hard = [sum(pair) for pair, doubt in zip(pairs, doubts, strict=True) if doubt >= limit]
    return easy_weight * sum(easy) / max(len(easy), 1) + (1 - easy_weight) * sum(hard) / max(len(hard), 1)


def plain_tsld(rows, scale_temperature):
    weights = [math.exp(-math.log(teacher[label]) / scale_temperature) for _, _, teacher, label in rows]
    return sum(weight * cross(p, q) for weight, (p, q, _, _) in zip(weights, rows, strict=True)) / sum(weights)


def plain_self_evolution(rows, label_weight, prior_weight):
    plain, helped = [], []
    for p, q, _, label in rows:
        r = [label_weight * (i == label) + (1 - label_weight) * x for i, x in enumerate(p)]
        plain.append(kl(r, q))
        helped.append(kl(r, [prior_weight * a + (1 - prior_weight) * b for a, b in zip(r, q, strict=True)]))
    return [h if x > middle(plain) else x for x, h in zip(plain, helped, strict=True)]


def plain_dac(rows, lower, upper, slope):
    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    losses = []
    for p, q, _, label in rows:
        gates, mass = [0.0] * len(p), 0.0
        for index in sorted(range(len(p)), key=lambda i: -p[i]):
            quantile = mass + p[index] / 2
            gates[index] = sigmoid(slope * (quantile - lower)) * sigmoid(slope * (upper - quantile))
            mass += p[index]
        gates[label] = 1.0
        kept_p, kept_q = ([x * gate for x, gate in zip(row, gates, strict=True)] for row in (p, q))
        losses.append(kl([x / sum(kept_p) for x in kept_p], [x / sum(kept_q) for x in kept_q]))
    return losses


def bounds(lower, upper):
    return lambda log_p, log_q: (log_p.new_full((len(log_p),), lower), log_p.new_full((len(log_p),), upper))


def random_batch(seed, tokens=5, vocabulary=6):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 1, tokens, vocabulary, generator=generator, dtype=torch.float64) * 2
    return student, teacher, torch.randint(vocabulary, (1, tokens), generator=generator)


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(3, 8), st.sampled_from([0.5, 1.0, 3.0]))
def test_losses_equal_a_plain_loop(seed, tokens, vocabulary, temperature):
    student, teacher, labels = random_batch(seed, tokens, vocabulary)
    rows = [x[0].softmax(-1).tolist() for x in (teacher / temperature, student / temperature, teacher)]
    rows = list(zip(*rows, labels[0].tolist(), strict=True))
    options = {"labels": labels, "temperature": temperature, "scale_t2": False}

    def per_token(loss, **arguments):
        return loss(student, teacher, reduction="none", **options, **arguments)[0].tolist()

    close = partial(pytest.approx, rel=1e-8, abs=1e-10)
    assert per_token(decoupled_kd, target_weight=0.7, non_target_weight=3.0) == close(plain_dkd(rows, 0.7, 3.0))
    assert per_token(self_evolution_kd, label_weight=0.3, prior_weight=0.6) == close(
        plain_self_evolution(rows, 0.3, 0.6)
    )
    assert per_token(dac_kl, bounds=bounds(0.1, 0.8), slope=9.0) == close(plain_dac(rows, 0.1, 0.8, 9.0))
    assert atkd(student, teacher, easy_weight=0.3, **options).item() == close(plain_atkd_mean(rows, 0.3))
    assert token_scaled_kd(student, teacher, scale_temperature=2.0, **options).item() == close(plain_tsld(rows, 2.0))


@pytest.mark.parametrize("loss", [decoupled_kd, atkd, token_scaled_kd, self_evolution_kd])
def test_the_square_of_the_temperature_is_a_factor(loss):
    student, teacher, labels = random_batch(0)
    plain = loss(student, teacher, labels=labels, temperature=3.0, scale_t2=False)
    torch.testing.assert_close(loss(student, teacher, labels=labels, temperature=3.0), 9 * plain)


@pytest.mark.parametrize("loss", [decoupled_kd, atkd, token_scaled_kd, self_evolution_kd])
def test_tokens_without_a_label_and_those_outside_the_mask_do_not_count(loss):
    student, teacher, labels = random_batch(1)
    mask = torch.tensor([[True, True, True, True, False]])
    unlabelled = labels.clone()
    unlabelled[0, 3] = -100
    scored = loss(student, teacher, mask, labels=unlabelled)
    torch.testing.assert_close(scored, loss(student[:, :3], teacher[:, :3], labels=labels[:, :3]))


def test_decoupled_kd_splits_the_forward_kl():
    student, teacher, labels = random_batch(2)
    part = partial(decoupled_kd, student, teacher, labels=labels, temperature=2.0, reduction="none")
    target, non_target = part(non_target_weight=0.0), part(target_weight=0.0, non_target_weight=1.0)
    rest = 1 - (teacher / 2).softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(
        target + rest * non_target, forward_kl(student, teacher, temperature=2.0, reduction="none")
    )


def test_decoupled_kd_survives_a_teacher_without_doubt():
    teacher = torch.tensor([[300.0, 0, 0]])
    student = torch.tensor([[0.0, 1, 300]], requires_grad=True)
    loss = decoupled_kd(student, teacher, labels=torch.tensor([0]))
    loss.backward()
    rest = forward_kl(student[:, 1:], teacher[:, 1:])
    torch.testing.assert_close(loss, 300 + 8 * rest, rtol=1e-5, atol=0)
    assert student.grad.isfinite().all()


def test_atkd_without_easy_tokens_has_only_the_hard_term():
    student, teacher, labels = random_batch(3, tokens=1)
    hard = decoupled_kd(student, teacher, labels=labels, non_target_weight=1.0)
    torch.testing.assert_close(atkd(student, teacher, labels=labels, easy_weight=0.3), 0.7 * hard)


def test_token_scaled_kd_with_a_high_scale_temperature_is_the_plain_mean_of_sequences():
    student, teacher = REFERENCE_STUDENT.double(), REFERENCE_TEACHER.double()
    plain = soft_cross_entropy(student, teacher, LABELS >= 0, reduction="seq_mean")
    torch.testing.assert_close(token_scaled_kd(student, teacher, labels=LABELS, scale_temperature=1e12), plain)


def test_token_scaled_kd_gives_no_weight_to_tokens_outside_the_mask():
    student, teacher, labels = random_batch(4)
    mask = torch.tensor([[True, True, False, False, True]])
    short = token_scaled_kd(student[:, mask[0]], teacher[:, mask[0]], labels=labels[:, mask[0]])
    torch.testing.assert_close(token_scaled_kd(student, teacher, mask, labels=labels), short)


def test_token_scaled_kd_puts_all_weight_on_labels_that_the_teacher_rules_out():
    student, teacher, labels = random_batch(5)
    teacher[0, 1, labels[0, 1]] = -torch.inf
    loss = token_scaled_kd(student, teacher, labels=labels)
    torch.testing.assert_close(loss, soft_cross_entropy(student[:, 1], teacher[:, 1]))


def test_token_scaled_kd_without_sequences_is_refused():
    with pytest.raises(ValueError, match=r"labels must be \(batch, length\), got \(3,\)"):
        token_scaled_kd(torch.zeros(3, 5), torch.zeros(3, 5), labels=torch.zeros(3, dtype=torch.int64))


def test_self_evolution_without_prior_is_the_kl_from_the_mixed_target():
    student, teacher, labels = random_batch(6)
    target = 0.4 * torch.nn.functional.one_hot(labels, 6) + 0.6 * teacher.softmax(-1)
    loss = self_evolution_kd(student, teacher, labels=labels, label_weight=0.4, prior_weight=0.0)
    torch.testing.assert_close(loss, forward_kl(student, target.log()))


def test_self_evolution_has_the_cross_entropy_and_the_forward_kl_as_limits():
    student, teacher, labels = random_batch(7)
    limit = partial(self_evolution_kd, student, teacher, labels=labels, prior_weight=0.0)
    torch.testing.assert_close(limit(label_weight=1.0), cross_entropy(student, labels))
    torch.testing.assert_close(limit(label_weight=0.0), forward_kl(student, teacher))


def test_self_evolution_helps_only_tokens_above_the_threshold():
    student, teacher, labels = random_batch(8)
    loss = partial(self_evolution_kd, student, teacher, labels=labels, reduction="none")
    plain, helped = loss(threshold=math.inf), loss(threshold=-1.0)
    torch.testing.assert_close(plain, loss(prior_weight=0.0))
    threshold = plain.median().item()
    torch.testing.assert_close(loss(threshold=threshold), torch.where(plain > threshold, helped, plain))
    assert (helped < plain).all()


def test_self_evolution_leaves_out_a_label_that_the_teacher_rules_out():
    student, teacher, labels = torch.zeros(1, 1, 3), torch.zeros(1, 1, 3), torch.tensor([[0]])
    teacher[0, 0, 0] = -torch.inf
    loss = self_evolution_kd(student, teacher, labels=labels, prior_weight=0.0)
    assert loss.item() == pytest.approx(2 * 0.25 * math.log(0.25 / (1 / 3)))


def test_bounds_that_keep_everything_give_the_forward_kl():
    student, teacher, labels = random_batch(9)
    loss = dac_kl(student, teacher, labels=labels, bounds=bounds(-1.0, 2.0), temperature=2.0)
    torch.testing.assert_close(loss, forward_kl(student, teacher, temperature=2.0))


def test_bounds_that_keep_one_more_id_than_the_label_compare_these_two():
    teacher = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
    student = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64).log()
    loss = dac_kl(student, teacher, labels=torch.tensor([3]), bounds=bounds(0.0, 0.4), slope=1e3)
    torch.testing.assert_close(loss, forward_kl(student[:, [0, 3]], teacher[:, [0, 3]]))
    only_label = dac_kl(student, teacher, labels=torch.tensor([3]), bounds=bounds(2.0, 2.0), slope=1e3)
    assert only_label.item() == pytest.approx(0, abs=1e-12)


def test_learned_bounds_lie_in_order_and_get_a_gradient():
    torch.manual_seed(0)
    student, teacher, labels = random_batch(10)
    student.requires_grad_()
    learned = QuantileBounds(top_k=4, hidden=8)
    lower, upper = learned(*(x[0].log_softmax(-1).sort(descending=True).values for x in (teacher, student)))
    assert ((0 <= lower) & (lower <= upper) & (upper <= 1)).all() and lower.shape == (5,)
    dac_kl(student, teacher, labels=labels, bounds=learned).backward()
    assert student.grad.abs().max() > 0
    assert all(parameter.grad.abs().max() > 0 for parameter in learned.parameters())


def test_gradients_of_the_bounds_equal_finite_differences():
    student, teacher, labels = random_batch(11)
    limits = torch.tensor([0.1, 0.7], dtype=torch.float64, requires_grad=True)

    def loss(limits):
        return dac_kl(student, teacher, labels=labels, bounds=lambda log_p, _: limits[:, None].expand(2, len(log_p)))

    assert torch.autograd.gradcheck(loss, limits)


def test_learned_bounds_take_a_vocabulary_below_their_top_k_and_no_token_at_all():
    torch.manual_seed(0)
    student, teacher, labels = random_batch(12)
    learned = QuantileBounds(top_k=256)
    assert dac_kl(student, teacher, labels=labels, bounds=learned).isfinite()
    nothing = dac_kl(student, teacher, labels=torch.full_like(labels, -100), bounds=learned)
    nothing.backward()
    assert nothing.item() == 0 and all(p.grad.abs().max() == 0 for p in learned.parameters())


def test_learned_bounds_that_read_no_id_are_refused():
    with pytest.raises(ValueError, match="top_k must be 1 or more, got 0"):
        QuantileBounds(top_k=0)


@pytest.mark.parametrize(
    ("loss", "argument"),
    [(atkd, "easy_weight"), (self_evolution_kd, "label_weight"), (self_evolution_kd, "prior_weight")],
)
def test_weights_outside_0_to_1_are_refused(loss, argument):
    for value in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"{argument} must be 0 to 1, got {value}"):
            loss(REFERENCE_STUDENT, REFERENCE_TEACHER, labels=LABELS, **{argument: value})
