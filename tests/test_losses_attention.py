import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechkd.losses.attention import (
    AttentionAligner,
    aligned_attention_kl,
    attention_kl,
    attention_mse,
    minilm,
    minilm_v2,
    relation_kl,
)

torch.manual_seed(1)
STUDENT, TEACHER, WIDE_TEACHER = torch.randn(4, 6), torch.randn(4, 6), torch.randn(4, 12)
MAP_LOSSES = {
    "mse": attention_mse,
    "mse of mean heads": partial(attention_mse, average_heads=True),
    "kl": attention_kl,
}
every_map_loss = pytest.mark.parametrize("loss", MAP_LOSSES.values(), ids=MAP_LOSSES)


def make_maps(num_frames=(5, 3), heads=2, dtype=torch.float64):
    """Scores of student and teacher, (batch, heads, frames, frames), with NaN on padded queries, and the mask."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(max(num_frames)) < torch.tensor(num_frames)[:, None]
    shape = (len(num_frames), heads, mask.shape[1], mask.shape[1])
    student, teacher = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    padding = ~mask[:, None, :, None]
    return student.masked_fill(padding, torch.nan).requires_grad_(), teacher.masked_fill(padding, torch.nan), mask


def make_vectors(num_frames=(5, 3), widths=(4, 8), dtype=torch.float64):
    """Vectors of student and teacher, (batch, frames, dim), with NaN on padding, and the mask."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(max(num_frames)) < torch.tensor(num_frames)[:, None]
    student, teacher = (torch.randn(*mask.shape, width, generator=generator, dtype=dtype) for width in widths)
    padding = ~mask[..., None]
    return student.masked_fill(padding, torch.nan).requires_grad_(), teacher.masked_fill(padding, torch.nan), mask


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-6), (torch.float32, 1e-5)])
def test_reference_values(dtype, tolerance):
    student, teacher, wide = (states[None].to(dtype) for states in (STUDENT, TEACHER, WIDE_TEACHER))
    assert relation_kl(student, teacher, num_heads=2).item() == pytest.approx(0.886944, abs=tolerance)
    assert relation_kl(student, wide, num_heads=2).item() == pytest.approx(0.409888, abs=tolerance)


def test_losses_equal_a_loop_over_real_queries_and_keys():
    student, teacher, mask = make_maps()
    squares, divergence = 0.0, 0.0
    for batch, num_frames in enumerate((5, 3)):
        for query in range(num_frames):
            for head in range(2):
                s = student[batch, head, query, :num_frames].tolist()
                t = teacher[batch, head, query, :num_frames].tolist()
                squares += sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / num_frames / 2
                total_s, total_t = sum(map(math.exp, s)), sum(map(math.exp, t))
                for a, b in zip(s, t, strict=True):
                    divergence += math.exp(b) / total_t * (b - math.log(total_t) - a + math.log(total_s)) / 2
    assert attention_mse(student, teacher, mask).item() == pytest.approx(squares / 8)
    assert attention_kl(student, teacher, mask).item() == pytest.approx(divergence / 8)
    assert attention_kl(student, teacher, mask, reduction="sum").item() == pytest.approx(divergence)


@every_map_loss
def test_padding_adds_no_loss_and_no_gradient(loss):
    student, teacher, mask = make_maps()
    whole = loss(student, teacher, mask, reduction="sum")
    whole.backward()
    assert student.grad[1, :, 3:].abs().max() == 0 and student.grad[1, :, :, 3:].abs().max() == 0
    assert student.grad[1, :, :3, :3].abs().min() > 0
    parts = loss(student[:1], teacher[:1], reduction="sum")
    parts = parts + loss(student[1:, :, :3, :3], teacher[1:, :, :3, :3], reduction="sum")
    torch.testing.assert_close(whole, parts)


@every_map_loss
def test_nothing_scored_gives_zero_with_a_live_graph(loss):
    student, teacher, mask = make_maps(num_frames=(3, 3))
    value = loss(student, teacher, torch.zeros_like(mask))
    value.backward()
    assert value.item() == 0 and student.grad.abs().max() == 0


