"""What the state of one governor says, as plain values, and how it is saved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from tolaria.governor.config import GovernorConfig
from tolaria.governor.policy import RollbackPolicy
from tolaria.governor.saved_form import (
    VERSION,
    check_keys,
    check_policy,
    check_random_guess_loss,
    checked_config,
)
from tolaria.governor.saved_state import checked_state
from tolaria.ops import MemoryField, StateField, memory_row


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
    """Settings and statistics of :func:`saved_form`, checked to the last field; version 2 is converted.

    ``saved["policy"]`` and ``saved["random_guess_loss"]`` are checked, too, and may be used as they are.

    Raises:
        ValueError: ``saved`` is nothing that :func:`saved_form` returned; the message names the field.
        TypeError: it is no mapping.
    """
    if not isinstance(saved, Mapping):
        raise TypeError(
            f"state: expected a dict from TolariaGovernor.state_dict(), got {type(saved).__name__}"
        )
    version = saved.get("version")
    if type(version) is not int or version not in (2, VERSION):
        raise ValueError(
            f"version: expected {VERSION}, or 2, which is converted, got {version!r}; load the state into "
            "the version of tolaria that saved it"
        )
    check_keys("", saved, {"version", "config", "random_guess_loss", "policy", "state"})
    config = checked_config(saved["config"], version)
    check_random_guess_loss(saved["random_guess_loss"])
    check_policy(saved["policy"], RollbackPolicy(config).saved_form(), version)
    return config, checked_state(saved["state"], config, version)


def take_over(state: Tensor, saved: Tensor) -> None:
    """Write saved statistics and counts to ``state`` in place; its own orders and slots stay as they are."""
    fresh = state.clone()
    state.copy_(saved)
    state[StateField.attached] = fresh[StateField.attached]
    for field in range(StateField.capture_order_0, StateField.restore_order + 1):
        state[field] = fresh[field]
    for field in range(StateField.last_good, StateField.slot_ticket_1 + 1):
        state[field] = fresh[field]
