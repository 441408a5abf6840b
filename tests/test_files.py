import errno
import resource
import signal
import subprocess
import sys

import pytest

from speechkd.files import atomic_folder, atomic_write, folder_lock, read_jsonl, write_json, write_jsonl


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert "old" in (tmp_path / "a.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_folder_leaves_the_old_one_and_no_rest(tmp_path):
    (tmp_path / ".a.tmp/content/abandoned").mkdir(parents=True)  # of a run that was killed
    with atomic_folder(tmp_path / "a") as temporary:
        (temporary / "old").touch()
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "a", replace=True) as temporary:
        (temporary / "half").touch()
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "old"]


def test_a_folder_takes_the_place_of_an_earlier_one_only_where_that_is_asked_for(tmp_path):
    for replace in (False, True):
        with atomic_folder(tmp_path / "a", replace=replace) as temporary:
            (temporary / f"replace-{replace}").touch()
    with pytest.raises(OSError, match="not empty"), atomic_folder(tmp_path / "a") as temporary:
        (temporary / "third").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["replace-True"]


def test_a_full_disk_is_said_and_what_was_there_is_kept(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"id": "old"}])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails as on a full disk
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(OSError, match="free some space and run the same command again") as error:
            write_jsonl(tmp_path / "rows.jsonl", [{"id": "x" * 100_000}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.errno == errno.EFBIG
    assert read_jsonl(tmp_path / "rows.jsonl") == [{"id": "old"}]


def test_a_second_process_is_refused_a_locked_folder(tmp_path):
    code = f"from speechkd.files import folder_lock\nwith folder_lock({str(tmp_path)!r}): pass"
    with folder_lock(tmp_path):
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "another process is writing to" in second.stderr
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
