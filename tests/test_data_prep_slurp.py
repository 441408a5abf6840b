import hashlib
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import slurp
from conftest import ROOT, write_tone
from slurp import download_slurp, prepare_slurp, read_sentences, read_speakers

from speechkd.data.manifest import read_manifest

SHARED_SLURP = ROOT.parent / "shared/data/slurp"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def annotation(text: str, files: list[str], entities: list[dict] | None = None, **fields: Any) -> dict:
    """One line as the corpus has it; `fields` replace some."""
    return {
        "slurp_id": 4489,
        "sentence": text,
        "sentence_annotation": text,
        "intent": "alarm",
        "action": "set",
        "tokens": [{"surface": word, "id": index, "lemma": word} for index, word in enumerate(text.split())],
        "scenario": "alarm",
        "recordings": [{"file": file, "wer": 0.0, "ent_wer": None, "status": "correct"} for file in files],
        "entities": entities or [],
        **fields,
    }


def write_annotations(corpus: Path, split: str, annotations: list[dict]) -> Path:
    path = corpus / f"dataset/slurp/{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in annotations))
    return path


def test_every_recording_of_a_sentence_is_an_utterance_with_its_labels(tmp_path):
    files = ["audio-12-headset.flac", "audio-12.flac", "audio--7.flac"]
    entities = [{"span": [4, 5], "type": "time"}, {"span": [0], "type": "event_name"}]
    write_annotations(tmp_path, "train", [annotation("Wake me up at eight O'Clock", files, entities)])
    synthetic = annotation("stop", ["audio-12.flac"], scenario="music", action="x")
    write_annotations(tmp_path, "train_synthetic", [synthetic])
    recordings = {"audio-12-headset.flac": {"usrid": "FO-488"}, "audio-12.flac": {"usrid": "UNK-323"}}
    (tmp_path / "dataset/slurp/metadata.json").write_text(json.dumps({"4489": {"recordings": recordings}}))
    for index, file in enumerate(files):
        write_tone(tmp_path / "audio/slurp_real" / file, 0.2 + 0.1 * index)
    write_tone(tmp_path / "audio/slurp_synth/audio-12.flac", 0.7)
    assert prepare_slurp(tmp_path, tmp_path / "out") == {"train": 3, "train_synthetic": 1, "skipped": 0}
    train = read_manifest(tmp_path / "out/train.jsonl")
    assert [row["id"] for row in train] == ["audio-12-headset", "audio-12", "audio--7"]
    assert [row["speaker"] for row in train] == ["FO-488", "UNK-323", None]
    assert [row["duration_seconds"] for row in train] == pytest.approx([0.2, 0.3, 0.4])
    for row in train:
        assert row["text"] == "Wake me up at eight O'Clock"
        assert row["intent"] == "alarm_set"  # not the field `intent`
        assert row["slots"] == [{"name": "time", "value": "eight o'clock"}, {"name": "event_name", "value": "wake"}]
    spoken = read_manifest(tmp_path / "out/train_synthetic.jsonl")[0]
    assert spoken["intent"] == "music_x" and spoken["duration_seconds"] == pytest.approx(0.7)


def test_broken_recordings_are_named_with_the_reason(tmp_path):
    audio = tmp_path / "slurp_real"  # unpacked beside dataset/, not in audio/
    write_annotations(tmp_path, "devel", [annotation("hi", [f"audio-{index}.flac" for index in range(4)])])
    write_annotations(tmp_path, "test", [annotation("hi", ["audio-9.flac"]), annotation("ho", ["audio-9.flac"])])
    write_tone(audio / "audio-0.flac", 0.2)
    write_tone(audio / "audio-9.flac", 0.2)
    (audio / "audio-1.flac").write_bytes(b"")
    (audio / "audio-2.flac").write_text("not found")
    assert prepare_slurp(tmp_path, tmp_path / "out") == {"devel": 1, "test": 1, "skipped": 4}
    reasons = {row["id"]: row["reason"] for row in read(tmp_path / "out/skipped.jsonl")}
    assert reasons.keys() == {"audio-1", "audio-2", "audio-3", "audio-9"}
    assert "corrupt, empty or not audio" in reasons["audio-1"] and "corrupt, empty or not audio" in reasons["audio-2"]
    assert reasons["audio-3"].endswith("audio-3.flac does not exist")
    assert reasons["audio-9"] == "its id is in test.jsonl already"
    assert read_manifest(tmp_path / "out/test.jsonl")[0]["text"] == "hi"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{broken", "JSONDecodeError"),
        (b"[1, 2]", "TypeError"),
        (b'"\xff"', "not UTF-8: byte 0xff"),
        (json.dumps(annotation("hi", ["a.flac"], scenario="")).encode(), "scenario is ''"),
        (json.dumps(annotation("  ", ["a.flac"])).encode(), "sentence is '  '"),
        (json.dumps(annotation("hi", ["a.flac"], [{"span": [7], "type": "time"}])).encode(), "KeyError: 7"),
        (json.dumps(annotation("hi", ["a.flac"], [{"span": [], "type": "time"}])).encode(), "spans no token"),
        (json.dumps(annotation("hi", ["a.flac"], recordings=None)).encode(), "TypeError"),
    ],
)
def test_a_broken_line_is_named_by_its_place_and_the_next_one_is_read(tmp_path, line, reason):
    path = write_annotations(tmp_path, "test", [])
    path.write_bytes(line + b"\n\n" + json.dumps(annotation("hi there", ["b.flac"])).encode() + b"\n")
    skipped: list[dict[str, str]] = []
    assert [sentence["files"] for sentence in read_sentences(path, skipped)] == [["b.flac"]]
    assert [row["id"] for row in skipped] == ["test.jsonl:1"] and reason in skipped[0]["reason"]


