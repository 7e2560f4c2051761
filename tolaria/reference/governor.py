"""The governor's rule in plain PyTorch: the oracle of ``csrc/math/governor.h``, equal to it bit for bit.

All ``n`` governors are judged at once; a row that is not concerned keeps its bytes by selection
(``torch.where``). Every float64 operation stands in the same order as in the C++, where no contraction is
allowed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tolaria.reference.governor_arithmetic import correctly_rounded_sqrt, welford
from tolaria.reference.governor_checks import check_column, check_governors, check_order, check_samples
from tolaria.reference.governor_layout import (
    ALL_PARTS_DONE,
    UNDOES,
    ConfigField,
    EventKind,
    MemoryField,
    Order,
    PanicReason,
    StateField,
)
from tolaria.reference.governor_rules import (
    chance_level,
    drift_with,
    gradient_norm,
    gradient_threshold,
    is_climbing,
    move_baseline,
    remember,
    remember_shift,
    shift_with,
    thresholds,
    window_moments,
)
from tolaria.reference.governor_state import (
    Governors,
    emit,
    entries_in,
    parts_in,
    slot_index,
    verdict_words,
    write_rollback_status,
    write_slot_status,
    write_status,
    write_verdict_status,
)
from tolaria.reference.magnitude import SETTLED_INTERVALS, SUSPECTED_AGAIN, Suspect, later_of

_S, _M = StateField, MemoryField


def _cancel_candidate(g: Governors, rows: Tensor) -> None:
    for field in (_S.candidate, _S.candidate_bad, _S.capture_order_0, _S.capture_order_1):
        g.put(field, rows, -1.0)
    for field in (_S.candidate_done, _S.candidate_healthy):
        g.put(field, rows, 0.0)
    _forget_suspect(g, rows)


def _forget_suspect(g: Governors, rows: Tensor) -> None:
    for field, value in zip((_S.suspect, _S.suspect_since, _S.suspect_count), Suspect(), strict=True):
        g.put(field, rows, value)


def _order_capture(g: Governors, rows: Tensor) -> None:
    slot = 1.0 - slot_index(g[_S.last_good])
    _cancel_candidate(g, rows)
    for field in (_S.candidate, _S.capture_order_0, _S.capture_order_1):
        g.put(field, rows, slot)
    g.put(_S.capture_count, rows, g[_S.capture_count] + 1.0)
    live = g.block(0).clone()
    for s in (0, 1):
        mine = rows & (slot == s)
        g.move(_S.slot_step_0 + s, mine, g[_S.step])
        g.move(_S.slot_capture_0 + s, mine, g[_S.capture_count])
        g.block(1 + s).copy_(torch.where(mine, live, g.block(1 + s)))


def _promote_candidate(g: Governors, rows: Tensor) -> None:
    slot = slot_index(g[_S.candidate])
    capture_step = g.by_slot(slot, _S.slot_step_0)
    g.put(_S.last_good, rows, slot)
    g.move(_S.anchor_step, rows, capture_step)
    g.move(_S.due_from, rows, capture_step)
    g.put(_S.promotion_count, rows, g[_S.promotion_count] + 1.0)
    _cancel_candidate(g, rows)
    write_slot_status(g, rows)
    capture, ticket = g.by_slot(slot, _S.slot_capture_0), g.by_slot(slot, _S.slot_ticket_0)
    emit(g, rows, EventKind.PROMOTION, capture, capture_step, ticket)


def commit_rollback(g: Governors, rows: Tensor) -> None:
    """The bookkeeping of a rollback whose tensors are back: the restored slot's memory judges from here."""
    slot = slot_index(g[_S.last_good])
    g.put(_S.rollback_count, rows, g[_S.rollback_count] + 1.0)
    g.move(_S.cooldown_left, rows, g.setting(ConfigField.cooldown))
    g.put(_S.steps_lost, rows, g[_S.step] - g[_S.anchor_step])
    g.move(_S.anchor_step, rows, g[_S.step])
    g.move(_S.due_from, rows, g[_S.step])
    g.move(_S.restored_capture, rows, g.by_slot(slot, _S.slot_capture_0))
    g.move(_S.restored_step, rows, g.by_slot(slot, _S.slot_step_0))
    g.move(_S.restored_ticket, rows, g.by_slot(slot, _S.slot_ticket_0))
    g.put(_S.restore_order, rows, 0.0)
    g.put(_S.reward, rows, -g.setting(ConfigField.death_penalty))
    kept = torch.where(slot == 0, g.block(1), g.block(2))
    g.block(0).copy_(torch.where(rows, kept, g.block(0)))
    _cancel_candidate(g, rows)
    write_rollback_status(g, rows)
    emit(g, rows, EventKind.ROLLBACK, g[_S.restored_capture], g[_S.restored_step], g[_S.restored_ticket])


