"""Many environments, one launch: ``n`` governors that judge side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tolaria import ops
from tolaria._arguments import check_optional
from tolaria.governor import uncovered
from tolaria.governor.attachment import make_engine
from tolaria.governor.config import GovernorConfig, resolve_random_guess_loss
from tolaria.governor.distributed import check_ranks
from tolaria.governor.engine import Engine
from tolaria.governor.following import Follower
from tolaria.governor.judging import would_roll_back
from tolaria.governor.one_thread import one_thread
from tolaria.governor.policy import RollbackPolicy
from tolaria.governor.rates import RateWatch
from tolaria.governor.row import make_rows
from tolaria.governor.verifying import verify
from tolaria.ops import Order, PanicReason, StateField, StatusField
from tolaria.snapshot import graphs
from tolaria.snapshot.covered import CoveredState
from tolaria.snapshot.inference import outside_inference
from tolaria.snapshot.parts import Cover, Parts, ScheduleChoice
from tolaria.snapshot.protocols import Stateful
from tolaria.telemetry.delivery import Telemetry
from tolaria.telemetry.events import GovernorEvent
from tolaria.telemetry.sinks import Sink, check_sinks
from tolaria.telemetry.verdict import Verification

_MAX_EVENTS_KEPT = 65536


class GovernorBank:
    """Judges the losses of ``n`` environments at once; rows may have snapshots of their own.

    A row without :meth:`attach` is judged by its loss alone: at a rollback it forgets its losses (as if
    restored to a fresh start) and the caller puts the environment back. An attached row is captured and
    restored like the model of a :class:`TolariaGovernor`.

    Args:
        n: how many environments, at least 1.
        config: settings shared by all; None means the defaults.
        num_classes, random_guess_loss: as for :class:`TolariaGovernor`.
        sinks: called with every event; ``event.row`` says whose it is.
        device: where losses arrive.

    Raises:
        ValueError: ``n`` is below 1.
        RuntimeError: several ranks; a bank judges for one process alone.

    :meth:`attach`, :meth:`detach` and :meth:`step` are for one thread at a time; two that meet are a
    ``TolariaError``.
    """

    _acting: int | None = None  # the thread that is inside a call

    @outside_inference
    def __init__(
        self,
        n: int,
        *,
        config: GovernorConfig | None = None,
        num_classes: int | None = None,
        random_guess_loss: float | None = None,
        sinks: Sequence[Sink] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"n: expected an integer of at least 1, got {n!r}")
        check_optional("config", config, GovernorConfig)
        check_sinks(sinks)
        check_ranks(None)
        self.config = config or GovernorConfig()
        if self.config.save_every:
            raise ValueError("config: expected save_every=0, since a bank writes no states to disk")
        self.random_guess_loss = resolve_random_guess_loss(num_classes, random_guess_loss)
        self._telemetry = Telemetry(sinks, _MAX_EVENTS_KEPT)
        settings = self.config.to_tensor(self.random_guess_loss, device)
        records = min(self.config.event_capacity, 16)
        self._rows = make_rows(n, self.config, settings, device, records=records, is_attached=False)
        self._state, self._settings = self._rows[0].state, settings
        self._mailbox = self._rows[0].mailbox
        self._written = self._mailbox.numpy()[:, StatusField.events]
        self._seen = np.zeros(n)
        self._engines: dict[int, Engine] = {}
        self._rates: dict[int, RateWatch] = {}
        self._followers = [self._follower(i, None) for i in range(n)]

    def _follower(self, i: int, engine: Engine | None) -> Follower:
        return Follower(self._rows[i].reader, engine, RollbackPolicy(self.config), self._telemetry)

    def __len__(self) -> int:
        return self._state.shape[1]

    @one_thread
    def attach(
        self,
        i: int,
        model: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer],
        *,
        schedulers: Sequence[Stateful] = (),
        scaler: torch.amp.GradScaler | None = None,
        extras: Mapping[str, Stateful] | None = None,
        schedules: ScheduleChoice = "rewind",
        cover: Cover = "all",
    ) -> None:
        """Give row ``i`` snapshots of a model of its own; arguments as for :class:`TolariaGovernor`.

        Raises:
            ValueError: ``i`` is out of range or attached already, or a parameter is not finite.
            RuntimeError: the model is on another device than the bank.
        """
        if not 0 <= i < len(self):
            raise ValueError(f"i: expected a row from 0 to {len(self) - 1}, got {i}")
        if i in self._engines:
            raise ValueError(f"i: row {i} is attached already; detach({i}) first")
        parts = Parts.checked(
            model,
            optimizers,
            schedulers=schedulers,
            scaler=scaler,
            extras=extras,
            schedules=schedules,
            cover=cover,
        )
        if parts.device != self._state.device:
            raise RuntimeError(
                f"model: it is on {parts.device}, the bank on {self._state.device}; put both on one device"
            )
        covered = CoveredState(parts)  # without random generators, which all rows share
        before = self._state[:, i].clone()
        self._state[:, i] = ops.governor_state(1, window=self.config.window, device=self._state.device)[:, 0]
        self._state[StateField.events, i] = before[StateField.events]
        try:
            engine = make_engine(self._rows[i], covered)
        except Exception:
            self._state[:, i] = before
            raise
        self._engines[i] = engine
        self._rates[i] = RateWatch()
        self._followers[i] = self._follower(i, engine)
        uncovered.watch(covered)
        self._telemetry.add([engine.attach_event()])
        self._telemetry.deliver()

    @one_thread
    def detach(self, i: int) -> None:
        """Let go of row ``i``'s model and slots, verified as by :meth:`verify`; the row is judged on."""
        engine = self._engines.get(i)
        if engine is None:
            return
        graphs.refuse_recording(self._state.device, "governor.detach")
        try:
            self._verify(i, engine)  # sync: nothing is heard of later
        finally:
            uncovered.unwatch(engine.covered)
            engine.close()
            del self._engines[i]
            self._followers[i] = self._follower(i, None)
            self._state[StateField.attached, i] = 0.0
            self._state[StateField.restore_order, i] = 0.0

    @one_thread
    def verify(self, i: int) -> Verification:
        """Look at the live state of row ``i`` now, as :meth:`TolariaGovernor.verify` does.

        Raises:
            ValueError: no model is attached to that row.
            TolariaError: a CUDA graph is being recorded.
            SnapshotError, TrainingDivergedError: as :meth:`TolariaGovernor.verify`.
        """
        engine = self._engines.get(i)
        if engine is None:
            raise ValueError(f"i: expected a row with a model, got {i}; attach({i}, model, optimizers) first")
        graphs.refuse_recording(self._state.device, "governor.verify")
        found = self._verify(i, engine)
        self._telemetry.deliver()
        self._followers[i].policy.check_budget()
        return found

    def _verify(self, i: int, engine: Engine) -> Verification:
        follower = self._followers[i]
        engine.synchronize()  # sync: the answer is wanted now
        follower.hear()
        follower.follow()
        return verify(self._rows[i], engine, follower)

    @one_thread
    def step(
        self, losses: Tensor, *, active: Tensor | None = None, gradient_norms: Tensor | None = None
    ) -> Tensor:
        """Judge one loss per environment, restore and capture the attached rows.

        Args:
            losses: ``(n,)``, any floating dtype, on the bank's device.
            active: ``(n,)`` bool; rows that are not active keep every byte.
            gradient_norms: ``(n,)`` norms to be judged beside the losses; a bank computes none by itself.

        Returns:
            Rewards, float32 ``(n,)`` on the bank's device: minus ``death_penalty`` for a row that rolled back
            at this step, else 0.

        Raises:
            ValueError: a shape or device does not fit.
            TypeError: a dtype does not fit.
            TrainingDivergedError: an attached row rolls back too often.
        """
        for engine in self._engines.values():
            engine.judging()
        if graphs.is_recording(self._state.device):
            graphs.outlive(self._state, self._settings, self._mailbox)
        state_bad = self._state_flags(losses, active, gradient_norms)
        ops.governor_step_(
            self._state, self._settings, losses, None, active, self._mailbox, gradient_norms, state_bad
        )
        for engine in self._engines.values():
            engine.judged(surely=active is None)
        self._look_at_rates()
        mask = None if active is None else active.reshape(-1)
        try:
            for i, engine in self._engines.items():
                # An inactive row keeps its orders; the CPU would look at them again, so it is passed over.
                if mask is None or mask.is_cuda or bool(mask[i]):
                    engine.act()
        finally:
            self._hear()
            for i in self._engines:
                self._followers[i].end_step()
        for engine in self._engines.values():
            engine.finished()
        reward = self._state[StateField.reward].to(torch.float32)
        if mask is not None:
            reward = torch.where(mask.bool(), reward, 0.0)
        self._telemetry.deliver()
        for i in self._engines:
            self._followers[i].policy.check_budget()
        return reward

    def _state_flags(
        self, losses: Tensor, active: Tensor | None, gradient_norms: Tensor | None
    ) -> Tensor | None:
        """Whose state is not finite, among the attached rows; of the others the bank knows none."""
        if not self.config.skips_before_rollback or not self._engines:
            return None
        rows = list(self._engines)
        if self._state.is_cpu:
            asked = would_roll_back(self._state, self._settings, losses, None, active, gradient_norms)
            rows = [i for i in rows if bool(asked[i])]
        flags = torch.zeros(len(self), dtype=torch.float64, device=self._state.device)
        for i in rows:
            flag = self._engines[i].state_check.flag()
            if flag is not None:
                flags[i : i + 1].copy_(flag)
        return flags

    def _look_at_rates(self) -> None:
        """Let the rows whose learning rate was raised on purpose learn their level anew."""
        if not self.config.shift_horizon or graphs.is_recording(self._state.device):
            return
        for i, engine in self._engines.items():
            rollbacks = self._rows[i].status(StatusField.rollback_count)
            if self._rates[i].is_restart(engine.covered.optimizers, rollbacks):
                self._rows[i].order(Order.RELEARN)

    def __reduce__(self) -> NoReturn:
        raise TypeError("bank: it watches its models and cannot be copied or pickled; make a new one")

    @outside_inference
    def poll(self) -> list[GovernorEvent]:
        """Events that arrived since the last call; never waits. As :meth:`TolariaGovernor.poll`, it tells."""
        self._hear()
        for i in list(self._engines):
            self._followers[i].follow_between_steps()
        self._telemetry.deliver()
        return self._telemetry.take()

    @property
    def reasons(self) -> list[PanicReason]:
        """Reason of every row's last verdict."""
        return [PanicReason(row.status(StatusField.reason)) for row in self._rows]

    @property
    def rollback_counts(self) -> list[int]:
        """Rollbacks of every row."""
        return [row.status(StatusField.rollback_count) for row in self._rows]

    def _hear(self) -> None:
        """Queue what has arrived, of the rows where something has."""
        if graphs.is_recording(self._state.device):
            return
        moved = self._written != self._seen
        self._seen[:] = self._written
        for i in {*np.flatnonzero(moved).tolist(), *self._engines}:
            self._followers[i].hear()
