"""What a governor knows of its run."""

from __future__ import annotations

import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from tolaria.errors import TolariaError
from tolaria.governor import statistics
from tolaria.governor.attachment import Attachment
from tolaria.governor.batches import BatchLedger
from tolaria.governor.config import GovernorConfig
from tolaria.governor.engine import Engine
from tolaria.ops import StatusField
from tolaria.snapshot import graphs, persist
from tolaria.telemetry.delivery import Telemetry
from tolaria.telemetry.verdict import GovernorReport, Pending, Verdict


class Readings:
    """On CUDA as of the last status word that arrived; call ``synchronize()`` first for the latest."""

    _attached: Attachment
    _telemetry: Telemetry
    _latest: Verdict | None
    _acting: int | None = None  # the thread that is inside a call

    @property
    def _engine(self) -> Engine:
        return self._attached.engine

    @property
    def config(self) -> GovernorConfig:
        """The settings in force; ``load_state_dict(state, keep_config=False)`` brings others."""
        return self._attached.row.config

    @config.setter
    def config(self, config: GovernorConfig) -> None:
        raise TolariaError(
            "governor.config: expected no assignment, since slots and policy are made for the settings; make "
            "a new governor, or load_state_dict(state, keep_config=False)"
        )

    @property
    def random_guess_loss(self) -> float | None:
        """Loss of guessing, if there is one."""
        return self._attached.random_guess_loss

    @property
    def name(self) -> str | None:
        """What this governor is called on its events."""
        return self._telemetry.labels.name

    @property
    def is_closed(self) -> bool:
        """Whether :meth:`close` was called: then it watches no more."""
        return self._attached.running is None

    @property
    def step_count(self) -> int:
        """Losses judged so far."""
        return self._attached.row.status(StatusField.step)

    @property
    def rollback_count(self) -> int:
        """Rollbacks so far."""
        return self._attached.row.status(StatusField.rollback_count)

    @property
    def last_good_step(self) -> int:
        """Step of the last known good capture; 0 is the state at attach."""
        return self._attached.row.status(StatusField.last_good_step)

    @property
    def last_report(self) -> GovernorReport | None:
        """The last rollback, as far as the host knows."""
        return self._attached.follower.last_report

    @property
    def offending_steps(self) -> tuple[int, ...]:
        """Steps whose losses led to rollbacks, for a sampler to leave out."""
        return tuple(self._attached.policy.offending_steps)

    @property
    def last_verdict(self) -> Verdict | None:
        """The last judgement; None before the first.

        A copy, on the device, that nobody has waited for: reading its values does. After a call by hand
        :attr:`Verdict.reason` is that of the call.

        Raises:
            TolariaError: a CUDA graph is being recorded.
        """
        at = self._attached
        graphs.refuse_recording(at.row.state.device, "governor.last_verdict")
        if self._latest is not None:
            return self._latest
        judged = self.step_count if at.running is None else at.running.enqueued_step
        return Verdict(at.row.verdict_fields()) if judged else None

    @property
    def pending(self) -> Pending:
        """What has been counted towards a rollback, or a promotion. On CUDA it waits for the device."""
        at = self._attached
        graphs.refuse_recording(at.row.state.device, "governor.pending")
        return at.row.pending(at.policy.validation.bad_in_a_row)

    @property
    def is_quiet(self) -> bool:
        """Whether this is a moment to change the structure: healthy, nothing pending, the state finite.

        The last verdict, if there is one, was healthy and nothing has happened since; no anomaly, no loss of
        guessing and no skipped step is being counted, nothing holds captures back (evidence of a collapse, a
        shift that shows, a bad validation); no capture was found poisoned, or suspiciously large; all that a
        capture would search is finite. On CUDA it waits for the device; it costs one pass over the state. A
        poisoned seed that incubates is culled, alone, as by ``verify()``. Where ranks judge together each
        answers for itself.

        Raises:
            TolariaError: a CUDA graph is being recorded, or the governor is closed.
            SnapshotError: an extra cannot say its state.
        """
        at = self._attached
        at.refuse_recording("is_quiet")
        at.engine.synchronize()  # sync: asked for by name
        return at.row.is_calm() and not at.engine.is_behind() and at.engine.first_bad() is None

    @property
    def batches_left_out(self) -> int:
        """Batches that were left out after rollbacks so far; see :class:`tolaria.data.SkipBatches`."""
        return self.batch_ledger.left_out

    @property
    def batch_ledger(self) -> BatchLedger:
        """What rollbacks have ordered to be left out, for :class:`tolaria.data.SkipBatches`."""
        return self._attached.policy.batches

    @property
    def history(self) -> list[float]:
        """The healthy losses of the window, oldest first. On CUDA it waits for the device."""
        return statistics.healthy_losses(self._attached.row.state, self.config.window)

    @property
    def lifetime(self) -> dict[str, float]:
        """Count, mean, population standard deviation, minimum and maximum of all healthy losses.

        On CUDA it waits for the device.
        """
        return statistics.lifetime_statistics(self._attached.row.state)

    def last_good_state_dict(self) -> dict[str, Any]:
        """The last known good state, to which a rollback would go back, as ordinary state dicts.

        As :meth:`Snapshot.state_dict` says it, with ``governor`` (this one's :meth:`state_dict` as of the
        capture) and ``step`` (of the capture) beside; copies, on the CPU. On CUDA it waits for the device.

        Raises:
            SnapshotError: an optimizer cannot say the state that it had.
        """
        at = self._attached
        at.refuse_recording("last_good_state_dict")
        return at.last_good_state()

    def save(self, path: str | os.PathLike[str]) -> Future[Path]:
        """Write the last known good state to disk, beside training; see :func:`load_snapshot`.

        ``path`` gets a folder ``step_000000123`` by ``torch.distributed.checkpoint``: there whole or not at
        all, and the two newest stay. Steps go on meanwhile; a capture that would overwrite the slot waits. On
        CUDA this call waits for the device once.

        Args:
            path: the folder of snapshots; made if need be.

        Returns:
            A future whose ``result()`` waits, and is the snapshot's folder or raises what went wrong
            (SnapshotError, FolderInUseError).

        Raises:
            TypeError, ValueError: ``path`` is no path.
            SnapshotError: an optimizer cannot say the state that it had.
        """
        folder = persist.as_path("path", path).absolute()
        at = self._attached
        at.refuse_recording("save")
        return at.start_saving(folder)

    def state_dict(self) -> dict[str, Any]:
        """Settings, statistics and counts; no slots.

        Plain values that strict JSON knows (NaN and infinity are words), safe for ``torch.load`` with
        ``weights_only``, too. On CUDA it waits for the device.
        """
        at = self._attached
        graphs.refuse_recording(at.row.state.device, "governor.state_dict")
        return statistics.saved_form(
            self.config,
            self.random_guess_loss,
            at.row.state,
            at.saved_policy(at.rates_now()),
            at.magnitudes(),
        )
