"""Learning rates that were lowered, for good or for a time, and what becomes of them at a restore."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.optim import Optimizer

from tolaria.snapshot.own_rates import OwnRates
from tolaria.snapshot.rates import Key, copied, rates_of, scaled, with_inner
from tolaria.snapshot.schedules import KeptRates

Change = Callable[[], object]
"""Sets one rate to a value that is known already, so it may be done twice."""


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
        kept = {id(s) for s in with_inner(s for s in schedulers if id(s) in self.left_alone)}
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
        live = {rate.key: copied(rate.value()) for rate in rates_of(optimizers, schedulers)}
        return RatesThen(self.own.values(optimizers, schedulers), live, self.times, self.healthy_since)
