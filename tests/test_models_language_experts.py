import copy
import json

import pytest
import torch
from conftest import tiny_whisper
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperForConditionalGeneration

from speechkd.models.language_experts import (
    SKIP_PROBABILITY,
    add_experts,
    gate_totals,
    gated_blocks,
    load_experts,
    merged_whisper,
    num_expert_parameters,
    save_experts,
    set_gate_noise,
    set_language,
    train_only,
)
from speechkd.teachers import teacher_identity


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "input_features": torch.randn(2, 80, 3000),
        "decoder_input_ids": torch.randint(0, 50_000, (2, 5)),
    }


def with_experts(*languages: str) -> WhisperForConditionalGeneration:
    model = tiny_whisper(decoder_layers=2)
    add_experts(model, languages)
    set_language(model, languages[0])
    return model


def disturbed(model: WhisperForConditionalGeneration, language: str) -> WhisperForConditionalGeneration:
    """As if trained: blocks that differ from the shared ones, and gates of either sign."""
    torch.manual_seed(2)
    for block in gated_blocks(model):
        for weight in block.experts[language].parameters():
            weight.data += 0.2 * torch.randn_like(weight)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**inputs(), use_cache=False).logits


def test_new_experts_leave_the_logits_the_same_to_the_bit():
    base = logits(tiny_whisper(decoder_layers=2))
    model = with_experts("en", "ca")
    assert all(isinstance(layer.fc2, nn.Identity) for layer in model.model.encoder.layers)
    for language in ("en", "ca", None):
        set_language(model, language)
        assert torch.equal(logits(model), base)


def test_no_language_is_the_base_model_in_training_too():
    model = disturbed(with_experts("en"), "en")
    set_language(model, None)
    set_gate_noise(model, 1.0)
    assert torch.equal(logits(model.train()), logits(tiny_whisper(decoder_layers=2)))


def test_whisper_small_gains_the_published_number_of_parameters_per_language():
    config = WhisperConfig(
        d_model=768,
        encoder_layers=12,
        decoder_layers=12,
        encoder_attention_heads=12,
        decoder_attention_heads=12,
        encoder_ffn_dim=3072,
        decoder_ffn_dim=3072,
    )
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    add_experts(model, ["ca", "th"])
    train_only(model, "ca")
    assert num_expert_parameters(model, "ca") == num_expert_parameters(model, "th") == 114_521_088
    assert sum(weight.numel() for weight in model.parameters() if weight.requires_grad) == 114_521_088


def test_each_token_goes_through_the_block_that_its_gate_chooses():
    block = gated_blocks(disturbed(with_experts("en"), "en"))[0].eval()
    states = torch.randn(3, 7, 16)
    expert = block.experts["en"]
    is_open = expert.gate_logits(states) >= 0
    assert is_open.any() and not is_open.all()
    both = torch.where(is_open.unsqueeze(-1), expert.feed_forward(states), block.shared(states))
    torch.testing.assert_close(block(states), both)
    assert torch.equal(block.gates, is_open)


def test_training_mixes_both_blocks_by_the_gate_and_skips_the_expert_now_and_then(monkeypatch):
    monkeypatch.setattr("speechkd.models.language_experts.EXPERT_DROPOUT", 0.0)
    monkeypatch.setattr("speechkd.models.language_experts.GATE_INPUT_DROPOUT", 0.0)
    block = gated_blocks(disturbed(with_experts("en"), "en"))[0].train()
    states, expert = torch.randn(3, 7, 16), block.experts["en"]
    gates = torch.sigmoid(expert.gate_logits(states)).unsqueeze(-1)
    mixed = gates * expert.feed_forward(states) + (1 - gates) * block.shared(states)
    skipped = 0
    for _ in range(400):
        output = block(states)
        is_skipped = torch.allclose(output, block.shared(states))
        assert is_skipped or torch.allclose(output, mixed, atol=1e-6)
        torch.testing.assert_close(block.gates, gates.squeeze(-1))  # without noise, skipped or not
        skipped += is_skipped
    assert abs(skipped / 400 - SKIP_PROBABILITY) < 0.08


