"""Memory for slots and mailboxes, of exactly the size that is asked for."""

from __future__ import annotations

import mmap
import weakref

import torch
from torch import Tensor

from tolaria.errors import SnapshotError


def allocate(nbytes: int, device: torch.device, storage: str = "pinned") -> Tensor:
    """Uninitialised bytes that a capture of tensors on ``device`` can write.

    Args:
        nbytes: how many; exactly so many are taken (``pin_memory()`` would round up to a power of two).
        device: where the captured tensors are; for the CPU it is ordinary memory.
        storage: on CUDA, ``"pinned"`` for page-locked host memory or ``"device"``.

    Returns:
        uint8 ``(nbytes,)``.

    Raises:
        SnapshotError: there is not so much memory.
    """
    try:
        if device.type != "cuda" or storage == "device":
            return torch.empty(nbytes, dtype=torch.uint8, device=device)
        return _page_locked(nbytes)
    except (RuntimeError, OSError, MemoryError) as error:
        kind = (
            "page-locked memory" if device.type == "cuda" and storage == "pinned" else f"memory on {device}"
        )
        raise SnapshotError(
            f"a snapshot slot needs {nbytes / 2**20:.1f} MiB of {kind}, which could not be had ({error}); "
            "use a smaller model or the other GovernorConfig.storage"
        ) from error


def _page_locked(nbytes: int) -> Tensor:
    # whole pages of our own: registering shares no page with a neighbour
    pages = mmap.mmap(-1, max(1, nbytes))
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    status = runtime.cudaHostRegister(whole.data_ptr(), nbytes, 1)  # 1: valid in every CUDA context
    if int(status) != 0:
        raise MemoryError(f"cudaHostRegister failed with {status}")
    # The storage holds the pages; when it lets go of them they are unlocked, before they are unmapped.
    weakref.finalize(pages, runtime.cudaHostUnregister, whole.data_ptr())
    return whole[:nbytes]
