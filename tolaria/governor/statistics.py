"""What the state of one governor says, as plain values, and how it is saved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from tolaria.governor.config import GovernorConfig
from tolaria.ops import MemoryField, StateField, memory_row

VERSION = 3
"""Of :func:`saved_form`: 3 counts skipped steps and restores without progress; 2 is converted."""


def healthy_losses(state: Tensor, window: int) -> list[float]:
    """The window's healthy losses, oldest first, from ``state`` ``(fields, 1)``; waits for the device."""
    column: list[float] = state[:, 0].tolist()  # sync: for people
    size = int(column[memory_row(0, window, MemoryField.history_size)])
    start = memory_row(0, window, len(MemoryField))
    return column[start : start + size]


def lifetime_statistics(state: Tensor) -> dict[str, float]:
    """Moments and range of all healthy losses, from ``state`` ``(fields, 1)``; waits for the device."""
    fields = state[StateField.life_count : StateField.life_max + 1, 0]
    count, mean, m2, low, high = fields.tolist()  # sync: for people
    std = math.sqrt(m2 / count) if count else math.nan
    return {"count": count, "mean": mean if count else math.nan, "std": std, "min": low, "max": high}


def saved_form(
    config: GovernorConfig, random_guess_loss: float | None, state: Tensor, policy: dict[str, Any]
) -> dict[str, Any]:
    """What a governor saves of itself: plain values and one CPU tensor."""
    return {
        "version": VERSION,
        "config": asdict(config),
        "random_guess_loss": random_guess_loss,
        "policy": policy,
        "state": state.detach().cpu().clone(),
    }


def read_saved_form(saved: Mapping[str, Any]) -> tuple[GovernorConfig, Tensor]:
    """Settings and statistics of :func:`saved_form`, checked.

    Raises:
        ValueError: ``saved`` is nothing that :func:`saved_form` returned.
    """
    if not isinstance(saved, Mapping):
        raise TypeError(
            f"state: expected a dict from TolariaGovernor.state_dict(), got {type(saved).__name__}"
        )
    missing = {"version", "config", "random_guess_loss", "state", "policy"} - set(saved)
    if missing:
        raise ValueError(
            f"state: expected a dict from TolariaGovernor.state_dict(), it lacks {sorted(missing)}"
        )
    if saved["version"] not in (2, VERSION):
        raise ValueError(
            f"state: expected version 2 or {VERSION}, got {saved['version']!r}; load it with the tolaria "
            "that saved it"
        )
    unknown = set(saved["config"]) - {f.name for f in fields(GovernorConfig)}
    if unknown:
        raise ValueError(f"state: its config has settings of another version: {sorted(unknown)}")
    is_former = saved["version"] == 2
    settings: dict[str, Any] = (
        {"skips_before_rollback": 0, **saved["config"]} if is_former else saved["config"]
    )
    config = GovernorConfig(**settings)
    state: Tensor = saved["state"]
    if is_former:
        state = _without_skips(state, config.window)
    expected = (memory_row(3, config.window, 0), 1)
    if not isinstance(state, Tensor) or tuple(state.shape) != expected or state.dtype != torch.float64:
        raise ValueError(
            f"state: expected float64 statistics of shape {expected}, got "
            + (f"{state.dtype} {tuple(state.shape)}" if isinstance(state, Tensor) else repr(state))
        )
    return config, state


def _without_skips(state: Tensor, window: int) -> Tensor:
    """Statistics of version 2, whose memories had no count of skipped steps, in the form of now."""
    rows = len(StateField) + 3 * (len(MemoryField) - 1 + 2 * window)
    if not isinstance(state, Tensor) or state.dim() != 2 or len(state) != rows:
        return state  # what it is instead is said by the caller
    fields, *memories = torch.split(state, [len(StateField)] + 3 * [len(MemoryField) - 1 + 2 * window])
    none = torch.zeros_like(state[:1])
    added = [
        part
        for memory in memories
        for part in (memory[: MemoryField.skips], none, memory[MemoryField.skips :])
    ]
    return torch.cat([fields, *added])


def take_over(state: Tensor, saved: Tensor) -> None:
    """Write saved statistics and counts to ``state`` in place; its own orders and slots stay as they are."""
    fresh = state.clone()
    state.copy_(saved)
    for field in range(StateField.capture_order_0, StateField.restore_order + 1):
        state[field] = fresh[field]
    for field in range(StateField.last_good, StateField.slot_capture_1 + 1):
        state[field] = fresh[field]
