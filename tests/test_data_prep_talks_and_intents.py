"""TED-LIUM and MInDS-14 on miniatures of their public layouts."""

import io
import json
import zipfile
from pathlib import Path

import datasets
import minds14
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
import tedlium
from minds14 import INTENTS, download_minds14, prepare_minds14, split_of
from tedlium import clean_text, prepare_tedlium

from speechkd.data.audio import load_utterance
from speechkd.data.manifest import read_manifest


def skipped_reasons(output_dir: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (output_dir / "skipped.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row["reason"] for row in rows}


def write_talk(folder: Path, talk: str, lines: list[str], seconds: int = 4, last_line: bytes = b"") -> Path:
    """A SPHERE file whose samples are the number of their second / 10, and its STM file."""
    (folder / "sph").mkdir(parents=True, exist_ok=True)
    (folder / "stm").mkdir(exist_ok=True)
    samples = np.repeat(np.arange(seconds) / 10, 16_000)
    soundfile.write(folder / f"sph/{talk}.sph", samples, 16_000, format="NIST", subtype="PCM_16")
    (folder / f"stm/{talk}.stm").write_bytes("".join(f"{line}\n" for line in lines).encode() + last_line)
    return folder / f"sph/{talk}.sph"


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("it 's what we <unk> do", "it's what we do"),
        ("you 're sure they 'd 've gone at ten o 'clock", "you're sure they'd've gone at ten o'clock"),
        ("the students ' work and get 'em in the '90s", "the students' work and get 'em in the '90s"),
        ("<sil> read(2) it {NOISE} again <sil>", "read it again"),
        ("<unk>", ""),
        ("a tale of trees", "a tale of trees"),
    ],
)
def test_tedlium_transcripts_lose_marks_and_split_contractions(raw, text):
    assert clean_text(raw) == text


def test_tedlium_segments_are_read_from_inside_the_talk(tmp_path):
    lines = [
        ";; a comment",
        "Ann_2010 1 Ann_2010 1.00 2.00 <o,f0,female> it 's the second second",
        "Ann_2010 1 Ann_2010 3.00 4.05 <NA> the last one <unk>",
        "Ann_2010 1 inter_segment_gap 2.00 3.00 <o,f0,>",
        "Ann_2010 1 Ann_2010 0.00 1.00 <o,f0,female> ignore_time_segment_in_scoring",
    ]
    write_talk(tmp_path / "TEDLIUM_release-3/legacy/train", "Ann_2010", lines)
    counts = prepare_tedlium(tmp_path, tmp_path / "out")
    assert counts == {"train": 2, "skipped": 0, "not_speech": 2}
    first, last = read_manifest(tmp_path / "out/train.jsonl")
    assert (first["id"], first["text"]) == ("Ann_2010-0000100-0000200", "it's the second second")
    assert (first["speaker"], first["language"], first["sample_rate_hz"]) == ("Ann_2010", "en", 16_000)
    np.testing.assert_allclose(load_utterance(first, 16_000), np.full(16_000, 0.1), atol=1e-4)
    # the end that lies a little behind the talk's is moved to it
    assert (last["offset_seconds"], last["duration_seconds"]) == (3.0, 1.0)
    np.testing.assert_allclose(load_utterance(last, 16_000), np.full(16_000, 0.3), atol=1e-4)


