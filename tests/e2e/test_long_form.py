"""The real teacher on two minutes of read speech, in chunks and window after window."""

import sys

import pytest
import soundfile
import torch
from conftest import ROOT

from speechkd.data.audio import load_audio
from speechkd.data.manifest import write_manifest
from speechkd.evaluate import evaluate_asr
from speechkd.files import read_jsonl
from speechkd.labels.pseudo_label import DecodingConfig
from speechkd.metrics.hallucination import five_gram_duplicates
from speechkd.models.long_form import LongFormConfig

LJSPEECH = ROOT.parent / "shared/data/ljspeech"
RATE_HZ = 16_000
MIN_SECONDS = 120
pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not LJSPEECH.is_dir(), reason="no LJ Speech beside the checkout")]


@pytest.fixture(scope="module")
def long_manifest(tmp_path_factory):
    """Consecutive sentences of one reader, joined without pauses."""
    folder = tmp_path_factory.mktemp("long")
    clips, texts = [], []
    for line in (LJSPEECH / "metadata.csv").read_text(encoding="utf-8").splitlines():
        key, _, text = line.split("|")
        clips.append(load_audio(next(LJSPEECH.rglob(f"{key}.*")), RATE_HZ))
        texts.append(text)
        if sum(map(len, clips)) >= MIN_SECONDS * RATE_HZ:
            break
    joined = torch.cat(clips)
    soundfile.write(folder / "lj.wav", joined.numpy(), RATE_HZ)
    row = {"id": "lj", "audio": "lj.wav", "duration_seconds": len(joined) / RATE_HZ, "sample_rate_hz": RATE_HZ}
    write_manifest(folder / "long.jsonl", [{**row, "text": " ".join(texts)}])
    return folder / "long.jsonl"


@pytest.mark.parametrize("method", ["chunked", "sequential"])
def test_two_minutes_of_read_speech_are_transcribed_well(long_manifest, tmp_path, method):
    metrics = evaluate_asr(
        "bundled:whisper-base",
        long_manifest,
        tmp_path,
        decoding=DecodingConfig(batch_size=4),
        long_form=LongFormConfig(method=method),
    )
    sys.stdout.write(f"\n{method}: WER {metrics['wer']:.2f} %, RTFx {metrics['rtfx']:.1f}\n")
    assert metrics["audio_seconds"] >= MIN_SECONDS and metrics["num_reference_words"] > 300
    assert metrics["wer"] < 10 and metrics["deletion_error_rate"] < 3  # nothing is lost between windows
    (row,) = read_jsonl(tmp_path / "hypotheses.jsonl")
    repeated_by_the_reader, _ = five_gram_duplicates([row["reference"]], "english")
    assert metrics["five_gram_duplicates"] <= repeated_by_the_reader  # and nothing is written twice
