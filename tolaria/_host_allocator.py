"""Host memory kept for the next tensors: by our ops, and, opt-in, by the C library for the whole process."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from tolaria import _extension
from tolaria.errors import TolariaError

# mallopt's parameters (malloc.h) and what glibc starts with.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_INITIAL = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 128 << 10, _TRIM_THRESHOLD: 128 << 10}
_KEEPING = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}

_tuned = False


@dataclass(frozen=True, slots=True)
class HostAllocatorTuning:
    """What :func:`tune_host_allocator` did; ``str()`` says it in a sentence."""

    glibc: str
    """Version of the C library."""
    changed: bool
    """False if it had been tuned before."""

    def __str__(self) -> str:
        """The change, in mallopt's words."""
        what = (
            "M_MMAP_MAX=0 (no separate mapping for large blocks), M_TRIM_THRESHOLD=-1 (freed memory is kept)"
        )
        return f"glibc {self.glibc}: {'' if self.changed else 'already '}set {what}"

    def undo(self) -> None:
        """Set what glibc starts with and give the kept memory back to the system.

        One thing stays: glibc no longer adapts the threshold to the sizes it sees.
        """
        global _tuned
        libc = ctypes.CDLL(None)
        for parameter, value in _INITIAL.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(ctypes.c_size_t(0))
        _tuned = False


def release_host_memory() -> int:
    """Give back to the system what the ops keep of large outputs on the CPU and no tensor uses any more.

    The ops keep up to 512 MiB, or what they needed at once if that was more, but at most an eighth of the
    memory that the machine has or its container allows, since fresh memory costs more than their arithmetic;
    a block that nothing fits for a while goes by itself. Worth a call between two jobs of one process, not
    between two steps.

    Returns:
        How many bytes that were.
    """
    return int(torch.ops.tolaria.release_idle_outputs()) if _extension.LOADED else 0


def tune_host_allocator() -> HostAllocatorTuning:
    """Let the C library keep freed memory for the next tensors, instead of giving it back to the system.

    By default glibc returns blocks of some megabytes to the system when they are freed, and the next tensor
    of that size pays a page fault for every 4 KiB: for large activations on the CPU more than the arithmetic.
    Call it once, before training. It holds for the whole process and every thread; the process then stays at
    its peak of host memory until it ends, or until ``undo()``. Calling it again changes nothing.

    Returns:
        What was set; its ``undo()`` sets glibc's initial values again.

    Raises:
        TolariaError: the process does not allocate through glibc (macOS, Windows, musl, a preloaded
            allocator), or glibc refused; nothing is changed then.
    """
    global _tuned
    libc, version = _glibc()
    changed = not _tuned
    if changed:
        for parameter, value in _KEEPING.items():
            if libc.mallopt(parameter, value) != 1:
                raise TolariaError(
                    f"tune_host_allocator: glibc {version} refused mallopt({parameter}, {value})"
                )
        _tuned = True
    return HostAllocatorTuning(glibc=version, changed=changed)


class _Place(ctypes.Structure):
    """``Dl_info`` of dlfcn.h."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _glibc() -> tuple[ctypes.CDLL, str]:
    """The C library and its version, if ``malloc`` is its own."""
    try:
        libc = ctypes.CDLL(None)
        version, mallopt, malloc = libc.gnu_get_libc_version, libc.mallopt, libc.malloc
    except (OSError, TypeError, AttributeError):
        raise TolariaError(
            "tune_host_allocator: expected a process on glibc (Linux), found another C library; "
            "nothing was changed, and nothing needs to be"
        ) from None
    version.restype = ctypes.c_char_p
    if _file_of(libc, malloc) != _file_of(libc, mallopt):
        raise TolariaError(
            f"tune_host_allocator: malloc is that of {_file_of(libc, malloc)}, not glibc's; "
            "nothing was changed; tune that allocator by its own means"
        )
    return libc, version().decode()


def _file_of(libc: ctypes.CDLL, function: object) -> str:
    """The file that a function was loaded from."""
    place = _Place()
    libc.dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(place))  # type: ignore[arg-type]
    return (place.file or b"?").decode()