def _push(g: Governors, rows: Tensor, size_field: MemoryField, window: Tensor, value: Tensor) -> None:
    """Append ``value`` to ``rows`` of a window; a full one loses its oldest."""
    size = entries_in(g.live(size_field), g.window)
    full = rows & (size == g.window)
    window[:-1] = torch.where(full, window[1:], window[:-1])
    size = size.clamp(max=g.window - 1)
    last = size.long().unsqueeze(0)
    window.scatter_(0, last, torch.where(rows, value, window.gather(0, last)))
    g.put(g.memory(size_field), rows, size + 1.0)


def _accept(
    g: Governors, rows: Tensor, x: Tensor, norm: Tensor | None, has_norm: Tensor, drift: Tensor
) -> None:
    """A healthy step: ``x`` joins H, the lifetime statistics and the drift baseline, the norm its window."""
    _push(g, rows, _M.history_size, g.history(), x)
    if norm is not None:
        _push(g, rows & has_norm, _M.gradient_size, g.gradients(), norm)
    drifting = rows & (g.setting(ConfigField.drift_horizon) != 0)
    g.put(g.memory(_M.drift_sum), drifting, drift)
    move_baseline(g, drifting, x)
    g.put(g.memory(_M.last_healthy), rows, x)
    g.put(g.memory(_M.consecutive), rows, 0.0)
    g.put(g.memory(_M.lobotomy_pending), rows, 0.0)
    g.put(g.memory(_M.skips), rows, 0.0)

    count = g[_S.life_count] + 1.0
    mean, m2 = welford(g[_S.life_mean], g[_S.life_m2], x, count)
    g.put(_S.life_min, rows & ((count == 1) | (x < g[_S.life_min])), x)
    g.put(_S.life_max, rows & ((count == 1) | (x > g[_S.life_max])), x)
    g.put(_S.life_count, rows, count)
    g.put(_S.life_mean, rows, mean)
    g.put(_S.life_m2, rows, m2)


def is_settled(g: Governors, undoes: Tensor | bool, interval: Tensor | int) -> Tensor:
    """Whether the level of the candidate's suspect has lasted: then the training makes the state so.

    Args:
        g: the governors.
        undoes: whether suspicious captures are rolled back.
        interval: steps between captures.
    """
    if isinstance(undoes, Tensor):
        return torch.where(undoes, is_settled(g, True, interval), is_settled(g, False, interval))
    if undoes:
        return g[_S.suspect_count] >= SUSPECTED_AGAIN
    captured = g.by_slot(g[_S.candidate], _S.slot_step_0)
    return captured - g[_S.suspect_since] >= SETTLED_INTERVALS * interval


def _tell_of_suspect(g: Governors, rows: Tensor, kind: EventKind) -> None:
    """Tell of the candidate's suspect, beside the verdict on the loss, which stays what it is."""
    of_loss = verdict_words(g)
    capture, step = (g.by_slot(g[_S.candidate], field) for field in (_S.slot_capture_0, _S.slot_step_0))
    g.put(_S.reason, rows, float(PanicReason.SUSPICIOUS_STATE))
    g.put(_S.rollback, rows, 0.0)
    g.move(_S.tensor_index, rows, g[_S.suspect])
    emit(g, rows, kind, capture, step)
    for field, value in zip((_S.reason, _S.rollback, _S.tensor_index), of_loss, strict=True):
        g.move(field, rows, value)


