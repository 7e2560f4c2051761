"""What a rollback covers: the tensors, found by name, and the parts that live on the host."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from tolaria.snapshot.fresh_state import fresh_value
from tolaria.snapshot.grad_scaler import SCALER_TENSORS
from tolaria.snapshot.parts import Parts
from tolaria.snapshot.protocols import HoldsSeed, TakesPartInRollback
from tolaria.snapshot.rng import Generators
from tolaria.snapshot.schedules import LoweredRates, ScheduleFinder

Kind = Literal["parameter", "buffer", "optimizer", "scaler", "extra"]


@dataclass(frozen=True, slots=True)
class CoveredTensor:
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


def named_modules(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """As ``root.named_modules()``, which costs ten times as much: generators within generators."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[nn.Module] = set()
    stack = [("", root)]
    while stack:
        name, module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        found.append((name, module))
        path = f"{name}." if name else ""
        children = [(path + leaf, child) for leaf, child in module._modules.items() if child is not None]
        stack += reversed(children)
    return found


def _methods(protocol: type) -> tuple[str, ...]:
    return tuple(name for name in vars(protocol) if not name.startswith("_"))


_PARTICIPANT, _SEED_HOLDER = _methods(TakesPartInRollback), _methods(HoldsSeed)


def _has(module: nn.Module, methods: tuple[str, ...]) -> bool:
    """Whether the module's class has these; ``isinstance`` with a protocol takes 100 us to say so."""
    return all(hasattr(type(module), name) for name in methods)


class Walk(NamedTuple):
    """What one walk over the modules finds, each by name."""

    modules: list[tuple[str, str, nn.Module]]
    """Every module below the roots, in the order of ``named_modules``, behind its root's prefix."""
    participants: list[tuple[str, TakesPartInRollback]]
    """Those of the model that take part in rollbacks."""
    seed_holders: list[tuple[str, HoldsSeed]]
    """Those of the model that may hold an incubating seed."""


