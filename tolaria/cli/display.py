"""What ``tolaria train`` shows: a live panel on a terminal, plain lines elsewhere, a closing table."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from tolaria._optional import require
from tolaria.governor import (
    AcceptanceEvent,
    CaptureEvent,
    GovernorEvent,
    PanicReason,
    PromotionEvent,
    ResumeEvent,
    RollbackEvent,
    VerdictEvent,
)
from tolaria.train.observers import GrowthObserver, SeedRecord, StepRecord, StoryContext, ValidationRecord

if TYPE_CHECKING:
    from tolaria.train.story import GrowthResult

_REFRESH_S = 0.25  # between looks at the device
_BLOCKS = "▁▂▃▄▅▆▇█"
_LOG_LINES = 8
_CROSS = "\u00d7"


_SUSPICIOUS = PanicReason.SUSPICIOUS_STATE.name


def _words(reason: PanicReason) -> str:
    return reason.name.replace("_", " ").lower()


def count(number: int, one: str, many: str | None = None) -> str:
    """``1 step``, ``2 steps``."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def describe(event: GovernorEvent) -> str | None:
    """An event in words; None for the routine ones."""
    if isinstance(event, RollbackEvent):
        report = event.report
        found = f" in {report.tensor_name}" if report.tensor_name else ""
        return (
            f"ROLLBACK to step {report.restored_step}: {_words(report.reason)}{found}, "
            f"loss {report.loss:.4g}, {report.steps_lost} steps lost"
        )
    if isinstance(event, ResumeEvent):
        losses, rollbacks = count(event.healthy_losses, "loss", "losses"), count(event.rollbacks, "rollback")
        said = f"resumed at step {event.step}: {losses} in the window, {rollbacks} so far"
        return said if event.config_kept else said + ", saved settings"
    if isinstance(event, VerdictEvent) and not event.is_of_step:
        return f"{_words(event.reason)} in {event.tensor_name}: the capture is not promoted"
    if isinstance(event, AcceptanceEvent):
        return f"{_words(PanicReason.SUSPICIOUS_STATE)} in {event.tensor_name} lasts: it is accepted"
    if isinstance(event, VerdictEvent) and not event.rollback:
        return f"{_words(event.reason)}, sat through: loss {event.loss:.4g} (mean {event.mean:.4g})"
    return None


class QuietDisplay(GrowthObserver):
    """Says nothing while the run goes on; counts what the closing table needs."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream if stream is not None else sys.stdout
        self.context: StoryContext | None = None
        self.result: GrowthResult | None = None
        self.captures, self.anomalies, self.steps_lost, self.last_good, self.rollbacks = 0, 0, 0, 0, 0

    def on_start(self, context: StoryContext) -> None:
        """The run has begun: from here on an error is no longer one of the command line."""
        self.context = context
        for event in context.past_events:
            self._count_past(event)

    def _count_past(self, event: Mapping[str, Any]) -> None:
        """Count what a run that is resumed has said before."""
        if event["kind"] == "capture":
            self.captures += 1
        elif event["kind"] == "promotion":
            self.last_good = event["capture_step"]
        elif event["kind"] == "rollback":
            self.rollbacks += 1
            self.steps_lost += event["report"]["steps_lost"]
        elif event["kind"] == "verdict" and not event["rollback"] and event["reason"] != _SUSPICIOUS:
            self.anomalies += 1

    def on_events(self, events: Sequence[GovernorEvent]) -> None:
        """Count."""
        for event in events:
            if isinstance(event, CaptureEvent):
                self.captures += 1
            elif isinstance(event, PromotionEvent):
                self.last_good = event.capture_step
            elif isinstance(event, RollbackEvent):
                self.rollbacks += 1
                self.steps_lost += event.report.steps_lost
            elif isinstance(event, VerdictEvent) and event.is_of_step and not event.rollback:
                self.anomalies += 1

    def on_finish(self, result: GrowthResult) -> None:
        """Keep it for the table."""
        self.result = result

    def on_interrupt(self, step: int) -> None:
        """Say that the key was heard."""
        self.close()
        print(f"interrupted after step {step}; saving the run folder", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Give the terminal back."""

    def rows(self) -> list[tuple[str, str]]:
        """The closing table."""
        result, context = self.result, self.context
        if result is None or context is None:
            return []
        seeds = sum(p.numel() for p in result.model.seed_parameters())
        hosts = sum(p.numel() for p in result.model.host_parameters())
        rows = [
            ("host alone, test", _metrics(result.host_test, context) + _when(result)),
            ("at the end, test", _metrics(result.test, context)),
        ]
        if result.control_test is not None:
            alone = _metrics(result.control_test, context)
            rows.insert(1, ("host alone to the end, test", f"{alone} (a control: the same steps)"))
        rows.append(("seed", self._seed_row(result, context)))
        rows.append(("parameters", f"{hosts:,} host" + (f" + {seeds:,} seed" if seeds else "")))
        governed = "off"
        if context.governor is not None:
            governed = (
                f"{count(self.captures, 'capture')}, {count(self.anomalies, 'anomaly', 'anomalies')}, "
                f"{count(self.rollbacks, 'rollback')}, {count(self.steps_lost, 'step')} lost"
            )
        rows.append(("governor", governed))
        ended = " (interrupted)" if result.interrupted else " (diverged)" if result.error is not None else ""
        if result.resumed_at:
            ended += f", resumed after step {', '.join(map(str, result.resumed_at))}"
        rows.append(("steps", f"{result.steps} of {context.total_steps} in {result.seconds:.1f} s{ended}"))
        return rows

    def _seed_row(self, result: GrowthResult, context: StoryContext) -> str:
        if not result.seeds:
            return "none grafted"
        reason = next(
            (s.reason for s in reversed(result.seeds) if s.stage.name in ("FOSSILIZED", "CULLED")), ""
        )
        outcome = result.outcome if result.outcome != "none" else "unfinished"
        return f"{context.blueprint} at {context.slot}: {outcome}" + (f"; {reason}" if reason else "")


