"""Tar shards in the WebDataset layout: written from a manifest, read in order or one member at a time.

The members of one utterance stand side by side and share their name up to its first dot: `<key>.json`, the manifest
row without `audio`, and `<key>.<flac|wav|ogg|mp3>`. Source of the layout: https://github.com/webdataset/webdataset
"""

import io
import json
import logging
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import groupby
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO

import soundfile
from tqdm import tqdm

from speechkd.data.manifest import FIELDS, Manifest, utterance_problems, write_manifest
from speechkd.files import atomic_write, write_jsonl

logger = logging.getLogger(__name__)

AUDIO_SUFFIXES = ("flac", "wav", "ogg", "mp3")
MAX_MEMBER_BYTES = 1 << 30
PREFIX = re.compile(r"[A-Za-z0-9_.-]+")
END_BYTES = 2 * tarfile.BLOCKSIZE  # a tar ends with two blocks of zeros, or more
# what tarfile lets out on damaged headers, besides its own errors
HEADER_ERRORS = (tarfile.TarError, ValueError, OverflowError, MemoryError, EOFError)

Utterance = dict[str, Any]


def write_shards(
    manifest: Manifest, output_dir: str | Path, *, prefix: str, utterances_per_shard: int = 1000
) -> list[Path]:
    """Copy a corpus into tar shards, in the order of its manifest.

    Audio that is a whole file is copied as it is, without decoding. A segment of a long file (`offset_seconds`) is cut
    out and written as 16-bit FLAC at its own rate. Beside `<prefix>-<number>.tar`, `<prefix>.jsonl` is a manifest of
    the same utterances (`audio` is `shard.tar#member`), and `<prefix>.skipped.jsonl` names those that could not be
    read. Every file is complete or absent; the manifest comes last.

    Args:
        manifest: the utterances.
        output_dir: folder of the shards.
        prefix: beginning of their names; letters, digits, `_`, `.` and `-`.
        utterances_per_shard: at most.

    Returns:
        The shards in order.

    Raises:
        ValueError: an argument is out of its range, the folder has more shards of this prefix than are to be written,
            or no utterance can be read.
    """
    if not PREFIX.fullmatch(prefix):
        raise ValueError(f"prefix must be letters, digits, '_', '.' and '-', got {prefix!r}")
    if utterances_per_shard < 1:
        raise ValueError(f"utterances_per_shard must be 1 or more, got {utterances_per_shard}")
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(manifest), utterances_per_shard)
    paths = [output_dir / f"{prefix}-{number:06d}.tar" for number in range(len(starts))]
    numbered = re.compile(rf"{re.escape(prefix)}-[0-9]{{6,}}\.tar")
    stale = sorted(path.name for path in output_dir.iterdir() if numbered.fullmatch(path.name) and path not in paths)
    if stale:
        raise ValueError(
            f"{output_dir} has {len(stale)} shards that these {len(paths)} would not replace, the first is {stale[0]}; "
            "remove them, or choose another folder or prefix"
        )
    skipped: list[dict[str, str]] = []

    def rows() -> Iterator[Utterance]:
        with tqdm(total=len(manifest), desc=prefix, unit="utterance") as progress:
            for path, start in zip(paths, starts, strict=True):
                stop = min(start + utterances_per_shard, len(manifest))
                shard_rows = []
                with atomic_write(path) as temporary, tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as tar:
                    for number in range(start, stop):
                        utterance = manifest[number]
                        progress.update()
                        try:
                            audio, suffix = _encoded_audio(utterance)
                        except (ValueError, OSError, soundfile.LibsndfileError) as error:
                            skipped.append({"id": utterance["id"], "reason": str(error)})
                            continue
                        row = {name: utterance[name] for name in FIELDS if utterance.get(name) is not None}
                        row = {name: value for name, value in row.items() if name not in ("audio", "offset_seconds")}
                        _add(tar, f"{number:09d}.json", json.dumps(row, ensure_ascii=False).encode())
                        _add(tar, f"{number:09d}.{suffix}", audio)
                        shard_rows.append({**row, "audio": f"{path.name}#{number:09d}.{suffix}"})
                yield from shard_rows

    num_written = write_manifest(output_dir / f"{prefix}.jsonl", rows())
    write_jsonl(output_dir / f"{prefix}.skipped.jsonl", skipped)
    if skipped:
        summary = (
            f"{len(skipped)} of {len(manifest)} utterances could not be read and are named in {prefix}.skipped.jsonl"
        )
        if num_written == 0:
            raise ValueError(f"{summary}; nothing is left. First: {skipped[0]['reason']}")
        logger.warning("%s. First: %s", summary, skipped[0]["reason"])
    return paths


