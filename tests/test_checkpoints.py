"""Complete and half written checkpoints, rotation, full disks, and the mean of weights."""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import tiny_whisper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from speechkd.checkpoints import (
    average_checkpoints,
    checkpoint_bytes,
    explain_full_disk,
    last_complete_checkpoint,
    mark_complete,
    mark_incomplete,
    require_space,
    rotate,
)

MIB = 2**20


def write_checkpoint(run_dir: Path, step: int, complete: bool = True, **weights: torch.Tensor) -> Path:
    """A folder as the trainer leaves it, with one tensor unless others are given."""
    folder = run_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file(weights or {"weight": torch.full((4, 3), float(step))}, folder / "model.safetensors")
    torch.save({"step": step}, folder / "optimizer.pt")
    if complete:
        mark_complete(folder)
    return folder


def steps_in(run_dir: Path) -> set[str]:
    return {path.name.removeprefix("checkpoint-") for path in run_dir.iterdir()}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no mount command to make a small file system with")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_newest_complete_checkpoint_is_taken_by_number(tmp_path):
    for step in (9, 100, 20):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-900").write_text("not a folder")
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def test_run_without_checkpoint_has_none(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "not-there") is None


def test_each_incomplete_checkpoint_is_passed_over_with_its_reason(tmp_path, caplog):
    for step in (10, 20, 30, 40, 50):
        write_checkpoint(tmp_path, step, complete=step < 50)
    truncated = tmp_path / "checkpoint-40/model.safetensors"
    size = truncated.stat().st_size
    os.truncate(truncated, size - 1)
    (tmp_path / "checkpoint-30/optimizer.pt").unlink()
    (tmp_path / "checkpoint-20/complete.json").write_text('{"sizes_bytes": {"mod')
    with caplog.at_level(logging.WARNING):
        assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    reasons = {
        50: "no complete.json, so it was half written when the run ended",
        40: f"model.safetensors has {size - 1} bytes instead of {size}",
        30: "optimizer.pt is missing",
        20: "complete.json is damaged",
    }
    assert len(caplog.messages) == 4
    for message, (step, reason) in zip(caplog.messages, reasons.items(), strict=True):
        assert message.startswith(f"ignoring checkpoint {tmp_path}/checkpoint-{step}: ")
        assert reason in message and message.endswith(f"taking {tmp_path}/checkpoint-10 instead")


def test_only_incomplete_checkpoints_count_as_none_with_a_warning(tmp_path, caplog):
    write_checkpoint(tmp_path, 10, complete=False)
    assert last_complete_checkpoint(tmp_path) is None
    assert "checkpoint-10" in caplog.text and "has no complete checkpoint" in caplog.text


def test_older_incomplete_checkpoint_gives_no_warning(tmp_path, caplog):
    write_checkpoint(tmp_path, 10, complete=False)
    write_checkpoint(tmp_path, 20)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-20"
    assert caplog.text == ""


def test_mark_lists_files_of_subfolders_and_no_leftovers(tmp_path):
    folder = write_checkpoint(tmp_path, 10, complete=False)
    (folder / "ema").mkdir()
    (folder / "ema/weights.bin").write_bytes(b"12345")
    (folder / ".complete.json.1.tmp").write_text("cut off")
    mark_complete(folder)
    sizes_bytes = json.loads((folder / "complete.json").read_text())["sizes_bytes"]
    assert set(sizes_bytes) == {"ema/weights.bin", "model.safetensors", "optimizer.pt"}
    assert sizes_bytes["ema/weights.bin"] == 5
    (folder / ".complete.json.1.tmp").unlink()
    assert last_complete_checkpoint(tmp_path) == folder


def test_everything_is_synced_before_the_mark_appears(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path, 10, complete=False)
    synced: list[tuple[str, bool]] = []
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        synced.append((name, (folder / "complete.json").exists()))
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    mark_complete(folder)
    before = [name for name, marked in synced if not marked]
    assert set(before[:3]) == {"model.safetensors", "optimizer.pt", "checkpoint-10"}
    assert len(before) == 4 and before[3].startswith(".complete.json")
    assert [name for name, marked in synced if marked] == ["checkpoint-10", tmp_path.name]


def test_checkpoint_that_is_written_over_is_incomplete_until_marked_again(tmp_path):
    folder = write_checkpoint(tmp_path, 10)
    mark_incomplete(folder)
    mark_incomplete(folder)  # nothing to take away
    assert last_complete_checkpoint(tmp_path) is None
    mark_complete(folder)
    assert last_complete_checkpoint(tmp_path) == folder


