"""One optimizer step, top to bottom; the three epoch functions share it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from tolaria.nn.nest import to_device
from tolaria.nn.schedule import AlphaSchedule
from tolaria.tasks.spec import TaskType
from tolaria.train.batch import batch_rows, call_model, for_criterion, split_batch
from tolaria.train.learner import Learner
from tolaria.train.weights import count_and_correct, is_summed, weight_of_mean

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
    seeds: Sequence[Learner] = ()
    """Step after the host, from the same backward pass; none touches another."""
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


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step saw. Tensors are 0-dim, detached, on the device."""

    loss: Tensor
    """That of the whole batch: the micro-batches' mean, weighted by label; for a criterion that sums,
    the sum."""
    rows: int
    """Samples."""
    count: Tensor
    """Labels that are not ignored, float64."""
    correct: Tensor | None
    """How many of them were guessed right, float64; None if the labels are no classes."""


def train_step(plan: StepPlan, micro_batches: Sequence[object]) -> StepResult:
    """Forward and backward over the micro-batches, then a step of each optimizer. Never waits for the device.

    The step is that of one batch of all of them: a micro-batch counts by its labels that are not ignored.
    (What a criterion ignores is read from its ``ignore_index``; a function's cannot be.)

    Args:
        plan: how.
        micro_batches: at least one batch.
    """
    for schedule in plan.alpha_schedules:
        schedule.step()
    plan.hooks.before_forward()
    _zero_grad(plan)
    result = _accumulate(plan, micro_batches)
    plan.hooks.after_backward()

    loss, verdict = result.loss, None
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
    return result


def _zero_grad(plan: StepPlan) -> None:
    for learner in (plan.host, *plan.seeds):
        learner.optimizer.zero_grad(set_to_none=True)


def _accumulate(plan: StepPlan, micro_batches: Sequence[object]) -> StepResult:
    """Gradients of the whole batch's loss; what there was to see."""
    pairs = [split_batch(batch) for batch in micro_batches]
    pairs = [(inputs, to_device(targets, plan.device)) for inputs, targets in pairs]
    is_mean = len(pairs) > 1 and not is_summed(plan.criterion)
    shares = _shares([targets for _, targets in pairs], plan.criterion) if is_mean else None
    rows, losses, seen = 0, list[Tensor](), list[tuple[Tensor, Tensor | None]]()
    for index, (inputs, targets) in enumerate(pairs):
        inputs = to_device(inputs, plan.device)
        with plan.autocast():
            logits, labels = for_criterion(call_model(plan.model, inputs), targets, plan.task_type)
            loss = plan.hooks.on_loss(_scalar(plan.criterion(logits, labels)))
        if shares is not None:
            share = shares[index].to(loss.dtype)
            loss = torch.where(share == 0, 0.0, loss) * share / len(pairs)  # the mean over nothing is NaN
        scaled = loss if plan.host.scaler is None else plan.host.scaler.scale(loss)
        scaled.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        seen.append(count_and_correct(logits, labels, plan.criterion))
        rows += batch_rows(inputs, targets)
    return StepResult(_sum(losses), rows, _sum([count for count, _ in seen]), _sum_or_none(seen))


def _shares(targets: Sequence[Tensor], criterion: Criterion) -> Tensor:
    """(count,): what each micro-batch's mean counts, in units of the average one; of equal ones exactly 1."""
    weights = torch.stack([weight_of_mean(each, criterion) for each in targets])
    return weights * len(targets) / weights.sum()


def _sum(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(list(values)).sum()


def _sum_or_none(seen: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor | None:
    hits = [hit for _, hit in seen if hit is not None]
    return _sum(hits) if len(hits) == len(seen) else None


def _scalar(loss: object) -> Tensor:
    if isinstance(loss, Tensor) and loss.dim() == 0:
        return loss
    got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise TypeError(f"criterion: expected a 0-dim tensor as the loss, got {got}; reduce it with .mean()")


def _step_optimizers(plan: StepPlan) -> Tensor | None:
    """Host first, then seeds; each unscaled, clipped and stepped on its own.

    Returns the norm of the host's gradient before clipping, if it clips; the seeds' are not part of it.
    """
    scaler = plan.host.scaler
    if scaler is not None:
        for learner in plan.seeds:
            learner.follow(scaler)
    norm = plan.host.finish()
    for learner in plan.seeds:
        learner.finish()
    if scaler is not None:
        scaler.update()
    with warnings.catch_warnings() if scaler is not None and plan.schedulers else nullcontext():
        if scaler is not None and plan.schedulers:  # a skipped first step, after an overflow, is no mistake
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for scheduler in plan.schedulers:
            scheduler.step()
    return norm
