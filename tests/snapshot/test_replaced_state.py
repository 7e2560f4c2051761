"""Rollbacks over state that was not changed in place: parameter objects, storages, forms, names."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tolaria.errors import SnapshotError
from tolaria.governor import GovernorConfig, PanicReason, TolariaGovernor


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.down.weight = self.up.weight
        self.norm = nn.BatchNorm1d(4)
        self.sliced = nn.Parameter(torch.randn(4, 8)[:, ::2])
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.down(torch.tanh(self.up(x)))) @ self.sliced


def attach(model: nn.Module, optimizer: torch.optim.Optimizer, **kw: Any) -> TolariaGovernor:
    config = GovernorConfig(snapshot_interval=1000, probation=1, restore_rng=True)
    return TolariaGovernor(model, optimizer, config=config, **kw)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=source)).square().mean().backward()
        optimizer.step()


def captured_run() -> tuple[Net, torch.optim.Optimizer, TolariaGovernor]:
    """A network after three steps, whose state of now is the last known good one."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    governor = attach(model, optimizer)
    train(model, optimizer, 3, seed=1)
    governor.snapshot()
    governor.step(1.0)
    return model, optimizer, governor


def assign(model: Net) -> None:
    nans = {k: torch.full_like(v, math.nan) for k, v in model.state_dict().items() if v.is_floating_point()}
    model.load_state_dict({**model.state_dict(), **nans}, assign=True)


def replace_data(model: Net) -> None:
    for parameter in model.parameters():
        parameter.data = torch.full_like(parameter.data, math.nan)


def transpose_storage(model: Net) -> None:
    model.up.weight.data = torch.full((4, 4), math.nan).t()


def transpose_view(model: Net) -> None:
    model.up.weight.data = model.up.weight.data.t()  # the same memory in another form


def swap_dictionary(model: Net) -> None:
    model.norm._buffers = {k: torch.full_like(v, 7) for k, v in model.norm._buffers.items()}


def change_dtype(model: Net) -> None:
    model.double()
    with torch.no_grad():
        model.up.weight.fill_(math.nan)


def reshape_buffer(model: Net) -> None:
    model.seen = torch.full((7,), math.nan)


def drop_buffer(model: Net) -> None:
    model.norm.running_mean = None


def drop_parameter(model: Net) -> None:
    model.down.weight = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    "wreck",
    [
        assign,
        replace_data,
        transpose_storage,
        transpose_view,
        swap_dictionary,
        change_dtype,
        reshape_buffer,
        drop_buffer,
        drop_parameter,
    ],
    ids=lambda f: f.__name__,
)
def test_replaced_tensors_come_back_as_they_were(wreck: Callable[[Net], None]) -> None:
    torch.manual_seed(0)
    model, optimizer, governor = captured_run()
    captured = copy.deepcopy(model.state_dict())
    for _ in range(2):
        train(model, optimizer, 2, seed=2)
        wreck(model)
        governor.execute_rollback()
        assert model.down.weight is model.up.weight
        for name, value in captured.items():
            live = model.state_dict()[name]
            assert (live.dtype, live.stride()) == (value.dtype, value.stride()), name
            assert torch.equal(live, value), name
    train(model, optimizer, 3, seed=3)
    torch.manual_seed(0)
    straight = Net()
    twin = torch.optim.AdamW(straight.parameters(), lr=1e-2)
    train(straight, twin, 3, seed=1)
    train(straight, twin, 3, seed=3)
    for name, value in straight.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def load_poison(optimizer: torch.optim.Optimizer) -> None:
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["exp_avg"].fill_(math.nan)
    optimizer.load_state_dict(saved)


def assign_poison(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state = defaultdict(
        dict, {p: {k: v + math.nan for k, v in state.items()} for p, state in optimizer.state.items()}
    )


@pytest.mark.parametrize("wreck", [load_poison, assign_poison], ids=lambda f: f.__name__)
def test_replaced_optimizer_state_comes_back_and_is_captured(
    wreck: Callable[[torch.optim.Optimizer], None],
) -> None:
    _, optimizer, governor = captured_run()
    kept = copy.deepcopy(optimizer.state_dict()["state"])
    wreck(optimizer)
    governor.snapshot()
    assert governor.last_report is not None
    assert governor.last_report.reason is PanicReason.NON_FINITE_STATE
    for index, state in kept.items():
        for name, value in state.items():
            assert torch.equal(optimizer.state_dict()["state"][index][name], value), name


def test_poison_in_a_buffer_of_new_shape_is_found_and_never_reaches_the_last_known_good() -> None:
    model = Net()
    governor = attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model.seen = torch.full((7,), math.nan)
    governor.snapshot()
    report = governor.last_report
    assert report is not None
    assert (report.reason, report.tensor_name) == (PanicReason.NON_FINITE_STATE, "seen")
    assert torch.equal(model.seen, torch.zeros(3))


def test_extra_may_be_named_like_a_submodule() -> None:
    model = nn.ModuleDict({"ema": nn.Linear(2, 2)})
    ema = nn.Linear(2, 2)
    before = copy.deepcopy((model.state_dict(), ema.state_dict()))
    governor = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), extras={"ema": ema})
    with torch.no_grad():
        for parameter in [*model.parameters(), *ema.parameters()]:
            parameter.fill_(7.0)
    governor.execute_rollback()
    for module, kept in zip((model, ema), before, strict=True):
        assert all(torch.equal(value, kept[name]) for name, value in module.state_dict().items())


def test_removed_optimizer_leaves_the_captures_of_the_others_whole() -> None:
    layers = [nn.Linear(2, 2) for _ in range(2)]
    first, second = (torch.optim.AdamW(layer.parameters()) for layer in layers)
    governor = TolariaGovernor(
        nn.ModuleList(layers), [first, second], config=GovernorConfig(snapshot_interval=99, probation=1)
    )
    for layer, optimizer in zip(layers, (first, second), strict=True):
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    governor.snapshot()
    governor.step(1.0)
    kept = copy.deepcopy(second.state_dict())
    governor.remove_optimizer(first)
    second.state.clear()
    governor.execute_rollback()
    for index, state in kept["state"].items():
        for name, value in state.items():
            assert torch.equal(second.state_dict()["state"][index][name], value), name


class Stubborn:
    """An extra whose two halves can be made to fail."""

    def __init__(self) -> None:
        self.value, self.fails = 0, ""

    def state_dict(self) -> dict[str, Any]:
        if self.fails == "saving":
            raise OSError("disk gone")
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        if self.fails == "loading":
            raise OSError("disk gone")
        self.value = state["value"]


def test_extra_that_fails_is_named_and_takes_nothing_with_it() -> None:
    model, extra = nn.Linear(2, 2), Stubborn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = attach(model, optimizer, extras={"ema": extra})
    kept = copy.deepcopy(model.state_dict())
    extra.fails = "saving"
    with pytest.raises(SnapshotError, match=r"extras\['ema'\].*disk gone"):
        governor.snapshot()
    for _ in range(3):
        governor.step(1.0)
    assert governor.last_good_step == 0, "a capture without its host-side parts is never promoted"
    extra.fails = "loading"
    torch.manual_seed(5)
    optimizer.param_groups[0]["lr"] = 9.0
    with torch.no_grad():
        model.weight.fill_(7.0)
    with pytest.raises(SnapshotError, match=r"extras\['ema'\].*everything else was put back"):
        governor.step(math.nan)
    assert torch.equal(model.weight, kept["weight"])
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert torch.initial_seed() != 5
    extra.fails = ""
    governor.step(1.0)
    assert governor.rollback_count == 1
