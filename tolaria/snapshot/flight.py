"""The capture that may be in flight on the side stream, and who waits for it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from tolaria.snapshot import graphs

_FLIGHTS: weakref.WeakSet[Flight] = weakref.WeakSet()


class Flight:
    """One capture on a stream of its own; everybody who changes what it reads waits for it, on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.started = False
        self._is_marked = True
        self.users: dict[int, torch.cuda.Stream] = {}
        """Every stream that this governor's own launches went to."""
        self._waited: set[int] = set()
        _FLIGHTS.add(self)
        self._recorded: tuple[int, Flight] | None = None
        """The capture at the head of a recorded CUDA graph, under the number of its recording."""

    def launching(self) -> None:
        """The capture is about to be enqueued; interrupted before :meth:`launched`, it is waited for too."""
        self._is_marked = False

    def launched(self) -> None:
        """The capture has been enqueued."""
        self.done.record(self.stream)
        self.started = True
        self._waited.clear()
        self._is_marked = True

    def join(self) -> None:
        """Make the current stream wait for the capture, once a stream."""
        if not self._is_marked:
            self.launched()
        stream = torch.cuda.current_stream(self.stream.device)
        self.users[stream.cuda_stream] = stream
        if self.started and stream.cuda_stream not in self._waited:
            stream.wait_event(self.done)
            self._waited.add(stream.cuda_stream)

    @staticmethod
    def join_all(device: torch.device) -> None:
        """Make the current stream wait for every capture in flight on ``device``, whose ever it is."""
        for flight in [f for f in _FLIGHTS if f.device == device]:
            flight.join()

    def wait(self) -> None:
        """Join; while a graph is being recorded, join the capture at its head, if there is one."""
        number = graphs.recording(self.device)
        if not number:
            self.join()
            return
        head = self.recorded_in(number)
        if head is not None:
            head.join()

    def begin_recorded(self) -> Flight:
        """The capture at the head of the graph that is being recorded."""
        head = Flight(self.device)
        self._recorded = graphs.recording(self.device), head
        return head

    def recorded_in(self, number: int) -> Flight | None:
        """What :meth:`begin_recorded` returned in this recording; a failed one leaves nothing to the next."""
        return self._recorded[1] if self._recorded is not None and self._recorded[0] == number else None


def before_optimizer_step(flight: Flight, *_: object) -> None:
    """A step pre-hook: the optimizer changes what is being captured."""
    flight.wait()


class LoadHooks:
    """Makes ``load_state_dict`` of every module wait, since anybody may load a part of the model alone."""

    def __init__(self, flight: Flight, handles: list[RemovableHandle]) -> None:
        self._flight = flight
        self._handles = handles
        self._hooked: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def cover(self, modules: Iterable[nn.Module]) -> None:
        """Hook those that are not hooked yet."""
        for module in modules:
            if module not in self._hooked and not isinstance(module, torch.jit.ScriptModule):
                hook = _BeforeLoading(self._flight)
                self._handles.append(module.register_load_state_dict_pre_hook(hook))  # type: ignore[no-untyped-call]
                self._hooked.add(module)


class _BeforeLoading:
    """A module's hook; a copied or pickled module is not governed, so there it does nothing."""

    def __init__(self, flight: Flight | None = None) -> None:
        self._flight = flight

    def __call__(self, *_: object) -> None:
        if self._flight is not None:
            self._flight.wait()

    def __reduce__(self) -> tuple[type[_BeforeLoading], tuple[()]]:
        return _BeforeLoading, ()
