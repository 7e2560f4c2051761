"""Learning-rate schedules that nobody handed over, and rates that a rollback leaves to their schedule."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tolaria.errors import UncoveredWarning
from tolaria.snapshot.protocols import Stateful
from tolaria.snapshot.voice import GOVERNOR, Voice

RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
"""The learning rate of a group, and what the schedules of torch derive it from."""
SCHEDULED = (*RATES, "momentum", "betas", "base_momentum", "max_momentum")
"""What the schedules of torch write to a group."""


class ScheduleFinder:
    """Finds schedules over covered optimizers and covers them; it searches only where something hints at one.

    A schedule of torch wraps ``optimizer.step`` and writes ``initial_lr`` when it is made; one that does not
    (ReduceLROnPlateau) gives itself away once it moves a rate. The search asks the garbage collector who
    holds the optimizer, which takes about 10 ms: it is made at captures and restores alone, after a hint.
    """

    def __init__(self, voice: Voice) -> None:
        self._voice = voice
        self._hints: dict[int, list[object]] = {}
        self._rates: dict[int, list[float | None]] = {}
        self._by_hand: dict[int, int] = {}
        self._taken_back: dict[int, list[float | None]] = {}
        self._told: list[object] = []

    def look(self, optimizers: Sequence[Optimizer], schedulers: list[Stateful]) -> None:
        """Append the schedules over ``optimizers`` that turned up since the last look to ``schedulers``."""
        hinted = [o for o in optimizers if self._has_new_hint(o)]
        moved = [o for o in optimizers if self._has_moved(o, schedulers)]
        searched = [*hinted, *(o for o in moved if id(o) not in self._by_hand)]
        found = _schedules_over(searched) if searched else []
        self._cover(found, schedulers)
        for optimizer in moved:
            if not any(_drives(schedule, optimizer) for schedule in found):
                self._by_hand[id(optimizer)] = self._by_hand.get(id(optimizer), 0) + 1
        self._tell_hidden([*found, *schedulers], hinted)
        self.refresh(optimizers)

    def moves_by_hand(self) -> dict[int, int]:
        """By the optimizer's id: how many looks found its rate set by something that is no schedule."""
        return dict(self._by_hand)

    def restored(self, rates: Mapping[int, list[float | None]], moves: Mapping[int, int]) -> None:
        """A restore has taken rates back.

        Args:
            rates: by the optimizer's id, those before the restore.
            moves: what :meth:`moves_by_hand` said at the capture.
        """
        late = {key for key, count in self._by_hand.items() if count > moves.get(key, 0)}
        self._taken_back.update((key, before) for key, before in rates.items() if key in late)

    def captured(self, optimizers: Sequence[Optimizer]) -> None:
        """Say where a restore raised a rate that was set by hand, if nobody has set it since.

        Who sets the rate at every step is not concerned; who counts steps and lowers it at some of them is.
        One that came out lower is what an agent wants that tried a rate too high.
        """
        for optimizer in optimizers:
            before, now = self._taken_back.pop(id(optimizer), []), _rates(optimizer)
            is_higher = any((b or 0.0) < (a or 0.0) for b, a in zip(before, now, strict=False))
            if not is_higher or now != self._rates.get(id(optimizer)):
                continue
            if not any(told is optimizer for told in self._told):
                self._told.append(optimizer)
                _warn_taken_back(self._voice, optimizer, before, now)

    def _tell_hidden(self, known: Sequence[object], hinted: Sequence[Optimizer]) -> None:
        """Name optimizers whose ``step`` a schedule has wrapped that the garbage collector does not show."""
        if not gc.get_freeze_count():
            return
        for optimizer in hinted:
            if "step" in vars(optimizer) and not any(reaches(s, optimizer) for s in known):
                self._told.append(optimizer)
                _warn_hidden(self._voice, optimizer)

    def refresh(self, optimizers: Sequence[Optimizer]) -> None:
        """The rates of now are what they should be: a restore or its policy has set them."""
        self._rates = {id(o): _rates(o) for o in optimizers}

    def rates(self) -> list[float]:
        """The rates at the last look, as far as they can be read without waiting for a device."""
        return [rate for rates in self._rates.values() for rate in rates if rate is not None]

    def _has_new_hint(self, optimizer: Optimizer) -> bool:
        hints = [vars(optimizer).get("step"), *("initial_lr" in group for group in optimizer.param_groups)]
        seen, self._hints[id(optimizer)] = self._hints.get(id(optimizer)), hints
        return hints != seen and any(hints)

    def _has_moved(self, optimizer: Optimizer, schedulers: Sequence[Stateful]) -> bool:
        """Whether a rate has changed and no covered schedule explains it."""
        rates = _rates(optimizer)
        if rates == self._rates.get(id(optimizer), rates):
            return False
        return not any(reaches(scheduler, optimizer) for scheduler in schedulers)

    def _cover(self, found: Sequence[object], schedulers: list[Stateful]) -> None:
        for schedule in found:
            is_known = any(reaches(known, schedule) for known in schedulers)
            is_part = any(other is not schedule and reaches(other, schedule) for other in found)
            if is_known or is_part or any(schedule is told for told in self._told):
                continue
            if isinstance(schedule, LRScheduler) and _tells_its_state(schedule):
                schedulers.append(schedule)
            elif not any(reaches(schedule, known) for known in schedulers):
                self._told.append(schedule)
                _warn(self._voice, schedule)