@every_map_loss
def test_the_teacher_gets_no_gradient_and_the_student_the_right_one(loss):
    student, teacher, _ = make_maps(num_frames=(3, 3))
    teacher.requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert torch.autograd.gradcheck(lambda scores: loss(scores, teacher), student)


@every_map_loss
def test_equal_maps_give_zero(loss):
    student, _, mask = make_maps()
    value = loss(student, student.detach(), mask)
    value.backward()
    assert abs(value.item()) < 1e-12 and student.grad.abs().max() < 1e-12


@every_map_loss
def test_micro_batches_with_num_items_add_up_to_the_whole(loss):
    student, teacher, mask = make_maps()
    parts = [loss(student[i : i + 1], teacher[i : i + 1], mask[i : i + 1], num_items=8) for i in range(2)]
    torch.testing.assert_close(sum(parts), loss(student, teacher, mask))


@every_map_loss
def test_bfloat16_maps_are_computed_in_float32(loss):
    student, teacher, mask = make_maps(dtype=torch.bfloat16)
    value = loss(student, teacher, mask)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(student.float(), teacher.float(), mask), rtol=0, atol=0)


@pytest.mark.parametrize("nothing", [-torch.inf, -1e4, torch.finfo(torch.float32).min])
@every_map_loss
def test_causal_scores_equal_a_loop_over_the_keys_before(loss, nothing):
    student, teacher, _ = make_maps(num_frames=(4,), dtype=torch.float32)
    later = torch.ones(4, 4, dtype=torch.bool).triu(1)
    value = loss(student.masked_fill(later, nothing), teacher.masked_fill(later, nothing), reduction="none")
    value.sum().backward()
    for query in range(4):
        keys = slice(0, query + 1)
        alone = loss(student[:, :, query : query + 1, keys], teacher[:, :, query : query + 1, keys])
        torch.testing.assert_close(value[0, query], alone)
    assert student.grad.isfinite().all() and student.grad[..., later].abs().max() == 0


@settings(max_examples=20, deadline=None)
@given(shift=st.floats(-50, 50), seed=st.integers(0, 1000))
def test_the_kl_is_blind_to_a_shift_of_a_row_and_agrees_with_that_of_probabilities(shift, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 1, 3, 4, 5, generator=generator, dtype=torch.float64)
    value = attention_kl(student, teacher)
    torch.testing.assert_close(attention_kl(student + shift, teacher - shift), value)
    probabilities = attention_kl(student.softmax(-1), teacher.softmax(-1), maps="probabilities")
    torch.testing.assert_close(probabilities, value)
    assert value >= 0


def test_probabilities_of_zero_add_nothing_and_keep_the_gradient_finite():
    student = torch.tensor([[[[0.25, 0.75, 0.0]]]], requires_grad=True)
    teacher = torch.tensor([[[[0.5, 0.5, 0.0]]]])
    value = attention_kl(student, teacher, maps="probabilities")
    value.backward()
    assert value.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert student.grad.isfinite().all() and student.grad[..., 2].item() == 0


def test_probabilities_of_padding_add_no_loss_and_no_gradient():
    student, teacher, mask = make_maps()
    padding = ~mask[:, None, None]
    student = student.detach().masked_fill(padding, -torch.inf).softmax(dim=-1).masked_fill(padding, torch.nan)
    teacher = teacher.masked_fill(padding, -torch.inf).softmax(dim=-1).masked_fill(padding, torch.nan)
    student.requires_grad_()
    value = attention_kl(student, teacher, mask, maps="probabilities", reduction="sum")
    value.backward()
    assert student.grad[1, :, 3:].abs().max() == 0 and student.grad[1, :, :, 3:].abs().max() == 0
    scores, target, _ = make_maps()
    torch.testing.assert_close(value, attention_kl(scores, target, mask, reduction="sum"))
    real = student.detach()[:1].requires_grad_()
    assert torch.autograd.gradcheck(lambda maps: attention_kl(maps, teacher[:1], maps="probabilities"), real)


