"""``torch.compile`` of a reference: compiled outside the timing, and a failure told, not hidden."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def compiled(function: Callable[..., Any], *, fullgraph: bool = True) -> Callable[..., Any]:
    """``function`` compiled for any size and number of threads, so that one compilation serves a sweep."""
    torch._dynamo.config.recompile_limit = 256
    torch._inductor.config.cpp.dynamic_threads = True
    return torch.compile(function, fullgraph=fullgraph, dynamic=True)
