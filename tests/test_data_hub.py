import io
import json
import logging
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from conftest import write_tone
from torch.utils.data import DataLoader

from speechkd.data.audio import load_utterance
from speechkd.data.hub import read_hub_dataset, read_utterances, stream_hub_dataset
from speechkd.data.manifest import FIELDS, Manifest, read_manifest
from speechkd.evaluate import evaluate_asr
from speechkd.labels.pseudo_label import DecodingConfig, label_manifest

ENCODED = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
COMMANDS = datasets.ClassLabel(names=["yes", "no"])


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def wav_bytes(seconds: float, pitch_hz: float = 220.0, rate_hz: int = 16_000) -> bytes:
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.1 * np.sin(2 * np.pi * pitch_hz * time), rate_hz, format="WAV")
    return buffer.getvalue()


def write_parquet(folder: Path, rows: dict[str, list], features: dict | None = None, num_files: int = 1) -> str:
    """A split `train` in the layout of the Hub; values of `audio` are dicts with bytes and path."""
    features = datasets.Features({"audio": ENCODED, **(features or {})})
    for name in rows.keys() - features.keys():
        features[name] = datasets.Value("string")
    dataset = datasets.Dataset.from_dict(rows, features=features).cast_column("audio", datasets.Audio())
    (folder / "data").mkdir(parents=True)
    for number in range(num_files):
        part = dataset.shard(num_files, number, contiguous=True)
        part.to_parquet(folder / f"data/train-{number:05d}-of-{num_files:05d}.parquet")
    return str(folder)


def clips(count: int) -> list[dict]:
    return [{"bytes": wav_bytes(0.1 + 0.01 * i, 200 + i), "path": f"clip{i}.wav"} for i in range(count)]


@pytest.fixture
def corpus(tmp_path) -> str:
    """24 clips in 6 files, with ids."""
    rows = {"audio": clips(24), "id": [f"u{i}" for i in range(24)], "sentence": [f"text {i}" for i in range(24)]}
    return write_parquet(tmp_path / "corpus", rows, num_files=6)


def test_a_row_becomes_an_utterance_with_the_bytes_durations_and_names_of_the_dataset(tmp_path):
    audio = [{"bytes": wav_bytes(0.5), "path": "a.wav"}, {"bytes": wav_bytes(0.25, rate_hz=8000), "path": "b.wav"}]
    folder = write_parquet(
        tmp_path / "corpus",
        {
            "audio": audio,
            "sentence": ["hello", ""],
            "client_id": [7, 8],
            "lang_id": [1, 0],
            "label": [1, None],
            "language": ["Mandarin", "English"],
        },
        {
            "client_id": datasets.Value("int64"),
            "lang_id": datasets.ClassLabel(names=["en_us", "cmn_hans_cn"]),
            "label": COMMANDS,
        },
    )
    manifest = read_utterances(f"hub:{folder}:train")
    assert isinstance(manifest, Manifest) and len(manifest) == 2
    expected = {"id": "a", "audio": audio[0]["bytes"], "duration_seconds": 0.5, "sample_rate_hz": 16_000}
    expected |= {"text": "hello", "speaker": "7", "language": "zh", "intent": "no"}
    assert manifest[0] == dict.fromkeys(FIELDS) | expected
    assert list(manifest[0]) == list(FIELDS)
    second = manifest[1]
    assert (second["text"], second["intent"], second["language"], second["sample_rate_hz"]) == ("", None, "en", 8000)
    assert manifest.durations_seconds.tolist() == [0.5, 0.25] and manifest.rows["text"][:] == ["hello", ""]
    assert str(manifest.path) == f"hub:{folder}:train"
    assert list(manifest.select([1])) == [second]


def test_a_clip_of_a_row_is_decoded_from_its_bytes(corpus):
    utterance = read_hub_dataset(corpus, None, "train")[3]
    expected, _ = soundfile.read(io.BytesIO(clips(4)[3]["bytes"]), dtype="float32")
    torch.testing.assert_close(load_utterance(utterance, 16_000), torch.from_numpy(expected))


