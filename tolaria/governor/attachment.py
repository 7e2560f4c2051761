"""All that there is of a governor between attach and close."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tolaria.errors import TolariaError, UncoveredWarning
from tolaria.governor import statistics
from tolaria.governor.config import GovernorConfig
from tolaria.governor.device_engine import DeviceEngine
from tolaria.governor.engine import Engine
from tolaria.governor.following import Follower
from tolaria.governor.host_engine import HostEngine
from tolaria.governor.judging import Judge
from tolaria.governor.manual_captures import ManualCaptures
from tolaria.governor.policy import RollbackPolicy
from tolaria.governor.row import Row, make_rows
from tolaria.governor.saved_rates import loaded_rates, plain_rates
from tolaria.governor.saved_state import fitted
from tolaria.governor.saving import Save, Saver, own_memory
from tolaria.governor.skipping import StepSkipper, remove_hooks
from tolaria.ops import Order, StateField, StatusField
from tolaria.snapshot import graphs
from tolaria.snapshot.covered import CoveredState
from tolaria.snapshot.host_state import HostState
from tolaria.snapshot.inference import outside_inference
from tolaria.snapshot.lowered_rates import RatesThen
from tolaria.snapshot.magnitudes import Magnitudes, Promoted
from tolaria.snapshot.parts import checked_optimizers
from tolaria.snapshot.saved import SavedState
from tolaria.telemetry.delivery import Telemetry
from tolaria.telemetry.events import ResumeEvent
from tolaria.telemetry.mailbox import MailboxReader

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


_Plain = tuple[Tensor, Tensor, Tensor, MailboxReader, Engine, StepSkipper | None]


def make_engine(row: Row, covered: CoveredState) -> Engine:
    """The engine for the device that ``covered`` is on."""
    return (DeviceEngine if covered.device.type == "cuda" else HostEngine)(row, covered)


class Attachment:
    """One governor's row of the judge's memory, and who works on it: they are made and let go together.

    Args:
        covered: what is governed; its state becomes the last known good one.
        config: the settings.
        random_guess_loss: loss of guessing, or None.
        process_group: ranks that judge together, or None.
        telemetry: where events go.

    Attributes:
        random_guess_loss: the loss of guessing in force: the one given, or one that was loaded.
        row: the judge's memory.
        running: carries out what the judge orders; None once it is closed, see :attr:`engine`.
        policy, follower: what the host does about what has happened.
        judge: judges, and knows what is judged.
        captures: those made by hand.
        skipper: leaves bad steps out, if the settings say so.
        saver: writes states to disk.
        plain: what :meth:`TolariaGovernor.step` needs if the loss alone is judged, by this rank alone and on
            the host; else None.
    """

    @outside_inference
    def __init__(
        self,
        covered: CoveredState,
        config: GovernorConfig,
        random_guess_loss: float | None,
        process_group: ProcessGroup | None,
        telemetry: Telemetry,
    ) -> None:
        self.random_guess_loss = self._given_guess = random_guess_loss
        self._group = process_group
        self._telemetry = telemetry
        settings = _settings_tensor(covered, config, random_guess_loss)
        (self.row,) = make_rows(1, config, settings, covered.device, records=config.event_capacity)
        self.running: Engine | None = make_engine(self.row, covered)
        self.skipper: StepSkipper | None = None
        try:
            self.running.defer_panics = process_group is not None
            self.policy = RollbackPolicy(config)
            self.follower = Follower(self.row.reader, self.running, self.policy, telemetry)
            self.judge = Judge(self.row, process_group)
            self.captures = ManualCaptures(self.row, self.running, is_shared=process_group is not None)
            self.begin()
        except BaseException:
            self.let_go()
            raise

    @property
    def engine(self) -> Engine:
        """Carries out what the judge orders.

        Raises:
            TolariaError: the governor is closed.
        """
        if self.running is None:
            raise TolariaError("governor: it is closed; make a new one")
        return self.running

    def begin(self) -> None:
        """Start from a state just adopted, under the settings of now."""
        config = self.row.config
        self.row.reader.skip_all()
        skips = config.skip_anomalous_steps and not config.log_only
        if self.skipper is not None and not skips:
            self.skipper.close()
            self.skipper = None
        elif self.skipper is None and skips:
            self.skipper = StepSkipper(self.engine)
            weakref.finalize(self, remove_hooks, self.skipper.handles)
        self.follower.skipper = self.judge.skipper = self.skipper
        self.judge.watch_gradients(self.engine)
        # A clean step then takes the shortest way, since between a step and the next every Python frame costs
        # 2 to 3 us (cold caches, Zen 3).
        self.follower.saver = self.saver = Saver(config.save_every, config.save_path)
        self.judge.losses.clear()
        self._take_way(is_counting=self.engine.covered.lowered.own is not None)

    def choose_way(self) -> None:
        """Steps take the shortest way, but not while rates are lowered for a time: they are counted then."""
        is_counting = self.engine.covered.lowered.own is not None
        if is_counting != self.judge.has_a_share:
            self._take_way(is_counting=is_counting)

    def _take_way(self, *, is_counting: bool) -> None:
        config = self.row.config
        self.judge.has_a_share = is_counting
        self._is_plain = self._group is None and self.row.state.device.type == "cpu" and not is_counting
        self._is_plain = self._is_plain and not config.gradient_norm and not config.skips_before_rollback
        self._is_plain = self._is_plain and not config.shift_horizon  # which looks at the rates
        self._expect(added=self.judge.losses.count)

    def expect_loss(self) -> None:
        """The next step is given its loss: it may go the shortest way."""
        self.judge.losses.clear()
        self._expect(added=0)

    def _expect(self, *, added: int) -> None:
        row = self.row
        at_hand = row.state, row.settings, row.mailbox, row.reader, self.engine, self.skipper
        self.plain: _Plain | None = at_hand if self._is_plain and not added else None

    def reset(self) -> None:
        """Forget all losses; the current state becomes the last known good one.

        Raises:
            ValueError: it is not finite; then nothing is forgotten.
            SnapshotError: it cannot be captured; likewise.
        """
        self.engine.adopt_current_state(partial(self.engine.order, Order.FORGET))
        self.replace_policy(RollbackPolicy(self.row.config))

    def replace_policy(self, policy: RollbackPolicy) -> None:
        """Count rollbacks by another one from here on."""
        self.policy = self.follower.policy = policy

    def refuse_recording(self, call: str) -> None:
        """Refuse a call of the governor that cannot be part of a CUDA graph, before it changes anything.

        Raises:
            TolariaError: a graph is being recorded, or the governor is closed.
        """
        graphs.refuse_recording(self.engine.covered.device, f"governor.{call}")

    def catch_up(self) -> None:
        """Wait for the device, then hear of what it did, and follow: nothing is pending afterwards."""
        self.engine.synchronize()
        self.follower.hear()
        self.follower.follow()

    def mark_step(self) -> None:
        """A step is over, for whatever leaves steps out."""
        if self.skipper is not None:
            self.skipper.after_step()

    def add_optimizer(self, optimizer: Optimizer) -> bool:
        """Cover another optimizer, and watch its steps; whether it is one more.

        Raises:
            TypeError: it is no optimizer.
            SnapshotError: its state cannot be covered; it is not added then.
        """
        covered = self.engine.covered
        if any(known is optimizer for known in covered.optimizers):
            return False
        before = list(covered.optimizers)
        listed = checked_optimizers(covered.model, [optimizer])
        added = [o for o in listed if not any(o is known for known in before)]
        covered.optimizers += added
        try:
            self.engine.sync_structure()
        except BaseException:
            covered.optimizers = before
            raise
        for new in added:
            self.engine.hook(new)
            if self.skipper is not None:
                self.skipper.hook(new)
            if self.judge.norms is not None:
                self.judge.norms.hook(new)
        return bool(added)

    # -- under another's statistics --------------------------------------------------------------------------

    def taking_over(self, state: Mapping[str, Any], *, keep_config: bool) -> Attachment:
        """What goes on from a saved form: this one itself if its memory fits, else a successor.

        A successor takes over when it is put in this one's place; then :meth:`make_way`. The current state of
        the model becomes the last known good one.

        Args:
            state: what :meth:`TolariaGovernor.state_dict` returned.
            keep_config: go on under the settings in force, instead of the saved ones.

        Raises:
            ValueError, TypeError: one is something else, or the model is not finite.
            SnapshotError: there is no memory for the new slots. Whatever is raised, nothing has changed.
        """
        if not isinstance(keep_config, bool):
            raise TypeError(f"keep_config: expected True or False, got {type(keep_config).__name__}")
        form = statistics.read_saved_form(state)
        config = self.row.config if keep_config else form.config
        given = self._given_guess if keep_config else form.random_guess_loss
        guess = form.random_guess_loss if given is None else given
        policy = RollbackPolicy(config)
        policy.load_saved_form(form.policy)
        saved = fitted(form.state, config)
        self.catch_up()  # sync: takes the state as it is
        covered = self.engine.covered
        rates = form.policy.get("rates") if config.lr_recovery_steps else None
        former, covered.lowered = covered.lowered, loaded_rates(rates, covered)
        fits = saved.shape == self.row.state.shape and all(
            getattr(config, name) == getattr(self.row.config, name) for name in ("storage", "event_capacity")
        )
        try:
            heir = (self._in_place if fits else self._successor)(config, guess, saved, form.magnitudes)
        except BaseException:
            covered.lowered = former
            raise
        heir.random_guess_loss, heir._given_guess = guess, given
        heir.replace_policy(policy)
        heir.begin()
        return heir

    def _in_place(
        self, config: GovernorConfig, guess: float | None, saved: Tensor, magnitudes: Magnitudes
    ) -> Attachment:
        """Take ``saved`` over where it is: recorded graphs go on being judged."""
        settings = _settings_tensor(self.engine.covered, config, guess)

        def take_over() -> None:
            self.row.settings.copy_(settings)
            statistics.take_over(self.row.state, saved)
            self.engine.slots.take_magnitudes(magnitudes)

        self.engine.adopt_current_state(take_over)
        statistics.go_on_capturing(self.row, saved)
        self.row.renew(config)
        return self

    def _successor(
        self, config: GovernorConfig, guess: float | None, saved: Tensor, magnitudes: Magnitudes
    ) -> Attachment:
        """Take ``saved`` over with memory of another size; a recorded graph finds a judge without slots."""
        successor = Attachment(self.engine.covered, config, guess, self._group, self._telemetry)
        try:
            successor.follower.last_report = self.follower.last_report

            def take_over() -> None:
                statistics.take_over(successor.row.state, saved)
                successor.engine.slots.take_magnitudes(magnitudes)

            successor.engine.adopt_current_state(take_over)
            statistics.go_on_capturing(successor.row, saved)
        except BaseException:
            successor.let_go()
            raise
        return successor

    def rates_now(self) -> RatesThen | None:
        """The rates, if they are lowered for a time."""
        covered = self.engine.covered
        return covered.lowered.now(covered.optimizers, covered.schedulers)

    def saved_policy(self, rates: RatesThen | None, *, until: float = math.inf) -> dict[str, Any]:
        """What the policy saves, with the rates and validations of now or of a capture, made at ``until``."""
        return self.policy.saved_form(plain_rates(self.engine.covered, rates), until=until)

    # -- on disk ---------------------------------------------------------------------------------------------

    def last_good_state(self) -> dict[str, Any]:
        """The last known good state as state dicts, and the governor's saved form as of its capture."""
        slot, host, form = self._last_good()
        return {**form, **SavedState(self.engine, host, slot).dicts()}

    def start_saving(self, folder: Path) -> Future[Path]:
        """Have the last known good state written; its slot is not overwritten meanwhile."""
        slot, host, form = self._last_good()
        # A replayed graph asks nobody before it captures, and a thread of its own must not use the device.
        is_safe = self.row.config.storage != "device" and not graphs.is_kept(self.row.state)
        take = own_memory if is_safe or self.row.state.is_cpu else torch.clone
        parts = {**form, **SavedState(self.engine, host, slot, take, whole=False).dicts()}
        return self.saver.start(Save(folder, parts), partial(self.engine.begin_reading, slot))

    def _last_good(self) -> tuple[int, HostState, dict[str, Any]]:
        """The slot of the last known good capture, its host-side parts, and what the governor says of it."""
        self.catch_up()  # sync: asked for by name
        slot, host = self.engine.last_good()
        state = self.row.state[:, self.row.column : self.row.column + 1]
        then = statistics.as_of_capture(state, slot)
        step = int(then[StateField.step])
        config, policy = self.row.config, self.saved_policy(host.lowered, until=step)
        form = statistics.saved_form(
            config, self.random_guess_loss, then, policy, self.magnitudes(as_of_capture=True)
        )
        return slot, host, {"step": step, "governor": form}

    def magnitudes(self, *, as_of_capture: bool = False) -> Magnitudes:
        """How large each tensor was in promoted captures, for whoever goes on from here.

        The state that is adopted there takes the place of the last known good one, or of the candidate if
        there is one that goes on being on probation.

        Args:
            as_of_capture: as when the last known good capture was made.
        """
        if self.running is None:
            return {}
        self.running.wait()  # a capture under way writes to them
        column = self.row.state[:, self.row.column].tolist()  # sync: asked for by name
        good = int(column[StateField.last_good])
        counts = not as_of_capture and statistics.is_on_probation(column, self.row.config)
        capture = column[StateField.slot_capture_0 + good]
        return self.running.slots.magnitudes(Promoted(good, capture, counts))

    def resume_event(self, *, config_kept: bool) -> ResumeEvent:
        """What was resumed, for telemetry; waits for the device."""
        return ResumeEvent(
            step=self.row.status(StatusField.step),
            row=self.row.column,
            healthy_losses=len(statistics.healthy_losses(self.row.state, self.row.config.window)),
            rollbacks=self.row.status(StatusField.rollback_count),
            config_kept=config_kept,
        )

    def make_way(self) -> None:
        """Let go for a successor."""
        loses_graphs = graphs.is_kept(self.row.state)
        self.let_go()
        if loses_graphs:
            warnings.warn(
                "governor: CUDA graphs recorded before are no longer guarded, since the loaded window, "
                "storage or event_capacity is another; record them anew",
                UncoveredWarning,
                stacklevel=4,
            )

    # -- the end ---------------------------------------------------------------------------------------------

    def let_go(self) -> None:
        """Remove the hooks and give the memory back."""
        if self.skipper is not None:
            self.skipper.close()
        judge: Judge | None = getattr(self, "judge", None)  # it is made late
        if judge is not None:
            judge.close()
        self.engine.close()

    def close(self) -> None:
        """Let go, for good; what has been heard of can still be read."""
        self.let_go()
        self.running = self.skipper = self.plain = self.judge.norms = None
        del self.captures
        self.follower.engine = self.follower.skipper = self.judge.skipper = None


def _settings_tensor(covered: CoveredState, config: GovernorConfig, guess: float | None) -> Tensor:
    overflows = covered.scaler is not None and covered.scaler.is_enabled()
    return config.to_tensor(guess, covered.device, gradient_may_overflow=overflows)
