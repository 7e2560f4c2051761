"""What users validate is judged, too: a collapse of their metric, which the training loss may never show."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from tolaria.governor.config import GovernorConfig
from tolaria.governor.plain_values import is_number, said

_LEAST = 3
"""Validations before one can be judged."""
_WINDOW = 10
_DEVIATIONS = 6.0
_NORMAL = 1.4826
"""Standard deviations in a median absolute deviation, of a normal distribution."""
_FLOOR = 0.05


class ValidationWindow:
    """The healthy values of one metric, and how many bad ones came in a row since.

    A value is bad if it is not finite, or lies ``6`` deviations on the worse side of the window's median. A
    deviation is the median absolute deviation in terms of a normal distribution (Rousseeuw and Croux, JASA
    88, 1993), at least 5% of the median.
    """

    def __init__(self, config: GovernorConfig) -> None:
        self._patience = config.validation_patience
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
            "higher_is_better": self._higher_is_better,
            "bad_in_a_row": self.bad_in_a_row,
        }

    def load_saved_form(self, saved: Mapping[str, Any]) -> None:
        """Go on where an earlier run was."""
        self._values = deque(saved["values"], maxlen=_WINDOW)
        self._higher_is_better = saved["higher_is_better"]
        self.bad_in_a_row = saved["bad_in_a_row"]


def check_saved_validation(saved: object) -> None:
    """What :meth:`ValidationWindow.saved_form` gives.

    Raises:
        ValueError: it is something else; the message names the entry.
    """
    if not isinstance(saved, Mapping) or set(saved) != {"values", "higher_is_better", "bad_in_a_row"}:
        raise ValueError(f"validation: expected values, higher_is_better and bad_in_a_row, got {said(saved)}")
    values, count = saved["values"], saved["bad_in_a_row"]
    is_listed = isinstance(values, list | tuple) and len(values) <= _WINDOW
    if not is_listed or not all(is_number(v) and math.isfinite(v) for v in values):
        raise ValueError(f"validation.values: expected at most {_WINDOW} finite numbers, got {said(values)}")
    if saved["higher_is_better"] not in (None, True, False):
        raise ValueError(
            f"validation.higher_is_better: expected a bool or None, got {said(saved['higher_is_better'])}"
        )
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"validation.bad_in_a_row: expected a count, got {said(count)}")
