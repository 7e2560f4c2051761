"""Sinks and other threads: what the run needs is done first, and in the thread that trains."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tolaria
from tolaria.errors import TolariaError
from tolaria.governor import (
    GovernorBank,
    GovernorConfig,
    GovernorEvent,
    RollbackEvent,
    StructureEvent,
    TolariaGovernor,
)
from tolaria.ops import StatusField, governor_mailbox, governor_state, governor_step_
from tolaria.snapshot.host_parts import HostParts


class Interrupting:
    """A sink in which Ctrl-C arrives once, at an event of one kind."""

    def __init__(self, kind: type[GovernorEvent], error: type[BaseException]) -> None:
        self.kind, self.error = kind, error
        self.seen: list[GovernorEvent] = []

    def __call__(self, event: GovernorEvent) -> None:
        self.seen.append(event)
        if isinstance(event, self.kind) and self.error is not OSError:
            self.kind = type(None)  # type: ignore[assignment]
            raise self.error("now")
        if isinstance(event, self.kind):
            raise self.error("now")


def guarded(device: str, *sinks: Callable[[GovernorEvent], object], **settings: Any) -> tuple[Any, ...]:
    model = nn.Linear(4, 4).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    config = GovernorConfig(lr_factor=0.5, snapshot_interval=100, max_rollbacks=10**6, **settings)
    return model, optimizer, TolariaGovernor(model, optimizer, config=config, sinks=sinks)


def number(value: float, device: str) -> Tensor:
    return torch.tensor(value, device=device)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def place(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError])
def test_policy_and_restore_come_before_the_sinks(error: type[BaseException], place: str) -> None:
    late: list[GovernorEvent] = []
    sink = Interrupting(RollbackEvent, error)
    model, optimizer, governor = guarded(place, sink, late.append)
    kept = model.weight.detach().clone()
    governor.step(number(1.0, place))
    with torch.no_grad():
        model.weight.fill_(5.0)
    model.weight.grad = torch.ones_like(model.weight)
    interrupted = 0
    for value in (float("nan"), 1.0, 1.0):
        try:
            governor.step(number(value, place))
            governor.synchronize()
        except (KeyboardInterrupt, SystemExit):
            interrupted += 1
    assert interrupted == (0 if error is OSError else 1)
    assert governor.rollback_count == 1
    assert torch.equal(model.weight, kept)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert model.weight.grad is None or not bool(model.weight.grad.any())
    assert [type(e) for e in late].count(RollbackEvent) == 1, "the other sinks hear of it, too"


def test_a_structure_event_is_told_after_the_restore(place: str) -> None:
    sink = Interrupting(StructureEvent, KeyboardInterrupt)
    model, optimizer, governor = guarded(place, sink)
    governor.step(number(1.0, place))
    kept = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.fill_(5.0)
    model.register_buffer("more", torch.ones(3, device=place))

    def fail() -> None:
        governor.step(number(float("nan"), place))
        governor.synchronize()

    with pytest.raises(KeyboardInterrupt):
        fail()
    governor.synchronize()
    assert torch.equal(model.weight, kept)
    assert governor.rollback_count == 1
    governor.step(number(1.0, place))
    governor.synchronize()
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert any(isinstance(e, RollbackEvent) for e in sink.seen)


def test_in_a_bank_policy_and_restores_of_all_rows_come_before_the_sinks(place: str) -> None:
    sink = Interrupting(RollbackEvent, KeyboardInterrupt)
    config = GovernorConfig(lr_factor=0.5, max_rollbacks=100)
    bank = GovernorBank(2, config=config, sinks=[sink], device=place)
    rows = []
    for i in range(2):
        model = nn.Linear(2, 2).to(place)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        bank.attach(i, model, optimizer)
        rows.append((model, optimizer, model.weight.detach().clone()))
    for model, *_ in rows:
        with torch.no_grad():
            model.weight.fill_(5.0)
    losses = torch.full((2,), float("nan"), device=place)

    def fail() -> None:
        bank.step(losses)
        if place == "cuda":
            torch.cuda.synchronize()
        bank.poll()

    with pytest.raises(KeyboardInterrupt):
        fail()
    if place == "cuda":
        torch.cuda.synchronize()
    bank.poll()
    assert all(torch.equal(model.weight, kept) for model, _, kept in rows)
    assert [optimizer.param_groups[0]["lr"] for _, optimizer, _ in rows] == [0.5, 0.5]
    assert sum(isinstance(e, RollbackEvent) for e in sink.seen) == 2


def test_a_sink_may_poll() -> None:
    polled: list[GovernorEvent] = []
    _, _, governor = guarded("cpu")
    governor.add_sink(lambda event: polled.extend(governor.poll()))
    governor.poll()
    governor.step(torch.tensor(float("nan")))
    assert [e.kind for e in polled] == ["verdict", "rollback"]


def test_polling_from_another_thread_loses_nothing(place: str) -> None:
    told: list[GovernorEvent] = []
    _, optimizer, governor = guarded(place, max_restores_of_one_capture=10**6)
    governor.poll()
    done = threading.Event()

    def poll() -> None:
        while not done.is_set():
            told.extend(governor.poll())

    threads = [threading.Thread(target=poll) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for i in range(40):
            governor.step(number(float("nan") if i % 4 == 3 else 1.0, place))
        told += governor.synchronize()
        governor.step(number(1.0, place))
    finally:
        done.set()
        for thread in threads:
            thread.join()
    told += governor.poll()
    assert governor.rollback_count == 10
    assert optimizer.param_groups[0]["lr"] == 0.5**10
    assert sum(isinstance(e, RollbackEvent) for e in told) == 10


def test_what_one_thread_follows_no_other_follows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer, governor = guarded("cpu")
    follower = governor._attached.follower
    begun, may_go_on, hear = threading.Event(), threading.Event(), follower.policy.hear

    def wait_and_hear(event: GovernorEvent, covered: Any) -> None:
        begun.set()
        assert may_go_on.wait(60)
        hear(event, covered)

    monkeypatch.setattr(follower.policy, "hear", wait_and_hear)
    thread = threading.Thread(target=lambda: governor.step(number(float("nan"), "cpu")))
    thread.start()
    try:
        assert begun.wait(60)
        follower.follow(waits=False)  # as poll() does
    finally:
        may_go_on.set()
        thread.join()
    assert not follower._heard
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_two_threads_inside_calls_are_an_error() -> None:
    model, _, governor = guarded("cpu")
    begun, errors = threading.Event(), []
    may_end = threading.Event()

    def stop_here(event: GovernorEvent) -> None:
        begun.set()
        assert may_end.wait(60)

    def step() -> None:
        governor.step(torch.tensor(float("nan")))

    governor.poll()
    governor.add_sink(stop_here)
    thread = threading.Thread(target=step)
    thread.start()
    try:
        assert begun.wait(60)
        for call in (governor.snapshot, governor.execute_rollback, governor.reset, governor.close, step):
            with pytest.raises(TolariaError, match="two threads are inside its calls") as caught:
                call()
            errors.append(caught.value)
    finally:
        may_end.set()
        thread.join()
    assert len(errors) == 5
    governor.snapshot()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_two_threads_inside_calls_of_a_bank_are_an_error() -> None:
    begun, may_end = threading.Event(), threading.Event()

    def stop_here(event: GovernorEvent) -> None:
        if isinstance(event, RollbackEvent):
            begun.set()
            assert may_end.wait(60)

    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bank = GovernorBank(2, sinks=[stop_here])
    bank.attach(0, model, optimizer)
    thread = threading.Thread(target=lambda: bank.step(torch.tensor([math.nan, 1.0])))
    thread.start()
    try:
        assert begun.wait(60)
        for call in (
            lambda: bank.attach(1, model, optimizer),
            lambda: bank.detach(0),
            lambda: bank.step(torch.ones(2)),
        ):
            with pytest.raises(TolariaError, match="two threads are inside its calls"):
                call()
    finally:
        may_end.set()
        thread.join()
    assert bank.step(torch.ones(2)).tolist() == [0.0, 0.0]


def test_a_governor_says_that_it_cannot_be_copied() -> None:
    import copy

    with pytest.raises(TypeError, match="cannot be copied or pickled; make a new one"):
        copy.deepcopy(guarded("cpu")[2])


@pytest.mark.parametrize("mode", ["reference", "auto"])
def test_a_clean_judgement_writes_one_status_word(mode: str) -> None:
    with tolaria.backend(mode):  # type: ignore[arg-type]
        for n in (1, 40):  # one alone, and side by side in vector lanes
            state, mailbox = governor_state(n), governor_mailbox(n)
            config = GovernorConfig().to_tensor(None, "cpu")
            governor_step_(state, config, torch.ones(n), mailbox=mailbox)
            words = mailbox[:, : len(StatusField)]
            words.fill_(77.0)
            governor_step_(state, config, torch.ones(n), mailbox=mailbox)
            expected = torch.full_like(words, 77.0)
            expected[:, StatusField.step] = 2.0
            assert torch.equal(words, expected)


class Parts:
    """Stands for host-side parts."""

    keys: frozenset[object] = frozenset()


def test_host_parts_go_by_ticket_and_replays_by_capture() -> None:
    parts, made = HostParts(), [Parts() for _ in range(6)]
    of_now: Callable[[], Any] = iter(made[3:]).__next__
    tickets = [parts.issue(host, step) for step, host in enumerate(made[:3])]  # type: ignore[arg-type]
    assert tickets == [1, 2, 3]
    parts.heard(1, 1, 0, of_now)
    parts.heard(2, 3, 2, of_now)  # ticket 2 met no order
    assert [parts.of(0, t) for t in (1, 2, 3)] == made[:3]
    parts.heard(3, 0, 9, of_now)  # a replay's
    parts.heard(3, 0, 9, of_now)
    assert parts.of(3, 0) is made[3]
    assert parts.of(5, 0) is made[3], "nobody heard of capture 5: the last before it"
    parts.confirm(2, 3)
    assert parts.of(2, 3) is made[2]
    assert parts.of(3, 0) is made[3]
    parts.confirm(3, 0)
    assert parts.of(2, 3) is made[3], "it is gone"
    for step in range(2000):
        parts.issue(Parts(), step)  # type: ignore[arg-type]
        parts.confirm(3, 0)
    assert parts.of(3, 0) is made[3]
    assert len(parts._kept) < 600