class CoveredState:
    """Finds what is covered, each time anew.

    Args:
        parts: what was handed over; optimizers and schedulers may join and leave later.
        restore_rng: whether random generators are covered at all.
    """

    def __init__(self, parts: Parts, *, restore_rng: bool = False) -> None:
        self.model = parts.model
        self.optimizers = list(parts.optimizers)
        self.schedulers = list(parts.schedulers)
        self.scaler = parts.scaler
        self.extras = dict(parts.extras)
        self.generators = Generators(parts.device, parts.generators, restore_rng)
        self.device = parts.device
        self.lowered = LoweredRates()
        self.schedules = ScheduleFinder()
        self._retired = WeakIdKeyDictionary()

    def retire(self, tensors: Sequence[Tensor]) -> None:
        """Cover these no more, though an optimizer may still hold them: their seed was culled."""
        for tensor in tensors:
            self._retired[tensor] = True

    # -- tensors ---------------------------------------------------------------------------------------------

    def tensors(self, walk: Walk | None = None) -> list[CoveredTensor]:
        """Every covered tensor, tied ones once, in a stable order; ``walk`` is that of now, if known."""
        walk = walk or self.walk()
        found: dict[int, CoveredTensor] = {}
        for candidate in self.candidates(walk):
            found.setdefault(id(candidate.tensor), candidate)
        incubating = {id(t) for _, module in walk.seed_holders for t in module.incubating_tensors()}
        zeroed = {id(t) for _, module in walk.participants for t in module.zero_alpha_tensors()}
        return [
            replace(t, watched=id(t.owner) not in incubating, zeroed=id(t.tensor) in zeroed)
            if id(t.owner) in incubating or id(t.tensor) in zeroed
            else t
            for t in found.values()
            if t.tensor.device == self.device and not (self._retired and t.owner in self._retired)
        ]

    def roots(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules that are covered tensor by tensor, with what their tensors' names begin with."""
        yield "", self.model
        for name, extra in self.extras.items():
            if isinstance(extra, nn.Module):
                yield f"{name}.", extra

    def walk(self) -> Walk:
        """All modules as they are now."""
        modules = [(prefix, name, m) for prefix, root in self.roots() for name, m in named_modules(root)]
        own = [(name, m) for prefix, name, m in modules if not prefix]
        return Walk(
            modules,
            [(name, cast(TakesPartInRollback, m)) for name, m in own if _has(m, _PARTICIPANT)],
            [(name, cast(HoldsSeed, m)) for name, m in own if _has(m, _SEED_HOLDER)],
        )

    def elsewhere(self) -> list[CoveredTensor]:
        """Parameters, buffers and the scaler's tensors that no capture copies, being on another device."""
        return [
            t
            for t in self.candidates(self.walk())
            if t.tensor.device != self.device and t.kind in ("parameter", "buffer", "scaler")
            if not (isinstance(t.key, tuple) and t.key[0] == "group")  # a host-side part
        ]

    def candidates(self, walk: Walk) -> Iterator[CoveredTensor]:
        """Every tensor that is covered, or would be on the governor's device; tied ones more than once."""
        names: dict[int, str] = {}
        stepped = {id(p) for o in self.optimizers for group in o.param_groups for p in group["params"]}
        modules = [(prefix, f"{path}." if path else "", module) for prefix, path, module in walk.modules]
        for prefix, path, module in modules:
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    name = prefix + path + leaf
                    names.setdefault(id(parameter), name)
                    hooked = id(parameter) in stepped
                    key: Hashable = ("module", prefix, path + leaf)
                    yield CoveredTensor(key, name, parameter, "parameter", parameter, hooked=hooked)
        for prefix, path, module in modules:
            for leaf, buffer in module._buffers.items():
                if buffer is not None:
                    key = ("module", prefix, path + leaf)
                    yield CoveredTensor(key, prefix + path + leaf, buffer, "buffer", buffer)
        for i, optimizer in enumerate(self.optimizers):
            yield from self._optimizer_tensors(i, optimizer, names)
        for name in SCALER_TENSORS:
            tensor = getattr(self.scaler, name, None)
            if isinstance(tensor, Tensor):
                yield CoveredTensor(("scaler", name), f"scaler.{name}", tensor, "scaler", tensor)

    @staticmethod
    def _optimizer_tensors(i: int, optimizer: Optimizer, names: dict[int, str]) -> Iterator[CoveredTensor]:
        for g, group in enumerate(optimizer.param_groups):
            for key, value in group.items():
                if isinstance(value, Tensor):
                    named = f"optimizer[{i}].group[{g}].{key}"
                    yield CoveredTensor(("group", id(optimizer), g, key), named, value, "scaler", value)
            for p, parameter in enumerate(group["params"]):
                name = names.get(id(parameter), f"optimizer[{i}].group[{g}].params[{p}]")
                if id(parameter) not in names:
                    own: Hashable = ("parameter", id(parameter))
                    yield CoveredTensor(own, name, parameter, "parameter", parameter, hooked=True)
                for key, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        named = f"optimizer[{i}].{key}({name})"
                        key_ = ("state", id(optimizer), id(parameter), key)
                        fresh = fresh_value(optimizer, group, key)
                        yield CoveredTensor(key_, named, value, "optimizer", parameter, fresh_value=fresh)

    def structure(self) -> list[int]:
        """A cheap sign of growth: parameters per group of every optimizer."""
        return [len(g["params"]) for o in self.optimizers for g in o.param_groups]

    # -- host-side parts -------------------------------------------------------------------------------------

    def is_captured(self, value: object) -> bool:
        """Whether ``value`` is a tensor that a capture copies, so is no host-side part."""
        return isinstance(value, Tensor) and value.device == self.device

    def find_schedules(self) -> None:
        """Cover the schedules over covered optimizers that have turned up since the last look."""
        self.schedules.look(self.optimizers, self.schedulers)

    def recreate(self, key: Hashable, value: Tensor) -> None:
        """Give a covered tensor that its owner dropped or replaced by one of another form back to it."""
        if not isinstance(key, tuple):
            return
        kind, *where = key
        if kind == "module":
            self._recreate_in_module(where[0], where[1], value)
        elif kind == "scaler" and self.scaler is not None:
            setattr(self.scaler, where[0], value)
        for optimizer in self.optimizers:
            groups = optimizer.param_groups
            if kind == "group" and where[0] == id(optimizer) and where[1] < len(groups):
                groups[where[1]][where[2]] = value
            elif kind == "state" and where[0] == id(optimizer):
                for parameter in (p for group in groups for p in group["params"] if id(p) == where[1]):
                    optimizer.state[parameter][where[2]] = value

    def _recreate_in_module(self, prefix: str, name: str, value: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module = dict(self.roots())[prefix]
        for step in filter(None, path.split(".")):
            found = module._modules.get(step)
            if found is None:  # it left the model, and its tensors with it
                return
            module = found
        for live, kind in ((module._parameters, nn.Parameter), (module._buffers, Tensor.detach)):
            if leaf in live:
                _put(live, leaf, value, kind)
                return


def _put(live: dict[str, Any], leaf: str, value: Tensor, kind: Callable[[Tensor], Tensor]) -> None:
    """Make ``value`` the tensor at ``leaf``: in the object that is there, if it can hold it."""
    tensor = live[leaf]
    if tensor is None or not become(tensor, value):
        live[leaf] = kind(value)


def become(tensor: Tensor, value: Tensor) -> bool:
    """Give the object ``tensor`` the memory and form of ``value``; whether that could be done."""
    try:
        tensor.data = value
    except RuntimeError:  # it has become another kind of tensor: sparse, a wrapper
        try:
            plain = nn.Parameter(value, value.requires_grad) if isinstance(tensor, nn.Parameter) else value
            torch.utils.swap_tensors(tensor, plain)  # type: ignore[no-untyped-call]
        except RuntimeError:
            return False
    return tensor.data_ptr() == value.data_ptr()
