"""Leaving out the optimizer step of a loss that was not healthy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tolaria.governor.tracked import TrackedState


class StepSkipper:
    """Makes ``optimizer.step()`` do nothing after an unhealthy verdict, and undoes what the forward did to buffers.

    On the CPU a step without gradients is a step not taken: parameters, moments and step counters stay as they are,
    for every optimizer of torch. (An optimizer that calls a closure computes new gradients; it is not skipped.) The
    buffers are copied after every step, since the next forward changes them before its loss can be judged.
    """

    def __init__(self, tracked: TrackedState) -> None:
        self._tracked = tracked
        self._skip = False
        self._handles: list[RemovableHandle] = []
        self._buffers: list[Tensor] = []
        self._copies: list[Tensor] = []
        for optimizer in tracked.optimizers:
            self.hook(optimizer)
        self.after_step()

    def hook(self, optimizer: Optimizer) -> None:
        """Watch one more optimizer."""
        self._handles.append(optimizer.register_step_pre_hook(self._before_optimizer_step))

    def _before_optimizer_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._skip:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def after_verdict(self, *, skip: bool) -> None:
        """Whether the optimizer steps up to the next call of :meth:`after_step` are left out."""
        self._skip = skip
        if skip and self._buffers:
            torch._foreach_copy_(self._buffers, self._copies)

    def after_step(self) -> None:
        """The step is over: what the buffers hold now is what an undone forward goes back to."""
        self._skip = False
        buffers = [b.detach() for b in self._tracked.model.buffers()]
        if [b.data_ptr() for b in buffers] != [b.data_ptr() for b in self._buffers]:
            self._buffers, self._copies = buffers, [b.clone() for b in buffers]
        elif buffers:
            torch._foreach_copy_(self._copies, buffers)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
