"""Peak memory of a few training steps, guarded and not."""

from __future__ import annotations

import memory
import pytest
from harness import SMOKE
from models import WORKLOADS

_found = {}


def beside(effort, device):
    """Start to measure while others compile; the function returned waits for the end."""
    running = memory.start(list(WORKLOADS)[: 1 if effort is SMOKE else None], device)
    return lambda: _found.update(memory.peaks(running))


@pytest.mark.parametrize("name", list(WORKLOADS))
def bench_memory(name, record):
    """The times beside the bytes mean nothing."""
    for impl, found in _found[name].items():
        info = {key: value for key, value in found.items() if key != "seconds"}
        record(f"memory/{name}", impl, [found["seconds"]], moved_bytes=0, **info)
