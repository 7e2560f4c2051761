"""A run folder read back, sorted for drawing."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Line = dict[str, Any]
Floats = npt.NDArray[np.float64]

_OUTLIER, _MOST_OUTLIERS = math.log(30.0), 5
_ODD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_TEXT = frozenset((
    "kind", "phase", "stage", "slot", "blueprint", "reason", "name",
    "governor", "tag", "tensor_name", "exempt", "generators",
))  # fmt: skip
"""Fields that hold words: one of them may be the name of a module that somebody called ``inf``."""


def read_lines(path: str | Path) -> list[Line]:
    """The objects of a ``.jsonl`` file that a run wrote; numbers that JSON does not know are floats again."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [thaw(json.loads(line)) for line in lines if line.strip()]


def thaw(value: Any, field_name: str = "") -> Any:  # noqa: ANN401  (whatever JSON holds)
    """A value that was written as JSON, with the numbers that JSON does not know as floats again."""
    if isinstance(value, str):
        return value if field_name in _TEXT else _ODD.get(value, value)
    if isinstance(value, dict):
        return {key: thaw(each, key) for key, each in value.items()}
    if isinstance(value, list):
        return [thaw(each, field_name) for each in value]
    return value


@dataclass(slots=True)
class RunRecord:
    """What the files of a run folder say; steps count from 1 and never go back."""

    steps: Floats
    losses: Floats
    alphas: Floats
    stages: list[str]
    validations: list[Line] = field(default_factory=list)
    events: dict[str, list[Line]] = field(default_factory=dict)
    config: Line = field(default_factory=dict)
    summary: Line = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """From the files that :class:`RunFolder` writes."""
        lines = read_lines(folder / "metrics.jsonl")
        taken = [line for line in lines if line["kind"] == "step"]
        events: dict[str, list[Line]] = {}
        for event in read_lines(folder / "events.jsonl"):
            events.setdefault(str(event["kind"]), []).append(event)
        column = {
            key: np.array([line[key] for line in taken], dtype=np.float64)
            for key in ("step", "loss", "alpha")
        }
        return cls(
            steps=column["step"],
            losses=column["loss"],
            alphas=column["alpha"],
            stages=[str(line["stage"]) for line in taken],
            validations=[line for line in lines if line["kind"] == "validation"],
            events=events,
            config=json.loads((folder / "config.json").read_text(encoding="utf-8")),
            summary=json.loads((folder / "summary.json").read_text(encoding="utf-8")),
        )

    @property
    def last_step(self) -> float:
        """The last step taken; at least 1, so that there is an axis to draw on."""
        return max(1.0, float(self.steps[-1])) if len(self.steps) else 1.0

    @property
    def rollbacks(self) -> list[Line]:
        """The reports, oldest first."""
        return [event["report"] for event in self.events.get("rollback", ())]

    @property
    def anomalies(self) -> list[Line]:
        """The verdicts that were no reason to roll back yet."""
        return [event for event in self.events.get("verdict", ()) if not event["rollback"]]

    @property
    def undone(self) -> npt.NDArray[np.bool_]:
        """For each step, whether a later rollback took it back."""
        out = np.zeros(len(self.steps), dtype=np.bool_)
        for report in self.rollbacks:
            out |= (self.steps > report["restored_step"]) & (self.steps <= report["step"])
        return out

    @property
    def undone_validations(self) -> npt.NDArray[np.bool_]:
        """For each validation, whether a later rollback took back the state that it looked at.

        One at the step of a rollback looked at the state that was put back.
        """
        where = np.array([line["step"] for line in self.validations], dtype=np.float64)
        out = np.zeros(len(where), dtype=np.bool_)
        for report in self.rollbacks:
            out |= (where > report["restored_step"]) & (where < report["step"])
        return out

    def captures(self) -> dict[str, list[float]]:
        """Steps of the captures by what became of them: promoted, discarded, or neither yet at the end."""
        promoted = {float(event["capture_step"]) for event in self.events.get("promotion", ())}
        others = {float(event["capture_step"]) for event in self.events.get("capture", ())} - promoted
        last = max((float(event["capture_step"]) for event in self.events.get("capture", ())), default=0.0)
        judged = [float(line["step"]) for line in (*self.anomalies, *self.rollbacks)]
        waiting = {step for step in others if step == last and not any(each > step for each in judged)}
        return {
            "known good": sorted(promoted),
            "discarded": sorted(others - waiting),
            "on probation at the end": sorted(waiting),
        }

    def bands(self) -> list[tuple[str, float, float]]:
        """Runs of steps in one stage: (stage, first, last)."""
        found: list[tuple[str, float, float]] = []
        for step, stage in zip(self.steps.tolist(), self.stages, strict=True):
            if found and found[-1][0] == stage:
                found[-1] = (stage, found[-1][1], step)
            else:
                found.append((stage, step - 1, step))
        return found

    def smoothed(self) -> Floats:
        """Running mean of the losses' logarithms, over a 150th of the run, begun anew after a rollback.

        NaN where the loss is not positive and finite, and at up to five outliers in a row (30 times the
        mean), which would bend the line for long.
        """
        restarts = {report["step"] for report in self.rollbacks}
        least = 1.0 / max(5.0, len(self.losses) / 150)
        out, mean, seen, outliers = np.full_like(self.losses, np.nan), 0.0, 0, 0
        for index, value in enumerate(self.losses):
            if index and self.steps[index - 1] in restarts:
                seen = 0
            if not (math.isfinite(value) and value > 0):
                continue
            log = math.log(value)
            if seen and log - mean > _OUTLIER and outliers < _MOST_OUTLIERS:
                outliers += 1
                continue
            seen, outliers = (1 if outliers == _MOST_OUTLIERS else seen + 1), 0
            mean += max(least, 1.0 / seen) * (log - mean)
            out[index] = math.exp(mean)
        return out
