"""The argument checks of the governor and snapshot ops, in the words of ``csrc/common/governor_checks.h``."""

from __future__ import annotations

import torch
from torch import Tensor

from tolaria.reference._checks import dtype_name, has_memory
from tolaria.reference.governor_layout import (
    CAPTURE_PARTS,
    MAX_WINDOW,
    ConfigField,
    MemoryField,
    Order,
    PanicReason,
    RecordField,
    StateField,
    StatusField,
)


def check_governors(state: Tensor, config: Tensor | None, mailbox: Tensor | None) -> None:
    """State, settings and mailbox must have the layouts of :mod:`tolaria.reference.governor_layout`.

    Raises:
        ValueError: one has not, or is on another device.
    """
    _check_state(state)
    if config is not None:
        fits = config.dtype == torch.float64 and config.shape == (len(ConfigField),)
        if not fits or not config.is_contiguous():
            raise ValueError(f"config: expected {len(ConfigField)} float64 values, got {_said(config)}")
        _check_device(state, config, "config")
        _check_memory(config, "config")
    if mailbox is not None:
        _check_mailbox(state, mailbox)


def _check_state(state: Tensor) -> None:
    fits = state.dtype == torch.float64 and state.dim() == 2
    if not fits or not (1 in (state.stride(1), state.shape[1]) and state.stride(0) >= state.shape[1]):
        raise ValueError(
            "state: expected a float64 matrix (fields, governors) whose rows are contiguous, got "
            f"{_said(state)} and strides {list(state.stride())}"
        )
    memories = state.shape[0] - len(StateField)
    windows = memories // 3 - len(MemoryField)
    if memories % 3 or windows % 2 or not 1 <= windows // 2 <= MAX_WINDOW:
        raise ValueError(
            f"state: {state.shape[0]} fields fit no window length; make it with tolaria.ops.governor_state"
        )
    _check_memory(state, "state")


def _check_mailbox(state: Tensor, mailbox: Tensor) -> None:
    n, status, record = state.shape[1], len(StatusField), len(RecordField)
    fits = mailbox.dtype == torch.float64 and mailbox.dim() == 2 and mailbox.is_contiguous()
    if not fits or mailbox.shape[0] != n or mailbox.shape[1] < status or (mailbox.shape[1] - status) % record:
        raise ValueError(
            f"mailbox: expected a contiguous float64 matrix (governors, {status} + k * {record}) for {n} "
            f"governors, got {_said(mailbox)}"
        )
    if not (mailbox.is_cpu and (state.is_cpu or mailbox.is_pinned())):
        wanted = "CPU memory" if state.is_cpu else "page-locked CPU memory"
        raise ValueError(f"mailbox: expected in {wanted}, got on {mailbox.device}")
    _check_memory(mailbox, "mailbox")


def _several_values_hint(n: int, name: str, count: int) -> str:
    """What to do with a loss for each sample, or a flag, where one governor judges one number."""
    if n != 1 or count < 2 or name == "gradient":
        return ""
    return f"; pass {name}.{'mean' if name == 'loss' else 'any'}()"


def check_samples(
    state: Tensor,
    loss: Tensor,
    nonfinite: Tensor | None,
    active: Tensor | None,
    gradient: Tensor | None,
    state_bad: Tensor | None = None,
) -> None:
    """What is judged: one value for each governor, of a floating dtype (flags may be bool).

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not fit.
    """
    n = state.shape[1]
    if not _is_floating(loss):
        raise TypeError(f"loss: expected float64, float32, float16 or bfloat16, got {dtype_name(loss.dtype)}")
    rows = gradient is not None and gradient.dtype == torch.float64 and gradient.numel() == 4 * n
    given = {"loss": loss, "nonfinite": nonfinite, "active": active, "gradient": gradient}
    given["state_bad"] = state_bad
    for name, values in given.items():
        if values is None:
            continue
        if name == "gradient" and not _is_floating(values):
            raise TypeError(
                f"gradient: expected float64, float32, float16 or bfloat16, got {dtype_name(values.dtype)}"
            )
        if values.dtype != torch.bool and not _is_floating(values):
            raise TypeError(
                f"{name}: expected bool (or a floating found_inf), got {dtype_name(values.dtype)}"
            )
        if values.numel() != n and not (name == "gradient" and rows):
            raise ValueError(
                f"{name}: expected one value for each of the {n} governors, got shape {list(values.shape)}"
                f"{_several_values_hint(n, name, values.numel())}"
            )
        _check_device(state, values, name)
        _check_memory(values, name)


def check_column(state: Tensor, column: int) -> None:
    """``column`` must be a governor of ``state``.

    Raises:
        ValueError: it is not.
    """
    if not 0 <= column < state.shape[1]:
        raise ValueError(f"column: expected 0 to {state.shape[1] - 1}, got {column}")


def check_order(order: int, reason: int) -> None:
    """Both must be known numbers.

    Raises:
        ValueError: one is not.
    """
    for name, value, known in (("order", order, len(Order)), ("reason", reason, len(PanicReason))):
        if not 0 <= value < known:
            raise ValueError(f"{name}: expected 0 to {known - 1}, got {value}")


def check_part(part: int) -> None:
    """``part`` must be one of a capture's.

    Raises:
        ValueError: it is not.
    """
    if not 0 <= part < CAPTURE_PARTS:
        raise ValueError(f"part: expected 0 or 1, got {part}")


def _is_floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() >= 2


def _check_device(state: Tensor, tensor: Tensor, name: str) -> None:
    if tensor.device != state.device:
        raise ValueError(f"{name}: expected on {state.device} like state, got {tensor.device}")


def _check_memory(tensor: Tensor, name: str) -> None:
    if not has_memory(tensor):
        raise ValueError(
            f"{name}: expected memory for its {tensor.numel()} elements, "
            "got a storage that was resized to less"
        )


def _said(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} of shape {list(tensor.shape)}"
