"""What is judged, in the form in which the judge takes it; and questions to it beforehand."""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from tolaria import ops
from tolaria._arguments import as_flag, as_number
from tolaria.governor.distributed import agree, agree_on_flag
from tolaria.governor.engine import Engine
from tolaria.governor.gradient_norms import GradientNorms
from tolaria.governor.loss_mean import LossMean
from tolaria.governor.rates import RateWatch
from tolaria.governor.row import Row
from tolaria.governor.skipping import StepSkipper, remove_hooks
from tolaria.governor.without_loss import WithoutLoss
from tolaria.ops import Order, StateField, StatusField
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
        self.has_a_share = False
        """Whether the host has something of its own to do at the end of every step."""
        # Numbers that are judged are written here, on the device, which a stream does without waiting.
        device = row.state.device
        self.losses = LossMean(device)
        """Those of the micro-batches of this step."""
        self.norms: GradientNorms | None = None
        """What looks at the gradients, once it is asked for."""
        self._without = WithoutLoss(row)  # here: later a device would have to be waited for
        self._rates = RateWatch()
        self._scalar, self._norm = torch.zeros(2, 1, dtype=torch.float64, device=device).unbind()
        self._flag = torch.zeros(1, dtype=torch.bool, device=device)

    def judge(
        self,
        engine: Engine,
        loss: Tensor | float | None,
        nonfinite: Tensor | bool | None,
        gradient_norm: Tensor | float | None = None,
        *,
        is_ahead: bool = False,
    ) -> bool:
        """Judge; whether there is anything to carry out or to tell, which is rare.

        The arguments and what is raised are those of :meth:`TolariaGovernor.check_vital_signs`; ``is_ahead``:
        the optimizers have not stepped yet.
        """
        row = self._row
        without = self._without if loss is None else None
        if loss is None:
            loss, nonfinite = self._without.loss, self._bad_state(engine, nonfinite)
        elif not isinstance(loss, Tensor):
            loss = self._scalar.fill_(as_number("loss", loss))
        if nonfinite is not None and not isinstance(nonfinite, Tensor):
            nonfinite = self._flag.fill_(as_flag("nonfinite", nonfinite))
        gradient: Tensor | None = None
        if isinstance(gradient_norm, Tensor):
            gradient = _one_norm(gradient_norm, row.state.device)
        elif gradient_norm is not None:
            gradient = self._norm.fill_(as_number("gradient_norm", gradient_norm))
        elif row.config.gradient_norm or without is not None:
            gradient = self._asked_norms(engine).take(is_ahead=is_ahead)
            if gradient is None and self._group is not None:  # those with gradients reduce theirs
                gradient = self._norm.zero_()
        engine.judging()
        if engine.is_recording():
            graphs.outlive(self._scalar, self._norm, self._flag)
        if self._group is not None:
            loss, nonfinite, gradient = agree(self._group, row.state, row.config, loss, nonfinite, gradient)
        state_bad = self._state_flag(engine, loss, nonfinite, gradient)
        if without is not None:
            without.begin()
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
        if row.config.shift_horizon and not engine.is_recording():
            rollbacks = row.status(StatusField.rollback_count)
            if self._rates.is_restart(engine.covered.optimizers, rollbacks):
                row.order(Order.RELEARN)
        if without is not None:
            without.end()
        if self.norms is not None:
            self.norms.judged(was_handed_over=gradient_norm is not None, is_ahead=is_ahead)
        return must_act or self.has_a_share

    def step_ended(self) -> None:
        """A step that was judged ahead is over."""
        if self.norms is not None:
            self.norms.judged(was_handed_over=False, is_ahead=False)

    def _asked_norms(self, engine: Engine) -> GradientNorms:
        if self.norms is None:
            self.norms = GradientNorms(engine)
            weakref.finalize(self, remove_hooks, self.norms.handles)
        return self.norms

    def watch_gradients(self, engine: Engine) -> None:
        """Take norms from the next step of an optimizer on, if the settings ask for them."""
        if self._row.config.gradient_norm:
            self._asked_norms(engine)

    def _bad_state(self, engine: Engine, nonfinite: Tensor | bool | None) -> Tensor | bool | None:
        """``nonfinite``, raised too where the state is not finite, on the device."""
        flag = engine.state_check.flag(None if self.skipper is None else self.skipper.put_back_buffers())
        if flag is None or nonfinite is None:
            return flag if nonfinite is None else nonfinite
        if isinstance(nonfinite, Tensor):
            return (flag != 0) | (nonfinite.reshape(1) != 0)
        return (flag != 0) | as_flag("nonfinite", nonfinite)

    def is_on_any_rank(self, flag: bool) -> bool:
        """Whether ``flag`` is raised here or, where ranks judge together, on any of them; then it waits."""
        if self._group is None:
            return flag
        raised = torch.full_like(self._row.state[0], float(flag))
        return bool(agree_on_flag(self._group, self._row.state, raised) != 0)  # sync: asked for by name

    @property
    def may_ask_ranks(self) -> bool:
        """Whether this rank alone decides, or the others can still be asked and come to the same call."""
        return self._group is None or (dist.is_initialized() and sys.exc_info()[0] is None)

    def close(self) -> None:
        """Remove the hooks."""
        self.losses.clear()
        if self.norms is not None:
            self.norms.close()

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


def _one_norm(norm: Tensor, device: torch.device) -> Tensor:
    """A norm that was handed over, before the judge, who calls it by another name, sees it.

    Raises:
        TypeError, ValueError: it is no floating tensor of one value on ``device``.
    """
    if not norm.is_floating_point():
        raise TypeError(f"gradient_norm: expected a floating tensor, got dtype {norm.dtype}")
    if norm.numel() != 1:
        raise ValueError(f"gradient_norm: expected one value, got shape {tuple(norm.shape)}")
    if norm.device != device:
        raise ValueError(f"gradient_norm: expected device {device}, got {norm.device}")
    return norm


def check_verdict(verdict: Verdict, latest: Verdict | None, **others: object) -> None:
    """A verdict given in place of a loss must be the ``latest``, and say all.

    Raises:
        ValueError: it is older, or one of the ``others`` comes with it.
    """
    if verdict is not latest:
        raise ValueError("loss: expected the verdict that was returned last, got another")
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
