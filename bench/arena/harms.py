"""What befalls a run: nothing, or something that people report, at a step and for a while."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from arena.learners import Batch, Learner, Spoil, untouched


class Watch(Protocol):
    """Whoever watches a run."""

    def allows(self, step: int, loss: Tensor) -> bool:
        """Whether the optimizers may take the step; gradients are in place."""
        ...

    def saw(self, step: int, loss: Tensor) -> None:
        """The step was taken, or left out."""
        ...


class Nobody:
    """A run that nobody watches."""

    def allows(self, step: int, loss: Tensor) -> bool:
        """Always."""
        return True

    def saw(self, step: int, loss: Tensor) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Harm:
    """Nothing; what there is to override is called at each step from ``begin`` on, for ``length`` steps.

    Args:
        begin: the first step that it befalls.
        length: how many steps in a row.
        size: how bad it is, in its own terms.
    """

    begin: int = 0
    length: int = 0
    size: float = 1.0

    def is_on(self, step: int) -> bool:
        """Whether it befalls ``step``."""
        return self.begin <= step < self.begin + self.length

    def batch(self, batch: Batch, source: torch.Generator) -> Batch:
        """What the network is shown instead of ``batch``."""
        return batch

    def rate(self, step: int) -> float:
        """Times the learning rate."""
        return 1.0

    def gradient_times(self) -> float:
        """Times the gradient."""
        return 1.0

    def loss(self, loss: Tensor) -> Tensor:
        """What the loss is instead."""
        return loss

    def before_update(self, learner: Learner) -> None:
        """Done to gradients."""

    def after_update(self, learner: Learner, step: int) -> None:
        """Done to the state."""


class Burst(Harm):
    """The learning rate is ``size`` times what it should be."""

    def rate(self, step: int) -> float:
        return self.size


class Climb(Harm):
    """The learning rate grows by the factor ``size`` a step, from 1, and stays where it ends."""

    def is_on(self, step: int) -> bool:
        return step >= self.begin

    def rate(self, step: int) -> float:
        return self.size ** min(step - self.begin + 1, self.length)


class ScaledInputs(Harm):
    """The inputs are ``size`` times what they should be."""

    def batch(self, batch: Batch, source: torch.Generator) -> Batch:
        return batch[0] * self.size, batch[1]


class WrongLabels(Harm):
    """A share ``size`` of the batch has the labels of other samples."""

    def batch(self, batch: Batch, source: torch.Generator) -> Batch:
        x, y = batch
        if not y.numel():
            return x[torch.randperm(len(x), generator=source)] * -1.0, y
        other = y[torch.randperm(len(y), generator=source)]
        wrong = torch.rand(len(y), generator=source) < self.size
        return x, torch.where(wrong.view(-1, *[1] * (y.dim() - 1)), other, y)


class LargeGradients(Harm):
    """Finite gradients, ``size`` times what they should be."""

    def gradient_times(self) -> float:
        return self.size


class DeadLastLayer(Harm):
    """The output layer fades to zero within ``length`` steps, and what drives it with it."""

    @torch.no_grad()
    def after_update(self, learner: Learner, step: int) -> None:
        left = 1.0 - (step - self.begin + 1) / self.length
        before = 1.0 - (step - self.begin) / self.length
        for parameter in learner.last_layer():
            parameter.mul_(left / before)
            if left == 0.0:
                parameter.fill_(-1e3 if parameter.dim() == 1 else 0.0)[..., :1].fill_(0.0)


class GrowingWeights(Harm):
    """All weights grow by the factor ``size`` a step."""

    @torch.no_grad()
    def after_update(self, learner: Learner, step: int) -> None:
        for parameter in learner.parameters():
            parameter.mul_(self.size)


class Poison(Harm):
    """A value that is not finite, once."""

    value = math.nan

    def _in(self, tensor: Tensor) -> None:
        tensor.view(-1)[0] = self.value


class PoisonedLoss(Poison):
    """In the loss, and so in every gradient."""

    def loss(self, loss: Tensor) -> Tensor:
        return loss * self.value

    def gradient_times(self) -> float:
        return self.value


class PoisonedGradient(Poison):
    """In a gradient."""

    @torch.no_grad()
    def before_update(self, learner: Learner) -> None:
        self._in(next(p.grad for p in learner.parameters() if p.grad is not None))


class PoisonedWeight(Poison):
    """In a parameter."""

    @torch.no_grad()
    def after_update(self, learner: Learner, step: int) -> None:
        self._in(next(learner.parameters()))


class PoisonedMoment(Poison):
    """In an optimizer's state."""

    @torch.no_grad()
    def after_update(self, learner: Learner, step: int) -> None:
        for moments in learner.optimizers[-1].state.values():  # a contestant may have thrown all of it away
            self._in(next(t for key, t in moments.items() if key != "step" and torch.is_tensor(t)))
            return


class PoisonedBuffer(Poison):
    """In a running mean; in a parameter where there is none."""

    @torch.no_grad()
    def after_update(self, learner: Learner, step: int) -> None:
        buffers = (b for b in learner.model.buffers() if b.is_floating_point())
        self._in(next(buffers, next(learner.parameters())))


class InfiniteWeight(PoisonedWeight):
    """Infinity in a parameter."""

    value = math.inf


def take_step(learner: Learner, step: int, harm: Harm, watch: Watch) -> Tensor:
    """One step of ``learner`` under ``harm``, as ``watch`` allows; the loss that was judged."""
    is_on = harm.is_on(step)
    loss = _gradients(learner, step, harm) if is_on else learner.gradients(step)
    if is_on:
        harm.before_update(learner)
    if watch.allows(step, loss):
        _update(learner, harm.rate(step) if is_on else 1.0)
    if is_on:
        harm.after_update(learner, step)
    watch.saw(step, loss)
    return loss


def _gradients(learner: Learner, step: int, harm: Harm) -> Tensor:
    source = learner.draw(-step - 1)
    spoil: Spoil = untouched if type(harm).batch is Harm.batch else lambda batch: harm.batch(batch, source)
    return harm.loss(learner.gradients(step, spoil, harm.gradient_times()))


def _update(learner: Learner, times: float) -> None:
    groups = [group for optimizer in learner.optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] *= times
    learner.update()
    if not learner.schedulers:  # which set the rate themselves
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
