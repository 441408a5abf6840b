import logging
import math

import numpy as np
import pytest
import torch

from speechkd.models.quantizer import Quantizer, QuantizerError
from speechkd.models.quantizer_fit import (
    FitConfig,
    fit,
    index_entropy_losses,
    kmeans,
    learning_rate,
    measure,
    merge_codebooks,
    residual_kmeans,
    start_at,
    training_terms,
    unscaled,
)

NUM_TRAIN, NUM_TEST, DIM = 65_536, 8_192, 64


def clustered_frames(generator):
    centers = 2 * generator.standard_normal((32, DIM))
    clusters = generator.integers(0, 32, NUM_TRAIN + NUM_TEST)
    return centers[clusters] + generator.standard_normal((NUM_TRAIN + NUM_TEST, DIM))


def correlated_frames(generator):
    turn = np.linalg.qr(generator.standard_normal((DIM, DIM)))[0]
    deviations = np.sqrt(np.arange(1, DIM + 1) ** -1.5)
    return generator.standard_normal((NUM_TRAIN + NUM_TEST, DIM)) * deviations @ turn.T + 0.5


def card_frames(draw, first, test_sum):
    """Train and test frames of the card, whose values show that they are the same."""
    frames = torch.from_numpy(draw(np.random.default_rng(20240)).astype(np.float32))
    assert frames[0, 0].item() == pytest.approx(first, abs=1e-6)
    assert frames[NUM_TRAIN:].double().sum().item() == pytest.approx(test_sum, abs=0.01)
    return frames[:NUM_TRAIN], frames[NUM_TRAIN:]


def error_on(frames, quantizer):
    """Squared error over that of the mean of these frames, as the card measures it."""
    decoded = quantizer.decode(quantizer.encode(frames))
    return ((decoded - frames).square().sum() / (frames - frames.mean(dim=0)).square().sum()).item()


def small_frames(num_frames=2000, dim=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_frames, dim, generator=generator) @ torch.randn(dim, dim, generator=generator) + 5


SMALL_FIT = FitConfig(bytes_per_frame=1, phase1_steps=30, phase2_steps=30, batch_size=128)


def test_clustered_frames_do_not_stall_and_reach_residual_kmeans():
    train, test = card_frames(clustered_frames, -0.229808, -41195.49)
    quantizer, report = fit(train, FitConfig(bytes_per_frame=2, phase1_steps=60, phase2_steps=120))
    assert error_on(test, quantizer) <= 0.1775 + 0.005
    assert max(report.index_entropy_losses) < 0.05


def test_correlated_frames_reach_the_published_training_and_residual_kmeans():
    train, test = card_frames(correlated_frames, 0.064849, 262106.69)
    quantizer, report = fit(train, FitConfig(bytes_per_frame=2, phase1_steps=200, phase2_steps=150))
    error = error_on(test, quantizer)
    assert error <= 0.2280 + 0.01 and error <= 0.2292
    assert report.relative_errors[5] == pytest.approx(error, abs=0.005)
    assert report.relative_errors[0] > report.relative_errors[1] > report.relative_errors[5]
    assert (report.num_train_frames, report.num_held_out_frames) == (62_260, 3_276)


def test_a_random_start_stalls_on_clustered_frames_and_says_so(caplog):
    train, _ = card_frames(clustered_frames, -0.229808, -41195.49)
    config = FitConfig(bytes_per_frame=2, phase1_steps=60, phase2_steps=0, start="random", keep_current=False)
    with caplog.at_level(logging.WARNING):
        quantizer, report = fit(train[:20_000], config)
    assert min(report.index_entropy_losses) > 0.25
    assert f"codebook 0 of quantizer {quantizer.id} has stalled" in caplog.text and "start kmeans" in caplog.text


def test_no_warning_of_codebooks_that_use_their_entries(caplog):
    with caplog.at_level(logging.WARNING):
        fit(small_frames(), SMALL_FIT)
    assert caplog.text == ""


def test_index_entropy_of_even_one_and_two_entries():
    codes = torch.stack([torch.arange(16), torch.full((16,), 3), torch.arange(16) % 4], dim=1)
    assert index_entropy_losses(codes, 16).tolist() == pytest.approx([0, 1, 0.5], abs=1e-6)


