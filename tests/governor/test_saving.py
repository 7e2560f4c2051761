"""Last known good states on disk: written beside training, gone on from bit for bit."""

from __future__ import annotations

import copy
import json
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from tests.state_dicts import assert_same
from tolaria import GovernorBank, GovernorConfig, SnapshotError, TolariaGovernor, load_snapshot
from tolaria.errors import ConfigError
from tolaria.snapshot import persist

CONFIG = GovernorConfig(snapshot_interval=10, probation=2)


class Average:
    """An extra with a tensor and a number."""

    def __init__(self) -> None:
        self.value, self.n = torch.zeros(3), 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "n": self.n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.n = state["value"].clone(), state["n"]


class Run:
    def __init__(self, device: str = "cpu", config: GovernorConfig = CONFIG, seed: int = 0) -> None:
        torch.manual_seed(seed)
        layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2)
        self.model = nn.Sequential(*layers).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.1, total_steps=300)
        self.scaler = torch.amp.GradScaler(device, init_scale=128.0)
        self.average, self.device = Average(), device
        self.governor = TolariaGovernor(
            self.model,
            self.optimizer,
            config=config,
            schedulers=[self.schedule],
            scaler=self.scaler,
            extras={"average": self.average},
            num_classes=10,
        )
        self.losses: list[float] = []

    def train(self, steps: int) -> None:
        for _ in range(steps):
            loss = self.model(torch.randn(16, 6).to(self.device)).square().mean()
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.schedule.step()
            self.average.value = self.average.value + float(loss.detach())
            self.average.n += 1
            self.governor.step(loss)
            self.losses.append(float(loss.detach()))

    def state(self) -> dict[str, Any]:
        parts = (self.model, self.optimizer, self.schedule, self.scaler, self.average)
        return {type(part).__name__: copy.deepcopy(part.state_dict()) for part in parts}


