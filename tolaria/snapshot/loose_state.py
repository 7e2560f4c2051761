"""Optimizer state that belongs to no parameter: ``optimizer.state["k"]``, or a parameter in no group."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Loose = list[tuple[Any, Any]]
"""Keys, and copies of what they held."""


def copied(optimizer: Optimizer) -> Loose:
    """Copies of all loose entries, tensors too; parameters in them stay the live ones."""
    kept = _own(optimizer)
    own = kept.keys()
    return [(k, copy.deepcopy(v, dict(kept))) for k, v in optimizer.state.items() if id(k) not in own]


def put_back(optimizer: Optimizer, captured: Loose, keep: Collection[int]) -> None:
    """Make the loose entries what they were, in the tensors and dictionaries that are there if they fit.

    Others that came later go, but for those whose key's id is in ``keep``: they were a parameter's.
    """
    kept = _own(optimizer)
    known = {id(key) for key, _ in captured}.union(kept, keep)
    for key in [k for k in optimizer.state if id(k) not in known]:
        del optimizer.state[key]
    for key, value in captured:
        optimizer.state[key] = _restored(optimizer.state.get(key), value, kept)


def _own(optimizer: Optimizer) -> dict[int, Any]:
    return {id(p): p for group in optimizer.param_groups for p in group["params"]}


@torch.no_grad()
def _restored(live: object, value: object, kept: dict[int, Any]) -> object:
    if isinstance(live, Tensor) and isinstance(value, Tensor) and _fits(live, value):
        live.copy_(value)
        return live
    if type(live) is dict and type(value) is dict:
        parts = {k: _restored(live.get(k), v, kept) for k, v in value.items()}
        live.clear()
        live.update(parts)
        return live
    return copy.deepcopy(value, dict(kept))


def _fits(live: Tensor, value: Tensor) -> bool:
    form = (value.shape, value.dtype, value.device, value.layout)
    return (live.shape, live.dtype, live.device, live.layout) == form and type(live) is type(value)
