"""Whether the covered state is finite."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tolaria import ops
from tolaria.ops import live_view
from tolaria.snapshot.covered import CoveredState
from tolaria.snapshot.slots import Slots
from tolaria.snapshot.watch import StructureWatch

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
        covered: what is covered.
        slots: know which tensors are exempt, since they were not finite from the start.
        watch: knows whether the tensors are still those of the last look.
    """

    def __init__(self, covered: CoveredState, slots: Slots, watch: StructureWatch) -> None:
        self._covered, self._slots, self._watch = covered, slots, watch
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
            for t in self._covered.tensors()
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
