"""recipes/dphubert on tiny random HuBERTs and Whispers and generated audio: both steps, what lies between, errors."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from recipe_runs import QUIET, facts_of, forget_the_end, log_of, run_sh, saved_teacher, student_of, write_clips
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor, get_linear_schedule_with_warmup

sys.path.append(str(ROOT / "recipes/dphubert"))  # behind the others: its train.py is loaded by path

from pruned_students import PROJECTIONS_FILE, gated_student
from pruning_objective import LossConfig, SparsityTarget, count_items, loss_terms

from speechkd.config import parse_config
from speechkd.data.encoder_clips import ClipSet, collate_clips
from speechkd.data.manifest import read_manifest
from speechkd.estimate import load_recipe
from speechkd.losses.layerwise import distilhubert_terms
from speechkd.models.encoder_inputs import EncoderInputs
from speechkd.models.pruned_encoder import PrunedEncoderModel
from speechkd.models.pruning import GatedEncoder, layer_states
from speechkd.models.speech_encoders import load_encoder, save_encoder

RECIPE = ROOT / "recipes/dphubert"
YAMLS = sorted(RECIPE.glob("*.yaml"))
PAPER, BARISTA = RECIPE / "librispeech.yaml", RECIPE / "barista.yaml"
ON_CPU = ["--trainer.use_cpu=true", "--trainer.bf16=false"]
train = load_recipe(RECIPE / "train.py")


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Four clips of 0.25 to 0.4 s."""
    return write_clips(tmp_path, [4000 + 800 * index for index in range(4)])


def arguments(path: Path, teacher: str, manifest: Path, *more: str) -> list[str]:
    options = {
        "teacher.name": teacher,
        "loss.layers": "[0,2,4]",
        "pruning.sparsity": 0.4,
        "pruning.ramp_steps": 1,
        "final.max_steps": 2,
        "final.warmup_steps": 0,
        "data.train_manifest": manifest,
        "data.test_manifest": manifest,
        "data.crop_seconds": 1.0,
        "data.max_batch_seconds": 8,
        "data.num_workers": 0,
        "trainer.output_dir": manifest.parent / "run",
        "trainer.max_steps": 2,
        "trainer.save_steps": 1,
        "trainer.logging_steps": 1,
        "trainer.warmup_steps": 0,
        "trainer.eval_strategy": "no",
        "trainer.bf16": "false",
        "trainer.use_cpu": "true",
        "trainer.report_to": "none",
    }
    if "window_seconds" in path.read_text():
        options["teacher.window_seconds"] = 1
    if "extra_manifests" in path.read_text():
        options["data.extra_manifests"] = f"[{write_clips(manifest.parent, [4000, 12_000], 'extra')}]"
    if "dev_manifest" in path.read_text():
        options["data.dev_manifest"] = "null"
    return ["--config", str(path), *(f"--{key}={value}" for key, value in options.items()), *more]


def built(argv: list[str]) -> tuple[Any, dict[str, Any], EncoderInputs]:
    return train.build_trainer(parse_config(train.DPHubertConfig, argv)[0])


# the objective


