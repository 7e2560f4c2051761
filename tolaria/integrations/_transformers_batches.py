"""Batches that Transformers' Trainer leaves out after a rollback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tolaria.governor import TolariaGovernor
from tolaria.governor.batches import BatchDebt


class LaterBatches:
    """Draws what is due and drops it, before the trainer draws the batches of a step.

    Args:
        trainer: whose; its ``get_batch_samples`` is wrapped.
        governor: tells the governor of now, or None while there is none.
    """

    def __init__(self, trainer: Any, governor: Callable[[], TolariaGovernor | None]) -> None:  # noqa: ANN401
        self._inner, self._governor = trainer.get_batch_samples, governor
        self._debt: BatchDebt | None = None
        trainer.get_batch_samples = self._draw

    def begin(self, governor: TolariaGovernor) -> None:
        """A run begins."""
        self._debt = BatchDebt(governor.batch_ledger)
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """So far none of its batches was left out."""
        self._is_short = False

    def _draw(self, batches: Any, count: int, *args: Any, **options: Any) -> Any:  # noqa: ANN401
        governor, debt = self._governor(), self._debt
        while governor is not None and debt is not None and debt.due(governor.batch_ledger):
            if next(batches, self) is self:
                return [], None
            self._is_short = True
            if debt.drawn():
                debt.pay()
        found = self._inner(batches, count, *args, **options)
        # The trainer steps by the number of batches: with fewer it would not, and keep their gradients.
        return ([], None) if self._is_short and len(found[0]) < count else found
