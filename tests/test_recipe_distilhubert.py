"""recipes/distilhubert on tiny random HuBERTs and Whispers and generated audio: clips, objectives, whole runs."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from conftest import ROOT, write_tone
from recipe_runs import QUIET, facts_of, forget_the_end, log_of, run_sh, saved_teacher, student_of, write_clips
from safetensors.torch import load_file
from test_models_distilhubert import make_teacher
from torch import nn
from transformers import AutoFeatureExtractor, AutoModel, WhisperConfig, get_linear_schedule_with_warmup

sys.path.append(str(ROOT / "recipes/distilhubert"))  # behind the others: its train.py is loaded by path

from encoder_objective import LossConfig, SharedFrames, count_items, loss_terms

from speechkd.check_config import _limits, _manifest_facts, check_config
from speechkd.config import parse_config
from speechkd.data.encoder_clips import ClipSet, DataConfig, SpanDraws, build_clips, collate_clips
from speechkd.data.features import WhisperWindow
from speechkd.data.manifest import read_manifest
from speechkd.estimate import load_recipe
from speechkd.losses.layerwise import LayerProjections, PredictionHeads, masked_info_nce, normalize_frames
from speechkd.models.distilhubert import CompactStudent, compact_encoder, teacher_targets
from speechkd.models.encoder_inputs import EncoderInputs

RECIPE = ROOT / "recipes/distilhubert"
YAMLS = sorted(RECIPE.glob("*.yaml"))
PAPER, BARISTA, COLLD = (RECIPE / f"{name}.yaml" for name in ("librispeech", "barista", "colld_barista"))
train = load_recipe(RECIPE / "train.py")
states = load_recipe(RECIPE / "store_teacher_states.py")


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Six clips of 0.5 to 1 s."""
    return write_clips(tmp_path, [8000 + 1600 * index for index in range(6)])


def make_pair(family: str, *, colld: bool = False, grid_seconds: float | None = None) -> tuple[Any, Any, SharedFrames]:
    """Teacher, student and their frames, without dropout."""
    teacher = make_teacher(family, **({"dropout": 0.0} if family == "whisper" else QUIET))
    heads = LayerProjections(2, 32, 32) if colld else PredictionHeads(32, 32, 2)
    options: dict[str, Any] = {"normalize_input": True, "grid_seconds": grid_seconds}
    student = CompactStudent(compact_encoder(teacher, 2), heads, mask_spans=colld, **options)
    return teacher, student, SharedFrames(student.inputs, EncoderInputs(teacher, normalize_input=True))


def batch_of(manifest: Path, **options: Any) -> dict[str, Any]:
    clips = ClipSet(read_manifest(manifest), 2.0)
    return collate_clips([clips[index] for index in range(len(clips))], **options)


# the objectives


@pytest.mark.parametrize("normalize_targets", [False, True])
@pytest.mark.parametrize(("family", "grid_seconds"), [("wav2vec2", None), ("whisper", None), ("whisper", 1.0)])
def test_the_loss_of_a_batch_is_that_of_its_clips_one_by_one(family, grid_seconds, normalize_targets, manifest):
    # encoders that padding does not reach; the clips of up to 1 s all end on the same point of the grid
    teacher, student, frames = make_pair(family, grid_seconds=grid_seconds)
    weights = LossConfig(cosine=0.5, normalize_targets=normalize_targets)
    batch = batch_of(manifest)
    loss, terms = loss_terms(student, teacher, batch, frames=frames, layers=[2, 4], weights=weights)
    l1 = cosine = 0.0
    num_frames = 0
    for row, length in zip(batch["waveforms"], batch["num_samples"], strict=True):
        inputs = student.inputs(row[None, :length] / 32768, torch.tensor([length]))
        count = int(student.inputs.num_frames(torch.tensor(length)))
        targets = teacher_targets(teacher, inputs, [2, 4])[0, :, :count]
        ours, theirs = student(inputs)[0, :, :count], normalize_frames(targets) if normalize_targets else targets
        l1 += (ours - theirs).abs().mean(dim=-1).sum().item()
        cosine += 0.5 * -F.logsigmoid(F.cosine_similarity(ours, theirs, dim=-1)).sum().item()
        num_frames += count
    assert terms["l1"].item() == pytest.approx(l1, rel=1e-4)
    assert terms["cosine"].item() == pytest.approx(cosine, rel=1e-4)
    assert loss.item() == pytest.approx(l1 + cosine, rel=1e-4)
    assert count_items(batch, num_frames=frames, num_layers=2) == 2 * num_frames


@pytest.mark.parametrize(("family", "grid_seconds"), [("wav2vec2", None), ("whisper", None), ("whisper", 0.3)])
def test_colld_counts_masked_frames_alone_and_the_teacher_hears_all(family, grid_seconds, manifest):
    teacher, student, frames = make_pair(family, colld=True, grid_seconds=grid_seconds)
    batch = batch_of(manifest, spans=SpanDraws(frames, 0.1, 3))
    loss, terms = loss_terms(
        student, teacher, batch, frames=frames, layers=[2, 4], weights=LossConfig(method="colld", temperature=0.5)
    )
    inputs = student.inputs(batch["waveforms"] / 32768, torch.tensor(batch["num_samples"]))
    width = batch["masked"].shape[1]
    ours = student(inputs, batch["masked"])[:, :, :width]
    clean = teacher_targets(teacher, inputs, [2, 4])[:, :, :width]
    mean = masked_info_nce(ours, clean, batch["masked"], temperature=0.5)  # all others are wrong answers: no draw
    assert (loss / count_items(batch, num_frames=frames, num_layers=2)).item() == pytest.approx(mean.item(), rel=1e-4)
    assert terms.keys() == {"info_nce"} and batch["masked"].any() and not batch["masked"].all()
    if grid_seconds is not None:  # of 1 s, rounded up to 1.2 s of the window of 2 s
        assert inputs["input_features"].shape[-1] == 120 and student(inputs, batch["masked"]).shape[2] == 60
    loss.backward()
    assert student.mask_vector.grad.abs().max() > 0


