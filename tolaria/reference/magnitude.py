"""How large each tensor of the state is, and which is suspicious: the oracle of ``csrc/math/magnitude.h``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from tolaria.reference.governor_layout import StateField

HISTORY_CAPTURES = 3.0
"""Promoted captures of a tensor before it is judged."""
UNEXPECTED, EXPECTED = 1000.0, 2.0
"""Times the largest magnitude in those: above the first suspicious, until it is within the second."""
LEAST_MAGNITUDE = 1e-3
"""What counts in place of a smaller one, since zero-born tensors grow by any factor."""
FALLEN, GROWN = 0.9, 2.0
"""Shares of the lowest and of the highest since the suspicion began, within which it has settled."""
SETTLED_INTERVALS = 5.0
"""Capture intervals for which it has to, to be trusted."""
SUSPECTED_AGAIN = 3.0
"""Captures for which it has to, where each was undone."""

MagnitudeField = IntEnum(
    "MagnitudeField",
    [
        "slot_0", "slot_1", "largest", "promoted", "folded",
        "suspected", "low", "high", "since", "rollbacks", "birth", "now",
    ],
    start=0,
)  # fmt: skip
"""Columns of the table of magnitudes, a row for each tensor."""


class Suspect(NamedTuple):
    """The tensor that has been under suspicion for the shortest time; of several the one of lowest index."""

    tensor: float = -1.0
    """Its index; -1: none."""
    since: float = 0.0
    times: float = 0.0


def later_of(a: Suspect, b: Suspect) -> Suspect:
    """The one of two that will be trusted last."""
    if not b.tensor >= 0:
        return a
    if not a.tensor >= 0 or b.since > a.since:
        return b
    return b if b.since == a.since and b.tensor < a.tensor else a


def magnitudes(tensors: Sequence[Tensor]) -> Tensor:
    """The largest magnitude of each, float64 ``(n,)``; infinity where a value is not finite.

    Integers count as 0, and of complex numbers the parts. Nothing is read back.
    """
    found = []
    for tensor in tensors:
        values = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
        if not values.is_floating_point() or values.numel() == 0:
            found.append(torch.zeros((), dtype=torch.float64, device=tensor.device))
            continue
        values = values.to(torch.float32) if values.element_size() == 1 else values
        found.append(values.abs().max().to(torch.float64).nan_to_num(nan=math.inf, posinf=math.inf))
    return torch.stack(found)


def weigh_(state: Tensor, column: int, slot: int, table: Tensor, rows: Tensor, now: Tensor) -> Suspect:
    """Judge the tensors of a capture that was just written into ``slot``.

    Args:
        state: float64 ``(fields, n)`` of the governors.
        column: whose capture it is.
        slot: 0 or 1.
        table: float64 ``(tensors, 12)``; see :data:`MagnitudeField`. Updated in place.
        rows: float64 ``(k, 2)``: index and birth of each tensor.
        now: float64 ``(k,)``: its magnitude.

    Returns:
        The suspect. The device is waited for.
    """
    inside = (rows[:, 0] >= 0) & (rows[:, 0] < len(table))
    rows, now = rows[inside].to(table.device), now[inside.to(now.device)].to(table.device)
    index, birth = rows[:, 0].long(), rows[:, 1]
    g, f = state[:, column].to(table.device), MagnitudeField
    fresh = torch.zeros(len(f), dtype=torch.float64, device=table.device)
    fresh[f.slot_0] = fresh[f.slot_1] = -1.0
    known = table[index]
    m = list(torch.where((known[:, f.birth] == birth)[:, None], known, fresh).unbind(1))
    m[f.birth] = birth

    good = 1 - slot
    capture, held = g[StateField.slot_capture_0 + good], m[f.slot_0 + good]
    folds = (held >= 0) & (m[f.folded] != capture)
    m[f.largest] = torch.where(folds & (held > m[f.largest]), held, m[f.largest])
    m[f.promoted] = torch.where(folds, _one_nan(m[f.promoted] + 1.0), m[f.promoted])
    m[f.folded] = torch.where(folds, capture, m[f.folded])
    m[f.slot_0 + slot] = now

    rollbacks = g[StateField.rollback_count]
    base = torch.where(m[f.largest] > LEAST_MAGNITUDE, m[f.largest], LEAST_MAGNITUDE)
    lingers = (m[f.suspected] > 0) & (m[f.rollbacks] == rollbacks)
    most = torch.where(lingers, EXPECTED, UNEXPECTED) * base
    suspicious = (m[f.promoted] >= HISTORY_CAPTURES) & (now > most)
    is_first = ~(m[f.suspected] > 0)
    falls, grows = is_first | (now < FALLEN * m[f.low]), is_first | (now > GROWN * m[f.high])
    moves = falls | grows
    step = g[StateField.slot_step_0 + slot]
    step = torch.where(step > 0, step, 0.0)
    m[f.suspected] = torch.where(moves, 1.0, _one_nan(m[f.suspected] + 1.0)).where(suspicious, 0.0)
    m[f.since] = torch.where(suspicious & moves, step, m[f.since])
    m[f.low] = torch.where(suspicious & falls, now, m[f.low])
    m[f.high] = torch.where(suspicious & grows, now, m[f.high])
    m[f.rollbacks] = torch.where(suspicious, rollbacks, m[f.rollbacks])
    table[index] = torch.stack(m, dim=1)

    suspect = Suspect()
    for at in suspicious.nonzero().flatten().tolist():
        since = float(m[f.since][at])
        found = Suspect(float(rows[at, 0]), since if since > 0 else 0.0, float(m[f.suspected][at]))
        suspect = later_of(suspect, found)
    return suspect


def _one_nan(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), torch.nan, x)
