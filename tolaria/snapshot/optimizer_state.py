"""What an optimizer keeps beside the tensors that captures copy, and how it is put back."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tolaria.snapshot import loose_state
from tolaria.snapshot.covered import CoveredState
from tolaria.snapshot.fresh_state import fresh_value
from tolaria.snapshot.host_copy import HostCopy, is_plain, refill
from tolaria.snapshot.inner_optimizers import with_inner
from tolaria.snapshot.wrapped import is_like, is_wrapper

HostValues = dict[int, dict[int, dict[str, Any]]]
"""By step, then by the parameter's id: the entries of an optimizer's state that are on the host."""

_TORCHS_OWN = frozenset(vars(torch.optim.SGD([torch.zeros(1, device="cpu")], lr=0.0))) | {
    "_opt_called",
    "step",
}
"""Attributes that every optimizer has: groups, state, hooks, what schedules of torch mark."""


@dataclass(slots=True)
class GroupHost:
    """One parameter group: which dict it was, what it trained, its settings that are on the host."""

    group: dict[str, Any]
    params: list[Tensor]
    keys: frozenset[str]
    settings: HostCopy


@dataclass(slots=True)
class OptimizerHost:
    """The host-side part of one optimizer at a capture."""

    optimizer: Optimizer
    groups: list[GroupHost]
    state_keys: dict[int, tuple[str, ...]]
    values: dict[int, dict[str, Any]]
    wrappers: dict[int, dict[str, Tensor]]
    """State whose bytes are in tensors inside: the objects themselves, not copied."""
    loose: loose_state.Loose
    attributes: dict[str, HostCopy]
    """Counters and the like of optimizers that are not torch's own: plain data among their attributes."""

    @classmethod
    def of(cls, covered: CoveredState, optimizer: Optimizer) -> OptimizerHost:
        """A copy as it is now."""
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        own = parameter_states(optimizer)
        return cls(
            optimizer,
            groups=[
                GroupHost(
                    g, list(g["params"]), frozenset(g), HostCopy.of_settings(_on_host(covered, g), trained)
                )
                for g in optimizer.param_groups
            ],
            state_keys={id(parameter): tuple(state) for parameter, state in own},
            values={
                id(parameter): {k: copy.deepcopy(v) for k, v in _on_host(covered, state).items()}
                for parameter, state in own
            },
            wrappers=_wrappers(covered, own),
            loose=loose_state.copied(optimizer),
            attributes={name: HostCopy.of_settings(value, trained) for name, value in _attributes(optimizer)},
        )

    def bring_back_wrappers(self) -> None:
        """State that wraps tensors and is gone, or is another kind now, is again what it was at the capture.

        To be called before the tensors are restored, those inside of it too.
        """
        for parameter in (p for group in self.groups for p in group.params if id(p) in self.wrappers):
            state = self.optimizer.state.setdefault(parameter, {})
            for key, wrapper in self.wrappers[id(parameter)].items():
                if not is_like(state.get(key), wrapper):
                    state[key] = wrapper

    def load(self, *, keep_fresh: bool, dropped: Collection[int], keep_settings: bool) -> None:
        """Put it back; state that came into being after the capture is removed.

        Args:
            keep_fresh: leave state that was put back to its value before the first step where it is.
            dropped: ids of parameters that left the model with this restore, and its groups with it.
            keep_settings: leave settings that came since in the groups: a schedule of later put them there.
        """
        self._load_groups(dropped, keep_settings)
        self._load_state(keep_fresh)
        loose_state.put_back(self.optimizer, self.loose, keep=self.state_keys)
        for name, value in self.attributes.items():
            setattr(self.optimizer, name, refill(getattr(self.optimizer, name, None), value.fresh()))

    def _load_groups(self, dropped: Collection[int], keep_settings: bool) -> None:
        """Each captured group gets its parameters and settings back; what the user put in since, stays.

        A group is known by its parameters, since ``load_state_dict`` makes new dicts.
        """
        live, placed = self.optimizer.param_groups, {id(p) for host in self.groups for p in host.params}
        homes = {id(p): group for group in live for p in group["params"]}
        chosen: dict[int, dict[str, Any]] = {}  # by id, in their order

        def late(group: dict[str, Any]) -> list[Tensor]:
            return [p for p in group["params"] if id(p) not in placed and id(p) not in dropped]

        for host in self.groups:
            homely = (homes[id(p)] for p in host.params if id(p) in homes)
            group = next((g for g in homely if id(g) not in chosen), None)
            params = [*host.params, *(late(group) if group is not None else ())]
            if group is None:  # it was taken out, or it is empty
                group = host.group if id(host.group) not in chosen else dict(host.group)
            if list(map(id, group["params"])) != list(map(id, params)):
                group["params"] = params
            for key in () if keep_settings else group.keys() - host.keys:
                del group[key]
            group.update(host.settings.fresh())
            chosen[id(group)] = group
        for group in (g for g in live if id(g) not in chosen):
            group["params"] = late(group)
            if group["params"]:
                chosen[id(group)] = group
        if list(chosen) != list(map(id, live)):
            live[:] = list(chosen.values())

    def _load_state(self, keep_fresh: bool) -> None:
        optimizer = self.optimizer
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for parameter, state in parameter_states(optimizer, also=self.state_keys):
            keys, group = self.state_keys.get(id(parameter), ()), groups.get(id(parameter))
            late = [k for k in state if k not in keys]
            if keep_fresh and group is not None and not keys:
                fresh = [
                    isinstance(state[k], Tensor)
                    and not is_wrapper(state[k])
                    and fresh_value(optimizer, group, k) is not None
                    for k in late
                ]
                late = [] if all(fresh) and all(state[k].device == parameter.device for k in late) else late
            for key in late:
                del state[key]
            state.update(copy.deepcopy(self.values.get(id(parameter), {})))
            if not state and id(parameter) not in self.state_keys:
                del optimizer.state[parameter]


def parameter_states(optimizer: Optimizer, also: Collection[int] = ()) -> list[tuple[Tensor, dict[str, Any]]]:
    """State by parameter, of those in a group and those whose id is in ``also``."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}.union(also)
    return [(parameter, state) for parameter, state in optimizer.state.items() if id(parameter) in own]


def _wrappers(
    covered: CoveredState, own: list[tuple[Tensor, dict[str, Any]]]
) -> dict[int, dict[str, Tensor]]:
    found: dict[int, dict[str, Tensor]] = {}
    for parameter, state in own:
        for key, value in state.items():
            # The type first: this is asked of every state tensor at every capture.
            if type(value) is not Tensor and is_wrapper(value) and covered.is_captured(value):
                found.setdefault(id(parameter), {})[key] = value
    return found


def _on_host(covered: CoveredState, values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k != "params" and not covered.is_captured(v)}


def _attributes(optimizer: Optimizer) -> Iterator[tuple[str, Any]]:
    """Its attributes that are data; those of torch's optimizers are constants."""
    if type(optimizer).__module__.startswith("torch.optim"):
        return
    # An inner optimizer's state under a name of the outer one's is covered already, and must stay one object.
    known = {id(held) for each in with_inner([optimizer]) for held in (each.state, each.param_groups)}
    for name, value in vars(optimizer).items():
        if name not in _TORCHS_OWN and id(value) not in known and is_plain(value):
            yield name, value
