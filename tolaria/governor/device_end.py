"""How an engine on CUDA comes to its end: nothing may still touch the memory that goes with it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from tolaria import ops
from tolaria.ops import StateField
from tolaria.snapshot import graphs
from tolaria.snapshot.flight import Flight


def let_go(
    flight: Flight,
    handles: list[RemovableHandle],
    state: Tensor,
    column: int,
    table: ops.SnapshotTable,
    memory: object,
) -> None:
    """The end of an engine: no launch may still touch ``memory``, which lives as long as the arguments."""
    for handle in handles:
        handle.remove()
    if torch.cuda._is_in_bad_fork():
        return  # a forked child that ends: it has the addresses, not the device
    again = partial(let_go, flight, [], state, column, table, memory)
    if graphs.is_postponed(flight.device, again):
        return
    for stream in (flight.stream, *flight.users.values()):
        if not stream.query():
            stream.synchronize()  # sync: when a governor goes while its work is under way
    if graphs.is_kept(state):
        graphs.disarm(flight.device, partial(_take_slots_away, state, column, table))


def _take_slots_away(state: Tensor, column: int, table: ops.SnapshotTable) -> None:
    """Make what a graph may replay touch nothing but ``state`` and the mailbox, which outlive it."""
    for field in (StateField.attached, StateField.restore_order):
        state[field, column] = 0.0
    for field in (StateField.candidate, StateField.capture_order_0, StateField.capture_order_1):
        state[field, column] = -1.0
    table.clear()
