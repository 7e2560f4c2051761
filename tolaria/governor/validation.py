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
    return float(metric)  # sync: asked for by name


class ValidationWindow:
    """The healthy values of one metric, and how many bad ones came in a row since.

    A value is bad if it is not finite, or lies six deviations on the worse side of the window's median. A
    deviation is the median absolute deviation in terms of a normal distribution (Rousseeuw and Croux, JASA
    88, 1993), at least 5% of the median.

    Args:
        patience: bad values in a row that call for a rollback.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._values: deque[float] = deque(maxlen=_WINDOW)
        self._higher_is_better: bool | None = None
        self.bad_in_a_row = 0

    def bound(self) -> float | None:
        """What a value must not pass on its worse side; None until there are three values."""
        if len(self._values) < _LEAST or self._higher_is_better is None:
            return None
        middle = statistics.median(self._values)
        spread = _NORMAL * statistics.median(abs(v - middle) for v in self._values)
        width = _DEVIATIONS * max(spread, _FLOOR * abs(middle))
        return middle - width if self._higher_is_better else middle + width

    def judge(self, value: float, *, higher_is_better: bool) -> bool:
        """Count a value in; whether it is the bad one that calls for a rollback.

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
            self._values.append(value)
            self.bad_in_a_row = 0
            return False
        self.bad_in_a_row += 1
        return self.bad_in_a_row >= self._patience

    def saved_form(self) -> dict[str, Any]:
        """Plain values for :meth:`load_saved_form`."""
        return {
            "values": list(self._values),
            "direction": _DIRECTIONS.index(self._higher_is_better),
            "bad_in_a_row": self.bad_in_a_row,
        }

    def load_saved_form(self, saved: Mapping[str, Any]) -> None:
        """Go on where an earlier run was."""
        self._values.extend(saved["values"])
        self._higher_is_better = _DIRECTIONS[saved["direction"]]
        self.bad_in_a_row = saved["bad_in_a_row"]


def check_saved_validation(saved: Mapping[str, Any]) -> None:
    """What :meth:`ValidationWindow.saved_form` gives, of which shape and kinds have been checked.

    Raises:
        ValueError: a value is not finite, or the direction is none.
    """
    for i, value in enumerate(saved["values"]):
        if not math.isfinite(value):
            raise ValueError(f"policy.validation.values[{i}]: expected a finite number, got {value}")
    if saved["direction"] >= len(_DIRECTIONS):
        raise ValueError(f"policy.validation.direction: expected 0 to 2, got {saved['direction']}")