class PlainDisplay(QuietDisplay):
    """A line now and then, for logs and pipes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self._began = time.perf_counter()
        self._lr, self._phase = 0.0, ""

    def say(self, step: int, text: str) -> None:
        """One line; nobody reading any more is as good as Ctrl-C."""
        line = f"{time.perf_counter() - self._began:7.1f}s  step {step:>5}  {text}"
        try:
            print(line, file=self.stream, flush=True)
        except BrokenPipeError:
            raise KeyboardInterrupt from None

    def on_start(self, context: StoryContext) -> None:
        """What will be done."""
        super().on_start(context)
        self.say(0, f"{context.task.name}: {context.task.summary}; {context.total_steps} steps")
        if context.governor is None:
            self.say(0, "no governor watches over this run")
        if context.first_step:
            self.say(context.first_step, "the run goes on from here")

    def on_validation(self, record: ValidationRecord) -> None:
        """Figures."""
        assert self.context is not None
        self.say(record.step, f"{record.phase:<9} validation {_metrics(record.metrics, self.context)}")

    def on_seed(self, record: SeedRecord) -> None:
        """The seed's life."""
        self.say(
            record.step,
            f"seed      {record.stage.name}: {record.blueprint} at {record.slot}, {record.reason}",
        )

    def on_events(self, events: Sequence[GovernorEvent]) -> None:
        """What is worth a line."""
        super().on_events(events)
        for event in events:
            text = describe(event)
            if text is not None:
                self.say(event.step, f"governor  {text}")


