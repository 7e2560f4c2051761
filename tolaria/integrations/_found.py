"""What an adapter finds by itself in a trainer, and how it says so."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_log = logging.getLogger("tolaria.integrations")


def world() -> ProcessGroup | None:
    """The group of all ranks, or None if there is but one."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


def is_first_rank() -> bool:
    """Whether this process is the one that speaks."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def say(trainer: str, **parts: object) -> None:
    """Log once, on rank 0, what was found; None stands for nothing.

    Args:
        trainer: whose.
        **parts: what was found, by what it is.
    """
    if is_first_rank():
        found = ", ".join(f"{name} {_said(part)}" for name, part in parts.items())
        _log.info("tolaria in %s: %s", trainer, found)


def _said(part: object) -> str:
    if part is None or (isinstance(part, list | tuple | dict) and not part):
        return "none"
    if isinstance(part, dict):
        return "+".join(map(str, part))
    if isinstance(part, list | tuple):
        return "+".join(map(_said, part))
    if isinstance(part, str | int | float):
        return str(part)
    return type(part).__name__


def classes_of(module: nn.Module) -> int | None:
    """The number of classes that a model says it tells apart, where it says so; None: it does not.

    Looked for are ``num_classes`` and ``num_labels`` on the module, on its ``hparams`` and its ``config``. Of
    a regression, or of several labels at a time, there is no loss of guessing: None.
    """
    for holder in (module, getattr(module, "hparams", None), getattr(module, "config", None)):
        if getattr(holder, "problem_type", None) not in (None, "single_label_classification"):
            return None
        for name in ("num_classes", "num_labels"):
            value = holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value >= 2:
                return value
    return None