def test_cross_attention_leaves_out_padded_keys():
    student, teacher = torch.randn(2, 1, 2, 3, 5, dtype=torch.float64)
    keys = torch.tensor([[True, True, True, True, False]])
    queries = torch.tensor([[True, True, False]])
    for loss in (attention_mse, attention_kl):
        value = loss(student, teacher, queries, keys)
        torch.testing.assert_close(value, loss(student[:, :, :2, :4], teacher[:, :, :2, :4]))


def test_relations_equal_those_of_each_utterance_alone():
    student, teacher, mask = make_vectors()
    value = relation_kl(student, teacher, mask, num_heads=2, reduction="sum")
    value.backward()
    parts = [
        relation_kl(student[i : i + 1, :n], teacher[i : i + 1, :n], num_heads=2, reduction="sum")
        for i, n in enumerate((5, 3))
    ]
    torch.testing.assert_close(value, sum(parts))
    assert student.grad[1, 3:].abs().max() == 0 and student.grad.isfinite().all()
    micro = [relation_kl(student[i:j], teacher[i:j], mask[i:j], num_heads=2, num_items=8) for i, j in ((0, 1), (1, 2))]
    torch.testing.assert_close(sum(micro), relation_kl(student, teacher, mask, num_heads=2))


def test_relations_equal_a_loop():
    student, teacher, _ = make_vectors(num_frames=(3,))
    total = 0.0
    for head in range(2):
        s, t = student[0, :, 2 * head : 2 * head + 2].detach(), teacher[0, :, 4 * head : 4 * head + 4]
        for i in range(3):
            log_q = torch.stack([s[i] @ s[j] / math.sqrt(2) for j in range(3)]).log_softmax(0)
            log_p = torch.stack([t[i] @ t[j] / math.sqrt(4) for j in range(3)]).log_softmax(0)
            total += (log_p.exp() * (log_p - log_q)).sum().item()
    assert relation_kl(student, teacher, num_heads=2).item() == pytest.approx(total / 6)


def test_relations_are_blind_to_rotation_have_the_right_gradient_and_vanish_on_padding():
    student, teacher, mask = make_vectors(num_frames=(4, 4))
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    value = relation_kl(student, teacher, num_heads=1)
    torch.testing.assert_close(relation_kl(student, teacher @ rotation, num_heads=1), value)
    assert torch.autograd.gradcheck(lambda states: relation_kl(states, teacher, num_heads=2), student)
    empty = relation_kl(student, teacher, torch.zeros_like(mask), num_heads=2)
    empty.backward()
    assert empty.item() == 0 and student.grad.abs().max() == 0
    assert relation_kl(student, student.detach(), num_heads=2).abs().item() < 1e-12