class RichDisplay(QuietDisplay):
    """A panel that is redrawn a few times a second."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        needs = {"feature": "the live display", "package": "rich", "extra": "train"}
        self._console = require("rich.console", **needs).Console(file=self.stream)
        self._table = require("rich.table", **needs).Table
        self._panel = require("rich.panel", **needs).Panel
        self._group = require("rich.console", **needs).Group
        self._text = require("rich.text", **needs).Text
        self._bar = require("rich.progress_bar", **needs).ProgressBar
        self._live: Any = require("rich.live", **needs).Live(
            console=self._console, auto_refresh=False, transient=True
        )
        self._losses: deque[float] = deque(maxlen=48)
        self._log: deque[Any] = deque(maxlen=_LOG_LINES)
        self._record: StepRecord | None = None
        self._validation: ValidationRecord | None = None
        self._drawn = self._began = time.perf_counter()

    def on_start(self, context: StoryContext) -> None:
        """Take the terminal."""
        super().on_start(context)
        self._began = time.perf_counter()
        self._live.start()

    def on_step(self, record: StepRecord) -> None:
        """Redraw if it is time: only then are loss and alpha fetched."""
        self._record = record
        if time.perf_counter() - self._drawn >= _REFRESH_S:
            self._losses.append(float(record.loss))  # sync: a few times a second, somebody looks
            self._draw()

    def on_validation(self, record: ValidationRecord) -> None:
        """Figures."""
        self._validation = record

    def on_seed(self, record: SeedRecord) -> None:
        """The seed's life."""
        self._note(
            record.step,
            f"seed {record.stage.name.lower()}: {record.blueprint} at {record.slot}, {record.reason}",
            "cyan",
        )

    def on_events(self, events: Sequence[GovernorEvent]) -> None:
        """What is worth a line."""
        super().on_events(events)
        for event in events:
            text = describe(event)
            if text is not None:
                routine = "cyan" if isinstance(event, ResumeEvent) else "yellow"
                self._note(event.step, text, "bold red" if isinstance(event, RollbackEvent) else routine)

    def on_finish(self, result: GrowthResult) -> None:
        """Give the terminal back; what was noted stays above the closing table."""
        super().on_finish(result)
        self.close()
        for line in self._log:
            self._console.print(line)

    def close(self) -> None:
        """Give the terminal back."""
        self._live.stop()

    def _note(self, step: int, text: str, style: str) -> None:
        self._log.append(self._text.assemble((f"{step:>6}  ", "dim"), (text, style)))
        self._draw()

    def _draw(self) -> None:
        self._drawn = time.perf_counter()
        self._live.update(
            self._panel(self._group(*self._body()), title=self._title(), title_align="left"), refresh=True
        )

    def _title(self) -> str:
        assert self.context is not None
        return f"tolaria train {self.context.task.name}"

    def _body(self) -> Iterable[Any]:
        context, record = self.context, self._record
        if context is None or record is None:
            return
        grid = self._table.grid(padding=(0, 2))
        grid.add_column(style="dim")
        grid.add_column()
        elapsed = time.perf_counter() - self._began
        left = elapsed / (record.step - context.first_step) * (context.total_steps - record.step)
        grid.add_row("step", f"{record.step} / {context.total_steps}   {elapsed:.0f} s, {left:.0f} s to go")
        grid.add_row("", self._bar(total=context.total_steps, completed=record.step, width=56))
        grid.add_row("stage", f"{record.phase}   slot {context.slot}: {record.stage.name}")
        alpha = float(record.alpha)
        grid.add_row(
            "alpha",
            self._text.assemble(
                ("█" * round(28 * alpha), "cyan"), ("·" * (28 - round(28 * alpha)), "dim"), f" {alpha:.2f}"
            ),
        )
        grid.add_row("loss", f"{sparkline(self._losses)} {self._losses[-1]:.4g}" if self._losses else "")
        if self._validation is not None:
            grid.add_row(
                "validation", f"{_metrics(self._validation.metrics, context)} (step {self._validation.step})"
            )
        governed = "[yellow]off[/]" if context.governor is None else (
            f"{count(self.captures, 'capture')}, known good: step {self.last_good}, "
            f"{count(self.anomalies, 'anomaly', 'anomalies')}, {count(self.rollbacks, 'rollback')}"
        )  # fmt: skip
        grid.add_row("governor", governed)
        yield grid
        if self._log:
            yield self._text("")
            yield from self._log


def sparkline(values: Sequence[float] | deque[float]) -> str:
    """Positive values as blocks, on a log scale; what is not finite is a cross."""
    finite = [math.log(v) for v in values if math.isfinite(v) and v > 0]
    if not finite:
        return _CROSS * len(values)
    low, span = min(finite), max(finite) - min(finite) or 1.0
    return "".join(
        _BLOCKS[round((math.log(v) - low) / span * (len(_BLOCKS) - 1))]
        if math.isfinite(v) and v > 0
        else _CROSS
        for v in values
    )


def _metrics(metrics: Any, context: StoryContext) -> str:  # noqa: ANN401  (Metrics or None)
    if metrics is None:
        return "not measured"
    text = f"loss {metrics.val_loss:.4f}, accuracy {metrics.val_accuracy:.2f}%"
    return text + (f", perplexity {metrics.perplexity:.2f}" if metrics.perplexity is not None else "")


def _when(result: GrowthResult) -> str:
    """That the host's figures are an earlier step of the same run, not a control that took all the steps."""
    if result.host_test is None:
        return ""
    return f" (at step {result.phases[0].end_step} of this run; no control)"


def choose_display(*, quiet: bool, stream: TextIO | None = None) -> QuietDisplay:
    """Live on a terminal, plain lines elsewhere, silent if ``quiet``."""
    target = stream if stream is not None else sys.stdout
    if quiet:
        return QuietDisplay(target)
    if not target.isatty():
        return PlainDisplay(target)
    return RichDisplay(target)


def print_table(rows: Sequence[tuple[str, str]], stream: TextIO | None = None) -> None:
    """The closing table: two columns, readable in a log, too."""
    target = stream if stream is not None else sys.stdout
    width = max((len(name) for name, _ in rows), default=0)
    print(file=target)
    for name, text in rows:
        print(f"  {name:<{width}}  {text}", file=target)
