"""What a rollback covers: the tensors, found by name, and the parts that live on the host."""

from __future__ import annotations

import copy
import random
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from tolaria.governor.fresh_state import fresh_value

Kind = Literal["parameter", "buffer", "optimizer", "scaler", "extra"]


@runtime_checkable
class Stateful(Protocol):
    """Anything that can be saved and loaded: a scheduler, an EMA, a sampler."""

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to come back here."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object:
        """Go back to a saved state."""
        ...


@runtime_checkable
class TakesPartInRollback(Protocol):
    """A module with host-side state of its own, such as a seed slot's stage."""

    def rollback_state(self) -> dict[str, Any]:
        """Host-side facts at a capture."""
        ...

    def load_rollback_state(self, captured: dict[str, Any] | None, /) -> None:
        """Go back to the captured facts (None: it was not there), after the tensors were restored."""
        ...

    def zero_alpha_tensors(self) -> list[Tensor]:
        """Alpha tensors that a capture writes as zero: those of seeds that a rollback drops."""
        ...


@runtime_checkable
class HoldsSeed(Protocol):
    """A module whose seed may incubate: it cannot reach the loss, so a poisoned one is culled alone."""

    def incubating_tensors(self) -> list[Tensor]:
        """Tensors of the incubating seed; empty without one."""
        ...

    def cull(self) -> object:
        """Drop the seed."""
        ...


@dataclass(frozen=True, slots=True)
class TrackedTensor:
    """A tensor that a capture covers, under a key that outlives its replacement."""

    key: Hashable
    name: str
    tensor: Tensor
    kind: Kind
    owner: Tensor
    """The parameter that optimizer state belongs to; elsewhere the tensor itself."""
    watched: bool = True
    """Whether a non-finite value in it is the run's trouble; an incubating seed's is not."""
    zeroed: bool = False
    """A capture taken now restores it as 0: the alpha of a seed that is no fossil yet."""
    fresh_value: float | Tensor | None = None
    """Optimizer state: what it holds before the first step, if that is the same as not being there."""
    hooked: bool = False
    """Parameter: whether a covered optimizer, whose hooks see it, is what changes it."""

    @property
    def part(self) -> int:
        """Capture part: 1 changes only where hooks see it, 0 anywhere (buffers, an EMA, a target)."""
        return 1 if self.hooked or self.kind == "optimizer" else 0


HostValues = dict[int, dict[int, dict[str, Any]]]
"""By step, then by the parameter's id: the entries of an optimizer's state that are on the host."""


@dataclass(slots=True)
class OptimizerHost:
    """The host-side part of one optimizer at a capture."""

    groups: list[dict[str, Any]]
    state_keys: dict[int, set[str]]
    values: dict[int, dict[str, Any]]


@dataclass(slots=True)
class HostState:
    """Everything a capture covers that is no tensor on the governor's device."""

    optimizers: list[OptimizerHost]
    schedulers: list[dict[str, Any]]
    scaler: dict[str, Any] | None
    extras: dict[str, dict[str, Any]]
    modules: dict[str, dict[str, Any]]
    rng: dict[str, Any]
    rates_lowered: int = 0
    """How many rollbacks had lowered the learning rates by then."""
    keys: frozenset[Hashable] = field(default_factory=frozenset)


SCALER_TENSORS = ("_scale", "_growth_tracker")
_SCALER_VALUES = ("_init_scale", "_growth_factor", "_backoff_factor", "_growth_interval", "_enabled")


