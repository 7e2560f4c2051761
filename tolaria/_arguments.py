"""Looks at the types of arguments; what does not fit is named, with what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def check_each(name: str, values: object, wanted: str, fits: Callable[[object], bool]) -> None:
    """``values`` must be a sequence of what ``fits``.

    Raises:
        TypeError: it is none, or holds something else.
    """
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{name}: expected a sequence of {wanted}, got {type(values).__name__}")
    for i, value in enumerate(values):
        if not fits(value):
            raise TypeError(f"{name}[{i}]: expected {wanted}, got {type(value).__name__}")


def check_optional(name: str, value: object, wanted: type) -> None:
    """``value`` must be None or a ``wanted``.

    Raises:
        TypeError: it is neither.
    """
    if value is not None and not isinstance(value, wanted):
        raise TypeError(f"{name}: expected {wanted.__name__} or None, got {type(value).__name__}")


def check_choice(name: str, value: object, choices: Sequence[str] | Sequence[int]) -> None:
    """``value`` must be one of some words or numbers; True is no 1.

    Raises:
        ValueError: it is another.
    """
    fits = (value == choice and isinstance(value, type(choice)) for choice in choices)
    if isinstance(value, bool) or not any(fits):
        raise ValueError(f"{name}: expected {' or '.join(map(repr, choices))}, got {value!r}")


def as_flag(name: str, value: object) -> bool:
    """``value`` as a bool.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: expected a bool or a tensor of one element, got {type(value).__name__}")
    return bool(value)


def as_number(name: str, value: object) -> float:
    """``value`` as a float.

    Raises:
        TypeError: it is no number.
        ValueError: no float can hold it.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        raise TypeError(
            f"{name}: expected a number or a floating tensor of one element, got {type(value).__name__}"
        )
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number that a float can hold, got a larger one") from None
