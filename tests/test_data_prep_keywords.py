import hashlib
import json
import tarfile
from pathlib import Path

import pytest
import speech_commands
import voxceleb1
from conftest import write_tone
from speech_commands import KEYWORDS, prepare_speech_commands
from voxceleb1 import prepare_voxceleb1

from speechkd.data.audio import load_utterance
from speechkd.data.manifest import read_manifest


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_speech_commands(parent: Path, version: str = "v0.01", clips_per_word: int = 4) -> Path:
    """Ten keywords and two other words in the public layout: of each word one clip is dev, one test."""
    root = parent / f"speech_commands_{version}"
    words = [*KEYWORDS, "bed", "marvin"]
    for word in words:
        for index in range(clips_per_word):
            write_tone(root / f"{word}/spk{index}_nohash_0.wav", 0.5)
    (root / "validation_list.txt").write_text("".join(f"{word}/spk0_nohash_0.wav\n" for word in words))
    (root / "testing_list.txt").write_text("".join(f"{word}/spk1_nohash_0.wav\n" for word in words))
    for name, seconds in (("pink_noise", 6.0), ("running_tap", 4.5), ("click", 0.4)):
        write_tone(root / f"_background_noise_/{name}.wav", seconds)
    (root / "README.md").write_text("not audio")
    return root


def test_speech_commands_are_split_by_the_official_lists_into_superbs_twelve_classes(tmp_path):
    make_speech_commands(tmp_path)
    counts = prepare_speech_commands(tmp_path, tmp_path / "out")
    assert counts == {"train": 26, "dev": 13, "test": 13, "skipped": 1}  # 2, 1 and 1 cuts of noise
    manifests = {split: read_manifest(tmp_path / f"out/{split}.jsonl") for split in ("train", "dev", "test")}
    speakers = {split: {row["speaker"] for row in rows if row["speaker"]} for split, rows in manifests.items()}
    assert speakers == {"train": {"spk2", "spk3"}, "dev": {"spk0"}, "test": {"spk1"}}
    for rows in manifests.values():
        assert {row["intent"] for row in rows} == {*KEYWORDS, "_unknown_", "_silence_"}
        for row in rows:
            word = row["id"].split("/")[0]
            assert row["intent"] == (word if word in KEYWORDS or word == "_silence_" else "_unknown_")
            assert row["text"] == (None if word == "_silence_" else word)


def test_silence_is_a_second_of_noise_from_another_part_of_the_file_in_each_split(tmp_path):
    make_speech_commands(tmp_path, clips_per_word=12)
    prepare_speech_commands(tmp_path, tmp_path / "out")
    starts = {}
    for split in ("train", "dev", "test"):
        rows = [row for row in read_manifest(tmp_path / f"out/{split}.jsonl") if row["intent"] == "_silence_"]
        assert len(rows) == {"train": 10, "dev": 1, "test": 1}[split]
        assert all(len(load_utterance(row, 16_000)) == 16_000 for row in rows)
        starts[split] = [row["offset_seconds"] for row in rows if "pink_noise" in row["audio"]]
    assert len(set(starts["train"])) == 5
    assert 0 <= min(starts["train"]) <= max(starts["train"]) <= 4.0
    assert 4.0 <= starts["dev"][0] <= 4.5 <= starts["test"][0] <= 5.0


def test_cuts_of_noise_depend_on_the_seed_alone(tmp_path):
    make_speech_commands(tmp_path)
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        prepare_speech_commands(tmp_path, tmp_path / name, seed=seed)
    one, two, three = ((tmp_path / name / "train.jsonl").read_bytes() for name in ("one", "two", "three"))
    assert one == two and one != three


def test_broken_missing_and_too_short_files_of_speech_commands_are_named(tmp_path):
    root = make_speech_commands(tmp_path)
    (root / "bed/spk2_nohash_0.wav").write_bytes(b"broken")
    (root / "yes/spk0_nohash_0.wav").unlink()
    # the version's own folder is taken as well as the folder around it
    assert prepare_speech_commands(root, tmp_path / "out") == {"train": 25, "dev": 12, "test": 13, "skipped": 3}
    reasons = {row["id"]: row["reason"] for row in read(tmp_path / "out/skipped.jsonl")}
    assert reasons.keys() == {"bed/spk2_nohash_0", "yes/spk0_nohash_0", "_background_noise_/click"}
    assert "does not exist, validation_list.txt names it" in reasons["yes/spk0_nohash_0"]
    assert "lasts 0.40 s, shorter than a cut of 1 s" in reasons["_background_noise_/click"]


