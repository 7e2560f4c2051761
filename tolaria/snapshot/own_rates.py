"""What learning rates would be had nobody lowered them: the schedules themselves say it, run on a copy."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tolaria.snapshot.rates import OF_SCHEDULES, Key, Rate, copied, inner_schedules, rates_of, with_inner

_MOST_STEPS = 1000
"""So many steps of a schedule are made up for one by one; a longer way is a jump."""


class OwnRates:
    """What rates that are lowered for a time would be had nobody lowered them.

    The schedules say it themselves: a copy of each is stepped when the live one was, over copies of the
    groups that hold its own rates. Nothing is multiplied and divided again, and what a schedule adds to a
    rate (``eta_min``), or how often it looked at the last one, makes no difference. A rate that changes
    though no schedule of torch has stepped was set by somebody else: it stays as it was set.

    Args:
        optimizers, schedulers: those that are covered.
        values: own rates; one that is not listed is its own.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], schedulers: Sequence[object], values: Mapping[Key, Any]
    ) -> None:
        self._begin(optimizers, schedulers, values)

    def _begin(
        self, optimizers: Sequence[Optimizer], schedulers: Sequence[object], values: Mapping[Key, Any]
    ) -> None:
        self._groups: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        """By the live group's id: itself, which keeps the id its own, and its copy."""
        self._schedules: dict[int, tuple[Any, Any]] = {}
        """By the live schedule's id: itself and its copy."""
        self._stepped: list[tuple[LRScheduler, LRScheduler]] = []
        """The outermost of torch; an inner one is stepped by the outer."""
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                self._copy_group(group)
        self._unexplained: set[int] = set()
        """Ids of groups with a schedule that cannot be run on a copy."""
        there = with_inner(schedulers)
        inside = {id(inner) for s in there if isinstance(s, LRScheduler) for inner in inner_schedules(s)}
        for schedule in there:
            if isinstance(schedule, LRScheduler) and id(schedule) not in inside:
                self._copy_outermost(schedule)
        for schedule in there:
            if id(schedule) not in self._schedules:
                lists = {name: copied(getattr(schedule, name, None)) for name in OF_SCHEDULES}
                self._schedules[id(schedule)] = schedule, _Plain(lists)
        for rate in rates_of(optimizers, schedulers):
            if rate.key in values:
                self._copy_of(rate).set(copied(values[rate.key]))
        self.settled()

    def settled(self) -> None:
        """The live rates are what they should be: whoever changes them from here on is somebody else."""
        self._marks = {key: _mark(live.get("lr")) for key, (live, _) in self._groups.items()}

    def _copy_group(self, group: dict[str, Any]) -> dict[str, Any]:
        if id(group) not in self._groups:
            mine = {key: [] if key == "params" else _copied_setting(value) for key, value in group.items()}
            self._groups[id(group)] = group, mine
        return self._groups[id(group)][1]

    def _copy_outermost(self, schedule: LRScheduler) -> None:
        before = dict(self._schedules)
        try:
            self._stepped.append((schedule, self._copy_schedule(schedule)))
        except Exception:  # whatever a schedule of somebody's own is made of, it must not end the run
            self._schedules = before
            self._unexplained |= _driven(schedule)

    def _copy_schedule(self, schedule: LRScheduler) -> LRScheduler:
        if id(schedule) in self._schedules:
            return self._schedules[id(schedule)][1]  # type: ignore[no-any-return]
        mine: LRScheduler = object.__new__(type(schedule))
        self._schedules[id(schedule)] = schedule, mine
        for name, value in vars(schedule).items():
            if isinstance(value, Optimizer):
                new: object = _Groups([self._copy_group(group) for group in value.param_groups])
            elif isinstance(value, LRScheduler):
                new = self._copy_schedule(value)
            elif isinstance(value, list | tuple) and any(isinstance(v, LRScheduler) for v in value):
                new = [self._copy_schedule(v) if isinstance(v, LRScheduler) else v for v in value]
            else:
                new = _copied_setting(value)
            vars(mine)[name] = new
        return mine

    def _copy_of(self, rate: Rate) -> Rate:
        known = self._groups if isinstance(rate.owner, dict) else self._schedules
        return Rate(rate.key, known[id(rate.owner)][1], rate.name)

    def follow(self, optimizers: Sequence[Optimizer], schedulers: Sequence[object]) -> None:
        """Do to the copies what has been done since the last call; waits for nothing."""
        marks = self._marks
        self.settled()
        moved = {key for key, mark in self._marks.items() if mark != marks[key]}
        explained: set[int] = set()
        for live, mine in list(self._stepped):
            driven = _driven(live)
            try:
                if _catch_up(live, mine, is_moved=bool(moved & driven)):
                    explained |= driven
            except Exception:  # it cannot be stepped by another: as above
                self._stepped = [pair for pair in self._stepped if pair[0] is not live]
                self._unexplained |= driven
        for key in moved - explained:
            self._take_over(key, marks[key], self._marks[key])
        self._meet(optimizers, schedulers)

    def _take_over(self, key: int, before: object, now: object) -> None:
        """A rate has moved by itself: it was set, or a schedule has multiplied it that nobody can follow."""
        live, own = self._groups[key]
        is_known = isinstance(before, float) and isinstance(now, float) and before != 0.0
        if key in self._unexplained and is_known:
            own["lr"] = own["lr"] * (now / before)  # type: ignore[operator]
        else:
            own["lr"] = copied(live["lr"])

    def _meet(self, optimizers: Sequence[Optimizer], schedulers: Sequence[object]) -> None:
        """Begin anew if groups or schedules have joined, or were replaced; their rates are their own."""
        there = [*(group for optimizer in optimizers for group in optimizer.param_groups)]
        is_known = all(id(group) in self._groups for group in there)
        if not is_known or any(id(s) not in self._schedules for s in with_inner(schedulers)):
            known = [r for r in rates_of(optimizers, schedulers) if self._knows(r)]
            self._begin(optimizers, schedulers, {r.key: self._copy_of(r).value() for r in known})

    def _knows(self, rate: Rate) -> bool:
        return id(rate.owner) in (self._groups if isinstance(rate.owner, dict) else self._schedules)

    def values(self, optimizers: Sequence[Optimizer], schedulers: Sequence[object]) -> dict[Key, Any]:
        """A copy of the own rates; call :meth:`follow` before."""
        return {rate.key: copied(self._copy_of(rate).value()) for rate in rates_of(optimizers, schedulers)}


