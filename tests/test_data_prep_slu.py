import hashlib
import json
from pathlib import Path
from typing import Any

import fluent_speech_commands
import meld
import pytest
import snips
import stop
from conftest import write_tone
from fluent_speech_commands import prepare_fluent_speech_commands
from meld import mend_text, prepare_meld
from snips import prepare_snips, query_split
from stop import parse_seqlogical, prepare_stop

from speechkd.data.manifest import read_manifest


def skipped_reasons(folder: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row["reason"] for row in rows}


def write_table(path: Path, *lines: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))


FLUENT_HEADER = ",path,speakerId,transcription,action,object,location"


def test_fluent_intents_join_action_object_and_location(tmp_path):
    corpus = tmp_path / "fluent_speech_commands_dataset"
    write_table(
        corpus / "data/train_data.csv",
        FLUENT_HEADER,
        '0,wavs/speakers/ann/a.wav,ann,"Turn up the heat, please",increase,heat,kitchen',
        "1,wavs/speakers/ann/b.wav,ann,Use Chinese,change language,Chinese,none",
    )
    valid = "0,wavs/speakers/bob/a.wav,bob,Stop,deactivate,music,none"
    write_table(corpus / "data/valid_data.csv", FLUENT_HEADER, valid)
    write_table(corpus / "data/test_data.csv", FLUENT_HEADER, "0,wavs/speakers/cy/a.wav,cy,Go,activate,lights,bedroom")
    for clip, seconds in {"ann/a": 0.2, "ann/b": 0.3, "bob/a": 0.2, "cy/a": 0.2}.items():
        write_tone(corpus / f"wavs/speakers/{clip}.wav", seconds)
    counts = prepare_fluent_speech_commands(tmp_path, tmp_path / "out")
    assert counts == {"train": 2, "valid": 1, "test": 1, "skipped": 0}
    heat, chinese = read_manifest(tmp_path / "out/train.jsonl")
    assert (heat["id"], heat["speaker"], heat["text"]) == ("ann-a", "ann", "Turn up the heat, please")
    assert heat["intent"] == "increase|heat|kitchen" and chinese["intent"] == "change language|Chinese|none"
    assert [slot["value"] for slot in heat["slots"]] == ["increase", "heat", "kitchen"]
    assert chinese["slots"] == [{"name": "action", "value": "change language"}, {"name": "object", "value": "Chinese"}]
    assert chinese["duration_seconds"] == pytest.approx(0.3)
    assert prepare_fluent_speech_commands(corpus, tmp_path / "direct") == counts


def test_fluent_names_every_broken_row_and_keeps_the_others(tmp_path):
    rows = [
        "0,wavs/speakers/ann/good.wav,ann,One,activate,lights,none",
        "1,wavs/speakers/ann/gone.wav,ann,Two,activate,lights,none",
        "2,wavs/speakers/ann/empty.wav,ann,Three,activate,lights,none",
        "3,wavs/speakers/ann/text.wav,ann,Four,activate,lights,none",
        "4,wavs/speakers/ann/none.wav,ann,Five,activate,lights,none",
        "5,wavs/speakers/ann/good.wav,ann,Six,activate,lights,none",
        "6,wavs/speakers/ann/good.wav,ann,,activate,lights,none",
        '7,wavs/speakers/ann/good.wav,ann,"Eight,activate,lights,none',
        "8,wavs/speakers/ann/good.wav,ann,Nine,activate,lights",
        b"9,wavs/speakers/ann/good.wav,ann,T\xe9n,activate,lights,none",
        "10,wavs/speakers/ann/last.wav,ann,Eleven,activate,lights,none",
    ]
    write_table(tmp_path / "data/train_data.csv", FLUENT_HEADER, *rows)
    for split in ("valid", "test"):
        write_table(tmp_path / f"data/{split}_data.csv", FLUENT_HEADER)
    audio = tmp_path / "wavs/speakers/ann"
    write_tone(audio / "good.wav", 0.2)
    write_tone(audio / "last.wav", 0.2)
    write_tone(audio / "none.wav", 0.0)
    (audio / "empty.wav").write_bytes(b"")
    (audio / "text.wav").write_text("404 not found")
    counts = prepare_fluent_speech_commands(tmp_path, tmp_path / "out")
    assert counts == {"train": 2, "valid": 0, "test": 0, "skipped": 9}
    assert [row["text"] for row in read_manifest(tmp_path / "out/train.jsonl")] == ["One", "Eleven"]
    reasons = skipped_reasons(tmp_path / "out")
    assert reasons["ann-gone"].endswith("gone.wav does not exist")
    assert "empty or not audio" in reasons["ann-empty"] and "empty or not audio" in reasons["ann-text"]
    assert "holds no samples" in reasons["ann-none"]
    assert reasons["ann-good"] == "its id is in train.jsonl already"
    assert "nothing in the columns ['transcription']" in reasons["train_data.csv:8"]
    assert "not a row of" in reasons["train_data.csv:9"]
    assert reasons["train_data.csv:10"].startswith("6 columns where the header")
    assert reasons["train_data.csv:11"].startswith("not UTF-8: byte 0xe9")