def test_superbs_test_set_is_read_by_folder_and_only_for_its_own_version(tmp_path):
    make_speech_commands(tmp_path, "v0.02")
    for label in (*KEYWORDS, "_unknown_", "_silence_"):
        write_tone(tmp_path / f"speech_commands_test_set_v0.02/{label}/ab12_nohash_1.wav.wav", 1.0)
    write_tone(tmp_path / "speech_commands_test_set_v0.01/yes/ab12_nohash_1.wav", 1.0)
    assert prepare_speech_commands(tmp_path, tmp_path / "out", version="v0.02")["test_superb"] == 12
    assert "test_superb" not in prepare_speech_commands(tmp_path / "speech_commands_v0.02", tmp_path / "other")
    rows = read_manifest(tmp_path / "out/test_superb.jsonl")
    assert [row["intent"] for row in rows] == sorted((*KEYWORDS, "_unknown_", "_silence_"))
    assert {row["speaker"] for row in rows} == {"ab12"}
    assert {row["intent"]: row["text"] for row in rows} == {
        **{word: word for word in KEYWORDS},
        "_unknown_": None,
        "_silence_": None,
    }


def test_speech_commands_without_lists_clips_or_noise_say_what_is_missing(tmp_path):
    root = make_speech_commands(tmp_path)
    with pytest.raises(ValueError, match="validation_list.txt does not exist; give the folder with speech_commands_v"):
        prepare_speech_commands(tmp_path, tmp_path / "out", version="v0.02")
    for path in [*root.glob("[a-z]*/*.wav")]:
        path.unlink()
    with pytest.raises(ValueError, match="no utterance could be used, 25 items were skipped"):
        prepare_speech_commands(tmp_path, tmp_path / "out")
    for path in (root / "_background_noise_").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="no usable noise in .*; the class _silence_ is cut from its wav files"):
        prepare_speech_commands(tmp_path, tmp_path / "out")


