"""What else a rollback does: gradients, learning rates, and the limit on how often."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tolaria.governor.batches import BatchLedger
from tolaria.governor.config import GovernorConfig
from tolaria.governor.diagnosis import Tried, diverged, healthy_between
from tolaria.governor.progress import Progress
from tolaria.governor.saved_rates import plain_rates
from tolaria.governor.validation import ValidationWindow
from tolaria.ops import PanicReason
from tolaria.snapshot.covered import CoveredState, named_modules
from tolaria.telemetry.events import GovernorEvent, PromotionEvent, RollbackEvent, VerdictEvent
from tolaria.telemetry.verdict import GovernorReport, plain_report, report_of

_MAX_OFFENDING = 4096
_AT_NO_STEP = (PanicReason.SUSPICIOUS_STATE, PanicReason.VALIDATION)
"""Reasons whose cause is some step since the last capture, or the last validation."""


def clear_gradients(covered: CoveredState) -> None:
    """Drop every gradient, and with it what was accumulated, since it belongs to the undone state.

    On CUDA gradients are zeroed where they are: a recorded graph keeps their addresses.
    """
    if covered.device.type == "cuda":
        covered.model.zero_grad(set_to_none=False)
        for optimizer in covered.optimizers:
            optimizer.zero_grad(set_to_none=False)
        return
    for _, module in named_modules(covered.model):
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.grad = None
    for optimizer in covered.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


@dataclass(slots=True)
class _Hearing:
    """An event that is being heard; hearing it again after an interruption does only what is left."""

    event: GovernorEvent
    lowered: int
    """How often the rates have been lowered, if it is a rollback."""
    is_noted: bool = False


def _is_same(one: GovernorEvent, other: GovernorEvent) -> bool:
    """Whether both tell of the same; a rollback may be told twice, by two objects."""
    if isinstance(one, RollbackEvent) and isinstance(other, RollbackEvent):
        return one.report.rollback_count == other.report.rollback_count
    return one is other


class RollbackPolicy:
    """What happens beside the restore, once per rollback; gives up when rollbacks come too often."""

    def __init__(self, config: GovernorConfig) -> None:
        self._config = config
        self._history: deque[GovernorReport] = deque(maxlen=min(max(64, config.max_rollbacks), sys.maxsize))
        self._unchecked = False
        self._progress = Progress(
            most=config.max_restores_of_one_capture, least=config.min_history, cooldown=config.cooldown
        )
        self.offending_steps: deque[int] = deque(maxlen=_MAX_OFFENDING)
        self._hearing: _Hearing | None = None
        self.batches = BatchLedger(config.skip_batches)
        self.validation = ValidationWindow(config.validation_patience)
        self._let_pass: deque[int] = deque(maxlen=_MAX_OFFENDING)
        self._lowered: tuple[int, float | None] = (0, None)
        """How often the rates have been lowered, and the lowest of them."""

    def hear(self, event: GovernorEvent, covered: CoveredState) -> None:
        """Take note of an event, in the order in which they happened; act on a rollback.

        Hearing the same event once more completes what an interruption left half done.
        """
        hearing = self._hearing
        if hearing is None or not _is_same(hearing.event, event):
            self._hearing = hearing = _Hearing(event, covered.lowered.times + 1)
        if not hearing.is_noted:
            self._note(event)
            hearing.is_noted = True
        if isinstance(event, RollbackEvent) or (isinstance(event, VerdictEvent) and event.is_of_step):
            unjudged = self._config.cooldown if isinstance(event, RollbackEvent) else 0
            covered.lowered.healthy_since = max(covered.lowered.healthy_since, event.step + unjudged)
        if isinstance(event, RollbackEvent):
            covered.lowered.times = hearing.lowered
            self.apply(covered)

    def _note(self, event: GovernorEvent) -> None:
        if isinstance(event, RollbackEvent):
            report = event.report
            self._history.append(report)
            self._unchecked = True
            self.batches.rolled_back()
            self.validation.went_back(report.restored_step)
            if report.reason is not PanicReason.MANUAL:
                if report.reason not in _AT_NO_STEP:
                    self._offend(report.step - max(1, report.consecutive_panics) + 1, report.step)
                self._progress.restored(report)
        elif isinstance(event, PromotionEvent):
            self._progress.promoted()
        elif isinstance(event, VerdictEvent) and event.is_of_step:
            self._progress.bad_step(event.step, is_skipped=not event.rollback)
            if not event.rollback:
                self._let_pass.append(event.step)
            if self._config.skips_before_rollback and not event.rollback:
                self._offend(event.step, event.step)

    def _offend(self, first: int, last: int) -> None:
        first = max(first, last - _MAX_OFFENDING + 1)  # a loaded count of panics may be of any size
        self.offending_steps.extend(s for s in range(first, last + 1) if s not in self.offending_steps)

    def apply(self, covered: CoveredState) -> None:
        """Clear gradients and lower the learning rates that were just put back.

        Called again after an interruption it completes what is half done.
        """
        clear_gradients(covered)
        rates = covered.lowered
        if rates.changes is None:
            is_for_a_time = self._config.lr_recovery_steps and self._config.lr_factor < 1.0
            lowered = rates.for_a_time if is_for_a_time else rates.for_good
            rates.changes = list(lowered(covered.optimizers, covered.schedulers, self._config.lr_factor))
        for change in rates.changes:
            change()
        rates.caught_up()
        covered.schedules.refresh(covered.optimizers)
        self._lowered = rates.times, min(covered.schedules.rates(), default=None)

    def end_step(self, covered: CoveredState, step: int) -> None:
        """The end of a step: rates that were lowered for a time go back once so many steps were healthy.

        Args:
            covered: what is governed.
            step: the last judgement of which everything has been heard.
        """
        rates = covered.lowered
        if rates.own is None:
            return
        if rates.way_back is None:
            rates.own.follow(covered.optimizers, covered.schedulers)
            if step - rates.healthy_since < self._config.lr_recovery_steps:
                return
            rates.way_back = list(rates.undone(covered.optimizers, covered.schedulers))
        for change in rates.way_back:
            change()
        rates.recovered()
        covered.schedules.refresh(covered.optimizers)

    def saved_form(
        self, saved_rates: dict[str, Any] | None = None, *, until: float = math.inf
    ) -> dict[str, Any]:
        """Plain values for :meth:`load_saved_form`.

        Args:
            saved_rates: what :func:`plain_rates` says; None: the rates are not lowered for a time.
            until: what was validated up to this step.
        """
        return {
            "reports": [plain_report(report) for report in self._history],
            "offending_steps": list(self.offending_steps),
            "progress": self._progress.saved_form(),
            "batches": self.batches.saved_form(),
            "validation": self.validation.saved_form(until),
            "rates": saved_rates if saved_rates is not None else plain_rates(None, None),
        }

    def load_saved_form(self, saved: Mapping[str, Any]) -> None:
        """Take over the rollbacks of an earlier run; they count against the budget."""
        self._history.extend(map(report_of, saved["reports"]))
        self.offending_steps.extend(saved["offending_steps"])
        if "progress" in saved:  # version 2 knew of none
            self._progress.load_saved_form(saved["progress"])
        if "batches" in saved:  # nor version 4 of these
            self.batches.load_saved_form(saved["batches"])
            self.validation.load_saved_form(saved["validation"])

    def check_budget(self) -> None:
        """Raise if the rollbacks since the last check spent the budget, or led nowhere.

        Raises:
            TrainingDivergedError: ``max_rollbacks`` inside ``rollback_window`` steps, or
                ``max_restores_of_one_capture`` without progress.
        """
        if not self._unchecked:
            return
        self._unchecked = False
        stuck, config = self._progress.take_stuck(), self._config
        if stuck is not None:
            raise diverged(stuck.words(), stuck.reports, stuck.healthy, self._tried(stuck.skipped), config)
        last = self._history[-1]
        recent = [r for r in self._history if r.step > last.step - config.rollback_window]
        if len(recent) >= config.max_rollbacks:
            self._history.clear()
            tried = self._tried(sum(step > recent[0].step for step in self._let_pass))
            healthy = healthy_between(recent, config.cooldown)
            what = f"{len(recent)} rollbacks within {config.rollback_window} steps"
            raise diverged(what, recent, healthy, tried, config)

    def _tried(self, let_pass: int) -> Tried:
        return Tried(let_pass, self.batches.left_out, *self._lowered)
