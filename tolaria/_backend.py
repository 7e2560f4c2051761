"""Which implementation the ops use: the compiled extension or the pure-PyTorch reference.

One process-wide mode, read by every wrapper in :mod:`tolaria.ops` through :func:`fused`. It is a plain module
global so that ``torch.compile`` can guard on it.
"""

from __future__ import annotations

import os
import warnings
from types import TracebackType
from typing import Literal, get_args

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


_mode: Mode = _checked(os.environ.get("TOLARIA_BACKEND", "auto"), "TOLARIA_BACKEND")
_warned = False

fused_on_cpu = _extension.LOADED and _mode != "reference"
"""What :func:`fused` says of a tensor in CPU memory, without a call."""


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
    if _extension.LOADED and (tensor.is_cpu or tensor.is_meta or (_extension.CUDA and tensor.is_cuda)):
        return True
    if _mode == "fused":
        raise ExtensionMissingError(
            f"backend 'fused': the extension has no kernels for device {tensor.device.type!r}; "
            "`tolaria doctor` says why"
        )
    if not _extension.LOADED:
        _warn_once()
    return False


def _warn_once() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"tolaria runs in pure PyTorch. {_extension.LOAD_ERROR} "
            "(TOLARIA_BACKEND=reference silences this warning)",
            RuntimeWarning,
            stacklevel=4,
        )
