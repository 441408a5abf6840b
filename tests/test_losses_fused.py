import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from speechkd.losses import logits
from speechkd.losses.fused import fused_linear_cross_entropy, fused_linear_distillation, fused_linear_divergence
from speechkd.losses.sparse import topk_divergence, topk_targets

DIVERGENCES = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    *(("generalized_jsd", {"beta": beta}) for beta in (0.0, 0.3, 1.0)),
    *(("skew_kl", {"alpha": alpha}) for alpha in (0.0, 0.1, 1.0)),
    *(("skew_reverse_kl", {"alpha": alpha}) for alpha in (0.0, 0.1, 1.0)),
    ("skew_reverse_kl", {"alpha": 0.1, "detach_mixture": True}),
    ("total_variation", {}),
]
MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
LABELS = torch.tensor([[0, 10, -100, 3, 1], [-100, -100, 6, 7, 8], [1, 1, 1, 1, 1]])
TOLERANCE = {torch.float64: {"rtol": 1e-9, "atol": 1e-10}, torch.float32: {"rtol": 1e-5, "atol": 1e-5}}


def make_models(dtype=torch.float64, vocabulary=11):
    """Student hidden states, head and bias, which require gradients; teacher hidden states and head."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5, 6), (vocabulary, 6), (vocabulary,), (3, 5, 4), (vocabulary, 4)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [tensor.requires_grad_(index < 3) for index, tensor in enumerate(tensors)]


def gradients(loss, tensors):
    """Gradients under a different upstream gradient for each value of the loss."""
    upstream = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return torch.autograd.grad(loss, tensors, upstream)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("reduction", ["token_mean", "sum", "seq_mean", "none"])
@pytest.mark.parametrize(("name", "options"), DIVERGENCES)
def test_value_and_gradients_are_those_of_the_plain_loss(name, options, reduction, dtype):
    hidden, weight, bias, teacher_hidden, teacher_weight = make_models(dtype)
    plain_loss = getattr(logits, name)
    for temperature, scale_t2 in [(1.0, True), (2.0, True), (2.0, False)]:
        common = {"temperature": temperature, "scale_t2": scale_t2, "reduction": reduction, **options}
        fused = fused_linear_divergence(
            hidden, weight, teacher_hidden, teacher_weight, MASK, divergence=name, student_bias=bias, **common
        )
        plain = plain_loss(hidden @ weight.T + bias, teacher_hidden @ teacher_weight.T, MASK, **common)
        torch.testing.assert_close(fused, plain, **TOLERANCE[dtype])
        for ours, theirs in zip(
            gradients(fused, [hidden, weight, bias]), gradients(plain, [hidden, weight, bias]), strict=True
        ):
            torch.testing.assert_close(ours, theirs, **TOLERANCE[dtype])


@pytest.mark.parametrize("reduction", ["token_mean", "sum", "seq_mean", "none"])
def test_labels_and_teacher_in_one_pass_equal_hintons_loss(reduction):
    hidden, weight, bias, teacher_hidden, teacher_weight = make_models()
    fused, terms = fused_linear_distillation(
        hidden,
        weight,
        teacher_hidden,
        teacher_weight,
        LABELS,
        MASK,
        label_weight=0.8,
        kd_weight=1.0,
        temperature=2.0,
        reduction=reduction,
        student_bias=bias,
    )
    student, teacher = hidden @ weight.T + bias, teacher_hidden @ teacher_weight.T
    plain = logits.hinton_kd(
        student,
        teacher,
        MASK,
        labels=LABELS,
        label_weight=0.8,
        kd_weight=1.0,
        temperature=2.0,
        reduction=reduction,
    )
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(0.8 * terms["cross_entropy"] + terms["divergence"], plain.detach())
    assert not terms["cross_entropy"].requires_grad
    for ours, theirs in zip(
        gradients(fused, [hidden, weight, bias]), gradients(plain, [hidden, weight, bias]), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_cross_entropy_alone_and_num_items():
    hidden, weight, *_ = make_models()
    fused = fused_linear_cross_entropy(hidden, weight, LABELS, num_items=20)
    plain = logits.cross_entropy(hidden @ weight.T, LABELS, num_items=20)
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(gradients(fused, [hidden, weight]), gradients(plain, [hidden, weight]))


@pytest.mark.parametrize("chunk_size", [1, 3, 6, 100])
def test_the_chunk_size_changes_nothing(chunk_size):
    hidden, weight, _, teacher_hidden, teacher_weight = make_models()
    inputs = (hidden, weight, teacher_hidden, teacher_weight, MASK)
    whole, chunked = fused_linear_divergence(*inputs), fused_linear_divergence(*inputs, chunk_size=chunk_size)
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(gradients(chunked, [hidden, weight]), gradients(whole, [hidden, weight]))


@pytest.mark.parametrize("reduction", ["token_mean", "none"])
def test_gradients_pass_gradcheck(reduction):
    hidden, weight, bias, teacher_hidden, teacher_weight = make_models()
    assert torch.autograd.gradcheck(
        lambda *student: fused_linear_divergence(
            *student[:2], teacher_hidden, teacher_weight, MASK, student_bias=student[2], reduction=reduction
        ),
        (hidden, weight, bias),
    )


def test_masked_tokens_may_hold_nan_and_get_no_gradient():
    hidden, weight, _, teacher_hidden, teacher_weight = make_models()
    with torch.no_grad():
        hidden[~MASK] = torch.nan
        teacher_hidden[~MASK] = torch.nan
    fused_linear_divergence(hidden, weight, teacher_hidden, teacher_weight, MASK).backward()
    assert hidden.grad[~MASK].abs().max() == 0 and hidden.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("reduction", ["token_mean", "sum", "seq_mean", "none"])
def test_a_batch_without_scored_tokens_gives_zero_with_a_live_graph(reduction):
    hidden, weight, _, teacher_hidden, teacher_weight = make_models()
    none = torch.zeros_like(MASK)
    loss = fused_linear_divergence(hidden, weight, teacher_hidden, teacher_weight, none, reduction=reduction)
    loss.sum().backward()
    assert loss.abs().max() == 0 and hidden.grad.abs().max() == 0 and weight.grad.abs().max() == 0


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_the_same():
    hidden, weight, _, teacher_hidden, teacher_weight = make_models()
    (alone,) = gradients(
        fused_linear_divergence(hidden, weight.detach(), teacher_hidden, teacher_weight, MASK), [hidden]
    )
    both = gradients(fused_linear_divergence(hidden, weight, teacher_hidden, teacher_weight, MASK), [hidden, weight])
    torch.testing.assert_close(alone, both[0])


def test_nothing_is_computed_for_gradients_where_none_are_wanted():
    hidden, weight, _, teacher_hidden, teacher_weight = make_models()
    with torch.no_grad():
        loss = fused_linear_divergence(hidden, weight, teacher_hidden, teacher_weight, MASK)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, fused_linear_divergence(hidden, weight, teacher_hidden, teacher_weight, MASK))


def test_a_kept_graph_gives_the_same_gradients_again():
    hidden, weight, _, teacher_hidden, teacher_weight = make_models()
    loss = fused_linear_divergence(hidden, weight, teacher_hidden, teacher_weight, MASK)
    first = torch.autograd.grad(3 * loss, [hidden, weight], retain_graph=True)
    kept = [tensor.clone() for tensor in first]
    second = torch.autograd.grad(loss, [hidden, weight])
    torch.testing.assert_close(first, tuple(kept), rtol=0, atol=0)
    torch.testing.assert_close(first, tuple(3 * tensor for tensor in second))


def test_token_weights_scale_tokens_and_not_the_divisor():
    hidden, weight, _, teacher_hidden, teacher_weight = make_models()
    weights = torch.rand(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = (hidden, weight, teacher_hidden, teacher_weight, MASK)
    fused = fused_linear_divergence(*inputs, token_weights=weights)
    plain = (fused_linear_divergence(*inputs, reduction="none") * weights).sum() / MASK.sum()
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(gradients(fused, [hidden, weight]), gradients(plain, [hidden, weight]))


def test_topk_targets_stand_in_for_the_teachers_head():
    hidden, weight, _, teacher_hidden, teacher_weight = make_models()
    targets = topk_targets(teacher_hidden @ teacher_weight.T, 4, temperature=2.0)
    common = {"temperature": 2.0, "target_temperature": 2.0}
    fused = fused_linear_divergence(hidden, weight, targets, None, MASK, **common)
    plain = topk_divergence(hidden @ weight.T, targets, MASK, **common)
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(gradients(fused, [hidden, weight]), gradients(plain, [hidden, weight]))


def test_padding_of_the_larger_vocabulary_is_cut_off():
    hidden, weight, _, teacher_hidden, teacher_weight = make_models(vocabulary=64)
    with torch.no_grad():
        weight[50:] = 100.0
    small = fused_linear_divergence(hidden, weight, teacher_hidden, teacher_weight[:50], MASK)
    plain = logits.forward_kl(hidden @ weight[:50].T, teacher_hidden @ teacher_weight[:50].T, MASK)
    torch.testing.assert_close(small, plain)
    torch.testing.assert_close(gradients(small, [weight]), gradients(plain, [weight]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["token_mean", "none"])
def test_autocast_comes_close_to_float32(dtype, reduction):
    hidden, weight, bias, teacher_hidden, teacher_weight = make_models(torch.float32, vocabulary=300)
    inputs = (hidden, weight, teacher_hidden, teacher_weight, MASK)
    exact = fused_linear_divergence(*inputs, student_bias=bias, reduction=reduction)
    with torch.autocast("cpu", dtype=dtype):
        half = fused_linear_divergence(*inputs, student_bias=bias, reduction=reduction)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.03, atol=0.01)
    for ours, theirs in zip(
        gradients(half, [hidden, weight, bias]), gradients(exact, [hidden, weight, bias]), strict=True
    ):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_compiled_code_around_it_gives_the_same():
    hidden, weight, _, teacher_hidden, teacher_weight = make_models()

    def step(hidden, weight):
        return 2 * fused_linear_divergence(hidden * 1.5, weight, teacher_hidden, teacher_weight, MASK)

    plain, compiled = step(hidden, weight), torch.compile(step, backend="aot_eager")(hidden, weight)
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(gradients(compiled, [hidden, weight]), gradients(plain, [hidden, weight]))


class _Student(nn.Module):
    """A body and a head, the head used outside of the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 6).double(), nn.Linear(6, 11, bias=False).double()

    def forward(self, x):
        return self.body(x), self.head.weight


