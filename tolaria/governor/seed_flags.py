"""Flags in page-locked memory by which the device tells that an incubating seed is poisoned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tolaria import ops
from tolaria.snapshot.memory import allocate

_ON_ITS_WAY = -1.0


@dataclass(slots=True)
class _Search:
    flag: Tensor
    tensors: list[Tensor]
    is_sent: bool = False
    """Whether the last search was enqueued wholly; an interrupted one may never bring a result."""


class SeedFlags:
    """One search per seed at a time; its result counts for the very tensors that were searched.

    A seed that goes may leave a result behind that is still on its way; the seed that grows in its place does
    not inherit it, and the memory is used again only once the result has landed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._searches: dict[str, _Search] = {}
        self._left: list[Tensor] = []
        self._lost: list[Tensor] = []
        """Where a result may land at any time, or never."""

    def found(self, name: str, tensors: list[Tensor]) -> bool:
        """Whether a search of ``tensors`` has found a non-finite value; no device call."""
        search = self._searches.get(name)
        if search is None:
            return False
        same = len(search.tensors) == len(tensors) and all(map(_is, search.tensors, tensors))
        poisoned = same and _value(search.flag) > 0
        if not same or poisoned:
            self._left.append(self._searches.pop(name).flag)
        return poisoned

    def search(self, name: str, tensors: list[Tensor]) -> None:
        """Enqueue a search, unless the last one's result is still on its way."""
        search = self._searches.get(name)
        if search is None:
            search = self._searches[name] = _Search(self._landed(), tensors)
        elif not search.is_sent:
            self._lost.append(search.flag)
            search.flag = self._landed()
        elif _value(search.flag) == _ON_ITS_WAY:
            return
        search.is_sent = False
        search.flag.fill_(_ON_ITS_WAY)
        search.flag.copy_(ops.tensor_stats(tensors)[2:3], non_blocking=True)
        search.is_sent = True

    def _landed(self) -> Tensor:
        """Memory that no copy will write to any more."""
        for i, flag in enumerate(self._left):
            if _value(flag) != _ON_ITS_WAY:
                return self._left.pop(i)
        return allocate(8, self._device).view(torch.float64)


def _is(a: Tensor, b: Tensor) -> bool:
    return a is b


def _value(flag: Tensor) -> float:
    return float(flag.numpy()[0])
