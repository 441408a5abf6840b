import io
import json
import os
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import shards as script  # data_prep/shards.py
import soundfile
from conftest import write_tone
from hypothesis import given, settings
from hypothesis import strategies as st

from speechkd.data import shards
from speechkd.data.manifest import Manifest, ManifestError, read_manifest, write_manifest
from speechkd.data.shards import check_ends, read_member, read_shard, split_member, write_shards


def pack(path: Path, members: list[tuple[str | tarfile.TarInfo, bytes]]) -> Path:
    """A tar of these members, as another program could have written it."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name) if isinstance(name, str) else name
            member.size = member.size or len(content)
            tar.addfile(member, io.BytesIO(content.ljust(member.size, b"\0")))
    return path


def tone_bytes(suffix: str = "flac", seconds: float = 0.5, rate_hz: int = 16_000) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, 0.1 * np.sin(np.arange(round(seconds * rate_hz)) / 10), rate_hz, format=suffix.upper())
    return content.getvalue()


def row(key: str, seconds: float = 0.5) -> bytes:
    return json.dumps({"id": key, "duration_seconds": seconds, "sample_rate_hz": 16_000}).encode()


@pytest.fixture
def written(tone_manifest, tmp_path) -> tuple[Manifest, Path, list[Path]]:
    """Six tones, a flac among them, and their shards of four and two."""
    write_tone(tmp_path / "audio/5.flac", 2.0)
    lines = tone_manifest.read_text().replace("audio/5.wav", "audio/5.flac")
    tone_manifest.write_text(lines)
    manifest = read_manifest(tone_manifest)
    return manifest, tmp_path / "out", write_shards(manifest, tmp_path / "out", prefix="t", utterances_per_shard=4)


def test_what_is_written_is_read_back_byte_for_byte(written):
    manifest, folder, paths = written
    assert [path.name for path in paths] == ["t-000000.tar", "t-000001.tar"]
    found = [(utterance, read()) for path in paths for utterance, read in read_shard(path)]
    assert len(found) == 6
    for (utterance, audio), original in zip(found, manifest, strict=True):
        assert {**utterance, "audio": original["audio"]} == original
        assert audio == Path(original["audio"]).read_bytes()
    with tarfile.open(paths[1]) as tar:  # JSON before its audio, the id only inside
        assert tar.getnames() == ["000000004.json", "000000004.wav", "000000005.json", "000000005.flac"]
    assert (folder / "t.skipped.jsonl").read_text() == ""
    assert not list(folder.glob("*.tmp"))


def test_random_access_equals_sequential_reading(written):
    _, folder, paths = written
    manifest = read_manifest(folder / "t.jsonl")
    sequential = [(utterance["id"], read()) for path in paths for utterance, read in read_shard(path)]
    assert sequential == [(utterance["id"], read_member(*split_member(utterance["audio"]))) for utterance in manifest]


def test_the_same_corpus_gives_the_same_bytes(written, tmp_path):
    manifest, _, paths = written
    again = write_shards(manifest, tmp_path / "again", prefix="t", utterances_per_shard=4)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]
    assert write_shards(manifest, tmp_path / "again", prefix="t", utterances_per_shard=4) == again


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_segments_of_a_long_file_are_cut_out_as_16_bit_flac(tmp_path, subtype):
    samples = np.random.default_rng(0).integers(-20_000, 20_000, size=(24_000, 2), dtype=np.int16)
    content = samples if subtype == "PCM_16" else samples.astype(np.float32) / 32_768
    soundfile.write(tmp_path / "long.wav", content, 8_000, subtype=subtype)
    segments = [(0.0, 0.5), (1.25, 0.75), (2.9, 0.1)]
    rows = [
        {"id": str(start), "audio": "long.wav", "duration_seconds": seconds, "sample_rate_hz": 8_000}
        | {"offset_seconds": start, "text": "a"}
        for start, seconds in segments
    ]
    write_manifest(tmp_path / "long.jsonl", rows)
    (path,) = write_shards(read_manifest(tmp_path / "long.jsonl"), tmp_path / "out", prefix="long")
    for (utterance, read), (start, seconds) in zip(read_shard(path), segments, strict=True):
        audio, rate_hz = soundfile.read(io.BytesIO(read()), dtype="int16")
        first = round(start * 8_000)
        np.testing.assert_array_equal(audio, samples[first : first + round(seconds * 8_000)])
        assert rate_hz == 8_000 and soundfile.info(io.BytesIO(read())).subtype == "PCM_16"
        assert utterance["offset_seconds"] is None and utterance["duration_seconds"] == seconds


def test_shards_can_be_written_from_shards_and_from_bytes(written, tmp_path):
    manifest, folder, _ = written

    class InMemory(Manifest):
        def __getitem__(self, index: int) -> dict:
            utterance = super().__getitem__(index)
            return {**utterance, "audio": Path(utterance["audio"]).read_bytes()}

    expected = [read() for path in written[2] for _, read in read_shard(path)]
    for number, source in enumerate([read_manifest(folder / "t.jsonl"), InMemory(manifest.path, manifest.rows)]):
        (path,) = write_shards(source, tmp_path / f"again{number}", prefix="u")
        again = list(read_shard(path))
        assert [read() for _, read in again] == expected
        assert again[5][0]["audio"].endswith("u-000000.tar#000000005.flac")


def test_an_utterance_that_cannot_be_read_is_named_and_left_out(tmp_path, caplog):
    write_tone(tmp_path / "a.wav", 1.0)
    (tmp_path / "b.wav").write_text("not audio")
    (tmp_path / "c.aiff").write_text("not audio that a shard holds")
    rows = [
        {"id": "whole", "audio": "a.wav"},
        {"id": "behind", "audio": "a.wav", "offset_seconds": 3.0},
        {"id": "broken", "audio": "b.wav", "offset_seconds": 0.0},
        {"id": "aiff", "audio": "c.aiff"},
    ]
    write_manifest(tmp_path / "m.jsonl", [{**row, "duration_seconds": 1.0, "sample_rate_hz": 16_000} for row in rows])
    manifest = read_manifest(tmp_path / "m.jsonl")
    (path,) = write_shards(manifest, tmp_path / "out", prefix="m")
    assert [utterance["id"] for utterance, _ in read_shard(path)] == ["whole"]
    assert read_manifest(tmp_path / "out/m.jsonl").ids == ["whole"]
    skipped = [json.loads(line) for line in (tmp_path / "out/m.skipped.jsonl").read_text().splitlines()]
    assert [line["id"] for line in skipped] == ["behind", "broken", "aiff"]
    assert "3 of 4 utterances could not be read" in caplog.text
    with pytest.raises(ValueError, match="nothing is left. First: .*a.wav: holds no samples at offset 3.00 s"):
        write_shards(manifest.select([1]), tmp_path / "none", prefix="m")


def test_shards_of_an_earlier_run_do_not_mix_with_new_ones(written, tmp_path):
    manifest, folder, _ = written
    with pytest.raises(ValueError, match=r"has 1 shards that these 1 would not replace, the first is t-000001.tar"):
        write_shards(manifest, folder, prefix="t")
    with pytest.raises(ValueError, match="prefix must be letters.* got 'a/b'"):
        write_shards(manifest, folder, prefix="a/b")
    with pytest.raises(ValueError, match="utterances_per_shard must be 1 or more, got 0"):
        write_shards(manifest, folder, prefix="u", utterances_per_shard=0)


def test_a_foreign_shard_gets_what_it_lacks_from_headers_keys_and_text_files(tmp_path):
    folder = tarfile.TarInfo(".")
    folder.type = tarfile.DIRTYPE
    path = pack(
        tmp_path / "foreign.tar",
        [
            (folder, b""),
            ("./a/b.c/001.flac", tone_bytes("flac", 0.5)),  # audio first, a dot in the folder, no JSON
            ("./a/b.c/001.txt", "grüß dich\n".encode()),
            ("002.json", b'{"text": "two", "speaker": null, "snr": 3, "__key__": "002"}'),
            ("002.cls", b"7"),
            ("002.WAV", tone_bytes("wav", 0.25, 8_000)),
        ],
    )
    (first, _), (second, read) = read_shard(path)
    assert first["id"] == "./a/b.c/001" and first["text"] == "grüß dich"
    assert (first["duration_seconds"], first["sample_rate_hz"]) == (0.5, 16_000)
    assert second["id"] == "002" and second["text"] == "two" and "snr" not in second
    assert (second["duration_seconds"], second["sample_rate_hz"]) == (0.25, 8_000)
    assert read() == tone_bytes("wav", 0.25, 8_000) == read_member(path, "002.WAV")


def test_broken_utterances_are_reported_and_the_others_read(tmp_path):
    path = pack(
        tmp_path / "some.tar",
        [
            ("0.json", row("good")),
            ("0.flac", tone_bytes()),
            ("1.json", b"{"),
            ("1.flac", tone_bytes()),
            ("2.json", row("silent")),
            ("3.json", row("twofold")),
            ("3.flac", tone_bytes()),
            ("3.wav", tone_bytes("wav")),
            ("4.json", row("negative", -1.0)),
            ("4.flac", tone_bytes()),
            ("5.flac", b"not audio"),
            ("6.json", b'["a list"]'),
            ("6.flac", tone_bytes()),
            ("7.flac", tone_bytes()),
            ("7.txt", b"\xff"),
            ("8.json", b"[" * 100_000),
            ("8.flac", tone_bytes()),
            ("9.json", b'{"id": 9, "duration_seconds": 0.5, "sample_rate_hz": 16000}'),
            ("9.flac", tone_bytes()),
            ("10.json", row("last")),
            ("10.flac", b"whole files are not decoded"),
        ],
    )
    reports: list[str] = []
    assert [utterance["id"] for utterance, _ in read_shard(path, reports.append)] == ["good", "last"]
    assert [report.partition(": left out")[0] for report in reports] == [f"{path}#{key}" for key in range(1, 10)]
    assert "has 0 of the members .flac, .wav, .ogg, .mp3" in reports[1]
    assert "has duration_seconds=-1.0; it must be positive" in reports[3]
    assert "has id=9, a int where another type belongs" in reports[8]


@pytest.mark.parametrize("content", ["audio of 2", "header of 3", "json of 3", "end mark"])
def test_a_truncated_tar_gives_what_is_whole_then_names_file_and_member(tmp_path, content):
    members = [(f"{key}.{suffix}", b"") for key in range(4) for suffix in ("json", "flac")]
    members = [(name, row(name[0]) if name.endswith("json") else tone_bytes()) for name, _ in members]
    path = pack(tmp_path / "cut.tar", members)
    with tarfile.open(path) as tar:
        offsets = {member.name: member.offset_data for member in tar}
    cut, whole, named = {
        "audio of 2": (
            offsets["2.flac"] + 10,
            ["0", "1"],
            "member '2.flac' should have [0-9,]+ bytes, but only 10 are",
        ),
        "header of 3": (offsets["3.json"] - 100, ["0", "1", "2"], "cut short or damaged after member '2.flac'"),
        "json of 3": (offsets["3.json"] + 5, ["0", "1", "2"], "member '3.json' should have [0-9,]+ bytes, but only 5"),
        "end mark": (
            offsets["3.flac"] + -(-len(tone_bytes()) // 512) * 512,
            list("0123"),
            "cut short or damaged after member '3.flac'",
        ),
    }[content]
    check_ends([path])
    os.truncate(path, cut)
    found, reports = [], []
    with pytest.raises(ValueError, match=rf"cut\.tar: {named}"):
        for utterance, _ in read_shard(path, reports.append):
            found.append(utterance["id"])
    assert found == whole and reports == []
    with pytest.raises(ValueError, match=rf"cut\.tar: {named}"):
        read_member(path, "0.flac")
    with pytest.raises(ValueError, match="cut.tar: does not end as a tar does"):
        check_ends([path])


def test_audio_whose_json_stood_behind_the_damage_is_not_given_without_it(tmp_path):
    audio = tone_bytes()
    path = pack(
        tmp_path / "cut.tar", [("a.flac", audio), ("a.json", row("a")), ("b.flac", audio), ("b.json", row("b"))]
    )
    with tarfile.open(path) as tar:
        os.truncate(path, tar.getmember("b.json").offset_data - 512)
    found = []
    with pytest.raises(ValueError, match="cut short or damaged after member 'b.flac'"):
        for utterance, _ in read_shard(path):
            found.append(utterance["id"])
    assert found == ["a"]


def unsafe_members() -> dict[str, tuple[tarfile.TarInfo, str]]:
    def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.size = kind, link, size
        return info

    return {
        "absolute": (member("/etc/1.flac"), "points out of the shard"),
        "parent": (member("../1.flac"), "points out of the shard"),
        "inner parent": (member("a/../../1.flac"), "points out of the shard"),
        "windows": (member("c:\\1.flac"), "points out of the shard"),
        "symbolic link": (member("1.flac", tarfile.SYMTYPE, "/etc/passwd"), "is a link or a device"),
        "hard link": (member("1.flac", tarfile.LNKTYPE, "0.flac"), "is a link or a device"),
        "device": (member("1.flac", tarfile.CHRTYPE), "is a link or a device"),
        "fifo": (member("1.flac", tarfile.FIFOTYPE), "is a link or a device"),
        "sparse": (member("1.flac", tarfile.GNUTYPE_SPARSE), "is sparse"),
        "oversized": (member("1.flac", size=(1 << 30) + 1), "claims 1,073,741,825 bytes, where 1,073,741,824 are"),
        "bomb": (member("1.flac", size=1 << 40), "claims 1,099,511,627,776 bytes"),
        "negative": (member("1.flac", size=-512), "claims -512 bytes"),
        "beyond the file": (member("1.flac", size=1 << 29), "should have 536,870,912 bytes, but only"),
    }


@pytest.mark.parametrize("kind", unsafe_members())
def test_unsafe_members_are_refused_by_every_reader(tmp_path, kind):
    info, problem = unsafe_members()[kind]
    path = pack(tmp_path / "unsafe.tar", [("0.json", row("zero")), ("0.flac", tone_bytes())])
    with tarfile.open(path) as tar:
        tar.getmembers()
        end = tar.offset
    with path.open("r+b") as file:
        file.seek(end)
        file.write(info.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
    found = []
    named = rf"unsafe\.tar: member .*1\.flac' .*{problem}"
    with pytest.raises(ValueError, match=named):
        for utterance, _ in read_shard(path):
            found.append(utterance["id"])
    assert found == ["zero"]
    for member in ("0.flac", "1.flac"):
        with pytest.raises(ValueError, match=named):
            read_member(path, member)
    write_manifest(
        tmp_path / "m.jsonl",
        [{"id": "a", "audio": "unsafe.tar#0.flac", "duration_seconds": 0.5, "sample_rate_hz": 16_000}],
    )
    with pytest.raises(ManifestError, match=rf"m\.jsonl:1: utterance 'a': .*{named}"):
        read_manifest(tmp_path / "m.jsonl")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_bytes_end_in_utterances_and_one_error_that_names_the_tar(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    members = [("0.json", row("0")), ("0.flac", b"x" * 700), (f"{'n' * 150}.json", row("1")), ("1.flac", b"x" * 20)]
    path = pack(folder / "fuzz.tar", members)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 6_000))
        content[place : place + 1] = data.draw(st.binary(min_size=1, max_size=12))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    for reader in (lambda: list(read_shard(path, lambda message: None)), lambda: read_member(path, "0.flac")):
        try:
            reader()
        except ValueError as error:
            assert str(path) in str(error)


def test_a_path_is_split_at_the_tar():
    assert split_member("a/b.tar#m.flac") == ("a/b.tar", "m.flac")
    assert split_member("a/b.tar#x/m#1.flac") == ("a/b.tar", "x/m#1.flac")
    for path in ("a/b.flac", "a/b#c.flac", "a/b.tar", "a/b.tar#", "b.tar/c.flac"):
        assert split_member(path) is None


def test_a_manifest_names_tars_and_members_that_are_not_there(written):
    _, folder, _ = written
    manifest = folder / "t.jsonl"
    lines = manifest.read_text().splitlines()
    lines[1] = lines[1].replace("t-000000.tar#000000001.wav", "t-000000.tar#no.wav")
    lines[2] = lines[2].replace("t-000000.tar", "no.tar")
    manifest.write_text("\n".join(lines))
    with pytest.raises(ManifestError) as error:
        read_manifest(manifest)
    message = str(error.value)
    assert f"{manifest}:2: utterance 'tone-1': {folder}/t-000000.tar has no member 'no.wav' among its 8" in message
    assert f"{manifest}:3: utterance 'tone-2': tar '{folder}/no.tar' cannot be opened" in message
    assert "2 problem(s)" in message


def test_a_tar_is_indexed_once_and_again_when_it_changes(written):
    _, folder, paths = written
    shards._index.cache_clear()
    manifest = read_manifest(folder / "t.jsonl")
    for utterance in manifest:
        read_member(*split_member(utterance["audio"]))
    assert shards._index.cache_info().misses == 2
    pack(paths[0], [("000000000.wav", b"new")])
    assert read_member(paths[0], "000000000.wav") == b"new"
    assert shards._index.cache_info().misses == 3


def test_a_member_can_be_read_after_its_shard_was_closed(written):
    manifest, _, paths = written
    readers = [read for _, read in read_shard(paths[0])]
    assert readers[2]() == Path(manifest[2]["audio"]).read_bytes()


def test_audio_that_is_not_asked_for_is_not_read(tmp_path):
    """Half a gigabyte of holes would be seen in the time and the memory that it takes."""
    path = tmp_path / "large.tar"
    with path.open("wb") as file:
        for key in range(8):
            for name, size in ((f"{key}.json", 0), (f"{key}.flac", 1 << 26)):
                info = tarfile.TarInfo(name)
                content = row(str(key)) if name.endswith("json") else b""
                info.size = size or len(content)
                file.write(info.tobuf() + content.ljust(-(-len(content) // 512) * 512, b"\0"))
                file.seek(size, os.SEEK_CUR)
        file.write(bytes(10_240))
    before = int(Path("/proc/self/io").read_text().split()[1])
    tracemalloc.start()
    assert len(list(read_shard(path))) == 8
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1 << 20
    assert int(Path("/proc/self/io").read_text().split()[1]) - before < 1 << 20


def test_the_script_shuffles_and_counts(tone_manifest, tmp_path, capsys):
    options = ["--manifest", str(tone_manifest), "--utterances-per-shard", "2", "--json", "--output-dir"]
    script.main([*options, str(tmp_path / "out")])
    assert json.loads(capsys.readouterr().out) == {"shards": 3, "utterances": 6, "skipped": 0}
    ids = read_manifest(tmp_path / "out/tones.jsonl").ids
    assert sorted(ids) == [f"tone-{number}" for number in range(6)] != ids
    with pytest.raises(SystemExit, match="2"):
        script.main([*options, str(tmp_path)])
    assert "holds tones.jsonl itself; choose another" in capsys.readouterr().err
