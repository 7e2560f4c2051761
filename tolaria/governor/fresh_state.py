"""What optimizer state is before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer


def fresh_value(optimizer: Optimizer, group: Mapping[str, Any], key: str) -> float | None:
    """What a state tensor holds before the first step, if that is the same as having no state; else None."""
    name = type(optimizer).__name__
    if name == "SGD":
        return 0.0 if key == "momentum_buffer" and not group.get("dampening") else None
    if name in ("Adam", "AdamW", "Adamax", "RMSprop", "Adadelta", "RAdam"):
        return 0.0
    if name == "NAdam":
        return 1.0 if key == "mu_product" else 0.0
    return None
