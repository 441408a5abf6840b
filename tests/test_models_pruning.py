import copy
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    Data2VecAudioConfig,
    Data2VecAudioModel,
    HubertConfig,
    HubertForCTC,
    HubertModel,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperModel,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from speechkd.models.hard_concrete import HardConcreteGates, hard_concrete
from speechkd.models.pruning import (
    DROP_RATES,
    GatedEncoder,
    LayerProjections,
    SparsityPenalty,
    layer_states,
    parameter_groups,
    target_sparsity,
)

ALL_GATES = tuple(DROP_RATES)
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16, 12, 16),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
}
WHISPER = WhisperConfig(
    d_model=32,
    encoder_layers=2,
    encoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_layers=0,
    vocab_size=50,
    pad_token_id=0,
    num_mel_bins=8,
    max_source_positions=20,
    encoder_layerdrop=0.5,
)
ENCODERS = {
    "hubert": lambda: HubertModel(HubertConfig(**SIZES)),
    "hubert, norms first": lambda: HubertModel(
        HubertConfig(**SIZES, do_stable_layer_norm=True, feat_extract_norm="layer", conv_bias=True)
    ),
    "wav2vec2": lambda: Wav2Vec2Model(Wav2Vec2Config(**SIZES)),
    "wavlm": lambda: WavLMModel(WavLMConfig(**SIZES, num_buckets=32, max_bucket_distance=40)),
    "data2vec": lambda: Data2VecAudioModel(
        Data2VecAudioConfig(**(SIZES | {"num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 5}))
    ),
    "whisper": lambda: WhisperEncoder(WHISPER),
}
every_encoder = pytest.mark.parametrize("kind", ENCODERS)


def make_encoder(kind="hubert"):
    torch.manual_seed(1)
    return ENCODERS[kind]().eval()


def make_inputs(kind="hubert", seed=2):
    generator = torch.Generator().manual_seed(seed)
    if kind == "whisper":
        return {"input_features": torch.randn(2, 8, 40, generator=generator)}
    mask = torch.ones(2, 400, dtype=torch.long)
    mask[1, 300:] = 0
    return {"input_values": torch.randn(2, 400, generator=generator) * mask, "attention_mask": mask}


def gates_of(model):
    return [module for module in model.gates.modules() if isinstance(module, HardConcreteGates)]


def weighted_sum(states):
    """A loss that no normalisation makes constant."""
    return (states * torch.randn(states.shape, generator=torch.Generator().manual_seed(6))).sum()


def make_gate(logits):
    gate = HardConcreteGates(len(logits), 0.5)
    gate.logits.data = torch.as_tensor(logits, dtype=torch.float32)
    return gate


def full_size():
    """HuBERT Base without weights, whose gates start exactly at their means."""
    with torch.device("meta"):
        encoder = HubertModel(HubertConfig())
    model = GatedEncoder(encoder)
    for kind, rows in model.gates.items():
        for gate in rows:
            gate.logits.data.fill_(math.log((1 - DROP_RATES[kind]) / DROP_RATES[kind]))
    return model


def test_open_probability():
    assert (2 / 3) * -math.log(0.1 / 1.1) == pytest.approx(1.598597, abs=1e-6)
    probabilities = make_gate([0.0, math.log(99), -1.598597]).open_probabilities()
    assert probabilities.tolist() == pytest.approx([0.831822, 0.997962, 0.5], abs=1e-6)


def test_share_of_open_draws_is_the_open_probability():
    torch.manual_seed(0)
    share = (make_gate(torch.zeros(1_000_000)).train()() > 0).double().mean().item()
    assert share == pytest.approx(0.831822, abs=0.0015)  # four standard deviations


def test_factors_of_given_draws():
    logits, uniform = torch.tensor([0.0, 0.0, 0.0, -2.0]), torch.tensor([0.5, 0.1, 0.9, 0.5])
    assert hard_concrete(logits, uniform).tolist() == pytest.approx([0.5, 0.0, 1.0, 0.0], abs=1e-6)
    wide = hard_concrete(torch.zeros(2, dtype=torch.float64), torch.tensor([0.2, 0.7], dtype=torch.float64))
    soft = [1 / (1 + (0.8 / 0.2) ** 1.5), 1 / (1 + (0.3 / 0.7) ** 1.5)]
    assert wide.tolist() == pytest.approx([1.2 * value - 0.1 for value in soft])


def test_evaluation_mask_keeps_soft_values_and_counts_zeros():
    gate = make_gate(torch.arange(-3, 5)).eval()
    assert gate.expected_size().item() == pytest.approx(5.966209, abs=1e-6)
    expected = [0, 0, 0.2315, 0.5, 0.7685, 0.9168, 0.9734, 0.9918]
    assert gate().tolist() == pytest.approx(expected, abs=5e-5)
    assert torch.equal(gate(), gate.evaluation_mask())
    assert (make_gate([0.0] * 6).evaluation_mask() == 0).sum() == 1  # ties: 6 - 4.99 zeros, not all or none


def test_draws_come_from_torchs_generator_once_per_call():
    gate = make_gate([0.0] * 8).train()
    torch.manual_seed(4)
    state = torch.get_rng_state()
    first, second = gate(), gate()
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(gate(), first) and torch.equal(gate(), second)


def test_first_logits_scatter_around_the_drop_rate():
    torch.manual_seed(0)
    gate = HardConcreteGates(4096, 0.01)
    assert gate.logits.mean().item() == pytest.approx(math.log(99), abs=1e-3)
    assert gate.logits.std().item() == pytest.approx(0.01, rel=0.1)


def test_expected_size_of_hubert_base_at_the_start():
    model = full_size()
    assert model.num_full_parameters == 94_371_456
    assert model.expected_parameters().item() == pytest.approx(84_766_853, abs=1)
    assert model.sparsity().item() == pytest.approx(0.101774, abs=1e-6)
    assert 0.25 * model.num_full_parameters == 23_592_864
    assert [len(rows) for rows in model.gates.values()] == [7, 12, 12]
    assert [len(rows[0].logits) for rows in model.gates.values()] == [512, 12, 3072]


def test_expected_size_of_the_example():
    model = full_size()
    for kind, kept in (("conv", 256), ("heads", 6), ("ffn_units", 768)):
        for gate in model.gates[kind]:
            gate.logits.data = torch.where(torch.arange(len(gate.logits)) < kept, 60.0, -60.0)
    assert model.expected_parameters().item() == pytest.approx(34_360_704, abs=0.01)


@every_encoder
def test_expected_size_is_the_extracted_size_where_gates_are_certain(kind):
    model = GatedEncoder(make_encoder(kind), ("conv", "heads", "ffn_units", "ffn"))
    for gate in gates_of(model):
        gate.logits.data = torch.where(torch.arange(len(gate.logits)) % 3 > 0, -60.0, 60.0)
    pruned = model.extract()
    uncounted = sum(
        weight.numel()
        for name, weight in pruned.state_dict().items()
        if name.rsplit(".attention.")[-1].startswith(("gru_", "rel_attn"))
    )
    assert (
        sum(weight.numel() for weight in pruned.state_dict().values()) - uncounted == model.expected_parameters().item()
    )
    assert (uncounted > 0) == (kind == "wavlm")


def test_expected_size_is_near_the_extracted_size():
    torch.manual_seed(0)
    model = GatedEncoder(make_encoder(), ("conv", "heads", "ffn_units"))
    for gate in gates_of(model):
        torch.nn.init.normal_(gate.logits, -1.0, 1.0)
    expected = model.expected_parameters().item()
    assert sum(weight.numel() for weight in model.extract().parameters()) == pytest.approx(expected, rel=0.1)


def test_expected_size_has_a_gradient_at_every_gate():
    model = GatedEncoder(make_encoder(), ALL_GATES)
    model.sparsity().backward()
    assert all((gate.logits.grad < 0).all() for gate in gates_of(model))  # a wider gate is a smaller sparsity


@every_encoder
def test_open_gates_change_nothing(kind):
    encoder = make_encoder(kind)
    with torch.no_grad():
        expected = encoder(**make_inputs(kind)).last_hidden_state
        model = GatedEncoder(encoder, ALL_GATES)
        for gate in gates_of(model):
            gate.logits.data.fill_(60.0)
        for mode in (True, False):
            states = model.train(mode)(**make_inputs(kind)).last_hidden_state
            torch.testing.assert_close(states, expected, atol=2e-6, rtol=0)


@every_encoder
def test_draws_change_the_states_and_evaluation_does_not_draw(kind):
    model = GatedEncoder(make_encoder(kind))
    inputs = make_inputs(kind)
    with torch.no_grad():
        first, second = (model.train()(**inputs).last_hidden_state for _ in range(2))
        assert (first - second).abs().max() > 1e-3
        before = torch.get_rng_state()
        first, second = (model.eval()(**inputs).last_hidden_state for _ in range(2))
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), before)


def test_one_draw_serves_the_whole_batch():
    model = GatedEncoder(make_encoder()).train()
    waveform = torch.randn(1, 400).expand(3, -1)
    with torch.no_grad():
        states = model(waveform).last_hidden_state
    torch.testing.assert_close(states[0], states[2])


@every_encoder
def test_every_gate_and_weight_learns(kind):
    torch.manual_seed(0)
    model = GatedEncoder(make_encoder(kind), ALL_GATES).train()
    for gate in gates_of(model):
        gate.logits.data.zero_()  # most draws lie between 0 and 1
    for _ in range(8):
        weighted_sum(model(**make_inputs(kind)).last_hidden_state).backward()
    assert all(gate.logits.grad.abs().max() > 1e-4 for gate in gates_of(model))
    frozen = ("penalty", "encoder.embed_positions")
    silent = [name for name, weight in model.named_parameters() if not name.startswith(frozen) and weight.grad is None]
    assert not silent


def test_gradient_checkpointing_sees_the_same_draws():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = GatedEncoder(make_encoder()).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.encoder.modules())
        torch.manual_seed(5)
        weighted_sum(model(**make_inputs()).last_hidden_state).backward()
        gradients.append([weight.grad for weight in model.parameters() if weight.grad is not None])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert max(gradient.abs().max() for gradient in gradients[0]) > 0.1


