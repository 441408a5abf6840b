import math
from functools import partial

import pytest
import torch

from speechkd.losses.dual_space import CrossModelAttentionKD, DualSpaceKD, TokenStates
from speechkd.losses.logits import cross_entropy, reverse_kl

STUDENT_DIM, TEACHER_DIM, STUDENT_VOCABULARY, TEACHER_VOCABULARY = 3, 4, 5, 6
LABELS = torch.tensor([[1, 3, 0, -100], [4, 2, -100, -100]])
TEACHER_LABELS = torch.tensor([[5, 0, 1, 2, 3], [-100, 4, -100, -100, -100]])


def make_states(seed, labels, vocabulary, dim, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    random = partial(torch.randn, generator=generator, dtype=torch.float64)
    hidden, head = random(*labels.shape, dim), random(vocabulary, dim)
    return TokenStates(
        hidden=hidden.to(dtype),
        logits=(hidden @ head.T).to(dtype),
        labels=labels,
        head=head.to(dtype),
        input_ids=torch.randint(vocabulary, labels.shape, generator=generator),
        embeddings=random(vocabulary, dim).to(dtype),
    )


def same_tokens(dtype=torch.float64):
    student = make_states(1, LABELS, STUDENT_VOCABULARY, STUDENT_DIM, dtype)
    return student, make_states(2, LABELS, STUDENT_VOCABULARY, TEACHER_DIM, dtype)


def other_tokens(dtype=torch.float64):
    student = make_states(1, LABELS, STUDENT_VOCABULARY, STUDENT_DIM, dtype)
    return student, make_states(2, TEACHER_LABELS, TEACHER_VOCABULARY, TEACHER_DIM, dtype)


def make_module(kind):
    torch.manual_seed(0)
    return kind(STUDENT_DIM, TEACHER_DIM).double()


CASES = [(DualSpaceKD, same_tokens), (CrossModelAttentionKD, other_tokens)]


def kl_loop(a, b, temperature):
    a, b = (a / temperature).softmax(-1).tolist(), (b / temperature).softmax(-1).tolist()
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


def test_terms_equal_a_loop_over_tokens():
    student, teacher = same_tokens()
    module, temperature = make_module(DualSpaceKD), 2.0
    expected = [0.0, 0.0, 0.0]
    for n, k in (LABELS >= 0).nonzero().tolist():
        logits = student.head @ (module.to_student.weight @ teacher.hidden[n, k] + module.to_student.bias)
        returned = teacher.head @ (module.to_teacher.weight @ student.hidden[n, k] + module.to_teacher.bias)
        expected[0] += -math.log(logits.softmax(-1)[LABELS[n, k]].item()) / 5
        expected[1] += kl_loop(logits, student.logits[n, k], temperature) / 5
        expected[2] += kl_loop(teacher.logits[n, k], returned, temperature) / 5
    terms = module(student, teacher, temperature=temperature, scale_t2=False)
    assert [term.item() for term in terms] == pytest.approx(expected, abs=1e-12)
    scaled = module(student, teacher, temperature=temperature)
    assert [term.item() for term in scaled] == pytest.approx([expected[0], 4 * expected[1], 4 * expected[2]], abs=1e-12)


def test_attention_terms_equal_a_loop_over_tokens():
    student, teacher = other_tokens()
    module = make_module(CrossModelAttentionKD)
    ours, theirs = (LABELS >= 0).nonzero().tolist(), (TEACHER_LABELS >= 0).nonzero().tolist()
    keys = {
        (n, k): torch.cat([teacher.embeddings[teacher.input_ids[n, k]], teacher.embeddings[TEACHER_LABELS[n, k]]])
        for n, k in theirs
    }
    key_std = torch.stack(list(keys.values())).std()
    label_std = torch.stack([teacher.embeddings[TEACHER_LABELS[n, k]] for n, k in theirs]).std()
    hidden_std = torch.stack([teacher.hidden[n, k] for n, k in theirs]).std()
    scores = {}
    for n, k in ours:
        query = torch.cat([student.embeddings[student.input_ids[n, k]], student.embeddings[LABELS[n, k]]])
        for row, j in theirs:
            if row == n:
                key = keys[n, j] / key_std
                scores[n, k, j] = ((module.query(query) @ key) / math.sqrt(2 * TEACHER_DIM)).exp().item()
    projection = student_space = teacher_space = 0.0
    num_right = 0
    for n, k in ours:
        total = sum(score for (row, i, _), score in scores.items() if (row, i) == (n, k))
        state = 0
        for row, j in theirs:
            if row == n:
                label = teacher.embeddings[TEACHER_LABELS[n, j]]
                value = module.to_student(teacher.hidden[n, j] / hidden_std + label / label_std)
                state = state + scores[n, k, j] / total * value
        logits = student.head @ state
        projection += -math.log(logits.softmax(-1)[LABELS[n, k]].item()) / len(ours)
        if logits.argmax() == LABELS[n, k]:
            num_right += 1
            student_space += kl_loop(logits, student.logits[n, k], 1.0) / len(ours)
    for n, j in theirs:
        total = sum(score for (row, _, i), score in scores.items() if (row, i) == (n, j))
        state = sum(scores[n, k, j] / total * module.to_teacher(student.hidden[n, k]) for row, k in ours if row == n)
        teacher_space += kl_loop(teacher.logits[n, j], teacher.head @ state, 1.0) / len(theirs)
    assert 0 < num_right < len(ours)
    terms = module(student, teacher)
    assert [term.item() for term in terms] == pytest.approx([projection, student_space, teacher_space], abs=1e-12)


@pytest.mark.parametrize("kind, make", CASES)
def test_each_term_trains_its_own_side_and_never_the_teacher_or_a_head(kind, make):
    student, teacher = make()
    for states in (student, teacher):
        for tensor in (states.hidden, states.logits, states.head, states.embeddings):
            tensor.requires_grad_()
    module = make_module(kind)
    trained = {
        "hidden": student.hidden,
        "logits": student.logits,
        "to_student": module.to_student.weight,
        "to_teacher": module.to_teacher.weight,
    }
    if kind is CrossModelAttentionKD:
        trained["query"] = module.query.weight
    frozen = [*teacher[:2], teacher.head, teacher.embeddings, student.head, student.embeddings]
    reached = []
    for term in module(student, teacher):
        tensors = [*trained.values(), *frozen]
        grads = torch.autograd.grad(term, tensors, retain_graph=True, allow_unused=True)
        assert all(grad is None for grad in grads[len(trained) :])
        reached.append({name for name, grad in zip(trained, grads, strict=False) if grad is not None})
    query = {"query"} & trained.keys()
    assert reached == [{"to_student"} | query, {"logits"}, {"hidden", "to_teacher"} | query]


def test_states_that_the_projections_map_onto_each_other_leave_no_divergence():
    student, teacher = same_tokens()
    module = make_module(DualSpaceKD)
    with torch.no_grad():
        logits = module.to_student(teacher.hidden) @ student.head.T
        returned = module.to_teacher(student.hidden) @ teacher.head.T
    terms = module(student._replace(logits=logits), teacher._replace(logits=returned))
    assert abs(terms.student_space.item()) < 1e-12 and abs(terms.teacher_space.item()) < 1e-12
    torch.testing.assert_close(terms.projection, cross_entropy(logits, LABELS))


def test_the_student_s_space_takes_any_divergence():
    student, teacher = same_tokens()
    module = make_module(DualSpaceKD)
    logits = module.to_student(teacher.hidden) @ student.head.T
    terms = module(student, teacher, divergence=reverse_kl, temperature=2.0)
    torch.testing.assert_close(terms.student_space, reverse_kl(student.logits, logits, LABELS >= 0, temperature=2.0))
    torch.testing.assert_close(terms.teacher_space, module(student, teacher, temperature=2.0).teacher_space)


@pytest.mark.parametrize("kind, make", CASES)
def test_masked_positions_have_no_value_and_no_gradient(kind, make):
    student, teacher = make()
    module = make_module(kind)
    expected = module(student, teacher)
    broken = []
    for states in (student, teacher):
        masked = states.labels < 0
        broken.append(
            states._replace(
                hidden=states.hidden.masked_fill(masked[..., None], torch.nan),
                logits=states.logits.masked_fill(masked[..., None], torch.nan),
                input_ids=states.input_ids.masked_fill(masked, -100),
            )
        )
    broken[0].hidden.requires_grad_()
    broken[0].logits.requires_grad_()
    terms = module(*broken)
    sum(terms).backward()
    torch.testing.assert_close(terms, expected, rtol=0, atol=0)
    assert broken[0].hidden.grad[LABELS < 0].abs().max() == 0 and broken[0].logits.grad[LABELS < 0].abs().max() == 0
    assert (broken[0].hidden.grad[LABELS >= 0].abs().amax(dim=-1) > 0).all()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_a_sequence_without_teacher_tokens_is_left_out():
    student, teacher = other_tokens()
    module = make_module(CrossModelAttentionKD)
    half = teacher._replace(labels=TEACHER_LABELS.clone())
    half.labels[1] = -100
    first = [
        TokenStates(*(x[:1] for x in states[:3]), states[3], states[4][:1], states[5]) for states in (student, half)
    ]
    torch.testing.assert_close(module(student, half), module(*first))
    per_token = module(student, half, reduction="none")
    assert per_token.projection.shape == LABELS.shape and per_token.teacher_space.shape == TEACHER_LABELS.shape
    assert per_token.projection[1].abs().max() == 0 and per_token.projection[0, :3].min() > 0


@pytest.mark.parametrize("kind, make", CASES)
def test_an_all_masked_batch_gives_zeros_with_a_live_graph(kind, make):
    student, teacher = (states._replace(labels=torch.full_like(states.labels, -100)) for states in make())
    student.hidden.requires_grad_()
    student.logits.requires_grad_()
    module = make_module(kind)
    terms = module(student, teacher)
    sum(terms).backward()
    assert all(term.item() == 0 and term.requires_grad for term in terms)
    assert student.hidden.grad.abs().max() == 0 and student.logits.grad.abs().max() == 0
    assert all(parameter.grad is None or parameter.grad.abs().max() == 0 for parameter in module.parameters())


def test_micro_batches_with_num_items_add_up_to_the_whole():
    student, teacher = same_tokens()
    module = make_module(DualSpaceKD)
    parts = []
    for n in range(2):
        rows = [TokenStates(*(x[n : n + 1] for x in states[:3]), states.head) for states in (student, teacher)]
        parts.append(module(*rows, num_items=5))
    for part, other, whole in zip(*parts, module(student, teacher), strict=True):
        torch.testing.assert_close(part + other, whole)


def test_a_constant_in_the_teacher_s_logits_changes_nothing():
    student, teacher = other_tokens()
    module = make_module(CrossModelAttentionKD)
    moved = module(student._replace(logits=student.logits + 3), teacher._replace(logits=teacher.logits - 5))
    torch.testing.assert_close(moved, module(student, teacher))


@pytest.mark.parametrize("kind, make", CASES)
def test_bfloat16_states_give_float32_terms(kind, make):
    exact = make_module(kind)(*make())
    student, teacher = make(torch.bfloat16)
    student.hidden.requires_grad_()
    student.logits.requires_grad_()
    terms = make_module(kind).float()(student, teacher)
    sum(terms).backward()
    assert all(term.dtype == torch.float32 for term in terms)
    torch.testing.assert_close(terms.teacher_space.double(), exact.teacher_space, rtol=0.05, atol=0.02)
    torch.testing.assert_close(terms.projection.double(), exact.projection, rtol=0.05, atol=0.02)
    assert student.hidden.grad.isfinite().all() and student.logits.grad.isfinite().all()


@pytest.mark.parametrize("kind, make", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_terms_work_under_autocast(kind, make, dtype):
    exact = make_module(kind)(*make())
    module = make_module(kind).float()
    with torch.autocast("cpu", dtype):
        terms = module(*make(torch.float32))
    terms.projection.backward()
    torch.testing.assert_close(terms.projection.double(), exact.projection, rtol=0.05, atol=0.02)
    torch.testing.assert_close(terms.teacher_space.double(), exact.teacher_space, rtol=0.05, atol=0.02)
    assert module.to_student.weight.grad.isfinite().all()


@pytest.mark.parametrize("kind, make", CASES)
def test_terms_pass_gradcheck(kind, make):
    student, teacher = make()
    module = make_module(kind)

    def total(hidden, logits, *weights):
        states = student._replace(hidden=hidden, logits=logits)
        named = dict(zip([name for name, _ in module.named_parameters()], weights, strict=True))
        return tuple(torch.func.functional_call(module, named, (states, teacher)))

    inputs = [student.hidden.requires_grad_(), student.logits.requires_grad_(), *module.parameters()]
    # the student's space holds the projections fixed, so only inputs that it reaches are checked there
    assert torch.autograd.gradcheck(lambda *xs: total(*xs)[0] + total(*xs)[2], inputs)
    assert torch.autograd.gradcheck(lambda logits: total(student.hidden, logits, *module.parameters())[1], inputs[1])


def test_training_moves_the_student_towards_the_teacher_s_label():
    student, teacher = other_tokens(torch.float32)
    module = make_module(CrossModelAttentionKD).float()
    hidden = student.hidden.clone().requires_grad_()
    optimizer = torch.optim.Adam([hidden, *module.parameters()], lr=0.05)
    before = cross_entropy(hidden @ student.head.T, LABELS)
    for _ in range(80):
        optimizer.zero_grad()
        sum(module(student._replace(hidden=hidden, logits=hidden @ student.head.T), teacher)).backward()
        optimizer.step()
    assert cross_entropy(hidden @ student.head.T, LABELS) < 0.5 * before


def test_states_that_do_not_fit_are_refused():
    student, teacher = same_tokens()
    module = make_module(DualSpaceKD)
    with pytest.raises(ValueError, match="different labels, .* use CrossModelAttentionKD"):
        module(student, teacher._replace(labels=LABELS.flip(0)))
    with pytest.raises(ValueError, match=r"student labels \(2, 4\) and teacher labels \(1, 4\) differ in batch size"):
        module(student, TokenStates(*(x[:1] for x in teacher[:3]), teacher.head))
    with pytest.raises(ValueError, match=r"student hidden states are \(2, 4, 4\), .* need \(2, 4, 3\)"):
        module(teacher, teacher)
    with pytest.raises(ValueError, match=r"teacher's head is \(4, 5\), its logits and hidden states need \(5, 4\)"):
        module(student, teacher._replace(head=teacher.head.T))
    with pytest.raises(ValueError, match=r"teacher logits are \(8, 5\), not \(batch, length, vocabulary\)"):
        module(student, teacher._replace(logits=teacher.logits.flatten(0, 1)))
    with pytest.raises(ValueError, match="label 5 is not in the vocabulary of 5 ids"):
        module(student._replace(labels=torch.full((2, 4), 5)), teacher)
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        module(student, teacher, temperature=0)


def test_attention_needs_inputs_and_embeddings():
    student, teacher = other_tokens()
    module = make_module(CrossModelAttentionKD)
    with pytest.raises(ValueError, match="teacher's states need input_ids and embeddings"):
        module(student, teacher._replace(embeddings=None))
    with pytest.raises(ValueError, match=r"student input_ids are \(2, 3\), its labels \(2, 4\)"):
        module(student._replace(input_ids=student.input_ids[:, :3]), teacher)
    with pytest.raises(ValueError, match=r"student embeddings are \(4, 3\), .* need at least \(5, 3\)"):
        module(student._replace(embeddings=student.embeddings[:4]), teacher)
    with pytest.raises(ValueError, match="student input_ids reach from 0 to 7, its embedding has 5 ids"):
        module(student._replace(input_ids=torch.full((2, 4), 7)), teacher)
