"""A file system that is really full while something is saved: nothing finished is lost, and the message says enough."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import (
    complete_steps,
    fork_server,
    label_arguments,
    labels_by_id,
    result_of_training,
    teacher_with_dropout,
    train_arguments,
    write_corpus,
)

pytestmark = pytest.mark.reliability

MB = 10**6
DISK_BYTES = 64 * 2**20
CHECKPOINT_BYTES = 10_232_832  # about; weights and two moments of the tiny student


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no mount command to make a small file system with")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, free_bytes: int) -> None:
    """Leave this much room, to a page."""
    with (disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - free_bytes)
    assert abs(shutil.disk_usage(disk).free - free_bytes) < 8192


@pytest.fixture
def training(tiny_teacher: str, tmp_path: Path, small_disk: Path) -> tuple[Path, list[str], dict]:
    """Run folder, on the small disk, of a finished training of 4 steps saved at 2 and 4; command line and result."""
    teacher = teacher_with_dropout(tiny_teacher, tmp_path / "teacher")
    manifest = write_corpus(tmp_path / "corpus", 8)
    argv = label_arguments(teacher, manifest, tmp_path / "labels/train")
    code, output = fork_server().run("label", argv, tmp_path / "label.log")
    assert code == 0, output
    steps = {"trainer.max_steps": 4, "trainer.save_steps": 2}
    argv = train_arguments(teacher, manifest, small_disk / "run", tmp_path / "labels", **steps)
    code, output = fork_server().run("train", argv, tmp_path / "whole.log")
    assert code == 0, output
    return small_disk / "run", argv, result_of_training(small_disk / "run")


@pytest.mark.parametrize(
    "free_bytes", [MB, CHECKPOINT_BYTES + 12_000], ids=["seen before writing", "met while writing"]
)
def test_a_full_disk_keeps_the_checkpoint_before_and_the_run_ends_the_same(training, free_bytes, small_disk, tmp_path):
    run_dir, argv, expected = training
    (run_dir / "run.json").unlink()
    shutil.rmtree(run_dir / "student")
    shutil.rmtree(run_dir / "checkpoint-4")
    fill(small_disk, free_bytes)
    code, output = fork_server().run("train", argv, tmp_path / "full.log")
    assert code == 2 and "Traceback" not in output, output
    message = re.search(r"a checkpoint needs about ([\d.]+) MB and ([\d.]+) MB are free in (\S+);", output)
    assert message is not None, output
    needed, free, place = message.groups()
    assert float(needed) == pytest.approx(CHECKPOINT_BYTES / MB, rel=0.02)
    assert float(free) <= free_bytes / MB + 0.1 and place == str(run_dir)
    assert "same command resumes" in output
    assert complete_steps(run_dir) == [2]
    (small_disk / "filler").unlink()
    code, output = fork_server().run("train", argv, tmp_path / "resumed.log")
    assert code == 0, output
    assert result_of_training(run_dir) == expected


def test_a_full_disk_for_the_student_keeps_the_checkpoints(training, small_disk, tmp_path):
    run_dir, argv, expected = training
    (run_dir / "run.json").unlink()
    shutil.rmtree(run_dir / "student")
    fill(small_disk, MB)
    code, output = fork_server().run("train", argv, tmp_path / "full.log")
    assert code == 2 and "Traceback" not in output, output
    assert "No space left on device" in output and str(run_dir) in output
    assert complete_steps(run_dir) == [2, 4] and not (run_dir / "run.json").exists()
    (small_disk / "filler").unlink()
    code, output = fork_server().run("train", argv, tmp_path / "resumed.log")
    assert code == 0, output
    assert result_of_training(run_dir) == expected


@pytest.mark.parametrize("targets", [["text"], ["text", "encoder_states"]], ids=["text", "encoder states"])
def test_a_full_disk_loses_no_label(tiny_teacher, small_disk, tmp_path, targets):
    manifest = write_corpus(tmp_path / "corpus", 12)
    server, more = fork_server(), ["--targets", *targets]
    code, output = server.run(
        "label_in_small_shards", label_arguments(tiny_teacher, manifest, tmp_path / "whole", *more), tmp_path / "log"
    )
    assert code == 0, output
    # room for the first shard of 4 clips and not for the second; encoder states are 48,000 bytes a clip
    argv = label_arguments(tiny_teacher, manifest, small_disk / "labels", *more)
    fill(small_disk, 300_000 if len(targets) > 1 else 12_288)
    code, output = server.run("label_in_small_shards", argv, tmp_path / "full.log")
    assert code == 2 and "Traceback" not in output, output
    assert "No space left on device" in output and "run the same command again" in output, output
    assert 0 < len(labels_by_id(small_disk / "labels")) < 12
    assert not list((small_disk / "labels").glob(".*.tmp"))
    (small_disk / "filler").unlink()
    code, output = server.run("label_in_small_shards", argv, tmp_path / "resumed.log")
    assert code == 0, output
    assert labels_by_id(small_disk / "labels") == labels_by_id(tmp_path / "whole")
