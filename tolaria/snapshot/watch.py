"""Notices, cheaply and at every step, that a covered tensor may have come, gone or moved."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tolaria.snapshot.covered import CoveredState, CoveredTensor, Walk
from tolaria.snapshot.grad_scaler import SCALER_TENSORS
from tolaria.snapshot.wrapped import inner_tensors, is_wrapper

_DTYPE = operator.attrgetter("dtype")
_BYTES = torch.UntypedStorage.nbytes
_VALUES = operator.methodcaller("values")
_NUMBERS = (int, float, tuple)  # a tuple: betas, which a schedule may cycle


class _Mark(NamedTuple):
    """What there was when the structure was last looked at."""

    modules: list[nn.Module]
    staged: list[Callable[[], list[Tensor]]]
    tensors: list[Tensor]
    storages: list[torch.UntypedStorage]
    signed: list[Tensor]
    """Those that may carry a conjugate or negative bit: complex ones and parts of them."""
    wrappers: list[Tensor]
    """Optimizer state that has others inside."""
    contents: list[object]
    whereabouts: tuple[object, ...]


class StructureWatch:
    """Compares the containers of a :class:`CoveredState` and the addresses of its tensors with a mark."""

    def __init__(self, covered: CoveredState) -> None:
        self._covered = covered
        self._mark: _Mark | None = None

    def forget(self) -> None:
        """Until the next :meth:`mark`, say that something has moved."""
        self._mark = None

    def mark(self, walk: Walk, tensors: Sequence[CoveredTensor]) -> None:
        """Remember what there is now: the next :meth:`has_moved` compares with it."""
        found = [t.tensor for t in tensors]
        staged = [
            *(module.zero_alpha_tensors for _, module in walk.participants),
            *(module.incubating_tensors for _, module in walk.seed_holders),
        ]
        mark = _Mark(
            modules=[module for *_, module in walk.modules],
            staged=staged,
            tensors=found,
            storages=list(map(Tensor.untyped_storage, found)),
            signed=[t for t in found if t.is_complex() or not t.is_contiguous()],
            wrappers=[v for s in self._states() for v in s.values() if is_wrapper(v)],
            contents=[],
            whereabouts=(),
        )
        self._mark = mark._replace(contents=self._contents(mark), whereabouts=self._whereabouts(mark))

    def has_moved(self) -> bool:
        """Whether something may be different; no device call, and it may say yes too often."""
        mark = self._mark
        if mark is None:
            return True
        now, seen = self._contents(mark), mark.contents
        # The objects seen last are kept, not their ids, which a successor could have inherited.
        if len(now) != len(seen):
            return True
        if not all(map(operator.is_, now, seen)):
            # Numbers, such as step counters and rates, come and go.
            changed = (pair for pair in zip(now, seen, strict=True) if pair[0] is not pair[1])
            if not all(isinstance(a, _NUMBERS) and isinstance(b, _NUMBERS) for a, b in changed):
                return True
        try:
            return self._whereabouts(mark) != mark.whereabouts
        except RuntimeError:  # a tensor became one that has no address, by swap_tensors
            return True

    def _states(self) -> Iterator[Mapping[Any, Any]]:
        states = chain.from_iterable(map(_VALUES, (o.state for o in self._covered.optimizers)))
        return (state for state in states if isinstance(state, Mapping))

    def _contents(self, mark: _Mark) -> list[object]:
        """What the containers hold, the groups' settings and parameters, and the scaler's tensors."""
        containers: list[Mapping[Any, Any]] = []
        for module in mark.modules:
            containers += [module._modules, module._parameters, module._buffers]
        for optimizer in self._covered.optimizers:
            containers.append(optimizer.state)
        containers += self._states()
        found: list[object] = list(chain.from_iterable(map(_VALUES, containers)))
        for optimizer in self._covered.optimizers:
            for group in optimizer.param_groups:
                found += group["params"]
                found += [value for key, value in group.items() if key != "params"]
        found += [inner for wrapper in mark.wrappers for _, inner in inner_tensors(wrapper)]
        found += [getattr(self._covered.scaler, name, None) for name in SCALER_TENSORS]
        return found

    def _whereabouts(self, mark: _Mark) -> tuple[object, ...]:
        """Where the tensors are and in what form, how many the seeds own, and the sizes of the groups.

        The sizes of the storages, too: one that was shrunk may lie at an address it had before.
        """
        tensors = mark.tensors
        return (
            list(map(Tensor.data_ptr, tensors)),
            list(map(Tensor.size, tensors)),
            list(map(Tensor.stride, tensors)),
            list(map(_DTYPE, tensors)),
            list(map(_BYTES, mark.storages)),
            [(t.is_conj(), t.is_neg()) for t in mark.signed],
            [len(tensors()) for tensors in mark.staged],
            self._covered.structure(),
        )


class BeforeSteps:
    """Calls its owner before each step of some optimizers, as long as the owner lives.

    What was put into an optimizer since the last look has its birth value until that step.
    """

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = weakref.WeakMethod(call)
        self._handles: list[RemovableHandle] = []
        weakref.finalize(call.__self__, _remove, self._handles)  # type: ignore[attr-defined]

    def hook(self, optimizer: Optimizer) -> None:
        """Call before its steps, too."""
        found = self._call

        def before(*_: object) -> None:
            call = found()
            if call is not None:
                call()

        self._handles.append(optimizer.register_step_pre_hook(before))

    def close(self) -> None:
        """Call no more."""
        _remove(self._handles)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
