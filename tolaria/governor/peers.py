"""Several governors over the same parameters: what one puts back changes the state that the others watch.

Each rolls back by its own rule, to its own captures. A capture of another that is on probation then has its
verdicts about a state that is gone: it is never promoted. On CUDA it may even be half made when the restore
writes to what it reads.
"""

from __future__ import annotations

import weakref

from torch import Tensor

from tolaria.governor.row import Row
from tolaria.ops import StateField
from tolaria.snapshot.covered import CoveredState

_BY_PARAMETER: dict[int, weakref.WeakSet[Peers]] = {}
"""Who trains which parameter, by its id."""


class Peers:
    """The others that watch parameters which one governor trains, as of when each of them was attached.

    Args:
        row: the governor's.
        covered: what it covers.
    """

    def __init__(self, row: Row, covered: CoveredState) -> None:
        self._row = row
        self._others: weakref.WeakSet[Peers] = weakref.WeakSet()
        self._ids = _trained(covered)
        # First, since what is created first is called last: the sets below have let go of this one by then.
        self._leave = weakref.finalize(self, _forget, self._ids)
        for key in self._ids:
            for other in _BY_PARAMETER.setdefault(key, weakref.WeakSet()):
                self._others.add(other)
                other._others.add(self)
            _BY_PARAMETER[key].add(self)

    def __bool__(self) -> bool:
        return bool(self._others)

    def states(self) -> list[Tensor]:
        """What :meth:`restored` writes to."""
        return [other._row.state for other in list(self._others)]

    def ordered(self, state: Tensor) -> Tensor:
        """1 or 0: whether ``state`` orders a restore now, for :meth:`restored` when that is done."""
        return state[StateField.restore_order, self._row.column].clone()

    def restored(self, ordered: Tensor) -> None:
        """What was on probation elsewhere counts as half made from here on, if ``ordered`` is 1."""
        for other in list(self._others):
            done = other._row.state[StateField.candidate_done, other._row.column]
            done.mul_(1.0 - ordered.to(done.device))

    def close(self) -> None:
        """The governor is gone."""
        for other in list(self._others):
            other._others.discard(self)
        self._others.clear()
        for key in self._ids:
            if key in _BY_PARAMETER:
                _BY_PARAMETER[key].discard(self)
        self._leave()


def _trained(covered: CoveredState) -> frozenset[int]:
    own = {id(p) for _, root in covered.roots() for p in root.parameters() if p.requires_grad}
    return frozenset(own).union(
        id(p) for optimizer in covered.optimizers for group in optimizer.param_groups for p in group["params"]
    )


def _forget(ids: frozenset[int]) -> None:
    for key in ids:
        if not _BY_PARAMETER.get(key):
            _BY_PARAMETER.pop(key, None)
