"""Steps that are judged without a loss, or by the mean of many; what their user calls them."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tolaria
from tolaria.governor import (
    GovernorConfig,
    JsonLinesSink,
    LoggingSink,
    PanicReason,
    RollbackEvent,
    TensorBoardSink,
    TolariaGovernor,
    VerdictEvent,
)
from tolaria.ops import MemoryField, StateField, memory_row
from tolaria.telemetry.verdict import NO_LOSS, judged_loss


@pytest.fixture(params=["fused", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    with tolaria.backend(request.param):
        yield


def make(
    *, name: str | None = None, sinks: Any = (), guess: float | None = None, **settings: Any
) -> TolariaGovernor:
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = GovernorConfig(**{"snapshot_interval": 5, "probation": 1, **settings})
    governor = TolariaGovernor(model, optimizer, config=config, name=name, sinks=sinks)
    governor.poll()
    return governor


def fill(governor: TolariaGovernor, value: float) -> None:
    for p in governor._engine.covered.model.parameters():
        p.grad = torch.full_like(p, value)


# -- add_loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_the_weighted_mean_of_the_micro_batches_is_judged(dtype: torch.dtype) -> None:
    governor = make()
    losses, weights = [0.5, 1.25, 3.0], [2, torch.tensor(5), 0.5]
    for loss, weight in zip(losses, weights, strict=True):
        governor.add_loss(torch.tensor(loss, dtype=dtype, requires_grad=True), weight)
    governor.step()
    expected = sum(x * float(w) for x, w in zip(losses, weights, strict=True)) / 7.5
    assert governor.history == [pytest.approx(expected, rel=1e-12)]
    governor.add_loss(2.0)
    governor.add_loss(torch.tensor([4.0], dtype=dtype))
    verdict = governor.check_vital_signs(tag="b")
    governor.step(verdict)
    assert governor.history[1:] == [3.0], "each is judged once"
    governor.step(torch.tensor(1.0))
    assert governor.history[2:] == [1.0]


def test_many_small_ones_add_up_in_more_than_their_own_precision() -> None:
    governor = make()
    for _ in range(1000):
        governor.add_loss(torch.tensor(1.0, dtype=torch.bfloat16))
    governor.step()
    assert governor.history == [1.0]


@pytest.mark.parametrize("none", [0, 0.0, torch.tensor(0), torch.tensor([0.0])])
def test_a_micro_batch_of_no_weight_is_left_out_even_if_it_is_nan(none: Any) -> None:
    governor = make()
    governor.add_loss(torch.tensor(math.nan), none)
    governor.add_loss(2.0, 3)
    governor.step()
    assert governor.history == [2.0]
    governor.add_loss(torch.tensor(math.nan), none)
    governor.step()
    assert governor.rollback_count == 1, "nothing was left to take the mean of"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_micro_batch_makes_the_mean_bad(bad: float) -> None:
    governor = make()
    governor.add_loss(1.0)
    governor.add_loss(torch.tensor(bad))
    governor.step()
    assert governor.rollback_count == 1
    governor.add_loss(1.5)
    governor.step()
    assert governor.history == [1.5]


def test_what_is_refused_changes_nothing() -> None:
    governor = make()
    with pytest.raises(TypeError, match="loss: expected a loss, a verdict or None, got nothing"):
        governor.step()
    governor.add_loss(1.0)
    for given in (2.0, torch.tensor(2.0), None):
        with pytest.raises(ValueError, match="expected nothing beside the 1 that add_loss was given"):
            governor.step(given)
    for loss, weight, match in (
        (torch.ones(2), 1, "loss: expected one value"),
        (torch.ones(1, dtype=torch.int64), 1, "loss: expected a floating tensor"),
        (1.0, -1, "weight: expected a finite number of at least 0"),
        (1.0, math.nan, "weight: expected a finite number"),
        (1.0, torch.ones(2), "weight: expected one value"),
        ("1", 1, "loss: expected a number"),
        (1.0, None, "weight: expected a number"),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            governor.add_loss(loss, weight)  # type: ignore[arg-type]
    governor.step()
    assert governor.history == [1.0]
    verdict = governor.check_vital_signs(1.0)
    governor.add_loss(1.0)
    with pytest.raises(ValueError, match="got a verdict"):
        governor.step(verdict)
    governor.close()
    with pytest.raises(RuntimeError, match="closed"):
        governor.add_loss(1.0)


@pytest.mark.parametrize("call", ["execute_rollback", "reset"])
def test_a_rollback_in_between_drops_what_was_added(call: str) -> None:
    governor = make()
    governor.step(1.0)
    governor.add_loss(1e9)
    getattr(governor, call)()
    governor.step(1.0)
    assert governor.history == [1.0]


# -- no loss -------------------------------------------------------------------------------------------------


def window(governor: TolariaGovernor) -> list[float]:
    state = governor._attached.row.state[:, 0]
    aside = {"consecutive", "skips", "gradient_size"}
    fields = [f for f in MemoryField if f.name not in aside]
    rows = [memory_row(0, 20, f) for f in fields] + [
        memory_row(0, 20, len(MemoryField) + i) for i in range(20)
    ]
    return state[[*range(StateField.life_count, StateField.life_max + 1), *rows]].tolist()


@pytest.mark.parametrize("config", [GovernorConfig(), GovernorConfig.strict()])
def test_without_a_loss_the_gradients_are_judged_and_the_window_stays(config: GovernorConfig) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    governor = TolariaGovernor(
        model, optimizer, config=config.replace(snapshot_interval=5, probation=1), random_guess_loss=2.3
    )
    for i in range(12):
        fill(governor, 1.0)
        governor.step(0.4 + 0.01 * (i % 3))
    before = window(governor)
    for _ in range(13):
        fill(governor, 1.0)
        governor.step(None)
        assert window(governor) == before
    assert (governor.step_count, governor.rollback_count) == (25, 0)
    assert governor.last_good_step == 20, "it is captured and promoted as ever"
    assert math.isnan(governor.last_verdict.loss)  # type: ignore[union-attr]
    for count in (1, 2):
        fill(governor, 1e6)
        governor.step(None)
        assert governor.rollback_count == count - 1
    report = governor.last_report
    assert report is not None
    assert report.reason is PanicReason.GRADIENT_NORM
    assert math.isnan(report.loss)
    assert all(math.isnan(e.loss) for e in governor.poll() if isinstance(e, VerdictEvent))
    assert window(governor) == before, "the slot holds the window, and nothing else"
    fill(governor, math.nan)
    governor.step(None)
    assert governor.rollback_count == 2


@pytest.mark.parametrize("ranks", [2, 3, 7, 10, 96, 1000])
def test_no_loss_is_none_on_any_number_of_ranks(ranks: int) -> None:
    assert sum([NO_LOSS] * ranks) / ranks == NO_LOSS
    assert math.isnan(judged_loss(NO_LOSS))


def test_without_a_loss_the_state_is_judged() -> None:
    governor = make()
    fill(governor, 1.0)
    governor.step(None)
    with torch.no_grad():
        governor._engine.covered.model.get_parameter("weight")[0, 0] = math.nan
    governor.step(None)
    assert governor.rollback_count == 1
    fill(governor, 1.0)
    governor.step(None, nonfinite=True)
    assert governor.rollback_count == 2
    fill(governor, 1.0)
    assert governor.check_vital_signs(None, nonfinite=torch.zeros(())).is_healthy


def test_only_the_gradients_of_a_whole_run() -> None:
    governor = make()
    for i in range(30):
        fill(governor, 1.0 + 0.1 * (i % 3))
        governor.step(None)
    assert governor.history == []
    assert governor.lifetime["count"] == 0
    assert governor.last_good_step == 25
    governor.step(1e3)  # the first loss of all
    assert governor.history == [1e3]


# -- tags and names ------------------------------------------------------------------------------------------


def test_every_sink_knows_the_tag_and_the_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scalars: list[tuple[str, float, int]] = []

    class Writer:
        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            scalars.append((tag, scalar_value, global_step))

    with JsonLinesSink(tmp_path / "events.jsonl") as sink, caplog.at_level(logging.INFO):
        governor = make(name="critic", sinks=[sink, LoggingSink(), TensorBoardSink(Writer())])
        for i in range(6):
            governor.step(torch.tensor(1.0), tag=np.int64(100 + i))
        governor.step(math.nan, tag=107)
        governor.step(math.nan, tag="late")
        governor.step(math.nan)
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert all(line["governor"] == "critic" for line in lines)
    told = [(line["kind"], line["step"], line.get("tag")) for line in lines]
    assert told == [
        ("attach", 0, None), ("capture", 5, 104), ("promotion", 6, 105),
        ("verdict", 7, 107), ("rollback", 7, 107),
        ("verdict", 8, "late"), ("rollback", 8, "late"), ("verdict", 9, None), ("rollback", 9, None),
    ]  # fmt: skip
    assert lines[4]["report"]["tag"] == 107
    assert "critic: step 7 (107): rollback" in caplog.text
    assert "critic: step 8 (late): verdict" in caplog.text
    assert ("governor/critic/rollbacks", 1, 107) in scalars
    assert ("governor/critic/rollbacks", 2, 8) in scalars
    assert governor.name == "critic"


def test_a_tag_may_come_with_the_judgement_or_with_its_verdict() -> None:
    governor = make(skip_anomalous_steps=True, skips_before_rollback=0)
    governor.step(governor.check_vital_signs(math.nan, tag="early"))
    governor.step(governor.check_vital_signs(math.nan), tag="later")
    governor.step(math.nan)
    tags = [e.report.tag for e in governor.poll() if isinstance(e, RollbackEvent)]
    assert tags == ["early", "later", None]


def test_the_tag_of_a_step_is_that_of_what_is_done_after_it() -> None:
    governor = make()
    governor.step(1.0, tag=41)
    report = governor.execute_rollback()
    assert (report.reason, report.tag) == (PanicReason.MANUAL, 41)
    governor.step(1.0)
    assert governor.execute_rollback().tag is None


def test_reports_keep_their_tags_through_json() -> None:
    governor = make()
    for tag in (7, "a"):
        governor.step(math.nan, tag=tag)
    other = make()
    other.load_state_dict(json.loads(json.dumps(governor.state_dict())))
    saved = other.state_dict()
    assert [report["tag"] for report in saved["policy"]["reports"]] == [7, "a"]
    for report in saved["policy"]["reports"]:
        del report["tag"]  # as before there were any
    make().load_state_dict(saved)
    saved["policy"]["reports"][0]["tag"] = [1]
    with pytest.raises(ValueError, match=r"reports\[0\]\.tag: expected a whole number, a string or None"):
        make().load_state_dict(saved)


def test_a_resumed_run_has_its_own_tags() -> None:
    governor = make()
    saved = governor.state_dict()
    governor.step(1.0, tag="before")
    governor.load_state_dict(saved)
    governor.poll()
    governor.step(math.nan)
    assert {e.tag for e in governor.poll()} == {None}


@pytest.mark.parametrize("tag", [1.5, True, [1], torch.tensor(1), b"x"])
def test_other_tags_are_refused_before_anything_is_judged(tag: Any) -> None:
    governor = make()
    with pytest.raises(TypeError, match="tag: expected an int or a str"):
        governor.step(torch.tensor(1.0), tag=tag)
    assert governor.step_count == 0


def test_a_refused_step_leaves_no_tag() -> None:
    governor = make()
    with pytest.raises(TypeError, match="loss"):
        governor.step("1", tag="refused")  # type: ignore[arg-type]
    governor.step(math.nan)
    assert {e.tag for e in governor.poll()} == {None}


def test_tags_are_bounded() -> None:
    governor = make()
    for i in range(5000):
        governor._telemetry.labels.note(i, i)
    assert len(governor._telemetry.labels._tags) == 4096


@pytest.mark.parametrize(("name", "error"), [(3, TypeError), ("", ValueError)])
def test_a_name_is_a_word(name: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="name: expected"):
        make(name=name)


def test_an_unnamed_step_tells_nothing_of_names() -> None:
    governor = make()
    governor.step(math.nan)
    assert all("tag" not in e.as_dict() and "governor" not in e.as_dict() for e in governor.poll())
