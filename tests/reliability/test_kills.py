"""kill -9 and SIGTERM at random moments of labelling and training: the same command, run again, ends the same."""

import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import (
    Process,
    complete_steps,
    fork_server,
    is_saving,
    label_arguments,
    labels_by_id,
    last_logged_step,
    result_of_training,
    teacher_with_dropout,
    train_arguments,
    write_corpus,
)

from speechkd.labels.teacher_cache import LabelStore
from speechkd.preemption import PREEMPTED_EXIT_CODE

pytestmark = pytest.mark.reliability

NUM_CLIPS = 24
NUM_STEPS = 12
NUM_KILLS, NUM_AIMED_KILLS, NUM_SIGTERMS = 30, 4, 10  # of labelling, and as many of training


class Work:
    """A teacher, clips, labels, and what runs that nobody disturbs make of them."""

    def __init__(self, teacher: str, folder: Path) -> None:
        self.server, self.teacher, self.folder = fork_server(), teacher, folder
        self.manifest = write_corpus(folder / "corpus", NUM_CLIPS)
        self.labels_dir = folder / "labels"
        self.label_seconds = self._run("label_in_small_shards", self.label(self.labels_dir / "train"))
        self.labels = labels_by_id(self.labels_dir / "train")
        self.train_seconds = self._run("train", self.train(folder / "whole/run"))
        self.result = result_of_training(folder / "whole/run")
        self.counts: Counter[str] = Counter()

    def _run(self, command: str, argv: list[str]) -> float:
        started = time.monotonic()
        code, output = self.server.run(command, argv, self.folder / "whole.log")
        assert code == 0, output
        return time.monotonic() - started

    def label(self, output_dir: Path, *more: str) -> list[str]:
        return label_arguments(self.teacher, self.manifest, output_dir, *more)

    def train(self, run_dir: Path, **more: object) -> list[str]:
        steps = {"trainer.max_steps": NUM_STEPS, "trainer.save_steps": 2}
        return train_arguments(self.teacher, self.manifest, run_dir, self.labels_dir, **steps, **more)


@pytest.fixture(scope="module")
def work(tiny_teacher: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Work]:
    folder = tmp_path_factory.mktemp("kills")
    work = Work(teacher_with_dropout(tiny_teacher, folder / "teacher"), folder)
    assert len(work.labels) == NUM_CLIPS
    yield work
    counts = work.counts
    request.config.get_terminal_writer().line(
        f"\n{counts['kill']} kill -9 ({counts['kill while saving']} while a checkpoint was written) and "
        f"{counts['SIGTERM']} SIGTERM ({counts['SIGTERM to the group']} to workers too), "
        f"{counts['resume']} resumes, {counts['finished']} runs compared"
    )


def disturb(
    work: Work,
    name: str,
    num_signals: int,
    start: Callable[[Path, int], Process],
    disturb_one: Callable[[Process, Path], bool],
    check_finished: Callable[[Path], None],
) -> None:
    """Start runs and disturb them, each until it comes to its end, as often as asked.

    Args:
        work: counts are kept there.
        name: of the folders.
        num_signals: how many signals have to hit running processes.
        start: folder and number of a run to its process.
        disturb_one: signals the process and waits for its end; False where it ended by itself before.
        check_finished: compares what a run left.
    """
    sent = number = 0
    while sent < num_signals or number == 0:
        folder, begun = work.folder / f"{name}-{number}/run", False
        while True:
            process = start(folder, number)
            work.counts["resume"] += begun
            begun = True
            if sent < num_signals and disturb_one(process, folder):
                sent += 1
                continue
            code = process.wait() if sent >= num_signals else 0
            assert code == 0, process.output()
            break
        check_finished(folder)
        work.counts["finished"] += 1
        number += 1


def kill_at_random(work: Work, seed: int, seconds: float) -> Callable[[Process, Path], bool]:
    """kill -9 at a moment drawn from the duration of an undisturbed run."""
    draw = random.Random(seed)

    def kill(process: Process, folder: Path) -> bool:
        if not process.sleep(draw.uniform(0, seconds)):
            assert process.wait() == 0, process.output()
            return False
        process.send(signal.SIGKILL)
        code = process.wait()
        assert code in (0, -signal.SIGKILL), process.output()
        if code == 0:  # it ended in between
            return False
        work.counts["kill"] += 1
        work.counts["kill while saving"] += is_saving(folder, process.started_at)
        return True

    return kill


