"""Ctrl-C at any line of a call on CUDA: all parts are of one moment after it, or after the next call."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.device_run import usual_schedule
from tests.interrupting import CALLS, Counter, Interruption
from tolaria.governor import GovernorConfig, TolariaGovernor
from tolaria.governor.seed_flags import SeedFlags

pytestmark = pytest.mark.cuda

EVERY = int(os.environ.get("TOLARIA_INTERRUPT_EVERY", "311"))
"""One line of so many is tried; 1: all of them, which takes an hour or two."""


class Run:
    """A state that says everywhere which one it is: attached as 1, and 2 since then."""

    def __init__(self, *, capturable: bool, interval: int = 1000) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1.0, capturable=capturable)
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1000)
        self.extra = Counter()
        self.mark(1.0)
        self.governor = TolariaGovernor(
            self.model,
            self.optimizer,
            schedulers=[self.scheduler],
            extras={"extra": self.extra},
            config=GovernorConfig(
                snapshot_interval=interval, probation=2, max_restores_of_one_capture=1000, max_rollbacks=1000
            ),
        )
        self.mark(2.0)

    def tensors(self) -> list[Tensor]:
        moments = [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        return [*self.model.parameters(), self.model[1].running_mean, *moments]

    def mark(self, value: float) -> None:
        with torch.no_grad():
            for tensor in self.tensors():
                tensor.fill_(value)
        self.optimizer.param_groups[0]["lr"] = value
        self.scheduler.last_epoch = int(value)
        self.extra.n = value

    def train(self) -> None:
        """A step that takes every part 16 further."""
        self.governor.wait()
        with torch.no_grad():
            for tensor in self.tensors():
                tensor.add_(16.0)
        self.optimizer.param_groups[0]["lr"] += 16.0
        self.scheduler.last_epoch += 16
        self.extra.n += 16.0

    def marks(self) -> set[float]:
        """What the parts say; one number if they are of one state."""
        torch.cuda.synchronize()
        found = {value for tensor in self.tensors() for value in tensor.detach().flatten().tolist()}
        rate = self.optimizer.param_groups[0]["lr"]
        return found | {rate, float(self.scheduler.last_epoch), self.extra.n}

    def marks_after_a_rollback(self) -> set[float]:
        self.mark(3.0)
        with torch.no_grad():
            self.model[0].weight.fill_(math.nan)
        self.governor.step(math.nan)
        self.governor.synchronize()
        return self.marks()


def prepared_step_that_captures(run: Run) -> Callable[[], Any]:
    for _ in range(3):
        run.governor.step(1.0)
    return lambda: run.governor.step(1.0)


def prepared_second_rollback(run: Run) -> Callable[[], Any]:
    run.governor.execute_rollback()
    run.mark(2.0)
    return run.governor.execute_rollback


def prepared_late_news(run: Run) -> Callable[[], Any]:
    """The device has rolled back, and the host has heard nothing of it."""
    import vgpu  # type: ignore[import-not-found]

    vgpu.schedule("lazy")
    run.governor.step(math.nan)
    vgpu.run_all()
    vgpu.schedule(usual_schedule())
    return run.governor.poll


def prepared_growth(run: Run) -> Callable[[], Any]:
    run.model[1].register_buffer("more", torch.zeros(1, device="cuda"))
    return run.governor.notify_structure_changed


OWN_CALLS: dict[str, Callable[[Run], Callable[[], Any]]] = {
    "step_that_captures": prepared_step_that_captures,
    "second_rollback": prepared_second_rollback,
    "late_news": prepared_late_news,
    "growth": prepared_growth,
}

NEXT: dict[str, Callable[[Run], Any]] = {
    "step": lambda run: run.governor.step(1.0),
    "trained": lambda run: (run.train(), run.governor.step(1.0)),
    "execute_rollback": lambda run: run.governor.execute_rollback(),
    "snapshot": lambda run: run.governor.snapshot(),
}


def made(name: str, *, capturable: bool) -> tuple[Run, Callable[[], Any]]:
    run = Run(capturable=capturable, interval=4 if name == "step_that_captures" else 1000)
    return run, OWN_CALLS[name](run) if name in OWN_CALLS else CALLS[name](run.governor)


def pairs() -> Iterator[tuple[str, str]]:
    """A call and the next one. What a late host does to a step in between is documented."""
    for name in (*CALLS, *OWN_CALLS):
        yield from ((name, then) for then in NEXT if (name, then) != ("late_news", "trained"))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    vgpu = pytest.importorskip("vgpu", reason="makes news late by the virtual device's schedules")
    yield
    vgpu.schedule(usual_schedule())


@pytest.mark.parametrize("capturable", [False, True], ids=["counters_on_host", "capturable"])
@pytest.mark.parametrize(("name", "then"), list(pairs()))
def test_a_call_interrupted_at_any_line(name: str, capturable: bool, then: str) -> None:
    run, call = made(name, capturable=capturable)
    whole = Interruption()
    with whole.on():
        call()
    assert len(whole.places) > 50
    torn = []
    for at in range((list(NEXT).index(then) * 2 + capturable) * 37 % EVERY, len(whole.places), EVERY):
        run, call = made(name, capturable=capturable)
        interruption = Interruption(at)
        if not interruption.stops(call):
            continue
        failure = found(run, then)
        if failure:
            torn.append(f"{whole.named(at)}: {failure}")
    assert torn == [], "\n".join(torn)


def found(run: Run, then: str) -> str:
    """What is wrong with a run that was interrupted, once it has gone on."""
    try:
        NEXT[then](run)
        run.governor.synchronize()
        after = run.marks()
        for _ in range(4):
            run.governor.step(1.0)
        at_last = run.marks_after_a_rollback()
        again = run.marks_after_a_rollback()
    except (AssertionError, LookupError, RuntimeError, ValueError) as error:
        return repr(error)
    is_whole = all(len(marks) == 1 and marks <= {1.0, 2.0, 17.0, 18.0} for marks in (after, at_last, again))
    return "" if is_whole else f"{after}, then {at_last}, {again}"


@pytest.mark.parametrize("schedule", ["lazy", *(f"random:{n}" for n in range(6)), "starve:1", "starve:2"])
def test_a_capture_is_waited_for_though_nobody_noted_that_it_was_launched(schedule: str) -> None:
    import vgpu

    files = ("snapshot/flight.py", "governor/device_engine.py")
    run, whole = Run(capturable=True), Interruption(within=files)
    with whole.on():
        run.governor.snapshot()
    late = [at for at, (code, _) in enumerate(whole.places) if code.co_name in ("_fork", "launched")]
    assert len(late) > 8
    for at in late:
        run, interruption = Run(capturable=True), Interruption(at, within=files)
        torch.cuda.synchronize()
        vgpu.schedule(schedule)
        with interruption.on(), pytest.raises(KeyboardInterrupt):
            run.governor.snapshot()
        failure = found(run, "trained")
        vgpu.schedule(usual_schedule())
        assert not failure, f"{list(whole.places)[at]}: {failure}"


def test_a_search_of_a_seed_interrupted_at_any_bytecode_is_made_again() -> None:
    def interruption(at: int | None = None) -> Interruption:
        return Interruption(at, within=("governor/seed_flags.py",), in_detail={"search"})

    poisoned = [torch.full((3,), math.nan, device="cuda")]
    whole = interruption()
    with whole.on():
        SeedFlags(torch.device("cuda")).search("seed", poisoned)
    assert len(whole.places) > 30
    for at in range(len(whole.places)):
        flags = SeedFlags(torch.device("cuda"))
        with interruption(at).on(), contextlib.suppress(KeyboardInterrupt):
            flags.search("seed", poisoned)
        torch.cuda.synchronize()
        for _ in range(2):
            flags.search("seed", poisoned)
            torch.cuda.synchronize()
        assert flags.found("seed", poisoned), list(whole.places)[at]
