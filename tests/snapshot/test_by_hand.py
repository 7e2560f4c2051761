"""``tolaria.Snapshot``: captures and restores without a governor."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from tests.device_run import no_host_sync
from tests.interrupting import Interruption
from tests.state_dicts import assert_same
from tolaria import GovernorConfig, MorphogeneticModel, SeedStage, Snapshot, TolariaGovernor
from tolaria.errors import SnapshotError, TolariaError

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "adam_on_device": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "rate_in_a_tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), foreach=False),
    "groups": lambda p: torch.optim.AdamW([{"params": p[:1], "lr": 0.1}, {"params": p[1:]}], lr=0.01),
}


def host(device: torch.device | str = "cpu") -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2)).to(device)


class Run:
    def __init__(self, device: torch.device | str = "cpu", optimizer: str = "adamw", **options: Any) -> None:
        self.model = host(device)
        self.optimizer = OPTIMIZERS[optimizer](list(self.model.parameters()))
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 50)
        self.device = torch.device(device)
        self.train(2)
        self.snapshot = Snapshot(
            self.model, self.optimizer, schedulers=[self.schedule], restore_rng=True, **options
        )

    def train(self, steps: int) -> None:
        for _ in range(steps):
            loss = self.model(torch.randn(16, 6).to(self.device)).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()

    def state(self) -> dict[str, Any]:
        parts = (self.model, self.optimizer, self.schedule)
        return {type(part).__name__: copy.deepcopy(part.state_dict()) for part in parts}

    def wreck(self) -> None:
        self.train(3)
        with torch.no_grad():
            for tensor in [*self.model.parameters(), *self.model.buffers()]:
                tensor.fill_(float("nan") if tensor.is_floating_point() else 7)
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.fill_(3.0)
        self.optimizer.param_groups[0]["weight_decay"] = 0.5


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_back_to_the_capture_bit_for_bit_and_on_from_there(
    device: torch.device, optimizer: str, slots: int
) -> None:
    run = Run(device, optimizer, slots=slots)
    for _ in range(3):  # into either slot
        run.train(1)
        run.snapshot.capture()
        captured = run.state()
        addresses = [p.data_ptr() for p in run.model.parameters()]
        run.train(4)
        ahead = run.state()
        for _ in range(2):
            run.wreck()
            run.snapshot.restore()
            assert_same(run.state(), captured)
            run.train(4)
            assert_same(run.state(), ahead)
        assert [p.data_ptr() for p in run.model.parameters()] == addresses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_state_dict_is_that_of_the_capture(device: torch.device, optimizer: str) -> None:
    run = Run(device, optimizer)
    run.snapshot.capture()
    captured = run.state()
    run.wreck()
    now = run.state()
    said = run.snapshot.state_dict()
    assert_same(said["model"], captured["Sequential"])
    (of_optimizer,) = said["optimizers"]
    assert_same(of_optimizer["param_groups"], captured[type(run.optimizer).__name__]["param_groups"])
    state = captured[type(run.optimizer).__name__]["state"]
    assert list(of_optimizer["state"]) == list(state)
    for index, values in state.items():
        assert_same(of_optimizer["state"][index], values)
    assert_same(said["schedulers"], [captured["CosineAnnealingLR"]])
    for part, value in now.items():  # and telling it has touched nothing
        live = {type(p).__name__: p for p in (run.model, run.optimizer, run.schedule)}[part]
        assert_same(live.state_dict(), value)
    fresh = Run("cpu", optimizer)
    fresh.model.load_state_dict(said["model"])
    fresh.optimizer.load_state_dict(of_optimizer)
    run.snapshot.restore()
    assert_same(fresh.optimizer.state_dict()["param_groups"], run.optimizer.state_dict()["param_groups"])


def test_state_that_is_there_and_empty_stays_so() -> None:
    parameter = nn.Parameter(torch.ones(2))
    model, optimizer = nn.ParameterList([parameter]), torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter] = {}
    snapshot = Snapshot(model, optimizer)
    snapshot.capture()
    before = copy.deepcopy(optimizer.state_dict())
    assert before["state"] == {0: {}}
    optimizer.state.clear()
    assert_same(snapshot.state_dict()["optimizers"][0], before)
    optimizer.state[parameter] = {"late": 1}
    snapshot.restore()
    assert_same(optimizer.state_dict(), before)


def test_without_optimizers_and_as_one_function(device: torch.device) -> None:
    model = host(device)
    snapshot = Snapshot(model)
    snapshot.capture()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[0].weight.mul_(2)
    snapshot.restore()
    assert_same(model.state_dict(), before)
    assert snapshot.state_dict()["optimizers"] == []


def test_memory_is_taken_once_and_two_slots_are_twice_as_much() -> None:
    one, two = Run(slots=1), Run(slots=2)
    assert two.snapshot.nbytes == 2 * one.snapshot.nbytes
    run = two
    covered = [*run.model.state_dict().values()]
    covered += [v for s in run.optimizer.state_dict()["state"].values() for v in s.values()]
    assert run.snapshot.nbytes >= 2 * sum(t.numel() * t.element_size() for t in covered)
    before = [memory.data_ptr() for memory in run.snapshot._base.slots.segments]
    for _ in range(3):
        run.snapshot.capture()
        run.train(1)
        run.snapshot.restore()
    assert [memory.data_ptr() for memory in run.snapshot._base.slots.segments] == before


def test_random_numbers_go_back_only_if_asked_for() -> None:
    def draws() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    for restore_rng in (True, False):
        snapshot = Snapshot(host(), restore_rng=restore_rng)
        snapshot.capture()
        first = draws()
        snapshot.restore()
        second = draws()
        snapshot.restore()
        assert (second == first) is restore_rng
        assert (draws() == first) is restore_rng, "a second restore is as the first"


def test_what_is_not_finite_is_named_and_masks_are_not(device: torch.device) -> None:
    model = host(device)
    model.register_buffer("mask", torch.full((3,), -torch.inf, device=device))
    snapshot = Snapshot(model)
    snapshot.capture()
    assert snapshot.is_finite
    assert snapshot.nonfinite is None
    with torch.no_grad():
        model[3].bias[0] = torch.nan
    snapshot.capture()
    assert not snapshot.is_finite
    assert snapshot.nonfinite == "3.bias"
    with torch.no_grad():
        model[3].bias[0] = 0.0
    assert not snapshot.is_finite, "it is the capture's, not that of now"
    snapshot.restore()
    assert model[3].bias[0].isnan()


def test_a_parameter_that_is_not_finite_from_the_start_counts() -> None:
    model = host()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.inf
    snapshot = Snapshot(model)
    snapshot.capture()
    assert snapshot.nonfinite == "0.weight"


def test_growth_and_loss_since_the_capture(device: torch.device) -> None:
    run = Run(device)
    run.snapshot.capture()
    captured, lost = run.state(), run.model[3]
    late = nn.Linear(2, 2).to(device)
    run.model.append(late)
    run.optimizer.add_param_group({"params": list(late.parameters())})
    birth = copy.deepcopy(late.state_dict())
    run.train(2)
    run.model[3] = nn.Linear(8, 2).to(device)  # replaced
    run.snapshot.restore()
    assert run.model[3] is lost
    state = run.model.state_dict()
    assert_same({k: v for k, v in state.items() if k in captured["Sequential"]}, dict(captured["Sequential"]))
    if "4.weight" in state:
        assert_same(late.state_dict(), birth)
    run.train(2)


class Counter:
    def __init__(self) -> None:
        self.n, self.average = 0, torch.zeros(2)

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["n"] == 13:
            raise ValueError("unlucky")
        self.n, self.average = state["n"], state["average"]


def test_extras_and_the_scaler(device: torch.device) -> None:
    model, counter = host(device), Counter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = AveragedModel(model, device=device)
    scaler = torch.amp.GradScaler(device.type, init_scale=256.0)
    scaler.scale(torch.ones(1, device=device))
    snapshot = Snapshot(model, optimizer, scaler=scaler, extras={"counter": counter, "ema": ema})
    ema.update_parameters(model)
    counter.n, counter.average = 5, torch.ones(2)
    snapshot.capture()
    averaged, of_scaler = copy.deepcopy(ema.state_dict()), scaler.state_dict()
    counter.n, counter.average = 6, torch.zeros(2)
    scaler.update(2.0)
    with torch.no_grad():
        model[0].weight.add_(1)
    ema.update_parameters(model)
    said = snapshot.state_dict()
    assert said["extras"]["counter"]["n"] == 5
    assert said["extras"]["counter"]["average"].tolist() == [1.0, 1.0]
    assert_same(said["extras"]["ema"], averaged)
    assert said["scaler"] == of_scaler
    snapshot.restore()
    assert counter.n == 5
    assert counter.average.tolist() == [1.0, 1.0]
    assert_same(ema.state_dict(), averaged)
    assert scaler.state_dict() == of_scaler


def test_an_extra_that_refuses_is_named_when_all_else_is_back() -> None:
    run, counter = Run(), Counter()
    counter.n = 13
    snapshot = Snapshot(run.model, run.optimizer, extras={"counter": counter})
    snapshot.capture()
    before = run.state()
    run.train(2)
    with pytest.raises(SnapshotError, match=r"extras\['counter'\].*unlucky"):
        snapshot.restore()
    assert_same(run.state()["Sequential"], before["Sequential"])
    counter.n = 0
    snapshot.capture()
    snapshot.restore()


# -- seeds ---------------------------------------------------------------------------------------------------


def grown(stage: SeedStage) -> tuple[MorphogeneticModel, torch.optim.Optimizer]:
    layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    model = MorphogeneticModel(layers, slots={"mid": "1"}, example_input=torch.zeros(1, 3, 6))
    slot = model.slots["mid"]
    slot.germinate("mlp", torch.zeros(4, 3, 8), rng_seed=1)
    for target in (SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.FOSSILIZED):
        if slot.stage is stage:
            break
        slot.advance(target, blend_steps=8)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize(
    "stage", [SeedStage.GERMINATED, SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.FOSSILIZED]
)
@pytest.mark.parametrize("then", ["goes_on", "culled", "reseeded"])
def test_a_seed_comes_back_at_its_stage(stage: SeedStage, then: str) -> None:
    model, optimizer = grown(stage)
    slot, x = model.slots["mid"], torch.randn(16, 3, 6)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            if slot.schedule is not None:
                slot.schedule.step()

    train(3)
    snapshot = Snapshot(model, optimizer)
    snapshot.capture()
    seed, before, output = slot.seed, copy.deepcopy(model.state_dict()), model(x).detach()
    train(3)
    ahead = copy.deepcopy(model.state_dict())
    if then != "goes_on" and stage is not SeedStage.FOSSILIZED:
        slot.cull()
        if then == "reseeded":
            slot.germinate("mlp", torch.zeros(4, 3, 8), rng_seed=2)
    snapshot.restore()
    assert slot.stage is stage
    assert slot.seed is seed
    assert_same(model.state_dict(), before)
    assert torch.equal(model(x), output)
    train(3)
    assert_same(model.state_dict(), ahead)


# -- whole or not at all -------------------------------------------------------------------------------------


def interruptions(
    call: Callable[[Run], None], device: torch.device, **options: Any
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Runs with a capture whose call was interrupted, at many lines of it; and the captured state."""
    whole = Interruption()
    run = Run(device, **options)
    run.snapshot.capture()
    run.wreck()
    with whole.on():
        call(run)
    assert len(whole.places) > 50
    for at in range(0, len(whole.places), 9 if device.type == "cpu" else 19):
        run, interruption = Run(device, **options), Interruption(at)
        run.snapshot.capture()
        captured = run.state()
        run.wreck()
        try:
            with interruption.on():
                call(run)
        except KeyboardInterrupt:
            yield run, captured