def test_a_clip_with_one_masked_frame_adds_nothing_and_counts_nothing(tmp_path):
    teacher, student, frames = make_pair("wav2vec2", colld=True)
    batch = batch_of(write_clips(tmp_path, [400]), spans=SpanDraws(frames, 0.065, 10))
    loss, _ = loss_terms(student, teacher, batch, frames=frames, layers=[2, 4], weights=LossConfig(method="colld"))
    assert batch["masked"].tolist() == [[True]] and count_items(batch, num_frames=frames, num_layers=2) == 0
    loss.backward()
    assert loss == 0 and loss.requires_grad


def test_the_teacher_computes_in_its_own_precision_under_autocast(manifest):
    teacher, student, frames = make_pair("wav2vec2")
    nn.init.zeros_(student.heads.split.weight)
    nn.init.zeros_(student.heads.split.bias)  # so the distance is that of the targets from 0
    batch, results = batch_of(manifest), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, terms = loss_terms(student, teacher, batch, frames=frames, layers=[2, 4], weights=LossConfig())
        results.append(terms["l1"])
    assert results[0] == results[1] > 0


def test_dropout_of_the_teacher_is_off_unless_it_is_asked_for(manifest):
    _, student, frames = make_pair("wav2vec2")
    noisy, results = make_teacher("wav2vec2", hidden_dropout=0.3), []
    for dropout in (False, False, True):
        options: dict[str, Any] = {"frames": frames, "layers": [4, 2], "weights": LossConfig(distance="l2")}
        loss, terms = loss_terms(student, noisy, batch_of(manifest), teacher_dropout=dropout, **options)
        results.append(loss.item())
    assert results[0] == results[1] != results[2] and terms.keys() == {"l2", "cosine"}


def test_models_of_other_frame_rates_are_refused_and_one_frame_is_dropped(tmp_path):
    teacher, student, _ = make_pair("wav2vec2")
    batch = batch_of(write_clips(tmp_path, [8100, 16_000]))
    options: dict[str, Any] = {"layers": [2, 4], "weights": LossConfig()}
    for kernels, strides in ((None, [5, 2, 2, 2, 2, 2, 1]), ([10, 3, 3, 3, 3, 3, 3], None)):
        changes = {"conv_stride": strides} if strides else {"conv_kernel": kernels}
        other = make_teacher("wav2vec2", **QUIET, **changes)
        frames = SharedFrames(student.inputs, EncoderInputs(other, normalize_input=True))
        if strides:
            with pytest.raises(
                ValueError, match=r"of clip 1, 1.00 s, the student makes 49 frames, 49.0 Hz, and the teacher 98"
            ):
                loss_terms(student, other, batch, frames=frames, **options)
        else:
            loss, _ = loss_terms(student, other, batch, frames=frames, **options)
            lengths = torch.tensor(batch["num_samples"])
            assert loss.isfinite() and frames(lengths).equal(frames.teacher.num_frames(lengths))
            assert (frames.student.num_frames(lengths) - frames(lengths)).tolist() == [1, 0]


# clips


def test_spans_belong_to_the_clip_and_the_epoch_and_not_to_the_batch(manifest):
    _, _, frames = make_pair("wav2vec2")
    clips, spans = ClipSet(read_manifest(manifest), 2.0, seed=3), SpanDraws(frames, 0.1, 3)
    together, alone = spans([clips[index] for index in range(6)]), spans([clips[1]])
    count = alone.shape[1]
    assert together[1, :count].equal(alone[0]) and not together[1, count:].any()
    clips.set_epoch(1)
    assert not spans([clips[1]]).equal(alone)


def test_long_clips_are_cropped_at_another_place_in_each_epoch(manifest):
    clips = ClipSet(read_manifest(manifest), 0.55, seed=1)
    whole = soundfile.read(manifest.parent / "audio/clips-5.wav", dtype="int16")[0]
    crops = []
    for epoch in (0, 0, 1):
        clips.set_epoch(epoch)
        crops.append(clips[5]["waveform"])
    assert crops[0].equal(crops[1]) and not crops[0].equal(crops[2]) and crops[0].dtype == torch.int16
    assert crops[2].numpy().tobytes() in whole.tobytes() and len(crops[2]) == 8800
    assert clips[0]["duration_seconds"] == 0.5 and clips[5]["duration_seconds"] == 0.55
    assert clips.durations_seconds.tolist() == [0.5, 0.55, 0.55, 0.55, 0.55, 0.55]