@pytest.mark.parametrize(
    ("parse", "intent", "slots"),
    [
        ("[IN:GET_ALARM ]", "GET_ALARM", []),
        ("[IN:CREATE_ALARM [SL:DATE_TIME for  tonight ] ]", "CREATE_ALARM", [("DATE_TIME", "for tonight")]),
        ("[IN:CREATE_ALARM set [SL:AMOUNT two ] alarms ]", "CREATE_ALARM", [("AMOUNT", "two")]),
        (
            "[IN:GET_DIRECTIONS [SL:DESTINATION [IN:GET_EVENT [SL:NAME_EVENT Eagles ][SL:CAT_EVENT game ] ] ] ]",
            "GET_DIRECTIONS",
            [("DESTINATION/GET_EVENT/NAME_EVENT", "Eagles"), ("DESTINATION/GET_EVENT/CAT_EVENT", "game")],
        ),
        (
            "[IN:A [SL:B the [IN:C [SL:D red ] ] house ] [SL:B mine ] ]",
            "A",
            [("B", "the house"), ("B/C/D", "red"), ("B", "mine")],
        ),
    ],
)
def test_parses_become_an_intent_and_slots_named_by_their_labels(parse, intent, slots):
    assert parse_seqlogical(parse) == (intent, [{"name": name, "value": value} for name, value in slots])


@pytest.mark.parametrize(
    ("parse", "message"),
    [
        ("", "there is no parse"),
        ("hello", "does not start with an intent"),
        ("] [IN:A ]", "does not start with an intent"),
        ("[SL:A hello ]", "opens '\\[SL:A' where"),
        ("[IN:A [XX:B hello ] ]", "opens '\\[' where a label"),
        ("[IN:A [SL:B hello ]", "ends before its last bracket"),
        ("[IN:A ] ]", "goes on after its last bracket"),
        ("[IN:A ] [IN:B ]", "goes on after its last bracket"),
    ],
)
def test_broken_parses_are_refused(parse, message):
    with pytest.raises(ValueError, match=message):
        parse_seqlogical(parse)


STOP_HEADER = (
    "file_id\tdomain\tgender\tnative\tutterance\tseqlogical\t"
    "normalized_utterance\tnormalized_seqlogical\tdecoupled_normalized_seqlogical"
)


def stop_row(file_id: str, text: str, parse: str) -> str:
    return "\t".join([file_id, "alarm", "male", "yes", text.upper(), "[IN:X ]", text, "[IN:X ]", parse])


