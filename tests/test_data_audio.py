import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import write_tone
from transformers import WhisperFeatureExtractor

from speechkd.data.audio import AudioError, load_audio, load_utterance, pcm16_to_float
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


FORMATS = [("wav", 8_000), ("wav", 16_000), ("wav", 44_100), ("flac", 16_000), ("flac", 44_100), ("ogg", 16_000)]


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("suffix", "rate_hz"), [*FORMATS, ("ogg", 44_100), ("mp3", 16_000), ("mp3", 44_100)])
def test_int16_samples_are_those_of_float32_rounded(tmp_path, suffix, rate_hz, channels):
    write_tone(tmp_path / f"a.{suffix}", 0.5, rate_hz, channels)
    as_float = load_audio(tmp_path / f"a.{suffix}", 16_000)
    as_int = load_audio(tmp_path / f"a.{suffix}", 16_000, dtype=torch.int16)
    assert as_int.dtype == torch.int16 and as_int.shape == as_float.shape and as_int.abs().max() > 2000
    assert (pcm16_to_float(as_int) - as_float).abs().max() <= 0.501 / 32768


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_int16_samples_of_a_16_bit_file_are_exactly_its_own(tmp_path, suffix):
    samples = np.random.default_rng(0).integers(-32768, 32768, 4000).astype(np.int16)
    soundfile.write(tmp_path / f"a.{suffix}", samples, 16_000, subtype="PCM_16")
    loaded = load_audio(tmp_path / f"a.{suffix}", 16_000, dtype=torch.int16)
    assert np.array_equal(loaded.numpy(), samples)
    assert torch.equal(pcm16_to_float(loaded), load_audio(tmp_path / f"a.{suffix}", 16_000))


def test_int16_samples_clip_where_a_float_file_is_louder_than_full_scale(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.array([1.5, -1.5, 0.0], dtype=np.float32), 16_000, subtype="FLOAT")
    assert load_audio(tmp_path / "a.wav", 16_000, dtype=torch.int16).tolist() == [32767, -32768, 0]


