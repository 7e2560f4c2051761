"""What a rollback covers: the tensors, found by name, and the parts that live on the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from tolaria.errors import SnapshotError
from tolaria.ops import live_view
from tolaria.snapshot.fresh_state import fresh_value
from tolaria.snapshot.grad_scaler import SCALER_TENSORS
from tolaria.snapshot.lowered_rates import LoweredRates
from tolaria.snapshot.module_tree import ModuleForm
from tolaria.snapshot.parts import Parts
from tolaria.snapshot.protocols import HoldsSeed, TakesPartInRollback
from tolaria.snapshot.rng import Generators
from tolaria.snapshot.schedules import SCHEDULED, ScheduleFinder, reaches
from tolaria.snapshot.voice import BY_HAND, GOVERNOR
from tolaria.snapshot.wrapped import inner_tensors, is_wrapper, put_inner

Kind = Literal["parameter", "buffer", "optimizer", "scaler"]


@dataclass(frozen=True, slots=True)
class CoveredTensor:
    """A tensor that a capture covers.

    A parameter's key is the object's identity, wherever surgery moves it. Other tensors are often replaced by
    new ones at every step, so their key is who holds them: a buffer's module and its name there.
    """

    key: Hashable
    name: str
    tensor: Tensor
    kind: Kind
    owner: Tensor
    """The parameter that optimizer state belongs to; elsewhere the tensor itself."""
    anchor: object = None
    """What ``key`` has the id of: kept alive as long as the key is known."""
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
    """Those that take part in rollbacks."""
    seed_holders: list[tuple[str, HoldsSeed]]
    """Those of the model that may hold an incubating seed."""


class CoveredState:
    """Finds what is covered, each time anew.

    Args:
        parts: what was handed over; optimizers and schedulers may join and leave later.
        restore_rng: whether random generators are covered at all.
        by_hand: no governor restores it, but whoever made it: seeds come back at their captured stage, which
            a governor's rollback drops, and a rate taken back is what was wanted.
    """

    def __init__(self, parts: Parts, *, restore_rng: bool = False, by_hand: bool = False) -> None:
        self.by_hand = by_hand
        self.voice = BY_HAND if by_hand else GOVERNOR
        self.model = parts.model
        self.optimizers = list(parts.optimizers)
        self.schedulers = list(parts.schedulers)
        self.scaler = parts.scaler
        self.extras = dict(parts.extras)
        self.generators = Generators(parts.device, parts.generators, restore_rng)
        self.device = parts.device
        self.keeps_schedules = parts.schedules == "keep"
        self._only_trained = parts.cover == "trained"
        self.lowered = LoweredRates()
        self.schedules = ScheduleFinder(self.voice)
        self.forms: tuple[ModuleForm, ...] = ()
        """Which object stands where in the modules, as of the last :meth:`note_forms`."""
        self._retired = WeakIdKeyDictionary()

    def retire(self, tensors: Sequence[Tensor]) -> None:
        """Cover these no more, though an optimizer may still hold them: their seed was culled."""
        for tensor in tensors:
            self._retired[tensor] = True

    def retired_ids(self) -> frozenset[int]:
        """The ids of what :meth:`retire` was given."""
        return frozenset(map(id, self._retired))

    def note_forms(self, walk: Walk) -> None:
        """Note which object stands where; seed slots see to their children themselves."""
        slots = {id(module) for _, module in walk.participants}
        own = (m for *_, m in walk.modules if not isinstance(m, torch.jit.ScriptModule))
        self.forms = tuple(ModuleForm.of(module) for module in own if id(module) not in slots)

    # -- tensors ---------------------------------------------------------------------------------------------

    def tensors(self, walk: Walk | None = None) -> list[CoveredTensor]:
        """Every covered tensor, tied ones once, in a stable order; ``walk`` is that of now, if known."""
        walk = walk or self.walk()
        found: dict[int, CoveredTensor] = {}
        for candidate in self.candidates(walk):
            found.setdefault(id(candidate.tensor), candidate)
        holders, slots = ((), ()) if self.by_hand else (walk.seed_holders, walk.participants)
        incubating = {id(t) for _, module in holders for t in module.incubating_tensors()}
        zeroed = {id(t) for _, module in slots for t in module.zero_alpha_tensors()}
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
            # Those of an averaged copy of the model, too: it must not keep a seed that the model has dropped.
            [(p + name, cast(TakesPartInRollback, m)) for p, name, m in modules if _has(m, _PARTICIPANT)],
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
        stepped = self._stepped()
        modules = [(prefix, f"{path}." if path else "", module) for prefix, path, module in walk.modules]
        for prefix, path, module in modules:
            for leaf, parameter in module._parameters.items():
                if parameter is not None and not self.leaves_out(parameter, stepped):
                    name = prefix + path + leaf
                    names.setdefault(id(parameter), name)
                    hooked = id(parameter) in stepped
                    key: Hashable = ("parameter", id(parameter))
                    yield CoveredTensor(
                        key, name, parameter, "parameter", parameter, parameter, hooked=hooked
                    )
        for prefix, path, module in modules:
            for leaf, buffer in module._buffers.items():
                if buffer is not None:
                    key = ("buffer", id(module), leaf)
                    yield CoveredTensor(key, prefix + path + leaf, buffer, "buffer", buffer, module)
        for i, optimizer in enumerate(self.optimizers):
            left_alone = SCHEDULED if self._keeps_rates(optimizer) else ()
            yield from self._optimizer_tensors(i, optimizer, names, left_alone)
        for name in SCALER_TENSORS:
            tensor = getattr(self.scaler, name, None)
            if isinstance(tensor, Tensor):
                yield CoveredTensor(("scaler", name), f"scaler.{name}", tensor, "scaler", tensor)

    def leaves_out(self, parameter: Tensor | None, stepped: Collection[int] | None = None) -> bool:
        """Whether a parameter is frozen and in no optimizer, and such are not covered.

        Args:
            parameter: of the model.
            stepped: ids of those in an optimizer, if known.
        """
        if parameter is None or not self._only_trained or parameter.requires_grad:
            return False
        return id(parameter) not in (self._stepped() if stepped is None else stepped)

    def _stepped(self) -> set[int]:
        return {id(p) for o in self.optimizers for group in o.param_groups for p in group["params"]}

    def _keeps_rates(self, optimizer: Optimizer) -> bool:
        """Whether a schedule that a restore leaves alone drives the rates of ``optimizer``."""
        return self.keeps_schedules and any(reaches(schedule, optimizer) for schedule in self.schedulers)

    @staticmethod
    def _optimizer_tensors(
        i: int, optimizer: Optimizer, names: dict[int, str], left_alone: Collection[str]
    ) -> Iterator[CoveredTensor]:
        shared = _shared(optimizer)
        for g, group in enumerate(optimizer.param_groups):
            first = group["params"][0] if group["params"] else None
            for key, value in group.items():
                if isinstance(value, Tensor) and key not in left_alone:
                    named = f"optimizer[{i}].group[{g}].{key}"
                    key_: Hashable = ("group", id(optimizer), id(first), key)
                    yield CoveredTensor(key_, named, value, "scaler", value, first)
            for p, parameter in enumerate(group["params"]):
                name = names.get(id(parameter), f"optimizer[{i}].group[{g}].params[{p}]")
                if id(parameter) not in names:
                    own: Hashable = ("parameter", id(parameter))
                    yield CoveredTensor(own, name, parameter, "parameter", parameter, parameter, hooked=True)
                for key, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        fresh = None if is_wrapper(value) else fresh_value(optimizer, group, key)
                        for path, inner in inner_tensors(value):
                            named = ".".join((f"optimizer[{i}].{key}({name})", *path))
                            key_ = ("state", id(optimizer), id(parameter), key, *path)
                            # Somebody else's, too: a restore that does not know it must not find zeros there.
                            born = inner if id(inner) in shared else fresh
                            yield CoveredTensor(
                                key_, named, inner, "optimizer", parameter, parameter, fresh_value=born
                            )

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

    def recreate(self, key: Hashable, anchor: object, value: Tensor) -> None:
        """Give a covered tensor that its owner dropped or replaced by one of another form back to it.

        Args:
            key: as in :class:`CoveredTensor`.
            anchor: likewise.
            value: what it was at the capture.
        """
        if not isinstance(key, tuple):
            return
        kind, *where = key
        if kind == "parameter" and isinstance(anchor, Tensor):
            _fill(anchor, value)
        elif kind == "buffer" and isinstance(anchor, nn.Module):
            if where[1] in anchor._buffers:
                _put(anchor._buffers, where[1], value)
        elif kind == "scaler" and self.scaler is not None:
            setattr(self.scaler, where[0], value)
        elif kind in ("group", "state") and isinstance(anchor, Tensor):
            for optimizer in (o for o in self.optimizers if id(o) == where[0]):
                homes = [g for g in optimizer.param_groups if any(p is anchor for p in g["params"])]
                for home in homes:
                    holder, path = home if kind == "group" else optimizer.state[anchor], where[3:]
                    if not path:
                        holder[where[2]] = value
                    elif is_wrapper(holder.get(where[2])):
                        put_inner(holder[where[2]], tuple(path), value)


def _shared(optimizer: Optimizer) -> set[int]:
    """Ids of state tensors that belong to several parameters, or to the optimizer itself: lookup tables."""
    if type(optimizer).__module__.startswith("torch.optim"):
        return set()
    states = [s for s in optimizer.state.values() if isinstance(s, Mapping)]
    tensors = (v for state in states for v in state.values() if isinstance(v, Tensor))
    held = Counter(id(inner) for tensor in tensors for _, inner in inner_tensors(tensor))
    own = (v for name, v in vars(optimizer).items() if name != "state")
    lists = (
        list(v.values()) if isinstance(v, dict) else v for v in own if isinstance(v, dict | list | tuple)
    )
    attributes = {id(v) for v in (*vars(optimizer).values(), *(v for each in lists for v in each))}
    return {key for key, count in held.items() if count > 1 or key in attributes}


@torch.no_grad()
def _fill(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter the bytes of ``value``: in its own memory, if it still has that form."""
    form = (parameter.shape, parameter.stride(), parameter.dtype)
    try:
        if form == (value.shape, value.stride(), value.dtype):
            live_view(parameter).copy_(live_view(value))
            return
    except SnapshotError:  # its memory is gone, or too small
        pass
    become(parameter, value)


def _put(live: dict[str, Any], leaf: str, value: Tensor) -> None:
    """Make ``value`` the tensor at ``leaf``: in the object that is there, if it can hold it."""
    tensor = live[leaf]
    if tensor is None or not become(tensor, value):
        live[leaf] = value.detach()


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