def test_stop_finds_the_clips_of_both_recordings_and_names_broken_rows(tmp_path):
    corpus = tmp_path / "stop"
    write_table(
        corpus / "manifests/train.tsv",
        STOP_HEADER,
        stop_row("train_0/alarm_train_0/1.wav", 'play "yesterday', "[IN:PLAY [SL:NAME yesterday ] ]"),
        stop_row("train_0/alarm_train_0/2.wav", "wake me", ""),
        stop_row("train_0/alarm_train_0/3.wav", "wake me", "[IN:WAKE ]"),
        stop_row("train_0/alarm_train_0/4.wav", "", "[IN:WAKE ]"),
        "train_0/alarm_train_0/5.wav\talarm",
    )
    both = [stop_row(f"test_{take}/alarm_test_{take}/1.wav", "stop", "[IN:STOP ]") for take in (0, 1)]
    write_table(corpus / "manifests/test.tsv", STOP_HEADER, *both)
    write_tone(corpus / "train_0/alarm_train_0/1.wav", 0.2)
    write_tone(corpus / "test_0/alarm_test/1.wav", 0.3)
    write_tone(corpus / "test_1/alarm_test_1/1.wav", 0.4)
    assert prepare_stop(tmp_path, tmp_path / "out") == {"train": 1, "test": 2, "skipped": 4}
    (train,) = read_manifest(tmp_path / "out/train.jsonl")
    assert (train["id"], train["text"], train["intent"]) == ("train_0-alarm_train_0-1", 'play "yesterday', "PLAY")
    assert train["slots"] == [{"name": "NAME", "value": "yesterday"}]
    test = {row["id"]: row["duration_seconds"] for row in read_manifest(tmp_path / "out/test.jsonl")}
    assert test == pytest.approx({"test_0-alarm_test_0-1": 0.3, "test_1-alarm_test_1-1": 0.4})
    reasons = skipped_reasons(tmp_path / "out")
    assert reasons["train_0-alarm_train_0-2"] == "there is no parse"
    assert reasons["train_0-alarm_train_0-3"].endswith("train_0/alarm_train_0/3.wav does not exist")
    assert reasons["train_0-alarm_train_0-4"] == "its transcript is empty"
    assert reasons["train.tsv:6"].startswith("2 columns where the header")


MELD_HEADER = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime"


def meld_row(utterance: str, emotion: str, sentiment: str, number: int) -> str:
    return f'1,{utterance},The Interviewer,{emotion},{sentiment},0,{number},8,21,"00:16:16,059","00:16:21,731"'


def test_meld_takes_sound_beside_videos_and_names_what_has_none(tmp_path):
    corpus = tmp_path / "MELD.Raw"
    write_table(
        corpus / "train_sent_emo.csv",
        MELD_HEADER,
        meld_row('"So let\x92s talk, ""you"" and I."', "neutral", "neutral", 0),
        meld_row("Only a video!", "joy", "positive", 1),
        meld_row("No clip", "joy", "positive", 2),
        meld_row("Odd label", "bored", "positive", 3),
        meld_row("Odd label", "joy", "mixed", 4),
        meld_row('"Not closed', "joy", "positive", 5),
        meld_row("Broken clip", "joy", "positive", 6),
    )
    write_table(corpus / "dev_sent_emo.csv", MELD_HEADER, meld_row("Oh my God", "sadness", "negative", 0))
    write_table(corpus / "test_sent_emo.csv", MELD_HEADER, meld_row("Hey", "surprise", "positive", 0))
    write_tone(corpus / "train_splits/dia0_utt0.wav", 0.2)
    (corpus / "train_splits/dia0_utt0.mp4").write_bytes(b"video")
    (corpus / "train_splits/dia0_utt1.mp4").write_bytes(b"video")
    (corpus / "train_splits/dia0_utt6.wav").write_bytes(b"")
    write_tone(corpus / "dev/dia0_utt0.flac", 0.3)
    write_tone(corpus / "output_repeated_splits_test/dia0_utt0.wav", 0.4)
    write_tone(corpus / "output_repeated_splits_test/final_videos_testdia0_utt0.wav", 0.9)
    assert prepare_meld(tmp_path, tmp_path / "out") == {"train": 1, "dev": 1, "test": 1, "skipped": 6}
    (train,) = read_manifest(tmp_path / "out/train.jsonl")
    assert (train["id"], train["speaker"]) == ("train-dia0_utt0", "The Interviewer")
    assert train["text"] == 'So let’s talk, "you" and I.'
    (dev,), (test,) = (read_manifest(tmp_path / f"out/{split}.jsonl") for split in ("dev", "test"))
    assert dev["intent"] == "sadness" and test["duration_seconds"] == pytest.approx(0.4)
    assert dev["slots"] == [{"name": "emotion", "value": "sadness"}, {"name": "sentiment", "value": "negative"}]
    reasons = skipped_reasons(tmp_path / "out")
    assert "dia0_utt1.mp4 is a video; take its sound out with ffmpeg" in reasons["train-dia0_utt1"]
    assert reasons["train-dia0_utt2"] == "no dia0_utt2.wav or .flac in train_splits/ or train/"
    assert reasons["train-dia0_utt3"].startswith("emotion 'bored' is none of neutral, joy")
    assert reasons["train-dia0_utt4"].startswith("sentiment 'mixed' is none of negative, neutral, positive")
    assert "not a row of" in reasons["train_sent_emo.csv:7"]
    assert "empty or not audio" in reasons["train-dia0_utt6"]


