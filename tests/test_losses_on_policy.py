import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from speechkd.losses.logits import generalized_jsd, reverse_kl
from speechkd.losses.on_policy import (
    GkdPolicy,
    clipped_policy_loss,
    completion_labels,
    minillm_advantages,
    minillm_loss,
    minillm_rewards,
)
from speechkd.losses.preference import token_log_probs

LABELS = torch.tensor([[0, 2, 4], [1, 3, -100]])
MASK = LABELS >= 0
EOS, PAD, PROMPT_LENGTH = 1, 0, 3


def logits(dtype=torch.float64):
    """Student and teacher logits, (2, 3, 5), of the published reference values; the student takes a gradient."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5).to(dtype), torch.randn(2, 3, 5).to(dtype)
    return student.requires_grad_(), teacher


def tiny_lm(seed):
    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=2,
        n_embd=16,
        n_head=2,
        vocab_size=32,
        n_positions=32,
        initializer_range=0.5,
        bos_token_id=2,
        eos_token_id=EOS,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def models():
    return tiny_lm(0), tiny_lm(1)


def prompts(seed=0, batch=6):
    return torch.randint(2, 32, (batch, PROMPT_LENGTH), generator=torch.Generator().manual_seed(seed))


def sampler(model, ids, pad=PAD, max_new_tokens=10):
    """A function of no arguments that samples completions with the model."""
    return lambda: model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=0.9,
        top_k=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=EOS,
        pad_token_id=pad,
    )


def advantages_by_definition(rewards, mask, gamma, length_norm):
    result = torch.zeros_like(rewards)
    for b in range(rewards.shape[0]):
        for t in range(rewards.shape[1]):
            later = [i for i in range(t, rewards.shape[1]) if mask[b, i]]
            weights = {"discount": gamma, "tokens": 1.0, "none": None}[length_norm]
            divisor = 1.0 if weights is None else sum(weights ** (i - t) for i in later)
            if mask[b, t]:
                result[b, t] = sum(gamma ** (i - t) * rewards[b, i] for i in later) / divisor
    return result


def test_labels_are_the_completion_up_to_and_with_the_first_end_of_text():
    ids = torch.tensor([[7, 1, 5, 6, 1, 0, 0], [7, 8, 5, 5, 5, 5, 5], [7, 8, 1, 9, 1, 1, 1]])
    expected = [[-100, -100, 5, 6, 1, -100, -100], [-100, -100, 5, 5, 5, 5, 5], [-100, -100, 1] + [-100] * 4]
    assert completion_labels(ids, 2, eos_id=1).tolist() == expected
    assert ids[0].tolist() == [7, 1, 5, 6, 1, 0, 0]


def test_any_of_several_ends_of_text_ends_a_completion():
    assert completion_labels(torch.tensor([[3, 4, 9, 1]]), 1, eos_id=[1, 9]).tolist() == [[-100, 4, 9, -100]]


def test_a_prompt_without_completion_has_no_labels():
    assert completion_labels(torch.tensor([[3, 4]]), 2, eos_id=1).tolist() == [[-100, -100]]


def test_padding_of_generated_text_is_not_scored_even_if_its_id_is_the_end_of_text(models):
    student, _ = models
    torch.manual_seed(0)
    ids = sampler(student, prompts(), pad=EOS)()
    labels = completion_labels(ids, PROMPT_LENGTH, EOS)
    ended = (ids[:, PROMPT_LENGTH:] == EOS).any(dim=1)
    assert ended.any() and ((labels == EOS).sum(dim=1) == ended).all()
    assert (labels[:, :PROMPT_LENGTH] == -100).all()
    for row, row_labels in zip(ids[:, PROMPT_LENGTH:].tolist(), labels[:, PROMPT_LENGTH:].tolist(), strict=True):
        end = row.index(EOS) + 1 if EOS in row else len(row)
        assert row_labels == row[:end] + [-100] * (len(row) - end)


def test_the_student_writes_its_share_of_the_batches():
    data = (torch.zeros(1, 2, dtype=torch.long),) * 2
    policy = GkdPolicy(EOS, student_fraction=0.3)
    sources = [policy.batch(data, 1, student=lambda: torch.ones(1, 2, dtype=torch.long))[2] for _ in range(1000)]
    assert sources.count("student") == pytest.approx(300, abs=45)  # 3 standard deviations
    assert sources.count("dataset") == 1000 - sources.count("student")


@pytest.mark.parametrize(("student_fraction", "expected"), [(0.0, "dataset"), (1.0, "student")])
def test_shares_of_none_and_all_hold_exactly(student_fraction, expected):
    data = (torch.zeros(1, 2, dtype=torch.long),) * 2
    policy = GkdPolicy(EOS, student_fraction=student_fraction)
    sources = {policy.batch(data, 1, student=lambda: torch.ones(1, 2, dtype=torch.long))[2] for _ in range(200)}
    assert sources == {expected}


def test_a_teacher_that_generates_replaces_the_dataset(models):
    student, teacher = models
    ids = prompts()
    torch.manual_seed(0)
    expected = sampler(teacher, ids)()
    torch.manual_seed(0)
    written, labels, source = GkdPolicy(EOS, student_fraction=0.0).batch(
        (ids, ids), PROMPT_LENGTH, student=sampler(student, ids), teacher=sampler(teacher, ids)
    )
    assert source == "teacher"
    torch.testing.assert_close(written, expected)
    torch.testing.assert_close(labels, completion_labels(expected, PROMPT_LENGTH, EOS))


def test_the_dataset_passes_through_as_it_is():
    ids, labels = torch.tensor([[5, 6]]), torch.tensor([[-100, 6]])
    result = GkdPolicy(EOS, student_fraction=0.0).batch((ids, labels), 1, student=lambda: ids)
    assert result[0] is ids and result[1] is labels


def test_a_restored_policy_draws_what_the_other_would_have_drawn(tmp_path):
    data = (torch.zeros(1, 2, dtype=torch.long),) * 2

    def sources(policy, count):
        return [policy.batch(data, 1, student=lambda: torch.ones(1, 2, dtype=torch.long))[2] for _ in range(count)]

    policy = GkdPolicy(EOS, seed=3)
    sources(policy, 17)
    torch.save(policy.state_dict(), tmp_path / "policy.pt")
    continued = sources(policy, 50)
    restored = GkdPolicy(EOS, seed=99)
    restored.load_state_dict(torch.load(tmp_path / "policy.pt", weights_only=True))
    assert sources(restored, 50) == continued and len(set(continued)) == 2


@pytest.mark.parametrize("method", ["gkd", "minillm"])
def test_a_student_that_learns_from_its_own_samples_comes_closer_to_the_teacher(models, method):
    teacher = models[1]
    student = tiny_lm(0)
    policy = GkdPolicy(EOS, student_fraction=1.0)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    held_out = torch.randint(2, 32, (8, 12), generator=torch.Generator().manual_seed(9))

    def distance():
        with torch.no_grad():
            return reverse_kl(student(held_out).logits, teacher(held_out).logits).item()

    before = distance()
    torch.manual_seed(0)
    for step in range(20):
        ids = prompts(seed=step)
        ids, labels, _ = policy.batch((ids, ids), PROMPT_LENGTH, student=sampler(student, ids))
        with torch.no_grad():
            teacher_logits = teacher(ids).logits[:, :-1]
        student_logits, labels = student(ids).logits[:, :-1], labels[:, 1:]
        if method == "gkd":
            loss = generalized_jsd(student_logits, teacher_logits, labels >= 0)
        else:
            loss = minillm_loss(student_logits, teacher_logits, labels=labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert distance() < 0.8 * before


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 2e-6)])
def test_rewards_equal_the_reference_number(dtype, tolerance):
    student, teacher = logits(dtype)
    rewards = minillm_rewards(student, teacher, LABELS)
    assert rewards.dtype == dtype and not rewards.requires_grad
    assert (rewards.sum() / MASK.sum()).item() == pytest.approx(0.311759, abs=tolerance)
    assert rewards[1, 2] == 0


def test_rewards_equal_the_difference_of_log_probabilities_at_any_temperature():
    student, teacher = logits()
    expected = token_log_probs(teacher / 2, LABELS) - token_log_probs(student / 2, LABELS)
    torch.testing.assert_close(minillm_rewards(student, teacher, LABELS, temperature=2.0), expected.detach())


def test_rewards_ignore_padding_of_the_teachers_vocabulary():
    student, teacher = torch.randn(1, 2, 60), torch.randn(1, 2, 64)
    labels = torch.tensor([[3, 59]])
    torch.testing.assert_close(
        minillm_rewards(student, teacher, labels), minillm_rewards(student, teacher[..., :60], labels)
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("length_norm", ["discount", "tokens", "none"])
def test_advantages_equal_their_definition(gamma, length_norm):
    torch.manual_seed(0)
    rewards = torch.randn(3, 6, dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0]]).bool()
    result = minillm_advantages(rewards.masked_fill(~mask, torch.nan), mask, gamma=gamma, length_norm=length_norm)
    torch.testing.assert_close(result, advantages_by_definition(rewards, mask, gamma, length_norm))


def test_without_discount_an_advantage_is_the_reward_and_with_none_the_mean_of_what_follows():
    rewards = torch.tensor([[1.0, 2.0, 6.0]])
    assert minillm_advantages(rewards).tolist() == [[1, 2, 6]]
    assert minillm_advantages(rewards, gamma=1.0).tolist() == [[3, 4, 6]]
    assert minillm_advantages(rewards, gamma=1.0, length_norm="none").tolist() == [[9, 8, 6]]


def test_before_any_update_the_policy_loss_is_minus_the_advantage_with_its_gradient():
    log_q = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    advantages = torch.tensor([[0.5, -3.0]])
    loss = clipped_policy_loss(log_q, log_q, advantages, reduction="none")
    loss.sum().backward()
    torch.testing.assert_close(loss, -advantages)
    torch.testing.assert_close(log_q.grad, -advantages)


def test_the_ratio_is_clipped_only_where_that_makes_the_loss_larger():
    ratios = torch.tensor([[1.5, 0.5, 1.5, 0.5, 1.1]])
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, 2.0]])
    log_q = ratios.log().requires_grad_()
    loss = clipped_policy_loss(log_q, torch.zeros_like(ratios), advantages, clip=0.2, reduction="none")
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([[-1.2, -0.5, 1.5, 0.8, -2.2]]))
    torch.testing.assert_close(log_q.grad, torch.tensor([[0.0, -0.5, 1.5, 0.0, -2.2]]))


@pytest.mark.parametrize("mixed", [0.0, 0.2], ids=["sampled from the student", "teacher-mixed"])
def test_the_expected_policy_gradient_is_the_gradient_of_the_reverse_kl(mixed):
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 1, 5, dtype=torch.float64), torch.randn(1, 1, 5, dtype=torch.float64)
    student.requires_grad_()
    q, p = student.detach().softmax(-1)[0, 0], teacher.softmax(-1)[0, 0]
    behaviour = mixed * p + (1 - mixed) * q
    expected = torch.autograd.grad(reverse_kl(student, teacher), student)[0]
    total = sum(
        behaviour[y]
        * minillm_loss(
            student,
            teacher,
            labels=torch.tensor([[y]]),
            old_log_probs=behaviour[y].log().reshape(1, 1),
            single_step=False,
            clip=math.inf,
        )
        for y in range(5)
    )
    torch.testing.assert_close(torch.autograd.grad(total, student)[0], expected)


def test_minillm_is_the_policy_loss_plus_the_reverse_kl():
    student, teacher = logits()
    advantages = minillm_advantages(minillm_rewards(student, teacher, LABELS), MASK, gamma=0.9)
    log_q = token_log_probs(student, LABELS)
    policy = clipped_policy_loss(log_q, log_q, advantages, MASK)
    torch.testing.assert_close(
        minillm_loss(student, teacher, labels=LABELS, gamma=0.9), policy + reverse_kl(student, teacher, MASK)
    )
    torch.testing.assert_close(minillm_loss(student, teacher, labels=LABELS, gamma=0.9, single_step=False), policy)


def test_equal_models_have_no_loss_and_no_gradient():
    student, _ = logits()
    loss = minillm_loss(student, student.detach() + 7, labels=LABELS, gamma=0.9)
    loss.backward()
    assert abs(loss.item()) < 1e-12 and student.grad.abs().max() < 1e-12


def test_masked_tokens_may_be_nan_and_change_nothing():
    student, teacher = logits()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    options = {"labels": LABELS, "gamma": 0.9}
    broken, broken_teacher = student.detach().clone(), teacher.clone()
    broken[0, 2] = broken[1, 2] = broken_teacher[0, 2] = torch.nan
    broken.requires_grad_()
    teacher.requires_grad_()
    loss = minillm_loss(broken, broken_teacher, mask, **options)
    loss.backward()
    expected = minillm_loss(student, teacher, labels=LABELS.masked_fill(~mask, -100), gamma=0.9)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(broken.grad, student.grad)
    assert broken.grad[0, 2].abs().max() == 0 and teacher.grad is None


def test_ids_that_a_model_rules_out_leave_loss_and_gradient_finite():
    student, teacher = logits()
    student, teacher = student.detach().clone(), teacher.clone()
    student[..., 1] = teacher[..., 2] = -torch.inf  # ids 1 and 2 are among the labels
    student.requires_grad_()
    loss = minillm_loss(student, teacher, labels=LABELS)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_a_batch_without_scored_tokens_gives_zero_with_a_live_graph():
    student, teacher = logits()
    loss = minillm_loss(student, teacher, labels=torch.full_like(LABELS, -100))
    loss.backward()
    assert loss.item() == 0 and student.grad.abs().max() == 0


def test_micro_batches_with_num_items_add_up_to_the_whole():
    student, teacher = logits()
    parts = [
        minillm_loss(student[i : i + 1], teacher[i : i + 1], labels=LABELS[i : i + 1], num_items=5) for i in (0, 1)
    ]
    torch.testing.assert_close(sum(parts), minillm_loss(student, teacher, labels=LABELS))


def test_bfloat16_is_computed_in_float32():
    student, teacher = logits(torch.bfloat16)
    loss = minillm_loss(student, teacher, labels=LABELS)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, minillm_loss(student.float(), teacher.float(), labels=LABELS))


def test_gradients_pass_gradcheck_with_a_fixed_sample():
    student, _ = logits()
    old = token_log_probs(student, LABELS).detach() + 0.05
    advantages = torch.tensor([[1.0, -2.0, 0.5], [0.3, -0.7, 9.0]], dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda x: clipped_policy_loss(token_log_probs(x, LABELS), old, advantages, MASK, clip=0.5), student
    )


def test_bad_input_is_refused_with_its_values():
    student, teacher = logits()
    rewards = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"begin with the 4 tokens of the prompt, got \(2, 3\)"):
        completion_labels(LABELS, 4, EOS)
    with pytest.raises(ValueError, match=r"ids must be \(batch, length\).*got \(3,\)"):
        completion_labels(LABELS[0], 1, EOS)
    with pytest.raises(ValueError, match="student_fraction must be 0 to 1, got 1.5"):
        GkdPolicy(EOS, student_fraction=1.5)
    with pytest.raises(ValueError, match="gamma must be 0 to 1, got 2"):
        minillm_advantages(rewards, gamma=2)
    with pytest.raises(ValueError, match="must be discount, tokens or none, got True"):
        minillm_advantages(rewards, length_norm=True)
    with pytest.raises(ValueError, match=r"rewards must be \(batch, length\), got \(3,\)"):
        minillm_advantages(rewards[0])
    with pytest.raises(ValueError, match=r"mask is \(2, 2\)"):
        minillm_advantages(rewards, MASK[:, :2])
    with pytest.raises(ValueError, match=r"must have one shape, got \[\(2, 3\), \(2, 3\), \(2, 2\)\]"):
        clipped_policy_loss(rewards, rewards, rewards[:, :2])
    with pytest.raises(ValueError, match="clip must be positive, got 0"):
        clipped_policy_loss(rewards, rewards, rewards, clip=0)
    with pytest.raises(ValueError, match="reduction must be token_mean, sum, seq_mean or none, got 'mean'"):
        clipped_policy_loss(rewards, rewards, rewards, reduction="mean")
    with pytest.raises(ValueError, match="temperature must be positive"):
        minillm_rewards(student, teacher, LABELS, temperature=0)
    with pytest.raises(ValueError, match="label 9 is not in the vocabulary"):
        minillm_loss(student, teacher, labels=torch.full_like(LABELS, 9))
