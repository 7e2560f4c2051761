"""Which implementation the ops use: the compiled extension or the pure-PyTorch reference.

One process-wide mode, read by every wrapper in :mod:`tolaria.ops` through :func:`fused`. It is a plain module
global so that ``torch.compile`` can guard on it.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from types import TracebackType
from typing import Literal, get_args

import torch
from torch import Tensor

from tolaria import _extension
from tolaria.errors import ConfigError, ExtensionMissingError

Mode = Literal["auto", "fused", "reference"]


def _checked(mode: str, source: str) -> Mode:
    if mode not in get_args(Mode):
        raise ConfigError(f"{source}: expected one of 'auto', 'fused', 'reference', got {mode!r}")
    if mode == "fused" and not _extension.LOADED:
        raise ExtensionMissingError(f"{source}: 'fused' needs the extension. {_extension.LOAD_ERROR}")
    return mode  # type: ignore[return-value]


def _as_bytes(text: str, source: str) -> int:
    """``text`` as a number of bytes: ``"16777216"``, ``"16M"``, ``"inf"``.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"(\d{1,12})([KMG]?)|inf", text.strip(), re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{source}: expected bytes, such as 16777216, 16M, 0 or inf, got {text!r}")
    if match[1] is None:
        return _NEVER
    return min(_NEVER, int(match[1]) << 10 * " KMG".index(match[2].upper() or " "))


_NEVER = 2**63 - 1
_stream_above = os.environ.get("TOLARIA_STREAM_ABOVE")
if _stream_above is not None:
    _bytes = _as_bytes(_stream_above, "TOLARIA_STREAM_ABOVE")
    if _extension.LOADED:
        _extension.set_stream_above(_bytes)

_mode: Mode = _checked(os.environ.get("TOLARIA_BACKEND", "auto"), "TOLARIA_BACKEND")
_warned = set[str]()

fused_on_cpu = _extension.LOADED and _mode != "reference"
"""What :func:`fused` says of a tensor in CPU memory, without a call."""


without_kernels: dict[int, str] = {}
"""By index, the CUDA devices that the extension was not built for, each with what is to be said of it."""


def _look_at_devices() -> None:
    """Fill :data:`without_kernels`, once, as soon as torch has initialised CUDA."""
    info = _extension.INFO
    if not _extension.CUDA or info is None:
        return
    without_kernels.clear()
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if not _extension.has_kernels_for(info.archs, (major, minor)):
            without_kernels[index] = (
                f"cuda:{index}: expected a device for which the extension has kernels "
                f"({';'.join(info.archs)}), got {torch.cuda.get_device_name(index)} of compute capability "
                f"{major}.{minor}; set TORCH_CUDA_ARCH_LIST={major}.{minor} and run "
                f"{_extension.rebuild_command(_extension.FOLDER)}"
            )


if _extension.CUDA:
    torch.cuda._lazy_call(_look_at_devices)  # type: ignore[no-untyped-call]


def devices_without_kernels() -> dict[int, str]:
    """:data:`without_kernels`, after having CUDA initialised where there is a device."""
    if _extension.CUDA and torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # a device that does not work is torch's to tell
            torch.cuda.init()  # type: ignore[no-untyped-call]
    return without_kernels


class BackendHandle:
    """What :func:`backend` returns after a change: a context manager that restores it on exit."""

    def __init__(self, former: Mode, mode: Mode) -> None:
        self._former = former
        self.mode = mode

    def __enter__(self) -> Mode:
        return self.mode

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        _set(self._former)

    def __repr__(self) -> str:
        return f"<tolaria backend {self.mode!r}, formerly {self._former!r}>"


def _set(mode: Mode) -> None:
    global _mode, fused_on_cpu
    _mode = mode
    fused_on_cpu = _extension.LOADED and mode != "reference"


def current_mode() -> Mode:
    """The mode in force: ``"auto"``, ``"fused"`` or ``"reference"``."""
    return _mode


def backend(mode: Mode) -> BackendHandle:
    """Choose the implementation of every tolaria op, for the whole process.

    Args:
        mode: ``"auto"`` uses the compiled extension where it can and the reference elsewhere, ``"fused"``
            insists on the extension, ``"reference"`` is pure PyTorch.

    Returns:
        A handle; used in a ``with`` statement it restores the former mode at the end.

    Raises:
        ConfigError: ``mode`` is none of the three.
        ExtensionMissingError: ``"fused"`` without a built extension.
    """
    handle = BackendHandle(_mode, _checked(mode, "backend(mode)"))
    _set(handle.mode)
    return handle


def fused(tensor: Tensor) -> bool:
    """Whether an op on ``tensor`` goes to the compiled extension under the mode in force."""
    if _mode == "reference":
        return False
    if _extension.LOADED and (tensor.is_cpu or tensor.is_meta):
        return True
    if (
        _extension.CUDA
        and tensor.is_cuda
        and not (without_kernels and tensor.device.index in without_kernels)
    ):
        return True
    unfit = without_kernels.get(tensor.device.index) if tensor.is_cuda else None
    if _mode == "fused":
        kind = f"the extension has no kernels for device {tensor.device.type!r}; `tolaria doctor` says why"
        raise ExtensionMissingError(f"backend 'fused': {unfit or kind}")
    if unfit is not None:
        _warn_once(unfit)
    elif not _extension.LOADED:
        _warn_once(str(_extension.LOAD_ERROR))
    return False


def _warn_once(why: str) -> None:
    if why not in _warned:
        _warned.add(why)
        warnings.warn(
            f"tolaria runs in pure PyTorch. {why} (TOLARIA_BACKEND=reference silences this warning)",
            RuntimeWarning,
            stacklevel=4,
        )
