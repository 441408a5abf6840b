"""Recognisers of torchaudio's parts: lengths, padding, losses against plain loops, overfitting, decoding, files."""

import itertools
import json
import math

import pytest
import torch
from recipe_runs import write_clips

from speechkd.data.augment import SpecAugmentConfig, spec_augment
from speechkd.data.manifest import read_manifest
from speechkd.labels.teacher_cache import LabelStoreError
from speechkd.models.recognizer import (
    BUDGETS,
    DistilledRecognizer,
    RecognizerConfig,
    RecognizerInputs,
    RecognizerModel,
)
from speechkd.models.recognizer_decoding import RecognitionConfig, Recognizer, transcribe_manifest
from speechkd.models.recognizer_tokens import Tokens
from speechkd.models.transducer import Joiner, Predictor, transducer_loss

KINDS = list(itertools.product(("conformer", "emformer"), ("ctc", "transducer")))
every_kind = pytest.mark.parametrize(("encoder", "head"), KINDS)
LENGTHS = torch.tensor([20_000, 9_000, 13_001, 400, 720])


def make_model(encoder="conformer", head="ctc", num_symbols=10, **changes):
    torch.manual_seed(0)
    sizes = {"width": 16, "num_layers": 3, "num_heads": 2, "ffn_width": 32, "kernel_size": 5, "joint_width": 16}
    contexts = {"segment_frames": 4, "left_context_frames": 8, "right_context_frames": 2}
    config = RecognizerConfig(
        num_symbols=num_symbols, encoder=encoder, head=head, **{**sizes, **contexts, "dropout": 0.0, **changes}
    )
    return RecognizerModel(config)


def make_clips(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    return 0.1 * torch.randn(len(lengths), int(lengths.max()), generator=generator)


def targets_of(*strings):
    return [torch.tensor(string, dtype=torch.int64) for string in strings]


# lengths and padding


@every_kind
@pytest.mark.parametrize("subsampling", [2, 4])
def test_padding_changes_no_state_loss_or_gradient(encoder, head, subsampling):
    model, inputs = make_model(encoder, head, subsampling=subsampling).train(), RecognizerInputs()
    waveforms, targets = make_clips(), targets_of([1, 2, 3], [5], [9, 10], [1], [4])
    states, num_frames = model(*inputs(waveforms, LENGTHS))
    assert num_frames.tolist() == model.config.num_frames(LENGTHS).tolist()
    model.loss(states[-1], num_frames, targets).backward()
    together = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    for row, length in enumerate(LENGTHS.tolist()):
        alone, frames = model(*inputs(waveforms[row : row + 1, :length], LENGTHS[row : row + 1]))
        assert frames.tolist() == [num_frames[row]]
        for one, all_of_them in zip(alone, states, strict=True):
            torch.testing.assert_close(one[0], all_of_them[row, : frames[0]], rtol=1e-4, atol=1e-5)
        model.loss(alone[-1], frames, targets[row : row + 1]).backward()
    for name, weight in model.named_parameters():
        if name in together:
            torch.testing.assert_close(weight.grad, together[name], rtol=1e-3, atol=1e-3)
    waveforms[1, 9_000:] = 1e4  # nobody hears it
    again, _ = model(*inputs(waveforms, LENGTHS))
    torch.testing.assert_close(again[-1], states[-1])


def test_states_have_the_rate_of_the_configuration():
    for subsampling, rate in ((4, 25.0), (2, 50.0)):
        config = make_model(subsampling=subsampling).config
        assert config.frame_rate_hz == rate
        seconds = 400.0
        assert int(config.num_frames(torch.tensor([round(16_000 * seconds)]))) == pytest.approx(rate * seconds, abs=1)
    assert make_model().config.num_frames(torch.tensor([399, 400, 1039, 1040])).tolist() == [0, 1, 1, 2]


def test_an_emformer_hears_no_more_than_its_right_context():
    model, inputs = make_model("emformer").eval(), RecognizerInputs()
    waveforms, length = make_clips(torch.tensor([32_000])), torch.tensor([32_000])
    states, _ = model(*inputs(waveforms, length))
    changed = waveforms.clone()
    changed[:, 24_000:] = 0.5  # 1.5 s: the frames of a segment that ends 6 frames before it cannot know
    later, _ = model(*inputs(changed, length))
    heard = (states[-1] - later[-1]).abs().amax(dim=-1)[0] > 1e-6
    assert not heard[:28].any() and heard[37:].all()


def test_clips_without_a_frame_are_refused():
    model, inputs = make_model(), RecognizerInputs()
    with pytest.raises(ValueError, match=r"clips of \[1, 0\] feature frames.*leave shorter ones out"):
        model(*inputs(torch.zeros(2, 500), torch.tensor([500, 399])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "lstm"}, "conformer or emformer"),
        ({"head": "attention"}, "ctc or transducer"),
        ({"subsampling": 3}, "subsampling must be 2 or 4, got 3"),
        ({"num_heads": 3}, "width=16 must be a multiple of num_heads=3"),
        ({"kernel_size": 4}, "kernel_size=4 odd"),
        ({"num_layers": 0}, "num_layers must be 1 or more, got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_model(**changes)


def test_budgets_are_as_large_as_the_zipformers_of_their_names():
    sizes = {}
    for name in BUDGETS:
        with torch.device("meta"):
            sizes[name] = RecognizerModel(RecognizerConfig(num_symbols=500, **BUDGETS[name])).num_parameters() / 1e6
    assert sizes["tiny"] < 3 and 21 < sizes["small"] < 25 and 62 < sizes["medium"] < 68
    assert (BUDGETS["paper"]["num_layers"], BUDGETS["paper"]["width"]) == (12, 512)


# the transducer


def all_paths_loss(logits, classes, blank):
    """-log of the summed probability of all ways through the lattice, one by one."""
    log_probs = logits.log_softmax(dim=-1)
    frames, symbols = logits.shape[0], len(classes)
    total = []
    for emitted in itertools.combinations_with_replacement(range(frames), symbols):  # the frame of each symbol
        score, said = 0.0, 0
        for frame in range(frames):
            while said < symbols and emitted[said] == frame:
                score = score + log_probs[frame, said, classes[said]]
                said += 1
            score = score + log_probs[frame, said, blank]
        total.append(score)
    return -torch.stack(total).logsumexp(dim=0)


def test_the_transducers_loss_is_that_of_all_its_paths():
    torch.manual_seed(0)
    predictor, joiner, source = Predictor(6, 8), Joiner(8, 6), torch.randn(2, 4, 8, requires_grad=True)
    num_frames, targets = torch.tensor([4, 3]), targets_of([1, 3, 3], [5])
    loss = transducer_loss(predictor, joiner, source, num_frames, targets)
    expected = 0.0
    for row, target in enumerate(targets):
        classes = (target - 1).tolist()
        said = predictor(torch.tensor([[5, *classes]]), torch.tensor([len(classes) + 1]), None)[0]
        logits = torch.stack([joiner.output(torch.tanh(frame + said[0])) for frame in source[row, : num_frames[row]]])
        expected = expected + all_paths_loss(logits, classes, blank=5)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(one, source)[0] for one in (loss, expected)), rtol=1e-3, atol=1e-5)


