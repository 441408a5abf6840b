import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import librispeech
import numpy as np
import pytest
import soundfile
from barista import label_key, prepare_barista, split_bucket
from conftest import ROOT, write_tone
from fsdd import prepare_fsdd, test_speakers
from librispeech import prepare_librispeech
from mini import prepare_mini
from synthetic_commands import SPEAKERS, all_commands, espeak_paths, prepare_synthetic_commands, synthesize

from speechkd.data.manifest import read_manifest

test_speakers.__test__ = False  # a function of the script, not a test


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("slots", "bucket"),
    [({"size": "twelve ounce ", "coffeeDrink": " coffee", "roast": "light roast"}, 21)],
)
def test_barista_labels_fall_into_the_published_buckets(slots, bucket):
    assert label_key(slots) == "coffeeDrink=coffee|roast=light roast|size=twelve ounce"
    assert split_bucket(label_key(slots)) == bucket


@pytest.mark.parametrize(
    ("key", "bucket"),
    [
        ("coffeeDrink=iced coffee|numberOfShots=triple shot|roast=light roast", 99),
        ("coffeeDrink=mocha|milkAmount=soy milk|numberOfShots=single shot", 7),
        ("coffeeDrink=iced mocha|roast=light roast|size=eight ounce", 66),
    ],
)
def test_other_published_barista_labels_keep_their_buckets(key, bucket):
    assert split_bucket(key) == bucket


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{broken", "label.json is not JSON"),
        ("[]", "holds a list; it should map file names to intent and slots"),
        ('{"a.wav": {"intent": "order"}}', "the label of 'a.wav' is .* it should have an intent and slots"),
    ],
)
def test_barista_names_a_broken_label_file(tmp_path, content, message):
    write_tone(tmp_path / "data/speech/clean/a.wav", 0.2)
    (tmp_path / "data/label").mkdir()
    (tmp_path / "data/label/label.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        prepare_barista(tmp_path, tmp_path / "out")


def test_barista_matches_files_by_stem_and_names_what_it_skips(tmp_path):
    corpus = tmp_path / "corpus"
    labels = {
        f"clip{index}.wav": {"intent": "orderDrink", "slots": {"coffeeDrink": "latte", "milkAmount": f" {index} milk"}}
        for index in range(30)
    }
    labels["gone.wav"] = {"intent": "orderDrink", "slots": {"coffeeDrink": "mocha"}}
    (corpus / "data/label").mkdir(parents=True)
    (corpus / "data/label/label.json").write_text(json.dumps(labels))
    for index in range(30):
        write_tone(corpus / f"data/speech/clean/clip{index}.flac", 0.2)
    (corpus / "data/speech/clean/clip7.flac").write_bytes(b"broken")
    counts = prepare_barista(corpus, tmp_path / "out")
    assert counts["labels_without_audio"] == 1 and counts["skipped"] == 1
    assert counts["train"] + counts["dev"] + counts["test"] == 29
    assert [row["id"] for row in read(tmp_path / "out/skipped.jsonl")] == ["clip7"]
    manifest = read_manifest(tmp_path / "out/train.jsonl")
    values = [slot["value"] for row in manifest for slot in row["slots"]]
    assert all(value == value.strip() for value in values)


def make_fsdd(corpus: Path, speakers: list[str], suffix: str = "wav") -> None:
    for speaker in speakers:
        for digit in range(10):
            for index in range(2):
                path = corpus / f"recordings/{digit}_{speaker}_{index}.{suffix}"
                write_tone(path, 0.3 + digit / 100, 8_000, pitch_hz=300)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_fsdd_strings_have_one_speaker_three_to_six_digits_and_short_gaps(tmp_path, suffix):
    make_fsdd(tmp_path / "corpus", ["ann", "bob", "cy"], suffix)
    counts = prepare_fsdd(tmp_path / "corpus", tmp_path / "out", num_train=20, num_test=10)
    train, test = read(tmp_path / "out/train.jsonl"), read(tmp_path / "out/test.jsonl")
    assert (len(train), len(test), counts["digits_train"], counts["digits_test"]) == (20, 10, 40, 20)
    assert {row["speaker"] for row in test} == set(counts["test_speakers"])
    assert not {row["speaker"] for row in test} & {row["speaker"] for row in train}
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for row in train + test:
        digits = [words.index(word) for word in row["text"].split()]
        assert 3 <= len(digits) <= 6
        gaps = row["duration_seconds"] - sum(0.3 + digit / 100 for digit in digits)
        assert 0.1 * (len(digits) - 1) - 0.01 <= gaps <= 0.3 * (len(digits) - 1) + 0.01
    assert len(read_manifest(tmp_path / "out/test.jsonl")) == 10


def test_fsdd_is_the_same_each_time_and_skips_a_corrupt_recording(tmp_path):
    make_fsdd(tmp_path / "corpus", ["ann", "bob"])
    (tmp_path / "corpus/recordings/3_ann_0.wav").write_bytes(b"broken")
    for name in ("one", "two"):
        prepare_fsdd(tmp_path / "corpus", tmp_path / name, num_train=5, num_test=5)
    assert (tmp_path / "one/train.jsonl").read_bytes() == (tmp_path / "two/train.jsonl").read_bytes()
    one, two = (soundfile.read(tmp_path / name / "audio/fsdd-train-00003.flac")[0] for name in ("one", "two"))
    assert np.array_equal(one, two)
    assert [row["id"] for row in read(tmp_path / "one/skipped.jsonl")] == ["3_ann_0"]


def make_barista(corpus: Path, num_clips: int) -> None:
    labels = {
        f"clip{index}.wav": {"intent": "orderDrink", "slots": {"coffeeDrink": f"drink {index}"}}
        for index in range(num_clips)
    }
    (corpus / "data/label").mkdir(parents=True)
    (corpus / "data/label/label.json").write_text(json.dumps(labels))
    for index in range(num_clips):
        write_tone(corpus / f"data/speech/clean/clip{index}.wav", 0.2)


def test_mini_is_fsdd_and_barista_side_by_side(tmp_path):
    make_fsdd(tmp_path / "corpora/fsdd", ["ann", "bob"])
    make_barista(tmp_path / "corpora/barista", 20)
    counts = prepare_mini(tmp_path / "corpora", tmp_path / "out")
    assert counts["fsdd"] == prepare_fsdd(tmp_path / "corpora/fsdd", tmp_path / "fsdd")
    assert counts["barista"] == prepare_barista(tmp_path / "corpora/barista", tmp_path / "barista")
    for name in ("fsdd/digits_train", "fsdd/train", "fsdd/test", "barista/train", "barista/dev", "barista/test"):
        alone, together = (read_manifest(folder / f"{name}.jsonl") for folder in (tmp_path, tmp_path / "out"))
        assert together.ids == alone.ids and len(alone) > 0
    shutil.rmtree(tmp_path / "corpora/barista")
    with pytest.raises(ValueError, match="barista does not exist; give --corpus-dir a folder with data/label"):
        prepare_mini(tmp_path / "corpora", tmp_path / "out")


def test_fsdd_speakers_are_split_by_rule():
    assert test_speakers({"george", "jackson", "lucas", "nicolas", "theo"}) == {"george"}
    assert len(test_speakers({"a", "b", "c", "d", "e", "f", "g", "h"})) == 2
    with pytest.raises(ValueError, match=r"two speakers or more, found \['ann'\]"):
        test_speakers({"ann"})


def test_librispeech_reports_what_has_no_partner(tmp_path):
    chapter = tmp_path / "LibriSpeech/train-clean-100/19/198"
    for index in range(3):
        write_tone(chapter / f"19-198-000{index}.flac", 0.5 + index)
    (chapter / "19-198.trans.txt").write_text("19-198-0000 HELLO THERE\n19-198-0001 GOOD DAY\n19-198-0009 GONE\n")
    write_tone(tmp_path / "LibriSpeech/test-clean/7/1/7-1-0000.flac", 1.0)
    (tmp_path / "LibriSpeech/test-clean/7/1/7-1.trans.txt").write_text("7-1-0000 A TEST\n")
    counts = prepare_librispeech(tmp_path, tmp_path / "out")
    assert counts == {"test-clean": 1, "train-clean-100": 2, "train": 2, "skipped": 2}
    manifest = read_manifest(tmp_path / "out/train.jsonl")
    assert [(row["id"], row["text"], row["speaker"]) for row in manifest][1] == ("19-198-0001", "GOOD DAY", "19")
    assert {row["id"] for row in read(tmp_path / "out/skipped.jsonl")} == {"19-198-0002", "19-198-0009"}


def test_librispeech_download_checks_the_archive_and_leaves_no_half_subset(tmp_path, monkeypatch):
    write_tone(tmp_path / "made/LibriSpeech/dev-clean/7/1/7-1-0000.flac", 1.0)
    (tmp_path / "made/LibriSpeech/dev-clean/7/1/7-1.trans.txt").write_text("7-1-0000 A TEST\n")
    server, corpus = tmp_path / "server", tmp_path / "corpus"
    server.mkdir()
    with tarfile.open(server / "dev-clean.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "made/LibriSpeech", "LibriSpeech")
    monkeypatch.setattr(librispeech, "ARCHIVES_URL", server.as_uri())
    (server / "md5sum.txt").write_text(f"{'0' * 32}  dev-clean.tar.gz\n")
    with pytest.raises(ValueError, match="dev-clean.tar.gz has MD5 .*, not 0000"):
        librispeech.download_librispeech(corpus, ["dev-clean"])
    assert list(corpus.iterdir()) == []
    md5 = hashlib.md5((server / "dev-clean.tar.gz").read_bytes()).hexdigest()
    (server / "md5sum.txt").write_text(f"{md5}  dev-clean.tar.gz\n")
    librispeech.download_librispeech(corpus, ["dev-clean"])
    assert [path.name for path in corpus.iterdir()] == ["LibriSpeech"]
    assert prepare_librispeech(corpus, tmp_path / "out") == {"dev-clean": 1, "skipped": 0}


def test_librispeech_download_without_a_server_ends_with_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(librispeech, "ARCHIVES_URL", (tmp_path / "nowhere").as_uri())
    with pytest.raises(SystemExit) as end:
        librispeech.main(
            ["--download", "--corpus-dir", str(tmp_path / "corpus"), "--output-dir", str(tmp_path / "out")]
        )
    assert end.value.code == 2 and "cannot be reached or lacks a subset" in capsys.readouterr().err


def test_a_file_in_the_way_of_the_output_folder_is_named(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="taken cannot be made, a file is in its way"):
        prepare_synthetic_commands(None, tmp_path / "taken", num_train=1, num_test=1)


def test_synthetic_commands_come_out_bit_identical(tmp_path):
    for name in ("one", "two"):
        prepare_synthetic_commands(None, tmp_path / name, num_train=4, num_test=2, seed=3)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 8
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)


def test_a_synthetic_sentence_sounds_the_same_after_any_other():
    paths, commands = espeak_paths(), all_commands()
    first = synthesize(commands[0].text, SPEAKERS[0], *paths)[0]
    for index in range(1, 4):
        synthesize(commands[index].text, SPEAKERS[index], *paths)
    assert np.array_equal(first, synthesize(commands[0].text, SPEAKERS[0], *paths)[0])


def test_synthetic_train_and_test_share_no_sentence(tmp_path):
    prepare_synthetic_commands(None, tmp_path, num_train=12, num_test=6)
    train, test = read_manifest(tmp_path / "train.jsonl"), read_manifest(tmp_path / "test.jsonl")
    assert not {row["text"] for row in train} & {row["text"] for row in test}
    assert len({row["speaker"] for row in train}) == 12
    assert all(1.0 < row["duration_seconds"] < 10.0 and row["intent"] for row in train)
    with pytest.raises(ValueError, match="99999 train utterances are asked for, the grammar has"):
        prepare_synthetic_commands(None, tmp_path, num_train=99_999)


@pytest.mark.parametrize("corpus", ["fsdd", "barista", "librispeech", "mini"])
def test_a_missing_corpus_ends_with_code_2_and_says_what_is_expected(corpus, tmp_path):
    command = [sys.executable, str(ROOT / f"data_prep/{corpus}.py"), "--output-dir", str(tmp_path / "out")]
    done = subprocess.run([*command, "--corpus-dir", str(tmp_path / "no")], capture_output=True, text=True)
    assert done.returncode == 2 and "no does not exist; give --corpus-dir a folder with" in done.stderr
