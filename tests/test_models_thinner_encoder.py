"""Students with other widths than their teachers: sizes, which units stay, what equals the teacher, what is saved."""

import pytest
import torch
from test_models_distilhubert import FAMILIES, count, make_clips, make_teacher
from transformers import AutoModel, HubertConfig, HubertModel

from speechkd.losses.layerwise import PredictionHeads
from speechkd.models.distilhubert import CompactStudent, compact_encoder
from speechkd.models.encoder_inputs import EncoderInputs

WAVEFORM_FAMILIES = ("hubert", "wav2vec2", "wavlm", "data2vec")
MIXED = [4, 8, 16, 16, 16, 8, 12]
THINNER = [
    ({"num_layers": 3, "conv_dim": 256, "intermediate_size": 2256}, 23_471_088),
    ({"num_layers": 2, "conv_dim": 256, "intermediate_size": 4160}, 23_490_304),
    ({"num_layers": 2, "conv_dim": [128, 256, 256, 512, 512, 512, 512], "intermediate_size": 3616}, 23_487_680),
]


def noisy_teacher(family, **changes):
    """Norms and biases differ from unit to unit, as in a trained one."""
    teacher = make_teacher(family, **changes)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return teacher


def states_of(encoder, inputs):
    with torch.no_grad():
        return encoder.eval()(**inputs, output_hidden_states=True).hidden_states


@pytest.mark.parametrize(("widths", "parameters"), THINNER)
def test_thinner_students_of_full_size_have_the_parameters_of_the_plain_one(widths, parameters):
    with torch.device("meta"):
        teacher = HubertModel(HubertConfig())
        student = compact_encoder(teacher, **widths)
        assert count(student) == parameters == pytest.approx(count(compact_encoder(teacher, 2)), rel=0.01)


@pytest.mark.parametrize("family", WAVEFORM_FAMILIES)
def test_widths_are_those_that_were_asked_for_and_every_weight_learns(family):
    teacher = noisy_teacher(family)
    encoder = compact_encoder(teacher, 2, conv_dim=MIXED, intermediate_size=56)
    assert type(encoder) is type(teacher) and list(teacher.config.conv_dim) == [16] * 7
    layers = encoder.feature_extractor.conv_layers
    assert [layer.conv.out_channels for layer in layers] == list(encoder.config.conv_dim) == MIXED
    assert [layer.conv.in_channels for layer in layers] == [1, *MIXED[:-1]]
    assert encoder.encoder.layers[0].feed_forward.intermediate_dense.out_features == 56
    student = CompactStudent(encoder, PredictionHeads(32, 32, 3), normalize_input=True).eval()
    student(student.inputs(*make_clips(8000, 8000))).square().sum().backward()
    without = {name for name, weight in student.named_parameters() if weight.grad is None or not weight.grad.any()}
    # the bias of keys is the same for all of them, so that attention does not see it
    assert all(name.endswith(("masked_spec_embed", "k_proj.bias")) for name in without)


@pytest.mark.parametrize("family", WAVEFORM_FAMILIES)
@pytest.mark.parametrize("conv_dim", [16, [16] * 7])
def test_nothing_changes_where_nothing_is_cut(family, conv_dim):
    teacher = noisy_teacher(family)
    plain, same = compact_encoder(teacher, 2), compact_encoder(teacher, 2, conv_dim=conv_dim, intermediate_size=48)
    assert all(torch.equal(weight, plain.state_dict()[name]) for name, weight in same.state_dict().items())
    inputs = EncoderInputs(teacher, normalize_input=True)(*make_clips(8000, 8000))
    waveforms = inputs["input_values"]
    with torch.no_grad():
        assert torch.equal(same.feature_extractor(waveforms), teacher.feature_extractor(waveforms))
    for ours, theirs in zip(states_of(same, inputs), states_of(plain, inputs), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "wav2vec2-bert"])
