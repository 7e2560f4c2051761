"""Where learning rates stand: in groups, and in what schedules derive them from."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tolaria.snapshot.schedules import RATES

OF_SCHEDULES = ("base_lrs", "_last_lr", "max_lrs", "min_lrs")
"""Lists of rates that schedules have."""

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
            now.copy_(value) if isinstance(value, Tensor) else now.fill_(value)  # neither waits
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
                for name in RATES:
                    if isinstance(group.get(name), Tensor | int | float):
                        yield Rate((id(optimizer), i, name), group, name)
    for schedule in with_inner(schedulers):
        for name in OF_SCHEDULES:
            if isinstance(getattr(schedule, name, None), list):
                yield Rate((id(schedule), 0, name), schedule, name)


def scaled(value: Any, factor: float) -> Any:  # noqa: ANN401  (as in Rate)
    """``value`` times ``factor``, or each of its values."""
    return [rate * factor for rate in value] if isinstance(value, list) else value * factor


def with_inner(schedulers: Iterable[object]) -> list[object]:
    """The schedules, and those inside them (of SequentialLR, of a wrapper that is not torch's), each once."""
    found: dict[int, object] = {}
    waiting = list(schedulers)[::-1]
    while waiting:
        schedule = waiting.pop()
        if id(schedule) not in found:
            found[id(schedule)] = schedule
            waiting += inner_schedules(schedule)[::-1]
    return list(found.values())


def inner_schedules(schedule: object) -> list[LRScheduler]:
    """The schedules of torch that are among the attributes of another, or in a list there."""
    held = (v if isinstance(v, list | tuple) else (v,) for v in getattr(schedule, "__dict__", {}).values())
    return [inner for values in held for inner in values if isinstance(inner, LRScheduler)]


def copied(value: Any) -> Any:  # noqa: ANN401  (as in Rate)
    """A copy that shares nothing."""
    if isinstance(value, list | tuple):
        return [copied(each) for each in value]
    return value.detach().clone() if isinstance(value, Tensor) else copy.copy(value)
