"""What tests of saved forms share: a governor with a past, ways to damage what it saves, refusals."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tolaria.governor import GovernorConfig, TolariaGovernor
from tolaria.ops import MemoryField, StateField, memory_row

WINDOW = 20


def make(**settings: Any) -> TolariaGovernor:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    governor = TolariaGovernor(
        model, torch.optim.AdamW(model.parameters()), config=GovernorConfig(**settings), num_classes=10
    )
    for i in range(12):
        governor.step(1.0 + 0.01 * i)
    governor.step(math.nan)
    for i in range(15):
        governor.step(1.0 + 0.01 * i)
    return governor


def through_a_file(saved: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


def through_json(saved: dict[str, Any]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(json.dumps(saved, allow_nan=False))
    return loaded


def places() -> list[tuple[str, int]]:
    """Every field of the state and of its three memories, with its row."""
    found = [(f.name, int(f)) for f in StateField]
    for which, prefix in enumerate(("", "slot_0.", "slot_1.")):
        found += [(prefix + f.name, memory_row(which, WINDOW, f)) for f in MemoryField]
    return found


def assert_refused(governor: TolariaGovernor, saved: Any, said: str) -> None:
    """The governor names what is wrong, is as it was, and still restores."""
    before, engine = governor.state_dict(), governor._engine
    with pytest.raises(ValueError, match=said):
        governor.load_state_dict(saved)
    assert repr(before) == repr(governor.state_dict())  # of NaN and the zeros' signs, too
    assert governor._engine is engine


def changed(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets ``path``, or makes it of what stood there."""

    def change(saved: dict[str, Any]) -> None:
        *above, last = path.split(".")
        place: Any = saved
        for key in above:
            place = place[int(key)] if isinstance(place, list) else place[key]
        place[last] = value(place[last]) if callable(value) else value

    return change


def without(path: str) -> Callable[[dict[str, Any]], None]:
    def change(saved: dict[str, Any]) -> None:
        *above, last = path.split(".")
        place: Any = saved
        for key in above:
            place = place[int(key)] if isinstance(place, list) else place[key]
        del place[last]

    return change
