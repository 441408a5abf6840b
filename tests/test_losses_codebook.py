import math

import pytest
import torch
import torch.nn.functional as F

from speechkd.losses.codebook import CodebookPredictor, align_codes, codebook_loss

MODES = ["independent", "joint"]
both_modes = pytest.mark.parametrize("mode", MODES)


def zero(predictor):
    for parameter in predictor.parameters():
        torch.nn.init.zeros_(parameter)
    return predictor


def make_batch(num_frames=(5, 3), padded_to=6, dim=7, num_codebooks=4, size=9):
    """States with NaN on padding, codes with -100 there, and the mask."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(padded_to) < torch.tensor(num_frames)[:, None]
    hidden = torch.randn(*mask.shape, dim, generator=generator).masked_fill(~mask[..., None], torch.nan)
    codes = torch.randint(size, (*mask.shape, num_codebooks), generator=generator).masked_fill(~mask[..., None], -100)
    return hidden.requires_grad_(), codes, mask


def make_predictor(mode, dim=7, num_codebooks=4, size=9):
    torch.manual_seed(1)
    return CodebookPredictor(dim, num_codebooks, size, mode=mode, hidden_dim=8)


@both_modes
def test_zero_weights_give_the_logarithm_of_the_entries(mode):
    predictor = zero(CodebookPredictor(6, 3, 5, mode=mode, hidden_dim=4))
    codes = torch.randint(5, (2, 4, 3))
    codes[1, 2:] = -100
    loss = codebook_loss(torch.randn(2, 4, 6), codes, predictor, reduction="sum")
    assert 3 * loss.item() == pytest.approx(28.96988, abs=1e-5)  # 18 ln 5, divided by the number of codes
    assert codebook_loss(torch.randn(2, 4, 6), codes, predictor).item() == pytest.approx(math.log(5), abs=1e-6)


def test_reference_values_of_the_joint_predictor():
    predictor = CodebookPredictor(1, 2, 2, mode="joint", hidden_dim=1)
    with torch.no_grad():
        predictor.linear1.weight.fill_(1.0)
        predictor.linear1.bias.fill_(0.5)
        predictor.embedding.copy_(torch.tensor([[2.0], [-4.0]]))
        predictor.joint_weight.copy_(torch.tensor([[[1.0], [-1.0]], [[2.0], [0.0]]]))
        predictor.weight.copy_(torch.tensor([[[0.5], [0.0]], [[0.0], [1.0]]]))
        predictor.bias.copy_(torch.tensor([[0.1, 0.0], [0.0, 0.2]]))
    hidden = torch.ones(1, 1, 1)
    expected = {(0, 0): 0.0663575, (0, 1): 3.2805710, (1, 0): 4.9610796, (1, 1): 3.9326525}
    for codes, value in expected.items():
        loss = 2 * codebook_loss(hidden, torch.tensor([[codes]]), predictor, reduction="sum")
        assert loss.item() == pytest.approx(value, abs=2e-6)
        longer = torch.tensor([[codes, (-100, -100)]])
        again = 2 * codebook_loss(torch.ones(1, 2, 1), longer, predictor, reduction="sum")
        assert again.item() == pytest.approx(value, abs=2e-6)


@both_modes
def test_the_loss_equals_a_plain_loop(mode):
    hidden, codes, mask = make_batch()
    predictor = make_predictor(mode).double()
    total = 0.0
    for row, frame in mask.nonzero().tolist():
        state, told = hidden[row, frame].double(), 0.0
        for n in range(4):
            logits = predictor.weight[n] @ state + predictor.bias[n]
            if mode == "joint":
                logits = logits + predictor.joint_weight[n] @ F.relu(predictor.linear1(state) + told)
                if n < 3:
                    told = told + 0.5 * math.sqrt(8 / 4) * predictor.embedding[9 * n + codes[row, frame, n]]
            total -= logits.log_softmax(dim=-1)[codes[row, frame, n]].item() / 4
    loss = codebook_loss(hidden.double(), codes, predictor, mask, reduction="sum")
    assert loss.item() == pytest.approx(total, rel=1e-9)
    mean = codebook_loss(hidden.double(), codes, predictor, mask)
    assert mean.item() == pytest.approx(total / 8, rel=1e-9)


@both_modes
def test_padding_adds_no_loss_and_no_gradient(mode):
    hidden, codes, mask = make_batch()
    predictor = make_predictor(mode)
    per_frame = codebook_loss(hidden, codes, predictor, mask, reduction="none")
    per_frame.sum().backward()
    assert per_frame.shape == mask.shape and (per_frame[~mask] == 0).all() and (per_frame[mask] > 0).all()
    assert (hidden.grad[~mask] == 0).all() and (hidden.grad[mask].abs().amax(dim=-1) > 0).all()
    by_codes = codebook_loss(hidden, codes, predictor, reduction="none")  # -100 alone says the same
    torch.testing.assert_close(by_codes, per_frame)
    by_mask = codebook_loss(hidden, codes.clamp(min=0), predictor, mask, reduction="none")
    torch.testing.assert_close(by_mask, per_frame)
    unpadded = codebook_loss(hidden[1:, :3], codes[1:, :3], predictor, reduction="none")
    torch.testing.assert_close(unpadded, per_frame[1:, :3])


@both_modes
def test_reductions_and_the_count_of_a_larger_batch(mode):
    hidden, codes, mask = make_batch()
    predictor = make_predictor(mode)
    per_frame = codebook_loss(hidden, codes, predictor, mask, reduction="none")
    for reduction, num_items, expected in [
        ("sum", None, per_frame.sum()),
        ("token_mean", None, per_frame.sum() / 8),
        ("token_mean", 20, per_frame.sum() / 20),
        ("seq_mean", None, (per_frame[0].sum() / 5 + per_frame[1].sum() / 3) / 2),
    ]:
        value = codebook_loss(hidden, codes, predictor, mask, reduction=reduction, num_items=num_items)
        torch.testing.assert_close(value, expected)


@both_modes
def test_a_batch_without_codes_gives_zero_with_a_live_graph(mode):
    hidden, codes, mask = make_batch()
    predictor = make_predictor(mode)
    for batch in [(codes.fill_(-100), mask), (codes, torch.zeros_like(mask))]:
        predictor.zero_grad()
        loss = codebook_loss(hidden, batch[0], predictor, batch[1])
        loss.backward()
        assert loss == 0
        assert all(parameter.grad is not None and not parameter.grad.any() for parameter in predictor.parameters())


@both_modes
def test_gradients_reach_every_weight_and_equal_finite_differences(mode):
    hidden, codes, mask = make_batch()
    predictor = make_predictor(mode).double()
    states = torch.randn(*mask.shape, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: codebook_loss(x, codes, predictor, mask), states)
    codebook_loss(states, codes, predictor, mask).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in predictor.parameters())


def test_an_independent_predictor_has_no_joint_weights_and_a_joint_one_the_published_number():
    assert set(dict(make_predictor("independent").named_parameters())) == {"weight", "bias"}
    sizes = {mode: sum(p.numel() for p in CodebookPredictor(1024, 16, mode=mode).parameters()) for mode in MODES}
    assert sizes == {"independent": 16 * 256 * 1025, "joint": 8_786_432}


@both_modes
def test_a_code_changes_the_losses_of_later_codes_only(mode):
    predictor = make_predictor(mode)
    hidden, codes = torch.randn(6, 7), torch.randint(9, (6, 4))

    def losses(codes):
        return F.cross_entropy(predictor(hidden, codes).transpose(1, 2), codes, reduction="none").detach()

    for n in range(4):
        changed = codes.clone()
        changed[:, n] = (changed[:, n] + 1) % 9
        differs = (losses(changed) - losses(codes)).abs().amax(dim=0) > 1e-6
        assert not differs[:n].any() and differs[n]
        assert differs[n + 1 :].all() if mode == "joint" else not differs[n + 1 :].any()


def test_a_joint_predictor_learns_what_the_first_code_says_of_the_second():
    permutation = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    reached = {}
    for mode in MODES:
        torch.manual_seed(0)
        predictor = CodebookPredictor(1, 2, 16, mode=mode, hidden_dim=64)
        optimizer = torch.optim.Adam(predictor.parameters(), lr=1e-2)
        for _ in range(300):
            first = torch.randint(16, (1, 256, 1))
            codes = torch.cat([first, permutation[first]], dim=-1)
            loss = 2 * codebook_loss(torch.zeros(1, 256, 1), codes, predictor)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        reached[mode] = loss.item()
    assert reached["joint"] == pytest.approx(math.log(16), abs=0.02)
    assert reached["independent"] == pytest.approx(2 * math.log(16), abs=0.05)


@both_modes
def test_half_precision_and_autocast_are_computed_in_float32(mode):
    hidden, codes, mask = make_batch()
    predictor = make_predictor(mode)
    plain = codebook_loss(hidden, codes, predictor, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert codebook_loss(hidden, codes, predictor, mask).equal(plain)
    half = codebook_loss(hidden.bfloat16(), codes, predictor, mask)
    assert half.dtype == torch.float32
    assert half.equal(codebook_loss(hidden.bfloat16().float(), codes, predictor, mask))


def test_codes_of_two_teacher_frames_stand_side_by_side():
    codes = torch.arange(101 * 8).view(1, 101, 8) % 256
    aligned = align_codes(codes.to(torch.uint8), 50, teacher_rate_hz=50, student_rate_hz=25)
    assert aligned.shape == (1, 50, 16) and aligned.dtype == torch.int64
    for t in range(50):
        assert aligned[0, t].tolist() == [*codes[0, 2 * t].tolist(), *codes[0, 2 * t + 1].tolist()]


def test_a_missing_frame_is_padded_along_time_and_half_of_its_slots_ignored():
    codes = torch.randint(256, (2, 99, 8))
    aligned = align_codes(codes, 50, teacher_rate_hz=50, student_rate_hz=25)
    assert aligned.shape == (2, 50, 16)
    assert (aligned[:, -1, 8:] == -100).all() and aligned[:, -1, :8].equal(codes[:, -1])
    assert (aligned[:, :-1] >= 0).all()
    predictor = zero(CodebookPredictor(4, 16))
    loss = codebook_loss(torch.randn(2, 50, 4), aligned, predictor, reduction="none")
    assert loss[:, -1].tolist() == pytest.approx([math.log(256) / 2] * 2)
    with pytest.raises(ValueError, match="frame 49 of clip 0 has codes for a part of its 16 codebooks"):
        codebook_loss(torch.randn(2, 50, 4), aligned, CodebookPredictor(4, 16, mode="joint"))


def test_codes_of_a_slower_teacher_are_repeated_for_the_nearest_frames():
    codes = torch.arange(3).view(1, 3, 1)
    doubled = align_codes(codes, 6, teacher_rate_hz=25, student_rate_hz=50)
    assert doubled.flatten().tolist() == [0, 0, 1, 1, 2, 2]
    uneven = align_codes(torch.arange(4).view(1, 4, 1), 5, teacher_rate_hz=40, student_rate_hz=50)
    assert uneven.flatten().tolist() == [0, 1, 2, 2, 3]  # middles at 0.4, 1.2, 2.0, 2.8, 3.6 teacher frames


def test_a_late_student_predicts_codes_of_earlier_frames():
    codes = torch.arange(1, 6).view(1, 5, 1)
    late = align_codes(codes, 5, delay_frames=2)
    assert late.flatten().tolist() == [-100, -100, 1, 2, 3]
    assert (align_codes(codes, 5, delay_frames=9) == -100).all()
    assert align_codes(codes, 5).equal(codes)


BAD_ALIGNMENTS = [
    ({"teacher_rate_hz": 50, "student_rate_hz": 33}, r"teacher_rate_hz=50 is 1.52 times student_rate_hz=33.*no whole"),
    ({"teacher_rate_hz": 100, "student_rate_hz": 25}, "20 frames of codes at teacher_rate_hz=100 are not .* last 80"),
    ({"num_frames": 30}, "20 frames of codes at teacher_rate_hz=50 are not those of 30 student frames"),
    ({"num_frames": 9}, "20 frames of codes"),
    ({"delay_frames": -1}, "delay_frames 0 or more.*delay_frames=-1"),
    ({"student_rate_hz": 0}, "rates must be positive.*student_rate_hz=0"),
    ({"codes": torch.zeros(1, 20, 4)}, r"codes are \(1, 20, 4\) torch.float32; give integers"),
    ({"codes": torch.zeros(20, 4).long()}, r"codes are \(20, 4\) torch.int64; give integers \(batch"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ALIGNMENTS)
def test_codes_that_cannot_be_aligned_are_refused(change, message):
    arguments = {"codes": torch.zeros(1, 20, 4, dtype=torch.int64), "num_frames": 20} | change
    with pytest.raises(ValueError, match=message):
        align_codes(arguments.pop("codes"), arguments.pop("num_frames"), **arguments)


BAD_CODES = [
    (
        torch.zeros(2, 6, 3, dtype=torch.int64),
        r"codes are \(2, 6, 3\), the states \(2, 6, 7\).* need \(2, 6, 4\); .*align",
    ),
    (torch.zeros(2, 6, 4, dtype=torch.uint8), "codes must be int64, got torch.uint8, which cannot hold -100"),
    (torch.full((2, 6, 4), 9), "code 9 is not in a codebook of 9 entries"),
    (torch.full((2, 6, 4), -1), "code -1 is not in a codebook of 9 entries; frames without codes have -100"),
]


@both_modes
@pytest.mark.parametrize(("codes", "message"), BAD_CODES)
def test_codes_that_do_not_fit_are_refused(mode, codes, message):
    with pytest.raises(ValueError, match=message):
        codebook_loss(torch.randn(2, 6, 7), codes, make_predictor(mode))


def test_predictors_that_make_no_sense_are_refused():
    for arguments, message in [
        ({"num_codebooks": 1, "mode": "joint"}, "mode joint needs 2 codebooks or more, got num_codebooks=1"),
        ({"num_codebooks": 2, "mode": "both"}, "mode must be independent or joint, got 'both'"),
        ({"num_codebooks": 0}, "sizes must be 1 or more, got dim=4, num_codebooks=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            CodebookPredictor(4, **arguments)
