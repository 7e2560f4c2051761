"""What a capture covers beside the tensors on the governor's device, and how it is put back."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import Tensor, nn

from tolaria.errors import SnapshotError
from tolaria.snapshot.covered import CoveredState, Walk
from tolaria.snapshot.grad_scaler import load_scaler_values, scaler_values
from tolaria.snapshot.host_copy import HostCopy, is_plain
from tolaria.snapshot.lowered_rates import RatesThen
from tolaria.snapshot.module_tree import ModuleForm, put_back_tree
from tolaria.snapshot.optimizer_state import OptimizerHost
from tolaria.snapshot.protocols import TakesPartInRollback
from tolaria.snapshot.schedules import KeptRates


@dataclass(slots=True)
class HostState:
    """Everything a capture covers that is no tensor on the governor's device."""

    optimizers: list[OptimizerHost]
    forms: tuple[ModuleForm, ...]
    """Which object stood where in the modules."""
    slot_forms: tuple[ModuleForm, ...]
    """The same for modules that take part in rollbacks, without the seeds that a restore drops."""
    schedulers: list[HostCopy]
    scaler: dict[str, Any]
    extras: dict[str, HostCopy]
    modules: list[tuple[TakesPartInRollback, dict[str, Any]]]
    own_states: list[OwnState]
    rng: dict[str, Any]
    rates_lowered: int
    """How often the learning rates had been lowered by then."""
    lowered: RatesThen | None = None
    """The rates, if they were lowered for a time by then."""
    rate_moves: dict[int, int] = field(default_factory=dict)
    """How often the rates had been set by hand by then; see :meth:`ScheduleFinder.restored`."""
    keys: frozenset[Hashable] = field(default_factory=frozenset)
    """The places in the slots that the capture filled."""
    restores: int = 0
    """How often :meth:`load_into` has put it back: a repeated one draws other random numbers."""

    @classmethod
    def of(cls, covered: CoveredState, walk: Walk | None = None) -> HostState:
        """A copy of every host-side part as it is now.

        Args:
            covered: what there is.
            walk: that of now, if known.

        Raises:
            SnapshotError: a scheduler, an extra or a module cannot say its state.
        """
        walk = walk or covered.walk()
        if not covered.by_hand:
            covered.schedules.captured(covered.optimizers)
        covered.find_schedules()
        return cls(
            optimizers=[OptimizerHost.of(covered, optimizer) for optimizer in covered.optimizers],
            forms=covered.forms,
            slot_forms=tuple(_slot_form(covered, module) for _, module in walk.participants),
            schedulers=[
                _copied(f"schedulers[{i}]", scheduler.state_dict)
                for i, scheduler in enumerate(covered.schedulers)
            ],
            scaler=scaler_values(covered.scaler),
            extras={
                name: _copied(f"extras[{name!r}]", extra.state_dict)
                for name, extra in covered.extras.items()
                if not isinstance(extra, nn.Module)
            },
            modules=[(module, module.rollback_state()) for _, module in walk.participants],
            own_states=list(_own_states(walk)),
            rng=covered.generators.state(),
            rates_lowered=covered.lowered.reflected,
            lowered=covered.lowered.now(covered.optimizers, covered.schedulers),
            rate_moves=covered.schedules.moves_by_hand(),
        )

    def extra_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors among the extras' parts, by name: what a capture of slots does not search."""
        for name, state in self.extras.items():
            for tensor in state.tensors():
                yield f"extras[{name!r}]", tensor

    def bring_back(self, covered: CoveredState) -> None:
        """Give modules and parameters that were lost since their place back, and seeds if done by hand.

        To be called before the tensors are restored, which is done for what can be reached. Parameters whose
        optimizer is covered no more stay away, and what replaced them stays: nobody would train them.
        """
        if covered.by_hand:
            self._load_modules(covered)
        live = {id(p) for o in covered.optimizers for group in o.param_groups for p in group["params"]}
        for host in self.optimizers:
            trained = {id(p) for group in host.groups for p in group.params}
            if any(host.optimizer is optimizer for optimizer in covered.optimizers):
                live |= trained
                host.bring_back_wrappers()
        trained = {id(p) for host in self.optimizers for group in host.groups for p in group.params}
        given_up = _with_holders(self.forms, trained - live)
        put_back_tree(self.forms, lambda: [m for *_, m in covered.walk().modules], given_up)

    def load_into(
        self,
        covered: CoveredState,
        *,
        keep_fresh: bool = False,
        again: bool = False,
        kept: KeptRates | None = None,
    ) -> None:
        """Put every host-side part back; state that came into being after the capture is removed.

        Args:
            covered: what the capture was of; its tensors are restored already.
            keep_fresh: leave optimizer state that was put back to its value before the first step where it
                is, so that addresses stay what they were.
            again: the same restore once more, so with the same random numbers.
            kept: what :meth:`rates_to_keep` said before the tensors were restored; None: say it now.

        Raises:
            SnapshotError: a scheduler, an extra or a module refused its state; everything else is back.
        """
        if kept is None:
            kept = self.rates_to_keep(covered)
            if not covered.keeps_schedules:
                kept.tell_lost()
        dropped = self._load_modules(covered)
        captured = {id(host.optimizer): host for host in self.optimizers}
        for optimizer in covered.optimizers:
            if id(optimizer) in captured:
                driven_since = id(optimizer) in kept.ids
                captured[id(optimizer)].load(
                    keep_fresh=keep_fresh, dropped=dropped, keep_settings=driven_since
                )
            else:  # unknown at the capture: it starts afresh
                optimizer.state.clear()
        kept.put_back()
        if not covered.by_hand:
            covered.schedules.restored(kept.before, self.rate_moves)
        covered.lowered.restored(self.rates_lowered, kept, self.lowered)
        load_scaler_values(covered.scaler, self.scaler)
        refused = [
            *(
                _refusal(f"schedulers[{i}]", scheduler.load_state_dict, state)
                for i, (scheduler, state) in enumerate(zip(covered.schedulers, self.schedulers, strict=False))
                if not covered.keeps_schedules
            ),
            *(
                _refusal(f"extras[{name!r}]", covered.extras[name].load_state_dict, state)
                for name, state in self.extras.items()
            ),
            *(_refusal(own.name, own.load, own.state) for own in self.own_states),
        ]
        self.restores += not again
        if covered.generators.are_covered:
            covered.generators.load(self.rng, max(0, self.restores - 1))
        for error in filter(None, refused):
            raise error

    def _load_modules(self, covered: CoveredState) -> frozenset[int]:
        """Take the participants back; the ids of parameters that left the model with that."""
        before = covered.walk()
        captured = {id(module): state for module, state in self.modules}
        options = {"keep_seed": True} if covered.by_hand else {}
        for _, module in before.participants:
            module.load_rollback_state(captured.get(id(module)), **options)
        if not before.participants:
            return frozenset()
        return _parameter_ids(before) - _parameter_ids(covered.walk()) | covered.retired_ids()

    def rates_to_keep(self, covered: CoveredState) -> KeptRates:
        """The rates that a restore leaves alone, since this capture does not know their schedule."""
        covered.find_schedules()
        known = 0 if covered.keeps_schedules else len(self.schedulers)
        return KeptRates(covered.optimizers, covered.schedulers, known)


