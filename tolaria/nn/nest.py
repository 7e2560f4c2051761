"""What a model is called with: a tensor, several by position, or several by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""One tensor; a tuple or list of positional arguments; a mapping of keyword arguments."""


def call_with(module: nn.Module, inputs: Any) -> Any:  # noqa: ANN401  (whatever the module takes and returns)
    """Call ``module`` as with a loader's inputs: a mapping by keyword, a tuple or list by position."""
    if isinstance(inputs, Mapping):
        return module(**inputs)
    if isinstance(inputs, tuple | list):
        return module(*inputs)
    return module(inputs)


def to_device(value: Any, device: torch.device) -> Any:  # noqa: ANN401  (any nest of tensors)
    """Move every tensor in a nest of tuples, lists and mappings; does not wait where memory is pinned."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: to_device(each, device) for name, each in value.items()}
    if isinstance(value, tuple | list):
        moved = [to_device(each, device) for each in value]
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    return value


def check_inputs(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is something that a model can be called with."""
    by_name = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if isinstance(value, Tensor) or ((by_name or isinstance(value, tuple | list)) and any(_tensors(value))):
        return
    kind = type(value).__name__
    got = f"a {kind} without a tensor" if by_name or isinstance(value, tuple | list) else f"{kind}"
    raise TypeError(
        f"{name}: expected a tensor, a tuple of arguments or a mapping of keyword arguments, as the model is "
        f"called with, got {got}"
    )


def _tensors(value: object) -> Iterator[bool]:
    if isinstance(value, Tensor):
        yield True
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)