class KeptRates:
    """The rates of optimizers whose schedule a capture does not know: they stay where the schedule is.

    A rollback to before the schedule was made (or found) cannot take it back; to take the rate back alone
    would leave the two at odds to the end of the run.

    Args:
        optimizers: the covered ones.
        schedulers: likewise.
        known: how many of the schedulers the capture knows.
    """

    def __init__(self, optimizers: Sequence[Optimizer], schedulers: Sequence[Stateful], known: int) -> None:
        late = schedulers[known:]
        driven = [o for o in optimizers if any(reaches(schedule, o) for schedule in late)]
        self.ids = frozenset(map(id, [*late, *driven]))
        """Of those schedules and their optimizers."""
        self._late, self._driven = late, driven
        self.before = {id(o): _rates(o) for o in optimizers}
        """The rates by the optimizer's id, as they are before the restore."""
        self._values = [
            (group, {key: copy.deepcopy(group[key]) for key in SCHEDULED if key in group})
            for optimizer in driven
            for group in optimizer.param_groups
        ]

    def tell_lost(self) -> None:
        """Name the schedules whose rates a device has taken back already: they are tensors there."""
        for schedule in self._late:
            for optimizer in self._driven:
                rates = [group.get("lr") for group in optimizer.param_groups]
                if reaches(schedule, optimizer) and any(isinstance(r, Tensor) and r.is_cuda for r in rates):
                    _warn(GOVERNOR, schedule)
                    break

    def put_back(self) -> None:
        """Give the groups the rates that they had before the restore."""
        for group, values in self._values:
            for key, value in values.items():
                if isinstance(value, Tensor) and isinstance(group.get(key), Tensor):
                    group[key].copy_(value)
                else:
                    group[key] = value


def reaches(holder: object, target: object, depth: int = 3) -> bool:
    """Whether ``holder`` is ``target`` or has it among its attributes, or in a list there, to some depth."""
    if holder is target:
        return True
    if depth == 0:
        return False
    if isinstance(holder, list | tuple):
        values: Iterator[object] = iter(holder)
    elif isinstance(holder, Optimizer | LRScheduler) or _has_methods(type(holder)):
        values = iter(_attributes(holder).values())
    else:
        return False
    return any(reaches(value, target, depth - 1) for value in values)


