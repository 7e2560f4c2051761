"""What a loss is compared with: thresholds, the band of chance level, the gradient's and the drift test.

The pure-PyTorch side of ``csrc/math/governor_rules.h``; every operation stands in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tolaria.reference.governor_arithmetic import correctly_rounded_sqrt, welford
from tolaria.reference.governor_layout import ConfigField, MemoryField
from tolaria.reference.governor_state import Governors

_M = MemoryField
_DRIFT_CLIP = 2.0
_LEVEL_HORIZON = 64.0
_WORSE_THAN_CHANCE = 0.25
_SHIFT_MOST, _SHIFT_LEAST, _SHIFT_CLIP, _SHIFT_RANGE = 2.0, -1.0, 4.0, 0.02
_SHIFT_FAST, _SHIFT_WANDER, _SHIFT_SLOWER = 10.0, 8.0, 4.0
_SHIFT_FAINT, _SHIFT_FAINTNESS = 0.25, 1.0
_SHIFT_SUSPICION, SHIFT_ARMED, _SHIFT_KEENER, _SHIFT_BELOW_ZERO = 0.15, 80.0, 3.0, 0.5


def window_moments(window: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of a window ``(window, n)``, oldest to newest."""
    mean = torch.zeros_like(size)
    m2 = torch.zeros_like(size)
    for count, x in enumerate(window.unbind(), start=1):
        inside = count <= size
        new_mean, new_m2 = welford(mean, m2, x, float(count))
        mean = torch.where(inside, new_mean, mean)
        m2 = torch.where(inside, new_m2, m2)
    return mean, m2


def _floored(g: Governors, std: Tensor, mean: Tensor) -> Tensor:
    """A standard deviation that is not below its floor, a share of ``|mean|``."""
    floor = g.setting(ConfigField.min_std) * mean.abs()
    return torch.where(std < floor, floor, std)


