"""States of frozen encoders on disk: what is stored, what a kill leaves, what is skipped, and the disk it takes."""

import json
import shutil
from collections import namedtuple

import pytest
import torch
from conftest import write_tone
from transformers import HubertConfig, HubertModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from speechkd import features_store, frame_encoders
from speechkd.data.audio import AudioError, load_audio
from speechkd.data.features import KaldiFbank
from speechkd.data.manifest import read_manifest, write_manifest
from speechkd.export.encoder import export_encoder
from speechkd.features_store import FrameStates, features_folder, store_states, stored_states
from speechkd.frame_encoders import fitting_window_seconds, load_frame_encoder
from speechkd.labels.teacher_cache import LabelStore
from speechkd.models.pruning import GatedEncoder
from speechkd.models.speech_encoders import feature_extractor, save_encoder

SECONDS = (1.0, 0.5, 0.5, 0.31)


def save_hubert(folder, **changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    convolutions = {"conv_dim": [16] * 7, "num_conv_pos_embedding_groups": 2, "num_conv_pos_embeddings": 16}
    encoder = HubertModel(HubertConfig(**(sizes | convolutions | changes))).eval()
    save_encoder(encoder, folder, normalize_input=False)
    return encoder


def save_whisper(folder):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    save_encoder(WhisperEncoder(WhisperConfig(**sizes)).eval(), folder, normalize_input=False)


@pytest.fixture
def tones(tmp_path):
    rows = []
    for index, seconds in enumerate(SECONDS):
        write_tone(tmp_path / f"audio/{index}.wav", seconds, pitch_hz=200 + 50 * index)
        rows.append(
            {"id": f"t{index}", "audio": f"audio/{index}.wav", "duration_seconds": seconds, "sample_rate_hz": 16_000}
        )
    write_manifest(tmp_path / "tones.jsonl", rows)
    return tmp_path / "tones.jsonl"


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_stored_states_are_those_of_each_clip_alone(norm, tones, tmp_path):
    model = save_hubert(tmp_path / "hubert", feat_extract_norm=norm)
    encoder = load_frame_encoder(str(tmp_path / "hubert"))
    assert encoder.pads == (norm == "layer") and (encoder.num_layers, encoder.width) == (3, 32)
    states = stored_states([store_states(encoder, read_manifest(tones), tmp_path / "features", batch_size=4)])
    for index in range(len(SECONDS)):
        waveform = load_audio(tones.parent / f"audio/{index}.wav", 16_000)
        with torch.no_grad():
            alone = torch.cat(model(waveform[None], output_hidden_states=True).hidden_states)
        stored = states.arrays[f"t{index}"]
        assert stored.dtype == torch.float16 and stored.shape == alone.shape
        torch.testing.assert_close(stored.float(), alone, rtol=2e-3, atol=2e-3)


def test_a_whisper_hears_a_window_that_fits_and_keeps_frames_of_the_clip_alone(tones, tmp_path):
    save_whisper(tmp_path / "whisper")
    manifest = read_manifest(tones)
    encoder = load_frame_encoder(str(tmp_path / "whisper"), window_seconds=fitting_window_seconds([manifest]))
    assert encoder.max_seconds == 1.0
    store = store_states(encoder, manifest, tmp_path / "features")
    frames = {row["id"]: row["num_frames"] for row in store.rows()}
    assert frames == {"t0": 50, "t1": 25, "t2": 25, "t3": 16}
    assert stored_states([store]).arrays["t3"].shape == (3, 16, 16)
    assert load_frame_encoder(str(tmp_path / "whisper")).max_seconds == 30.0


def test_means_on_disk_and_in_memory_are_means_over_real_frames(tones, tmp_path):
    save_hubert(tmp_path / "hubert", feat_extract_norm="layer")
    encoder, manifest = load_frame_encoder(str(tmp_path / "hubert")), read_manifest(tones)
    frames = stored_states([store_states(encoder, manifest, tmp_path / "features")])
    on_disk = stored_states([store_states(encoder, manifest, tmp_path / "features", mean=True)])
    in_memory = frames.means(manifest.ids)
    for key in manifest.ids:
        assert on_disk.arrays[key].shape == (3, 1, 32)
        torch.testing.assert_close(on_disk.arrays[key].float(), in_memory.arrays[key], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(in_memory.arrays[key][:, 0], frames.arrays[key].float().mean(dim=1))


def test_log_mel_is_one_layer_of_filter_banks_whose_mean_says_something(tones, tmp_path):
    encoder = load_frame_encoder("log-mel")
    states = stored_states([store_states(encoder, read_manifest(tones), tmp_path / "features")])
    waveform = load_audio(tones.parent / "audio/1.wav", 16_000)
    banks, _ = KaldiFbank(80)(waveform[None], torch.tensor([len(waveform)]))
    torch.testing.assert_close(states.arrays["t1"].float(), (banks + 6) / 4, rtol=2e-3, atol=2e-3)
    assert (states.arrays["t0"].float().mean(dim=1) - states.arrays["t3"].float().mean(dim=1)).abs().max() > 0.1
    with pytest.raises(ValueError, match="log-mel has no weights to draw anew"):
        load_frame_encoder("log-mel", fresh_seed=0)


def test_fresh_weights_are_those_of_their_seed_and_another_encoder(tmp_path):
    save_hubert(tmp_path / "hubert")
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    own, first, again, other = (
        load_frame_encoder(str(tmp_path / "hubert"), fresh_seed=seed).identity["weights_sha256"]
        for seed in (None, 0, 0, 1)
    )
    assert first == again and len({own, first, other}) == 3
    assert torch.equal(before, torch.random.get_rng_state())


def test_fresh_weights_do_not_depend_on_the_window(tones, tmp_path):
    save_whisper(tmp_path / "whisper")
    waveform = load_audio(tones.parent / "audio/1.wav", 16_000)[None]
    states = []
    for seconds in (1, 2):
        encoder = load_frame_encoder(str(tmp_path / "whisper"), fresh_seed=0, window_seconds=seconds)
        with torch.no_grad():
            states.append(encoder.encode(waveform, torch.tensor([waveform.shape[1]]))[0][:, 0, :25])
    torch.testing.assert_close(states[0], states[1])  # of the first block's input, which hears no padding


def test_a_killed_run_goes_on_with_the_clips_that_are_missing(tones, tmp_path, monkeypatch):
    save_hubert(tmp_path / "hubert")
    encoder, manifest = load_frame_encoder(str(tmp_path / "hubert")), read_manifest(tones)
    monkeypatch.setattr(features_store, "SHARD_BYTES", 0)  # a shard for every group
    encode, calls = encoder.encode, []

    def encode_until_killed(waveforms, num_samples):
        calls.append(num_samples.tolist())
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(waveforms, num_samples)

    dying = frame_encoders.FrameEncoder(**{**vars(encoder), "encode": encode_until_killed})
    with pytest.raises(KeyboardInterrupt):
        store_states(dying, manifest, tmp_path / "features")
    folder = features_folder(tmp_path / "features", encoder, manifest, mean=False)
    done = [row["id"] for row in LabelStore(folder).rows()]
    assert 0 < len(done) < len(SECONDS)
    calls.clear()
    counting = frame_encoders.FrameEncoder(
        **{**vars(encoder), "encode": lambda *clips: calls.append(len(clips[1])) or encode(*clips)}
    )
    store = store_states(counting, manifest, tmp_path / "features")
    assert sum(calls) == len(SECONDS) - len(done)
    assert sorted(row["id"] for row in store.rows()) == sorted(manifest.ids)
    store_states(counting, manifest, tmp_path / "features")
    assert sum(calls) == len(SECONDS) - len(done)  # nothing was left


def test_bad_and_short_clips_are_named_and_left_out(tones, tmp_path):
    save_hubert(tmp_path / "hubert")
    (tones.parent / "audio/0.wav").write_bytes(b"no audio")
    write_tone(tones.parent / "audio/3.wav", 0.02)
    rows = rows_of(tones)
    rows[3]["duration_seconds"] = 0.02
    write_manifest(tones, rows)
    encoder, manifest = load_frame_encoder(str(tmp_path / "hubert")), read_manifest(tones)
    store = store_states(encoder, manifest, tmp_path / "features", max_skipped_fraction=0.5)
    assert sorted(row["id"] for row in store.rows()) == ["t1", "t2"]
    skipped = {row["id"]: row["reason"] for row in rows_of(store.folder / "skipped.jsonl")}
    assert skipped.keys() == {"t0", "t3"}
    assert "320 samples at 16 kHz are no frame, which takes 400" in skipped["t3"]
    with pytest.raises(AudioError, match="2 of 4 clips"):
        store_states(encoder, manifest, tmp_path / "features")


def test_a_disk_that_is_too_small_is_refused_before_anything_is_encoded(tones, tmp_path, monkeypatch):
    save_hubert(tmp_path / "hubert")
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 0, 10))
    encoder = load_frame_encoder(str(tmp_path / "hubert"))
    dumb = frame_encoders.FrameEncoder(**{**vars(encoder), "encode": None})
    with pytest.raises(ValueError, match=r"states of 4 clips, 0.0 h, need 0.0 GB .*--features-dir"):
        store_states(dumb, read_manifest(tones), tmp_path / "features")


