"""Label store: teacher outputs on disk, keyed by utterance id.

A store is a folder with `header.json` (who made it, and how) and shards. A shard is `shard-NNNNN.jsonl` with one row an
utterance, and, where arrays are stored, `shard-NNNNN.safetensors` with one array an utterance, memory-mapped when read.
The arrays are written first and the rows renamed into place last: a shard counts only when its rows are there.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from speechkd.files import atomic_write, read_jsonl, write_json, write_jsonl

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1


class LabelStoreError(ValueError):
    """A label store cannot be used as asked; the message says why."""


class LabelStore:
    """One folder of teacher outputs.

    Args:
        folder: the store; created by `create_store`.

    Raises:
        LabelStoreError: the folder holds no store, or one of another format.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        header = self.folder / "header.json"
        if not header.is_file():
            raise LabelStoreError(f"{self.folder} holds no label store; write one with `speechkd label`")
        self.header: dict[str, Any] = json.loads(header.read_text(encoding="utf-8"))
        if self.header.get("format_version") != FORMAT_VERSION:
            raise LabelStoreError(
                f"{self.folder} has label store format {self.header.get('format_version')}, this version reads "
                f"{FORMAT_VERSION}; label again into another folder"
            )
        self._array_files: dict[str, str] | None = None
        self._open_files: dict[str, Any] = {}

    def rows(self) -> Iterator[dict[str, Any]]:
        """All finished rows, in the order they were written."""
        for path in self.row_files():
            yield from read_jsonl(path)

    def row_files(self) -> list[Path]:
        """The shards' rows, in the order they were written."""
        return sorted(self.folder.glob("shard-*.jsonl"), key=_shard_number)

    def array(self, utterance_id: str) -> Tensor:
        """The array of one utterance, memory-mapped.

        Raises:
            LabelStoreError: the store has no array for it.
        """
        if self._array_files is None:
            self._array_files = {}
            for path in sorted(self.folder.glob("shard-*.safetensors")):
                if path.with_suffix(".jsonl").exists():
                    with safe_open(path, "pt") as file:
                        self._array_files.update(dict.fromkeys(file.keys(), str(path)))
        array_file = self._array_files.get(utterance_id)
        if array_file is None:
            raise LabelStoreError(
                f"label store {self.folder} holds no encoder states of utterance {utterance_id!r}; run "
                "`speechkd label --targets text encoder_states` on its manifest"
            )
        if array_file not in self._open_files:
            self._open_files[array_file] = safe_open(array_file, "pt")
        return self._open_files[array_file].get_tensor(utterance_id)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open_files": {}}  # data loader workers map the files themselves

    def write_shard(self, rows: list[dict[str, Any]], arrays: dict[str, Tensor]) -> None:
        """Commit rows and their arrays as one shard.

        Args:
            rows: one dict an utterance, with its `id`.
            arrays: utterance id to array; empty where the store keeps none.
        """
        # not their count: where a shard was removed by hand, that would be the name of another
        number = max(map(_shard_number, self.row_files()), default=-1) + 1
        name = self.folder / f"shard-{number:05d}"
        if arrays:
            with atomic_write(name.with_suffix(".safetensors")) as temporary:
                save_file({key: array.contiguous() for key, array in arrays.items()}, temporary)
        write_jsonl(name.with_suffix(".jsonl"), rows)


def _shard_number(path: Path) -> int:
    """The number in a shard's name; -1 of a file that somebody else put there."""
    number = path.stem.removeprefix("shard-")
    return int(number) if number.isdecimal() else -1


def create_store(folder: str | Path, header: dict[str, Any]) -> LabelStore:
    """Open a store for writing, or carry on with one that was begun with the same header. The caller holds its lock.

    Args:
        folder: created where it is missing.
        header: `teacher` (identity), `targets`, `decoding` settings.

    Raises:
        LabelStoreError: the folder holds labels of another teacher, or made with other settings.
    """
    folder = Path(folder)
    for leftover in folder.glob(".*.tmp"):  # of a run that was killed while it wrote
        leftover.unlink()
    path = folder / "header.json"
    header = {"format_version": FORMAT_VERSION, **header}
    if path.is_file():
        store = LabelStore(folder)
        check_teacher(store, header["teacher"])
        if set(header.get("targets", ())) < set(store.header.get("targets", ())):
            header["targets"] = store.header["targets"]  # a store that keeps more serves as well
        changed = [key for key in header if store.header.get(key) != header[key] and key != "teacher"]
        if changed:
            raise LabelStoreError(
                f"{folder} holds labels made with other settings: "
                + "; ".join(f"{key} was {store.header.get(key)}, now {header[key]}" for key in changed)
                + ". Choose another output folder, or remove this one"
            )
        return store
    if folder.is_dir() and any(entry.name != ".lock" for entry in folder.iterdir()):
        raise LabelStoreError(f"{folder} is not empty and holds no label store; choose another output folder")
    write_json(path, header)
    return LabelStore(folder)


def check_teacher(store: LabelStore, teacher: dict[str, Any]) -> None:
    """Refuse a store that another teacher wrote.

    Args:
        store: opened store.
        teacher: identity as of `speechkd.teachers.teacher_identity`; the name may differ, the weights may not.

    Raises:
        LabelStoreError: names both teachers.
    """
    known = store.header["teacher"]
    if known["weights_sha256"] != teacher["weights_sha256"]:
        raise LabelStoreError(
            f"the labels in {store.folder} come from teacher {known['name']} (weights {known['weights_sha256'][:12]}), "
            f"but this run has {teacher['name']} (weights {teacher['weights_sha256'][:12]}); label again with this "
            "teacher into another folder, or use the one that made the labels"
        )
