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
            torch._functorch.config.donated_buffer = False  # a backward that is timed runs more than once
            inductor = torch._inductor.config
            inductor.cpp.dynamic_threads = True
            inductor.cpp.vec_isa_ok = True  # this CPU's widest; trying each out takes longer than compiling
            inductor.compile_threads = 1  # here, one kernel at a time: a pool of processes costs more
            made.append(torch.compile(function, fullgraph=fullgraph, dynamic=True))
        return made[0](*args)

    return run
