import logging

import pytest

from speechkd.arguments import DistillationArguments
from speechkd.run_folder import RUN_FILE, training_run


def arguments(folder) -> DistillationArguments:
    return DistillationArguments(output_dir=str(folder), use_cpu=True)


def test_a_run_is_new_until_its_facts_are_written_and_never_trains_again(tmp_path, caplog):
    with training_run(arguments(tmp_path / "run"), "trainer: {}\n") as is_finished:
        assert not is_finished and (tmp_path / "run/config.yaml").read_text() == "trainer: {}\n"
        (tmp_path / "run" / RUN_FILE).write_text("{}")
    with caplog.at_level(logging.INFO), training_run(arguments(tmp_path / "run"), "trainer: {}\n") as is_finished:
        assert is_finished
    assert f"{tmp_path}/run holds a finished training" in caplog.text


def test_two_trainings_in_one_folder_and_another_configuration_are_refused(tmp_path):
    with (
        training_run(arguments(tmp_path), "trainer: {}\n"),
        pytest.raises(ValueError, match="another process is writing"),
        training_run(arguments(tmp_path), "trainer: {}\n"),
    ):
        raise AssertionError("the folder was free")
    with (
        pytest.raises(ValueError, match="holds another run; changed: trainer"),
        training_run(arguments(tmp_path), "trainer: {seed: 1}\n"),
    ):
        raise AssertionError("the configuration was taken")


def test_other_processes_of_a_run_do_not_write(tmp_path, monkeypatch):
    monkeypatch.setattr(DistillationArguments, "process_index", property(lambda self: 1))
    with training_run(arguments(tmp_path / "run"), "trainer: {}\n") as is_finished:
        assert not is_finished and not (tmp_path / "run/config.yaml").exists()