@pytest.mark.parametrize(("family", "grid_seconds"), [("wav2vec2", None), ("whisper", None), ("whisper", 0.5)])
def test_the_loss_of_a_batch_is_that_of_its_clips_and_the_penalty_counts_once(family, grid_seconds, manifest, tmp_path):
    # encoders that padding does not reach; the clips of up to 0.4 s all end on the same point of the grid
    changes = {"dropout": 0.0} if family == "whisper" else QUIET
    teacher, normalize = load_encoder(saved_teacher(tmp_path / "teacher", family, True, **changes))
    inputs = EncoderInputs(teacher, normalize_input=normalize, grid_seconds=grid_seconds)
    weights = LossConfig(layers=[0, 2, 4], cosine=0.5)
    student = gated_student(teacher, ["heads", "ffn_units"], weights.layers, 0.4)
    student.penalty.linear.data.fill_(-3.0)
    clips = ClipSet(read_manifest(manifest), 2.0)
    batch = collate_clips([clips[index] for index in range(4)])
    options: dict[str, Any] = {"inputs": inputs, "weights": weights, "target": SparsityTarget(0.4, 10, lambda: 5)}
    num_items = int(count_items(batch, inputs=inputs, num_layers=3))
    student.train()
    loss, terms = loss_terms(student, teacher, batch, **options)
    penalty = -3.0 * (student.sparsity().item() - 0.2)
    assert terms["penalty"].item() / num_items == pytest.approx(penalty, rel=1e-4)
    assert terms["sparsity"].item() / num_items == pytest.approx(student.sparsity().item(), rel=1e-4)
    assert terms["target_sparsity"].item() / num_items == pytest.approx(0.2)
    assert loss.item() == pytest.approx(sum(terms[name].item() for name in ("l1", "cosine", "penalty")), rel=1e-4)

    loss, terms = loss_terms(student.eval(), teacher, batch, **options)  # no draws, no penalty
    assert terms.keys() == {"l1", "cosine"}
    expected = torch.zeros(2)
    with torch.no_grad():
        for row, length in zip(batch["waveforms"], batch["num_samples"], strict=True):
            heard = inputs(row[None, :length] / 32768, torch.tensor([length]))
            width = int(inputs.num_frames(torch.tensor(length)))
            ours = student.projections(layer_states(student, weights.layers, **heard))[:, :, :width]
            theirs = layer_states(teacher, weights.layers, **heard)[:, :, :width]
            both = distilhubert_terms(ours, theirs, reduction="sum", cosine_weight=0.5, form="negative")
            expected += torch.stack(both)
    assert [terms["l1"].item(), terms["cosine"].item()] == pytest.approx(expected.tolist(), rel=1e-3)


# configurations


@pytest.mark.parametrize("step", ["prune", "distil"])
@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_yaml_is_a_configuration_of_both_steps(path, step):
    config, resolved = parse_config(train.DPHubertConfig, ["--config", str(path), f"--step={step}", *ON_CPU])
    folder = f"exp/dphubert/{path.stem}"
    assert config.trainer.output_dir == (f"{folder}-pruned" if step == "prune" else folder)
    assert f"output_dir: {folder}\n" in resolved and config.step_one_dir == f"{folder}-pruned"
    assert config.pruning.gates == ["conv", "heads", "ffn_units"] and config.data.test_manifest is not None
    assert (config.trainer.max_steps == config.final.max_steps) == (step == "distil")


def test_all_promised_datasets_have_a_recipe():
    assert [path.stem for path in YAMLS] == "barista fsdd librispeech mini quickstart".split()


