"""Common Voice, FLEURS and VoxPopuli on miniatures of their public layouts."""

import json
import shutil
import tarfile
from pathlib import Path

import common_voice
import fleurs
import pytest
import voxpopuli
from common_voice import prepare_common_voice, unquote
from conftest import write_tone
from fleurs import download_fleurs, prepare_fleurs
from voxpopuli import prepare_voxpopuli

from speechkd.data.audio import load_utterance
from speechkd.data.manifest import read_manifest


def skipped_reasons(output_dir: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (output_dir / "skipped.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row["reason"] for row in rows}


def write_broken_clips(folder: Path, suffix: str) -> None:
    """A clip of zero bytes, and a text that is named like a clip."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"zero.{suffix}").write_bytes(b"")
    (folder / f"words.{suffix}").write_text("this is no audio\n")


def write_table(path: Path, rows: list[list[str]], last_line: bytes = b"") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join("\t".join(row) + "\n" for row in rows).encode() + last_line)


COMMON_VOICE_HEADER = ["client_id", "path", "sentence_id", "sentence", "sentence_domain", "up_votes", "locale"]


def common_voice_row(speaker: str, name: str, sentence: str) -> list[str]:
    return [speaker, f"{name}.mp3", "0f3a", sentence, "", "2", "en"]


def make_common_voice(release: Path, language: str = "en") -> Path:
    """One language with two good train clips, one of dev, one of test, and each kind of broken row in train."""
    folder = release / language
    names = {"a": "one", "b": "two", "c": "one", "d": "dev", "e": "test", "cut": "one"}
    good = {name: common_voice_row(speaker, name, f"Sentence {name}.") for name, speaker in names.items()}
    for name in names:
        write_tone(folder / f"clips/{name}.mp3", 0.5, 32_000)
    write_broken_clips(folder / "clips", "mp3")
    write_tone(folder / "clips/silent.mp3", 0.5, 32_000)
    broken = [
        common_voice_row("one", "gone", "Gone."),
        common_voice_row("one", "zero", "Zero."),
        common_voice_row("one", "words", "Words."),
        common_voice_row("one", "silent", "  "),
        ["one", "short.mp3", "few columns"],
    ]
    train = [good["a"], good["b"], good["cut"], *broken]
    write_table(folder / "train.tsv", [COMMON_VOICE_HEADER, *train], b"one\tlatin.mp3\t\tcaf\xe9\t\t2\ten\n")
    write_table(folder / "dev.tsv", [COMMON_VOICE_HEADER, good["d"]])
    write_table(folder / "test.tsv", [COMMON_VOICE_HEADER, good["e"]])
    later = common_voice_row("dev", "gone-too", "More of the speaker of dev.")
    write_table(folder / "validated.tsv", [COMMON_VOICE_HEADER, *good.values(), later, *broken[:4]])
    durations = [[f"{name}.mp3", "3000" if name == "cut" else "500"] for name in names]
    write_table(folder / "clip_durations.tsv", [["clip", "duration[ms]"], *durations, ["odd.mp3", "long"]])
    return folder


def test_common_voice_keeps_good_rows_and_names_each_broken_one_once(tmp_path):
    folder = make_common_voice(tmp_path / "cv-corpus-21.0-2025-03-14")
    counts = prepare_common_voice(tmp_path, tmp_path / "out")
    assert counts == {"en/train": 2, "en/dev": 1, "en/test": 1, "en/validated": 3, "skipped": 8}
    train = read_manifest(tmp_path / "out/en/train.jsonl")
    assert [(row["id"], row["text"], row["speaker"], row["language"]) for row in train] == [
        ("a", "Sentence a.", "one", "en"),
        ("b", "Sentence b.", "two", "en"),
    ]
    assert train[0]["sample_rate_hz"] == 32_000
    assert abs(len(load_utterance(train[0], 16_000)) / 16_000 - 0.5) < 0.1
    reasons = skipped_reasons(tmp_path / "out")
    assert reasons.keys() == {
        "gone", "zero", "words", "silent", "cut", "odd.mp3", "train.tsv:9", "train.tsv:10",
    }  # fmt: skip
    assert "gone.mp3 does not exist" in reasons["gone"]
    assert "cannot be opened" in reasons["zero"] and "cannot be opened" in reasons["words"]
    assert reasons["silent"] == "its transcript is empty"
    assert "lasts 0.5" in reasons["cut"] and "clip_durations.tsv has 3.00 s" in reasons["cut"]
    assert reasons["odd.mp3"] == "clip_durations.tsv has duration[ms]='long'"
    assert reasons["train.tsv:9"] == f"3 columns where the header of {folder}/train.tsv has 7"
    assert reasons["train.tsv:10"] == f"not UTF-8: byte 0xe9 at column 19 of {folder}/train.tsv"


def test_common_voice_validated_has_no_speaker_of_dev_or_test(tmp_path):
    make_common_voice(tmp_path / "cv")
    prepare_common_voice(tmp_path / "cv", tmp_path / "out")
    assert [row["id"] for row in read_manifest(tmp_path / "out/en/validated.jsonl")] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("sentence", "text"),
    [
        (' "The cat sat."', "The cat sat."),
        ('"He said ""no""."', 'He said "no".'),
        ('"Yes" or "no"', '"Yes" or "no"'),
        ('He said "no".', 'He said "no".'),
        ('"', '"'),
        ('""', '""'),
    ],
)
def test_common_voice_sentences_lose_only_the_quotation_marks_of_the_table(sentence, text):
    assert unquote(sentence) == text


def test_common_voice_takes_one_language_a_release_or_the_folder_around_it(tmp_path):
    make_common_voice(tmp_path / "cv", "en")
    make_common_voice(tmp_path / "cv", "zh-CN")
    for corpus_dir in (tmp_path, tmp_path / "cv", tmp_path / "cv/zh-CN"):
        counts = prepare_common_voice(corpus_dir, tmp_path / "out", languages=["zh-CN"])
        assert (counts["zh-CN/train"], "en/train" in counts) == (2, False)
    assert read_manifest(tmp_path / "out/zh-CN/train.jsonl")[0]["language"] == "zh"


def test_common_voice_refuses_what_is_not_there_or_there_twice(tmp_path):
    folder = make_common_voice(tmp_path / "cv-corpus-21")
    with pytest.raises(ValueError, match=r"languages \['xx'\] are not in .*, only \['en'\]; see --languages"):
        prepare_common_voice(tmp_path, tmp_path / "out", languages=["xx"])
    shutil.copytree(folder, tmp_path / "cv-corpus-20/en")
    with pytest.raises(ValueError, match=r"languages \['en'\] are there twice: .*; give one release"):
        prepare_common_voice(tmp_path, tmp_path / "out")
    write_table(folder / "train.tsv", [["client_id", "path"], ["one", "a.mp3"]])
    with pytest.raises(ValueError, match=r"train.tsv lacks the columns \['sentence'\], it has \['client_id', 'path'\]"):
        prepare_common_voice(folder, tmp_path / "out")
    with pytest.raises(ValueError, match="clips has no <language>/clips; give --corpus-dir the corpus in its public"):
        prepare_common_voice(folder / "clips", tmp_path / "out")


def test_common_voice_keeps_what_speakers_say_of_their_dialect(tmp_path):
    header = [*COMMON_VOICE_HEADER, "accents", "variant"]
    said = {"a": ["Irish", ""], "b": ["Irish", "Hiberno-English"], "c": ["", ""]}
    for name in said:
        write_tone(tmp_path / f"en/clips/{name}.mp3", 0.5, 32_000)
    rows = [[*common_voice_row(name, name, "Yes."), *dialect] for name, dialect in said.items()]
    write_table(tmp_path / "en/test.tsv", [header, *rows])
    prepare_common_voice(tmp_path, tmp_path / "out")
    test = read_manifest(tmp_path / "out/en/test.jsonl")
    assert test.rows["dialect"][:] == ["Irish", "Hiberno-English", None]


def test_a_corpus_without_one_usable_clip_is_an_error_that_points_to_the_reasons(tmp_path):
    write_broken_clips(tmp_path / "en/clips", "mp3")
    write_table(tmp_path / "en/dev.tsv", [COMMON_VOICE_HEADER, common_voice_row("one", "zero", "Zero.")])
    with pytest.raises(ValueError, match="no utterance could be used, 1 items were skipped; see .*skipped.jsonl"):
        prepare_common_voice(tmp_path, tmp_path / "out")
    assert skipped_reasons(tmp_path / "out").keys() == {"zero"}


def fleurs_row(key: int, name: str, text: str) -> list[str]:
    return [str(key), f"{name}.wav", text, text.lower(), " ".join(text.lower()), "8000", "FEMALE"]


def make_fleurs_split(folder: Path, split: str) -> None:
    """Two readers of one sentence, a doubled row, and each kind of broken row."""
    for name in ("101", "102", "103"):
        write_tone(folder / f"audio/{split}/{name}.wav", 0.5)
    write_broken_clips(folder / f"audio/{split}", "wav")
    rows = [
        fleurs_row(7, "101", 'Drei "neue" Bäume.'),
        fleurs_row(7, "102", "Drei neue Bäume."),
        fleurs_row(8, "101", "Noch einmal."),
        fleurs_row(9, "gone", "Fort."),
        fleurs_row(9, "zero", "Null."),
        fleurs_row(9, "words", "Worte."),
        fleurs_row(9, "103", ""),
        ["9", "104.wav", "zu kurz"],
    ]
    write_table(folder / f"{split}.tsv", rows, b"9\t105.wav\t\xff\t\t\t1\tMALE\n")


def test_fleurs_keeps_good_rows_and_names_each_broken_one(tmp_path):
    make_fleurs_split(tmp_path / "data/de_de", "train")
    make_fleurs_split(tmp_path / "data/cmn_hans_cn", "test")
    counts = prepare_fleurs(tmp_path, tmp_path / "out", languages=["de_de"])
    assert counts == {"de_de/train": 2, "skipped": 7}
    train = read_manifest(tmp_path / "out/de_de/train.jsonl")
    assert [(row["id"], row["text"], row["language"]) for row in train] == [
        ("de_de_101", 'Drei "neue" Bäume.', "de"),
        ("de_de_102", "Drei neue Bäume.", "de"),
    ]
    reasons = skipped_reasons(tmp_path / "out")
    assert reasons.pop("de_de_101") == "its id is in train.jsonl already"
    assert reasons.pop("train.tsv:8") == "3 columns where de_de/train.tsv has 7"
    assert reasons.pop("train.tsv:9").startswith("not UTF-8: byte 0xff")
    assert reasons.keys() == {"de_de_gone", "de_de_zero", "de_de_words", "de_de_103"}
    assert prepare_fleurs(tmp_path, tmp_path / "both")["cmn_hans_cn/test"] == 2
    assert read_manifest(tmp_path / "both/cmn_hans_cn/test.jsonl")[0]["language"] == "zh"


def test_fleurs_download_unpacks_the_splits_and_fetches_nothing_twice(tmp_path, monkeypatch):
    made, server = tmp_path / "made", tmp_path / "server/de_de"
    (server / "audio").mkdir(parents=True)
    for split in fleurs.SPLITS:
        make_fleurs_split(made, split)
        shutil.copy(made / f"{split}.tsv", server / f"{split}.tsv")
        with tarfile.open(server / f"audio/{split}.tar.gz", "w:gz") as archive:
            archive.add(made / f"audio/{split}", split)
    monkeypatch.setattr(fleurs, "HUB_URL", (tmp_path / "server").as_uri())
    download_fleurs(tmp_path / "corpus", ["de_de"])
    shutil.rmtree(tmp_path / "server")
    download_fleurs(tmp_path / "corpus", ["de_de"])
    assert sorted(path.name for path in (tmp_path / "corpus/de_de").iterdir()) == [
        "audio", "dev.tsv", "test.tsv", "train.tsv",
    ]  # fmt: skip
    counts = prepare_fleurs(tmp_path / "corpus", tmp_path / "out")
    assert (counts["de_de/train"], counts["de_de/dev"], counts["de_de/test"]) == (2, 2, 2)
    with pytest.raises(ValueError, match="fr_fr/train.tsv cannot be reached"):
        download_fleurs(tmp_path / "corpus", ["fr_fr"])


def test_fleurs_download_needs_to_know_what_and_where_to(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        fleurs.main(["--download", "--corpus-dir", str(tmp_path), "--output-dir", str(tmp_path / "out")])
    assert end.value.code == 2 and "--download needs --corpus-dir" in capsys.readouterr().err


VOXPOPULI_HEADER = "id raw_text normalized_text speaker_id split gender is_gold_transcript accent".split()


def test_voxpopuli_finds_clips_by_year_and_names_each_broken_row(tmp_path):
    folder = tmp_path / "transcribed_data/en"
    ids = {
        name: f"{year}0114-0900-PLENARY-3-en_{year}0114-17:12:30_{index}"
        for index, (name, year) in enumerate(
            [("good", 2013), ("other", 2014), ("gone", 2013), ("zero", 2013), ("words", 2013), ("empty", 2013)]
        )
    }
    for name in ("good", "other", "empty"):
        write_tone(folder / ids[name][:4] / f"{ids[name]}.ogg", 0.5)
    write_broken_clips(folder / "2013", "ogg")
    for name in ("zero", "words"):
        (folder / f"2013/{name}.ogg").rename(folder / f"2013/{ids[name]}.ogg")
    texts = {name: f"the {name} one" for name in ids} | {"empty": ""}
    speakers = dict.fromkeys(ids, "125") | {"other": "None"}
    rows = [[key, "", texts[name], speakers[name], "train", "f", "t", ""] for name, key in ids.items()]
    write_table(folder / "asr_train.tsv", [VOXPOPULI_HEADER, *rows, ["x", "a\ttab"]], b"\xc3\x28\n")
    write_table(folder / "asr_dev.tsv", [VOXPOPULI_HEADER, rows[1]])
    counts = prepare_voxpopuli(tmp_path, tmp_path / "out")
    assert counts == {"en/train": 2, "en/dev": 1, "skipped": 6}
    train = read_manifest(tmp_path / "out/en/train.jsonl")
    assert [(row["id"], row["text"], row["speaker"], row["language"]) for row in train] == [
        (ids["good"], "the good one", "125", "en"),
        (ids["other"], "the other one", None, "en"),
    ]
    reasons = skipped_reasons(tmp_path / "out")
    assert reasons.pop("asr_train.tsv:8") == f"3 columns where the header of {folder}/asr_train.tsv has 8"
    assert reasons.pop("asr_train.tsv:9") == f"not UTF-8: byte 0xc3 at column 1 of {folder}/asr_train.tsv"
    assert reasons.keys() == {ids[name] for name in ("gone", "zero", "words", "empty")}


def test_the_first_line_may_begin_with_a_byte_order_mark(tmp_path):
    key = "20130114-0900-PLENARY-3-en_20130114-17:12:30_0"
    write_tone(tmp_path / f"en/2013/{key}.ogg", 0.5)
    header = ["\ufeffid", *VOXPOPULI_HEADER[1:]]
    write_table(tmp_path / "en/asr_test.tsv", [header, [key, "", "hello", "1", "test", "f", "t", ""]])
    assert prepare_voxpopuli(tmp_path, tmp_path / "out") == {"en/test": 1, "skipped": 0}


@pytest.mark.parametrize(
    ("script", "place"),
    [(common_voice, "https://datacollective.mozillafoundation.org"), (voxpopuli, "voxpopuli.get_asr_data")],
)
def test_a_corpus_that_cannot_be_fetched_ends_with_code_2_and_says_where_to_get_it(script, place, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        script.main(["--download", "--output-dir", str(tmp_path)])
    message = capsys.readouterr().err
    assert end.value.code == 2 and "--download is not available" in message and place in message


@pytest.mark.parametrize("script", [common_voice, fleurs, voxpopuli])
def test_a_missing_corpus_folder_says_what_is_expected(script, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        script.main(["--corpus-dir", str(tmp_path / "no"), "--output-dir", str(tmp_path / "out")])
    assert end.value.code == 2 and "no does not exist; give --corpus-dir a folder with" in capsys.readouterr().err
