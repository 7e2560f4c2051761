"""Extras that are no modules and turn NaN on CUDA: found at the next capture, named, and put back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.device_run import no_host_sync, usual_schedule
from tolaria import Snapshot
from tolaria.governor import GovernorConfig, PromotionEvent, RollbackEvent, TolariaGovernor
from tolaria.ops import PanicReason

pytestmark = pytest.mark.cuda


class Shadow:
    """An average that is no module, as people write it."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.seen = value, torch.zeros((), dtype=torch.int64, device=value.device)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value.copy_(state["value"])


class Run:
    """A healthy run of two steps a capture, with extras."""

    def __init__(self, **extras: Tensor) -> None:
        self.model = nn.Linear(2, 2).cuda()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.extras = {name: Shadow(value) for name, value in extras.items()}
        self.governor = TolariaGovernor(
            self.model,
            self.optimizer,
            config=GovernorConfig(snapshot_interval=2, probation=1),
            extras=dict(self.extras),
        )
        self.loss = torch.ones((), device="cuda")
        torch.cuda.synchronize()

    def steps(self, n: int) -> None:
        with no_host_sync():
            for _ in range(n):
                self.governor.step(self.loss)

    def promotions(self) -> list[int]:
        events = self.governor.synchronize()
        return [event.capture_step for event in events if isinstance(event, PromotionEvent)]


@pytest.fixture(params=["usual", "eager", "lazy", "starve:3"])
def schedule(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "usual":
        yield
        return
    vgpu = pytest.importorskip("vgpu", reason="schedules are the virtual device's")
    vgpu.schedule(request.param)
    yield
    vgpu.schedule(usual_schedule())


PLACES = {"device": "cuda", "host": "cpu"}
VALUES = {
    "f32": torch.ones(3),
    "bf16": torch.ones(3, dtype=torch.bfloat16),
    "complex": torch.ones(3, dtype=torch.complex64),
    "sparse": torch.eye(3).to_sparse(),
    "trained": nn.Parameter(torch.ones(3)),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", VALUES)
def test_an_extra_that_turns_nan_is_found_and_named(kind: str, place: str, schedule: None) -> None:
    fine = torch.ones(2, device="cuda")
    run = Run(a=fine, b=VALUES[kind].detach().clone().to(PLACES[place]), c=fine.clone())
    run.steps(4)
    before = run.promotions()
    assert before
    with torch.no_grad():
        run.extras["b"].value.mul_(math.inf if kind != "complex" else math.nan)
    run.steps(6)
    events = run.governor.synchronize()
    run.governor.step(run.loss)
    reports = [event.report for event in events if isinstance(event, RollbackEvent)]
    assert reports
    for report in reports[:1]:
        assert (report.reason, report.tensor_name) == (PanicReason.NON_FINITE_STATE, "extras['b']")
        assert report.restored_step <= 4
    value = run.extras["b"].value.detach()
    assert bool(torch.isfinite(value._values() if value.is_sparse else value).all())


def test_the_first_of_several_bad_extras_is_named() -> None:
    bad = torch.full((2,), math.nan, device="cuda")
    run = Run(
        **{name: torch.ones(2, device=place) for name, place in (("b", "cuda"), ("a", "cpu"), ("c", "cuda"))}
    )
    for extra in run.extras.values():
        extra.value.copy_(bad)
    run.steps(6)
    events = run.governor.synchronize()
    assert next(e for e in events if isinstance(e, RollbackEvent)).report.tensor_name == "extras['a']"


def test_an_extra_that_was_not_finite_at_attach_is_no_finding() -> None:
    run = Run(mask=torch.full((2,), -math.inf, device="cuda"), other=torch.ones(2, device="cuda"))
    run.steps(8)
    assert run.promotions()
    assert run.governor.rollback_count == 0


def test_an_extra_that_holds_nan_is_refused_by_name_where_it_would_be_adopted() -> None:
    run = Run(average=torch.ones(2, device="cuda"))
    run.extras["average"].value[0] = math.nan
    with pytest.raises(ValueError, match=r"extras\['average'\]: expected a finite state"):
        run.governor.reset()
    run.governor.execute_rollback()
    assert bool(torch.isfinite(run.extras["average"].value).all())


def test_a_capture_by_hand_finds_it_too() -> None:
    run = Run(average=torch.ones(2, device="cuda"))
    run.extras["average"].value[0] = math.nan
    with no_host_sync():
        run.governor.snapshot()
        run.governor.step(run.loss)
    run.governor.synchronize()
    report = run.governor.last_report
    assert report is not None
    assert report.tensor_name == "extras['average']"


@pytest.mark.parametrize("place", PLACES.values())
def test_only_captures_cost_launches_and_only_with_extras_on_the_device(place: str) -> None:
    vgpu = pytest.importorskip("vgpu", reason="counts come from the virtual device")

    vgpu.schedule("eager")

    def launches(**extras: Tensor) -> list[int]:
        run, counts = Run(**extras), []
        for _ in range(6):
            vgpu.reset()
            run.governor.step(run.loss)
            stats = vgpu.stats()
            counts.append(
                sum(kernel["launches"] for kernel in stats["kernel_launches"].values())
                + sum(n for name, n in stats["aten_launches"].items() if "copy" not in name)
            )
            torch.cuda.synchronize()
        return counts

    without, with_one = launches(), launches(one=torch.ones(2, device=place))
    more = [b - a for a, b in zip(without, with_one, strict=True)]
    vgpu.schedule(usual_schedule())
    captures = [count > min(without) for count in without]
    assert any(captures)
    assert not all(captures)
    for is_capture, extra in zip(captures, more, strict=True):
        assert 0 <= extra <= (5 if is_capture and place == "cuda" else 0), (without, with_one)


@pytest.mark.parametrize("place", PLACES.values())
def test_a_snapshot_names_it(place: str) -> None:
    model, average = nn.Linear(2, 2).cuda(), Shadow(torch.ones(2, device=place))
    snapshot = Snapshot(model, extras={"average": average})
    with no_host_sync():
        snapshot.capture()
    assert snapshot.is_finite
    average.value[0] = math.nan
    snapshot.capture()
    average.value[0] = 1.0
    assert snapshot.nonfinite == "extras['average']"
