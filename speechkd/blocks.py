"""The transformer blocks of a model, one by one: what is compiled, and what is sharded."""

from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel


def transformer_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Layers of a model that are repeated, as transformers names them for sharding."""
    names = set(model._no_split_modules or ())
    # by base classes too: sharding makes subclasses
    return [module for module in model.modules() if names & {base.__name__ for base in type(module).__mro__}]


def compile_blocks(model: PreTrainedModel, **compiler: str | None) -> None:
    """Compile each transformer block in place; `compiler` are arguments of `torch.compile`."""
    for block in transformer_blocks(model):
        if block._compiled_call_impl is None:  # teacher and student may share an encoder
            block.compile(**compiler)


def shard_blocks(model: PreTrainedModel) -> None:
    """Shard each transformer block, and then what is around them, with FSDP."""
    for block in transformer_blocks(model):
        fully_shard(block)
    fully_shard(model)
