"""What users validate is judged, too: a collapse of their metric, which the training loss may never show."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tolaria._arguments import as_number

_LEAST = 3
"""Validations before one can be judged."""
_WINDOW = 10
_DEVIATIONS = 6.0
_NORMAL = 1.4826
"""Standard deviations in a median absolute deviation, of a normal distribution."""
_FLOOR = 0.05
_DIRECTIONS = (None, True, False)
"""Whether higher is better, by its number in a saved form; not said yet."""


def as_metric(metric: object) -> float:
    """A validated metric as a number; of a tensor on a device it waits.

    Raises:
        TypeError: it is neither a number nor a floating tensor.
        ValueError: it has more than one element.
    """
    if not isinstance(metric, Tensor):
        return as_number("metric", metric)
    if not metric.is_floating_point():
        raise TypeError(f"metric: expected a floating tensor, got {metric.dtype}")
    if metric.numel() != 1:
        raise ValueError(f"metric: expected one value, got shape {tuple(metric.shape)}")
    return float(metric.detach())  # sync: asked for by name


class ValidationWindow:
    """The healthy values of one metric, and the bad ones in a row since.

    A value is bad if it is not finite, or lies six deviations on the worse side of the window's median. A
    deviation is the median absolute deviation in terms of a normal distribution (Rousseeuw and Croux, JASA
    88, 1993), at least 5% of the median.

    Values belong to the state that was validated: a rollback takes those of later states away, since by them
    an older state would be bad at once, and rolled back again.

    Args:
        patience: bad values in a row that call for a rollback.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._healthy: deque[tuple[int, float]] = deque(maxlen=_WINDOW)
        """After which step, and the value."""
        self._bad: list[int] = []
        """After which steps."""
        self._higher_is_better: bool | None = None

    @property
    def bad_in_a_row(self) -> int:
        """Bad values since the last healthy one."""
        return len(self._bad)

    def bound(self) -> float | None:
        """What a value must not pass on its worse side.

        None until there are three values, and while nothing says what is far from them (most are 0).
        """
        if len(self._healthy) < _LEAST or self._higher_is_better is None:
            return None
        values = [value for _, value in self._healthy]
        middle = statistics.median(values)
        spread = _NORMAL * statistics.median(abs(v - middle) for v in values)
        width = _DEVIATIONS * max(spread, _FLOOR * abs(middle))
        if width == 0.0:
            return None
        return middle - width if self._higher_is_better else middle + width

    def judge(self, value: float, step: int, *, higher_is_better: bool) -> bool:
        """Count a value in; whether it is the bad one that calls for a rollback.

        Args:
            value: what was validated.
            step: after which step.
            higher_is_better: whether a collapse is below.

        Raises:
            ValueError: the metric was said to be better the other way before.
        """
        if self._higher_is_better not in (None, higher_is_better):
            raise ValueError(
                f"higher_is_better: expected {self._higher_is_better}, as before, got {higher_is_better}; "
                "judge one metric"
            )
        self._higher_is_better = higher_is_better
        bound = self.bound()
        is_worse = bound is not None and (value < bound if higher_is_better else value > bound)
        if math.isfinite(value) and not is_worse:
            self._healthy.append((step, value))
            self.forgive()
            return False
        self._bad.append(step)
        return self.bad_in_a_row >= self._patience

    def forgive(self) -> None:
        """Count the bad ones anew."""
        self._bad.clear()

    def went_back(self, step: int) -> None:
        """The state is that after ``step`` again: what was validated since is of no state that there is."""
        self._load(self._until(step))

    def _until(self, step: float) -> tuple[list[tuple[int, float]], list[int]]:
        return [each for each in self._healthy if each[0] <= step], [s for s in self._bad if s <= step]

    def _load(self, values: tuple[list[tuple[int, float]], list[int]]) -> None:
        self._healthy, self._bad = deque(values[0], maxlen=_WINDOW), values[1]

    def saved_form(self, until: float = math.inf) -> dict[str, Any]:
        """Plain values for :meth:`load_saved_form`.

        Args:
            until: as of this step.
        """
        healthy, bad = self._until(until)
        return {
            "values": [value for _, value in healthy],
            "steps": [step for step, _ in healthy],
            "direction": _DIRECTIONS.index(self._higher_is_better),
            "bad_steps": bad,
        }

    def load_saved_form(self, saved: Mapping[str, Any]) -> None:
        """Go on where an earlier run was."""
        healthy = list(zip(saved["steps"], saved["values"], strict=True))
        self._load((healthy, list(saved["bad_steps"])))
        self._higher_is_better = _DIRECTIONS[saved["direction"]]


def check_saved_validation(saved: Mapping[str, Any]) -> None:
    """What :meth:`ValidationWindow.saved_form` gives, of which shape and kinds have been checked.

    Raises:
        ValueError: a value is not finite or has no step, or the direction is none.
    """
    steps, values = len(saved["steps"]), len(saved["values"])
    if steps != values:
        raise ValueError(f"policy.validation.steps: expected as many as values, {values}, got {steps}")
    for i, value in enumerate(saved["values"]):
        if not math.isfinite(value):
            raise ValueError(f"policy.validation.values[{i}]: expected a finite number, got {value}")
    if saved["direction"] >= len(_DIRECTIONS):
        raise ValueError(f"policy.validation.direction: expected 0 to 2, got {saved['direction']}")
