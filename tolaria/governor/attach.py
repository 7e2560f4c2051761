"""What attaching needs: checked arguments, one device, the engine for it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tolaria import ops
from tolaria.governor.config import GovernorConfig
from tolaria.governor.device_engine import DeviceEngine
from tolaria.governor.engine import Engine, HostEngine
from tolaria.governor.events import MailboxReader
from tolaria.governor.memory import allocate
from tolaria.governor.tracked import TrackedState


def make_mailbox(n: int, records: int, device: torch.device) -> Tensor:
    """A mailbox from which ``records`` events can be read; page-locked for CUDA, whose device writes it."""
    empty = ops.governor_mailbox(n, records=records + 1)  # one may be half written
    if device.type != "cuda":
        return empty
    return allocate(empty.numel() * 8, device).view(torch.float64).view(empty.shape).zero_()


def make_engine(
    column: int,
    state: Tensor,
    config: GovernorConfig,
    settings: Tensor,
    mailbox: Tensor,
    reader: MailboxReader,
    tracked: TrackedState,
) -> Engine:
    """The engine for the device that ``tracked`` is on."""
    kind = DeviceEngine if tracked.device.type == "cuda" else HostEngine
    return kind(column, state, config, settings, mailbox, reader, tracked)


def checked_optimizers(model: nn.Module, optimizers: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    """The optimizers as a list, after a look at the types.

    Raises:
        TypeError: the model is no module, or an optimizer none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    listed = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    for i, optimizer in enumerate(listed):
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizers[{i}]: expected a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
    return listed


def check_settings(config: GovernorConfig | None, scaler: torch.amp.GradScaler | None) -> None:
    """A look at the types of the optional arguments.

    Raises:
        TypeError: one is neither None nor of its type.
    """
    for name, value, wanted in (
        ("config", config, GovernorConfig),
        ("scaler", scaler, torch.amp.GradScaler),
    ):
        if value is not None and not isinstance(value, wanted):
            raise TypeError(f"{name}: expected {wanted.__name__} or None, got {type(value).__name__}")


def as_number(name: str, value: object) -> float:
    """``value`` as a float.

    Raises:
        TypeError: it is no number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        raise TypeError(
            f"{name}: expected a number or a floating tensor of one element, got {type(value).__name__}"
        )
    return float(value)


def single_device(model: nn.Module, optimizers: Sequence[Optimizer]) -> torch.device:
    """The one device that the model's parameters are on; the optimizers' if it has none.

    Raises:
        RuntimeError: they are on several.
    """
    parameters = list(model.parameters()) or [
        p for o in optimizers for g in o.param_groups for p in g["params"]
    ]
    devices = {p.device for p in parameters}
    if len(devices) > 1:
        raise RuntimeError(
            f"model: its parameters are on {', '.join(sorted(map(str, devices)))}; one governor covers one "
            "device, so put the model on one or give each part a governor of its own"
        )
    return devices.pop() if devices else torch.device("cpu")


def resolve_random_guess_loss(num_classes: int | None, random_guess_loss: float | None) -> float | None:
    """The loss of guessing: as given, or ln(num_classes), or None.

    Raises:
        ValueError: ``num_classes`` below 2, or a loss that is not positive and finite.
    """
    if random_guess_loss is not None:
        if not (isinstance(random_guess_loss, int | float) and 0 < random_guess_loss < math.inf):
            raise ValueError(
                f"random_guess_loss: expected a positive finite number, got {random_guess_loss!r}"
            )
        return float(random_guess_loss)
    if num_classes is None:
        return None
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
        raise ValueError(f"num_classes: expected an integer of at least 2, got {num_classes!r}")
    return math.log(num_classes)
