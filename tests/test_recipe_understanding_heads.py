"""recipes/segue, understanding: heads on vectors, fine-tuning, and how clips become vectors."""

import json
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, write_tone
from torch import nn
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2Model,
)

sys.path.append(str(ROOT / "recipes/segue"))  # behind the others: its train.py is loaded by path

from heads import (
    TargetClips,
    collate_targets,
    fine_tune,
    fit_heads,
    fit_ridge,
    predicted_labels,
    speech_vectors,
)
from understanding_orders import (
    CPU,
    RATE_HZ,
    config,
    orders,
    perfect_vectors,
    slots,
    weights_of,
    whisper_student,
    write_orders,
)
from understanding_tasks import (
    class_targets,
    label_classes,
)

from speechkd.data.manifest import read_manifest, write_manifest
from speechkd.labels.embeddings import cache_lower_states
from speechkd.models.segue import SegueEncoder
from speechkd.models.understanding import SegueForUnderstanding, understanding_loss


def test_heads_see_neither_the_scale_nor_the_place_of_the_vectors():
    labels = orders()
    classes = label_classes(config(), labels)
    targets, _ = class_targets(labels, classes)
    ids = [str(index) for index in range(len(labels))]
    vectors = torch.stack(list(perfect_vectors(ids, labels).values()))
    moved = 300 * vectors + 7
    sizes = [len(values) for values in classes.values()]
    for fit in (lambda x: fit_heads(x, targets, sizes, config(), 0), lambda x: fit_ridge(x, targets, sizes, 100.0)):
        for plain, far in zip(fit(vectors), fit(moved), strict=True):
            torch.testing.assert_close(plain(vectors), far(moved), rtol=1e-3, atol=1e-3)


def test_ridge_of_values_is_that_of_the_scaled_vectors():
    vectors = torch.tensor([[1.0, 0], [0, 1], [1, 1]]) * 4 - 2
    values = torch.tensor([[1.0], [2], [4]])
    (head,) = fit_ridge(vectors, values, [], 0.5)
    centred = (vectors - vectors.mean(0)).double()
    scaled = centred / centred.square().mean().sqrt()
    gram = scaled.T @ scaled + 0.5 * torch.eye(2, dtype=torch.float64)
    weight = torch.linalg.solve(gram, scaled.T @ (values.double() - values.double().mean()))
    expected = scaled @ weight + values.double().mean()
    torch.testing.assert_close(head(vectors).double(), expected, rtol=0, atol=1e-5)
    (said,) = predicted_labels(nn.ModuleList([head]), vectors[:1], {"mood": []})
    assert float(said["mood"]) == pytest.approx(float(expected[0]), abs=1e-5)


def test_one_item_and_equal_items_can_be_learnt_from():
    heads = fit_heads(torch.ones(3, 4), torch.tensor([[0], [0], [0]]), [2], config(), 0)
    assert predicted_labels(heads, torch.ones(1, 4), {"drink": ["mocha", "latte"]}) == [{"drink": "mocha"}]
    assert torch.isfinite(heads[0].weight).all()


def test_worked_example_of_the_loss_of_two_heads():
    outputs = [torch.tensor([[2.0, 0, 0]]), torch.tensor([[0.0, 1]])]
    first = understanding_loss(outputs[:1], torch.tensor([[0]]))
    assert first.item() == pytest.approx(0.2395448, abs=5e-8)
    assert understanding_loss(outputs[1:], torch.tensor([[0]])).item() == pytest.approx(1.3132616, abs=1e-7)
    assert understanding_loss(outputs, torch.tensor([[0, 0]])).item() == pytest.approx(1.5528065, abs=1e-7)
    twice = [scores.repeat(2, 1) for scores in outputs]  # a sum over items too
    assert understanding_loss(twice, torch.zeros(2, 2, dtype=torch.int64)).item() == pytest.approx(3.105613, abs=1e-6)


def test_loss_of_values_is_the_sum_over_items_of_the_squared_error():
    outputs, targets = torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [0.0]])
    assert understanding_loss([outputs], targets, "values").item() == 10
    assert understanding_loss([outputs.bfloat16()], targets, "values").dtype == torch.float32


@pytest.mark.parametrize(
    ("outputs", "targets", "kind", "message"),
    [
        ([torch.zeros(2, 3)], torch.zeros(2, 2, dtype=torch.int64), "classes", "do not fit 1 heads and 2 items"),
        ([torch.zeros(2, 3)], torch.zeros(2, 1), "classes", "of torch.float32 do not fit"),
        ([torch.zeros(2, 1)], torch.zeros(3, 1), "values", r"do not fit values \(3, 1\)"),
        ([torch.zeros(2, 1)] * 2, torch.zeros(2, 1), "values", "values need one head"),
    ],
)
def test_targets_that_do_not_fit_the_heads_are_refused(outputs, targets, kind, message):
    with pytest.raises(ValueError, match=message):
        understanding_loss(outputs, targets, kind)


@pytest.mark.parametrize("heads", [[], [nn.Linear(31, 2)], [nn.Linear(32, 2), nn.Linear(16, 2)], [nn.Identity()]])
def test_heads_of_another_width_are_refused(heads):
    with pytest.raises(ValueError, match="do not fit embeddings of 32"):
        SegueForUnderstanding(whisper_student(), nn.ModuleList(heads))