def test_a_stalled_codebook_is_named_with_what_it_uses(caplog):
    frames = torch.tensor([[0.0], [1.0]]).repeat(50, 1)
    quantizer = Quantizer(1, 1, 16)
    with torch.no_grad():
        quantizer.centers.copy_(torch.arange(16.0).view(1, 16, 1))
    with caplog.at_level(logging.WARNING):
        report = measure(quantizer, frames, 7)
    assert report.index_entropy_losses == pytest.approx([0.75]) and report.num_train_frames == 7
    assert "uses its 16 entries as if it had 2 (index-entropy loss 0.750" in caplog.text


def test_conversion_keeps_decoding_and_argmax():
    torch.manual_seed(0)
    small = Quantizer(6, 4, 16)
    with torch.no_grad():
        small.centers.normal_()
        small.logits_scale.fill_(0.03)
        small.centers_scale.fill_(-0.02)
    merged = merge_codebooks(small)
    frames = torch.randn(100, 6)
    codes = torch.randint(16, (100, 4))
    pairs = 16 * codes[:, 0::2] + codes[:, 1::2]
    torch.testing.assert_close(merged.decode(pairs), small.decode(codes), rtol=0, atol=1e-6)
    start = small.search(frames, 0)
    assert merged.search(frames, 0).equal(16 * start[:, 0::2] + start[:, 1::2])
    assert merged.id != small.id and (merged.num_codebooks, merged.codebook_size) == (2, 256)
    torch.testing.assert_close(merged.data_mean(), small.data_mean())
    with pytest.raises(QuantizerError, match="codebook_size must be .* got 65536"):
        merge_codebooks(merged)


def test_undoing_centre_and_scale_is_exact():
    torch.manual_seed(0)
    inside = Quantizer(6, 2, 16)
    with torch.no_grad():
        inside.centers.normal_()
        inside.logits_scale.fill_(0.1)
        inside.centers_scale.fill_(0.05)
    mean, scale = torch.randn(6), torch.tensor(3.7)
    frames = torch.randn(200, 6)
    outside = unscaled(inside, mean, scale)
    moved = frames * scale + mean
    torch.testing.assert_close(outside.logits(moved), inside.logits(frames), atol=1e-4, rtol=1e-4)
    assert (outside.search(moved) == inside.search(frames)).all(dim=-1).float().mean() > 0.99
    torch.testing.assert_close(
        outside.decode(inside.search(frames)), inside.decode(inside.search(frames)) * scale + mean
    )


def test_the_same_codes_for_frames_of_another_scale_and_offset():
    frames = small_frames()
    quantizer, report = fit(frames, SMALL_FIT)
    tiny, tiny_report = fit(frames * 1e-3 + 1, SMALL_FIT)
    assert tiny_report.relative_errors == pytest.approx(report.relative_errors, abs=0.02)
    assert tiny.data_mean().mean().item() == pytest.approx(1, abs=0.05)


def test_gradients_of_each_term_reach_their_own_weights():
    torch.manual_seed(0)
    quantizer = Quantizer(6, 2, 16)
    frames = torch.randn(50, 6)
    terms = training_terms(quantizer, frames, quantizer.search(frames, 1))
    logits = {"to_logits.weight", "to_logits.bias", "logits_scale"}
    expected = {"reconstruction": {"centers", "centers_scale"}, "log_prob": logits, "entropy": logits}
    for name, term in terms.items():
        quantizer.zero_grad()
        term.backward(retain_graph=True)
        assert {key for key, weight in quantizer.named_parameters() if weight.grad is not None} == expected[name]


def test_terms_equal_plain_loops():
    torch.manual_seed(0)
    quantizer = Quantizer(3, 2, 4)
    frames, codes = torch.randn(5, 3), torch.randint(4, (5, 2))
    probabilities = quantizer.logits(frames).softmax(dim=-1).detach()
    log_prob = sum(math.log(probabilities[f, n, codes[f, n]]) for f in range(5) for n in range(2)) / 10
    entropy = 0.0
    for book in range(2):
        means = [sum(probabilities[f, book, k].item() for f in range(5)) / 5 for k in range(4)]
        entropy -= sum(p * math.log(p) for p in means) / 2
    terms = training_terms(quantizer, frames, codes)
    assert terms["log_prob"].item() == pytest.approx(-log_prob, rel=1e-5)
    assert terms["entropy"].item() == pytest.approx(1 - entropy / math.log(4), rel=1e-4)
    mean = sum(quantizer.centers[book].mean(dim=0) for book in range(2))
    error = (quantizer.centers[0, codes[:, 0]] + quantizer.centers[1, codes[:, 1]] - frames).square().sum()
    torch.testing.assert_close(terms["reconstruction"], error / (frames - mean).square().sum())


