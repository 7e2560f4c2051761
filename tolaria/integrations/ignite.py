"""The governor in ignite: ``TolariaHandler(model, optimizer).attach(engine)``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tolaria._arguments import check_optional
from tolaria._optional import require
from tolaria.data import SkipBatches
from tolaria.governor import GovernorConfig, Sink, TolariaGovernor
from tolaria.integrations._found import classes_of, say, world
from tolaria.integrations._saving import VerifiedStateDicts
from tolaria.snapshot.inner_optimizers import seen_through
from tolaria.snapshot.parts import ScheduleChoice
from tolaria.snapshot.protocols import Stateful

_engine = require("ignite.engine", feature="TolariaHandler", package="pytorch-ignite", extra="ignite")
_handlers = require("ignite.handlers", feature="TolariaHandler", package="pytorch-ignite", extra="ignite")
T = TypeVar("T", bound="TolariaHandler")


class TolariaHandler:
    """Governs the runs of an engine that trains; attach it before or behind other handlers, it goes first.

    Judged is each step of an optimizer, at ``ITERATION_COMPLETED``, by the mean of the losses since the one
    before. The governor is made when a run begins, so that a checkpoint can be loaded before. Where the loss
    is not finite, handlers behind this one are shown the output of the last iteration where it was: neither
    ``TerminateOnNan`` nor a running average ends a run that was healed. While it runs, whoever asks model or
    optimizer for its state dict (``Checkpoint`` does) gets a state that was verified. ``config.skip_batches``
    leaves batches out after a rollback. The handler has a ``state_dict`` of its own for ``to_save``.

    Args:
        model: as for :class:`TolariaGovernor`.
        optimizer: one, or several.
        loss: makes the loss of the process function's output: a number, a tensor of one value, or None, with
            which gradients and state are judged alone.
        config: settings; None means :meth:`GovernorConfig.balanced`.
        num_classes: of a classifier trained with cross entropy; None: looked for on the model.
        scaler, schedulers, extras: as for :class:`TolariaGovernor`.
        schedules: ``"keep"``: a rollback leaves schedules where the engine counts on; ``"rewind"``.
        sinks: called with every event; the engine's iteration is their tag.

    Attributes:
        governor: None before the first run begins.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        loss: Callable[[Any], Tensor | float | None] = lambda output: output,
        *,
        config: GovernorConfig | None = None,
        num_classes: int | None = None,
        scaler: torch.amp.GradScaler | None = None,
        schedulers: Sequence[Stateful] = (),
        extras: Mapping[str, Stateful] | None = None,
        schedules: ScheduleChoice = "keep",
        sinks: Sequence[Sink] = (),
    ) -> None:
        check_optional("config", config, GovernorConfig)
        if not callable(loss):
            raise TypeError(f"loss: expected a function of the output, got {type(loss).__name__}")
        self.governor: TolariaGovernor | None = None
        self._model, self._loss, self._config = model, loss, config or GovernorConfig.balanced()
        self._optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        self._options: dict[str, Any] = {
            "num_classes": num_classes or classes_of(model), "scaler": scaler, "schedulers": schedulers,
            "extras": extras, "schedules": schedules, "sinks": sinks,
        }  # fmt: skip
        self._saved: Mapping[str, Any] | None = None
        self._has_stepped, self._waits = False, False
        self._output: Any = None

    def attach(self: T, engine: Any) -> T:  # noqa: ANN401  (ignite's)
        """Govern what ``engine`` trains.

        Returns:
            Itself.

        Raises:
            TypeError: it is no engine.
            ValueError: it is attached to that engine already.
        """
        if not isinstance(engine, _engine.Engine):
            raise TypeError(f"engine: expected an ignite.engine.Engine, got {type(engine).__name__}")
        events = _engine.Events
        if engine.has_event_handler(self._judge, events.ITERATION_COMPLETED):
            raise ValueError("engine: expected one that this handler is not attached to")
        for event, handler in (
            (events.STARTED, self._begin),
            (events.ITERATION_COMPLETED, self._judge),
            (events.COMPLETED, self._end),
        ):
            engine.add_event_handler(event, handler)
            handlers = engine._event_handlers[event]
            handlers.insert(0, handlers.pop())  # what others look at is judged before
        return self

    def _begin(self, engine: Any) -> None:  # noqa: ANN401  (ignite's)
        if self.governor is None:
            self.governor = TolariaGovernor(
                self._model, self._optimizers, config=self._config, process_group=world(), **self._options
            )
            VerifiedStateDicts(self.governor, self._model, self._optimizers)
            for optimizer in self._optimizers:
                seen_through(optimizer).register_step_post_hook(self._stepped)
            say(
                "ignite", optimizers=self._optimizers, classes=self._options["num_classes"],
                scaler=self._options["scaler"], schedules=self._options["schedulers"],
            )  # fmt: skip
        else:
            self._saved = self._saved or self.governor.state_dict()
        if self._saved is not None:
            self.governor.load_state_dict(self._saved)
            self._saved = None
        if self._config.skip_batches and engine.state.dataloader is not None:
            engine.state.dataloader = SkipBatches(engine.state.dataloader, self.governor)
        behind = [each[0] for each in engine._event_handlers[_engine.Events.ITERATION_COMPLETED]]
        self._waits = any(isinstance(each, _handlers.TerminateOnNan) for each in behind)
        self._has_stepped, self._output = False, None

    def _stepped(self, *args: object) -> None:
        self._has_stepped = True

    def _judge(self, engine: Any) -> None:  # noqa: ANN401  (ignite's)
        governor, output = self.governor, engine.state.output
        assert governor is not None
        loss = self._loss(output)
        if loss is not None:
            governor.add_loss(loss)
        if self._has_stepped:
            self._has_stepped = False
            if governor._attached.judge.losses.count:  # a rollback between micro-batches drops theirs
                governor.step(tag=engine.state.iteration)
            else:
                governor.step(None, tag=engine.state.iteration)
        if loss is not None and not self._config.log_only:
            engine.state.output = self._output = self._shown(output, loss)

    def _shown(self, output: Any, loss: Tensor | float) -> Any:  # noqa: ANN401  (the process function's)
        """What other handlers see. Where the device alone knows whether it is finite, that selects."""
        last = self._output
        if last is None:
            return output
        if isinstance(loss, Tensor) and not loss.is_cpu and not self._waits:
            return torch.where(loss.isfinite(), output, last) if loss is output else output
        return output if math.isfinite(float(loss)) else last

    def _end(self, engine: Any) -> None:  # noqa: ANN401  (ignite's)
        self._output = None
        if self.governor is not None:
            self.governor.verify()

    def state_dict(self) -> dict[str, Any]:
        """The governor's, as plain values."""
        return self.governor.state_dict() if self.governor is not None else dict(self._saved or {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved run when the next one begins."""
        self._saved = state or None