def _advance_slots(g: Governors, rows: Tensor, healthy: Tensor, paused: Tensor, suspicious: Tensor) -> None:
    doubted = rows & suspicious
    g.move(_S.due_from, doubted, g.by_slot(g[_S.candidate], _S.slot_step_0))
    _cancel_candidate(g, doubted)
    write_slot_status(g, doubted)
    pending = rows & (g[_S.candidate] >= 0)
    lost = pending & (~healthy | (g[_S.candidate_done] != ALL_PARTS_DONE))
    waits = paused | (g.live(_M.collapse) > 0) | is_climbing(g, g.live(_M.shift_sum)) | (g.live(_M.held) != 0)
    counted = pending & ~lost & ~waits
    _cancel_candidate(g, lost)
    g.put(_S.candidate_healthy, counted, g[_S.candidate_healthy] + 1.0)
    _promote_candidate(g, counted & (g[_S.candidate_healthy] >= g.setting(ConfigField.probation)))
    due = g[_S.step] - g[_S.due_from] >= g.setting(ConfigField.snapshot_interval)
    acts = g.setting(ConfigField.log_only) == 0
    ordered = rows & healthy & ~waits & due & (g[_S.candidate] < 0) & acts
    _order_capture(g, ordered)
    write_slot_status(g, ordered)


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
    """Reference of :func:`tolaria.ops.governor_step_`."""
    check_governors(state, config, mailbox)
    check_samples(state, loss, nonfinite, active, gradient, state_bad)
    g = Governors(state, config, mailbox)
    c = g.setting
    x = loss.detach().reshape(-1).to(torch.float64)
    rows = torch.ones_like(x, dtype=torch.bool) if active is None else active.reshape(-1) != 0
    finite = torch.isfinite(x) if nonfinite is None else torch.isfinite(x) & (nonfinite.reshape(-1) == 0)
    size = g.live(_M.history_size).clone()
    mean, m2 = window_moments(g.history(), size)
    std = correctly_rounded_sqrt(m2 / size)
    absolute, statistical, multiplier = thresholds(g, mean, std)

    over = [x > absolute, x > statistical, x > multiplier]
    explosion = torch.where(
        c(ConfigField.rule_any) != 0, over[0] | over[1] | over[2], over[0] & over[1] & over[2]
    )
    explosion = torch.where(size < c(ConfigField.min_history), x > c(ConfigField.warmup_bound), explosion)
    norm, has_norm = gradient_norm(g, gradient)
    steepest = torch.full_like(x, torch.inf)
    judged = torch.full_like(x, -1.0) if norm is None else torch.where(has_norm, norm, -1.0)
    if norm is not None:
        of_gradients = window_moments(g.gradients(), g.live(_M.gradient_size))
        steepest = torch.where(has_norm, gradient_threshold(g, of_gradients), torch.inf)
    drift, shift = drift_with(g, x), shift_with(g, x, judged, has_norm)
    # The rules in their order of precedence; a row falls to the first that holds.
    poisoned = (g[_S.candidate] >= 0) & (g[_S.candidate_bad] >= 0)
    looks, undoes = c(ConfigField.suspicious_state) != 0, c(ConfigField.suspicious_state) == UNDOES
    suspected = ~poisoned & looks & (g[_S.candidate] >= 0) & (g[_S.suspect] >= 0)
    suspicious = suspected & ~is_settled(g, undoes, c(ConfigField.snapshot_interval))
    undone = suspicious & undoes
    state_bad_ = poisoned | undone
    nonfinite_loss = ~state_bad_ & ~finite
    open_ = ~state_bad_ & finite
    nonfinite_gradient = open_ & has_norm & ~judged.isfinite()
    open_ = open_ & ~nonfinite_gradient
    paused = open_ & (g[_S.cooldown_left] > 0)
    open_ = open_ & ~paused
    judged_level, chance = open_, chance_level(g, x, mean, std)
    collapsed = open_ & chance.learnt & (chance.evidence >= c(ConfigField.collapse_patience))
    at_chance = open_ & chance.at_once
    lobotomy = at_chance | collapsed
    open_ = open_ & ~lobotomy
    shifted = open_ & shift.found
    open_ = open_ & ~shifted
    steep = open_ & ~explosion & (judged > steepest)
    anomaly = open_ & (explosion | steep)
    drifted = open_ & ~anomaly & (drift > c(ConfigField.drift_threshold) * c(ConfigField.drift_horizon))
    joins = open_ & ~anomaly & ~drifted

    pending, consecutive = g.memory(_M.lobotomy_pending), g.memory(_M.consecutive)
    g.put(pending, rows & at_chance, g[pending] + 1.0)
    g.put(consecutive, rows & anomaly, g[consecutive] + 1.0)
    rollback = (
        state_bad_
        | nonfinite_loss
        | nonfinite_gradient
        | drifted
        | shifted
        | collapsed
        | (at_chance & (g[pending] >= c(ConfigField.lobotomy_patience)))
        | (anomaly & (g[consecutive] >= c(ConfigField.min_panics_before_rollback)))
    )
    # So many bad steps in a row are left out instead, while the state is finite; a shift is not one step.
    skips = g.memory(_M.skips)
    may_skip = ~state_bad_ & ~drifted & ~shifted & (g[skips] < c(ConfigField.skips_before_rollback))
    if state_bad is not None:
        may_skip = may_skip & (state_bad.reshape(-1) == 0)
    rollback = rollback & ~may_skip
    reason = torch.zeros_like(x)
    for held, value in (
        (poisoned, PanicReason.NON_FINITE_STATE),
        (undone, PanicReason.SUSPICIOUS_STATE),
        (nonfinite_loss, PanicReason.NON_FINITE),
        (lobotomy, PanicReason.LOBOTOMY),
        (anomaly, PanicReason.ANOMALY),
        (nonfinite_gradient | steep, PanicReason.GRADIENT_NORM),
        (drifted | shifted, PanicReason.DRIFT),
    ):
        reason = torch.where(held, float(value), reason)

    healthy = reason == PanicReason.HEALTHY
    g.put(skips, rows & ~healthy & ~rollback, g[skips] + 1.0)

    known = size > 0
    before = verdict_words(g)
    g.put(_S.step, rows, g[_S.step] + 1.0)
    g.put(_S.reason, rows, reason)
    g.put(_S.rollback, rows, rollback.to(x))
    g.put(_S.loss, rows, x)
    g.put(_S.mean, rows, torch.where(known, mean, torch.nan))
    g.put(_S.std, rows, torch.where(known, std, torch.nan))
    g.put(_S.threshold_absolute, rows, absolute)
    g.put(_S.threshold_statistical, rows, torch.where(known, statistical, torch.nan))
    g.put(_S.threshold_multiplier, rows, torch.where(known, multiplier, torch.nan))
    g.put(_S.gradient_norm, rows, judged)
    g.put(_S.gradient_threshold, rows, steepest)
    g.put(_S.drift, rows, torch.where(c(ConfigField.shift_horizon) != 0, shift.total, drift))
    g.put(_S.tensor_index, rows, torch.where(poisoned, g[_S.candidate_bad], -1.0))
    g.move(_S.tensor_index, rows & undone, g[_S.suspect])
    g.put(_S.reward, rows, 0.0)
    g.put(_S.cooldown_left, rows & (g[_S.cooldown_left] > 0), g[_S.cooldown_left] - 1.0)
    _accept(g, rows & joins, x, norm, has_norm, drift)
    remember(g, rows & judged_level, chance, x, joins)
    remember_shift(g, rows & judged_level, shift, x, joins)
    g.move(_S.panics, rows, g[consecutive])

    acts = rollback & (c(ConfigField.log_only) == 0)
    attached = g[_S.attached] != 0
    g.put(_S.restore_order, rows, (acts & attached).to(x))
    write_verdict_status(g, rows, before)
    emit(g, rows & ~healthy, EventKind.VERDICT, -1.0, -1.0)
    _tell_of_suspect(g, rows & suspicious & ~undone, EventKind.VERDICT)
    _tell_of_suspect(g, rows & suspected & ~suspicious, EventKind.ACCEPTANCE)
    _forget_suspect(g, rows & suspected & ~suspicious)
    _advance_slots(g, rows & attached, healthy, paused, suspicious)
    commit_rollback(g, rows & acts & ~attached)


