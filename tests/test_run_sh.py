"""recipes/distil_whisper/run.sh as a user calls it, with a tiny random teacher."""

import sys
from pathlib import Path

import pytest
from conftest import ROOT
from recipe_runs import run_sh
from test_data_prep import make_barista, make_fsdd

pytestmark = pytest.mark.recipe


def test_wrong_words_end_with_2_and_say_what_would_do(tmp_path):
    done = run_sh("distil_whisper", tmp_path, "timit")
    assert done.returncode == 2 and "there are: barista common_voice" in done.stderr and "quickstart" in done.stderr
    done = run_sh("distil_whisper", tmp_path, "fsdd", "--stage", "9")
    assert done.returncode == 2 and "a stage is 1 to 4, not '9'" in done.stderr
    done = run_sh("distil_whisper", tmp_path, "fsdd", "--corpus-dir")
    assert done.returncode == 2 and "--corpus-dir needs a value" in done.stderr
    done = run_sh("distil_whisper", tmp_path, "fsdd", "--corpus-dir", "nowhere")
    assert done.returncode == 2 and "nowhere does not exist; give --corpus-dir a folder with recordings/" in done.stderr
    done = run_sh("distil_whisper", tmp_path, "common_voice", "--corpus-dir", "nowhere")
    assert done.returncode == 2 and "nowhere does not exist" in done.stderr and "stage 1" in done.stdout
    done = run_sh("distil_whisper", tmp_path, "fsdd", "--data.train_manifest", "my/own/train.jsonl")
    assert done.returncode == 2 and "no script of data_prep makes my/own/train.jsonl" in done.stderr
    done = run_sh("distil_whisper", tmp_path, "fsdd", "--trainer.learning_rat", "1")
    assert done.returncode == 2 and "trainer.learning_rat" in done.stderr


def test_the_script_of_several_corpora_prepares_all_of_them_once(tmp_path):
    make_fsdd(tmp_path / "corpora/fsdd", ["ann", "bob"])
    make_barista(tmp_path / "corpora/barista", 20)
    words = ["mini", "--corpus-dir", "corpora", "--stop-stage", "1"]
    done = run_sh("distilhubert", tmp_path, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "data/mini/fsdd/train.jsonl").is_file() and (tmp_path / "data/mini/barista/test.jsonl").is_file()
    for recipe, dataset in (("distilhubert", "colld_mini"), ("dphubert", "mini")):
        again = run_sh(recipe, tmp_path, dataset, *words[1:])
        assert again.returncode == 0 and "stage 1 (prepare): finished before, skipped" in again.stdout, again.stderr


@pytest.mark.parametrize(("recipe", "stage"), [("distilhubert", 4), ("dphubert", 4)])
def test_the_last_stage_of_a_compact_encoder_probes_it_once(recipe, stage, tmp_path):
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    log = f'case "$1" in *probe.py) echo "$@" >> "$0.log"; exit 0 ;; esac\nexec {sys.executable} "$@"\n'
    (bin_dir / "python").write_text(f"#!/bin/sh\n{log}")  # all but the probe runs, which takes an hour
    (bin_dir / "python").chmod(0o755)
    words = [
        "mini",
        "--stage",
        str(stage),
        "--trainer.output_dir",
        f"exp/{recipe}/mini-seed1",
        "--trainer.use_cpu=true",
    ]
    done = run_sh(recipe, tmp_path, *words, first_on_path=bin_dir)
    assert done.returncode == 0, done.stderr[-2000:]
    again = run_sh(recipe, tmp_path, *words, first_on_path=bin_dir)
    assert again.returncode == 0 and f"stage {stage} (probe): finished before, skipped" in again.stdout
    (call,) = (bin_dir / "python.log").read_text().splitlines()
    run_dir, name = f"exp/{recipe}/mini-seed1", f"{recipe}-mini-seed1"
    encoders = f"teacher=bundled:whisper-base {name}={run_dir}/student log-mel=log-mel"
    corpora = "--fsdd-dir data/mini/fsdd --barista-dir data/mini/barista"
    options = f"--output {run_dir}/probes.json {corpora} --encoders {encoders} fresh-{name}=random:{run_dir}/student"
    assert call == f"{ROOT}/recipes/distilhubert/probe.py {options}"


