"""Ctrl-C wherever one asks for it: a trace that raises at one line, or bytecode, of the package."""

from __future__ import annotations

import gc
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import tolaria

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
