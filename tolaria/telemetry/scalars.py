"""Which numbers of an event a logger gets: one mapping for all of them."""

from __future__ import annotations

import math

from tolaria.ops import PanicReason
from tolaria.telemetry.events import (
    CaptureEvent,
    GovernorEvent,
    PromotionEvent,
    RollbackEvent,
    SeedCulledEvent,
    ValidationEvent,
    VerdictEvent,
)


def scalars_of(event: GovernorEvent) -> dict[str, float]:
    """The numbers of an event by name; none for an event of which there is nothing to plot.

    They are called ``governor/rollbacks`` and so on, ``governor/NAME/rollbacks`` of a governor with a name.
    What is not finite is left out: the reason, a number of :class:`PanicReason`, says it.
    """
    values: dict[str, float] = {}
    if isinstance(event, RollbackEvent):
        values = {"rollbacks": event.report.rollback_count, "steps_lost": event.report.steps_lost}
    elif isinstance(event, VerdictEvent):
        values = {"panic_reason": event.reason, "panic_loss": event.loss}
    elif isinstance(event, CaptureEvent):
        values = {"capture": event.capture_id}
    elif isinstance(event, PromotionEvent):
        values = {"last_known_good_step": event.capture_step}
    elif isinstance(event, ValidationEvent):
        values = {"bad_validations": event.bad_in_a_row, "bad_metric": event.metric}
    elif isinstance(event, SeedCulledEvent):
        values = {"seeds_culled": 1}
    whose = "governor" if event.governor is None else f"governor/{event.governor}"
    return {f"{whose}/{name}": float(value) for name, value in values.items() if math.isfinite(value)}


def step_of(event: GovernorEvent) -> int:
    """Where it stands on the axis: at its step's tag if that is a number, else at the governor's own step."""
    return event.tag if isinstance(event.tag, int) else event.step


def alert_of(event: GovernorEvent) -> str | None:
    """One sentence for people, if an event is worth an alert: a rollback is."""
    if not isinstance(event, RollbackEvent):
        return None
    report = event.report
    whose = "the governor" if event.governor is None else f"the governor {event.governor}"
    what = f" in {report.tensor_name}" if report.tensor_name else ""
    reason = PanicReason(report.reason).name.lower().replace("_", " ")
    return (
        f"step {step_of(event)}: {whose} rolled back ({reason}{what}; loss {report.loss:.6g}) to the state "
        f"of {report.steps_lost} steps before; rollback {report.rollback_count}"
    )