class _Plain:
    """Holds lists of rates."""

    def __init__(self, lists: Mapping[str, Any]) -> None:
        vars(self).update(lists)


class _Groups:
    """Stands before a schedule for the optimizer."""

    _opt_called = True

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.param_groups = groups

    def step(self) -> None:
        """Schedules look whether it is wrapped."""

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def _copied_setting(value: Any) -> Any:  # noqa: ANN401
    """A copy of what a schedule writes to; other things as they are."""
    if isinstance(value, Tensor):
        return copied(value) if value.numel() == 1 else value
    if isinstance(value, tuple):
        return value
    if isinstance(value, list):
        return [_copied_setting(each) for each in value]
    return copy.copy(value) if isinstance(value, dict | set | deque) else value


def _driven(schedule: LRScheduler) -> set[int]:
    return {id(group) for group in schedule.optimizer.param_groups}


def _mark(rate: object) -> object:
    """What changes when a rate is set: of a tensor on a device its version, which needs no waiting."""
    if isinstance(rate, Tensor) and not rate.is_cpu:
        return id(rate), -1 if rate.is_inference() else rate._version
    return float(rate) if isinstance(rate, Tensor | int | float) else None


def _count(schedule: Any) -> int:  # noqa: ANN401
    """How often it was stepped; ChainedScheduler does not count, but what is in it."""
    last = getattr(schedule, "last_epoch", None)
    inner = inner_schedules(schedule)
    return int(last) if last is not None else _count(inner[0]) if inner else 0


def _place(schedule: Any) -> dict[str, object]:  # noqa: ANN401
    """Where a schedule is: its counts and settings, but no rates."""
    return {name: value for name, value in vars(schedule).items() if isinstance(value, int | float | str)}


def _catch_up(live: Any, mine: Any, *, is_moved: bool) -> bool:  # noqa: ANN401
    """Step a copy as often as the live schedule was; whether there was anything to do.

    Args:
        live: the schedule.
        mine: its copy.
        is_moved: whether a rate of its groups has changed.
    """
    before = repr(_place(mine))
    if repr(_place(live)) == before and _count(live) == _count(mine):
        return False
    if hasattr(live, "_reduce_lr"):  # ReduceLROnPlateau: what it was told is gone, but not what it did
        if is_moved:
            mine._reduce_lr(live.last_epoch)
    elif 0 < (steps := _count(live) - _count(mine)) <= _MOST_STEPS:
        for _ in range(steps):
            mine.step()
    inner = list(zip(inner_schedules(live), inner_schedules(mine), strict=True))
    for one, its_copy in inner:
        _catch_up(one, its_copy, is_moved=is_moved)
    if repr(_place(live)) != repr(_place(mine)):
        vars(mine).update(_place(live))
        if not inner and not hasattr(live, "_reduce_lr"):
            _jump(mine)
    return True


def _jump(mine: Any) -> None:  # noqa: ANN401
    """The rates of the place where a copy is now, as ``step(epoch)`` finds them."""
    mine._get_lr_called_within_step = True
    closed = getattr(mine, "_get_closed_form_lr", mine.get_lr)
    for group, rate in zip(mine.optimizer.param_groups, closed(), strict=True):
        Rate((0, 0, "lr"), group, "lr").set(rate)
    mine._get_lr_called_within_step = False
    mine._last_lr = [copied(group["lr"]) for group in mine.optimizer.param_groups]
