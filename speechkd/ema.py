"""Exponential moving average of the trainable weights, kept in float32 beside the model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from speechkd.files import atomic_write


class WeightAverage:
    """Running average of a model's trainable weights: `average = decay * average + (1 - decay) * weight`.

    Averaging of the iterates as in Polyak & Juditsky 1992, https://doi.org/10.1137/0330046, with exponential weights.
    The decay warms up as in TensorFlow's ExponentialMovingAverage: at update n = 0, 1, ... it is
    min(decay, (1 + n) / (10 + n)), so the random first weights are soon forgotten.

    The averages are float32 whatever the model's dtype, since 1 - decay is lost in bfloat16, and live on the device of
    their weight. Tied weights are held once, under the name that `named_parameters` gives. Parameters sharded by FSDP
    are not supported.

    Args:
        model: trained model; what has `requires_grad` now is averaged, starting from its present value.
        decay: limit of the decay, above 0 and below 1.

    Raises:
        ValueError: decay is out of range, or nothing in the model is trainable.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"the decay of the average must be above 0 and below 1, got {decay}; 0.999 is usual")
        self.model, self.decay = model, decay
        self.num_updates = 0
        self.weights = {
            name: parameter.detach().to(torch.float32, copy=True)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        if not self.weights:
            raise ValueError(
                f"{type(model).__name__} has no parameter with requires_grad, so there is nothing to average; "
                "unfreeze what is trained before the average is made"
            )

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights in; call it after each optimizer step."""
        parameters = self._parameters_of(self.model)
        for name, parameter in zip(self.weights, parameters, strict=True):
            if self.weights[name].device != parameter.device:  # the model was moved after the average was made
                self.weights[name] = self.weights[name].to(parameter.device)
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        # as average += (1 - decay) * (weight - average): in float32 decay and 1 - decay do not add up to 1, and at
        # 0.9999 two separate products settle up to 1.6e-4 (relative) beside a weight that stands still
        torch._foreach_lerp_(
            list(self.weights.values()), [parameter.float() for parameter in parameters], weight=1 - decay
        )
        self.num_updates += 1

    def state_dict(self) -> dict[str, Any]:
        """`num_updates`, an int, and `weights`, name to float32 tensor; the tensors are not copied."""
        return {"num_updates": self.num_updates, "weights": dict(self.weights)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            ValueError: its weights differ from this model's in name or shape; nothing is changed then.
        """
        weights = state["weights"]
        names = dict.fromkeys([*self.weights, *weights])
        for name in names:
            if name not in weights or name not in self.weights or weights[name].shape != self.weights[name].shape:
                raise ValueError(
                    f"the stored weight average and the model differ at {name}: {_shape(weights, name)} stored, "
                    f"{_shape(self.weights, name)} trained now; continue with the student and the frozen layers "
                    "of that run, or begin a new output folder"
                )
        for name, average in self.weights.items():
            average.copy_(weights[name])
        self.num_updates = state["num_updates"]

    def save(self, path: str | Path) -> None:
        """Write the averages as safetensors, atomically; `num_updates` stands in the metadata.

        Raises:
            OSError, SafetensorError: the disk is full.
        """
        tensors = {name: average.contiguous() for name, average in self.weights.items()}
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt", "num_updates": str(self.num_updates)})

    def load(self, path: str | Path) -> None:
        """Continue from a file that `save` wrote.

        Raises:
            ValueError: it is missing, damaged, no weight average, or of another model; nothing is changed then.
        """
        try:
            with safe_open(path, framework="pt") as file:
                num_updates = int((file.metadata() or {})["num_updates"])
                weights = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path} cannot be read as a weight average ({type(error).__name__}: {error}); resume from a "
                "checkpoint that has one, or train without the average"
            ) from error
        try:
            self.load_state_dict({"num_updates": num_updates, "weights": weights})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the weights of `model` by their averages, in the model's dtype and on its devices.

        Raises:
            ValueError: the model lacks an averaged weight, or has it in another shape; nothing is changed then.
        """
        for parameter, average in zip(self._parameters_of(model), self.weights.values(), strict=True):
            parameter.copy_(average)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Put the averages into `model`, to evaluate or save it, and its own weights back at the end.

        They come back bit by bit, also after an exception. Holds a second copy of the averaged weights meanwhile.
        """
        parameters = self._parameters_of(model)
        weights = [parameter.detach().clone() for parameter in parameters]
        try:
            self.copy_to(model)
            yield
        finally:
            with torch.no_grad():
                for parameter, weight in zip(parameters, weights, strict=True):
                    parameter.copy_(weight)

    def _parameters_of(self, model: nn.Module) -> list[Tensor]:
        """Looked up by name each time, since wrapping a model may replace its parameters."""
        found = dict(model.named_parameters())
        for name, average in self.weights.items():
            if name not in found or found[name].shape != average.shape:
                raise ValueError(
                    f"weight {name} of the average has shape {tuple(average.shape)}, the model {type(model).__name__} "
                    f"has {_shape(found, name)}; pass the model that was averaged, without a DDP or compile wrapper"
                )
        return [found[name].detach() for name in self.weights]


class EmaCallback(TrainerCallback):
    """Updates a weight average once per optimizer step.

    `on_step_end` comes after the whole accumulated batch; the parts of it call `on_substep_end`.
    """

    def __init__(self, average: WeightAverage) -> None:
        self.average = average

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.average.update()


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return str(tuple(tensors[name].shape)) if name in tensors else "no such weight"