def governor_order_(
    state: Tensor,
    config: Tensor,
    column: int,
    order: int,
    reason: int,
    tensor_index: int,
    mailbox: Tensor | None = None,
) -> None:
    """Reference of :func:`tolaria.ops.governor_order_`."""
    check_governors(state, config, mailbox)
    check_column(state, column)
    check_order(order, reason)
    g = Governors(state, config, mailbox)
    row = torch.zeros(state.shape[1], dtype=torch.bool, device=state.device)
    row[column] = True
    if order == Order.ROLLBACK:
        fresh = row & (g[_S.rollback] == 0) if reason != PanicReason.NON_FINITE_STATE else row
        g.put(_S.reason, fresh, float(reason))
        g.put(_S.tensor_index, fresh, float(tensor_index))
        g.put(_S.rollback, fresh, 1.0)
        write_status(g, fresh)
        emit(g, fresh, EventKind.VERDICT, -1.0, -1.0)
        g.move(_S.restore_order, row, g[_S.attached])
        commit_rollback(g, row & (g[_S.attached] == 0))
    elif order == Order.CAPTURE:
        _order_capture(g, row)
    elif order == Order.PROMOTE:
        _promote_candidate(g, row & (g[_S.candidate] >= 0))
    elif order == Order.RELEARN:
        for of_shift in (_M.shift_count, _M.shift_sum, _M.shift_armed):
            g.put(g.memory(of_shift), row, 0.0)
    elif order in (Order.HOLD, Order.RELEASE):
        g.put(g.memory(_M.held), row, float(order == Order.HOLD))
    else:
        g.block(0).copy_(torch.where(row, 0.0, g.block(0)))
        for field in range(_S.life_count, _S.life_max + 1):
            g.put(field, row, 0.0)
        g.put(_S.cooldown_left, row, 0.0)
    write_status(g, row)