def check_labels(work: Work) -> Callable[[Path], None]:
    def check(folder: Path) -> None:
        assert labels_by_id(folder) == work.labels

    return check


def check_training(work: Work) -> Callable[[Path], None]:
    def check(folder: Path) -> None:
        assert result_of_training(folder) == work.result

    return check


def start_training(work: Work) -> Callable[[Path, int], Process]:
    """Every third run has a worker that loads audio."""

    def start(folder: Path, number: int) -> Process:
        argv = work.train(folder, **{"data.num_workers": int(number % 3 == 1)})
        return work.server.start("train", argv, folder.parent / "log")

    return start


def start_labelling(work: Work) -> Callable[[Path, int], Process]:
    def start(folder: Path, number: int) -> Process:
        argv = work.label(folder, "--num-workers", str(int(number % 3 == 1)))
        return work.server.start("label_in_small_shards", argv, folder.parent / "log")

    return start


def test_labelling_killed_at_random_moments_has_every_id_once_with_the_same_text(work):
    kill = kill_at_random(work, 1, work.label_seconds)
    disturb(work, "label-kill", NUM_KILLS, start_labelling(work), kill, check_labels(work))


def test_training_killed_at_random_moments_ends_bit_identical(work):
    kill = kill_at_random(work, 2, work.train_seconds)
    disturb(work, "train-kill", NUM_KILLS, start_training(work), kill, check_training(work))


def test_training_killed_while_it_saves_ends_bit_identical(work):
    def kill(process: Process, folder: Path) -> bool:
        while not is_saving(folder, process.started_at):
            if not process.is_running():
                assert process.wait() == 0, process.output()
                return False
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        work.counts["kill"] += 1
        work.counts["kill while saving"] += is_saving(folder, process.started_at)
        return True

    disturb(work, "train-aimed", NUM_AIMED_KILLS, start_training(work), kill, check_training(work))


def test_a_run_killed_with_its_workers_alive_starts_again_at_once(work):
    # a worker notices only after seconds that its parent is gone, and has inherited what the parent held open
    folder = work.folder / "orphans/run"
    process = start_training(work)(folder, 1)
    process.wait_until(lambda: last_logged_step(folder) > 0)
    process.send(signal.SIGKILL)
    process.wait()
    code, output = work.server.run("train", work.train(folder, **{"data.num_workers": 1}), folder.parent / "log")
    assert code == 0, output
    assert result_of_training(folder) == work.result


def terminate_at_random(
    work: Work,
    seed: int,
    seconds: float,
    is_finished: Callable[[Path], bool],
    check_stopped: Callable[[Process, Path], None],
) -> Callable[[Process, Path], bool]:
    """SIGTERM at a random moment, to every second process with its workers, as schedulers send it."""
    draw = random.Random(seed)

    def terminate(process: Process, folder: Path) -> bool:
        # a process that has not set its handler dies of the signal, which no command can help
        if not process.sleep(draw.uniform(0.1, seconds)):
            assert process.wait() == 0, process.output()
            return False
        whole_group = draw.random() < 0.5
        process.send(signal.SIGTERM, whole_group)
        code = process.wait()
        if code in (0, -signal.SIGTERM) and is_finished(folder):  # the signal came too late
            return False
        work.counts["SIGTERM"] += 1
        work.counts["SIGTERM to the group"] += whole_group
        assert code == PREEMPTED_EXIT_CODE, process.output()
        assert "Traceback" not in process.output()
        check_stopped(process, folder)
        return True

    return terminate


