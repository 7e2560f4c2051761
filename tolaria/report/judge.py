"""What the judge thought at each step: its op again over the recorded losses, checked against verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch.optim import Optimizer

from tolaria import _backend
from tolaria.governor import GovernorConfig
from tolaria.governor.rates import RateWatch
from tolaria.ops import (
    MemoryField,
    Order,
    PanicReason,
    StateField,
    governor_order_,
    governor_state,
    governor_step_,
    memory_row,
)
from tolaria.report.lines import Line, number, whole
from tolaria.report.sampling import Floats

_S = StateField
_VERDICT_FIELDS = _S.reward + 1
MOST_BY_REFERENCE = 5_000
"""Steps that are judged where there is no compiled op: the reference takes milliseconds for each."""
_MOST_MEMORIES = 64
_MOST_VERDICTS = 20_000  # that wait for their step: later ones are not checked
_OF_STATE = ("NON_FINITE_STATE", "SUSPICIOUS_STATE")
_NOT_OF_LOSS = ("MANUAL", "VALIDATION")
COLUMNS = ("mean", "std", "statistical", "multiplier", "gradient_threshold", "drift", "collapse", "shift")
"""What :meth:`OfflineJudge.judge` returns for each step; the last three as shares of what rolls back."""


def settings_of(recorded: Mapping[str, Any]) -> GovernorConfig:
    """The governor's settings as ``config.json`` holds them.

    Raises:
        ValueError, TypeError: they are none of this version's.
    """
    values: dict[str, Any] = {}
    for name, value in recorded.items():
        as_number = number(value) if isinstance(value, str) else None
        values[name] = value if as_number is None else as_number
    if isinstance(values.get("lobotomy_band"), list):
        values["lobotomy_band"] = tuple(number(each) for each in values["lobotomy_band"])
    return GovernorConfig(**values)


class OfflineJudge:
    """Judges recorded losses one after another, as the governor of the run did.

    Arithmetic and rule are the op's own, which is equal bit for bit on every backend. What the losses cannot
    tell is taken from the record: when something was captured, when a rollback put which capture's memory
    back, and what was found in the state.

    Args:
        config: the governor's settings.
        random_guess_loss: loss of guessing, or None.
        may_overflow: whether the run was under a GradScaler.
    """

    def __init__(
        self, config: GovernorConfig, random_guess_loss: float | None, *, may_overflow: bool = False
    ) -> None:
        self._config, self._window = config, config.window
        self._settings = config.to_tensor(random_guess_loss, "cpu", gradient_may_overflow=may_overflow)
        self._state = governor_state(1, window=config.window)
        self._fields = self._state.numpy()[:, 0]
        first, end = memory_row(0, self._window, 0), memory_row(1, self._window, 0)
        self._live = self._fields[first:end]
        self._memories: dict[int, Floats] = {0: self._live.copy()}
        self._loss, self._norm = (torch.zeros(1, dtype=torch.float64) for _ in range(2))
        self._rates, self._rollbacks = RateWatch(), 0
        self._captured: set[int] = set()
        self._restores: dict[int, int] = {}
        self._verdicts: dict[int, Line] = {}
        self._blind_from = 2**53
        self.judged, self.agreed = 0, 0
        """Steps judged, and recorded verdicts that came out the same to the bit."""
        self.differed: list[int] = []
        """Steps at which they did not, the first hundred; unrecorded verdicts too."""
        self.different = 0
        """How many those were."""

    @property
    def is_full(self) -> bool:
        """Whether no more is judged: without the compiled op long runs would take hours."""
        return self.judged >= MOST_BY_REFERENCE and not _backend.fused(self._state)

    def expect(self, event: Line) -> None:
        """An event of the run, before its step is judged."""
        kind, step = event["kind"], event["step"]
        if kind in ("capture", "structure", "attach"):
            self._captured.add(whole(event.get("capture_step")) or step)
        elif kind == "rollback":
            self._restores[step] = event["report"]["restored_step"]
        elif kind == "verdict":
            suspicious = event["reason"] == "SUSPICIOUS_STATE" and not event["rollback"]
            if not suspicious and event["reason"] not in _NOT_OF_LOSS:
                if len(self._verdicts) < _MOST_VERDICTS:
                    self._verdicts[step] = event
                else:
                    self._blind_from = min(self._blind_from, step)

    def judge(
        self, steps: Sequence[int], losses: Sequence[float], norms: Sequence[float], rates: Sequence[float]
    ) -> Floats:
        """Judge these steps, which follow on those before.

        Args:
            steps: their numbers, rising by one.
            losses: as recorded.
            norms: of the gradients, NaN where none is recorded.
            rates: learning rates, NaN likewise.

        Returns:
            float64 ``(len(COLUMNS), steps)``; NaN past the last that is judged.
        """
        out = np.full((len(COLUMNS), len(steps)), np.nan)
        for i, (step, loss, norm, rate) in enumerate(zip(steps, losses, norms, rates, strict=True)):
            if self.is_full:
                break
            out[:, i] = self._one(step, loss, norm, rate)
        return out

    def _one(self, step: int, loss: float, norm: float, rate: float) -> list[float]:
        fields, recorded = self._fields, self._verdicts.pop(step, None)
        fields[_S.step] = step - 1
        self._find_in_state(recorded)
        self._loss[0] = loss
        gradient = None
        if not math.isnan(norm) or (recorded is not None and recorded["reason"] == "GRADIENT_NORM"):
            self._norm[0] = norm
            gradient = self._norm
        governor_step_(self._state, self._settings, self._loss, None, None, None, gradient)
        verdict = fields[:_VERDICT_FIELDS].tolist()
        self.judged += 1
        self._compare(step, verdict, recorded)
        shown = self._shown(verdict)
        self._follow(step, rate)
        return shown

    def _find_in_state(self, recorded: Line | None) -> None:
        """Whether a capture found what the losses do not show."""
        fields = self._fields
        fields[_S.candidate], fields[_S.candidate_bad], fields[_S.suspect] = -1.0, -1.0, -1.0
        if recorded is not None and recorded["reason"] in _OF_STATE:
            fields[_S.candidate] = 0.0
            of_value = recorded["reason"] == "NON_FINITE_STATE"
            fields[_S.candidate_bad if of_value else _S.suspect] = 0.0
            fields[_S.suspect_count] = 0.0

    def _compare(self, step: int, verdict: list[float], recorded: Line | None) -> None:
        reason = PanicReason(int(verdict[_S.reason])).name
        if recorded is None and (reason == "HEALTHY" or step >= self._blind_from):
            return
        is_same = False
        if recorded is not None:
            told = [recorded["mean"], recorded["std"], *recorded["thresholds"]]
            mine = [*verdict[_S.mean : _S.threshold_multiplier + 1]]
            is_same = recorded["reason"] == reason and recorded["rollback"] == bool(verdict[_S.rollback])
            is_same &= all(a == b or (a != a and b != b) for a, b in zip(told, mine, strict=True))
        if is_same:
            self.agreed += 1
            return
        self.different += 1
        if len(self.differed) < 100:
            self.differed.append(step)

    def _shown(self, verdict: list[float]) -> list[float]:
        config, fields = self._config, self._fields

        def live(field: MemoryField) -> float:
            return float(fields[memory_row(0, self._window, field)])

        drift = math.nan
        if config.drift_horizon:
            drift = live(MemoryField.drift_sum) / (config.drift_threshold * config.drift_horizon)
        shift = verdict[_S.drift] / config.shift_threshold if config.shift_horizon else math.nan
        return [
            verdict[_S.mean], verdict[_S.std], verdict[_S.threshold_statistical],
            verdict[_S.threshold_multiplier], verdict[_S.gradient_threshold], drift,
            live(MemoryField.collapse) / config.collapse_patience, shift,
        ]  # fmt: skip

    def _follow(self, step: int, rate: float) -> None:
        """What happened after the judgement: a capture, a rollback, a warm restart."""
        if step in self._captured:
            self._captured.discard(step)
            self._memories[step] = self._live.copy()
            for old in sorted(self._memories)[1:-_MOST_MEMORIES]:
                del self._memories[old]
        restored = self._restores.pop(step, None)
        if restored is not None:
            self._rollbacks += 1
            self._fields[_S.cooldown_left] = self._config.cooldown
            memory = self._memories.get(restored)
            if memory is not None:
                self._live[:] = memory
            for later in [each for each in self._memories if each > restored]:
                del self._memories[later]
        if self._config.shift_horizon and not math.isnan(rate):
            of_run = cast("Optimizer", _Rate(rate))
            if self._rates.is_restart([of_run], self._rollbacks):
                governor_order_(self._state, self._settings, 0, Order.RELEARN)


class _Rate:
    """What a watch of rates reads of an optimizer."""

    def __init__(self, rate: float) -> None:
        self.param_groups = [{"lr": rate}]
