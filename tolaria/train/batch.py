"""From whatever a loader yields to the logits and labels that a criterion takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from tolaria.tasks.spec import TaskType

_INPUT_NAMES = ("inputs", "input_ids", "x", "pixel_values")
_TARGET_NAMES = ("targets", "labels", "y")


def check_task_type(task_type: str) -> None:
    """Raise ValueError unless ``task_type`` is one of those there are."""
    if task_type not in get_args(TaskType):
        raise ValueError(f"task_type: expected one of {get_args(TaskType)}, got {task_type!r}")


def split_batch(batch: object) -> tuple[Any, Tensor]:
    """Inputs and targets of a batch: a pair, or a mapping with an input and a target entry.

    Raises:
        TypeError: neither.
    """
    if isinstance(batch, Mapping):
        inputs = next((batch[name] for name in _INPUT_NAMES if name in batch), None)
        targets = next((batch[name] for name in _TARGET_NAMES if name in batch), None)
        if inputs is not None and isinstance(targets, Tensor):
            return inputs, targets
        got = f"a mapping with keys {sorted(map(str, batch))}"
    elif isinstance(batch, Sequence) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    else:
        got = f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, Sequence) else "")
    raise TypeError(
        f"loader: expected batches (inputs, targets) or mappings with one of {_INPUT_NAMES} and one of "
        f"{_TARGET_NAMES}, got {got}"
    )


def to_device(value: Any, device: torch.device) -> Any:  # noqa: ANN401  (any nest of tensors)
    """Move every tensor in a nest of tuples, lists and mappings; does not wait where memory is pinned."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: to_device(each, device) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(to_device(each, device) for each in value)
    return value


def call_model(model: nn.Module, inputs: Any) -> Tensor:  # noqa: ANN401
    """The model's logits: its output, the ``logits`` of an output object, or the first element of a tuple.

    Raises:
        TypeError: no tensor is found there.
    """
    if isinstance(inputs, Mapping):
        output = model(**inputs)
    elif isinstance(inputs, tuple | list):
        output = model(*inputs)
    else:
        output = model(inputs)
    logits = getattr(output, "logits", output)
    if isinstance(logits, tuple | list) and logits:
        logits = logits[0]
    if not isinstance(logits, Tensor):
        raise TypeError(f"model: expected it to return logits as a tensor, got {type(output).__name__}")
    return logits


def for_criterion(logits: Tensor, targets: Tensor, task_type: TaskType) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V) and targets (B, T) of tokens become (B*T, V) and (B*T,); others stay as they are."""
    if task_type == "lm" and logits.dim() > 2 and targets.dim() == logits.dim() - 1:
        return logits.flatten(0, -2), targets.flatten()
    return logits, targets


def batch_rows(inputs: Any, targets: Tensor) -> int:  # noqa: ANN401
    """Samples in a batch, known without looking at the device."""
    return int(targets.shape[0]) if targets.dim() else 1
