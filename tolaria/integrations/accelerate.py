"""The governor under Accelerate: ``guard(accelerator, model, optimizer, scheduler)`` after ``prepare``."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from tolaria._optional import require
from tolaria.governor import GovernorConfig, GovernorEvent, Sink
from tolaria.governor.optimizer_guard import Guard, judged_after
from tolaria.integrations._found import classes_of, say, world
from tolaria.snapshot.parts import ScheduleChoice
from tolaria.snapshot.protocols import Stateful
from tolaria.telemetry.scalars import scalars_of, step_of

# Accelerate has no types.
# ruff: noqa: ANN401


def guard(
    accelerator: Any,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    scheduler: Stateful | Sequence[Stateful] | None = None,
    config: GovernorConfig | None = None,
    *,
    num_classes: int | None = None,
    extras: Mapping[str, Stateful] | None = None,
    schedules: ScheduleChoice = "keep",
    sinks: Sequence[Sink] = (),
) -> Guard:
    """Govern a loop of Accelerate's: one line, after ``prepare``, and none in the loop.

    ::

        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
        guard(accelerator, model, optimizer, scheduler)

    The loss is the mean of what ``accelerator.backward`` is given between two steps; it is judged just after
    the optimizer has stepped, which it does at the end of an accumulation. Scaler, ranks and trackers are
    found. Before ``accelerator.save_state`` the state is verified, and, where one process trains, before
    ``save_model``, ``save`` and ``get_state_dict``; the governor's own state is among what ``save_state``
    writes and ``load_state`` reads.

    Args:
        accelerator: the ``Accelerator``.
        model: what ``prepare`` returned, or was given.
        optimizer: likewise, one or several.
        scheduler: likewise; schedules of torch are found anyway.
        config: settings; None means :meth:`GovernorConfig.balanced`.
        num_classes: of a classifier trained with cross entropy; None: looked for on the model.
        extras: named objects to roll back too, an EMA for instance.
        schedules: ``"keep"``: a rollback leaves schedules where they are; ``"rewind"``.
        sinks: called with every event, on every rank.

    Returns:
        The governor, which need not be kept. ``close()`` ends it, with a last look at the state.

    Raises:
        TypeError: one is of another kind.
        ValueError, RuntimeError: as for :func:`tolaria.guard`.
        MissingDependencyError: Accelerate is not installed.
    """
    package = require("accelerate", feature="accelerate.guard", package="accelerate", extra="accelerate")
    if not isinstance(accelerator, package.Accelerator):
        raise TypeError(f"accelerator: expected an Accelerator, got {type(accelerator).__name__}")
    config = judged_after(config)
    inner = accelerator.unwrap_model(model)
    schedulers = _listed(scheduler)
    classes = num_classes or classes_of(inner)
    governor = Guard(
        inner, optimizer,
        config=config, num_classes=classes, scaler=accelerator.scaler,
        schedulers=schedulers, extras=extras, schedules=schedules, process_group=world(),
        sinks=[lambda event: _track(accelerator, event), *sinks],
    )  # fmt: skip
    _tie(accelerator, governor)
    say(
        "Accelerate", optimizers=_listed(optimizer), schedulers=schedulers, scaler=accelerator.scaler,
        extras=dict(extras or {}), classes=classes, ranks=accelerator.num_processes,
    )  # fmt: skip
    return governor


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _track(accelerator: Any, event: GovernorEvent) -> None:
    scalars = scalars_of(event)
    if scalars and accelerator.trackers:
        accelerator.log(scalars, step=step_of(event))


def _tie(accelerator: Any, governor: Guard) -> None:
    """Wrap what the governor has to hear of, for as long as it is there."""
    known = weakref.ref(governor)

    def live() -> Guard | None:
        there = known()
        return None if there is None or there.is_closed else there

    def add_loss(loss: Any, **_: Any) -> None:
        there = live()
        if there is not None and isinstance(loss, Tensor) and loss.numel() == 1:
            there.add_loss(loss.detach())

    def step_is_over(*_: Any, **__: Any) -> None:
        there = live()
        if there is not None and accelerator.sync_gradients:
            there.step_if_left_out()

    def verify(*_: Any, **__: Any) -> None:
        there = live()
        if there is not None:
            there.verify()

    _wrap(accelerator, "backward", after=add_loss)
    # All ranks verify together, and may be trusted to meet in save_state alone.
    for name in ("save_state", *(("save_model", "save", "get_state_dict") if world() is None else ())):
        _wrap(accelerator, name, before=verify)
    for optimizer in accelerator._optimizers if accelerator.scaler is not None else ():
        _wrap(optimizer, "step", after=step_is_over)
    accelerator.register_for_checkpointing(_State(governor))


def _nothing(*_: Any, **__: Any) -> None:
    return


def _wrap(owner: Any, name: str, *, before: Any = _nothing, after: Any = _nothing) -> None:
    call = getattr(owner, name)

    @functools.wraps(call)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before(*args, **kwargs)
        result = call(*args, **kwargs)
        after(*args, **kwargs)
        return result

    setattr(owner, name, wrapped)


class _State:
    """The governor's state, as Accelerate saves and loads it."""

    def __init__(self, governor: Guard) -> None:
        self._governor = governor

    def state_dict(self) -> dict[str, Any]:
        return self._governor.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._governor.load_state_dict(state)
