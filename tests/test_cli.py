import itertools
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from speechkd import doctor
from speechkd.cli import main, run_command
from speechkd.models.speech_encoders import save_encoder


def test_label_and_evaluate_print_json_and_finish_with_0(tiny_teacher, tone_manifest, tmp_path, capsys):
    common = ["--manifest", str(tone_manifest), "--max-new-tokens", "5", "--json"]
    main(["label", "--teacher", tiny_teacher, "--output-dir", str(tmp_path / "labels"), *common])
    assert json.loads(capsys.readouterr().out)["num_utterances"] == 6
    main(["evaluate", "--model", tiny_teacher, "--output-dir", str(tmp_path / "scores"), *common])
    assert json.loads(capsys.readouterr().out)["num_utterances"] == 6


def test_bad_input_ends_with_2_and_its_message(tmp_path):
    arguments = ["label", "--teacher", "bundled:whisper-base"]
    arguments += ["--manifest", str(tmp_path / "no.jsonl"), "--output-dir", str(tmp_path / "out")]
    code = "import sys; from speechkd.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 2
    assert "no.jsonl does not exist; write it with a script of data_prep/" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "asr"], "evaluate --task asr needs --model and --manifest and --output-dir"),
        (["--model", "m", "--output-dir", "out"], "evaluate --task asr needs --manifest"),
        (["--task", "slurp", "--gold", "gold.jsonl"], "evaluate --task slurp needs --predictions"),
        (
            ["--task", "slurp", "--gold", "g", "--predictions", "p", "--model", "m"],
            "evaluate --task slurp does not use --model",
        ),
        (
            ["--model", "m", "--manifest", "f", "--output-dir", "out", "--gold", "g"],
            "evaluate --task asr does not use --gold",
        ),
    ],
)
def test_evaluate_says_what_its_task_lacks_or_does_not_use(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(["evaluate", *arguments])
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(WhisperEncoder(WhisperConfig(**sizes)).eval(), folder, normalize_input=False)
    return str(folder)


def test_encoders_are_exported_and_compared_without_a_manifest(tiny_encoder, tmp_path, capsys):
    program = str(tmp_path / "program")
    main(["export", "--model", tiny_encoder, "--format", "torch_export", "--output-dir", program, "--json"])
    assert json.loads(capsys.readouterr().out)["format"] == "torch_export"
    main(["bench", "--models", tiny_encoder, program, "--seconds", "0.5", "--rounds", "1", "--json"])
    assert [model["name"] for model in json.loads(capsys.readouterr().out)["models"]] == [tiny_encoder, program]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--manifest", "clips.jsonl", "--models"], "cannot transcribe; leave --manifest out"),
        (["bench", "--max-clips", "3", "--models"], "--max-clips are for models that transcribe; give --manifest"),
        (
            ["export", "--format", "onnx", "--output-dir", "out", "--window-seconds", "5", "--model"],
            "of any length; leave",
        ),
        (["export", "--format", "ggml", "--output-dir", "out", "--model"], "encoders have no format 'ggml'"),
    ],
)
def test_what_is_for_transcription_is_refused_for_encoders(arguments, message, tiny_encoder, capsys):
    with pytest.raises(SystemExit) as error:
        main([*arguments, tiny_encoder])
    assert error.value.code == 2 and message in capsys.readouterr().err


def raises(error):
    raise error


def test_a_loss_that_is_not_finite_ends_with_1_and_a_bug_keeps_its_traceback():
    with pytest.raises(SystemExit) as error:
        run_command(lambda: raises(FloatingPointError("the loss is nan")))
    assert error.value.code == 1
    with pytest.raises(KeyError):
        run_command(lambda: raises(KeyError("bug")))


def test_a_signal_at_any_step_of_a_command_ends_with_75(monkeypatch):
    """Until its handler is taken off again: a signal just after the command's last line was once a traceback."""
    before, codes, num_steps = signal.getsignal(signal.SIGTERM), [], itertools.count()

    def signal_at(step):
        def trace(frame, event, argument):
            if signal.getsignal(signal.SIGTERM) is not before and next(num_steps) == step:
                signal.raise_signal(signal.SIGTERM)
            return trace

        return trace

    for step in range(100):
        num_steps = itertools.count()
        sys.settrace(signal_at(step))
        try:
            run_command(lambda: None)
        except SystemExit as error:
            codes.append(error.code)
        finally:
            sys.settrace(None)
            signal.signal(signal.SIGTERM, before)
        if next(num_steps) <= step:  # the command ended before
            break
    assert codes == [75] * step and step > 5


def test_doctor_says_why_a_cpu_stays_in_float32(tone_manifest):
    facts = doctor.examine(str(tone_manifest))
    assert facts["manifest"]["num_utterances"] == 6
    assert facts["matmul_gflops"]["float32"] > 0
    if "cores" in facts["device"]:
        slower = facts["matmul_gflops"]["bfloat16"] < facts["matmul_gflops"]["float32"]
        assert any(("keep float32" if slower else "stays in float32") in advice for advice in facts["advice"])


@pytest.mark.parametrize("command", ["label", "evaluate", "bench", "doctor"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as error:
        main([command, "--help"])
    assert error.value.code == 0 and "--json" in capsys.readouterr().out
