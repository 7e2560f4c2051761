"""Odd schedules: what the rates would be had nobody lowered them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from lowered_runs import FACTOR, Run
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from tolaria.governor import GovernorConfig, TolariaGovernor


def test_the_plateau_schedule_keeps_what_it_lowered_itself() -> None:
    def make(optimizer: Optimizer) -> LRScheduler:
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.7, patience=1, min_lr=0.05)

    run, alone = Run(make), Run(make)
    governor = run.govern(12, snapshot_interval=1000, schedules="keep")
    governor.step(math.nan)
    for _ in range(12):
        for each in (run, alone):
            each.schedule.step(1.0)  # type: ignore[union-attr,arg-type]
        governor.step(1.0)
    assert run.settings()[0] == alone.settings()[0]
    assert run.rates() == [pytest.approx(0.3 * 0.7**5), 0.05]


def test_a_schedule_that_is_told_the_epoch_is_followed() -> None:
    def make(optimizer: Optimizer) -> LRScheduler:
        return lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=2, T_mult=2, eta_min=0.01)

    run, alone = Run(make), Run(make)
    governor = run.govern(12, schedules="keep")
    for step in range(1, 40):
        for each in (run, alone):
            each.schedule.step(step / 7)  # type: ignore[union-attr,arg-type]
        governor.step(math.nan if step == 9 else 1.0)
    assert run.rates() == alone.rates()


class Warmup(LRScheduler):
    """As packages write them: another schedule inside, and a list that is no rate."""

    def __init__(self, optimizer: Optimizer, after: LRScheduler) -> None:
        self.after, self.log = after, [0.0]
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        if self.last_epoch < 5:
            return [base * (self.last_epoch + 1) / 5 for base in self.base_lrs]
        self.after.step()
        return self.after.get_last_lr()


def test_a_schedule_inside_another_is_stepped_by_nobody_else() -> None:
    def make(optimizer: Optimizer) -> LRScheduler:
        return Warmup(optimizer, lr_scheduler.CosineAnnealingLR(optimizer, 60, eta_min=0.01))

    run, alone = Run(make), Run(make)
    governor = run.govern(12, schedules="keep")
    for step in range(1, 40):
        for each in (run, alone):
            each.train()
            each.schedule.step()  # type: ignore[union-attr]
        governor.step(math.nan if step == 9 else 1.0)
    assert run.schedule.after.last_epoch == alone.schedule.after.last_epoch  # type: ignore[union-attr]
    assert run.rates() == alone.rates()


class Told(LRScheduler):
    """Cannot be stepped by anybody else: it wants to be told something."""

    def step(self, told: object = None, *more: object) -> None:  # type: ignore[override]
        if self.__dict__.get("last_epoch", -1) >= 0 and told is None:
            raise RuntimeError("told nothing")
        super().step()

    def get_lr(self) -> list[Any]:
        return [group["lr"] * 0.99 for group in self.optimizer.param_groups]


def test_a_schedule_that_cannot_be_run_on_a_copy_is_followed_by_what_it_does() -> None:
    run, alone = Run(Told), Run(Told)
    governor = run.govern(12, schedules="keep")
    for step in range(1, 40):
        for each in (run, alone):
            each.train()
            each.schedule.step("this")  # type: ignore[union-attr,arg-type]
        governor.step(math.nan if step == 9 else 1.0)
    assert run.rates() == pytest.approx(alone.rates(), rel=1e-12)


class Wrapper:
    """As accelerate hands schedules out."""

    def __init__(self, scheduler: LRScheduler) -> None:
        self.scheduler = scheduler

    def step(self) -> None:
        self.scheduler.step()

    def state_dict(self) -> Any:
        return self.scheduler.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.scheduler.load_state_dict(state)


@pytest.mark.parametrize("kind", ["wrapped", "inner-first", "outer-first"])
def test_a_schedule_that_is_reached_in_two_ways_is_lowered_and_stepped_once(kind: str) -> None:
    def make(optimizer: Optimizer) -> LRScheduler:
        first = lr_scheduler.LambdaLR(optimizer, lambda n: 0.97**n)
        if kind == "wrapped":
            return first
        second = lr_scheduler.CosineAnnealingLR(optimizer, 50, eta_min=0.007)
        return lr_scheduler.SequentialLR(optimizer, [first, second], milestones=[25])

    run, alone = Run(make), Run(make)
    assert run.schedule is not None
    assert alone.schedule is not None
    handed: list[Any] = [Wrapper(run.schedule)] if kind == "wrapped" else [run.schedule]
    if kind != "wrapped":
        handed += run.schedule._schedulers  # type: ignore[attr-defined]
    governor = TolariaGovernor(
        run.model,
        run.optimizer,
        config=GovernorConfig(lr_factor=FACTOR, lr_recovery_steps=12),
        schedulers=handed[::-1] if kind == "inner-first" else handed,
        schedules="keep",
    )
    for step in range(1, 40):
        for each in (run, alone):
            each.train()
            each.schedule.step()  # type: ignore[union-attr]
        governor.step(math.nan if step == 9 else 1.0)
        if 9 <= step < 21:
            assert run.rates() == pytest.approx([rate * FACTOR for rate in alone.rates()])
    assert repr(run.settings()) == repr(alone.settings())


@pytest.mark.parametrize("steps", [0, 50])
def test_with_schedules_kept_all_rates_of_a_group_compound(steps: int) -> None:
    run = Run(lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.8, total_steps=100))
    governor = run.govern(steps, schedules="keep", lr_factor=0.5)
    before = [dict(group) for group in run.optimizer.param_groups]
    for _ in range(2):
        governor.step(math.nan)
    for group, was in zip(run.optimizer.param_groups, before, strict=True):
        for key in ("lr", "initial_lr", "max_lr", "min_lr"):
            assert group[key] == was[key] * 0.25, key
