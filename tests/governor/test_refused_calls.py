"""A call that is refused or fails leaves everything as it was: slots, candidate, counters, host parts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tolaria
from tolaria import _extension
from tolaria.governor import GovernorConfig, TolariaGovernor
from tolaria.governor.device_engine import DeviceEngine
from tolaria.governor.host_engine import HostEngine
from tolaria.snapshot import slots as slot_memory


@pytest.fixture(
    params=["reference", "fused", pytest.param("cuda", marks=pytest.mark.cuda)],
)
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device, under each backend that serves it."""
    if request.param == "reference":
        with tolaria.backend("reference"):
            yield "cpu"
        return
    if not _extension.LOADED:
        pytest.skip("needs the compiled extension")
    yield "cuda" if request.param == "cuda" else "cpu"


class Run:
    """A guarded run with a scheduler, an extra and a healthy candidate on probation."""

    def __init__(self, device: str) -> None:
        self.model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(device)
        options = {"capturable": True} if device == "cuda" else {}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, **options)  # type: ignore[arg-type]
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3)
        config = GovernorConfig(snapshot_interval=1000, probation=5, lr_factor=0.5)
        self.governor = TolariaGovernor(
            self.model, self.optimizer, config=config, schedulers=[self.scheduler]
        )
        self.x = torch.ones(4, 4, device=device)
        for _ in range(3):
            self.step()
        self.governor.execute_rollback()
        for _ in range(3):
            self.step()
        self.governor.snapshot()
        self.step()
        self.governor.synchronize()

    def step(self) -> None:
        loss = self.model(self.x).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.governor.step(loss)
        self.scheduler.step()

    def everything(self) -> dict[str, Any]:
        """What must not change, as values that compare."""
        governor = self.governor
        governor._engine.synchronize()
        engine = governor._engine
        found: dict[str, Any] = {
            "state": governor._attached.row.state.cpu().view(torch.int64).tolist(),
            "settings": governor._attached.row.settings.cpu().view(torch.int64).tolist(),
            "mailbox": governor._attached.row.mailbox.view(torch.int64).tolist(),
            "places": [(key, place.is_live) for key, place in engine.slots.places.items()],
            "slots": [_bytes(slot) for place in engine.slots.places.values() for slot in place.slots],
            "live": [_bytes(place.live) for place in engine.slots.places.values()],
            "table": engine.slots.table.data[: 2 + len(engine.slots.places)].tolist(),
            "exempt": set(engine.slots.exempt),
            "covered": [list(map(id, engine.covered.optimizers)), list(map(id, engine.covered.schedulers))],
            "policy": governor._attached.policy.saved_form(),
            "rates": [group["lr"] for group in self.optimizer.param_groups],
            "rollbacks": (engine.covered.lowered.times, engine.covered.lowered.reflected),
            "latest": governor._latest,
            "report": governor.last_report,
            "config": (governor.config, governor.random_guess_loss),
            "hooks": len(self.optimizer._optimizer_step_pre_hooks),  # type: ignore[attr-defined]
        }
        if isinstance(engine, HostEngine):
            found["parts"] = list(map(id, engine._transfer._host))
        if isinstance(engine, DeviceEngine):
            found["parts"] = [(k.ticket, k.step, id(k.host)) for k in engine._parts._kept]
            found["judged"] = engine._judged
        return found


def _bytes(tensor: Tensor) -> list[int]:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).tolist()


@contextlib.contextmanager
def poisoned(run: Run) -> Iterator[None]:
    """A parameter is NaN for a while."""
    weight = run.model[0].weight
    assert isinstance(weight, Tensor)
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = float("nan")
        yield
        weight.copy_(kept)


@contextlib.contextmanager
def mute(run: Run) -> Iterator[None]:
    """The scheduler cannot say its state for a while."""

    def refuse() -> dict[str, Any]:
        raise OSError("no state today")

    run.scheduler.state_dict = refuse  # type: ignore[method-assign]
    yield
    del run.scheduler.state_dict


@contextlib.contextmanager
def uncopyable(run: Run) -> Iterator[None]:
    """The optimizer holds state that no capture can copy."""
    weight = run.model[0].weight
    state = run.optimizer.state[weight]  # type: ignore[index]
    state["odd"] = torch.zeros(70_000, 2, device=run.x.device)[:, 0]  # too many pieces
    yield
    del state["odd"]


@contextlib.contextmanager
def nothing(run: Run) -> Iterator[None]:
    yield


@contextlib.contextmanager
def no_memory(run: Run) -> Iterator[None]:
    """No memory is left for slots."""

    def exhausted(*_: object) -> Tensor:
        raise tolaria.errors.SnapshotError("no memory left")

    real = slot_memory.allocate
    slot_memory.allocate = exhausted
    yield
    slot_memory.allocate = real


def load_another_window(run: Run) -> None:
    other = TolariaGovernor(nn.Linear(1, 1), [], config=run.governor.config.replace(window=24))
    run.governor.load_state_dict(other.state_dict(), keep_config=False)


def odd_optimizer(run: Run) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD([nn.Parameter(run.x.clone())], lr=0.1)
    optimizer.state[optimizer.param_groups[0]["params"][0]]["odd"] = torch.eye(4).to_sparse().to(run.x.device)
    return optimizer


