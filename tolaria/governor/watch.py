"""Notices, cheaply and at every step, that a covered tensor may have come, gone or moved."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn

from tolaria.governor.host_state import SCALER_TENSORS
from tolaria.governor.tracked import TrackedState, TrackedTensor, Walk

_DTYPE = operator.attrgetter("dtype")
_VALUES = operator.methodcaller("values")
_NUMBERS = (int, float, tuple)  # a tuple: betas, which a schedule may cycle


class StructureWatch:
    """Compares the containers of a :class:`TrackedState` and the addresses of its tensors with a mark."""

    def __init__(self, tracked: TrackedState) -> None:
        self._tracked = tracked
        self._modules: list[nn.Module] = []
        self._staged: list[Callable[[], list[Tensor]]] = []
        self._seen: list[object] = []
        self._tensors: list[Tensor] = []
        self._rest: tuple[object, ...] = ()

    def mark(self, walk: Walk, tensors: Sequence[TrackedTensor]) -> None:
        """Remember what there is now: the next :meth:`has_moved` compares with it."""
        self._modules = [module for *_, module in walk.modules]
        self._staged = [
            *(module.zero_alpha_tensors for _, module in walk.participants),
            *(module.incubating_tensors for _, module in walk.seed_holders),
        ]
        self._seen = self._contents()
        self._tensors = [t.tensor for t in tensors]
        self._rest = self._whereabouts()

    def has_moved(self) -> bool:
        """Whether something may be different; no device call, and it may say yes too often."""
        now, seen = self._contents(), self._seen
        # The objects seen last are kept, not their ids, which a successor could have inherited.
        if len(now) != len(seen):
            return True
        if not all(map(operator.is_, now, seen)):
            # Numbers, such as step counters and rates, come and go.
            changed = (pair for pair in zip(now, seen, strict=True) if pair[0] is not pair[1])
            if not all(isinstance(a, _NUMBERS) and isinstance(b, _NUMBERS) for a, b in changed):
                return True
        return self._whereabouts() != self._rest

    def _contents(self) -> list[object]:
        """What the containers hold, the groups' settings and parameters, and the scaler's tensors."""
        containers: list[Mapping[Any, Any]] = []
        for module in self._modules:
            containers += [module._modules, module._parameters, module._buffers]
        for optimizer in self._tracked.optimizers:
            containers += [optimizer.state, *optimizer.state.values()]
        found: list[object] = list(chain.from_iterable(map(_VALUES, containers)))
        for optimizer in self._tracked.optimizers:
            for group in optimizer.param_groups:
                found += group["params"]
                found += [value for key, value in group.items() if key != "params"]
        found += [getattr(self._tracked.scaler, name, None) for name in SCALER_TENSORS]
        return found

    def _whereabouts(self) -> tuple[object, ...]:
        """Where the tensors are and in what form, how many the seeds own, and the sizes of the groups."""
        tensors = self._tensors
        return (
            list(map(Tensor.data_ptr, tensors)),
            list(map(Tensor.size, tensors)),
            list(map(Tensor.stride, tensors)),
            list(map(_DTYPE, tensors)),
            [len(tensors()) for tensors in self._staged],
            self._tracked.structure(),
        )
