"""What a governor knows of its run."""

from __future__ import annotations

from torch import Tensor

from tolaria.governor import statistics
from tolaria.governor.config import GovernorConfig
from tolaria.governor.following import Follower
from tolaria.governor.policy import RollbackPolicy
from tolaria.ops import StatusField
from tolaria.telemetry.mailbox import MailboxReader
from tolaria.telemetry.verdict import GovernorReport


class Readings:
    """On CUDA as of the last status word that arrived; call ``synchronize()`` first for the latest."""

    config: GovernorConfig
    _state: Tensor
    _reader: MailboxReader
    _policy: RollbackPolicy
    _follower: Follower

    @property
    def step_count(self) -> int:
        """Losses judged so far."""
        return self._reader.status(StatusField.step)

    @property
    def rollback_count(self) -> int:
        """Rollbacks so far."""
        return self._reader.status(StatusField.rollback_count)

    @property
    def last_good_step(self) -> int:
        """Step of the last known good capture; 0 is the state at attach."""
        return self._reader.status(StatusField.last_good_step)

    @property
    def last_report(self) -> GovernorReport | None:
        """The last rollback, as far as the host knows."""
        return self._follower.last_report

    @property
    def offending_steps(self) -> tuple[int, ...]:
        """Steps whose losses led to rollbacks, for a sampler to leave out."""
        return tuple(self._policy.offending_steps)

    @property
    def history(self) -> list[float]:
        """The healthy losses of the window, oldest first. On CUDA it waits for the device."""
        return statistics.healthy_losses(self._state, self.config.window)

    @property
    def lifetime(self) -> dict[str, float]:
        """Count, mean, population standard deviation, minimum and maximum of all healthy losses.

        On CUDA it waits for the device.
        """
        return statistics.lifetime_statistics(self._state)
