"""The norm of the gradients, taken where they are whole: just before the optimizers use them."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tolaria.errors import UncoveredWarning
from tolaria.governor.closures import Arguments, closure_of, outermost, with_closure
from tolaria.governor.engine import Engine
from tolaria.snapshot import graphs


class GradientNorms:
    """Looks at the gradients in the step pre-hook of each optimizer: who clears them next is of no concern.

    With a closure, at the gradients that its first evaluation leaves. What no hook has seen since the last
    judgement, an optimizer that has not stepped yet or has no hooks, is looked at when it is asked for.

    Args:
        engine: what covers the model and its optimizers.
    """

    def __init__(self, engine: Engine) -> None:
        # Weakly: the optimizers' hooks know this object, and must not keep the engine and its slots.
        self._engine: Engine = weakref.proxy(engine)
        self._device = engine.covered.device
        self.handles: list[RemovableHandle] = []
        self._seen: dict[tuple[int, int], tuple[Tensor, int]] = {}
        """By optimizer the row of ``tensor_stats``, and the recording of a CUDA graph that it is part of."""
        self._is_wanted = True
        self._has_warned = False
        for optimizer in engine.covered.optimizers:
            self.hook(optimizer)

    def hook(self, optimizer: Optimizer) -> None:
        """Watch one more optimizer."""
        hook = outermost(self._before_step, self._engine.covered)
        self.handles.append(optimizer.register_step_pre_hook(hook))

    def judged(self, *, was_handed_over: bool, is_ahead: bool) -> None:
        """A judgement was made: what was seen until now has been used.

        Args:
            was_handed_over: the caller told the norm, and will next time.
            is_ahead: the optimizers step after it, and the gradients have been judged already.
        """
        self._seen.clear()
        self._is_wanted = not (was_handed_over or is_ahead)

    def take(self, *, is_ahead: bool) -> Tensor | None:
        """``tensor_stats`` over the gradients of this step; None, with a warning, if there are none.

        Args:
            is_ahead: the optimizers step after it.
        """
        now = self._recording()
        seen = [stats for stats, recording in self._seen.values() if recording == now]
        if seen:
            return _added(seen)
        stats = self._of_now() if is_ahead else self._engine.gradient_stats()
        if stats is None or (stats.is_cpu and not bool(stats[:3].any())):
            self._warn()
        return stats

    def _of_now(self) -> Tensor | None:
        """Before the optimizers step: some gradients may have a GradScaler's scale still."""
        scaler, optimizers = self._engine.covered.scaler, self._engine.covered.optimizers
        scale = getattr(scaler, "_scale", None)
        if scaler is None or scale is None or not scaler.is_enabled():
            return self._engine.gradient_stats()
        stages = {i: state["stage"].name for i, state in scaler._per_optimizer_states.items()}
        scaled = [o for o in optimizers if stages.get(id(o), "READY") == "READY"]
        plain = [o for o in optimizers if stages.get(id(o), "READY") != "READY"]
        with_scale, without = self._engine.gradient_stats(scaled), self._engine.gradient_stats(plain)
        parts = [] if with_scale is None else [_unscaled(with_scale, scale)]
        parts += [] if without is None else [without]
        return _added(parts) if parts else None

    def _recording(self) -> int:
        return graphs.recording(self._device)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        if not self._is_wanted:
            return None
        closure = closure_of(args, kwargs)
        if closure is None:
            self._look(optimizer)
            return None
        return with_closure(args, kwargs, self._looking(closure, optimizer))

    def _looking(self, closure: Callable[..., Any], optimizer: Optimizer) -> Callable[..., Any]:
        looks = True

        @functools.wraps(closure, updated=())
        def evaluate(*args: object, **kwargs: object) -> object:
            nonlocal looks
            loss = closure(*args, **kwargs)
            if looks and self._is_wanted:
                self._look(optimizer)
            looks = False
            return loss

        return evaluate

    def _look(self, optimizer: Optimizer) -> None:
        stats = self._engine.gradient_stats([optimizer])
        scale = getattr(optimizer, "grad_scale", None)
        if stats is not None and isinstance(scale, Tensor):  # a fused step takes the scale away by itself
            stats = _unscaled(stats, scale)
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        if stats is not None:  # an optimizer and the one that it wraps train the same
            self._seen[id(trained[0]), len(trained)] = stats, self._recording()

    def _warn(self) -> None:
        if self._engine.covered.optimizers and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "governor: gradient_norm is asked for (by the settings, or by step(None)), but no parameter "
                "of a covered optimizer has a gradient that is not zero, so none is judged; call "
                "governor.step before they are cleared, or hand gradient_norm= over",
                UncoveredWarning,
                stacklevel=6,
            )

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()


def _added(parts: list[Tensor]) -> Tensor:
    """Rows of ``tensor_stats`` as one; the judge reads the sum of squares and the count."""
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _unscaled(stats: Tensor, scale: Tensor) -> Tensor:
    """A row of ``tensor_stats`` as if the tensors had been divided by ``scale``."""
    away = scale.to(torch.float64).reciprocal().square()
    return torch.cat([stats[:1] * away.reshape(1), stats[1:]])
