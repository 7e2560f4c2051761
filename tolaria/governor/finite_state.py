"""Whether the covered state is finite, which decides if a bad step may be let pass instead of rolled back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tolaria import ops
from tolaria.governor.slots import Slots
from tolaria.governor.tracked import TrackedState
from tolaria.governor.watch import StructureWatch
from tolaria.ops import StateField, live_view

_SEARCHED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class PutBack(NamedTuple):
    """Buffers that are put back after a bad step anyhow, and what they then hold."""

    buffers: Collection[int]
    """Their ids."""
    values: Sequence[Tensor]
    """What counts in their place."""


class StateCheck:
    """Looks for NaN and infinity in parameters, buffers and optimizer state, as captures do.

    Args:
        tracked: what is covered.
        slots: know which tensors are exempt, since they were not finite from the start.
        watch: knows whether the tensors are still those of the last look.
    """

    def __init__(self, tracked: TrackedState, slots: Slots, watch: StructureWatch) -> None:
        self._tracked, self._slots, self._watch = tracked, slots, watch
        self._tensors: list[tuple[int, Tensor]] | None = None

    def flag(self, put_back: PutBack | None = None) -> Tensor | None:
        """A flag for ``governor_step_``: float64 ``(1,)``, above 0 where something is not finite.

        None if there is nothing to search. It never waits; on CUDA it is one pass over the state.
        """
        if self._tensors is None or self._watch.has_moved():
            self._tensors = self._find()
        aside = put_back.buffers if put_back is not None else ()
        searched = [view for identity, view in self._tensors if identity not in aside]
        if put_back is not None:
            searched += [value for value in put_back.values if value.is_floating_point()]
        return ops.tensor_stats(searched)[2:3] if searched else None

    def _find(self) -> list[tuple[int, Tensor]]:
        return [
            (id(t.tensor) if t.kind == "buffer" else 0, _searchable(t.tensor))
            for t in self._tracked.tensors()
            if t.watched
            and t.kind != "scaler"
            and t.key not in self._slots.exempt
            and (t.tensor.is_floating_point() or t.tensor.is_complex())
            and t.tensor.layout == torch.strided
        ]


def _searchable(tensor: Tensor) -> Tensor:
    """``tensor`` in a form that ``tensor_stats`` takes; float8 and the like as a copy."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return live_view(tensor) if tensor.dtype in _SEARCHED else tensor.to(torch.float32)


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
