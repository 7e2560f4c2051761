"""Governor ops: judge ``n`` losses at once, give an order from outside the rule.

Source: csrc/math/governor.h · reference: tolaria.reference.governor · bench: bench/ops/bench_governor.py
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.optim import Optimizer

from tolaria import _backend, _extension
from tolaria.reference import governor as reference
from tolaria.reference.governor_layout import MemoryField, Order, PanicReason, StateField
from tolaria.reference.governor_rules import is_climbing
from tolaria.reference.governor_state import Governors


def governor_step_(
    state: Tensor,
    config: Tensor,
    loss: Tensor,
    nonfinite: Tensor | None = None,
    active: Tensor | None = None,
    mailbox: Tensor | None = None,
    gradient: Tensor | None = None,
    state_bad: Tensor | None = None,
) -> None:
    """Judge one loss for each of ``n`` governors, in one launch and without reading anything back.

    Rules, statistics and the double buffer's bookkeeping are those of DESIGN section 4; all arithmetic is
    float64 and the same bit for bit on every backend.

    Args:
        state: float64 ``(fields, n)`` from :func:`governor_state`; updated in place.
        config: float64 ``(CONFIG_FIELDS,)`` on ``state``'s device, shared by all governors.
        loss: ``n`` values, any floating dtype, on ``state``'s device.
        nonfinite: ``n`` flags (bool, or a floating ``found_inf``): nonzero is judged like a NaN loss.
        active: ``n`` flags; a row whose flag is 0 is not touched.
        mailbox: float64 ``(n, status + records)`` in (page-locked) CPU memory, where events and status are
            written.
        gradient: ``n`` norms of the gradients that belong to the losses, any floating dtype, or the ``n``
            rows ``(n, 4)`` that :func:`tolaria.ops.tensor_stats` returned for them; None: not judged.
        state_bad: ``n`` flags as ``nonfinite``: the state of such a row is not finite, so a bad step of it is
            rolled back even where ``skips_before_rollback`` would let it pass; None: all are finite.

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: ``loss`` is not floating, or a flag is neither bool nor floating.

    Whatever values ``state``, ``config`` and ``mailbox`` hold, nothing outside them is written: what indexes
    is bounded, alike on every backend.
    """
    if _backend.fused(state):
        torch.ops.tolaria.governor_step_.default(
            state, config, loss, nonfinite, active, mailbox, gradient, state_bad
        )
    else:
        reference.governor_step_(state, config, loss, nonfinite, active, mailbox, gradient, state_bad)


def judge_(
    state: Tensor,
    config: Tensor,
    loss: Tensor,
    nonfinite: Tensor | None,
    mailbox: Tensor,
    gradient: Tensor | None,
    told: int,
    optimizers: list[Optimizer],
    sizes: list[int],
    state_bad: Tensor | None = None,
) -> bool:
    """:func:`governor_step_` for a single governor, by the shortest way, and whether the host must act.

    Args:
        state: as for :func:`governor_step_` with ``n`` of 1, like all that follow.
        config: the settings.
        loss: one value.
        nonfinite: a flag, or None.
        mailbox: where events and status are written.
        gradient: a norm, or a row of ``tensor_stats``, or None.
        told: how many of the mailbox's events the host has read.
        optimizers: those whose groups may have grown.
        sizes: how many parameters each of their groups had.
        state_bad: a flag, or None.

    Returns:
        False if nothing is to be done: on the CPU, no order, no further event, no growth. Else, and wherever
        the host cannot know without waiting, True.

    Raises:
        ValueError, TypeError: as :func:`governor_step_`.
    """
    if _backend.fused_on_cpu and state.is_cpu and state_bad is None and not is_dynamo_compiling():
        return _extension.judge(state, config, loss, nonfinite, mailbox, gradient, told, optimizers, sizes)
    governor_step_(state, config, loss, nonfinite, None, mailbox, gradient, state_bad)
    return True


def suspicious_candidates(state: Tensor, *, undoes: bool, interval: int) -> Tensor:
    """Which governors will refuse their candidate for the magnitude of a tensor: bool ``(n,)``; never waits.

    Args:
        state: float64 ``(fields, n)``.
        undoes: whether suspicious captures are rolled back.
        interval: steps between captures.
    """
    captured, suspected = state[StateField.candidate] >= 0, state[StateField.suspect] >= 0
    return captured & suspected & ~reference.is_settled(Governors(state, None, None), undoes, interval)


def held_back(state: Tensor, config: Tensor) -> Tensor:
    """Which governors capture and promote nothing for now: bool ``(n,)``; never waits.

    There is evidence of a collapse, or much of a shift, or what was validated is bad.

    Args:
        state: float64 ``(fields, n)``.
        config: float64 ``(CONFIG_FIELDS,)``.
    """
    g = Governors(state, config, None)
    climbs = is_climbing(g, g.live(MemoryField.shift_sum))
    return climbs | (g.live(MemoryField.collapse) > 0) | (g.live(MemoryField.held) != 0)


def governor_order_(
    state: Tensor,
    config: Tensor,
    column: int,
    order: Order,
    reason: PanicReason = PanicReason.MANUAL,
    tensor_index: int = -1,
    mailbox: Tensor | None = None,
) -> None:
    """Order something for governor ``column``, from outside the rule.

    A rollback, a capture, a promotion, that it forgets all losses, that the shift test learns its level anew,
    that nothing is captured and promoted for now, or that it is again.

    Args:
        state: float64 ``(fields, n)``; updated in place.
        config: float64 ``(CONFIG_FIELDS,)``.
        column: which governor, 0 to ``n - 1``.
        order: what to do; a rollback that is already pending keeps its reason.
        reason: why, for ``Order.ROLLBACK``.
        tensor_index: the tensor to blame, or -1.
        mailbox: as for :func:`governor_step_`.

    Raises:
        ValueError: ``column``, ``order`` or ``reason`` is out of range, or a tensor does not fit.
    """
    if _backend.fused(state):
        torch.ops.tolaria.governor_order_.default(
            state, config, column, int(order), int(reason), tensor_index, mailbox
        )
    else:
        reference.governor_order_(state, config, column, order, reason, tensor_index, mailbox)
