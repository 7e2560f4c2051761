"""Comparing state dicts bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def assert_same(left: Any, right: Any) -> None:
    """Equal in types, order and bits, through containers; NaN is NaN, wherever the tensors are."""
    assert type(left) is type(right)
    if isinstance(left, Tensor):
        assert left.dtype == right.dtype
        torch.testing.assert_close(left.cpu(), right.cpu(), rtol=0, atol=0, equal_nan=True)
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    else:
        assert left == right
