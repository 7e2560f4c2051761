"""Optimizer steps that are left out on the CPU: the host knows the verdict before the step, or within."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from tolaria.governor.closures import Arguments, closure_of, is_of_torch, outermost, with_closure
from tolaria.snapshot.covered import CoveredState
from tolaria.snapshot.undo import HostUndo


class LeftOutSteps:
    """Makes the steps of one optimizer do nothing while its owner says so.

    torch's own optimizers do nothing without gradients. Any other may count steps, average weights or decay
    them all the same, so what it holds is copied, only where a step is to be left out, and put back. The
    closure is not evaluated then. Where the verdict comes from within it, what follows is left out.

    An optimizer that evaluates its closure several times has changed its parameters by the second time. LBFGS
    and those that were seen to do so are copied after the first evaluation of every step, and before it those
    that were seen to change them by then (schedule-free ones).

    Args:
        covered: what is governed.
        optimizer: whose steps.
        is_bad: whether the step is to be left out, as far as the verdict is known.
        loss: the loss that was judged, for who asked a closure that is not evaluated.
    """

    def __init__(
        self,
        covered: CoveredState,
        optimizer: Optimizer,
        is_bad: Callable[[], bool],
        loss: Callable[[], Tensor],
    ) -> None:
        self._covered, self._optimizer = covered, optimizer
        self._is_bad, self._loss = is_bad, loss
        self._is_idle_without_gradients = is_of_torch(optimizer)
        self._evaluates_often = isinstance(optimizer, LBFGS)
        self._moves_first = False
        self._undo: HostUndo | None = None

    def hook(self) -> list[RemovableHandle]:
        """Watch its steps."""
        before = outermost(self._before_step, self._covered)
        after = outermost(lambda *_: self.finish(), self._covered)
        return [
            self._optimizer.register_step_pre_hook(before),
            self._optimizer.register_step_post_hook(after),
        ]

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        self._put_back()  # where the last step raised
        closure = closure_of(args, kwargs)
        if self._is_bad():
            self._leave_out()
            return None if closure is None else with_closure(args, kwargs, lambda *_, **__: self._loss())
        if closure is None:
            return None
        if self._moves_first:
            self._undo = HostUndo(self._covered, self._optimizer)
        return with_closure(args, kwargs, self._watched(closure))

    def _watched(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        evaluations, changes = 0, self._changes()

        @functools.wraps(closure, updated=())
        def evaluate(*args: object, **kwargs: object) -> object:
            nonlocal evaluations
            if evaluations and self._is_bad():
                return self._loss()
            self._moves_first = self._moves_first or (not evaluations and self._changes() != changes)
            loss = closure(*args, **kwargs)
            evaluations += 1
            self._evaluates_often = self._evaluates_often or evaluations > 1
            if self._is_bad():
                self._leave_out(may_copy=evaluations == 1)
            elif evaluations == 1 and self._evaluates_often and self._undo is None:
                self._undo = HostUndo(self._covered, self._optimizer)
            return loss

        return evaluate

    def _leave_out(self, *, may_copy: bool = True) -> None:
        """Take the gradients away; remember what there is where that is not enough."""
        is_idle = self._is_idle_without_gradients and not self._evaluates_often
        if may_copy and self._undo is None and not is_idle:
            self._undo = HostUndo(self._covered, self._optimizer)
        for parameter in self._parameters():
            if parameter.grad is not None:  # strange optimizers ask for one: a climb, a norm of them all
                parameter.grad = None if is_idle else torch.zeros_like(parameter.grad)

    def finish(self) -> None:
        """The step is over: put back what it changed, if it was to be left out."""
        self._put_back()
        if self._is_bad():
            for parameter in self._parameters():
                parameter.grad = None

    def _put_back(self) -> None:
        undo, self._undo = self._undo, None
        if undo is not None and self._is_bad():
            undo.put_back()

    def _changes(self) -> int:
        """Changes of the parameters in place so far."""
        return sum(parameter._version for parameter in self._parameters())

    def _parameters(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]
