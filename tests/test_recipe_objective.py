"""The objective of the Distil-Whisper recipe, its students, and what they refuse."""

import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import train
from conftest import TOKENS, tiny_whisper
from objective import Divergence, LossConfig, StepDraws, count_items, loss_terms, on_policy_batch
from safetensors.torch import load_file
from students import StudentConfig, build_models
from test_recipes import arguments
from transformers import WhisperConfig, WhisperForConditionalGeneration

from speechkd.check_config import check_config
from speechkd.config import TeacherConfig
from speechkd.data.augment import SpecAugmentConfig
from speechkd.data.collate import collate_labels
from speechkd.data.features import WhisperLogMel
from speechkd.labels.decoder_state_labels import collate_decoder_states, decoder_states_of_labels
from speechkd.labels.pseudo_label import DecodingConfig, label_manifest
from speechkd.labels.teacher_cache import LabelStoreError
from speechkd.labels.topk_labels import topk_of_labels
from speechkd.labels.topk_records import collate_topk, decode_topk
from speechkd.losses import logits as divergences
from speechkd.models.whisper import student_from_teacher
from speechkd.teachers import load_whisper

LABELS = [
    [*TOKENS.prefix, 400, 401, 402, TOKENS.end_of_text],
    [*TOKENS.prefix, 500, TOKENS.end_of_text],
]
NAMES = list(Divergence.__args__)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def teacher() -> WhisperForConditionalGeneration:
    return sharpened(tiny_whisper(decoder_layers=4))


@pytest.fixture
def student(teacher: WhisperForConditionalGeneration) -> WhisperForConditionalGeneration:
    return student_from_teacher(teacher, decoder_layers=2).train()


