"""Argument checks of the reference ops and of the fakes, in the words of ``csrc/common/checks.h``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` rather than ``torch.float32``, as the compiled checks print it."""
    return str(dtype).removeprefix("torch.")


def layout_name(layout: torch.layout) -> str:
    """``Sparse`` rather than ``torch.sparse_coo``, as the compiled checks print it."""
    return "".join(
        part.title() for part in str(layout).removeprefix("torch.").removesuffix("_coo").split("_")
    )


def check_tensors(op: str, **arguments: object) -> None:
    """Every argument must be a tensor.

    Raises:
        TypeError: one of them is not.
    """
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            hint = "; pass torch.tensor(value, device=...)" if isinstance(value, (int, float)) else ""
            raise TypeError(f"tolaria.{op}: {name}: expected a Tensor, got {type(value).__name__}{hint}")


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    """The tensor must be strided and of one of the four floating dtypes.

    Raises:
        TypeError: it is not.
    """
    if tensor.layout != torch.strided:
        raise TypeError(f"tolaria.{op}: {name}: expected a strided tensor, got {layout_name(tensor.layout)}")
    if tensor.dtype not in _FLOATING:
        raise TypeError(
            f"tolaria.{op}: {name}: expected dtype float32, float64, float16 or bfloat16, "
            f"got {dtype_name(tensor.dtype)}"
        )


def check_same_device(op: str, name: str, tensor: Tensor, owner: str, other: Tensor) -> None:
    """The two tensors must be on one device.

    Raises:
        ValueError: they are not.
    """
    if tensor.device != other.device:
        raise ValueError(
            f"tolaria.{op}: {name}: expected {owner}'s device {other.device}, got {tensor.device}; "
            f"move it with {name}.to('{other.device}')"
        )


def check_same_shape(op: str, name: str, tensor: Tensor, owner: str, other: Tensor) -> None:
    """The two tensors must have one shape.

    Raises:
        ValueError: they have not.
    """
    if tensor.shape != other.shape:
        raise ValueError(
            f"tolaria.{op}: {name}: expected {owner}'s shape {list(other.shape)}, got {list(tensor.shape)}"
        )


def broadcasts_to(source: Sequence[int], target: Sequence[int]) -> bool:
    """Whether NumPy's rules stretch ``source`` to exactly ``target``."""
    if len(source) > len(target):
        return False
    tail = target[len(target) - len(source) :]
    return all(have in (1, want) for have, want in zip(source, tail, strict=True))


def check_alpha(op: str, alpha: Tensor, owner: str, other: Tensor) -> None:
    """Alpha must be floating, on ``other``'s device, and broadcast to its shape.

    Raises:
        TypeError: its dtype is not floating.
        ValueError: its device or shape does not fit.
    """
    check_floating(op, "alpha", alpha)
    check_same_device(op, "alpha", alpha, owner, other)
    if not broadcasts_to(alpha.shape, other.shape):
        raise ValueError(
            f"tolaria.{op}: alpha: expected a shape that broadcasts to {owner}'s {list(other.shape)}, "
            f"got {list(alpha.shape)}"
        )


def check_pair(op: str, host: Tensor, seed: Tensor) -> None:
    """Host and seed must be floating, of one shape, on one device.

    Raises:
        TypeError: a dtype is not floating.
        ValueError: shapes or devices differ.
    """
    check_floating(op, "host", host)
    check_floating(op, "seed", seed)
    check_same_device(op, "seed", seed, "host", host)
    check_same_shape(op, "seed", seed, "host", host)


def arithmetic_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 when one of the tensors is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
