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


def has_memory(tensor: Tensor) -> bool:
    """Whether the tensor's storage holds all its elements, which ``untyped_storage().resize_`` may undo.

    torch reads beyond the end of one that does not. What is no plain tensor with memory (a subclass, a
    tracer's or a functional transform's) is taken at its word.
    """
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return True
    if tensor.numel() == 0 or tensor.is_meta or tensor._is_zerotensor():
        return True
    try:
        size = tensor.untyped_storage().nbytes()
    except NotImplementedError:
        return True
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return size >= (tensor.storage_offset() + last + 1) * tensor.itemsize


def check_memory(op: str, name: str, tensor: Tensor) -> None:
    """The tensor's storage must hold all its elements.

    Raises:
        ValueError: it was resized to less.
    """
    if not has_memory(tensor):
        raise ValueError(
            f"tolaria.{op}: {name}: expected memory for its {tensor.numel()} elements, "
            "got a storage that was resized to less"
        )


def check_strided(where: str, tensor: Tensor) -> None:
    """The tensor must be an ordinary one: neither sparse nor nested nor of a library's own layout.

    Raises:
        TypeError: it is not.
    """
    if tensor.is_nested or tensor.layout != torch.strided:
        got = "a nested one" if tensor.is_nested else layout_name(tensor.layout)
        raise TypeError(f"{where}: expected a strided tensor, got {got}")


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    """The tensor must be strided, of one of the four floating dtypes, and hold its elements.

    Raises:
        TypeError: it is sparse or nested, or its dtype is another.
        ValueError: its storage was resized to less.
    """
    check_strided(f"tolaria.{op}: {name}", tensor)
    if tensor.dtype not in _FLOATING:
        raise TypeError(
            f"tolaria.{op}: {name}: expected dtype float32, float64, float16 or bfloat16, "
            f"got {dtype_name(tensor.dtype)}"
        )
    check_memory(op, name, tensor)


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
