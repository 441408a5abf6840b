import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from speechkd.losses.hidden import (
    LayerFilters,
    hidden_cosine,
    hidden_l1,
    hidden_l1_cosine,
    hidden_mse,
    hidden_projection,
    ted_mse,
)
from speechkd.losses.layers import LearnedLayerMap, layer_map, lead_kl, learned_map_mse, stack_layers

torch.manual_seed(1)
STUDENT, TEACHER = torch.randn(4, 6), torch.randn(4, 6)
LOSSES = {
    "l1": hidden_l1,
    "mse": hidden_mse,
    "cosine": hidden_cosine,
    "negative cosine": partial(hidden_cosine, form="negative"),
    "log-sigmoid cosine": partial(hidden_cosine, form="log_sigmoid"),
    "l1 + cosine": lambda *args, **kwargs: sum(hidden_l1_cosine(*args, **kwargs)),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def make_layers(num_layers=2, num_frames=(5, 3), dim=4, dtype=torch.float64, seed=0):
    """Student and teacher, (batch, layers, frames, dim), with NaN on padding, and the mask, (batch, frames)."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(num_frames) + 1) < torch.tensor(num_frames)[:, None]
    shape = (len(num_frames), num_layers, mask.shape[1], dim)
    student, teacher = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    padding = ~mask[:, None, :, None]
    return student.masked_fill(padding, torch.nan).requires_grad_(), teacher.masked_fill(padding, torch.nan), mask


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-6), (torch.float32, 1e-5)])
def test_reference_values(dtype, tolerance):
    student, teacher = STUDENT.to(dtype), TEACHER.to(dtype)
    assert hidden_cosine(student, teacher).item() == pytest.approx(1.312177, abs=tolerance)
    assert hidden_mse(student, teacher).item() == pytest.approx(2.757771, abs=tolerance)


def test_losses_equal_a_loop_over_real_frames():
    student, teacher, mask = make_layers()
    totals = {"l1": 0.0, "mse": 0.0, "cosine": 0.0, "negative cosine": 0.0, "log-sigmoid cosine": 0.0}
    for batch, frame in mask.nonzero().tolist():
        for layer in range(2):
            s, t = student[batch, layer, frame].tolist(), teacher[batch, layer, frame].tolist()
            dot = sum(a * b for a, b in zip(s, t, strict=True))
            cosine = dot / math.hypot(*s) / math.hypot(*t)
            totals["l1"] += sum(abs(a - b) for a, b in zip(s, t, strict=True)) / 4
            totals["mse"] += sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / 4
            totals["cosine"] += 1 - cosine
            totals["negative cosine"] += -cosine
            totals["log-sigmoid cosine"] += math.log1p(math.exp(-cosine))
    for name, total in totals.items():
        assert LOSSES[name](student, teacher, mask, reduction="sum").item() == pytest.approx(total)
        assert LOSSES[name](student, teacher, mask).item() == pytest.approx(total / (8 * 2))
    l1, cosine = hidden_l1_cosine(student, teacher, mask, reduction="sum")
    assert (l1.item(), cosine.item()) == pytest.approx((totals["l1"], totals["log-sigmoid cosine"]))


@every_loss
def test_padding_adds_no_loss_and_no_gradient(loss):
    student, teacher, mask = make_layers(num_frames=(5, 3))
    whole = loss(student, teacher, mask, reduction="sum")
    whole.backward()
    parts = loss(student[:1, :, :5], teacher[:1, :, :5], reduction="sum") + loss(
        student[1:, :, :3], teacher[1:, :, :3], reduction="sum"
    )
    torch.testing.assert_close(whole, parts)
    assert student.grad[1, :, 3:].abs().max() == 0 and student.grad[:, :, :3].abs().min() > 0


@every_loss
def test_a_batch_of_padding_gives_zero_with_a_live_graph(loss):
    student, teacher, mask = make_layers()
    total = loss(student, teacher, torch.zeros_like(mask))
    total.backward()
    assert total.item() == 0 and student.grad.abs().max() == 0


@every_loss
def test_the_teacher_gets_no_gradient_and_the_student_the_right_one(loss):
    student, teacher, mask = make_layers()
    teacher = teacher.requires_grad_()
    loss(student, teacher, mask).backward()
    assert teacher.grad is None
    real = student.detach()[mask[:, None].expand(-1, 2, -1)].requires_grad_()
    target = teacher.detach()[mask[:, None].expand(-1, 2, -1)]
    assert torch.autograd.gradcheck(lambda states: loss(states, target), real)


@every_loss
def test_micro_batches_with_num_items_add_up_to_the_whole(loss):
    student, teacher, mask = make_layers()
    parts = [loss(student[i : i + 1], teacher[i : i + 1], mask[i : i + 1], num_items=8 * 2) for i in range(2)]
    torch.testing.assert_close(sum(parts), loss(student, teacher, mask))


@every_loss
def test_bfloat16_states_are_computed_in_float32_also_under_autocast(loss):
    student, teacher, mask = make_layers(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher, mask)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(student.float(), teacher.float(), mask), rtol=0, atol=0)


@every_loss
def test_one_value_per_position_without_reduction(loss):
    student, teacher, mask = make_layers()
    values = loss(student, teacher, mask, reduction="none")
    assert values.shape == (2, 2, 6) and values[1, :, 3:].abs().max() == 0
    torch.testing.assert_close(values.sum(), loss(student, teacher, mask, reduction="sum"))


def test_utterances_can_weigh_the_same_whatever_their_length():
    student, teacher, mask = make_layers(num_frames=(5, 3))
    alone = [hidden_mse(student[i, 0, :n], teacher[i, 0, :n]) for i, n in enumerate((5, 3))]
    value = hidden_mse(student[:, 0], teacher[:, 0], mask, reduction="seq_mean")
    torch.testing.assert_close(value, sum(alone) / 2)


def test_equal_states_give_zero():
    for loss in (hidden_l1, hidden_mse, hidden_cosine):
        student = STUDENT.double().requires_grad_()
        value = loss(student, student.detach())
        value.backward()
        assert abs(value.item()) < 1e-12 and student.grad.abs().max() < 1e-12


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_the_cosine_is_blind_to_length_and_half_a_squared_distance(scale, seed):
    student, teacher, mask = make_layers(seed=seed)
    value = hidden_cosine(student, teacher, mask)
    torch.testing.assert_close(hidden_cosine(student * scale, teacher / scale, mask), value)
    real = mask[:, None].expand(-1, 2, -1)
    units = [F.normalize(states[real], dim=-1) for states in (student, teacher)]
    torch.testing.assert_close((units[0] - units[1]).square().sum(dim=-1).mean() / 2, value)
    assert 0 <= value <= 2


def test_parallel_opposite_and_zero_vectors():
    student = torch.tensor([[2.0, 0.0], [-3.0, 0.0], [0.0, 0.0]], requires_grad=True)
    values = hidden_cosine(student, torch.tensor([[1.0, 0.0]]).expand(3, 2), reduction="none")
    values.sum().backward()
    assert values.tolist() == [0, 2, 1]
    assert student.grad.isfinite().all()


def test_a_projection_starts_as_the_identity_or_keeps_lengths():
    states = torch.randn(3, 4)
    torch.testing.assert_close(hidden_projection(4, 4, bias=True)(states), states)
    wide = hidden_projection(4, 6)(states)
    torch.testing.assert_close(wide.norm(dim=-1), states.norm(dim=-1))


def test_task_filters_compare_what_they_keep():
    student, teacher, mask = make_layers(dtype=torch.float32)
    ours, theirs = LayerFilters(2, 4, filter_dim=3), LayerFilters(2, 4, filter_dim=3)
    value = ted_mse(student, teacher, ours, theirs, mask)
    value.backward()
    total = 0.0
    for batch, frame in mask.nonzero().tolist():
        for layer in range(2):
            kept = ours.filters[layer](student[batch, layer, frame])
            total += (kept - theirs.filters[layer](teacher[batch, layer, frame])).square().mean().item()
    assert value.item() == pytest.approx(total / 16, rel=1e-5)
    assert student.grad[1, :, 3:].abs().max() == 0 and student.grad[0, :, :5].abs().max() > 0
    assert all(weight.grad.isfinite().all() and weight.grad.abs().max() > 0 for weight in ours.parameters())
    assert all(weight.grad is None for weight in theirs.parameters())
    same = ted_mse(teacher, teacher, theirs, theirs, mask)
    assert same.item() == 0
    with pytest.raises(ValueError, match=r"\(2, 1, 6, 4\) do not fit 2 filters"):
        ours(student[:, :1])


def test_layer_maps():
    assert layer_map(4, 12) == [3, 6, 9, 12]
    assert layer_map(5, 12, "skip") == [2, 4, 6, 8, 10]
    assert layer_map(3, 12, "first") == [1, 2, 3]
    assert layer_map(2, 12, "middle") == [6, 7]
    assert layer_map(3, 12, "last") == [10, 11, 12]
    with pytest.raises(ValueError, match="student of 5 layers .* teacher of 4; choose 1 to 4"):
        layer_map(5, 4)
    with pytest.raises(ValueError, match="kind must be .*, got 'every'"):
        layer_map(2, 4, "every")


@pytest.mark.parametrize("kind", ["uniform", "skip", "first", "middle", "last"])
def test_layer_maps_rise_within_the_teacher_and_equal_depths_give_the_identity(kind):
    for depth in range(1, 25):
        assert layer_map(depth, depth, kind) == list(range(1, depth + 1))
        for student_depth in range(1, depth):
            layers = layer_map(student_depth, depth, kind)
            assert len(layers) == student_depth and layers == sorted(set(layers))
            assert layers[0] >= 1 and layers[-1] <= depth


def test_layers_are_stacked_by_their_number():
    hidden_states = [torch.full((2, 3, 4), float(layer)) for layer in range(5)]
    stacked = stack_layers(hidden_states, [0, 4, 2])
    assert stacked.shape == (2, 3, 3, 4) and stacked[0, :, 0, 0].tolist() == [0, 4, 2]
    with pytest.raises(ValueError, match=r"layers \[5\] must be among 0 \(embeddings\) to 4"):
        stack_layers(hidden_states, [5])
    with pytest.raises(ValueError, match=r"layers \[\] must be"):
        stack_layers(hidden_states, [])


def test_a_learned_map_starts_near_the_uniform_map_and_finds_the_layer_to_copy():
    torch.manual_seed(0)
    learned = LearnedLayerMap(2, 4)
    assert learned.weights().argmax(dim=-1).tolist() == [1, 3]
    torch.testing.assert_close(learned.weights().sum(dim=-1), torch.ones(2))
    teacher = torch.randn(3, 4, 5, 6)
    student = teacher[:, [0, 2]]
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.2)
    for _ in range(60):
        optimizer.zero_grad()
        learned_map_mse(student, teacher, learned).backward()
        optimizer.step()
    assert learned.weights().argmax(dim=-1).tolist() == [0, 2] and learned.weights().amax(dim=-1).min() > 0.9


def test_a_learned_map_equals_a_loop_and_ignores_padding():
    student, _, mask = make_layers(num_layers=2)
    _, teacher, _ = make_layers(num_layers=3, seed=1)
    learned = LearnedLayerMap(2, 3).double()
    value = learned_map_mse(student, teacher, learned, mask)
    value.backward()
    weights, total = learned.weights(), 0.0
    for batch, frame in mask.nonzero().tolist():
        for layer in range(2):
            mixture = sum(weights[layer, k] * teacher[batch, k, frame] for k in range(3))
            total += (student[batch, layer, frame] - mixture).square().mean().item()
    assert value.item() == pytest.approx(total / 16)
    assert student.grad[1, :, 3:].abs().max() == 0 and student.grad.isfinite().all()
    assert learned.logits.grad.isfinite().all() and learned.logits.grad.abs().max() > 0
    empty = learned_map_mse(student, teacher, learned, torch.zeros_like(mask))
    empty.backward()
    assert empty.item() == 0 and learned.logits.grad.isfinite().all()


def test_a_learned_map_names_the_layers_that_it_needs():
    learned = LearnedLayerMap(2, 4)
    with pytest.raises(ValueError, match=r"teacher states are \(1, 3, 5, 6\), this map needs \(batch, 4"):
        learned(torch.zeros(1, 3, 5, 6))
    with pytest.raises(ValueError, match=r"student states are \(1, 2, 5, 3\), the mixtures \(1, 2, 5, 6\)"):
        learned_map_mse(torch.zeros(1, 2, 5, 3), torch.zeros(1, 4, 5, 6), learned)


def test_lead_weighs_pairs_by_how_well_they_fit():
    student, _, mask = make_layers(num_layers=2)
    _, teacher, _ = make_layers(num_layers=3, seed=1)
    pairs = torch.zeros(2, 3, dtype=torch.float64)
    for batch, frame in mask.nonzero().tolist():
        for i in range(2):
            for j in range(3):
                log_q = (student[batch, i, frame] / 2).log_softmax(-1)
                log_p = (teacher[batch, j, frame] / 2).log_softmax(-1)
                pairs[i, j] += (log_p.exp() * (log_p - log_q)).sum().detach() / 8
    weights = (-pairs / 0.3).flatten().softmax(dim=0).view(2, 3)
    value = lead_kl(student, teacher, mask, temperature=2.0, layer_temperature=0.3)
    assert value.item() == pytest.approx(4 * (weights * pairs).sum().item())
    value.backward()
    assert student.grad[1, :, 3:].abs().max() == 0 and student.grad.isfinite().all()
    even = lead_kl(student, teacher, mask, temperature=2.0, layer_temperature=1e9)
    assert even.item() == pytest.approx(4 * pairs.mean().item())
    chosen = lead_kl(student, teacher, mask, temperature=2.0, pairs=[(1, 2)])
    assert chosen.item() == pytest.approx(4 * pairs[1, 2].item())


def test_lead_weights_are_constants_for_the_gradient():
    student, teacher, mask = make_layers()
    (gradient,) = torch.autograd.grad(lead_kl(student, teacher, mask), student)
    pairs = [(i, j) for i in range(2) for j in range(2)]
    losses = torch.stack([lead_kl(student, teacher, mask, pairs=[pair]) for pair in pairs])
    (expected,) = torch.autograd.grad(((-losses).softmax(dim=0).detach() * losses).sum(), student)
    torch.testing.assert_close(gradient, expected)


def test_lead_with_labels_weighs_by_how_well_the_teacher_layer_answers():
    student, _, mask = make_layers(num_layers=2)
    _, teacher, _ = make_layers(num_layers=2, seed=1)
    labels = torch.tensor([[0, 1, 2, 3, 0, -100], [3, 2, 1, -100, -100, -100]])
    errors = torch.stack([F.cross_entropy(teacher[:, j][mask], labels[mask]) for j in range(2)])
    weights = (-errors / 0.5).softmax(dim=0)
    plain = [lead_kl(student, teacher, mask, pairs=[(i, i)]) for i in range(2)]
    value = lead_kl(student, teacher, labels=labels, pairs=[(0, 0), (1, 1)], layer_temperature=0.5)
    torch.testing.assert_close(value, weights[0] * plain[0] + weights[1] * plain[1])


def test_lead_of_padding_is_zero_with_a_live_graph_and_its_errors_name_the_layers():
    student, teacher, mask = make_layers()
    value = lead_kl(student, teacher, torch.zeros_like(mask))
    value.backward()
    assert value.item() == 0 and student.grad.abs().max() == 0
    with pytest.raises(ValueError, match=r"pairs \[\(2, 0\)\] must name some of 2 student and 2 teacher layers"):
        lead_kl(student, teacher, mask, pairs=[(2, 0)])
    with pytest.raises(ValueError, match=r"student logits \(2, 4\) and teacher logits \(2, 2, 6, 4\) must both"):
        lead_kl(torch.zeros(2, 4), teacher)
    with pytest.raises(ValueError, match="layer_temperature must be positive, got 0"):
        lead_kl(student, teacher, mask, layer_temperature=0)


def test_bad_input_is_named():
    student, teacher, mask = make_layers()
    with pytest.raises(ValueError, match=r"student \(2, 2, 6, 4\) and teacher \(2, 1, 6, 4\) differ in shape"):
        hidden_mse(student, teacher[:, :1], mask)
    with pytest.raises(ValueError, match=r"have 3 values, the teacher's 4; map .*hidden_projection\(3, 4\)"):
        hidden_mse(student[..., :3], teacher, mask)
    with pytest.raises(ValueError, match=r"mask is \(2, 5\), vectors \(2, 2, 6, 4\) need \(2, 2, 6\) or \(2, 6\)"):
        hidden_mse(student, teacher, mask[:, :5])
    with pytest.raises(ValueError, match=r"mask is \(2, 5\), vectors \(2, 6, 4\) need \(2, 6\)"):
        hidden_mse(student[:, 0], teacher[:, 0], mask[:, :5])
    with pytest.raises(ValueError, match=r"mask must be bool .*, got torch.int64; pass mask.bool\(\)"):
        hidden_mse(student, teacher, mask.long())
    with pytest.raises(ValueError, match=r"the batch is empty: its vectors are \(0, 2, 6, 4\)"):
        hidden_mse(student[:0], teacher[:0])
    with pytest.raises(ValueError, match="form must be .*, got 'cos'"):
        hidden_cosine(student, teacher, mask, form="cos")
    with pytest.raises(ValueError, match="reduction must be .*, got 'mean'"):
        hidden_l1(student, teacher, mask, reduction="mean")
