"""Compact students: sizes, what comes from the teacher, inputs, masks, gradients, targets, and what is saved."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    Data2VecAudioConfig,
    Data2VecAudioModel,
    HubertConfig,
    HubertForCTC,
    HubertModel,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperModel,
)

from speechkd.losses.hidden import hidden_l1_cosine
from speechkd.losses.layerwise import (
    LayerProjections,
    PredictionHeads,
    SplitLinear,
    colld_layers,
    distilhubert_terms,
    masked_info_nce,
    span_mask,
)
from speechkd.models.distilhubert import CompactStudent, check_target_layers, compact_encoder, teacher_targets
from speechkd.models.encoder_inputs import EncoderInputs, align_frames

SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
CONVOLUTIONS = {"conv_dim": [16] * 7, "num_conv_pos_embedding_groups": 2, "num_conv_pos_embeddings": 16}
STABLE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
FRAME_COUNTS = {400: 1, 719: 1, 720: 2, 3200: 9, 16000: 49, 250000: 781}
FAMILIES = ("hubert", "wav2vec2", "wavlm", "data2vec", "wav2vec2-bert", "whisper")
every_family = pytest.mark.parametrize("family", FAMILIES)


def make_teacher(family, **changes):
    torch.manual_seed(0)
    waveform = SIZES | CONVOLUTIONS
    if family == "hubert":
        teacher = HubertModel(HubertConfig(**(waveform | changes)))
    elif family == "wav2vec2":
        teacher = Wav2Vec2Model(Wav2Vec2Config(**(waveform | STABLE | changes)))
    elif family == "wavlm":
        teacher = WavLMModel(WavLMConfig(**(waveform | changes)))
    elif family == "data2vec":
        convolutions = {"conv_pos_kernel_size": 5, "num_conv_pos_embeddings": 2}
        teacher = Data2VecAudioModel(Data2VecAudioConfig(**(waveform | convolutions | changes)))
    elif family == "wav2vec2-bert":
        teacher = Wav2Vec2BertModel(Wav2Vec2BertConfig(**(SIZES | changes)))
    else:
        sizes = {"d_model": 32, "encoder_layers": 4, "encoder_attention_heads": 2, "encoder_ffn_dim": 48}
        decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 8, "vocab_size": 9}
        ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
        window = {"begin_suppress_tokens": None, "max_source_positions": 100}  # 2 s
        teacher = WhisperModel(WhisperConfig(**(sizes | decoder | ids | window | changes))).encoder
    return teacher.eval()


def make_clips(*lengths):
    generator = torch.Generator().manual_seed(2)
    clips = [0.1 * torch.randn(length, generator=generator) for length in lengths]
    return pad_sequence(clips, batch_first=True), torch.tensor(lengths)


def make_student(teacher, *, colld=False, **arguments):
    encoder = compact_encoder(teacher, 2)
    heads = LayerProjections(2, 32, 32) if colld else PredictionHeads(32, 32, 3)
    return CompactStudent(encoder, heads, mask_spans=colld, **{"normalize_input": True, **arguments})


def count(model):
    return sum(weight.numel() for weight in model.parameters())


def test_parameters_of_the_full_size_models():
    with torch.device("meta"):
        teacher = HubertModel(HubertConfig())
        student = compact_encoder(teacher, 2)
        heads = PredictionHeads(768, 768, 3)
        vector = HubertModel(HubertConfig(num_hidden_layers=2, feat_proj_layer_norm=False))
        assert (count(teacher), count(student), count(heads)) == (94_371_712, 23_491_200, 3_543_552)
        assert count(student) + count(heads) == 27_034_752
        assert count(vector) == 23_491_968  # with the vector that only SpecAugment uses
        assert count(HubertModel(HubertConfig(num_hidden_layers=2))) == 23_492_992
        assert count(student.feature_extractor) == 4_200_448
        assert count(student.encoder.pos_conv_embed) == 4_719_488
        layer = student.encoder.layers[0]
        assert (count(layer.attention), count(layer.feed_forward)) == (2_362_368, 4_722_432)


def test_a_hubert_student_has_all_but_the_norms_from_its_teacher():
    teacher = make_teacher("hubert")
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    student = compact_encoder(teacher, 2)
    theirs = teacher.state_dict()
    fresh = {"encoder.layer_norm.weight", "encoder.layer_norm.bias"}
    assert student.state_dict().keys() == {
        key
        for key in theirs
        if not key.startswith(("encoder.layers.2", "encoder.layers.3", "feature_projection.layer_norm", "masked"))
    }
    assert all(torch.equal(value, theirs[key]) for key, value in student.state_dict().items() if key not in fresh)
    assert student.encoder.layer_norm.weight.eq(1).all() and student.encoder.layer_norm.bias.eq(0).all()
    assert student.config.layerdrop == student.config.mask_time_prob == 0 and not student.config.feat_proj_layer_norm
    assert teacher.config.num_hidden_layers == 4 and teacher.config.feat_proj_layer_norm


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_other_students_are_the_first_layers_of_their_teacher(family):
    teacher = make_teacher(family)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    student = compact_encoder(teacher, 2).eval()
    assert type(student) is type(teacher)
    inputs = EncoderInputs(teacher, normalize_input=True)(*make_clips(8000, 6000))
    with torch.no_grad():
        states = [model(**inputs, output_hidden_states=True).hidden_states for model in (student, teacher)]
    assert len(states[0]) == 3
    torch.testing.assert_close(states[0][1], states[1][1], rtol=0, atol=0)


def test_a_random_student_takes_no_weight_from_its_teacher():
    teacher = make_teacher("hubert")
    torch.manual_seed(7)
    student = compact_encoder(teacher, 3, init="random")
    assert len(student.encoder.layers) == 3
    query, convolution = student.encoder.layers[0].attention.q_proj, student.encoder.pos_conv_embed.conv
    assert query.weight.std().item() == pytest.approx(0.02, rel=0.1) and query.bias.eq(0).all()
    # 4 / (kernel * width) in variance, as for all weight-normed convolutions of the class
    assert convolution.weight.std().item() == pytest.approx(math.sqrt(4 / (16 * 32)), rel=0.1)
    assert not torch.equal(query.weight, teacher.encoder.layers[0].attention.q_proj.weight)


def test_half_precision_teachers_have_float32_students():
    student = compact_encoder(make_teacher("hubert").bfloat16(), 1)
    assert {weight.dtype for weight in student.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda: make_teacher("hubert"), (5,), "num_layers=5, but the teacher has 4 layers"),
        (lambda: make_teacher("hubert"), (0,), "num_layers=0"),
        (lambda: HubertForCTC(HubertConfig(**SIZES, **CONVOLUTIONS)), (2,), "HubertForCTC is more than an encoder"),
        (lambda: make_teacher("wav2vec2", add_adapter=True), (2,), "has an adapter"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        compact_encoder(make(), *arguments)


def test_other_kinds_of_teachers_and_starts_are_refused():
    teacher = make_teacher("hubert")
    with pytest.raises(ValueError, match="init must be teacher or random, got 'zeros'"):
        compact_encoder(teacher, 2, init="zeros")
    teacher.config.model_type = "unispeech"
    with pytest.raises(ValueError, match="type 'unispeech' is not known"):
        compact_encoder(teacher, 2)


def test_frame_counts_and_short_clips():
    inputs = EncoderInputs(make_teacher("hubert"), normalize_input=False)
    counts = inputs.num_frames(torch.tensor(list(FRAME_COUNTS)))
    assert counts.tolist() == list(FRAME_COUNTS.values()) and inputs.receptive_field_samples == 400
    with pytest.raises(ValueError, match="clip 1 of the batch has 399 samples, but one frame needs 400"):
        inputs(*make_clips(800, 399))
    with pytest.raises(ValueError, match="no clip"):
        inputs.num_frames(torch.tensor([], dtype=torch.int64))
    bert = EncoderInputs(make_teacher("wav2vec2-bert"), normalize_input=True)
    assert bert.num_frames(torch.tensor([560, 879, 880])).tolist() == [1, 1, 2] and bert.receptive_field_samples == 560
    with pytest.raises(ValueError, match="has 559 samples, but one frame needs 560"):
        bert(*make_clips(559))
    whisper = EncoderInputs(make_teacher("whisper"), normalize_input=True)
    assert whisper.num_frames(torch.tensor([1, 320, 321, 32000])).tolist() == [1, 1, 2, 100]
    with pytest.raises(ValueError, match="longer than the model's window of 2 s"):
        whisper(*make_clips(32001))


@every_family
def test_the_model_makes_as_many_frames_as_are_counted(family):
    teacher = make_teacher(family)
    inputs = EncoderInputs(teacher, normalize_input=True)
    waveforms, num_samples = make_clips(9001, 5000)
    with torch.no_grad():
        frames = teacher(**inputs(waveforms, num_samples)).last_hidden_state.shape[1]
    assert frames == (100 if family == "whisper" else inputs.num_frames(num_samples).max())


@pytest.mark.parametrize("normalize", [True, False])
def test_waveforms_are_those_of_the_feature_extractor(normalize):
    waveforms, num_samples = make_clips(2000, 1500)
    made = EncoderInputs(make_teacher("hubert"), normalize_input=normalize)(waveforms + 3, num_samples)
    clips = [(row + 3)[:length].numpy() for row, length in zip(waveforms, num_samples.tolist(), strict=True)]
    extractor = Wav2Vec2FeatureExtractor(do_normalize=normalize, return_attention_mask=True)
    expected = extractor(clips, sampling_rate=16000, padding=True, return_tensors="pt")
    assert torch.equal(made["attention_mask"], expected.attention_mask.bool())
    torch.testing.assert_close(made["input_values"], expected.input_values, rtol=1e-4, atol=1e-4)


def test_no_mask_where_there_is_no_padding():
    inputs = EncoderInputs(make_teacher("hubert"), normalize_input=True)
    assert inputs(*make_clips(2000, 2000)).keys() == {"input_values"}


def test_filter_banks_of_w2v_bert_are_those_of_the_feature_extractor():
    waveforms, num_samples = make_clips(4000, 3333)
    made = EncoderInputs(make_teacher("wav2vec2-bert"), normalize_input=True)(waveforms, num_samples)
    clips = [row[:length].numpy() for row, length in zip(waveforms, num_samples.tolist(), strict=True)]
    expected = SeamlessM4TFeatureExtractor()(clips, sampling_rate=16000, return_tensors="pt")
    mask = made["attention_mask"]
    assert mask.sum(dim=1).tolist() == expected.attention_mask.sum(dim=1).tolist() == [11, 9]
    width = mask.shape[1]
    torch.testing.assert_close(
        made["input_features"][mask], expected.input_features[:, :width][mask], rtol=1e-2, atol=2e-3
    )


@every_family
def test_targets_are_the_hidden_states_whatever_mode_the_teacher_was_in(family):
    teacher = make_teacher(family)
    inputs = EncoderInputs(teacher, normalize_input=True)(*make_clips(8000, 6000))
    with torch.no_grad():
        states = teacher(**inputs, output_hidden_states=True).hidden_states
    targets = teacher_targets(teacher.train(), inputs, [2, 4])
    assert not teacher.training and not targets.requires_grad
    torch.testing.assert_close(targets, torch.stack([states[2], states[4]], dim=1), rtol=0, atol=0)


@every_family
def test_dropout_of_the_teacher_makes_its_targets_noisy_but_drops_no_layer(family):
    name = {"whisper": "encoder_layerdrop"}.get(family, "layerdrop")
    dropout = "dropout" if family == "whisper" else "hidden_dropout"
    teacher = make_teacher(family, **{name: 1.0, dropout: 0.3, "mask_time_prob": 0.9, "apply_spec_augment": True})
    inputs = EncoderInputs(teacher, normalize_input=True)(*make_clips(8000))
    clean = teacher_targets(teacher, inputs, [1, 4])
    noisy = [teacher_targets(teacher, inputs, [1, 4], dropout=True) for _ in range(2)]
    assert noisy[0].shape == clean.shape and not torch.equal(noisy[0], clean) and not torch.equal(*noisy)
    assert not any(module.training for module in teacher.modules())
    torch.testing.assert_close(teacher_targets(teacher, inputs, [1, 4]), clean, rtol=0, atol=0)


@pytest.mark.parametrize("layers", [[4, 8, 12], [0, 1], []])
def test_target_layers_that_the_teacher_lacks_are_refused(layers):
    teacher = make_teacher("hubert")
    with pytest.raises(ValueError, match="cannot be taken from a teacher of 4 layers; name some of 1 to 4"):
        check_target_layers(teacher, layers)
    with pytest.raises(ValueError, match="target layers"):
        teacher_targets(teacher, {}, layers)


def test_a_difference_of_one_frame_is_cut_and_of_more_refused():
    student, teacher, samples = torch.tensor([5, 3]), torch.tensor([4, 3]), torch.tensor([1760, 1120])
    predictions, targets = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 4, 8)
    ours, theirs, mask = align_frames(predictions, targets, student, teacher, samples)
    assert torch.equal(ours, predictions[:, :, :4]) and torch.equal(theirs, targets)
    assert mask.tolist() == [[True] * 4, [True] * 3 + [False]]
    with pytest.raises(ValueError, match=r"clip 0, 0\.11 s, the student makes 5 frames, 45\.5 Hz, .* 2, 18\.2 Hz"):
        align_frames(predictions, targets, student, torch.tensor([2, 2]), samples)
    with pytest.raises(ValueError, match="are to have 4 frames"):
        align_frames(predictions, targets[:, :, :3], student, teacher, samples)


def test_a_split_linear_is_separate_linears_and_one_block_diagonal():
    torch.manual_seed(0)
    split, parts = SplitLinear(3, 4, 5), torch.randn(2, 7, 3, 4)
    each = [F.linear(parts[:, :, i], split.weight[i].T, split.bias[i]) for i in range(3)]
    torch.testing.assert_close(split(parts), torch.stack(each, dim=2), rtol=0, atol=1e-6)
    block = F.linear(parts.flatten(2), torch.block_diag(*split.weight).T, split.bias.flatten())
    torch.testing.assert_close(split(parts).flatten(2), block, rtol=0, atol=1e-6)
    assert split.weight.abs().max() <= 0.5 and split.weight.abs().max() > 0.4
    changed = parts.clone()
    changed[:, :, 1] += 1
    differs = (split(changed) != split(parts)).flatten(0, 1).any(dim=0)
    assert not differs[[0, 2]].any() and differs[1].all()


def test_heads_are_independent_and_see_the_last_layer():
    heads = PredictionHeads(32, 24, 3, inner_dim=20)
    states = [torch.randn(2, 5, 32) for _ in range(3)]
    predictions = heads(states)
    assert predictions.shape == (2, 3, 5, 24)
    predictions[:, 1].square().sum().backward()
    gradient = heads.expand.weight.grad.unflatten(0, (3, 20)).abs().amax(dim=(1, 2))
    assert gradient[1] > 0 and gradient[[0, 2]].eq(0).all()
    assert PredictionHeads(32, 24, 1)(states).shape == (2, 1, 5, 24)
    with pytest.raises(ValueError, match="num_heads=0"):
        PredictionHeads(32, 24, 0)


def test_projections_need_a_state_of_every_layer():
    states = [torch.randn(2, 5, 32) for _ in range(3)]
    maps = LayerProjections(2, 32, 32)
    torch.testing.assert_close(maps(states), torch.stack(states[1:], dim=1))  # they start as the identity
    assert LayerProjections(2, 32, 24)(states).shape == (2, 2, 5, 24)
    with pytest.raises(ValueError, match="4 hidden states do not fit maps for 2 layers, which need 3"):
        maps([*states, states[0]])


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "wav2vec2-bert"])
def test_only_the_gradient_of_the_convolutions_is_scaled(family):
    teacher = make_teacher(family)
    waveforms, num_samples = make_clips(3000, 3000)
    gradients, outputs = [], []
    for factor in (1.0, 0.1, 0.0):
        torch.manual_seed(3)
        student = make_student(teacher, feature_grad_mult=factor).eval()
        outputs.append(student(student.inputs(waveforms, num_samples)))
        outputs[-1].square().sum().backward()
        gradients.append({name: weight.grad for name, weight in student.named_parameters()})
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    front = ("encoder.feature_extractor.", "encoder.conv")
    convolutions = [name for name in gradients[0] if name.startswith(front)]
    assert len(convolutions) >= 4
    for name, gradient in gradients[0].items():
        if name in convolutions:
            torch.testing.assert_close(gradients[1][name], 0.1 * gradient, rtol=1e-3, atol=1e-6)
            assert gradients[2][name] is None and gradient.abs().max() > 0
        elif gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient)
            torch.testing.assert_close(gradients[2][name], gradient)


@pytest.mark.parametrize("family", ["hubert", "whisper"])
def test_gradient_checkpointing_changes_no_gradient(family):
    off = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "dropout")
    teacher = make_teacher(family, **dict.fromkeys(off, 0.0))
    student = make_student(teacher, colld=True, feature_grad_mult=0.1).train()
    inputs = student.inputs(*make_clips(3000, 3000))
    masked = torch.zeros(2, 8, dtype=torch.bool)
    masked[:, 2:5] = True
    gradients = []
    for enable in (False, True):
        if enable:
            student.gradient_checkpointing_enable()
        student.zero_grad()
        student(inputs, masked).square().sum().backward()
        gradients.append([weight.grad for weight in student.parameters() if weight.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"feature_grad_mult must be 0 to 1, got 1\.5"):
        make_student(make_teacher("hubert"), feature_grad_mult=1.5)
    with pytest.raises(ValueError, match=r"feature_grad_mult=0\.1, but a w2v-BERT has no convolutions"):
        make_student(make_teacher("wav2vec2-bert"), feature_grad_mult=0.1)


@every_family
def test_masked_frames_are_hidden_and_the_vector_learns(family):
    student = make_student(make_teacher(family), colld=True).eval()
    waveforms, num_samples = make_clips(8000, 6000)
    frames = student.inputs.num_frames(num_samples)
    masked = torch.zeros(2, int(frames.max()), dtype=torch.bool)
    masked[0, 5:12] = True
    seen = []
    place = student.encoder.conv2 if family == "whisper" else student.encoder.feature_projection
    projections = []
    keep = place.register_forward_hook(lambda *call: projections.append(call[-1]))
    inside = student.encoder.layers if family == "whisper" else student.encoder.encoder.layers
    inside[0].register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0].detach()))
    inputs = student.inputs(waveforms, num_samples)
    plain, hidden = student(inputs), student(inputs, masked)
    keep.remove()
    assert plain.shape[:2] == hidden.shape[:2] == (2, 2) and hidden.shape[-1] == 32
    assert not torch.equal(plain[0], hidden[0])
    torch.testing.assert_close(plain[1], hidden[1])  # nothing of it was masked
    if family in ("wav2vec2-bert", "whisper"):  # no convolution over positions mixes the frames
        changed = (seen[0] != seen[1]).any(dim=-1)
        assert changed[:, : masked.shape[1]].equal(masked) and not changed[:, masked.shape[1] :].any()
    hidden.square().sum().backward()
    assert student.mask_vector.grad.abs().min() > 0
    torch.testing.assert_close(student(inputs), plain)  # no hook stays


def test_a_student_cannot_see_what_is_masked():
    student = make_student(make_teacher("wav2vec2-bert"), colld=True).eval()
    inputs = student.inputs(*make_clips(8000))
    masked = torch.zeros(1, inputs["input_features"].shape[1], dtype=torch.bool)
    masked[0, 3:9] = True
    other = inputs | {"input_features": torch.where(masked[..., None], 5.0, inputs["input_features"])}
    torch.testing.assert_close(student(inputs, masked), student(other, masked), rtol=0, atol=0)
    assert not torch.equal(student(inputs), student(other))


def test_masks_that_do_not_fit_are_refused():
    teacher = make_teacher("hubert")
    student = make_student(teacher, colld=True)
    inputs = student.inputs(*make_clips(8000))
    for masked in (torch.zeros(1, 25, dtype=torch.bool), torch.zeros(2, 24, dtype=torch.bool), torch.zeros(1, 24)):
        with pytest.raises(ValueError, match=r"1 clips of up to 24 frames need \(1, 24\)"):
            student(inputs, masked)
    with pytest.raises(ValueError, match="mask_spans=False; set it to True"):
        make_student(teacher)(inputs, torch.zeros(1, 24, dtype=torch.bool))


def test_spans_are_repeatable_and_never_on_padding():
    num_frames = torch.tensor([400, 3, 1, 50])
    masked = span_mask(num_frames, generator=torch.Generator().manual_seed(0))
    assert masked.shape == (4, 400) and masked.equal(span_mask(num_frames, generator=torch.Generator().manual_seed(0)))
    assert not masked.equal(span_mask(num_frames, generator=torch.Generator().manual_seed(1)))
    assert not (masked & (torch.arange(400) >= num_frames[:, None])).any() and masked.any(dim=1).all()
    lengths = torch.diff(torch.nonzero(torch.diff(F.pad(masked[0].int(), (1, 1))))[:, 0])[::2]
    assert lengths[:-1].min() >= 10  # only the clip's end cuts a span


def test_about_half_of_a_long_clip_is_masked():
    masked = span_mask(torch.full((200,), 1500), generator=torch.Generator().manual_seed(0))
    assert masked.float().mean().item() == pytest.approx(1 - (1 - 0.065) ** 10, abs=0.01)
    starts = span_mask(torch.full((200,), 150), span=1, generator=torch.Generator().manual_seed(0)).sum(dim=1)
    assert set(starts.tolist()) == {9, 10} and starts.float().mean().item() == pytest.approx(9.75, abs=0.1)


@pytest.mark.parametrize("arguments", [{"start_probability": 0.0}, {"start_probability": 1.5}, {"span": 0}])
def test_bad_spans_are_refused(arguments):
    with pytest.raises(ValueError, match="start_probability must be above 0"):
        span_mask(torch.tensor([5]), **arguments)


def test_layers_of_colld():
    assert colld_layers(4, 24) == [6, 12, 18, 24] and colld_layers(5, 12) == [3, 5, 8, 10, 12]
    assert colld_layers(3, 3) == [1, 2, 3]
    for student, teacher in ((4, 3), (0, 3)):
        with pytest.raises(ValueError, match=f"a student of {student} layers cannot be paired with a teacher of 3"):
            colld_layers(student, teacher)


@pytest.mark.parametrize("family", ["hubert", "wav2vec2-bert", "whisper"])
def test_a_saved_student_is_a_plain_model_without_heads(tmp_path, family):
    student = make_student(make_teacher(family), colld=True, normalize_input=False).eval()
    student.save_encoder(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert not AutoModel.from_pretrained(tmp_path, output_loading_info=True)[1]["missing_keys"]
    encoder = loaded.encoder if family == "whisper" else loaded
    assert type(encoder) is type(student.encoder) and not any("head" in name for name in loaded.state_dict())
    waveforms, num_samples = make_clips(8000)
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path)
    made = extractor(waveforms[0].numpy(), sampling_rate=16000, return_tensors="pt")
    inputs = student.inputs(waveforms, num_samples)
    with torch.no_grad():
        expected = student.encoder(**inputs).last_hidden_state
        assert torch.equal(encoder(**inputs).last_hidden_state, expected)
        torch.testing.assert_close(encoder(**made).last_hidden_state, expected, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize(("form", "floor"), [("log_sigmoid", 0.313262), ("negative", -1.0)])
def test_a_student_overfits_four_clips_towards_the_least_loss(form, floor):
    teacher = make_teacher("hubert", conv_dim=[8] * 7)
    student = make_student(teacher, normalize_input=False).eval()
    waveforms, num_samples = make_clips(2000, 2000, 2000, 1700)
    inputs = student.inputs(waveforms, num_samples)
    frames = student.inputs.num_frames(num_samples)
    targets = teacher_targets(teacher, inputs, [2, 3, 4])

    def loss():
        predictions, aligned, mask = align_frames(student(inputs), targets, frames, frames, num_samples)
        return sum(distilhubert_terms(predictions, aligned, mask, form=form))

    start = loss().item()
    still = torch.optim.Adam(student.parameters(), lr=0.0)
    loss().backward()
    still.step()
    assert loss().item() == start
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    end = loss().item()
    assert floor < end < start - 0.7 * (start - floor)


def test_the_contrast_trains_the_same_student_through_masks():
    teacher = make_teacher("wavlm")
    student = make_student(teacher, colld=True, feature_grad_mult=0.1).eval()
    waveforms, num_samples = make_clips(16000, 12000)
    inputs = student.inputs(waveforms, num_samples)
    masked = span_mask(student.inputs.num_frames(num_samples), generator=torch.Generator().manual_seed(0))
    targets = teacher_targets(teacher, inputs, colld_layers(2, 4))
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        losses.append(masked_info_nce(student(inputs, masked), targets, masked))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    assert all(weight.grad is not None for weight in student.parameters())


def test_every_weight_of_the_student_learns_so_that_none_is_unused_between_processes():
    for family in FAMILIES:
        student = make_student(make_teacher(family))
        student(student.inputs(*make_clips(3000, 2500))).square().sum().backward()
        unused = [name for name, weight in student.named_parameters() if weight.requires_grad and weight.grad is None]
        assert unused == [], family


def test_terms_of_a_full_step_equal_those_of_the_plain_loss():
    teacher = make_teacher("hubert")
    student = make_student(teacher).eval()
    inputs = student.inputs(*make_clips(3000, 3000))
    predictions, targets = student(inputs), teacher_targets(teacher, inputs, [1, 2, 4])
    assert distilhubert_terms(predictions, targets) == hidden_l1_cosine(predictions, targets)
