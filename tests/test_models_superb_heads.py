import math

import pytest
import torch
import torch.nn.functional as F

from speechkd.models.ctc_head import ctc_greedy, ctc_loss, encode_symbols
from speechkd.models.superb_heads import (
    TDNN_LOST_FRAMES,
    CharacterHead,
    LayerSum,
    PhoneHead,
    SpeakerHead,
    UtteranceHead,
    am_softmax_loss,
)
from speechkd.models.understanding import understanding_loss

LAYERS, WIDTH = 3, 16
HEADS = {
    "utterance": lambda seed=0: UtteranceHead(LAYERS, WIDTH, [4, 2], seed=seed, hidden_size=8),
    "phone": lambda seed=0: PhoneHead(LAYERS, WIDTH, 5, seed=seed, hidden_size=8),
    "character": lambda seed=0: CharacterHead(LAYERS, WIDTH, 5, seed=seed, hidden_size=8),
    "speaker": lambda seed=0: SpeakerHead(LAYERS, WIDTH, 6, seed=seed, hidden_size=8, pooled_size=12),
}
every_head = pytest.mark.parametrize("make_head", HEADS.values(), ids=HEADS)


def make_states(num_frames=(20, 16), padded_to=None, seed=0):
    """States (batch, layers, frames, width), with large values on padding, and the mask."""
    generator = torch.Generator().manual_seed(seed)
    longest = padded_to or max(num_frames)
    mask = torch.arange(longest) < torch.tensor(num_frames)[:, None]
    states = torch.full((len(num_frames), LAYERS, longest, WIDTH), 1e3)
    for clip, length in enumerate(num_frames):
        states[clip, :, :length] = torch.randn(LAYERS, length, WIDTH, generator=generator)
    return states, mask


def outputs(head, states, mask):
    """All numbers that a head gives for real frames of each clip, in one tensor."""
    result = head(states, mask)
    if isinstance(result, list):
        return torch.cat(result, dim=-1)
    return result[0][mask] if isinstance(result, tuple) else result


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_layer_sum_begins_as_the_mean_of_the_states():
    states = torch.randn(2, 13, 5, 4, generator=torch.Generator().manual_seed(0))
    layers = LayerSum(13)
    torch.testing.assert_close(layers.weights, torch.full((13,), 1 / 13))
    torch.testing.assert_close(layers(states, torch.ones(2, 5, dtype=torch.bool)), states.mean(dim=1))


def test_layer_sum_weighs_by_softmax_and_learns_its_logits():
    states, mask = make_states()
    layers = LayerSum(LAYERS)
    with torch.no_grad():
        layers.logits.copy_(torch.tensor([0.0, 1.0, -2.0]))
    scale = 1 + math.e + math.exp(-2)
    expected = (states[:, 0] + math.e * states[:, 1] + math.exp(-2) * states[:, 2]) / scale
    summed = layers(states, mask)
    torch.testing.assert_close(summed[mask], expected[mask])
    assert (summed[~mask] == 0).all()
    summed.sum().backward()
    assert (layers.logits.grad != 0).all()


def test_layer_sum_of_half_precision_states_is_float32():
    states, mask = make_states()
    summed = LayerSum(LAYERS)(states.bfloat16(), mask)
    assert summed.dtype == torch.float32
    torch.testing.assert_close(summed, LayerSum(LAYERS)(states.bfloat16().float(), mask))


@every_head
def test_padding_and_company_change_nothing(make_head):
    head = make_head().eval()
    states, mask = make_states()
    together = head(states, mask)
    padded = outputs(head, *make_states(padded_to=31))
    torch.testing.assert_close(padded, outputs(head, states, mask))
    alone = [head(states[[clip], :, :length], mask[[clip], :length]) for clip, length in enumerate((20, 16))]
    for clip, single in enumerate(alone):
        if isinstance(together, tuple):
            length = int(mask[clip].sum())
            torch.testing.assert_close(together[0][clip, :length], single[0][0])
        else:
            for both, one in zip(*(out if isinstance(out, list) else [out] for out in (together, single)), strict=True):
                torch.testing.assert_close(both[clip], one[0])