def finish_capture_part(
    state: Tensor, column: int, part: int, bad: int, found: Suspect, mailbox: Tensor | None, ticket: int
) -> None:
    """A capture part has been copied.

    ``bad`` is the index of the first non-finite tensor, or -1, ``found`` the one of suspicious magnitude.
    """
    g = Governors(state, None, mailbox)
    mine = state[:, column]
    mine[_S.capture_order_0 + part] = -1.0
    done = parts_in(float(mine[_S.candidate_done])) | (1 << part)
    mine[_S.candidate_done] = float(done)
    known = float(mine[_S.candidate_bad])
    if bad >= 0 and (known < 0 or bad < known):
        mine[_S.candidate_bad] = float(bad)
    fields = (_S.suspect, _S.suspect_since, _S.suspect_count)
    suspect = later_of(Suspect(*(float(mine[field]) for field in fields)), found)
    for field, value in zip(fields, suspect, strict=True):
        mine[field] = value
    if done == ALL_PARTS_DONE:
        row = torch.zeros(state.shape[1], dtype=torch.bool, device=state.device)
        row[column] = True
        slot = g[_S.candidate]
        mine[_S.slot_ticket_0 + int(slot_index(slot[column]))] = float(ticket)
        capture, step = g.by_slot(slot, _S.slot_capture_0), g.by_slot(slot, _S.slot_step_0)
        emit(g, row, EventKind.CAPTURE, capture, step, float(ticket))
