"""Why going back did not help: what a person reads who finds the run ended."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from tolaria.errors import AtFault, TrainingDivergedError
from tolaria.governor.config import GovernorConfig
from tolaria.ops import PanicReason
from tolaria.telemetry.verdict import GovernorReport

_OTHER_THAN_LOSSES = (PanicReason.NON_FINITE_STATE, PanicReason.SUSPICIOUS_STATE, PanicReason.VALIDATION)
"""Reasons that the losses do not show."""
_OF_STATE = (PanicReason.LOBOTOMY, PanicReason.DRIFT)
"""Reasons that no single batch is."""

_NEXT = {
    "data": "look at the data of governor.offending_steps and take it out, or leave more out: skip_batches, "
    "or skip_anomalous_steps for single bad batches",
    "state": "lower the learning rate (lr_factor below 1), warm up longer or clip gradients, or start from "
    "an earlier state; look at the data of governor.offending_steps if that changes nothing",
    "unknown": "look at the data of governor.offending_steps; lower the learning rate (lr_factor below 1); "
    "leave batches out after a rollback (skip_batches), or bad steps (skip_anomalous_steps)",
}


@dataclass(frozen=True, slots=True)
class Tried:
    """What was done before a run was given up."""

    let_pass: int
    """Bad steps that were let pass without a rollback."""
    left_out: int
    """Batches left out after rollbacks."""
    lowered: int
    """How often the learning rates were lowered."""
    rate: float | None
    """The lowest learning rate that came of it, if it could be read without waiting."""

    def words(self, rollbacks: int, config: GovernorConfig) -> str:
        """For people, with the settings by which more can be tried."""
        tried = [
            f"{rollbacks} rollbacks",
            f"{self.let_pass} bad steps let pass (skips_before_rollback={config.skips_before_rollback})",
            f"{self.left_out} batches left out (skip_batches={config.skip_batches})",
            self._of_rates(config),
            "random generators put back, then seeded anew (restore_rng=True)"
            if config.restore_rng
            else "new draws from the random generators (restore_rng=False)",
        ]
        return "tried: " + "; ".join(tried)

    def _of_rates(self, config: GovernorConfig) -> str:
        if config.lr_factor == 1.0:
            return "the same learning rates (lr_factor=1)"
        to = "" if self.rate is None else f" to {self.rate:g}"
        times = config.lr_factor**self.lowered
        return (
            f"learning rates lowered{to} (times {times:g}; lr_factor={config.lr_factor:g} at each rollback)"
        )


def healthy_between(reports: Sequence[GovernorReport], cooldown: int) -> tuple[int, ...]:
    """Healthy steps between each rollback and the next, oldest first."""
    return tuple(
        max(0, after.step - before.step - cooldown - max(1, after.consecutive_panics))
        for before, after in itertools.pairwise(reports)
    )


def find_fault(reports: Sequence[GovernorReport], healthy: Sequence[int]) -> tuple[AtFault, str]:
    """Whether data or state is at fault, and why one may think so.

    Args:
        reports: the rollbacks, oldest first, without those by hand.
        healthy: healthy steps between one and the next.
    """
    if not healthy:
        return "unknown", "too few rollbacks that nobody made by hand to tell data from state"
    last = reports[-1]
    if all(report.reason in _OTHER_THAN_LOSSES for report in reports):
        return "state", f"the losses were healthy, but {_what_was_not(last)}"
    if not any(healthy):
        return "state", "the restored state was judged bad at once each time, no step was healthy"
    climbed = sum(map(_has_climbed, reports)) == len(reports)
    is_by_batch = not climbed and all(r.reason is not PanicReason.VALIDATION for r in reports)
    if len(healthy) > 1 and len(set(healthy)) == 1 and is_by_batch:
        return "data", f"each time it went wrong after the same {healthy[0]} healthy steps, at the same batch"
    stayed_away = sum(report.consecutive_panics > 1 or _has_climbed(report) for report in reports)
    counts = ", ".join(map(str, healthy))
    if len(healthy) > 1 and stayed_away * 2 > len(reports):
        return "state", (
            f"after {counts} healthy steps the loss grew from the restored level each time and did not come "
            f"back, which no single batch does (last {last.loss:g}, after a mean of {last.mean:g})"
        )
    return "unknown", (
        f"a single batch each time, after {counts} healthy steps: samples that move from batch to batch, or "
        "a state on the brink"
    )


def _what_was_not(last: GovernorReport) -> str:
    if last.reason is PanicReason.VALIDATION:
        return "what was validated collapsed"
    what = "non-finite" if last.reason is PanicReason.NON_FINITE_STATE else "larger than it had ever been"
    return f"the state turned {what} ({last.tensor_name})"


def _has_climbed(report: GovernorReport) -> bool:
    """Whether the loss was on its way before it was judged bad: no single batch takes it there."""
    return report.reason in _OF_STATE or report.std > abs(report.mean)


def diverged(
    what: str, reports: Sequence[GovernorReport], healthy: Sequence[int], tried: Tried, config: GovernorConfig
) -> TrainingDivergedError:
    """The error that ends the run, in lines for people.

    Args:
        what: the limit that was reached, with its figures.
        reports: the rollbacks that did, oldest first.
        healthy: healthy steps between one and the next.
        tried: what was done.
        config: the settings.
    """
    last = reports[-1]
    found = "" if last.tensor_name is None else f" in {last.tensor_name}"
    where = f"the last one at step {last.step}, reason {last.reason.name}{found}, loss {last.loss:g}"
    judged = [report for report in reports if report.reason is not PanicReason.MANUAL]
    between = healthy if len(judged) == len(reports) else healthy_between(judged, config.cooldown)
    at_fault, why = find_fault(judged, between)
    name = {"data": "the data, most likely", "state": "the state or the learning rate, most likely"}
    lines = [
        f"{what} ({where})",
        tried.words(len(reports), config),
        f"at fault: {name.get(at_fault, 'unknown')}: {why}",
        f"next: {_NEXT[at_fault]}; or raise max_rollbacks, max_restores_of_one_capture",
    ]
    return TrainingDivergedError("\n".join(lines), history=tuple(reports), at_fault=at_fault)