def test_an_interrupted_restore_is_completed_by_the_next_call(device: torch.device) -> None:
    for run, captured in interruptions(lambda run: run.snapshot.restore(), device):
        run.snapshot.restore()
        assert_same(run.state(), captured)


def test_an_interrupted_capture_with_two_slots_leaves_the_one_before(device: torch.device) -> None:
    new = 0
    for run, captured in interruptions(lambda run: run.snapshot.capture(), device, slots=2):
        wrecked = run.state()
        run.snapshot.restore()
        now = run.state()
        if torch.isnan(now["Sequential"]["0.weight"]).any():  # the new one was whole already
            new += 1
            assert_same(now, wrecked)
        else:
            assert_same(now, captured)
    assert new < 5


def test_an_interrupted_capture_with_one_slot_is_no_capture(device: torch.device) -> None:
    refused = 0
    for run, captured in interruptions(lambda run: run.snapshot.capture(), device, slots=1):
        wrecked = run.state()
        try:
            run.snapshot.restore()
        except SnapshotError:
            refused += 1
            run.snapshot.capture()
            run.snapshot.restore()
            assert_same(run.state(), wrecked)
            continue
        now = run.state()
        if torch.isnan(now["Sequential"]["0.weight"]).any():
            assert_same(now, wrecked)
        else:
            assert_same(now, captured)
    assert refused > 0