class TrackedState:
    """Finds what is covered, each time anew, and puts the host-side parts back.

    Args:
        model: its parameters, buffers, and the modules that take part in rollbacks.
        optimizers: state and hyper-parameters of each.
        schedulers: restored through their state dicts.
        scaler: a ``torch.amp.GradScaler`` or None.
        extras: named objects with ``state_dict``/``load_state_dict``; an ``nn.Module`` is covered tensor by
            tensor.
        generators: random generators beside the default ones.
        restore_rng: whether random generators are covered at all.
        device: tensors on it are captured; tensors elsewhere belong to the host-side parts.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        *,
        schedulers: Sequence[Stateful] = (),
        scaler: torch.amp.GradScaler | None = None,
        extras: Mapping[str, Stateful] | None = None,
        generators: Sequence[torch.Generator] = (),
        restore_rng: bool = True,
        device: torch.device,
    ) -> None:
        self.model = model
        self.optimizers = list(optimizers)
        self.schedulers = list(schedulers)
        self.scaler = scaler
        self.extras = dict(extras or {})
        self.generators = list(generators)
        self.restore_rng = restore_rng
        self.device = device
        self.rollbacks = 0
        self.rates_lowered = 0
        """Rollbacks heard of, and how many of them the rates reflect (a restore brings older rates)."""
        self._retired = WeakIdKeyDictionary()

    def retire(self, tensors: Sequence[Tensor]) -> None:
        """Cover these no more, though an optimizer may still hold them: their seed was culled."""
        for tensor in tensors:
            self._retired[tensor] = True

    # -- tensors ---------------------------------------------------------------------------------------------

    def tensors(self) -> list[TrackedTensor]:
        """Every covered tensor, tied ones once, in a stable order."""
        found: dict[int, TrackedTensor] = {}
        for candidate in self._candidates():
            found.setdefault(id(candidate.tensor), candidate)
        incubating = {id(t) for _, module in self.seed_holders() for t in module.incubating_tensors()}
        zeroed = {id(t) for _, module in self.participants() for t in module.zero_alpha_tensors()}
        return [
            replace(t, watched=id(t.owner) not in incubating, zeroed=id(t.tensor) in zeroed)
            if id(t.owner) in incubating or id(t.tensor) in zeroed
            else t
            for t in found.values()
            if t.tensor.device == self.device and t.owner not in self._retired
        ]

    def _candidates(self) -> Iterator[TrackedTensor]:
        names: dict[int, str] = {}
        modules: list[tuple[str, nn.Module]] = [("", self.model)]
        modules += [
            (f"{name}.", extra) for name, extra in self.extras.items() if isinstance(extra, nn.Module)
        ]
        stepped = {id(p) for o in self.optimizers for group in o.param_groups for p in group["params"]}
        for prefix, module in modules:
            for name, parameter in module.named_parameters():
                names.setdefault(id(parameter), prefix + name)
                hooked = id(parameter) in stepped
                key: Hashable = ("model", prefix + name)
                yield TrackedTensor(key, prefix + name, parameter, "parameter", parameter, hooked=hooked)
        for prefix, module in modules:
            for name, buffer in module.named_buffers():
                yield TrackedTensor(("model", prefix + name), prefix + name, buffer, "buffer", buffer)
        for i, optimizer in enumerate(self.optimizers):
            yield from self._optimizer_tensors(i, optimizer, names)
        for name in SCALER_TENSORS:
            tensor = getattr(self.scaler, name, None)
            if isinstance(tensor, Tensor):
                yield TrackedTensor(("scaler", name), f"scaler.{name}", tensor, "scaler", tensor)

    @staticmethod
    def _optimizer_tensors(i: int, optimizer: Optimizer, names: dict[int, str]) -> Iterator[TrackedTensor]:
        for g, group in enumerate(optimizer.param_groups):
            for key, value in group.items():
                if isinstance(value, Tensor):
                    named = f"optimizer[{i}].group[{g}].{key}"
                    yield TrackedTensor(("group", i, g, key), named, value, "scaler", value)
            for p, parameter in enumerate(group["params"]):
                name = names.get(id(parameter), f"optimizer[{i}].group[{g}].params[{p}]")
                if id(parameter) not in names:
                    own: Hashable = ("parameter", id(parameter))
                    yield TrackedTensor(own, name, parameter, "parameter", parameter, hooked=True)
                for key, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        named = f"optimizer[{i}].{key}({name})"
                        key_ = ("state", i, id(parameter), key)
                        fresh = fresh_value(optimizer, group, key)
                        yield TrackedTensor(key_, named, value, "optimizer", parameter, fresh_value=fresh)

    def structure(self) -> tuple[int, ...]:
        """A cheap sign of growth: parameters per group of every optimizer."""
        return tuple(len(g["params"]) for o in self.optimizers for g in o.param_groups)

    def participants(self) -> Iterator[tuple[str, TakesPartInRollback]]:
        """The modules that take part in rollbacks, by name."""
        for name, module in self.model.named_modules():
            if isinstance(module, TakesPartInRollback):
                yield name, module

    def seed_holders(self) -> Iterator[tuple[str, HoldsSeed]]:
        """The modules that may hold an incubating seed, by name."""
        for name, module in self.model.named_modules():
            if isinstance(module, HoldsSeed):
                yield name, module

    # -- host-side parts -------------------------------------------------------------------------------------

    def host_state(self) -> HostState:
        """A copy of every host-side part as it is now."""
        return HostState(
            optimizers=[self._optimizer_host(o) for o in self.optimizers],
            schedulers=[copy.deepcopy(s.state_dict()) for s in self.schedulers],
            scaler=None
            if self.scaler is None
            else {k: getattr(self.scaler, k, None) for k in _SCALER_VALUES},
            extras={
                k: copy.deepcopy(e.state_dict())
                for k, e in self.extras.items()
                if not isinstance(e, nn.Module)
            },
            modules={name: module.rollback_state() for name, module in self.participants()},
            rng=self._rng_state(),
            rates_lowered=self.rates_lowered,
        )

    def _is_captured(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.device == self.device

    def _optimizer_host(self, optimizer: Optimizer) -> OptimizerHost:
        groups = [
            {k: copy.deepcopy(v) for k, v in g.items() if k != "params" and not self._is_captured(v)}
            for g in optimizer.param_groups
        ]
        state_keys: dict[int, set[str]] = {}
        values: dict[int, dict[str, Any]] = {}
        for parameter, state in optimizer.state.items():
            state_keys[id(parameter)] = set(state)
            host = {k: copy.deepcopy(v) for k, v in state.items() if not self._is_captured(v)}
            if host:
                values[id(parameter)] = host
        return OptimizerHost(groups, state_keys, values)

    def _rng_state(self) -> dict[str, Any]:
        if not self.restore_rng:
            return {}
        state: dict[str, Any] = {
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "generators": [g.get_state() for g in self.generators],
        }
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def generator_names(self) -> tuple[str, ...]:
        """What ``restore_rng`` covers, in words."""
        if not self.restore_rng:
            return ()
        device = (f"torch.{self.device}",) if self.device.type == "cuda" else ()
        own = (f"generator[{i}]" for i in range(len(self.generators)))
        return ("torch.cpu", *device, "python.random", "numpy.random", *own)

    def load_host_state(self, host: HostState, *, keep_fresh: bool = False) -> None:
        """Put every host-side part back; what came into being after the capture is removed.

        Args:
            host: from :meth:`host_state`.
            keep_fresh: leave optimizer state that was put back to its value before the first step where it
                is, so that addresses stay what they were.
        """
        for optimizer, captured in zip(self.optimizers, host.optimizers, strict=False):
            self._load_optimizer(optimizer, captured, keep_fresh=keep_fresh)
        for optimizer in self.optimizers[len(host.optimizers) :]:  # unknown at the capture: it starts afresh
            optimizer.state.clear()
        for scheduler, state in zip(self.schedulers, host.schedulers, strict=False):
            scheduler.load_state_dict(copy.deepcopy(state))
        self.rates_lowered = host.rates_lowered
        self._load_scaler(host)
        for name, extra_state in host.extras.items():
            self.extras[name].load_state_dict(copy.deepcopy(extra_state))
        for name, module in self.participants():
            module.load_rollback_state(host.modules.get(name))
        self._load_rng(host.rng)

    @staticmethod
    def _load_optimizer(optimizer: Optimizer, captured: OptimizerHost, *, keep_fresh: bool) -> None:
        del optimizer.param_groups[len(captured.groups) :]
        for target, values in zip(optimizer.param_groups, captured.groups, strict=False):
            target.update(copy.deepcopy(values))
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for parameter in list(optimizer.state):
            keys = captured.state_keys.get(id(parameter), set())
            state, group = optimizer.state[parameter], groups.get(id(parameter))
            late = [k for k in state if k not in keys]
            if keep_fresh and group is not None and not keys:
                fresh = [
                    isinstance(state[k], Tensor) and fresh_value(optimizer, group, k) is not None
                    for k in late
                ]
                late = [] if all(fresh) and all(state[k].device == parameter.device for k in late) else late
            for key in late:
                del state[key]
            state.update(copy.deepcopy(captured.values.get(id(parameter), {})))
            if not state:
                del optimizer.state[parameter]

    def _load_scaler(self, host: HostState) -> None:
        if self.scaler is None or host.scaler is None:
            return
        for key, value in host.scaler.items():
            setattr(self.scaler, key, value)
        for name in SCALER_TENSORS:
            if ("scaler", name) not in host.keys:
                setattr(self.scaler, name, None)
        states = getattr(self.scaler, "_per_optimizer_states", None)
        if states is not None:
            states.clear()  # an unscaling begun on the undone step is void

    def _load_rng(self, rng: dict[str, Any]) -> None:
        if not rng:
            return
        torch.set_rng_state(rng["torch"])
        random.setstate(rng["python"])
        np.random.set_state(rng["numpy"])
        for generator, state in zip(self.generators, rng["generators"], strict=True):
            generator.set_state(state)
        if "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], self.device)

    def recreate(self, key: Hashable, value: Tensor) -> None:
        """Give a covered tensor that went missing (cleared optimizer or scaler state) back to its owner."""
        if not isinstance(key, tuple):
            return
        if key[0] == "state":
            _, i, parameter_id, name = key
            for group in self.optimizers[i].param_groups if i < len(self.optimizers) else ():
                for parameter in group["params"]:
                    if id(parameter) == parameter_id:
                        self.optimizers[i].state[parameter][name] = value
        elif key[0] == "group":
            _, i, g, name = key
            if i < len(self.optimizers) and g < len(self.optimizers[i].param_groups):
                self.optimizers[i].param_groups[g][name] = value
        elif key[0] == "scaler" and self.scaler is not None:
            setattr(self.scaler, str(key[1]), value)
