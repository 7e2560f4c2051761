"""Which module, parameter and buffer stood where at a capture, and how what was lost since comes back.

Surgery moves objects: a layer is wrapped, parametrized, pruned, shifted by a block that is inserted. What can
still be reached is where it belongs, whatever its path is now, and the tree is left alone. What cannot be
reached any more (a layer was replaced, parameters were assigned anew, a mask was made permanent) comes back
with the module that held it, which gets the form that it had: class, children, parameters, buffers and hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks")
_BOOKKEEPING = ("_keys", "_size")
"""What a ParameterDict and a ParameterList know of their parameters beside the parameters."""


@dataclass(frozen=True, slots=True)
class ModuleForm:
    """The form of one module: references, no copies."""

    module: nn.Module
    kind: type[nn.Module]
    properties: dict[str, property]
    """Those of a class that torch makes for one module alone: its parametrized tensors."""
    children: dict[str, nn.Module | None]
    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, Tensor | None]
    hooks: dict[str, dict[int, Any]]
    bookkeeping: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module) -> ModuleForm:
        """The form of ``module`` now."""
        attributes = vars(module)
        return cls(
            module,
            type(module),
            {n: v for n, v in vars(type(module)).items() if isinstance(v, property)}
            if "parametrizations" in module._modules
            else {},
            dict(module._modules.items()),
            dict(module._parameters.items()),
            dict(module._buffers.items()),
            {name: dict(attributes[name]) for name in _HOOKS if attributes.get(name)},
            {name: _shallow(attributes[name]) for name in _BOOKKEEPING if name in attributes},
        )

    def has_lost(self, reachable: Collection[int], given_up: Collection[int]) -> bool:
        """Whether a child, parameter or buffer of then cannot be reached any more.

        Args:
            reachable: ids of the modules and parameters of now.
            given_up: ids of those that nobody wants back.
        """
        objects = [*self.children.values(), *self.parameters.values()]
        gone = (o for o in objects if o is not None and id(o) not in reachable and id(o) not in given_up)
        if next(gone, None) is not None:
            return True
        module = self.module
        names = [n for n, buffer in self.buffers.items() if buffer is not None]
        emptied = (n for n, p in self.parameters.items() if p is not None and n in module._parameters)
        return any(name not in module._buffers for name in names) or any(
            module._parameters[name] is None for name in emptied
        )

    def put_back(self) -> None:
        """Give the module this form; what came since goes."""
        module, attributes = self.module, vars(self.module)
        if type(module) is not self.kind:
            module.__class__ = self.kind
        for name, value in self.properties.items():
            setattr(self.kind, name, value)
        _assign(module._modules, self.children)
        for name in [n for n in module._parameters if n not in self.parameters]:
            del module._parameters[name]
        for name, parameter in self.parameters.items():
            if name not in module._parameters or module._parameters[name] is not parameter:
                attributes.pop(name, None)
                setattr(module, name, parameter)  # by which an LSTM follows with its flat weights
        for name in [n for n in module._buffers if n not in self.buffers]:
            del module._buffers[name]
        for name, buffer in self.buffers.items():
            if name not in module._buffers:
                attributes.pop(name, None)
                module._buffers[name] = buffer
        for name in _HOOKS:
            if name in attributes and dict(attributes[name]) != self.hooks.get(name, {}):
                _assign(attributes[name], self.hooks.get(name, {}))
        for name, value in self.bookkeeping.items():
            setattr(module, name, _shallow(value))


def _shallow(value: object) -> object:
    return dict(value) if isinstance(value, dict) else value


def _assign(target: Any, values: Mapping[Any, Any]) -> None:  # noqa: ANN401  (a mapping of torch's)
    """Make ``target`` hold ``values`` in their order, in place."""
    if list(target.items()) != list(values.items()):
        target.clear()
        target.update(values)


def put_back_tree(
    forms: Iterable[ModuleForm], walk: Callable[[], Iterable[nn.Module]], given_up: Collection[int]
) -> None:
    """Bring back what was lost from the modules.

    Args:
        forms: the modules as they were, but those that see to their own children.
        walk: every module that can be reached now.
        given_up: ids of modules and parameters that are not wanted back.
    """
    known = {id(form.module): form for form in forms}
    while True:
        modules = {id(module): module for module in walk()}
        reachable = modules.keys() | {id(p) for m in modules.values() for p in m._parameters.values()}
        lost = [known[i] for i in modules if i in known and known[i].has_lost(reachable, given_up)]
        if not lost:
            return
        for form in lost:
            form.put_back()
            del known[id(form.module)]
