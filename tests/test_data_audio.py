import numpy as np
import pytest
import soundfile
import torch
from conftest import write_tone
from transformers import WhisperFeatureExtractor

from speechkd.data.audio import AudioError, load_audio, load_utterance
from speechkd.data.features import WhisperLogMel
from speechkd.data.loader import clip_batches, report_skipped
from speechkd.data.manifest import read_manifest


@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_any_rate_and_channel_count_becomes_mono_at_the_models_rate(tmp_path, rate_hz, channels):
    write_tone(tmp_path / "a.wav", 1.0, rate_hz, channels)
    samples = load_audio(tmp_path / "a.wav", 16_000)
    time = torch.arange(16_000) / 16_000
    expected = 0.1 * torch.sin(2 * torch.pi * 220.0 * time)
    assert samples.shape == (16_000,) and samples.dtype == torch.float32
    torch.testing.assert_close(samples[500:-500], expected[500:-500], atol=1e-3, rtol=0)


@pytest.mark.parametrize(("suffix", "tolerance"), [("wav", 1e-4), ("flac", 1e-4), ("ogg", 0.03), ("mp3", 0.03)])
def test_formats_decode_to_the_same_sound(tmp_path, suffix, tolerance):
    write_tone(tmp_path / f"a.{suffix}", 1.0)
    samples = load_audio(tmp_path / f"a.{suffix}", 16_000, duration_seconds=1.0)
    time = torch.arange(len(samples)) / 16_000
    expected = 0.1 * torch.sin(2 * torch.pi * 220.0 * time)
    assert (samples - expected)[2000:14000].abs().max() < tolerance


def test_an_offset_reads_a_part_of_a_file(tmp_path):
    write_tone(tmp_path / "a.wav", 3.0)
    whole = load_audio(tmp_path / "a.wav", 16_000)
    part = load_audio(tmp_path / "a.wav", 16_000, offset_seconds=1.0, duration_seconds=0.5)
    torch.testing.assert_close(part, whole[16_000:24_000])


def test_unusable_files_are_named_with_the_reason(tmp_path):
    with pytest.raises(AudioError, match="no.wav: audio file does not exist"):
        load_audio(tmp_path / "no.wav", 16_000)
    (tmp_path / "empty.wav").touch()
    with pytest.raises(AudioError, match=r"empty.wav: audio file is empty \(0 bytes\)"):
        load_audio(tmp_path / "empty.wav", 16_000)
    (tmp_path / "text.wav").write_text("not audio")
    with pytest.raises(AudioError, match="text.wav: cannot be decoded"):
        load_audio(tmp_path / "text.wav", 16_000)
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16_000)
    with pytest.raises(AudioError, match="none.wav: holds no samples"):
        load_audio(tmp_path / "none.wav", 16_000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.1, np.nan, 0.2], dtype=np.float32), 16_000, subtype="FLOAT")
    with pytest.raises(AudioError, match="nan.wav: 1 samples are NaN"):
        load_audio(tmp_path / "nan.wav", 16_000)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_a_truncated_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    write_tone(path, 2.0)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(AudioError, match="truncated|cannot be decoded"):
        load_audio(path, 16_000, duration_seconds=2.0)


def test_a_file_longer_than_its_manifest_says_is_refused(tmp_path):
    write_tone(tmp_path / "a.wav", 2.0)
    with pytest.raises(AudioError, match="lasts 2.00 s where 1.00 s are expected"):
        load_audio(tmp_path / "a.wav", 16_000, duration_seconds=1.0)


def test_the_error_names_the_utterance(tone_manifest):
    utterance = read_manifest(tone_manifest)[2]
    (tone_manifest.parent / "audio/2.wav").unlink()
    with pytest.raises(AudioError, match="utterance 'tone-2'.*does not exist"):
        load_utterance(utterance, 16_000)


def test_log_mel_equals_the_feature_extractor():
    generator = torch.Generator().manual_seed(0)
    clips = [0.3 * torch.randn(n, generator=generator) for n in (16_000, 47_123)]
    loud_and_quiet = torch.zeros(2, 47_123)
    loud_and_quiet[0, :16_000], loud_and_quiet[1] = clips[0] * 0.01, clips[1]
    for num_mels in (80, 128):
        extractor = WhisperFeatureExtractor(feature_size=num_mels)
        expected = extractor(
            [loud_and_quiet[0, :16_000].numpy(), clips[1].numpy()], sampling_rate=16_000, return_tensors="pt"
        ).input_features
        features = WhisperLogMel(num_mels)(loud_and_quiet)
        assert features.shape == (2, num_mels, 3000)
        assert (features - expected).abs().max() < 1e-3


def test_clips_above_the_window_are_refused():
    with pytest.raises(ValueError, match="30.00 s is longer|30.0. s is longer"):
        WhisperLogMel()(torch.zeros(1, 480_001))
    assert WhisperLogMel()(torch.zeros(1, 480_000)).shape == (1, 80, 3000)


def test_bad_clips_are_set_aside_and_the_others_kept(tone_manifest, tmp_path):
    (tone_manifest.parent / "audio/1.wav").write_bytes(b"")
    manifest = read_manifest(tone_manifest)
    batches = list(clip_batches(manifest, range(6), sample_rate_hz=16_000, batch_size=3, max_seconds=1.9))
    assert [u["id"] for b in batches for u in b.utterances] == ["tone-0", "tone-2", "tone-3", "tone-4"]
    skipped = [row for batch in batches for row in batch.skipped]
    assert [row["id"] for row in skipped] == ["tone-1", "tone-5"]
    assert "longer than the 2 s" in skipped[1]["reason"] or "lasts 2.0 s" in skipped[1]["reason"]
    report_skipped(skipped, 6, tmp_path / "out", 0.5)
    assert (tmp_path / "out/skipped.jsonl").read_text().count("\n") == 2
    with pytest.raises(AudioError, match=r"2 of 6 clips \(33.3 %\) were skipped.*at most 10.0 %.*tone-1"):
        report_skipped(skipped, 6, tmp_path / "out", 0.1)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_samples_are_those_of_a_float_read_bit_for_bit(tmp_path, subtype):
    samples = np.random.default_rng(0).uniform(-1, 1, (800, 2))
    soundfile.write(tmp_path / "clip.wav", samples, 16_000, subtype=subtype)
    expected, _ = soundfile.read(tmp_path / "clip.wav", dtype="float32")
    torch.testing.assert_close(
        load_audio(tmp_path / "clip.wav", 16_000), torch.from_numpy(expected).mean(dim=1), rtol=0, atol=0
    )
