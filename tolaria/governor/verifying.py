"""Whether the live state may be saved, and what is done if not: for a governor, and for a row of a bank."""

from __future__ import annotations

from collections.abc import Callable

from tolaria.governor.distributed import ANOTHER_RANKS
from tolaria.governor.engine import Engine
from tolaria.governor.following import Follower
from tolaria.governor.row import Row
from tolaria.ops import PanicReason
from tolaria.telemetry.verdict import Verification


def _of_this_rank(found: bool) -> bool:
    return found


def verify(
    row: Row, engine: Engine, follower: Follower, is_on_any_rank: Callable[[bool], bool] = _of_this_rank
) -> Verification:
    """Look at the live state; roll back if it is not finite, or if a rollback is due anyhow.

    The host has caught up with the device; sinks are told by the caller.

    Args:
        row: the governor, or one of a bank.
        engine: its engine.
        follower: does the host's share of a rollback.
        is_on_any_rank: whether any rank found what this one did, or did not.
    """
    bad = engine.first_bad()
    is_due = row.is_restore_ordered()
    if is_on_any_rank(bad is not None):
        bad = bad or ANOTHER_RANKS
    elif not is_due:
        follower.hear()  # of a seed that was culled
        return Verification()
    if row.config.log_only:
        engine.tell_bad(bad)
        follower.hear()
        return Verification(is_fine=False, tensor_name=bad)
    roll_back(engine, follower, PanicReason.MANUAL if bad is None else PanicReason.NON_FINITE_STATE, bad)
    return Verification(is_fine=False, tensor_name=bad, report=follower.last_report)


def roll_back(engine: Engine, follower: Follower, reason: PanicReason, bad: str | None = None) -> None:
    """Restore now, from outside the rule, and follow; a reason that is pending stays."""
    try:
        engine.rollback(reason, bad)
        engine.synchronize()
    finally:
        follower.end_step()
