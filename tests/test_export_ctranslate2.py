import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_whisper
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration
from transformers.models.whisper import WhisperFeatureExtractor

from speechkd.bundled import bundled_path
from speechkd.data.features import SAMPLE_RATE_HZ
from speechkd.export.ctranslate2 import CTRANSLATE2_PRECISIONS, Ctranslate2Transcriber, export_ctranslate2
from speechkd.export.ctranslate2 import valid_alignment_heads as valid
from speechkd.export.transcribers import huggingface_transcriber
from speechkd.teachers import load_processor

pytest.importorskip("ctranslate2", exc_type=ImportError)
OPTIONS = {"language": "en", "task": "transcribe"}


def noise(seconds: float, seed: int) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * SAMPLE_RATE_HZ)).astype(np.float32)


@pytest.fixture(scope="module")
def exported(tiny_teacher, tmp_path_factory):
    """Folders of all precisions; the model has two encoder layers and three decoder layers."""
    folders = {}
    for precision in CTRANSLATE2_PRECISIONS:
        folders[precision] = tmp_path_factory.mktemp(precision)
        export_ctranslate2(Path(tiny_teacher), folders[precision], precision=precision)
    return folders


@pytest.mark.parametrize("max_new_tokens", [1, 3, 9])
def test_float32_says_what_pytorch_says_up_to_the_same_token(tiny_teacher, exported, max_new_tokens):
    ours = Ctranslate2Transcriber(exported["float32"], **OPTIONS, max_new_tokens=max_new_tokens)
    theirs = huggingface_transcriber(tiny_teacher, **OPTIONS, max_new_tokens=max_new_tokens)
    clips = [noise(seconds, seed) for seed, seconds in enumerate((0.3, 1.0, 2.5))]
    texts = [ours(clip) for clip in clips]
    assert texts == [theirs(clip) for clip in clips]
    assert any(texts)


def test_clips_together_say_what_they_say_alone(exported):
    transcriber = Ctranslate2Transcriber(exported["float32"], **OPTIONS, max_new_tokens=6)
    clips = [noise(1.0, seed) for seed in range(3)]
    assert transcriber.transcribe_batch(np.stack(clips)) == [transcriber(clip) for clip in clips]


def test_precisions_differ_in_size(exported):
    sizes = {name: (folder / "model.bin").stat().st_size for name, folder in exported.items()}
    assert sizes["int8"] < 0.6 * sizes["float32"] and sizes["float16"] < 0.6 * sizes["float32"]
    assert sizes["int8_float16"] < sizes["int8"]


@pytest.mark.parametrize("precision", CTRANSLATE2_PRECISIONS)
def test_faster_whisper_loads_the_folder_and_gives_every_word_a_time(exported, precision):
    faster_whisper = pytest.importorskip("faster_whisper", exc_type=ImportError)
    model = faster_whisper.WhisperModel(str(exported[precision]), device="cpu", cpu_threads=1)
    assert model.hf_tokenizer.token_to_id("<|startoftranscript|>") == 50258
    # one segment: where a random model's int8 puts timestamp tokens depends on the processor
    options = {"language": "en", "beam_size": 1, "temperature": 0.0, "max_new_tokens": 8, "without_timestamps": True}
    [segment] = model.transcribe(noise(2.0, 0), word_timestamps=True, **options)[0]
    assert segment.words and segment.text.strip() == "".join(word.word for word in segment.words).strip()
    assert all(word.start <= word.end for word in segment.words)


def test_mel_bins_of_large_v3_reach_faster_whisper(tiny_teacher, tmp_path):
    faster_whisper = pytest.importorskip("faster_whisper", exc_type=ImportError)
    torch.manual_seed(0)
    config = WhisperConfig.from_pretrained(tiny_teacher, num_mel_bins=128)
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig.from_pretrained(tiny_teacher)
    model.save_pretrained(tmp_path / "model")
    processor = load_processor(tiny_teacher)
    processor.feature_extractor = WhisperFeatureExtractor(feature_size=128)
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "out").mkdir()
    export_ctranslate2(tmp_path / "model", tmp_path / "out", precision="int8")
    loaded = faster_whisper.WhisperModel(str(tmp_path / "out"), device="cpu", cpu_threads=1)
    assert loaded.feature_extractor.mel_filters.shape[0] == loaded.model.n_mels == 128


def test_alignment_heads_of_a_deeper_teacher_are_left_out(tmp_path):
    assert valid([[1, 1], [3, 2], [1, 8]], num_layers=2, num_heads=8) == [[1, 1]]
    assert valid([[5, 0]], num_layers=2, num_heads=2) == valid(None, 2, 2) == [[1, 0], [1, 1]]
    assert valid(None, num_layers=1, num_heads=1) == [[0, 0]]
    model = tiny_whisper(2)
    model.generation_config = GenerationConfig.from_pretrained(bundled_path("whisper-base"))  # heads of six layers
    model.save_pretrained(tmp_path / "model")
    load_processor("bundled:whisper-base").save_pretrained(tmp_path / "model")
    (tmp_path / "out").mkdir()
    export_ctranslate2(tmp_path / "model", tmp_path / "out", precision="float32")
    heads = json.loads((tmp_path / "out/config.json").read_text())["alignment_heads"]
    assert heads and all(layer < 2 and head < 2 for layer, head in heads)


def test_unknown_precision_missing_library_and_spoiled_folder_are_named(exported, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="'int4' is unknown; choose one of float32, float16, int8, int8_float16"):
        export_ctranslate2(tmp_path, tmp_path, precision="int4")
    with pytest.raises(ValueError, match="model.bin does not exist; make it with"):
        Ctranslate2Transcriber(tmp_path, **OPTIONS, max_new_tokens=4)
    for path in exported["int8"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = (tmp_path / "model.bin").read_bytes()
    (tmp_path / "model.bin").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="CTranslate2 cannot load .*export the model anew"):
        Ctranslate2Transcriber(tmp_path, **OPTIONS, max_new_tokens=4)
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(ValueError, match=r'ctranslate2, which is not installed; pip install "speechkd\[export\]"'):
        Ctranslate2Transcriber(exported["int8"], **OPTIONS, max_new_tokens=4)