def test_states_beyond_float16_are_refused(tones, tmp_path):
    encoder = load_frame_encoder("log-mel")
    loud = frame_encoders.FrameEncoder(
        **{**vars(encoder), "encode": lambda *clips: (encoder.encode(*clips)[0] * 1e6, encoder.encode(*clips)[1])}
    )
    with pytest.raises(ValueError, match="states of utterance 't0' reach .* float16"):
        store_states(loud, read_manifest(tones), tmp_path / "features")


def test_a_batch_is_padded_with_zeros_and_masked():
    arrays = {"a": torch.ones(2, 3, 4), "b": torch.ones(2, 1, 4)}
    states, mask = FrameStates(arrays).batch(["b", "a"])
    assert states.shape == (2, 2, 3, 4) and mask.tolist() == [[True, False, False], [True, True, True]]
    assert states[0, :, 1:].abs().max() == 0 and (states[1] == 1).all()
    with pytest.raises(ValueError, match="no states to probe"):
        FrameStates({})


def test_new_weights_of_a_pruned_encoder_have_its_widths(tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48}
    gated = GatedEncoder(WhisperEncoder(WhisperConfig(**sizes)), ["heads", "ffn_units"]).eval()
    with torch.no_grad():
        gated.gates["ffn_units"][0].logits[:30] = -20.0
        gated.gates["heads"][1].logits[:1] = -20.0
    pruned = gated.extract()
    pruned.save_pretrained(tmp_path)
    feature_extractor(pruned.encoder.config, normalize_input=False).save_pretrained(tmp_path)
    loaded, fresh, again, other = (
        load_frame_encoder(str(tmp_path), fresh_seed=seed, window_seconds=1) for seed in (None, 0, 0, 1)
    )
    assert fresh.identity == again.identity
    assert len({encoder.identity["weights_sha256"] for encoder in (loaded, fresh, other)}) == 3
    states = [encoder.encode(torch.randn(1, 8000), torch.tensor([8000]))[0] for encoder in (loaded, fresh)]
    assert states[0].shape == states[1].shape == (1, 3, 50, 32)
    encoder = frame_encoders._fresh_weights(str(tmp_path), pruned.encoder)
    theirs = pruned.encoder.state_dict()
    assert {name: weight.shape for name, weight in encoder.state_dict().items()} == {
        name: weight.shape for name, weight in theirs.items()
    }
    weights = encoder.layers[0].fc1.weight
    assert len(weights) == pruned.config.ffn_units[0] <= 18 and weights.std().item() == pytest.approx(0.02, rel=0.2)
    assert encoder.embed_positions.weight.equal(theirs["embed_positions.weight"])  # of sines, not of draws


