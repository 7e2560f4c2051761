"""Schedules that nobody handed over: the rate is right in the end, or a warning names the schedule."""

from __future__ import annotations

import functools
import gc
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import lr_scheduler as lrs

from tolaria.errors import UncoveredWarning
from tolaria.governor import GovernorBank, GovernorConfig, TolariaGovernor

STEPS = 60


def _warmup(step: int, *, steps: int) -> float:
    """As transformers make theirs: a partial of a function."""
    return min(1.0, (step + 1) / steps)


class _Plateau(lrs.ReduceLROnPlateau):
    """Stepped like the others, with a metric that gets no better."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer, patience=7, factor=0.5)

    def step(self, metrics: Any = 1.0, epoch: Any = None) -> None:
        super().step(1.0)


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "step": lambda o: lrs.StepLR(o, 9, gamma=0.5),
    "multi-step": lambda o: lrs.MultiStepLR(o, [7, 22, 31, 44]),
    "exponential": lambda o: lrs.ExponentialLR(o, 0.95),
    "cosine": lambda o: lrs.CosineAnnealingLR(o, STEPS),
    "restarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 11),
    "one-cycle": lambda o: lrs.OneCycleLR(o, 0.5, total_steps=STEPS + 1),
    "cyclic": lambda o: lrs.CyclicLR(o, 0.01, 0.2, step_size_up=8, cycle_momentum=False),
    "lambda": lambda o: lrs.LambdaLR(o, lambda step: 0.97**step),
    "partial": lambda o: lrs.LambdaLR(o, functools.partial(_warmup, steps=50)),
    "multiplicative": lambda o: lrs.MultiplicativeLR(o, lambda step: 0.97),
    "plateau": _Plateau,
    "sequential": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, total_iters=20), lrs.CosineAnnealingLR(o, 40)], milestones=[20]
    ),
    "chained": lambda o: lrs.ChainedScheduler([lrs.ExponentialLR(o, 0.97), lrs.StepLR(o, 15)]),
}


class Run:
    """Steps with losses, bad ones among them; the schedule moves on at every step that is not undone."""

    def __init__(self, make: Callable[[Any], Optimizer] = lambda p: SGD(p, lr=0.1, momentum=0.9)) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1)
        self.optimizer = make(self.model.parameters())

    def attach(self, **kw: Any) -> TolariaGovernor:
        config = GovernorConfig(snapshot_interval=10, probation=1, **kw.pop("settings", {}))
        self.governor = TolariaGovernor(self.model, self.optimizer, config=config, **kw)
        return self.governor

    def train(self, scheduler: Any, steps: int, bad: tuple[int, ...] = ()) -> None:
        for step in range(steps):
            self.optimizer.zero_grad()
            loss = self.model(torch.ones(2, 3)).square().mean()
            loss.backward()
            self.optimizer.step()
            scheduler.step()
            self.governor.step(math.nan if step in bad else 1.0)

    @property
    def rates(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]


def is_consistent(run: Run, scheduler: Any, make: Callable[[Optimizer], Any]) -> bool:
    """Whether the rate is the one that the schedule has, alone, after as many steps as it believes."""
    taken = scheduler._schedulers[-1] if isinstance(scheduler, lrs.ChainedScheduler) else scheduler
    alone = Run()
    twin = make(alone.optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while (
            twin._schedulers[-1]
            if twin is not taken and hasattr(twin, "_schedulers") and isinstance(twin, lrs.ChainedScheduler)
            else twin
        ).last_epoch < taken.last_epoch:
            twin.step()
    return run.rates == pytest.approx(alone.rates, rel=1e-9)


@pytest.mark.parametrize("when", ["before", "after", "late"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rate_is_right_in_the_end(name: str, when: str) -> None:
    run, make = Run(), SCHEDULES[name]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UncoveredWarning)
        scheduler = make(run.optimizer) if when == "before" else None
        run.attach()
        if when == "late":
            run.governor.step(1.0)
            for _ in range(12):
                run.governor.step(1.0)
        scheduler = scheduler or make(run.optimizer)
        run.train(scheduler, STEPS - 20, bad=(5, 18, 33))
    assert run.governor.rollback_count == 3
    assert [w for w in told if issubclass(w.category, UncoveredWarning)] == []
    assert is_consistent(run, scheduler, make)


@pytest.mark.parametrize("name", ["step", "cosine", "lambda", "plateau", "sequential"])
def test_a_covered_schedule_goes_back_with_its_capture(name: str) -> None:
    run = Run()
    scheduler = SCHEDULES[name](run.optimizer)
    run.attach()
    run.train(scheduler, 25)
    run.governor.snapshot()
    run.governor.step(1.0)
    rates, taken = run.rates, scheduler.last_epoch
    run.train(scheduler, 8, bad=(7,))
    if name != "plateau":
        assert (run.rates, scheduler.last_epoch) == (rates, taken)
    assert is_consistent(run, scheduler, SCHEDULES[name])


def test_the_lowered_rate_counts_once_whether_a_schedule_went_back_or_not() -> None:
    for late in (False, True):
        run = Run()
        scheduler = None if late else lrs.ConstantLR(run.optimizer, 1.0)
        run.attach(settings={"lr_factor": 0.5})
        scheduler = scheduler or lrs.ConstantLR(run.optimizer, 1.0)
        run.train(scheduler, 9, bad=(2, 4, 8))
        assert run.rates == pytest.approx([0.1 / 8])
        run.train(scheduler, 20)
        run.train(scheduler, 2, bad=(1,))
        assert run.rates == pytest.approx([0.1 / 16])


class CosineScheduler:
    """Not torch's: as timm's, it holds the optimizer and writes its rate."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.count = optimizer, 0
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]

    def step(self) -> None:
        self.count += 1
        self.optimizer.param_groups[0]["lr"] *= 0.9

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Untellable(lrs.StepLR):
    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError("no state to tell")


