"""Whether rollbacks lead anywhere: one capture that is restored again and again, and nothing comes of it."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tolaria.telemetry.verdict import GovernorReport, plain_report, report_of


@dataclass(frozen=True, slots=True)
class Stuck:
    """Restores of one capture that led nowhere."""

    reports: tuple[GovernorReport, ...]
    """The restores, oldest first."""
    healthy: tuple[int, ...]
    """Healthy steps between one and the next."""
    skipped: int
    """Bad steps between them that were let pass without a rollback."""

    def words(self) -> str:
        """What happened."""
        last = self.reports[-1]
        between = f", followed by {', '.join(map(str, self.healthy))} healthy steps" if self.healthy else ""
        return (
            f"no progress: capture {last.restored_capture} of step {last.restored_step} was restored "
            f"{len(self.reports)} times in a row{between}"
        )


class Progress:
    """Counts restores of one capture in a row, and the healthy steps between them.

    A chain ends when a newer capture is promoted or restored, and begins anew at a restore of which no event
    tells when it happened. It knows steps by their numbers alone, so that it does not matter how late events
    arrive, nor that some were dropped: of a bad step that nobody heard of, the count of healthy ones errs to
    the side of progress.

    Args:
        most: restores of one capture in a row that are no progress (>= 1).
        least: so many healthy steps between all of them, unless always the same number, are progress.
        cooldown: steps after a rollback that are not judged, so not healthy.
    """

    def __init__(self, *, most: int, least: int, cooldown: int) -> None:
        self._most = min(most, sys.maxsize)  # more than a deque can hold is never reached
        self._least, self._cooldown = least, cooldown
        self._stuck: Stuck | None = None
        self._begin()

    def _begin(self, *reports: GovernorReport) -> None:
        self._reports = deque(reports, maxlen=self._most)
        self._healthy: deque[int] = deque(maxlen=self._most - 1)
        self._skipped = 0
        self._bad = 0
        self._last_bad = 0
        self._is_adopted = False

    def promoted(self) -> None:
        """A newer capture is the last known good one."""
        self._begin()

    def bad_step(self, step: int, *, is_skipped: bool) -> None:
        """The verdict of ``step`` was not healthy."""
        if not self._reports or step <= max(self._last_bad, self._reports[-1].step):
            return
        self._last_bad = step
        self._skipped += is_skipped
        if step > self._reports[-1].step + self._cooldown:
            self._bad += 1

    def restored(self, report: GovernorReport) -> None:
        """A rollback that nobody asked for by hand."""
        last = self._reports[-1] if self._reports else None
        # Restores are steps apart; one at the step of the last, or before it, stands for a dropped event.
        if last is None or report.step <= last.step or not self._is_same_capture(report, last):
            self._begin(report)
        else:
            self.bad_step(report.step, is_skipped=False)
            judged = max(0, report.step - last.step - self._cooldown)
            self._healthy.append(max(0, judged - max(self._bad, report.consecutive_panics)))
            self._reports.append(report)
            self._bad, self._is_adopted = 0, False
        if len(self._reports) == self._most and self._leads_nowhere():
            self._stuck = Stuck(tuple(self._reports), tuple(self._healthy), self._skipped)
            self._begin()

    def _is_same_capture(self, report: GovernorReport, last: GovernorReport) -> bool:
        return self._is_adopted or report.restored_capture == last.restored_capture

    def _leads_nowhere(self) -> bool:
        is_alike = len(self._healthy) > 1 and len(set(self._healthy)) == 1
        return is_alike or all(count < self._least for count in self._healthy)

    def take_stuck(self) -> Stuck | None:
        """The restores that led nowhere, if there were any since the last call."""
        stuck, self._stuck = self._stuck, None
        return stuck

    def saved_form(self) -> dict[str, Any]:
        """Plain values for :meth:`load_saved_form`."""
        return {
            "reports": [plain_report(report) for report in self._reports],
            "healthy": list(self._healthy),
            "skipped": self._skipped,
            "bad": self._bad,
            "last_bad": self._last_bad,
        }

    def load_saved_form(self, saved: Mapping[str, Any]) -> None:
        """Go on from an earlier run, whose state is the first capture of this one.

        Raises:
            ValueError: ``saved`` is nothing that :meth:`saved_form` returned.
        """
        reports = [report_of(report) for report in saved["reports"]]
        counts = [*saved["healthy"], saved["skipped"], saved["bad"], saved["last_bad"]]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"state: expected counts of steps in policy.progress, got {counts}")
        self._begin(*reports)
        self._healthy.extend(saved["healthy"])
        self._skipped, self._bad, self._last_bad = saved["skipped"], saved["bad"], saved["last_bad"]
        self._is_adopted = True