@pytest.mark.parametrize(
    ("keep", "protected", "remaining"),
    [
        (None, None, {"9", "20", "100", "110"}),
        (3, None, {"9", "20", "100", "110"}),
        (2, None, {"20", "100", "110"}),
        (1, None, {"100", "110"}),
        (2, 9, {"9", "100", "110"}),
        (1, 9, {"9", "100", "110"}),
        (1, 100, {"100", "110"}),
    ],
)
def test_rotation_keeps_newest_protected_and_those_being_written(tmp_path, keep, protected, remaining):
    for step in (9, 20, 100):
        write_checkpoint(tmp_path, step)
    write_checkpoint(tmp_path, 110, complete=False)
    rotate(tmp_path, keep, tmp_path / f"checkpoint-{protected}" if protected else None)
    assert steps_in(tmp_path) == remaining


def test_rotation_removes_overtaken_incomplete_checkpoints_but_not_the_protected(tmp_path):
    for step in (10, 20, 30, 40):
        write_checkpoint(tmp_path, step, complete=step in (20, 40))
    rotate(tmp_path, None, protect=tmp_path / "checkpoint-30")
    assert steps_in(tmp_path) == {"20", "30", "40"}


def test_rotation_counts_no_incomplete_checkpoint_as_kept(tmp_path):
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, step, complete=step < 30)
    rotate(tmp_path, 2)
    assert steps_in(tmp_path) == {"10", "20", "30"}


def test_rotation_deletes_nothing_while_no_checkpoint_is_complete(tmp_path):
    for step in (10, 20):
        write_checkpoint(tmp_path, step, complete=False)
    rotate(tmp_path, 1)
    assert steps_in(tmp_path) == {"10", "20"}


def test_rotation_refuses_to_keep_nothing(tmp_path):
    with pytest.raises(ValueError, match="save_total_limit must be at least 1, got 0"):
        rotate(tmp_path, 0)


