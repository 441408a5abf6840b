"""Files that are complete or absent, and folders that one process owns."""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(error.errno, f"{os.strerror(error.errno)}; {_FULL_DISK}", str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


_FULL_DISK = "free some space and run the same command again, what was finished before is kept"


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
        yield
