import math

import pytest
import torch
import torch.nn.functional as F

from speechkd.losses.layerwise import contrastable, distilhubert_terms, masked_info_nce, normalize_frames

PREDICTIONS = torch.tensor([[[[1.0, 0], [1, 1]], [[0, 2], [-1, 0]]]])
TARGETS = torch.tensor([[[[1.0, 0], [0, 1]], [[0, 1], [1, 0]]]])
LOG_SIGMOIDS = [0.313262, 0.400834, 0.313262, 1.313262]
FRAMES = torch.tensor([[[1.0, 0], [0, 1], [1, 1]]])
FRAME_TARGETS = torch.tensor([[[1.0, 0], [0, 1], [-1, 0]]])
ALL_MASKED = torch.ones(1, 3, dtype=torch.bool)


def make_states(num_layers=2, num_frames=(7, 4), dim=5, dtype=torch.float64, seed=0):
    """Student and teacher, (batch, layers, frames, dim), and the mask of real frames, (batch, frames)."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(num_frames) + 2) < torch.tensor(num_frames)[:, None]
    shape = (len(num_frames), num_layers, mask.shape[1], dim)
    student, teacher = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    return student.requires_grad_(), teacher, mask


def all_negatives(student, teacher, masked, temperature=0.1):
    """The contrastive loss of every layer and masked frame against all others, one at a time."""
    losses = []
    for clip, layer in [(clip, layer) for clip in range(len(masked)) for layer in range(student.shape[1])]:
        frames = masked[clip].nonzero()[:, 0].tolist()
        for frame in frames:
            cosines = F.cosine_similarity(student[clip, layer, frame][None], teacher[clip, layer, frames])
            losses.append(F.cross_entropy(cosines[None] / temperature, torch.tensor([frames.index(frame)])))
    return torch.stack(losses)


def test_worked_example_of_distilhubert():
    distance, cosine = distilhubert_terms(PREDICTIONS, TARGETS)
    assert distance.item() == 0.5 and cosine.item() == pytest.approx(0.585155, abs=1e-6)
    assert (distance + cosine).item() == pytest.approx(1.085155, abs=1e-6)
    _, each = distilhubert_terms(PREDICTIONS, TARGETS, reduction="none")
    assert each.flatten().tolist() == pytest.approx(LOG_SIGMOIDS, abs=1e-6)


def test_worked_example_of_dphubert():
    distance, cosine = distilhubert_terms(PREDICTIONS, TARGETS, form="negative")
    assert cosine.item() == pytest.approx(-0.426777, abs=1e-6)
    assert (distance + cosine).item() == pytest.approx(0.073223, abs=1e-6)


def test_a_perfect_student_has_its_loss_and_an_orthogonal_one_log_two():
    for form, cosine in (("log_sigmoid", 0.313262), ("negative", -1.0)):
        terms = distilhubert_terms(TARGETS, TARGETS, form=form)
        assert [term.item() for term in terms] == pytest.approx([0, cosine], abs=1e-6)
    assert distilhubert_terms(TARGETS, TARGETS.flip(-1))[1].item() == pytest.approx(0.693147, abs=1e-6)
    assert distilhubert_terms(TARGETS, -TARGETS)[1].item() == pytest.approx(1.313262, abs=1e-6)


def test_squared_distance_and_weight_of_the_cosine():
    student, teacher, mask = make_states()
    distance, cosine = distilhubert_terms(student, teacher, mask, distance="l2", cosine_weight=0.25)
    real = mask[:, None].expand(-1, 2, -1)
    torch.testing.assert_close(distance, F.mse_loss(student[real], teacher[real]))
    torch.testing.assert_close(cosine, 0.25 * distilhubert_terms(student, teacher, mask)[1])
    assert distilhubert_terms(student, teacher, mask, cosine_weight=0)[1].item() == 0


def test_padding_adds_nothing_and_without_padding_the_mask_changes_nothing():
    student, teacher, mask = make_states(num_frames=(7, 4))
    whole = sum(distilhubert_terms(student, teacher, mask, reduction="sum"))
    whole.backward()
    parts = [
        sum(distilhubert_terms(student[clip : clip + 1, :, :n], teacher[clip : clip + 1, :, :n], reduction="sum"))
        for clip, n in enumerate((7, 4))
    ]
    torch.testing.assert_close(whole, sum(parts))
    assert student.grad[1, :, 4:].abs().max() == 0 and student.grad[1, :, :4].abs().min() > 0
    full = torch.ones_like(mask)
    assert distilhubert_terms(student, teacher, full) == distilhubert_terms(student, teacher)


def test_layers_count_alike_and_the_teacher_gets_no_gradient():
    student, teacher, mask = make_states()
    teacher.requires_grad_()
    loss = sum(distilhubert_terms(student, teacher, mask, normalize_targets=True))
    torch.testing.assert_close(
        loss, sum(distilhubert_terms(student.flip(1), teacher.flip(1), mask, normalize_targets=True))
    )
    loss.backward()
    assert teacher.grad is None


def test_normalised_targets_are_blind_to_their_scale_and_offset():
    student, teacher, mask = make_states()
    targets = normalize_frames(teacher)
    torch.testing.assert_close(targets.mean(dim=-1), torch.zeros(2, 2, 9, dtype=torch.float64))
    torch.testing.assert_close(
        targets.var(dim=-1, unbiased=False), torch.ones(2, 2, 9, dtype=torch.float64), rtol=0, atol=1e-3
    )
    plain = distilhubert_terms(student, targets, mask)
    torch.testing.assert_close(distilhubert_terms(student, teacher, mask, normalize_targets=True), plain)
    large = distilhubert_terms(student, 1e3 * teacher + 7, mask, normalize_targets=True)
    torch.testing.assert_close(large, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_everything_is_float32_under_autocast(dtype):
    student, teacher, mask = make_states(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        terms = distilhubert_terms(student, teacher, mask, normalize_targets=True)
        contrast = masked_info_nce(student, teacher, mask)
    expected = distilhubert_terms(student.float(), teacher.float(), mask, normalize_targets=True)
    assert terms == expected and terms[0].dtype == torch.float32
    torch.testing.assert_close(contrast, masked_info_nce(student.float(), teacher.float(), mask), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distance": "l3"}, "distance must be l1 or l2, got 'l3'"),
        ({"cosine_weight": -1.0}, "cosine_weight must be 0 or more, got -1.0"),
        ({"cosine_weight": math.nan}, "got nan"),
        ({"form": "sine"}, "form must be"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, r"mask is \(2, 3\)"),
    ],
)
def test_bad_arguments_of_the_terms_are_refused(arguments, message):
    student, teacher, _ = make_states()
    with pytest.raises(ValueError, match=message):
        distilhubert_terms(student, teacher, **arguments)


def test_worked_example_of_the_contrast():
    rows = masked_info_nce(FRAMES.double(), FRAME_TARGETS.double(), ALL_MASKED, reduction="none")[0]
    assert rows.tolist() == pytest.approx([4.54e-5, 9.08e-5, 14.835283], rel=1e-3)
    assert masked_info_nce(FRAMES, FRAME_TARGETS, ALL_MASKED).item() == pytest.approx(4.945140, abs=1e-5)
    warm = masked_info_nce(FRAMES, FRAME_TARGETS, ALL_MASKED, temperature=1.0)
    assert warm.item() == pytest.approx(1.060377, abs=1e-6)


def test_the_contrast_equals_a_loop_and_only_masked_frames_matter():
    student, teacher, mask = make_states()
    masked = mask.clone()
    masked[:, [1, 2]] = False
    loss = masked_info_nce(student, teacher, masked)
    torch.testing.assert_close(loss, all_negatives(student, teacher, masked).mean())
    loss.backward()
    hidden = masked[:, None].expand(-1, 2, -1)
    assert student.grad[~hidden].abs().max() == 0 and student.grad[hidden].abs().min() > 0
    other_student, other_teacher = (torch.where(hidden[..., None], x.detach(), 9.0) for x in (student, teacher))
    torch.testing.assert_close(masked_info_nce(other_student, other_teacher, masked), loss)
    torch.testing.assert_close(masked_info_nce(student * 3, teacher / 7, masked), loss)
    per_layer = [masked_info_nce(student[:, layer], teacher[:, layer], masked) for layer in range(2)]
    torch.testing.assert_close(sum(per_layer) / 2, loss)


def test_the_contrast_has_the_right_gradient_and_none_for_the_teacher():
    student, teacher, mask = make_states(num_frames=(4, 3), dim=3)
    teacher.requires_grad_()
    masked_info_nce(student, teacher, mask).backward()
    assert teacher.grad is None
    assert torch.autograd.gradcheck(lambda states: masked_info_nce(states, teacher, mask), student)


def blind_loss(teacher, masked, **arguments):
    """Of a student that says nothing: log of the number of answers, exactly."""
    return masked_info_nce(torch.zeros_like(teacher), teacher, masked, reduction="none", **arguments)


def test_as_many_negatives_as_asked_for_or_all_that_there_are():
    _, teacher, mask = make_states(num_frames=(7, 4))
    loss = blind_loss(teacher, mask, num_negatives=5)
    torch.testing.assert_close(loss[0, :, :7], torch.full((2, 7), math.log(6), dtype=torch.float64))
    torch.testing.assert_close(loss[1, :, :4], torch.full((2, 4), math.log(4), dtype=torch.float64))


def test_equal_targets_are_no_negatives():
    _, teacher, mask = make_states(num_layers=1, num_frames=(6,))
    teacher[:, :, 1:4] = teacher[:, :, :1] * torch.tensor([1.0, 2.0, 0.5]).double()[:, None]  # four alike, two others
    expected = torch.tensor([3.0, 3, 3, 3, 6, 6]).double().log()
    torch.testing.assert_close(blind_loss(teacher, mask)[0, 0, :6], expected)
    drawn = blind_loss(teacher, mask, num_negatives=3)[0, 0, :6]
    torch.testing.assert_close(drawn, torch.tensor([3.0, 3, 3, 3, 4, 4]).double().log())


def test_frames_that_all_look_alike_add_zero_and_count():
    student, _, mask = make_states(num_layers=1, num_frames=(4, 4))
    teacher = torch.ones(2, 1, 6, 5, dtype=torch.float64)
    teacher[1] = make_states(num_layers=1, num_frames=(4,), seed=3)[1][0]
    loss = masked_info_nce(student, teacher, mask)
    alone = masked_info_nce(student[1:], teacher[1:], mask[1:])
    torch.testing.assert_close(loss, alone / 2)


def test_a_masked_frame_alone_in_its_utterance_is_skipped():
    student, teacher, mask = make_states(num_frames=(7, 1))
    assert contrastable(mask)[0].equal(mask[0]) and not contrastable(mask)[1].any()
    loss = masked_info_nce(student, teacher, mask)
    torch.testing.assert_close(loss, masked_info_nce(student[:1], teacher[:1], mask[:1]))
    nothing = masked_info_nce(student[1:], teacher[1:], mask[1:])
    nothing.backward()
    assert nothing.item() == 0 and student.grad.abs().max() == 0


def test_the_draw_is_repeatable_and_uniform():
    student, teacher, mask = make_states(num_layers=1, num_frames=(6,))

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return masked_info_nce(student, teacher, mask, num_negatives=2, generator=generator)

    assert draw(0).equal(draw(0)) and not draw(0).equal(draw(1))
    # one clip a draw: the student looks along frame 0's target, so frame 1 alone among five can be told from the rest
    many = torch.eye(6).expand(4000, 1, 6, 6)
    blind = torch.zeros_like(many)
    blind[..., 1] = 1.0
    loss = masked_info_nce(
        blind, many, torch.ones(4000, 6, dtype=torch.bool), num_negatives=2, temperature=1.0, reduction="none"
    )[:, 0, 0]
    with_it = loss > math.log(3) + 0.1
    assert with_it.float().mean().item() == pytest.approx(2 / 5, abs=0.04)
    assert loss[~with_it].unique().numel() == 1


def test_micro_batches_with_num_items_add_up_to_the_whole():
    student, teacher, mask = make_states()
    count = int(contrastable(mask).sum()) * 2
    parts = [masked_info_nce(student[i : i + 1], teacher[i : i + 1], mask[i : i + 1], num_items=count) for i in (0, 1)]
    torch.testing.assert_close(sum(parts), masked_info_nce(student, teacher, mask))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_negatives": 0}, "num_negatives=0 leaves nothing"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"masked": torch.ones(2, 4, dtype=torch.bool)}, r"masked is \(2, 4\)"),
        ({"masked": torch.ones(2, 9)}, "mask must be bool"),
        ({"teacher": torch.zeros(2, 2, 8, 5)}, "differ in shape"),
    ],
)
def test_bad_arguments_of_the_contrast_are_refused(arguments, message):
    student, teacher, mask = make_states()
    with pytest.raises(ValueError, match=message):
        masked_info_nce(**{"student": student, "teacher": teacher, "masked": mask} | arguments)
