"""The governor in Lightning: ``Trainer(callbacks=[TolariaCallback()])``, or ``Fabric(callbacks=[...])``.

It serves ``lightning.pytorch`` and ``pytorch_lightning``, and is a callback of whichever is imported first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tolaria._arguments import check_choice
from tolaria.governor import GovernorConfig, GovernorEvent, RollbackEvent, Sink, TolariaGovernor, VerdictEvent
from tolaria.governor.batches import BatchDebt
from tolaria.governor.optimizer_guard import judged_after
from tolaria.integrations import _lightning_parts as parts
from tolaria.integrations._fabric import FabricHooks
from tolaria.integrations._found import classes_of, say, world
from tolaria.snapshot.parts import ScheduleChoice

# Lightning's own arguments have no types here, since two packages define them.
# ruff: noqa: ANN401


class TolariaCallback(FabricHooks, parts.callback_class()):  # type: ignore[misc]
    """Governs a run of Lightning's ``Trainer``, or of Fabric: one line to add.

    Each optimizer step is judged, of automatic and of manual optimization, by the mean loss of its batches
    (what ``training_step`` returns; without that by gradients and state alone), before other callbacks see
    the batch as done. Found by itself: optimizers, schedules, scaler, averages of the weights
    (``EMAWeightAveraging``), ranks, the number of classes (``num_classes`` of the module or its hparams), and
    the loggers, which get what the governor tells. The state is verified before each checkpoint and
    validation, so that what is saved as best or last is finite; running results of the epoch are freed of
    what was not. The governor's state is in the checkpoint, and resumed from it. With ``config.skip_batches``
    batches are left out after a rollback, though never the last one of an epoch.

    Args:
        config: settings; None means :meth:`GovernorConfig.balanced`.
        num_classes: of a classifier trained with cross entropy; None: looked for.
        on_save: ``"verify"``; ``"trust"`` writes checkpoints without a look.
        schedules: ``"keep"``: a rollback leaves schedules where the trainer counts on; ``"rewind"``.
        sinks: called with every event.

    Raises:
        TypeError: ``config`` is something else.
        ValueError: it asks for ``skip_anomalous_steps``, as steps are judged once they are taken; or a word
            is no choice.

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
        sinks: Sequence[Sink] = (),
    ) -> None:
        super().__init__()
        check_choice("on_save", on_save, ("verify", "trust"))
        check_choice("schedules", schedules, ("keep", "rewind"))
        self.governor: TolariaGovernor | None = None
        self._config, self._num_classes = judged_after(config), num_classes
        self._verifies, self._schedules, self._sinks = on_save == "verify", schedules, tuple(sinks)
        self._saved: Mapping[str, Any] | None = None
        self._ended: Mapping[str, Any] | None = None
        self._results: parts.TrainingResults | None = None
        self._begin_step(0)

    def _begin_step(self, global_step: int) -> None:
        self._global_step, self._has_loss, self._is_bad = global_step, False, False

    # -- a run begins ----------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Go first: an average that another callback keeps is to be made of what was put back."""
        trainer.callbacks = [self, *(other for other in trainer.callbacks if other is not self)]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach: optimizers are there, and a checkpoint is loaded."""
        self._close()
        averages = parts.averages_of(trainer.callbacks)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        schedulers = [each.scheduler for each in trainer.lr_scheduler_configs]
        classes = self._num_classes or classes_of(pl_module)
        self._results = parts.TrainingResults(trainer.fit_loop.epoch_loop)
        self._begin_step(trainer.global_step)
        self.governor, self._ended = TolariaGovernor(
            pl_module, trainer.optimizers,
            config=self._config, num_classes=classes, schedulers=schedulers, schedules=self._schedules,
            scaler=scaler, extras=averages, process_group=world(),
            sinks=[self._hear, lambda event: parts.log(trainer, event), *self._sinks],
        ), None  # fmt: skip
        self._resume()
        self._debt = BatchDebt(self.governor.batch_ledger)
        self._verify_saves(trainer)
        say(
            "Lightning", optimizers=trainer.optimizers, schedulers=schedulers, scaler=scaler,
            averages=averages, classes=classes, ranks=trainer.world_size, loggers=trainer.loggers,
        )  # fmt: skip

    def _verify_saves(self, trainer: Any) -> None:
        """Here, since Lightning asks no callback where weights alone are saved."""
        if not self._verifies or "save_checkpoint" in vars(trainer):
            return
        save = trainer.save_checkpoint

        def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
            self.verify()
            return save(*args, **kwargs)

        trainer.save_checkpoint = save_checkpoint

    # -- every batch -----------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """What was kept of results belongs to the last epoch."""
        if self._results is not None:
            self._results.forget()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judge, if an optimizer has stepped."""
        governor, automatic, loss = self.governor, pl_module.automatic_optimization, parts.loss_of(outputs)
        assert governor is not None
        assert self._results is not None
        if loss is not None:
            divided = trainer.accumulate_grad_batches if automatic else 1  # by Lightning, a short window, too
            governor.add_loss(loss if divided == 1 else loss * divided)
            self._has_loss = True
        step = trainer.global_step
        if step == self._global_step:
            return
        if self._has_loss:
            governor.step(tag=step)
        elif not automatic:  # else training_step has returned None, and nothing was trained
            governor.step(None, tag=step)
        (self._results.free if self._is_bad else self._results.keep)()
        self._begin_step(step)
        if self._config.skip_batches:
            parts.leave_out(trainer.fit_loop, self._debt, governor.batch_ledger)

    def _hear(self, event: GovernorEvent) -> None:
        self._is_bad |= isinstance(event, VerdictEvent | RollbackEvent)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """What NaN in the weights makes of a metric would stay with EarlyStopping and ModelCheckpoint."""
        self.verify()

    def verify(self) -> bool:
        """Whether the state was finite; else it has been rolled back."""
        is_fine = super().verify()
        if not is_fine:
            self._has_loss = False  # a rollback has dropped what was added
            if self._results is not None:
                self._results.free()
        return bool(is_fine)

    # -- state, and the end ----------------------------------------------------------------------------------

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The last look, before an average becomes the model."""
        self._close()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the trainer as it was."""
        vars(trainer).pop("save_checkpoint", None)

    def _close(self) -> None:
        if self.governor is not None and self._ended is None:
            self.verify()
            self._ended = self.governor.state_dict()
            self.governor.close()

    def state_dict(self) -> dict[str, Any]:
        """The governor's, as plain values."""
        if self.governor is None:
            return dict(self._saved or {})
        return dict(self.governor.state_dict() if self._ended is None else self._ended)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until there are optimizers."""
        self._saved = state_dict
