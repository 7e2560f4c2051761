"""What became of a run after an incident: whether, and when, the loss was back where it had been."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from tolaria.report.judge import COLUMNS
from tolaria.report.lines import Line
from tolaria.report.sampling import Floats

WINDOW = 20
"""Losses whose mean must be back: as many as the judge's own window has."""
DEVIATIONS = 2.0
_MOST_OPEN = 16
_MOST = 2000
_MEAN, _STD = COLUMNS.index("mean"), COLUMNS.index("std")


@dataclass(slots=True)
class Return:
    """The way back after a rollback, a loss that was sat through, or a fault."""

    step: int
    """Where it starts."""
    level: float
    """What the mean of the last losses must come down to: the judge's mean and two deviations before."""
    back_after: int | None = None
    """Steps until it was there; None: not yet."""
    worst: float = -math.inf
    """The largest finite loss on the way."""
    seen: int = 0
    window: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))


class Aftermath:
    """Follows the losses after each incident; of those that are open at one time the newest sixteen."""

    def __init__(self) -> None:
        self.returns: dict[int, Return] = {}
        """By step; the first two thousand."""
        self._open: list[Return] = []
        self._levels: dict[int, float] = {}
        self._faults: set[int] = set()

    def expect(self, event: Line) -> None:
        """An event, before the losses after it."""
        if event["kind"] == "fault":
            self._faults.add(event["step"])
        judged = event.get("report") if event["kind"] == "rollback" else event
        if event["kind"] not in ("rollback", "verdict") or judged is None or len(self._levels) >= _MOST:
            return
        level = judged["mean"] + DEVIATIONS * judged["std"]
        if math.isfinite(level):
            # of anomalies in a row the first knows what was usual; a rollback's own is of that step, too
            self._levels[event["step"]] = level

    def follow(self, steps: Sequence[int], losses: Sequence[float], shown: Floats | None) -> None:
        """The next losses, and what the judge thought of them."""
        if not (self._levels or self._open or self._faults):
            return
        for i, (step, loss) in enumerate(zip(steps, losses, strict=True)):
            for way in self._open:
                self._follow(way, step, loss)
            level = self._levels.pop(step, None)
            if step in self._faults:
                self._faults.discard(step)
                if level is None and shown is not None:
                    usual = float(shown[_MEAN, i] + DEVIATIONS * shown[_STD, i])
                    level = usual if math.isfinite(usual) else None
            if level is not None and len(self.returns) < _MOST:
                # a level that was on its way up at a rollback is no level to be back at
                way = Return(step, min([level, *(each.level for each in self._open)]))
                self.returns[step] = way
                self._open = [*self._open[1 - _MOST_OPEN :], way]
            self._open = [way for way in self._open if way.back_after is None]

    @staticmethod
    def _follow(way: Return, step: int, loss: float) -> None:
        way.seen = step - way.step
        if not math.isfinite(loss):
            way.window.clear()
            return
        way.worst = max(way.worst, loss)
        way.window.append(loss)
        if len(way.window) == WINDOW and sum(way.window) / WINDOW <= way.level:
            way.back_after = way.seen
