"""A governor that loads a state_dict goes on as if the run had never been interrupted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from judged_runs import SETTINGS, losses_like_a_run, norms_like_a_run, same_bits
from saved_forms import make, through_a_file, through_json
from torch import Tensor, nn

import tolaria
from tolaria import ops
from tolaria.cli.display import describe
from tolaria.governor import (
    CaptureEvent,
    GovernorConfig,
    JsonLinesSink,
    PanicReason,
    PromotionEvent,
    ResumeEvent,
    RollbackEvent,
    TolariaGovernor,
)
from tolaria.governor.plain_values import plain, revived
from tolaria.governor.saved_form import VERSION
from tolaria.governor.saved_state import checked_state, fitted
from tolaria.ops import MemoryField, StateField, StatusField, memory_row

STEPS, LAST_SAVED = 70, 40
BACKENDS = ["fused", "reference", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(params=BACKENDS)
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the judge works: either backend on the CPU, or a CUDA device."""
    is_cuda = request.param == "cuda"
    with tolaria.backend("fused" if is_cuda else request.param):
        yield "cuda" if is_cuda else "cpu"


class Watched:
    """A governor beside what it said of every step."""

    def __init__(self, place: str, **settings: Any) -> None:
        self.model = nn.Linear(2, 2).to(place)
        config = GovernorConfig(
            snapshot_interval=10, probation=2, window=12, min_history=4, warmup_bound=50.0, **settings
        )
        self.governor = TolariaGovernor(self.model, [], config=config, random_guess_loss=2.3)
        self.events: list[Any] = []
        self.judged: dict[int, tuple[bytes, list[float]]] = {}
        self.reasons: dict[int, PanicReason] = {}

    def step(self, loss: float) -> None:
        verdict = self.governor.check_vital_signs(loss)
        self.governor.step(verdict)
        self.events += self.governor.synchronize()
        self.judged[verdict.step] = verdict.fields.cpu().numpy().tobytes(), self.governor.history
        self.reasons[verdict.step] = verdict.reason

    def steps_of(self, kind: type[CaptureEvent] | type[PromotionEvent], after: int) -> list[tuple[int, int]]:
        return [(e.step, e.capture_step) for e in self.events if isinstance(e, kind) and e.step > after]

    def rollbacks(self, after: int = 0) -> list[RollbackEvent]:
        return [e for e in self.events if isinstance(e, RollbackEvent) and e.step > after]


def losses_with_anomalies(seed: int, *, roll_back: bool) -> list[float]:
    """Losses about 1, an explosion now and then; to roll back, some follow each other, and a few are NaN."""
    source = torch.Generator().manual_seed(seed)
    x = 0.5 + torch.rand(STEPS, generator=source, dtype=torch.float64)
    chance = torch.rand(STEPS, generator=source)
    for step in range(STEPS):
        if chance[step] < 0.15 and (roll_back or x[step - 1] < 50):
            x[step] = 1e3
    if roll_back:
        x[[17 + seed, 34 + seed, 55 + seed]] = math.nan
    return x.tolist()


def uninterrupted(place: str, losses: list[float]) -> tuple[Watched, dict[int, dict[str, Any]]]:
    """The run that nothing interrupts, and what it saved after each step."""
    run, saved = Watched(place), {}
    for step, loss in enumerate(losses, start=1):
        run.step(loss)
        saved[step] = through_json(run.governor.state_dict())
    return run, saved


def resumed(place: str, saved: dict[str, Any], losses: list[float]) -> Watched:
    run = Watched(place)
    run.governor.poll()
    run.governor.load_state_dict(saved)
    for loss in losses:
        run.step(loss)
    return run


@pytest.mark.parametrize("seed", range(3))
def test_captures_verdicts_and_windows_are_those_of_the_run_that_went_on(place: str, seed: int) -> None:
    losses = losses_with_anomalies(seed, roll_back=False)
    whole, saved = uninterrupted(place, losses)
    assert not whole.rollbacks()
    on_probation = 0
    for k in range(1, LAST_SAVED + 1, 1 if place == "cpu" else 3):
        run = resumed(place, saved[k], losses[k:])
        for kind in (CaptureEvent, PromotionEvent):
            assert run.steps_of(kind, k) == whole.steps_of(kind, k), k
        assert run.judged == {step: said for step, said in whole.judged.items() if step > k}, k
        on_probation += saved[k]["state"][StateField.candidate] >= 0
    assert on_probation >= (3 if place == "cpu" else 1)
    assert len(whole.steps_of(CaptureEvent, 0)) > len(
        whole.steps_of(PromotionEvent, 0)
    )  # some were discarded


