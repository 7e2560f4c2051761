"""Agreement among ranks: every rank judges the same loss, so none rolls back alone."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from tolaria.governor.config import GovernorConfig
from tolaria.ops import StateField
from tolaria.ops.governor import suspicious_candidates

OTHER_RANK = 1 << 30
"""Index reported when the tensor that a capture complains of is another rank's."""

ANOTHER_RANKS = "a tensor of another rank"
"""Its name."""


def check_ranks(process_group: dist.ProcessGroup | None) -> None:
    """Refuse settings under which one rank could roll back alone.

    Raises:
        RuntimeError: several ranks without a process group.
        TypeError: ``process_group`` is none.
    """
    if process_group is not None and not (
        dist.is_available() and isinstance(process_group, dist.ProcessGroup)
    ):
        raise TypeError(
            f"process_group: expected a torch.distributed.ProcessGroup or None, got "
            f"{type(process_group).__name__}"
        )
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and process_group is None:
        raise RuntimeError(
            f"process_group: torch.distributed runs {dist.get_world_size()} ranks, and one rank must never "
            "roll back alone; pass process_group=torch.distributed.group.WORLD, so that all judge the same "
            "loss"
        )


def agree_on_flag(process_group: dist.ProcessGroup, state: Tensor, flag: Tensor | None) -> Tensor:
    """``flag`` ``(1,)``, raised on every rank if it is on any; None is not raised. On ``state``'s device."""
    shared = torch.zeros_like(state[0]) if flag is None else (flag != 0).to(state.dtype)
    dist.all_reduce(shared, group=process_group)
    return shared


def agree(
    process_group: dist.ProcessGroup,
    state: Tensor,
    config: GovernorConfig,
    loss: Tensor,
    nonfinite: Tensor | None,
    gradient: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean loss and joined flags of all ranks, reduced on the device; a NaN or infinity on one reaches all.

    A non-finite value, or a suspicious magnitude, that a capture found on one rank becomes every rank's, in
    ``state``.

    Args:
        process_group: the ranks that must agree.
        state: float64 ``(fields, n)``; what captures found is updated in place.
        config: what says when a suspicion has lasted long enough; the same on every rank.
        loss: ``n`` losses of this rank.
        nonfinite: ``n`` flags of this rank, or None.
        gradient: ``n`` norms of this rank or its row of ``tensor_stats``, or None on every rank.

    Returns:
        float64 losses ``(n,)``, flags ``(n,)`` and, if there are any, mean norms ``(n,)``.
    """
    bad = state[StateField.candidate_bad]
    own = torch.zeros_like(bad) if nonfinite is None else (nonfinite.reshape(-1) != 0).to(bad)
    undoes = config.suspicious_state == "rollback"
    doubts = suspicious_candidates(state, undoes=undoes, interval=config.snapshot_interval)
    told = [loss.detach().reshape(-1).to(bad), own, (bad >= 0).to(bad), doubts.to(bad)]
    if gradient is not None:
        norms = gradient.detach().reshape(len(bad), -1).to(bad)
        if norms.shape[1] > 1:
            norms = torch.where(norms[:, 2:3] > 0, math.nan, norms[:, :1].sqrt())
        told.append(norms[:, 0])
    shared = torch.stack(told)
    dist.all_reduce(shared, group=process_group)
    ranks = dist.get_world_size(process_group)
    mean = shared[0] / ranks
    captured = state[StateField.candidate] >= 0
    bad.copy_(torch.where((shared[2] > 0) & (bad < 0) & captured, float(OTHER_RANK), bad))
    doubted = (shared[3] > 0) & ~doubts & captured
    for field, value in (
        (StateField.suspect, float(OTHER_RANK)),
        (StateField.suspect_since, math.inf),  # so here it has not lasted either
        (StateField.suspect_count, 0.0),
    ):
        state[field] = torch.where(doubted, value, state[field])
    return mean, shared[1], None if gradient is None else shared[4] / ranks
