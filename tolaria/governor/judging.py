"""What is judged, in the form in which the judge takes it; and questions to it beforehand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tolaria import ops
from tolaria._arguments import as_flag, as_number
from tolaria.governor.distributed import agree, agree_on_flag
from tolaria.governor.engine import Engine
from tolaria.governor.row import Row
from tolaria.governor.skipping import StepSkipper
from tolaria.ops import StateField
from tolaria.ops.governor import judge_
from tolaria.snapshot import graphs
from tolaria.telemetry.verdict import Verdict

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Judge:
    """Judges for one governor: numbers become tensors, ranks agree, and what has to be searched is.

    Args:
        row: the governor's memory.
        process_group: ranks that judge together, or None.
    """

    def __init__(self, row: Row, process_group: ProcessGroup | None) -> None:
        self._row = row
        self._group = process_group
        self.skipper: StepSkipper | None = None
        """What leaves bad steps out, if anything does: it knows what buffers hold once one is."""
        # Numbers that are judged are written here, on the device, which a stream does without waiting.
        device = row.state.device
        self._scalar, self._norm = torch.zeros(2, 1, dtype=torch.float64, device=device).unbind()
        self._flag = torch.zeros(1, dtype=torch.bool, device=device)

    def judge(
        self,
        engine: Engine,
        loss: Tensor | float,
        nonfinite: Tensor | bool | None,
        gradient_norm: Tensor | float | None = None,
    ) -> bool:
        """Judge; whether there is anything to carry out or to tell, which is rare.

        The arguments and what is raised are those of :meth:`TolariaGovernor.check_vital_signs`.
        """
        row = self._row
        if not isinstance(loss, Tensor):
            loss = self._scalar.fill_(as_number("loss", loss))
        if nonfinite is not None and not isinstance(nonfinite, Tensor):
            nonfinite = self._flag.fill_(as_flag("nonfinite", nonfinite))
        gradient: Tensor | None = None
        if isinstance(gradient_norm, Tensor):
            gradient = gradient_norm
        elif gradient_norm is not None:
            gradient = self._norm.fill_(as_number("gradient_norm", gradient_norm))
        elif row.config.gradient_norm:
            gradient = engine.gradient_stats()
        engine.judging()
        if engine.is_recording():
            graphs.outlive(self._scalar, self._norm, self._flag)
        if self._group is not None:
            loss, nonfinite, gradient = agree(self._group, row.state, row.config, loss, nonfinite, gradient)
        state_bad = self._state_flag(engine, loss, nonfinite, gradient)
        must_act = judge_(
            row.state,
            row.settings,
            loss,
            nonfinite,
            row.mailbox,
            gradient,
            row.reader.told,
            engine.covered.optimizers,
            engine.structure,
            state_bad,
        )
        engine.judged()  # not before: a call that was refused has judged nothing
        return must_act

    def _state_flag(
        self, engine: Engine, loss: Tensor, nonfinite: Tensor | None, gradient: Tensor | None
    ) -> Tensor | None:
        """Whether the state is not finite, where that decides between letting a step pass and a rollback."""
        row = self._row
        if not row.config.skips_before_rollback:
            return None
        if row.state.is_cpu and not bool(
            would_roll_back(row.state, row.settings, loss, nonfinite, None, gradient)
        ):
            return None
        skipper = self.skipper
        flag = engine.state_check.flag(None if skipper is None else skipper.put_back_buffers())
        return flag if self._group is None else agree_on_flag(self._group, row.state, flag)


def check_verdict(verdict: Verdict, latest: Verdict | None, **others: object) -> None:
    """A verdict given in place of a loss must be the ``latest``, and say all.

    Raises:
        ValueError: it is older, or one of the ``others`` comes with it.
    """
    if verdict is not latest:
        raise ValueError("loss: expected the verdict that was returned last, got an older one")
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"{name}: expected None with a verdict, which is judged already")


def would_roll_back(
    state: Tensor,
    settings: Tensor,
    losses: Tensor,
    nonfinite: Tensor | None,
    active: Tensor | None,
    gradient: Tensor | None,
) -> Tensor:
    """Which governors would roll back if no bad step was let pass: bool ``(n,)``. Judges on a copy.

    Args, and what is raised: as for :func:`tolaria.ops.governor_step_`.
    """
    trial = state.clone()
    always = torch.ones(state.shape[1], dtype=torch.bool, device=state.device)
    ops.governor_step_(trial, settings, losses, nonfinite, active, None, gradient, always)
    rolls_back = trial[StateField.rollback] != 0
    return rolls_back if active is None else rolls_back & (active.reshape(-1) != 0)