def test_copies_have_gates_of_their_own():
    model = GatedEncoder(make_encoder()).eval()
    clone = copy.deepcopy(model)
    for gate in gates_of(clone):
        gate.logits.data.fill_(60.0)
    with torch.no_grad():
        states = clone(**make_inputs()).last_hidden_state
        torch.testing.assert_close(states, make_encoder()(**make_inputs()).last_hidden_state, atol=2e-6, rtol=0)
        assert (model(**make_inputs()).last_hidden_state - states).abs().max() > 1e-2


def test_bfloat16_input_keeps_its_dtype():
    model = GatedEncoder(make_encoder(), ALL_GATES).train()
    model.encoder.bfloat16()
    states = model(make_inputs()["input_values"].bfloat16()).last_hidden_state
    assert states.dtype == torch.bfloat16 and gates_of(model)[0].logits.dtype == torch.float32


def test_layer_drop_and_spec_augment_are_off():
    model = GatedEncoder(make_encoder("whisper"))
    assert model.encoder.layerdrop == model.config.encoder_layerdrop == 0
    model = GatedEncoder(make_encoder("hubert"))
    assert model.config.layerdrop == model.config.mask_time_prob == 0 and not hasattr(
        model.encoder, "masked_spec_embed"
    )


def test_penalty():
    penalty = SparsityPenalty()
    sparsity = torch.tensor(0.30, requires_grad=True)
    assert penalty(sparsity, 0.45).item() == 0
    penalty.linear.data.fill_(0.5)
    penalty.quadratic.data.fill_(2.0)
    value = penalty(sparsity, 0.45)
    value.backward()
    assert value.item() == pytest.approx(-0.03)
    assert penalty.linear.grad.item() == pytest.approx(-0.15)
    assert penalty.quadratic.grad.item() == pytest.approx(0.0225)
    assert sparsity.grad.item() == pytest.approx(0.5 + 2 * 2.0 * -0.15)


