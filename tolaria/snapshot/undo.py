"""Undoing a step that the host does not know to be bad: tensors by a copy, host-side counters later."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tolaria import ops
from tolaria.errors import TolariaError
from tolaria.ops import ConfigField, SnapshotEntry, SnapshotTable, StateField, live_view, slot_view
from tolaria.snapshot import graphs
from tolaria.snapshot.covered import CoveredState
from tolaria.snapshot.optimizer_state import HostValues, OptimizerHost, parameter_states
from tolaria.snapshot.wrapped import inner_tensors

_ALIGN = 256


class UndoCopy:
    """One copy of a few tensors on their own CUDA device, put back if a flag there says so; nothing waits.

    A capture and a restore by the snapshot ops, under a governor state of its own whose orders are written
    here instead of judged. Each costs one launch, and a small copy that gives the order.
    """

    def __init__(self, device: torch.device) -> None:
        self._state = ops.governor_state(1, window=2, device=device)
        self._armed = self._state.clone()
        self._armed[StateField.capture_order_0] = 0.0
        self._armed[StateField.last_good] = 0.0
        # A restore reads what a governor's rollback costs; nobody reads that here.
        self._settings = torch.zeros(len(ConfigField), dtype=torch.float64, device="cpu").to(device)
        self._table = SnapshotTable(device=device)
        self._seen: list[tuple[int, torch.Size]] = []
        self.copies: list[Tensor] = []
        """What :meth:`put_back` gives the tensors, in their order."""
        weakref.finalize(self, _clear, self._state, self._table)

    def save(self, tensors: Sequence[Tensor]) -> None:
        """Copy ``tensors``.

        Raises:
            TolariaError: they are not those of last time, and a CUDA graph is being recorded.
        """
        seen = [(t.data_ptr(), t.shape) for t in tensors]
        if seen != self._seen:
            self._lay_out([live_view(t) for t in tensors])
            self._seen = seen
        if graphs.is_recording(self._state.device):
            graphs.outlive(self._state, self._armed, self._settings, self._table.data)
        self._state.copy_(self._armed)
        ops.snapshot_capture_(self._state, 0, self._table, 0)

    def put_back(self, flag: Tensor) -> None:
        """Give the tensors the bytes of the last :meth:`save` unless ``flag``, one number, is 0."""
        self._state[StateField.restore_order].copy_(flag.view(1))
        ops.snapshot_restore_(self._state, 0, self._settings, self._table)

    def _lay_out(self, views: list[Tensor]) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise TolariaError(
                "governor: skip_anomalous_steps cannot be recorded in a CUDA graph before its copies are "
                "laid out; run a few eager steps first, then record"
            )
        offsets = [0]
        for view in views:
            offsets.append(offsets[-1] + -(-view.numel() * view.element_size() // _ALIGN) * _ALIGN)
        memory = torch.empty(offsets[-1], dtype=torch.uint8, device=self._state.device)
        places = [slot_view(memory, start, view) for start, view in zip(offsets, views, strict=False)]
        self.copies = places
        entries = [SnapshotEntry(v, (p, p), 0, -1) for v, p in zip(views, places, strict=True)]
        self._table.update(entries)


def _clear(state: Tensor, table: SnapshotTable) -> None:
    """The copy goes: a graph that was recorded with it finds nothing to copy any more."""
    if graphs.is_kept(state) and not graphs.is_postponed(state.device, partial(_clear, state, table)):
        graphs.disarm(state.device, table.clear)


class HostUndo:
    """All that one optimizer may change in a step, copied, for an optimizer in CPU memory.

    Args:
        covered: what is covered.
        optimizer: one of its optimizers.
    """

    def __init__(self, covered: CoveredState, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._host = OptimizerHost.of(covered, optimizer)
        self._state = [(parameter, dict(state)) for parameter, state in parameter_states(optimizer)]
        self._settings = [(group, _tensors_of(group)) for group in optimizer.param_groups]
        held = [value for group in optimizer.param_groups for value in (*group["params"], *group.values())]
        held += [value for _, state in self._state for value in state.values()]
        tensors = [value for value in held if isinstance(value, Tensor) and covered.is_captured(value)]
        self._copies = [(t.detach(), t.detach().clone()) for t in _unwrapped(tensors)]

    def put_back(self) -> None:
        """Give everything the value and the place that it had."""
        optimizer = self._optimizer
        self._host.bring_back_wrappers()
        for parameter, former in self._state:
            state = optimizer.state.setdefault(parameter, {})
            state.update(_tensors_of(former))
        for group, settings in self._settings:
            group.update(settings)
        for tensor, copied in self._copies:
            tensor.copy_(copied)
        self._host.load(keep_fresh=False, dropped=(), keep_settings=False)


def _tensors_of(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if isinstance(value, Tensor)}


def _unwrapped(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    for tensor in tensors:
        yield from (inner for _, inner in inner_tensors(tensor))


class HostCounters:
    """What an optimizer keeps on the host, for steps whose verdict the host has not heard yet.

    Plain AdamW counts its steps on the CPU, a skipped one too. What it keeps there depends only on how many
    steps it took, so a step that turns out to have been skipped is undone by going one entry back.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self._device = device
        self._before: HostValues = {}

    def note(self, step: int, known: int) -> None:
        """About to take step ``step``; the verdicts before ``known`` have been heard."""
        for heard in [s for s in self._before if s < known]:
            del self._before[heard]
        self._before[step] = {id(p): self._on_host(state) for p, state in parameter_states(self._optimizer)}

    def _on_host(self, state: dict[str, Any]) -> dict[str, Any]:
        return {
            key: value.clone() if isinstance(value, Tensor) else copy.copy(value)
            for key, value in state.items()
            if not (isinstance(value, Tensor) and value.device == self._device)
        }

    def skipped(self, step: int) -> HostValues:
        """Step ``step`` was not taken: correct the optimizer.

        Returns:
            What it should have held after each later step.
        """
        later = sorted(s for s in self._before if s >= step)
        if not later or later[0] != step:
            return {}  # never tried
        right = {s: self._before[s] for s in later}
        for earlier, s in reversed(list(itertools.pairwise(later))):
            self._before[s] = right[earlier]
        for parameter, state in parameter_states(self._optimizer):
            values = right[later[-1]].get(id(parameter))
            if values is not None:
                state.update(copy.deepcopy(values))
            elif self._on_host(state):
                del self._optimizer.state[parameter]  # born in the step that was skipped
        return right

    def clear(self) -> None:
        """A rollback put other values in place."""
        self._before.clear()