@pytest.mark.parametrize("seed", range(3))
def test_after_a_rollback_captures_go_on_in_the_same_steps(place: str, seed: int) -> None:
    """The two roll back to different states, each judged on by its own window; the losses do not tell."""
    losses = losses_with_anomalies(seed, roll_back=True)
    whole, saved = uninterrupted(place, losses)
    assert len(whole.rollbacks()) >= 3
    for k in range(1, LAST_SAVED + 1, 1 if place == "cpu" else 3):
        run = resumed(place, saved[k], losses[k:])
        assert run.steps_of(CaptureEvent, k) == whole.steps_of(CaptureEvent, k), k
        assert run.reasons == {step: reason for step, reason in whole.reasons.items() if step > k}, k
        first = whole.rollbacks(k)[0].step
        same = [step for step in run.judged if step < first]
        assert [run.judged[step] for step in same] == [whole.judged[step] for step in same], k
        assert [e.step for e in run.rollbacks()] == [e.step for e in whole.rollbacks(k)]
        for event in run.rollbacks()[:1]:
            assert event.report.steps_lost == event.step - event.report.restored_step


@pytest.mark.parametrize("k", range(8, 16))
def test_what_is_live_at_load_is_the_last_known_good_state_at_once(place: str, k: int) -> None:
    run = Watched(place)
    for _ in range(k):
        run.step(1.0)
    other = Watched(place)
    born = [p.detach().clone() for p in other.model.parameters()]
    other.governor.load_state_dict(run.governor.state_dict())
    history, row = other.governor.history, other.governor._attached.row
    # The capture of step 10 is on probation until step 12, under its own step.
    is_pending = k in (10, 11)
    assert other.governor.last_good_step == (10 if is_pending else k)
    assert row.status(StatusField.due_from) == row.state[StateField.anchor_step] == (10 if k >= 12 else 0)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.zero_()
    other.step(1.5)
    other.step(math.nan)
    assert all(map(torch.equal, other.model.parameters(), born))
    (event,) = other.rollbacks()
    assert event.report.restored_step == (10 if is_pending else k)
    assert event.report.steps_lost == k + 2 - event.report.restored_step
    assert other.governor.history == history == [1.0] * min(k, 12)


def test_a_rollback_does_not_bring_back_bad_steps_in_a_row(place: str) -> None:
    run, other = Watched(place), Watched(place)
    for loss in (1.0, 1.1, 1.2, 1.3, 1e3):
        run.step(loss)
    other.governor.load_state_dict(run.governor.state_dict())
    for loss in (1e3, 1e3, 1.0, 1.0):
        other.step(loss)
    assert [e.step for e in other.rollbacks()] == [6]
    assert other.reasons[7] is PanicReason.ANOMALY


def test_a_poisoned_capture_does_not_follow_a_run_that_is_finite_now(place: str) -> None:
    run, other = Watched(place), Watched(place)
    for _ in range(10):
        run.step(1.0)
    saved = run.governor.state_dict()
    saved["state"][StateField.candidate_bad] = 0.0
    other.governor.load_state_dict(saved)
    other.step(1.0)
    assert other.reasons == {11: PanicReason.HEALTHY}
    assert other.steps_of(CaptureEvent, 10) == [(11, 11)]


