"""Ctrl-C wherever one asks for it: a trace that raises at one line, or bytecode, of the package."""

from __future__ import annotations

import gc
import math
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from torch import nn

import tolaria
from tolaria.governor import GovernorConfig, TolariaGovernor

_PACKAGE = str(Path(tolaria.__file__).parent)


class Interruption:
    """Collects the places that a call passes, and interrupts it at one of them.

    A place is a line, or a bytecode in the functions of ``in_detail``, reached for the first time.

    Args:
        at: the number of the place to raise KeyboardInterrupt at; None: pass through all of them.
        within: ends of the names of the files to look at; all of the package by default.
        in_detail: names of functions where every bytecode is a place.
    """

    def __init__(
        self, at: int | None = None, *, within: tuple[str, ...] = ("",), in_detail: Collection[str] = ()
    ) -> None:
        self._at, self._within, self._in_detail = at, within, in_detail
        self.places: dict[tuple[CodeType, int], None] = {}
        self.has_happened = False

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(_PACKAGE) or not code.co_filename.endswith(self._within):
            return None
        in_detail = frame.f_trace_opcodes = code.co_name in self._in_detail
        if event == ("opcode" if in_detail else "line") and not self.has_happened:
            place = code, frame.f_lasti if in_detail else frame.f_lineno
            is_new = place not in self.places
            self.places[place] = None
            if is_new and len(self.places) - 1 == self._at:
                self.has_happened = True
                raise KeyboardInterrupt
        return self

    @contextmanager
    def on(self) -> Iterator[None]:
        """Trace the calls of this block; nothing is collected, since finalizers may swallow the exception."""
        before, collects = sys.gettrace(), gc.isenabled()
        gc.disable()
        sys.settrace(self)
        try:
            yield
        finally:
            sys.settrace(before)
            if collects:
                gc.enable()

    def stops(self, call: Callable[[], object]) -> bool:
        """Make the call; whether it was interrupted. A place may be one that only the first call passes."""
        with suppress(KeyboardInterrupt), self.on():
            call()
        return self.has_happened

    def named(self, at: int) -> str:
        """Place number ``at`` in words."""
        code, line = list(self.places)[at]
        return f"{Path(code.co_filename).name}:{line} {code.co_name}"


class Counter:
    """An extra with a number."""

    def __init__(self) -> None:
        self.n = 0.0

    def state_dict(self) -> dict[str, float]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.n = state["n"]


def _load(governor: TolariaGovernor) -> Callable[[], Any]:
    saved = governor.state_dict()
    return lambda: governor.load_state_dict(saved)


def _load_of_another_size(governor: TolariaGovernor) -> Callable[[], Any]:
    config = GovernorConfig(snapshot_interval=1000, window=40, probation=2)
    saved = TolariaGovernor(nn.Linear(1, 1), [], config=config).state_dict()
    return lambda: governor.load_state_dict(saved, keep_config=False)


def _save(governor: TolariaGovernor) -> Callable[[], Any]:
    folder = tempfile.mkdtemp(dir=_FOLDER.name)
    return lambda: governor.save(folder).result()


def _condemned(governor: TolariaGovernor) -> TolariaGovernor:
    """A rollback is called for, and not carried out yet."""
    governor.check_vital_signs(math.nan)
    return governor


def _waiting(governor: TolariaGovernor) -> Callable[[], Any]:
    """A capture by hand waits for the end of the next step."""
    governor.snapshot()
    governor.step(1.0)
    governor.snapshot()
    return lambda: governor.step(1.0)


_FOLDER = tempfile.TemporaryDirectory(prefix="tolaria-")

CALLS: dict[str, Callable[[TolariaGovernor], Callable[[], Any]]] = {
    "snapshot": lambda governor: governor.snapshot,
    "step_that_rolls_back": lambda governor: lambda: governor.step(math.nan),
    "execute_rollback": lambda governor: governor.execute_rollback,
    "verify_that_rolls_back": lambda governor: _condemned(governor).verify,
    "step_with_a_waiting_snapshot": lambda governor: _waiting(governor),
    "step_without_a_loss": lambda governor: lambda: governor.step(None, gradient_norm=1.0),
    "reset": lambda governor: governor.reset,
    "save": _save,
    "load_state_dict": _load,
    "load_state_dict_of_another_size": _load_of_another_size,
}
"""Calls to interrupt: what prepares one, and the call."""
