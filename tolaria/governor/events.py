"""Typed telemetry events, and how they are read from a mailbox."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tolaria.governor.verdict import GovernorReport, judged_norm
from tolaria.ops import EventKind, PanicReason, RecordField, StatusField


@dataclass(frozen=True, slots=True, kw_only=True)
class GovernorEvent:
    """Something a governor tells. ``row`` is the environment in a bank, 0 in a single governor."""

    step: int
    row: int = 0
    time_s: float = field(default_factory=time.time)
    """Seconds since the epoch when the host learnt of it."""

    @property
    def kind(self) -> str:
        """Short name for logs: ``verdict``, ``capture``, ``rollback``, ..."""
        return type(self).__name__.removesuffix("Event").lower()

    def as_dict(self) -> dict[str, object]:
        """JSON-ready: non-finite numbers become strings, enums their names."""
        return {"kind": self.kind, **{k: _plain(v) for k, v in dataclasses.asdict(self).items()}}


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


def _plain(value: object) -> object:
    if isinstance(value, PanicReason):
        return value.name
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
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


class MailboxReader:
    """Reads what arrived in one row of a mailbox, by plain loads: it never waits and makes no device call."""

    def __init__(self, mailbox_row: npt.NDArray[np.float64], row: int, reward: float) -> None:
        self._status = mailbox_row[: len(StatusField)]
        ring = mailbox_row[len(StatusField) :]
        self._ring = ring.reshape(-1, len(RecordField))
        # The device writes a record before it counts it: of a full ring the oldest may be half overwritten.
        self._readable = len(self._ring) - 1
        self._row = row
        self._reward = reward
        self.told = 0
        """Events that :meth:`read` has told of."""
        self._rollbacks = 0

    def status(self, word: StatusField) -> int:
        """One status word."""
        return int(self._status[word])

    @property
    def has_news(self) -> bool:
        """Whether a record waits."""
        return bool(self._status[StatusField.events] != self.told)

    def set_reward(self, reward: float) -> None:
        """What a rollback costs from now on."""
        self._reward = reward

    def skip_all(self) -> None:
        """Forget what waits."""
        self.told = int(self._status[StatusField.events])
        self._rollbacks = self.status(StatusField.rollback_count)

    def read(self, names: Sequence[str], capture_bytes: int) -> Iterator[GovernorEvent]:
        """The events since the last call, oldest first; a count stands in for those that were overwritten.

        No rollback is lost with them: those that the status words count but no record tells of are told as
        far as the status words know.
        """
        rollbacks = self.status(StatusField.rollback_count)
        written = int(self._status[StatusField.events])
        lost = max(0, written - self.told - self._readable)
        if lost:
            self.told += lost
            yield DroppedEventsEvent(step=self.status(StatusField.step), row=self._row, dropped=lost)
            records = [self._ring[n % len(self._ring)] for n in range(self.told, written)]
            told = sum(1 for record in records if record[RecordField.kind] == EventKind.ROLLBACK)
            for _ in range(rollbacks - self._rollbacks - told):
                yield self._untold_rollback(capture_bytes)
        while self.told < written:
            record = self._ring[self.told % len(self._ring)].tolist()
            if int(self._status[StatusField.events]) - self.told > self._readable:
                # the device lapped us while we read: count it as dropped
                yield from self.read(names, capture_bytes)
                return
            self.told += 1
            yield self._decode(record, names, capture_bytes)

    def _decode(self, r: list[float], names: Sequence[str], capture_bytes: int) -> GovernorEvent:
        step, kind = int(r[RecordField.step]), EventKind(int(r[RecordField.kind]))
        capture_id, capture_step = int(r[RecordField.capture_id]), int(r[RecordField.capture_step])
        if kind is EventKind.CAPTURE:
            return CaptureEvent(
                step=step,
                row=self._row,
                capture_id=capture_id,
                capture_step=capture_step,
                bytes=capture_bytes,
                ticket=int(r[RecordField.ticket]),
            )
        if kind is EventKind.PROMOTION:
            return PromotionEvent(step=step, row=self._row, capture_id=capture_id, capture_step=capture_step)
        index = int(r[RecordField.tensor_index])
        name = None if index < 0 else names[index] if index < len(names) else "a tensor of another rank"
        reason = PanicReason(int(r[RecordField.reason]))
        thresholds = (
            r[RecordField.threshold_absolute],
            r[RecordField.threshold_statistical],
            r[RecordField.threshold_multiplier],
        )
        loss, mean, std, panics = (
            r[RecordField.loss], r[RecordField.mean], r[RecordField.std], int(r[RecordField.panics])
        )  # fmt: skip
        gradient_norm, gradient_threshold, drift = (
            judged_norm(r[RecordField.gradient_norm]), r[RecordField.gradient_threshold], r[RecordField.drift]
        )  # fmt: skip
        if kind is EventKind.VERDICT:
            return VerdictEvent(
                step=step,
                row=self._row,
                reason=reason,
                rollback=r[RecordField.rollback] != 0.0,
                loss=loss,
                mean=mean,
                std=std,
                thresholds=thresholds,
                consecutive_panics=panics,
                tensor_name=name,
                gradient_norm=gradient_norm,
                gradient_threshold=gradient_threshold,
                drift=drift,
            )
        self._rollbacks += 1
        report = GovernorReport(
            reason=reason,
            step=step,
            loss=loss,
            mean=mean,
            std=std,
            thresholds=thresholds,
            consecutive_panics=panics,
            restored_capture=capture_id,
            restored_step=capture_step,
            steps_lost=int(r[RecordField.steps_lost]),
            reward=self._reward,
            rollback_count=int(r[RecordField.rollback_count]),
            tensor_name=name,
            gradient_norm=gradient_norm,
            gradient_threshold=gradient_threshold,
            drift=drift,
        )
        return RollbackEvent(step=step, row=self._row, report=report, bytes=capture_bytes)

    def _untold_rollback(self, capture_bytes: int) -> RollbackEvent:
        self._rollbacks += 1
        restored = self.status(StatusField.restored_step)
        step = self.status(StatusField.step)
        report = GovernorReport(
            reason=PanicReason(self.status(StatusField.reason)),
            step=step,
            loss=math.nan,
            mean=math.nan,
            std=math.nan,
            thresholds=(math.nan, math.nan, math.nan),
            consecutive_panics=0,
            restored_capture=self.status(StatusField.restored_capture),
            restored_step=restored,
            steps_lost=max(0, step - restored),
            reward=self._reward,
            rollback_count=self._rollbacks,
        )
        return RollbackEvent(step=step, row=self._row, report=report, bytes=capture_bytes)
