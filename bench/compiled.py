"""``torch.compile`` of a reference: compiled outside the timing, and a failure told, not hidden."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def compiled(function: Callable[..., Any], *, fullgraph: bool = True) -> Callable[..., Any]:
    """``function`` compiled for any size and number of threads, so that one compilation serves a sweep.

    It is compiled at the first call: importing the compiler takes seconds and warns of its own parts.
    """
    made: list[Callable[..., Any]] = []

    def run(*args: object) -> Any:
        if not made:
            torch._dynamo.config.recompile_limit = 256
            torch._inductor.config.cpp.dynamic_threads = True
            made.append(torch.compile(function, fullgraph=fullgraph, dynamic=True))
        return made[0](*args)

    return run