@every_head
def test_equal_seeds_give_equal_heads_and_leave_the_global_generator_alone(make_head):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first, again, other = (make_head(seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


@every_head
def test_every_parameter_learns(make_head):
    head = make_head()
    values = outputs(head, *make_states())
    (values * torch.randn(values.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in head.parameters())


def test_sizes_are_those_of_the_toolkit():
    with torch.device("meta"):  # counted without memory or time
        utterance = UtteranceHead(13, 768, [12], seed=0)
        intents = UtteranceHead(13, 768, [6, 14, 4], seed=0)
        phones = PhoneHead(13, 768, 73, seed=0)
        characters = CharacterHead(13, 768, 31, seed=0)
        speakers = SpeakerHead(13, 768, 1211, seed=0)
    linear = 768 * 256 + 256
    assert count(utterance) == 13 + linear + 257 * 12
    assert count(intents) == 13 + linear + 257 * (6 + 14 + 4)
    assert count(phones) == 13 + linear + 257 * 74
    lstm = sum(2 * (4 * 1024 * (size + 1024) + 2 * 4 * 1024) for size in (1024, 2048))
    assert count(characters) == 13 + 769 * 1024 + lstm + 2049 * 32
    network = (5 + 3 + 3 + 1) * 512 * 512 + 4 * 512 + 512 * 1500 + 1500
    assert count(speakers) == 13 + 769 * 512 + network + 3001 * 512 + 513 * 512 + 1211 * 512


def test_utterance_head_is_linear_before_and_after_the_mean():
    head = HEADS["utterance"]()
    states, mask = make_states()
    for clip, length in enumerate((20, 16)):
        mean = states[clip, :, :length].mean(dim=(0, 1))
        embedding = mean @ head.projection.weight.T + head.projection.bias
        torch.testing.assert_close(head.embed(states, mask)[clip], embedding)
        for scores, layer in zip(head(states, mask), head.heads, strict=True):
            torch.testing.assert_close(scores[clip], layer(embedding))


def test_utterance_head_learns_labels_from_one_layer_and_finds_it():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (64,), generator=generator)
    states = torch.randn(64, LAYERS, 5, WIDTH, generator=generator)
    states[:, 1] += 2 * F.one_hot(labels, WIDTH)[:, None]
    mask = torch.ones(64, 5, dtype=torch.bool)
    head = UtteranceHead(LAYERS, WIDTH, [4], seed=0, hidden_size=8)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-2)
    for _ in range(60):
        optimizer.zero_grad()
        (understanding_loss(head(states, mask), labels[:, None]) / 64).backward()
        optimizer.step()
    assert (head(states, mask)[0].argmax(dim=-1) == labels).float().mean() > 0.95
    assert head.layers.weights.argmax() == 1


@pytest.mark.parametrize("head_class", [PhoneHead, CharacterHead])
def test_ctc_heads_learn_strings(head_class):
    alphabet, texts = list("abcde"), [list("abb"), list("ea")]
    states, mask = make_states((8, 6))
    for clip, text in enumerate(texts):
        for position, symbol in enumerate(text):
            states[clip, :, 2 * position + 1, alphabet.index(symbol)] += 5
    head = head_class(LAYERS, WIDTH, 5, seed=0, hidden_size=16).eval()  # no dropout: two clips are learnt by heart
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-2)
    for _ in range(40):
        optimizer.zero_grad()
        logits, num_frames = head(states, mask)
        ctc_loss(logits, num_frames, encode_symbols(texts, alphabet)).backward()
        optimizer.step()
    logits, num_frames = head(states, mask)
    assert num_frames.tolist() == [8, 6]
    assert logits.shape == (2, 8, 6)
    assert ctc_greedy(logits, num_frames, alphabet) == texts


def test_character_head_drops_out_in_training_alone():
    head, (states, mask) = HEADS["character"](), make_states()
    assert not torch.equal(head(states, mask)[0], head(states, mask)[0])
    head.eval()
    assert torch.equal(head(states, mask)[0], head(states, mask)[0])


def test_speaker_embedding_equals_its_definition():
    head, (states, mask) = HEADS["speaker"](), make_states()
    for clip, length in enumerate((20, 16)):
        frames = head.projection(states[clip, :, :length].mean(dim=0))
        for layer, (context, step) in zip(head.network, ((5, 1), (3, 2), (3, 3), (1, 1), (1, 1)), strict=True):
            weight = layer.weight.permute(0, 2, 1).flatten(1)
            windows = [
                frames[t : t + (context - 1) * step + 1 : step].flatten()
                for t in range(len(frames) - (context - 1) * step)
            ]
            frames = (torch.stack(windows) @ weight.T + layer.bias).relu()
        assert len(frames) == length - TDNN_LOST_FRAMES
        pooled = torch.cat([frames.mean(dim=0), frames.var(dim=0, correction=0).clamp_min(1e-10).sqrt()])
        expected = head.embedding(pooled).relu()
        torch.testing.assert_close(head.embed(states, mask)[clip], expected)
        vector = head.last(expected).relu()
        cosines = F.cosine_similarity(vector[None], head.speakers)
        torch.testing.assert_close(head(states, mask)[clip], cosines)


