"""What optimizer state is before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

_ZEROS = ("Adam", "AdamW", "Adamax", "RMSprop", "Adadelta", "RAdam", "Muon")
_OTHER_THAN_ZERO: dict[str, dict[str, float | str]] = {
    "NAdam": {"mu_product": 1.0},
    "ASGD": {"mu": 1.0, "eta": "lr"},
    "Rprop": {"step_size": "lr"},
    "Adagrad": {"sum": "initial_accumulator_value"},
}
"""By optimizer and entry: a number, or the name of the group's setting that it starts from."""


def fresh_value(optimizer: Optimizer, group: Mapping[str, Any], key: str) -> float | Tensor | None:
    """What a state tensor holds before the first step, if that is the same as having no state; else None.

    SGD's momentum with dampening has no such value: the first step takes the gradient undampened.
    """
    name = type(optimizer).__name__
    if name == "SGD":
        return 0.0 if key == "momentum_buffer" and not group.get("dampening") else None
    if name in _ZEROS:
        return 0.0
    if name in _OTHER_THAN_ZERO:
        value = _OTHER_THAN_ZERO[name].get(key, 0.0)
        return group[value] if isinstance(value, str) else value
    return None
