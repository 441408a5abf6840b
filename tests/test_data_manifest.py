import json

import pytest

from speechkd.data.manifest import ManifestError, read_manifest, write_manifest


def test_rows_come_back_with_absolute_audio_paths(tone_manifest):
    manifest = read_manifest(tone_manifest)
    assert len(manifest) == 6 and manifest.ids[0] == "tone-0"
    assert manifest[1]["audio"] == str(tone_manifest.parent / "audio/1.wav")
    assert manifest[1]["text"] == "a tone" and manifest[1]["speaker"] is None
    assert manifest.durations_seconds.sum() == pytest.approx(9.0)
    assert manifest.select([4, 0]).ids == ["tone-4", "tone-0"]


def test_a_dialect_is_an_optional_text(tone_manifest):
    rows = [json.loads(line) for line in tone_manifest.read_text().splitlines()]
    write_manifest(tone_manifest, [{**rows[0], "dialect": "Hiberno-English"}, rows[1]])
    assert [row["dialect"] for row in read_manifest(tone_manifest)] == ["Hiberno-English", None]
    write_manifest(tone_manifest, [{**rows[0], "dialect": 3}])
    with pytest.raises(ManifestError, match="'tone-0' has dialect=3, a int where another type belongs"):
        read_manifest(tone_manifest)


def test_a_changed_file_is_read_again(tone_manifest):
    rows = [json.loads(line) for line in tone_manifest.read_text().splitlines()]
    assert len(read_manifest(tone_manifest)) == 6
    write_manifest(tone_manifest, rows[:2])
    assert len(read_manifest(tone_manifest)) == 2


def test_all_problems_are_reported_at_once_with_file_and_line(tone_manifest):
    good = tone_manifest.read_bytes().splitlines(keepends=True)
    lines = [
        good[0],
        good[0],  # duplicate id
        b'{"id": "b\xff"}\n',
        b"not json\n",
        b'{"id": "c", "audio": "audio/0.wav", "duration_seconds": -1, "sample_rate_hz": 16000}\n',
        b'{"id": "d", "audio": "audio/no.wav", "duration_seconds": 1, "sample_rate_hz": 16000}\n',
        b'{"id": "e", "audio": "audio/0.wav", "duration_seconds": "1", "txt": "x"}\n',
    ]
    tone_manifest.write_bytes(b"".join(lines))
    with pytest.raises(ManifestError) as error:
        read_manifest(tone_manifest)
    message = str(error.value)
    name = str(tone_manifest)
    assert f"{name}:2: repeats the id of line 1" in message
    assert f"{name}:3: not UTF-8 (byte 0xff at column 10)" in message
    assert f"{name}:4: not JSON" in message
    assert f"{name}:5: utterance 'c' has duration_seconds=-1" in message
    assert f"{name}:6: utterance 'd': audio file" in message and "no.wav does not exist" in message
    assert f"{name}:7: utterance 'e' lacks the field 'sample_rate_hz'" in message
    assert "unknown field 'txt'" in message


def test_an_empty_and_a_missing_manifest_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ManifestError, match="empty.jsonl holds no utterance"):
        read_manifest(tmp_path / "empty.jsonl")
    with pytest.raises(ManifestError, match="no.jsonl does not exist"):
        read_manifest(tmp_path / "no.jsonl")
