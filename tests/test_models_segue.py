"""The SEGUE student: valid frames, pooling, Whisper's windows, frozen layers, saving, and vectors of speech."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    Data2VecAudioConfig,
    Data2VecAudioModel,
    HubertConfig,
    HubertForCTC,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from speechkd.data.features import WhisperLogMel
from speechkd.losses.hidden import hidden_mse
from speechkd.models.segue import SegueEncoder, embedding_loss
from speechkd.models.speech_embedder import SpeechEmbedder, load_segue
from speechkd.teachers_text import compat_gather, masked_mean

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
CONVOLUTIONS = {"conv_dim": [16] * 7, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0, "mask_time_prob": 0.0}
LAYER_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "num_conv_pos_embeddings": 16}
FRAME_COUNTS = {
    399: 0,
    400: 1,
    719: 1,
    720: 2,
    3280: 10,
    8000: 24,
    16000: 49,
    32000: 99,
    80000: 249,
    160000: 499,
    238400: 744,
}


def whisper(**changes):
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 9}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 8, "begin_suppress_tokens": None}
    return WhisperModel(WhisperConfig(**(sizes | ids | changes)))


def make_model(family, **changes):
    torch.manual_seed(0)
    shared = SIZES | CONVOLUTIONS
    if family == "whisper":
        return whisper(**changes)
    if family == "data2vec":
        config = Data2VecAudioConfig(**(shared | {"conv_pos_kernel_size": 5, "num_conv_pos_embeddings": 2} | changes))
        return Data2VecAudioModel(config)
    if family == "hubert":  # the other families are of the base kind, with the large kind's layers in wav2vec2
        return HubertModel(HubertConfig(**(shared | {"num_conv_pos_embeddings": 16} | changes)))
    if family == "wavlm":
        return WavLMModel(WavLMConfig(**(shared | LAYER_NORM | changes)))
    if family == "wavlm group":
        return WavLMModel(WavLMConfig(**(shared | {"num_conv_pos_embeddings": 16} | changes)))
    return Wav2Vec2Model(Wav2Vec2Config(**(shared | LAYER_NORM | changes)))


FAMILIES = ("wav2vec2", "hubert", "wavlm", "wavlm group", "data2vec", "whisper")
every_family = pytest.mark.parametrize("family", FAMILIES)


def make_student(family="wav2vec2", model_changes=None, **arguments):
    model = make_model(family, **(model_changes or {}))
    return SegueEncoder(model.encoder if family == "whisper" else model, **arguments).eval()


def make_clips(*lengths, seed=0):
    """Noise, padded with NaN, and the lengths."""
    generator = torch.Generator().manual_seed(seed)
    waveforms = torch.full((len(lengths), max(lengths)), torch.nan)
    for row, length in zip(waveforms, lengths, strict=True):
        row[:length] = 0.1 * torch.randn(length, generator=generator)
    return waveforms, torch.tensor(lengths)


def save_model(model, folder, do_normalize=True):
    model.save_pretrained(folder)
    extractor = (
        WhisperFeatureExtractor()
        if model.config.model_type == "whisper"
        else Wav2Vec2FeatureExtractor(do_normalize=do_normalize)
    )
    extractor.save_pretrained(folder)
    return str(folder)


def test_frame_counts_are_those_of_the_convolutions():
    student = make_student()
    counts = student.num_frames(torch.tensor(list(FRAME_COUNTS)))
    assert counts.tolist() == list(FRAME_COUNTS.values())
    assert student.encoder._get_feat_extract_output_lengths(torch.tensor(list(FRAME_COUNTS))).equal(counts)
    assert student.num_frames(torch.tensor([0, 5])).tolist() == [0, 0]
    assert student.receptive_field_samples == 400


def test_whisper_counts_20_ms_frames_and_rounds_its_window_up_to_the_grid():
    student = make_student("whisper", grid_seconds=1.0)
    num_samples = torch.tensor([1, 320, 321, 16_000, 16_001, 479_999])
    assert student.num_frames(num_samples).tolist() == [1, 1, 2, 50, 51, 1500]
    assert student.num_states(num_samples).tolist() == [50, 50, 50, 50, 100, 1500]
    assert make_student("whisper").num_states(num_samples).tolist() == [1500] * 6


def test_masked_mean_and_the_gather_of_the_public_code():
    states = torch.tensor([[[1.0, 0.0], [2.0, 4.0], [6.0, 8.0], [9.0, 9.0]]])
    mask = torch.tensor([[1, 1, 1, 0]])
    assert masked_mean(states, mask).tolist() == [[3.0, 4.0]]
    assert masked_mean(states, mask.bool()).tolist() == [[3.0, 4.0]]
    assert compat_gather(states, mask).tolist() == [[1.75, 3.0]]
    assert compat_gather(states, mask.bool()).tolist() == [[1.75, 3.0]]


def test_padded_frames_get_no_gradient():
    states = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]]], requires_grad=True)
    pooled = masked_mean(states, torch.tensor([[True, True, False]]))
    loss = hidden_mse(pooled, torch.zeros(1, 2))
    loss.backward()
    assert pooled.tolist() == [[2.0, 3.0]] and loss.item() == 6.5
    assert states.grad.tolist() == [[[1.0, 1.5], [1.0, 1.5], [0.0, 0.0]]]
    with_nan = torch.tensor([[[1.0], [torch.nan]]], requires_grad=True)
    masked_mean(with_nan, torch.tensor([[1, 0]])).sum().backward()
    assert with_nan.grad.tolist() == [[[1.0], [0.0]]]


def test_a_mask_that_does_not_fit_is_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"mask \(2, 5\) does not fit states \(2, 4, 3\)"):
        masked_mean(torch.zeros(2, 4, 3), torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"row 1 of the batch has nothing to average"):
        masked_mean(torch.zeros(2, 2, 3), torch.tensor([[1, 1], [0, 0]]))
    student = make_student()
    with pytest.raises(ValueError, match=r"lengths of shape \(3,\) for 2 rows"):
        student(torch.zeros(2, 800), torch.tensor([800, 800, 800]))
    with pytest.raises(ValueError, match="length 900 does not fit rows padded to 800"):
        student(torch.zeros(2, 800), torch.tensor([800, 900]))


def test_mse_is_the_element_mean_per_item():
    student, teacher = torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 2.0]]), torch.zeros(2, 3)
    loss = embedding_loss(student, teacher, "mse")
    assert loss.item() == 2.0  # element mean 1.0 of each of two items
    squared_norms = (student - teacher).square().sum(dim=1)
    assert squared_norms.tolist() == [1.0, 5.0] and squared_norms.mean() == 3 * loss / 2


def test_objectives_are_sums_over_the_items():
    student, teacher = torch.eye(3)[:2], torch.eye(3)[[0, 2]]
    assert embedding_loss(student, teacher, "cosine").item() == pytest.approx(0 + 1)
    expected = sum(np.log(np.exp(score).sum()) - score[row] for row, score in enumerate(np.array([[2.0, 0], [0, 0]])))
    assert embedding_loss(student, teacher, "info_nce", temperature=0.5).item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="objective must be mse, cosine or info_nce, got 'l2'"):
        embedding_loss(student, teacher, "l2")
    with pytest.raises(ValueError, match="student's vectors have 3 values, the teacher's 4"):
        embedding_loss(torch.zeros(2, 3), torch.zeros(2, 4))


@every_family
def test_embeddings_have_the_teachers_width_and_no_gradient_comes_from_padded_frames(family):
    student = make_student(family, embedding_dim=24, **({"grid_seconds": 0.5} if family == "whisper" else {}))
    waveforms, num_samples = make_clips(8000, 5000)
    states, mask = student.frame_states(waveforms, num_samples)
    states.retain_grad()
    embeddings = student.project(masked_mean(states, mask))
    embedding_loss(embeddings, torch.ones(2, 24)).backward()
    assert embeddings.shape == (2, 24) and embeddings.dtype == torch.float32 and embeddings.isfinite().all()
    assert mask.sum(dim=1).tolist() == student.num_frames(num_samples).tolist()
    assert (states.grad[~mask] == 0).all() and (states.grad[mask].abs().sum(dim=-1) > 0).all()
    assert embeddings.equal(student(waveforms, num_samples))
    assert student.projection.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("family", ["wav2vec2", "wavlm", "whisper"])
def test_padding_with_a_mask_does_not_change_an_embedding(family):
    student = make_student(family, **({"grid_seconds": 0.1} if family == "whisper" else {}))
    waveforms, num_samples = make_clips(8000, 5000, 3000)
    batch = student(waveforms, num_samples)
    for row, length in enumerate(num_samples.tolist()):
        alone = student(waveforms[row : row + 1, :length], num_samples[row : row + 1])
        assert (batch[row] - alone[0]).abs().max() < 1e-5
    # the mask is what does it
    student.encoder._get_feature_vector_attention_mask = lambda width, mask, **_: torch.ones(3, width).bool()
    student._attention_mask = lambda *_: None
    assert (student(waveforms, num_samples)[2] - batch[2]).abs().max() > 1e-5


@every_family
def test_cached_lower_states_give_what_the_live_model_gives(family):
    grid = {"grid_seconds": 0.2} if family == "whisper" else {}
    waveforms, num_samples = make_clips(8000, 5000)
    whole, frozen = make_student(family, **grid), make_student(family, num_frozen_layers=1, **grid)
    states = frozen.lower_states(waveforms, num_samples)
    assert not states.requires_grad and states.shape[1] == int(frozen.num_states(num_samples).max())
    cached = frozen(None, num_samples, states)
    assert cached.equal(frozen(waveforms, num_samples))
    assert (cached - whole(waveforms, num_samples)).abs().max() < 1e-5  # the model's own forward pass
    # longer padding, as of another batch, is not heard
    longer = nn.functional.pad(states, (0, 0, 0, 7), value=torch.nan)
    torch.testing.assert_close(frozen(None, num_samples, longer), cached, rtol=0, atol=1e-6)


@every_family
def test_frozen_layers_stay_in_eval_mode_and_only_the_upper_ones_learn(family):
    grid = {"grid_seconds": 0.2} if family == "whisper" else {}
    rates = {"dropout": 0.5} if family == "whisper" else {"hidden_dropout": 0.5, "mask_time_prob": 0.5}
    model = make_model(family, **rates)
    student = SegueEncoder(model.encoder if family == "whisper" else model, num_frozen_layers=1, **grid)
    waveforms, num_samples = make_clips(8000, 5000)
    assert student.lower_states(waveforms, num_samples).equal(student.lower_states(waveforms, num_samples))
    layers = student.stack.layers
    assert not layers[0].training and layers[1].training
    identity = student.lower_identity("x")["weights_sha256"]
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    embedding_loss(student(waveforms, num_samples), torch.ones(2, 32)).backward()
    optimizer.step()
    learned = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert learned and all(
        "layers.1." in name or name.endswith((".layer_norm.weight", ".layer_norm.bias")) for name in learned
    )
    assert student.lower_identity("x")["weights_sha256"] == identity
    with torch.no_grad():
        next(layers[0].parameters()).add_(1.0)
    assert student.lower_identity("x")["weights_sha256"] != identity


def test_a_step_changes_the_convolutions():
    student = make_student().train()
    before = student.encoder.feature_extractor.conv_layers[0].conv.weight.clone()
    embedding_loss(student(*make_clips(8000, 5000)), torch.ones(2, 32)).backward()
    torch.optim.AdamW(student.parameters(), lr=1e-3).step()
    assert not student.encoder.feature_extractor.conv_layers[0].conv.weight.equal(before)


def test_frozen_transfer_trains_the_head_alone():
    rates = {"hidden_dropout": 0.5, "mask_time_prob": 0.5}
    probe = nn.Sequential()
    probe.encoder, probe.head = make_student("wav2vec2", rates).freeze(), nn.Linear(32, 3)
    probe.train()
    assert not any(module.training for module in probe.encoder.modules()) and probe.head.training
    before = {name: weight.clone() for name, weight in probe.encoder.state_dict().items()}
    clips = make_clips(8000, 5000)
    first, second = probe.encoder(*clips), probe.encoder(*clips)
    assert first.equal(second)
    nn.functional.cross_entropy(probe.head(first), torch.tensor([0, 2])).backward()
    torch.optim.AdamW([p for p in probe.parameters() if p.requires_grad], lr=0.1).step()
    assert all(weight.equal(before[name]) for name, weight in probe.encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in probe.encoder.parameters())
    assert all(parameter.grad is not None for parameter in probe.head.parameters())


def test_base_size_and_the_last_feed_forwards_dropout():
    with torch.device("meta"):
        student = SegueEncoder(Wav2Vec2Model(Wav2Vec2Config()))
    assert student.num_parameters() == 94_371_712
    layers = student.encoder.encoder.layers

    def rates(layer):
        return layer.feed_forward.intermediate_dropout.p, layer.feed_forward.output_dropout.p

    assert rates(layers[-1]) == (0.0, 0.0) and rates(layers[-2]) == (0.1, 0.1)
    student.set_last_ffn_dropout(True)
    assert rates(layers[-1]) == (0.1, 0.1)


def test_whispers_last_feed_forward_has_no_dropout_either():
    student = make_student("whisper", {"dropout": 0.2, "activation_dropout": 0.3})
    first, last = student.stack.layers
    assert (last.activation_dropout, last.dropout) == (0, 0) and (first.activation_dropout, first.dropout) == (0.3, 0.2)
    student.set_last_ffn_dropout(True)
    assert (last.activation_dropout, last.dropout) == (0.3, 0.2)


def test_a_saved_encoder_has_its_own_dropout_rates(tmp_path):
    make_student().save_encoder(tmp_path)
    layer = AutoModel.from_pretrained(tmp_path).encoder.layers[-1]
    assert (layer.feed_forward.intermediate_dropout.p, layer.feed_forward.output_dropout.p) == (0.1, 0.1)


def test_a_grid_does_not_reach_beyond_a_window_that_was_shortened():
    student = make_student("whisper", {"max_source_positions": 100}, grid_seconds=0.64)  # 2 s
    lengths = torch.tensor([32_000, 8_000])
    assert student.num_states(lengths).tolist() == [100, 32]
    waveforms = torch.zeros(2, 33_600)  # as a loader pads it
    waveforms[:, :32_000] = torch.randn(2, 32_000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = student(waveforms, lengths)
        torch.testing.assert_close(together[:1], student(waveforms[:1, :32_000], lengths[:1]), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="a clip of 2.10 s is longer than the model.s window of 2 s"):
        student(waveforms, torch.tensor([33_600, 8_000]))


def test_whisper_on_30_s_is_the_stock_encoder():
    model = make_model("whisper").eval()
    waveforms, num_samples = make_clips(8000, 5000)
    features = WhisperLogMel()(waveforms.nan_to_num(0.0))
    with torch.no_grad():
        expected = model.encoder(features).last_hidden_state
        states, mask = SegueEncoder(model.encoder).eval().frame_states(waveforms, num_samples)
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)
    assert mask.sum(dim=1).tolist() == [25, 16]


@every_family
def test_saved_and_loaded_embeddings_agree_with_stock_transformers(family, tmp_path):
    grid = {"grid_seconds": 0.5} if family == "whisper" else {}
    student = make_student(family, embedding_dim=24, **grid)
    student.save_encoder(tmp_path, teacher={"name": "a teacher"})
    clips = [clip[: int(length)] for clip, length in zip(*make_clips(8000, 5000, 8000), strict=True)]
    before = SpeechEmbedder(student).encode(clips)
    after = SpeechEmbedder.from_pretrained(tmp_path).encode([clip.numpy() for clip in clips])
    assert after.shape == (3, 24) and after.dtype == np.float32
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-6)
    note = json.loads((tmp_path / "pooling.json").read_text())
    assert note["teacher"] == {"name": "a teacher"} and note["embedding_dim"] == 24
    assert note["grid_seconds"] == grid.get("grid_seconds")

    # by hand, as the note says
    model, extractor = AutoModel.from_pretrained(tmp_path), AutoFeatureExtractor.from_pretrained(tmp_path)
    inputs = extractor(clips[0].numpy(), sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        if family == "whisper":
            model = model.encoder
            model.config.max_source_positions = 25  # 8,000 samples are 0.5 s
            model.embed_positions = nn.Embedding.from_pretrained(model.embed_positions.weight[:25])
            states = model(inputs.input_features[..., :50]).last_hidden_state[0]
        else:
            states = model(inputs.input_values).last_hidden_state[0]
    projection = load_file(tmp_path / "projection.safetensors")
    by_hand = projection["weight"] @ states.mean(dim=0) + projection["bias"]
    np.testing.assert_allclose(after[0], by_hand.numpy(), rtol=0, atol=1e-5)


@every_family
def test_embeddings_do_not_depend_on_how_clips_are_batched(family):
    embedder = SpeechEmbedder(make_student(family, **({"grid_seconds": 0.1} if family == "whisper" else {})))
    clips = [clip[: int(length)] for clip, length in zip(*make_clips(3000, 8000, 3000, 5000), strict=True)]
    alone = np.concatenate([embedder.encode([clip]) for clip in clips])
    np.testing.assert_allclose(embedder.encode(clips, batch_size=3), alone, rtol=0, atol=1e-5)


def test_no_clips_give_no_vectors():
    assert SpeechEmbedder(make_student()).encode([]).shape == (0, 32)


def test_silence_has_a_finite_embedding():
    for family in FAMILIES:
        embedder = SpeechEmbedder(make_student(family, **({"grid_seconds": 0.5} if family == "whisper" else {})))
        assert np.isfinite(embedder.encode([np.zeros(8000, dtype=np.float32)])).all()


def test_other_rates_are_resampled():
    embedder = SpeechEmbedder(make_student("whisper", grid_seconds=0.5))
    time = np.arange(8000) / 16_000
    tone = np.sin(2 * np.pi * 300 * time)
    same, other = embedder.encode([tone]), embedder.encode([tone[::2]], sample_rate_hz=8000)
    noise = embedder.encode([make_clips(8000)[0][0]])
    assert np.abs(same - other).max() < np.abs(same - noise).max() / 3


def test_clips_that_cannot_be_heard_are_refused():
    embedder = SpeechEmbedder(make_student())
    good = np.zeros(800, dtype=np.float32)
    with pytest.raises(ValueError, match=r"clip 1 of the batch has 399 samples.*needs 400 samples for one"):
        embedder.student(torch.zeros(2, 800), torch.tensor([800, 399]))
    with pytest.raises(ValueError, match="has 0 samples and so not one frame"):
        SpeechEmbedder(make_student("whisper", grid_seconds=0.5)).encode([good[:0]])
    with pytest.raises(ValueError, match=r"clip 1 is \(2, 800\) torch.float32; give one channel"):
        embedder.encode([good, np.zeros((2, 800), dtype=np.float32)])
    with pytest.raises(ValueError, match=r"clip 0 is \(800,\) torch.int16"):
        embedder.encode([good.astype(np.int16)])
    with pytest.raises(ValueError, match="clip 1 holds NaN or infinite samples"):
        embedder.encode([good, good + np.nan])
    with pytest.raises(ValueError, match="longer than the model's window of 30 s"):
        SpeechEmbedder(make_student("whisper")).encode([np.zeros(480_001, dtype=np.float32)])
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        embedder.encode([good], batch_size=0)
    with pytest.raises(ValueError, match="the batch has no clip"):
        embedder.student(torch.zeros(0, 800), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="num_samples is missing"):
        embedder.student(torch.zeros(1, 800))
    with pytest.raises(ValueError, match="neither waveforms nor states"):
        embedder.student(None, torch.tensor([800]))


def test_states_that_do_not_fit_are_refused():
    num_samples = torch.tensor([8000, 5000])
    with pytest.raises(ValueError, match="num_frozen_layers=0: every layer learns"):
        make_student()(None, num_samples, torch.zeros(2, 24, 32))
    with pytest.raises(ValueError, match="num_frozen_layers=0: no states can be kept"):
        make_student().lower_states(torch.zeros(2, 8000), num_samples)
    frozen = make_student(num_frozen_layers=1)
    with pytest.raises(ValueError, match=r"states \(2, 23, 32\) do not fit 2 clips of up to 24 frames"):
        frozen(None, num_samples, torch.zeros(2, 23, 32))


def test_arguments_that_do_not_fit_the_encoder_are_refused():
    for wrong in (-1, 2):
        with pytest.raises(ValueError, match=f"num_frozen_layers={wrong} of 2 layers"):
            make_student(num_frozen_layers=wrong)
    for wrong in (0.0, 0.03, 31.0):
        with pytest.raises(ValueError, match=f"grid_seconds must be a multiple of 0.02 up to 30, got {wrong}"):
            make_student("whisper", grid_seconds=wrong)
    with pytest.raises(ValueError, match="grid_seconds=1.0 is for Whisper; a wav2vec2 hears"):
        make_student(grid_seconds=1.0)
    with pytest.raises(ValueError, match="add_adapter"):
        make_student("wav2vec2", {"add_adapter": True})
    with pytest.raises(ValueError, match="type 'whisper_decoder' is not known here"):
        config = Wav2Vec2Config(**SIZES | CONVOLUTIONS)
        config.__class__ = type("Other", (Wav2Vec2Config,), {"model_type": "whisper_decoder"})
        model = make_model("wav2vec2")
        model.config = config
        SegueEncoder(model)


def test_the_first_layers_alone_are_kept(tmp_path):
    for family in ("wav2vec2", "wavlm", "whisper"):
        model = make_model(family, **{"encoder_layers" if family == "whisper" else "num_hidden_layers": 3})
        name = save_model(model, tmp_path / family)
        student = load_segue(name, num_layers=2)
        stack = model.encoder if family == "whisper" else model.encoder
        assert student.num_layers == 2 and student.config.num_hidden_layers == 2
        for kept, original in zip(student.stack.layers, stack.layers[:2], strict=True):
            assert all(
                ours.equal(theirs) for ours, theirs in zip(kept.parameters(), original.parameters(), strict=True)
            )
        student.save_encoder(tmp_path / f"{family}-saved")
        assert load_segue(str(tmp_path / f"{family}-saved")).num_layers == 2
        for wrong in (0, 4):
            with pytest.raises(ValueError, match=f"num_layers={wrong} of an encoder of 3"):
                load_segue(name, num_layers=wrong)


def test_encoders_are_loaded_from_checkpoints_with_a_head_and_scale_their_input_as_they_were_trained(tmp_path):
    torch.manual_seed(0)
    model = HubertForCTC(HubertConfig(**SIZES, **CONVOLUTIONS, num_conv_pos_embeddings=16, vocab_size=8))
    student = load_segue(save_model(model, tmp_path / "ctc", do_normalize=False))
    assert not student.normalize_input and not student.training
    weight = student.encoder.encoder.layers[0].attention.q_proj.weight
    assert weight.equal(model.hubert.encoder.layers[0].attention.q_proj.weight)
    loud = SpeechEmbedder(student).encode([np.ones(800, dtype=np.float32), np.full(800, 0.5, dtype=np.float32)])
    assert not np.allclose(loud[0], loud[1])
    assert load_segue(save_model(model, tmp_path / "scaled")).normalize_input


def test_a_saved_student_is_trained_on_with_its_own_projection(tmp_path):
    student = make_student("whisper", embedding_dim=24, grid_seconds=0.5)
    student.save_encoder(tmp_path)
    again = load_segue(str(tmp_path), num_frozen_layers=1)
    assert again.grid_seconds == 0.5 and again.projection.weight.equal(student.projection.weight)
    assert load_segue(str(tmp_path), embedding_dim=16).embedding_dim == 16


def test_checkpoints_of_the_trainer_hold_all_weights_once(tmp_path):
    student = make_student("whisper", embedding_dim=24)
    student.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(student.state_dict())
    assert not any("decoder" in name or name.startswith(("stack", "log_mel")) for name in student.state_dict())


def test_folders_that_cannot_be_loaded_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="speech encoder '.*empty' cannot be loaded"):
        load_segue(str(tmp_path / "empty"))
    name = save_model(make_model("wav2vec2"), tmp_path / "plain")
    with pytest.raises(ValueError, match="has no pooling.json; give a folder that SegueEncoder.save_encoder wrote"):
        SpeechEmbedder.from_pretrained(name)
    weights = load_file(tmp_path / "plain/model.safetensors")
    lacking = {key: weight for key, weight in weights.items() if "layers.1.attention.q_proj" not in key}
    make_model("wav2vec2").save_pretrained(tmp_path / "plain", state_dict=lacking)
    with pytest.raises(ValueError, match="has no weights for 2 parameters, first encoder.layers.1.attention.q_proj"):
        load_segue(name)


@pytest.mark.parametrize("family", ["wav2vec2", "whisper"])
def test_fifty_steps_teach_eight_sounds_their_embeddings(family):
    quiet = {"hidden_dropout": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0}
    torch.manual_seed(0)
    teacher = torch.randn(8, 32)
    make = partial(make_student, family)
    student = make(grid_seconds=0.2) if family == "whisper" else make(quiet)
    student.train()
    time = torch.arange(3200) / 16_000
    waveforms = torch.stack([torch.sin(2 * torch.pi * (200 + 150 * i) * time) for i in range(8)])
    num_samples = torch.full((8,), 3200)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    for _ in range(50):
        optimizer.zero_grad()
        loss = embedding_loss(student(waveforms, num_samples), teacher) / 8
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    vectors = torch.from_numpy(SpeechEmbedder(student).encode(list(waveforms)))
    assert hidden_mse(vectors, teacher) < 0.2
    assert torch.cdist(vectors, teacher).argmin(dim=1).tolist() == list(range(8))