@dataclass(frozen=True, slots=True)
class OwnState:
    """State that a module keeps beside its tensors, and how it takes it back."""

    module: nn.Module
    name: str
    load: Callable[[Any], object]
    state: HostCopy
    is_extra_state: bool


def _own_states(walk: Walk) -> Iterator[OwnState]:
    """What modules say in ``get_extra_state``; of modules among the extras also counters and the like.

    Those of an extra (an EMA's count of updates, a metric's sums) are plain data among its attributes.
    """
    for prefix, path, module in walk.modules:
        name = prefix + path or "model"
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            state = _copied(f"{name}.get_extra_state()", module.get_extra_state)
            yield OwnState(module, f"{name}.set_extra_state()", module.set_extra_state, state, True)
        if prefix and not type(module).__module__.startswith("torch.nn"):  # whose attributes are settings
            data = {k: v for k, v in vars(module).items() if k not in _MODULES_OWN and is_plain(v)}
            if data:
                yield OwnState(module, name, vars(module).update, HostCopy.of(data), False)


_MODULES_OWN = frozenset(vars(nn.Module())) | {"_is_full_backward_hook"}


def _slot_form(covered: CoveredState, module: TakesPartInRollback) -> ModuleForm:
    form = ModuleForm.of(cast(nn.Module, module))
    drops_seed = not covered.by_hand and module.zero_alpha_tensors()
    return replace(form, children={}) if drops_seed else form


def _parameter_ids(walk: Walk) -> frozenset[int]:
    return frozenset(id(p) for *_, module in walk.modules for _, p in module._parameters.items())


def _with_holders(forms: tuple[ModuleForm, ...], parameters: set[int]) -> set[int]:
    """The ids of parameters, and of the modules that hold one of them at any depth."""
    found = set(parameters)
    while found:
        holders = {
            id(form.module)
            for form in forms
            if any(id(o) in found for o in (*form.children.values(), *form.parameters.values()))
        }
        if holders <= found:
            break
        found |= holders
    return found


def _copied(name: str, state_dict: Callable[[], Any]) -> HostCopy:
    try:
        return HostCopy.of(state_dict())
    except Exception as error:
        raise SnapshotError(
            f"{name}: its state cannot be captured ({error!r}); nothing was captured"
        ) from error


def _refusal(name: str, load: Callable[[Any], object], state: HostCopy) -> SnapshotError | None:
    """What to raise once everything else is back, if ``load`` fails."""
    try:
        load(state.fresh())
    except Exception as error:
        refusal = SnapshotError(
            f"{name}: it refused its state in a rollback ({error!r}); everything else was put back"
        )
        refusal.__cause__ = error
        return refusal
    return None