def test_tedlium_names_each_broken_line_and_talk(tmp_path):
    folder = tmp_path / "legacy/dev"
    lines = [
        "Ann_2010 1 Ann_2010 0.00 1.00 <NA> good",
        "Ann_2010 1 Ann_2010 1.00 2.00 <NA> <unk>",
        "Ann_2010 1 Ann_2010 1.00 2.00 <NA>",
        "Ann_2010 1 Ann_2010 3.00 6.00 <NA> behind the end",
        "Ann_2010 1 Ann_2010 2.00 1.00 <NA> backwards",
        "Ann_2010 1 Ann_2010 nan 1.00 <NA> at no time",
        "Ann_2010 1 Ann_2010 soon later <NA> not numbers",
        "Ann_2010 1",
        "Ann_2010 1 Ann_2010 0.00 1.00 <NA> good again",
    ]
    write_talk(folder, "Ann_2010", lines, last_line=b"Ann_2010 1 Ann_2010 0.00 1.50 <NA> \xe9t\xe9\n")
    write_talk(folder, "NoAudio_2011", ["NoAudio_2011 1 NoAudio_2011 0.00 1.00 <NA> x"]).unlink()
    write_talk(folder, "Zero_2011", ["Zero_2011 1 Zero_2011 0.00 1.00 <NA> x"]).write_bytes(b"")
    write_talk(folder, "Words_2011", ["Words_2011 1 Words_2011 0.00 1.00 <NA> x"]).write_text("no audio")
    write_talk(folder, "NoText_2011", [])
    (folder / "stm/NoText_2011.stm").unlink()
    counts = prepare_tedlium(tmp_path / "legacy", tmp_path / "out")
    assert counts == {"dev": 1, "skipped": 13, "not_speech": 0}
    assert [row["text"] for row in read_manifest(tmp_path / "out/dev.jsonl")] == ["good"]
    reasons = skipped_reasons(tmp_path / "out")
    assert {reasons[f"Ann_2010.stm:{line}"] for line in (2, 3)} == {"no word is left of its transcript"}
    assert reasons["Ann_2010.stm:4"] == "segment 3.00 to 6.00 s is not inside of the talk's 4.00 s"
    assert all("is not inside of" in reasons[f"Ann_2010.stm:{line}"] for line in (5, 6))
    assert all("is not `talk channel speaker" in reasons[f"Ann_2010.stm:{line}"] for line in (7, 8))
    assert reasons["Ann_2010-0000000-0000100"] == "its id is in dev.jsonl already"
    assert reasons["Ann_2010.stm:10"].startswith("not UTF-8: byte 0xe9")
    assert reasons["NoAudio_2011"].startswith("no NoAudio_2011.sph in")
    assert reasons["NoText_2011"].startswith("no NoText_2011.stm in")
    assert all("cannot be opened" in reasons[talk] for talk in ("Zero_2011", "Words_2011"))


def test_tedlium_skips_what_a_truncated_talk_has_lost(tmp_path):
    lines = [f"Ann_2010 1 Ann_2010 {start}.00 {start + 1}.00 <NA> second {start}" for start in range(4)]
    path = write_talk(tmp_path / "legacy/test", "Ann_2010", lines)
    path.write_bytes(path.read_bytes()[: -3 * 16_000])  # a second and a half of int16
    assert prepare_tedlium(tmp_path, tmp_path / "out") == {"test": 2, "skipped": 2, "not_speech": 0}
    for row in read_manifest(tmp_path / "out/test.jsonl"):
        assert len(load_utterance(row, 16_000)) == 16_000


def test_tedlium_refuses_other_folders_and_download(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"no legacy/<split>/stm/\*.stm in .*; give the folder that holds legacy/"):
        prepare_tedlium(tmp_path, tmp_path / "out")
    with pytest.raises(SystemExit) as end:
        tedlium.main(["--download", "--output-dir", str(tmp_path)])
    assert end.value.code == 2 and "TEDLIUM_release-3.tgz" in capsys.readouterr().err


def wav_bytes(seconds: float = 0.5) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.full(round(8_000 * seconds), 0.1), 8_000, format="WAV")
    return file.getvalue()


def make_minds14(root: Path) -> None:
    """The original archives: 20 good rows of en-US, two of de-DE, and each kind of broken row."""
    clips = {f"en-US~{INTENTS[index % 14].upper()}/clip{index}.wav": wav_bytes() for index in range(20)}
    lines = ["filepath,text_asr,text_translated,intent_class"]
    lines += [f'{name},"hello, {index}",hello,{INTENTS[index % 14]}' for index, name in enumerate(clips)]
    lines += [
        "en-US~FREEZE/gone.wav,gone,gone,freeze",
        "en-US~FREEZE/zero.wav,zero,zero,freeze",
        "en-US~FREEZE/words.wav,words,words,freeze",
        "en-US~FREEZE/silent.wav,,,freeze",
        "en-US~DANCE/odd.wav,odd,odd,dance",
        "en-US~FREEZE/few.wav,few",
        'en-US~FREEZE/quote.wav,"never closed,x,freeze',
        "en-US~FREEZE/after.wav,after the stray quotation mark,x,FREEZE",
    ]
    clips |= {"en-US~FREEZE/zero.wav": b"", "en-US~FREEZE/words.wav": b"this is no audio"}
    clips |= {f"en-US~{name}.wav": wav_bytes() for name in ("FREEZE/silent", "DANCE/odd", "FREEZE/after")}
    clips |= {f"de-DE~ABROAD/{name}.wav": wav_bytes() for name in "ab"}
    german = "filepath,a,b,c\n" + "".join(f"de-DE~ABROAD/{name}.wav,Grüße,regards,abroad\n" for name in "ab")
    root.mkdir(parents=True)
    with zipfile.ZipFile(root / "audio.zip", "w") as archive:
        for name, content in clips.items():
            archive.writestr(name, content)
    with zipfile.ZipFile(root / "text.zip", "w") as archive:
        archive.writestr("en-US.csv", "\n".join(lines).encode() + b"\nen-US~FREEZE/l.wav,caf\xe9,x,freeze\n")
        archive.writestr("de-DE.csv", german.encode())


