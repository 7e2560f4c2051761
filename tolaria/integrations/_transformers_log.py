"""The log of Transformers' Trainer: what a step that was undone has put there is taken out again."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tolaria.governor import GovernorEvent, VerdictEvent


class TrainerLog:
    """Keeps the trainer's running sum of losses, and what it logs, finite.

    Args:
        trainer: whose.
    """

    def __init__(self, trainer: Any) -> None:  # noqa: ANN401  (Transformers')
        self._trainer = trainer
        self._before: Tensor | None = None
        self._nan_step: int | str | None = None

    def begin_step(self) -> None:
        """A micro-batch begins; the trainer's own filter, which waits for the device, is not needed."""
        if self._before is None and not self._trainer.args.logging_nan_inf_filter:
            self._before = self._trainer._tr_loss.clone()

    def end_step(self) -> None:
        """Put the mean of the steps before in the place of a NaN, as that filter does; nothing waits."""
        before, self._before = self._before, None
        if before is not None:
            trainer = self._trainer
            steps, total = trainer.state.global_step - trainer._globalstep_last_logged, trainer._tr_loss
            total.copy_(torch.where(total.isfinite(), total, before * (steps / max(1, steps - 1))))

    def hear(self, event: GovernorEvent) -> None:
        """What the governor tells."""
        if isinstance(event, VerdictEvent) and not math.isfinite(event.loss):
            self._nan_step = event.tag

    def clean(self, logs: dict[str, Any]) -> None:
        """Take what is not finite out of what was just logged: ``trainer_state.json`` stays strict JSON.

        So is a mean loss of 0, which is what both filters make of a NaN that no other step is logged with.
        """
        state = self._trainer.state
        for name in ("loss", "grad_norm"):
            value = logs.get(name)
            is_filtered = name == "loss" and value == 0.0 and self._nan_step == state.global_step
            if is_filtered or (isinstance(value, float) and not math.isfinite(value)):
                del logs[name]
                state.log_history[-1].pop(name, None)
