"""whisper.cpp on our files: whisper-base and a cut student on LJ Speech."""

from pathlib import Path

import pytest
import torch
from conftest import ROOT

from speechkd.data.audio import load_audio
from speechkd.data.collate import WhisperTokens
from speechkd.data.features import SAMPLE_RATE_HZ, WhisperLogMel
from speechkd.export.ggml import export_ggml, ggml_transcriber
from speechkd.metrics.wer import error_rates
from speechkd.models.whisper import greedy_decode, student_from_teacher
from speechkd.teachers import load_processor, load_whisper, resolve_model

pytest.importorskip("pywhispercpp", exc_type=ImportError)
DATA = ROOT.parent / "shared/data/ljspeech"
pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not DATA.is_dir(), reason="no real recordings beside the checkout")]


@pytest.fixture(scope="module")
def clips() -> list[torch.Tensor]:
    return [load_audio(path, SAMPLE_RATE_HZ) for path in sorted(DATA.rglob("*.flac"))[:2]]


def pytorch_texts(folder: str | Path, clips: list[torch.Tensor], max_new_tokens: int) -> list[str]:
    model, tokenizer = load_whisper(str(folder)), load_processor(str(folder)).tokenizer
    tokens = WhisperTokens.from_tokenizer(tokenizer)
    texts = []
    for clip in clips:
        with torch.no_grad():
            states = model.model.encoder(WhisperLogMel()(clip.unsqueeze(0))).last_hidden_state
        decoded = greedy_decode(model, states, tokens, max_new_tokens=max_new_tokens)[0]
        texts.append(tokenizer.decode(decoded.token_ids, skip_special_tokens=True).strip())
    return texts


def ggml_texts(
    folder: str | Path, clips: list[torch.Tensor], output_dir: Path, precision: str, max_new_tokens: int
) -> list[str]:
    output_dir.mkdir()
    export_ggml(Path(folder), output_dir, precision=precision)
    transcribe = ggml_transcriber(output_dir, language="en", task="transcribe", max_new_tokens=max_new_tokens)
    return [transcribe(clip.numpy()) for clip in clips]


def test_the_teacher_says_the_same_in_f16_and_nearly_so_in_q5_0_at_a_third_of_the_size(tmp_path, clips):
    folder = resolve_model("bundled:whisper-base")
    expected = pytorch_texts(folder, clips, max_new_tokens=100)
    texts = {name: ggml_texts(folder, clips, tmp_path / name, name, 100) for name in ("f16", "q5_0")}
    assert error_rates(expected, texts["f16"], "english").wer < 3
    assert error_rates(expected, texts["q5_0"], "english").wer < 15
    sizes = {name: (tmp_path / name / "ggml-model.bin").stat().st_size for name in texts}
    assert sizes["q5_0"] < 0.4 * sizes["f16"]


def test_a_student_of_two_decoder_layers_and_a_clip_under_a_second_run(tmp_path, clips):
    teacher = load_whisper("bundled:whisper-base")
    student_from_teacher(teacher, decoder_layers=2).save_pretrained(tmp_path / "student")
    load_processor("bundled:whisper-base").save_pretrained(tmp_path / "student")
    clips = [clips[0], clips[0][: SAMPLE_RATE_HZ // 2]]
    # untrained it soon rambles, where the last bit decides
    expected = pytorch_texts(tmp_path / "student", clips, max_new_tokens=4)
    assert all(expected)
    assert ggml_texts(tmp_path / "student", clips, tmp_path / "ggml", "f16", 4) == expected
