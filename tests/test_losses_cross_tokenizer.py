import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from speechkd.losses.cross_tokenizer import byte_ends, gold, min_edit_logits, shared_ids, uld
from speechkd.losses.logits import forward_kl, generalized_jsd, reverse_kl, total_variation

torch.manual_seed(0)
STUDENT, TEACHER = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
torch.manual_seed(2)
TEACHER_7 = torch.randn(2, 3, 7)
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool)


def close(value, expected, dtype):
    assert value.dtype == dtype
    assert value.item() == pytest.approx(expected, abs=2e-6 if dtype == torch.float64 else 1e-5)


def gold_case(dtype=torch.float64, seed=0):
    """Two sequences; groups {0,1}|{0}, {2}|{1,2}, then EOS; and {0}|{0,1}, with padding on both sides."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "student_logits": torch.randn(2, 5, 6, generator=generator, dtype=dtype),
        "teacher_logits": torch.randn(2, 4, 8, generator=generator, dtype=dtype),
        "student_labels": torch.tensor([[3, 1, 4, 5, -100], [2, -100, -100, -100, -100]]),
        "teacher_labels": torch.tensor([[7, 1, 6, 0], [2, 5, -100, -100]]),
        "student_ends": torch.tensor([[3, 5, 9, -1, -1], [4, -1, -1, -1, -1]]),
        "teacher_ends": torch.tensor([[5, 7, 9, -1], [1, 4, -1, -1]]),
    }


GOLD_GROUPS = [[([0, 1], [0]), ([2], [1, 2])], [([0], [0, 1])]]
SHARED = torch.tensor([[1, 1], [4, 6], [0, 7]])


def merged_loop(logits, labels, positions, merge, temperature=1.0):
    probs = (logits / temperature).softmax(dim=-1)
    kept = positions[-1] if merge == "bayesian" else positions[0]
    merged = probs[kept]
    for position in positions:
        if position != kept:
            merged = merged * probs[position, labels[position]].clamp(min=1e-8)
    return merged


def sorted_l1_loop(a, b):
    a, b = sorted(a.tolist(), reverse=True), sorted(b.tolist(), reverse=True)
    width = max(len(a), len(b))
    a, b = a + [0.0] * (width - len(a)), b + [0.0] * (width - len(b))
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))


def jsd_loop(q, p, beta):
    total = 0.0
    for x, y in zip(q.tolist(), p.tolist(), strict=True):
        x, y = max(x, 1e-8), max(y, 1e-8)
        m = beta * y + (1 - beta) * x
        total += beta * y * math.log(y / m) + (1 - beta) * x * math.log(x / m)
    return total


def gold_loop(case, merge, shared=None, weights=None, beta=0.5, temperature=1.0):
    """Losses of all groups by sequence, one group at a time."""
    losses = []
    for n, groups in enumerate(GOLD_GROUPS):
        losses.append([])
        for ours, theirs in groups:
            q = merged_loop(case["student_logits"][n], case["student_labels"][n], ours, merge, temperature)
            p = merged_loop(case["teacher_logits"][n], case["teacher_labels"][n], theirs, merge, temperature)
            if shared is None:
                losses[-1].append(sorted_l1_loop(q, p))
                continue
            part = len(shared) / len(p)
            matched_weight, other_weight = weights or (part, 1 - part)
            rest_q = [k for k in range(len(q)) if k not in shared[:, 0].tolist()]
            rest_p = [k for k in range(len(p)) if k not in shared[:, 1].tolist()]
            matched = jsd_loop(q[shared[:, 0]], p[shared[:, 1]], beta)
            losses[-1].append(matched_weight * matched + other_weight * sorted_l1_loop(q[rest_q], p[rest_p]))
    return losses


# ULD


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_uld_equals_the_published_numbers(dtype):
    student = STUDENT.to(dtype, copy=True).requires_grad_()
    loss = uld(student, TEACHER.to(dtype), MASK)
    loss.backward()
    close(loss, 0.423923, dtype)
    assert student.grad.norm().item() == pytest.approx(0.210477, abs=2e-6 if dtype == torch.float64 else 1e-5)
    close(uld(STUDENT.to(dtype), TEACHER_7.to(dtype), MASK), 0.337031, dtype)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_uld_equals_a_loop_over_tokens(temperature):
    losses = [
        sorted_l1_loop((STUDENT[n, k] / temperature).softmax(-1), (TEACHER_7[n, k] / temperature).softmax(-1))
        for n, k in MASK.nonzero().tolist()
    ]
    loss = uld(STUDENT, TEACHER_7, MASK, temperature=temperature)
    assert loss.item() == pytest.approx(sum(losses) / 5, abs=1e-6)


def test_uld_of_permuted_vocabularies_is_zero():
    assert uld(STUDENT[..., [3, 0, 4, 1, 2]], STUDENT).item() < 1e-6
    student = STUDENT.clone().requires_grad_()
    loss = uld(student, STUDENT)
    loss.backward()
    assert loss.item() == 0 and student.grad.abs().max() == 0


def test_uld_ignores_constants_added_to_logits():
    shift = torch.tensor([[[3.0], [-7.0], [0.5]]])
    torch.testing.assert_close(uld(STUDENT + shift, TEACHER_7 - shift, MASK), uld(STUDENT, TEACHER_7, MASK))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.3, 30.0), st.sampled_from([1.0, 3.0]))
def test_half_of_uld_is_at_most_total_variation(seed, scale, temperature):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, 4, 9, generator=generator, dtype=torch.float64)
    loss = uld(student, teacher, temperature=temperature, reduction="none")
    bound = total_variation(student, teacher, temperature=temperature, scale_t2=False, reduction="none")
    assert (loss <= 2 * bound + 1e-12).all() and (loss >= 0).all() and (loss <= 2).all()


def test_uld_gradients_of_a_row_add_up_to_zero():
    student = STUDENT.double().requires_grad_()
    uld(student, TEACHER_7.double(), MASK).backward()
    torch.testing.assert_close(student.grad.sum(dim=-1), torch.zeros(2, 3).double(), rtol=0, atol=1e-12)


def test_uld_pairs_the_first_scored_tokens_of_both():
    mask = torch.tensor([[False, True, True], [True, False, True]])
    teacher_mask = torch.tensor([[True, False, True, True], [False, False, False, True]])
    teacher = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(3))
    losses = uld(STUDENT, teacher, mask, teacher_mask=teacher_mask, reduction="none")
    expected = torch.zeros(2, 3)
    for row, ours, theirs in [(0, 1, 0), (0, 2, 2), (1, 0, 3)]:
        expected[row, ours] = uld(STUDENT[row, ours][None], teacher[row, theirs][None])
    torch.testing.assert_close(losses, expected)
    by_sequence = uld(STUDENT, teacher, mask, teacher_mask=teacher_mask, reduction="seq_mean")
    torch.testing.assert_close(by_sequence, ((expected[0, 1] + expected[0, 2]) / 2 + expected[1, 0]) / 2)


def test_uld_without_masks_drops_the_rest_of_the_longer_sequence():
    teacher = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(uld(STUDENT, teacher), uld(STUDENT, teacher[:, :3]))
    torch.testing.assert_close(uld(STUDENT[:, :2], teacher), uld(STUDENT[:, :2], teacher[:, :2]))


def test_uld_of_masked_positions_has_no_value_and_no_gradient():
    student, teacher = STUDENT.clone(), TEACHER_7.clone()
    student[~MASK], teacher[~MASK] = torch.nan, torch.nan
    student.requires_grad_()
    loss = uld(student, teacher, MASK)
    loss.backward()
    torch.testing.assert_close(loss, uld(STUDENT, TEACHER_7, MASK), rtol=0, atol=0)
    assert student.grad[~MASK].abs().max() == 0 and student.grad[MASK].abs().max() > 0


def test_uld_micro_batches_add_up_to_the_whole():
    parts = [uld(STUDENT[n : n + 1], TEACHER_7[n : n + 1], MASK[n : n + 1], num_items=5) for n in range(2)]
    torch.testing.assert_close(sum(parts), uld(STUDENT, TEACHER_7, MASK))


def test_uld_of_an_all_masked_batch_is_zero_with_a_live_graph():
    student = STUDENT.clone().requires_grad_()
    loss = uld(student, TEACHER_7, torch.zeros_like(MASK))
    loss.backward()
    assert loss.item() == 0 and student.grad.abs().max() == 0


def test_uld_takes_bfloat16_infinities_and_large_logits():
    loss = uld(STUDENT.bfloat16(), TEACHER_7.bfloat16(), MASK)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, uld(STUDENT.bfloat16().float(), TEACHER_7.bfloat16().float(), MASK))
    ruled_out = torch.cat([STUDENT, torch.full((2, 3, 1), -torch.inf)], dim=-1).requires_grad_()
    loss = uld(ruled_out, TEACHER_7, MASK)
    loss.backward()
    torch.testing.assert_close(loss, uld(STUDENT, TEACHER_7, MASK))
    assert ruled_out.grad.isfinite().all()
    assert uld(1e4 * torch.eye(3), -1e4 * torch.eye(3)).item() == pytest.approx(1.0)


def test_uld_passes_gradcheck_and_gives_the_teacher_none():
    student, teacher = STUDENT.double().requires_grad_(), TEACHER_7.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: uld(logits, TEACHER_7.double(), MASK, temperature=2.0), student)
    uld(student, teacher, MASK).backward()
    assert teacher.grad is None


def test_uld_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="temperature must be positive and finite, got -1"):
        uld(STUDENT, TEACHER, temperature=-1)
    with pytest.raises(ValueError, match=r"\(2, 3, 5\) and teacher logits \(1, 3, 7\) are not .* of one batch"):
        uld(STUDENT, TEACHER_7[:1])
    with pytest.raises(ValueError, match=r"mask \(2, 3\) does not fit teacher logits \(2, 2, 7\); pass teacher_mask"):
        uld(STUDENT, TEACHER_7[:, :2], MASK)
    with pytest.raises(ValueError, match="mask must be bool"):
        uld(STUDENT, TEACHER_7, MASK.long())
    with pytest.raises(ValueError, match=r"mask is \(2, 3\), the logits \(2, 2, 7\)"):
        uld(STUDENT, TEACHER_7[:, :2], MASK, teacher_mask=MASK)
    with pytest.raises(ValueError, match="reduction must be"):
        uld(STUDENT, TEACHER, reduction="mean")


# GOLD


@pytest.mark.parametrize("merge", ["bayesian", "observed"])
@pytest.mark.parametrize("shared", [None, SHARED])
def test_gold_equals_a_loop_over_groups(merge, shared):
    case = gold_case()
    losses = gold_loop(case, merge, shared, temperature=2.0)
    everything = sum(losses, [])
    options = {"merge": merge, "shared": shared, "temperature": 2.0}
    assert gold(**case, **options).item() == pytest.approx(sum(everything) / 3, abs=1e-12)
    assert gold(**case, **options, reduction="sum").item() == pytest.approx(sum(everything), abs=1e-12)
    by_sequence = sum(sum(row) / len(row) for row in losses) / 2
    assert gold(**case, **options, reduction="seq_mean").item() == pytest.approx(by_sequence, abs=1e-12)
    expected = torch.zeros(2, 5).double()
    expected[0, 1], expected[0, 2], expected[1, 0] = everything
    torch.testing.assert_close(gold(**case, **options, reduction="none"), expected)


def test_gold_with_shared_ids_takes_other_weights_and_mixtures():
    case = gold_case()
    for beta, weights in [(0.5, (0.6, 0.4)), (0.1, (1.0, 0.0)), (0.9, (0.0, 2.0))]:
        expected = sum(sum(gold_loop(case, "bayesian", SHARED, weights, beta), [])) / 3
        assert gold(**case, shared=SHARED, weights=weights, beta=beta).item() == pytest.approx(expected, abs=1e-12)


def test_bayesian_groups_have_the_probability_of_the_text_and_of_every_other_last_token():
    case = gold_case()
    log_q = case["student_logits"][0].log_softmax(dim=-1)
    first, last = case["student_labels"][0, :2].tolist()
    teacher = torch.full((1, 1, 6), -torch.inf, dtype=torch.float64)
    teacher[..., 0] = 0.0
    loss = gold(
        case["student_logits"][:1, :2],
        teacher,
        student_labels=torch.tensor([[first, last]]),
        teacher_labels=torch.tensor([[0]]),
        student_ends=torch.tensor([[1, 4]]),
        teacher_ends=torch.tensor([[4]]),
    )
    joint = (log_q[0, first] + log_q[1]).exp()
    expected = 1 - joint.max() + joint.sum() - joint.max()  # a certain teacher has 1 against the likeliest, else 0
    torch.testing.assert_close(loss, expected)


TRL_NUMBERS = [  # value and gradient norm of TRL 1.16's ULDLoss on the batch below
    ("observed", False, 0.518125, 0.102409),
    ("observed", True, 0.157095, 0.041321),
    ("bayesian", False, 0.640137, 0.102030),
    ("bayesian", True, 0.229276, 0.032036),
]


@pytest.mark.parametrize("merge, hybrid, value, norm", TRL_NUMBERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gold_equals_trl_whose_observed_merge_reads_logits_one_token_late(merge, hybrid, value, norm, dtype):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 6, 11, generator=generator).to(dtype).requires_grad_()
    teacher = torch.randn(2, 7, 13, generator=generator).to(dtype)
    rows = slice(1, None) if merge == "observed" else slice(None, -1)  # after, or before, the tokens 1, 2, ...
    loss = gold(
        student[:, rows],
        teacher[:, rows],
        student_labels=torch.tensor([[-100, 3, 4, 5, 0], [7, 8, 9, 0, -100]]),
        teacher_labels=torch.tensor([[-100, 7, 3, 4, 5, 0], [11, 12, 0, -100, -100, -100]]),
        student_ends=torch.tensor([[-1, 3, 5, 9, -1], [2, 4, 6, -1, -1]]),
        teacher_ends=torch.tensor([[-1, 2, 5, 7, 9, -1], [4, 6, -1, -1, -1, -1]]),
        shared=torch.tensor([[0, 0], [1, 3], [2, 6], [3, 9], [4, 12], [5, 2]]) if hybrid else None,
        merge=merge,
        reduction="seq_mean",
    )
    loss.backward()
    close(loss, value, dtype)
    close(student.grad.norm(), norm, dtype)


def test_gold_of_one_tokenizer_is_uld_or_with_all_ids_shared_a_plain_divergence():
    student, teacher = STUDENT.double(), TEACHER.double()
    labels = torch.tensor([[0, 2, 4], [1, 3, -100]])
    ends = byte_ends(labels, [b"a", b"bc", b"d", b"ef", b"g"])
    case = {"student_labels": labels, "teacher_labels": labels, "student_ends": ends, "teacher_ends": ends}
    torch.testing.assert_close(gold(student, teacher, **case), uld(student, teacher, MASK))
    all_ids = torch.arange(5)[:, None].expand(5, 2)
    for beta in (0.1, 0.5, 0.9):
        torch.testing.assert_close(
            gold(student, teacher, **case, shared=all_ids, beta=beta),
            generalized_jsd(student, teacher, MASK, beta=beta),
        )
    torch.testing.assert_close(
        gold(student, teacher, **case, shared=all_ids, beta=0), forward_kl(student, teacher, MASK)
    )
    torch.testing.assert_close(
        gold(student, teacher, **case, shared=all_ids, beta=1), reverse_kl(student, teacher, MASK)
    )


def test_gold_is_zero_with_no_gradient_where_both_models_are_the_same():
    case = gold_case()
    for name in ("labels", "ends"):
        case[f"teacher_{name}"] = case[f"student_{name}"]
    case["teacher_logits"] = case["student_logits"].clone()
    case["student_logits"].requires_grad_()
    loss = gold(**case, shared=torch.tensor([[0, 0], [3, 3]]))
    loss.backward()
    assert abs(loss.item()) < 1e-12 and case["student_logits"].grad.abs().max() < 1e-12


def test_gold_ignores_constants_and_permuted_ids():
    case = gold_case()
    order = torch.tensor([7, 2, 0, 5, 1, 6, 3, 4])
    place = order.argsort()
    moved = dict(
        case, teacher_logits=case["teacher_logits"][..., order] + 3.0, student_logits=case["student_logits"] - 2
    )
    moved["teacher_labels"] = torch.where(case["teacher_labels"] < 0, -100, place[case["teacher_labels"].clamp(min=0)])
    shared = torch.stack([SHARED[:, 0], place[SHARED[:, 1]]], dim=-1)
    torch.testing.assert_close(gold(**moved, shared=shared), gold(**case, shared=SHARED))


def test_gold_skips_tokens_without_text_unless_they_get_an_end():
    case = gold_case()
    without = {name: value[:, :3] for name, value in case.items()}
    torch.testing.assert_close(gold(**case), gold(**without))
    case["student_ends"][0, 3], case["teacher_ends"][0, 3] = 9, 9
    losses = gold(**case, reduction="none")
    expected = sorted_l1_loop(*(case[f"{who}_logits"][0, 3].softmax(-1) for who in ("student", "teacher")))
    assert losses[0, 3].item() == pytest.approx(expected, abs=1e-12)


def test_gold_leaves_masked_positions_without_value_and_gradient():
    case = gold_case()
    expected = gold(**case, shared=SHARED)
    scored = (case["student_labels"] >= 0) & (case["student_ends"] >= 0)
    case["student_logits"] = case["student_logits"].masked_fill(~scored[..., None], torch.nan).requires_grad_()
    case["teacher_logits"] = case["teacher_logits"].masked_fill((case["teacher_ends"] < 0)[..., None], torch.nan)
    case["teacher_logits"].requires_grad_()
    loss = gold(**case, shared=SHARED)
    loss.backward()
    assert loss.item() == expected.item()
    assert case["student_logits"].grad[~scored].abs().max() == 0
    assert (case["student_logits"].grad[scored].abs().amax(dim=-1) > 0).all()
    assert case["teacher_logits"].grad is None


def test_gold_micro_batches_add_up_and_a_batch_without_groups_is_zero():
    case = gold_case()
    parts = [gold(**{key: value[n : n + 1] for key, value in case.items()}, num_items=3) for n in range(2)]
    torch.testing.assert_close(sum(parts), gold(**case))
    for labels in ("student_labels", "teacher_labels"):
        for shared in (None, SHARED):
            empty = dict(case, **{labels: torch.full_like(case[labels], -100)})
            empty["student_logits"] = case["student_logits"].clone().requires_grad_()
            loss = gold(**empty, shared=shared)
            loss.backward()
            assert loss.item() == 0 and empty["student_logits"].grad.abs().max() == 0


def test_gold_takes_bfloat16_and_impossible_tokens():
    case = gold_case(torch.float32)
    low = {key: value.bfloat16() if value.is_floating_point() else value for key, value in case.items()}
    rounded = {key: value.float() if value.is_floating_point() else value for key, value in low.items()}
    assert gold(**low, shared=SHARED).dtype == torch.float32
    torch.testing.assert_close(gold(**low, shared=SHARED), gold(**rounded, shared=SHARED))
    case["student_logits"][0, 0, 3] = -torch.inf  # the first token of a group: its probability counts as 1e-8
    case["student_logits"][0, 1] *= 1e4
    case["student_logits"].requires_grad_()
    loss = gold(**case, shared=SHARED)
    loss.backward()
    expected = sum(sum(gold_loop(case, "bayesian", SHARED), [])) / 3
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert case["student_logits"].grad.isfinite().all()


@pytest.mark.parametrize("merge", ["bayesian", "observed"])
def test_gold_passes_gradcheck(merge):
    case = gold_case()
    student = case.pop("student_logits").requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: gold(logits, **case, shared=SHARED, merge=merge), student)


def test_gold_refuses_what_does_not_fit():
    case = gold_case()
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        gold(**case, temperature=0)
    with pytest.raises(ValueError, match="beta must be 0 to 1, got 2"):
        gold(**case, beta=2)
    with pytest.raises(ValueError, match="merge must be 'bayesian' or 'observed', got 'mean'"):
        gold(**case, merge="mean")
    with pytest.raises(ValueError, match=r"\(1, 5, 6\) and teacher logits \(2, 4, 8\) are not .* of one batch"):
        gold(**dict(case, student_logits=case["student_logits"][:1]))
    with pytest.raises(ValueError, match=r"labels are \(2, 4\), the logits \(2, 5, 6\) need \(2, 5\)"):
        gold(**dict(case, student_labels=case["student_labels"][:, :4]))
    with pytest.raises(ValueError, match="label 7 is not in the vocabulary of 6 ids"):
        gold(**dict(case, student_labels=torch.full((2, 5), 7)))
    with pytest.raises(ValueError, match=r"teacher_ends is \(2, 3\), its labels are \(2, 4\); use byte_ends"):
        gold(**dict(case, teacher_ends=case["teacher_ends"][:, :3]))
    with pytest.raises(ValueError, match=r"student token ends \[5, 3, 9\] decrease"):
        gold(**dict(case, student_ends=case["student_ends"][:, [1, 0, 2, 3, 4]]))
    with pytest.raises(
        ValueError, match=r"shared must be \(pairs, 2\), int64, got \(3, 2\), torch.float32; use shared_ids"
    ):
        gold(**case, shared=SHARED.float())
    with pytest.raises(ValueError, match=r"shared ids \[6, 1\] are not in the vocabularies of 6 and 8 ids"):
        gold(**case, shared=torch.tensor([[0, 0], [6, 1]]))


# MinED

OURS = [b"", b"the", b" book", b" cat", b"s", b" c", b"at", b"x"]
THEIRS = [b"", b" cat", b"the", b" bo", b"ok", b"s", b"y"]


def mined_case():
    """ "the book cats" and EOS, as the| book| cat|s and the| bo|ok| cat|s: all but " book" have a counterpart."""
    generator = torch.Generator().manual_seed(4)
    return {
        "student_logits": torch.randn(1, 6, 8, generator=generator),
        "teacher_logits": torch.randn(1, 7, 7, generator=generator),
        "student_labels": torch.tensor([[1, 2, 3, 4, 0, -100]]),
        "teacher_labels": torch.tensor([[-100, 2, 3, 4, 1, 5, 0]]),
        "student_bytes": OURS,
        "teacher_bytes": THEIRS,
        "shared": shared_ids(OURS, THEIRS),
    }


def test_matched_tokens_take_the_teacher_s_logits_and_the_others_their_label():
    case = mined_case()
    targets = min_edit_logits(**case)
    teacher = case["teacher_logits"][0]
    for position, source in [(0, 1), (2, 4), (3, 5)]:
        for index, text in enumerate(OURS):
            expected = teacher[source, THEIRS.index(text)] if text and text in THEIRS else torch.tensor(-torch.inf)
            assert targets[0, position, index] == expected
    for position, label in [(1, 2), (4, 0)]:  # " book" is two teacher tokens, EOS has no spelling
        assert targets[0, position].softmax(dim=-1).tolist() == F.one_hot(torch.tensor(label), 8).tolist()
    assert targets[0, 5].abs().max() == 0


def test_min_ed_s_forward_kl_is_the_cross_entropy_without_and_a_kl_over_shared_ids_with_a_match():
    case = mined_case()
    mask = case["student_labels"] != -100
    losses = forward_kl(case["student_logits"], min_edit_logits(**case), mask, reduction="none")[0]
    log_q = case["student_logits"][0].log_softmax(dim=-1)
    torch.testing.assert_close(losses[1], -log_q[1, 2])
    ours, theirs = case["shared"].unbind(-1)
    log_p = case["teacher_logits"][0, 4, theirs].log_softmax(dim=-1)
    torch.testing.assert_close(losses[2], (log_p.exp() * (log_p - log_q[2, ours])).sum())


def test_min_ed_targets_have_no_graph_and_ignore_masked_positions():
    case = mined_case()
    expected = min_edit_logits(**case)
    student = case["student_logits"].clone()
    student[0, 5], case["teacher_logits"][0, 0] = torch.nan, torch.nan
    student.requires_grad_()
    targets = min_edit_logits(
        **dict(case, student_logits=student, teacher_logits=case["teacher_logits"].requires_grad_())
    )
    assert not targets.requires_grad and torch.equal(targets, expected)
    forward_kl(student, targets, case["student_labels"] != -100).backward()
    assert student.grad[0, 5].abs().max() == 0 and student.grad[0, :5].isfinite().all()


def test_min_ed_takes_bfloat16_empty_sequences_and_a_teacher_that_rules_all_out():
    case = mined_case()
    assert min_edit_logits(**dict(case, student_logits=case["student_logits"].bfloat16())).dtype == torch.float32
    assert min_edit_logits(**dict(case, student_logits=case["student_logits"].double())).dtype == torch.float64
    one_hot = torch.full((1, 6, 8), -torch.inf)
    one_hot[0, torch.arange(5), case["student_labels"][0, :5]] = 0.0
    one_hot[0, 5] = 0.0
    for change in (
        {"teacher_labels": torch.full((1, 7), -100)},
        {"teacher_logits": torch.full((1, 7, 7), -torch.inf)},
        {"shared": torch.empty(0, 2, dtype=torch.long)},
    ):
        assert torch.equal(min_edit_logits(**dict(case, **change)), one_hot)
    assert torch.equal(min_edit_logits(**dict(case, student_labels=torch.full((1, 6), -100))), torch.zeros(1, 6, 8))


def test_min_ed_refuses_what_does_not_fit():
    case = mined_case()
    with pytest.raises(ValueError, match="are not .* of one batch"):
        min_edit_logits(**dict(case, student_logits=case["student_logits"][0]))
    with pytest.raises(ValueError, match="label 9 is not in the vocabulary of 7 ids"):
        min_edit_logits(**dict(case, teacher_labels=torch.full((1, 7), 9)))
    with pytest.raises(ValueError, match="id 4 is not among the 3 of its tokenizer"):
        min_edit_logits(**dict(case, student_bytes=OURS[:3], student_labels=torch.full((1, 6), 4)))
    with pytest.raises(ValueError, match="shared must be"):
        min_edit_logits(**dict(case, shared=torch.zeros(3, dtype=torch.long)))
