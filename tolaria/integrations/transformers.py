"""The governor in Transformers' ``Trainer``, and in TRL's: ``TolariaCallback().install(trainer)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from torch import Tensor

from tolaria._arguments import check_choice, check_optional
from tolaria._optional import require
from tolaria.governor import GovernorConfig, GovernorEvent, RollbackEvent, Sink, TolariaGovernor, VerdictEvent
from tolaria.integrations._found import say, world
from tolaria.integrations._transformers_batches import LaterBatches
from tolaria.integrations._transformers_found import classes_of_trainer, is_judged_by_loss
from tolaria.integrations._transformers_log import TrainerLog
from tolaria.integrations._transformers_saves import STATE, Checkpoints
from tolaria.snapshot.parts import Cover, ScheduleChoice
from tolaria.telemetry.scalars import scalars_of

_transformers = require(
    "transformers", feature="TolariaCallback", package="transformers", extra="transformers"
)
T = TypeVar("T", bound="TolariaCallback")


class TolariaCallback(_transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Governs the runs of a ``Trainer``: ``TolariaCallback().install(trainer)`` before ``trainer.train()``.

    Judged is each optimizer step, by the loss that the trainer would log, before other callbacks see the step
    as done; trainers that maximise rewards (TRL's GRPO) by gradients and state alone, since their loss says
    nothing. Found by itself: optimizer, schedule, scaler, ranks, adapters (PEFT's frozen parameters are not
    covered), and the loss of guessing where the trainer's own loss is a cross entropy. Before each checkpoint
    and evaluation the state is verified, so that what is saved is finite; ``save_total_limit`` leaves the
    last checkpoint of a state that nothing has undone. No NaN of a step that was undone stays in the log. The
    governor's state is in ``trainer_state.json``, and resumed from it. With ``config.skip_batches`` batches
    are left out after a rollback.

    Args:
        config: settings; None means :meth:`GovernorConfig.balanced`.
        num_classes: of a classifier trained with cross entropy, the vocabulary of a language model; None:
            looked for.
        on_save: ``"verify"``, or ``"trust"``: checkpoints are written without a look.
        schedules: ``"keep"``: a rollback leaves schedules where the trainer counts on; ``"rewind"``.
        cover: as for :class:`TolariaGovernor`; None: ``"trained"`` of a PEFT model, else ``"all"``.
        sinks: called with every event.

    Attributes:
        governor: that of the run; None before it begins.
    """

    def __init__(
        self,
        config: GovernorConfig | None = None,
        *,
        num_classes: int | None = None,
        on_save: Literal["verify", "trust"] = "verify",
        schedules: ScheduleChoice = "keep",
        cover: Cover | None = None,
        sinks: Sequence[Sink] = (),
    ) -> None:
        check_optional("config", config, GovernorConfig)
        check_choice("on_save", on_save, ("verify", "trust"))
        check_choice("schedules", schedules, ("keep", "rewind"))
        self.governor: TolariaGovernor | None = None
        self._config, self._num_classes = config or GovernorConfig.balanced(), num_classes
        self._verifies, self._schedules, self._cover = on_save == "verify", schedules, cover
        self._sinks, self._trainer, self._is_closed = tuple(sinks), None, True
        self._batches: LaterBatches | None = None
        self._events: list[GovernorEvent] = []
        self._loss: Tensor | None = None

    def install(self: T, trainer: Any) -> T:  # noqa: ANN401  (Transformers')
        """Put itself first among the callbacks of ``trainer``, and around what it calls.

        Returns:
            Itself.

        Raises:
            TypeError: it is no ``Trainer``.
            ValueError: this callback, or another of its kind, is installed there or elsewhere.
        """
        if not isinstance(trainer, _transformers.Trainer):
            raise TypeError(f"trainer: expected a transformers.Trainer, got {type(trainer).__name__}")
        callbacks = trainer.callback_handler.callbacks
        others = [each for each in callbacks if isinstance(each, TolariaCallback) and each is not self]
        if self._trainer is not None or others:
            raise ValueError(
                "trainer: expected one without a TolariaCallback, and a callback without a trainer"
            )
        callbacks[:] = [self, *(each for each in callbacks if each is not self)]
        self._trainer, self._log = trainer, TrainerLog(trainer)
        self._checkpoints = Checkpoints(trainer, self._live, verifies=self._verifies)
        self._training_step, trainer.training_step = trainer.training_step, self._told_step
        if self._config.skip_batches:
            self._batches = LaterBatches(trainer, self._live)
        return self

    def _live(self) -> TolariaGovernor | None:
        return None if self._is_closed else self.governor

    # -- a run begins and ends -------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Attach: the optimizer is there, and a checkpoint is loaded.

        Raises:
            RuntimeError: it is not installed.
        """
        if self._trainer is None:
            raise RuntimeError("TolariaCallback: callbacks get no loss; call install(trainer) before train()")
        self._close()
        self._loss = None
        trainer, saved = self._trainer, state.stateful_callbacks.get(STATE)
        model, adapted = trainer.model, hasattr(trainer.model, "peft_config")
        scaler = getattr(trainer.accelerator, "scaler", None)
        classes = self._num_classes or classes_of_trainer(trainer)
        self.governor = TolariaGovernor(
            model, trainer.optimizer,
            config=self._config, num_classes=classes, schedulers=[trainer.lr_scheduler],
            schedules=self._schedules, scaler=scaler, cover=self._cover or ("trained" if adapted else "all"),
            process_group=world(), sinks=[self._hear, *self._sinks],
        )  # fmt: skip
        self._is_closed = False
        if saved is not None:
            self.governor.load_state_dict(saved)
        if self._batches is not None:
            self._batches.begin(self.governor)
        self._checkpoints.begin()
        say(
            "Transformers", optimizer=trainer.optimizer, schedule=trainer.lr_scheduler, scaler=scaler,
            classes=classes, ranks=args.world_size,
        )  # fmt: skip

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """The last word."""
        self._close()
        self._tell()

    def _close(self) -> None:
        if self.governor is not None and not self._is_closed:
            self._is_closed = True
            self.governor.close()

    # -- every step ------------------------------------------------------------------------------------------

    def _told_step(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  (Transformers')
        trainer: Any = self._trainer
        if not self._config.log_only:
            self._log.begin_step()
        loss = self._training_step(*args, **kwargs)
        if isinstance(loss, Tensor) and loss.numel() == 1 and is_judged_by_loss(trainer):
            part = loss.detach().reshape(()).float()
            self._loss = part if self._loss is None else self._loss + part
        return loss

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Judge."""
        governor = self._live()
        if governor is None:
            return
        loss, self._loss = self._loss, None
        governor.step(loss, tag=state.global_step)
        self._log.end_step()
        self._tell()

    def _hear(self, event: GovernorEvent) -> None:
        if isinstance(event, RollbackEvent):
            self._checkpoints.undone(event.report.restored_step)
        if isinstance(event, RollbackEvent | VerdictEvent):
            self._log.hear(event)
            self._events.append(event)

    def _tell(self) -> None:
        """Log the numbers of what went wrong, past what TRL's trainers do at a log."""
        events, self._events[:] = list(self._events), []
        for event in events:
            _transformers.Trainer.log(self._trainer, scalars_of(event))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ANN401
        """Leave out what is not finite."""
        if self._live() is not None and logs and not self._config.log_only:
            self._log.clean(logs)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Nothing of it is left out yet."""
        if self._batches is not None:
            self._batches.begin_epoch()
