import logging
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT
from torch.utils.data import DataLoader, Dataset

from speechkd.config import parse_config
from speechkd.data.audio import AudioError, load_audio
from speechkd.data.augment import (
    SpecAugmentConfig,
    WaveformAugment,
    WaveformAugmentConfig,
    change_speed,
    find_audio,
    load_noise,
    mix_noise,
    reverberate,
    spec_augment,
    utterance_seed,
)

LJSPEECH = ROOT.parent / "shared/data/ljspeech"
RATE_HZ = 16_000


def make_noise(num_samples: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(num_samples, generator=torch.Generator().manual_seed(seed))


def make_tone(pitch_hz: float, seconds: float = 1.0) -> torch.Tensor:
    return 0.3 * torch.sin(2 * torch.pi * pitch_hz * torch.arange(round(seconds * RATE_HZ)) / RATE_HZ)


def pitch_hz(waveform: torch.Tensor) -> float:
    spectrum = torch.fft.rfft(waveform * torch.hann_window(len(waveform)), n=16 * RATE_HZ).abs()
    return spectrum.argmax().item() / 16


def snr_db(clean: torch.Tensor, mixed: torch.Tensor) -> float:
    return (10 * (clean.double().square().sum() / (mixed - clean).double().square().sum()).log10()).item()


@pytest.fixture
def noise_dir(tmp_path: Path) -> Path:
    """Noises at three rates, one of them shorter than the clips, in two folders."""
    folder = tmp_path / "noise"
    (folder / "more").mkdir(parents=True)
    for name, seconds, rate_hz in (("a.wav", 4.0, 16_000), ("more/b.flac", 3.0, 22_050), ("more/c.wav", 0.3, 8_000)):
        soundfile.write(folder / name, make_noise(round(seconds * rate_hz), seed=len(name)).numpy(), rate_hz)
    return folder


@pytest.fixture
def impulse_response_dir(tmp_path: Path) -> Path:
    """Decaying noise after a direct sound that does not stand at the beginning."""
    folder = tmp_path / "rooms"
    folder.mkdir()
    for name in ("hall", "room"):
        response = 0.3 * make_noise(8000, seed=len(name)) * torch.exp(-torch.arange(8000) / 1500)
        response[:100], response[100] = 0, 0.9
        soundfile.write(folder / f"{name}.wav", response.numpy(), RATE_HZ)
    return folder


@pytest.fixture
def augment(noise_dir: Path, impulse_response_dir: Path) -> WaveformAugment:
    config = WaveformAugmentConfig(
        speed_factors=[0.9, 1.0, 1.1], noise_dir=str(noise_dir), impulse_response_dir=str(impulse_response_dir)
    )
    return WaveformAugment(config, RATE_HZ, seed=1)


class AugmentedClips(Dataset):
    def __init__(self, augment: WaveformAugment, num_clips: int) -> None:
        self.augment, self.num_clips = augment, num_clips

    def __len__(self) -> int:
        return self.num_clips

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.augment(make_noise(2000, seed=index), f"clip-{index}", epoch=2)


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.1, 1.15, 0.5, 2.0])
def test_speed_divides_the_length_and_multiplies_the_pitch(factor):
    faster = change_speed(make_tone(440.0), factor)
    assert len(faster) == -(-RATE_HZ * 100 // round(100 * factor))
    assert pitch_hz(faster) == pytest.approx(440.0 * factor, abs=0.5)
    assert faster.square().mean().sqrt() == pytest.approx(0.3 / 2**0.5, rel=0.02)


def test_speed_one_changes_nothing():
    clip = make_noise(1000)
    assert torch.equal(change_speed(clip, 1.0), clip)


@pytest.mark.parametrize("factor", [0.0, -1.0, 0.905, 3.0, float("nan")])
def test_unusable_speeds_are_refused(factor):
    with pytest.raises(ValueError, match="speed factor .* must be 0.5 to 2 in steps of 0.01"):
        WaveformAugmentConfig(speed_factors=[1.0, factor])


@pytest.mark.parametrize("wanted_db", [-5.0, 0.0, 12.3, 40.0])
@pytest.mark.parametrize("noise_level", [1e-4, 1.0])
def test_the_mix_has_the_wanted_ratio(wanted_db, noise_level):
    clean = make_tone(300.0)
    mixed = mix_noise(clean, noise_level * make_noise(len(clean)), wanted_db)
    assert snr_db(clean, mixed) == pytest.approx(wanted_db, abs=0.01)


def test_silent_clips_and_silent_noise_leave_the_clip_as_it_is():
    clip, silence = make_noise(500), torch.zeros(500)
    assert torch.equal(mix_noise(silence, clip, 10.0), silence)
    assert torch.equal(mix_noise(clip, silence, 10.0), clip)
    assert torch.equal(mix_noise(clip, silence + 1e-30, 10.0), clip)


def test_ratios_are_drawn_over_the_whole_range(noise_dir):
    config = WaveformAugmentConfig(noise_dir=str(noise_dir), noise_probability=1.0, min_snr_db=5.0, max_snr_db=15.0)
    augment = WaveformAugment(config, RATE_HZ, seed=0)
    clean = make_tone(300.0, seconds=0.2)
    ratios = [snr_db(clean, augment(clean, f"clip-{index}", epoch=0)) for index in range(60)]
    assert 4.99 < min(ratios) < 6.5 and 13.5 < max(ratios) < 15.01
    assert abs(np.mean(ratios) - 10.0) < 1.5


def test_the_share_of_clips_with_noise_is_the_probability(noise_dir):
    augment = WaveformAugment(WaveformAugmentConfig(noise_dir=str(noise_dir), noise_probability=0.3), RATE_HZ, seed=0)
    clean = make_tone(300.0, seconds=0.05)
    noisy = sum(not torch.equal(augment(clean, f"clip-{index}", epoch=0), clean) for index in range(200))
    assert 35 < noisy < 85  # 60 +- 4 standard deviations


def test_reverberation_is_linear_convolution_aligned_to_the_direct_sound():
    clip = make_noise(4000)
    for taps, direct in ((1000, 0), (1000, 300), (9000, 5000)):
        response = 0.2 * make_noise(taps, seed=1)
        response[direct] = -1.0
        expected = np.convolve(clip.double(), response.double())[direct : direct + 4000]
        expected *= clip.abs().mean().item() / np.abs(expected).mean()
        np.testing.assert_allclose(reverberate(clip, response).numpy(), expected, atol=1e-5)


def test_silence_and_single_samples_can_be_reverberated():
    response = make_noise(1000)
    assert torch.equal(reverberate(torch.zeros(500), response), torch.zeros(500))
    torch.testing.assert_close(reverberate(torch.tensor([0.5]), response).abs(), torch.tensor([0.5]))


def test_noise_is_cut_or_repeated_to_the_length(noise_dir):
    whole = load_audio(noise_dir / "a.wav", RATE_HZ)
    part = load_noise(noise_dir / "a.wav", RATE_HZ, 8000, position=0.5)
    start = round(0.5 * (4.0 - 0.51) * RATE_HZ)
    assert torch.equal(part, whole[start : start + 8000])
    short = load_audio(noise_dir / "more/c.wav", RATE_HZ)
    repeated = load_noise(noise_dir / "more/c.wav", RATE_HZ, 8000, position=0.0)
    assert torch.equal(repeated, torch.cat([short, short])[:8000])
    for path in find_audio(noise_dir):
        for position in (0.0, 0.37, 0.999):
            for num_samples in (1, 4801, 47_840, 48_000, 70_001):
                assert len(load_noise(path, RATE_HZ, num_samples, position)) == num_samples


def test_the_same_seed_gives_the_same_bits_and_anything_else_does_not(augment):
    clip = make_noise(8000)
    first = augment(clip, "clip", epoch=3)
    torch.manual_seed(99)
    random.seed(99)
    again = WaveformAugment(augment.config, RATE_HZ, seed=1)(clip, "clip", epoch=3)
    assert torch.equal(first, again)
    others = [augment(clip, "clip", epoch=4), augment(clip, "clip2", epoch=3)]
    others.append(WaveformAugment(augment.config, RATE_HZ, seed=2)(clip, "clip", epoch=3))
    assert not any(torch.equal(first, other) for other in others)


def test_seeds_are_fixed_numbers_and_all_differ():
    assert utterance_seed(0, 0, "clip", "noise") == 2896429170735840607
    keys = [(s, e, u, p) for s in (1, 11) for e in (1, 11) for u in ("a", "1\na") for p in ("noise", "speed")]
    assert len({utterance_seed(*key) for key in keys}) == len(keys)


def test_switching_noise_off_does_not_change_the_other_draws(augment):
    clip = make_tone(300.0, seconds=0.3)
    config = WaveformAugmentConfig(speed_factors=augment.config.speed_factors)
    only_speed = WaveformAugment(config, RATE_HZ, seed=1)
    for index in range(20):
        assert only_speed.speed_factor(f"clip-{index}", 0) == augment.speed_factor(f"clip-{index}", 0)
        factor = augment.speed_factor(f"clip-{index}", 0)
        assert len(augment(clip, f"clip-{index}", 0)) == -(-len(clip) * 100 // round(100 * factor))


def test_every_speed_is_drawn_about_equally_often(augment):
    drawn = [augment.speed_factor(f"clip-{index}", epoch) for index in range(100) for epoch in range(3)]
    assert all(70 < drawn.count(factor) < 130 for factor in (0.9, 1.0, 1.1))


def test_the_number_of_workers_changes_nothing(augment):
    clips = AugmentedClips(augment, 12)
    results = [list(DataLoader(clips, batch_size=None, num_workers=n)) for n in (0, 2)]
    for one, other in zip(*results, strict=True):  # sums of other numbers of threads differ in the last digit
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_global_random_states_are_left_alone(augment):
    features = torch.randn(2, 80, 50)
    torch.manual_seed(0)
    random.seed(0)
    expected = torch.rand(1), random.random()
    torch.manual_seed(0)
    random.seed(0)
    augment(make_noise(500), "clip", epoch=0)
    spec_augment(features, torch.tensor([50, 20]), ["a", "b"], SpecAugmentConfig(), seed=0, epoch=0)
    assert (torch.rand(1), random.random()) == expected


def test_loud_results_are_scaled_into_the_range_of_pcm(noise_dir):
    config = WaveformAugmentConfig(noise_dir=str(noise_dir), noise_probability=1.0, min_snr_db=0.0, max_snr_db=0.0)
    augmented = WaveformAugment(config, RATE_HZ, seed=0)(3 * make_tone(300.0), "clip", epoch=0)
    assert augmented.abs().max() == 1.0


@pytest.mark.parametrize("num_samples", [1, 2, 100])
def test_very_short_and_silent_clips_stay_finite(augment, num_samples):
    for index in range(20):
        assert augment(make_noise(num_samples), f"clip-{index}", epoch=0).isfinite().all()
        assert (augment(torch.zeros(num_samples), f"clip-{index}", epoch=0) == 0).all()


def test_a_clip_without_samples_is_named(augment):
    with pytest.raises(AudioError, match="utterance 'clip' has no samples"):
        augment(torch.zeros(0), "clip", epoch=0)


def test_without_settings_nothing_changes():
    clip = make_noise(100)
    assert torch.equal(WaveformAugment(WaveformAugmentConfig(), RATE_HZ, seed=0)(clip, "clip", epoch=0), clip)


def test_a_missing_or_empty_folder_is_refused_at_the_start(tmp_path):
    with pytest.raises(ValueError, match="no is not a folder; give one with noise"):
        WaveformAugment(WaveformAugmentConfig(noise_dir=str(tmp_path / "no")), RATE_HZ, seed=0)
    (tmp_path / "README.txt").write_text("noise comes later")
    for config in (
        WaveformAugmentConfig(noise_dir=str(tmp_path)),
        WaveformAugmentConfig(impulse_response_dir=str(tmp_path)),
    ):
        with pytest.raises(ValueError, match=r"holds no audio \(.flac, .mp3, .ogg, .wav\); unpack the noise"):
            WaveformAugment(config, RATE_HZ, seed=0)


def test_a_broken_noise_file_loses_no_clip_and_is_named_once(noise_dir, caplog):
    (noise_dir / "broken.wav").write_text("not audio")
    config = WaveformAugmentConfig(noise_dir=str(noise_dir), noise_probability=1.0)
    augment = WaveformAugment(config, RATE_HZ, seed=0)
    clean = make_tone(300.0, seconds=0.1)
    with caplog.at_level(logging.WARNING):
        for index in range(30):
            assert not torch.equal(augment(clean, f"clip-{index}", epoch=0), clean)
    assert [record.message for record in caplog.records if "broken.wav: cannot be decoded" in record.message]
    assert len(caplog.records) == 1


def test_folders_with_nothing_usable_are_an_error(tmp_path):
    for name, config in (
        ("noises", WaveformAugmentConfig(noise_dir=str(tmp_path), noise_probability=1.0)),
        ("impulse responses", WaveformAugmentConfig(impulse_response_dir=str(tmp_path), reverberation_probability=1.0)),
    ):
        soundfile.write(tmp_path / "a.wav", np.zeros(0), RATE_HZ)
        with pytest.raises(AudioError, match=f"10 {name} drawn from {tmp_path}"):
            WaveformAugment(config, RATE_HZ, seed=0)(make_noise(100), "clip", epoch=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_probability": 1.5}, "noise_probability must be 0 to 1, got 1.5"),
        ({"reverberation_probability": float("nan")}, "reverberation_probability must be 0 to 1, got nan"),
        ({"min_snr_db": 20.0, "max_snr_db": 10.0}, "min_snr_db=20.0 and max_snr_db=10.0"),
        ({"max_snr_db": float("inf")}, "must be finite"),
    ],
)
def test_impossible_waveform_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        WaveformAugmentConfig(**settings)


@pytest.mark.parametrize("settings", [{"num_time_masks": -1}, {"max_time_mask_fraction": 1.1}])
def test_impossible_mask_settings_are_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be 0 .*got"):
        SpecAugmentConfig(**settings)


def test_settings_come_from_yaml(tmp_path):
    path = tmp_path / "augment.yaml"
    path.write_text("speed_factors: [0.9, 1.0]\nnoise_dir: musan\n")
    config, _ = parse_config(WaveformAugmentConfig, ["--config", str(path), "--min_snr_db", "0"])
    assert (config.speed_factors, config.noise_dir, config.min_snr_db) == ([0.9, 1.0], "musan", 0.0)


def make_features(num_frames: list[int]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    features = torch.randn(len(num_frames), 80, max(num_frames), generator=torch.Generator().manual_seed(0)) + 3
    return features, torch.tensor(num_frames), [f"clip-{row}" for row in range(len(num_frames))]


def mask_widths(masked: torch.Tensor) -> list[int]:
    """Lengths of the runs of True, (positions,)."""
    edges = [0, *(torch.nonzero(masked[1:] != masked[:-1]).flatten() + 1).tolist(), len(masked)]
    return [end - start for start, end in pairwise(edges) if masked[start]]


def test_masks_are_bands_and_stretches_of_the_mean_within_the_true_length():
    features, num_frames, ids = make_features([300, 120, 30] * 10)
    config = SpecAugmentConfig(num_time_masks=1, max_time_mask_frames=40, num_frequency_masks=1)
    masked = spec_augment(features, num_frames, ids, config, seed=0, epoch=0)
    changed = masked != features
    frames, bins = changed.all(dim=1), torch.zeros(len(ids), 80, dtype=torch.bool)
    for row, length in enumerate(num_frames.tolist()):
        bins[row] = changed[row, :, :length].all(dim=1)
        assert not changed[row, :, length:].any()
        expected = bins[row, :, None] | frames[row, None, :length]
        assert torch.equal(changed[row, :, :length], expected)
        assert sum(mask_widths(frames[row])) <= min(39, 0.2 * length)
        assert len(mask_widths(frames[row])) <= 1 and sum(mask_widths(bins[row])) <= 26
        values = masked[row][changed[row]]
        torch.testing.assert_close(values, features[row, :, :length].mean().expand_as(values))
    assert frames.any(dim=1).sum() > 20 and bins.any(dim=1).sum() > 20
    assert len({tuple(row.tolist()) for row in bins}) > 20


def test_masks_do_not_depend_on_batch_or_padding_but_on_the_epoch():
    features, num_frames, ids = make_features([200, 90, 150])
    config = SpecAugmentConfig()
    together = spec_augment(features, num_frames, ids, config, seed=0, epoch=1)
    for row, length in enumerate(num_frames.tolist()):
        clip = features[row : row + 1, :, :length]
        alone = spec_augment(clip, num_frames[row : row + 1], [ids[row]], config, seed=0, epoch=1)
        assert torch.equal(alone[0], together[row, :, :length])
    assert not torch.equal(spec_augment(features, num_frames, ids, config, seed=0, epoch=2), together)
    assert not torch.equal(spec_augment(features, num_frames, ids, config, seed=1, epoch=1), together)


def test_no_masks_and_empty_batches_change_nothing():
    features, num_frames, ids = make_features([50, 1])
    for config in (
        SpecAugmentConfig(num_time_masks=0, num_frequency_masks=0),
        SpecAugmentConfig(max_time_mask_frames=0, max_frequency_mask_bins=0),
    ):
        assert torch.equal(spec_augment(features, num_frames, ids, config, seed=0, epoch=0), features)
    empty = spec_augment(features[:0], num_frames[:0], [], SpecAugmentConfig(), seed=0, epoch=0)
    assert empty.shape == (0, 80, 50)
    unheard = spec_augment(features, torch.tensor([0, 1]), ids, SpecAugmentConfig(), seed=0, epoch=0)
    assert torch.equal(unheard[0], features[0]) and unheard.isfinite().all()


def test_masks_refuse_ids_and_lengths_of_another_batch():
    features, num_frames, ids = make_features([50, 40])
    with pytest.raises(ValueError, match="1 utterance ids for a batch of 2"):
        spec_augment(features, num_frames, ids[:1], SpecAugmentConfig(), seed=0, epoch=0)
    with pytest.raises(ValueError, match="length 51 does not fit rows padded to 50"):
        spec_augment(features, num_frames + 1, ids, SpecAugmentConfig(), seed=0, epoch=0)


@pytest.mark.skipif(not LJSPEECH.is_dir(), reason=f"{LJSPEECH} does not exist")
def test_real_recordings_can_be_augmented(augment):
    files = sorted((LJSPEECH / "wavs").iterdir())
    assert len(files) >= 32
    for path in files:
        clean = load_audio(path, RATE_HZ)
        augmented = augment(clean, path.name, epoch=0)
        factor = augment.speed_factor(path.name, epoch=0)
        assert len(augmented) == -(-len(clean) * 100 // round(100 * factor))
        assert augmented.isfinite().all() and 0.01 < augmented.abs().max() <= 1.0
