"""Questions to the judge."""

from __future__ import annotations

import torch
from torch import Tensor

from tolaria import ops
from tolaria.ops import StateField


def would_roll_back(
    state: Tensor,
    settings: Tensor,
    losses: Tensor,
    nonfinite: Tensor | None,
    active: Tensor | None,
    gradient: Tensor | None,
) -> Tensor:
    """Which governors would roll back if no bad step was let pass: bool ``(n,)``. Judges on a copy.

    Args, and what is raised: as for :func:`tolaria.ops.governor_step_`.
    """
    trial = state.clone()
    always = torch.ones(state.shape[1], dtype=torch.bool, device=state.device)
    ops.governor_step_(trial, settings, losses, nonfinite, active, None, gradient, always)
    rolls_back = trial[StateField.rollback] != 0
    return rolls_back if active is None else rolls_back & (active.reshape(-1) != 0)
