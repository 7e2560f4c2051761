"""On CUDA: memory that goes away while a launch still needs it, state that comes and goes, a late host."""

from __future__ import annotations

import copy
import gc
import mmap
import weakref
from collections.abc import Iterator

import pytest
import torch
from device_run import no_host_sync, usual_schedule
from torch import Tensor, nn

from tolaria.errors import SnapshotError
from tolaria.governor import GovernorConfig, TolariaGovernor
from tolaria.nn import SeedSlot
from tolaria.snapshot import memory as slot_memory

pytestmark = pytest.mark.cuda

SCHEDULES = ["lazy", "random:2", "starve:1", "starve:2", "starve:4"]


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> Iterator[str]:
    """One hostile schedule after the other on the virtual device; on hardware the one there is, once."""
    try:
        import vgpu  # type: ignore[import-not-found]
    except ImportError:
        if request.param != SCHEDULES[0]:
            pytest.skip("hardware has one schedule")
        yield "hardware"
        return
    gc.collect()
    torch.cuda.synchronize()
    vgpu.schedule(request.param)
    yield request.param
    torch.cuda.synchronize()
    vgpu.schedule(usual_schedule())


def linear(value: float | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(128, 128).cuda()
    if value is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
    return model


class Guarded:
    """A linear model under AdamW and a governor that captures often."""

    def __init__(self, **settings: object) -> None:
        self.model = linear()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        config = GovernorConfig(snapshot_interval=4, probation=1).replace(**settings)
        self.governor = TolariaGovernor(self.model, self.optimizer, config=config)
        self.x = torch.randn(2, 128, device="cuda")
        self.bad = torch.full((), float("nan"), device="cuda")
        self.states: dict[int, list[Tensor]] = {}

    def step(self, i: int, *, poison: bool = False) -> None:
        loss = self.model(self.x).square().mean()
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()
        self.optimizer.step()
        self.governor.step(loss * self.bad if poison else loss)
        self.states[i] = [t.detach().clone() for t in self.model.parameters()]


def test_replaced_memory_may_be_reused_by_the_stream_it_came_from(schedule: str) -> None:
    origin = torch.cuda.Stream()
    with torch.cuda.stream(origin):
        model = linear(3.0)
    torch.cuda.synchronize()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = TolariaGovernor(model, optimizer, config=GovernorConfig(snapshot_interval=100, probation=1))
    governor.snapshot()
    for parameter in model.parameters():
        parameter.data = torch.full_like(parameter, 5.0)
    governor.notify_structure_changed()
    with torch.cuda.stream(origin):
        junk = [torch.full((128, 128), float("nan"), device="cuda") for _ in range(8)]
    governor.step(torch.ones((), device="cuda"))
    governor.synchronize()
    assert governor.rollback_count == 0
    governor.execute_rollback()
    assert all(bool((p == 3.0).all()) for p in model.parameters())
    del junk


def test_governor_may_go_right_after_a_step_and_the_optimizer_stay(schedule: str) -> None:
    run = Guarded()
    for i in range(1, 9):
        run.step(i, poison=i == 8)
    engine = weakref.ref(run.governor._engine)
    del run.governor
    gc.collect()
    assert engine() is None, "the optimizer's hooks must not keep the engine and its slots"
    pages = [mmap.mmap(-1, 1 << 16) for _ in range(32)]  # would lie where the slots were
    torch.cuda.synchronize()
    assert not any(page.read().strip(b"\0") for page in pages)
    assert not run.optimizer._optimizer_step_pre_hooks  # type: ignore[attr-defined]


def test_what_no_covered_optimizer_steps_may_change_at_any_time(schedule: str) -> None:
    run = Guarded()
    target = copy.deepcopy(run.model).requires_grad_(False)
    run.model.add_module("target", target)
    average = copy.deepcopy(target)  # the hooks of a governed model must not stand in the way
    run.governor._engine.covered.extras["average"] = average
    mine = [run.model.weight, run.model.bias]
    run.model.forward = lambda x: nn.functional.linear(x, *mine)  # type: ignore[method-assign]
    states: dict[int, list[Tensor]] = {}
    with no_host_sync():
        for i in range(1, 20):
            run.step(i, poison=i == 18)
            states[i] = [t.detach().clone() for t in (*run.model.parameters(), *average.parameters())]
            with torch.no_grad():
                for slow, fast in zip((*target.parameters(), *average.parameters()), mine * 2, strict=True):
                    slow.lerp_(fast, 0.1)
    run.governor.synchronize()
    report = run.governor.last_report
    assert report is not None
    assert report.restored_step > 0
    assert all(torch.equal(a, b) for a, b in zip(states[18], states[report.restored_step], strict=True))


def test_loading_weights_waits_for_the_capture(schedule: str) -> None:
    run = Guarded(snapshot_interval=100)
    before = [p.detach().clone() for p in run.model.parameters()]
    other = {name: torch.full_like(value, 9.0) for name, value in run.model.state_dict().items()}
    torch.cuda.synchronize()
    run.governor.snapshot()
    run.model.load_state_dict(other)
    run.governor.step(torch.ones((), device="cuda"))
    run.governor.synchronize()
    run.governor.execute_rollback()
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


def test_optimizer_state_replaced_while_a_capture_is_in_flight(schedule: str) -> None:
    run = Guarded()
    for i in range(1, 22):
        run.step(i, poison=i == 19)
        if i in (8, 9, 12):
            run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    run.governor.synchronize()
    report = run.governor.last_report
    assert report is not None
    assert report.restored_step > 12
    restored, captured = run.states[19], run.states[report.restored_step]
    assert all(torch.equal(a, b) for a, b in zip(restored, captured, strict=True))


def test_cleared_optimizer_state_comes_back() -> None:
    run = Guarded(snapshot_interval=100)
    for i in range(1, 4):
        run.step(i)
    run.governor.snapshot()
    run.step(4)
    run.governor.synchronize()
    for i in (5, 7):
        run.governor.wait()
        run.optimizer.state.clear()
        run.step(i)
        run.step(i + 1, poison=True)
        run.governor.synchronize()
        assert {float(state["step"]) for state in run.optimizer.state.values()} == {3.0}


def test_seeds_that_come_and_go_leave_no_memory_behind() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), SeedSlot("middle"), nn.Linear(8, 2)).cuda()
    slot, x = model[1], torch.ones(4, 8, device="cuda")
    assert isinstance(slot, SeedSlot)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    governor = TolariaGovernor(model, optimizer, config=GovernorConfig(snapshot_interval=4, probation=1))

    def steps(*optimizers: torch.optim.Optimizer) -> None:
        for _ in range(10):
            loss = model(x).square().mean()
            for each in optimizers:
                each.zero_grad(set_to_none=False)
            loss.backward()
            for each in optimizers:
                each.step()
            governor.step(loss)

    sizes = []
    for _ in range(16):
        seed = slot.germinate(lambda _: nn.Linear(8, 8).cuda(), model[0](x).detach(), rng_seed=1)
        slot.start_training()
        own = torch.optim.AdamW(seed.parameters(), fused=True)
        governor.add_optimizer(own)
        steps(optimizer, own)
        governor.remove_optimizer(own)
        slot.cull()
        steps(optimizer)
        sizes.append((governor._engine.slots.nbytes, len(governor._engine.slots.places)))
    # While a capture that may come back holds the seed before, the next one needs room of its own.
    assert max(nbytes for nbytes, _ in sizes) <= 1.25 * sizes[1][0]
    assert sizes[-1][1] == sizes[1][1]