def test_pcm_becomes_float_below_one_and_other_dtypes_are_refused():
    assert pcm16_to_float(torch.tensor([-32768, 16384, 32767], dtype=torch.int16)).tolist() == [-1, 0.5, 32767 / 32768]
    floats = torch.rand(2, 3)
    assert pcm16_to_float(floats) is floats
    with pytest.raises(ValueError, match="must be torch.int16 or torch.float32, got torch.int64"):
        pcm16_to_float(torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="got dtype=torch.float16"):
        load_audio("a.wav", 16_000, dtype=torch.float16)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_bytes_and_tar_members_decode_as_the_file_does(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    write_tone(path, 1.0)
    with tarfile.open(tmp_path / "b.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.add(path, f"0.{suffix}")
    for dtype in (torch.float32, torch.int16):
        limits = {"offset_seconds": 0.25, "duration_seconds": 0.5, "dtype": dtype}
        expected = load_audio(path, 16_000, **limits)
        assert torch.equal(load_audio(path.read_bytes(), 16_000, **limits), expected)
        assert torch.equal(load_audio(f"{tmp_path}/b.tar#0.{suffix}", 16_000, **limits), expected)


def test_a_member_that_cannot_be_read_is_an_audio_error_naming_it(tmp_path):
    with tarfile.open(tmp_path / "b.tar", "w", format=tarfile.USTAR_FORMAT):
        pass
    with pytest.raises(AudioError, match=r"b.tar#0.flac: .*has no member '0.flac'"):
        load_audio(f"{tmp_path}/b.tar#0.flac", 16_000)
    with pytest.raises(AudioError, match="no.tar#0.flac: .*cannot be opened"):
        load_audio(tmp_path / "no.tar#0.flac", 16_000)


def test_broken_bytes_are_named_by_their_utterance():
    utterance = {"id": "clip-7", "audio": b"not audio", "offset_seconds": None, "duration_seconds": 1.0}
    with pytest.raises(AudioError, match="utterance 'clip-7': audio of 9 bytes: cannot be decoded"):
        load_utterance(utterance, 16_000)
    with pytest.raises(AudioError, match=r"utterance 'clip-7': audio is empty \(0 bytes\)"):
        load_utterance({**utterance, "audio": b""}, 16_000, torch.int16)


def with_wav_bytes(path: Path, num_bytes: int) -> Path:
    """The file, whose header now promises this many bytes of samples."""
    content = bytearray(path.read_bytes())
    content[40:44] = struct.pack("<I", num_bytes)
    path.write_bytes(content)
    return path


def with_flac_samples(path: Path, num_samples: int) -> Path:
    """The file, whose STREAMINFO now says this many samples; 0 means unknown."""
    content = bytearray(path.read_bytes())
    fields = int.from_bytes(content[18:26], "big") >> 36 << 36 | num_samples
    content[18:26] = fields.to_bytes(8, "big")
    path.write_bytes(content)
    return path


def test_a_header_that_promises_more_than_there_is_is_refused_without_a_known_duration(tmp_path):
    write_tone(tmp_path / "a.wav", 1.0)
    with pytest.raises(AudioError, match="a.wav: truncated, 1.00 s of 10.00 s could be read"):
        load_audio(with_wav_bytes(tmp_path / "a.wav", 320_000), 16_000)
    assert len(load_audio(with_wav_bytes(tmp_path / "a.wav", 0xFFFFFFFF), 16_000)) == 16_000  # written into a pipe
    for suffix in ("wav", "flac", "mp3"):
        write_tone(tmp_path / f"half.{suffix}", 2.0)
        content = (tmp_path / f"half.{suffix}").read_bytes()
        for source in (content[: len(content) // 2], content[: len(content) // 3]):
            with pytest.raises(AudioError, match="truncated|cannot be decoded"):
                load_audio(source, 16_000)


@pytest.mark.parametrize("num_samples", [0, 64_000, 2**36 - 1])
def test_a_flac_with_a_wrong_or_unknown_length_is_refused_without_asking_for_its_memory(tmp_path, num_samples):
    write_tone(tmp_path / "a.flac", 1.0)
    with pytest.raises(AudioError, match="a.flac: (its header does not say|cannot be decoded|truncated)"):
        load_audio(with_flac_samples(tmp_path / "a.flac", num_samples), 16_000)


def test_silence_is_not_taken_for_a_header_that_promises_too_much(tmp_path):
    soundfile.write(tmp_path / "silence.flac", np.zeros(600 * 16_000, dtype=np.int16), 16_000)
    assert len(load_audio(tmp_path / "silence.flac", 16_000, dtype=torch.int16)) == 600 * 16_000


def test_a_rate_that_only_a_corrupt_header_has_is_refused(tmp_path):
    write_tone(tmp_path / "a.wav", 1.0)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[24:28] = struct.pack("<I", 1_999_993)
    with pytest.raises(AudioError, match="has 1999993 samples a second, which cannot be resampled to 16000 Hz"):
        load_audio(bytes(content), 16_000)
    content[24:28] = bytes(4)
    with pytest.raises(AudioError, match="cannot be decoded"):
        load_audio(bytes(content), 16_000)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_damage_anywhere_gives_samples_or_an_audio_error_and_nothing_else(tmp_path, suffix):
    write_tone(tmp_path / f"a.{suffix}", 0.3)
    content = (tmp_path / f"a.{suffix}").read_bytes()
    generator = np.random.default_rng(0)
    num_refused = 0
    for _ in range(60):
        damaged = bytearray(content)
        for position in generator.integers(0, min(len(content), 200), 4):
            damaged[position] = generator.integers(0, 256)
        damaged = damaged[: generator.integers(1, len(damaged) + 1)]
        try:
            assert len(load_audio(bytes(damaged), 16_000, duration_seconds=0.3)) > 0
        except AudioError:
            num_refused += 1
    assert num_refused > 20
