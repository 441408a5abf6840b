"""Fetching archives with their checksums, and unpacking them without trusting their names, kinds or sizes."""

import bz2
import errno
import gzip
import hashlib
import http.client
import lzma
import shutil
import stat
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from speechkd.files import atomic_write, folder_lock

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 60
MAX_UNPACKED_BYTES = 200 << 30
MAX_RATIO = 200  # unpacked to packed; text packs to about a tenth, audio hardly at all
RATIO_FREE_BYTES = 16 << 20  # a small archive may pack as well as it likes
ZIP_MAGICS = (b"PK\x03\x04", b"PK\x05\x06")
DECOMPRESSORS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
# errors of the file system that only an archive with clashing or endless names can cause
ARCHIVE_ERRNOS = (None, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


class UnreachableError(ValueError):
    """A server did not answer, does not have the file, or broke off."""


def fetch(url: str, path: str | Path, *, checksum: str | None = None) -> Path:
    """Download one file, unless it is there already.

    Args:
        url: where the file is.
        path: its name on disk; complete or absent at any moment.
        checksum: "md5:<hex>" or "sha256:<hex>". A file that is there and has another one is fetched again; without
            a checksum a file that is there counts as whole.

    Returns:
        `path`.

    Raises:
        UnreachableError: the server cannot be reached, lacks the file or ended early; a ValueError.
        ValueError: the checksum is malformed, or that of the file is another.
    """
    path = Path(path)
    algorithm, expected = _parse_checksum(checksum)
    if path.is_file() and (expected is None or _digest(path, algorithm) == expected):
        return path
    with atomic_write(path) as temporary:
        found = _receive(url, temporary, algorithm, path.name)
        if expected is not None and found != expected:
            raise ValueError(
                f"{path.name} has {algorithm.upper()} {found}, not {expected}; fetch it again, "
                f"and if that does not help, {url} has changed since the checksum was written down"
            )
    return path


def _parse_checksum(checksum: str | None) -> tuple[str, str | None]:
    if checksum is None:
        return "sha256", None
    algorithm, _, expected = checksum.partition(":")
    if algorithm not in ("md5", "sha256") or len(expected) != 2 * hashlib.new(algorithm).digest_size:
        raise ValueError(f"checksum {checksum!r} is neither 'md5:' and 32 nor 'sha256:' and 64 hexadecimal digits")
    return algorithm, expected.lower()


def _digest(path: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _receive(url: str, path: Path, algorithm: str, name: str) -> str:
    """Write what the server sends to `path`; the digest of it."""
    digest, num_bytes = hashlib.new(algorithm), 0
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer, path.open("wb") as file:
            length = answer.headers.get("Content-Length")
            total = int(length) if length else None
            with tqdm(total=total, unit="B", unit_scale=True, desc=name) as progress:
                while chunk := answer.read(CHUNK_BYTES):
                    digest.update(chunk)
                    file.write(chunk)
                    num_bytes += len(chunk)
                    progress.update(len(chunk))
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise UnreachableError(
            f"{url} cannot be reached ({error}); check the network, or fetch it by hand and save it as {name}"
        ) from error
    if total is not None and num_bytes != total:
        raise UnreachableError(f"{url} ended after {num_bytes:,} of {total:,} bytes; run the same command again")
    return digest.hexdigest()


def unpack(archive: str | Path, folder: str | Path, *, inner: str = "", max_bytes: int = MAX_UNPACKED_BYTES) -> Path:
    """Unpack a tar (plain, gzip, bzip2, xz) or zip archive into a new folder.

    Everything goes into a temporary folder beside `folder`, which is renamed when the archive was read to its end:
    a folder that is there is whole. Members keep neither owner, permissions nor time.

    Args:
        archive: the file; its kind is told by its content, not its name.
        folder: where its members go; must not exist, or be empty.
        inner: the folder inside the archive that becomes `folder`; what is outside of it is dropped. "" takes all.
        max_bytes: limit of the unpacked size.

    Returns:
        `folder`.

    Raises:
        ValueError: `folder` has content, or another process unpacks to it; the archive is damaged or none, or lacks
            `inner`; a member, which is named, has an absolute name or `..` in it, is a link or a device, or brings the
            size above `max_bytes` or above 200 times that of the archive.
    """
    archive, folder = Path(archive), Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} is there already; remove it to unpack {archive.name} again")
    temporary = folder.with_name(f".{folder.name}.unpacking")
    with folder_lock(temporary):
        content = temporary / "content"
        shutil.rmtree(content, ignore_errors=True)  # of a run that was killed
        content.mkdir()
        try:
            _unpack_members(archive, content, max_bytes)
            if not (content / inner).is_dir():
                raise ValueError(f"{archive} has no folder {inner!r} in it; fetch the one that the corpus publishes")
            (content / inner).replace(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


class Member(NamedTuple):
    """One entry of an archive. `kind` is "file", "folder", "link" or "device"; only a file has a stream."""

    name: str
    kind: str
    num_bytes: int
    stream: IO[bytes] | None


def _unpack_members(archive: Path, folder: Path, max_bytes: int) -> None:
    ratio_bytes = max(RATIO_FREE_BYTES, MAX_RATIO * archive.stat().st_size)
    declared_bytes = written_bytes = 0
    try:
        members = _zip_members(archive) if _starts_with(archive, *ZIP_MAGICS) else _tar_members(archive)
        for member in tqdm(members, desc=archive.name, unit="file"):
            declared_bytes += member.num_bytes
            _check_name_and_kind(archive, member)
            _check_size(archive, member.name, declared_bytes, max_bytes, ratio_bytes)
            target = folder / member.name
            if member.stream is None:
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                while chunk := member.stream.read(CHUNK_BYTES):
                    written_bytes += len(chunk)  # a header can lie, and its size be negative
                    _check_size(archive, member.name, written_bytes, max_bytes, ratio_bytes)
                    file.write(chunk)
    except (OSError, EOFError, RuntimeError, tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        if getattr(error, "errno", None) not in ARCHIVE_ERRNOS:
            raise
        raise ValueError(
            f"{archive} is damaged, encrypted or neither tar nor zip ({error}); remove it and fetch it again"
        ) from error


def _check_name_and_kind(archive: Path, member: Member) -> None:
    name = PureWindowsPath(member.name)  # splits at both kinds of slash and knows drives
    if name.drive or name.root or ".." in name.parts:
        raise ValueError(
            f"{archive}: member {member.name!r} points outside of the folder; nothing was unpacked, "
            "do not use this archive unless you trust where it is from"
        )
    if member.kind not in ("file", "folder"):
        raise ValueError(
            f"{archive}: member {member.name!r} is a {member.kind}; nothing was unpacked, "
            "only files and folders are; unpack it by hand if you trust where it is from"
        )


def _check_size(archive: Path, name: str, num_bytes: int, max_bytes: int, ratio_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise ValueError(
            f"{archive}: member {name!r} brings the unpacked size to {num_bytes:,} bytes, above max_bytes="
            f"{max_bytes:,}; nothing was unpacked, raise max_bytes if you trust where the archive is from"
        )
    if num_bytes > ratio_bytes:
        raise ValueError(
            f"{archive}: member {name!r} brings the unpacked size to {num_bytes:,} bytes, above {MAX_RATIO} times the "
            "archive's own, as in a decompression bomb; nothing was unpacked, do so by hand if you trust its source"
        )


def _starts_with(archive: Path, *magics: bytes) -> bool:
    with archive.open("rb") as file:
        return file.read(8).startswith(magics)


def _zip_members(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as content:
        for info in content.infolist():
            file_type = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archive was not made on Unix
            if info.is_dir():
                yield Member(info.filename, "folder", 0, None)
            elif file_type in (0, stat.S_IFREG):
                with content.open(info) as stream:
                    yield Member(info.filename, "file", info.file_size, stream)
            else:
                yield Member(info.filename, "link" if file_type == stat.S_IFLNK else "device", 0, None)


def _tar_members(archive: Path) -> Iterator[Member]:
    opener = next((opener for magic, opener in DECOMPRESSORS.items() if _starts_with(archive, magic)), open)
    with opener(archive, "rb") as stream, tarfile.open(fileobj=stream, mode="r|") as content:
        for info in content:
            if info.isreg():
                yield Member(info.name, "file", info.size, content.extractfile(info))
            elif info.isdir():
                yield Member(info.name, "folder", 0, None)
            else:
                yield Member(info.name, "link" if info.issym() or info.islnk() else "device", 0, None)
        # the compressed stream's own checksum stands behind the last block; padding is short, the rest is not read
        for _ in range(64):
            if not stream.read(CHUNK_BYTES):
                break