def test_padded_seconds_are_what_the_encoder_computes(manifest):
    batch = batch_of(manifest)
    assert batch["padded_seconds"] == pytest.approx(6 * 1.0) and batch["audio_seconds"] == pytest.approx(4.5)
    assert batch["waveforms"].shape == (6, 16_000) and batch["waveforms"].dtype == torch.int16
    assert "masked" not in batch
    assert batch_of(manifest, window=WhisperWindow(2.0))["padded_seconds"] == pytest.approx(12.0)
    assert batch_of(manifest, window=WhisperWindow(2.0, 0.3))["padded_seconds"] == pytest.approx(6 * 1.2)


def test_with_a_grid_batches_hold_more_clips_and_student_teacher_and_log_agree(whisper, manifest):
    more = ["--data.max_batch_seconds=5", "--teacher.grid_seconds=0.5"]
    trainer, run = built(arguments(BARISTA, whisper, manifest, *more))
    whole, _ = built(arguments(BARISTA, whisper, manifest, *more[:1]))
    assert [len(batch) for batch in whole.sampler] == [2, 2, 2] and run["grid_seconds"] == 0.5
    batches = list(trainer.sampler)
    assert sorted(map(sorted, batches)) == [[0], [1, 2, 3, 4, 5]]  # heard as 0.5 and as 1 s
    heard: list[int] = []
    trainer.teacher.conv2.register_forward_hook(lambda *call: heard.append(call[-1].shape[-1]))
    trainer.model.encoder.conv2.register_forward_hook(lambda *call: heard.append(call[-1].shape[-1]))
    for indices in [*batches, [3, 0]]:
        batch = trainer.data_collator([trainer.train_dataset[index] for index in indices])
        trainer.loss_terms(trainer.model, trainer.teacher, batch)
        positions = math.ceil(max(batch["num_samples"]) / 8000) * 25
        assert heard[-2:] == [positions, positions]
        assert batch["padded_seconds"] == pytest.approx(len(indices) * positions / 50)
    assert set(heard) == {25, 50}


def test_a_grid_is_of_whole_positions_within_the_window_of_a_whisper(hubert, whisper, manifest):
    for wrong in (0.0, 0.03, 2.5):
        with pytest.raises(ValueError, match=f"grid_seconds must be a multiple of 0.02 up to 2, got {wrong}"):
            built(arguments(BARISTA, whisper, manifest, f"--teacher.grid_seconds={wrong}"))
    with pytest.raises(ValueError, match="grid_seconds=0.2 is for Whisper; a hubert hears each clip as it is"):
        built(arguments(PAPER, hubert, manifest, "--teacher.grid_seconds=0.2"))


def test_clips_below_one_frame_are_left_out_and_counted(tmp_path, caplog):
    path = write_clips(tmp_path, [399, 400, 8000])
    data = DataConfig(train_manifest=str(path))
    clips, left_out = build_clips(read_manifest(path), data, tmp_path / "run", shortest_samples=400, seed=0)
    assert clips.manifest.ids == ["clips-1", "clips-2"] and left_out == {"num_undecodable": 0, "num_short": 1}
    assert "1 of 3 clips" in caplog.text and "are shorter than 400 samples" in caplog.text
    with pytest.raises(ValueError, match="of 2, 2 are shorter than 400 samples and 0 cannot be decoded; give longer"):
        short = write_clips(tmp_path, [399, 100], "short")
        build_clips(read_manifest(short), data, tmp_path / "other", shortest_samples=400, seed=0)


def test_several_manifests_are_one_training_set(whisper, manifest, tmp_path, caplog):
    more = [write_clips(tmp_path, [8000, 4000], "more"), write_clips(tmp_path, [6400, 3200, 399], "last")]
    (tmp_path / "audio/last-1.wav").write_bytes(b"no audio")
    extra = f"--data.extra_manifests=[{','.join(map(str, more))}]"
    options = [extra, "--data.max_skipped_fraction=0.5", "--teacher.grid_seconds=0.1", "--data.crop_seconds=0.7"]
    trainer, run = built(arguments(BARISTA, whisper, manifest, *options))
    clips = trainer.train_dataset
    assert run["train_manifest"] == ", ".join(map(str, [manifest, *more])) and run["train_utterances"] == 10
    assert run["left_out"] == {"num_undecodable": 1, "num_short": 0}
    seconds = [0.5, 0.6, 0.7, 0.7, 0.7, 0.7, 0.5, 0.25, 0.4, 399 / 16_000]
    assert clips.durations_seconds.tolist() == pytest.approx(seconds)
    assert run["train_hours"] == pytest.approx(sum(seconds) / 3600)
    items = [clips[index] for index in range(10)]
    assert [item["id"] for item in items] == [f"clips-{i}" for i in range(6)] + ["more-0", "more-1", "last-0", "last-2"]
    assert "last-1" in (tmp_path / "run/corpus-2/skipped.jsonl").read_text()
    clips.set_epoch(1)
    assert not clips[5]["waveform"].equal(items[5]["waveform"]) and clips[6]["spans_seed"] != items[6]["spans_seed"]
    assert sorted(sum(trainer.sampler, [])) == list(range(10))


@pytest.mark.recipe
def test_a_run_on_two_manifests_resumes_with_the_same_student(whisper, manifest, tmp_path):
    more = write_clips(tmp_path, [3000, 5000, 9000], "more")
    argv = arguments(BARISTA, whisper, manifest, f"--data.extra_manifests=[{more}]", "--teacher.grid_seconds=0.2")
    argv += ["--data.max_batch_size=2", "--data.crop_seconds=0.5", "--trainer.max_steps=4", "--trainer.save_steps=3"]
    train.main(argv)
    run = tmp_path / "run"
    first = student_of(run)
    forget_the_end(run, 4)
    train.main(argv)
    assert all(student_of(run)[name].equal(weight) for name, weight in first.items())
    assert f"{manifest}, {more}" in (run / "student/README.md").read_text()