def test_speech_commands_download_checks_both_archives_and_prepares_them(tmp_path, monkeypatch, capsys):
    make_speech_commands(tmp_path / "made")
    write_tone(tmp_path / "made/speech_commands_test_set_v0.01/_silence_/0.wav", 1.0)
    checksums = {}
    (tmp_path / "server").mkdir()
    for folder in (tmp_path / "made").iterdir():
        packed = tmp_path / f"server/{folder.name}.tar.gz"
        with tarfile.open(packed, "w:gz") as archive:
            archive.add(folder, ".")  # as published: no folder around the words
        checksums[folder.name] = f"sha256:{hashlib.sha256(packed.read_bytes()).hexdigest()}"
    monkeypatch.setattr(speech_commands, "ARCHIVES_URL", (tmp_path / "server").as_uri())
    corpus, command = tmp_path / "corpus", ["--download", "--json", "--output-dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        speech_commands.main([*command, "--corpus-dir", str(corpus)])
    assert end.value.code == 2 and "speech_commands_v0.01.tar.gz has SHA256" in capsys.readouterr().err
    assert list(corpus.iterdir()) == []
    monkeypatch.setattr(speech_commands, "CHECKSUMS", checksums)
    speech_commands.main([*command, "--corpus-dir", str(corpus)])
    counts = {"train": 26, "dev": 13, "test": 13, "test_superb": 1, "skipped": 1}
    assert json.loads(capsys.readouterr().out) == counts
    assert {path.name for path in corpus.iterdir()} == checksums.keys()


IDENTIFICATION = """\
1 id10001/videoA/00001.wav
1 id10001/videoA/00001.wav
1 id10002/videoB/00001.wav
2 id10001/videoA/00002.wav
3 id10270/videoC/00001.wav
3 id10270/videoC/00009.wav
4 id10270/videoC/00001.wav
"""
TRIALS = """\
1 id10270/videoC/00001.wav id10270/videoD/00001.wav
0 id10270/videoC/00001.wav id10271/videoE/00001.wav

0 id10270/videoC/00001.wav id10272/videoF/00001.wav
"""


def make_voxceleb1(corpus: Path, folder_of: dict[str, str]) -> None:
    """Eight utterances of five speakers; `folder_of` gives the wav folder by the speaker's first digits."""
    for name in (
        "id10001/videoA/00001",
        "id10001/videoA/00002",
        "id10002/videoB/00001",
        "id10270/videoC/00001",
        "id10270/videoD/00001",
        "id10271/videoE/00001",
        "id10272/videoG/00001",
    ):
        write_tone(corpus / folder_of[name[:5]] / f"{name}.wav", 0.5)
    (corpus / folder_of["id102"] / "id10272/videoF").mkdir()
    (corpus / folder_of["id102"] / "id10272/videoF/00001.wav").write_bytes(b"broken")


@pytest.mark.parametrize(
    "folder_of", [{"id100": "wav", "id102": "wav"}, {"id100": "dev/wav", "id102": "test/wav"}], ids=["one", "two"]
)
def test_voxceleb1_gives_splits_for_identification_and_trials_for_verification(tmp_path, folder_of):
    make_voxceleb1(tmp_path / "corpus", folder_of)
    (tmp_path / "corpus/iden_split.txt").write_text(IDENTIFICATION)
    (tmp_path / "corpus/veri_test.txt").write_text(TRIALS)
    counts = prepare_voxceleb1(tmp_path / "corpus", tmp_path / "out")
    assert counts == {
        "train": 2,
        "dev": 1,
        "test": 1,
        "verification_train": 3,
        "verification_test": 3,
        "trials": 2,
        "skipped": 5,
    }
    rows = {name: list(read_manifest(tmp_path / f"out/{name}.jsonl")) for name in list(counts)[:5]}
    assert [(row["id"], row["speaker"]) for row in rows["dev"]] == [("id10001/videoA/00002", "id10001")]
    # no speaker of a trial is trained on, not even the one whose only trial is broken
    assert {row["speaker"] for row in rows["verification_train"]} == {"id10001", "id10002"}
    trials = [line.split() for line in (tmp_path / "out/verification_trials.txt").read_text().splitlines()]
    assert [trial[0] for trial in trials] == ["1", "0"]
    assert {key for trial in trials for key in trial[1:]} == {row["id"] for row in rows["verification_test"]}
    reasons = {row["id"]: row["reason"] for row in read(tmp_path / "out/skipped.jsonl")}
    assert reasons.keys() == {
        "id10001/videoA/00001",
        "id10272/videoF/00001",
        "iden_split.txt:6",
        "iden_split.txt:7",
        "veri_test.txt:4",
    }
    assert reasons["id10001/videoA/00001"] == "its id is in train.jsonl already"
    assert "is not a line of this list" in reasons["iden_split.txt:7"]
    assert reasons["veri_test.txt:4"] == "id10272/videoF/00001.wav does not exist or cannot be opened"


def test_one_list_of_voxceleb1_is_enough_and_none_is_an_error(tmp_path):
    make_voxceleb1(tmp_path / "corpus", {"id100": "wav", "id102": "wav"})
    with pytest.raises(ValueError, match="corpus is not VoxCeleb1; it needs wav/<speaker>/<video>/<number>.wav and"):
        prepare_voxceleb1(tmp_path / "corpus", tmp_path / "out")
    (tmp_path / "corpus/iden_split.txt").write_text(IDENTIFICATION)
    assert prepare_voxceleb1(tmp_path / "corpus", tmp_path / "out") == {"train": 2, "dev": 1, "test": 1, "skipped": 4}
    assert not (tmp_path / "out/verification_trials.txt").exists()
    (tmp_path / "corpus/iden_split.txt").write_text("1 id99999/videoA/00001.wav\n")
    with pytest.raises(ValueError, match="no utterance could be used, 2 items were skipped"):
        prepare_voxceleb1(tmp_path / "corpus", tmp_path / "out")


def test_voxceleb1_says_where_its_audio_is_asked_for(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        voxceleb1.main(["--download", "--output-dir", str(tmp_path / "out")])
    assert end.value.code == 2 and "ask at https://www.robots.ox.ac.uk/~vgg/data/voxceleb/" in capsys.readouterr().err
