"""The memory in which the judge tells, on whatever device, what happened; it is read without waiting."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from tolaria.ops import EventKind, PanicReason, RecordField, StatusField
from tolaria.telemetry.events import (
    AcceptanceEvent,
    CaptureEvent,
    DroppedEventsEvent,
    GovernorEvent,
    PromotionEvent,
    RollbackEvent,
    VerdictEvent,
)
from tolaria.telemetry.verdict import GovernorReport, judged_loss, judged_norm


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

    def read(self, name_of: Callable[[int], str | None], capture_bytes: int) -> Iterator[GovernorEvent]:
        """The events since the last call, oldest first; a count stands in for those that were overwritten.

        No rollback is lost with them: those that the status words count but no record tells of are told as
        far as the status words know. After an interruption the last one may be told twice.
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
                yield from self.read(name_of, capture_bytes)
                return
            yield self._decode(record, name_of, capture_bytes)
            self.told += 1  # now it is taken; whoever is interrupted before reads it once more

    def _decode(
        self, r: list[float], name_of: Callable[[int], str | None], capture_bytes: int
    ) -> GovernorEvent:
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
        name = None if index < 0 else name_of(index) or "a tensor of another rank"
        if kind is EventKind.ACCEPTANCE:
            return AcceptanceEvent(
                step=step, row=self._row, tensor_name=name, capture_id=capture_id, capture_step=capture_step
            )
        reason = PanicReason(int(r[RecordField.reason]))
        thresholds = (
            r[RecordField.threshold_absolute],
            r[RecordField.threshold_statistical],
            r[RecordField.threshold_multiplier],
        )
        loss, mean, std, panics = (
            judged_loss(r[RecordField.loss]), r[RecordField.mean], r[RecordField.std],
            int(r[RecordField.panics]),
        )  # fmt: skip
        gradient_norm, gradient_threshold, drift = (
            judged_norm(r[RecordField.gradient_norm]), r[RecordField.gradient_threshold], r[RecordField.drift]
        )  # fmt: skip
        if step == 0:  # by hand: nothing has been judged
            loss = mean = std = gradient_norm = gradient_threshold = math.nan
            thresholds = (math.nan,) * 3
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
        self._rollbacks = int(r[RecordField.rollback_count])
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
            # After a resume the judge counts from a capture of the run before it, which is older.
            steps_lost=min(int(r[RecordField.steps_lost]), step - capture_step),
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
