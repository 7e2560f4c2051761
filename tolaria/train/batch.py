"""From whatever a loader yields to the logits and labels that a criterion takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from tolaria.nn.nest import call_with
from tolaria.tasks.spec import TaskType

_INPUT_NAMES = ("inputs", "input_ids", "x", "pixel_values")
_KEYWORD_NAMES = ("input_ids", "pixel_values")  # of batches whose other entries (a mask) go to the model, too
_TARGET_NAMES = ("targets", "labels", "y")


def split_batch(batch: object) -> tuple[Any, Tensor]:
    """Inputs and targets of a batch: a pair, or a mapping with an input and a target entry.

    Of a mapping with ``input_ids`` or ``pixel_values`` every entry but the target is an input, by keyword.

    Raises:
        TypeError: neither.
    """
    if isinstance(batch, Mapping):
        named = next((name for name in _INPUT_NAMES if name in batch), None)
        targets = next((batch[name] for name in _TARGET_NAMES if name in batch), None)
        if named is not None and isinstance(targets, Tensor):
            rest = {name: batch[name] for name in batch if name not in _TARGET_NAMES}
            return (rest if named in _KEYWORD_NAMES and len(rest) > 1 else batch[named]), targets
        got = f"a mapping with keys {sorted(map(str, batch))}"
    elif isinstance(batch, Sequence) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    else:
        got = f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, Sequence) else "")
    raise TypeError(
        f"loader: expected batches (inputs, targets) or mappings with one of {_INPUT_NAMES} and one of "
        f"{_TARGET_NAMES}, got {got}"
    )


def call_model(model: nn.Module, inputs: Any) -> Tensor:  # noqa: ANN401
    """The model's logits: its output, ``logits`` of an output object or mapping, or the first of a tuple.

    Raises:
        TypeError: no tensor is found there.
    """
    output = call_with(model, inputs)
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
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
