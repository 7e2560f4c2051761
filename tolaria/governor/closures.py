"""Calls of ``optimizer.step`` as its hooks see them: the closure that came along, and which call it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from torch.optim import Optimizer

from tolaria.snapshot.covered import CoveredState

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
R = TypeVar("R")
Hook = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], R]


def outermost(hook: Hook[R], covered: CoveredState) -> Hook[R | None]:
    """``hook``, but not where a class calls the step that it inherits, nor for an optimizer that was removed.

    torch calls the hooks around each of the two steps: what one has begun the other must not end.

    Args:
        hook: before or behind a step.
        covered: knows which optimizers are governed still.
    """

    @wraps(hook)
    def once(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> R | None:
        if not any(optimizer is known for known in covered.optimizers):
            return None
        if _inherits_a_step(optimizer) and _is_inherited_call(optimizer):
            return None
        return hook(optimizer, args, kwargs)

    return once


def is_of_torch(optimizer: Optimizer) -> bool:
    """Whether its step is one of torch's own, of which is known when it does nothing; no subclass's is."""
    return type(optimizer).__module__.startswith("torch.optim")


def _inherits_a_step(optimizer: Optimizer) -> bool:
    of_classes = [vars(kind)["step"] for kind in type(optimizer).__mro__ if "step" in vars(kind)]
    return sum(hasattr(step, "hooked") for step in of_classes) > 1


def _is_inherited_call(optimizer: Optimizer) -> bool:
    """Whether another of torch's wrappers that call the hooks is at work, around the one that calls now."""
    calling = sys._getframe(2)
    frame = calling.f_back
    while frame is not None:
        if frame.f_code is calling.f_code and frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False


def closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
    """The closure among the arguments of a step, the first of which is the optimizer; None: there is none."""
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    return closure if callable(closure) else None


def with_closure(args: tuple[Any, ...], kwargs: dict[str, Any], closure: Callable[..., Any]) -> Arguments:
    """The same arguments with another closure in the place of theirs."""
    if len(args) > 1:
        return (args[0], closure, *args[2:]), kwargs
    return args, {**kwargs, "closure": closure}