def test_a_predictor_goes_on_where_its_state_stands():
    torch.manual_seed(0)
    predictor, classes = Predictor(6, 8), torch.tensor([[5, 1, 2, 2, 0], [5, 0, 4, 1, 3]])
    whole, _, _ = predictor(classes, torch.tensor([5, 5]), None)
    first, _, state = predictor(classes[:, :2], torch.tensor([2, 2]), None)
    rest, _, _ = predictor(classes[:, 2:], torch.tensor([3, 3]), state)
    torch.testing.assert_close(torch.cat([first, rest], dim=1), whole)
    changed = classes.clone()
    changed[:, 1] = 3  # it sees the last two symbols alone
    assert predictor(changed, torch.tensor([5, 5]), None)[0][:, 3:].equal(whole[:, 3:])


def test_targets_that_do_not_fit_are_refused():
    model = make_model(head="transducer")
    states, num_frames = torch.randn(2, 4, 16), torch.tensor([4, 4])
    with pytest.raises(ValueError, match=r"target 1 is \[\]; it must hold one symbol or more"):
        model.loss(states, num_frames, targets_of([1], []))
    with pytest.raises(ValueError, match=r"target 0 is \[11\].*numbers 1 to 10"):
        model.loss(states, num_frames, targets_of([11], [1]))
    with pytest.raises(ValueError, match="1 targets do not fit"):
        model.loss(states, num_frames, targets_of([1]))
    with pytest.raises(ValueError, match="clip 0 has 4 frames, and its 5 symbols need 5"):
        make_model().loss(states, num_frames, targets_of([1, 2, 3, 4, 5], [1]))


@every_kind
def test_half_precision_keeps_the_loss_in_float32(encoder, head):
    model, inputs = make_model(encoder, head).eval(), RecognizerInputs()
    targets = targets_of([1, 2, 3], [5], [9, 10], [1], [4])
    losses = []
    for on in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            states, num_frames = model(*inputs(make_clips(), LENGTHS))
            losses.append(model.loss(states[-1], num_frames, targets))
    assert losses[1].dtype == torch.float32 and losses[1].item() == pytest.approx(losses[0].item(), rel=0.02)


