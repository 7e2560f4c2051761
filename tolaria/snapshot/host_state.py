"""What a capture covers beside the tensors on the governor's device, and how it is put back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from tolaria.errors import SnapshotError
from tolaria.snapshot import loose_state
from tolaria.snapshot.covered import CoveredState
from tolaria.snapshot.fresh_state import fresh_value
from tolaria.snapshot.grad_scaler import load_scaler_values, scaler_values
from tolaria.snapshot.schedules import KeptRates

HostValues = dict[int, dict[int, dict[str, Any]]]
"""By step, then by the parameter's id: the entries of an optimizer's state that are on the host."""


@dataclass(slots=True)
class OptimizerHost:
    """The host-side part of one optimizer at a capture."""

    optimizer: Optimizer
    groups: list[dict[str, Any]]
    state_keys: dict[int, set[str]]
    values: dict[int, dict[str, Any]]
    loose: loose_state.Loose = field(default_factory=list)


@dataclass(slots=True)
class HostState:
    """Everything a capture covers that is no tensor on the governor's device."""

    optimizers: list[OptimizerHost]
    parameters: list[tuple[nn.Module, str, nn.Parameter]]
    """Which object every parameter was."""
    schedulers: list[dict[str, Any]]
    scaler: dict[str, Any]
    extras: dict[str, dict[str, Any]]
    modules: dict[str, dict[str, Any]]
    rng: dict[str, Any]
    rates_lowered: int
    """How often the learning rates had been lowered by then."""
    rate_moves: dict[int, int] = field(default_factory=dict)
    """How often the rates had been set by hand by then; see :meth:`ScheduleFinder.restored`."""
    keys: frozenset[Hashable] = field(default_factory=frozenset)
    """The places in the slots that the capture filled."""
    restores: int = 0
    """How often :meth:`load_into` has put it back: a repeated one draws other random numbers."""

    @classmethod
    def of(cls, covered: CoveredState) -> HostState:
        """A copy of every host-side part as it is now.

        Raises:
            SnapshotError: a scheduler or an extra cannot say its state.
        """
        walk = covered.walk()
        covered.schedules.captured(covered.optimizers)
        covered.find_schedules()
        return cls(
            optimizers=[_optimizer_host(covered, optimizer) for optimizer in covered.optimizers],
            parameters=[
                (module, name, parameter)
                for *_, module in walk.modules
                for name, parameter in module._parameters.items()
                if parameter is not None
            ],
            schedulers=[
                _told(f"schedulers[{i}]", scheduler.state_dict)
                for i, scheduler in enumerate(covered.schedulers)
            ],
            scaler=scaler_values(covered.scaler),
            extras={
                name: _told(f"extras[{name!r}]", extra.state_dict)
                for name, extra in covered.extras.items()
                if not isinstance(extra, nn.Module)
            },
            modules={name: module.rollback_state() for name, module in walk.participants},
            rng=covered.generators.state(),
            rates_lowered=covered.lowered.reflected,
            rate_moves=covered.schedules.moves_by_hand(),
        )

    def load_into(
        self,
        covered: CoveredState,
        *,
        keep_fresh: bool = False,
        again: bool = False,
        kept: KeptRates | None = None,
    ) -> None:
        """Put every host-side part back; what came into being after the capture is removed.

        Args:
            covered: what the capture was of; its tensors are restored already.
            keep_fresh: leave optimizer state that was put back to its value before the first step where it
                is, so that addresses stay what they were.
            again: the same restore once more, so with the same random numbers.
            kept: what :meth:`rates_to_keep` said before the tensors were restored; None: say it now.

        Raises:
            SnapshotError: a scheduler or an extra refused its state; everything else is back.
        """
        if kept is None:
            kept = self.rates_to_keep(covered)
            kept.tell_lost()
        captured = {id(host.optimizer): host for host in self.optimizers}
        for optimizer in covered.optimizers:
            if id(optimizer) in captured:
                _load_optimizer(optimizer, captured[id(optimizer)], keep_fresh=keep_fresh)
            else:  # unknown at the capture: it starts afresh
                optimizer.state.clear()
        kept.put_back()
        covered.schedules.restored(kept.before, self.rate_moves)
        covered.lowered.restored(self.rates_lowered, kept)
        self._reattach_parameters(covered)
        load_scaler_values(covered.scaler, self.scaler)
        for name, module in covered.walk().participants:
            module.load_rollback_state(self.modules.get(name))
        refused = [
            *(
                _refusal(f"schedulers[{i}]", scheduler.load_state_dict, state)
                for i, (scheduler, state) in enumerate(zip(covered.schedulers, self.schedulers, strict=False))
            ),
            *(
                _refusal(f"extras[{name!r}]", covered.extras[name].load_state_dict, state)
                for name, state in self.extras.items()
            ),
        ]
        self.restores += not again
        covered.generators.load(self.rng, max(0, self.restores - 1))
        for error in filter(None, refused):
            raise error

    def rates_to_keep(self, covered: CoveredState) -> KeptRates:
        """The rates that a restore leaves alone, since this capture does not know their schedule."""
        covered.find_schedules()
        return KeptRates(covered.optimizers, covered.schedulers, len(self.schedulers))

    def _reattach_parameters(self, covered: CoveredState) -> None:
        """Undo a replacement of parameter objects that the optimizers know nothing of.

        ``load_state_dict(assign=True)`` is one: the optimizers keep the old objects, the model has new ones.
        """
        held = {id(p) for o in covered.optimizers for group in o.param_groups for p in group["params"]}
        moved: set[int] = set()
        for module, name, parameter in self.parameters:
            has_place = name in module._parameters  # a ScriptModule's mapping has no get()
            current = module._parameters[name] if has_place else parameter
            if id(parameter) not in held or (id(current) in held and current is not parameter):
                continue
            if current is not None and id(parameter) not in moved:  # of tied ones the first was restored
                moved.add(id(parameter))
                if current is not parameter:
                    parameter.data = current.data
            if has_place:
                module._parameters[name] = parameter