def test_relations_keep_their_precision_under_autocast():
    student, teacher, mask = make_vectors(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value = relation_kl(student, teacher, mask, num_heads=2)
    torch.testing.assert_close(value, relation_kl(student, teacher, mask, num_heads=2), rtol=0, atol=0)
    assert relation_kl(student.bfloat16(), teacher.bfloat16(), mask, num_heads=2).dtype == torch.float32


def test_minilm_adds_attention_and_value_relations():
    student, teacher, mask = make_maps()
    ours, theirs, _ = make_vectors()
    value = minilm(student, teacher, ours, theirs, mask)
    expected = attention_kl(student, teacher, mask) + relation_kl(ours, theirs, mask, num_heads=2)
    torch.testing.assert_close(value, expected)
    value.backward()
    assert ours.grad.abs().sum() > 0 and student.grad.abs().sum() > 0


def test_minilm_v2_adds_relations_of_queries_keys_and_values():
    student, teacher, mask = make_vectors()
    ours, theirs = [student, 2 * student, -3 * student], [teacher, teacher / 2, teacher]
    expected = sum(relation_kl(s, t, mask, num_heads=2) for s, t in zip(ours, theirs, strict=True))
    torch.testing.assert_close(minilm_v2(ours, theirs, mask, num_heads=2), expected)
    assert minilm_v2(ours, theirs, mask, num_heads=2, reduction="none").shape == (2, 5)
    with pytest.raises(ValueError, match="gave 2 and 3 tensors; give queries, keys and values of both"):
        minilm_v2(ours[:2], theirs, mask)


def identity_aligner(heads):
    aligner = AttentionAligner(heads, heads).double()
    torch.nn.init.eye_(aligner.mix.weight[:, :, 0])
    torch.nn.init.zeros_(aligner.mix.bias)
    return aligner


def test_aligned_heads_equal_the_plain_kl_where_the_alignment_is_the_identity():
    student, teacher, mask = make_maps()
    student = student.detach().softmax(dim=-1).masked_fill(~mask[:, None, None], 0.0)
    teacher = teacher.softmax(dim=-1).masked_fill(~mask[:, None, None], 0.0)
    teacher = teacher / teacher.sum(dim=-1, keepdim=True)
    value = aligned_attention_kl(student, teacher, identity_aligner(2), mask)
    torch.testing.assert_close(value, 2 * attention_kl(student, teacher, mask, maps="probabilities"))
    same = aligned_attention_kl(teacher, teacher, identity_aligner(2), mask)
    assert abs(same.item()) < 1e-12


def test_the_map_form_equals_the_published_formula_on_a_batch_without_padding():
    student, teacher, _ = make_maps(num_frames=(4, 4), heads=3)
    student, teacher = student.detach().softmax(dim=-1), teacher[:, :2].softmax(dim=-1)
    aligner = AttentionAligner(3, 2).double()
    mixed = torch.einsum("ts,bsqk->btqk", aligner.mix.weight[:, :, 0], student) + aligner.mix.bias[:, None, None]
    log_q, log_p = mixed.flatten(2).log_softmax(dim=-1), teacher.flatten(2).log_softmax(dim=-1)
    expected = torch.nn.functional.kl_div(log_q, log_p.exp(), reduction="sum")
    value = aligned_attention_kl(student, teacher, aligner, reduction="sum", form="map")
    torch.testing.assert_close(value, expected)
    same = aligned_attention_kl(student, student, identity_aligner(3), form="map")
    assert abs(same.item()) < 1e-12


@pytest.mark.parametrize("form", ["rows", "map"])
def test_aligned_heads_learn_from_real_positions_alone(form):
    student, teacher, mask = make_maps(heads=3)
    aligner = AttentionAligner(3, 2).double()
    probabilities = student.detach().softmax(dim=-1).requires_grad_()
    target = teacher[:, :2].softmax(dim=-1).requires_grad_()
    loss = partial(aligned_attention_kl, aligner=aligner, form=form)
    whole = loss(probabilities, target, mask=mask, reduction="sum")
    whole.backward()
    assert probabilities.grad.isfinite().all() and target.grad is None
    assert probabilities.grad[1, :, 3:].abs().max() == 0 and probabilities.grad[1, :, :, 3:].abs().max() == 0
    assert probabilities.grad[0].abs().min() > 0 and aligner.mix.weight.grad.abs().min() > 0
    parts = loss(probabilities[:1], target[:1], reduction="sum") + loss(
        probabilities[1:, :, :3, :3], target[1:, :, :3, :3], reduction="sum"
    )
    torch.testing.assert_close(whole, parts)
    micro = [loss(probabilities[i:j], target[i:j], mask=mask[i:j], num_items=8) for i, j in ((0, 1), (1, 2))]
    torch.testing.assert_close(sum(micro), loss(probabilities, target, mask=mask))
    probabilities.grad = None
    empty = loss(probabilities, target, mask=torch.zeros_like(mask))
    empty.backward()
    assert empty.item() == 0 and probabilities.grad.abs().max() == 0
    real = probabilities.detach()[:1].requires_grad_()
    assert torch.autograd.gradcheck(lambda maps: loss(maps, target[:1]), real)


@pytest.mark.parametrize("form", ["rows", "map"])
def test_causal_attention_is_aligned_with_a_finite_gradient(form):
    student, teacher, _ = make_maps(num_frames=(4,), heads=3, dtype=torch.float32)
    later = torch.ones(4, 4, dtype=torch.bool).triu(1)
    maps = [scores.detach().masked_fill(later, -torch.inf).softmax(dim=-1) for scores in (student, teacher[:, :2])]
    aligner = AttentionAligner(3, 2)
    probabilities = maps[0].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = aligned_attention_kl(probabilities, maps[1], aligner, form=form)
    value.backward()
    torch.testing.assert_close(value, aligned_attention_kl(probabilities, maps[1], aligner, form=form), rtol=0, atol=0)
    assert value > 0 and probabilities.grad.isfinite().all() and aligner.mix.weight.grad.isfinite().all()


def test_aligned_causal_rows_equal_those_of_the_keys_before():
    student, teacher, _ = make_maps(num_frames=(4,), heads=3)
    later = torch.ones(4, 4, dtype=torch.bool).triu(1)
    aligner = AttentionAligner(3, 2).double()
    maps = [scores.detach().masked_fill(later, -torch.inf).softmax(dim=-1) for scores in (student, teacher[:, :2])]
    values = aligned_attention_kl(*maps, aligner, reduction="none")
    for query in range(4):
        alone = [probabilities[:, :, query : query + 1, : query + 1] for probabilities in maps]
        torch.testing.assert_close(values[0, query], aligned_attention_kl(*alone, aligner))


def test_bad_input_is_named():
    student, teacher, mask = make_maps()
    with pytest.raises(ValueError, match=r"student attention \(2, 2, 5, 5\) and teacher attention \(2, 2, 4, 5\) must"):
        attention_kl(student, teacher[:, :, :4], mask)
    with pytest.raises(ValueError, match="student has 1 heads, the teacher 2; pass average_heads=True"):
        attention_mse(student[:, :1], teacher, mask)
    with pytest.raises(ValueError, match="student has 1 heads, the teacher 2; take minilm_v2"):
        attention_kl(student[:, :1], teacher, mask)
    with pytest.raises(ValueError, match="has 5 queries and 4 keys, .* pass key_mask"):
        attention_kl(student[..., :4], teacher[..., :4], mask)
    with pytest.raises(ValueError, match=r"key_mask is \(2, 3\), vectors \(2, 5, 5\) need \(2, 5\)"):
        attention_kl(student, teacher, mask, mask[:, :3])
    with pytest.raises(ValueError, match="mask must be bool"):
        attention_mse(student, teacher, mask.float())
    with pytest.raises(ValueError, match="maps must be .*, got 'logits'"):
        attention_kl(student, teacher, mask, maps="logits")
    vectors, _, _ = make_vectors()
    with pytest.raises(ValueError, match=r"vectors are \(2, 5, 4\); .* num_heads=3 divides"):
        relation_kl(vectors, vectors, mask, num_heads=3)
    aligner = AttentionAligner(3, 2).double()
    with pytest.raises(ValueError, match="have 2 and 2 heads in all, the aligner is for 3 and 2"):
        aligned_attention_kl(student, teacher, aligner, mask)
    with pytest.raises(ValueError, match=r"must be probabilities, got -1; pass scores.softmax"):
        aligned_attention_kl(student, torch.full_like(student, -1.0), identity_aligner(2))
    with pytest.raises(ValueError, match="form must be rows or map, got 'flat'"):
        aligned_attention_kl(student, teacher, identity_aligner(2), mask, form="flat")
    with pytest.raises(ValueError, match=r"the batch is empty: its vectors are \(0, 5, 5\)"):
        attention_kl(student[:0], teacher[:0])