# -- what is saved -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "through", [through_json, through_a_file, lambda saved: through_json(through_a_file(saved))]
)
def test_a_saved_governor_is_the_same_in_whatever_it_was_saved(
    through: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    governor, plainly, twin = make(), make(), make()
    governor.step(math.nan)
    saved = governor.state_dict()
    assert through(saved) == saved
    plainly.load_state_dict(saved)
    twin.load_state_dict(through(saved))
    assert same_bits(plainly._attached.row.state, twin._attached.row.state)
    assert plainly.state_dict() == twin.state_dict()
    assert twin.offending_steps == governor.offending_steps
    twin.execute_rollback()
    reports = twin._attached.policy._history
    assert [type(report.thresholds) for report in reports] == [tuple] * 3
    assert repr(list(reports)[:2]) == repr(list(governor._attached.policy._history))


@given(st.lists(st.floats(width=64)))
def test_every_float64_survives_strict_json(values: list[float]) -> None:
    read = revived(json.loads(json.dumps(plain(values), allow_nan=False)))
    canonical = [math.nan if math.isnan(value) else value for value in values]
    kept, wanted = (torch.tensor(v, dtype=torch.float64) for v in (read, canonical))
    assert same_bits(kept, wanted)


def test_a_tensor_may_be_called_inf() -> None:
    governor, other = make(), make()
    saved = governor.state_dict()
    saved["policy"]["reports"][0]["tensor_name"] = "inf"
    other.load_state_dict(through_json(saved))
    assert other.state_dict()["policy"]["reports"][0]["tensor_name"] == "inf"


# -- under which settings ------------------------------------------------------------------------------------


def entries(column: Tensor, window: int, which: int) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of one memory."""
    values = column[:, 0].tolist()
    start = memory_row(which, window, len(MemoryField))
    sizes = [
        int(values[memory_row(which, window, f)])
        for f in (MemoryField.history_size, MemoryField.gradient_size)
    ]
    return values[start : start + sizes[0]], values[start + window : start + window + sizes[1]]


@pytest.mark.parametrize("window", [12, 13, 20, 21, 50])
def test_of_another_window_the_newest_losses_and_norms_stay(window: int) -> None:
    config = GovernorConfig(window=20, drift_horizon=6, cooldown=3, snapshot_interval=5)
    state, settings = ops.governor_state(1, window=20), config.to_tensor(None, "cpu")
    for step in range(33):
        loss = torch.tensor([1.0 + step / 64])
        norm = None if step % 3 == 0 else torch.tensor([2.0 + step / 64])
        ops.governor_step_(state, settings, loss, None, None, None, norm)
    other = fitted(state, config.replace(window=window))
    for which in range(3):
        losses, norms = entries(state, 20, which)
        assert entries(other, window, which) == (losses[-window:], norms[-window:])
        counts = slice(memory_row(which, 20, 0), memory_row(which, 20, len(MemoryField)))
        moved = slice(memory_row(which, window, 0), memory_row(which, window, len(MemoryField)))
        here, there = state[counts].clone(), other[moved].clone()
        for field in (MemoryField.history_size, MemoryField.gradient_size):
            here[field], there[field] = 0.0, 0.0
        assert same_bits(here, there)
    assert len(entries(state, 20, 0)[0]) == 20
    assert same_bits(state[: len(StateField)].contiguous(), other[: len(StateField)].contiguous())


@pytest.mark.parametrize("horizons", [(0, 12), (12, 0), (1, 5), (12, 3), (3, 1)])
@pytest.mark.parametrize("name", SETTINGS)
def test_statistics_under_other_settings_are_ones_that_those_settings_reach(
    name: str, horizons: tuple[int, int]
) -> None:
    before, after = horizons
    config = GovernorConfig(**{**SETTINGS[name], "drift_horizon": before, "snapshot_interval": 5})
    others = [
        GovernorConfig(**{**SETTINGS[other], "drift_horizon": after, "snapshot_interval": 7})
        for other in SETTINGS
    ]
    state, settings = ops.governor_state(1, window=config.window), config.to_tensor(2.3, "cpu")
    losses, norms = losses_like_a_run(1, 60, 0), norms_like_a_run(1, 60, 0)
    for step in range(60):
        ops.governor_step_(state, settings, losses[step], None, None, None, norms[step])
        assert same_bits(fitted(state, config), state)
        for other in others:
            moved = fitted(state, other)
            assert same_bits(checked_state(moved[:, 0].tolist(), other, VERSION), moved)


@pytest.mark.parametrize(("cooldown", "left"), [(0, 0), (2, 2), (5, 5), (9, 5)])
def test_a_cooldown_lasts_no_longer_than_the_settings_let_it(cooldown: int, left: int) -> None:
    governor, other = make(cooldown=8), make(cooldown=cooldown)
    for loss in (math.nan, 1.0, 1.0, 1.0):
        governor.step(loss)
    other.load_state_dict(governor.state_dict())
    assert other.state_dict()["state"][StateField.cooldown_left] == left
    make().load_state_dict(other.state_dict(), keep_config=False)


def test_under_the_saved_settings_captures_come_in_the_same_steps(place: str) -> None:
    run, other = Watched(place), Watched(place, event_capacity=17)
    for _ in range(25):
        run.step(1.0)
    other.governor.load_state_dict(run.governor.state_dict(), keep_config=False)
    for _ in range(25):
        run.step(1.0)
        other.step(1.0)
    assert (
        other.steps_of(CaptureEvent, 25) == run.steps_of(CaptureEvent, 25) == [(30, 30), (40, 40), (50, 50)]
    )


def test_without_a_drift_test_no_drift_is_told() -> None:
    run = make(drift_horizon=12, drift_threshold=100.0)
    for i in range(12):
        run.step(1.2 + 0.05 * i)
    assert run.check_vital_signs(2.0).drift > 0
    other = make()
    other.load_state_dict(run.state_dict())
    assert other.check_vital_signs(2.0).drift == 0


def test_the_settings_in_force_stay_unless_the_saved_ones_are_asked_for() -> None:
    saved = make(sensitivity=9.0, window=40, event_capacity=17).state_dict()
    governor = make(sensitivity=4.0)
    memory, config = governor._attached.row.state.data_ptr(), governor.config
    governor.load_state_dict(saved)
    assert governor.config == config
    assert governor._attached.row.state.data_ptr() == memory
    verdict = governor.check_vital_signs(1.0)
    assert verdict.thresholds[1] == pytest.approx(verdict.mean + 4.0 * verdict.std)
    governor.load_state_dict(saved, keep_config=False)
    assert governor.config == GovernorConfig(sensitivity=9.0, window=40, event_capacity=17)
    governor.load_state_dict(make().state_dict())
    assert governor.config == GovernorConfig(sensitivity=9.0, window=40, event_capacity=17)


def test_bad_statistics_are_refused_under_the_settings_that_they_were_saved_with() -> None:
    saved = make(cooldown=3).state_dict()
    saved["state"][StateField.cooldown_left] = 4.0
    governor = make(cooldown=8)
    before = governor.state_dict()
    with pytest.raises(ValueError, match=r"state\.cooldown_left: expected a whole number from 0 to 3"):
        governor.load_state_dict(saved)
    assert governor.state_dict() == before


@pytest.mark.parametrize("given_guess", [None, 4.6])
def test_a_loss_of_guessing_that_was_given_stays(given_guess: float | None) -> None:
    def governor(guess: float | None) -> TolariaGovernor:
        return TolariaGovernor(nn.Linear(1, 1), [], random_guess_loss=guess)

    resumed = governor(given_guess)
    for saved in (2.3, None, 1.1):
        resumed.load_state_dict(governor(saved).state_dict())
        assert resumed.random_guess_loss == (saved if given_guess is None else given_guess)
    resumed.load_state_dict(governor(2.3).state_dict(), keep_config=False)
    assert resumed.random_guess_loss == 2.3
    resumed.load_state_dict(governor(1.1).state_dict())
    assert resumed.random_guess_loss == 2.3


# -- what is told --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_config", [True, False])
def test_a_resume_is_told(place: str, keep_config: bool, tmp_path: Path) -> None:
    run, other = Watched(place), Watched(place)
    for loss in (1.0, 1.0, math.nan, 1.0, 1.0, 1.0):
        run.step(loss)
    other.governor.poll()
    with JsonLinesSink(tmp_path / "events.jsonl") as sink:
        other.governor.add_sink(sink)
        other.governor.load_state_dict(run.governor.state_dict(), keep_config=keep_config)
    (event,) = other.governor.poll()
    assert isinstance(event, ResumeEvent)
    (line,) = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert line == event.as_dict()
    del line["time_s"]
    assert line == {
        "kind": "resume", "step": 6, "row": 0,
        "healthy_losses": 3, "rollbacks": 1, "config_kept": keep_config,
    }  # fmt: skip
    said = "resumed at step 6: 3 losses in the window, 1 rollback so far"
    assert describe(event) == said + ("" if keep_config else ", saved settings")


def test_a_refused_resume_is_not_told() -> None:
    governor = make()
    governor.poll()
    with pytest.raises(ValueError, match="version: expected"):
        governor.load_state_dict({})
    assert governor.poll() == []
