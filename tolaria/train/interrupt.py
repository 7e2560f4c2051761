"""Ctrl-C while a run goes on: noted, and obeyed where the state is whole."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_OURS_TO_TAKE = (signal.default_int_handler, signal.SIG_DFL)


class Interrupts:
    """Holds SIGINT and SIGTERM back inside, so that a run ends between two steps and its folder is complete.

    The first signal is looked at by :meth:`check`; one more raises KeyboardInterrupt at once, for a step that
    hangs. :meth:`spare` grants what follows (saving) another one. Only the main thread can do this, and only
    where nobody else handles the signal; elsewhere everything stays as it is.
    """

    def __init__(self) -> None:
        self.count = 0
        """Signals so far."""
        self._patience = 1
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) in _OURS_TO_TAKE:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count > self._patience:
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt if there was a signal."""
        if self.count:
            raise KeyboardInterrupt

    def spare(self) -> None:
        """From here on one more signal is noted and nothing else."""
        self._patience = self.count + 1