@pytest.mark.parametrize("save", [save_hubert, save_whisper])
def test_an_export_gives_the_last_states_of_its_encoder(save, tones, tmp_path):
    save(tmp_path / "model")
    export_encoder(str(tmp_path / "model"), tmp_path / "onnx", "onnx")
    whole = load_frame_encoder(str(tmp_path / "model"), window_seconds=2, grid_seconds=0.2)
    export = load_frame_encoder(str(tmp_path / "onnx"), window_seconds=2, grid_seconds=0.2)
    assert (export.num_layers, export.width) == (1, whole.width)
    assert (export.max_seconds, export.min_samples, export.pads) == (whole.max_seconds, whole.min_samples, whole.pads)
    assert export.identity["weights_sha256"] != whole.identity["weights_sha256"]
    manifest = read_manifest(tones)
    expected, found = (store_states(encoder, manifest, tmp_path / "features") for encoder in (whole, export))
    for key in manifest.ids:
        torch.testing.assert_close(found.array(key), expected.array(key)[-1:], atol=2e-3, rtol=0)
    with pytest.raises(ValueError, match="is an export, whose weights are fixed"):
        load_frame_encoder(str(tmp_path / "onnx"), fresh_seed=0)


def test_on_a_grid_a_clip_is_heard_as_alone_whatever_stands_beside_it(tones, tmp_path):
    save_whisper(tmp_path / "model")
    encoder = load_frame_encoder(str(tmp_path / "model"), window_seconds=2, grid_seconds=0.2)
    assert encoder.hears_alike(3200, 1) and not encoder.hears_alike(3200, 3201)
    manifest = read_manifest(tones)
    together = store_states(encoder, manifest, tmp_path / "together")
    for index, key in enumerate(manifest.ids):
        alone = store_states(encoder, manifest.select([index]), tmp_path / f"alone-{index}")
        torch.testing.assert_close(together.array(key), alone.array(key), atol=2e-3, rtol=0)
    whole = store_states(load_frame_encoder(str(tmp_path / "model"), window_seconds=2), manifest, tmp_path / "whole")
    assert whole.folder.parent.name != together.folder.parent.name