def test_the_librispeech_recipe_has_the_papers_settings():
    steps = {}
    for step in ("prune", "distil"):
        config, _ = parse_config(train.DPHubertConfig, ["--config", str(PAPER), f"--step={step}", *ON_CPU])
        args = config.trainer
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
        factor = get_linear_schedule_with_warmup(optimizer, int(args.warmup_steps), args.max_steps).lr_lambdas[0]
        steps[step] = (args.max_steps, args.warmup_steps, args.learning_rate, factor(args.warmup_steps // 2))
        assert args.lr_scheduler_type == "linear"
    assert steps == {"prune": (50_000, 15_000, 2e-4, 0.5), "distil": (25_000, 5000, 1e-4, 0.5)}
    assert config.loss == LossConfig(layers=[0, 4, 8, 12], distance="l1", cosine=1.0, cosine_form="negative")
    assert config.pruning == train.PruningConfig(sparsity=0.75, ramp_steps=5000, learning_rate=0.02)
    assert (args.adam_beta1, args.adam_beta2, args.weight_decay, args.max_grad_norm) == (0.9, 0.999, 0.0, 10.0)
    assert args.seed == 2022 and config.data.max_batch_seconds == 160 and args.gradient_accumulation_steps == 1
    assert round(16_000 * config.data.crop_seconds) == 250_000 and config.teacher.name == "facebook/hubert-base-ls960"


def test_settings_that_do_not_fit_are_refused(capsys):
    for wrong, message in (
        (["--pruning.sparsity=1"], "pruning.sparsity=1; give the share to remove, above 0 and below 1"),
        (["--pruning.sparsity=0"], "pruning.sparsity=0; give the share"),
        (["--pruning.ramp_steps=301"], "pruning.ramp_steps=301 is more than trainer.max_steps=300, so the target is"),
        (["--pruning.ramp_steps=0"], "pruning.ramp_steps must be 1 or more, got 0"),
        (["--pruning.gates=[heads,heads]"], "pruning.gates=['heads', 'heads']; give one or more, each once"),
        (["--pruning.gates=[layers]"], "pruning.gates"),
        (["--pruning.learning_rate=0"], "pruning.learning_rate must be above 0, got 0"),
        (["--loss.layers=[4,2]"], "loss.layers=[4, 2]; give layers from 0, rising, each once"),
        (["--loss.layers=[]"], "loss.layers=[]; give layers"),
        (["--loss.cosine=-1"], "loss.cosine must be 0 or more, got -1"),
        (["--final.max_steps=0"], "final.max_steps must be 1 or more, got 0"),
        (["--step=three"], "step"),
        (["--data.crop_seconds=151"], "data.crop_seconds=151 is more than data.max_batch_seconds=150"),
        (["--trainer.eval_strategy=epoch"], "needs data.dev_manifest"),
        (
            [
                "--data.dev_manifest=dev.jsonl",
                *(f"--trainer.{name}_strategy=steps" for name in ("eval", "save")),
                "--trainer.load_best_model_at_end=true",
            ],
            "leave it to --step distil",
        ),
    ):
        with pytest.raises(SystemExit) as stopped:
            parse_config(train.DPHubertConfig, ["--config", str(BARISTA), "--trainer.use_cpu=true", *wrong])
        assert stopped.value.code == 2 and message in capsys.readouterr().err, wrong


# whole runs


@pytest.mark.recipe
@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_recipe_takes_two_steps_of_both(path, hubert, whisper, manifest, tmp_path):
    teacher = hubert if path is PAPER else whisper
    argv = arguments(path, teacher, manifest)
    train.main(argv)
    first, final = tmp_path / "run-pruned", tmp_path / "run"
    pruned = facts_of(first)
    assert not final.exists() and pruned["steps"] == 2
    assert pruned["train_utterances"] == (6 if path.stem == "mini" else 4)
    terms = {f"loss/{name}" for name in ("l1", "cosine", "penalty", "sparsity", "target_sparsity")}
    rows = [row for row in log_of(first) if "loss/total" in row]
    assert terms <= rows[0].keys() and [row["loss/target_sparsity"] for row in rows] == pytest.approx([0, 0.4])
    assert "Step one of two" in (first / "student/README.md").read_text()

    train.main([*argv, "--step=distil"])
    facts = facts_of(final)
    assert facts["step"] == "distil" and facts["steps"] == 2 and facts["parameters"] == pruned["parameters"]
    rows = [row for row in log_of(final) if "loss/total" in row]
    assert len(rows) == 2 and "loss/penalty" not in rows[0] and {"loss/l1", "loss/cosine"} <= rows[0].keys()
    card = (final / "student/README.md").read_text()
    assert "PrunedEncoderModel.from_pretrained" in card and "trust_remote_code=True" in card and facts["loss"] in card
    assert (first / "student" / PROJECTIONS_FILE).is_file() and not (final / "student" / PROJECTIONS_FILE).exists()
    before, after = student_of(first), student_of(final)
    assert before.keys() == after.keys() and any(not after[name].equal(before[name]) for name in after)

    model = PrunedEncoderModel.from_pretrained(final / "student")
    assert all(weight.equal(after[name]) for name, weight in model.state_dict().items())
    assert model.num_parameters() == facts["parameters"] and model.config.ffn_units == facts["ffn_units"]
    extractor = AutoFeatureExtractor.from_pretrained(final / "student")
    features = extractor(np.zeros(16_000), sampling_rate=16_000, return_tensors="pt")
    encoder, _ = load_encoder(str(final / "student"))  # what probes and other recipes take
    with torch.no_grad():
        states = model(**features).last_hidden_state
        assert states.shape[-1] == 32 and encoder(**features).last_hidden_state.equal(states)
    with pytest.raises(ValueError, match="the encoder is pruned; save the PrunedEncoderModel that it is part of"):
        save_encoder(encoder, tmp_path / "stock", normalize_input=False)


@pytest.mark.recipe
@pytest.mark.parametrize("family", ["hubert", "whisper"])
def test_the_extracted_student_is_the_gated_one_of_the_last_checkpoint(family, hubert, whisper, manifest, tmp_path):
    # with gates on the last convolution of a HuBERT, what follows would see other means: the card of the method
    gates = "[heads,ffn_units]" if family == "hubert" else "[conv,heads,ffn_units]"
    path, teacher = (PAPER, hubert) if family == "hubert" else (BARISTA, whisper)
    argv = arguments(path, teacher, manifest, f"--pruning.gates={gates}", "--pruning.learning_rate=0.5")
    train.main(argv)
    run, facts = tmp_path / "run-pruned", facts_of(tmp_path / "run-pruned")
    trainer, _, inputs = built([*argv, f"--trainer.output_dir={tmp_path / 'other'}"])
    gated = trainer.model
    gated.load_state_dict(load_file(run / "checkpoint-2/model.safetensors"))
    gated.eval()
    pruned = PrunedEncoderModel.from_pretrained(run / "student")
    heard = inputs(0.1 * torch.randn(2, 8000), torch.tensor([8000, 8000]))
    with torch.no_grad():
        torch.testing.assert_close(
            pruned(**heard).last_hidden_state, gated(**heard).last_hidden_state, atol=1e-5, rtol=0
        )
        assert gated.expected_parameters().item() == pytest.approx(facts["counted_parameters"])
    zeros = [int((gate.evaluation_mask() == 0).sum()) for gate in gated.gates["ffn_units"]]
    assert facts["ffn_units"] == [48 - number for number in zeros] and sum(zeros) > 0
    # a gate's expected size is not a whole number: half a unit in each row at most
    per_unit = {"conv": 3 * (80 + 32) + 1, "heads": 16 * 131, "ffn_units": 65}
    allowed = sum(per_unit[kind] * len(gated.gates[kind]) / 2 for kind in gated.gates)
    assert abs(facts["parameters"] - facts["counted_parameters"]) <= allowed


@pytest.mark.recipe
def test_both_steps_compute_a_batch_on_its_longest_clip_with_a_grid(whisper, manifest, tmp_path):
    argv = arguments(BARISTA, whisper, manifest, "--teacher.grid_seconds=0.1", "--data.max_batch_seconds=1")
    for step, run in (("prune", tmp_path / "run-pruned"), ("distil", tmp_path / "run")):
        trainer, _, _ = built([*argv, f"--step={step}"])
        heard: list[int] = []
        encoder = trainer.model.encoder if step == "prune" else trainer.model.encoder.encoder
        for model in (trainer.teacher, encoder):
            model.conv2.register_forward_hook(lambda *call, into=heard: into.append(call[-1].shape[-1]))
        batch = trainer.data_collator([trainer.train_dataset[index] for index in (0, 1)])  # 0.25 and 0.3 s
        trainer.loss_terms(trainer.model, trainer.teacher, batch)
        assert heard == [15, 15] and batch["padded_seconds"] == pytest.approx(0.6)
        assert len(list(trainer.sampler)) < 4  # the window is 1 s: without a grid a batch holds one clip
        train.main([*argv, f"--step={step}"])
        assert facts_of(run)["grid_seconds"] == 0.1


@pytest.mark.recipe
def test_the_sparsity_moves_to_its_target(hubert, manifest, tmp_path):
    more = ["--pruning.learning_rate=0.2", "--pruning.ramp_steps=20", "--trainer.max_steps=80"]
    train.main(arguments(PAPER, hubert, manifest, *more, "--trainer.save_strategy=no"))
    rows = [row for row in log_of(tmp_path / "run-pruned") if "loss/sparsity" in row]
    sparsity = [row["loss/sparsity"] for row in rows]
    assert [rows[step]["loss/target_sparsity"] for step in (0, 10, 20, 79)] == pytest.approx([0, 0.2, 0.4, 0.4])
    facts = facts_of(tmp_path / "run-pruned")
    # so short a run ends near the target; over hundreds of steps the multipliers settle
    assert sparsity[0] < 0.1 and facts["sparsity"] == pytest.approx(0.4, abs=0.12)
    teacher = facts["counted_parameters"] / (1 - facts["sparsity"])
    assert facts["parameters"] == pytest.approx(0.6 * teacher, rel=0.15)


@pytest.mark.recipe
def test_gates_and_multipliers_have_their_own_learning_rate_under_one_schedule(whisper, manifest):
    more = ["--pruning.learning_rate=0.3", "--trainer.learning_rate=0.002", "--trainer.max_steps=4"]
    trainer, _, _ = built(arguments(BARISTA, whisper, manifest, *more, "--pruning.ramp_steps=1"))
    rates: list[list[float]] = []
    optimizer = trainer.create_optimizer()
    optimizer.register_step_pre_hook(lambda *call: rates.append([group["lr"] for group in optimizer.param_groups]))
    trainer.train()
    shares = [1.0, 0.75, 0.5, 0.25]
    assert [row[0] for row in rates] == pytest.approx([0.002 * share for share in shares])
    assert [row[1] for row in rates] == [row[2] for row in rates] == pytest.approx([0.3 * share for share in shares])
    penalty = trainer.model.penalty
    assert penalty.quadratic > 0 > penalty.linear  # the target is above the sparsity
    assert not trainer.teacher.training and not any(weight.requires_grad for weight in trainer.teacher.parameters())


@pytest.mark.recipe
def test_resumed_steps_end_with_the_same_student(hubert, manifest, tmp_path):
    # crops, dropout and gates are drawn anew in each step
    more = ["--data.crop_seconds=0.3", "--data.max_batch_size=2", "--trainer.max_steps=4", "--trainer.save_steps=3"]
    argv = arguments(PAPER, hubert, manifest, *more, "--final.max_steps=4")
    for step, run in (("prune", tmp_path / "run-pruned"), ("distil", tmp_path / "run")):
        train.main([*argv, f"--step={step}"])
        first, facts = student_of(run), facts_of(run)
        forget_the_end(run, 4)
        train.main([*argv, f"--step={step}"])
        assert first.keys() == student_of(run).keys()
        assert all(student_of(run)[name].equal(weight) for name, weight in first.items())
        assert facts_of(run) == facts and (run / "checkpoint-4").is_dir()


@pytest.mark.recipe
def test_step_two_starts_from_the_pruned_student_and_its_projections(hubert, whisper, manifest, tmp_path):
    argv = arguments(PAPER, hubert, manifest, "--trainer.learning_rate=0.01")
    second = [*argv, "--step=distil"]
    with pytest.raises(ValueError, match="run-pruned, where no finished step one is; run it first, with --step prune"):
        built(second)
    train.main(argv)
    trainer, run, _ = built(second)
    student = trainer.model
    assert all(
        student.encoder.state_dict()[name].equal(weight) for name, weight in student_of(tmp_path / "run-pruned").items()
    )
    projections = load_file(tmp_path / "run-pruned/student" / PROJECTIONS_FILE)
    assert all(student.projections.state_dict()[name].equal(weight) for name, weight in projections.items())
    assert not projections["shared.weight"].equal(torch.eye(32)) and run["step"] == "distil"
    assert all(weight.requires_grad for weight in student.parameters())
    with pytest.raises(ValueError, match=r"are for layers \[0, 2, 4\], but loss.layers=\[2, 4\]; both steps need"):
        built([*second, "--loss.layers=[2,4]"])
    with pytest.raises(ValueError, match="was pruned out of .*hubert .*but the teacher is .*whisper"):
        built([*second, f"--teacher.name={whisper}", "--teacher.window_seconds=1"])


@pytest.mark.recipe
def test_what_a_teacher_does_not_have_is_refused(hubert, whisper, manifest, tmp_path):
    def refused(path: Path, teacher: str, *more: str) -> str:
        with pytest.raises(ValueError) as error:
            built(arguments(path, teacher, manifest, *more))
        return str(error.value)

    message = refused(PAPER, hubert, "--loss.layers=[0,5]")
    assert "loss.layers=[0, 5]: a teacher of 4 layers has no 5; choose from 0 to 4" in message
    message = refused(PAPER, hubert, "--pruning.sparsity=0.9")
    assert "pruning.sparsity=0.9, but gates on conv, heads, ffn_units can remove at most 0." in message
    message = refused(BARISTA, whisper, "--pruning.sparsity=0.5", "--pruning.gates=[heads]")
    assert "pruning.sparsity=0.5, but gates on heads can remove at most 0." in message and "lower it" in message
    assert "window_seconds=1 is for a Whisper" in refused(BARISTA, hubert)
    bert = saved_teacher(tmp_path / "bert", "wav2vec2-bert")
    assert "'wav2vec2-bert' cannot be pruned here" in refused(PAPER, bert)
    message = refused(
        BARISTA, whisper, "--data.max_batch_seconds=8", "--data.crop_seconds=0.3", "--teacher.window_seconds=3"
    )
    assert "a window of 3 s cannot be cut" in message


@pytest.mark.recipe
def test_a_student_that_lost_a_whole_convolution_is_refused(hubert, manifest):
    trainer, _, _ = built(arguments(PAPER, hubert, manifest))
    assert isinstance(trainer.model, GatedEncoder)
    trainer.model.gates["conv"][3].logits.data.fill_(-20.0)
    with pytest.raises(ValueError, match=r"conv_layers\.3\.conv would lose all of its 16 channels.*; lower the target"):
        trainer.model.extract()


def test_run_sh_says_what_would_do(tmp_path):
    done = run_sh("dphubert", tmp_path, "timit")
    assert done.returncode == 2 and "there are: barista fsdd librispeech mini quickstart" in done.stderr
    done = run_sh("dphubert", tmp_path, "fsdd", "--stage", "5")
    assert done.returncode == 2 and "a stage is 1 to 4, not '5'" in done.stderr
    done = run_sh("dphubert", tmp_path, "--help")
    assert done.returncode == 0 and "Stages: 1 prepare, 2 prune, 3 distil, 4 probe." in done.stdout


@pytest.mark.recipe
def test_the_stages_end_with_a_student_once(whisper, manifest, tmp_path):
    # preparing is the same in all recipes, and tested there
    options = arguments(RECIPE / "fsdd.yaml", whisper, manifest, "--trainer.save_strategy=no")
    words = ["fsdd", "--stage", "2", *options[2:]]
    done = run_sh("dphubert", tmp_path, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [facts_of(tmp_path / name)["step"] for name in ("run-pruned", "run")] == ["prune", "distil"]
    assert (tmp_path / "run/student/model.safetensors").is_file()
    changed = run_sh("dphubert", tmp_path, *words, "--final.max_steps=3")  # which step one does not read
    assert changed.returncode == 2 and changed.stdout.count("finished before, skipped") == 1
    assert "final.max_steps was 2, now 3" in changed.stderr
