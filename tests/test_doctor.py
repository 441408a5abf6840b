"""`speechkd doctor`: what it says of a sound configuration, and that it names everything wrong with an unsound one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train
from conftest import ROOT, write_tone
from test_recipes import arguments

from speechkd import doctor
from speechkd.cli import main
from speechkd.data.manifest import write_manifest
from speechkd.estimate import find_recipe, load_recipe, recipe_config_class
from speechkd.labels.pseudo_label import DecodingConfig, label_manifest

FSDD = ROOT / "recipes/distil_whisper/fsdd.yaml"


def write_tones(path: Path, prefix: str, text: str = "a tone", **more: str) -> Path:
    rows = []
    for index in range(4):
        audio = path.parent / f"audio/{prefix}-{index}.wav"
        write_tone(audio, 1.0, pitch_hz=300 + 40 * index)
        row = {"id": f"{prefix}-{index}", "audio": f"audio/{audio.name}", "duration_seconds": 1.0, "text": text}
        rows.append({**row, "sample_rate_hz": 16_000, **more})
    write_manifest(path, rows)
    return path


def examined(argv: list[str]) -> dict:
    return doctor.examine(config=argv[1], overrides=argv[2:])


def without_a_trial(manifest: Path, *more: str) -> list[str]:
    """Arguments whose missing teacher keeps the check short."""
    return arguments(FSDD, str(manifest.parent / "no-teacher"), manifest, manifest.parent / "no-labels", *more)


def test_a_sound_configuration_gets_estimates_that_a_real_run_confirms(tiny_teacher, tone_manifest, tmp_path, capsys):
    labels = tmp_path / "labels"
    decoding = DecodingConfig(max_new_tokens=6)
    targets = ("text", "encoder_states", "decoder_states")
    label_manifest(tiny_teacher, tone_manifest, labels / "train", decoding=decoding, targets=targets)
    test_manifest = write_tones(tmp_path / "test.jsonl", "test")
    argv = [*arguments(FSDD, tiny_teacher, tone_manifest, labels), f"--data.test_manifest={test_manifest}"]
    argv += ["--trainer.max_steps=12", "--trainer.save_steps=6", "--trainer.logging_steps=1"]
    before = sorted(path for path in tmp_path.rglob("*"))

    main(["doctor", *argv, "--json"])  # a problem would end it with 2

    facts = json.loads(capsys.readouterr().out)
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert facts["problems"] == [] and facts["output_dir"] == str(tmp_path / "run")
    estimates = facts["estimates"]
    step_seconds = estimates["seconds_per_step"]
    assert estimates["steps_per_epoch"] == 3 and estimates["total_steps"] == 12
    assert estimates["minutes_per_epoch"] == pytest.approx(3 * step_seconds / 60)
    assert estimates["hours_in_all"] == pytest.approx(12 * step_seconds / 3600)
    assert 0.1 < estimates["peak_memory_gb"] < estimates["device_memory_gb"]
    assert estimates["checkpoints_kept"] == 2

    train.main(argv)

    checkpoint = tmp_path / "run/checkpoint-12"
    size_gb = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()) / 1e9
    assert estimates["checkpoint_gb"] == pytest.approx(size_gb, rel=0.05)
    log = [json.loads(line) for line in (tmp_path / "run/train_log.jsonl").read_text().splitlines()]
    real_seconds = log[-1]["train_runtime"] / 12
    assert real_seconds / 3 < step_seconds < real_seconds * 3


def test_all_problems_are_named_at_once_each_with_its_way_out(tone_manifest, tmp_path, capsys):
    missing = tmp_path / "data/fsdd/dev.jsonl"
    with pytest.raises(SystemExit) as error:
        main(["doctor", *without_a_trial(tone_manifest, f"--data.dev_manifest={missing}")])
    assert error.value.code == 2
    printed = capsys.readouterr().out
    problems = printed[printed.index("\nproblems:") : printed.index("\nadvice:")]
    assert problems.count("\n  - ") == 5, problems
    assert "teacher.name: model folder" in problems and "does not exist; check the path, or give a Hub id" in problems
    assert "data.dev_manifest: manifest" in problems and "run.sh fsdd --corpus-dir DIR --stop-stage 1`" in problems
    for split in ("train", "dev"):
        assert f"no-labels/{split} holds no label store" in problems
    targets = "--targets text encoder_states decoder_states --language en"
    assert f"{targets} --whisper-task transcribe --max-new-tokens 6`" in problems
    assert "6 utterance ids are both in data.train_manifest and data.test_manifest" in problems
    assert "not_made: time, memory and checkpoint size: teacher.name=" in printed
    assert not (tmp_path / "run").exists() and not (tmp_path / "no-labels").exists()


def test_every_wrong_key_and_value_is_named_and_the_rest_still_checked(tone_manifest, tmp_path):
    path = tmp_path / "recipe/mine.yaml"
    path.parent.mkdir()
    (path.parent / "train.py").write_text((ROOT / "recipes/distil_whisper/train.py").read_text())
    path.write_text(
        "trainer: {learning_rat: 1.0, seed: many}\nlosses: {kl: 1}\nteacher: {license: mit, cache_encoder_states: true}"
    )
    argv = without_a_trial(tone_manifest)
    facts = doctor.examine(config=str(path), overrides=argv[2:])
    problems = "\n".join(facts["problems"])
    assert "unknown key 'trainer.learning_rat'; did you mean 'trainer.learning_rate'?" in problems
    assert "unknown key 'losses" in problems and '"trainer.seed"' in problems
    assert "teacher.name: model folder" in problems
    assert facts["manifests"]["train"]["num_utterances"] == 6
    assert "the configuration has errors" in facts["estimates"]["not_made"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has bfloat16")
def test_bfloat16_without_a_gpu_does_not_hide_the_other_problems(tone_manifest):
    argv = [
        item for item in without_a_trial(tone_manifest) if not item.startswith(("--trainer.bf16", "--trainer.use_cpu"))
    ]
    facts = doctor.examine(config=str(FSDD.with_name("librispeech.yaml")), overrides=argv[2:])
    assert facts["problems"][0].startswith("trainer.bf16=true") and "or set trainer.bf16=false" in facts["problems"][0]
    assert any("teacher.name: model folder" in problem for problem in facts["problems"])


def test_labels_over_the_models_limit_are_counted(tiny_teacher, tmp_path):
    manifest = write_tones(tmp_path / "train.jsonl", "train", text="tone " * 500)
    argv = arguments(FSDD, tiny_teacher, manifest, tmp_path / "none")
    argv = [item for item in argv if not item.startswith(("--teacher.name", "--data.labels_dir"))]
    argv += ["--teacher=null", "--data.labels_dir=null", f"--student.init_from={tiny_teacher}", "--loss.kl=0"]
    facts = examined(argv)
    assert facts["labels"]["train"]["over_limit"] == 4 and facts["labels"]["train"]["longest_tokens"] > 448
    assert any("4 texts of data.train_manifest are longer than the model's 448" in item for item in facts["problems"])


def test_speakers_in_train_and_test_are_advice_and_no_problem(tmp_path):
    manifest = write_tones(tmp_path / "train.jsonl", "train", speaker="ada")
    test_manifest = write_tones(tmp_path / "test.jsonl", "test", speaker="ada")
    facts = examined(without_a_trial(manifest, f"--data.test_manifest={test_manifest}"))
    assert any("1 speakers are both" in advice and "ada" in advice for advice in facts["advice"])
    assert not any("data.test_manifest" in problem for problem in facts["problems"])


def test_a_trial_that_fails_is_a_problem_with_its_reason(tiny_teacher, tone_manifest, tmp_path):
    labels = tmp_path / "labels"
    decoding = DecodingConfig(max_new_tokens=6)
    targets = ("text", "decoder_states")
    label_manifest(tiny_teacher, tone_manifest, labels / "train", decoding=decoding, targets=targets)
    header = labels / "train/header.json"
    header.write_text(header.read_text().replace('"weights_sha256": "', '"weights_sha256": "0'))
    argv = [*arguments(FSDD, tiny_teacher, tone_manifest, labels), "--teacher.cache_encoder_states=false"]
    facts = examined(argv)
    assert any(
        "trial of the largest batch failed" in item and "come from teacher" in item for item in facts["problems"]
    )
    assert "come from teacher" in facts["estimates"]["not_made"]


def test_a_bad_manifest_is_a_problem_and_the_machine_is_still_described(tmp_path):
    facts = doctor.examine(manifest=str(tmp_path / "no.jsonl"))
    assert any("no.jsonl does not exist; write it with" in problem for problem in facts["problems"])
    assert set(facts["matmul_gflops"]) == {"float32", "bfloat16", "float16"}
    assert facts["cores"] >= 1 and 0 < facts["memory"]["free_gb"] <= facts["memory"]["total_gb"]
    assert all(cache["free_gb"] >= 0 for cache in facts["caches"].values())
    assert facts["packages"]["torch"] != "not installed"


def test_the_recipe_is_found_beside_the_yaml_or_by_the_method_of_a_run(tmp_path, monkeypatch):
    assert find_recipe(FSDD) == FSDD.with_name("train.py")
    run = tmp_path / "exp/distil_whisper/fsdd/config.yaml"
    run.parent.mkdir(parents=True)
    run.write_text("{}")
    monkeypatch.chdir(ROOT)
    assert find_recipe(run).resolve() == FSDD.with_name("train.py")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there is no .*fsdd/train.py and no recipes/distil_whisper/train.py; keep"):
        find_recipe(run)


def test_a_recipe_without_one_configuration_class_is_refused(tmp_path):
    (tmp_path / "train.py").write_text("from speechkd.config import DataConfig\n")
    with pytest.raises(ValueError, match="must define one dataclass whose name ends in Config"):
        recipe_config_class(load_recipe(tmp_path / "train.py"))


def test_settings_without_a_configuration_and_other_commands_refuse_unknown_options(capsys):
    with pytest.raises(SystemExit) as error:
        main(["doctor", "--trainer.seed", "7"])
    assert error.value.code == 2 and "add --config FILE" in capsys.readouterr().err
    code = "import sys; from speechkd.cli import main; main(sys.argv[1:])"
    given = ["label", "--teacher", "x", "--manifest", "m", "--output-dir", "o", "--trainer.seed", "7"]
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True)
    assert done.returncode == 2 and "unrecognized arguments: --trainer.seed 7" in done.stderr
