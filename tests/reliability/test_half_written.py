"""Checkpoints that a crash left half written: each is ignored with a warning, and the run ends as if undisturbed."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import train
from processes import (
    complete_steps,
    label_arguments,
    result_of_training,
    teacher_with_dropout,
    train_arguments,
    write_corpus,
)

from speechkd.cli import main as speechkd_main

pytestmark = pytest.mark.reliability


@pytest.fixture(scope="module")
def finished(tiny_teacher: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Run folder of a finished training with checkpoints of the steps 4 and 6, and its command line."""
    folder = tmp_path_factory.mktemp("half-written")
    teacher = teacher_with_dropout(tiny_teacher, folder / "teacher")
    manifest = write_corpus(folder / "corpus", 8)
    speechkd_main(["label", *label_arguments(teacher, manifest, folder / "labels/train")])
    steps = {"trainer.max_steps": 6, "trainer.save_steps": 2}
    argv = train_arguments(teacher, manifest, folder / "run", folder / "labels", **steps)
    train.main(argv)
    return folder / "run", argv


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no mark": (lambda folder: (folder / "complete.json").unlink(), "it has no complete.json"),
    "damaged mark": (lambda folder: (folder / "complete.json").write_text('{"siz'), "its complete.json is damaged"),
    "cut weights": (lambda folder: cut(folder / "model.safetensors"), "model.safetensors has "),
    "cut optimizer": (lambda folder: cut(folder / "optimizer.pt"), "optimizer.pt has "),
    "no random state": (lambda folder: (folder / "rng_state.pth").unlink(), "rng_state.pth is missing"),
    "mark alone": (
        lambda folder: [path.unlink() for path in folder.iterdir() if path.name != "complete.json"],
        " is missing",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_half_written_checkpoint_is_ignored_with_a_warning_that_names_it(finished, damage, caplog):
    run_dir, argv = finished
    expected = result_of_training(run_dir)
    assert complete_steps(run_dir) == [4, 6]
    spoil, reason = DAMAGE[damage]
    spoil(run_dir / "checkpoint-6")
    (run_dir / "run.json").unlink()
    shutil.rmtree(run_dir / "student")
    with caplog.at_level(logging.WARNING, "speechkd"):
        train.main(argv)
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("speechkd")]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"ignoring checkpoint {run_dir}/checkpoint-6: ") and reason in warnings[0]
    assert warnings[0].endswith(f"taking {run_dir}/checkpoint-4 instead")
    assert result_of_training(run_dir) == expected
    assert complete_steps(run_dir) == [4, 6]


def test_without_a_complete_checkpoint_the_run_starts_again_and_ends_the_same(finished, caplog):
    run_dir, argv = finished
    expected = result_of_training(run_dir)
    for step in (4, 6):
        (run_dir / f"checkpoint-{step}/complete.json").unlink()
    (run_dir / "run.json").unlink()
    with caplog.at_level(logging.WARNING, "speechkd"):
        train.main(argv)
    for step in (4, 6):
        assert caplog.text.count(f"ignoring checkpoint {run_dir}/checkpoint-{step}: ") == 1
    assert "has no complete checkpoint" in caplog.text
    assert result_of_training(run_dir) == expected