def test_host_far_behind_loses_no_rollback_though_the_ring_is_tiny(schedule: str) -> None:
    run = Guarded(event_capacity=3, lr_factor=0.5, max_rollbacks=1000)
    scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda _: 1.0)
    run.governor._engine.covered.schedulers.append(scheduler)
    for i in range(1, 121):
        run.step(i, poison=i in (50, 51, 100))
    run.governor.synchronize()
    assert run.governor.rollback_count == 3
    report = run.governor.last_report
    assert report is not None
    assert report.rollback_count == 3
    rates = {run.optimizer.param_groups[0]["lr"]}
    scheduler.step()
    assert rates == {run.optimizer.param_groups[0]["lr"]}
    assert rates == {1e-3 / 8}


def test_loading_a_governor_is_no_rollback() -> None:
    run = Guarded()
    scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 10)
    run.governor._engine.covered.schedulers.append(scheduler)
    for i in range(1, 8):
        run.step(i, poison=i == 7)
    run.governor.synchronize()
    run.governor.load_state_dict(run.governor.state_dict())
    assert run.governor.rollback_count == 1
    for i in range(8, 20):
        run.step(i)
        scheduler.step()
    run.governor.synchronize()
    assert scheduler.last_epoch == 12
    assert run.governor.rollback_count == 1


def test_no_memory_for_a_new_engine_leaves_the_governor_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Guarded()
    run.step(1)
    other = TolariaGovernor(linear(), [], config=run.governor.config.replace(window=24))
    saved, before = other.state_dict(), dict(vars(run.governor)) | vars(run.governor._attached)

    def exhausted(nbytes: int) -> Tensor:
        raise MemoryError("no pages left")

    real = slot_memory._page_locked
    monkeypatch.setattr(
        slot_memory, "_page_locked", lambda nbytes: real(nbytes) if nbytes < 1e5 else exhausted(nbytes)
    )
    with pytest.raises(SnapshotError, match="page-locked memory"):
        run.governor.load_state_dict(saved, keep_config=False)
    monkeypatch.undo()
    assert vars(run.governor) | vars(run.governor._attached) == before
    gc.collect()
    for i in range(2, 12):
        run.step(i, poison=i == 11)
    run.governor.synchronize()
    assert run.governor.rollback_count == 1