def test_ids_are_the_datasets_own_else_file_stems_else_row_numbers(tmp_path):
    def ids(name: str, paths: list, column: dict, features: dict | None = None) -> list[str]:
        audio = [{"bytes": wav_bytes(0.1), "path": path} for path in paths]
        return read_hub_dataset(write_parquet(tmp_path / name, {"audio": audio, **column}, features), None, "train").ids

    sentences = {"id": datasets.Value("int32")}
    assert ids("own", ["x/a.wav", "y/a.wav"], {"utt_id": ["one", "two"]}) == ["one", "two"]
    assert ids("numbers", ["a.wav", "b.wav"], {"id": [5, 6]}, sentences) == ["5", "6"]
    assert ids("sentences", ["a.wav", "b.wav"], {"id": [5, 5]}, sentences) == ["a", "b"]
    assert ids("repeated", ["x/a.wav", "y/a.wav"], {"id": [5, 5]}, sentences) == ["train-000000", "train-000001"]
    assert ids("nameless", [None, None], {}) == ["train-000000", "train-000001"]


def test_an_audio_folder_with_metadata_gives_paths_and_needs_no_torchcodec(tmp_path):
    for index in range(3):
        write_tone(tmp_path / f"corpus/train/clips/{index}.flac", 0.5 + 0.1 * index)
    lines = "".join(f"clips/{index}.flac,word {index},s{index}\n" for index in range(3))
    (tmp_path / "corpus/train/metadata.csv").write_text("file_name,transcription,speaker_id\n" + lines)
    manifest = read_utterances(f"hub:{tmp_path}/corpus:train")
    assert manifest.ids == ["0", "1", "2"] and manifest.rows["text"][:] == ["word 0", "word 1", "word 2"]
    utterance = manifest[2]
    assert Path(utterance["audio"]) == tmp_path / "corpus/train/clips/2.flac" and utterance["speaker"] == "s2"
    assert len(load_utterance(utterance, 16_000)) == 0.7 * 16_000
    assert list(stream_hub_dataset(f"{tmp_path}/corpus", None, "train")) == list(manifest)


def test_rows_that_are_no_audio_are_logged_and_left_out_in_both_forms(tmp_path, caplog):
    audio = clips(5)
    audio[1]["bytes"] = b"not audio at all"
    audio[3] = {"bytes": wav_bytes(0.0), "path": "clip3.wav"}
    folder = write_parquet(tmp_path / "corpus", {"audio": audio})
    with caplog.at_level(logging.WARNING):
        manifest = read_hub_dataset(folder, None, "train")
    assert manifest.ids == ["clip0", "clip2", "clip4"]
    assert [utterance["audio"] for utterance in manifest] == [audio[index]["bytes"] for index in (0, 2, 4)]
    assert "2 of 5 rows of hub:" in caplog.text and "train-000001: " in caplog.text
    assert "train-000003: its header promises 0 samples" in caplog.text
    caplog.clear()
    stream = stream_hub_dataset(folder, None, "train")
    with caplog.at_level(logging.WARNING):
        assert list(stream) == list(manifest) == list(stream)
    assert caplog.text.count("utterance 'clip1' is left out") == 1


def test_headers_are_read_once_and_then_come_from_the_cache(corpus, monkeypatch):
    first = list(read_hub_dataset(corpus, None, "train"))
    monkeypatch.setattr(soundfile, "info", lambda *_: pytest.fail("a header was read again"))
    assert list(read_hub_dataset(corpus, None, "train")) == first


