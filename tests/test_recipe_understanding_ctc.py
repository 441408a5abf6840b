"""recipes/segue, understanding: strings by CTC."""

import sys

import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "recipes/segue"))  # behind the others: its train.py is loaded by path

from comparison import System, compare, read_split
from frame_heads import fit_ctc, labels_of, read_strings, string_of
from understanding_orders import CPU, config, orders, weights_of, whisper_student, write_orders
from understanding_tasks import (
    read_labels,
    score_labels,
)

from speechkd.data.manifest import read_manifest
from speechkd.models.ctc_head import (
    SegueForCTC,
    ctc_alphabet,
    ctc_greedy,
    ctc_loss,
    encode_symbols,
    entities_of,
    entity_symbols,
)


def test_worked_example_of_ctc():
    logits = torch.zeros(1, 3, 2)
    loss = ctc_loss(logits, torch.tensor([3]), [torch.tensor([1])])
    assert loss.item() == pytest.approx(0.2876821, abs=5e-8)  # 6 of 8 paths spell "a"
    twice = ctc_loss(logits.repeat(2, 1, 1), torch.tensor([3, 3]), [torch.tensor([1])] * 2)
    assert twice.item() == pytest.approx(2 * 0.2876821, abs=1e-7)


def test_padded_frames_change_no_ctc_loss_and_get_no_gradient():
    logits = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    targets = [torch.tensor([1, 2]), torch.tensor([], dtype=torch.int64)]
    padded = logits.clone().requires_grad_()
    with torch.no_grad():
        padded[1, 4:] = 50.0
    loss = ctc_loss(padded, torch.tensor([6, 4]), targets)
    loss.backward()
    alone = ctc_loss(logits[:1], torch.tensor([6]), targets[:1]) - logits[1, :4].log_softmax(-1)[:, 0].sum()
    torch.testing.assert_close(loss.detach(), alone)
    assert padded.grad[1, 4:].abs().max() == 0 and padded.grad[1, :4].abs().max() > 0
    assert ctc_loss(logits.bfloat16(), torch.tensor([6, 4]), targets).dtype == torch.float32


@pytest.mark.parametrize(
    ("target", "num_frames", "message"),
    [
        ([0], 3, "target 0 holds 0; symbols have numbers 1 to 1, 0 is the blank"),
        ([2], 3, "target 0 holds 2"),
        ([1, 1], 2, "clip 0 has 2 frames, and its 2 symbols need 3"),
    ],
)
def test_strings_that_ctc_cannot_spell_are_refused(target, num_frames, message):
    with pytest.raises(ValueError, match=message):
        ctc_loss(torch.zeros(1, 3, 2), torch.tensor([num_frames]), [torch.tensor(target)])
    with pytest.raises(ValueError, match="and 2 targets do not fit"):
        ctc_loss(torch.zeros(1, 3, 2), torch.tensor([num_frames]), [torch.tensor(target)] * 2)


def test_greedy_reading_takes_repeats_together_and_drops_blanks_and_padding():
    best = torch.tensor([[1, 1, 0, 1, 2, 2], [2, 0, 0, 1, 1, 1]])
    logits = torch.nn.functional.one_hot(best, 3).float()
    assert ctc_greedy(logits, torch.tensor([6, 3]), ["a", "b"]) == [["a", "a", "b"], ["b"]]


def test_symbols_have_numbers_from_one_and_unknown_ones_are_named():
    strings = [list("cab"), ["<size>", "b"]]
    alphabet = ctc_alphabet(strings)
    assert alphabet == ["<size>", "a", "b", "c"]
    assert [target.tolist() for target in encode_symbols(strings, alphabet)] == [[4, 2, 3], [1, 3]]
    with pytest.raises(ValueError, match=r"symbols \['z'\] are not among the 4"):
        encode_symbols([["z"]], alphabet)


