"""The features that pass through a seed slot: found in what a host's module returns, and laid out alike."""

from __future__ import annotations

from torch import Tensor


def features_of(output: object, slot: str) -> Tensor:
    """The features in what an injection point returned: a tensor, or a tuple that begins with one.

    Raises:
        TypeError: anything else.
    """
    first = output[0] if isinstance(output, tuple) and output else output
    if isinstance(first, Tensor):
        return first
    got = type(output).__name__
    if isinstance(output, tuple):
        got += f" that begins with {type(first).__name__}" if output else " that is empty"
    raise TypeError(
        f"slot {slot!r}: expected its injection point to return a tensor or a tuple that begins with one, "
        f"got {got}; name a submodule that returns a tensor"
    )


def with_strides_of(features: Tensor, beside: Tensor) -> Tensor:
    """``beside`` laid out as ``features`` are, gaps included (those of a slice).

    A layer that follows may choose its kernel by strides, and another kernel rounds differently. Features
    that overlap themselves (expanded ones) cannot be copied so and stay dense.
    """
    if beside.stride() == features.stride():
        return beside
    extent = 1  # of the dimensions with smaller strides, from first to last element
    for stride, size in sorted(zip(features.stride(), features.shape, strict=True)):
        if size > 1 and stride < extent:
            return beside
        extent += stride * (size - 1)
    return beside.new_empty_strided(features.shape, features.stride()).copy_(beside)
