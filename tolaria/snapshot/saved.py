"""A capture as ordinary state dicts, which load into modules and optimizers without tolaria."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from tolaria.errors import SnapshotError
from tolaria.snapshot import loose_state
from tolaria.snapshot.base import SnapshotBase
from tolaria.snapshot.host_state import HostState
from tolaria.snapshot.module_tree import ModuleForm
from tolaria.snapshot.optimizer_state import OptimizerHost
from tolaria.snapshot.place import Place, PlaceKey, stored
from tolaria.snapshot.wrapped import with_inner_tensors


class SavedState:
    """Reads one capture; the slot must not be overwritten meanwhile.

    Args:
        base: what the capture is of.
        host: its host-side parts.
        slot: where its tensors are.
        take: makes what is returned of a tensor in the slot: a copy, or the memory itself.
        whole: with parameters that are left out as frozen (``cover="trained"``), as they are now.
    """

    def __init__(
        self,
        base: SnapshotBase,
        host: HostState,
        slot: int,
        take: Callable[[Tensor], Tensor] = torch.clone,
        *,
        whole: bool = True,
    ) -> None:
        self._covered, self._host, self._slot, self._take = base.covered, host, slot, take
        self._whole = whole
        self._places: dict[Hashable, tuple[PlaceKey, Place]] = {
            place.key: (key, place) for key, place in base.slots.places.items() if key in host.keys
        }
        self._live = {id(t.tensor): t.key for t in base.covered.tensors()}
        self._taken: dict[Hashable, Tensor] = {}
        self._forms = {id(form.module): form for form in (*host.forms, *host.slot_forms)}

    def dicts(self) -> dict[str, Any]:
        """Every part.

        Returns:
            ``model``, ``extras`` (by name), ``optimizers`` (those handed over, then those that they wrap),
            ``schedulers``, ``scaler`` (or None): what the ``state_dict()`` of each would have been, with
            tensors on the CPU; ``attributes``: plain data among the attributes of module extras, by path;
            ``rng``: the random generators' states.

        Raises:
            SnapshotError: an optimizer cannot say the state that it had.
        """
        host, covered = self._host, self._covered
        extras: dict[str, Any] = {name: copied.copied() for name, copied in host.extras.items()}
        extras |= {prefix[:-1]: self.module(root) for prefix, root in covered.roots() if prefix}
        parts = {
            "model": self.module(covered.model),
            "optimizers": self.optimizers(),
            "schedulers": [copied.copied() for copied in host.schedulers],
            "scaler": self._scaler(),
            "extras": {name: extras[name] for name in covered.extras if name in extras},
            "attributes": {own.name: own.state.copied() for own in host.own_states if not own.is_extra_state},
            "rng": dict(host.rng),
        }
        # What schedulers, extras and loose state hold may lie on the device.
        return tree_map_only(Tensor, Tensor.cpu, parts)  # type: ignore[no-any-return]

    # -- modules ---------------------------------------------------------------------------------------------

    def module(self, root: nn.Module) -> OrderedDict[str, Any]:
        """What ``root.state_dict()`` would have been, by the modules of the capture; without hooks."""
        found: OrderedDict[str, Any] = OrderedDict()
        extra_states = {id(own.module): own.state for own in self._host.own_states if own.is_extra_state}
        stack = [("", root)]
        while stack:
            path, module = stack.pop()
            form = self._forms.get(id(module)) or ModuleForm.of(module)
            for name, parameter in form.parameters.items():
                left_out = not self._whole and self._covered.leaves_out(parameter)
                if parameter is not None and not left_out:
                    found[path + name] = self._tensor(("parameter", id(parameter)), parameter)
            for name, buffer in form.buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    found[path + name] = self._tensor(("buffer", id(module), name), buffer)
            if id(module) in extra_states:
                found[path + "_extra_state"] = extra_states[id(module)].copied()
            children = [(f"{path}{name}.", m) for name, m in form.children.items() if m is not None]
            stack += reversed(children)
        return found

    def _tensor(self, key: Hashable, live: Tensor | None) -> Tensor:
        """What the capture holds under ``key``; of what it does not cover, a copy of ``live``."""
        if key not in self._places:
            key = self._live.get(id(live), key)  # it has several names, and is kept under another
        if key not in self._places:
            assert live is not None, "what is gone is covered, or it could not come back"
            return live.detach().to("cpu", copy=True)
        if key not in self._taken:
            form, place = self._places[key]
            self._taken[key] = stored(form, self._take(place.slots[self._slot].cpu()))
        return self._taken[key]

    # -- optimizers ------------------------------------------------------------------------------------------

    def optimizers(self) -> list[dict[str, Any]]:
        """What the ``state_dict()`` of each would have been."""
        hosts = {id(host.optimizer): host for host in self._host.optimizers}
        twins: dict[int, Optimizer] = {}
        found = []
        for host in self._host.optimizers:
            try:
                found.append(self._twin(host.optimizer, hosts, twins).state_dict())
            except Exception as error:
                raise SnapshotError(
                    f"{type(host.optimizer).__name__}: its captured state cannot be told ({error!r})"
                ) from error
        return found

    def _twin(
        self, optimizer: Optimizer, hosts: Mapping[int, OptimizerHost], twins: dict[int, Optimizer]
    ) -> Optimizer:
        """An optimizer with the captured state, which nobody steps: to ask it for its ``state_dict``."""
        if id(optimizer) in twins:
            return twins[id(optimizer)]
        twin: Optimizer = object.__new__(type(optimizer))
        twins[id(optimizer)] = twin
        vars(twin).update(vars(optimizer))

        def of_then(value: object) -> object:
            if isinstance(value, Optimizer):
                return self._twin(value, hosts, twins)
            if type(value) is dict and any(isinstance(each, Optimizer) for each in value.values()):
                return {key: of_then(each) for key, each in value.items()}
            if type(value) in (list, tuple) and any(isinstance(each, Optimizer) for each in value):  # type: ignore[attr-defined]
                return type(value)(map(of_then, value))  # type: ignore[call-arg, call-overload]
            return value

        for name, value in vars(optimizer).items():
            if name != "state":
                vars(twin)[name] = of_then(value)
        host = hosts.get(id(optimizer))
        if host is None:  # its state is that of the one around it
            host = next((h for h in hosts.values() if h.optimizer.state is optimizer.state), None)
        if host is not None:
            vars(twin).update({name: copied.copied() for name, copied in host.attributes.items()})
            vars(twin)["state"] = self._optimizer_state(host)
            vars(twin)["param_groups"] = self._groups(host)
        return twin

    def _optimizer_state(self, host: OptimizerHost) -> defaultdict[Any, Any]:
        state: defaultdict[Any, Any] = defaultdict(dict)
        for parameter in (p for group in host.groups for p in group.params if id(p) in host.state_keys):
            values = copy.deepcopy(host.values.get(id(parameter), {}))
            live = host.optimizer.state.get(parameter, {})
            own = state[parameter]  # which may be there and empty
            for key in host.state_keys[id(parameter)]:
                where = ("state", id(host.optimizer), id(parameter), key)
                wrapper = host.wrappers.get(id(parameter), {}).get(key)
                if wrapper is not None:
                    own[key] = self._wrapped(where, wrapper)
                else:
                    own[key] = values[key] if key in values else self._tensor(where, live.get(key))
        state.update(loose_state.of_then(host.optimizer, host.loose))
        return state

    def _wrapped(self, where: tuple[object, ...], wrapper: Tensor) -> Tensor:
        return with_inner_tensors(wrapper, lambda path, inner: self._tensor((*where, *path), inner))

    def _groups(self, host: OptimizerHost) -> list[dict[str, Any]]:
        groups = []
        for group in host.groups:
            settings, first = group.settings.copied(), id(group.params[0]) if group.params else id(None)
            for key in group.keys - settings.keys() - {"params"}:
                where = ("group", id(host.optimizer), first, key)
                settings[key] = self._tensor(where, group.group[key])
            ordered = [key for key in group.group if key in settings]
            ordered += settings.keys() - set(ordered)  # it was taken out of the group since
            groups.append({"params": list(group.params), **{key: settings[key] for key in ordered}})
        return groups

    def _scaler(self) -> dict[str, Any] | None:
        """As ``GradScaler.state_dict()`` says it."""
        scaler, values = self._covered.scaler, self._host.scaler
        if scaler is None:
            return None
        if not values["_enabled"]:
            return {}

        def number(name: str, born: float) -> float:
            place = self._places.get(("scaler", name))
            return float(place[1].slots[self._slot]) if place else born

        return {
            "scale": number("_scale", values["_init_scale"]),
            "growth_factor": values["_growth_factor"],
            "backoff_factor": values["_backoff_factor"],
            "growth_interval": values["_growth_interval"],
            "_growth_tracker": int(number("_growth_tracker", 0)),
        }
