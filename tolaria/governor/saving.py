"""Writes last known good states to disk beside training: from the slot, in a thread of its own."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from tolaria.snapshot import persist
from tolaria.snapshot.plain_form import to_plain
from tolaria.telemetry.events import GovernorEvent, PromotionEvent

KIND = "tolaria training state"
VERSION = 1
KEPT = 2
"""Snapshots that stay in a folder."""
_REST = 3.0
"""Seconds of sleep for each second of writing, so that training keeps its memory bandwidth."""


@dataclass(frozen=True, slots=True)
class Save:
    """A last known good state that is to be written; its slot is not overwritten before it is."""

    folder: Path
    """Of snapshots."""
    parts: Mapping[str, Any]
    """State dicts, the governor's saved form, and ``step``, that of the capture."""

    def write(self, *, rest: float) -> Path:
        """Write it; returns the snapshot's folder."""
        document, tensors = to_plain({"kind": KIND, "version": VERSION, **self.parts}, _is_live)
        return persist.write(self.folder, self.parts["step"], tensors, document, keep=KEPT, rest=rest)


class Saver:
    """Writes one state at a time.

    Args:
        every: write every so many promotions by itself; 0: none.
        path: where to.
    """

    def __init__(self, every: int = 0, path: str | None = None) -> None:
        self._every, self._folder = every, None if path is None else Path(path).absolute()
        self._promotions = 0
        self._started: list[tuple[threading.Thread, Future[Path]]] = []
        self._is_due = False

    def learn(self, events: Sequence[GovernorEvent]) -> None:
        """Hear of promotions."""
        if self._every:
            before = self._promotions // self._every
            self._promotions += sum(isinstance(event, PromotionEvent) for event in events)
            self._is_due |= self._promotions // self._every != before

    def save_if_due(self, start: Callable[[Path], Future[Path]]) -> None:
        """Have a promoted state written; with two under way already, the one after the next promotion."""
        if not self._is_due or len(self._pending()) > 1:
            return
        assert self._folder is not None, "the settings ask for a path"
        self._is_due = False
        start(self._folder)

    def _pending(self) -> list[tuple[threading.Thread, Future[Path]]]:
        """What is being written or waits for it; warns of what could not be written by itself.

        A thread that never started, since Ctrl-C came in between, is none of it.
        """
        now = [(thread.is_alive(), thread, future) for thread, future in self._started]
        self._started = [(thread, future) for is_alive, thread, future in now if is_alive]
        over = (future for is_alive, _, future in now if not is_alive and future.done())
        for error in [future.exception() for future in over]:
            if error is not None and self._every:
                warnings.warn(f"governor: a state could not be saved: {error}", RuntimeWarning, stacklevel=2)
        return self._started

    def start(self, save: Save, register: Callable[[threading.Thread], None]) -> Future[Path]:
        """Write ``save`` in another thread, after those before.

        Args:
            save: what to write.
            register: called with that thread before it starts.
        """
        before, future = list(self._pending()), Future[Path]()

        def write() -> None:
            try:
                for thread, _ in before:
                    thread.join()
                future.set_result(save.write(rest=_REST))
            except BaseException as error:  # whoever asks for the result gets it
                future.set_exception(error)

        future.set_running_or_notify_cancel()
        # No daemon: a program that ends finishes what it is writing.
        thread = threading.Thread(target=write, name="tolaria-save")
        register(thread)
        self._started.append((thread, future))
        thread.start()
        return future

    def finish(self, start: Callable[[Path], Future[Path]]) -> None:
        """Wait until all is written; a promoted state that was passed over is written now."""
        self._join()
        self.save_if_due(start)
        self._join()

    def _join(self) -> None:
        for thread, _ in self._pending():
            thread.join()
        self._pending()


def _is_live(thing: object) -> bool:
    """What a program has, and a file has not: the running program's own takes its place on load."""
    return isinstance(thing, nn.Module | Optimizer) or callable(thing)


def own_memory(tensor: Tensor) -> Tensor:
    """The tensor itself: a slot that nobody overwrites is written as it lies."""
    return tensor
