"""What a contestant did in a run, and what that is worth."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from arena.branches import branch, can_branch
from arena.contestants import CONTESTANTS, Contestant
from arena.learners import Learner
from arena.runs import BEGIN, Fate, Run, Truth


@dataclass(frozen=True)
class Result:
    """One contestant in one run."""

    contestant: str
    run: Run
    truth: Truth
    alarms: tuple[int, ...]
    score: float
    seconds: float

    def plain(self) -> dict[str, object]:
        """As JSON has it."""
        return {
            "contestant": self.contestant,
            "run": str(self.run),
            "fate": self.truth.fate.value,
            "undisturbed": round(self.truth.undisturbed, 2),
            "alone": round(self.truth.score, 2),
            "score": round(self.score, 2),
            "alarms": list(self.alarms),
            "milliseconds": round(1e3 * self.seconds / self.run.steps, 3),
        }

    @property
    def late(self) -> list[int]:
        """Alarms from the harm on; all of them where there was none."""
        return [step for step in self.alarms if self.run.harm is None or step >= BEGIN]

    @property
    def false_alarms(self) -> int:
        """Alarms in a healthy run. Before anything befell one that is harmed they are those of the former."""
        return len(self.alarms) if self.truth.fate is Fate.HEALTHY else 0

    @property
    def healthy_steps(self) -> int:
        """Steps at which an alarm is a false one."""
        return self.run.steps if self.truth.fate is Fate.HEALTHY else 0


def watched_training(name: str, training: Sequence[Run], truths: Sequence[Truth]) -> list[Result]:
    """Let a contestant watch runs of one training."""
    harmed = {run: truth for run, truth in zip(training, truths, strict=True) if run.harm is not None}
    if not (can_branch() and len(harmed) > 1):
        return [watched(name, run, truth) for run, truth in zip(training, truths, strict=True)]
    first = next(iter(harmed))
    learner = first.learner()
    contestant = CONTESTANTS[name](learner, True)
    seconds = _watch(contestant, first, learner, range(BEGIN))
    tails = [partial(_rest, name, run, fate, learner, contestant, seconds) for run, fate in harmed.items()]
    results = branch(tails)
    contestant.clean_up()
    alone = ((run, truth) for run, truth in zip(training, truths, strict=True) if run.harm is None)
    return results + [watched(name, run, truth) for run, truth in alone]


def watched(name: str, run: Run, truth: Truth) -> Result:
    """Let a contestant watch a run; of a healthy one it tells alone, so that its alarms can be counted."""
    learner = run.learner()
    contestant = CONTESTANTS[name](learner, truth.fate is not Fate.HEALTHY)
    seconds = _watch(contestant, run, learner, range(run.steps))
    contestant.close()
    contestant.clean_up()
    return Result(name, run, truth, tuple(contestant.alarms), learner.score(), seconds)


def _rest(
    name: str, run: Run, truth: Truth, learner: Learner, contestant: Contestant, seconds: float
) -> Result:
    """From where the harm begins; in a child process, so nothing is cleaned up."""
    seconds += _watch(contestant, run, learner, range(BEGIN, run.steps))
    contestant.close()
    return Result(name, run, truth, tuple(contestant.alarms), learner.score(), seconds)


def _watch(contestant: Contestant, run: Run, learner: Learner, steps: range) -> float:
    """Seconds that these steps took."""
    began = time.perf_counter()
    for step in steps:
        if contestant.gave_up:
            break
        run.step(learner, step, contestant)
    return time.perf_counter() - began


@dataclass(frozen=True)
class Row:
    """One contestant over all runs."""

    contestant: str
    broken: int
    caught: int
    median_steps: float
    recovering: int
    wrongly: int
    healthy_steps: int
    false_alarms: int
    points_lost: float
    within_a_point: int
    points_lost_of_broken: float

    @property
    def per_ten_thousand(self) -> float:
        """False alarms in 10,000 healthy steps."""
        return 1e4 * self.false_alarms / max(1, self.healthy_steps)


def row(name: str, results: Iterable[Result]) -> Row:
    """Sum up one contestant."""
    own = [r for r in results if r.contestant == name]
    broken: Sequence[Result] = [r for r in own if r.truth.fate is Fate.BROKEN]
    caught = [r for r in broken if r.late]
    recovering = [r for r in own if r.truth.fate is Fate.RECOVERS]
    lost = [r.truth.undisturbed - r.score for r in caught]
    waited = [r.late[0] - BEGIN for r in caught if r.run.harm is not None]
    return Row(
        contestant=name,
        broken=len(broken),
        caught=len(caught),
        median_steps=statistics.median(waited) if waited else float("nan"),
        recovering=len(recovering),
        wrongly=sum(bool(r.late) for r in recovering),
        healthy_steps=sum(r.healthy_steps for r in own),
        false_alarms=sum(r.false_alarms for r in own),
        points_lost=statistics.fmean(lost) if lost else float("nan"),
        within_a_point=sum(points <= 1.0 for points in lost),
        points_lost_of_broken=statistics.fmean(r.truth.undisturbed - r.score for r in broken)
        if broken
        else float("nan"),
    )


def table(rows: Sequence[Row], fates: Mapping[Fate, int]) -> str:
    """The rows as Markdown."""
    counts = ", ".join(f"{count} {fate.value}" for fate, count in fates.items())
    lines = [
        f"{sum(fates.values())} runs: {counts}.",
        "",
        "| | broken runs caught | steps until then | rolled back, would have recovered | "
        "false alarms in 10,000 steps | caught and within a point | "
        "points lost, caught | points lost, all broken |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        caught = f"{r.caught} of {r.broken} ({_percent(r.caught, r.broken)})"
        wrongly = f"{r.wrongly} of {r.recovering} ({_percent(r.wrongly, r.recovering)})"
        lines.append(
            f"| {r.contestant} | {caught} | {r.median_steps:.0f} | {wrongly} | {r.per_ten_thousand:.2f} | "
            f"{r.within_a_point} of {r.caught} | {r.points_lost:.1f} | {r.points_lost_of_broken:.1f} |"
        )
    return "\n".join(lines)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f}%" if whole else "none"
