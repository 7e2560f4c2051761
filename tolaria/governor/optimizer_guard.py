"""A governor that is called by the optimizers themselves, for loops that hide theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tolaria._arguments import check_optional
from tolaria.governor.closures import outermost
from tolaria.governor.config import GovernorConfig
from tolaria.governor.governor import TolariaGovernor
from tolaria.snapshot.inner_optimizers import seen_through
from tolaria.snapshot.parts import ScheduleChoice
from tolaria.snapshot.protocols import Stateful
from tolaria.telemetry.sinks import Sink

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Guard(TolariaGovernor):
    """A :class:`TolariaGovernor` whose :meth:`step` its optimizers call; :func:`guard` makes it.

    It lives as long as an optimizer that it watches, or until :meth:`close`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer],
        **options: Any,  # noqa: ANN401  (those of its base)
    ) -> None:
        super().__init__(model, optimizers, **options)
        self._handles: dict[int, RemovableHandle] = {}
        for optimizer in [optimizers] if isinstance(optimizers, Optimizer) else optimizers:
            self._watch(optimizer)

    def _watch(self, optimizer: Optimizer) -> None:
        """Judge after its steps. What is inside of it is part of them; a trainer's wrapper does not step."""
        optimizer = seen_through(optimizer)
        if id(optimizer) not in self._handles:
            hook = outermost(self._stepped, self._engine.covered)
            self._handles[id(optimizer)] = optimizer.register_step_post_hook(hook)

    def _stepped(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Here, not in the pre-hook: a restore there would be followed by the step that called for it.
        if self._attached.judge.losses.count:
            self.step()
        else:
            self.step(None)

    def step_if_left_out(self) -> None:
        """Judge the losses of a step that a GradScaler has left out, of which no hook has heard, if any.

        For whoever knows that a step is over: without it a run whose every step is left out, since its
        weights are not finite, would be judged no more.
        """
        if self._attached.judge.losses.count:
            self.step()

    def add_optimizer(self, optimizer: Optimizer) -> None:
        """As for any governor; its steps are judged, too."""
        super().add_optimizer(optimizer)
        self._watch(optimizer)

    def close(self) -> None:
        """As for any governor; then steps are judged no more."""
        try:
            super().close()
        finally:
            if self.is_closed:
                for handle in self._handles.values():
                    handle.remove()
                self._handles.clear()


def judged_after(config: GovernorConfig | None) -> GovernorConfig:
    """Settings for whoever judges after the step; None: :meth:`GovernorConfig.balanced`.

    Raises:
        TypeError: they are something else.
        ValueError: they ask for ``skip_anomalous_steps``, which needs a judgement before the step.
    """
    check_optional("config", config, GovernorConfig)
    config = config or GovernorConfig.balanced()
    if config.skip_anomalous_steps:
        raise ValueError(
            "config: expected skip_anomalous_steps=False, got True; here a step is judged once it is taken, "
            "use TolariaGovernor and check_vital_signs to leave them out"
        )
    return config


def guard(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    config: GovernorConfig | None = None,
    scaler: torch.amp.GradScaler | None = None,
    schedulers: Sequence[Stateful] = (),
    extras: Mapping[str, Stateful] | None = None,
    schedules: ScheduleChoice = "rewind",
    sinks: Sequence[Sink] = (),
    process_group: ProcessGroup | None = None,
    name: str | None = None,
) -> Guard:
    """Govern a loop whose loss nobody hands over, by hooks on the optimizer alone: no call per step.

    For trainers that hide their loop (agents of Stable-Baselines3, TRL's GRPO)::

        governor = tolaria.guard(model, optimizer)
        trainer.train()  # as ever

    The gradients' norm is taken just before each step of the optimizer, where they are whole. Just after it
    the norm and the state are judged: if one is not finite the state goes back at once; if all is well and
    one is due, it is captured. What only a loss would show (a spike, a collapse) is not judged, unless
    somebody calls ``add_loss`` before the step. A step costs two passes, over gradients and state. One that a
    GradScaler leaves out is not judged.

    Args:
        model: as for :class:`TolariaGovernor`.
        optimizer: one, or several; each of their steps is judged.
        config: settings; None means :meth:`GovernorConfig.balanced`.
        scaler: the ``GradScaler`` in use: overflows are routine then.
        schedulers: as for :class:`TolariaGovernor`, like all that follow.
        extras: named objects to roll back, too.
        schedules: whether a rollback takes schedulers back.
        sinks: called with every event.
        process_group: ranks that judge together.
        name: stands on every event.

    Returns:
        The governor, which need not be kept: the optimizer keeps it.

    Raises:
        ValueError: a parameter is not finite; or ``config`` asks for ``skip_anomalous_steps``, which needs a
            judgement before the step.
        TypeError, RuntimeError: as for :class:`TolariaGovernor`.
    """
    config = judged_after(config)
    return Guard(
        model, optimizer,
        config=config, scaler=scaler, schedulers=schedulers, extras=extras, schedules=schedules, sinks=sinks,
        process_group=process_group, name=name,
    )  # fmt: skip
