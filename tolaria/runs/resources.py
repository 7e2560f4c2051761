"""How much memory the process has in use."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def memory_in_use() -> dict[str, int]:
    """Bytes that are resident (on Linux), and allocated on the current CUDA device, if one is in use."""
    found = {}
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        found["resident_bytes"] = pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        pass
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found["device_bytes"] = torch.cuda.memory_allocated()
    return found
