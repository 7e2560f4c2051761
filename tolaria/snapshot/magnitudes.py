"""How large tensors were in promoted captures, by name: what a run that goes on from there needs to know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tolaria.ops import MagnitudeField
from tolaria.snapshot.place import Place

Magnitudes = Mapping[str, tuple[float, float]]
"""By name the largest magnitude, and in how many promoted captures the tensor was."""

_F = MagnitudeField


class Promoted(NamedTuple):
    """The last known good capture."""

    slot: int
    capture: float
    """Its id."""
    counts: bool
    """Whether it is one of the promoted ones there; not where the adopted state takes its place."""


def read(table: Tensor, places: Iterable[Place], good: Promoted) -> dict[str, tuple[float, float]]:
    """What is known of the live tensors, those of the last known good capture included.

    Args:
        table: of the slots; see ``SnapshotTable.magnitudes``. The device is waited for.
        places: of the tensors.
        good: the last known good capture.
    """
    rows = table.tolist()  # sync: asked for by name
    found = {}
    for place in places:
        row = rows[place.number] if place.is_live and place.number < len(rows) else None
        if row is None or row[_F.birth] != place.birth:
            continue
        held = row[_F.slot_0 + good.slot]
        largest, is_folded = max(row[_F.largest], held), row[_F.folded] == good.capture
        promoted = row[_F.promoted] - is_folded + (good.counts and held >= 0)
        if promoted > 0 or largest > 0:
            found[place.name] = (largest, promoted)
    return found


def write_(table: Tensor, places: Iterable[Place], magnitudes: Magnitudes) -> None:
    """Take over what was read, for the tensors that have their names; on CUDA enqueued."""
    known = torch.zeros(table.shape, dtype=table.dtype, device="cpu")
    for place in places:
        if place.is_live and place.number < len(known) and place.name in magnitudes:
            row = known[place.number]
            row[_F.slot_0 : _F.slot_1 + 1] = -1.0
            row[_F.largest], row[_F.promoted] = magnitudes[place.name]
            row[_F.birth] = place.birth
    table.copy_(known)
