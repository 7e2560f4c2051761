"""Optimizers that step over covered parameters and are not covered: found at their step, named in a warning.

A rollback puts such parameters back, but not what the optimizer keeps of them: moments of the undone steps,
or NaN. Every step of every optimizer passes through one process-wide hook of torch's, which is there as long
as a governor is; for an optimizer that was looked at before it is a look into a dict.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from tolaria.errors import UncoveredWarning
from tolaria.snapshot.covered import CoveredState
from tolaria.snapshot.schedules import reaches


class _Watch:
    """Who is governed, and which optimizers were looked at since that changed."""

    def __init__(self) -> None:
        self.governed: dict[int, weakref.ref[CoveredState]] = {}
        self.seen: dict[int, weakref.ref[Optimizer]] = {}
        self.dismissed: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self.handle: RemovableHandle | None = None

    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        known = self.seen.get(id(optimizer))
        if known is None or known() is not optimizer:
            self.seen[id(optimizer)] = weakref.ref(optimizer)
            self._look(optimizer)

    def _look(self, optimizer: Optimizer) -> None:
        governed = [covered for ref in self.governed.values() if (covered := ref()) is not None]
        if optimizer in self.dismissed or any(_covers(covered, optimizer) for covered in governed):
            return
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for covered in governed:
            names = [
                prefix + name
                for prefix, root in covered.roots()
                for name, p in root.named_parameters()
                if id(p) in stepped
            ]
            if names:
                self.dismissed.add(optimizer)  # one warning
                _warn(optimizer, names)
                return

    def forget(self, key: int) -> None:
        """Somebody is governed no more; the hook goes with the last."""
        self.governed.pop(key, None)
        self.seen.clear()
        if not self.governed and self.handle is not None:
            self.handle.remove()
            self.handle = None


_WATCH = _Watch()


def watch(covered: CoveredState) -> None:
    """Look out for optimizers that step over what ``covered`` covers and are not part of it."""
    key = id(covered)
    _WATCH.governed[key] = weakref.ref(covered, lambda _: _WATCH.forget(key))
    _WATCH.seen.clear()
    if _WATCH.handle is None:
        _WATCH.handle = register_optimizer_step_pre_hook(_WATCH)


def unwatch(covered: CoveredState) -> None:
    """The end of :func:`watch`."""
    _WATCH.forget(id(covered))


def look_again() -> None:
    """A model has grown: an optimizer that had nothing to do with it may step over its parameters now."""
    _WATCH.seen.clear()


def dismiss(optimizer: Optimizer) -> None:
    """Its owner does not want it covered: no warning."""
    _WATCH.dismissed.add(optimizer)


def _covers(covered: CoveredState, optimizer: Optimizer) -> bool:
    """Whether it is covered, itself or by one that it wraps or that wraps it."""
    return any(
        reaches(known, optimizer) or reaches(optimizer, known) or known.param_groups is optimizer.param_groups
        for known in covered.optimizers
    )


def _warn(optimizer: Optimizer, names: list[str]) -> None:
    kind, more = type(optimizer).__name__, f" and {len(names) - 1} more" if len(names) > 1 else ""
    warnings.warn(
        f"governor: an optimizer that it does not cover ({kind}) steps over {names[0]}{more}: a rollback "
        "puts the parameters back, but not its state; call governor.add_optimizer(optimizer), or "
        "remove_optimizer(optimizer) if that is meant",
        UncoveredWarning,
        stacklevel=4,
    )