def read_splits(folder: Path) -> dict[str, dict]:
    rows = {}
    for split in ("train", "dev", "test"):
        for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows[row["id"]] = {**row, "split": split}
    return rows


def test_minds14_archives_give_intents_and_name_each_broken_row(tmp_path):
    make_minds14(tmp_path / "MInDS-14")
    counts = prepare_minds14(tmp_path, tmp_path / "out")
    assert sum(counts[f"en-US/{split}"] for split in ("train", "dev", "test")) == 21
    assert sum(counts[f"de-DE/{split}"] for split in ("train", "dev", "test")) == 2
    rows = read_splits(tmp_path / "out/en-US")
    clip = rows["en-US-ABROAD-clip0"]
    assert (clip["text"], clip["intent"], clip["language"]) == ("hello, 0", "abroad", "en")
    assert (clip["duration_seconds"], clip["sample_rate_hz"]) == (0.5, 8_000)
    assert rows["en-US-FREEZE-after"]["intent"] == "freeze"
    assert all(row["split"] == split_of(key) for key, row in rows.items())
    train = read_manifest(tmp_path / "out/en-US/train.jsonl")
    assert len(train) == counts["en-US/train"] and len(load_utterance(train[0], 8_000)) == 4_000
    reasons = skipped_reasons(tmp_path / "out")
    assert counts["skipped"] == len(reasons) == 8
    assert reasons["en-US-DANCE-odd"] == "its intent 'dance' is none of the 14"
    assert reasons["en-US-FREEZE-silent"] == "its transcript is empty"
    assert reasons["en-US-FREEZE-gone"].endswith("gone.wav does not exist")
    assert all("cannot be opened" in reasons[f"en-US-FREEZE-{name}"] for name in ("zero", "words"))
    assert all(reasons[f"en-US.csv:{line}"].startswith("not a row of 4 columns") for line in (27, 28))
    assert reasons["en-US.csv:30"].startswith("not UTF-8: byte 0xe9")


def test_minds14_unpacked_folders_give_the_same_manifests_as_archives(tmp_path):
    root = tmp_path / "packed/MInDS-14"
    make_minds14(root)
    for name in ("audio", "text"):
        with zipfile.ZipFile(root / f"{name}.zip") as archive:
            archive.extractall(tmp_path / "unpacked" / name)
    packed = prepare_minds14(root, tmp_path / "out/packed", languages=["de-DE"])
    unpacked = prepare_minds14(tmp_path / "unpacked", tmp_path / "out/unpacked", languages=["de-DE"])
    assert packed == unpacked and "en-US/train" not in packed
    rows = [read_splits(tmp_path / f"out/{name}/de-DE") for name in ("packed", "unpacked")]
    for row in [*rows[0].values(), *rows[1].values()]:
        row.pop("audio")
    assert rows[0] == rows[1] and len(rows[0]) == 2
    with pytest.raises(ValueError, match=r"languages \['xx-XX'\] are not in .*, only \['de-DE', 'en-US'\]"):
        prepare_minds14(tmp_path / "unpacked", tmp_path / "out", languages=["xx-XX"])


