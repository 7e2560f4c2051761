"""Optimizers with their clipping and their scalers, so that what goes wrong in one seed stays there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from tolaria import ops
from tolaria.nn.slot import SeedSlot
from tolaria.nn.stage import SeedStage

_APART = (SeedStage.GERMINATED, SeedStage.TRAINING)


@dataclass(slots=True)
class Learner:
    """An optimizer with its clipping and its scaler: the host's, or that of seeds.

    Seeds that share an optimizer are clipped one by one, and one whose gradient overflows under a scaler
    misses its step alone. Which one is read from the device, once a step, if there are several and a scaler.
    """

    optimizer: Optimizer
    """Whose parameters are clipped and stepped."""
    max_grad_norm: float | None = None
    """Clip the norm over its own parameters (of seeds: over each seed's) to this; None: leave it."""
    scaler: GradScaler | None = None
    """Its own; a scaler is never shared, so that an overflow here changes nothing there."""
    slots: Sequence[SeedSlot] = ()
    """Whose seeds are apart from the rest of the optimizer's parameters."""
    is_host: bool = False
    """The host's: only incubating seeds are apart, the others are part of it."""

    def follow(self, scale_of: GradScaler) -> None:
        """Take over the scale that the gradients carry; its own record of overflows stays."""
        if self.scaler is not None:
            one = torch.ones((), device=self._device())
            self.scaler.scale(one)
            self.scaler.update(new_scale=scale_of.scale(one))

    def finish(self) -> Tensor | None:
        """Unscale, clip, step; nothing if no parameter has a gradient. The host's norm before it clips."""
        rest, seeds = self._parts()
        hidden: list[tuple[Tensor, Tensor | None]] = []
        if self.scaler is not None and len(seeds) + bool(rest) > 1:
            hidden = _hide_overflown(seeds)
            seeds = [part for part in seeds if part[0].grad is not None]
        if not rest and not seeds:
            _show(hidden)
            return None
        norm = self._prepare(rest, seeds)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
        else:
            self.optimizer.step()
        _show(hidden)
        return norm

    def _prepare(self, rest: Sequence[Tensor], seeds: Sequence[Sequence[Tensor]]) -> Tensor | None:
        """Unscale and clip; the norm before, if it clips."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.max_grad_norm is None:
            return None
        for part in seeds:
            nn.utils.clip_grad_norm_(part, self.max_grad_norm)
        return nn.utils.clip_grad_norm_(rest, self.max_grad_norm) if rest else None

    def _parts(self) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Its parameters with a gradient: of no seed, and of each seed that is apart."""
        grown = [slot for slot in self.slots if slot.seed is not None]
        owner = {
            id(p): index
            for index, slot in enumerate(grown)
            if not self.is_host or slot.stage in _APART
            for p in slot.parameters()
        }
        rest: list[Tensor] = []
        seeds: dict[int, list[Tensor]] = {}
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    seeds.setdefault(owner[id(p)], []).append(p) if id(p) in owner else rest.append(p)
        return rest, list(seeds.values())

    def _device(self) -> torch.device:
        found = (p.device for group in self.optimizer.param_groups for p in group["params"])
        return next(found, torch.device("cpu"))


def _hide_overflown(seeds: Sequence[Sequence[Tensor]]) -> list[tuple[Tensor, Tensor | None]]:
    """Take their gradients away from the seeds that have a non-finite one."""
    if not seeds:
        return []
    counts = [ops.tensor_stats([p.grad for p in part if p.grad is not None])[2] for part in seeds]
    hidden: list[tuple[Tensor, Tensor | None]] = []
    for part, count in zip(
        seeds, torch.stack(counts).tolist(), strict=True
    ):  # sync: which one misses its step
        if count:
            hidden += [(p, p.grad) for p in part]
            for p in part:
                p.grad = None
    return hidden


def _show(hidden: Sequence[tuple[Tensor, Tensor | None]]) -> None:
    for p, gradient in hidden:
        p.grad = gradient
