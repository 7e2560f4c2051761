"""Learning rates that were lowered, for good or for a time, and what they would be without that."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tolaria.snapshot.schedules import KeptRates

_OF_GROUPS = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
_OF_SCHEDULES = ("base_lrs", "_last_lr", "max_lrs", "min_lrs")
_MOST_STEPS = 1000
"""So many steps of a schedule are made up for one by one; a longer way is a jump."""

Change = Callable[[], object]
"""Sets one rate to a value that is known already, so it may be done twice."""
Key = tuple[int, int, Hashable]


@dataclass(frozen=True, slots=True)
class Rate:
    """Where a rate, or a list of rates, stands: in a group, or in what a schedule derives rates from."""

    key: Key
    """Of whom: the optimizer's or schedule's id, which group, and the name."""
    owner: Any
    """The group, or the schedule."""
    name: str

    def value(self) -> Any:  # noqa: ANN401  (a number, a tensor, or a list of these)
        """What stands there."""
        return self.owner[self.name] if isinstance(self.owner, dict) else getattr(self.owner, self.name)

    def set(self, value: Any) -> None:  # noqa: ANN401  (as above)
        """Write ``value``; a tensor in a group stays the same tensor, a list becomes another."""
        if not isinstance(self.owner, dict):
            setattr(self.owner, self.name, value)
        elif isinstance(now := self.owner[self.name], Tensor):
            now.copy_(torch.as_tensor(value))
        else:
            self.owner[self.name] = value


def rates_of(optimizers: Iterable[Optimizer], schedulers: Iterable[object]) -> Iterator[Rate]:
    """Every rate, in groups and in what schedules derive them from, in a fixed order; shared groups once.

    LambdaLR, OneCycleLR and SWALR compute the rate from other rates: ``base_lrs``, and ``max_lr``,
    ``min_lr``, ``swa_lr`` in the groups.
    """
    seen: set[int] = set()
    for optimizer in optimizers:
        for i, group in enumerate(optimizer.param_groups):
            if id(group) not in seen:
                seen.add(id(group))
                for name in _OF_GROUPS:
                    if isinstance(group.get(name), Tensor | int | float):
                        yield Rate((id(optimizer), i, name), group, name)
    for schedule in _with_inner(schedulers):
        for name in _OF_SCHEDULES:
            if isinstance(getattr(schedule, name, None), list):
                yield Rate((id(schedule), 0, name), schedule, name)


def scaled(value: Any, factor: float) -> Any:  # noqa: ANN401  (as in Rate)
    """``value`` times ``factor``, or each of its values."""
    return [rate * factor for rate in value] if isinstance(value, list) else value * factor


def _with_inner(schedulers: Iterable[object]) -> list[object]:
    """The schedules, and those inside them (of SequentialLR, of a wrapper that is not torch's), each once."""
    found: dict[int, object] = {}
    waiting = list(schedulers)[::-1]
    while waiting:
        schedule = waiting.pop()
        if id(schedule) not in found:
            found[id(schedule)] = schedule
            waiting += _inner(schedule)[::-1]
    return list(found.values())


def _inner(schedule: object) -> list[LRScheduler]:
    held = (v if isinstance(v, list | tuple) else (v,) for v in getattr(schedule, "__dict__", {}).values())
    return [inner for values in held for inner in values if isinstance(inner, LRScheduler)]


def _copied(value: Any) -> Any:  # noqa: ANN401  (as in Rate)
    if isinstance(value, list | tuple):
        return [_copied(each) for each in value]
    return value.detach().clone() if isinstance(value, Tensor) else copy.copy(value)


@dataclass(frozen=True, slots=True)
class RatesThen:
    """Rates that are lowered for a time, at some moment."""

    own: Mapping[Key, Any]
    """What they would be had nobody lowered them."""
    live: Mapping[Key, Any]
    """What they are."""
    times: int
    """How often they were lowered."""
    healthy_since: int
    """The step after which all were healthy."""


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
        for schedule in _with_inner(schedulers):
            if isinstance(schedule, LRScheduler) and id(schedule) not in self._schedules:
                self._stepped.append((schedule, self._copy_schedule(schedule)))
            elif not isinstance(schedule, LRScheduler):
                lists = {name: _copied(getattr(schedule, name, None)) for name in _OF_SCHEDULES}
                self._schedules[id(schedule)] = schedule, _Plain(lists)
        for rate in rates_of(optimizers, schedulers):
            if rate.key in values:
                self._copy_of(rate).set(_copied(values[rate.key]))
        self.settled()

    def settled(self) -> None:
        """The live rates are what they should be: whoever changes them from here on is somebody else."""
        self._marks = {key: _mark(live.get("lr")) for key, (live, _) in self._groups.items()}

    def _copy_group(self, group: dict[str, Any]) -> dict[str, Any]:
        if id(group) not in self._groups:
            mine = {key: [] if key == "params" else _copied_setting(value) for key, value in group.items()}
            self._groups[id(group)] = group, mine
        return self._groups[id(group)][1]

    def _copy_schedule(self, schedule: LRScheduler) -> LRScheduler:
        if id(schedule) in self._schedules:
            return self._schedules[id(schedule)][1]  # type: ignore[no-any-return]
        mine: LRScheduler = object.__new__(type(schedule))
        self._schedules[id(schedule)] = schedule, mine
        for name, value in vars(schedule).items():
            if isinstance(value, Optimizer):
                copied: object = _Groups([self._copy_group(group) for group in value.param_groups])
            elif isinstance(value, LRScheduler):
                copied = self._copy_schedule(value)
            elif isinstance(value, list | tuple) and any(isinstance(v, LRScheduler) for v in value):
                copied = [self._copy_schedule(v) if isinstance(v, LRScheduler) else v for v in value]
            else:
                copied = _copied_setting(value)
            vars(mine)[name] = copied
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
        for live, mine in self._stepped:
            driven = {id(group) for group in live.optimizer.param_groups}
            if _catch_up(live, mine, is_moved=bool(moved & driven)):
                explained |= driven
        for key in moved - explained:
            live_group, own_group = self._groups[key]
            own_group["lr"] = _copied(live_group["lr"])
        self._meet(optimizers, schedulers)

    def _meet(self, optimizers: Sequence[Optimizer], schedulers: Sequence[object]) -> None:
        """Begin anew if groups or schedules have joined, or were replaced; their rates are their own."""
        there = [*(group for optimizer in optimizers for group in optimizer.param_groups)]
        is_known = all(id(group) in self._groups for group in there)
        if not is_known or any(id(s) not in self._schedules for s in _with_inner(schedulers)):
            known = [r for r in rates_of(optimizers, schedulers) if self._knows(r)]
            self._begin(optimizers, schedulers, {r.key: self._copy_of(r).value() for r in known})

    def _knows(self, rate: Rate) -> bool:
        return id(rate.owner) in (self._groups if isinstance(rate.owner, dict) else self._schedules)

    def values(self, optimizers: Sequence[Optimizer], schedulers: Sequence[object]) -> dict[Key, Any]:
        """A copy of the own rates; call :meth:`follow` before."""
        return {rate.key: _copied(self._copy_of(rate).value()) for rate in rates_of(optimizers, schedulers)}


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
        return _copied(value) if value.numel() == 1 else value
    if isinstance(value, tuple):
        return value
    if isinstance(value, list):
        return [_copied_setting(each) for each in value]
    return copy.copy(value) if isinstance(value, dict | set | deque) else value


def _mark(rate: object) -> object:
    """What changes when a rate is set: of a tensor on a device its version, which needs no waiting."""
    if isinstance(rate, Tensor) and not rate.is_cpu:
        return id(rate), -1 if rate.is_inference() else rate._version
    return float(rate) if isinstance(rate, Tensor | int | float) else None


def _count(schedule: Any) -> int:  # noqa: ANN401
    """How often it was stepped; ChainedScheduler does not count, but what is in it."""
    last = getattr(schedule, "last_epoch", None)
    inner = _inner(schedule)
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
    inner = list(zip(_inner(live), _inner(mine), strict=True))
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
    mine._last_lr = [_copied(group["lr"]) for group in mine.optimizer.param_groups]


@dataclass(slots=True)
class LoweredRates:
    """How often the learning rates were lowered, and how many of those times the live rates reflect.

    A capture holds the rates of its own time, so that a restore brings back older ones: what has been done to
    the rates since is to be done again.
    """

    times: int = 0
    """How often they were lowered so far; if for a time, since they were last what they would be."""
    reflected: int = 0
    """How many of those the rates of now reflect."""
    left_alone: frozenset[int] = frozenset()
    """Ids of schedules and optimizers that the last restore left alone; see :class:`KeptRates`."""
    reflected_there: int = 0
    """How many of those their rates reflect."""
    changes: list[Change] | None = None
    """What lowers the rates just put back, while that is being done; each may be done twice."""
    way_back: list[Change] | None = None
    """Likewise what makes lowered rates their own again."""
    own: OwnRates | None = None
    """While the rates are lowered for a time: what they would be."""
    healthy_since: int = 0
    """All steps after this one were healthy."""
    captured: RatesThen | None = None
    """What the capture that was restored last says of its own rates; None: they were not lowered."""
    is_restored: bool = False
    """Whether the rates are those of a capture, and nothing has been done to them yet."""

    def restored(self, reflected: int, kept: KeptRates, captured: RatesThen | None) -> None:
        """A capture whose rates reflect so many was put back, all but ``kept``."""
        self.changes = self.way_back = None
        self.left_alone, self.reflected_there = kept.ids, self.reflected
        self.reflected, self.captured, self.is_restored = reflected, captured, True

    def caught_up(self) -> None:
        """All rates reflect everything now."""
        if self.own is not None:
            self.own.settled()
        self.reflected = self.reflected_there = self.times
        self.is_restored = False
        self.captured = self.changes = None

    def for_good(
        self, optimizers: Sequence[Optimizer], schedulers: Sequence[object], factor: float
    ) -> Iterator[Change]:
        """What lowers the rates just put back once more for every time that they do not reflect.

        Rates that the restore left alone reflect all but the last.
        """
        kept = self.left_alone
        for is_kept, reflected in ((False, self.reflected), (True, self.reflected_there)):
            times = factor ** (self.times - reflected)
            if times != 1.0:
                chosen = [o for o in optimizers if (id(o) in kept) == is_kept]
                schedules = [s for s in schedulers if (id(s) in kept) == is_kept]
                for rate in rates_of(chosen, schedules):
                    yield partial(rate.set, scaled(rate.value(), times))

    def for_a_time(
        self, optimizers: Sequence[Optimizer], schedulers: Sequence[object], factor: float
    ) -> Iterator[Change]:
        """What makes each rate its own, lowered so many times; begins to follow the own ones."""
        own = self._own_values(optimizers, schedulers)
        self.own = OwnRates(optimizers, schedulers, own)
        values, times = self.own.values(optimizers, schedulers), factor**self.times
        for rate in rates_of(optimizers, schedulers):
            yield partial(rate.set, scaled(values[rate.key], times))

    def _own_values(self, optimizers: Sequence[Optimizer], schedulers: Sequence[object]) -> dict[Key, Any]:
        """The own rates of now, the live ones where that is what they are."""
        former: dict[Key, Any] = {}
        if self.own is not None:
            self.own.follow(optimizers, schedulers)
            former = self.own.values(optimizers, schedulers)
        if not self.is_restored:
            return former
        kept = {id(s) for s in _with_inner(s for s in schedulers if id(s) in self.left_alone)}
        kept |= self.left_alone
        back = {} if self.captured is None else self.captured.own
        return {
            **{key: value for key, value in back.items() if key[0] not in kept},
            **{key: value for key, value in former.items() if key[0] in kept},
        }

    def undone(self, optimizers: Sequence[Optimizer], schedulers: Sequence[object]) -> Iterator[Change]:
        """What makes each rate its own again; :meth:`recovered` tells that it is done."""
        values = self._own_values(optimizers, schedulers)
        for rate in rates_of(optimizers, schedulers):
            if rate.key in values:
                yield partial(rate.set, values[rate.key])

    def recovered(self) -> None:
        """The rates are their own again."""
        self.times = self.reflected = self.reflected_there = 0
        self.own = self.way_back = None

    def now(self, optimizers: Sequence[Optimizer], schedulers: Sequence[object]) -> RatesThen | None:
        """What there is to say of rates that are lowered for a time; None: they are not."""
        if self.own is None:
            return None
        self.own.follow(optimizers, schedulers)
        live = {rate.key: _copied(rate.value()) for rate in rates_of(optimizers, schedulers)}
        return RatesThen(self.own.values(optimizers, schedulers), live, self.times, self.healthy_since)
