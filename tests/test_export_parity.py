import json
import logging

import pytest

from speechkd.cli import main
from speechkd.data.manifest import write_manifest
from speechkd.export import export_model
from speechkd.export.parity import check_parity, compare_texts
from speechkd.export.transcribers import load_transcriber
from speechkd.labels.decoding import DecodingConfig
from speechkd.teachers import load_whisper, teacher_identity

DECODING = DecodingConfig(max_new_tokens=4)
SETTINGS = {"language": "en", "task": "transcribe", "max_new_tokens": 4}


def test_equal_texts_are_counted_and_the_others_shown_with_both():
    found = compare_texts(["a", "b", "c"], ["one two", "Three.", ""], ["one two", "three.", ""])
    assert (found["num_clips"], found["num_equal"]) == (3, 2)
    assert found["wer"] == pytest.approx(100 / 3)
    assert found["differing"] == [{"id": "b", "source": "Three.", "export": "three."}]
    assert compare_texts(["a"], [""], ["so"])["wer"] is None


def test_clips_that_cannot_be_decoded_are_left_out_and_named(tone_manifest, caplog):
    (tone_manifest.parent / "audio/1.wav").write_bytes(b"no audio")
    with caplog.at_level(logging.WARNING):
        found = check_parity(lambda clip: str(len(clip)), lambda clip: "x", tone_manifest, max_clips=3)
    assert (found["num_clips"], found["num_skipped"], found["num_equal"]) == (2, 1, 0)
    assert [pair["source"] for pair in found["differing"]] == ["16000", "22400"]
    assert "tone-1" in caplog.text
    write_manifest(tone_manifest, [json.loads(tone_manifest.read_text().splitlines()[1])])
    with pytest.raises(ValueError, match="none of the 1 clips"):
        check_parity(str, str, tone_manifest)


def test_the_command_exports_compares_and_says_what_was_made_of_what(tiny_teacher, tone_manifest, tmp_path, capsys):
    output_dir = tmp_path / "exports/half"
    arguments = ["export", "--model", tiny_teacher, "--format", "huggingface", "--output-dir", str(output_dir)]
    arguments += ["--manifest", str(tone_manifest), "--max-clips", "2", "--max-new-tokens", "4"]
    main([*arguments, "--precision", "float16", "--json"])
    result = json.loads(capsys.readouterr().out)
    export = json.loads((output_dir / "export.json").read_text())
    assert export.items() <= result.items()
    assert (export["format"], export["precision"]) == ("huggingface", "float16")
    assert export["model"] == teacher_identity(tiny_teacher, load_whisper(tiny_teacher))
    assert (export["encoder_layers"], export["decoder_layers"]) == (2, 3)
    parity = json.loads((output_dir / "parity.json").read_text())
    assert export["parity"]["num_clips"] == 2 and parity["num_equal"] + len(parity["differing"]) == 2
    assert load_whisper(str(output_dir), dtype="auto").dtype.itemsize == 2
    assert [path.name for path in output_dir.parent.iterdir()] == ["half"]
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2 and "is not empty; choose another one or remove it" in capsys.readouterr().err


def test_without_a_manifest_the_missing_check_is_told(tiny_teacher, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        result = export_model(tiny_teacher, "huggingface", tmp_path / "out")
    assert result["parity"] is None and "NO PARITY CHECK" in caplog.text
    assert not (tmp_path / "out/parity.json").exists()


def test_an_export_that_fails_leaves_nothing_and_what_a_killed_one_left_is_not_taken_over(
    tiny_teacher, tone_manifest, tmp_path
):
    broken = tmp_path / "broken.jsonl"
    write_manifest(broken, [json.loads(tone_manifest.read_text().splitlines()[0])])
    (tmp_path / "audio/0.wav").write_bytes(b"no audio")
    with pytest.raises(ValueError, match="none of the 1 clips"):
        export_model(tiny_teacher, "huggingface", tmp_path / "out", manifest_path=broken, decoding=DECODING)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.tmp").exists()
    (tmp_path / ".out.tmp/export").mkdir(parents=True)
    (tmp_path / ".out.tmp/export/half").touch()
    export_model(tiny_teacher, "huggingface", tmp_path / "out")
    assert not (tmp_path / "out/half").exists() and not (tmp_path / ".out.tmp").exists()


def test_bad_requests_are_refused_before_anything_is_loaded(tiny_teacher, tmp_path):
    with pytest.raises(ValueError, match="onnx has no precision 'int4'; choose one of float32, int8"):
        export_model("no/model", "onnx", tmp_path / "out", precision="int4")
    with pytest.raises(ValueError, match="max_clips must be 1 or more, got 0"):
        export_model("no/model", "onnx", tmp_path / "out", max_clips=0)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is not empty"):
        export_model("no/model", "onnx", tmp_path / "file")
    (tmp_path / "export.json").write_text('{"format": "onnx"}')
    with pytest.raises(ValueError, match="is an export already"):
        export_model(str(tmp_path), "onnx", tmp_path / "out")


def test_spoiled_and_unknown_exports_are_named(tmp_path):
    for content, message in (("{", "is no JSON"), ("[]", "does not say"), ('{"format": "tape"}', "names the format")):
        (tmp_path / "export.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_transcriber(str(tmp_path), **SETTINGS)


def test_an_unknown_language_is_refused(tiny_teacher):
    with pytest.raises(ValueError, match="does not know the language 'xx'"):
        load_transcriber(tiny_teacher, **SETTINGS | {"language": "xx"})
