"""What a snapshot is of: a model with everything that its training keeps state in, as it was handed over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from tolaria._arguments import check_choice, check_each, check_optional
from tolaria.snapshot.inner_optimizers import with_inner
from tolaria.snapshot.protocols import Stateful

Cover = Literal["all", "trained"]
"""Every parameter, or only what an optimizer holds or may come to hold: not the frozen ones."""
ScheduleChoice = Literal["rewind", "keep"]
"""Whether a restore takes schedulers and their rates back, or leaves them where a trainer counts on."""


@dataclass(frozen=True, slots=True)
class Parts:
    """A model, what trains it, and what else goes with it; made by :meth:`checked`."""

    model: nn.Module
    """Its parameters, buffers, and the modules that take part in rollbacks."""
    optimizers: tuple[Optimizer, ...]
    """State and hyper-parameters of each."""
    schedulers: tuple[Stateful, ...]
    """Taken back through their state dicts."""
    scaler: torch.amp.GradScaler | None
    extras: Mapping[str, Stateful]
    """Named objects with a state dict; an ``nn.Module`` is covered tensor by tensor."""
    generators: tuple[torch.Generator, ...]
    """Random generators beside the default ones."""
    device: torch.device
    """Tensors on it are captured; tensors elsewhere belong to the host-side parts."""
    schedules: ScheduleChoice = "rewind"
    cover: Cover = "all"

    @classmethod
    def checked(
        cls,
        model: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer],
        *,
        schedulers: Sequence[Stateful] = (),
        scaler: torch.amp.GradScaler | None = None,
        extras: Mapping[str, Stateful] | None = None,
        generators: Sequence[torch.Generator] = (),
        schedules: ScheduleChoice = "rewind",
        cover: Cover = "all",
    ) -> Parts:
        """The parts, after a look at what they are.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: an optimizer comes twice, a parameter is not initialised yet, or a word is no choice.
            RuntimeError: the parameters are on several devices, or on one that is not supported.
        """
        listed = checked_optimizers(model, optimizers)
        check_optional("scaler", scaler, torch.amp.GradScaler)
        check_schedulers(schedulers)
        check_each("generators", generators, "torch.Generator", lambda v: isinstance(v, torch.Generator))
        _check_extras(extras)
        check_choice("schedules", schedules, get_args(ScheduleChoice))
        check_choice("cover", cover, get_args(Cover))
        device = single_device(model, listed)
        return cls(
            model,
            tuple(listed),
            tuple(schedulers),
            scaler,
            dict(extras or {}),
            tuple(generators),
            device,
            schedules,
            cover,
        )


def checked_optimizers(model: nn.Module, optimizers: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    """The optimizers and those that they wrap as a list, after a look at the types.

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
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(
                f"optimizers[{i}]: expected param_groups, which {type(optimizer).__name__} has none of; hand "
                "over the optimizer inside of it, and what it keeps itself in extras="
            )
        if any(optimizer is earlier for earlier in listed[:i]):
            raise ValueError(f"optimizers[{i}]: expected each optimizer once, got one a second time")
    lazy = [name for name, tensor in _named_tensors(model) if is_lazy(tensor)]
    if lazy:
        raise ValueError(
            f"model: expected initialised parameters, got a lazy {lazy[0]}; run one forward before attaching"
        )
    return with_inner(listed)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def check_schedulers(schedulers: object) -> None:
    """A sequence of objects that can be saved and loaded.

    Raises:
        TypeError: it is none, or holds something else.
    """
    check_each("schedulers", schedulers, "objects with state_dict and load_state_dict", _is_stateful)


def _check_extras(extras: object) -> None:
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