Trouble = Callable[[Run], contextlib.AbstractContextManager[None]]
REFUSED: dict[str, tuple[Trouble, Callable[[Run], object]]] = {
    "step: words": (nothing, lambda r: r.governor.step("0.1")),  # type: ignore[arg-type]
    "step: shape": (nothing, lambda r: r.governor.step(r.x[0])),
    "step: integers": (nothing, lambda r: r.governor.step(torch.ones((), dtype=torch.int64).to(r.x.device))),
    "step: flag": (nothing, lambda r: r.governor.step(1.0, nonfinite="no")),  # type: ignore[arg-type]
    "step: flag's dtype": (nothing, lambda r: r.governor.step(1.0, nonfinite=r.x[0, :1].long())),
    "step: flag's shape": (nothing, lambda r: r.governor.step(1.0, nonfinite=r.x[0] > 0)),
    "step: norm": (nothing, lambda r: r.governor.step(1.0, gradient_norm="big")),  # type: ignore[arg-type]
    "step: norm's shape": (nothing, lambda r: r.governor.step(1.0, gradient_norm=r.x[0])),
    "check: shape": (nothing, lambda r: r.governor.check_vital_signs(r.x[0])),
    "check: words": (nothing, lambda r: r.governor.check_vital_signs("0.1")),  # type: ignore[arg-type]
    "reset: NaN": (poisoned, lambda r: r.governor.reset()),
    "reset: mute": (mute, lambda r: r.governor.reset()),
    "reset: uncopyable": (uncopyable, lambda r: r.governor.reset()),
    "snapshot: mute": (mute, lambda r: r.governor.snapshot()),
    "snapshot: uncopyable": (uncopyable, lambda r: r.governor.snapshot()),
    "structure: uncopyable": (uncopyable, lambda r: r.governor.notify_structure_changed()),
    "load: nothing": (nothing, lambda r: r.governor.load_state_dict(None)),  # type: ignore[arg-type]
    "load: empty": (nothing, lambda r: r.governor.load_state_dict({})),
    "load: NaN": (poisoned, lambda r: r.governor.load_state_dict(r.governor.state_dict())),
    "load: mute": (mute, lambda r: r.governor.load_state_dict(r.governor.state_dict())),
    "load: no memory": (no_memory, lambda r: load_another_window(r)),
    "load: NaN, another window": (poisoned, lambda r: load_another_window(r)),
    "load: mute, another window": (mute, lambda r: load_another_window(r)),
    "add: no optimizer": (nothing, lambda r: r.governor.add_optimizer("adam")),  # type: ignore[arg-type]
    "add: uncopyable": (nothing, lambda r: r.governor.add_optimizer(odd_optimizer(r))),
    "add: no scheduler": (nothing, lambda r: r.governor.add_scheduler(3)),  # type: ignore[arg-type]
    "add: no sink": (nothing, lambda r: r.governor.add_sink(3)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_call_leaves_everything_as_it_was(name: str, place: str) -> None:
    run = Run(place)
    trouble, call = REFUSED[name]
    run.governor.poll()
    before = run.everything()
    with trouble(run), pytest.raises((ValueError, TypeError, RuntimeError)):
        call(run)
    after = run.everything()
    assert {key for key in before if before[key] != after[key]} == set()
    assert run.governor.poll() == []
    # and the candidate goes its way: it is promoted, and is what a rollback brings back
    for _ in range(5):
        run.step()
    run.governor.synchronize()
    assert run.governor.last_good_step == 6
    assert run.governor.execute_rollback().restored_step == 6
    assert all(bool(torch.isfinite(p).all()) for p in run.model.parameters())


def test_a_verdict_may_still_be_acted_on_after_a_refused_call(place: str) -> None:
    run = Run(place)
    verdict = run.governor.check_vital_signs(1.0)
    with pytest.raises(ValueError, match="loss: expected one value"):
        run.governor.step(run.x[0])
    with pytest.raises(ValueError, match="nonfinite: expected None"):
        run.governor.step(verdict, nonfinite=True)
    run.governor.step(verdict)


def test_a_refused_attach_leaves_the_row_as_it_was(place: str) -> None:
    bank = tolaria.GovernorBank(3, device=place)
    losses = torch.ones(3, device=place)
    for _ in range(4):
        bank.step(losses)
    model = nn.Linear(2, 2).to(place)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    before = bank._state.cpu().view(torch.int64).tolist(), bank._mailbox.view(torch.int64).tolist()
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        bank.attach(1, model, optimizer)
    with torch.no_grad():
        model.weight.fill_(1.0)
    scheduler.state_dict = lambda: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(tolaria.errors.SnapshotError):
        bank.attach(1, model, optimizer, schedulers=[scheduler])
    after = bank._state.cpu().view(torch.int64).tolist(), bank._mailbox.view(torch.int64).tolist()
    assert before == after
    assert not optimizer._optimizer_step_pre_hooks  # type: ignore[attr-defined]
    assert bank.poll() == []
    del scheduler.state_dict
    bank.attach(1, model, optimizer, schedulers=[scheduler])
    with pytest.raises(ValueError, match="loss"):
        bank.step(torch.ones(2, device=place))
    assert bank.step(losses).tolist() == [0.0] * 3