def sharpened(model: WhisperForConditionalGeneration) -> WhisperForConditionalGeneration:
    """Larger weights, as of a trained model, so that layers change what is predicted."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0)
    return model


def cached_batch(labels: list[list[int]] = LABELS, pad_to: int = 0) -> dict:
    decoder_input_ids, label_ids = collate_labels(labels, TOKENS, pad_to=pad_to)
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(len(labels), 1500, 16, generator=generator)
    ids = [f"clip-{row}" for row in range(len(labels))]
    return {"ids": ids, "decoder_input_ids": decoder_input_ids, "labels": label_ids, "encoder_states": states}


def heard_batch() -> dict:
    batch = cached_batch()
    del batch["encoder_states"]
    waveforms = torch.randn(2, 16_000, generator=torch.Generator().manual_seed(2))
    return {**batch, "waveforms": waveforms, "num_samples": [16_000, 16_000]}


def scored(model, teacher, batch, draws=None, shared_encoder=None, teacher_head=None, **settings):
    log_mel = WhisperLogMel()
    return loss_terms(
        model,
        teacher,
        batch,
        weights=LossConfig(**settings),
        log_mel=log_mel,
        shared_encoder=shared_encoder,
        teacher_head=teacher_head,
        draws=draws,
    )


def draws_at(step: int, **more) -> StepDraws:
    return StepDraws(seed=7, step=lambda: step, tokens=TOKENS, **more)


def logits_of(model, batch):
    inputs = {"encoder_outputs": (batch["encoder_states"],), "decoder_input_ids": batch["decoder_input_ids"]}
    return model(**inputs, use_cache=False).logits


@pytest.mark.parametrize("name", NAMES)
def test_every_divergence_is_that_of_full_logits(name, teacher, student):
    batch = cached_batch(pad_to=11)
    settings = {"beta": 0.3} if name == "generalized_jsd" else {}
    total, terms = scored(student, teacher, batch, divergence=name, cross_entropy=0.8, kl=0.5, **settings)
    total.backward()
    gradient = student.proj_out.weight.grad.clone()
    student.zero_grad()
    full = logits_of(student, batch)
    with torch.no_grad():
        theirs = logits_of(teacher, batch)
    entropy = divergences.cross_entropy(full, batch["labels"], reduction="sum")
    compare = getattr(divergences, name)
    value = compare(full, theirs, batch["labels"] >= 0, temperature=2.0, reduction="sum", **settings)
    expected = 0.8 * entropy + 0.5 * value
    expected.backward()
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms["cross_entropy"], entropy.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms["kl" if name == "forward_kl" else name], value.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, student.proj_out.weight.grad, rtol=1e-3, atol=1e-4)
    assert value > 0.01


def test_hidden_states_are_compared_with_evenly_spaced_layers_and_not_with_those_copied(teacher, student):
    batch = cached_batch(pad_to=11)
    without, _ = scored(student, teacher, batch)
    total, terms = scored(student, teacher, batch, hidden_mse=0.25)
    inputs = {"encoder_outputs": (batch["encoder_states"],), "decoder_input_ids": batch["decoder_input_ids"]}
    with torch.no_grad():
        ours = student(**inputs, output_hidden_states=True).decoder_hidden_states
        theirs = teacher(**inputs, output_hidden_states=True).decoder_hidden_states
    valid = batch["labels"] >= 0
    pairs = [(1, 2), (2, 4)]  # the copied ones are 1 and 4
    expected = sum((ours[i][valid] - theirs[j][valid]).square().mean(dim=-1).sum() for i, j in pairs)
    torch.testing.assert_close(terms["hidden_mse"], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total, without + 0.25 * expected, rtol=1e-4, atol=1e-4)
    total.backward()
    assert student.model.decoder.layers[0].fc1.weight.grad.abs().sum() > 0


def test_hidden_states_alone_are_an_objective(teacher, student):
    total, terms = scored(student, teacher, cached_batch(), cross_entropy=0.0, kl=0.0, hidden_mse=1.0)
    torch.testing.assert_close(total, terms["hidden_mse"])


def with_topk(teacher, batch, k):
    records = topk_of_labels(teacher, batch["encoder_states"], LABELS, TOKENS, k)
    targets = [decode_topk(record, k, 51_865) for record in records]
    return batch | collate_topk(targets, list(map(len, LABELS)), batch["labels"].shape[1])


def test_stored_topk_near_the_live_teacher_and_nearer_with_more_ids(teacher, student):
    batch = cached_batch(pad_to=11)
    _, live = scored(student, teacher, batch, temperature=1.0)
    gaps = []
    for k in (4, 256, 51_865):
        _, terms = scored(student, None, with_topk(teacher, batch, k), temperature=1.0)
        torch.testing.assert_close(terms["cross_entropy"], live["cross_entropy"])
        gaps.append((live["kl"] - terms["kl"]).item())
    assert gaps[0] > gaps[1] > gaps[2] - 1e-3  # a bucket for the tail never gives more than the whole
    assert gaps[2] == pytest.approx(0, abs=2e-3 * live["kl"].item())  # records are float16


def gradients_of(model, loss) -> torch.Tensor:
    loss.backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


@pytest.mark.parametrize("name", NAMES)
def test_stored_decoder_states_give_loss_and_gradients_of_the_live_teacher(name, teacher, student):
    batch, settings = cached_batch(pad_to=11), {"divergence": name, "cross_entropy": 0.0, "temperature": 2.0}
    live, live_terms = scored(student, teacher, batch, **settings)
    expected = gradients_of(student, live)
    student.zero_grad()
    states = decoder_states_of_labels(teacher, batch["encoder_states"], LABELS, TOKENS)
    lengths = list(map(len, LABELS))
    batch["teacher_decoder_states"] = collate_decoder_states(states, lengths, batch["labels"].shape[1])
    head = teacher.proj_out.weight.detach()
    stored, terms = scored(student, None, batch, teacher_head=head, **settings)
    gradients = gradients_of(student, stored)
    torch.testing.assert_close(stored, live, rtol=2e-4, atol=0)  # float16 states: 3e-5 apart
    # 7e-5 apart, total variation 3e-4
    assert (gradients - expected).norm() < 1e-3 * expected.norm() and terms.keys() == live_terms.keys()
    batch["teacher_decoder_states"] = batch["teacher_decoder_states"].roll(1, dims=1)
    other, _ = scored(student, None, batch, teacher_head=head, **settings)
    assert abs(other / live - 1) > 0.01


def test_only_the_head_of_a_teacher_with_stored_decoder_states_is_held(tiny_teacher):
    gc.collect()
    before = sum(isinstance(thing, WhisperForConditionalGeneration) for thing in gc.get_objects())
    config = TeacherConfig(name=tiny_teacher, stored_outputs="decoder_states")
    models = build_models(config, StudentConfig(decoder_layers=2), torch.device("cpu"))
    gc.collect()
    after = sum(isinstance(thing, WhisperForConditionalGeneration) for thing in gc.get_objects())
    assert after - before == 1 and models.teacher is None  # the student
    head, trained = models.teacher_head, models.student.proj_out.weight
    assert torch.equal(head, trained) and head.data_ptr() != trained.data_ptr()
    assert not head.requires_grad and head.untyped_storage().nbytes() == head.nbytes
    config = TeacherConfig(name=tiny_teacher, stored_outputs="topk")
    assert build_models(config, StudentConfig(decoder_layers=2), torch.device("cpu")).teacher_head is None


def test_on_policy_batches_come_by_seed_and_step_alone(teacher, student):
    batch, weights = cached_batch(), LossConfig(on_policy_fraction=0.5)
    inputs = {"encoder_outputs": (batch["encoder_states"],)}

    def drawn(step):
        return on_policy_batch(student, inputs, batch, weights, draws_at(step))

    written = [drawn(step) for step in range(24)]
    assert 4 < sum(is_on_policy for _, _, is_on_policy in written) < 20
    for step in (3, 11):  # as a resumed run would
        assert all(torch.equal(a, b) for a, b in zip(drawn(step)[:2], written[step][:2], strict=True))
    for fraction, expected in ((0.0, False), (1.0, True)):
        always = replace(weights, on_policy_fraction=fraction)
        assert {on_policy_batch(student, inputs, batch, always, draws_at(step))[2] for step in range(6)} == {expected}


def test_an_on_policy_batch_continues_the_labels_prefix_without_prompts(student):
    prompted = [[TOKENS.start_of_prev, 11, 12, *LABELS[0]], LABELS[1]]
    batch = cached_batch(prompted)
    inputs = {"encoder_outputs": (batch["encoder_states"],)}
    weights = LossConfig(on_policy_fraction=1.0)
    ids, labels, _ = on_policy_batch(student, inputs, batch, weights, draws_at(0))
    prefix = len(TOKENS.prefix)
    assert (ids[:, :prefix] == torch.tensor(TOKENS.prefix)).all()
    assert (labels[:, : prefix - 1] == -100).all() and (labels[:, prefix - 1] >= 0).all()
    assert torch.equal(labels[:, prefix - 1 : -1], ids[:, prefix:])  # nothing ended, so all is scored
    assert labels.shape[1] == len(LABELS[0]) - 1
    greedy = replace(weights, on_policy_temperature=0.0)
    first, second = (on_policy_batch(student, inputs, batch, greedy, draws_at(step))[1] for step in (0, 1))
    assert torch.equal(first, second) and not torch.equal(first, labels)


def test_an_on_policy_step_learns_from_the_divergence_on_the_students_words(teacher, student):
    batch = cached_batch()
    settings = {"divergence": "total_variation", "temperature": 1.0, "on_policy_fraction": 1.0}
    total, terms = scored(student, teacher, batch, draws=draws_at(0), **settings)
    inputs = {"encoder_outputs": (batch["encoder_states"],)}
    ids, labels, _ = on_policy_batch(student, inputs, batch, LossConfig(on_policy_fraction=1.0), draws_at(0))
    own = {"decoder_input_ids": ids, "encoder_states": batch["encoder_states"]}
    with torch.no_grad():
        distance = divergences.total_variation(logits_of(student, own), logits_of(teacher, own), labels >= 0)
    # as much as the labels would have weighed
    torch.testing.assert_close(total.detach(), distance * count_items(batch), rtol=1e-4, atol=1e-4)
    assert terms["cross_entropy"] == 0 and terms["on_policy"] == count_items(batch)
    total.backward()
    assert student.model.decoder.layers[1].fc1.weight.grad.abs().sum() > 0


def test_evaluation_is_on_the_labels(teacher, student):
    batch = cached_batch()
    student.eval()
    drawn = scored(student, teacher, batch, draws=draws_at(0), on_policy_fraction=1.0)[0]
    torch.testing.assert_close(drawn, scored(student, teacher, batch)[0])


def test_spec_augment_masks_what_the_student_hears_and_not_what_the_teacher_hears(teacher, student):
    batch, masks = heard_batch(), SpecAugmentConfig(num_time_masks=4, max_time_mask_frames=60, max_time_mask_fraction=1)
    heard: dict[str, list] = {"student": [], "teacher": []}
    for name, model in (("student", student), ("teacher", teacher)):
        model.model.encoder.register_forward_pre_hook(lambda _, args, name=name: heard[name].append(args[0]))
    for step in (0, 0, 1):
        scored(student, teacher, batch, draws=draws_at(step, spec_augment=masks))
    scored(student.eval(), teacher, batch, draws=draws_at(0, spec_augment=masks))
    clean = WhisperLogMel()(batch["waveforms"])
    assert all(torch.equal(features, clean) for features in heard["teacher"])
    first, again, later, evaluated = heard["student"]
    assert torch.equal(first, again) and not torch.equal(first, later)
    assert torch.equal(evaluated, clean)
    changed = (first != clean).any(dim=1)
    assert changed[:, :100].any() and not changed[:, 100:].any()  # the clips last 100 frames
    torch.testing.assert_close(first[0][first[0] != clean[0]].unique(), clean[0, :, :100].mean()[None])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_policy_fraction": 1.5}, "on_policy_fraction must be 0 to 1, got 1.5"),
        ({"on_policy_fraction": 0.5, "kl": 0.0}, "needs the teacher's opinion"),
        ({"on_policy_temperature": -1.0}, "on_policy_temperature must be 0 or more, got -1.0"),
        ({"cross_entropy": 0.0, "kl": 0.0}, "not all 0"),
        ({"temperature": 0.0}, "loss.temperature must be positive"),
    ],
)
def test_impossible_objectives_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**settings)


def test_masks_on_a_frozen_encoder_are_refused():
    with pytest.raises(ValueError, match=r"freeze_encoder=false and teacher\.cache_encoder_states=false"):
        StudentConfig(spec_augment=SpecAugmentConfig())
    StudentConfig(spec_augment=SpecAugmentConfig(), freeze_encoder=False)


def test_a_student_may_start_from_a_student_that_lost_encoder_layers_too(tiny_teacher, tmp_path):
    device = torch.device("cpu")
    first = StudentConfig(encoder_layers_numbers=[-1], decoder_layers_numbers=[0, -1], freeze_encoder=False)
    models = build_models(TeacherConfig(name=tiny_teacher), first, device)
    assert models.decoder_layers_kept == [0, 2] and models.student.config.encoder_layers == 1
    last = models.teacher.model.encoder.layers[1].fc1.weight
    assert torch.equal(models.student.model.encoder.layers[0].fc1.weight, last)
    models.student.save_pretrained(tmp_path / "student")
    again = StudentConfig(init_from=str(tmp_path / "student"), freeze_encoder=False)
    assert build_models(TeacherConfig(name=tiny_teacher), again, device).student.config.decoder_layers == 2
    cached = TeacherConfig(name=tiny_teacher, cache_encoder_states=True)
    with pytest.raises(ValueError, match="cache_encoder_states: the encoder of student.init_from=.* is not"):
        build_models(cached, again, device)


def saved_whisper(folder, **changes) -> str:
    settings = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1} | changes
    settings |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    settings |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    WhisperForConditionalGeneration(WhisperConfig(**settings)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "cached", "hidden", "message"),
    [
        ({"vocab_size": 51_866}, False, False, "the teacher has 51865 tokens and the student 51866"),
        ({"num_mel_bins": 128}, False, False, "the teacher hears 80 mel bins and student.init_from=.* 128"),
        ({"d_model": 32}, True, False, r"is not the teacher's \(widths 32 and 16\)"),
        ({"d_model": 32}, False, True, "teacher has 3 decoder layers of width 16, .* has 1 of width 32"),
    ],
)
def test_a_student_of_another_teacher_is_refused(changes, cached, hidden, message, tiny_teacher, tmp_path):
    config = TeacherConfig(name=tiny_teacher, cache_encoder_states=cached)
    student = StudentConfig(init_from=saved_whisper(tmp_path / "other", **changes))
    with pytest.raises(ValueError, match=message):
        build_models(config, student, torch.device("cpu"), needs_hidden_states=hidden)


@pytest.fixture(scope="module")
def sharp_teacher(tiny_teacher, tmp_path_factory):
    """Folder of a teacher from which a student that lacks layers differs much."""
    folder = tmp_path_factory.mktemp("sharp") / "teacher"
    shutil.copytree(tiny_teacher, folder)
    sharpened(load_whisper(tiny_teacher)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(sharp_teacher, tone_manifest):
    """Trains the fsdd recipe on tones with all stored outputs; more settings may be given."""
    folder = tone_manifest.parent / "labels"
    targets = ("text", "encoder_states", "topk", "decoder_states")
    decoding = DecodingConfig(max_new_tokens=6)
    label_manifest(sharp_teacher, tone_manifest, folder / "train", decoding=decoding, targets=targets)

    def train_with(*more: str) -> tuple[dict, list[dict]]:
        recipe = train.__file__.replace("train.py", "fsdd.yaml")
        train.main(arguments(recipe, sharp_teacher, tone_manifest, folder, "--trainer.logging_steps=1", *more))
        output = next((item.split("=")[1] for item in more if "output_dir" in item), str(tone_manifest.parent / "run"))
        log = [json.loads(line) for line in open(f"{output}/train_log.jsonl")]
        return json.load(open(f"{output}/run.json")), [row for row in log if "loss/total" in row]

    return train_with


def test_a_run_from_stored_targets_says_so_and_needs_no_live_teacher(run, tone_manifest):
    stored, log = run("--teacher.stored_outputs=topk", "--loss.temperature=1.0")
    assert stored["teacher_outputs"] == "stored" and "KL(stored top-k of the teacher, T=1" in stored["loss"]
    assert stored["teacher"]["weights_sha256"] and stored["decoder_layers_kept"] == [0, 2]
    options = ("--teacher.stored_outputs=null", "--loss.temperature=1.0")
    live, live_log = run(*options, f"--trainer.output_dir={tone_manifest.parent / 'live'}")
    assert live["teacher_outputs"] == "live"
    for ours, theirs in zip(log, live_log, strict=True):
        assert ours["loss/cross_entropy"] == pytest.approx(theirs["loss/cross_entropy"], rel=1e-2)
        assert 0 < ours["loss/kl"] <= theirs["loss/kl"]


@pytest.mark.parametrize(
    "options", [("--loss.cross_entropy=0",), ("--loss.divergence=js", "--trainer.eval_strategy=steps")]
)
def test_a_run_from_stored_decoder_states_ends_with_the_student_of_the_live_teacher(options, run, tone_manifest):
    labels = tone_manifest.parent / "labels"
    if "--trainer.eval_strategy=steps" in options:
        shutil.copytree(labels / "train", labels / "dev")
        options += ("--trainer.eval_steps=1", f"--data.dev_manifest={tone_manifest}")
    folders = [tone_manifest.parent / name for name in ("stored", "live")]
    (stored, log), (live, live_log) = (
        run(f"--teacher.stored_outputs={outputs}", f"--trainer.output_dir={folder}", *options)
        for outputs, folder in zip(("decoder_states", "null"), folders, strict=True)
    )
    assert (stored["teacher_outputs"], live["teacher_outputs"]) == ("stored", "live")
    assert "(stored decoder states of the teacher, T=2, T^2)" in stored["loss"] and "(teacher, T=2" in live["loss"]
    for ours, theirs in zip(log, live_log, strict=True):
        for name in [name for name in theirs if name.startswith("loss/")]:
            assert ours[name] == pytest.approx(theirs[name], rel=5e-4)

    def weights(folder: Path) -> torch.Tensor:
        return torch.cat([weight.flatten() for _, weight in sorted(load_file(folder / "model.safetensors").items())])

    ours, theirs = (weights(folder / "student") for folder in folders)
    before = weights(folders[0] / "student_init")
    assert 0 < (ours - theirs).norm() < 0.01 * (theirs - before).norm()


def test_an_encoder_of_its_own_is_trained_on_masked_features_and_hidden_states(run, tone_manifest):
    _, log = run(
        "--teacher.cache_encoder_states=false",
        "--teacher.stored_outputs=null",
        "--student.freeze_encoder=false",
        "--student.spec_augment.num_time_masks=1",
        "--loss.hidden_mse=0.5",
    )
    assert all(row["loss/hidden_mse"] > 0 for row in log)
    folder = tone_manifest.parent / "run"
    before, after = (load_file(folder / name / "model.safetensors") for name in ("student_init", "student"))
    moved = [name for name in before if ".encoder.layers." in name and not before[name].equal(after[name])]
    assert moved


def test_a_resumed_on_policy_run_ends_with_the_same_student(run, tone_manifest):
    options = ("--loss.on_policy_fraction=0.5", "--loss.divergence=js", "--trainer.max_steps=4")
    options += ("--teacher.stored_outputs=null", "--trainer.save_total_limit=4")
    whole, part = (tone_manifest.parent / name for name in ("whole", "part"))
    _, log = run(*options, f"--trainer.output_dir={whole}")
    assert {row["loss/on_policy"] for row in log} == {0.0, 1.0}
    shutil.copytree(whole / "checkpoint-2", part / "checkpoint-2")
    run(*options, f"--trainer.output_dir={part}")
    weights, resumed = (load_file(folder / "student/model.safetensors") for folder in (whole, part))
    assert all(resumed[name].equal(weight) for name, weight in weights.items())


@pytest.mark.parametrize("outputs", ["topk", "decoder_states"])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--loss.hidden_mse=1.0", "loss.hidden_mse would need more"),
        ("--loss.on_policy_fraction=0.5", "loss.on_policy_fraction would need more"),
        ("--data.augment.speed_factors=[0.9]", "data.augment would need more"),
        ("--data.previous_text_probability=0.5", "data.previous_text_probability would need more"),
        ("--decoding.timestamps=true", "timestamp_probability below 1 would need more"),
        ("--data.pack=true", "data.pack with a WER or CER filter would need more"),
        ("--loss.kl=0", "and loss.kl is 0; set it above 0, or teacher.stored_outputs=null"),
        ("--data.labels_dir=null", "needs data.labels_dir, and that of every extra corpus"),
    ],
)
def test_what_stored_outputs_cannot_serve_is_refused(outputs, option, message, tiny_teacher, tone_manifest, capsys):
    more = (f"--teacher.stored_outputs={outputs}", "--teacher.cache_encoder_states=false", "--loss.temperature=1.0")
    more += ("--filters.max_wer=10",) if "pack" in option else ()
    refused(tiny_teacher, tone_manifest, *more, option)
    assert f"teacher.stored_outputs={outputs} " in (error := capsys.readouterr().err) and message in error


@pytest.mark.parametrize(
    ("option", "got"), [("--loss.temperature=2.0", "got forward_kl and 2"), ("--loss.divergence=js", "got js and 1")]
)
def test_stored_ids_serve_forward_kl_at_temperature_1_alone(option, got, tiny_teacher, tone_manifest, capsys):
    refused(tiny_teacher, tone_manifest, "--teacher.stored_outputs=topk", "--loss.temperature=1.0", option)
    error = capsys.readouterr().err
    assert got in error and "or set teacher.stored_outputs=decoder_states" in error


def refused(teacher: str, manifest: Path, *more: str) -> None:
    recipe = train.__file__.replace("train.py", "fsdd.yaml")
    with pytest.raises(SystemExit) as exited:
        train.main(arguments(recipe, teacher, manifest, manifest.parent / "none", *more))
    assert exited.value.code == 2


@pytest.mark.parametrize(("outputs", "kind"), [("topk", "top-k targets"), ("decoder_states", "decoder states")])
def test_a_store_without_stored_outputs_is_refused(outputs, kind, tiny_teacher, tone_manifest):
    folder = tone_manifest.parent / "labels"
    label_manifest(tiny_teacher, tone_manifest, folder / "train", decoding=DecodingConfig(max_new_tokens=6))
    recipe = train.__file__.replace("train.py", "fsdd.yaml")
    more = (f"--teacher.stored_outputs={outputs}", "--loss.temperature=1.0", "--teacher.cache_encoder_states=false")
    with pytest.raises(LabelStoreError, match=f"keeps no {kind}.*--targets text {outputs}` into another folder"):
        train.main(arguments(recipe, tiny_teacher, tone_manifest, folder, *more))


def test_doctor_estimates_a_run_from_stored_decoder_states(run, sharp_teacher, tone_manifest):
    recipe = train.__file__.replace("train.py", "fsdd.yaml")
    test_manifest = tone_manifest.with_name("test.jsonl")
    test_manifest.write_text(tone_manifest.read_text().replace('"tone-', '"test-'))
    given = arguments(recipe, sharp_teacher, tone_manifest, tone_manifest.parent / "labels")
    more = ["--teacher.stored_outputs=decoder_states", f"--data.test_manifest={test_manifest}"]
    found = check_config(Path(recipe), [*given[2:], *more])
    assert found["problems"] == [] and found["estimates"]["total_steps"] == 2
