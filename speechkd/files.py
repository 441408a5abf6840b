"""Files that are complete or absent, and folders that one process owns."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

FULL_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write to a temporary name beside `path` and rename at the end.

    Args:
        path: final name; its folder is created.

    Yields:
        The temporary path. If the block raises, it is removed and `path` stays as it was.

    Raises:
        OSError: the disk is full; the message says what to do.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with full_disk_explained(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Fill a folder under a temporary name beside `path` and rename it at the end.

    Args:
        path: final name.
        replace: remove an earlier folder of this name first; else `path` must be empty or absent.

    Yields:
        The temporary folder, empty. If the block raises, it is removed and `path` stays as it was.

    Raises:
        OSError: the disk is full; the message says what to do.
        ValueError: another process fills the folder.
    """
    path = Path(path)
    work_dir = path.with_name(f".{path.name}.tmp")
    with full_disk_explained(path), folder_lock(work_dir):
        temporary = work_dir / "content"
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
        temporary.mkdir()
        try:
            yield temporary
            if replace:
                shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
        finally:
            shutil.rmtree(work_dir, ignore_errors=True)


@contextmanager
def full_disk_explained(path: str | Path) -> Iterator[None]:
    """Say what to do when the disk is full.

    Args:
        path: what is written.

    Raises:
        OSError: in place of any error that came from a full disk.
    """
    try:
        yield
    except Exception as error:
        number = full_disk_errno(error)
        if number is None:
            raise
        way_out = "free some space and run the same command again, what was finished before is kept"
        raise OSError(number, f"{os.strerror(number)}; {way_out}", str(path)) from error


def full_disk_errno(error: BaseException) -> int | None:
    """The system's number of an error that a full disk caused; None for others."""
    if isinstance(error, OSError):
        return error.errno if error.errno in FULL_DISK_ERRNOS else None
    # safetensors writes "(os error 28)" after the text of the system, torch's old format the text alone
    text = str(error)
    return next((n for n in FULL_DISK_ERRNOS if f"(os error {n})" in text or os.strerror(n) in text), None)


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write one JSON object, indented, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_jsonl(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file that `write_jsonl` wrote; [] where it does not exist."""
    path = Path(path)
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


_locks: set[IO[str]] = set()


def _close_locks() -> None:
    for file in _locks:
        file.close()
    _locks.clear()


# a worker that outlives its killed parent by some seconds would hold the inherited lock against the next run
os.register_at_fork(after_in_child=_close_locks)


@contextmanager
def folder_lock(folder: str | Path) -> Iterator[None]:
    """Hold a folder against other processes of this machine; the lock goes with the process.

    Raises:
        ValueError: another process holds it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is writing to {folder}; wait for it, stop it, or choose another output folder"
            ) from error
        _locks.add(file)
        try:
            yield
        finally:
            _locks.discard(file)
