"""What an interrupted run has left: a state to go on from, and the record up to there."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tolaria.errors import SnapshotError
from tolaria.governor import load_snapshot
from tolaria.runs.files import write_whole
from tolaria.runs.record import Line, thaw
from tolaria.train.bookmark import EXTRA, Bookmark, Resumption
from tolaria.train.observers import ValidationRecord
from tolaria.train.validate import Metrics

SNAPSHOTS = "snapshots"
METRICS, EVENTS, CONFIG, SUMMARY = "metrics.jsonl", "events.jsonl", "config.json", "summary.json"


def read_config(folder: Path) -> Line:
    """What ``config.json`` says.

    Raises:
        ValueError: ``folder`` is no run.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"resume: expected the folder of a run, with {CONFIG} in it, got {folder}"
        ) from error
    except ValueError as error:
        raise ValueError(f"resume: {folder / CONFIG}: expected JSON, got {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"resume: {folder / CONFIG}: expected an object, got {type(config).__name__}")  # noqa: TRY004 (data, not an argument)
    found: Line = thaw(config)
    return found


class Past:
    """The newest whole state in a run folder, and the lines that were written by then.

    Args:
        folder: of a run that nobody writes to.

    Raises:
        ValueError: the run is over, or has diverged.
        SnapshotError: there is no state to go on from, or all are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        _check_is_not_over(folder)
        state = _newest_state(folder)
        if EXTRA not in state["extras"]:
            raise SnapshotError(f"resume: {folder / SNAPSHOTS}: expected states of a run, got others")
        self.bookmark = mark = Bookmark.from_plain(state["extras"][EXTRA])
        self._metrics = _lines_that(self._is_metric_before(mark), folder / METRICS)
        self._events = _lines_that(self._is_event_before(mark), folder / EVENTS)
        self._check_record()
        self.resumption = Resumption(
            state=state,
            bookmark=mark,
            validations=[_validation(line) for line, _ in self._metrics if line["kind"] == "validation"],
            events=[line for line, _ in self._events],
        )

    def cut_record(self) -> None:
        """Drop what the dead run wrote after the state to go on from; each file is the old or the new one."""
        for name, lines in ((METRICS, self._metrics), (EVENTS, self._events)):
            write_whole(self._folder / name, "".join(text + "\n" for _, text in lines).encode())

    def _check_record(self) -> None:
        """A machine that lost power may have lost lines that the state outlived."""
        steps = {line["step"] for line, _ in self._metrics if line["kind"] == "step"}
        lost = self.bookmark.step - len(steps)
        if lost:
            warnings.warn(
                f"{self._folder / METRICS}: it lacks {lost} of the first {self.bookmark.step} steps; the run "
                "goes on, its curve has a gap",
                RuntimeWarning,
                stacklevel=4,
            )

    @staticmethod
    def _is_metric_before(mark: Bookmark) -> Callable[[Line], bool]:
        counts = {"validation": mark.validations, "phase": len(mark.phases)}

        def holds(line: Line) -> bool:
            if line["kind"] == "step":
                return bool(line["step"] <= mark.step)
            counts[line["kind"]] -= 1
            return counts[line["kind"]] >= 0

        return holds

    @staticmethod
    def _is_event_before(mark: Bookmark) -> Callable[[Line], bool]:
        seeds, resources, is_captured = len(mark.seeds), mark.validations, False

        def holds(line: Line) -> bool:
            nonlocal seeds, resources, is_captured
            kind, step = line["kind"], line["step"]
            if kind == "seed":
                seeds -= 1
                return seeds >= 0
            if kind == "resources":  # one at each validation
                resources -= 1
                return resources >= 0
            if kind == "promotion":  # of this state, or an earlier one
                return bool(line["capture_step"] <= mark.step)
            if (
                kind == "structure" and step == mark.step
            ):  # after the capture it is of a seed that comes again
                return not is_captured
            is_captured |= kind in ("attach", "capture") and step == mark.step
            return bool(step <= mark.step)

        return holds


def _check_is_not_over(folder: Path) -> None:
    """Raise ValueError if there is nothing left to do."""
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        summary = {}
    if summary.get("diverged") is not None:
        raise ValueError(
            f"resume: expected a run that was interrupted, got {folder}, which diverged and would again: "
            f"{summary['diverged']}"
        )
    if any((folder / SNAPSHOTS).glob("step_*")):
        return
    if summary.get("interrupted") is False:
        raise ValueError(
            f"resume: expected a run that was interrupted, got {folder}, which is over: all its "
            f"{summary.get('steps')} steps are taken"
        )
    raise SnapshotError(
        f"resume: {folder}: expected a state to go on from in {SNAPSHOTS}, found none: the run ended before "
        "it had written one, or is of an earlier version; start it anew"
    )


def _newest_state(folder: Path) -> dict[str, Any]:
    """What the newest whole snapshot holds; one that is damaged is passed over with a warning."""
    try:
        return load_snapshot(folder / SNAPSHOTS)
    except SnapshotError as error:
        raise SnapshotError("resume: " + str(error).replace("\n ", ";")) from error


def _lines_that(holds: Callable[[Line], bool], path: Path) -> list[tuple[Line, str]]:
    """The lines for which ``holds``, as objects and as they are; a last one that was cut off is left out."""
    try:
        written = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except FileNotFoundError:
        written = []
    found = []
    for number, text in enumerate(written, 1):
        try:
            line = thaw(json.loads(text))
            if holds(line):
                found.append((line, text))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"resume: {path}: line {number}: expected one of a run's, got {text[:80]!r}"
            ) from error
    return found


def _validation(line: Line) -> ValidationRecord:
    figures: dict[str, Any] = {name: line[name] for name in Metrics._fields}
    return ValidationRecord(step=line["step"], phase=line["phase"], metrics=Metrics(**figures))
