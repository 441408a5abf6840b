"""Small real objects that several tests need: recordings on disk and a tiny random Whisper."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may wait for a network

import hypothesis
import pytest
import soundfile
import torch
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor

from speechkd.bundled import bundled_path
from speechkd.data.collate import WhisperTokens
from speechkd.data.manifest import write_manifest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "data_prep"), str(ROOT / "recipes/distil_whisper")]

# the same examples each time, so that a change is judged by what it does; HYPOTHESIS_PROFILE=default looks for new ones
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

TOKENS = WhisperTokens(
    start_of_transcript=50258,
    start_of_prev=50361,
    no_timestamps=50363,
    no_speech=50362,
    end_of_text=50257,
    prefix=(50258, 50259, 50359, 50363),
)


def tiny_whisper(decoder_layers: int = 4, vocab_size: int = 51865) -> WhisperForConditionalGeneration:
    """Random Whisper of width 16 with Whisper's own vocabulary size and context."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=vocab_size,
        d_model=16,
        encoder_layers=2,
        decoder_layers=decoder_layers,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
    )
    return WhisperForConditionalGeneration(config).eval()


def write_tone(
    path: Path, seconds: float = 1.0, rate_hz: int = 16_000, channels: int = 1, pitch_hz: float = 220.0
) -> None:
    """A quiet tone as a wav, flac, ogg or mp3 file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    time = torch.arange(round(seconds * rate_hz)) / rate_hz
    tone = 0.1 * torch.sin(2 * torch.pi * pitch_hz * time)
    soundfile.write(path, tone[:, None].expand(-1, channels).numpy(), rate_hz)


@pytest.fixture
def tone_manifest(tmp_path: Path) -> Path:
    """Six tones of 1 to 2 s with texts."""
    rows = []
    for index in range(6):
        seconds = 1.0 + 0.2 * index
        write_tone(tmp_path / f"audio/{index}.wav", seconds, pitch_hz=200 + 50 * index)
        rows.append(
            {
                "id": f"tone-{index}",
                "audio": f"audio/{index}.wav",
                "duration_seconds": seconds,
                "sample_rate_hz": 16_000,
                "text": "a tone",
            }
        )
    write_manifest(tmp_path / "tones.jsonl", rows)
    return tmp_path / "tones.jsonl"


@pytest.fixture(scope="session")
def hubert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random HuBERT, see `saved_teacher`."""
    from recipe_runs import saved_teacher

    return saved_teacher(tmp_path_factory.mktemp("teachers") / "hubert", "hubert")


@pytest.fixture(scope="session")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random Whisper that hears 2 s, see `saved_teacher`."""
    from recipe_runs import saved_teacher

    return saved_teacher(tmp_path_factory.mktemp("teachers") / "whisper", "whisper")


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny random Whisper with the real vocabulary, which loads as any teacher."""
    folder = tmp_path_factory.mktemp("tiny-teacher")
    bundled = bundled_path("whisper-base")
    model = tiny_whisper(decoder_layers=3)
    model.generation_config = GenerationConfig.from_pretrained(bundled)
    model.generation_config.alignment_heads = [[2, 0]]
    model.save_pretrained(folder)
    WhisperProcessor.from_pretrained(bundled).save_pretrained(folder)
    return str(folder)
