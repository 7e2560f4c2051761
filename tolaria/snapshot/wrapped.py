"""Tensors that wrap others, as quantised optimizer state does: the tensors inside have the bytes.

Such a tensor says by torch's protocol (``__tensor_flatten__``) what is inside of it and how another is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

InnerPath = tuple[str, ...]
"""Names of attributes, from the tensor that wraps to one inside; empty: the tensor itself."""


def is_wrapper(value: object) -> bool:
    """Whether ``value`` is a tensor whose bytes are those of others inside; a shard is none."""
    if type(value) is Tensor or not isinstance(value, Tensor):
        return False
    return is_traceable_wrapper_subclass(value) and not hasattr(value, "placements")


def inner_tensors(tensor: Tensor) -> Iterator[tuple[InnerPath, Tensor]]:
    """What has the bytes of ``tensor``, by path: the tensors inside at any depth, or itself."""
    if not is_wrapper(tensor):
        yield (), tensor
        return
    for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
        for path, inner in inner_tensors(getattr(tensor, name)):
            yield (name, *path), inner


def put_inner(tensor: Tensor, path: InnerPath, inner: Tensor) -> None:
    """Make ``inner`` what is at ``path`` in ``tensor``."""
    holder = tensor
    for name in path[:-1]:
        holder = getattr(holder, name)
    setattr(holder, path[-1], inner)


def is_like(value: object, tensor: Tensor) -> bool:
    """Whether ``value`` wraps tensors as ``tensor`` does, so that their bytes make it the same."""
    if type(value) is not type(tensor) or not isinstance(value, Tensor):
        return False
    if not is_wrapper(tensor):
        return True
    (names, context), (others, other) = tensor.__tensor_flatten__(), value.__tensor_flatten__()  # type: ignore[attr-defined]
    if (value.shape, value.dtype, others) != (tensor.shape, tensor.dtype, names):
        return False
    try:
        is_same = bool(context == other)
    except (RuntimeError, ValueError, TypeError):  # what cannot be compared may be another
        is_same = False
    return is_same and all(is_like(getattr(value, name), getattr(tensor, name)) for name in names)


def with_inner_tensors(tensor: Tensor, made: Callable[[InnerPath, Tensor], Tensor]) -> Tensor:
    """Another tensor like ``tensor``.

    Args:
        tensor: wraps others.
        made: gives what the other one has in place of a tensor inside, given its path and itself.
    """
    names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]

    def part(name: str) -> Tensor:
        inner: Tensor = getattr(tensor, name)
        if is_wrapper(inner):
            return with_inner_tensors(inner, lambda path, each: made((name, *path), each))
        return made((name,), inner)

    parts = {name: part(name) for name in names}
    again: Tensor = type(tensor).__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())  # type: ignore[attr-defined]
    return again