def test_an_id_in_two_manifests_is_refused_before_audio_is_decoded(whisper, manifest, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(manifest.read_text().splitlines()[3] + "\n")
    message = f"utterance id 'clips-3' is both in {manifest} and in {other}; of data.train_manifest and"
    with pytest.raises(ValueError, match=message):
        built(arguments(BARISTA, whisper, manifest, f"--data.extra_manifests=[{other}]"))
    assert not (tmp_path / "run/audio_check.json").exists()


def test_a_clip_that_is_a_sample_shorter_than_its_manifest_says_gets_silence(tmp_path):
    path = write_clips(tmp_path, [399])
    path.write_text(path.read_text().replace(str(399 / 16_000), "0.025"))
    clips, left_out = build_clips(
        read_manifest(path), DataConfig(train_manifest=str(path)), tmp_path / "run", shortest_samples=400, seed=0
    )
    assert len(clips[0]["waveform"]) == 400 and clips[0]["waveform"][-1] == 0 and left_out["num_short"] == 0


# configurations


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_yaml_is_a_configuration(path):
    argv = ["--config", str(path), "--trainer.use_cpu=true", "--trainer.bf16=false"]
    config, _ = parse_config(train.DistilHubertConfig, argv)
    assert config.trainer.output_dir == f"exp/distilhubert/{path.stem}" and config.trainer.max_steps > 0
    assert (config.loss.method == "colld") == path.stem.startswith("colld_")
    assert config.data.test_manifest is not None


def test_all_promised_datasets_have_a_recipe():
    assert [
        path.stem for path in YAMLS
    ] == "barista colld_barista colld_librispeech colld_mini fsdd librispeech mini quickstart".split()


def test_the_librispeech_recipe_has_the_papers_settings():
    argv = ["--config", str(PAPER), "--trainer.use_cpu=true", "--trainer.bf16=false"]
    config, _ = parse_config(train.DistilHubertConfig, argv)
    args = config.trainer
    assert config.teacher.layers == [4, 8, 12] and not config.teacher.dropout and config.teacher.dtype == "float32"
    assert config.student == train.StudentConfig(num_layers=2, init="teacher", feature_grad_mult=0.1)
    assert config.loss == LossConfig(distance="l1", cosine=1.0, cosine_form="log_sigmoid", normalize_targets=False)
    assert round(16_000 * config.data.crop_seconds) == 250_000 and config.data.max_batch_size == 24
    assert 24 * config.data.crop_seconds <= config.data.max_batch_seconds and args.gradient_accumulation_steps == 1
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon, args.max_grad_norm) == (0.9, 0.98, 1e-6, 5.0)
    assert (args.weight_decay, args.save_steps, args.logging_steps) == (0.01, 10_000, 50)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    factor = get_linear_schedule_with_warmup(optimizer, int(args.warmup_steps), args.max_steps).lr_lambdas[0]
    assert args.lr_scheduler_type == "linear" and args.learning_rate == 2e-4
    multipliers = {step: factor(step) for step in (7000, 14_000, 107_000, 200_000)}
    assert multipliers == pytest.approx({7000: 0.5, 14_000: 1.0, 107_000: 0.5, 200_000: 0.0})


def test_settings_that_do_not_fit_are_refused(capsys):
    for wrong, message in (
        (["--teacher.layers=null"], "teacher.layers=None with loss.method=distilhubert: distilhubert needs target"),
        (["--loss.method=colld"], "teacher.layers=[2, 4, 6] with loss.method=colld"),
        (
            ["--loss.method=colld", "--teacher.layers=null"],
            "student.heads=least_squares is for loss.method=distilhubert",
        ),
        (["--loss.method=fithubert"], "loss.method"),
        (["--loss.cosine=-1"], "loss.cosine must be 0 or more, got -1"),
        (["--loss.temperature=0"], "loss.temperature"),
        (["--loss.span_start_probability=0"], "loss.span_start_probability must be above 0 and at most 1, got 0"),
        (["--loss.num_negatives=0"], "loss.num_negatives must be 1 or more, got 0"),
        (["--teacher.dropout=true", "--teacher.states_dir=x"], "teacher.states_dir=x keeps one for each frame"),
        (["--data.crop_seconds=151"], "data.crop_seconds=151 is more than data.max_batch_seconds=150"),
        (["--data.max_batch_size=0"], "data.max_batch_size must be 1 or more, got 0"),
        (["--data.max_skipped_fraction=2"], "data.max_skipped_fraction must be 0 to 1, got 2"),
        (["--data.num_workers=-1"], "data.num_workers must be 0 or more, got -1"),
        (["--trainer.eval_strategy=epoch"], "needs data.dev_manifest"),
        (["--student.conv_dim=wide"], "student.conv_dim"),
        (["--student.conv_dim=8", "--student.init_from=x"], "student.conv_dim=8 is for a student made of the teacher"),
        (["--student.intermediate_size=8", "--student.init_from=x"], "student.init_from=x comes with its widths"),
    ):
        with pytest.raises(SystemExit) as stopped:
            parse_config(train.DistilHubertConfig, ["--config", str(BARISTA), "--trainer.use_cpu=true", *wrong])
        assert stopped.value.code == 2 and message in capsys.readouterr().err


