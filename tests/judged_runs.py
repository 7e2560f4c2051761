"""What the judge's tests judge: settings, losses and norms like those of a run; how states compare."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from tolaria.governor import GovernorConfig
from tolaria.ops import StateField

_BALANCED = {
    f.name: getattr(GovernorConfig.balanced(), f.name)
    for f in dataclasses.fields(GovernorConfig)
    if getattr(GovernorConfig.balanced(), f.name) != getattr(GovernorConfig(), f.name)
    and f.name not in ("snapshot_interval", "probation")
}

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "any": {"rule": "any", "min_std": 0.05},
    "patient": {"lobotomy_patience": 3, "cooldown": 2, "min_panics_before_rollback": 3},
    "bounded": {"warmup_bound": 50.0, "lobotomy_band": (0.95, math.inf), "window": 12},
    "drift": {"drift_horizon": 12, "drift_threshold": 0.4, "min_std": 0.05, "gradient_multiplier": 3.0},
    "skipping": {"skips_before_rollback": 3, "cooldown": 1},
    "classic": {"lobotomy_rule": "classic"},
    "hasty": {"collapse_patience": 2.5, "sensitivity": 1.0},
    "shift": {"shift_horizon": 12, "shift_threshold": 8.0, "shift_spike": 20.0, "min_std": 0.05},
    "shift and drift": {"shift_horizon": 9, "shift_threshold": 30.0, "shift_slack": 0.0, "drift_horizon": 12},
    "balanced": dict(_BALANCED),
    "log-only": {"log_only": True},
}


def losses_like_a_run(n: int, steps: int, seed: int) -> Tensor:
    """(steps, n) losses with NaN, Inf, spikes, plateaus, chance level, negatives and denormals among them.

    A fifth of the runs comes down to small losses, and falls back to chance level for good later on.
    """
    source = torch.Generator().manual_seed(seed)
    x = torch.rand(steps, n, generator=source, dtype=torch.float64) * 1.2
    kind = torch.rand(steps, n, generator=source)
    flat = torch.rand(n, generator=source) < 0.2
    x = torch.where(flat, 0.5, x)
    scale = torch.pow(10.0, torch.randint(-3, 8, (steps, n), generator=source).double())
    for low, high, value in (
        (0.00, 0.06, x * scale),
        (0.06, 0.10, torch.full_like(x, math.log(10))),
        (0.10, 0.11, torch.full_like(x, math.nan)),
        (0.11, 0.12, torch.full_like(x, math.inf)),
        (0.12, 0.125, torch.full_like(x, -math.inf)),
        (0.125, 0.14, torch.full_like(x, 5e-310)),
        (0.14, 0.15, -x),
        (0.15, 0.152, torch.full_like(x, 1.7e308)),
    ):
        x = torch.where((kind >= low) & (kind < high), value, x)
    collapses, time = torch.rand(n, generator=source) < 0.2, torch.arange(steps).unsqueeze(1)
    x = torch.where(collapses & (kind >= 0.1), x * torch.where(x.abs() < 2.0, 0.3, 1.0), x)
    chance = math.log(10) * (0.9 + 0.3 * torch.rand(steps, n, generator=source, dtype=torch.float64))
    return torch.where(collapses & (time > steps // 2) & (kind > 0.3), chance, x)


def norms_like_a_run(n: int, steps: int, seed: int) -> Tensor:
    """(steps, n, 4) rows of ``tensor_stats``, with overflows, explosions and zeros among them."""
    source = torch.Generator().manual_seed(seed)
    norm = torch.rand(steps, n, generator=source, dtype=torch.float64)
    kind = torch.rand(steps, n, generator=source)
    norm = torch.where(kind < 0.05, norm * 1e3, norm)
    norm = torch.where((kind >= 0.05) & (kind < 0.07), 0.0, norm)
    bad = ((kind >= 0.07) & (kind < 0.09)).double()
    return torch.stack([norm * norm, norm, bad, bad - 1.0], dim=2)


def flags_like_a_run(n: int, steps: int, seed: int, share: float = 0.3) -> Tensor:
    """(steps, n) flags: whether the state was found not finite."""
    return torch.rand(steps, n, generator=torch.Generator().manual_seed(seed + 1)) < share


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int64), b.view(torch.int64))


def carry_out_captures(state: Tensor, poisoned: Tensor) -> None:
    """Stand in for the snapshot op: mark ordered captures as done, some of them as poisoned."""
    ordered = state[StateField.capture_order_0] >= 0
    state[StateField.candidate_done] = torch.where(ordered, 3.0, state[StateField.candidate_done])
    state[StateField.candidate_bad] = torch.where(ordered & poisoned, 5.0, state[StateField.candidate_bad])