# learning, decoding, files


TEXTS = ["one two", "two", "three one"]
TONES = {"one": 400.0, "two": 900.0, "three": 1800.0}


def spoken(texts=TEXTS):
    """Words as tones of 0.4 s, 0.2 s apart."""
    clips = []
    for text in texts:
        parts = []
        for word in text.split():
            time = torch.arange(6_400) / 16_000
            parts += [0.3 * torch.sin(2 * math.pi * TONES[word] * time), torch.zeros(3_200)]
        clips.append(torch.cat(parts))
    num_samples = torch.tensor([len(clip) for clip in clips])
    return torch.nn.utils.rnn.pad_sequence(clips, batch_first=True), num_samples


def trained(encoder, head, num_steps=200):
    tokens = Tokens.characters(TEXTS)
    model, inputs = make_model(encoder, head, len(tokens), width=48, joint_width=64), RecognizerInputs()
    waveforms, num_samples = spoken()
    features, num_frames = inputs(waveforms, num_samples)
    targets = [tokens.encode(text) for text in TEXTS]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1.0, (step + 1) / 20, (num_steps - step) / 50)
        states, frames = model(features, num_frames)
        loss = model.loss(states[-1], frames, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    return Recognizer(model, tokens)


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def learnt(request):
    return trained(*request.param)


@pytest.fixture(scope="module")
def learnt_ctc():
    return trained("conformer", "ctc")


def test_a_handful_of_clips_is_learnt_to_the_letter_and_read_one_by_one_as_together(learnt):
    waveforms, num_samples = spoken()
    assert learnt.transcribe(waveforms, num_samples) == TEXTS
    for row, length in enumerate(num_samples.tolist()):
        assert learnt.transcribe(waveforms[row : row + 1, :length], num_samples[row : row + 1]) == TEXTS[row : row + 1]


def test_beam_search_reads_what_was_learnt(learnt):
    if learnt.model.config.head == "ctc":
        pytest.importorskip("flashlight.lib.text", reason="flashlight-text is not installed")
    waveforms, num_samples = spoken()
    for beam_size in (1, 4, 50):
        config = RecognitionConfig(method="beam", beam_size=beam_size)
        assert learnt.transcribe(waveforms, num_samples, config) == TEXTS


def test_a_beam_of_ctc_finds_the_string_whose_alignments_are_likeliest_together():
    pytest.importorskip("flashlight.lib.text", reason="flashlight-text is not installed")
    recognizer = Recognizer(make_model(num_symbols=2), Tokens.characters(["ab"]))
    # two frames: the blank is likeliest in each, but "a" has three alignments
    scores = torch.tensor([[0.4, 0.35, 0.25], [0.4, 0.35, 0.25]]).log()
    recognizer.model.ctc_logits = lambda states: scores[None]
    assert recognizer._greedy_ctc(torch.zeros(1, 2, 1), torch.tensor([2])) == [[]]
    assert recognizer._beam_ctc(torch.zeros(1, 2, 1), torch.tensor([2]), 10) == [[1]]
    paths = {}
    for path in itertools.product(range(3), repeat=2):
        text = tuple(n for n, _ in itertools.groupby(path) if n)
        paths[text] = paths.get(text, 0) + math.exp(sum(scores[t, n].item() for t, n in enumerate(path)))
    assert max(paths, key=paths.get) == (1,)


def test_a_beam_without_its_package_says_what_would_do(learnt_ctc, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchaudio.models.decoder", None)
    with pytest.raises(ValueError, match="needs flashlight-text .*install speechkd\\[beam\\], or decode greedily"):
        learnt_ctc.transcribe(*spoken(), RecognitionConfig(method="beam"))


def test_a_saved_recognizer_is_read_back_and_hears_the_same(learnt, tmp_path):
    learnt.model.save_pretrained(tmp_path)
    learnt.tokens.save(tmp_path)
    again = Recognizer.from_pretrained(tmp_path)
    assert all(weight.equal(again.model.state_dict()[name]) for name, weight in learnt.model.state_dict().items())
    assert again.transcribe(*spoken()) == TEXTS
    (tmp_path / "tokens.json").unlink()
    with pytest.raises(ValueError, match="has no tokens.json; give the folder of a recogniser"):
        Recognizer.from_pretrained(tmp_path)


def test_a_head_is_no_part_of_the_recognizer(tmp_path):
    recognizer = make_model()
    student = DistilledRecognizer(recognizer, torch.nn.Linear(16, 8))
    assert student.num_parameters() - recognizer.num_parameters() == 16 * 8 + 8
    assert not any(name.startswith("head") for name in recognizer.state_dict())
    features, num_frames = RecognizerInputs()(make_clips(), LENGTHS)
    assert student(features, num_frames)[0][-1].equal(recognizer(features, num_frames)[0][-1])


def test_a_manifest_is_transcribed_once_and_by_one_recognizer(learnt_ctc, tmp_path):
    learnt_ctc.model.save_pretrained(tmp_path / "student")
    learnt_ctc.tokens.save(tmp_path / "student")
    manifest = read_manifest(write_clips(tmp_path, [8_000, 16_000, 300, 24_000, 12_000]))
    config = RecognitionConfig(batch_size=2)
    store = transcribe_manifest(tmp_path / "student", manifest, tmp_path / "decoded", config)
    rows = {row["id"]: row for row in store.rows()}
    assert set(rows) == set(manifest.ids) and rows["clips-2"]["text"] == ""  # no frame, nothing said
    assert all(row["compute_seconds"] > 0 for row in rows.values())
    again = transcribe_manifest(tmp_path / "student", manifest, tmp_path / "decoded", config)
    assert len(list(again.rows())) == 5
    with torch.no_grad():
        learnt_ctc.model.output.bias += 1
    learnt_ctc.model.save_pretrained(tmp_path / "other")
    learnt_ctc.tokens.save(tmp_path / "other")
    with pytest.raises(LabelStoreError, match="come from teacher"):
        transcribe_manifest(tmp_path / "other", manifest, tmp_path / "decoded", config)


def test_masked_features_are_what_spec_augment_says_and_nothing_is_warped():
    features, num_frames = RecognizerInputs()(make_clips(), LENGTHS)
    config = SpecAugmentConfig(num_time_masks=1, num_frequency_masks=1)
    ids = [str(row) for row in range(len(features))]
    masked = spec_augment(features.transpose(1, 2), num_frames, ids, config, seed=0, epoch=0).transpose(1, 2)
    changed = masked != features
    assert changed.any() and masked[~changed].equal(features[~changed])
    for row, length in enumerate(num_frames.tolist()):
        assert not changed[row, length:].any()
        mean = features[row, :length].mean()
        torch.testing.assert_close(masked[row][changed[row]], mean.expand(int(changed[row].sum())))


# symbols


def test_characters_are_symbols_from_1_and_come_back(tmp_path):
    tokens = Tokens.characters(["Two, small!", "a latte"])
    assert len(tokens) == len(set("two small") | set("a latte"))
    numbers = tokens.encode("A  Tall latte.")
    assert numbers.dtype == torch.int64 and numbers.min() >= 1 and numbers.max() <= len(tokens)
    assert tokens.decode(numbers.tolist()) == "a tall latte" and len(numbers) == len("a tall latte")
    assert tokens.encode("...").tolist() == []
    tokens.save(tmp_path)
    assert Tokens.load(tmp_path).encode("tall").equal(tokens.encode("tall"))
    assert json.loads((tmp_path / "tokens.json").read_text())["normalizer"] == "basic"
    with pytest.raises(ValueError, match=r"characters \['z'\] of 'a zoo' are not among the"):
        tokens.encode("a zoo")


def test_pieces_of_words_come_back_and_are_fewer_than_characters(tmp_path):
    texts = ["the cat sat on the mat", "the dog sat on the log", "that cat and that dog"] * 3
    tokens = Tokens.bpe(texts, 30)
    assert len(tokens) <= 30
    for text in texts:
        assert tokens.decode(tokens.encode(text).tolist()) == text
    assert len(tokens.encode(texts[0])) < len(texts[0])
    tokens.save(tmp_path)
    assert Tokens.load(tmp_path).decode(tokens.encode("the dog and the cat").tolist()) == "the dog and the cat"
    with pytest.raises(ValueError, match="5 symbols for texts of 13 characters"):
        Tokens.bpe(texts, 5)
    with pytest.raises(ValueError, match="hold no character"):
        Tokens.characters(["", "..."])


def test_tokens_of_another_size_than_the_model_are_refused():
    with pytest.raises(ValueError, match="the model has 10 symbols and the tokens 2"):
        Recognizer(make_model(), Tokens.characters(["ab"]))


def test_padding_gets_no_gradient():
    model, inputs = make_model(), RecognizerInputs()
    features, num_frames = inputs(make_clips(), LENGTHS)
    features.requires_grad_(True)
    states, frames = model(features, num_frames)
    sum(state[row, : frames[row]].square().sum() for state in states for row in range(5)).backward()
    for row, length in enumerate(num_frames.tolist()):
        assert not features.grad[row, length:].any()
    assert features.grad[0].abs().max() > 0
