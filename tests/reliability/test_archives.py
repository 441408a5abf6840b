"""Archives that hide where a member goes, or how much it holds, behind another header; all others are refused in
`test_data_prep_download.py` and `test_data_shards.py`."""

import io
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
from download import unpack

from speechkd.data.shards import read_member, read_shard

pytestmark = pytest.mark.reliability

LONG = "x" * 150 + "/"  # does not fit into the first header


def write_tar(path: Path, name: str, tar_format: int, pax_headers: dict[str, str] | None = None) -> Path:
    with tarfile.open(path, "w", format=tar_format) as archive:
        info = tarfile.TarInfo(name)
        info.size, info.pax_headers = 4, pax_headers or {}
        archive.addfile(info, io.BytesIO(b"evil"))
    return path


@pytest.mark.parametrize("name", [f"/{LONG}1.flac", f"{LONG}../../1.flac", "../" * 60 + "1.flac"])
@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["GNU", "PAX"])
def test_a_name_in_an_extended_header_is_checked_too(tmp_path, name, tar_format):
    path = write_tar(tmp_path / "c.tar", name, tar_format)
    with pytest.raises(ValueError, match="points outside of the folder"):
        unpack(path, tmp_path / "out")
    with pytest.raises(ValueError, match="points out of the shard"):
        list(read_shard(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.tar"]


def test_a_pax_header_does_not_replace_a_harmless_name_by_one_outside(tmp_path):
    path = write_tar(tmp_path / "c.tar", "good.flac", tarfile.PAX_FORMAT, {"path": "../evil.flac"})
    with tarfile.open(path) as archive:
        assert archive.getnames() == ["../evil.flac"]  # the trap is set
    with pytest.raises(ValueError, match="evil.flac' points outside of the folder"):
        unpack(path, tmp_path / "out")
    for read in (lambda: list(read_shard(path)), lambda: read_member(path, "good.flac")):
        with pytest.raises(ValueError, match="evil.flac' has a name that points out of the shard"):
            read()


def test_a_file_is_not_written_through_a_link_that_came_before_it(tmp_path):
    with tarfile.open(tmp_path / "c.tar", "w") as archive:
        link = tarfile.TarInfo("folder")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "target")
        archive.addfile(link)
        info = tarfile.TarInfo("folder/evil")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"evil"))
    (tmp_path / "target").mkdir()
    with pytest.raises(ValueError, match="member 'folder' is a link"):
        unpack(tmp_path / "c.tar", tmp_path / "out")
    assert not list((tmp_path / "target").iterdir()) and not (tmp_path / "out").exists()


def test_a_zip_whose_entries_share_one_compressed_block_is_refused_as_a_bomb(tmp_path):
    # 2,000 names in the directory point at the same megabyte of zeros, which takes a thousand bytes once
    path = tmp_path / "c.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0000", bytes(1 << 20))
        start = archive.start_dir
    content = path.read_bytes()
    entry = content[start : content.index(b"PK\x05\x06")]
    name_at = entry.index(b"0000")
    entries = b"".join(entry[:name_at] + b"%04d" % number + entry[name_at + 4 :] for number in range(2_000))
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 2_000, 2_000, len(entries), start, 0)
    path.write_bytes(content[:start] + entries + end)
    with pytest.raises(ValueError, match="bomb|damaged"):
        unpack(path, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.zip"]


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_shard_is_not_unpacked_on_the_way(tmp_path, mode):
    with tarfile.open(tmp_path / "c.tar", mode) as archive:
        info = tarfile.TarInfo("1.flac")
        info.size = 1 << 20
        archive.addfile(info, io.BytesIO(bytes(info.size)))
    for read in (lambda: list(read_shard(tmp_path / "c.tar")), lambda: read_member(tmp_path / "c.tar", "1.flac")):
        with pytest.raises(ValueError, match="c.tar: not an uncompressed tar"):
            read()