def thresholds(g: Governors, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Absolute, statistical and multiplier threshold."""
    c = g.setting
    absolute = c(ConfigField.absolute_threshold).expand_as(mean)
    statistical = mean + c(ConfigField.sensitivity) * _floored(g, std, mean)
    silent = torch.where(c(ConfigField.rule_any) != 0, torch.inf, -torch.inf).to(mean)
    return absolute, statistical, torch.where(mean > 0, c(ConfigField.multiplier) * mean, silent)


class ChanceLevel(NamedTuple):
    """Whether a network that had learnt is back at the loss of guessing; see ``math/governor_rules.h``."""

    learnt: Tensor
    at_once: Tensor
    level: Tensor
    evidence: Tensor


def chance_level(g: Governors, x: Tensor, mean: Tensor, std: Tensor) -> ChanceLevel:
    """What the loss ``x`` says of that, given the moments of the window."""
    c = g.setting
    guess = c(ConfigField.random_guess_loss)
    low, high = c(ConfigField.lobotomy_low) * guess, c(ConfigField.lobotomy_high) * guess
    below = c(ConfigField.lobotomy_healthy_below) * guess
    evidence, former = g.live(_M.collapse), g.live(_M.learnt) != 0
    bound = mean + c(ConfigField.sensitivity) * std
    is_long = g.live(_M.history_size) >= c(ConfigField.min_history)
    is_classic = c(ConfigField.lobotomy_classic) != 0
    in_band = (x >= low) & (x <= high)
    learnt = former | (is_long & (mean < below))
    at_once = is_long & (g.live(_M.last_healthy) < below) & in_band & (is_classic | (learnt & (bound < low)))
    level = torch.where(former, g.live(_M.learnt_level), mean)
    less = torch.where(x < 0.5 * (level + low), -1.0, 0.0).to(x)
    total = evidence + torch.where(in_band, 1.0, torch.where(x > high, _WORSE_THAN_CHANCE, less))
    most = 2.0 * c(ConfigField.collapse_patience)
    following = torch.where(total > most, most, torch.where(total > 0, total, 0.0))
    return ChanceLevel(learnt, at_once, level, torch.where(learnt & ~is_classic, following, evidence))


def remember(g: Governors, rows: Tensor, chance: ChanceLevel, x: Tensor, joins: Tensor) -> None:
    """Remember what was found; a loss that has joined moves the level."""
    low = g.setting(ConfigField.lobotomy_low) * g.setting(ConfigField.random_guess_loss)
    moved = chance.level + (torch.where(x < low, x, low) - chance.level) / _LEVEL_HORIZON
    level = torch.where(joins, moved, chance.level)
    g.put(g.memory(_M.learnt), rows, chance.learnt.to(x))
    g.put(g.memory(_M.learnt_level), rows, torch.where(chance.learnt, level, 0.0))
    g.put(g.memory(_M.collapse), rows, chance.evidence)


class Shift(NamedTuple):
    """Whether the level of the losses has shifted up for good; see ``csrc/math/governor_rules.h``."""

    is_ready: Tensor
    found: Tensor
    scale: Tensor
    total: Tensor
    armed: Tensor
    norm: Tensor
    has_norm: Tensor


def shift_with(g: Governors, x: Tensor, norm: Tensor, has_norm: Tensor) -> Shift:
    """What the loss ``x`` says of that, and the norm of its gradient where there is one."""
    c = g.setting
    horizon, threshold = c(ConfigField.shift_horizon), c(ConfigField.shift_threshold)
    level, spread, total = g.live(_M.shift_level), g.live(_M.shift_spread), g.live(_M.shift_sum)
    is_on = horizon != 0
    is_ready = is_on & (g.live(_M.shift_count) >= 0.5 * horizon)
    least = _SHIFT_RANGE * (g.live(_M.shift_top) - level)
    wander = _SHIFT_WANDER * g.live(_M.shift_wander)
    wider = torch.where(spread < wander, wander, spread)
    widest, share = torch.where(wider < least, least, wider), c(ConfigField.min_std) * level
    scale = torch.where(widest < share, share, widest)
    left = g.live(_M.shift_armed) - 1.0
    usual = g.live(_M.shift_gradient)
    knows_norm = is_ready & has_norm & (usual > 0)
    is_spike = knows_norm & (norm > c(ConfigField.shift_spike) * usual)
    is_faint = knows_norm & (norm < _SHIFT_FAINT * usual)
    armed = torch.where(is_spike, SHIFT_ARMED, torch.where(left > 0, left, 0.0))
    armed = torch.where(is_on, armed, g.live(_M.shift_armed))
    is_armed = armed > 0
    z = (x - level) / scale
    z = torch.where(z.isnan(), 0.0, z)
    z = torch.where(is_faint & (z > 0), z + _SHIFT_FAINTNESS, z)
    z = z - torch.where(is_armed, 0.0, c(ConfigField.shift_slack))
    following = total + z.clamp(_SHIFT_LEAST, _SHIFT_MOST)
    most = 2.0 * threshold
    following = torch.where(following > most, most, torch.where(following > 0, following, 0.0))
    total = torch.where(is_ready, following, total)
    found = is_ready & (total >= torch.where(is_armed, threshold / _SHIFT_KEENER, threshold))
    return Shift(is_ready, found, scale, total, armed, norm, has_norm)


def is_climbing(g: Governors, total: Tensor) -> Tensor:
    """Evidence so strong that no loss moves the level and no capture is promoted."""
    return total > _SHIFT_SUSPICION * g.setting(ConfigField.shift_threshold)


def remember_shift(g: Governors, rows: Tensor, shift: Shift, x: Tensor, joins: Tensor) -> None:
    """Remember what was found; a loss that has joined moves level and spread while nothing is suspicious.

    A level below zero follows even then, slowly. A shift that was told is learnt: where nothing is put back,
    the next losses are the level.
    """
    rows = rows & (g.setting(ConfigField.shift_horizon) != 0)
    horizon, most = g.setting(ConfigField.shift_horizon), _SHIFT_CLIP * shift.scale
    level, spread, count = g.live(_M.shift_level), g.live(_M.shift_spread), g.live(_M.shift_count) + 1.0
    count = torch.where(count < horizon, count, horizon)
    d = x - level
    d = torch.where(shift.is_ready & (d > most), most, torch.where(shift.is_ready & (d < -most), -most, d))
    moved = level + d / count
    away = torch.where(shift.is_ready, d, x - moved)
    wider = spread + (away.abs() - spread) / count
    fast, wander = g.live(_M.shift_fast), g.live(_M.shift_wander)
    faster = fast + (level + d - fast) / torch.where(count < _SHIFT_FAST, count, _SHIFT_FAST)
    above = torch.where(faster > moved, faster - moved, 0.0)
    farther = wander + (above - wander) / (_SHIFT_SLOWER * horizon)
    usual = g.live(_M.shift_gradient)
    loudest = _SHIFT_CLIP * usual
    heard = torch.where(shift.is_ready & (usual > 0) & (shift.norm > loudest), loudest, shift.norm)
    tuned = torch.where(usual > 0, usual + (heard - usual) / count, heard)
    fits = moved.isfinite() & wider.isfinite() & faster.isfinite() & farther.isfinite()
    climbs = is_climbing(g, shift.total)
    moves = rows & joins & fits & ~climbs
    g.put(
        g.memory(_M.shift_level),
        rows & joins & fits & climbs & (level < 0),
        level + _SHIFT_BELOW_ZERO * (d / count),
    )
    g.put(g.memory(_M.shift_count), moves, count)
    g.put(g.memory(_M.shift_count), rows & shift.found, 0.0)
    g.put(g.memory(_M.shift_level), moves, moved)
    g.put(g.memory(_M.shift_spread), moves, wider)
    g.put(g.memory(_M.shift_top), moves & ~shift.is_ready & (moved > g.live(_M.shift_top)), moved)
    g.put(g.memory(_M.shift_fast), moves, faster)
    g.put(g.memory(_M.shift_wander), moves & shift.is_ready, farther)
    g.put(g.memory(_M.shift_gradient), moves & shift.has_norm & tuned.isfinite(), tuned)
    g.put(g.memory(_M.shift_sum), rows, torch.where(shift.found, 0.0, shift.total))
    g.put(g.memory(_M.shift_armed), rows, torch.where(shift.found, 0.0, shift.armed))


def gradient_threshold(g: Governors, moments: tuple[Tensor, Tensor]) -> Tensor:
    """What a gradient's norm must exceed to be an explosion; infinite until its window is long enough."""
    c, size = g.setting, g.live(_M.gradient_size)
    mean, m2 = moments
    statistical = mean + c(ConfigField.sensitivity) * _floored(g, correctly_rounded_sqrt(m2 / size), mean)
    multiplier = c(ConfigField.gradient_multiplier) * mean
    larger = torch.where(statistical > multiplier, statistical, multiplier)
    return torch.where(size < c(ConfigField.min_history), torch.inf, larger)


def drift_with(g: Governors, x: Tensor) -> Tensor:
    """The drift sum with ``x`` counted in: a one-sided CUSUM (Page 1954) of standardised losses."""
    c, total, mean = g.setting, g.live(_M.drift_sum), g.live(_M.drift_mean)
    z = (x - mean) / _floored(g, correctly_rounded_sqrt(g.live(_M.drift_variance)), mean)
    z = torch.where(z.isnan(), 0.0, z.clamp(-_DRIFT_CLIP, _DRIFT_CLIP))
    following = total + z - c(ConfigField.drift_slack)
    following = torch.where(following > 0, following, 0.0)
    armed = ~(g.live(_M.drift_count) < c(ConfigField.min_history))
    return torch.where(armed & (c(ConfigField.drift_horizon) != 0), following, total)


def move_baseline(g: Governors, rows: Tensor, x: Tensor) -> None:
    """Plain moments of the first ``drift_horizon`` losses, from then on exponentially forgetting ones."""
    horizon = g.setting(ConfigField.drift_horizon)
    count = g.live(_M.drift_count) + 1.0
    count = torch.where(count < horizon, count, horizon)
    delta = x - g.live(_M.drift_mean)
    mean = g.live(_M.drift_mean) + delta / count
    variance = g.live(_M.drift_variance)
    variance = variance + (delta * (x - mean) - variance) / count
    anew = ~(mean.isfinite() & variance.isfinite())  # overflow
    g.put(g.memory(_M.drift_count), rows, torch.where(anew, 1.0, count))
    g.put(g.memory(_M.drift_mean), rows, torch.where(anew, x, mean))
    g.put(g.memory(_M.drift_variance), rows, torch.where(anew, 0.0, variance))


def gradient_norm(g: Governors, gradient: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """The norms, given as such or as rows of ``tensor_stats``, and which of them are to be judged."""
    n = g.state.shape[1]
    if gradient is None:
        return None, torch.zeros(n, dtype=torch.bool, device=g.state.device)
    norm = gradient.detach().to(torch.float64).reshape(n, -1)
    if norm.shape[1] > 1:
        norm = torch.where(norm[:, 2] > 0, torch.nan, correctly_rounded_sqrt(norm[:, 0]))
    norm = norm.reshape(n)
    # Under a GradScaler an overflow is routine, and the step was left out: there is no gradient to judge.
    return norm, norm.isfinite() | (g.setting(ConfigField.gradient_may_overflow) == 0)
