"""Optimizer state that belongs to no parameter: ``optimizer.state["k"]``, or a parameter in no group."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from torch.optim import Optimizer

from tolaria.snapshot.host_copy import refill

Loose = list[tuple[Any, Any]]
"""Keys, and copies of what they held."""


def copied(optimizer: Optimizer) -> Loose:
    """Copies of all loose entries, tensors too; parameters in them stay the live ones."""
    kept = _own(optimizer)
    own = kept.keys()
    return [(k, copy.deepcopy(v, dict(kept))) for k, v in optimizer.state.items() if id(k) not in own]


def of_then(optimizer: Optimizer, captured: Loose) -> dict[Any, Any]:
    """Copies of the captured entries, by key."""
    kept = _own(optimizer)
    return {key: copy.deepcopy(value, dict(kept)) for key, value in captured}


def put_back(optimizer: Optimizer, captured: Loose, keep: Collection[int]) -> None:
    """Make the loose entries what they were, in the tensors and dictionaries that are there if they fit.

    Others that came later go, but for those whose key's id is in ``keep``: they were a parameter's.
    """
    kept = _own(optimizer)
    known = {id(key) for key, _ in captured}.union(kept, keep)
    for key in [k for k in optimizer.state if id(k) not in known]:
        del optimizer.state[key]
    for key, value in captured:
        optimizer.state[key] = refill(optimizer.state.get(key), copy.deepcopy(value, dict(kept)))


def _own(optimizer: Optimizer) -> dict[int, Any]:
    return {id(p): p for group in optimizer.param_groups for p in group["params"]}
