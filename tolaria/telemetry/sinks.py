"""Where events go. A sink is any callable that takes a :class:`GovernorEvent`; these are the usual ones."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol

from tolaria._arguments import check_each
from tolaria.telemetry.events import GovernorEvent, RollbackEvent, ValidationEvent, VerdictEvent
from tolaria.telemetry.scalars import scalars_of, step_of

_log = logging.getLogger("tolaria.governor")


class Sink(Protocol):
    """Takes one event. It may raise: training goes on and the exception is logged."""

    def __call__(self, event: GovernorEvent, /) -> object:
        """Take ``event``; what is returned is ignored."""


def check_sinks(sinks: object) -> None:
    """A sequence of callables.

    Raises:
        TypeError: it is none, or holds something else.
    """
    check_each("sinks", sinks, "callables", callable)


def deliver(sinks: Iterable[Sink], event: GovernorEvent) -> None:
    """Hand ``event`` to every sink; one that raises neither stops training nor the other sinks."""
    for sink in sinks:
        try:
            sink(event)
        except Exception:
            # a sink is the one place where an exception is swallowed: the rollback is already done
            _log.warning("sink %r failed on %s", sink, event.kind, exc_info=True)


class LoggingSink:
    """Writes events to a ``logging`` logger: rollbacks as ERROR, bad verdicts as WARNING, others as INFO.

    A line begins with the governor's name, if it has one, its step and the step's tag in brackets.
    """

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self._logger = logger or _log

    def __call__(self, event: GovernorEvent, /) -> None:
        """Log ``event`` as one line at the level of its kind."""
        level = logging.INFO
        if isinstance(event, RollbackEvent):
            level = logging.ERROR
        elif isinstance(event, VerdictEvent | ValidationEvent):
            level = logging.WARNING
        apart = ("kind", "step", "time_s", "row", "tag", "governor")
        details = {k: v for k, v in event.as_dict().items() if k not in apart}
        whose = "" if event.governor is None else f"{event.governor}: "
        tag = "" if event.tag is None else f" ({event.tag})"
        self._logger.log(level, "%sstep %d%s: %s %s", whose, event.step, tag, event.kind, details)


class JsonLinesSink:
    """Appends each event to a file as one JSON object a line, flushed at once; also a context manager."""

    def __init__(self, path: str | Path) -> None:
        self._file: IO[str] = Path(path).open("a", encoding="utf-8")  # noqa: SIM115 (close() does)

    def __call__(self, event: GovernorEvent, /) -> None:
        """Append ``event`` as one line and flush it."""
        self._file.write(json.dumps(event.as_dict()) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> JsonLinesSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ScalarWriter(Protocol):
    """The part of TensorBoard's ``SummaryWriter`` that is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Record one value under ``tag``."""


class TensorBoardSink:
    """Writes rollbacks, anomalies, captures and promotions as scalars to a TensorBoard ``SummaryWriter``.

    Their names, and where they stand: :mod:`tolaria.telemetry.scalars`.
    """

    def __init__(self, writer: ScalarWriter) -> None:
        self._writer = writer

    def __call__(self, event: GovernorEvent, /) -> None:
        """Write the scalars of ``event`` at its step, or its tag."""
        for name, value in scalars_of(event).items():
            self._writer.add_scalar(name, value, step_of(event))
