"""Extras that hold NaN on CUDA: a capture about to be launched is marked as poisoned, without waiting.

No slot holds the tensors of an extra that is no module, so the capture's launches do not search them. They
are searched here, and the finding goes where those launches write theirs: the judge reads it, takes the
capture for poisoned, and names the extra by its number.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tolaria import ops
from tolaria.governor.row import Row
from tolaria.ops import StateField
from tolaria.snapshot.base import SnapshotBase
from tolaria.snapshot.finite_state import stored_values
from tolaria.snapshot.host_state import HostState

_SEARCHED = {torch.float32, torch.float64, torch.float16, torch.bfloat16}


def flag_bad_extras(row: Row, base: SnapshotBase, host: HostState, number_of: Callable[[str], int]) -> None:
    """If an extra holds a value that is not finite, the capture that was ordered, if one was, has found it.

    Args:
        row: the governor.
        base: what is captured, on a CUDA device.
        host: the host-side parts of the capture.
        number_of: the number that the judge is given for an extra.
    """
    for name, tensors in reversed(base.extras_on_device(host).items()):  # the first has the last word
        count = _nonfinite_count(tensors)
        if count is not None:
            _flag(row, number_of(name), count)
    bad = base.bad_host_part(host)
    if bad is not None:
        _flag(row, number_of(bad))


def _nonfinite_count(tensors: list[Tensor]) -> Tensor | None:
    """How many values are not finite, on the device; None: none can be."""
    values = [stored_values(tensor) for tensor in tensors]
    searched = [v for v in values if v.dtype in _SEARCHED and v.layout is torch.strided]
    return ops.tensor_stats(searched)[2] if searched else None


def _flag(row: Row, number: int, count: Tensor | None = None) -> None:
    """Write the finding; not without an order, since a candidate on probation is of another state."""
    state = row.state[:, row.column]
    is_bad = state[StateField.capture_order_0] >= 0
    if count is not None:
        is_bad.logical_and_(count)
    state[StateField.candidate_bad].masked_fill_(is_bad, float(number))
