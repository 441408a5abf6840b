import copy
import re
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    Data2VecAudioConfig,
    Data2VecAudioModel,
    HubertConfig,
    HubertModel,
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from speechkd.models import pruned_encoder
from speechkd.models.encoder_extraction import EncoderMasks, prune_encoder
from speechkd.models.hard_concrete import HardConcreteGates
from speechkd.models.pruned_encoder import PrunedEncoderConfig, PrunedEncoderModel, encoder_parts
from speechkd.models.pruning import GatedEncoder

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16, 12, 16),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
DATA2VEC = SIZES | {"num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 5}
ENCODERS = {
    "hubert": lambda: HubertModel(HubertConfig(**SIZES)),
    "hubert, norms first": lambda: HubertModel(HubertConfig(**SIZES, do_stable_layer_norm=True)),
    "wav2vec2": lambda: Wav2Vec2Model(Wav2Vec2Config(**SIZES)),
    "wavlm": lambda: WavLMModel(WavLMConfig(**SIZES, num_buckets=32, max_bucket_distance=40)),
    "data2vec": lambda: Data2VecAudioModel(Data2VecAudioConfig(**DATA2VEC)),
    "whisper": lambda: WhisperEncoder(
        WhisperConfig(
            d_model=32,
            encoder_layers=3,
            encoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_layers=0,
            vocab_size=50,
            pad_token_id=0,
            num_mel_bins=8,
            max_source_positions=20,
        )
    ),
}
every_encoder = pytest.mark.parametrize("kind", ENCODERS)


def make_encoder(kind):
    """A random encoder whose weights, all of them, differ from zero and one."""
    torch.manual_seed(1)
    encoder = ENCODERS[kind]().eval()
    for name, weight in encoder.named_parameters():
        if weight.ndim == 1 and "embed" not in name:
            torch.nn.init.normal_(weight, 1.0 if "norm.weight" in name else 0.0, 0.1)
    return encoder


def make_inputs(kind):
    generator = torch.Generator().manual_seed(2)
    if kind == "whisper":
        return {"input_features": torch.randn(2, 8, 40, generator=generator)}
    mask = torch.ones(2, 400, dtype=torch.long)
    mask[1, 300:] = 0
    return {"input_values": torch.randn(2, 400, generator=generator) * mask, "attention_mask": mask}


@torch.no_grad()
def run(model, kind):
    return model.eval()(**make_inputs(kind)).last_hidden_state


def gated(kind, gates, seed=3):
    """An encoder with gates of which about half are shut; the last convolution's and every branch stay open."""
    encoder = make_encoder(kind)
    model = GatedEncoder(encoder, gates).eval()
    torch.manual_seed(seed)
    for gate in model.gates.modules():
        if isinstance(gate, HardConcreteGates) and len(gate.logits) == 1:
            gate.logits.data.fill_(1.0)
        elif isinstance(gate, HardConcreteGates):
            torch.nn.init.normal_(gate.logits, -1.5, 2.0)
    if "conv" in gates and kind != "whisper":
        model.gates["conv"][-1].logits.data.fill_(20.0)
    return model


def ones(encoder):
    """Masks that keep everything."""
    model = GatedEncoder(copy.deepcopy(encoder), ["ffn"])
    masks = model.masks()
    return EncoderMasks(masks.conv, masks.heads, masks.ffn_units, torch.ones(3), torch.ones(3))


@every_encoder
def test_pruned_model_equals_the_gated_one(kind):
    exact_conv = () if kind == "data2vec" else ("conv",)  # its layer norms see fewer channels
    model = gated(kind, (*exact_conv, "heads", "ffn_units", "attention", "ffn"))
    pruned = model.extract()
    config = pruned.config
    assert 0 < sum(config.num_heads) < 12 and 0 < sum(config.ffn_units) < 3 * 48
    torch.testing.assert_close(run(pruned, kind), run(model, kind), atol=1e-5, rtol=0)
    if exact_conv:
        assert sum(config.conv_channels) < sum(model.num_units["conv"])
    assert pruned.num_parameters() < sum(weight.numel() for weight in model.encoder.parameters())


@pytest.mark.parametrize("kind", ["hubert", "data2vec"])
def test_last_convolution_may_lose_channels_though_norms_then_see_fewer(kind):
    model = gated(kind, ("conv", "heads", "ffn_units"))
    model.gates["conv"][-1].logits.data = torch.linspace(-4, 4, 16)
    pruned = model.extract()
    assert pruned.config.conv_channels[-1] < 16
    result = run(pruned, kind)
    assert result.shape == run(model, kind).shape and result.isfinite().all()


def test_last_convolution_folds_exactly_without_a_norm_behind_it():
    torch.manual_seed(0)
    model = GatedEncoder(HubertModel(HubertConfig(**SIZES, feat_proj_layer_norm=False)), ["conv"])
    for gate in model.gates["conv"]:
        gate.logits.data = torch.linspace(-3, 3, len(gate.logits))
    pruned = model.extract()
    assert pruned.config.conv_channels[-1] < 16
    torch.testing.assert_close(run(pruned, "hubert"), run(model, "hubert"), atol=1e-5, rtol=0)


@every_encoder
def test_emptied_branches_are_dropped_with_their_bias(kind):
    model = gated(kind, ("heads", "ffn_units"))
    for layer, name in ((0, "heads"), (1, "ffn_units"), (2, "heads"), (2, "ffn_units")):
        model.gates[name][layer].logits.data.fill_(-20.0)
    masks = model.masks()
    pruned = model.extract()
    assert pruned.config.use_attention == [False, True, False] and pruned.config.use_ffn == [True, False, False]
    names = [name for name, _ in pruned.named_parameters()]
    assert not [name for name in names if re.search(r"layers\.[02]\.(attention|self_attn)\..*_proj", name)]
    assert not [name for name in names if re.search(r"layers\.[12]\.(feed_forward|fc)", name)]
    # the gated model still adds the bias of an emptied branch, the pruned one does not
    parts = encoder_parts(model.encoder)
    for names, layers in ((parts.attentions, (0, 2)), (parts.ffn_outs, (1, 2))):
        for layer in layers:
            out = model.encoder.get_submodule(names[layer])
            getattr(out, "out_proj", out).bias.data.zero_()
    assert not masks.heads[0].any()
    torch.testing.assert_close(run(pruned, kind), run(model, kind), atol=1e-5, rtol=0)


@every_encoder
def test_whole_branches_can_go(kind):
    encoder = make_encoder(kind)
    masks = ones(encoder)
    masks.attention[1] = masks.ffn[0] = 0
    masks.attention[0], masks.ffn[2] = 0.5, 0.25
    pruned = prune_encoder(encoder, masks)
    assert pruned.config.use_attention == [True, False, True] and pruned.config.use_ffn == [False, True, True]
    parts = encoder_parts(encoder)
    outs = [f"{name}.out_proj" for name in parts.attentions]
    for names, factors in ((outs, masks.attention), (parts.ffn_outs, masks.ffn)):
        for name, factor in zip(names, factors, strict=True):
            linear = encoder.get_submodule(name)
            linear.weight.data *= factor
            linear.bias.data *= factor
    torch.testing.assert_close(run(pruned, kind), run(encoder, kind), atol=1e-5, rtol=0)


@every_encoder
def test_nothing_pruned_gives_the_same_model_with_weights_of_its_own(kind):
    encoder = make_encoder(kind)
    before = run(encoder, kind)
    pruned = prune_encoder(encoder, ones(encoder))
    torch.testing.assert_close(run(pruned, kind), before, atol=1e-5, rtol=0)
    assert isinstance(pruned.encoder, type(encoder))
    for weight in pruned.parameters():
        weight.data.zero_()
    assert torch.equal(run(encoder, kind), before)


@every_encoder
def test_saved_and_loaded_model_gives_the_same_states(kind, tmp_path):
    pruned = gated(kind, ("conv", "heads", "ffn_units")).extract()
    pruned.save_pretrained(tmp_path)
    loaded, info = PrunedEncoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert (run(loaded, kind) - run(pruned, kind)).abs().max() == 0
    assert loaded.config.heads == pruned.config.heads and loaded.config.ffn_units == pruned.config.ffn_units
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors", ".py"}
    inputs = make_inputs(kind)
    assert not [name for name, _ in loaded.named_parameters() if "scale" in name]  # it must not learn
    states = loaded.train()(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == 4 and all(torch.isfinite(state).all() for state in states)


def test_attention_implementation_reaches_the_encoder(tmp_path):
    pruned = gated("hubert", ("conv", "heads", "ffn_units")).extract()
    pruned.save_pretrained(tmp_path)
    eager = PrunedEncoderModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert (eager.encoder.config._attn_implementation, pruned.encoder.config._attn_implementation) == ("eager", "sdpa")
    torch.testing.assert_close(run(eager, "hubert"), run(pruned, "hubert"), atol=1e-5, rtol=0)
    maps = eager(**make_inputs("hubert"), output_attentions=True).attentions
    assert [attention.shape[1] for attention in maps] == [heads for heads in pruned.config.num_heads if heads]


def test_folder_loads_through_auto_classes_and_without_speechkd(tmp_path, monkeypatch):
    pruned = gated("wavlm", ("conv", "heads", "ffn_units")).extract()
    pruned.save_pretrained(tmp_path / "student")
    assert type(AutoConfig.from_pretrained(tmp_path / "student")) is PrunedEncoderConfig
    assert type(AutoModel.from_pretrained(tmp_path / "student")) is PrunedEncoderModel
    assert not re.search(r"^(from|import) speechkd", Path(pruned_encoder.__file__).read_text(), re.MULTILINE)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    name = AutoConfig.from_pretrained(tmp_path / "student").auto_map["AutoModel"]
    alone = get_class_from_dynamic_module(name, str(tmp_path / "student")).from_pretrained(tmp_path / "student")
    assert not type(alone).__module__.startswith("speechkd")
    assert torch.equal(run(alone, "wavlm"), run(pruned, "wavlm"))


def test_parameter_count_of_the_published_size():
    inner = HubertConfig(mask_time_prob=0.0)
    with torch.device("meta"):
        full = PrunedEncoderModel(PrunedEncoderConfig(encoder_config=inner))
        small = PrunedEncoderModel(
            PrunedEncoderConfig(
                encoder_config=inner,
                conv_channels=[256] * 7,
                heads=[list(range(6))] * 12,
                ffn_units=[768] * 12,
            )
        )
    counts = [sum(weight.numel() for weight in model.state_dict().values()) for model in (full, small)]
    assert counts == [94_371_456, 34_360_704]
    front_end = full.encoder.feature_extractor
    assert sum(weight.numel() for weight in front_end.state_dict().values()) == 4_200_960
    assert sum(weight.numel() for weight in front_end.parameters()) == 4_200_448


@pytest.mark.parametrize("kind", ["hubert", "wavlm"])
def test_a_model_around_the_pruned_one_does_not_draw_new_weights(kind):
    class Student(PreTrainedModel):
        _supports_sdpa = True

        def __init__(self, encoder):
            super().__init__(encoder.config)
            self.encoder = encoder
            self.post_init()

    model = gated(kind, ("conv", "heads", "ffn_units"))
    pruned = model.extract()
    expected, of_gated = run(pruned, kind), run(model, kind)
    assert torch.equal(run(Student(pruned).encoder, kind), expected)
    assert torch.equal(run(Student(model).encoder, kind), of_gated)


def test_weights_keep_their_dtype():
    encoder = make_encoder("hubert").bfloat16()
    pruned = prune_encoder(encoder, ones(encoder))
    assert {weight.dtype for weight in pruned.parameters()} == {torch.bfloat16}


def test_layer_drop_and_spec_augment_are_off():
    pruned = prune_encoder(make_encoder("hubert"), ones(make_encoder("hubert")))
    inner = pruned.config.encoder_config
    assert inner.layerdrop == inner.mask_time_prob == inner.mask_feature_prob == 0
    assert not hasattr(pruned.encoder, "masked_spec_embed")


def test_emptied_convolution_is_refused_by_name():
    encoder = make_encoder("hubert")
    masks = ones(encoder)
    masks.conv[1].zero_()
    with pytest.raises(ValueError, match=r"conv_layers\.1\.conv would lose all of its 12 channels.*lower the target"):
        prune_encoder(encoder, masks)


def test_masks_that_do_not_fit_are_refused():
    encoder = make_encoder("hubert")
    masks = ones(encoder)
    masks.heads[2] = torch.ones(5)
    with pytest.raises(ValueError, match=r"masks\.heads has \[4, 4, 5\] factors, the encoder \[4, 4, 4\] units"):
        prune_encoder(encoder, masks)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"conv_channels": [16, 12]}, "conv_channels has 2 entries, the hubert encoder needs 3"),
        ({"conv_channels": [16, 0, 16]}, r"conv_channels\[1\]=0; the convolution has 12 channels"),
        ({"heads": [[0, 4], [0], [0]]}, r"heads\[0\]=\[0, 4\]; give rising numbers from 0 to 3"),
        ({"heads": [[1, 0], [0], [0]]}, r"heads\[0\]=\[1, 0\]"),
        ({"ffn_units": [48, 49, 0]}, r"ffn_units\[1\]=49; the layer has 48 units"),
    ],
)
def test_widths_that_do_not_fit_are_refused(lists, message):
    with pytest.raises(ValueError, match=message):
        PrunedEncoderConfig(encoder_config=HubertConfig(**SIZES), **lists)


def test_other_encoders_are_refused():
    with pytest.raises(ValueError, match="'wav2vec2-bert' cannot be pruned here; take one of wav2vec2, hubert"):
        PrunedEncoderConfig(encoder_config=AutoConfig.for_model("wav2vec2-bert"))
