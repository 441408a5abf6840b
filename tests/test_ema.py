"""The moving average of the weights: its values, its file, its precision and the swap into the model."""

import pytest
import torch
from conftest import tiny_whisper
from safetensors import safe_open
from torch import nn
from torch.utils.data import TensorDataset
from transformers import Trainer, TrainingArguments

from speechkd.ema import EmaCallback, WeightAverage


def small_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two trainable layers around a frozen one, with a buffer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 7), nn.BatchNorm1d(7), nn.Linear(7, 2))
    model[1].requires_grad_(False)
    return model.to(dtype)


@torch.no_grad()
def drift(model: nn.Module, seed: int) -> None:
    """Stands for an optimizer step."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            step = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter += step.to(parameter)


def test_average_equals_a_plain_float64_loop_with_warm_up():
    model = small_model()
    average = WeightAverage(model, decay=0.9)
    expected = {name: p.detach().double() for name, p in model.named_parameters() if p.requires_grad}
    for step in range(200):
        drift(model, step)
        average.update()
        decay = min(0.9, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            if name in expected:
                expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
    assert average.num_updates == 200 and (1 + 199) / (10 + 199) > 0.9  # both branches of the decay were used
    assert set(average.weights) == set(expected)
    for name, weight in average.weights.items():
        torch.testing.assert_close(weight.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_only_trainable_parameters_are_averaged_and_no_graph_is_kept():
    model = small_model()
    average = WeightAverage(model, decay=0.9)
    model(torch.randn(3, 5)).sum().backward()
    average.update()
    assert set(average.weights) == {"0.weight", "0.bias", "2.weight", "2.bias", "3.weight", "3.bias"}
    assert set(average.weights) < set(model.state_dict())
    assert all(not weight.requires_grad and weight.grad_fn is None for weight in average.weights.values())


def test_tied_weights_are_held_once_and_stay_tied():
    model = tiny_whisper(decoder_layers=1)
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    average = WeightAverage(model, decay=0.5)
    assert "model.decoder.embed_tokens.weight" in average.weights and "proj_out.weight" not in average.weights
    start = model.proj_out.weight.detach().clone()
    drift(model, 1)
    average.update()
    with average.applied(model):
        assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
        moved = model.proj_out.weight.detach()
        torch.testing.assert_close(moved, average.weights["model.decoder.embed_tokens.weight"], rtol=0, atol=0)
        assert not torch.equal(moved, start)


def test_average_of_a_bfloat16_model_keeps_float32_precision():
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    average = WeightAverage(model, decay=0.999)
    average.num_updates = 100_000  # past the warm-up
    nn.init.constant_(model.weight, 1.0078125)  # the next bfloat16 number
    for _ in range(100):
        average.update()
    # each update moves the average by under 2**-17, which bfloat16 would round away at 1
    expected = 1 + 0.0078125 * (1 - 0.999**100)
    assert average.weights["weight"].dtype == torch.float32
    assert average.weights["weight"].item() == pytest.approx(expected, abs=5e-6)
    average.copy_to(model)
    assert model.weight.dtype == torch.bfloat16


def test_average_of_weights_that_stand_still_does_not_drift():
    model = nn.Linear(3, 3)
    average = WeightAverage(model, decay=0.9999)
    average.num_updates = 100_000  # past the warm-up
    for _ in range(20_000):
        average.update()
    torch.testing.assert_close(average.weights["weight"], model.weight.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("through_file", [True, False])
def test_saved_average_continues_bit_for_bit(tmp_path, through_file):
    model, resumed_model = small_model(), small_model()
    average, resumed = WeightAverage(model, decay=0.99), None
    for step in range(12):
        if step == 5:
            if through_file:
                average.save(tmp_path / "ema.safetensors")
            state = {"num_updates": average.num_updates, "weights": {n: w.clone() for n, w in average.weights.items()}}
            resumed_model.load_state_dict(model.state_dict())
            resumed = WeightAverage(resumed_model, decay=0.99)
            if through_file:
                resumed.load(tmp_path / "ema.safetensors")
            else:
                assert average.state_dict().keys() == state.keys()
                resumed.load_state_dict(state)
        drift(model, step)
        average.update()
        if resumed is not None:
            drift(resumed_model, step)
            resumed.update()
    assert resumed is not None and resumed.num_updates == average.num_updates == 12
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in average.weights.items())


def test_file_is_plain_safetensors_with_the_count(tmp_path):
    model = small_model(torch.bfloat16)
    average = WeightAverage(model, decay=0.9)
    average.update()
    average.save(tmp_path / "new/ema.safetensors")
    with safe_open(tmp_path / "new/ema.safetensors", framework="pt") as file:
        assert file.metadata()["num_updates"] == "1"
        assert file.get_tensor("0.weight").dtype == torch.float32
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["ema.safetensors"]


def test_applied_swaps_and_restores_bit_for_bit_also_after_an_exception():
    model = small_model(torch.bfloat16)
    average = WeightAverage(model, decay=0.9)
    drift(model, 1)
    average.update()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = list(model.parameters())
    with pytest.raises(KeyboardInterrupt), average.applied(model):
        for name, weight in average.weights.items():
            assert torch.equal(model.state_dict()[name], weight.to(torch.bfloat16))
        assert not torch.equal(model.state_dict()["0.weight"], before["0.weight"])
        assert torch.equal(model.state_dict()["1.weight"], before["1.weight"])  # frozen
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    # an optimizer holds these objects
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))


def test_average_follows_parameters_that_were_replaced():
    model = nn.Linear(2, 2, bias=False)
    average = WeightAverage(model, decay=0.5)
    average.update()
    model.weight = nn.Parameter(torch.full((2, 2), 5.0))
    average.num_updates = 1000
    start = average.weights["weight"].clone()
    average.update()
    torch.testing.assert_close(average.weights["weight"], (start + 5) / 2)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, float("nan")])
def test_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=f"above 0 and below 1, got {decay}"):
        WeightAverage(small_model(), decay)


def test_frozen_model_is_refused():
    with pytest.raises(ValueError, match="Sequential has no parameter with requires_grad"):
        WeightAverage(small_model().requires_grad_(False), 0.9)


def test_average_of_another_model_is_refused_and_changes_nothing(tmp_path):
    model = small_model()
    average = WeightAverage(model, decay=0.9)
    wider = nn.Sequential(nn.Linear(5, 8))
    WeightAverage(wider, decay=0.9).save(tmp_path / "wider.safetensors")
    before = {name: weight.clone() for name, weight in average.weights.items()}
    with pytest.raises(
        ValueError, match=r"wider.safetensors: .* differ at 0.weight: \(8, 5\) stored, \(7, 5\) trained"
    ):
        average.load(tmp_path / "wider.safetensors")
    with pytest.raises(ValueError, match=r"differ at 4.weight: \(1,\) stored, no such weight trained"):
        average.load_state_dict({"num_updates": 3, "weights": {**before, "4.weight": torch.ones(1)}})
    with pytest.raises(ValueError, match=r"0.weight of the average has shape \(7, 5\), .* has \(8, 5\)"):
        average.copy_to(wider)
    assert average.num_updates == 0
    assert all(torch.equal(weight, before[name]) for name, weight in average.weights.items())


def test_missing_damaged_or_foreign_file_is_named(tmp_path):
    average = WeightAverage(small_model(), decay=0.9)
    average.save(tmp_path / "cut.safetensors")
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-10])
    small_model()[0].weight.data.numpy().tofile(tmp_path / "raw.safetensors")
    for name in ("cut.safetensors", "raw.safetensors", "absent.safetensors"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as a weight average"):
            average.load(tmp_path / name)


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 1)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.linear(inputs) - targets).square().mean()}


def test_callback_updates_once_per_optimizer_step_under_accumulation(tmp_path):
    model = Regression()
    average = WeightAverage(model, decay=0.9)
    weights = [model.linear.weight.detach().clone()]
    real_update = average.update

    def recorded_update() -> None:
        weights.append(model.linear.weight.detach().clone())
        real_update()

    average.update = recorded_update  # type: ignore[method-assign]
    data = TensorDataset(torch.randn(24, 3), torch.randn(24, 1))
    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        num_train_epochs=2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    Trainer(model, args, train_dataset=data, data_collator=_collate, callbacks=[EmaCallback(average)]).train()
    assert average.num_updates == 6  # 24 items * 2 epochs / (2 * 4)
    assert all(not torch.equal(a, b) for a, b in zip(weights, weights[1:], strict=False))  # after the step, not before
    expected = weights[0]
    for step, weight in enumerate(weights[1:]):
        decay = (1 + step) / (10 + step)
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(average.weights["linear.weight"], expected)


def _collate(items: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    inputs, targets = zip(*items, strict=True)
    return {"inputs": torch.stack(inputs), "targets": torch.stack(targets)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_average_follows_the_model_to_cuda(tmp_path):
    model = small_model(torch.bfloat16)
    average = WeightAverage(model, decay=0.9)
    model.cuda()
    for step in range(3):
        drift(model.cpu(), step)
        model.cuda()
        average.update()
    assert all(weight.is_cuda and weight.dtype == torch.float32 for weight in average.weights.values())
    average.save(tmp_path / "ema.safetensors")
    resumed = WeightAverage(small_model(), decay=0.9)
    resumed.load(tmp_path / "ema.safetensors")
    assert all(torch.equal(resumed.weights[name], weight.cpu()) for name, weight in average.weights.items())
    with average.applied(model):
        assert torch.equal(model[0].weight, average.weights["0.weight"].to(torch.bfloat16))
