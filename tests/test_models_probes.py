import logging
import math

import pytest
import torch
import torch.nn.functional as F

from speechkd.models.probes import (
    encode_classes,
    linear_heads,
    multi_head_cross_entropy,
    predict_classes,
    ridge_probe,
    softmax_probe,
)

FEATURES = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.float64)
VALUES = torch.tensor([1, 2, 4], dtype=torch.float64)


def clusters(num_items=60, dim=16, num_classes=3, seed=0):
    """Embeddings of well separated classes, and the class of each."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(num_classes, dim, generator=generator)
    classes = torch.arange(num_items) % num_classes
    return centres[classes] + torch.randn(num_items, dim, generator=generator), classes


@pytest.mark.parametrize(
    ("alpha", "weight", "bias"),
    [(0.5, (0.6666667, 1.3333333), 1.0), (100.0, (0.00335515, 0.01325614), 2.3222591)],
)
def test_worked_examples_of_ridge_regression(alpha, weight, bias):
    layer = ridge_probe(FEATURES, VALUES, alpha)
    digits = 5e-8 if alpha < 1 else 5e-9
    assert layer.weight[0].tolist() == pytest.approx(weight, abs=digits)
    assert layer.bias.item() == pytest.approx(bias, abs=5e-8)


@pytest.mark.parametrize(("num_items", "dim"), [(40, 7), (5, 30)])
def test_ridge_solves_the_normal_equations(num_items, dim):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(num_items, dim, generator=generator, dtype=torch.float64) + 5
    targets = torch.randn(num_items, 2, generator=generator, dtype=torch.float64) - 3
    layer = ridge_probe(features, targets, alpha=2.0)
    centred = features - features.mean(dim=0)
    normal = centred.T @ centred + 2.0 * torch.eye(dim, dtype=torch.float64)
    torch.testing.assert_close(layer.weight.data.T, torch.linalg.solve(normal, centred.T @ targets))
    # the intercept carries no penalty, so residuals have mean zero
    torch.testing.assert_close((targets - layer(features)).mean(dim=0), torch.zeros(2, dtype=torch.float64))


def test_shifting_the_targets_moves_the_intercept_alone():
    plain, shifted = ridge_probe(FEATURES, VALUES, 1.0), ridge_probe(FEATURES, VALUES + 1000, 1.0)
    torch.testing.assert_close(plain.weight, shifted.weight)
    assert shifted.bias.item() == pytest.approx(plain.bias.item() + 1000)


def test_little_data_gives_the_mean():
    layer = ridge_probe(FEATURES[:1], VALUES[:1])
    assert layer.weight.abs().max() == 0
    assert layer(FEATURES)[:, 0].tolist() == [1, 1, 1]


def test_ridge_keeps_the_features_type_and_takes_no_gradient():
    layer = ridge_probe(FEATURES.float().requires_grad_(), VALUES)
    assert layer.weight.dtype == torch.float32
    assert not layer.weight.requires_grad and not layer.bias.requires_grad


@pytest.mark.parametrize(
    ("features", "targets", "alpha", "message"),
    [
        (FEATURES, VALUES[:2], 1.0, r"targets \(2,\) do not fit features \(3, 2\)"),
        (FEATURES, VALUES[:, None, None], 1.0, "do not fit features"),
        (FEATURES[:0], VALUES[:0], 1.0, r"features are \(0, 2\)"),
        (FEATURES[0], VALUES, 1.0, r"features are \(2,\)"),
        (FEATURES.long(), VALUES, 1.0, "features are .* of torch.int64"),
        (FEATURES, VALUES, 0.0, "alpha must be a positive number, got 0.0"),
        (FEATURES, VALUES, math.nan, "alpha must be a positive number, got nan"),
        (FEATURES, torch.tensor([1.0, math.nan, 2.0]), 1.0, "1 targets are NaN or infinite"),
        (FEATURES / torch.tensor([[1], [0], [0]]), VALUES, 1.0, "item 1 and 1 more of 3 have embeddings with NaN"),
    ],
)
def test_ridge_refuses_what_it_cannot_fit(features, targets, alpha, message):
    with pytest.raises(ValueError, match=message):
        ridge_probe(features, targets, alpha)


def test_labels_unseen_in_training_become_minus_one_and_are_counted(caplog):
    with caplog.at_level(logging.WARNING):
        numbers, num_unseen = encode_classes(["tea", "mocha", "tea", "cocoa"], ["mocha", "tea"])
    assert numbers.tolist() == [1, 0, 1, -1]
    assert numbers.dtype == torch.int64
    assert num_unseen == 1
    assert "1 of 4 items have a label unseen in training and count as wrong: 'cocoa'" in caplog.text


def test_known_labels_raise_no_warning(caplog):
    with caplog.at_level(logging.WARNING):
        assert encode_classes(["tea"], ["tea"], for_training=True)[1] == 0
    assert caplog.text == ""


def test_a_label_to_train_on_that_is_no_class_is_refused_by_name():
    message = "2 of 3 items to train on have a label that is none of the 1 classes: 'cocoa', 'milk'; add it"
    with pytest.raises(ValueError, match=message):
        encode_classes(["tea", "milk", "cocoa"], ["tea"], for_training=True)


def test_many_unknown_labels_are_named_in_part():
    with pytest.raises(ValueError, match="'0', '1', '2', '3', '4' and 3 more"):
        encode_classes([str(number) for number in range(8)], ["tea"], for_training=True)


def test_a_class_listed_twice_is_refused():
    with pytest.raises(ValueError, match=r"classes \['tea'\] stand twice in the list of 3"):
        encode_classes(["tea"], ["tea", "mocha", "tea"])


def test_no_label_gives_no_number():
    numbers, num_unseen = encode_classes([], ["tea"])
    assert (numbers.shape, num_unseen) == ((0,), 0)


def test_heads_begin_with_the_published_deviation():
    heads = linear_heads(768, [400, 300], seed=0)
    assert [tuple(head.weight.shape) for head in heads] == [(400, 768), (300, 768)]
    assert heads[0].weight.std().item() == pytest.approx(0.05103, rel=0.01)
    assert heads[0].weight.mean().abs().item() < 1e-3
    assert all(head.bias.abs().max() == 0 for head in heads)


def test_equal_seeds_give_equal_heads():
    torch.manual_seed(0)
    first = linear_heads(8, [3], seed=1)[0].weight
    torch.manual_seed(5)  # the global generator has no part in it
    assert torch.equal(linear_heads(8, [3], seed=1)[0].weight, first)
    assert not torch.equal(linear_heads(8, [3], seed=2)[0].weight, first)


@pytest.mark.parametrize("num_classes", [[], [3, 0]])
def test_heads_without_a_class_are_refused(num_classes):
    with pytest.raises(ValueError, match="heads need one class or more each"):
        linear_heads(8, num_classes, seed=0)


def test_worked_example_of_the_loss_of_two_heads():
    first, second = torch.tensor([[2.0, 0, 0]]), torch.tensor([[0.0, 1]])
    zero = torch.zeros(1, 1, dtype=torch.int64)
    assert multi_head_cross_entropy([first], zero).item() == pytest.approx(0.2395448, abs=2e-7)
    assert multi_head_cross_entropy([second], zero).item() == pytest.approx(1.3132616, abs=2e-7)
    both = multi_head_cross_entropy([first, second], torch.zeros(1, 2, dtype=torch.int64))
    assert both.item() == pytest.approx(1.5528065, abs=2e-7)


def test_loss_is_summed_over_heads_and_averaged_over_items():
    logits = [torch.randn(5, count, generator=torch.Generator().manual_seed(count)) for count in (3, 4)]
    targets = torch.tensor([[0, 3], [1, 2], [2, 1], [0, 0], [1, 3]])
    plain = sum(-logits[head][item].log_softmax(dim=0)[targets[item, head]] for item in range(5) for head in range(2))
    torch.testing.assert_close(multi_head_cross_entropy(logits, targets), plain / 5)


def test_loss_of_bfloat16_logits_is_float32():
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    loss = multi_head_cross_entropy([logits], torch.zeros(4, 1, dtype=torch.int64))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), torch.zeros(4, dtype=torch.int64)))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([[0, 0], [-1, 0]]), r"item 1 has class -1 for head 0, which knows 0 to 2 \(1 such targets\)"),
        (torch.tensor([[0, 2], [3, 2]]), r"item 0 has class 2 for head 1, which knows 0 to 1 \(3 such targets\)"),
        (torch.zeros(2, 1, dtype=torch.int64), r"targets are \(2, 1\) of torch.int64; 2 heads need \(items, 2\)"),
        (torch.zeros(2, 2), "targets are .* of torch.float32"),
        (torch.zeros(0, 2, dtype=torch.int64), "there is no item to train on"),
        (torch.zeros(3, 2, dtype=torch.int64), "differ in number"),
    ],
)
def test_targets_that_the_heads_cannot_learn_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        multi_head_cross_entropy([torch.zeros(2, 3), torch.zeros(2, 2)], targets)
    with pytest.raises(ValueError, match=message):
        softmax_probe(torch.zeros(2, 5), targets, [3, 2], num_steps=1)


def test_probe_learns_several_labels_at_once():
    features, classes = clusters(num_items=120)
    targets = torch.stack([classes, (classes == 1).long()], dim=1)
    heads = softmax_probe(features[:60], targets[:60], [3, 2], num_steps=100)
    right = predict_classes(heads, features[60:]) == targets[60:]
    assert right.float().mean(dim=0).min() > 0.95
    assert not any(parameter.requires_grad for parameter in heads.parameters())


def test_one_head_takes_plain_targets():
    features, classes = clusters()
    plain = softmax_probe(features, classes, [3], num_steps=20)
    column = softmax_probe(features, classes[:, None], [3], num_steps=20)
    assert torch.equal(plain[0].weight, column[0].weight)
    assert predict_classes(plain, features).shape == (60, 1)


def test_heads_do_not_disturb_each_other():
    features, classes = clusters()
    targets = torch.stack([classes, (classes + 1) % 3], dim=1)
    together = softmax_probe(features, targets, [3, 3], num_steps=20)
    alone = softmax_probe(features, targets[:, 0], [3], num_steps=20)
    torch.testing.assert_close(together[0].weight, alone[0].weight)


def test_seed_sets_the_first_weights_and_nothing_else_is_random():
    features, classes = clusters()
    first, again, other = (softmax_probe(features, classes, [3], num_steps=5, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)


def test_learning_rate_rises_from_zero_then_falls():
    features, classes = clusters()
    start = linear_heads(16, [3], seed=0)[0].bias.detach()
    # Adam moves a weight by about the learning rate: 0, 0.5 and 1 of its peak in the first three of 2 + 8 steps
    biases = [
        softmax_probe(features, classes, [3], num_steps=10, learning_rate=1e-3, warmup_fraction=fraction)[0].bias
        for fraction in (0.2, 0.0)
    ]
    moved = [(bias - start).abs().max().item() for bias in biases]
    assert moved[0] == pytest.approx(1e-3 * (0 + 0.5 + sum(left / 8 for left in range(1, 9))), rel=0.1)
    assert moved[1] == pytest.approx(1e-3 * sum(left / 10 for left in range(1, 11)), rel=0.1)


def test_embeddings_get_no_gradient():
    features, classes = clusters()
    features.requires_grad_()
    softmax_probe(features, classes, [3], num_steps=2)
    assert features.grad is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_steps": 0}, "num_steps >= 1, .* got 0"),
        ({"learning_rate": 0.0}, "learning_rate > 0"),
        ({"learning_rate": math.nan}, "learning_rate > 0"),
        ({"warmup_fraction": 1.5}, "warmup_fraction in 0 to 1"),
        ({"features": torch.full((60, 16), math.nan)}, "item 0 and 59 more of 60 have embeddings with NaN"),
        ({"features": torch.zeros(59, 16)}, "features of 59 items and targets of 60 differ in number"),
    ],
)
def test_probe_refuses_what_it_cannot_train(changed, message):
    features, classes = clusters()
    with pytest.raises(ValueError, match=message):
        softmax_probe(**{"features": features, "targets": classes, "num_classes": [3], "num_steps": 2} | changed)


def test_equal_scores_choose_the_first_class():
    heads = linear_heads(4, [3], seed=0)
    assert predict_classes(heads, torch.zeros(2, 4)).tolist() == [[0], [0]]