def test_entities_come_back_out_of_their_string():
    labels = {"date": "noon, today", "size": "large <one>"}
    symbols = entity_symbols(labels)
    assert symbols[:3] == ["<date>", "n", "o"] and entities_of(symbols) == labels
    assert entities_of(["x", "<size>", "<date>", " ", "a", "<size>", "b", "<size>", "c"]) == {
        "date": "a",
        "size": "b, c",
    }
    assert entity_symbols({}) == [] and entities_of([]) == entities_of(["a"]) == {}


@pytest.mark.parametrize(("task", "mode"), [("entities", "frozen"), ("asr", "fine_tune")])
def test_ctc_learns_strings_and_a_frozen_encoder_stays(tmp_path, task, mode):
    labels = [{"drink": "mocha"}, {"drink": "latte"}]
    manifest = read_manifest(write_orders(tmp_path, "train", labels, seconds=0.6))
    settings = config(task, modes=[mode], head_steps=120, fine_tune_steps=80, head_learning_rate=5e-2)
    settings.fine_tune_learning_rate, settings.fine_tune_batch_seconds = 1e-2, 10.0
    wanted = list(read_labels(manifest, settings).values())
    student = whisper_student(embedding_dim=16)
    before = weights_of(student)
    model, alphabet = fit_ctc(
        student, manifest, wanted, settings, mode, output_dir=tmp_path / "run", seed=0, machine=CPU
    )
    moved = {name for name, weight in model.encoder.state_dict().items() if not weight.equal(before[name])}
    assert bool(moved) == (mode == "fine_tune") and not any("projection" in name for name in moved)
    said = read_strings(model, alphabet, manifest, settings)
    assert said == wanted
    scores = score_labels(settings, wanted, said, [] if task == "asr" else ["drink"])
    assert scores["wer" if task == "asr" else "slot_f1"] == (0 if task == "asr" else 100)


def test_strings_and_labels_are_inverse():
    for task, labels in (("asr", {"text": "four two"}), ("entities", {"drink": "mocha", "size": "small"})):
        settings = config(task)
        assert labels_of(settings, string_of(settings, labels)) == labels
    with pytest.raises(ValueError, match="needs one symbol or more, got 0"):
        SegueForCTC(whisper_student(), 0, seed=0)


def test_letters_are_scored_as_words_and_entities_as_slots():
    asr, entities = config("asr"), config("entities")
    scores = score_labels(asr, [{"text": "four two"}, {"text": "nine"}], [{"text": "four too"}, {}], [])
    assert scores["wer"] == pytest.approx(100 * 2 / 3) and scores["cer"] > 0
    scores = score_labels(entities, [{"drink": "mocha"}], [{"drink": "mocha", "size": "small"}], ["drink", "size"])
    assert scores["slot_f1"] == pytest.approx(100 * 2 / 3) and scores["acceptance"] == 100
    assert scores["strict_match"] == 0 and scores["mean_slot_accuracy"] == 50


def test_ctc_compares_the_encoders_alone_and_leaves_clips_out_that_are_too_short(tmp_path, caplog):
    found = {name: write_orders(tmp_path / "data", name, orders(3)) for name in ("train", "test")}
    settings = config("entities", modes=["frozen"], head_steps=2, fine_tune_batch_seconds=10.0)
    train, test = (read_split(settings, str(path)) for path in found.values())
    systems = [System("speech", {}, whisper_student, {}), System("text", {}, None, {})]
    outcome = compare(settings, systems, train, test, output_dir=tmp_path / "run", machine=CPU)
    # "espresso" and its size take 17 frames with a blank between equal letters, 0.3 s have 15
    assert "1 of 3 clips have fewer frames than their strings have symbols" in caplog.text
    assert "'train-02' with 15 frames for 15 symbols" in caplog.text
    (result,) = outcome["results"]
    assert [key for key in result["mean"] if key.startswith("accuracy/")] == ["accuracy/drink", "accuracy/size"]
    assert (result["system"], result["mode"]) == ("speech", "frozen") and set(result["mean"]) >= {"slot_f1"}
    assert len((tmp_path / "run/understanding_hypotheses.jsonl").read_text().splitlines()) == 3