def test_kill_within_a_deletion_leaves_nothing_that_looks_like_a_checkpoint(tmp_path):
    for step in (10, 20):
        write_checkpoint(tmp_path, step)
    # dies at the second file that is deleted
    program = """
import os, signal, sys
from speechkd.checkpoints import rotate
real_unlink, count = os.unlink, [0]
def unlink(*args, **kwargs):
    count[0] += 1
    if count[0] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    real_unlink(*args, **kwargs)
os.unlink = unlink
rotate(sys.argv[1], 1)
"""
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)])
    assert killed.returncode == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir()} == {".deleting-checkpoint-10", "checkpoint-20"}
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-20"
    rotate(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-20"}


def test_estimated_bytes_are_what_adam_and_the_weights_take(tmp_path):
    model = tiny_whisper(decoder_layers=1)
    model.model.encoder.requires_grad_(False)
    model.proj_out.bias = None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(input_features=torch.zeros(1, 80, 3000), decoder_input_ids=torch.tensor([[1]])).logits.sum().backward()
    optimizer.step()
    state_bytes = sum(
        value.nbytes for state in optimizer.state.values() for value in state.values() if value.numel() > 1
    )
    model.save_pretrained(tmp_path)
    weights_bytes = (tmp_path / "model.safetensors").stat().st_size
    assert checkpoint_bytes(model) == pytest.approx(weights_bytes + state_bytes, rel=0.02)


def test_estimated_bytes_follow_dtype_buffers_and_tied_weights():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    model.register_buffer("steps", torch.zeros(3, dtype=torch.int64))
    assert checkpoint_bytes(model) == 3 * 16 * 4 + 24
    assert checkpoint_bytes(model.to(torch.bfloat16), optimizer_states_per_parameter=1) == 2 * 16 * 2 + 24
    assert checkpoint_bytes(model.requires_grad_(False)) == 16 * 2 + 24


def test_missing_space_is_told_before_writing(small_disk):
    require_space(small_disk / "checkpoint-10", 2 * MIB)
    (small_disk / "other").write_bytes(bytes(MIB))
    with pytest.raises(OSError) as raised:
        require_space(small_disk / "checkpoint-10", 2 * MIB)
    assert raised.value.errno == errno.ENOSPC
    message = str(raised.value)
    assert "needs about 2.1 MB and 1.0 MB are free in " + str(small_disk / "checkpoint-10") in message
    assert "lower trainer.save_total_limit" in message and "the same command resumes" in message


def save_with_safetensors(folder: Path) -> None:
    save_file({"weight": torch.zeros(MIB)}, folder / "model.safetensors")


def save_with_torch(folder: Path) -> None:
    torch.save({"exp_avg": torch.zeros(MIB)}, folder / "optimizer.pt")


def save_with_torch_to_file(folder: Path) -> None:
    with (folder / "optimizer.pt").open("wb") as file:
        torch.save({"exp_avg": torch.zeros(MIB)}, file)


def save_with_torch_old_format(folder: Path) -> None:
    torch.save({"exp_avg": torch.zeros(MIB)}, folder / "optimizer.pt", _use_new_zipfile_serialization=False)


def save_plain(folder: Path) -> None:
    (folder / "trainer_state.json").write_bytes(bytes(4 * MIB))


def save_wrapped(folder: Path) -> None:
    try:
        save_with_safetensors(folder)
    except SafetensorError as error:
        raise KeyError("in a callback") from error


@pytest.mark.parametrize(
    "save",
    [
        save_with_safetensors,
        save_with_torch,
        save_with_torch_to_file,
        save_with_torch_old_format,
        save_plain,
        save_wrapped,
    ],
)
def test_full_disk_is_recognised_and_the_checkpoint_before_survives(small_disk, save):
    before = write_checkpoint(small_disk, 10)
    folder = small_disk / "checkpoint-20"
    folder.mkdir()
    with pytest.raises(Exception) as raised:  # noqa: B017 (each library raises its own)
        save(folder)
    explained = explain_full_disk(raised.value, folder, 4 * MIB)
    assert explained is not None and explained.errno == errno.ENOSPC
    assert f"needs about 4.2 MB and {shutil.disk_usage(folder).free / 1e6:.1f} MB are free in {folder}" in str(
        explained
    )
    assert last_complete_checkpoint(small_disk) == before
    assert load_file(before / "model.safetensors")["weight"].eq(10).all()


def test_full_device_is_recognised_without_a_small_disk(tmp_path):
    with pytest.raises(RuntimeError) as raised:
        torch.save({"exp_avg": torch.zeros(MIB)}, "/dev/full")
    assert explain_full_disk(raised.value, tmp_path, 10**18) is not None
    assert explain_full_disk(raised.value, tmp_path, 1) is None  # the disk has room, so it was something else
    with pytest.raises(OSError) as raised:
        Path("/dev/full").write_bytes(b"0")
    assert explain_full_disk(raised.value, tmp_path, 1) is not None


def test_spent_quota_keeps_its_own_name(tmp_path):
    explained = explain_full_disk(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), tmp_path, MIB)
    assert explained is not None and explained.errno == errno.EDQUOT
    assert os.strerror(errno.EDQUOT) in str(explained)


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(SafetensorError) as missing_folder:
        save_with_safetensors(tmp_path / "not-there")
    with pytest.raises(RuntimeError) as missing_folder_torch:
        save_with_torch(tmp_path / "not-there")
    ring = [ValueError("first"), ValueError("second")]
    ring[0].__cause__, ring[1].__cause__ = ring[1], ring[0]
    for error in (missing_folder.value, missing_folder_torch.value, PermissionError(errno.EACCES, "no"), ring[0]):
        assert explain_full_disk(error, tmp_path, 10**18) is None


