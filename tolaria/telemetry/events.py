"""What a governor tells: typed events, and the queue in which they wait."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from dataclasses import dataclass, field

from tolaria.ops import PanicReason
from tolaria.telemetry.verdict import GovernorReport


@dataclass(frozen=True, slots=True, kw_only=True)
class GovernorEvent:
    """Something a governor tells. ``row`` is the environment in a bank, 0 in a single governor."""

    step: int
    """Judgement, from 1; 0 before the first."""
    row: int = 0
    tag: int | str | None = None
    """What the caller named that step: ``governor.step(loss, tag=...)``."""
    governor: str | None = None
    """Name of the governor, if it was given one."""
    time_s: float = field(default_factory=time.time)
    """Seconds since the epoch when the host learnt of it."""

    @property
    def kind(self) -> str:
        """Short name for logs: ``verdict``, ``capture``, ``rollback``, ..."""
        return type(self).__name__.removesuffix("Event").lower()

    def as_dict(self) -> dict[str, object]:
        """JSON-ready: non-finite numbers become strings, enums their names; labels that are not set go."""
        return {"kind": self.kind, **_without_unset(dataclasses.asdict(self))}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachEvent(GovernorEvent):
    """A governor took charge of a model."""

    tensors: int
    """Tensors covered by a capture."""
    state_bytes: int
    """Bytes that one capture writes."""
    slot_bytes: int
    """Memory of both slots."""
    exempt: tuple[str, ...]
    """Tensors that were non-finite from the start (masks), so are not searched."""
    generators: tuple[str, ...]
    """Random generators that a rollback puts back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeEvent(GovernorEvent):
    """A governor goes on from a saved run, whose last step is ``step``."""

    healthy_losses: int
    """Losses in the window."""
    rollbacks: int
    """Rollbacks so far."""
    config_kept: bool
    """Whether its settings stayed; if not, the saved ones came into force."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationEvent(GovernorEvent):
    """A validated metric that collapsed: not finite, or beyond what is usual for it."""

    metric: float
    bound: float | None
    """What it must not pass on its worse side; None while too few values are known."""
    bad_in_a_row: int
    """How many were so since the last good one."""
    rollback: bool
    """Whether it calls for a rollback; until then nothing is captured and nothing promoted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictEvent(GovernorEvent):
    """A verdict that was not healthy."""

    reason: PanicReason
    rollback: bool
    loss: float
    mean: float
    std: float
    thresholds: tuple[float, float, float]
    consecutive_panics: int
    tensor_name: str | None
    gradient_norm: float = math.nan
    gradient_threshold: float = math.nan
    drift: float = 0.0

    @property
    def is_of_step(self) -> bool:
        """Whether the step was bad; not where only a capture was refused (SUSPICIOUS_STATE, no rollback)."""
        return self.rollback or self.reason is not PanicReason.SUSPICIOUS_STATE


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureEvent(GovernorEvent):
    """A capture was written; it is on probation."""

    capture_id: int
    capture_step: int
    bytes: int
    ticket: int = 0
    """On CUDA the number of the launch that made it; 0 where the replay of a recorded graph did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromotionEvent(GovernorEvent):
    """A capture passed its probation and is the last known good one."""

    capture_id: int
    capture_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptanceEvent(GovernorEvent):
    """A tensor of suspicious magnitude is trusted from here on: it has stayed so, or come back to it."""

    tensor_name: str | None
    capture_id: int
    capture_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RollbackEvent(GovernorEvent):
    """State was put back."""

    report: GovernorReport
    bytes: int
    """How many were written back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedCulledEvent(GovernorEvent):
    """A seed that turned non-finite while it incubated was removed."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StructureEvent(GovernorEvent):
    """The set of covered tensors changed; the slots were laid out anew."""

    tensors: int
    state_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DroppedEventsEvent(GovernorEvent):
    """So many events were lost, since nobody polled. The counts in the status word stay right."""

    dropped: int


def _without_unset(fields: dict[str, object]) -> dict[str, object]:
    return {k: _plain(v) for k, v in fields.items() if v is not None or k not in ("tag", "governor")}


def _plain(value: object) -> object:
    if isinstance(value, PanicReason):
        return value.name
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return _without_unset(value)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


class EventQueue:
    """Events that wait for ``poll()``. When ``capacity`` of them do, the oldest go and are counted."""

    def __init__(self, capacity: int = 4096) -> None:
        self._events: deque[GovernorEvent] = deque(maxlen=capacity)
        self._dropped = 0

    def add(self, event: GovernorEvent) -> None:
        """Append one."""
        self._dropped += len(self._events) == self._events.maxlen
        self._events.append(event)

    def take(self) -> list[GovernorEvent]:
        """All that wait, oldest first, behind a count of those that are gone."""
        events, dropped = list(self._events), self._dropped
        self._events.clear()
        self._dropped = 0
        if dropped:
            events.insert(0, DroppedEventsEvent(step=events[0].step, row=events[0].row, dropped=dropped))
        return events