def test_short_clip_is_repeated_for_the_speaker_head():
    head = HEADS["speaker"]()
    states, mask = make_states((4, 3))
    repeated = states[:, :, torch.arange(15) % 4][:1]
    torch.testing.assert_close(head.embed(states, mask)[:1], head.embed(repeated, torch.ones(1, 15, dtype=torch.bool)))
    long_states, long_mask = make_states((20, 3))
    long_states[1, :, :3] = states[1, :, :3]
    torch.testing.assert_close(head.embed(long_states, long_mask)[1], head.embed(states, mask)[1])


def test_gradient_of_a_clip_with_one_output_is_finite():
    head = HEADS["speaker"]()
    states, mask = make_states((15, 15))
    am_softmax_loss(head(states, mask), torch.tensor([0, 1])).backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


def test_speaker_head_learns_speakers():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 3
    states = torch.randn(24, LAYERS, 16, WIDTH, generator=generator) + 2 * F.one_hot(labels, WIDTH)[:, None, None]
    mask = torch.ones(24, 16, dtype=torch.bool)
    head = SpeakerHead(LAYERS, WIDTH, 3, seed=0, hidden_size=16, pooled_size=24)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        (am_softmax_loss(head(states, mask), labels) / 24).backward()
        optimizer.step()
    assert (head(states, mask).argmax(dim=-1) == labels).all()
    vectors = F.normalize(head.embed(states, mask), dim=-1)
    same = (labels[:, None] == labels) & ~torch.eye(24, dtype=torch.bool)
    cosines = vectors @ vectors.T
    assert cosines[same].mean() > cosines[labels[:, None] != labels].mean() + 0.3


@pytest.mark.parametrize(("cosines", "expected"), [((0.8, 0.1, -0.2), 1.2337e-4), ((0.5, 0.4, -0.2), 9.000123)])
def test_worked_examples_of_the_margin(cosines, expected):
    loss = am_softmax_loss(torch.tensor([cosines]), torch.tensor([0]))
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=2e-7)


def test_margin_loss_is_a_sum_and_without_margin_the_cross_entropy():
    cosines = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    targets = torch.tensor([0, 3, 1, 2, 2])
    loss = am_softmax_loss(cosines, targets)
    single = [am_softmax_loss(cosines[[clip]], targets[[clip]]) for clip in range(5)]
    torch.testing.assert_close(loss, torch.stack(single).sum())
    plain = am_softmax_loss(cosines, targets, scale=7.0, margin=0.0)
    torch.testing.assert_close(plain, F.cross_entropy(7 * cosines, targets, reduction="sum"))
    assert am_softmax_loss(cosines.bfloat16(), targets).dtype == torch.float32


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0]), r"cosines \(2, 3\) and targets \(1,\) of torch.int64 do not fit"),
        (torch.tensor([0.0, 1.0]), "targets .* of torch.float32 do not fit"),
        (torch.tensor([0, 3]), "clip 1 has speaker 3, and the head knows 0 to 2"),
        (torch.tensor([-1, 0]), "clip 0 has speaker -1"),
    ],
)
def test_targets_that_are_no_speakers_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        am_softmax_loss(torch.zeros(2, 3), targets)


@every_head
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda states, mask: (states[:, :2], mask),
            r"states are \(2, 2, 20, 16\) .* a head of 3 layers needs \(batch, 3",
        ),
        (lambda states, mask: (states[:, 0], mask), r"states are \(2, 20, 16\)"),
        (lambda states, mask: (states.long(), mask), "of torch.int64; a head of 3 layers"),
        (lambda states, mask: (states[:, :, :0], mask[:, :0]), r"states are \(2, 3, 0, 16\)"),
        (lambda states, mask: (states, mask[:, :5]), r"mask is \(2, 5\) of torch.bool; states .* need \(2, 20\)"),
        (lambda states, mask: (states, mask.long()), "mask is .* of torch.int64"),
        (
            lambda states, mask: (states, mask.flip(1)),
            "clip 1 of the batch has 16 real frames that do not stand at its",
        ),
        (
            lambda states, mask: (states, mask & torch.tensor([[True], [False]])),
            "clip 1 of the batch has 0 real frames",
        ),
    ],
)
def test_states_and_masks_that_do_not_fit_are_refused(make_head, change, message):
    with pytest.raises(ValueError, match=message):
        make_head()(*change(*make_states()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerSum(0), "one layer or more, got num_layers=0"),
        (lambda: UtteranceHead(3, 8, [], seed=0), r"one class or more for each label, got num_classes=\[\]"),
        (lambda: UtteranceHead(3, 8, [2, 0], seed=0), r"got num_classes=\[2, 0\]"),
        (lambda: PhoneHead(3, 8, 0, seed=0), "one symbol or more, got num_symbols=0"),
        (lambda: CharacterHead(3, 8, 0, seed=0), "one symbol or more, got num_symbols=0"),
        (lambda: SpeakerHead(3, 8, 1, seed=0), "two or more to learn from, got num_speakers=1"),
    ],
)
def test_heads_of_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
