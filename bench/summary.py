"""Read pytest-benchmark's JSON: groups of implementations, their medians, and ratios with an interval."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Timing:
    """One implementation in one group."""

    samples: tuple[float, ...]
    """Seconds a call, one a round; rounds of a group go together. NaN where it sat the round out."""
    info: dict[str, Any]

    @property
    def median(self) -> float:
        """Seconds a call."""
        return float(np.nanmedian(self.samples))

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third."""
        low, high = np.nanpercentile(self.samples, [25, 75])
        return float(low), float(high)

    @property
    def bytes_per_second(self) -> float:
        """Of what the case must read and write at least."""
        return float(self.info.get("moved_bytes", 0)) / self.median


@dataclass(frozen=True)
class Ratio:
    """A quotient of medians, with the middle 95% of what resampled rounds give."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Group:
    """What was measured side by side."""

    name: str
    timings: dict[str, Timing] = field(default_factory=dict)

    @property
    def absent(self) -> dict[str, str]:
        """Implementations that did not run, and why."""
        fused = self.timings.get("fused")
        return dict(fused.info.get("absent", {})) if fused else {}

    @property
    def ceiling(self) -> str | None:
        """The cold one, where the op writes to fresh memory. One that ``fused`` beats is none: then warm."""
        cold = self.ratio("fused", "ceiling (cold)")
        wanted = "ceiling (cold)" if cold is not None and cold.value >= 1 else "ceiling (warm)"
        return wanted if wanted in self.timings else None

    def ratio(self, of: str, to: str) -> Ratio | None:
        """Time of one implementation over that of another; None where one is missing."""
        if of not in self.timings or to not in self.timings:
            return None
        return ratio(self.timings[of].samples, self.timings[to].samples)


def _paired(of: Sequence[float], to: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The rounds in which both took part."""
    a, b = np.asarray(of, dtype=float), np.asarray(to, dtype=float)
    both = ~(np.isnan(a) | np.isnan(b))
    return a[both], b[both]


def ratio(of: Sequence[float], to: Sequence[float]) -> Ratio:
    """Quotient of medians. Rounds are resampled in pairs: what slows a round down slows both."""
    a, b = _paired(of, to)
    picks = np.random.default_rng(0).integers(0, len(a), (RESAMPLES, len(a)))
    low, high = np.percentile(np.median(a[picks], axis=1) / np.median(b[picks], axis=1), [2.5, 97.5])
    return Ratio(float(np.median(a) / np.median(b)), float(low), float(high))


def median_difference(of: Sequence[float], to: Sequence[float]) -> Ratio:
    """Median of paired differences in seconds, with the middle 95% of what resampled pairs give."""
    a, b = _paired(of, to)
    gaps = a - b
    picks = np.random.default_rng(0).integers(0, len(gaps), (RESAMPLES, len(gaps)))
    low, high = np.percentile(np.median(gaps[picks], axis=1), [2.5, 97.5])
    return Ratio(float(np.median(gaps)), float(low), float(high))


@dataclass(frozen=True)
class Session:
    """Everything that some JSON files hold; of a group measured twice, the later file's figures."""

    groups: dict[str, Group]
    machines: list[dict[str, Any]]
    """Of each file, with ``when`` it was made."""


def read(paths: Iterable[str | Path]) -> Session:
    """Merge files. A group comes from one file as a whole: what ran side by side stays together."""
    groups: dict[str, Group] = {}
    machines = []
    for path in paths:
        data = json.loads(Path(path).read_text())
        machines.append({**data["machine_info"], "when": data["datetime"]})
        found: dict[str, Group] = {}
        for row in data["benchmarks"]:
            info = dict(row["extra_info"])
            group = found.setdefault(row["group"], Group(row["group"]))
            group.timings[info.pop("impl")] = Timing(
                tuple(math.nan if x is None else x for x in info.pop("samples")), info
            )
        groups |= found
    return Session(groups, machines)