def _encoded_audio(utterance: Utterance) -> tuple[bytes, str]:
    """Audio of one utterance as it goes into a shard, and its suffix.

    Raises:
        ValueError, OSError, soundfile.LibsndfileError: it cannot be read.
    """
    source, name = utterance["audio"], f"audio of {utterance['id']!r}"
    if isinstance(source, str):
        name = source
        in_tar = split_member(source)
        if in_tar is not None:
            source = read_member(*in_tar)
        elif not Path(source).is_file():
            raise ValueError(f"{name}: audio file does not exist")
    if utterance["offset_seconds"] is not None:
        return _cut(source, name, utterance["offset_seconds"], utterance["duration_seconds"]), "flac"
    if isinstance(utterance["audio"], str):
        suffix = name.rpartition(".")[2].lower()
    else:
        suffix = soundfile.info(io.BytesIO(source)).format.lower()
    if suffix not in AUDIO_SUFFIXES:
        raise ValueError(f"{name}: a shard holds {', '.join(AUDIO_SUFFIXES)}, not {suffix}; convert it first")
    if isinstance(source, str):
        if os.stat(source).st_size > MAX_MEMBER_BYTES:
            raise ValueError(f"{name}: larger than {MAX_MEMBER_BYTES:,} bytes; cut it into segments by offset_seconds")
        source = Path(source).read_bytes()
    return source, suffix


def _cut(source: str | bytes, name: str, offset_seconds: float, duration_seconds: float) -> bytes:
    """A segment as 16-bit FLAC."""
    with soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
        file.seek(min(round(offset_seconds * file.samplerate), file.frames))
        # samples that are not 16-bit go through float32, where writing clips and rounds them
        dtype = "int16" if file.subtype == "PCM_16" else "float32"
        samples = file.read(round(duration_seconds * file.samplerate), dtype=dtype, always_2d=True)
    if len(samples) == 0:
        raise ValueError(f"{name}: holds no samples at offset {offset_seconds:.2f} s")
    encoded = io.BytesIO()
    soundfile.write(encoded, samples, file.samplerate, format="FLAC", subtype="PCM_16")
    return encoded.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # neither time nor owner: the same corpus gives the same bytes
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _warn(message: str) -> None:
    logger.warning("%s", message)