def test_target_rises_and_stays():
    targets = [target_sparsity(update) for update in (0, 1000, 2500, 5000, 6000)]
    assert targets == pytest.approx([0, 0.15, 0.375, 0.75, 0.75])


def test_multipliers_climb_as_with_a_negative_learning_rate():
    model = GatedEncoder(make_encoder())
    optimizer = torch.optim.AdamW(parameter_groups(model), betas=(0.9, 0.999))
    other = torch.nn.Parameter(torch.zeros(1))
    negative = torch.optim.AdamW([{"params": [other], "lr": -0.02}], weight_decay=0.0)
    for gradient in (-0.1, -0.1, -0.05):
        model.penalty.linear.grad = torch.full((1,), gradient)
        other.grad = torch.full((1,), gradient)
        optimizer.step()
        negative.step()
    assert model.penalty.linear.item() == pytest.approx(-0.0588363, abs=1e-7)
    assert other.item() == pytest.approx(-0.0588363, abs=1e-7)


def test_groups_hold_every_learning_parameter_once():
    model = GatedEncoder(make_encoder(), projections=LayerProjections(32, (0, 2)))
    model.encoder.feature_extractor.requires_grad_(False)
    groups = parameter_groups(model, learning_rate=1e-4)
    held = [id(weight) for group in groups for weight in group["params"]]
    learning = [id(weight) for weight in model.parameters() if weight.requires_grad]
    assert len(set(held)) == len(held) and set(held) == set(learning)
    assert [group["lr"] for group in groups] == [1e-4, 0.02, 0.02]
    assert all(group["weight_decay"] == 0 for group in groups)
    assert {id(weight) for weight in model.projections.parameters()} <= {id(weight) for weight in groups[0]["params"]}