def _rank(rank: int, init_file: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=2)
    hidden, _, _, teacher_hidden, teacher_weight = make_models()
    student = DistributedDataParallel(_Student())
    states, head = student(hidden.detach()[rank : rank + 1])
    mine = slice(rank, rank + 1)
    loss = fused_linear_divergence(
        states, head, teacher_hidden[mine], teacher_weight, MASK[mine], num_items=int(MASK.sum())
    )
    (2 * loss).backward()  # the mean over ranks is undone
    if rank == 0:
        torch.save({name: parameter.grad for name, parameter in student.module.named_parameters()}, out)
    dist.destroy_process_group()


def test_two_ranks_sum_to_the_gradients_of_one(tmp_path):
    mp.spawn(_rank, (str(tmp_path / "init"), str(tmp_path / "grads.pt")), nprocs=2)
    hidden, _, _, teacher_hidden, teacher_weight = make_models()
    student = _Student()
    fused_linear_divergence(*student(hidden.detach()), teacher_hidden, teacher_weight, MASK).backward()
    gathered = torch.load(tmp_path / "grads.pt", weights_only=True)
    assert os.path.exists(tmp_path / "grads.pt") and len(gathered) == 3
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gathered[name], parameter.grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_weight": torch.zeros(11, 5)}, r"student_hidden \(3, 5, 6\) and student_weight \(11, 5\) do not"),
        ({"teacher_weight": torch.zeros(12, 4)}, r"11 and 12 ids are not one tokenizer"),
        ({"teacher_weight": None}, "teacher_weight is missing"),
        ({"teacher_hidden": torch.zeros(3, 4, 4)}, r"\(3, 5, 11\) and teacher logits \(3, 4, 11\) differ"),
        ({"mask": torch.ones(3, 5)}, "mask must be bool"),
        ({"mask": torch.ones(3, 4, dtype=torch.bool)}, r"mask is \(3, 4\)"),
        ({"divergence": "kl"}, "divergence must be one of forward_kl, .* got 'kl'"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"alpha": 1.5}, "alpha must be 0 to 1, got 1.5"),
        ({"chunk_size": 0}, "chunk_size must be 1 token or more, got 0"),
        ({"student_bias": torch.full((11,), torch.nan)}, "student_bias must be 11 finite values"),
        ({"token_weights": torch.ones(3)}, r"token_weights are \(3,\), the tokens \(3, 5\)"),
        ({"reduction": "mean"}, "reduction must be token_mean, sum, seq_mean or none, got 'mean'"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_values(change, message):
    hidden, weight, _, teacher_hidden, teacher_weight = make_models(torch.float32)
    arguments = {
        "student_hidden": hidden,
        "student_weight": weight,
        "teacher_hidden": teacher_hidden,
        "teacher_weight": teacher_weight,
        "mask": MASK,
    }
    with pytest.raises(ValueError, match=message):
        fused_linear_divergence(**{**arguments, **change})


def test_topk_targets_that_do_not_fit_are_refused():
    hidden, weight, _, teacher_hidden, teacher_weight = make_models()
    targets = topk_targets(teacher_hidden @ teacher_weight.T, 4)
    with pytest.raises(ValueError, match=r"top-k targets are \(2, 5, 4\), the tokens \(3, 5\)"):
        fused_linear_divergence(hidden, weight, type(targets)(*(field[:2] for field in targets)))
    with pytest.raises(ValueError, match="top-k targets have no teacher_weight and are compared by forward_kl"):
        fused_linear_divergence(hidden, weight, targets, divergence="reverse_kl")


def test_labels_outside_the_vocabulary_are_refused():
    hidden, weight, *_ = make_models()
    with pytest.raises(ValueError, match="label 11 is not in the vocabulary of 11 ids"):
        fused_linear_cross_entropy(hidden, weight, LABELS.masked_fill(LABELS == 10, 11))