def read_shard(
    path: str | Path, report: Callable[[str], None] = _warn
) -> Iterator[tuple[Utterance, Callable[[], bytes]]]:
    """Utterances of one shard, from its beginning to its end.

    Headers and JSON are read, audio is passed over by seeking until it is asked for. Foreign shards work too: a
    `.txt` member is the text; without an `id` the key is it; without `duration_seconds` or `sample_rate_hz` the header
    of the audio, which is then read at once, gives them. Other fields and members are left out.

    Args:
        path: an uncompressed tar.
        report: takes one message for each utterance that is left out because it is broken.

    Yields:
        The utterance, a dict with the fields of a manifest (None where absent; `audio` is `path#member`), and a
        function that reads its encoded audio. The function works at any time, fastest before the next utterance.

    Raises:
        ValueError: the tar is damaged, or has a member that is refused; names both. The whole utterances before that
            come first.
    """
    path = Path(path)
    damage: list[ValueError] = []
    with _open(path) as file:
        for key, group in groupby(
            _until_damage(_members(path, file), damage), key=lambda member: _split(member.name)[0]
        ):
            members: dict[str, tarfile.TarInfo] = {}
            repeated = ""
            for member in group:
                suffix = _split(member.name)[1]
                repeated = repeated or (suffix if suffix in members else "")
                members[suffix] = member
            found = [suffix for suffix in AUDIO_SUFFIXES if suffix in members]
            if damage and not (found and "json" in members):
                break  # what is missing may have stood behind the damage
            place = f"{path}#{key}"
            try:
                if repeated:
                    raise ValueError(f"has two members .{repeated}")
                if len(found) != 1:
                    raise ValueError(f"has {len(found)} of the members .{', .'.join(AUDIO_SUFFIXES)}, not one")
                read = _reader(path, file, members[found[0]])
                utterance = _utterance(path, file, key, members, read)
            except (ValueError, RecursionError, soundfile.LibsndfileError) as error:
                report(f"{place}: left out, {error}")
                continue
            utterance["audio"] = f"{path}#{members[found[0]].name}"
            yield utterance, read
    if damage:
        raise damage[0]


def _split(name: str) -> tuple[str, str]:
    """Key and suffix of a member: its name up to and after the first dot behind the folder."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def _utterance(
    path: Path, file: BinaryIO, key: str, members: dict[str, tarfile.TarInfo], read: Callable[[], bytes]
) -> Utterance:
    """Checked fields of one utterance. Raises ValueError, RecursionError or LibsndfileError where they are broken."""
    row: Any = json.loads(_reader(path, file, members["json"])()) if "json" in members else {}
    if not isinstance(row, dict):
        raise ValueError(f"its JSON holds {type(row).__name__}, not an object")
    row = {name: row[name] for name in FIELDS if row.get(name) is not None}
    row.setdefault("id", key)
    if "txt" in members:
        row.setdefault("text", _reader(path, file, members["txt"])().decode("utf-8").strip())
    if "duration_seconds" not in row or "sample_rate_hz" not in row:
        info = soundfile.info(io.BytesIO(read()))
        row.setdefault("duration_seconds", info.frames / info.samplerate)
        row.setdefault("sample_rate_hz", info.samplerate)
    problems = utterance_problems({**row, "audio": ""})
    if problems:
        raise ValueError("; ".join(problems))
    for name in ("duration_seconds", "offset_seconds"):
        if name in row:
            row[name] = float(row[name])
    return {**dict.fromkeys(FIELDS), **row}


def split_member(path: str) -> tuple[str, str] | None:
    """Tar and member of "a/b.tar#m.flac"; None for the path of a file."""
    stem, mark, member = path.partition(".tar#")
    return (f"{stem}.tar", member) if mark and member else None


def read_member(tar_path: str | Path, member: str) -> bytes:
    """Content of one member. Each process indexes a tar once; a call reads once, without a shared file position.

    Raises:
        ValueError: the tar is missing or damaged, has a member that is refused, or lacks this one; names both.
    """
    offset, num_bytes = find_member(tar_path, member)
    with _open(Path(tar_path)) as file:
        return _read_at(Path(tar_path), file, member, offset, num_bytes)


def find_member(tar_path: str | Path, member: str) -> tuple[int, int]:
    """Where a member begins in its tar, and how long it is, in bytes.

    Raises:
        ValueError: as for `read_member`.
    """
    try:
        stat = os.stat(tar_path)
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise ValueError(f"tar {str(tar_path)!r} cannot be opened ({error}); correct the path") from error
    index = _index(str(tar_path), stat.st_mtime_ns, stat.st_size)
    if isinstance(index, str):
        raise ValueError(index)
    if member not in index:
        raise ValueError(
            f"{tar_path} has no member {member!r} among its {len(index)}; correct the name, or write the shards again"
        )
    return index[member]


@lru_cache(maxsize=1024)
def _index(path: str, mtime_ns: int, num_bytes: int) -> dict[str, tuple[int, int]] | str:
    """Offset and size of each member, or what is wrong with the tar: its next member need not read it to know."""
    try:
        with _open(Path(path)) as file:
            return {member.name: (member.offset_data, member.size) for member in _members(Path(path), file)}
    except ValueError as error:
        return str(error)


def check_ends(paths: list[Path]) -> None:
    """Refuse shards that are missing or were cut short, by a look at their last bytes.

    Raises:
        ValueError: names the first of them.
    """
    for path in paths:
        with _open(path) as file:
            num_bytes = os.fstat(file.fileno()).st_size
            if os.pread(file.fileno(), END_BYTES, max(0, num_bytes - END_BYTES)) != bytes(END_BYTES):
                raise ValueError(f"{path}: does not end as a tar does; it was cut short or is no tar, fetch it again")


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise ValueError(f"tar {str(path)!r} cannot be opened ({error.strerror}); correct the path") from error


def _members(path: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The files in a tar, in order; what is between their headers is not read.

    Raises:
        ValueError: the tar is damaged, or a member is refused; names both.
    """
    num_bytes = os.fstat(file.fileno()).st_size
    where = "at its beginning"
    try:
        tar = tarfile.open(fileobj=file, mode="r:")
        member = tar.next()
    except HEADER_ERRORS as error:
        raise ValueError(f"{path}: not an uncompressed tar ({error!r}); fetch it again, or unpack it first") from error
    while member is not None:
        _check_member(path, member, num_bytes)
        if not member.isdir():
            yield member
        where = f"after member {member.name!r}"
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
        try:
            member = tar.next()
        except HEADER_ERRORS as error:
            raise ValueError(f"{path}: damaged {where} ({error!r}); fetch it again") from error
    # tarfile takes an unreadable header, and the end of the file, for the end of the archive
    if os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) != bytes(tarfile.BLOCKSIZE):
        raise ValueError(f"{path}: cut short or damaged {where}; fetch it again")


