"""Learning rates that are raised on purpose: the losses rise with them, and no shift test should mind."""

from __future__ import annotations

from collections.abc import Iterable

from torch.optim import Optimizer

_RAISED = 1.5
"""Times the rate of the step before: a warm restart; the climb of a warm-up is slower than that."""
_KNOWN = 1.05
"""Times the highest rate so far: the run has lived with it."""


class RateWatch:
    """Tells a warm restart from a burst: it returns at once to a rate that the run has had before.

    It reads the rates that are Python numbers; those in tensors belong to the device.
    """

    def __init__(self) -> None:
        self._last: list[float] = []
        self._highest: list[float] = []
        self._rollbacks = 0

    def is_restart(self, optimizers: Iterable[Optimizer], rollbacks: int = 0) -> bool:
        """Whether any group's rate went up to a known one since the last call.

        Args:
            optimizers: those whose groups are looked at.
            rollbacks: how many there were so far; one puts rates back, and the level with them.
        """
        rates = [
            rate if isinstance(rate := group.get("lr"), int | float) else 0.0
            for optimizer in optimizers
            for group in optimizer.param_groups
        ]
        last, self._last = self._last, rates
        if rates == last:
            return False
        known, highest = self._highest, rates
        if len(known) == len(rates):
            highest = [max(pair) for pair in zip(known, rates, strict=True)]
        self._highest = highest
        went_back, self._rollbacks = rollbacks != self._rollbacks, rollbacks
        if went_back or not len(last) == len(known) == len(rates):
            return False
        return any(
            _RAISED * before < rate <= _KNOWN * most
            for before, rate, most in zip(last, rates, known, strict=True)
        )