# -- beside others, and what is refused ----------------------------------------------------------------------


def test_beside_a_governor_and_another_snapshot(device: torch.device) -> None:
    run = Run(device)
    config = GovernorConfig(snapshot_interval=3, probation=1)
    governor = TolariaGovernor(run.model, run.optimizer, config=config)
    other = Snapshot(run.model, run.optimizer, slots=2)
    for _ in range(8):
        run.snapshot.capture()
        other.capture()
        before = run.state()
        run.train(1)
        governor.step(torch.ones((), device=device))
        ahead = run.state()
        run.snapshot.restore()
        assert_same(run.state(), before)
        run.train(1)
        assert_same(run.state(), ahead)
    with torch.no_grad():
        run.model[0].weight.fill_(torch.nan)
    governor.execute_rollback()
    assert torch.isfinite(run.model[0].weight).all()
    governor.close()


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.complex64, torch.bool]),
    transposed=st.booleans(),
)
@example(sizes=[0, 1, 2, 0], dtype=torch.float32, transposed=False)
def test_any_buffer(sizes: list[int], dtype: torch.dtype, transposed: bool) -> None:
    model = nn.Module()
    value = torch.randn(sizes).mul(9).to(dtype)
    model.register_buffer("b", value.transpose(0, -1) if transposed else value)
    snapshot = Snapshot(model)
    snapshot.capture()
    before = model.b.clone()
    model.b.zero_()
    assert torch.equal(snapshot.state_dict()["model"]["b"], before)
    snapshot.restore()
    assert torch.equal(model.b, before)
    assert snapshot.state_dict()["model"]["b"].dtype == dtype