def write_parquet(path: Path, contents: dict[str, bytes | None], intents: tuple[str, ...] = INTENTS) -> None:
    """The Hub's form: audio bytes in the table, paths of the machine that made it, intents as class numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features(
        {
            "path": datasets.Value("string"),
            "audio": datasets.Audio(sampling_rate=8_000),
            "transcription": datasets.Value("string"),
            "english_transcription": datasets.Value("string"),
            "intent_class": datasets.ClassLabel(names=list(intents)),
            "lang_id": datasets.ClassLabel(names=["en-US", "de-DE"]),
        }
    )
    columns = {
        "path": [f"/cache/{name}" for name in contents],
        "audio": [{"path": Path(name).name, "bytes": content} for name, content in contents.items()],
        "transcription": [None if "silent" in name else "Hello." for name in contents],
        "english_transcription": ["hello"] * len(contents),
        "intent_class": [11] * len(contents),
        "lang_id": [0] * len(contents),
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
    table = pyarrow.table(columns, schema=features.arrow_schema.with_metadata(metadata))
    pyarrow.parquet.write_table(table, path)


def test_minds14_hub_files_give_intents_and_name_each_broken_row(tmp_path):
    folder = "en-US~JOINT_ACCOUNT"
    contents = {f"{folder}/{name}.wav": wav_bytes() for name in ("a", "b", "silent")}
    contents |= {f"{folder}/zero.wav": None, f"{folder}/words.wav": b"this is no audio"}
    write_parquet(tmp_path / "hub/en-US/train-00000-of-00001.parquet", contents)
    write_parquet(tmp_path / "hub/all/train-00000-of-00001.parquet", contents)
    counts = prepare_minds14(tmp_path / "hub", tmp_path / "out")
    assert (sum(counts.values()), counts["skipped"]) == (5, 3)
    rows = read_splits(tmp_path / "out/en-US")
    assert rows.keys() == {"en-US-JOINT_ACCOUNT-a", "en-US-JOINT_ACCOUNT-b"}
    for row in rows.values():
        assert (row["intent"], row["text"], row["duration_seconds"]) == ("joint_account", "Hello.", 0.5)
        assert (tmp_path / "out/en-US" / row["audio"]).read_bytes() == wav_bytes()
    assert skipped_reasons(tmp_path / "out").keys() == {f"en-US-JOINT_ACCOUNT-{x}" for x in ("zero", "words", "silent")}


def test_minds14_refuses_hub_files_with_other_intents_and_folders_without_corpus(tmp_path):
    write_parquet(tmp_path / "hub/en-US/x.parquet", {"en-US~ABROAD/a.wav": wav_bytes()}, intents=INTENTS[::-1])
    with pytest.raises(ValueError, match="x.parquet numbers the intents .*; take the files of PolyAI/minds14"):
        prepare_minds14(tmp_path / "hub", tmp_path / "out")
    file = tmp_path / "hub/en-US/x.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"x.parquet'\] cannot be read as parquet .*; fetch the files again"):
        prepare_minds14(tmp_path / "hub", tmp_path / "out")
    with pytest.raises(ValueError, match=r"has no <language>/\*.parquet; give --corpus-dir the corpus"):
        prepare_minds14(tmp_path / "out", tmp_path / "out")


def test_minds14_download_fetches_the_files_of_the_locales(tmp_path, monkeypatch, capsys):
    write_parquet(tmp_path / "server/en-US" / minds14.HUB_FILE, {"en-US~JOINT_ACCOUNT/a.wav": wav_bytes()})
    monkeypatch.setattr(minds14, "HUB_URL", (tmp_path / "server").as_uri())
    download_minds14(tmp_path / "corpus", ["en-US"])
    assert sum(prepare_minds14(tmp_path / "corpus", tmp_path / "out").values()) == 1
    arguments = ["--download", "--corpus-dir", str(tmp_path / "corpus"), "--output-dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        minds14.main([*arguments, "--languages", "xx-XX"])
    assert end.value.code == 2 and "xx-XX" in capsys.readouterr().err


def test_minds14_splits_are_fixed_by_the_id():
    splits = [split_of(f"en-US-FREEZE-{index}") for index in range(1000)]
    shares = [splits.count(split) / 1000 for split in ("train", "dev", "test")]
    assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.04)
    assert splits[:6] == ["dev", "train", "dev", "train", "train", "dev"]
