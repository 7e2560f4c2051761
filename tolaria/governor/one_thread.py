"""Calls that act on the model, which two threads cannot make at the same time."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from tolaria.errors import TolariaError
from tolaria.snapshot.inference import outside_inference


class Acts(Protocol):
    """Whose calls they are."""

    _acting: int | None
    """The thread that makes one now."""


A = TypeVar("A", bound=Acts)
P = ParamSpec("P")
T = TypeVar("T")


def one_thread(call: Callable[Concatenate[A, P], T]) -> Callable[Concatenate[A, P], T]:
    """``call``, which may be made under ``torch.inference_mode``, and is an error if two threads meet in it.

    That one waits for the other would be no help: their optimizers' steps change what a capture copies.
    """
    outside = outside_inference(call)

    @functools.wraps(call)
    def alone(self: A, /, *args: P.args, **kwargs: P.kwargs) -> T:
        here, other = threading.get_ident(), self._acting
        if other is not None and other != here:
            raise TolariaError(
                "governor: two threads are inside its calls at the same time; hold one lock around the "
                "optimizers' steps and the governor's"
            )
        self._acting = here
        try:
            return outside(self, *args, **kwargs)
        finally:
            self._acting = other

    return alone
