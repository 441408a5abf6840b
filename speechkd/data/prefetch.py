"""Batches on the device before they are needed: the next is copied while the step on this one runs."""

from collections.abc import Callable, Iterator
from operator import methodcaller
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


def prefetch(batches: Iterator[dict[str, Any]], device: torch.device | str) -> Iterator[dict[str, Any]]:
    """Batches on the device, each copied on a side stream while the step on the one before it runs.

    Args:
        batches: dicts; tensors in them, also inside lists, tuples and dicts, are moved. Only pinned ones are copied
            while the device computes.
        device: where they go. On a CPU `batches` itself is returned.

    Yields:
        The same batches. An error of `batches` is raised where its batch would come, not one earlier.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return batches
    return _copied_ahead(batches, device)


def _copied_ahead(batches: Iterator[dict[str, Any]], device: torch.device) -> Iterator[dict[str, Any]]:
    side_stream = torch.cuda.Stream(device)

    def copied() -> Iterator[tuple[dict[str, Any], torch.cuda.Event]]:
        for batch in batches:
            with torch.cuda.stream(side_stream):
                on_device = _map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))
                is_copied = side_stream.record_event()
            yield on_device, is_copied

    for batch, is_copied in _one_ahead(copied()):
        stream = torch.cuda.current_stream(device)
        stream.wait_event(is_copied)
        # the allocator must not hand the memory to the next copy while this stream still reads it
        _map_tensors(batch, methodcaller("record_stream", stream))
        yield batch


def _one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each taken before the one in front of it is handed out; an error waits for its turn."""
    held: list[Item] = []
    try:
        for item in items:
            yield from held
            held = [item]
    except Exception as caught:
        error: Exception | None = caught
    else:
        error = None
    yield from held
    if error is not None:
        raise error


def _map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """The same nest of dicts, lists and tuples with `function` of each tensor; other values as they are."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_tensors(element, function) for key, element in value.items()}
    if isinstance(value, (list, tuple)):
        elements = [_map_tensors(element, function) for element in value]
        return elements if isinstance(value, list) else tuple(elements)
    return value