@pytest.mark.parametrize("kind", [CosineScheduler, lambda o: Untellable(o, 5)])
def test_what_cannot_be_covered_for_sure_is_named_once(kind: Callable[[Optimizer], Any]) -> None:
    run = Run()
    scheduler = kind(run.optimizer)
    with pytest.warns(UncoveredWarning, match=type(scheduler).__name__):
        run.attach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.train(scheduler, 40, bad=(5, 15))
    assert run.governor._engine.covered.schedulers == []


class Wrapped:
    """As Accelerate's: a schedule around a schedule."""

    def __init__(self, scheduler: Any, optimizer: Optimizer) -> None:
        self.scheduler, self.optimizers = scheduler, [optimizer]

    def step(self) -> None:
        self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state)


@pytest.mark.filterwarnings("error")
def test_schedules_handed_over_are_covered_once() -> None:
    run = Run()
    outer = lrs.SequentialLR(
        run.optimizer, [lrs.ConstantLR(run.optimizer), lrs.StepLR(run.optimizer, 3)], milestones=[4]
    )
    wrapped = Wrapped(outer, run.optimizer)
    run.attach(schedulers=[wrapped])
    run.train(wrapped, 30, bad=(12,))
    assert run.governor._engine.covered.schedulers == [wrapped]


@pytest.mark.filterwarnings("error")
def test_nobody_elses_schedule_is_touched() -> None:
    run, other = Run(), Run()
    theirs = lrs.StepLR(other.optimizer, 3)
    theirs.owner = run.model  # type: ignore[attr-defined]
    run.attach()
    for step in range(25):
        run.optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)  # by hand, as many loops do
        run.governor.step(1.0)
    run.governor.step(math.nan)
    assert run.governor._engine.covered.schedulers == []


@pytest.mark.filterwarnings("error")
def test_a_schedule_that_is_gone_is_not_missed() -> None:
    run = Run()
    gone = weakref.ref(lrs.StepLR(run.optimizer, 3))
    gc.collect()
    assert gone() is None
    run.attach()
    run.train(lrs.StepLR(run.optimizer, 5), 25, bad=(20,))
    assert len(run.governor._engine.covered.schedulers) == 1


