"""Curves of any length in bounded memory: the least and the largest value of each stretch of steps stay."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_OUTLIER, _MOST_OUTLIERS = math.log(30.0), 5


class MinMax:
    """A curve of which no spike is lost.

    Steps fall into buckets of one width, 1 at first; when a step lies beyond the last bucket the width is
    doubled and neighbours are merged. A bucket keeps its least and its largest value with their steps, and
    one step at which the value was not finite.

    Args:
        buckets: how many; an even number. Memory is five float64 each.
    """

    def __init__(self, buckets: int = 1024) -> None:
        self._n, self.width = buckets, 1
        self._low = np.full(buckets, np.inf)
        self._high = np.full(buckets, -np.inf)
        self._low_at, self._high_at, self._odd_at = (np.full(buckets, np.nan) for _ in range(3))
        self.count, self.odd = 0, 0
        """Values in all, and those that were not finite."""

    def add(self, steps: Floats, values: Floats) -> None:
        """Values at steps from 0 to 2**53, in any order."""
        if not len(steps):
            return
        while steps.max() // self.width >= self._n:
            self._halve()
        at = (steps // self.width).astype(np.int64)
        self.count += len(steps)
        finite = np.isfinite(values)
        if not finite.all():
            self.odd += int((~finite).sum())
            self._odd_at[at[~finite]] = steps[~finite]
            at, steps, values = at[finite], steps[finite], values[finite]
        for kept, where, best in (
            (self._low, self._low_at, np.minimum), (self._high, self._high_at, np.maximum),
        ):  # fmt: skip
            before = kept[at]
            best.at(kept, at, values)
            won = (values == kept[at]) & (before != kept[at])
            where[at[won]] = steps[won]

    def one(self, step: float, value: float) -> None:
        """One value."""
        self.add(np.array([float(step)]), np.array([float(value)]))

    def _halve(self) -> None:
        even, odd = slice(0, None, 2), slice(1, None, 2)
        half = self._n // 2
        first = self._low[even] <= self._low[odd]
        low_at = np.where(first, self._low_at[even], self._low_at[odd])
        low = np.minimum(self._low[even], self._low[odd])
        last = self._high[even] >= self._high[odd]
        high_at = np.where(last, self._high_at[even], self._high_at[odd])
        high = np.maximum(self._high[even], self._high[odd])
        odd_at = np.where(np.isnan(self._odd_at[even]), self._odd_at[odd], self._odd_at[even])
        for kept, new, empty in (
            (self._low, low, np.inf), (self._high, high, -np.inf),
            (self._low_at, low_at, np.nan), (self._high_at, high_at, np.nan), (self._odd_at, odd_at, np.nan),
        ):  # fmt: skip
            kept[:half], kept[half:] = new, empty
        self.width *= 2

    def points(self) -> tuple[Floats, Floats]:
        """Steps and values, in order of steps: two of each bucket, one where they are the same."""
        filled = ~np.isnan(self._low_at)
        steps = np.concatenate((self._low_at[filled], self._high_at[filled]))
        values = np.concatenate((self._low[filled], self._high[filled]))
        steps, first = np.unique(steps, return_index=True)
        return steps, values[first]

    def odd_steps(self) -> Floats:
        """A step of each bucket in which a value was not finite."""
        found: Floats = self._odd_at[~np.isnan(self._odd_at)]
        return found


class Thinned:
    """Steps of which too many are thinned: when ``most`` are kept every second one goes."""

    def __init__(self, most: int = 1500) -> None:
        self._most, self._stride, self.count = most, 1, 0
        self.kept: list[tuple[int, int]] = []
        """Step and number of each."""

    def add(self, step: int, which: int) -> None:
        """One more."""
        if self.count % self._stride == 0:
            self.kept.append((step, which))
            if len(self.kept) >= self._most:
                del self.kept[1::2]
                self._stride *= 2
        self.count += 1


class Smoother:
    """Running mean of a loss: of its logarithm while it is positive, over a 150th of the steps so far.

    Where a value is not finite it is NaN, and at up to five outliers in a row, which would bend it for long.
    """

    def __init__(self) -> None:
        self._mean, self._seen, self._all, self._outliers, self._is_log = 0.0, 0, 0, 0, True

    def restart(self) -> None:
        """What follows has nothing to do with what was."""
        self._seen = self._outliers = 0

    def add(self, values: Sequence[float]) -> list[float]:
        """The smoothed values."""
        return [self._one(value) for value in values]

    def _one(self, value: float) -> float:
        self._all += 1
        if not math.isfinite(value):
            return math.nan
        if self._is_log and value <= 0:  # from here on a plain mean
            self._is_log = False
            self._mean = math.exp(self._mean) if self._seen else 0.0
        new = math.log(value) if self._is_log else value
        if self._is_log and self._seen and new - self._mean > _OUTLIER and self._outliers < _MOST_OUTLIERS:
            self._outliers += 1
            return math.nan
        self._seen = 1 if self._outliers == _MOST_OUTLIERS else self._seen + 1
        self._outliers = 0
        self._mean += max(1.0 / max(5.0, self._all / 150), 1.0 / self._seen) * (new - self._mean)
        return math.exp(self._mean) if self._is_log else self._mean
