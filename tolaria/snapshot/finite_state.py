"""Whether the covered state is finite."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tolaria import ops
from tolaria.errors import SnapshotError
from tolaria.ops import live_view
from tolaria.snapshot.covered import CoveredState, CoveredTensor
from tolaria.snapshot.slots import Slots
from tolaria.snapshot.watch import StructureWatch

_SEARCHED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_COMPLEX = (torch.complex64, torch.complex128, torch.complex32)


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
        self._found: list[_Searched] | None = None

    def flag(self, put_back: PutBack | None = None) -> Tensor | None:
        """A flag for ``governor_step_``: float64 ``(1,)``, above 0 where something is not finite.

        None if there is nothing to search. It never waits; on CUDA it is one pass over the state.
        """
        if self._found is None or self._watch.has_moved():
            self._found = self._find()
        aside = put_back.buffers if put_back is not None else ()
        searched = [s.values() for s in self._found if s.buffer not in aside]
        if put_back is not None:
            searched += [value for value in put_back.values if value.is_floating_point()]
        return ops.tensor_stats(searched)[2:3] if searched else None

    def first_bad(self) -> str | None:
        """Name of the first tensor that a capture made now would find not finite; waits."""
        known = {place.key for place in self._slots.places.values()}
        # A mask that joins later is exempt; a moment that the last step brought into being is not.
        found = [s for s in self._find() if s.key in known or not (s.buffer and known)]
        at = int(ops.tensor_stats([s.values() for s in found])[3])  # sync: asked for by name
        return None if at < 0 else found[at].name

    def _find(self) -> list[_Searched]:
        return [
            _Searched.of(t)
            for t in self._covered.tensors()
            if t.watched
            and not t.zeroed
            and t.key not in self._slots.exempt
            and (t.tensor.is_floating_point() or t.tensor.is_complex())
        ]


class _Searched(NamedTuple):
    """A tensor to look at, and the form in which ``tensor_stats`` takes it."""

    key: Hashable
    name: str
    tensor: Tensor
    buffer: int
    """The id of a buffer; 0 for anything else."""
    view: Tensor | None
    """Shares the tensor's memory; None where only a copy, made when it is looked at, can be searched."""

    @classmethod
    def of(cls, t: CoveredTensor) -> _Searched:
        return cls(t.key, t.name, t.tensor, id(t.tensor) if t.kind == "buffer" else 0, _view(t.tensor))

    def values(self) -> Tensor | None:
        """What is looked at now; None if nobody can."""
        if self.view is not None:
            return self.view
        try:
            stored = stored_values(self.tensor)
            return stored if stored.dtype in _SEARCHED else stored.to(torch.float32)
        except (NotImplementedError, RuntimeError):  # smaller than float8; it is copied unseen
            return None


def _view(tensor: Tensor) -> Tensor | None:
    """Its memory as values: a sign or a conjugate that is still to be taken makes none finite."""
    if tensor.layout is not torch.strided or tensor.dtype not in (*_SEARCHED, *_COMPLEX):
        return None
    try:
        view = live_view(tensor)
    except SnapshotError:  # it has no bytes of its own; captures leave it out, too
        return None
    return torch.view_as_real(view) if view.is_complex() else view


def stored_values(tensor: Tensor) -> Tensor:
    """The numbers ``tensor`` stores, detached: of a sparse one the values, of a complex one both parts."""
    tensor = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        tensor = tensor._values()
    elif tensor.layout is not torch.strided:
        tensor = tensor.values()
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    return tensor.resolve_neg()
