"""What a judgement says, and what a rollback did."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from tolaria.ops import PanicReason, StateField


def judged_norm(stored: float) -> float:
    """A gradient norm as it is told: the state holds -1 where none was judged."""
    return math.nan if stored == -1.0 else stored


NO_LOSS = -(2.0**996)
"""What the judge is given where there is no loss: below every threshold, and no loss of guessing. A power of
two, so that the mean over any number of ranks is the same once more."""


def judged_loss(stored: float) -> float:
    """A loss as it is told: NaN where there was none."""
    return math.nan if stored == NO_LOSS else stored


class Verdict:
    """The judgement of one loss; true when a rollback is called for.

    It owns its values (a copy on the governor's device), so reading it late is safe. Reading waits for the
    device: ``bool(verdict)``, ``reason``, ``loss`` and the statistics do; holding or passing it on does not.
    """

    __slots__ = ("_cache", "_fields")

    def __init__(self, fields: Tensor) -> None:
        self._fields = fields
        self._cache: list[float] | None = None

    def _value(self, field: StateField) -> float:
        if self._cache is None:
            self._cache = self._fields.tolist()  # sync: one transfer, the first time somebody looks
        return self._cache[field]

    def __bool__(self) -> bool:
        return self._value(StateField.rollback) != 0.0

    @property
    def fields(self) -> Tensor:
        """The verdict's fields on the device, float64; see :class:`tolaria.ops.StateField`. Never waits."""
        return self._fields

    @property
    def reason(self) -> PanicReason:
        """Why."""
        return PanicReason(int(self._value(StateField.reason)))

    @property
    def is_healthy(self) -> bool:
        """Whether nothing at all was wrong; an unhealthy verdict need not call for a rollback yet."""
        return self.reason is PanicReason.HEALTHY

    @property
    def step(self) -> int:
        """Which judgement this was, from 1."""
        return int(self._value(StateField.step))

    @property
    def loss(self) -> float:
        """The loss that was judged."""
        return self._value(StateField.loss)

    @property
    def mean(self) -> float:
        """Mean of the window it was judged by; NaN while that is empty."""
        return self._value(StateField.mean)

    @property
    def std(self) -> float:
        """Population standard deviation of that window."""
        return self._value(StateField.std)

    @property
    def thresholds(self) -> tuple[float, float, float]:
        """Absolute, statistical and multiplier threshold."""
        return (
            self._value(StateField.threshold_absolute),
            self._value(StateField.threshold_statistical),
            self._value(StateField.threshold_multiplier),
        )

    @property
    def gradient_norm(self) -> float:
        """The gradient's norm that was judged beside the loss; NaN where none was."""
        return judged_norm(self._value(StateField.gradient_norm))

    @property
    def gradient_threshold(self) -> float:
        """What that norm must exceed to be an anomaly; infinite while its window is too short."""
        return self._value(StateField.gradient_threshold)

    @property
    def drift(self) -> float:
        """The drift sum with this loss (standard deviations times losses); 0 without a drift test."""
        return self._value(StateField.drift)

    @property
    def consecutive_panics(self) -> int:
        """Anomalies in a row, this one included."""
        return int(self._value(StateField.panics))

    def __repr__(self) -> str:
        return (
            f"Verdict(step={self.step}, reason={self.reason.name}, rollback={bool(self)}, "
            f"loss={self.loss:.6g}, mean={self.mean:.6g}, std={self.std:.6g})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GovernorReport:
    """One rollback."""

    reason: PanicReason
    """What called for it."""
    step: int
    """Judgement at which it happened."""
    loss: float
    """Loss at the panic."""
    mean: float
    """Mean of the healthy window at the panic; NaN while that was empty."""
    std: float
    """Its population standard deviation."""
    thresholds: tuple[float, float, float]
    """Absolute, statistical, multiplier."""
    consecutive_panics: int
    """Anomalies in a row."""
    restored_capture: int
    """Id of the capture that was put back; 1 is the one made at attach."""
    restored_step: int
    """Step at which that capture was made."""
    steps_lost: int
    """Steps of training undone."""
    reward: float
    """Punishment for an RL agent: minus ``death_penalty``."""
    rollback_count: int
    """Rollbacks so far, this one included."""
    tensor_name: str | None = None
    """First tensor found holding a non-finite value, where that was the reason."""
    gradient_norm: float = math.nan
    """The gradient's norm at the panic; NaN where it was not judged."""
    gradient_threshold: float = math.nan
    """What it would have had to exceed to be an anomaly."""
    drift: float = 0.0
    """The drift sum at the panic."""
    tag: int | str | None = None
    """What the caller named the step; see ``TolariaGovernor.step``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What ``verify()`` found; true if the state was fine, so that it may be saved."""

    tensor_name: str | None = None
    """The first tensor, or extra, that held NaN or infinity."""
    report: GovernorReport | None = None
    """The rollback, if there was one: the state is the last known good one again, finite and older."""
    is_fine: bool = True
    """What ``bool()`` says."""

    def __bool__(self) -> bool:
        return self.is_fine


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """What has been counted so far, and may come to a rollback or to a promotion."""

    anomalies: int
    """Anomalies in a row, of ``min_panics_before_rollback``."""
    lobotomies: int
    """Losses of guessing since the last healthy one, of ``lobotomy_patience``."""
    collapse: float
    """Losses of guessing, or worse, that add up to a collapse, of ``collapse_patience``."""
    shift: float
    """The shift sum, of ``shift_threshold``; above 15% of that no capture is promoted."""
    validations: int
    """Bad validations in a row, of ``validation_patience``."""
    skips: int
    """Bad steps in a row that were let pass, of ``skips_before_rollback``."""
    probation: int | None
    """Healthy verdicts since the capture that is on probation, of ``probation``; None: none is."""
    rollback: bool
    """Whether a rollback was called for and not carried out yet."""


def plain_report(report: GovernorReport) -> dict[str, Any]:
    """Plain values for :func:`report_of`."""
    return {**asdict(report), "reason": int(report.reason)}


def report_of(saved: Mapping[str, Any]) -> GovernorReport:
    """The report that :func:`plain_report` was made of."""
    thresholds = tuple(saved["thresholds"])  # a list where it came through JSON
    return GovernorReport(**{**saved, "reason": PanicReason(saved["reason"]), "thresholds": thresholds})
