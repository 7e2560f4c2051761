"""What attaching needs: checked arguments, one device, the engine for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from tolaria import ops
from tolaria.governor.config import GovernorConfig
from tolaria.governor.device_engine import DeviceEngine
from tolaria.governor.engine import Engine, HostEngine
from tolaria.snapshot.covered import CoveredState
from tolaria.snapshot.memory import allocate
from tolaria.snapshot.protocols import Stateful
from tolaria.telemetry.mailbox import MailboxReader
from tolaria.telemetry.sinks import Sink


def make_mailbox(n: int, records: int, device: torch.device) -> Tensor:
    """A mailbox from which ``records`` events can be read; page-locked for CUDA, whose device writes it."""
    empty = ops.governor_mailbox(n, records=records + 1)  # one may be half written
    if device.type != "cuda":
        return empty
    return allocate(empty.numel() * 8, device).view(torch.float64).view(empty.shape).copy_(empty)


def make_engine(
    column: int,
    state: Tensor,
    config: GovernorConfig,
    settings: Tensor,
    mailbox: Tensor,
    reader: MailboxReader,
    covered: CoveredState,
) -> Engine:
    """The engine for the device that ``covered`` is on."""
    kind = DeviceEngine if covered.device.type == "cuda" else HostEngine
    return kind(column, state, config, settings, mailbox, reader, covered)


def checked_optimizers(model: nn.Module, optimizers: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    """The optimizers as a list, after a look at the types.

    Raises:
        TypeError: the model is no module, or an optimizer none.
        ValueError: an optimizer comes twice, or a parameter is not initialised yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if not isinstance(optimizers, Optimizer | Iterable) or isinstance(optimizers, Mapping | str):
        raise TypeError(
            "optimizers: expected a torch.optim.Optimizer or a sequence of them, got "
            f"{type(optimizers).__name__}"
        )
    listed = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    for i, optimizer in enumerate(listed):
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizers[{i}]: expected a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        if any(optimizer is earlier for earlier in listed[:i]):
            raise ValueError(f"optimizers[{i}]: expected each optimizer once, got one a second time")
    lazy = [name for name, tensor in _named_tensors(model) if is_lazy(tensor)]
    if lazy:
        raise ValueError(
            f"model: expected initialised parameters, got a lazy {lazy[0]}; run one forward before attaching"
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


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def check_listed(
    *,
    schedulers: Sequence[Stateful] = (),
    extras: Mapping[str, Stateful] | None = None,
    generators: Sequence[torch.Generator] = (),
    sinks: Sequence[Sink] = (),
) -> None:
    """A look at the types of what comes in sequences and mappings.

    Raises:
        TypeError: one is no sequence or mapping, or holds something else.
    """
    for name, values, wanted, fits in (
        ("schedulers", schedulers, "objects with state_dict and load_state_dict", _is_stateful),
        ("generators", generators, "torch.Generator", lambda v: isinstance(v, torch.Generator)),
        ("sinks", sinks, "callables", callable),
    ):
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise TypeError(f"{name}: expected a sequence of {wanted}, got {type(values).__name__}")
        for i, value in enumerate(values):
            if not fits(value):
                raise TypeError(f"{name}[{i}]: expected {wanted}, got {type(value).__name__}")
    if extras is not None and not isinstance(extras, Mapping):
        raise TypeError(f"extras: expected a mapping of names to objects, got {type(extras).__name__}")
    for key, value in (extras or {}).items():
        if not isinstance(key, str) or not _is_stateful(value):
            raise TypeError(
                f"extras[{key!r}]: expected a name and an object with state_dict and load_state_dict, got "
                f"{type(value).__name__}"
            )


def _is_stateful(value: object) -> bool:
    return isinstance(value, Stateful) and not isinstance(value, type)


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
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        raise TypeError(
            f"{name}: expected a number or a floating tensor of one element, got {type(value).__name__}"
        )
    return float(value)


def single_device(model: nn.Module, optimizers: Sequence[Optimizer]) -> torch.device:
    """The one device that the model's parameters are on; the optimizers' if it has none.

    Raises:
        RuntimeError: they are on several, or on one that is not supported.
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
    device = devices.pop() if devices else torch.device("cpu")
    if device.type not in ("cpu", "cuda"):
        raise RuntimeError(
            f"model: expected parameters on cpu or cuda, got them on {device}; move the model first"
        )
    return device


def resolve_random_guess_loss(num_classes: int | None, random_guess_loss: float | None) -> float | None:
    """The loss of guessing: as given, or ln(num_classes), or None.

    Raises:
        ValueError: ``num_classes`` below 2, or a loss that is not positive and finite.
    """
    if random_guess_loss is not None:
        is_number = isinstance(random_guess_loss, int | float) and not isinstance(random_guess_loss, bool)
        if not (is_number and 0 < random_guess_loss < math.inf):
            raise ValueError(
                f"random_guess_loss: expected a positive finite number, got {random_guess_loss!r}"
            )
        return float(random_guess_loss)
    if num_classes is None:
        return None
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
        raise ValueError(f"num_classes: expected an integer of at least 2, got {num_classes!r}")
    return math.log(num_classes)