def test_average_is_the_float64_mean_in_the_stored_dtype(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for step in (10, 20, 30):
        write_checkpoint(
            tmp_path,
            step,
            full=torch.randn(50, 7, generator=generator),
            half=torch.randn(50, generator=generator).to(torch.bfloat16),
            num_batches=torch.tensor(step),
            is_frozen=torch.tensor([step == 30, False]),
        )
    average = average_checkpoints(tmp_path, last=3)
    stored = [load_file(tmp_path / f"checkpoint-{step}/model.safetensors") for step in (10, 20, 30)]
    assert set(average) == {"full", "half", "num_batches", "is_frozen"}
    for name, dtype in (("full", torch.float32), ("half", torch.bfloat16)):
        mean = torch.stack([weights[name].double() for weights in stored]).mean(dim=0)
        torch.testing.assert_close(average[name], mean.to(dtype), rtol=0, atol=0)
    assert average["num_batches"] == 30 and average["num_batches"].dtype == torch.int64
    assert average["is_frozen"].tolist() == [True, False]


def test_small_differences_survive_the_average(tmp_path):
    # in float32, adding 1 to 2**24 changes nothing and the mean would be 2**23
    for step, value in ((10, 2.0**24), (20, 1.0), (30, 1.0)):
        write_checkpoint(tmp_path, step, weight=torch.tensor([value]))
    assert average_checkpoints(tmp_path, last=3)["weight"].item() == torch.tensor((2.0**24 + 2) / 3).item()


def test_average_takes_the_checkpoints_asked_for(tmp_path):
    for step in (10, 20, 40, 80):
        write_checkpoint(tmp_path, step, complete=step < 80)
    assert average_checkpoints(tmp_path, last=2)["weight"].eq(30).all()
    assert average_checkpoints(tmp_path, steps=range(10, 21, 10))["weight"].eq(15).all()
    assert average_checkpoints(tmp_path, steps=iter([40, 10, 10]))["weight"].eq(25).all()


def test_sharded_weights_average_like_whole_ones_and_load_into_the_model(tmp_path):
    model = tiny_whisper(decoder_layers=1)
    for step in (10, 20):
        torch.nn.init.constant_(model.model.encoder.layer_norm.bias, step)
        torch.nn.init.constant_(model.proj_out.weight, step)
        model.save_pretrained(tmp_path / f"sharded/checkpoint-{step}", max_shard_size="50KB")
        model.save_pretrained(tmp_path / f"whole/checkpoint-{step}")
        mark_complete(tmp_path / f"sharded/checkpoint-{step}")
        mark_complete(tmp_path / f"whole/checkpoint-{step}")
    assert not (tmp_path / "sharded/checkpoint-10/model.safetensors").exists()
    sharded, whole = average_checkpoints(tmp_path / "sharded", last=2), average_checkpoints(tmp_path / "whole", last=2)
    assert sharded.keys() == whole.keys()
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)
    model.load_state_dict(sharded, strict=False)
    model.tie_weights()
    assert model.model.encoder.layer_norm.bias.eq(15).all() and model.proj_out.weight.eq(15).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of last and steps"),
        ({"last": 1, "steps": [10]}, "exactly one of last and steps"),
        ({"last": 0}, "last must be at least 1, got 0"),
        ({"last": 3}, r"last 3 checkpoints: .* steps 10, 20; .*raise trainer.save_total_limit"),
        ({"steps": []}, r"\(none given\)"),
        ({"steps": [10, 15]}, r"steps 15 \(no such folder\): .* steps 10, 20; .*raise trainer.save_total_limit"),
        ({"steps": [10, 30]}, r"steps 30 \(it has no complete.json"),
        ({"steps": range(100, 120)}, r"109 \(no such folder\) and 10 more: "),
    ],
)
def test_average_names_the_checkpoints_that_are_missing(tmp_path, arguments, message):
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, step, complete=step < 30)
    with pytest.raises(ValueError, match=message):
        average_checkpoints(tmp_path, **arguments)


def test_average_refuses_weights_of_another_architecture(tmp_path):
    a, b, wider = torch.ones(2), torch.ones(2), torch.ones(3)
    write_checkpoint(tmp_path, 10, a=a, b=b)
    write_checkpoint(tmp_path, 20, a=a, b=wider)
    write_checkpoint(tmp_path, 30, a=a)
    with pytest.raises(ValueError, match=r"tensor b has shape \(2,\) in .*checkpoint-10 and \(3,\) in .*checkpoint-20"):
        average_checkpoints(tmp_path, steps=[10, 20])
    with pytest.raises(ValueError, match=r"checkpoint-10 has a tensor b that .*checkpoint-30 lacks"):
        average_checkpoints(tmp_path, steps=[10, 30])
    write_checkpoint(tmp_path, 40, a=a, b=wider, c=b)
    with pytest.raises(ValueError, match=r"checkpoint-40 has a tensor c that .*checkpoint-20 lacks"):
        average_checkpoints(tmp_path, steps=[20, 40])


def test_average_needs_safetensors(tmp_path):
    folder = write_checkpoint(tmp_path, 10, complete=False)
    (folder / "model.safetensors").unlink()
    mark_complete(folder)
    with pytest.raises(ValueError, match="checkpoint-10 has neither model.safetensors nor"):
        average_checkpoints(tmp_path, last=1)
