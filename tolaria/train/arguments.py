"""Checks of what the loops and the validation are given, before anything is touched."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import get_args

from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from tolaria.tasks.spec import TaskType


def check_task_type(task_type: object) -> None:
    """Raise ValueError unless ``task_type`` is one of those there are."""
    if task_type not in get_args(TaskType):
        raise ValueError(f"task_type: expected one of {get_args(TaskType)}, got {task_type!r}")


def check_model_and_criterion(model: object, criterion: object) -> None:
    """Raise TypeError unless the one is a module and the other can be called."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if not callable(criterion):
        raise TypeError(
            f"criterion: expected a callable of logits and targets, got {type(criterion).__name__}"
        )


def check_loader(name: str, loader: object) -> None:
    """Raise TypeError unless ``loader`` can be iterated."""
    if not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise TypeError(f"{name}: expected an iterable of batches, got {type(loader).__name__}")


def check_optimizer(name: str, optimizer: object) -> None:
    """Raise TypeError unless ``optimizer`` is one, or does what one does."""
    if not isinstance(optimizer, Optimizer) and not all(
        hasattr(optimizer, each) for each in ("param_groups", "zero_grad", "step")
    ):
        raise TypeError(f"{name}: expected a torch optimizer, got {type(optimizer).__name__}")


def check_norm(name: str, norm: object) -> None:
    """Raise ValueError unless ``norm`` is a number above 0, or None."""
    if norm is not None and not (isinstance(norm, Real) and float(norm) > 0):
        raise ValueError(f"{name}: expected a number above 0 or None, got {norm!r}")


def check_count(name: str, value: object, least: int, *, optional: bool = False) -> None:
    """Raise ValueError unless ``value`` is an integer >= ``least`` (or None where that is allowed)."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(
            f"{name}: expected an integer >= {least}{' or None' if optional else ''}, got {value!r}"
        )


def check_scaler(scaler: object) -> None:
    """Raise TypeError unless ``scaler`` is a GradScaler, or None."""
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise TypeError(f"scaler: expected a torch.amp.GradScaler or None, got {type(scaler).__name__}")


def check_steppers(name: str, steppers: object) -> None:
    """Raise TypeError unless ``steppers`` is a sequence of schedules that step without an argument."""
    if not isinstance(steppers, Sequence) or not all(callable(getattr(s, "step", None)) for s in steppers):
        hint = f"; pass [{name[:-1]}]" if hasattr(steppers, "step") else ""
        raise TypeError(f"{name}: expected a sequence of objects with a step method, got {steppers!r}{hint}")
    if any(isinstance(each, ReduceLROnPlateau) for each in steppers):
        raise TypeError(f"{name}: ReduceLROnPlateau needs a metric; step it yourself after validation")


def check_calls(name: str, value: object, calls: Sequence[str]) -> None:
    """Raise TypeError unless ``value`` has every method or attribute in ``calls``, or is None."""
    missing = [each for each in calls if value is not None and not hasattr(value, each)]
    if missing:
        raise TypeError(
            f"{name}: expected an object with {', '.join(calls)}, or None, got {type(value).__name__}"
        )