# whole runs


def arguments(path: Path, teacher: str, manifest: Path, *more: str) -> list[str]:
    options = {
        "teacher.name": teacher,
        "teacher.dtype": "float32",
        "student.num_layers": 2,
        "data.train_manifest": manifest,
        "data.test_manifest": manifest,
        "data.crop_seconds": 1.0,
        "data.max_batch_seconds": 8,
        "data.num_workers": 0,
        "trainer.output_dir": manifest.parent / "run",
        "trainer.max_steps": 2,
        "trainer.save_strategy": "steps",
        "trainer.save_steps": 1,
        "trainer.logging_steps": 1,
        "trainer.learning_rate": 0.01,
        "trainer.warmup_steps": 0,
        "trainer.eval_strategy": "no",
        "trainer.bf16": "false",
        "trainer.use_cpu": "true",
        "trainer.report_to": "none",
    }
    if path.stem.startswith("colld"):
        options["loss.span_frames"] = 3
    else:
        options["teacher.layers"] = "[2,3,4]"
    if "window_seconds" in path.read_text():
        options["teacher.window_seconds"] = 2
    if "extra_manifests" in path.read_text():
        options["data.extra_manifests"] = f"[{write_clips(manifest.parent, [4000, 20_000], 'extra')}]"
    if "states_dir" in path.read_text():
        options |= {"teacher.states_dir": manifest.parent / "states", "data.crop_seconds": 2.0}
    if "dev_manifest" in path.read_text():
        options["data.dev_manifest"] = manifest
    return ["--config", str(path), *(f"--{key}={value}" for key, value in options.items()), *more]


def built(argv: list[str]) -> tuple[Any, dict[str, Any]]:
    return train.build_trainer(parse_config(train.DistilHubertConfig, argv)[0])


@pytest.mark.recipe
@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_recipe_trains_two_steps(path, hubert, whisper, manifest, tmp_path):
    family = {"librispeech": "hubert", "colld_librispeech": "wav2vec2-bert"}.get(path.stem, "whisper")
    teacher = {"hubert": hubert, "whisper": whisper}.get(family) or saved_teacher(tmp_path / "teacher", family)
    argv = arguments(path, teacher, manifest)
    states.main(argv)
    train.main(argv)
    run = tmp_path / "run"
    facts = facts_of(run)
    assert facts["teacher_states"] == ("stored in float16" if path.stem.endswith("mini") else "live")
    assert facts["steps"] == 2 and facts["encoder_layers"] == 2
    assert facts["train_utterances"] == (8 if path.stem.endswith("mini") else 6)
    assert facts["left_out"] == {"num_undecodable": 0, "num_short": 0} and facts["is_whisper"] == (family == "whisper")
    assert facts["teacher_layers"] == ([2, 4] if path.stem.startswith("colld") else [2, 3, 4])
    terms = {"loss/info_nce"} if path.stem.startswith("colld") else {"loss/l1", "loss/cosine"}
    assert terms <= log_of(run)[0].keys()
    card = (run / "student/README.md").read_text()
    assert "weights SHA-256" in card and "A speech encoder of 2 layers" in card and facts["loss"] in card

    trained = load_file(run / "checkpoint-2/model.safetensors")
    loaded = AutoModel.from_pretrained(run / "student")
    encoder = loaded.encoder if family == "whisper" else loaded
    weights = encoder.state_dict()
    assert all(weight.equal(weights[name[8:]]) for name, weight in trained.items() if name.startswith("encoder."))
    assert {f"encoder.{name}" for name in weights} <= trained.keys()
    theirs = (AutoModel.from_pretrained(teacher).encoder if family == "whisper" else loaded).state_dict()
    assert family != "whisper" or any(not weight.equal(theirs[name]) for name, weight in weights.items())
    extractor = AutoFeatureExtractor.from_pretrained(run / "student")
    features = extractor(np.zeros(16_000), sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        assert encoder(**features).last_hidden_state.shape[-1] == 32


@pytest.mark.recipe
@pytest.mark.parametrize("method", ["distilhubert", "colld"])
@pytest.mark.parametrize("family", ["hubert", "whisper"])
def test_stored_states_of_the_teacher_give_the_loss_of_the_live_one(family, method, hubert, whisper, tmp_path):
    # a HuBERT hears padding, and a Whisper silence up to the longest clip of a batch: so all are of one length
    manifest = write_clips(tmp_path, [16_000] * 4)
    path = {"distilhubert": BARISTA, "colld": COLLD}[method]
    argv = arguments(path, {"hubert": hubert, "whisper": whisper}[family], manifest, "--data.num_workers=1")
    argv += ["--teacher.window_seconds=null"] if family == "hubert" else ["--teacher.grid_seconds=0.3"]
    stored = [*argv, f"--teacher.states_dir={tmp_path / 'states'}"]
    with pytest.raises(ValueError, match="4 of 4 clips .* have no states in .*, the first .*store_teacher_states.py"):
        built(stored)
    states.main(stored)
    losses = []
    for arguments_ in (argv, stored):
        trainer, _ = built(arguments_)
        batch = next(iter(trainer.get_train_dataloader()))
        torch.manual_seed(0)
        losses.append(trainer.loss_terms(trainer.model.eval(), trainer.teacher, batch)[0].item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert trainer.teacher is None

    with pytest.raises(ValueError, match="has 1.0 s, which data.crop_seconds=0.5 would crop"):
        built([*stored, "--data.crop_seconds=0.5"])


@pytest.mark.recipe
@pytest.mark.parametrize("family", ["hubert", "whisper"])
def test_heads_by_least_squares_begin_with_less_to_learn(family, hubert, whisper, manifest):
    argv = arguments(BARISTA, {"hubert": hubert, "whisper": whisper}[family], manifest)
    argv += ["--teacher.window_seconds=null"] if family == "hubert" else ["--teacher.grid_seconds=0.2"]
    losses = {}
    for heads in ("random", "least_squares"):
        trainer, run = built([*argv, f"--student.heads={heads}"])
        assert run["heads"] == heads
        batch = next(iter(trainer.get_train_dataloader()))
        torch.manual_seed(0)
        losses[heads] = trainer.loss_terms(trainer.model.eval(), trainer.teacher, batch)[0].item()
    assert losses["least_squares"] < 0.8 * losses["random"]


@pytest.mark.recipe
def test_a_student_needs_nothing_of_speechkd(hubert, manifest, tmp_path):
    train.main(arguments(PAPER, hubert, manifest))
    code = (
        "import sys, torch\n"
        "from transformers import AutoModel\n"
        "encoder = AutoModel.from_pretrained(sys.argv[1])\n"
        "assert type(encoder).__name__ == 'HubertModel' and not encoder.config.feat_proj_layer_norm\n"
        "assert encoder(torch.zeros(1, 16000)).last_hidden_state.shape == (1, 49, 32)\n"
        "assert 'speechkd' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run/student")], check=True, cwd=tmp_path)