def _attributes(thing: object) -> dict[str, Any]:
    """Its attributes, wherever they lie: in a dict of its own, in slots, in both."""
    found = dict(getattr(thing, "__dict__", {}))
    for kind in type(thing).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in found and hasattr(thing, name):
                found[name] = getattr(thing, name)
    return found


def _drives(schedule: object, optimizer: Optimizer) -> bool:
    """Whether ``schedule`` holds ``optimizer``, or one that it wraps."""
    return reaches(schedule, optimizer) or reaches(optimizer, _attributes(schedule).get("optimizer"), depth=1)


def _has_methods(kind: type) -> bool:
    return all(callable(getattr(kind, name, None)) for name in ("step", "state_dict", "load_state_dict"))


def _is_schedule(thing: object) -> bool:
    kind = type(thing)
    if issubclass(kind, LRScheduler):
        return True
    return "sched" in kind.__name__.lower() and _has_methods(kind) and not issubclass(kind, Optimizer)


def _schedules_over(optimizers: Sequence[Optimizer]) -> list[object]:
    """Every schedule whose ``optimizer`` is one of these, or one that they wrap."""
    wrapped = [v for o in optimizers for v in vars(o).values() if isinstance(v, Optimizer)]
    targets = [*optimizers, *wrapped]

    def holds(attributes: dict[str, Any]) -> bool:
        return any(attributes.get("optimizer") is target for target in targets)

    referrers = gc.get_referrers(*targets)
    # The attributes of an object may lie in a dict of their own.
    dicts = [r for r in referrers if type(r) is dict and holds(r)]
    owners = gc.get_referrers(*dicts) if dicts else []
    found: dict[int, object] = {}
    for thing in (*referrers, *owners):
        if _is_schedule(thing) and holds(_attributes(thing)):
            found[id(thing)] = thing
    return list(found.values())


def _rates(optimizer: Optimizer) -> list[float | None]:
    """The rates that can be read without waiting for a device."""
    return [
        float(rate) if not isinstance(rate, Tensor) or rate.device.type == "cpu" else None
        for rate in (group.get("lr", 0.0) for group in optimizer.param_groups)
    ]


def _tells_its_state(schedule: LRScheduler) -> bool:
    try:
        copy.deepcopy(schedule.state_dict())
    except Exception:  # whatever it is, it must not end the run: the schedule is named in a warning
        return False
    return True


def _warn(voice: Voice, schedule: object) -> None:
    kind, optimizer = type(schedule).__name__, type(_attributes(schedule)["optimizer"]).__name__
    warnings.warn(
        f"{voice.who}: {kind} drives the rate of a covered optimizer ({optimizer}) and is not covered: "
        f"{voice.restore} takes the rate back without it; pass schedulers=[...], or call add_scheduler",
        UncoveredWarning,
        stacklevel=2,
    )


def _warn_hidden(voice: Voice, optimizer: Optimizer) -> None:
    warnings.warn(
        f"{voice.who}: a schedule drives the rate of a covered optimizer ({type(optimizer).__name__}) and "
        f"cannot be found after gc.freeze(): {voice.restore} takes the rate back without it; pass "
        "schedulers=[...], or call add_scheduler",
        UncoveredWarning,
        stacklevel=2,
    )


def _warn_taken_back(
    voice: Voice, optimizer: Optimizer, before: Sequence[float | None], after: Sequence[float | None]
) -> None:
    former, now = next(
        (b or 0.0, a or 0.0) for b, a in zip(before, after, strict=False) if (b or 0.0) < (a or 0.0)
    )
    warnings.warn(
        f"{voice.who}: {voice.restore} took the rate of a covered optimizer ({type(optimizer).__name__}) "
        f"back from {former:g} to {now:g}, and whatever had set it has not set it again; hand it over in "
        "schedulers=[...] (state_dict and load_state_dict are enough), or set the rate at every step",
        UncoveredWarning,
        stacklevel=2,
    )
