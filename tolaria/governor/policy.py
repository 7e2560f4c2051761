"""What else a rollback does: gradients, learning rates, and the limit on how often."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from tolaria.errors import TrainingDivergedError
from tolaria.governor.config import GovernorConfig
from tolaria.governor.progress import Progress
from tolaria.ops import PanicReason
from tolaria.snapshot.covered import CoveredState, named_modules
from tolaria.telemetry.events import GovernorEvent, PromotionEvent, RollbackEvent, VerdictEvent
from tolaria.telemetry.verdict import GovernorReport, plain_report, report_of

_MAX_OFFENDING = 4096
_SCALED_GROUP_KEYS = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")


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


def _groups(optimizers: Iterable[Optimizer]) -> list[dict[str, Any]]:
    """Their parameter groups, each once: an optimizer and the one that it wraps share them."""
    return list({id(group): group for optimizer in optimizers for group in optimizer.param_groups}.values())


Change = Callable[[], object]
"""Sets one rate to a value that is known already, so it may be done twice."""


def scaled_rates(
    optimizers: Iterable[Optimizer], schedulers: Iterable[object], factor: float
) -> Iterator[Change]:
    """What multiplies every learning rate by ``factor``, in groups and in what schedulers derive them from.

    LambdaLR, OneCycleLR and SWALR compute the rate from other rates, so these are scaled too
    (``base_lrs``, and ``max_lr``, ``min_lr``, ``swa_lr`` in the groups).
    """
    for group in _groups(optimizers):
        for key in _SCALED_GROUP_KEYS:
            value = group.get(key)
            if isinstance(value, Tensor):
                yield partial(value.copy_, value * factor)
            elif isinstance(value, int | float):
                yield partial(group.__setitem__, key, value * factor)
    for scheduler in schedulers:
        yield from _scaled_scheduler(scheduler, factor)


def _scaled_scheduler(scheduler: object, factor: float) -> Iterator[Change]:
    for name in ("base_lrs", "_last_lr", "max_lrs", "min_lrs"):
        rates = getattr(scheduler, name, None)
        if isinstance(rates, list):
            yield partial(setattr, scheduler, name, [rate * factor for rate in rates])
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _scaled_scheduler(inner, factor)


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
        if isinstance(event, RollbackEvent):
            covered.lowered.times = hearing.lowered
            self.apply(covered)

    def _note(self, event: GovernorEvent) -> None:
        if isinstance(event, RollbackEvent):
            report = event.report
            self._history.append(report)
            self._unchecked = True
            if report.reason is not PanicReason.MANUAL:
                if report.reason is not PanicReason.SUSPICIOUS_STATE:  # at some step since the last capture
                    self._offend(report.step - max(1, report.consecutive_panics) + 1, report.step)
                self._progress.restored(report)
        elif isinstance(event, PromotionEvent):
            self._progress.promoted()
        elif isinstance(event, VerdictEvent) and event.is_of_step:
            self._progress.bad_step(event.step, is_skipped=not event.rollback)
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
            rates.changes = list(self._lowered_rates(covered))
        for change in rates.changes:
            change()
        rates.caught_up()
        covered.schedules.refresh(covered.optimizers)

    def _lowered_rates(self, covered: CoveredState) -> Iterator[Change]:
        # A slot holds the rates of its own time: the factor of every rollback since then applies again. Rates
        # that the restore left alone reflect all but the last.
        rates = covered.lowered
        kept = rates.left_alone
        for is_kept, reflected in ((False, rates.reflected), (True, rates.reflected_there)):
            factor = self._config.lr_factor ** (rates.times - reflected)
            if factor != 1.0:
                optimizers = [o for o in covered.optimizers if (id(o) in kept) == is_kept]
                schedulers = [s for s in covered.schedulers if (id(s) in kept) == is_kept]
                yield from scaled_rates(optimizers, schedulers, factor)

    def saved_form(self) -> dict[str, Any]:
        """Plain values for :meth:`load_saved_form`."""
        return {
            "reports": [plain_report(report) for report in self._history],
            "offending_steps": list(self.offending_steps),
            "progress": self._progress.saved_form(),
        }

    def load_saved_form(self, saved: Mapping[str, Any]) -> None:
        """Take over the rollbacks of an earlier run; they count against the budget."""
        self._history.extend(map(report_of, saved["reports"]))
        self.offending_steps.extend(saved["offending_steps"])
        if "progress" in saved:  # version 2 knew of none
            self._progress.load_saved_form(saved["progress"])

    def check_budget(self) -> None:
        """Raise if the rollbacks since the last check spent the budget, or led nowhere.

        Raises:
            TrainingDivergedError: ``max_rollbacks`` inside ``rollback_window`` steps, or
                ``max_restores_of_one_capture`` without progress.
        """
        if not self._unchecked:
            return
        self._unchecked = False
        stuck = self._progress.take_stuck()
        if stuck is not None:
            raise TrainingDivergedError(stuck.message(self._config), history=stuck.reports)
        last = self._history[-1]
        recent = [r for r in self._history if r.step > last.step - self._config.rollback_window]
        if len(recent) >= self._config.max_rollbacks:
            self._history.clear()
            raise TrainingDivergedError(
                f"{len(recent)} rollbacks within {self._config.rollback_window} steps (the last one at step "
                f"{last.step}, reason {last.reason.name}): going back again would not help; lower the "
                "learning rate, look at the data of these steps, or raise max_rollbacks",
                history=tuple(recent),
            )
