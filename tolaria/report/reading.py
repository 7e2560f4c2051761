"""A run read from its files, once or again and again while it grows, in memory that does not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tolaria.report.aftermath import Aftermath
from tolaria.report.events import EventLog, checked
from tolaria.report.judge import COLUMNS, OfflineJudge, settings_of
from tolaria.report.lines import Line, Tail, number, read_object, whole
from tolaria.report.sampling import MinMax, Smoother

_KNOWN = ("step", "loss", "lr", "alpha", "gradient_norm")
_MOST_CURVES = 24
_MOST_BANDS = 400
_MOST_POINTS = 400  # of validations that are kept for the sentences about incidents
RAW = ("metrics.jsonl", "events.jsonl", "config.json", "summary.json")
"""Files of a run folder that a page links to."""


class RunReading:
    """What is known of a run.

    Args:
        path: a run folder, any folder with ``events*.jsonl`` (those of several ranks, too) or
            ``metrics*.jsonl``, or one file that a ``JsonLinesSink`` wrote.
        buckets: points of the finest curve, halved.

    Raises:
        ValueError: there is no such thing at ``path``.
        OSError: a file cannot be read.
    """

    def __init__(self, path: Path, *, buckets: int = 4096) -> None:
        self.path, self._buckets = path, buckets
        self.version = 0
        """Grows with every change."""
        self._find()
        self._begin()

    def _find(self) -> None:
        if self.path.is_file():
            self.folder, files = self.path.parent, [self.path]
        elif self.path.is_dir():
            self.folder = self.path
            files = [
                file for what in ("events", "metrics") for file in sorted(self.path.glob(f"{what}*.jsonl"))
            ]
        else:
            raise ValueError(f"RUN: expected a run folder or a .jsonl file, {self.path} is not there")
        if not files:
            raise ValueError(
                f"RUN: expected a folder with events.jsonl or metrics.jsonl in it, got {self.path}"
            )
        events = [file for file in files if file.name.startswith("events")]
        self._others = [Tail(file) for file in events[1:]]
        metrics = [file for file in files if file.name.startswith("metrics")]
        first = events[:1] if self.path.is_dir() else files
        # events first: what happened at a step is known before its loss is looked at
        self._tails = [Tail(file) for file in [*first, *metrics[:1]] if file in files]
        if self.path.is_dir():  # those that are not there yet may come
            for name, have in (("metrics.jsonl", metrics), ("events.jsonl", events)):
                if not have:
                    self._tails.append(Tail(self.path / name))
        self.files = [file.name for file in files]

    def _begin(self) -> None:
        self.config, self._config_fault = read_object(self.folder / "config.json")
        self._mend_config()
        self.summary: Line = {}
        self.log = EventLog()
        self.loss, self.smooth = MinMax(self._buckets), MinMax(self._buckets // 2)
        self.curves: dict[str, MinMax] = {}
        """Everything else that a step or a validation tells, ``step/lr``, ``validation/val_loss``."""
        self.judged = {name: MinMax(self._buckets // 4) for name in COLUMNS}
        self.bands: list[tuple[str, int, int]] = []
        """Stage, first and last step."""
        self.phases: list[Line] = []
        self.validations: list[tuple[int, Line]] = []
        self.steps, self.last_step, self.gaps, self.bad_lines, self._left_out = 0, 0, 0, 0, 0
        self.last_loss = math.nan
        self._smoother, self._restarts = Smoother(), set[int]()
        self.aftermath = Aftermath()
        self.judge, self.judge_fault = self._make_judge()

    def _mend_config(self) -> None:
        """Settings of a governor are an object, or there are none."""
        if not isinstance(self.config.get("governor", {}), dict):
            self.config["governor"] = None

    def _make_judge(self) -> tuple[OfflineJudge | None, str | None]:
        recorded = self.config.get("governor")
        if not isinstance(recorded, dict):
            return None, None
        guess = number(self.config.get("random_guess_loss"))
        guess = None if guess is None or not 0 < guess < math.inf else guess
        try:
            return (
                OfflineJudge(settings_of(recorded), guess, may_overflow=self.config.get("amp") == "float16"),
                None,
            )
        except (ValueError, TypeError, OverflowError) as error:
            return None, f"the settings in config.json are none of this version's: {error}"

    def refresh(self) -> bool:
        """Read what is new, all of it; whether there was anything. A file that was replaced is read anew."""
        self.begin_anew_if_replaced()
        is_new = False
        while self.read_some():
            is_new = True
        return is_new

    def begin_anew_if_replaced(self) -> None:
        """Forget everything if a file is not the one that was read: the run was resumed, or is another."""
        if any(tail.was_replaced for tail in (*self._tails, *self._others)):
            self._find()
            self._begin()
            self.version += 1

    def read_some(self) -> bool:
        """Read one piece of each file; whether there was one."""
        is_new = False
        for tail in self._others:
            for line in _all_of(tail):
                event = checked(line)
                if event is not None:
                    self.log.add_rank(event)
                is_new = True
        for tail in self._tails:
            # all events before any loss, or a rollback would come too late for the judge
            pieces = _pieces(tail) if tail is self._tails[0] and len(self._tails) > 1 else [tail.read()]
            for lines in pieces:
                if lines is not None:
                    is_new = True
                    self._take(lines)
        summary, _ = read_object(self.folder / "summary.json")
        if summary != self.summary:
            self.summary, is_new = summary, True
        if not self.config:
            config, self._config_fault = read_object(self.folder / "config.json")
            if config and not self.steps:
                self.config = config
                self._mend_config()
                self.judge, self.judge_fault = self._make_judge()
                is_new = True
        self.version += is_new
        return is_new

    def _take(self, lines: Iterable[Line]) -> None:
        steps: list[Line] = []
        for line in lines:
            kind = line.get("kind")
            if kind == "step":
                steps.append(line)
            elif kind == "validation" and "metric" not in line:
                self._steps(steps)
                steps = []
                self._validation(line)
            elif kind == "phase":
                if len(self.phases) < _MOST_BANDS:
                    self.phases.append(line)
            else:
                self._event(line)
        self._steps(steps)

    def _event(self, line: Line) -> None:
        event = checked(line)
        if event is None:
            self.bad_lines += 1
            return
        self.log.add(event)
        if event["kind"] == "rollback":
            self._restarts.add(event["step"])
        self.aftermath.expect(event)
        if self.judge is not None:
            self.judge.expect(event)

    def _validation(self, line: Line) -> None:
        step = whole(line.get("step"))
        if step is None:
            self.bad_lines += 1
            return
        figures = {
            name: value
            for name, each in line.items()
            if name != "step" and (value := number(each)) is not None
        }
        if len(self.validations) >= _MOST_POINTS:
            del self.validations[1::2]
        self.validations.append((step, figures))
        for name, value in figures.items():
            if not math.isnan(value):
                self._curve(f"validation/{name}").one(step, value)

    def _curve(self, name: str) -> MinMax:
        if name not in self.curves:
            if len(self.curves) >= _MOST_CURVES:
                self._left_out += 1
                return MinMax(2)
            self.curves[name] = MinMax(self._buckets // 4)
        return self.curves[name]

    def _steps(self, lines: Sequence[Line]) -> None:
        """A piece of the record of steps; lines without a step or a loss are counted and passed over."""
        good = [
            (step, loss, line)
            for line in lines
            if (step := whole(line.get("step"))) is not None
            and (loss := number(line.get("loss"))) is not None
        ]
        self.bad_lines += len(lines) - len(good)
        if not good:
            return
        numbers = [step for step, _, _ in good]
        losses = [loss for _, loss, _ in good]
        at, values = np.array(numbers, dtype=np.float64), np.array(losses)
        self.gaps += int((np.diff(np.concatenate(([self.last_step], at))) != 1).sum())
        self.steps += len(good)
        self.last_step, self.last_loss = numbers[-1], losses[-1]
        self.loss.add(at, values)
        self._smoothed(numbers, losses)
        columns = self._columns([line for _, _, line in good], at)
        self._bands([(step, line) for step, _, line in good])
        shown = None
        if self.judge is not None:
            nothing = [math.nan] * len(good)
            shown = self.judge.judge(
                numbers, losses, columns.get("gradient_norm", nothing), columns.get("lr", nothing)
            )
            for name, curve in zip(COLUMNS, shown, strict=True):
                known = ~np.isnan(curve)
                self.judged[name].add(at[known], curve[known])
        self.aftermath.follow(numbers, losses, shown)

    def _smoothed(self, steps: list[int], losses: list[float]) -> None:
        start, out = 0, list[float]()
        if self._restarts:
            for i, step in enumerate(steps):
                if step in self._restarts:
                    out += self._smoother.add(losses[start : i + 1])
                    self._smoother.restart()
                    self._restarts.discard(step)
                    start = i + 1
        out += self._smoother.add(losses[start:])
        values = np.array(out)
        known = ~np.isnan(values)
        self.smooth.add(np.array(steps, dtype=np.float64)[known], values[known])

    def _columns(self, lines: list[Line], at: Any) -> dict[str, list[float]]:  # noqa: ANN401 (an array)
        names = dict.fromkeys(name for line in (lines[0], lines[-1]) for name in line)
        found: dict[str, list[float]] = {}
        for name in names:
            if name in ("step", "loss", "kind", "phase", "stage"):
                continue
            column = [number(line.get(name)) for line in lines]
            if all(value is None for value in column):
                continue
            found[name] = [math.nan if value is None else value for value in column]
            self._curve(f"step/{name}").add(at, np.array(found[name]))
        return found

    def _bands(self, taken: list[tuple[int, Line]]) -> None:
        for step, line in taken:
            stage = line.get("stage")
            if not isinstance(stage, str):
                continue
            if self.bands and self.bands[-1][0] == stage:
                self.bands[-1] = (stage, self.bands[-1][1], step)
            elif len(self.bands) < _MOST_BANDS:
                self.bands.append((stage, step - 1, step))

    def notes(self) -> list[str]:
        """What is odd about the record, in sentences."""
        said = [] if self._config_fault is None else [self._config_fault]
        tails = (*self._tails, *self._others)
        damaged = sum(tail.damaged for tail in tails) + self.bad_lines
        if damaged:
            said.append(f"{damaged} lines could not be read and were passed over")
        said += [f"the last line of {tail.path.name} was cut off" for tail in tails if tail.unread]
        if self.gaps:
            said.append(f"the steps of the record do not follow on each other at {self.gaps} places")
        if self.log.clock_went_back:
            said.append(f"the clock went back {self.log.clock_went_back} times; no step time is drawn there")
        if self.log.dropped:
            said.append(f"{self.log.dropped} more incidents are in the files; the page keeps the first ones")
        if self._left_out:
            said.append(f"only the first {_MOST_CURVES} metrics are drawn")
        if self.judge_fault is not None:
            said.append(f"the judge's view is not drawn: {self.judge_fault}")
        if self.judge is not None and self.judge.is_full:
            said.append(
                f"the judge's view ends after {self.judge.judged} steps, as the compiled ops are not there"
            )
        return said


def _pieces(tail: Tail) -> Iterable[list[Line]]:
    while (lines := tail.read()) is not None:
        yield lines


def _all_of(tail: Tail) -> Iterable[Line]:
    for lines in _pieces(tail):
        yield from lines