def overfit(argv: list[str], *more: str) -> list[float]:
    """Losses of a run on four fixed clips in one batch."""
    options = ["--trainer.max_steps=150", "--trainer.save_strategy=no", "--trainer.logging_steps=1"]
    trainer, _ = built([*argv, *options, *more])
    trainer.train()
    return [row["loss/total"] for row in trainer.state.log_history if "loss/total" in row]


@pytest.mark.recipe
@pytest.mark.parametrize(("form", "floor"), [("log_sigmoid", 0.3133), ("negative", -1.0)])
def test_the_loss_falls_towards_that_of_a_perfect_student(form, floor, tmp_path):
    teacher = saved_teacher(tmp_path / "teacher", "hubert", **QUIET)
    argv = arguments(PAPER, teacher, write_clips(tmp_path, [6400] * 4), f"--loss.cosine_form={form}")
    losses = overfit(argv)
    assert len(losses) == 150 and min(losses) > floor
    assert losses[-1] - floor < 0.25 * (losses[0] - floor)


@pytest.mark.recipe
def test_the_loss_of_colld_falls_and_without_a_learning_rate_nothing_changes(tmp_path):
    teacher = saved_teacher(tmp_path / "teacher", "whisper", dropout=0.0)
    argv = arguments(COLLD, teacher, write_clips(tmp_path, [6400] * 4))
    losses = overfit(argv)
    assert np.mean(losses[-30:]) < 0.7 * np.mean(losses[:10])
    still, _ = built([*argv, "--trainer.learning_rate=0", f"--trainer.output_dir={tmp_path / 'still'}"])
    before = {name: weight.clone() for name, weight in still.model.state_dict().items()}
    still.train()
    assert all(weight.equal(before[name]) for name, weight in still.model.state_dict().items())


@pytest.mark.recipe
@pytest.mark.parametrize("path", [PAPER, COLLD], ids=["distilhubert", "colld"])
def test_a_resumed_run_ends_with_the_same_student(path, hubert, whisper, manifest, tmp_path):
    # crops, spans, dropout and negatives are drawn anew in each step
    argv = arguments(path, hubert if path is PAPER else whisper, manifest, "--data.crop_seconds=0.7")
    argv += ["--data.max_batch_size=3", "--loss.num_negatives=2", "--trainer.max_steps=4", "--trainer.save_steps=3"]
    train.main(argv)
    run = tmp_path / "run"
    first = student_of(run)
    forget_the_end(run, 4)
    train.main(argv)
    assert first.keys() == student_of(run).keys()
    assert all(student_of(run)[name].equal(weight) for name, weight in first.items())
    assert (run / "checkpoint-4").is_dir()


@pytest.mark.recipe
def test_the_teacher_does_not_learn_and_frozen_convolutions_stay(hubert, manifest):
    trainer, run = built(arguments(PAPER, hubert, manifest, "--student.feature_grad_mult=0"))
    before = {name: weight.clone() for name, weight in trainer.teacher.state_dict().items()}
    fronts = [model.feature_extractor.state_dict() for model in (trainer.model.encoder, trainer.teacher)]
    assert run["parameters"] == trainer.model.encoder.num_parameters()
    assert run["head_parameters"] == 32 * 96 + 96 + 3 * 32 * 32 + 3 * 32
    trainer.train()
    assert not trainer.teacher.training
    assert all(weight.equal(before[name]) for name, weight in trainer.teacher.state_dict().items())
    assert all(weight.equal(fronts[1][name]) for name, weight in fronts[0].items())