def test_stray_windows_characters_are_mended_and_others_left_alone():
    assert mend_text("company\x92s \x93new\x94 caf\u00e9\x81 \u2019") == "company’s “new” café ’"


def snips_query(*chunks: str | tuple[str, str]) -> dict[str, Any]:
    """A query of Snips' format from plain texts and (slot name, text) pairs."""
    data = [
        {"text": chunk} if isinstance(chunk, str) else {"text": chunk[1], "entity": chunk[0], "slot_name": chunk[0]}
        for chunk in chunks
    ]
    return {"data": data}


def write_snips_dataset(path: Path, intents: dict[str, list[dict[str, Any]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"language": "en", "intents": {name: {"utterances": queries} for name, queries in intents.items()}}
    path.write_text(json.dumps(content))


def test_snips_lights_are_split_by_text_and_broken_recordings_are_named(tmp_path):
    corpus = tmp_path / "smart-lights-en-close-field"
    queries = [snips_query("dim the ", ("room", f"room {index}"), " now\n") for index in range(60)]
    write_snips_dataset(corpus / "dataset.json", {"SwitchLightOn": [snips_query("lights on")], "SetLight": queries})
    texts = ["lights on", *(f"dim the room {index} now\n" for index in range(60)), "never asked for", ""]
    entries = {
        str(number): {"filename": f"{number}.wav", "text": text, "worker": {"id": f"worker-{number % 7}"}}
        for number, text in enumerate(texts)
    }
    entries["99"] = {"filename": "99.wav"}
    for number in range(len(texts)):
        write_tone(corpus / f"speech_corpus/audio/{number}.wav", 0.1)
    (corpus / "speech_corpus/audio/13.wav").unlink()
    (corpus / "speech_corpus/metadata.json").write_text(json.dumps(entries))
    counts = prepare_snips(corpus, tmp_path / "out")
    assert counts["train"] + counts["dev"] + counts["test"] == 60 and counts["skipped"] == 4
    rows = {name: list(read_manifest(tmp_path / f"out/{name}.jsonl")) for name in ("train", "dev", "test")}
    assert all(query_split(row["text"], "dataset") == name for name in rows for row in rows[name])
    assert 36 <= counts["train"] <= 58
    by_id = {row["id"]: row for name in rows for row in rows[name]}
    assert by_id["smart-lights-en-close-field-0"]["intent"] == "SwitchLightOn"
    dim = by_id["smart-lights-en-close-field-3"]
    assert (dim["text"], dim["intent"], dim["speaker"]) == ("dim the room 2 now", "SetLight", "worker-3")
    assert dim["slots"] == [{"name": "room", "value": "room 2"}] and dim["language"] == "en"
    reasons = skipped_reasons(tmp_path / "out")
    assert reasons["smart-lights-en-close-field-13"].endswith("13.wav does not exist")
    assert reasons["smart-lights-en-close-field-61"] == "no query has the text 'never asked for'"
    assert reasons["smart-lights-en-close-field-62"] == "its transcript is empty"
    assert reasons["metadata.json:99"] == "not a recording: KeyError: 'text'"


def test_snips_loudspeaker_keeps_its_own_test_set(tmp_path):
    corpus = tmp_path / "smart-speaker-en-close-field"
    write_snips_dataset(corpus / "training_dataset.json", {"Next": [snips_query("next"), snips_query("play both")]})
    test = [snips_query("play ", ("artist", "abba")), snips_query("play both")]
    write_snips_dataset(corpus / "test_dataset.json", {"Play": test})
    texts = ["next", "play abba", "play both"]
    entries = [{"path_file": f"audio/{index}.wav", "text": text} for index, text in enumerate(texts)]
    (corpus / "metadata.json").write_text(json.dumps(entries))
    for index in range(3):
        write_tone(corpus / f"audio/{index}.wav", 0.1)
    assert prepare_snips(corpus, tmp_path / "out") == {"train": 1, "dev": 0, "test": 2, "skipped": 0}
    abba, both = read_manifest(tmp_path / "out/test.jsonl")
    assert (abba["text"], abba["slots"], abba["speaker"]) == ("play abba", [{"name": "artist", "value": "abba"}], None)
    assert both["intent"] == "Play"  # of the test set, where it is scored


def test_snips_splits_are_tenths_by_the_hash_of_the_text():
    for text in ("lights on", "turn the kitchen blue", "a", "b", "c", "d", "e", "f"):
        bucket = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 100
        assert query_split(text, "dataset") == ("train" if bucket < 80 else "dev" if bucket < 90 else "test")
        assert query_split(text, "training_dataset") == ("train" if bucket < 90 else "dev")
        assert query_split(text, "test_dataset") == "test"
    splits = [query_split(f"query {index}", "dataset") for index in range(2000)]
    assert 0.77 < splits.count("train") / 2000 < 0.83 and 0.08 < splits.count("dev") / 2000 < 0.12


def test_broken_snips_files_are_named(tmp_path):
    (tmp_path / "dataset.json").write_text("{broken")
    with pytest.raises(ValueError, match="dataset.json is not JSON"):
        prepare_snips(tmp_path, tmp_path / "out")
    (tmp_path / "dataset.json").write_text('{"language": "en"}')
    with pytest.raises(ValueError, match=r"dataset.json is no Snips data set \(KeyError\('intents'\)\)"):
        prepare_snips(tmp_path, tmp_path / "out")
    write_snips_dataset(tmp_path / "dataset.json", {})
    with pytest.raises(ValueError, match="metadata.json does not exist; expected dataset.json and speech_corpus/"):
        prepare_snips(tmp_path, tmp_path / "out")
    (tmp_path / "metadata.json").write_text("3")
    with pytest.raises(ValueError, match="metadata.json holds a int, not the recordings"):
        prepare_snips(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (prepare_fluent_speech_commands, "lacks data/train_data.csv, data/valid_data.csv, data/test_data.csv"),
        (prepare_stop, "has none of manifests/train.tsv"),
        (prepare_meld, "lacks train_sent_emo.csv, dev_sent_emo.csv, test_sent_emo.csv"),
        (prepare_snips, "has neither dataset.json nor training_dataset.json"),
    ],
)
def test_another_folder_is_refused_with_what_is_expected(prepare, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("prepare", "table", "message"),
    [
        (prepare_fluent_speech_commands, "data/train_data.csv", "lacks the columns"),
        (prepare_stop, "manifests/train.tsv", "lacks the columns"),
        (prepare_meld, "train_sent_emo.csv", "lacks the columns"),
    ],
)
def test_a_table_without_its_columns_is_refused(prepare, table, message, tmp_path):
    for name in (table, *(table.replace("train", split) for split in ("valid", "dev", "test"))):
        write_table(tmp_path / name, "a,b\tc", "1,2\t3")
    with pytest.raises(ValueError, match=f"{Path(table).name} {message}"):
        prepare(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("script", "where"),
    [
        (fluent_speech_commands, "https://fluent.ai/fluent-speech-commands"),
        (stop, "https://dl.fbaipublicfiles.com/stop/LICENSE.txt"),
        (meld, "https://affective-meld.github.io"),
        (snips, "https://github.com/sonos/spoken-language-understanding-research-datasets"),
    ],
)
def test_download_is_refused_with_where_to_get_the_corpus(script, where, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        script.main(["--download", "--corpus-dir", str(tmp_path), "--output-dir", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert end.value.code == 2 and "--download is not available" in error and where in error


@pytest.mark.parametrize("script", [fluent_speech_commands, stop, meld, snips])
def test_help_has_the_layout_in_full(script, capsys):
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    assert end.value.code == 0 and script.__doc__.strip() in capsys.readouterr().out