def test_scales_move_slowly_from_their_start():
    torch.manual_seed(0)
    quantizer = Quantizer(6, 2, 16)
    frames = torch.randn(50, 6)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.005, betas=(0.9, 0.98), eps=1e-9, weight_decay=1e-6)
    sum(training_terms(quantizer, frames, quantizer.search(frames, 1)).values()).backward()
    optimizer.step()
    for scale in (quantizer.logits_scale, quantizer.centers_scale):
        assert math.exp(-0.0501) < math.exp(10 * scale.item()) < math.exp(0.0501) and scale != 0


def test_the_learning_rate_halves_each_quarter():
    rates = [learning_rate(step, 10_000, 0.005) for step in (0, 2499, 2500, 5000, 7500, 10_000)]
    assert rates == pytest.approx([0.005, 0.005, 0.0025, 0.00125, 0.000625, 0.0003125], rel=1e-12)


def test_kmeans_is_as_good_as_that_of_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster")
    frames = small_frames(3000, 4)
    ours = kmeans(frames, 16, torch.Generator().manual_seed(0))
    error = torch.cdist(frames, ours).min(dim=1).values.square().sum().item()
    theirs = cluster.KMeans(16, n_init=1, random_state=0).fit(frames.numpy()).inertia_
    assert error < 1.05 * theirs


def test_residual_kmeans_takes_what_the_stages_before_left_and_starts_the_search_near_it():
    frames = small_frames(3000, 4) - 5
    centers = residual_kmeans(frames, 2, 16, torch.Generator().manual_seed(0))
    first = torch.cdist(frames, centers[0]).argmin(dim=1)
    second = torch.cdist(frames - centers[0, first], centers[1]).argmin(dim=1)
    stages = [frames, frames - centers[0, first], frames - centers[0, first] - centers[1, second]]
    errors = [rest.square().sum().item() for rest in stages]
    assert errors[2] < 0.6 * errors[1] < 0.36 * errors[0]
    quantizer = Quantizer(4, 2, 16)
    start_at(quantizer, centers, frames)
    by_argmax = (quantizer.decode(quantizer.search(frames, 0)) - frames).square().sum().item()
    searched = (quantizer.decode(quantizer.search(frames)) - frames).square().sum().item()
    assert searched <= errors[2] * 1.02 and by_argmax < 0.6 * errors[0]


def test_frames_that_are_all_alike_need_no_search():
    quantizer, report = fit(torch.full((400, 3), 2.5), SMALL_FIT)
    torch.testing.assert_close(quantizer.decode(quantizer.encode(torch.full((2, 3), 2.5))), torch.full((2, 3), 2.5))


def test_a_fit_repeats_itself_and_leaves_the_random_numbers_of_the_caller_alone():
    torch.manual_seed(9)
    expected = torch.randn(2)
    torch.manual_seed(9)
    first, report = fit(small_frames(), SMALL_FIT)
    assert torch.randn(2).equal(expected) and not first.training
    second, _ = fit(small_frames(), SMALL_FIT)
    assert first.id == second.id and first.centers.equal(second.centers)
    other, _ = fit(small_frames(), FitConfig(**{**vars(SMALL_FIT), "seed": 1}))
    assert other.id != first.id
    assert (report.num_train_frames, report.num_held_out_frames) == (1900, 100)


def test_frames_in_float16_and_autocast_change_little():
    _, report = fit(small_frames(), SMALL_FIT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, half = fit(small_frames().half(), SMALL_FIT)
    assert half.relative_errors[1:] == pytest.approx(report.relative_errors[1:], abs=0.02)


def test_frames_that_cannot_be_fitted_are_refused():
    with pytest.raises(QuantizerError, match="260 frames, of which 13 are held out, are fewer than the 256 entries"):
        fit(torch.randn(260, 4))
    with pytest.raises(QuantizerError, match=r"frames are \(2, 300, 4\); give those of all utterances in one"):
        fit(torch.randn(2, 300, 4))
    frames = torch.randn(400, 4)
    frames[123, 1] = math.nan
    with pytest.raises(QuantizerError, match="1 of 400 frames hold NaN or infinity, the first is frame 123"):
        fit(frames)
    with pytest.raises(ValueError, match="bytes_per_frame must be a power of two, got 6; take 8 or 16"):
        FitConfig(bytes_per_frame=6)
    with pytest.raises(ValueError, match="phase2_steps=-1"):
        FitConfig(phase2_steps=-1)
