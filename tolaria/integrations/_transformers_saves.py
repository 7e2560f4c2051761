"""Checkpoints of Transformers' Trainer: verified before they are written, and the last healthy one stays."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from os.path import normpath
from pathlib import Path
from typing import Any

from tolaria.governor import TolariaGovernor
from tolaria.integrations._found import world

STATE = "tolaria"
"""Where the governor's state is among the trainer's: under the callback's name it would rebuild that."""


class Checkpoints:
    """Which of the checkpoints written so far are of states that no rollback has undone.

    Args:
        trainer: whose; its ``save_model``, ``_save_checkpoint`` and ``evaluate`` are wrapped.
        governor: tells the governor of now, or None while there is none.
        verifies: whether the state is verified before it is written.
    """

    def __init__(
        self,
        trainer: Any,  # noqa: ANN401  (Transformers')
        governor: Callable[[], TolariaGovernor | None],
        *,
        verifies: bool,
    ) -> None:
        self._trainer, self._governor, self._verifies = trainer, governor, verifies
        self._written: dict[str, int] = {}
        self._folder: str | None = None
        self._save_model, self._save_checkpoint = trainer.save_model, trainer._save_checkpoint
        self._evaluate, trainer.evaluate = trainer.evaluate, self._verified_evaluation
        trainer.save_model, trainer._save_checkpoint = self._verified_model, self._kept_checkpoint

    def begin(self) -> None:
        """A run begins, from a checkpoint maybe: that one is the state at attach."""
        self._written.clear()
        state = self._trainer.state
        resumed = Path(self._trainer.args.output_dir, f"checkpoint-{state.global_step}")
        if state.global_step and resumed.is_dir():
            self._written[normpath(resumed)] = 0

    def undone(self, step: int) -> None:
        """A rollback went back to what was captured at ``step`` of the governor."""
        self._written = {folder: at for folder, at in self._written.items() if at <= step}

    def _verified_evaluation(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401  (Transformers')
        governor = self._governor()
        if governor is not None:
            governor.verify()
        return self._evaluate(*args, **options)

    def _verified_model(
        self,
        output_dir: str | None = None,
        _internal_call: bool = False,
        **options: Any,  # noqa: ANN401
    ) -> None:
        governor = self._governor()
        # Of several ranks all take part in a checkpoint; what a user saves the first may save alone.
        if governor is not None and self._verifies and (_internal_call or world() is None):
            governor.verify()
        self._save_model(output_dir, _internal_call=_internal_call, **options)
        if governor is not None and _internal_call:
            self._folder = output_dir
            self._trainer.state.stateful_callbacks[STATE] = governor.state_dict()
            self._trainer.args.save_total_limit = None  # after the arguments are written, before it deletes

    def _kept_checkpoint(self, *args: Any, **options: Any) -> None:  # noqa: ANN401  (Transformers')
        arguments = self._trainer.args
        limit, self._folder = arguments.save_total_limit, None
        try:
            self._save_checkpoint(*args, **options)
        finally:
            arguments.save_total_limit = limit
        governor = self._governor()
        if governor is None or self._folder is None:
            return
        if limit is not None and limit > 0 and arguments.should_save:
            self._rotate(Path(self._folder), limit, self._healthy(governor.last_good_step))
        self._written[normpath(self._folder)] = governor.step_count

    def _healthy(self, last_good_step: int) -> list[str]:
        """The newest that is as old as the last known good state, and the next, which may soon be so."""
        there = [folder for folder in self._written if Path(folder).is_dir()]
        good = [folder for folder in there if self._written[folder] <= last_good_step]
        return good[-1:] + there[len(good) :][:1]

    def _rotate(self, newest: Path, limit: int, healthy: list[str]) -> None:
        """Delete the oldest as the trainer would, but for the healthy ones."""
        best = self._trainer.state.best_model_checkpoint
        kept = {normpath(folder) for folder in (newest, best, *healthy) if folder is not None}
        found = [folder for folder in newest.parent.glob("checkpoint-*") if folder.is_dir()]
        found.sort(key=lambda folder: folder.stat().st_mtime)
        excess = len(found) - max(limit, len(kept))
        for folder in [f for f in found if normpath(f) not in kept][: max(0, excess)]:
            shutil.rmtree(folder, ignore_errors=True)
