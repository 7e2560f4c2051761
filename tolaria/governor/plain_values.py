"""Plain values, as strict JSON knows them: how a saved form is written, and what may be read back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

_ODD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_DEEPEST = 5
"""Levels of lists and dicts in a saved form: the thresholds of a report are the deepest."""


def plain(value: object) -> Any:  # noqa: ANN401  (whatever JSON holds)
    """``value`` in what strict JSON knows: lists for tuples, words for NaN and infinity, plain numbers."""
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float):  # NumPy's is one
        return float(value) if math.isfinite(value) else str(float(value))
    return int(value) if is_integer(value) else value


def revived(value: object, depth: int = _DEEPEST) -> Any:  # noqa: ANN401  (as above)
    """What :func:`plain` was made of, but for tuples; a tensor's name may be any word."""
    if isinstance(value, str):
        return _ODD.get(value, value)
    if depth and isinstance(value, Mapping):
        return {k: v if k == "tensor_name" else revived(v, depth - 1) for k, v in value.items()}
    if depth and isinstance(value, list | tuple):
        return [revived(part, depth - 1) for part in value]
    return value


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a plain number that a float64 can hold; NaN and infinity are."""
    return isinstance(value, float) or (is_integer(value) and abs(value) <= 10**300)


def is_integer(value: object) -> TypeGuard[int]:
    """Whether it is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def said(value: object) -> str:
    """A value for a message: itself if it is plain and short, else its type."""
    is_plain = value is None or isinstance(value, bool | float | str) or is_number(value)
    text = repr(value) if is_plain else ""
    return text if text and len(text) <= 60 else type(value).__name__
