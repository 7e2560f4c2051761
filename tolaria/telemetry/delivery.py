"""Events on their way to people: a queue for ``poll()``, and the sinks."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence

from tolaria.telemetry.events import EventQueue, GovernorEvent
from tolaria.telemetry.labels import Labels
from tolaria.telemetry.sinks import Sink, deliver


class Telemetry:
    """Takes events from any thread, and delivers them when nothing is left to be done for the run.

    A sink is a stranger's code: it may raise, be interrupted by Ctrl-C, or call the governor. So events are
    first queued, then the governor finishes what it is doing, and only then are they delivered. What an
    interrupted delivery leaves behind goes out with the next.
    """

    def __init__(self, sinks: Sequence[Sink], capacity: int = 4096, name: str | None = None) -> None:
        self.labels = Labels(name)
        self.sinks: list[Sink] = list(sinks)
        self._queue = EventQueue(capacity)
        self._outgoing: deque[tuple[Sink, GovernorEvent]] = deque()
        self._lock = threading.Lock()
        self._delivering = threading.RLock()

    def add(self, events: Iterable[GovernorEvent]) -> None:
        """Label and queue ``events``."""
        with self._lock:
            for event in map(self.labels.on, events):
                self._queue.add(event)
                self._outgoing.extend((sink, event) for sink in self.sinks)

    def deliver(self) -> None:
        """Hand the sinks what is queued for them; one that raises stops neither training nor the others.

        Sinks are called by one thread at a time; what another one queues meanwhile goes out there.
        """
        if not self._delivering.acquire(blocking=False):
            return
        try:
            while self._outgoing:
                sink, event = self._outgoing.popleft()
                deliver((sink,), event)
        finally:
            self._delivering.release()

    def take(self) -> list[GovernorEvent]:
        """What nobody has polled yet, oldest first."""
        with self._lock:
            return self._queue.take()