def test_penalty_drives_the_sparsity_to_its_target():
    torch.manual_seed(0)
    model = GatedEncoder(make_encoder())
    optimizer = torch.optim.AdamW(parameter_groups(model, gate_learning_rate=0.05))
    for update in range(400):
        optimizer.zero_grad()
        model.penalty(model.sparsity(), target_sparsity(update, 0.5, 200)).backward()
        optimizer.step()
    assert model.sparsity().item() == pytest.approx(0.5, abs=0.03)
    pruned = model.extract()
    share = sum(weight.numel() for weight in pruned.parameters()) / model.num_full_parameters
    assert share == pytest.approx(0.5, abs=0.1)


def test_training_goes_on_from_a_checkpoint_step_by_step():
    def steps(model, optimizer, num_steps):
        for _ in range(num_steps):
            optimizer.zero_grad()
            loss = weighted_sum(model(**make_inputs()).last_hidden_state)
            (loss + model.penalty(model.sparsity(), 0.5)).backward()
            optimizer.step()

    torch.manual_seed(0)
    model = GatedEncoder(make_encoder()).train()
    optimizer = torch.optim.AdamW(parameter_groups(model))
    steps(model, optimizer, 1)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    steps(model, optimizer, 2)
    other = GatedEncoder(make_encoder()).train()
    other_optimizer = torch.optim.AdamW(parameter_groups(other))
    other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    torch.set_rng_state(saved[2])
    steps(other, other_optimizer, 2)
    for (name, weight), (_, expected) in zip(other.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(weight, expected), name


@every_encoder
def test_layer_zero_is_taken_before_the_positions(kind):
    encoder, inputs = make_encoder(kind), make_inputs(kind)
    inputs.pop("attention_mask", None)
    with torch.no_grad():
        states = layer_states(encoder, (0, 1, 2), **inputs)
        output = encoder(**inputs, output_hidden_states=True)
        hidden = output.hidden_states
        if kind == "whisper":
            first = F.gelu(encoder.conv2(F.gelu(encoder.conv1(inputs["input_features"])))).transpose(1, 2)
        else:
            first = encoder.feature_projection(encoder.feature_extractor(inputs["input_values"]).transpose(1, 2))
            first = first[0] if isinstance(first, tuple) else first
    torch.testing.assert_close(states, torch.stack([first, hidden[1], output.last_hidden_state], dim=1))
    assert (first - hidden[0]).abs().max() > 1e-3
    assert not encoder.get_submodule("conv2" if kind == "whisper" else "feature_projection")._forward_hooks


def test_layer_states_of_gated_and_pruned_models():
    model = GatedEncoder(make_encoder(), ("heads", "ffn_units")).eval()
    with torch.no_grad():
        states = layer_states(model, (0, 2), **make_inputs())
        torch.testing.assert_close(layer_states(model.extract(), (0, 2), **make_inputs()), states, atol=1e-5, rtol=0)
    assert states.shape == (2, 2, 19, 32)


def test_projections_start_as_the_identity_and_share_one_map():
    projections = LayerProjections(768)
    assert sum(weight.numel() for weight in projections.parameters()) == 2 * (768 * 768 + 768)
    projections = LayerProjections(8)
    states = torch.randn(2, 4, 5, 8)
    torch.testing.assert_close(projections(states), states)
    projections.first.weight.data.zero_()
    projections.shared.bias.data.fill_(1.0)
    expected = states + 1
    expected[:, 0] = 0
    torch.testing.assert_close(projections(states), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GatedEncoder(make_encoder(), ["heads", "head"]), r"gates=\['heads', 'head'\]; choose one or more of"),
        (lambda: GatedEncoder(make_encoder(), []), r"gates=\[\]; choose"),
        (
            lambda: GatedEncoder(WhisperModel(WHISPER)),
            "only the encoder can be pruned, got WhisperModel; give .encoder",
        ),
        (lambda: GatedEncoder(HubertForCTC(HubertConfig(**SIZES))), "HubertForCTC has a head.*give .base_model"),
        (lambda: HardConcreteGates(0, 0.5), "num_units=0"),
        (lambda: HardConcreteGates(4, 1.0), r"drop_rate=1.0; give 1 unit or more and a rate in \(0, 1\)"),
        (lambda: target_sparsity(1, 1.0), r"final=1.0, ramp_updates=5000; give a final sparsity in \[0, 1\)"),
        (lambda: target_sparsity(1, 0.5, 0), "ramp_updates=0"),
        (lambda: layer_states(make_encoder(), (0, 3)), r"layers \[0, 3\] of an encoder of 2; choose from 0 to 2"),
        (lambda: LayerProjections(8, ()), "no layer to compare"),
        (lambda: LayerProjections(8)(torch.zeros(2, 3, 5, 8)), r"do not hold the layers \[0, 4, 8, 12\]"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_other_encoders_are_refused():
    with torch.device("meta"):
        encoder = Wav2Vec2BertModel(Wav2Vec2BertConfig())
    with pytest.raises(ValueError, match="'wav2vec2-bert' cannot be pruned here; take one of wav2vec2, hubert"):
        GatedEncoder(encoder)


def test_sparsity_that_empties_a_convolution_is_refused():
    model = GatedEncoder(make_encoder())
    model.gates["conv"][2].logits.data.fill_(-60.0)
    with pytest.raises(ValueError, match=r"conv_layers\.2\.conv would lose all of its 16 channels"):
        model.extract()
