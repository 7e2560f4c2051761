"""The governor in Fabric: what ``Fabric(callbacks=[TolariaCallback()])`` calls."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tolaria.governor import GovernorConfig, Sink, TolariaGovernor
from tolaria.governor.optimizer_guard import Guard
from tolaria.integrations._found import classes_of, say, world
from tolaria.snapshot.parts import ScheduleChoice


class FabricHooks:
    """The part of ``TolariaCallback`` that serves Fabric.

    Fabric tells when a module is set up, but neither its loss nor its optimizers. So the governor is made
    just before an optimizer of the module first steps, by a hook that torch calls before each step of any;
    and ``fabric.backward`` and ``fabric.save`` are wrapped: the loss is the mean of what the former is given.
    """

    governor: TolariaGovernor | None
    _config: GovernorConfig
    _num_classes: int | None
    _verifies: bool
    _schedules: ScheduleChoice
    _sinks: tuple[Sink, ...]
    _saved: Mapping[str, Any] | None
    _ended: Mapping[str, Any] | None
    _setup: _Setup | None = None

    def verify(self) -> bool:
        """Whether the state was finite; else it has been rolled back."""
        return self.governor is None or self._ended is not None or bool(self.governor.verify())

    def on_after_setup(self, fabric: Any, module: nn.Module) -> None:  # noqa: ANN401  (Fabric's)
        """Govern ``module`` together with those that were set up before.

        Call it by hand after ``fabric.setup_module``, of which Fabric tells nobody.
        """
        if self._setup is None:
            self._setup = _Setup(self, fabric)
        self._setup.modules.append(getattr(module, "module", module))

    def on_after_optimizer_step(self, strategy: Any, optimizer: Any) -> None:  # noqa: ANN401  (Fabric's)
        """A step that the scaler has left out is over, too."""
        if isinstance(self.governor, Guard):
            self.governor.step_if_left_out()

    def _attach_to_fabric(self, fabric: Any, modules: list[nn.Module], optimizer: Optimizer) -> None:  # noqa: ANN401
        model = modules[0] if len(modules) == 1 else nn.ModuleList(modules)
        classes = self._num_classes or classes_of(modules[0])
        scaler = getattr(fabric.strategy.precision, "scaler", None)
        self.governor = Guard(
            model, optimizer,
            config=self._config, num_classes=classes, scaler=scaler, schedules=self._schedules,
            process_group=world(), sinks=self._sinks,
        )  # fmt: skip
        self._resume()
        say("Fabric", optimizers=[optimizer], scaler=scaler, classes=classes, ranks=fabric.world_size)

    def _resume(self) -> None:
        """Go on from what was loaded before there was a governor."""
        if self._saved is not None and self.governor is not None:
            self.governor.load_state_dict(self._saved)
            self._saved = None


class _Setup:
    """One Fabric, its modules, and who steps over them."""

    def __init__(self, callback: FabricHooks, fabric: Any) -> None:  # noqa: ANN401  (Fabric's)
        self.modules: list[nn.Module] = []
        self._callback = weakref.ref(callback)
        self._fabric = fabric
        self._early: list[Tensor] = []
        self._seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._wrap(fabric)
        me = weakref.ref(self)

        def before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            setup = me()
            if setup is not None and optimizer not in setup._seen:
                setup._meet(optimizer)

        weakref.finalize(self, register_optimizer_step_pre_hook(before_step).remove)

    def _wrap(self, fabric: Any) -> None:  # noqa: ANN401  (Fabric's)
        backward, save = fabric.backward, fabric.save

        def told_backward(tensor: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
            backward(tensor, *args, **kwargs)
            if tensor.numel() == 1:
                self._tell(tensor.detach())

        def verified_save(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401
            callback = self._callback()
            if callback is not None and callback._verifies and callback.governor is not None:
                callback.verify()
            save(*args, **kwargs)

        fabric.backward, fabric.save = told_backward, verified_save

    def _tell(self, loss: Tensor) -> None:
        callback = self._callback()
        governor = None if callback is None else callback.governor
        if governor is None:
            self._early.append(loss)
        else:
            governor.add_loss(loss)

    def _meet(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step for the first time."""
        self._seen.add(optimizer)
        callback = self._callback()
        own = {id(p) for module in self.modules for p in module.parameters()}
        if callback is None or not any(id(p) in own for g in optimizer.param_groups for p in g["params"]):
            return
        if callback.governor is None:
            callback._attach_to_fabric(self._fabric, self.modules, optimizer)
            early, self._early = self._early, []
            for loss in early:
                self._tell(loss)
        else:
            callback.governor.add_optimizer(optimizer)
