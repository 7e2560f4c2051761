"""One run per fault, beside an undisturbed one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from tolaria.chaos.faults import ChaosFault, chosen_faults
from tolaria.chaos.run import Outcome, checked_start, execute, latest_start
from tolaria.chaos.target import ChaosRun

_HEADER = ("fault", "at", "caught", "after", "lost", "restore", "score", "undisturbed")


@dataclass(frozen=True, slots=True)
class ChaosTable:
    """The undisturbed run and one outcome per fault."""

    undisturbed: Outcome
    outcomes: list[Outcome]

    @property
    def is_as_promised(self) -> bool:
        """Whether every fault ended as the governor promises."""
        return all(outcome.is_as_promised for outcome in self.outcomes)

    def summary(self) -> str:
        """How many faults were rolled back, sat through or missed, in words."""
        missed = [o.fault for o in self.outcomes if o.reason is None]
        tolerated = sum(o.reason is not None and not o.is_caught for o in self.outcomes)
        broken = [o.fault for o in self.outcomes if not o.is_as_promised]
        said = f"{sum(o.is_caught for o in self.outcomes)} of {len(self.outcomes)} faults rolled back"
        said += f", {tolerated} sat through" if tolerated else ""
        said += f", missed: {', '.join(missed)}" if missed else ""
        return said + (f"; NOT AS PROMISED: {', '.join(broken)}" if broken else "")

    def lines(self) -> Iterator[str]:
        """The table as text."""
        yield header_line()
        for outcome in self.outcomes:
            yield outcome_line(outcome, self.undisturbed.score)

    def as_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {"undisturbed": asdict(self.undisturbed), "outcomes": [asdict(o) for o in self.outcomes]}

    def __str__(self) -> str:
        return "\n".join(self.lines())


def run_table(
    make_run: Callable[[], ChaosRun],
    *,
    faults: Sequence[ChaosFault] | None = None,
    steps: int = 300,
    start: int | None = None,
    rng_seed: int = 0,
    on_outcome: Callable[[Outcome], object] | None = None,
) -> ChaosTable:
    """Break a model in every way there is, each in a run of its own.

    Args:
        make_run: builds a fresh run, the same every time.
        faults: what goes wrong; all of :func:`chosen_faults` if None.
        steps: optimizer steps of every run.
        start: when faults begin; None draws a step for each, from the middle half of the run where it fits.
        rng_seed: seeds these steps.
        on_outcome: called with each outcome as it comes, the undisturbed run's first.

    Returns:
        The table.

    Raises:
        ValueError: a fault does not fit into ``steps``; nothing has been run then.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: expected an integer >= 1, got {steps!r}")
    rng = random.Random(rng_seed)
    listed = list(faults) if faults is not None else chosen_faults()
    run = make_run()
    interval = run.config.snapshot_interval
    starts = [_draw(rng, fault, steps, interval) if start is None else start for fault in listed]
    for fault, first in zip(listed, starts, strict=True):
        checked_start(fault, steps, interval, first)
    outcomes = [execute(run, steps=steps)]
    if on_outcome is not None:
        on_outcome(outcomes[0])
    for fault, first in zip(listed, starts, strict=True):
        outcomes.append(execute(make_run(), fault, steps=steps, start=first))
        if on_outcome is not None:
            on_outcome(outcomes[-1])
    return ChaosTable(outcomes[0], outcomes[1:])


def _draw(rng: random.Random, fault: ChaosFault, steps: int, interval: int) -> int:
    """A start in the middle half of the run, or as late as the fault's length allows."""
    drawn, last = (
        rng.randint(max(1, steps // 2), max(1, 3 * steps // 4)),
        latest_start(fault, steps, interval),
    )
    return drawn if drawn <= last else rng.randint(max(1, last // 2), last)


def header_line() -> str:
    """The head of the table."""
    return _row(_HEADER)


def outcome_line(outcome: Outcome, undisturbed: float) -> str:
    """One row of the table."""
    restored = {None: "-", True: "bit-exact", False: "DIFFERS"}[outcome.bit_exact]
    return _row((
        outcome.fault,
        str(outcome.start),
        (outcome.reason or "NO (blind spot)").replace("_", " ").lower(),
        "-" if outcome.detected_after is None else str(outcome.detected_after),
        str(outcome.steps_lost),
        restored if outcome.is_finite else f"{restored}, NOT FINITE",
        f"{outcome.score:.2f}",
        f"{undisturbed:.2f}",
    ))  # fmt: skip


def _row(cells: Sequence[str]) -> str:
    widths = (22, 5, 28, 6, 5, 10, 7, 11)
    aligned = [
        f"{c:<{w}}" if i in (0, 2, 5) else f"{c:>{w}}"
        for i, (c, w) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(aligned).rstrip()
