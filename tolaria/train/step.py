"""One optimizer step, top to bottom; the three epoch functions share it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tolaria.nn.nest import to_device
from tolaria.nn.schedule import AlphaSchedule
from tolaria.tasks.spec import TaskType
from tolaria.train.batch import batch_rows, call_model, for_criterion, split_batch

Criterion = Callable[[Tensor, Tensor], Tensor]


class GovernorConfigLike(Protocol):
    """What a step needs to know of a governor's settings."""

    @property
    def skip_anomalous_steps(self) -> bool:
        """Whether the loss is judged before the optimizer steps."""
        ...

    @property
    def gradient_norm(self) -> bool:
        """Whether the gradient's norm is judged, too."""
        ...


class GovernorLike(Protocol):
    """The part of :class:`tolaria.TolariaGovernor` that a step calls."""

    @property
    def config(self) -> GovernorConfigLike:
        """Its settings."""
        ...

    def check_vital_signs(self, loss: Tensor) -> object:
        """Judge a loss; the verdict goes to :meth:`step`."""
        ...

    def step(self, loss: Any, *, gradient_norm: Tensor | None = None) -> object:  # noqa: ANN401  (or a verdict)
        """Judge, restore, capture; ``gradient_norm``: from before clipping, where that is known."""
        ...


class StepHooks:
    """Places inside a step where others may look or meddle, without waiting; nothing is done here."""

    def before_forward(self) -> None:
        """Before the first forward of a step."""

    def on_loss(self, loss: Tensor) -> Tensor:
        """The loss of a micro-batch, before its backward; what is returned is used instead."""
        return loss

    def after_backward(self) -> None:
        """Gradients are complete and still scaled; nothing is clipped yet."""

    def after_step(self, loss: Tensor) -> None:
        """Optimizers and governor have stepped; ``loss`` is the mean micro-batch loss, on the device."""


@dataclass(slots=True)
class Learner:
    """An optimizer with its clipping and its scaler: the host's, or a seed's."""

    optimizer: Optimizer
    """Whose parameters are clipped and stepped."""
    max_grad_norm: float | None = None
    """Clip the norm over its own parameters to this; None: leave it."""
    scaler: GradScaler | None = None
    """Its own; a scaler is never shared, so that an overflow here changes nothing there."""

    def finish(self) -> Tensor | None:
        """Unscale, clip, step; nothing if no parameter has a gradient. The norm before it clips."""
        with_grad = [
            p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        if not with_grad:
            return None
        norm = self.prepare(with_grad)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
        else:
            self.optimizer.step()
        return norm

    def prepare(self, with_grad: Sequence[Tensor]) -> Tensor | None:
        """Unscale and clip; the norm before, if it clips."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.max_grad_norm is None:
            return None
        return nn.utils.clip_grad_norm_(with_grad, self.max_grad_norm)


@dataclass(slots=True)
class StepPlan:
    """Everything a step needs beside its batches."""

    model: nn.Module
    """Takes the inputs, returns logits."""
    criterion: Criterion
    """Logits and targets to a 0-dim loss."""
    device: torch.device
    """Where the batches go."""
    task_type: TaskType
    """``"lm"`` flattens tokens for the criterion."""
    host: Learner
    """Steps first."""
    seed: Learner | None = None
    """Steps after the host, from the same backward pass."""
    amp_dtype: torch.dtype | None = None
    """Run forwards under autocast with this dtype."""
    schedulers: Sequence[LRScheduler] = ()
    """Stepped after the optimizers."""
    alpha_schedules: Sequence[AlphaSchedule] = ()
    """Stepped before the forward."""
    governor: GovernorLike | None = None
    """Told the loss once per step."""
    hooks: StepHooks = field(default_factory=StepHooks)
    """Who looks on."""

    def autocast(self) -> AbstractContextManager[object]:
        """The context that forwards run in."""
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)


def train_step(plan: StepPlan, micro_batches: Sequence[object]) -> tuple[Tensor, int]:
    """Forward and backward over the micro-batches, then a step of each optimizer. Never waits for the device.

    Args:
        plan: how.
        micro_batches: at least one batch; the loss is the mean over them.

    Returns:
        The mean micro-batch loss (0-dim, detached, on the device) and the number of samples.
    """
    for schedule in plan.alpha_schedules:
        schedule.step()
    plan.hooks.before_forward()
    _zero_grad(plan)
    loss, rows = _accumulate(plan, micro_batches)
    plan.hooks.after_backward()

    verdict = None
    if plan.governor is not None and plan.governor.config.skip_anomalous_steps:
        verdict = plan.governor.check_vital_signs(
            loss
        )  # its hooks on the optimizers then leave a bad step out
    norm = _step_optimizers(plan)
    if plan.governor is not None:
        if verdict is None and norm is not None and plan.governor.config.gradient_norm:
            plan.governor.step(loss, gradient_norm=norm)
        else:
            plan.governor.step(loss if verdict is None else verdict)
    plan.hooks.after_step(loss)
    return loss, rows


def _zero_grad(plan: StepPlan) -> None:
    plan.host.optimizer.zero_grad(set_to_none=True)
    if plan.seed is not None:
        plan.seed.optimizer.zero_grad(set_to_none=True)


def _accumulate(plan: StepPlan, micro_batches: Sequence[object]) -> tuple[Tensor, int]:
    """Gradients of the mean loss over the micro-batches; that loss, and the number of samples."""
    count, rows = len(micro_batches), 0
    losses: list[Tensor] = []
    for batch in micro_batches:
        inputs, targets = split_batch(batch)
        inputs, targets = to_device(inputs, plan.device), to_device(targets, plan.device)
        with plan.autocast():
            logits, labels = for_criterion(call_model(plan.model, inputs), targets, plan.task_type)
            loss = plan.hooks.on_loss(_scalar(plan.criterion(logits, labels)))
        share = loss / count if count > 1 else loss
        scaled = share if plan.host.scaler is None else plan.host.scaler.scale(share)
        scaled.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        rows += batch_rows(inputs, targets)
    return (losses[0] if count == 1 else torch.stack(losses).mean()), rows


def _scalar(loss: object) -> Tensor:
    if isinstance(loss, Tensor) and loss.dim() == 0:
        return loss
    got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise TypeError(f"criterion: expected a 0-dim tensor as the loss, got {got}; reduce it with .mean()")


def _step_optimizers(plan: StepPlan) -> Tensor | None:
    """Host first, then seed; each unscaled, clipped and stepped on its own.

    Returns the norm of the host's gradient before clipping, if it clips; the seed's is not part of it.
    """
    seed, scaler = plan.seed, plan.host.scaler
    if seed is not None and seed.scaler is not None and scaler is not None:
        # The gradients carry the host's scale. The seed's scaler takes it over and keeps its own record of
        # overflows.
        one = torch.ones((), device=plan.device)
        seed.scaler.scale(one)
        seed.scaler.update(new_scale=scaler.scale(one))
    norm = plan.host.finish()
    if seed is not None:
        seed.finish()
    if scaler is not None:
        scaler.update()
    with warnings.catch_warnings() if scaler is not None and plan.schedulers else nullcontext():
        if scaler is not None and plan.schedulers:  # a skipped first step, after an overflow, is no mistake
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for scheduler in plan.schedulers:
            scheduler.step()
    return norm