@pytest.mark.parametrize("content", ['{"1": {}}', '{"1": {"recordings": {"a.flac": {}}}}', "[]", "{broken"])
def test_a_broken_metadata_file_is_named(tmp_path, content):
    (tmp_path / "metadata.json").write_text(content)
    with pytest.raises(ValueError, match="metadata.json (does not map|is not JSON)"):
        read_speakers(tmp_path / "metadata.json")


def test_a_folder_without_annotations_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dataset/slurp has none of train.jsonl, devel.jsonl, test.jsonl"):
        prepare_slurp(tmp_path, tmp_path / "out")


@pytest.mark.skipif(not SHARED_SLURP.is_dir(), reason="needs the SLURP annotations in ../shared/data")
@pytest.mark.parametrize(
    ("split", "sentences", "recordings", "entities", "without_entity"),
    [("devel", 2033, 8690, 2022, 646), ("test", 2974, 13078, 2823, 994)],
)
def test_the_published_annotations_are_read_completely(split, sentences, recordings, entities, without_entity):
    skipped: list[dict[str, str]] = []
    rows = list(read_sentences(SHARED_SLURP / f"dataset/slurp/{split}.jsonl", skipped))
    slots = [slot for row in rows for slot in row["slots"]]
    assert skipped == [] and len(rows) == sentences
    assert len({file for row in rows for file in row["files"]}) == recordings
    assert len({row["intent"] for row in rows}) == 59
    assert len(slots) == entities and len({slot["name"] for slot in slots}) == 53
    assert sum(not row["slots"] for row in rows) == without_entity
    assert all(slot["value"] == slot["value"].lower().strip() != "" for slot in slots)


@pytest.mark.skipif(not SHARED_SLURP.is_dir(), reason="needs the SLURP annotations in ../shared/data")
def test_annotations_without_audio_name_every_recording_before_the_error(tmp_path):
    with pytest.raises(ValueError, match="no utterance could be used, 21768 items were skipped; see .*skipped.jsonl"):
        prepare_slurp(SHARED_SLURP, tmp_path)
    rows = read(tmp_path / "skipped.jsonl")
    assert len({row["id"] for row in rows}) == 21768
    assert all(row["reason"].endswith(f"slurp_real/{row['id']}.flac does not exist") for row in rows)


def test_download_checks_the_archives_and_a_second_one_needs_no_server(tmp_path, monkeypatch):
    server, corpus = tmp_path / "server", tmp_path / "corpus"
    for split in ("train", "devel", "test", "train_synthetic"):
        write_annotations(server, split, [annotation("hi", [f"audio-{split}.flac"])])
    (server / "dataset/slurp/metadata.json").write_text("{}")
    for folder, files in {"slurp_real": ("train", "devel", "test"), "slurp_synth": ("train_synthetic",)}.items():
        for split in files:
            write_tone(tmp_path / folder / f"audio-{split}.flac", 0.2)
        with tarfile.open(server / f"{folder}.tar.gz", "w:gz") as archive:
            archive.add(tmp_path / folder, folder)
    checksums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in server.glob("*.tar.gz")}
    monkeypatch.setattr(slurp, "ANNOTATIONS_URL", (server / "dataset/slurp").as_uri())
    monkeypatch.setattr(slurp, "RECORD_URL", (server / "record.json").as_uri())
    monkeypatch.setattr(slurp, "ARCHIVES_URL", server.as_uri())

    def publish(listed: dict[str, str]) -> None:
        files = [{"key": name, "checksum": f"md5:{md5}"} for name, md5 in listed.items()]
        (server / "record.json").write_text(json.dumps({"files": files}))

    publish({"slurp_real.tar.gz": checksums["slurp_real.tar.gz"]})
    with pytest.raises(ValueError, match=r"lists no slurp_synth.tar.gz, only \['slurp_real.tar.gz'\]"):
        download_slurp(corpus)
    publish({**checksums, "slurp_synth.tar.gz": "0" * 32})
    with pytest.raises(ValueError, match="slurp_synth.tar.gz has MD5 .*, not 0000"):
        download_slurp(corpus)
    assert not (corpus / "audio/slurp_synth").exists()
    publish(checksums)
    download_slurp(corpus)
    assert sorted(path.name for path in corpus.iterdir()) == ["audio", "dataset"]
    shutil.rmtree(server)
    download_slurp(corpus)
    expected = {"train": 1, "devel": 1, "test": 1, "train_synthetic": 1, "skipped": 0}
    assert prepare_slurp(corpus, tmp_path / "out") == expected


def test_download_without_a_folder_ends_with_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        slurp.main(["--download", "--output-dir", str(tmp_path)])
    assert end.value.code == 2 and "--download needs --corpus-dir" in capsys.readouterr().err
