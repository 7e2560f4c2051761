"""When a capture that was asked for by hand is made."""

from __future__ import annotations

from tolaria._fossils import listen
from tolaria.governor.engine import Engine
from tolaria.governor.row import Row
from tolaria.ops import StatusField


class ManualCaptures:
    """At once, unless it would end the probation of one made by hand a few steps before.

    There is one slot for a candidate. If every call took it, a caller who comes more often than ``probation``
    allows would never see anything promoted, and a rollback would go back to the beginning. So from the first
    judgement after a capture by hand until it is promoted or discarded another one waits: the newest state is
    captured at the end of the step that decides. That may take longer than ``probation`` steps, since those
    with evidence of a collapse or of a shift do not count.

    A device tells of it late, and of one that was discarded by a bad step not at all: there a capture has at
    least ``snapshot_interval`` steps to be promoted. Ranks on devices hear at different times; they let all
    of these pass, so as to capture in the same step.

    Args:
        row: the governor.
        engine: makes the captures.
        is_shared: whether ranks judge together.
    """

    def __init__(self, row: Row, engine: Engine, *, is_shared: bool) -> None:
        self._row, self._engine, self._is_shared = row, engine, is_shared
        self._made_at: int | None = None
        self._rollbacks = self._promotions = 0
        self._waits = False
        listen(self)

    def fossilized(self, slot: object) -> None:
        """A seed is part of a network for good: if of this one, capture soon, so that a rollback keeps it."""
        if any(module is slot for _, module in self._engine.covered.walk().participants):
            self._ask_later()

    def ask(self) -> None:
        """Capture now, or as soon as that costs no other its probation.

        Raises:
            SnapshotError: the state cannot be captured; the candidate is what it was then.
        """
        if self._is_on_probation():
            self._engine.follow_structure()  # what cannot be captured is refused here, not within a step
            self._engine.host_parts()
            self._waits = True
            self._engine.look_again()  # so that the coming steps come to `end_step`
        else:
            self._make()

    def _ask_later(self) -> None:
        """Capture at the end of the coming step, or as soon after it as that costs no other its probation."""
        self._rollbacks = self._row.status(StatusField.rollback_count)
        self._waits = True
        self._engine.look_again()  # so that the coming steps come to `end_step`

    def end_step(self) -> None:
        """A step is over: make a capture that waits, if it may be made now."""
        if not self._waits:
            return
        if self._is_on_probation() or self._engine.is_recording():
            self._engine.look_again()
        elif self._rollbacks == self._row.status(StatusField.rollback_count):
            self._make()
        else:
            self._waits = False  # what was to be captured has gone

    def _is_on_probation(self) -> bool:
        row, made_at = self._row, self._made_at
        if made_at is None or self._rollbacks != row.status(StatusField.rollback_count):
            return False
        steps = self._engine.enqueued_step - made_at
        if steps <= 0:
            return False
        if not self._engine.is_late:
            return row.candidate_step() == made_at
        has_news = self._promotions != row.status(StatusField.promotion_count)
        is_promoted = has_news and row.status(StatusField.last_good_step) >= made_at
        if is_promoted and not self._is_shared:
            return False
        return steps < row.config.snapshot_interval  # which is more than probation

    def _make(self) -> None:
        self._promotions = self._row.status(StatusField.promotion_count)
        self._engine.snapshot()
        self._made_at, self._waits = self._engine.enqueued_step, False
        self._rollbacks = self._row.status(StatusField.rollback_count)