def test_buffers_whose_elements_share_memory() -> None:
    model = nn.Module()
    model.register_buffer("expanded", torch.arange(3.0).expand(2, 3))
    model.register_buffer("windows", torch.arange(6.0).unfold(0, 3, 1))
    model.register_buffer("conjugate", torch.tensor([1 + 2j, 3 - 1j]).conj())
    model.register_buffer("negative", torch.tensor([1 + 2j, 3 - 1j]).conj().imag)
    snapshot = Snapshot(model)
    snapshot.capture()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.conjugate.zero_()
    model.windows[0, :2] = 9.0
    said = snapshot.state_dict()["model"]
    assert_same({name: said[name].clone() for name in before}, before)
    snapshot.restore()
    assert_same({name: buffer.clone() for name, buffer in model.named_buffers()}, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots: expected 1 or 2, got 0"),
        ({"slots": 3}, "slots: expected 1 or 2, got 3"),
        ({"slots": True}, "slots: expected 1 or 2, got True"),
        ({"slots": 2.0}, r"slots: expected 1 or 2, got 2\.0"),
        ({"storage": "disk"}, "storage: expected 'pinned' or 'device', got 'disk'"),
        ({"restore_rng": "yes"}, "restore_rng: expected a bool"),
        ({"cover": "some"}, "cover: expected 'all' or 'trained'"),
        ({"optimizers": [nn.Linear(1, 1)]}, r"optimizers\[0\]"),
        ({"extras": {"x": 3}}, r"extras\['x'\]"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Snapshot(nn.Linear(2, 2), **options)


def test_what_cannot_be_is_said() -> None:
    model = nn.Linear(2, 2)
    snapshot = Snapshot(model)
    for call in (snapshot.restore, snapshot.state_dict, lambda: snapshot.is_finite):
        with pytest.raises(SnapshotError, match="there was none yet"):
            call()
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            copied(snapshot)
    model.register_buffer("sparse", torch.eye(2).to_sparse())
    with pytest.raises(SnapshotError, match="sparse"):
        snapshot.capture()
    with pytest.raises(SnapshotError, match="sparse"):
        Snapshot(model)


def test_a_refused_capture_leaves_the_one_before() -> None:
    run = Run()
    run.snapshot.capture()
    captured = run.state()
    run.train(1)
    run.model.register_buffer("sparse", torch.eye(2).to_sparse())
    with pytest.raises(SnapshotError, match="sparse"):
        run.snapshot.capture()
    del run.model.sparse
    run.snapshot.restore()
    assert_same(run.state(), captured)


@pytest.mark.cuda
def test_not_within_a_recording_and_on_any_stream() -> None:
    run = Run("cuda")
    run.snapshot.capture()
    captured = run.state()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.zeros(1, device="cuda")
        for call in (run.snapshot.capture, run.snapshot.restore):
            with pytest.raises(TolariaError, match=r"Snapshot\.(capture|restore): expected no CUDA graph"):
                call()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run.wreck()
        run.snapshot.restore()
    torch.cuda.current_stream().wait_stream(side)
    assert_same(run.state(), captured)
    with torch.cuda.stream(side):
        side.wait_stream(torch.cuda.current_stream())
        run.train(1)
        run.snapshot.capture()
        trained = run.state()
    run.snapshot.restore()
    torch.cuda.synchronize()
    assert_same(run.state(), trained)


@pytest.mark.cuda
def test_nothing_waits_for_the_device() -> None:
    run = Run("cuda")
    run.snapshot.capture()
    run.train(1)
    with no_host_sync():
        run.snapshot.capture()
        run.snapshot.restore()


@pytest.mark.multi_gpu
@pytest.mark.parametrize("storage", ["pinned", "device"])
def test_on_another_device_than_the_current_one(storage: str) -> None:
    run = Run("cuda:1", storage=storage)
    run.snapshot.capture()
    captured = run.state()
    run.train(2)
    ahead = run.state()
    run.wreck()
    assert torch.cuda.current_device() == 0
    run.snapshot.restore()
    assert_same(run.state(), captured)
    assert_same(run.snapshot.state_dict()["model"], captured["Sequential"])
    assert run.snapshot.is_finite
    run.train(2)
    assert_same(run.state(), ahead)