@pytest.mark.recipe
def test_a_run_may_start_from_another_student(hubert, manifest, tmp_path):
    train.main(arguments(PAPER, hubert, manifest, "--data.dev_manifest=null"))
    start = str(tmp_path / "run/student")
    more = (f"--student.init_from={start}", f"--trainer.output_dir={tmp_path / 'more'}")
    trainer, run = built(arguments(PAPER, hubert, manifest, *more))
    assert run["init"] == start and run["encoder_layers"] == 2
    weights = trainer.model.encoder.state_dict()
    assert all(weights[name].equal(weight) for name, weight in student_of(tmp_path / "run").items())


@pytest.mark.recipe
@pytest.mark.parametrize(("conv_dim", "widths"), [("8", [8] * 7), ("[4,8,8,16,16,16,16]", [4, 8, 8, 16, 16, 16, 16])])
def test_a_student_with_thinner_convolutions_trains_and_is_loaded_by_stock_transformers(
    conv_dim, widths, hubert, manifest, tmp_path
):
    more = (f"--student.conv_dim={conv_dim}", "--student.num_layers=3", "--student.intermediate_size=40")
    train.main(arguments(PAPER, hubert, manifest, *more))
    loaded, info = AutoModel.from_pretrained(tmp_path / "run/student", output_loading_info=True)
    facts = facts_of(tmp_path / "run")
    assert list(loaded.config.conv_dim) == widths and not info["missing_keys"] and len(loaded.encoder.layers) == 3
    assert facts["parameters"] == loaded.num_parameters() and facts["encoder_layers"] == 3


@pytest.mark.recipe
def test_the_development_set_is_scored_alike_each_time(whisper, manifest, tmp_path):
    more = [f"--data.dev_manifest={manifest}", "--trainer.eval_strategy=steps", "--trainer.eval_steps=1"]
    more += ["--trainer.learning_rate=0"]
    train.main([*arguments(COLLD, whisper, manifest), *more])
    losses = [row["eval_loss/info_nce"] for row in log_of(tmp_path / "run") if "eval_loss/info_nce" in row]
    assert len(losses) == 2 and losses[0] == losses[1] > 0


@pytest.mark.recipe
def test_teachers_and_students_that_do_not_fit_are_refused(hubert, whisper, manifest, tmp_path):
    def refused(path: Path, teacher: str, *more: str) -> str:
        with pytest.raises(ValueError) as error:
            built(arguments(path, teacher, manifest, *more))
        return str(error.value)

    message = refused(PAPER, hubert, "--teacher.layers=[2,5]")
    assert "target layers [2, 5]: [5] cannot be taken from a teacher of 4 layers; name some of 1 to 4" in message
    assert "num_layers=5, but the teacher has 4 layers" in refused(COLLD, whisper, "--student.num_layers=5")
    assert "window_seconds=2 is for a Whisper" in refused(BARISTA, hubert)
    assert "a window of 3 s cannot be cut" in refused(BARISTA, whisper, "--teacher.window_seconds=3")
    message = refused(BARISTA, whisper, f"--student.init_from={hubert}", "--teacher.window_seconds=null")
    assert "model_type hubert, of the teacher whisper" in message
    scaled = saved_teacher(tmp_path / "scaled", "hubert", normalize_input=True)
    message = refused(PAPER, hubert, f"--student.init_from={scaled}")
    assert "hears other input than the teacher: do_normalize True, of the teacher False; take an" in message
    bert = saved_teacher(tmp_path / "bert", "wav2vec2-bert")
    message = refused(RECIPE / "colld_librispeech.yaml", bert, "--student.feature_grad_mult=0.1")
    assert "a w2v-BERT has no convolutions before its projection; set it to 1" in message
    assert "conv_dim=8, but a whisper has no convolutions" in refused(BARISTA, whisper, "--student.conv_dim=8")


@pytest.mark.recipe
def test_clips_longer_than_a_whispers_window_are_refused_or_cropped(whisper, tmp_path):
    manifest = write_clips(tmp_path, [8000, 24_000])
    argv = arguments(BARISTA, whisper, manifest, "--teacher.window_seconds=1")
    with pytest.raises(ValueError, match="the longest clip has 1.5 s and the encoder hears 1 s; lower data.crop_sec"):
        built([*argv, "--data.crop_seconds=8"])
    trainer, run = built([*argv, "--data.crop_seconds=1"])
    assert run["train_hours"] == pytest.approx(1.5 / 3600)
    trainer.train()


@pytest.mark.recipe
def test_short_clips_are_counted_and_do_not_stop_a_run(hubert, tmp_path):
    train.main(arguments(PAPER, hubert, write_clips(tmp_path, [399, 400, 719, 8000])))
    facts = facts_of(tmp_path / "run")
    assert facts["left_out"] == {"num_undecodable": 0, "num_short": 1} and facts["train_utterances"] == 3


@pytest.mark.recipe
def test_clips_that_cannot_be_read_are_skipped_up_to_the_limit(hubert, manifest, tmp_path):
    (tmp_path / "audio/clips-3.wav").write_bytes(b"RIFF, but nothing more")
    argv = arguments(PAPER, hubert, manifest, "--data.dev_manifest=null")
    with pytest.raises(ValueError, match="1 of 6 clips .* were skipped"):
        built(argv)
    _, run = built([*argv, "--data.max_skipped_fraction=0.2"])
    assert run["train_utterances"] == 5 and run["left_out"]["num_undecodable"] == 1
    assert "clips-3" in (tmp_path / "run/skipped.jsonl").read_text()


