"""The host-side parts of captures that the device may still restore.

Every capture launch carries a *ticket*, a number that the host counts up and that the device stores beside
the capture it makes; so which parts belong to which capture is no guess from a count of steps, which rejected
calls, recordings and replays would falsify. A capture that a graph replay makes has no ticket: its parts are
those of the moment when the host heard of it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torch.optim import Optimizer

from tolaria.snapshot.host_state import HostState
from tolaria.snapshot.optimizer_state import HostValues

_MOST = 512
"""Kept launches at most: more than this the host cannot be ahead of the device, whose queues are shorter."""


@dataclass(slots=True)
class _Kept:
    host: HostState
    ticket: int
    """0: made by a graph replay."""
    step: int
    """Judgements that the host had counted."""
    capture: int | None = None
    """The capture's id, once the host has heard of it."""


class HostParts:
    """Host-side parts by ticket, or by capture where a replay made it."""

    def __init__(self) -> None:
        self._kept: list[_Kept] = []
        self._ticket = 0

    def issue(self, host: HostState, step: int) -> int:
        """File ``host`` for a capture that is about to be launched; returns its ticket."""
        self._ticket += 1
        self._kept.append(_Kept(host, self._ticket, step))
        return self._ticket

    def heard(self, capture: int, ticket: int, step: int, of_now: Callable[[], HostState]) -> None:
        """The device has made a capture; of one without a ticket, the parts of now are filed."""
        known = next(
            (k for k in self._kept if (k.ticket == ticket if ticket else k.capture == capture)), None
        )
        if known is not None:
            known.capture = capture
        elif not ticket:
            self._kept.append(_Kept(of_now(), 0, step, capture))

    def of(self, capture: int, ticket: int) -> HostState:
        """The parts of a capture; of one nobody heard of, those of the last before it."""
        return self._find(capture, ticket).host

    def _find(self, capture: int, ticket: int) -> _Kept:
        exact = [k for k in self._kept if (k.ticket == ticket if ticket else k.capture == capture)]
        earlier = [k for k in self._kept if k.capture is not None and k.capture <= capture]
        return (exact or sorted(earlier, key=lambda k: k.capture or 0) or self._kept[:1])[-1]

    def confirm(self, capture: int, ticket: int) -> None:
        """This capture is the last known good one: what is older can never be restored again."""
        if not self._kept:
            return
        good = self._find(capture, ticket)

        def is_older(k: _Kept) -> bool:
            return (0 < k.ticket < ticket) or (k.capture is not None and k.capture < capture)

        self._kept = [k for k in self._kept if k is good or not is_older(k)]
        surplus = len(self._kept) - _MOST
        if surplus > 0:
            self._kept = [k for i, k in enumerate(self._kept) if k is good or i >= surplus]

    def forget_others(self, ticket: int) -> None:
        """Nothing but the capture with ``ticket`` can be restored from now on."""
        self._kept = [k for k in self._kept if k.ticket == ticket]

    def keys(self) -> frozenset[Hashable]:
        """Places in the slots that some capture filled."""
        return frozenset[Hashable]().union(*(kept.host.keys for kept in self._kept))

    def correct(self, optimizer: Optimizer, right: HostValues) -> None:
        """Captures since a step that turned out to be skipped keep the optimizer's values of ``right``."""
        for kept in self._kept:
            for host in kept.host.optimizers:
                if host.optimizer is optimizer and kept.step in right and kept.step != min(right):
                    host.values = right[kept.step]
