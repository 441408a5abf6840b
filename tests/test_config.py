from pathlib import Path

import pytest
from train import DistilWhisperConfig

from speechkd.config import parse_config, save_config

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
YAMLS = sorted(RECIPES.glob("distil_whisper/*.yaml"))
FSDD = str(RECIPES / "distil_whisper/fsdd.yaml")


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_recipe_parses_and_its_resolved_form_is_accepted_back(path, tmp_path):
    config, resolved = parse_config(DistilWhisperConfig, ["--config", str(path), "--trainer.bf16", "false"])
    (tmp_path / "config.yaml").write_text(resolved)
    again, resolved_again = parse_config(DistilWhisperConfig, ["--config", str(tmp_path / "config.yaml")])
    assert resolved_again == resolved and again.loss == config.loss
    assert (config.loss.cross_entropy, config.loss.kl, config.loss.temperature) == (0.8, 1.0, 2.0)


def test_the_command_line_wins_over_the_file():
    config, _ = parse_config(DistilWhisperConfig, ["--config", FSDD, "--trainer.seed", "7", "--loss.kl", "0.5"])
    assert config.trainer.seed == 7 and config.loss.kl == 0.5


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("trainer: {learning_rat: 1.0}", "unknown key 'trainer.learning_rat'; did you mean 'trainer.learning_rate'?"),
        ("losses: {kl: 1}", "unknown key 'losses.kl'; did you mean 'loss.kl'?"),
        ("trainer: {seed: many}", '"trainer.seed"'),
        ("data: {max_skipped_fraction: 7}", "data.max_skipped_fraction must be 0 to 1, got 7"),
        ("data: {previous_text_probability: 1.1}", "data.previous_text_probability must be 0 to 1, got 1.1"),
        ("data: {timestamp_probability: 0.2}", "needs labels with timestamps; set decoding.timestamps=true"),
        ("data: {extra_corpora: [{train_manifest: x, weight: .nan}]}", "the weight of x is nan; it must be a positive"),
        ("data: {extra_corpora: [{train_manifest: x, languag: de}]}", "languag"),
        ("data: {extra_corpora: [{train_manifest: x}]}", "data.labels_dir, and that of every extra corpus"),
        ("loss: {cross_entropy: 0, kl: 0}", "loss weights must be >= 0 and not all 0"),
        ("teacher: null", "without a teacher set student.init_from"),
        ("student: {freeze_encoder: false}", "cache_encoder_states needs the teacher's whole encoder, frozen"),
        ("decoding: {task: sing}", '"decoding.task"'),
    ],
)
def test_wrong_keys_types_and_combinations_are_named(yaml, message, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text(yaml)
    with pytest.raises(SystemExit) as error:
        parse_config(DistilWhisperConfig, ["--config", FSDD, "--config", str(tmp_path / "bad.yaml")])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_an_empty_key_outside_its_section_is_named(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("labels_dir:\n")
    with pytest.raises(SystemExit):
        parse_config(DistilWhisperConfig, ["--config", str(tmp_path / "c.yaml")])
    assert "unknown key 'labels_dir'; did you mean 'data.labels_dir'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--trainer.learning_rate=.nan", "trainer.learning_rate is nan; it must be a finite number"),
        ("--loss.kl=.inf", "loss.kl is inf; it must be a finite number"),
        ("--trainer.max_steps=[[[[", "trainer.max_steps"),
        ("--trainer.eval_strategy=steps", "trainer.eval_strategy=steps needs data.dev_manifest"),
    ],
)
def test_values_that_no_run_can_have_are_named_on_the_command_line_too(option, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(DistilWhisperConfig, ["--config", FSDD, "--trainer.use_cpu=true", option])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_folder_that_holds_another_run_is_refused(tmp_path):
    save_config("a: 1\nb: 2\n", tmp_path)
    save_config("a: 1\nb: 2\n", tmp_path)
    with pytest.raises(ValueError, match=r"holds another run; changed: b: 3 \(was b: 2\)"):
        save_config("a: 1\nb: 3\n", tmp_path)


def test_a_misspelt_option_is_refused_also_when_the_configuration_is_only_printed(capsys):
    with pytest.raises(SystemExit) as error:
        parse_config(DistilWhisperConfig, ["--config", FSDD, "--trainer.learning_rat", "1", "--print_config"])
    assert error.value.code == 2 and "trainer.learning_rat" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        parse_config(DistilWhisperConfig, ["--config", FSDD, "--trainer.seed", "9", "--print_config"])
    assert error.value.code == 0 and "seed: 9" in capsys.readouterr().out
