"""Faults to break a run with on purpose, at a step of your choice, and to watch it recover."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tolaria.nn.model import MorphogeneticModel
from tolaria.train.step import StepHooks

_SPIKE, _SPIKE_STEPS = 1000.0, 2  # one alone is shrugged off: a governor waits for a second anomaly in a row


class Fault(Protocol):
    """Something that goes wrong at some steps; the other methods are called at those steps only."""

    def strikes(self, step: int) -> bool:
        """Whether it goes wrong at this optimizer step, counting from 1."""
        ...

    def before_forward(self, model: nn.Module) -> None:
        """Before the forward of such a step."""
        ...

    def on_loss(self, loss: Tensor) -> Tensor:
        """The loss, before its backward; what is returned is used instead."""
        ...

    def after_backward(self, model: nn.Module) -> None:
        """The gradients are complete."""
        ...


class FaultHooks(StepHooks):
    """Between a step and the faults that strike in it.

    Args:
        faults: what goes wrong.
        model: what they meddle with.
        optimizer: whose learning rate is told.
        begin: called before each step; says its number, counting from 1.
        end: called after each step with its loss and the rate of its first parameter group.
    """

    def __init__(
        self,
        faults: Sequence[Fault],
        model: nn.Module,
        optimizer: Optimizer,
        begin: Callable[[], int],
        end: Callable[[Tensor, float], None],
    ) -> None:
        self._faults, self._model, self._optimizer = list(faults), model, optimizer
        self._begin, self._end = begin, end
        self._now: list[Fault] = []
        self._lr = 0.0

    def before_forward(self) -> None:
        """Find out what strikes, and let it."""
        step = self._begin()
        self._now = [fault for fault in self._faults if fault.strikes(step)]
        self._lr = float(self._optimizer.param_groups[0]["lr"])
        for fault in self._now:
            fault.before_forward(self._model)

    def on_loss(self, loss: Tensor) -> Tensor:
        """The loss, as the faults want it."""
        for fault in self._now:
            loss = fault.on_loss(loss)
        return loss

    def after_backward(self) -> None:
        """Let the faults have the gradients."""
        for fault in self._now:
            fault.after_backward(self._model)

    def after_step(self, loss: Tensor) -> None:
        """The step is over."""
        self._end(loss, self._lr)


def _nothing(_: nn.Module) -> None:
    pass


def _same(loss: Tensor) -> Tensor:
    return loss


@dataclass(frozen=True, slots=True)
class InjectedFault:
    """A fault made of up to three functions; see :func:`parse_fault` for those that have names."""

    name: str
    """What reports call it."""
    step: int
    """The first step it strikes, counting from 1."""
    on_model: Callable[[nn.Module], None] = _nothing
    """Applied before the forward."""
    on_loss_value: Callable[[Tensor], Tensor] = _same
    """Applied to the loss."""
    on_gradients: Callable[[nn.Module], None] = _nothing
    """Applied after the backward."""
    duration: int = 1
    """How many steps it lasts."""

    def strikes(self, step: int) -> bool:
        """Whether it goes wrong at this optimizer step, counting from 1."""
        return self.step <= step < self.step + self.duration

    def before_forward(self, model: nn.Module) -> None:
        """Before the forward of that step."""
        with torch.no_grad():
            self.on_model(model)

    def on_loss(self, loss: Tensor) -> Tensor:
        """The loss, before its backward."""
        return self.on_loss_value(loss)

    def after_backward(self, model: nn.Module) -> None:
        """The gradients are complete."""
        with torch.no_grad():
            self.on_gradients(model)


def _poison_first(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            tensor.view(-1)[tensor.numel() // 2].fill_(float("nan"))
            return
    raise ValueError(
        "inject: expected a fault whose kind of tensor the network holds, it holds none of that kind"
    )


def _nan_weight(model: nn.Module) -> None:
    _poison_first([p for p in model.parameters() if p.dim() > 1])


def _nan_buffer(model: nn.Module) -> None:
    named = [(name, b) for name, b in model.named_buffers() if b.is_floating_point() and b.dim() > 0]
    _poison_first([b for _, b in named])


def _nan_gradient(model: nn.Module) -> None:
    _poison_first([p.grad for p in model.parameters() if p.grad is not None])


def _lobotomy(model: nn.Module) -> None:
    """The network forgets: the last linear layer of the host (a tied embedding, too) goes to zero."""
    host = model.host if isinstance(model, MorphogeneticModel) else model
    layers = [m for m in host.modules() if isinstance(m, nn.Linear)]
    for parameter in layers[-1].parameters() if layers else model.parameters():
        parameter.zero_()


_KINDS: dict[str, Callable[[str, int], InjectedFault]] = {
    "nan-loss": lambda name, step: InjectedFault(name, step, on_loss_value=lambda loss: loss * float("nan")),
    "spike": lambda name, step: InjectedFault(
        name, step, on_loss_value=lambda loss: (loss + 1.0) * _SPIKE, duration=_SPIKE_STEPS
    ),
    "nan-weight": lambda name, step: InjectedFault(name, step, on_model=_nan_weight),
    "nan-buffer": lambda name, step: InjectedFault(name, step, on_model=_nan_buffer),
    "nan-gradient": lambda name, step: InjectedFault(name, step, on_gradients=_nan_gradient),
    "lobotomy": lambda name, step: InjectedFault(name, step, on_model=_lobotomy),
}


def list_faults() -> list[str]:
    """Names that :func:`parse_fault` knows."""
    return list(_KINDS)


def parse_fault(text: str) -> InjectedFault:
    """A fault from ``"<kind>@<step>"``, ``"nan-loss@300"`` for example.

    Raises:
        ValueError: the form, the kind or the step is wrong; the message lists the kinds.
    """
    kind, at, step = text.partition("@")
    if not at or not step.isdecimal() or int(step) < 1:
        raise ValueError(f"inject: expected '<kind>@<step>' such as 'nan-loss@300', got {text!r}")
    if kind not in _KINDS:
        close = difflib.get_close_matches(kind, _KINDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"inject: expected one of {', '.join(_KINDS)}, got {kind!r}{hint}")
    return _KINDS[kind](text, int(step))
