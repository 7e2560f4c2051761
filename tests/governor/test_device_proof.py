"""300 guarded steps of real networks with captures, faults and rollbacks, under hostile stream schedules.

Where the virtual device is, each schedule attacks the order of streams; on hardware the one schedule there is
runs. The negative controls take one wait out each: the same run must then fail under some schedule.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from device_proof import FAULTS, Log, ProofRun
from device_run import no_host_sync, usual_schedule
from torch import Tensor, nn

from tolaria import ops
from tolaria.governor import GovernorConfig, TolariaGovernor, device_engine
from tolaria.snapshot.covered import CoveredTensor

pytestmark = pytest.mark.cuda

KINDS = ["cnn", "transformer"]
LONG = ["random:1", "lazy", "starve:1"]
CONTROL = ["eager", "lazy", "random:2", "starve:2", "starve:3"]
SHORT = ["eager", *(f"random:{i}" for i in range(2, 10)), *(f"starve:{i}" for i in range(2, 12))]


def schedules(names: list[str]) -> Iterator[str]:
    """Each schedule in turn, with nothing left over from the one before."""
    try:
        import vgpu  # type: ignore[import-not-found]
    except ImportError:
        yield "hardware"
        return
    try:
        for name in names:
            gc.collect()
            torch.cuda.synchronize()
            vgpu.schedule(name)
            yield name
    finally:
        torch.cuda.synchronize()
        vgpu.schedule(usual_schedule())


def told(kind: str, steps: int, names: list[str]) -> dict[str, tuple[Log, Tensor]]:
    return {name: ProofRun(kind, FAULTS).story(steps) for name in schedules(names)}


def assert_one_story(stories: dict[str, tuple[Log, Tensor]]) -> Log:
    """The same log and the same last bytes under every schedule."""
    log, last = next(iter(stories.values()))
    for name, (other, bytes_) in stories.items():
        assert other == log, name
        assert torch.equal(bytes_, last), name
    return log


@pytest.mark.parametrize("kind", KINDS)
def test_three_hundred_steps_without_a_host_sync(kind: str) -> None:
    log = assert_one_story(told(kind, 300, LONG))
    rollbacks = [step for name, step, _ in log if name == "rollback"]
    assert rollbacks == [24, 57, 58, 101, 131, 163, 197, 222, 252, 284]
    assert sum(1 for name, _, _ in log if name == "promoted") >= 20
    assert len({restored for name, _, restored in log if name == "rollback"}) >= 8


@pytest.mark.parametrize("kind", KINDS)
def test_one_story_under_many_schedules(kind: str) -> None:
    log = assert_one_story(told(kind, 62, SHORT))
    assert [step for name, step, _ in log if name == "rollback"] == [24, 57, 58]


# -- negative controls: what a missing wait does -------------------------------------------------------------


def fails_somewhere(run: Callable[[], object], names: list[str]) -> bool:
    """Whether ``run`` fails, or tells another story, under one of the schedules."""
    stories = []
    for _ in schedules(names):
        try:
            stories.append(run())
        except AssertionError:
            return True
        if stories[-1] != stories[0]:
            return True
    return False


def control(run: Callable[[], object], remove: Callable[[], None]) -> None:
    pytest.importorskip("vgpu", reason="a tear has to be provoked; hardware may never show it")
    assert not fails_somewhere(run, CONTROL), "it must pass before the wait is removed"
    remove()
    assert fails_somewhere(run, SHORT), "the wait was removed, and no schedule noticed"


def trained() -> object:
    return ProofRun("cnn", FAULTS).story(26)[0]


def test_the_optimizers_wait_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    control(trained, lambda: monkeypatch.setattr(device_engine, "before_optimizer_step", lambda *_: None))


def test_the_side_streams_wait_for_the_judge_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loose(torch.cuda.Stream):
        def wait_event(self, event: object) -> None:
            pass

    def remove() -> None:
        monkeypatch.setattr(device_engine.torch.cuda, "Stream", Loose)

    control(trained, remove)


def test_what_others_mutate_must_be_copied_on_the_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    control(trained, lambda: monkeypatch.setattr(CoveredTensor, "part", property(lambda _: 1)))


def seldom() -> object:
    """The optimizer takes every third step only; between them nothing but the judge waits for a capture."""
    run = ProofRun("cnn", {20: "nan"})
    with no_host_sync():
        for i in range(1, 31):
            loss = run.loss(i)
            run.optimizer.zero_grad(set_to_none=False)
            loss.backward()
            if i % 3 == 0:
                run.optimizer.step()
            run.governor.step(loss)
    events = run.governor.synchronize()
    return [(e.kind, e.step) for e in events if e.kind in ("promotion", "capture", "rollback")]


def test_the_judges_wait_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    control(seldom, lambda: monkeypatch.setattr(device_engine.DeviceEngine, "judging", _judging_alone))


def _judging_alone(engine: device_engine.DeviceEngine) -> None:
    engine._next = max(engine._judged, engine.step_count) + 1


def undone_by_hand() -> object:
    """A restore by hand right behind a capture: both touch the parameters, on different streams."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).cuda()
    governor = TolariaGovernor(model, [], config=GovernorConfig())
    engine = governor._engine
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor.add_optimizer(optimizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3.0)
    governor.snapshot()
    engine.order(ops.Order.ROLLBACK)
    engine.restore()
    torch.randn(8, device="cuda").sum()
    torch.cuda.synchronize()
    slots = [float(place.slots[s].min()) for place in engine.slots.places.values() for s in (0, 1)]
    return sum(value == 3.0 for value in slots)


def test_the_restores_wait_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    control(undone_by_hand, lambda: monkeypatch.setattr(device_engine.DeviceEngine, "wait", lambda _: None))


def regrown() -> object:
    """Memory replaced while a capture is in flight: the table it reads must not change under it."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = TolariaGovernor(model, optimizer, config=GovernorConfig(snapshot_interval=100, probation=1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3.0)
    governor.snapshot()
    for parameter in model.parameters():
        parameter.data = torch.full_like(parameter, 5.0)
    governor.notify_structure_changed()
    torch.randn(8, device="cuda").sum()
    governor.step(torch.ones((), device="cuda"))
    governor.synchronize()
    governor.execute_rollback()
    return [float(p.detach().mean()) for p in model.parameters()]


def test_the_structure_changes_wait_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def sync_structure(engine: device_engine.DeviceEngine, **how: Any) -> None:
        super(device_engine.DeviceEngine, engine).sync_structure(**how)

    control(
        regrown, lambda: monkeypatch.setattr(device_engine.DeviceEngine, "sync_structure", sync_structure)
    )
