"""Telemetry: events in order, sinks that may fail, dropped events, settings checked."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from tolaria.errors import ConfigError
from tolaria.governor import (
    CaptureEvent,
    DroppedEventsEvent,
    GovernorConfig,
    GovernorEvent,
    JsonLinesSink,
    LoggingSink,
    PromotionEvent,
    RollbackEvent,
    TensorBoardSink,
    TolariaGovernor,
    VerdictEvent,
)


def make(**kw: object) -> TolariaGovernor:
    model = nn.Linear(2, 2)
    config = GovernorConfig(snapshot_interval=4, probation=1, **kw.pop("settings", {}))  # type: ignore[arg-type]
    return TolariaGovernor(model, torch.optim.SGD(model.parameters(), lr=0.1), config=config, **kw)  # type: ignore[arg-type]


def test_events_tell_the_story_in_order() -> None:
    governor = make()
    governor.poll()
    for _ in range(6):
        governor.step(1.0)
    governor.step(float("nan"))
    kinds = [(type(e), e.step) for e in governor.poll()]
    assert kinds == [(CaptureEvent, 4), (PromotionEvent, 5), (VerdictEvent, 7), (RollbackEvent, 7)]
    assert governor.poll() == []


def test_failing_sink_neither_stops_training_nor_loses_the_rollback(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[GovernorEvent] = []

    def broken(event: GovernorEvent) -> None:
        raise OSError("disk full")

    governor = make(sinks=[broken, seen.append])
    governor.step(float("nan"))
    assert any(isinstance(e, RollbackEvent) for e in seen)
    assert "disk full" in caplog.text
    assert governor.rollback_count == 1


def test_log_json_and_tensorboard_sinks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scalars: list[tuple[str, float, int]] = []

    class Writer:
        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            scalars.append((tag, scalar_value, global_step))

    with JsonLinesSink(tmp_path / "events.jsonl") as sink, caplog.at_level(logging.INFO):
        governor = make(sinks=[sink, LoggingSink(), TensorBoardSink(Writer())])
        governor.step(float("inf"))
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["attach", "verdict", "rollback"]
    assert lines[-1]["report"]["reason"] == "NON_FINITE"
    assert lines[-1]["report"]["loss"] == "inf"
    assert "step 1: rollback" in caplog.text
    assert ("governor/rollbacks", 1, 1) in scalars


def test_full_ring_counts_what_it_dropped_and_the_status_stays_right() -> None:
    governor = make(settings={"event_capacity": 4, "log_only": True})
    governor.poll()
    reader = governor._attached.row.reader
    for _ in range(10):  # straight to the judge: nobody reads the ring meanwhile
        governor._attached.judge.judge(governor._engine, float("nan"), None)
    events = governor.poll()
    assert isinstance(events[0], DroppedEventsEvent)
    assert events[0].dropped == 6
    assert [e.step for e in events[1:]] == [7, 8, 9, 10]
    assert not reader.has_news


def test_log_only_never_acts() -> None:
    governor = make(settings={"log_only": True})
    weight = governor._engine.covered.model.get_parameter("weight")
    before = weight.detach().clone()
    for _ in range(20):
        governor.step(1.0)
    with torch.no_grad():
        weight.add_(1.0)
    verdict = governor.check_vital_signs(float("nan"))
    governor.step(verdict)
    assert verdict
    assert governor.rollback_count == 0
    assert torch.equal(weight.detach(), before + 1.0)


def test_config_error_lists_every_bad_field() -> None:
    with pytest.raises(ConfigError) as caught:
        GovernorConfig(window=1, sensitivity=-1.0, rule="some", cooldown=-3)  # type: ignore[arg-type]
    for name in ("window", "sensitivity", "rule", "cooldown"):
        assert name in str(caught.value)
    with pytest.raises(ConfigError, match="snapshot_interval: expected more than probation = 5, got 5"):
        GovernorConfig(snapshot_interval=5, probation=5)
    with pytest.raises(ConfigError, match="window: expected at least min_history = 10, got 5"):
        GovernorConfig(window=5)


def test_strict_trips_where_the_default_does_not() -> None:
    strict, default = make(settings={}), make(settings={})
    strict = TolariaGovernor(
        nn.Linear(1, 1), [], config=GovernorConfig.strict(random_guess_loss=2.3), random_guess_loss=2.3
    )
    for governor in (strict, default):
        for i in range(20):
            governor.step(0.1 + 0.001 * (i % 3))
    assert not default.check_vital_signs(5.0).consecutive_panics
    assert strict.check_vital_signs(5.0).consecutive_panics == 1
    assert strict.config.replace(cooldown=3).cooldown == 3


def test_wrong_arguments_are_named() -> None:
    governor = make()
    with pytest.raises(TypeError, match="loss: expected a number"):
        governor.step("0.1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loss: expected one value"):
        governor.step(torch.ones(3))
    with pytest.raises(TypeError, match="loss: expected float64"):
        governor.step(torch.ones(1, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"optimizers\[0\]"):
        TolariaGovernor(nn.Linear(1, 1), ["sgd"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="num_classes: expected an integer of at least 2, got 1"):
        make(num_classes=1)
    governor.close()
    with pytest.raises(RuntimeError, match="closed"):
        governor.step(1.0)
