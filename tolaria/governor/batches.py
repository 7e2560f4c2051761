"""How many batches a rollback leaves out, and how many of them have been."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class BatchLedger:
    """What a governor's rollbacks have ordered to be left out; iterations over data pay it.

    Each iteration that is under way when a rollback is heard of leaves out so many batches of its own. What
    none of them could, since its data ended, is left to the next that begins.

    Args:
        size: batches to leave out after a rollback (>= 0).
    """

    def __init__(self, size: int) -> None:
        self.size = size
        """Batches to leave out after a rollback."""
        self.rollbacks = 0
        """Rollbacks that ordered something."""
        self.owed = 0
        """Batches that nobody has left out yet, of the last one's."""
        self.left_out = 0
        """Batches left out so far."""

    def rolled_back(self) -> None:
        """A rollback, by hand or not, orders batches to be left out, in place of what was ordered before."""
        if self.size:
            self.owed = self.size
            self.rollbacks += 1

    def saved_form(self) -> dict[str, int]:
        """Plain values for :meth:`load_saved_form`."""
        return {"owed": self.owed, "left_out": self.left_out}

    def load_saved_form(self, saved: Mapping[str, Any]) -> None:
        """Go on from an earlier run; what it owed is still owed."""
        self.owed = min(saved["owed"], self.size)
        self.left_out = saved["left_out"]


class BatchDebt:
    """What one iteration over data still has to leave out; a governor may get another ledger meanwhile."""

    def __init__(self, ledger: BatchLedger) -> None:
        self._take_up(ledger)

    def _take_up(self, ledger: BatchLedger) -> None:
        self._ledger, self._rollbacks, self._debt = ledger, ledger.rollbacks, ledger.owed
        self._seen = ledger.left_out

    def due(self, ledger: BatchLedger) -> int:
        """Batches to leave out now.

        Args:
            ledger: the governor's ledger of now.
        """
        if ledger is not self._ledger:
            self._take_up(ledger)
        elif ledger.rollbacks != self._rollbacks:
            self._rollbacks, self._debt = ledger.rollbacks, ledger.size
        self._seen = ledger.left_out
        return self._debt

    def drawn(self) -> bool:
        """A batch has come since :meth:`due`; whether it is to be left out.

        What was left out meanwhile, by another that this one draws from, was left out for this one, too.
        """
        self._debt = max(0, self._debt - (self._ledger.left_out - self._seen))
        self._seen = self._ledger.left_out
        return self._debt > 0

    def pay(self) -> None:
        """The batch just drawn is left out."""
        ledger = self._ledger
        if self._debt:
            self._debt -= 1
            ledger.left_out += 1
            self._seen = ledger.left_out
            if self._rollbacks == ledger.rollbacks:
                ledger.owed = min(ledger.owed, self._debt)
