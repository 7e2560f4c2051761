"""What the state of one governor says, as plain values, and how it is saved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from torch import Tensor

from tolaria.governor.config import GovernorConfig, resolve_random_guess_loss
from tolaria.governor.plain_values import plain, revived
from tolaria.governor.policy import RollbackPolicy
from tolaria.governor.row import Row
from tolaria.governor.saved_form import (
    VERSION,
    check_keys,
    check_policy,
    check_random_guess_loss,
    checked_config,
    checked_magnitudes,
)
from tolaria.governor.saved_state import checked_state
from tolaria.ops import ALL_PARTS_DONE, MemoryField, StateField, StatusField, memory_row, window_of
from tolaria.snapshot.magnitudes import Magnitudes


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


_IN_A_ROW = (MemoryField.consecutive, MemoryField.lobotomy_pending, MemoryField.skips)
"""What counts bad steps in a row."""


class SavedForm(NamedTuple):
    """What a governor saved of itself, checked, in this version's layout."""

    config: GovernorConfig
    """The settings that it had."""
    random_guess_loss: float | None
    """Its loss of guessing."""
    policy: Mapping[str, Any]
    """For :meth:`RollbackPolicy.load_saved_form`."""
    state: Tensor
    """Its statistics, float64 ``(fields, 1)`` on the CPU, for ``config.window``."""
    magnitudes: Magnitudes
    """How large each tensor was."""


def saved_form(
    config: GovernorConfig,
    random_guess_loss: float | None,
    state: Tensor,
    policy: dict[str, Any],
    magnitudes: Magnitudes,
) -> dict[str, Any]:
    """What a governor saves of itself, in values that strict JSON knows."""
    column: list[float] = state[:, 0].tolist()  # sync: it is asked for
    form = {
        "version": VERSION,
        "config": asdict(config),
        "random_guess_loss": random_guess_loss,
        "policy": policy,
        "state": column,
        "magnitudes": {name: (size, int(captures)) for name, (size, captures) in magnitudes.items()},
    }
    return {name: plain(part) for name, part in form.items()}


def read_saved_form(saved: Mapping[str, Any]) -> SavedForm:
    """What :func:`saved_form` returned, checked to the last field; versions 2 to 4 are converted.

    Raises:
        ValueError: ``saved`` is nothing that :func:`saved_form` returned; the message names the field.
        TypeError: it is no mapping.
    """
    if not isinstance(saved, Mapping):
        raise TypeError(
            f"state: expected a dict from TolariaGovernor.state_dict(), got {type(saved).__name__}"
        )
    version = saved.get("version")
    if type(version) is not int or not 2 <= version <= VERSION:
        raise ValueError(
            f"version: expected {VERSION}, or 2 to 4, which are converted, got {version!r}; load the state "
            "into the version of tolaria that saved it"
        )
    keys = {"version", "config", "random_guess_loss", "policy", "state"}
    check_keys("", saved, keys | {"magnitudes"} if version > 4 else keys)
    said = {name: saved[name] for name in ("config", "policy", "state")}
    if version >= 4:
        said = {name: revived(part) for name, part in said.items()}
    config = checked_config(said["config"], version)
    guess = saved["random_guess_loss"]
    check_random_guess_loss(guess)
    check_policy(said["policy"], RollbackPolicy(config).saved_form(), version)
    state = checked_state(said["state"], config, version)
    magnitudes = checked_magnitudes(saved.get("magnitudes", {}))
    return SavedForm(config, resolve_random_guess_loss(None, guess), said["policy"], state, magnitudes)


def take_over(state: Tensor, saved: Tensor) -> None:
    """Write saved statistics and counts to ``state`` in place; its own orders and slots stay as they are."""
    fresh = state.clone()
    state.copy_(saved)
    state[StateField.attached] = fresh[StateField.attached]
    for field in range(StateField.capture_order_0, StateField.restore_order + 1):
        state[field] = fresh[field]
    for field in range(StateField.last_good, StateField.slot_ticket_1 + 1):
        state[field] = fresh[field]


def is_on_probation(column: Sequence[float], config: GovernorConfig) -> bool:
    """Whether a governor has a candidate that may be promoted: a poisoned one is of a state that is gone."""
    is_suspicious = config.suspicious_state != "off" and column[StateField.suspect] >= 0
    return column[StateField.candidate] >= 0 and column[StateField.candidate_bad] < 0 and not is_suspicious


def go_on_capturing(row: Row, saved: Tensor) -> None:
    """Capture from here on in the steps in which ``saved`` would have, once its statistics are taken over.

    The next capture is due when it was due there. A candidate on probation goes on being on probation, under
    the step of its capture, which decides when the one after it is due; its slot is the last known good one,
    whose state, the adopted one, is younger by the verdicts that the probation has had so far.
    """
    old: list[float] = saved[:, 0].tolist()
    state, status = row.state[:, row.column], row.mailbox[row.column]
    slot = int(state[StateField.last_good])
    for field in _IN_A_ROW:  # a capture follows a healthy verdict, so none brings bad steps back
        state[memory_row(1 + slot, window_of(row.state), field)] = 0.0
    state[StateField.anchor_step] = old[StateField.anchor_step]
    state[StateField.due_from] = status[StatusField.due_from] = old[StateField.due_from]
    candidate = int(old[StateField.candidate])
    if candidate < 0 or old[StateField.candidate_bad] >= 0:
        return
    step = old[StateField.slot_step_0 + candidate]
    if not is_on_probation(old, row.config):  # it would have been refused
        state[StateField.due_from] = status[StatusField.due_from] = step
        return
    state[StateField.slot_step_0 + slot] = status[StatusField.last_good_step] = step
    state[StateField.candidate_healthy] = old[StateField.candidate_healthy]
    state[StateField.candidate_done] = ALL_PARTS_DONE
    state[StateField.candidate] = slot  # the last: it makes it one


def as_of_capture(state: Tensor, slot: int) -> Tensor:
    """``state`` ``(fields, 1)`` as it was when the capture in ``slot`` was made; waits for the device.

    Windows, steps and when captures are due are those of then. Counts of the whole run (captures, rollbacks,
    lifetime statistics) are those of now, as far as there were so many steps by then.
    """
    then = state.detach().cpu().clone()  # sync: it is asked for
    column, window = then[:, 0], window_of(state)
    length = memory_row(1, window, 0) - memory_row(0, window, 0)
    source = memory_row(1 + slot, window, 0)
    column[memory_row(0, window, 0) :][:length] = column[source : source + length].clone()
    step = float(column[StateField.slot_step_0 + slot])
    column[StateField.step] = column[StateField.anchor_step] = column[StateField.due_from] = step
    for field in (StateField.reason, StateField.rollback, StateField.panics, StateField.cooldown_left):
        column[field] = 0.0  # a capture follows a healthy verdict, after any cooldown
    of_steps = StateField.slot_step_0, StateField.slot_step_1, StateField.restored_step
    for field in (*of_steps, StateField.steps_lost):
        column[field] = min(step, float(column[field]))
    counted = float(column[StateField.life_count])
    if counted > step:
        column[StateField.life_m2] *= step / counted
        column[StateField.life_count] = step
    if step == 0:
        column[StateField.life_mean] = 0.0
    column[StateField.candidate] = column[StateField.suspect] = -1.0
    column[StateField.suspect_since] = column[StateField.suspect_count] = 0.0
    return then