def test_all_stages_run_once_and_a_changed_configuration_is_refused(tmp_path, tiny_teacher):
    options = ["--teacher.name", tiny_teacher, "--trainer.max_steps", "2", "--decoding.max_new_tokens", "4"]
    options += ["--filters.min_mean_logprob=null", "--filters.max_wer=null", "--filters.drop_unfinished=false"]
    options += ["--filters.max_repeated_5grams=null", "--student.decoder_layers=2"]
    first = run_sh("distil_whisper", tmp_path, "quickstart", *options)
    assert first.returncode == 0, first.stderr[-2000:]
    assert "| student after |" in first.stdout and "synthetic" in first.stdout
    assert (tmp_path / "exp/distil_whisper/quickstart/student/model.safetensors").is_file()
    again = run_sh("distil_whisper", tmp_path, "quickstart", *options)
    assert again.stdout.count("finished before, skipped") == 4
    changed = run_sh("distil_whisper", tmp_path, "quickstart", *options, "--loss.kl=0.5")
    assert changed.returncode == 2 and "loss.kl was 1.0, now 0.5" in changed.stderr and "--force" in changed.stderr
    forced = run_sh("distil_whisper", tmp_path, "quickstart", *options, "--loss.kl=0.5", "--force", "--stop-stage", "3")
    assert forced.returncode == 0, forced.stderr[-2000:]
    assert forced.stdout.count("finished before, skipped") == 2  # data and labels did not change


def folder_of_a_command_that_logs(tmp_path: Path) -> Path:
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "speechkd").write_text('#!/bin/sh\necho "$@" >> "$0.log"\n')  # stands for the program that is called
    (bin_dir / "speechkd").chmod(0o755)
    return bin_dir


def test_stored_outputs_are_asked_for_where_they_are_trained_on(tmp_path):
    bin_dir = folder_of_a_command_that_logs(tmp_path)
    options = ["--stage", "2", "--stop-stage", "2", "--teacher.stored_outputs=decoder_states"]
    options += ["--teacher.cache_encoder_states=true", "--data.dev_manifest=dev.jsonl"]
    done = run_sh("distil_whisper", tmp_path, "quickstart", *options, first_on_path=bin_dir)
    assert done.returncode == 0, done.stderr
    train_set, test_set, dev_set = (bin_dir / "speechkd.log").read_text().splitlines()
    targets = "--language en --targets text encoder_states decoder_states"
    assert train_set.endswith(targets) and dev_set.endswith(targets) and test_set.endswith("--language en")
    live = [*options[:4], "--teacher.stored_outputs=null", *options[5:]]
    again = run_sh(
        "distil_whisper", tmp_path, "quickstart", *live, first_on_path=bin_dir
    )  # the labels hold more than it asks for
    assert again.returncode == 0 and "finished before, skipped" in again.stdout


def test_every_corpus_is_labelled_in_its_language_and_windows_where_they_are_trained_on(tmp_path):
    bin_dir = folder_of_a_command_that_logs(tmp_path)
    corpora = "[{train_manifest: fr.jsonl, labels_dir: labels-fr, language: fr}, {train_manifest: x, labels_dir: null}"
    corpora += ", {train_manifest: more.jsonl, labels_dir: labels-more}]"
    options = ["--stage", "2", "--stop-stage", "2", "--data.pack=true", "--decoding.timestamps=true"]
    options += ["--filters.max_wer=null", "--data.labels_dir=labels", "--data.dev_manifest=dev.jsonl"]
    options += ["--teacher.cache_encoder_states=false", f"--data.extra_corpora={corpora}"]
    done = run_sh("distil_whisper", tmp_path, "quickstart", *options, first_on_path=bin_dir)
    assert done.returncode == 0, done.stderr
    logged = (bin_dir / "speechkd.log").read_text().splitlines()
    assert all(call.startswith("label --teacher bundled:whisper-base --whisper-task transcribe") for call in logged)
    windows, folder = "--targets text --pack", "data/synthetic_commands"
    assert [call.split("--max-skipped-fraction 0.01 --timestamps --manifest ")[1] for call in logged] == [
        f"{folder}/train.jsonl --output-dir labels/train --language en {windows}",
        f"{folder}/test.jsonl --output-dir labels/test --language en",
        f"dev.jsonl --output-dir labels/dev --language en {windows}",
        f"fr.jsonl --output-dir labels-fr/train --language fr {windows}",
        f"more.jsonl --output-dir labels-more/train --language en {windows}",
    ]
    changed = run_sh("distil_whisper", tmp_path, "quickstart", *options, "--data.pack=false", first_on_path=bin_dir)
    assert changed.returncode == 2 and "data.pack was True, now False" in changed.stderr