def test_fine_tuning_switches_the_dropouts_on_that_segue_has_off():
    student = whisper_student()
    student.config.dropout = 0.1
    assert student.stack.layers[-1].dropout == 0
    SegueForUnderstanding(student, nn.ModuleList([nn.Linear(32, 2)]))
    assert student.stack.layers[-1].dropout == 0.1


def test_encoding_leaves_the_encoder_as_it_was_and_does_not_depend_on_the_others(tmp_path):
    manifest = read_manifest(write_orders(tmp_path, "train", orders(5)[::-1]))
    soundfile.write(tmp_path / "audio/train-00.wav", np.zeros(6400), RATE_HZ)  # silence has a vector too
    student = whisper_student().train()
    before = weights_of(student)
    vectors, skipped = speech_vectors(student, manifest)
    assert student.training and not skipped and list(vectors) != manifest.ids  # shortest first
    assert all(torch.equal(before[name], weight) for name, weight in student.state_dict().items())
    alone, _ = speech_vectors(student, manifest.select([4]))
    torch.testing.assert_close(alone["train-04"], vectors["train-04"], rtol=0, atol=1e-5)
    assert torch.stack(list(vectors.values())).isfinite().all()


def test_clips_too_short_for_ten_frames_are_lengthened_when_encoded_and_when_learnt_from(tmp_path):
    write_tone(tmp_path / "tone.wav", 0.02)
    row = {
        "id": "short",
        "audio": "tone.wav",
        "duration_seconds": 0.02,
        "sample_rate_hz": RATE_HZ,
        **slots(drink="tea"),
    }
    write_manifest(tmp_path / "short.jsonl", [row])
    manifest = read_manifest(tmp_path / "short.jsonl")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    convolutions = {"conv_dim": [16] * 7, "num_conv_pos_embedding_groups": 2, "num_conv_pos_embeddings": 16}
    torch.manual_seed(0)
    student = SegueEncoder(Wav2Vec2Model(Wav2Vec2Config(**sizes, **convolutions)))
    vectors, skipped = speech_vectors(student, manifest)
    assert not skipped and vectors["short"].isfinite().all()
    assert TargetClips(manifest, torch.zeros(1, 1), min_samples=3280)[0]["waveform"].shape == (3280,)
    settings = config(fine_tune_steps=1)
    targets, classes = torch.zeros(1, 1, dtype=torch.int64), {"drink": ["tea"]}
    fine_tune(student, None, manifest, targets, classes, settings, output_dir=tmp_path / "run", seed=0, machine=CPU)


def test_fine_tuning_moves_encoder_and_heads_but_no_frozen_layer(tmp_path):
    labels = orders(6)
    manifest = read_manifest(write_orders(tmp_path, "train", labels))
    classes = label_classes(config(), labels)
    targets, _ = class_targets(labels, classes)
    task = config(fine_tune_steps=2, fine_tune_batch_seconds=1.2, fine_tune_learning_rate=1e-3)
    student = whisper_student(num_frozen_layers=1)
    before = weights_of(student)
    model = fine_tune(student, None, manifest, targets, classes, task, output_dir=tmp_path / "run", seed=0, machine=CPU)
    moved = {name for name, weight in model.encoder.state_dict().items() if not weight.equal(before[name])}
    assert moved and not any("layers.0." in name or "conv" in name for name in moved)
    assert any("layers.1." in name for name in moved) and not model.training
    log = [json.loads(line) for line in (tmp_path / "run/train_log.jsonl").read_text().splitlines()]
    assert model.heads[0].weight.requires_grad and log


def test_fine_tuning_lowers_the_loss_and_its_seed_repeats(tmp_path):
    labels = orders(6)
    manifest = read_manifest(write_orders(tmp_path, "train", labels))
    classes = label_classes(config(), labels)
    targets, _ = class_targets(labels, classes)
    task = config(fine_tune_steps=15, fine_tune_batch_seconds=10, fine_tune_learning_rate=1e-2)
    runs = [
        fine_tune(
            whisper_student(), None, manifest, targets, classes, task, output_dir=tmp_path / "run", seed=3, machine=CPU
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*(run.state_dict().values() for run in runs), strict=True))

    def loss(model):
        batch = collate_targets([TargetClips(manifest, targets)[index] for index in range(6)])
        with torch.no_grad():
            return understanding_loss(model(batch["waveforms"], batch["num_samples"]), targets).item()

    start = fine_tune(
        whisper_student(), None, manifest, targets, classes, config(fine_tune_steps=1, fine_tune_learning_rate=1e-9),
        output_dir=tmp_path / "start", seed=3, machine=CPU,
    )  # fmt: skip
    assert loss(runs[0]) < 0.7 * loss(start)


def test_stored_states_of_frozen_layers_stand_for_the_audio(tmp_path):
    labels = orders(4)
    path = write_orders(tmp_path, "train", labels)
    student = whisper_student(num_frozen_layers=1)
    store = cache_lower_states(student, "tiny", path, tmp_path / "states")
    manifest, targets = read_manifest(path), torch.zeros(4, 1, dtype=torch.int64)
    model = SegueForUnderstanding(student, nn.ModuleList([nn.Linear(32, 2)])).eval()
    outputs = []
    for states in (None, store):
        batch = collate_targets([TargetClips(manifest, targets, states=states)[index] for index in range(4)])
        outputs.append(model(batch.get("waveforms"), batch["num_samples"], batch.get("states"))[0])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=5e-3)  # states are kept in float16
    with pytest.raises(ValueError, match="4 utterances and 3 targets differ"):
        TargetClips(manifest, targets[:3])
