"""CUDA graphs: whether one is being recorded, and what must outlive it.

A recorded launch keeps the addresses that it was given, and nobody tells us when the last graph that holds
them is gone. So whatever was recorded once, a few kilobytes a governor, stays for the life of the process;
what is large (slots, copies) is reached through a table whose rows are taken away before it goes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tolaria import _extension
from tolaria.errors import TolariaError

_kept: dict[int, Tensor] = {}
_postponed: list[tuple[torch.device, Callable[[], None]]] = []


def is_recording(device: torch.device) -> bool:
    """Whether the current stream of ``device`` is being recorded; asks the host alone."""
    return recording(device) != 0


def recording(device: torch.device) -> int:
    """The number of the recording that the current stream of ``device`` takes part in; 0: none."""
    if device.type != "cuda":
        return 0
    if _extension.LOADED and _extension.CUDA:
        index = torch.cuda.current_device() if device.index is None else device.index
        return _extension.recording(index)
    with torch.cuda.device(device):
        return int(torch.cuda.is_current_stream_capturing())


def outlive(*tensors: Tensor) -> None:
    """Keep ``tensors`` for good: the recording that is under way holds their addresses."""
    for tensor in tensors:
        _kept[id(tensor)] = tensor


def is_kept(tensor: Tensor) -> bool:
    """Whether a recording may hold the address of ``tensor``."""
    return id(tensor) in _kept


def is_postponed(device: torch.device, call: Callable[[], None]) -> bool:
    """Whether a graph is being recorded, which ``call`` would spoil; then it is made later.

    For what the garbage collector calls, which comes by at any time.
    """
    recorded = is_recording(device)
    if recorded:
        _postponed.append((device, call))
    return recorded


def catch_up() -> None:
    """Make the calls that were postponed."""
    while _postponed and not is_recording(_postponed[-1][0]):
        _postponed.pop()[1]()


def disarm(device: torch.device, change: Callable[[], None]) -> None:
    """Change what recorded graphs read, while none of them runs; waits for the device."""
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # sync: replays may be under way on any stream
        change()
        torch.cuda.synchronize()  # sync: the next replay may come on any stream


def refuse_recording(device: torch.device, call: str) -> None:
    """Refuse a call that cannot be part of a graph, before it changes anything.

    Args:
        device: whose current stream counts.
        call: its name, for the error.

    Raises:
        TolariaError: a CUDA graph is being recorded on the current stream.
    """
    if is_recording(device):
        raise TolariaError(
            f"{call}: expected no CUDA graph to be recorded, since it waits for the device or looks "
            "at what the host has; call it before or after the recording"
        )
