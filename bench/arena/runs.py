"""Which trainings are run, what befalls them, and what becomes of each if nobody steps in.

Half of the seeds are held out: rules are made on the others (``--tuning``) and judged on all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache, partial

import torch

from arena import harms
from arena.branches import branch, can_branch
from arena.harms import Harm, Nobody, Watch, take_step
from arena.learners import (
    Digits,
    Learner,
    PlainDigits,
    Regression,
    RestartedDigits,
    SummedDigits,
    TwoClasses,
)
from arena.more_learners import Policy, Ring, Text

BEGIN = 150
"""The step at which a harm begins; what it befalls has learnt by then."""
AFTER = 200
"""Steps that a run has to recover in."""
PROBE = 25
"""Steps between two scores."""
PROBES = 3
"""The last scores, whose mean is compared."""
TOLERANCE = 5.0
"""Points that a run may be worse than the one that nothing befell, and count as recovered."""


class Fate(Enum):
    """What becomes of a run without a governor; one that nothing befalls may break by itself."""

    HEALTHY = "healthy"
    RECOVERS = "recovers"
    BROKEN = "broken"


@dataclass(frozen=True)
class Problem:
    """A training: how it is made, with which batches and rates, how long it is when nothing befalls it."""

    name: str
    make: Callable[[int, int, float], Learner]
    batches: tuple[int, ...]
    rates: tuple[float, ...]
    steps: int = 1500


PROBLEMS = (
    Problem("digits", Digits, (16, 64), (0.01, 0.02, 0.05)),
    Problem("digits, no BatchNorm", PlainDigits, (16, 64), (0.01, 0.02, 0.05)),
    Problem("digits, summed loss", SummedDigits, (128,), (0.01, 0.05, 0.1)),
    Problem("digits, warm restarts", RestartedDigits, (32,), (0.02, 0.05, 0.1)),
    Problem("two classes", TwoClasses, (8, 64), (3e-4, 1e-3, 3e-3)),
    Problem("two classes, 10% wrong", partial(TwoClasses, noise=0.1), (8, 64), (3e-4, 1e-3, 3e-3)),
    Problem("two classes, 20% wrong", partial(TwoClasses, noise=0.2), (8, 64), (3e-4, 1e-3, 3e-3)),
    Problem("regression", Regression, (16, 128), (1e-3, 3e-3, 1e-2)),
    Problem("policy gradient", Policy, (16, 128), (3e-3, 1e-2, 3e-2)),
    Problem("two networks", Ring, (64,), (3e-4, 1e-3, 2e-3), 1000),
    Problem("text", Text, (8,), (5e-4, 1e-3, 3e-3), 600),
)


def _harms() -> Iterator[tuple[str, Harm]]:
    for size, length in ((3.0, 10), (10.0, 1), (10.0, 10), (30.0, 3), (30.0, 20), (100.0, 1), (1000.0, 2)):
        yield f"rate x {size:g} for {length}", harms.Burst(BEGIN, length, size)
    yield "climbing rate", harms.Climb(BEGIN, 100, 1.06)
    for size in (100.0, 1e4):
        yield f"inputs x {size:g}, one batch", harms.ScaledInputs(BEGIN, 1, size)
    yield "all labels wrong, one batch", harms.WrongLabels(BEGIN, 1, 1.0)
    yield "half of the labels wrong from here on", harms.WrongLabels(BEGIN, 10**9, 0.5)
    for size, length in ((100.0, 1), (1e4, 1), (1e4, 5)):
        yield f"gradients x {size:g} for {length}", harms.LargeGradients(BEGIN, length, size)
    for length in (1, 5, 30):
        yield f"dead last layer within {length}", harms.DeadLastLayer(BEGIN, length)
    yield "growing weights", harms.GrowingWeights(BEGIN, 60, 1.05)
    yield "NaN in the loss", harms.PoisonedLoss(BEGIN, 1)
    yield "NaN in a gradient", harms.PoisonedGradient(BEGIN, 1)
    yield "NaN in a weight", harms.PoisonedWeight(BEGIN, 1)
    yield "infinity in a weight", harms.InfiniteWeight(BEGIN, 1)
    yield "NaN in a moment", harms.PoisonedMoment(BEGIN, 1)
    yield "NaN in a buffer", harms.PoisonedBuffer(BEGIN, 1)


HARMS = dict(_harms())


@dataclass(frozen=True)
class Run:
    """One training of one problem."""

    problem: Problem
    batch: int
    rate: float
    seed: int
    harm: str | None = None

    @property
    def steps(self) -> int:
        """How long it is."""
        return self.problem.steps if self.harm is None else BEGIN + AFTER + self._length()

    def _length(self) -> int:
        length = HARMS[self.harm].length if self.harm is not None else 0
        return length if length < 10**6 else 0

    @property
    def training(self) -> tuple[Problem, int, float, int]:
        """What it has in common with runs that something else befalls."""
        return self.problem, self.batch, self.rate, self.seed

    def learner(self) -> Learner:
        """A new one, at its first step."""
        return self.problem.make(self.seed, self.batch, self.rate)

    def step(self, learner: Learner, step: int, watch: Watch) -> torch.Tensor:
        """Take step ``step``; the loss."""
        return take_step(learner, step, HARMS[self.harm] if self.harm is not None else Harm(), watch)

    def __str__(self) -> str:
        return (
            f"{self.problem.name}, {self.batch} at {self.rate:g}, seed {self.seed}: {self.harm or 'nothing'}"
        )


def runs(seeds: tuple[int, ...], *, harmed: bool, share: float = 1.0) -> list[Run]:
    """All runs of these seeds, or every so many of them, evenly over problems and harms."""
    found = [
        Run(problem, batch, rate, seed, harm)
        for seed in seeds
        for problem in PROBLEMS
        for batch in problem.batches
        for rate in problem.rates
        for harm in (HARMS if harmed else (None,))
    ]
    count = max(1, round(share * len(found)))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(len(found)))
    return [found[i] for i in sorted(order[:count].tolist())]


@dataclass(frozen=True)
class Truth:
    """What became of a run without a governor."""

    fate: Fate
    score: float
    """At its end."""
    undisturbed: float
    """At the same step of the run that nothing befell."""


def truths(training: Sequence[Run]) -> list[Truth]:
    """What becomes of runs of one training without a governor."""
    harmed = [run for run in training if run.harm is not None]
    if not (can_branch() and len(harmed) > 1):
        return [truth(run) for run in training]
    learner = harmed[0].learner()
    for step in range(BEGIN):
        harmed[0].step(learner, step, Nobody())
    _calm(*harmed[0].training)
    tails = [partial(_fate, run, learner, BEGIN) for run in harmed]
    known = dict(zip(harmed, branch(tails), strict=True))
    return [known[run] if run in known else truth(run) for run in training]


def truth(run: Run) -> Truth:
    """Run it without a governor; what nobody harmed is run once for all harms."""
    return _left_alone(run) if run.harm is None else _fate(run, run.learner(), 0)


def _fate(run: Run, learner: Learner, first: int) -> Truth:
    """From its step ``first`` on."""
    probes = _probes(run.steps)
    found, calm = _scores(run, probes, learner, first), _calm(*run.training)
    # Of several probes, since a single score of a run that swings may be good or bad by chance.
    lag = sum(calm[step] - found[step] for step in probes) / len(probes)
    fate = Fate.RECOVERS if lag <= TOLERANCE else Fate.BROKEN
    return Truth(fate, found[run.steps], calm[run.steps])


def _left_alone(run: Run) -> Truth:
    """Some trainings break by themselves: they end far below what they had reached."""
    scores = _scores(run, tuple(range(PROBE, run.steps + 1, PROBE)))
    last = [scores[step] for step in _probes(run.steps)]
    held = [  # over several probes, since one may be good by chance
        min(scores[step - PROBE * i] for i in range(PROBES)) for step in scores if step >= PROBE * PROBES
    ]
    reached = max(held)
    fate = Fate.HEALTHY if reached - sum(last) / len(last) <= TOLERANCE else Fate.BROKEN
    return Truth(fate, scores[run.steps], reached)


def _probes(steps: int) -> tuple[int, ...]:
    return tuple(steps - PROBE * i for i in range(PROBES))


@cache
def _calm(problem: Problem, batch: int, rate: float, seed: int) -> dict[int, float]:
    """Scores of the run that nothing befalls, wherever a harmed one is probed."""
    harmed = (Run(problem, batch, rate, seed, harm) for harm in HARMS)
    probes = {step for run in harmed for step in _probes(run.steps)}
    return _scores(Run(problem, batch, rate, seed), tuple(sorted(probes)))


def _scores(
    run: Run, after: tuple[int, ...], learner: Learner | None = None, first: int = 0
) -> dict[int, float]:
    """The scores after so many steps, of a learner that has taken ``first`` of them."""
    learner, found = run.learner() if learner is None else learner, {}
    for step in range(first, max(after)):
        run.step(learner, step, Nobody())
        if step + 1 in after:
            found[step + 1] = learner.score()
    return found
