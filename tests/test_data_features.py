import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from torchaudio.compliance import kaldi
from transformers import (
    HubertConfig,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperFeatureExtractor,
)

from speechkd.data.audio import load_audio
from speechkd.data.features import (
    KaldiFbank,
    WhisperLogMel,
    WhisperWindow,
    clip_by_clip_on_cpu,
    kaldi_num_frames,
    normalize_waveforms,
    padding_mask,
)

LJSPEECH = ROOT.parent / "shared/data/ljspeech"
LENGTHS = [16_000, 47_123, 400, 30_559]


def make_clips(lengths: list[int] = LENGTHS) -> list[torch.Tensor]:
    """Noise at different levels, with an offset from zero."""
    generator = torch.Generator().manual_seed(0)
    return [0.02 + 0.3 / 10**row * torch.randn(n, generator=generator) for row, n in enumerate(lengths)]


def pad(clips: list[torch.Tensor], fill: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Batch padded with `fill`, and lengths."""
    padded = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=fill)
    return padded, torch.tensor([len(clip) for clip in clips])


def assert_equal_to_kaldi(clips: list[torch.Tensor], num_mels: int) -> None:
    features, num_frames = KaldiFbank(num_mels)(*pad(clips))
    assert features.dtype == torch.float32 and features.shape[2] == num_mels
    for row, clip in enumerate(clips):
        expected = kaldi.fbank(clip[None], num_mel_bins=num_mels, dither=0.0)
        assert num_frames[row] == len(expected)
        assert (features[row, : len(expected)] - expected).abs().max() < 1e-3
        assert (features[row, len(expected) :] == 0).all()


def assert_equal_to_extractor(clips: list[torch.Tensor]) -> None:
    values, mask = normalize_waveforms(*pad(clips))
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    expected = extractor([c.numpy() for c in clips], sampling_rate=16_000, padding=True, return_tensors="pt")
    assert torch.equal(mask.int(), expected.attention_mask)
    assert (values - expected.input_values).abs().max() < 1e-4
    assert (values[~mask] == 0).all()


@pytest.mark.parametrize("num_mels", [23, 80, 128])
def test_fbank_of_a_batch_equals_kaldi_clip_by_clip(num_mels):
    assert_equal_to_kaldi(make_clips(), num_mels)


def test_fbank_ignores_what_stands_in_the_padding():
    clips = make_clips()
    expected, _ = KaldiFbank()(*pad(clips))
    for fill in (9.0, float("nan")):
        features, _ = KaldiFbank()(*pad(clips, fill))
        assert torch.equal(features, expected)


def test_fbank_of_a_clip_does_not_depend_on_the_batch():
    clips = make_clips()
    together, num_frames = KaldiFbank()(*pad(clips))
    for row, clip in enumerate(clips):
        alone, _ = KaldiFbank()(*pad([clip]))
        torch.testing.assert_close(together[row, : num_frames[row]], alone[0], atol=1e-5, rtol=0)


def test_clips_shorter_than_a_frame_have_no_frames():
    lengths = [0, 1, 399, 400, 559, 560]
    features, num_frames = KaldiFbank()(*pad(make_clips(lengths)))
    assert num_frames.tolist() == [0, 0, 0, 1, 1, 2] == kaldi_num_frames(torch.tensor(lengths)).tolist()
    assert (features[:3] == 0).all() and (features[3, 1:] == 0).all()
    features, num_frames = KaldiFbank()(torch.ones(2, 10), torch.tensor([10, 0]))
    assert num_frames.tolist() == [0, 0] and (features == 0).all()


def test_silence_gives_kaldis_floor():
    features, _ = KaldiFbank()(torch.zeros(1, 1600), torch.tensor([1600]))
    torch.testing.assert_close(features, torch.full((1, 8, 80), 1.1920929e-07).log())


def test_features_are_float32_under_autocast():
    batch, num_samples = pad(make_clips())
    fbank, log_mel = KaldiFbank(), WhisperLogMel()
    expected = fbank(batch, num_samples)[0], normalize_waveforms(batch, num_samples)[0], log_mel(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fbank(batch, num_samples)[0], normalize_waveforms(batch, num_samples)[0], log_mel(batch)
    for one, other in zip(expected, found, strict=True):
        assert other.dtype == torch.float32 and torch.equal(one, other)


def test_too_few_filters_are_refused():
    with pytest.raises(ValueError, match="num_mels=3 is too few.*ask for 4 or more"):
        KaldiFbank(3)


def test_normalised_waveforms_equal_the_feature_extractor():
    assert_equal_to_extractor(make_clips())


def test_normalisation_ignores_what_stands_in_the_padding():
    clips = make_clips()
    expected, _ = normalize_waveforms(*pad(clips))
    values, mask = normalize_waveforms(*pad(clips, float("nan")))
    assert torch.equal(values, expected) and (values[~mask] == 0).all()


def test_silence_and_single_samples_are_normalised_to_zero():
    waveforms = torch.tensor([[0.0, 0.0, 0.0], [0.5, 9.0, 9.0], [0.5, 0.5, 0.5]])
    values, mask = normalize_waveforms(waveforms, torch.tensor([3, 1, 0]))
    assert (values == 0).all() and mask.sum(dim=1).tolist() == [3, 1, 0]


@pytest.mark.parametrize(
    ("model_class", "config_class"), [(Wav2Vec2Model, Wav2Vec2Config), (HubertModel, HubertConfig)]
)
def test_models_take_the_mask_and_ignore_the_padding(model_class, config_class):
    torch.manual_seed(0)
    config = config_class(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        feat_extract_norm="layer",
        conv_dim=(8, 8),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    model = model_class(config).eval()
    values, mask = normalize_waveforms(*pad(make_clips([2000, 800])))
    with torch.no_grad():
        states = model(values, attention_mask=mask).last_hidden_state
        expected = model(values, attention_mask=mask.long()).last_hidden_state
        alone = model(values[1:, :800], attention_mask=mask[1:, :800]).last_hidden_state
    assert torch.equal(states, expected)
    torch.testing.assert_close(states[1:, : alone.shape[1]], alone, atol=1e-4, rtol=0)


def test_lengths_that_do_not_fit_are_refused():
    batch = torch.zeros(2, 800)
    with pytest.raises(ValueError, match="length 801 does not fit rows padded to 800"):
        normalize_waveforms(batch, torch.tensor([800, 801]))
    with pytest.raises(ValueError, match="length -1 does not fit"):
        KaldiFbank()(batch, torch.tensor([-1, 800]))
    with pytest.raises(ValueError, match=r"lengths of shape \(3,\) for 2 rows"):
        padding_mask(torch.tensor([1, 2, 3]), batch)


def test_an_empty_batch_is_refused():
    batch, num_samples = torch.zeros(0, 800), torch.zeros(0, dtype=torch.int64)
    for compute in (lambda: KaldiFbank()(batch, num_samples), lambda: WhisperLogMel()(batch)):
        with pytest.raises(ValueError, match="a batch of 0 clips has no features"):
            compute()
    assert normalize_waveforms(batch, num_samples)[0].shape == (0, 800)


@pytest.mark.parametrize("num_samples", [1, 159, 160, 161, 399, 400, 16_000, 479_519, 479_520, 479_700, 480_000])
def test_log_mel_of_any_length_equals_the_feature_extractor(num_samples):
    clip = make_clips([num_samples])[0]
    expected = WhisperFeatureExtractor()(clip.numpy(), sampling_rate=16_000, return_tensors="pt").input_features
    assert (WhisperLogMel()(clip[None]) - expected).abs().max() < 1e-3


def test_features_are_the_same_clip_by_clip_and_all_at_once():
    batch, _ = pad(make_clips())
    for module in (WhisperLogMel(), KaldiFbank()):
        one_by_one = clip_by_clip_on_cpu(module._log_mel, batch)
        torch.testing.assert_close(one_by_one, module._log_mel(batch), atol=1e-4, rtol=0)


@pytest.mark.skipif(not LJSPEECH.is_dir(), reason=f"{LJSPEECH} does not exist")
def test_real_recordings_equal_the_reference_extractors():
    files = sorted(path for path in Path(LJSPEECH).rglob("*") if path.suffix in {".wav", ".flac", ".mp3"})
    assert len(files) >= 32
    clips = sorted((load_audio(path, 16_000) for path in files), key=len)
    for start in range(0, len(clips), 8):
        batch = clips[start : start + 8]
        assert_equal_to_kaldi(batch, 80)
        assert_equal_to_extractor(batch)
    last = clips[-4:]
    expected = WhisperFeatureExtractor()([c.numpy() for c in last], sampling_rate=16_000, return_tensors="pt")
    assert (WhisperLogMel()(pad(last)[0]) - expected.input_features).abs().max() < 1e-3


def test_a_whisper_computes_its_window_or_clips_rounded_up_to_a_grid():
    lengths = torch.tensor([1, 320, 16_000, 16_001, 479_999])
    assert WhisperWindow().num_positions(lengths).tolist() == [1500] * 5
    assert WhisperWindow(30.0, 1.0).num_positions(lengths).tolist() == [50, 50, 50, 100, 1500]
    assert WhisperWindow(15.0, 0.64).num_positions(torch.tensor([10_240, 10_241, 240_000])).tolist() == [32, 64, 750]
    heard = WhisperWindow(15.0, 0.64).heard_seconds(np.array([0.64, 3.0, 14.9]))
    assert heard.tolist() == pytest.approx([0.64, 3.2, 15.0])


@pytest.mark.parametrize("grid_seconds", [-0.2, 0.0, 0.03, 15.02, math.inf, math.nan])
def test_a_grid_is_of_whole_positions_within_the_window(grid_seconds):
    with pytest.raises(ValueError, match="grid_seconds must be a multiple of 0.02 up to 15, got"):
        WhisperWindow(15.0, grid_seconds)