def test_gate_noise_grows_from_none_and_drives_the_gates_apart():
    model = with_experts("en").train()
    states = torch.randn(1, 4000, 16)
    shares = {}
    for progress in (0.0, 0.1, 1.0, 2.0):
        set_gate_noise(model, progress)
        block = gated_blocks(model)[0]
        block(states)
        shares[progress] = ((block.gates > 0.1) & (block.gates < 0.9)).float().mean().item()
        assert block.gates.mean().item() == pytest.approx(0.5, abs=0.03)
    assert shares[0.0] == 1.0 and block.gates.unique().numel() > 1
    assert shares[0.1] == pytest.approx(1.0, abs=0.01)  # noise 0.5
    assert [shares[1.0], shares[2.0]] == pytest.approx([0.34, 0.34], abs=0.03)  # noise 5, and no more


def test_only_the_chosen_language_gets_gradients_and_always_all_of_it():
    model = with_experts("en", "ca").train()
    train_only(model, "ca")
    set_gate_noise(model, 0.5)
    model(**inputs(), use_cache=False).logits.sum().backward()
    moved = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert moved == {name for name, _ in model.named_parameters() if ".experts.ca." in name}


def test_skipping_every_expert_still_leaves_a_graph(monkeypatch):
    monkeypatch.setattr("speechkd.models.language_experts.SKIP_PROBABILITY", 1.1)
    model = with_experts("en").train()
    train_only(model, "en")
    model(**inputs(), use_cache=False).logits.sum().backward()
    grads = [weight.grad for weight in model.parameters() if weight.requires_grad]
    assert all(grad is not None and not grad.any() for grad in grads)