def test_labelling_told_to_stop_exits_75_and_keeps_what_is_finished(work):
    num_before: Counter[Path] = Counter()

    def num_rows(folder: Path) -> int:
        return len(list(LabelStore(folder).rows())) if (folder / "header.json").exists() else 0

    def check_stopped(process: Process, folder: Path) -> None:
        assert num_rows(folder) >= num_before[folder]
        num_before[folder] = num_rows(folder)

    terminate = terminate_at_random(
        work, 3, work.label_seconds, lambda folder: num_rows(folder) == NUM_CLIPS, check_stopped
    )
    disturb(work, "label-term", NUM_SIGTERMS, start_labelling(work), terminate, check_labels(work))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_labelling_told_to_stop_loses_no_finished_batch(work, num_workers):
    # one shard would hold all of the clips, so nothing is on disk before the signal
    folder = work.folder / f"one-shard-{num_workers}/run"
    argv = work.label(folder, "--num-workers", str(num_workers))
    process = work.server.start("label", argv, folder.parent / "log")
    process.wait_until(lambda: re.search(r"label: +[1-9]\d?%", process.output()) is not None)
    process.send(signal.SIGTERM, whole_group=True)
    assert process.wait() == PREEMPTED_EXIT_CODE, process.output()
    assert 0 < len(labels_by_id(folder)) < NUM_CLIPS
    code, output = work.server.run("label", argv, folder.parent / "log")
    assert code == 0, output
    assert labels_by_id(folder) == work.labels


def check_checkpoint_of_last_step(process: Process, folder: Path) -> None:
    """Once steps were made, there is a complete checkpoint of the last one."""
    last = last_logged_step(folder)
    assert complete_steps(folder)[-1:] == ([last] if last else []), process.output()


def test_training_told_to_stop_exits_75_with_a_checkpoint_of_its_last_step(work):
    terminate = terminate_at_random(
        work, 4, work.train_seconds, lambda folder: (folder / "run.json").exists(), check_checkpoint_of_last_step
    )
    disturb(work, "train-term", NUM_SIGTERMS, start_training(work), terminate, check_training(work))


def test_a_signal_to_all_processes_of_a_job_lets_the_workers_finish_the_step(work):
    folder = work.folder / "group/run"
    for step in (1, 4):
        process = start_training(work)(folder, 1)
        process.wait_until(lambda step=step: last_logged_step(folder) >= step)
        process.send(signal.SIGTERM, whole_group=True)
        assert process.wait() == PREEMPTED_EXIT_CODE, process.output()
        assert f"step {last_logged_step(folder)} is saved" in process.output()
        check_checkpoint_of_last_step(process, folder)
        work.counts["SIGTERM"] += 1
        work.counts["SIGTERM to the group"] += 1
    code, output = work.server.run("train", work.train(folder, **{"data.num_workers": 1}), folder.parent / "log")
    assert code == 0, output
    assert result_of_training(folder) == work.result


def assert_second_is_refused(work: Work, command: str, argv: list[str], folder: Path, first_file: str) -> None:
    first = work.server.start(command, argv, folder.parent / "log")
    first.wait_until(lambda: (folder / first_file).exists())
    code, output = work.server.run(command, argv, folder.parent / "second.log")
    assert code == 2 and f"error: another process is writing to {folder}" in output, output
    assert "Traceback" not in output
    assert first.is_running() and first.wait() == 0, first.output()


def test_a_second_training_in_one_folder_is_refused_and_the_first_undisturbed(work):
    folder = work.folder / "train-twice/run"
    assert_second_is_refused(work, "train", work.train(folder, **{"data.num_workers": 0}), folder, "config.yaml")
    assert result_of_training(folder) == work.result


def test_a_second_labelling_in_one_folder_is_refused_and_the_first_undisturbed(work):
    folder = work.folder / "label-twice/run"
    assert_second_is_refused(work, "label", work.label(folder, "--num-workers", "0"), folder, "header.json")
    assert labels_by_id(folder) == work.labels


def test_what_a_kill_left_of_a_first_file_does_not_block_the_folder(work):
    folder = work.folder / "first-file/run"
    folder.mkdir(parents=True)
    (folder / ".header.json.123.tmp").write_text('{"format')
    code, output = work.server.run("label", work.label(folder), folder.parent / "log")
    assert code == 0, output
    assert labels_by_id(folder) == work.labels and not list(folder.glob(".*.tmp"))
