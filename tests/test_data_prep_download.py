import hashlib
import io
import os
import stat
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import download
import pytest
from download import UnreachableError, fetch, unpack

from speechkd.files import folder_lock

TAR_MODES = {"tar": "w", "tar.gz": "w:gz", "tar.bz2": "w:bz2", "tar.xz": "w:xz"}
FILES = {"corpus/a.txt": b"first\n", "corpus/deep/er/b.txt": b"second\n" * 100, "corpus/empty.txt": b""}


def write_archive(path: Path, files: dict[str, bytes]) -> Path:
    """A tar or zip archive, by the suffix of its name."""
    suffix = path.name.partition(".")[2]
    if suffix == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
        return path
    with tarfile.open(path, TAR_MODES[suffix]) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(archive: Path, message: str, **limits: int) -> None:
    """The archive is refused with this message, and its folder holds nothing but the archive afterwards."""
    with pytest.raises(ValueError, match=message):
        unpack(archive, archive.parent / "out", **limits)
    assert list(archive.parent.parent.rglob("*")) == [archive.parent, archive]


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """A folder in a folder, so that what escapes from it is seen."""
    (tmp_path / "box").mkdir()
    return tmp_path / "box"


@pytest.fixture
def server() -> Iterator[str]:
    """A web server on this machine: /whole sends 10 bytes, /broken 10 of the 1,000 that it promises, others 404."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path not in ("/whole", "/broken"):
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", "10" if self.path == "/whole" else "1000")
            self.end_headers()
            self.wfile.write(b"0123456789")

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_a_file_is_fetched_once_and_again_only_when_its_checksum_differs(box, server, algorithm):
    checksum = f"{algorithm}:{hashlib.new(algorithm, b'0123456789').hexdigest()}"
    assert fetch(f"{server}/whole", box / "deep/file", checksum=checksum).read_bytes() == b"0123456789"
    assert fetch(f"{server}/gone", box / "deep/file", checksum=checksum) == box / "deep/file"
    (box / "deep/file").write_bytes(b"01234")
    fetch(f"{server}/whole", box / "deep/file", checksum=checksum)
    assert contents(box) == {"deep/file": b"0123456789"}


def test_without_a_checksum_a_file_that_is_there_stays(box, server):
    (box / "file").write_bytes(b"mine")
    fetch(f"{server}/whole", box / "file")
    assert contents(box) == {"file": b"mine"}


def test_a_wrong_checksum_is_named_and_leaves_what_was_there(box, server):
    (box / "file").write_bytes(b"old")
    found = hashlib.md5(b"0123456789").hexdigest()
    with pytest.raises(ValueError, match=f"file has MD5 {found}, not {'0' * 32}; fetch it again"):
        fetch(f"{server}/whole", box / "file", checksum=f"md5:{'0' * 32}")
    assert contents(box) == {"file": b"old"}


@pytest.mark.parametrize("checksum", ["0" * 32, "md5:00", "crc32:00000000", ""])
def test_a_malformed_checksum_is_refused_before_anything_is_fetched(box, checksum):
    with pytest.raises(ValueError, match=f"checksum {checksum!r} is neither 'md5:' and 32 nor 'sha256:' and 64"):
        fetch("http://127.0.0.1:9/file", box / "file", checksum=checksum)


def test_an_answer_that_breaks_off_leaves_no_file(box, server):
    with pytest.raises(UnreachableError, match="broken"):
        fetch(f"{server}/broken", box / "file")
    assert contents(box) == {}


def test_a_file_that_the_server_lacks_and_a_server_that_is_not_there_are_named(box, server):
    with pytest.raises(UnreachableError, match=r"/gone cannot be reached \(HTTP Error 404.*check the network"):
        fetch(f"{server}/gone", box / "file")
    with pytest.raises(UnreachableError, match="nowhere cannot be reached"):
        fetch((box / "nowhere").as_uri(), box / "file")
    assert contents(box) == {}


@pytest.mark.parametrize("suffix", [*TAR_MODES, "zip"])
def test_every_kind_of_archive_unpacks_to_the_files_that_went_in(box, suffix):
    # the kind is told by the content: the name says nothing
    archive = write_archive(box / f"c.{suffix}", FILES).rename(box / "download")
    assert unpack(archive, box / "new/out") == box / "new/out"
    assert contents(box / "new") == {f"out/{name}": content for name, content in FILES.items()}


def test_one_inner_folder_can_become_the_result(box):
    archive = write_archive(box / "c.tar", FILES | {"other/c.txt": b"dropped"})
    unpack(archive, box / "out", inner="corpus/deep")
    assert contents(box / "out") == {"er/b.txt": FILES["corpus/deep/er/b.txt"]}
    archive = archive.rename(box / "c")
    with pytest.raises(ValueError, match="has no folder 'speech' in it"):
        unpack(archive, box / "other", inner="speech")
    assert {path.name for path in box.iterdir()} == {"c", "out"}


def test_what_a_killed_run_left_is_not_part_of_the_result(box):
    (box / ".out.unpacking/content/corpus").mkdir(parents=True)
    (box / ".out.unpacking/content/corpus/half.txt").write_text("half")
    unpack(write_archive(box / "c.tar", FILES), box / "out")
    assert contents(box / "out") == FILES and not (box / ".out.unpacking").exists()


def test_two_processes_do_not_unpack_to_one_folder(box):
    archive = write_archive(box / "c.tar", FILES)
    with folder_lock(box / ".out.unpacking"), pytest.raises(ValueError, match="another process is writing to"):
        unpack(archive, box / "out")
    assert not (box / "out").exists()


def test_a_folder_with_content_is_kept_and_an_empty_one_is_filled(box):
    archive = write_archive(box / "c.zip", FILES)
    (box / "out").mkdir()
    unpack(archive, box / "out")
    (box / "out/mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="out is there already; remove it to unpack c.zip again"):
        unpack(archive, box / "out")
    assert (box / "out/mine.txt").read_text() == "mine"


@pytest.mark.parametrize("suffix", ["tar.gz", "zip"])
@pytest.mark.parametrize(
    "name", ["{box}/evil", "../evil", "a/../../evil", "a/..", "..\\evil", "\\evil", "C:\\evil", "C:evil", "//host/evil"]
)
def test_a_member_that_points_out_of_the_folder_is_refused_by_name(box, suffix, name):
    archive = write_archive(box / f"c.{suffix}", {"good.txt": b"good", name.format(box=box): b"evil"})
    assert_refused(archive, "member '.*(evil|a/..)' points outside of the folder; nothing was unpacked")


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (tarfile.SYMTYPE, "link"),
        (tarfile.LNKTYPE, "link"),
        (tarfile.CHRTYPE, "device"),
        (tarfile.BLKTYPE, "device"),
        (tarfile.FIFOTYPE, "device"),
    ],
)
def test_links_and_devices_in_a_tar_are_refused_by_name(box, kind, word):
    with tarfile.open(box / "c.tar", "w") as archive:
        info = tarfile.TarInfo("odd")
        info.type, info.linkname = kind, "good.txt"
        archive.addfile(tarfile.TarInfo("good.txt"))
        archive.addfile(info)
    assert_refused(box / "c.tar", f"member 'odd' is a {word}; nothing was unpacked")


@pytest.mark.parametrize(("mode", "word"), [(stat.S_IFLNK, "link"), (stat.S_IFCHR, "device"), (stat.S_IFIFO, "device")])
def test_links_and_devices_in_a_zip_are_refused_by_name(box, mode, word):
    with zipfile.ZipFile(box / "c.zip", "w") as archive:
        info = zipfile.ZipInfo("odd")
        info.external_attr = (mode | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    assert_refused(box / "c.zip", f"member 'odd' is a {word}; nothing was unpacked")


@pytest.mark.parametrize("suffix", ["tar", "tar.xz", "zip"])
def test_an_archive_above_max_bytes_is_refused_and_one_of_exactly_that_size_is_not(box, suffix):
    archive = write_archive(box / f"c.{suffix}", {"a": os.urandom(600), "b": os.urandom(400)})
    assert_refused(archive, "member 'b' brings the unpacked size to 1,000 bytes, above max_bytes=999", max_bytes=999)
    unpack(archive, box / "out", max_bytes=1000)
    assert sum(map(len, contents(box / "out").values())) == 1000


@pytest.mark.parametrize("suffix", ["tar.gz", "tar.bz2", "tar.xz", "zip"])
def test_an_archive_that_grows_two_hundredfold_is_refused_as_a_bomb(box, suffix):
    archive = write_archive(box / f"c.{suffix}", {"small": b"x", "zeros": bytes(17 << 20)})
    assert_refused(archive, "member 'zeros' brings the .* above 200 times the archive's own, as in a decompression")


def test_a_tar_whose_header_declares_terabytes_is_refused(box):
    with tarfile.open(box / "c.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        info = tarfile.TarInfo("endless")
        info.size = 5 << 40
        archive.addfile(info)
    assert_refused(box / "c.tar", "member 'endless' brings the unpacked size to 5,497,558,138,880 bytes, above max_")


def test_what_is_really_written_is_held_against_max_bytes_too(box, monkeypatch):
    # neither tarfile nor zipfile gives more than the header says; a reader that does stands in for them
    liar = download.Member("liar", "file", 1, io.BytesIO(bytes(1_000)))
    monkeypatch.setattr(download, "_tar_members", lambda archive: iter([liar]))
    archive = write_archive(box / "c.tar", FILES)
    assert_refused(archive, "member 'liar' brings the unpacked size to 1,000 bytes, above max_bytes=100", max_bytes=100)


def test_a_zip_whose_directory_understates_a_size_is_refused(box):
    archive = write_archive(box / "c.zip", {"liar": b"0123456789" * 50})
    content = archive.read_bytes()
    assert content.count((500).to_bytes(4, "little")) == 2  # local header and central directory
    archive.write_bytes(content.replace((500).to_bytes(4, "little"), (5).to_bytes(4, "little")))
    assert_refused(archive, "c.zip is damaged", max_bytes=100)


def test_a_tar_with_a_negative_size_is_refused(box):
    with tarfile.open(box / "c.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        info = tarfile.TarInfo("negative")
        info.size = -1024
        archive.addfile(info)
        archive.addfile(tarfile.TarInfo("after"))
    with pytest.raises(ValueError):
        unpack(box / "c.tar", box / "out")
    assert [path.name for path in box.iterdir()] == ["c.tar"]


@pytest.mark.parametrize("suffix", ["tar.gz", "tar.bz2", "tar.xz", "zip"])
@pytest.mark.parametrize("lost", [2, 500])
def test_a_truncated_archive_leaves_no_folder(box, suffix, lost):
    archive = write_archive(box / f"c.{suffix}", FILES | {"noise": os.urandom(5_000)})
    archive.write_bytes(archive.read_bytes()[:-lost])
    assert_refused(archive, f"c.{suffix} is damaged, encrypted or neither tar nor zip .* fetch it again")


@pytest.mark.parametrize("suffix", ["tar.gz", "zip"])
def test_a_flipped_bit_leaves_no_folder(box, suffix):
    archive = write_archive(box / f"c.{suffix}", {"noise": os.urandom(5_000)})
    content = bytearray(archive.read_bytes())
    content[2_500] ^= 1
    archive.write_bytes(content)
    assert_refused(archive, f"c.{suffix} is damaged")


@pytest.mark.parametrize(
    "content", [b"", b"<html>not found</html>", b"PK\x03\x04 no zip", b"\x1f\x8bno gzip", b"x" * 2_000]
)
def test_what_is_no_archive_is_named(box, content):
    (box / "c.tar").write_bytes(content)
    assert_refused(box / "c.tar", "c.tar is damaged, encrypted or neither tar nor zip")


@pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a"), (".", "b"), ("a/" + "n" * 300, "b")])
def test_members_that_no_folder_can_hold_are_refused(box, names):
    archive = write_archive(box / "c.tar", dict.fromkeys(names, b"content"))
    assert_refused(archive, "c.tar is damaged")