def _told(name: str, state_dict: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return copy.deepcopy(state_dict())
    except Exception as error:
        raise SnapshotError(
            f"{name}: its state_dict() cannot be captured ({error!r}); nothing was captured"
        ) from error


def _refusal(
    name: str, load: Callable[[dict[str, Any]], object], state: dict[str, Any]
) -> SnapshotError | None:
    """What to raise once everything else is back, if ``load`` fails."""
    try:
        load(copy.deepcopy(state))
    except Exception as error:
        refusal = SnapshotError(
            f"{name}: its load_state_dict() failed in a rollback ({error!r}); everything else was put back"
        )
        refusal.__cause__ = error
        return refusal
    return None


def _optimizer_host(covered: CoveredState, optimizer: Optimizer) -> OptimizerHost:
    def host_values(values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            k: copy.deepcopy(v) for k, v in values.items() if k != "params" and not covered.is_captured(v)
        }

    groups = [host_values(g) for g in optimizer.param_groups]
    own = parameter_states(optimizer)
    state_keys = {id(parameter): set(state) for parameter, state in own}
    values = {id(parameter): host_values(state) for parameter, state in own}
    return OptimizerHost(optimizer, groups, state_keys, values, loose_state.copied(optimizer))


def parameter_states(optimizer: Optimizer, also: Collection[int] = ()) -> list[tuple[Tensor, dict[str, Any]]]:
    """State by parameter, of those in a group and those whose id is in ``also``."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}.union(also)
    return [(parameter, state) for parameter, state in optimizer.state.items() if id(parameter) in own]


def _load_optimizer(optimizer: Optimizer, captured: OptimizerHost, *, keep_fresh: bool) -> None:
    del optimizer.param_groups[len(captured.groups) :]
    for target, values in zip(optimizer.param_groups, captured.groups, strict=False):
        target.update(copy.deepcopy(values))
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for parameter, state in parameter_states(optimizer, also=captured.state_keys):
        keys, group = captured.state_keys.get(id(parameter), set()), groups.get(id(parameter))
        late = [k for k in state if k not in keys]
        if keep_fresh and group is not None and not keys:
            fresh = [
                isinstance(state[k], Tensor) and fresh_value(optimizer, group, k) is not None for k in late
            ]
            late = [] if all(fresh) and all(state[k].device == parameter.device for k in late) else late
        for key in late:
            del state[key]
        state.update(copy.deepcopy(captured.values.get(id(parameter), {})))
        if not state:
            del optimizer.state[parameter]
    loose_state.put_back(optimizer, captured.loose, keep=captured.state_keys)