def test_units_beyond_the_teachers_leave_its_states_as_they_are(family):
    teacher = noisy_teacher(family)
    wider = compact_encoder(teacher, 2, intermediate_size=64)
    inputs = EncoderInputs(teacher, normalize_input=True)(*make_clips(8000, 8000))
    for ours, theirs in zip(states_of(wider, inputs), states_of(compact_encoder(teacher, 2), inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    layer = wider.layers[0] if family == "whisper" else wider.encoder.layers[0].feed_forward
    first, second = (layer.fc1, layer.fc2) if family == "whisper" else (layer.intermediate_dense, layer.output_dense)
    assert first.weight.shape == (64, 32) and first.weight[48:].std() > 0 and second.weight[:, 48:].eq(0).all()


@pytest.mark.parametrize("family", WAVEFORM_FAMILIES)
def test_channels_and_units_without_effect_are_the_ones_that_go(family):
    """What is silenced in the teacher may go: the student's states are then those of the plain student."""
    teacher = noisy_teacher(family)
    kept = [torch.randperm(16)[:width].sort().values for width in MIXED]
    units = torch.randperm(48)[:20].sort().values
    convolutions = [layer.conv for layer in teacher.feature_extractor.conv_layers]
    readers = [*convolutions[1:], teacher.feature_projection.projection]
    with torch.no_grad():
        for reader, channels in zip(readers, kept, strict=True):
            silent = torch.ones(16, dtype=torch.bool).index_fill(0, channels, False)
            reader.weight[:, silent] = 0
        for layer in teacher.encoder.layers:
            silent = torch.ones(48, dtype=torch.bool).index_fill(0, units, False)
            layer.feed_forward.output_dense.weight[:, silent] = 0
    student = compact_encoder(teacher, 2, conv_dim=MIXED, intermediate_size=20)
    theirs, ours = teacher.state_dict(), student.state_dict()
    inputs = [torch.arange(1), *kept[:-1]]
    for index, (rows, columns) in enumerate(zip(kept, inputs, strict=True)):
        name = f"feature_extractor.conv_layers.{index}"
        for key in (f"{name}.conv.bias", f"{name}.layer_norm.weight", f"{name}.layer_norm.bias"):
            assert (key in ours) == (key in theirs) and (key not in ours or torch.equal(ours[key], theirs[key][rows]))
        assert torch.equal(ours[f"{name}.conv.weight"], theirs[f"{name}.conv.weight"][rows][:, columns])
    projection = "feature_projection.projection.weight"
    assert torch.equal(ours[projection], theirs[projection][:, kept[-1]])
    if family != "hubert":  # whose student has no norm there
        assert torch.equal(
            ours["feature_projection.layer_norm.bias"], theirs["feature_projection.layer_norm.bias"][kept[-1]]
        )
    first = "encoder.layers.1.feed_forward.intermediate_dense.bias"
    assert torch.equal(ours[first], theirs[first][units])
    if family == "hubert":  # no norm over channels, which would hear the silenced ones
        clips = EncoderInputs(teacher, normalize_input=True)(*make_clips(8000, 8000))
        for thin, plain in zip(states_of(student, clips), states_of(compact_encoder(teacher, 2), clips), strict=True):
            torch.testing.assert_close(thin, plain, rtol=1e-4, atol=1e-4)


def test_the_gain_of_a_normalisation_of_its_own_says_what_a_channel_weighs():
    teacher = make_teacher("hubert")
    first = teacher.feature_extractor.conv_layers[0]
    with torch.no_grad():
        first.conv.weight[3] *= 100  # divided out again
        first.layer_norm.weight[3] = 0.01
        first.layer_norm.weight[5] = 100
    student = compact_encoder(teacher, 1, conv_dim=[1, *[16] * 6])
    assert torch.equal(student.feature_extractor.conv_layers[0].conv.weight, first.conv.weight[5:6])


@pytest.mark.parametrize("init", ["teacher", "random"])
def test_stock_transformers_loads_a_thinner_student(init, tmp_path):
    encoder = compact_encoder(noisy_teacher("hubert"), 3, init=init, conv_dim=MIXED, intermediate_size=20)
    student = CompactStudent(encoder, PredictionHeads(32, 32, 3), normalize_input=False)
    student.save_encoder(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is HubertModel and list(loaded.config.conv_dim) == MIXED and not info["missing_keys"]
    waveforms, _ = make_clips(8000)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(waveforms).last_hidden_state, encoder.eval()(waveforms).last_hidden_state)


def test_half_precision_teachers_have_thinner_float32_students():
    student = compact_encoder(noisy_teacher("hubert").bfloat16(), 2, conv_dim=8, intermediate_size=64)
    assert {weight.dtype for weight in student.parameters()} == {torch.float32}


def test_the_gradient_of_thinner_convolutions_is_scaled_like_others():
    teacher, gradients = noisy_teacher("hubert"), []
    for factor in (1.0, 0.1):
        torch.manual_seed(3)
        encoder, heads = compact_encoder(teacher, 2, conv_dim=8), PredictionHeads(32, 32, 3)
        student = CompactStudent(encoder, heads, feature_grad_mult=factor, normalize_input=True).eval()
        student(student.inputs(*make_clips(3000))).square().sum().backward()
        gradients.append(student.encoder.feature_extractor.conv_layers[1].conv.weight.grad)
    torch.testing.assert_close(gradients[1], 0.1 * gradients[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "widths", "message"),
    [
        ("whisper", {"conv_dim": 8}, "conv_dim=8, but a whisper has no convolutions over the waveform .* leave it out"),
        ("wav2vec2-bert", {"conv_dim": [8]}, r"conv_dim=\[8\], but a wav2vec2-bert .* of type wav2vec2, hubert"),
        ("wav2vec2-bert", {"intermediate_size": 8}, "intermediate_size=8, but the layers of a w2v-BERT keep"),
        ("hubert", {"conv_dim": 17}, "conv_dim=17: convolution 0 would have 17 channels, .* has 16; choose 1 to 16"),
        ("hubert", {"conv_dim": [16] * 6 + [0]}, "convolution 6 would have 0 channels"),
        ("hubert", {"conv_dim": [8, 8]}, r"conv_dim=\[8, 8\] has 2 widths, but the teacher has 7 convolutions; give"),
        ("hubert", {"intermediate_size": 0}, "intermediate_size=0; give 1 unit or more"),
    ],
)
def test_widths_that_do_not_fit_are_refused(family, widths, message):
    with pytest.raises(ValueError, match=message):
        compact_encoder(make_teacher(family), 2, **widths)
