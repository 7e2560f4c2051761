"""Copies of values that live on the host: numbers, containers, tensors are copied, live objects are not.

The state of a scheduler or an extra may hold an optimizer or another scheduler. A deep copy of those would be
a second one that nobody drives: here they stay the objects they are, and what can say its state (the other
scheduler) gets a copy of its attributes put back into it. In what an optimizer holds, modules (K-FAC),
generators and whatever can be called stay as well: they belong to the model. In the state of an extra they
are just what is to be covered.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_ATOMS = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size)
_CONTAINERS = (dict, list, tuple, set, frozenset)


@dataclass(frozen=True, slots=True)
class HostCopy:
    """A copy of a value, to be put back any number of times."""

    value: Any
    inner: tuple[tuple[object, dict[str, Any]], ...]
    """Live objects within the value that have a state of their own, and copies of their attributes."""
    live: tuple[object, ...]
    """Live objects within the value; kept, since a memo knows them by their ids."""

    @classmethod
    def of(cls, value: object) -> HostCopy:
        """A copy of what a scheduler, a module or an extra says its state is."""
        return cls._of(value, {}, _is_driven)

    @classmethod
    def of_settings(cls, value: object, parameters: Iterable[Tensor]) -> HostCopy:
        """A copy of what an optimizer that trains ``parameters`` holds; those stay the ones they are."""
        if _is_flat(value):
            return cls(value.copy(), (), ())
        return cls._of(value, {id(parameter): parameter for parameter in parameters}, _is_no_setting)

    @classmethod
    def _of(cls, value: object, kept: dict[int, object], stays: Callable[[object], bool]) -> HostCopy:
        found = list(_find(value, stays, set(kept)))
        kept = kept | {id(thing): thing for thing in found}
        inner = tuple((t, copy.deepcopy(vars(t), dict(kept))) for t in found if _has_state(t))
        return cls(copy.deepcopy(value, dict(kept)), inner, tuple(kept.values()))

    def copied(self) -> Any:  # noqa: ANN401  (whatever was copied)
        """A copy of the value; the live objects within it are left as they are."""
        return copy.deepcopy(self.value, self._memo())

    def fresh(self) -> Any:  # noqa: ANN401  (whatever was copied)
        """A copy of the value; the live objects within it get their attributes back."""
        for thing, attributes in self.inner:
            vars(thing).update(copy.deepcopy(attributes, self._memo()))
        return self.copied()

    def _memo(self) -> dict[int, Any]:
        return {id(thing): thing for thing in self.live}

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that were copied."""
        for part in (self.value, *(attributes for _, attributes in self.inner)):
            yield from _find(part, lambda thing: isinstance(thing, Tensor), set(self._memo()))


def _is_flat(value: object) -> TypeGuard[dict[str, Any]]:
    """Whether it is a dict of numbers and tuples of numbers, as the settings of a group are."""
    return type(value) is dict and all(
        isinstance(v, _ATOMS) or (type(v) is tuple and all(isinstance(n, _ATOMS) for n in v))
        for v in value.values()
    )


def is_plain(value: object) -> bool:
    """Whether ``value`` is data alone: numbers, strings, tensors and containers of such, to any depth."""
    if isinstance(value, _ATOMS):
        return True
    others = _find(value, lambda thing: not isinstance(thing, (*_ATOMS, *_CONTAINERS, Tensor)), set())
    return next(others, None) is None


def _has_state(thing: object) -> bool:
    """Whether it is driven by whoever holds it, and can say its state: a scheduler within a scheduler."""
    if isinstance(thing, nn.Module | Optimizer | type) or not hasattr(thing, "__dict__"):
        return False
    return all(callable(getattr(thing, name, None)) for name in ("state_dict", "load_state_dict"))


def _is_driven(thing: object) -> bool:
    """Whether a copy of it would be another one that nobody uses."""
    return isinstance(thing, Optimizer) or _has_state(thing)


def _is_no_setting(thing: object) -> bool:
    """Likewise, for what an optimizer holds."""
    if isinstance(thing, (Tensor, *_CONTAINERS, *_ATOMS)):
        return False
    return isinstance(thing, nn.Module | torch.Generator) or callable(thing) or _is_driven(thing)


def _find(value: object, wanted: Callable[[object], bool], seen: set[int]) -> Iterator[Any]:
    """Everything within ``value`` that is wanted, each once; what is found is looked into if it has state."""
    stack = [value]
    while stack:
        thing = stack.pop()
        if isinstance(thing, _ATOMS) or id(thing) in seen:
            continue
        seen.add(id(thing))
        is_found = wanted(thing)
        if is_found:
            yield thing
        if not is_found or _has_state(thing):
            stack += _within(thing)


def _within(thing: object) -> Iterable[object]:
    """What a deep copy of it would copy, but for what modules, optimizers and tensors hold."""
    if isinstance(thing, dict):
        return [*thing.keys(), *thing.values()]
    if isinstance(thing, _CONTAINERS):
        return thing
    if isinstance(thing, MethodType):
        return [thing.__self__]
    if isinstance(thing, Tensor | nn.Module | Optimizer | type | FunctionType | ModuleType):
        return []
    return list(getattr(thing, "__dict__", {}).values())


@torch.no_grad()
def refill(live: object, value: object) -> object:
    """``value``, in the tensors and dictionaries that are there if they fit: others may hold them, too."""
    if isinstance(live, Tensor) and isinstance(value, Tensor):
        return live.copy_(value) if _form(live) == _form(value) else value
    if type(live) is dict and type(value) is dict:
        parts = {key: refill(live.get(key), part) for key, part in value.items()}
        live.clear()
        live.update(parts)
        return live
    return value


def _form(tensor: Tensor) -> tuple[object, ...]:
    return type(tensor), tensor.shape, tensor.dtype, tensor.device, tensor.layout