def _check_member(path: Path, member: tarfile.TarInfo, tar_bytes: int) -> None:
    name = PureWindowsPath(member.name)  # splits at both kinds of slash and knows drives
    if name.drive or name.root or ".." in name.parts:
        problem = "has a name that points out of the shard"
    elif not (member.isfile() or member.isdir()):
        problem = "is a link or a device"
    elif member.issparse():
        problem = "is sparse"
    elif not 0 <= member.size <= MAX_MEMBER_BYTES:
        problem = f"claims {member.size:,} bytes, where {MAX_MEMBER_BYTES:,} are the limit"
    elif member.offset_data + member.size > tar_bytes:
        rest = max(0, tar_bytes - member.offset_data)
        raise ValueError(
            f"{path}: member {member.name!r} should have {member.size:,} bytes, but only {rest:,} are left of the tar; "
            "it was cut short, fetch it again"
        )
    else:
        return
    raise ValueError(
        f"{path}: member {member.name!r} {problem}; the shard is refused, pack it again as plain files if you trust it"
    )


def _until_damage(members: Iterator[tarfile.TarInfo], damage: list[ValueError]) -> Iterator[tarfile.TarInfo]:
    """The members up to the first error, which is put into `damage`."""
    try:
        yield from members
    except ValueError as error:
        damage.append(error)


def _reader(path: Path, file: BinaryIO, member: tarfile.TarInfo) -> Callable[[], bytes]:
    name, offset, num_bytes = member.name, member.offset_data, member.size

    def read() -> bytes:
        if not file.closed:
            return _read_at(path, file, name, offset, num_bytes)
        with _open(path) as again:
            return _read_at(path, again, name, offset, num_bytes)

    return read


def _read_at(path: Path, file: BinaryIO, name: str, offset: int, num_bytes: int) -> bytes:
    content = os.pread(file.fileno(), num_bytes, offset)
    if len(content) < num_bytes:
        raise ValueError(
            f"{path}: member {name!r} has {len(content):,} of its {num_bytes:,} bytes; the tar was cut while in use"
        )
    return content
