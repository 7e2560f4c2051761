"""Calls around the step: bad arguments, rollback by hand, skipping, closing, saving, failures inside them."""

from __future__ import annotations

import copy
import gc
import math
import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tolaria import _extension
from tolaria.errors import SnapshotError, TolariaError, TrainingDivergedError
from tolaria.governor import (
    DroppedEventsEvent,
    GovernorBank,
    GovernorConfig,
    PanicReason,
    RollbackEvent,
    TolariaGovernor,
    VerdictEvent,
)
from tolaria.snapshot import slots


class Smoothed(nn.Module):
    """Its forward assigns a buffer anew instead of writing to it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.linear(x - self.mean)


def make(
    model: nn.Module | None = None, **kw: Any
) -> tuple[nn.Module, torch.optim.Optimizer, TolariaGovernor]:
    model = nn.Linear(3, 2) if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    config = GovernorConfig(**{"snapshot_interval": 100, "probation": 1, **kw.pop("settings", {})})
    return model, optimizer, TolariaGovernor(model, optimizer, config=config, **kw)


def load(**options: Any) -> None:
    governor = make()[2]
    governor.load_state_dict(governor.state_dict(), **options)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def assert_same(model: nn.Module, kept: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept[name]), name


BAD_ARGUMENTS: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "one-scheduler": (TypeError, "schedulers: expected a sequence", lambda: make(schedulers=nn.Identity())),
    "no-scheduler": (TypeError, r"schedulers\[0\]: expected", lambda: make(schedulers=[3])),
    "extras-list": (TypeError, "extras: expected a mapping", lambda: make(extras=[nn.Identity()])),
    "extras-number": (TypeError, r"extras\['ema'\]: expected", lambda: make(extras={"ema": 3})),
    "one-generator": (TypeError, "generators: expected", lambda: make(generators=torch.Generator())),
    "one-sink": (TypeError, "sinks: expected", lambda: make(sinks=print)),
    "no-sink": (TypeError, r"sinks\[0\]: expected", lambda: make(sinks=[3])),
    "group": (TypeError, "process_group: expected", lambda: make(process_group=3)),
    "guess-loss": (ValueError, "random_guess_loss: expected", lambda: make(random_guess_loss=True)),
    "strict": (
        ValueError,
        "random_guess_loss: expected",
        lambda: GovernorConfig.strict("x"),  # type: ignore[arg-type]
    ),
    "lazy": (ValueError, "model: expected initialised", lambda: TolariaGovernor(nn.LazyLinear(2), [])),
    "meta": (
        RuntimeError,
        "expected parameters on cpu or cuda, got them on meta",
        lambda: TolariaGovernor(nn.Linear(1, 1, device="meta"), []),
    ),
    "optimizers": (TypeError, "optimizers: expected", lambda: TolariaGovernor(nn.Linear(1, 1), None)),  # type: ignore[arg-type]
    "flag": (TypeError, "nonfinite: expected a bool", lambda: make()[2].step(1.0, nonfinite="no")),  # type: ignore[arg-type]
    "state": (TypeError, "state: expected a dict", lambda: make()[2].load_state_dict(None)),  # type: ignore[arg-type]
    "keep_config": (TypeError, "keep_config: expected True or False, got int", lambda: load(keep_config=1)),
    "add-sink": (TypeError, "sinks", lambda: make()[2].add_sink(3)),  # type: ignore[arg-type]
    "add-scheduler": (TypeError, "schedulers", lambda: make()[2].add_scheduler(3)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_argument_is_named(name: str) -> None:
    error, words, call = BAD_ARGUMENTS[name]
    with pytest.raises(error, match=words):
        call()


def test_an_optimizer_given_twice_is_an_error() -> None:
    model, optimizer, _ = make()
    with pytest.raises(ValueError, match=r"optimizers\[1\]: expected each optimizer once"):
        TolariaGovernor(model, [optimizer, optimizer])


def test_rollback_by_hand_restores_every_time_and_counts_once() -> None:
    model, optimizer, governor = make(settings={"lr_factor": 0.5})
    governor.step(1.0)
    kept = weights(model)
    for _ in range(3):
        take_step(model, optimizer)
        report = governor.execute_rollback()
        assert_same(model, kept)
        assert not optimizer.state
        assert optimizer.param_groups[0]["lr"] == 0.25
        assert all(p.grad is None for p in model.parameters())
    assert (report.rollback_count, governor.rollback_count) == (1, 1)
    assert sum(isinstance(e, RollbackEvent) for e in governor.poll()) == 1
    assert governor.offending_steps == (), "no loss led to a rollback by hand"


def test_log_only_does_not_act_on_a_poisoned_snapshot_either() -> None:
    model, _, governor = make(settings={"log_only": True})
    with torch.no_grad():
        model.get_parameter("weight")[0, 0] = math.nan
    governor.snapshot()
    governor.step(1.0)
    assert governor.rollback_count == 0
    assert bool(model.get_parameter("weight")[0, 0].isnan())
    reasons = [e.reason for e in governor.poll() if isinstance(e, VerdictEvent)]
    assert reasons == [PanicReason.NON_FINITE_STATE]


def test_skipped_step_puts_back_a_buffer_that_the_forward_assigned() -> None:
    model, optimizer, governor = make(Smoothed(), settings={"skip_anomalous_steps": True})
    for _ in range(12):
        take_step(model, optimizer)
        governor.step(governor.check_vital_signs(1.0))
    kept, counters = weights(model), copy.deepcopy(optimizer.state_dict())
    model(torch.full((4, 3), 5.0)).sum().backward()
    verdict = governor.check_vital_signs(1e6)
    optimizer.step()
    governor.step(verdict)
    assert_same(model, kept)
    steps = [state["step"] for state in optimizer.state_dict()["state"].values()]
    assert steps == [state["step"] for state in counters["state"].values()]


def test_log_only_skips_nothing() -> None:
    model, optimizer, governor = make(settings={"skip_anomalous_steps": True, "log_only": True})
    kept = weights(model)
    model(torch.ones(4, 3)).sum().backward()
    governor.check_vital_signs(math.nan)
    optimizer.step()
    assert not torch.equal(model.get_parameter("weight"), kept["weight"])


def test_loaded_settings_decide_whether_steps_are_skipped() -> None:
    saved = make(settings={"skip_anomalous_steps": True})[2].state_dict()
    model, optimizer, governor = make()
    plain, hooks = governor.state_dict(), len(optimizer._optimizer_step_pre_hooks)
    governor.load_state_dict(saved)
    assert len(optimizer._optimizer_step_pre_hooks) == hooks
    governor.load_state_dict(saved, keep_config=False)
    assert len(optimizer._optimizer_step_pre_hooks) > hooks
    kept = weights(model)
    model(torch.ones(4, 3)).sum().backward()
    governor.check_vital_signs(math.nan)
    optimizer.step()
    assert_same(model, kept)
    governor.load_state_dict(plain, keep_config=False)
    assert len(optimizer._optimizer_step_pre_hooks) == hooks
    governor.close()
    assert not optimizer._optimizer_step_pre_hooks


def test_the_rollback_budget_survives_saving() -> None:
    settings = {"max_rollbacks": 3, "rollback_window": 50}
    first = make(settings=settings)[2]
    for _ in range(2):
        first.step(math.nan)
    second = make(settings=settings)[2]
    second.load_state_dict(first.state_dict())
    assert second.offending_steps == (1, 2)
    with pytest.raises(TrainingDivergedError) as caught:
        second.step(math.nan)
    assert len(caught.value.history) == 3


def test_without_memory_nothing_is_half_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, governor = make()
    saved, born = governor.state_dict(), weights(model)
    take_step(model, optimizer)  # the optimizer now has state that the slots have no room for
    kept = weights(model)

    def exhausted(*_: object) -> Tensor:
        raise SnapshotError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(slots, "allocate", exhausted)
        for call in (governor.snapshot, governor.execute_rollback, lambda: governor.load_state_dict(saved)):
            with pytest.raises(SnapshotError, match="no memory left"):
                call()  # type: ignore[operator]
            assert_same(model, kept)
            assert optimizer.state
    assert governor.execute_rollback().rollback_count == 1
    assert_same(model, born)
    for _ in range(3):
        governor.step(1.0)


def test_close_lets_go_and_leaves_a_last_poll() -> None:
    model, optimizer, governor = make(settings={"skip_anomalous_steps": True, "skips_before_rollback": 0})
    governor.step(math.nan)
    gone = [weakref.ref(model), weakref.ref(governor._engine.slots.segments[0])]
    governor.close()
    governor.close()
    assert any(isinstance(e, RollbackEvent) for e in governor.poll())
    assert governor.rollback_count == 1
    assert not optimizer._optimizer_step_pre_hooks
    for call in (governor.snapshot, governor.execute_rollback, governor.reset, governor.synchronize):
        with pytest.raises(RuntimeError, match="closed"):
            call()
    del model, optimizer
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_events_that_nobody_polls_are_counted() -> None:
    governor = make(settings={"snapshot_interval": 2})[2]
    for _ in range(4200):
        governor.step(1.0)
    first, *rest = governor.poll()
    assert isinstance(first, DroppedEventsEvent)
    assert first.dropped + len(rest) == 1 + 2 * 2100 - 1, "attach, captures and all promotions but the last"


def test_lr_factor_reaches_the_rate_that_swalr_goes_to() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.5, anneal_epochs=2)
    governor = TolariaGovernor(model, optimizer, config=GovernorConfig(lr_factor=0.5), schedulers=[scheduler])
    governor.step(math.nan)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25)


def calls_in(function: Callable[[], object]) -> list[str]:
    """Names of the Python functions that ``function`` calls; each costs microseconds in cold caches."""
    names: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            names.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return names


@pytest.mark.skipif(not _extension.LOADED, reason="needs the compiled extension")
def test_clean_step_takes_the_shortest_way() -> None:
    _, optimizer, governor = make()
    loss = torch.tensor(1.0)
    governor.step(loss)
    names = calls_in(lambda: governor.step(loss))
    assert "act" not in names
    assert len(names) <= 8, names
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert "sync_structure" in calls_in(lambda: governor.step(loss))
    assert "act" not in calls_in(lambda: governor.step(loss))


def test_capture_of_what_has_not_moved_looks_for_no_tensors() -> None:
    model, optimizer, governor = make()
    take_step(model, optimizer)
    assert "tensors" in calls_in(governor.snapshot)
    assert "tensors" not in calls_in(governor.snapshot)
    optimizer.load_state_dict(optimizer.state_dict())
    assert "tensors" in calls_in(governor.snapshot)


def test_step_after_an_unread_verdict_tells_of_it() -> None:
    told: list[Any] = []
    _, _, governor = make(sinks=[told.append], settings={"min_panics_before_rollback": 3})
    for _ in range(12):
        governor.step(torch.tensor(1.0))
    governor.check_vital_signs(torch.tensor(100.0))  # dropped: its loss was not to count
    told.clear()
    governor.step(torch.tensor(1.0))
    assert [type(event) for event in told] == [VerdictEvent]


def test_step_of_a_closed_governor_judges_nothing() -> None:
    _, _, governor = make()
    governor.close()
    with pytest.raises(TolariaError, match="closed"):
        governor.step(torch.tensor(1.0))
    assert governor.step_count == 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_calls_may_be_made_under_inference_mode(device: str) -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    config = GovernorConfig(snapshot_interval=4, probation=1, skip_anomalous_steps=True)
    with torch.inference_mode():
        governor = TolariaGovernor(model, optimizer, config=config)

    def train(loss: float = 1.0) -> None:
        optimizer.zero_grad()
        model(torch.randn(4, 2, device=device)).square().mean().backward()
        verdict = governor.check_vital_signs(loss)
        optimizer.step()
        governor.step(verdict)

    for _ in range(6):
        train()
    late = [torch.ones(3, device=device) for _ in range(40)]
    with torch.inference_mode():
        for i, buffer in enumerate(late):
            model.register_buffer(f"late{i}", buffer)
        governor.snapshot()
        governor.notify_structure_changed()
        governor.poll()
    train()
    with torch.inference_mode():
        governor.execute_rollback()
        governor.reset()
        governor.load_state_dict(governor.state_dict())
        governor.step(1.0)
    for loss in (1.0, math.nan, math.nan, math.nan, math.nan, 1.0):
        train(loss)
    governor.synchronize()
    assert governor.rollback_count == 2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_rows_of_a_bank_may_be_judged_under_inference_mode(device: str) -> None:
    model = nn.Linear(2, 2).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    config = GovernorConfig(snapshot_interval=4, probation=1)
    with torch.inference_mode():
        bank = GovernorBank(2, config=config, device=device)
        bank.attach(0, model, optimizer)
    for i in range(12):
        optimizer.zero_grad()
        model(torch.ones(4, 2, device=device)).square().mean().backward()
        optimizer.step()
        with torch.inference_mode():
            bank.step(torch.tensor([math.nan if i == 8 else 1.0, 1.0], device=device))
    bank.poll()
    assert bank.rollback_counts == [1, 0]
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(bank)
