"""Memory for slots and mailboxes, of exactly the size that is asked for."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from tolaria import _extension
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
        with torch.cuda.device(device):
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
    """Host memory that the current device reads and writes by the host's addresses."""
    if _extension.CUDA:
        return cast(Tensor, torch.ops.tolaria.page_locked(nbytes))
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
