"""Whisper's encoder on less than its window: the stock encoder's states, modes, gates and gradients."""

import copy

import pytest
import torch
from test_models_distilhubert import make_teacher
from torch import nn

from speechkd.data.features import WhisperLogMel
from speechkd.models.pruning import GatedEncoder, layer_states
from speechkd.models.whisper import shorten_encoder
from speechkd.models.whisper_states import whisper_output


def make_features(num_samples: int = 16_000, window_seconds: float = 2.0) -> torch.Tensor:
    torch.manual_seed(1)
    return WhisperLogMel(80, window_seconds)(0.1 * torch.randn(2, num_samples))


def assert_same(ours, theirs) -> None:
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 5
    for mine, its in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_at_the_full_window_the_states_are_those_of_the_stock_encoder(training):
    encoder = make_teacher("whisper", dropout=0.2, activation_dropout=0.1).train(training)
    features, outputs = make_features(), []
    for run in (whisper_output, lambda model, values: model(values, output_hidden_states=True)):
        torch.manual_seed(2)
        outputs.append(run(encoder, features))
    assert_same(*outputs)
    assert whisper_output(encoder, features).last_hidden_state.equal(outputs[0].last_hidden_state) is not training


def test_a_shorter_input_has_the_first_positions():
    encoder = make_teacher("whisper")
    short = copy.deepcopy(encoder)
    shorten_encoder(short, 1)
    features = make_features(12_000)[..., :100]
    with torch.no_grad():
        output = whisper_output(encoder, features)
        assert_same(output, short(features, output_hidden_states=True))
        half = whisper_output(encoder, features[..., :50])
    assert half.last_hidden_state.shape == (2, 25, 32)
    assert not half.last_hidden_state.equal(output.last_hidden_state[:, :25])


def test_layers_are_dropped_in_training_alone():
    encoder = make_teacher("whisper", encoder_layerdrop=1.0, dropout=0.0)
    features = make_features()[..., :100]
    quiet = whisper_output(encoder, features).hidden_states
    assert not any(quiet[layer].equal(quiet[layer + 1]) for layer in range(4))
    states = whisper_output(encoder.train(), features).hidden_states
    assert all(state.equal(states[0]) for state in states[1:-1]) and len(states) == 5


def test_gradient_checkpointing_computes_layers_again_and_changes_no_gradient():
    encoder = make_teacher("whisper", dropout=0.0).train()
    features, calls, gradients = make_features()[..., :60], [], []
    encoder.layers[0].fc1.register_forward_hook(lambda *call: calls[-1].append(1))
    for enable in (False, True):
        if enable:
            encoder.gradient_checkpointing_enable()
        encoder.zero_grad()
        calls.append([])
        whisper_output(encoder, features).last_hidden_state.square().sum().backward()
        gradients.append([weight.grad for weight in encoder.parameters() if weight.requires_grad])
    assert [len(made) for made in calls] == [1, 2]
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_gates_act_on_less_than_the_window_as_on_all_of_it():
    gated = GatedEncoder(make_teacher("whisper"), ["conv", "heads", "ffn_units", "attention", "ffn"]).eval()
    with torch.no_grad():
        for gates in gated.gates.values():
            for index, gate in enumerate(gates):
                nn.init.normal_(gate.logits, mean=2.0 if index else 0.0, std=2.0)
        masks = gated.masks()
        assert min(mask.min().item() for mask in (*masks.heads, *masks.ffn_units, *masks.conv)) < 0.5
        short = make_features()[..., :100]
        small = copy.deepcopy(gated)
        shorten_encoder(small.encoder, 1)
        ours = layer_states(gated, [0, 1, 4], input_features=short)
        theirs = small(short, output_hidden_states=True)
        torch.testing.assert_close(ours[:, 1], theirs.hidden_states[1], rtol=0, atol=1e-5)
        torch.testing.assert_close(ours[:, 2], theirs.last_hidden_state, rtol=0, atol=1e-5)
        pruned = layer_states(gated.extract(), [0, 1, 4], input_features=short)
    torch.testing.assert_close(pruned, ours, rtol=0, atol=1e-4)
    torch.manual_seed(3)
    draws = [layer_states(gated.train(), [4], input_features=short) for _ in range(2)]
    assert not draws[0].equal(draws[1])
