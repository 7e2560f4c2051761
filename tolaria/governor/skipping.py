"""Leaving out the optimizer step of a loss that was not healthy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tolaria.errors import ConfigError
from tolaria.governor.tracked import TrackedState


class StepSkipper:
    """Makes ``optimizer.step()`` do nothing after an unhealthy verdict; undoes the forward's buffer changes.

    On the CPU a step without gradients is a step not taken: parameters, moments and step counters stay as
    they are, for every optimizer of torch. (An optimizer that calls a closure computes new gradients; it is
    not skipped.) On CUDA the host does not know the verdict: a fused optimizer skips by itself when its
    ``found_inf`` is set, which is merged with GradScaler's.

    The buffers are copied after every step, since the next forward changes them before its loss can be
    judged.

    Raises:
        ConfigError: an optimizer on CUDA is not fused.
    """

    def __init__(self, tracked: TrackedState) -> None:
        self._tracked = tracked
        self._on_device = tracked.device.type == "cuda"
        self._skip = False
        self._flag = torch.zeros((), dtype=torch.float32, device=tracked.device)
        self._handles: list[RemovableHandle] = []
        self._buffers: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._lent: dict[int, bool] = {}
        for optimizer in tracked.optimizers:
            self.hook(optimizer)
        self.after_step()

    def hook(self, optimizer: Optimizer) -> None:
        """Watch one more optimizer."""
        if self._on_device and not all(group.get("fused") for group in optimizer.param_groups):
            raise ConfigError(
                f"skip_anomalous_steps: expected optimizers made with fused=True on CUDA, got "
                f"{type(optimizer).__name__} without it; nothing else can leave out a step that the host "
                "knows nothing of"
            )
        before = self._set_found_inf if self._on_device else self._drop_gradients
        self._handles.append(optimizer.register_step_pre_hook(before))
        if self._on_device:
            self._handles.append(optimizer.register_step_post_hook(self._remove_found_inf))

    def _drop_gradients(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._skip:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def _set_found_inf(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        lent_to: Any = optimizer  # what fused kernels read is no declared attribute
        scalers = getattr(optimizer, "found_inf", None)
        self._lent[id(optimizer)] = not hasattr(optimizer, "grad_scale")
        if self._lent[id(optimizer)]:
            lent_to.grad_scale = None
        lent_to.found_inf = self._flag if scalers is None else torch.maximum(scalers, self._flag)

    def _remove_found_inf(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        lent_to: Any = optimizer
        if self._lent.pop(id(optimizer), False):  # GradScaler removes what it set itself
            del lent_to.grad_scale, lent_to.found_inf

    def after_verdict(self, reason: Tensor) -> None:
        """Leave out the optimizer steps up to the next :meth:`after_step` unless ``reason`` ``(1,)`` is 0."""
        if not self._on_device:
            self._skip = bool(reason != 0)
            if self._skip and self._buffers:
                torch._foreach_copy_(self._buffers, self._copies)
            return
        skip = (reason != 0).view(())
        self._flag.copy_(skip)
        for buffer, copy in zip(self._buffers, self._copies, strict=True):
            buffer.copy_(torch.where(skip, copy, buffer))

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