def test_columns_can_be_named_and_are_listed_when_they_are_not_there(tmp_path):
    rows = {"audio": clips(2), "text": ["a", "b"], "other": ["c", "d"]}
    folder = write_parquet(tmp_path / "corpus", rows)
    manifest = read_hub_dataset(folder, None, "train", audio_column="audio", text_column="other")
    assert manifest.rows["text"][:] == ["c", "d"]
    with pytest.raises(ValueError, match="has no text column 'words'; its columns are audio, text, other"):
        read_hub_dataset(folder, None, "train", text_column="words")
    with pytest.raises(ValueError, match="has no audio column 'text'; its columns are audio, text, other"):
        read_hub_dataset(folder, None, "train", audio_column="text")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"texts:train has 0 audio columns.*columns: a, b"):
        read_utterances(f"hub:{tmp_path}/texts:train")
    two = {"audio": clips(2), "more": clips(2)}
    both = write_parquet(tmp_path / "both", two, {"more": ENCODED})
    dataset = datasets.Dataset.from_parquet(f"{both}/data/*.parquet").cast_column("more", datasets.Audio())
    dataset.to_parquet(f"{both}/data/train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"2 audio columns, \['audio', 'more'\].*name it in audio_column"):
        read_hub_dataset(both, None, "train")
    assert len(read_hub_dataset(both, None, "train", audio_column="more")) == 2


def test_a_slice_of_a_split_is_a_source_too(corpus):
    assert read_utterances(f"hub:{corpus}:train[2:4]").ids == ["u2", "u3"]
    assert read_utterances(f"hub:{corpus}:default:train[:1]").ids == ["u0"]


@pytest.mark.parametrize("read", [lambda *source: read_hub_dataset(*source), lambda *s: stream_hub_dataset(*s)])
def test_what_cannot_be_found_is_an_error_that_names_the_source_and_what_there_is(corpus, tmp_path, read):
    with pytest.raises(ValueError, match="hub:nobody/nothing:xx:train cannot be read: .*connect to the network"):
        read("nobody/nothing", "xx", "train")
    with pytest.raises(ValueError, match="hub:/no/such/folder:train cannot be read: .*check the name"):
        read("/no/such/folder", None, "train")
    with pytest.raises(ValueError, match=r":tset cannot be read: .*\['train'\]"):
        read(corpus, None, "tset")
    with pytest.raises(ValueError, match=r":en:train cannot be read: .*Available: \['default'\]"):
        read(corpus, "en", "train")
    nothing = write_parquet(tmp_path / "nothing", {"audio": [{"bytes": b"text", "path": "a.wav"}]})
    with pytest.raises(ValueError, match=r"hub:.*nothing:train has 1 rows and no usable audio"):
        read_hub_dataset(nothing, None, "train")


def test_a_source_of_another_form_is_refused_and_a_path_is_a_manifest(tone_manifest):
    for source in ("hub:google/fleurs", "hub:a:b:c:d", "hub::train", "hub:name:"):
        with pytest.raises(ValueError, match="is not hub:NAME"):
            read_utterances(source)
    assert list(read_utterances(tone_manifest)) == list(read_manifest(tone_manifest))


def test_a_stream_gives_the_utterances_of_the_mapped_form(corpus):
    assert list(stream_hub_dataset(corpus, None, "train")) == list(read_hub_dataset(corpus, None, "train"))


def ids_of(stream) -> list[str]:
    return [utterance["id"] for utterance in stream]


def test_shuffling_depends_on_seed_and_epoch_alone_and_mixes_within_and_over_files(corpus):
    stream = stream_hub_dataset(corpus, None, "train", seed=1, shuffle_buffer=8)
    first = ids_of(stream)
    assert ids_of(stream) == first == ids_of(stream_hub_dataset(corpus, None, "train", seed=1, shuffle_buffer=8))
    assert sorted(first) == sorted(f"u{index}" for index in range(24))
    stream.set_epoch(1)
    others = [ids_of(stream), ids_of(stream_hub_dataset(corpus, None, "train", seed=2, shuffle_buffer=8))]
    assert len({tuple(order) for order in (first, *others)}) == 3
    assert all(sorted(order) == sorted(first) for order in others)
    files = [{int(key[1:]) // 4 for key in first[start : start + 8]} for start in (0, 8, 16)]
    assert all(len(block) == 2 for block in files)  # a block of 8 is two files of 4
    assert first[:8] != sorted(first[:8], key=lambda key: int(key[1:]))


@pytest.mark.parametrize("world_size, num_workers", [(1, 2), (2, 0), (2, 2), (3, 0), (4, 0), (4, 2), (5, 0)])
def test_ranks_and_workers_share_the_split_without_overlap(corpus, world_size, num_workers):
    seen: list[str] = []
    for rank in range(world_size):  # 4 and 5 do not divide the 6 files
        stream = stream_hub_dataset(corpus, None, "train", seed=0, shuffle_buffer=4, rank=rank, world_size=world_size)
        stream.set_epoch(3)
        seen += ids_of(DataLoader(stream, batch_size=None, num_workers=num_workers))
    assert sorted(seen) == sorted(f"u{index}" for index in range(24))


@pytest.mark.parametrize("seed, shuffle_buffer", [(None, 5), (7, 1), (7, 5), (7, 100)])
@pytest.mark.parametrize("rank, world_size", [(0, 1), (1, 2), (2, 4)])
def test_a_restored_stream_gives_exactly_the_rest(corpus, seed, shuffle_buffer, rank, world_size):
    def make():
        return stream_hub_dataset(
            corpus, None, "train", seed=seed, shuffle_buffer=shuffle_buffer, rank=rank, world_size=world_size
        )

    whole = make()
    whole.set_epoch(2)
    expected = ids_of(whole)
    for count in (0, 5, len(expected) - 1, len(expected)):
        stopped, resumed = make(), make()
        stopped.set_epoch(2)
        iterator = iter(stopped)
        assert ids_of(islice(iterator, count)) == expected[:count]
        state = json.loads(json.dumps(stopped.state_dict()))
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        again = make()
        assert ids_of(islice(resumed, 3)) == expected[count : count + 3]
        again.load_state_dict(resumed.state_dict())  # a run that is stopped twice
        assert ids_of(again) == expected[count + 3 :]
        resumed.load_state_dict(state)
        assert ids_of(resumed) == expected[count:]
    assert ids_of(resumed) == expected  # only the first iteration is shortened
    resumed.set_epoch(3)
    whole.set_epoch(3)
    assert ids_of(resumed) == ids_of(whole)


def test_a_state_of_another_stream_and_wrong_arguments_are_refused(corpus):
    state = stream_hub_dataset(corpus, None, "train", seed=1).state_dict()
    with pytest.raises(ValueError, match="the stream's state has seed=1, this run has 2"):
        stream_hub_dataset(corpus, None, "train", seed=2).load_state_dict(state)
    for arguments, message in (
        ({"shuffle_buffer": 0}, "shuffle_buffer must be 1 or more, got 0"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"rank": 2, "world_size": 2}, "rank=2 with world_size=2"),
    ):
        with pytest.raises(ValueError, match=message):
            stream_hub_dataset(corpus, None, "train", **arguments)


def test_labels_of_a_hub_source_are_those_of_the_manifest_of_the_same_clips(tiny_teacher, tone_manifest, tmp_path):
    manifest = read_manifest(tone_manifest)
    audio = [{"bytes": Path(row["audio"]).read_bytes(), "path": f"{row['id']}.wav"} for row in manifest]
    folder = write_parquet(tmp_path / "corpus", {"audio": audio, "text": manifest.rows["text"][:]})
    decoding = DecodingConfig(batch_size=2, max_new_tokens=6)
    rows = []
    for number, source in enumerate((tone_manifest, f"hub:{folder}:train")):
        store = label_manifest(tiny_teacher, source, tmp_path / f"labels-{number}", decoding=decoding)
        rows.append(sorted(({**row, "compute_seconds": None} for row in store.rows()), key=lambda row: row["id"]))
    assert rows[0] == rows[1] and len(rows[0]) == 6
    metrics = [
        evaluate_asr(
            tiny_teacher, source, tmp_path / f"eval-{number}", decoding=decoding, decoded_dir=tmp_path / "labels-0"
        )
        for number, source in enumerate((tone_manifest, f"hub:{folder}:train"))
    ]
    assert metrics[0]["wer"] == metrics[1]["wer"] and metrics[1]["manifest"] == f"hub:{folder}:train"


def test_a_clip_of_a_hub_source_that_cannot_be_decoded_is_named_in_skipped_jsonl(tiny_teacher, tmp_path):
    write_tone(tmp_path / "cut.flac", 1.0)
    audio = clips(3)
    audio[1]["bytes"] = (tmp_path / "cut.flac").read_bytes()[:2000]  # the header still promises all of it
    folder = write_parquet(tmp_path / "corpus", {"audio": audio})
    decoding = DecodingConfig(batch_size=2, max_new_tokens=6)
    source = f"hub:{folder}:train"
    store = label_manifest(tiny_teacher, source, tmp_path / "labels", decoding=decoding, max_skipped_fraction=0.5)
    assert sorted(row["id"] for row in store.rows()) == ["clip0", "clip2"]
    skipped = json.loads((tmp_path / "labels/skipped.jsonl").read_text())
    assert skipped["id"] == "clip1" and "utterance 'clip1'" in skipped["reason"]
