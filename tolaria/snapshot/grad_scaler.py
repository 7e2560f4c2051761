"""What a ``torch.amp.GradScaler`` holds: two tensors, which captures copy, and numbers for the host side."""

from __future__ import annotations

from typing import Any

import torch

SCALER_TENSORS = ("_scale", "_growth_tracker")
_SCALER_VALUES = ("_init_scale", "_growth_factor", "_backoff_factor", "_growth_interval", "_enabled")


def scaler_values(scaler: torch.amp.GradScaler | None) -> dict[str, Any]:
    """Its numbers; its tensors only where there were none yet, which is a value as well."""
    values = {name: getattr(scaler, name, None) for name in _SCALER_VALUES}
    return values | {name: None for name in SCALER_TENSORS if getattr(scaler, name, None) is None}


def load_scaler_values(scaler: torch.amp.GradScaler | None, values: dict[str, Any]) -> None:
    """Put :func:`scaler_values` back; an unscaling begun on the undone step is void."""
    if scaler is None:
        return
    for name, value in values.items():
        setattr(scaler, name, value)
    states = getattr(scaler, "_per_optimizer_states", None)
    if states is not None:
        states.clear()