def test_gradient_checkpointing_changes_no_gradient_of_blocks_and_gates():
    gradients = []
    for checkpointing in (False, True):
        model = disturbed(with_experts("en"), "en").train()
        train_only(model, "en")
        set_gate_noise(model, 0.5)
        if checkpointing:
            model.gradient_checkpointing_enable()
        batch = inputs()
        torch.manual_seed(4)
        output = model(**batch, use_cache=False).logits
        masks = torch.ones(2, 1500, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
        sums, counts = gate_totals(model, *masks)
        (output.square().mean() + sums.sum() / counts.sum()).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_gate_totals_count_valid_tokens_alone():
    model = disturbed(with_experts("en"), "en").train()
    frame_mask = torch.arange(1500) < torch.tensor([[100], [1500]])
    token_mask = torch.arange(5) < torch.tensor([[5], [3]])
    model(**inputs(), use_cache=False)
    sums, counts = gate_totals(model, frame_mask, token_mask)
    blocks = gated_blocks(model)
    assert counts.tolist() == [1600, 1600, 8, 8] and sums.requires_grad
    torch.testing.assert_close(sums[0], blocks[0].gates[0, :100].sum() + blocks[0].gates[1].sum())
    torch.testing.assert_close(sums[3], blocks[3].gates[0].sum() + blocks[3].gates[1, :3].sum())
    set_language(model, None)
    model(**inputs(), use_cache=False)
    with pytest.raises(ValueError, match="gates are unknown"):
        gate_totals(model, frame_mask, token_mask)


def test_saved_experts_load_into_the_base_model_and_give_the_same_logits(tmp_path):
    model = disturbed(disturbed(with_experts("en", "ca"), "en"), "ca")
    base = tiny_whisper(decoder_layers=2)
    for language in ("en", "ca"):
        save_experts(model, tmp_path, language, teacher_identity("tiny", base))
    load_experts(base, tmp_path, ["ca", "en"])
    for language in ("ca", "en"):
        set_language(model, language)
        set_language(base, language)
        assert torch.equal(logits(base), logits(model))
    assert json.loads((tmp_path / "ca-experts.json").read_text())["base_model"]["name"] == "tiny"
    with pytest.raises(ValueError, match="load all languages at once"):
        load_experts(base, tmp_path, ["en"])


def test_experts_of_another_base_model_are_refused_by_name(tmp_path):
    save_experts(with_experts("en"), tmp_path, "en", teacher_identity("tiny", tiny_whisper(decoder_layers=2)))
    with pytest.raises(ValueError, match="tiny with decoder_layers=2, this model has 3"):
        load_experts(tiny_whisper(decoder_layers=3), tmp_path, ["en"])
    with pytest.raises(ValueError, match="trained on float32 weights, this model has float16"):
        load_experts(tiny_whisper(decoder_layers=2).half(), tmp_path, ["en"])
    other = tiny_whisper(decoder_layers=2)
    other.model.decoder.layer_norm.bias.data += 1e-3
    with pytest.raises(ValueError, match=r"trained on tiny \(weights SHA-256 [0-9a-f]{12}\), this is another model"):
        load_experts(other, tmp_path, ["en"])
    assert not gated_blocks(other)
    with pytest.raises(ValueError, match="no experts of 'th', only of en"):
        load_experts(other, tmp_path, ["th"])
    with pytest.raises(ValueError, match="no language is given"):
        load_experts(other, tmp_path, [])


def test_languages_that_are_not_there_or_there_already_are_named():
    model = with_experts("en")
    with pytest.raises(ValueError, match="no experts of 'ca', only of en"):
        set_language(model, "ca")
    with pytest.raises(ValueError, match="no experts of 'en', only of no language"):
        set_language(tiny_whisper(), "en")
    with pytest.raises(ValueError, match="experts of en are added twice"):
        add_experts(model, ["en"])
    with pytest.raises(ValueError, match="no experts of 'ca'"):
        merged_whisper(model, "ca", [1.0] * 4)


def test_a_merged_model_is_stock_and_exact_where_each_gate_is_constant(tmp_path):
    model = disturbed(with_experts("en"), "en")
    for index, block in enumerate(gated_blocks(model)):
        gate = block.experts["en"]
        gate.gate_in.weight.data.zero_()
        gate.gate_in.bias.data.fill_(1.0)
        gate.gate_out.weight.data.fill_(1.0 if index % 2 else -1.0)
    gated = logits(model)
    sums, counts = gate_totals(model, torch.ones(2, 1500, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool))
    shares = (sums / counts).tolist()
    assert shares == [0.0, 1.0, 0.0, 1.0]
    merged_whisper(model, "en", shares).save_pretrained(tmp_path)
    stock = WhisperForConditionalGeneration.from_pretrained(tmp_path)
    assert stock.state_dict().keys() == tiny_whisper(decoder_layers=2).state_dict().keys()
    assert torch.equal(logits(stock.eval()), gated)
    assert torch.equal(logits(model), gated)
    with pytest.raises(ValueError, match="3 open shares for 4 layers"):
        merged_whisper(model, "en", shares[:3])


def test_a_merged_model_can_be_made_right_after_a_training_step():
    model = with_experts("en").train()
    train_only(model, "en")
    model(**inputs(), use_cache=False)
    merged = merged_whisper(model, "en", [0.5, 0.49, 0.5, 0.49])
    assert not gated_blocks(merged) and len(gated_blocks(model)) == 4
    assert torch.equal(logits(merged), logits(tiny_whisper(decoder_layers=2)))


def test_experts_decode_with_a_cache_as_without():
    model = disturbed(with_experts("en"), "en")
    ids = inputs()["decoder_input_ids"]
    states = model.model.encoder(inputs()["input_features"])
    whole = model(encoder_outputs=states, decoder_input_ids=ids, use_cache=False).logits
    cache, steps = None, []
    for position in range(ids.shape[1]):
        output = model(
            encoder_outputs=states,
            decoder_input_ids=ids[:, position : position + 1],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-4, rtol=1e-4)


def test_a_copy_with_experts_keeps_the_weights_of_its_original_apart():
    base = tiny_whisper(decoder_layers=2)
    model = copy.deepcopy(base)
    add_experts(model, ["en"])
    disturbed(model, "en")
    assert torch.equal(logits(base), logits(tiny_whisper(decoder_layers=2)))
