"""Sinks for experiment trackers, and for a table: numbers (:mod:`tolaria.telemetry.scalars`) and alerts.

What other ranks than the first tell is left out. The trackers are imported where they are used.
"""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch.distributed as dist

from tolaria._optional import require
from tolaria.telemetry.events import GovernorEvent
from tolaria.telemetry.scalars import alert_of, scalars_of, step_of


class _TrackerSink(ABC):
    """Hands on the numbers of an event, and an alert if it is worth one."""

    def __call__(self, event: GovernorEvent, /) -> None:
        """Write ``event``."""
        if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
            return
        scalars, alert = scalars_of(event), alert_of(event)
        if scalars:
            self._write(scalars, step_of(event))
        if alert is not None:
            self._alert(alert)

    @abstractmethod
    def _write(self, scalars: Mapping[str, float], step: int) -> None: ...

    @abstractmethod
    def _alert(self, text: str) -> None: ...


class WandbSink(_TrackerSink):
    """Logs to Weights & Biases, offline, too, with an alert at each rollback.

    W&B drops what is logged at a step older than the last, so the numbers are added to the row that your loop
    is about to log, and have an axis of their own: ``governor/step``, the step's tag or the governor's step.

    Args:
        run: a ``wandb`` run; None: the one that is active when something is told.
    """

    def __init__(self, run: Any = None) -> None:  # noqa: ANN401  (of a package without types)
        self._wandb = require("wandb", feature="WandbSink", package="wandb", extra="wandb")
        self._run, self._defined = run, None

    def _live(self) -> Any:  # noqa: ANN401  (as above)
        run = self._run or self._wandb.run
        if run is None:
            raise RuntimeError("WandbSink: expected an active run, got none; call wandb.init(), or pass run=")
        if run is not self._defined:
            run.define_metric("governor/*", step_metric="governor/step")
            self._defined = run
        return run

    def _write(self, scalars: Mapping[str, float], step: int) -> None:
        self._live().log({**scalars, "governor/step": step}, commit=False)

    def _alert(self, text: str) -> None:
        self._live().alert(title="rollback", text=text, level=self._wandb.AlertLevel.WARN)


class TrackioSink(_TrackerSink):
    """Logs to trackio, with an alert at each rollback, at the step's tag or the governor's step.

    Args:
        run: what ``trackio.init`` returned; None: the current run.
    """

    def __init__(self, run: Any = None) -> None:  # noqa: ANN401  (of a package without types)
        package = require("trackio", feature="TrackioSink", package="trackio", extra="trackio")
        self._log = package.log if run is None else run.log
        self._fire = package.alert if run is None else run.alert

    def _write(self, scalars: Mapping[str, float], step: int) -> None:
        self._log(dict(scalars), step=step)

    def _alert(self, text: str) -> None:
        self._fire(title="rollback", text=text)


class CsvSink(_TrackerSink):
    """Appends to a table of the columns ``step``, ``name``, ``value``: a row a number, flushed at once.

    Args:
        path: the file; it gets a head if it is new or empty.
    """

    def __init__(self, path: str | Path) -> None:
        self._file: IO[str] = Path(path).open("a", encoding="utf-8", newline="")  # noqa: SIM115 (close() does)
        self._rows = csv.writer(self._file)
        if self._file.tell() == 0:
            self._rows.writerow(("step", "name", "value"))

    def _write(self, scalars: Mapping[str, float], step: int) -> None:
        self._rows.writerows((step, name, value) for name, value in scalars.items())
        self._file.flush()

    def _alert(self, text: str) -> None:
        return  # its numbers are in the table

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> CsvSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