@pytest.fixture
def may_write(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before it is set."""
    event, write = threading.Event(), persist.write

    def slowly(*arguments: Any, **options: Any) -> Path:
        assert event.wait(60)
        return write(*arguments, **options)

    monkeypatch.setattr(persist, "write", slowly)
    return event


@pytest.mark.parametrize("steps", [5, 12, 13, 30, 47])
def test_a_resumed_run_goes_on_bit_for_bit(device: torch.device, tmp_path: Path, steps: int) -> None:
    first = Run(device.type)
    first.train(steps)
    first.governor.synchronize()
    path = first.governor.save(tmp_path).result()
    at = first.governor.last_good_step
    assert path.name == f"step_{at:09d}"
    first.train(40)
    second = Run(device.type, seed=1)
    second.train(3)
    assert load_snapshot(tmp_path, second.governor)["step"] == at
    assert second.governor.step_count == at
    second.train(steps + 40 - at)
    assert second.losses[3:] == first.losses[at:]
    assert_same(second.state(), first.state())
    first.governor.synchronize()
    second.governor.synchronize()
    assert second.governor.history == first.governor.history
    assert second.governor.last_good_step == first.governor.last_good_step
    with torch.no_grad():
        second.model[0].weight.fill_(torch.nan)
    second.governor.execute_rollback()
    assert torch.isfinite(second.model[0].weight).all()


def test_the_last_good_state_as_dicts(device: torch.device) -> None:
    run = Run(device.type)
    run.train(20)
    run.governor.snapshot()
    captured = run.state()
    run.train(2)
    run.governor.synchronize()
    assert run.governor.last_good_step == 20
    run.train(5)
    said = run.governor.last_good_state_dict()
    assert said["step"] == 20
    assert_same(said["model"], captured["Sequential"])
    assert said["schedulers"] == [captured["OneCycleLR"]]
    assert said["extras"]["average"]["n"] == captured["Average"]["n"]
    assert said["scaler"] == captured["GradScaler"]
    json.dumps(said["governor"], allow_nan=False)
    other = Run(device.type, seed=2)
    other.model.load_state_dict(said["model"])
    other.optimizer.load_state_dict(said["optimizers"][0])
    other.governor.load_state_dict(said["governor"])
    assert other.governor.step_count == 20


def test_save_every_promotion(tmp_path: Path) -> None:
    run = Run(config=CONFIG.replace(save_every=1, save_path=str(tmp_path / "a")))
    run.train(44)
    run.governor.close()
    assert persist.newest(tmp_path / "a").name == "step_000000040"
    kept = sorted(path.name for path in (tmp_path / "a").glob("step_*"))
    assert len(kept) == 2
    run = Run(config=CONFIG.replace(save_every=3, save_path=str(tmp_path / "b")))
    run.train(44)
    run.governor.close()
    assert [path.name for path in (tmp_path / "b").glob("step_*")] == ["step_000000030"]


def test_a_slot_that_is_read_is_not_overwritten(tmp_path: Path, may_write: threading.Event) -> None:
    run = Run()
    run.train(12)
    wanted = run.governor.last_good_state_dict()
    future = run.governor.save(tmp_path)
    trained = threading.Thread(target=run.train, args=(25,))
    trained.start()
    trained.join(timeout=2)
    assert trained.is_alive(), "the second capture from here would overwrite the slot"
    assert not future.done()
    may_write.set()
    trained.join()
    assert future.result().name == "step_000000010"
    said = load_snapshot(tmp_path)
    assert_same(dict(said["model"]), dict(wanted["model"]))


def test_plain_torch_reads_what_is_written(tmp_path: Path) -> None:
    run = Run()
    run.train(12)
    said = run.governor.last_good_state_dict()
    path = run.governor.save(tmp_path).result()
    target: dict[str, Tensor] = {"model/0.weight": torch.empty(8, 6), "model/1.running_mean": torch.empty(8)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are no other ranks
        dcp.load(target, checkpoint_id=path, no_dist=True)
    assert_same(target["model/0.weight"], said["model"]["0.weight"])
    assert_same(target["model/1.running_mean"], said["model"]["1.running_mean"])


def test_a_frozen_base_is_not_written(tmp_path: Path) -> None:
    def build(seed: int) -> tuple[nn.Module, TolariaGovernor]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
        model[0].requires_grad_(False)
        optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
        return model, TolariaGovernor(model, optimizer, cover="trained")

    model, governor = build(0)
    path = governor.save(tmp_path).result()
    assert sum(f.stat().st_size for f in path.iterdir()) < 64 * 64 * 4 + 40_000
    other, resumed = build(1)
    base = other[0].weight.clone()
    load_snapshot(tmp_path, resumed)
    assert torch.equal(other[1].weight, model[1].weight)
    assert torch.equal(other[0].weight, base)
    assert "0.weight" not in load_snapshot(tmp_path)["model"]


def test_functions_and_schedules_of_functions_stay_those_of_the_program(tmp_path: Path) -> None:
    def build() -> tuple[torch.optim.Optimizer, TolariaGovernor]:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(
            [{"params": [model.weight], "hook": len}, {"params": [model.bias]}], lr=0.1
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        for _ in range(3):
            optimizer.step()
            schedule.step()
        return optimizer, TolariaGovernor(model, optimizer, schedulers=[schedule])

    _, governor = build()
    governor.save(tmp_path).result()
    optimizer, resumed = build()
    optimizer.param_groups[0]["lr"] = 9.0
    load_snapshot(tmp_path, resumed)
    assert optimizer.param_groups[0]["hook"] is len
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)


def wrong_size(run: Run) -> None:
    run.model[3] = nn.Linear(8, 3)


def no_scaler(run: Run) -> None:
    run.governor._engine.covered.scaler = None


def other_extras(run: Run) -> None:
    run.governor._engine.covered.extras["more"] = Average()


def one_more_optimizer(run: Run) -> None:
    run.governor.add_optimizer(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))


def refusing_extra(run: Run) -> None:
    def refuse(state: dict[str, Any]) -> None:
        if state["n"]:
            raise ValueError("not this one")

    run.average.load_state_dict = refuse  # type: ignore[method-assign]


@pytest.mark.filterwarnings("ignore::tolaria.UncoveredWarning")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wrong_size, r"(?s)model: it refused the saved state: .*size mismatch"),
        (no_scaler, "scaler: expected the GradScaler"),
        (other_extras, "extras: expected those that were saved"),
        (one_more_optimizer, "optimizers: expected as many as were saved, 1, got 2"),
        (refusing_extra, r"extras\['average'\]: it refused the saved state: not this one"),
    ],
)
def test_what_does_not_fit_changes_nothing(tmp_path: Path, change: Any, message: str) -> None:
    first = Run()
    first.train(12)
    first.governor.save(tmp_path).result()
    second = Run(seed=1)
    second.train(4)
    change(second)
    before, steps, draws = second.state(), second.governor.step_count, torch.get_rng_state()
    with pytest.raises(SnapshotError, match=message):
        load_snapshot(tmp_path, second.governor)
    assert_same(second.state(), before)
    assert second.governor.step_count == steps
    assert torch.equal(torch.get_rng_state(), draws)


def test_arguments_are_what_they_should_be(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="governor: expected TolariaGovernor or None, got Linear"):
        load_snapshot(tmp_path, nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="restore_rng: expected a bool"):
        load_snapshot(tmp_path, restore_rng="yes")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="path: expected"):
        load_snapshot(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="config: expected save_every=0"):
        GovernorBank(2, config=GovernorConfig(save_every=1, save_path=str(tmp_path)))


def test_what_is_no_saved_state(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(SnapshotError):
            load_snapshot(path)
    persist.write(tmp_path, 3, {"x": torch.ones(1)}, {"kind": "something else"})
    with pytest.raises(SnapshotError, match="expected a state that TolariaGovernor"):
        load_snapshot(tmp_path)


def test_a_state_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    class Odd(Average):
        def state_dict(self) -> dict[str, Any]:
            return {"thing": {"deep": object.__new__(Thing)}}

    class Thing:
        pass

    model = nn.Linear(2, 2)
    governor = TolariaGovernor(model, torch.optim.SGD(model.parameters(), lr=0.1), extras={"odd": Odd()})
    with pytest.raises(SnapshotError, match=r"extras/odd/thing/deep: .*got a Thing, which cannot be written"):
        governor.save(tmp_path).result()
    assert persist.newest(tmp_path) is None


def test_a_failure_by_itself_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    run = Run(config=CONFIG.replace(save_every=1, save_path=str(tmp_path / "file")))
    run.train(18)
    with pytest.warns(RuntimeWarning, match="a state could not be saved"):
        run.governor.close()


def test_a_path_is_one_and_is_that_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    with pytest.raises(TypeError, match="path: expected a path, got int"):
        run.governor.save(3)  # type: ignore[arg-type]
    for nowhere in ("", "a\0b"):
        with pytest.raises(ValueError, match="path: expected a path, got"):
            run.governor.save(nowhere)
        with pytest.raises(ValueError, match="path: expected a path, got"):
            load_snapshot(nowhere)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    future = run.governor.save("here")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert future.result() == tmp_path / "here" / "step_000000000"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"save_every": 1}, "save_path: expected a folder, since save_every is set"),
        ({"save_every": -1}, "save_every: expected an integer of at least 0"),
        ({"save_path": 3}, "save_path: expected a path as a string"),
        ({"save_path": "", "save_every": 1}, "save_path: expected a path as a string"),
    ],
)
def test_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GovernorConfig(**fields)


@pytest.mark.cuda
def test_slots_on_the_device_are_copied_first(tmp_path: Path) -> None:
    run = Run("cuda", config=CONFIG.replace(storage="device"))
    run.train(12)
    wanted = run.governor.last_good_state_dict()
    run.governor.save(tmp_path).result()
    assert_same(dict(load_snapshot(tmp_path)["model"]), dict(wanted["model"]))


@pytest.mark.cuda
def test_replays_that_overwrite_the_slot_do_not_disturb_a_save(
    tmp_path: Path, may_write: threading.Event
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 2).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, capturable=True)
    config = GovernorConfig(snapshot_interval=4, probation=1)
    governor = TolariaGovernor(model, optimizer, config=config)
    x = torch.randn(16, 6).cuda()

    def step() -> None:
        loss = model(x).square().mean()
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.step()
        governor.step(loss)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    governor.wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(8):
        graph.replay()
    wanted = governor.last_good_state_dict()
    future = governor.save(tmp_path)
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    may_write.set()
    future.result()
    said = load_snapshot(tmp_path)
    assert said["step"] == wanted["step"] > 0
    assert_same(dict(said["model"]), dict(wanted["model"]))
    governor.synchronize()
    assert governor.last_good_step > wanted["step"]


@pytest.mark.cuda
def test_an_extra_with_tensors_on_the_device(tmp_path: Path) -> None:
    model, average = nn.Linear(2, 2).cuda(), Average()
    average.value = torch.arange(3.0, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = TolariaGovernor(model, optimizer, extras={"average": average})
    governor.save(tmp_path).result()
    for said in (load_snapshot(tmp_path), governor.last_good_state_dict()):
        assert said["extras"]["average"]["value"].is_cpu
        assert said["extras"]["average"]["value"].tolist() == [0.0, 1.0, 2.0]
