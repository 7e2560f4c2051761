"""Snapshot copies in plain PyTorch: the oracle of ``csrc/cpu/snapshot.cpp`` and its fallback."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tolaria.reference.governor import commit_rollback, finish_capture_part
from tolaria.reference.governor_checks import check_column, check_governors, check_part
from tolaria.reference.governor_layout import StateField
from tolaria.reference.governor_state import Governors, slot_index
from tolaria.reference.magnitude import Suspect, magnitudes, weigh_


def first_nonfinite(tensors: Sequence[Tensor]) -> int:
    """Index of the first floating tensor with NaN or infinity, or -1. A reduction a tensor, one transfer."""
    kept = [(i, t) for i, t in enumerate(tensors) if t.numel() and (t.is_floating_point() or t.is_complex())]
    if not kept:
        return -1
    # The largest magnitude, unlike a sum of squares, cannot overflow where every element is finite.
    wide = [t.to(torch.float32) if t.element_size() == 1 else t for _, t in kept]  # no norm of float8
    largest = torch._foreach_norm(wide, ord=float("inf"))
    finite = torch.stack([torch.isfinite(norm).to("cpu") for norm in largest]).tolist()
    return next((i for (i, _), fine in zip(kept, finite, strict=True) if not fine), -1)


def snapshot_capture_(
    state: Tensor,
    column: int,
    live: Sequence[Tensor],
    slots: Sequence[tuple[Tensor, Tensor]],
    checked: Sequence[int],
    part: int,
    mailbox: Tensor | None = None,
    ticket: int = 0,
    births: Sequence[int] = (),
    history: Tensor | None = None,
) -> None:
    """Reference of :func:`tolaria.ops.snapshot_capture_`.

    ``checked``: a report index, or -1, per tensor; ``births``: likewise, 0 where its magnitude is not judged
    by ``history``, the table of magnitudes.
    """
    check_governors(state, None, mailbox)
    check_column(state, column)
    check_part(part)
    order = state[StateField.capture_order_0 + part, column]
    if not bool(order >= 0):  # -1, or NaN
        return
    slot = int(slot_index(order))
    if live:
        torch._foreach_copy_([pair[slot] for pair in slots], list(live))
    watched = [(index, pair[slot]) for index, pair in zip(checked, slots, strict=True) if index >= 0]
    bad = first_nonfinite([t for _, t in watched])
    suspect = Suspect()
    judged = [
        (float(index), float(birth), pair[slot])
        for index, birth, pair in zip(checked, births, slots, strict=bool(births))
        if birth and pair[slot].numel()
    ]
    if history is not None and judged:
        rows = torch.tensor([judged_row[:2] for judged_row in judged], dtype=torch.float64, device="cpu")
        suspect = weigh_(state, column, slot, history, rows, magnitudes([t for *_, t in judged]))
    first = watched[bad][0] if bad >= 0 else -1
    finish_capture_part(state, column, part, first, suspect, mailbox, ticket)


def snapshot_restore_(
    state: Tensor,
    column: int,
    config: Tensor,
    live: Sequence[Tensor],
    slots: Sequence[tuple[Tensor, Tensor]],
    mailbox: Tensor | None = None,
) -> None:
    """Reference of :func:`tolaria.ops.snapshot_restore_`."""
    check_governors(state, config, mailbox)
    check_column(state, column)
    if not bool(state[StateField.restore_order, column]):
        return
    slot = int(slot_index(state[StateField.last_good, column]))
    if live:
        torch._foreach_copy_(list(live), [pair[slot] for pair in slots])
    g = Governors(state, config, mailbox)
    row = torch.zeros(state.shape[1], dtype=torch.bool, device=state.device)
    row[column] = True
    commit_rollback(g, row)
