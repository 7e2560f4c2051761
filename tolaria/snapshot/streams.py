"""Calls that follow one another on the streams of a CUDA device, whichever streams they are made on."""

from __future__ import annotations

import weakref
from functools import partial

import torch

from tolaria.snapshot import graphs
from tolaria.snapshot.flight import Flight
from tolaria.snapshot.slots import Slots


class InOrder:
    """Makes the launches of one owner happen in the order of its calls, and its memory outlive them.

    On the CPU there is nothing to do.

    Args:
        device: where the launches go.
        slots: what they use.
        memory: likewise.
    """

    def __init__(self, device: torch.device, slots: Slots, memory: object) -> None:
        self._device, self._slots = device, slots
        self._done: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            weakref.finalize(self, _let_go, device, self._done, (slots, memory))

    def begin(self) -> None:
        """The current stream waits for the call before, and for captures of governors in flight."""
        if self._done is not None:
            graphs.catch_up()
            torch.cuda.current_stream(self._device).wait_event(self._done)
            Flight.join_all(self._device)

    def done(self) -> None:
        """The last launch of a call is enqueued on the current stream."""
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """The host waits for the last call's launches."""
        if self._done is not None:
            self._done.synchronize()  # sync: asked for by name

    def before_new_table(self) -> None:
        """Launches on the current stream may still use what the table points to and is about to let go."""
        if self._done is not None:
            current = torch.cuda.current_stream(self._device)
            for tensor in [*(place.live for place in self._slots.places.values()), self._slots.table.data]:
                tensor.record_stream(current)


def _let_go(device: torch.device, done: torch.cuda.Event, memory: object) -> None:
    """No launch may still touch ``memory``, which lives as long as the arguments."""
    if torch.cuda._is_in_bad_fork():
        return  # a forked child that ends: it has the addresses, not the device
    if not graphs.is_postponed(device, partial(_let_go, device, done, memory)):
        done.synchronize()  # sync: when a snapshot goes