@pytest.mark.recipe
def test_doctor_checks_the_recipe_and_estimates_its_costs(hubert, manifest):
    test_manifest = write_clips(manifest.parent, [8000], "test")
    argv = arguments(PAPER, hubert, manifest, f"--data.test_manifest={test_manifest}", "--data.dev_manifest=null")
    found = check_config(PAPER, argv[2:])
    assert found["problems"] == [] and found["config"]["class"] == "DistilHubertConfig"
    assert found["estimates"]["total_steps"] == 2 and not (manifest.parent / "run").exists()


@pytest.mark.recipe
def test_doctor_reads_every_manifest_of_a_whisper_and_no_texts(whisper, manifest):
    test_manifest = write_clips(manifest.parent, [8000], "test")
    more = write_clips(manifest.parent, [8000, 4000], "more")
    argv = arguments(BARISTA, whisper, manifest, f"--data.test_manifest={test_manifest}", "--data.max_batch_seconds=60")
    found = check_config(BARISTA, [*argv[2:], "--teacher.grid_seconds=0.2", f"--data.extra_manifests=[{more}]"])
    assert found["problems"] == [] and found["labels"] == {} and found["estimates"]["total_steps"] == 2
    assert found["manifests"]["train, data.extra_manifests[0]"]["num_utterances"] == 2
    overlap = check_config(BARISTA, [*argv[2:], f"--data.extra_manifests=[{test_manifest}]"])["problems"]
    assert any("both in data.extra_manifests[0] and data.test_manifest" in problem for problem in overlap)


def test_doctor_measures_batches_by_what_a_whisper_hears(manifest):
    def longer_than_batch(*more):
        # the missing teacher spares the trial
        argv = arguments(BARISTA, "missing", manifest, "--data.crop_seconds=1", "--data.max_batch_seconds=2", *more)
        model = WhisperConfig(max_source_positions=100)
        config = parse_config(train.DistilHubertConfig, argv)[0]
        return _manifest_facts(read_manifest(manifest), _limits(config, model))["longer_than_batch"]

    assert longer_than_batch("--teacher.window_seconds=null") == 0  # the model's own 2 s
    assert longer_than_batch("--teacher.window_seconds=3") == len(read_manifest(manifest))
    assert longer_than_batch("--teacher.window_seconds=3", "--teacher.grid_seconds=0.2") == 0


def test_run_sh_says_what_would_do(tmp_path):
    done = run_sh("distilhubert", tmp_path, "timit")
    assert done.returncode == 2 and "there are: barista colld_barista colld_librispeech colld_mini" in done.stderr
    done = run_sh("distilhubert", tmp_path, "fsdd", "--stage", "5")
    assert done.returncode == 2 and "a stage is 1 to 4, not '5'" in done.stderr
    done = run_sh("distilhubert", tmp_path, "--help")
    assert done.returncode == 0 and "Stages: 1 prepare, 2 states, 3 train, 4 probe." in done.stdout


def test_the_small_runs_differ_in_method_alone_and_compute_little_silence():
    runs = {}
    for name in ("mini", "colld_mini"):
        argv = ["--config", str(RECIPE / f"{name}.yaml"), "--trainer.use_cpu=true"]
        runs[name], _ = parse_config(train.DistilHubertConfig, argv)
    mini, colld = runs["mini"], runs["colld_mini"]
    mini.student.heads = "random"  # the maps of colld start as the identity
    assert mini.data == colld.data and mini.student == colld.student and mini.teacher.grid_seconds == 0.64
    settings = ("max_steps", "learning_rate", "warmup_steps", "max_grad_norm", "adam_beta2")
    assert all(getattr(mini.trainer, key) == getattr(colld.trainer, key) for key in settings)
    assert mini.data.train_manifests == ["data/mini/fsdd/train.jsonl", "data/mini/barista/train.jsonl"]


@pytest.mark.recipe
def test_the_stages_end_with_a_student_once(hubert, tmp_path):
    for digit in range(4):
        for speaker in ("ann", "bob"):
            write_tone(tmp_path / f"corpus/recordings/{digit}_{speaker}_0.wav", 0.3, 8000, pitch_hz=200 + 50 * digit)
    options = arguments(RECIPE / "fsdd.yaml", hubert, Path("data/fsdd/train.jsonl"), "--teacher.window_seconds=null")
    words = ["fsdd", "--corpus-dir", "corpus", *options[2:], "--data.test_manifest=data/fsdd/test.jsonl"]
    words += ["--data.crop_seconds=2", "--trainer.output_dir=exp/run"]
    first = run_sh("distilhubert", tmp_path, *words)
    assert first.returncode == 0, first.stderr[-2000:]
    facts = facts_of(tmp_path / "exp/run")
    assert facts["train_utterances"] == 240 and (tmp_path / "exp/run/student/model.safetensors").is_file()
    again = run_sh("distilhubert", tmp_path, *words)
    assert again.returncode == 0 and again.stdout.count("finished before, skipped") == 2
    assert "stage 4 (probe): no probe section, nothing to score" in first.stdout
    assert "stage 2 (states): no teacher.states_dir, the teacher runs in every step" in first.stdout
    changed = run_sh("distilhubert", tmp_path, *words, "--loss.cosine=0.5")
    assert changed.returncode == 2 and "loss.cosine was 1.0, now 0.5" in changed.stderr
