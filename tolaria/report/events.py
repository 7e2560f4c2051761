"""The events of a run: checked, counted, within bounds; what is routine is thinned, incidents are not."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from tolaria.report.lines import Line, number, whole
from tolaria.report.sampling import MinMax, Thinned

MOST_INCIDENTS = 2000
"""Verdicts and rollbacks that are kept for the table; what comes later is counted."""
_NUMBERS = ("loss", "mean", "std", "gradient_norm", "gradient_threshold", "drift", "reward")
_COUNTS = ("consecutive_panics", "restored_capture", "steps_lost", "rollback_count", "bad_in_a_row")


def checked(line: Line) -> Line | None:
    """An event whose fields are what they are called; None if it is none."""
    kind, step = line.get("kind"), whole(line.get("step"))
    if not isinstance(kind, str) or step is None:
        return None
    event: Line = {**line, "kind": kind, "step": step}
    if kind == "rollback":
        report = line.get("report")
        if not isinstance(report, dict) or whole(report.get("restored_step")) is None:
            return None
        event["report"] = _judged(report, step)
        event["report"]["restored_step"] = whole(report["restored_step"])
    elif kind == "verdict":
        event = _judged(line, step)
        event["rollback"] = line.get("rollback") is True
    elif kind == "fault":
        event["name"] = str(line.get("name", "fault"))
    elif kind in ("capture", "promotion"):
        for name in ("capture_step", "capture_id"):
            event[name] = whole(line.get(name))
            if event[name] is None:
                return None
    return event


def _judged(line: Line, step: int) -> Line:
    """A verdict or a report with numbers where numbers belong."""
    found: Line = {**line, "step": step, "reason": str(line.get("reason", "unknown"))}
    for name in _NUMBERS:
        value = number(line.get(name))
        found[name] = math.nan if value is None else value
    for name in _COUNTS:
        found[name] = whole(line.get(name)) or 0
    three = line.get("thresholds")
    values = [number(each) for each in three] if isinstance(three, list) else []
    found["thresholds"] = [math.nan if v is None else v for v in [*values, None, None, None][:3]]
    tensor = line.get("tensor_name")
    found["tensor_name"] = None if tensor is None else str(tensor)
    return found


def _key(event: Line) -> tuple[Any, ...]:
    """What is the same on all ranks."""
    reason = event.get("reason") or event.get("report", {}).get("reason")
    return event["kind"], event["step"], str(reason)


class EventLog:
    """Everything that is kept of the events."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        """Events by kind; kinds beyond the first hundred count as ``other``."""
        self.incidents: list[Line] = []
        """Faults, verdicts, rollbacks, bad validations and their like, as they came."""
        self.dropped = 0
        """Incidents beyond :data:`MOST_INCIDENTS`."""
        self.steps_lost, self.rollbacks, self.anomalies = 0, 0, 0
        self.captures = {name: Thinned() for name in ("good", "discarded")}
        """Captures by what became of them."""
        self.pending: tuple[int, int] | None = None
        """Step and number of the capture that is on probation."""
        self.seeds: list[Line] = []
        self.step_seconds, self.state_bytes = MinMax(), MinMax(256)
        self.resident = MinMax(512)
        """Resident memory of the process in bytes, where it was recorded."""
        self.clock_went_back = 0
        self.first_time: float | None = None
        self.last_time: float | None = None
        self.last_step = 0
        self.attach: Line | None = None
        self._stamp: tuple[int, float] | None = None
        self._keys, self._of_ranks = set[tuple[Any, ...]](), set[tuple[Any, ...]]()

    def add(self, event: Line) -> None:
        """One more, checked; what another rank has told already is not told again."""
        kind, step = event["kind"], event["step"]
        if _key(event) in self._of_ranks:
            return
        self.counts[kind if kind in self.counts or len(self.counts) < 100 else "other"] += 1
        self.last_step = max(self.last_step, step)
        self._clock(step, number(event.get("time_s")))
        if kind == "capture":
            self._settle("discarded")
            self.pending = (event["capture_step"], event["capture_id"])
        elif kind == "promotion":
            if self.pending is not None and self.pending[1] == event["capture_id"]:
                self._settle("good")
            else:
                self.captures["good"].add(event["capture_step"], event["capture_id"])
        elif kind in ("attach", "structure"):
            if kind == "attach":
                self.attach = event
            size = number(event.get("state_bytes"))
            if size is not None:
                self.state_bytes.one(step, size)
        elif kind == "resources":
            size = number(event.get("resident_bytes"))
            if size is not None:
                self.resident.one(step, size)
        elif kind == "seed":
            if len(self.seeds) < MOST_INCIDENTS:
                self.seeds.append(event)
        elif kind in ("verdict", "rollback", "fault", "validation", "seedculled", "acceptance", "resume",
                      "droppedevents"):  # fmt: skip
            self._incident(event)

    def add_rank(self, event: Line) -> None:
        """An event of another rank's file: what its governor did is the same, so it is told once."""
        if event["kind"] in ("verdict", "rollback") and _key(event) not in self._keys:
            if len(self._of_ranks) < MOST_INCIDENTS:
                self._of_ranks.add(_key(event))
            self._incident(event)

    def _settle(self, fate: str) -> None:
        if self.pending is not None:
            self.captures[fate].add(*self.pending)
            self.pending = None

    def _incident(self, event: Line) -> None:
        kind = event["kind"]
        if kind == "rollback":
            self.rollbacks += 1
            self.steps_lost += event["report"]["steps_lost"]
            self._settle("discarded")
        elif kind == "verdict" and not event["rollback"] and event["reason"] != "SUSPICIOUS_STATE":
            self.anomalies += 1
        if len(self.incidents) < MOST_INCIDENTS:
            self.incidents.append(event)
            self._keys.add(_key(event))
        else:
            self.dropped += 1

    def _clock(self, step: int, seconds: float | None) -> None:
        """Seconds a step, from two stamps; a clock that goes back gives none, and is told of."""
        if seconds is None or not math.isfinite(seconds):
            return
        if self._stamp is not None:
            steps, passed = step - self._stamp[0], seconds - self._stamp[1]
            if passed < 0:
                self.clock_went_back += 1
            elif steps > 0:
                self.step_seconds.one(step, passed / steps)
        if self._stamp is None or step != self._stamp[0] or seconds < self._stamp[1]:
            self._stamp = (step, seconds)
        self.first_time = seconds if self.first_time is None else self.first_time
        self.last_time = seconds