def test_rows_of_a_bank_find_theirs() -> None:
    bank = GovernorBank(2, config=GovernorConfig(snapshot_interval=10, probation=1))
    runs = [Run(), Run()]
    schedulers = [lrs.ExponentialLR(run.optimizer, 0.9) for run in runs]
    for i, run in enumerate(runs):
        bank.attach(i, run.model, run.optimizer)
    for step in range(25):
        for run, scheduler in zip(runs, schedulers, strict=True):
            run.optimizer.step()
            scheduler.step()
        bank.step(torch.tensor([1.0, math.nan if step == 18 else 1.0]))
    assert [s.last_epoch for s in schedulers] == [25, 25 - (19 - 10)]
    assert runs[0].rates == pytest.approx([0.1 * 0.9**25])
    assert runs[1].rates == pytest.approx([0.1 * 0.9**16])


@pytest.mark.parametrize("make", [lambda p: AdamW(p, lr=torch.tensor(0.1)), lambda p: AdamW(p, lr=0.1)])
def test_a_rate_that_is_a_tensor_stays_with_its_late_schedule(make: Callable[[Any], Optimizer]) -> None:
    run = Run(make)
    run.attach()
    scheduler = lrs.ExponentialLR(run.optimizer, 0.9)
    run.train(scheduler, 6, bad=(5,))
    assert run.rates == pytest.approx([0.1 * 0.9**6])


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    yield
    gc.collect()


class SlotScheduler:
    """Holds the optimizer in a slot: it has no attributes that ``vars`` would show."""

    __slots__ = ("count", "optimizer")

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.count = optimizer, 0

    def step(self) -> None:
        self.count += 1
        if self.count == 3:
            self.optimizer.param_groups[0]["lr"] *= 0.1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def test_a_schedule_without_a_dict_is_named() -> None:
    run = Run()
    scheduler = SlotScheduler(run.optimizer)
    run.attach()
    with pytest.warns(UncoveredWarning, match="SlotScheduler"):
        run.train(scheduler, 12)


def test_a_schedule_that_gc_freeze_hides_is_told_of() -> None:
    run = Run()
    scheduler = lrs.MultiStepLR(run.optimizer, [12])
    gc.freeze()
    try:
        with pytest.warns(UncoveredWarning, match="cannot be found after gc.freeze"):
            run.attach()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run.train(scheduler, 40, bad=(14,))
            run.governor.add_scheduler(scheduler)
            run.train(scheduler, 20, bad=(14,))
    finally:
        gc.unfreeze()


class Milestones:
    """Nothing tells that this is a schedule: it counts steps and lowers the rate at some of them."""

    def __init__(self, optimizer: Optimizer, *at: int) -> None:
        self.held, self.at, self.count = optimizer, at, 0

    def step(self) -> None:
        self.count += 1
        if self.count in self.at:
            self.held.param_groups[0]["lr"] *= 0.1


def test_a_rate_that_a_rollback_took_back_for_good_is_told_of_once() -> None:
    run = Run()
    run.attach()
    scheduler = Milestones(run.optimizer, 3, 13, 43)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.train(scheduler, 14)
    with pytest.warns(UncoveredWarning, match=r"SGD\) back from 0\.001 to 0\.01, .*schedulers="):
        run.train(scheduler, 20, bad=(1,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.train(scheduler, 30, bad=(11,))


class Formula:
    """The rate of every step, as loops set it that have no schedule."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.held, self.count = optimizer, 0

    def step(self) -> None:
        self.count += 1
        self.held.param_groups[0]["lr"] = 0.1 / self.count


@pytest.mark.parametrize(
    "make", [Formula, lambda o: Milestones(o, 3)], ids=["each step", "before the capture"]
)
@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.filterwarnings("error")
def test_a_rate_set_by_hand_that_is_not_lost_is_not_spoken_of(
    make: Callable[[Optimizer], Any], factor: float
) -> None:
    run = Run()
    run.attach(settings={"lr_factor": factor})
    run.train(make(run.optimizer), 80, bad=(14, 15, 33, 57))
