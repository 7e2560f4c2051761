"""What modules, extras and schedulers keep beside tensors, and what a governor may leave alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tolaria.errors import SnapshotError
from tolaria.governor import GovernorConfig, TolariaGovernor
from tolaria.nn import MorphogeneticModel

CONFIG = GovernorConfig(snapshot_interval=1000)


def attach(model: nn.Module, **arguments: Any) -> TolariaGovernor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return TolariaGovernor(model, optimizer, config=CONFIG, **arguments)


class Scaled(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.scale = 1.0

    def get_extra_state(self) -> dict[str, Any]:
        return {"scale": self.scale, "amax": torch.tensor([self.scale])}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        assert float(state["amax"]) == state["scale"]
        self.scale = state["scale"]


def test_extra_state_of_modules_goes_back() -> None:
    model = nn.Sequential(Scaled(), Scaled())
    governor = attach(model)
    for _ in range(2):
        model[0].scale, model[1].scale = 3.0, 4.0
        governor.execute_rollback()
        assert [m.scale for m in model] == [1.0, 1.0]


def test_extra_state_that_cannot_be_told_is_named() -> None:
    class Broken(nn.Linear):
        def get_extra_state(self) -> object:
            raise OSError("gone")

    with pytest.raises(SnapshotError, match=r"0\.get_extra_state\(\).*gone"):
        attach(nn.Sequential(Broken(2, 2)))


class Ema(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module, self.updates, self.history = copy.deepcopy(model), 0, [torch.zeros(1)]

    def update(self, model: nn.Module) -> None:
        self.updates += 1
        self.history.append(torch.tensor([float(self.updates)]))
        for mine, theirs in zip(self.module.parameters(), model.parameters(), strict=True):
            mine.data.lerp_(theirs.data, 0.5)


def test_an_extra_module_keeps_its_counters_with_its_tensors() -> None:
    model = nn.Linear(2, 2)
    ema = Ema(model)
    ema.update(model)
    governor = attach(model, extras={"ema": ema})
    kept = copy.deepcopy(ema.state_dict())
    with torch.no_grad():
        model.weight.fill_(9.0)
    ema.update(model)
    governor.execute_rollback()
    assert ema.updates == 1
    assert [float(t) for t in ema.history] == [0.0, 1.0]
    assert all(torch.equal(value, kept[name]) for name, value in ema.state_dict().items())


def test_an_averaged_copy_drops_the_seed_that_the_model_drops() -> None:
    host = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model = MorphogeneticModel(host, {"h": "1"}, example_input=torch.zeros(2, 4))
    slot = model.germinate("h", lambda _: nn.Linear(8, 8), rng_seed=1)
    slot.start_training()
    slot.start_blending(4)
    average = AveragedModel(model)
    governor = attach(model, extras={"average": average})
    governor.execute_rollback()
    copied = average.module.slot("h")
    assert copied.stage is slot.stage
    assert len(list(average.module.parameters())) == len(list(model.parameters()))


def test_a_frozen_mask_may_be_infinite_and_a_trained_one_not() -> None:
    model = nn.Linear(2, 2)
    mask = torch.full((2, 2), float("-inf")).triu(1)
    model.mask = nn.Parameter(mask.clone(), requires_grad=False)
    optimizer = torch.optim.SGD([model.weight, model.bias], lr=0.1)
    governor = TolariaGovernor(model, optimizer, config=CONFIG)
    model.mask.data.zero_()
    governor.execute_rollback()
    assert torch.equal(model.mask, mask)
    with pytest.raises(ValueError, match="mask"):
        attach(model)


def train(governor: TolariaGovernor, scheduler: Any, optimizer: Any, steps: int, bad: int = -1) -> float:
    for step in range(steps):
        optimizer.step()
        scheduler.step()
        governor.step(float("nan") if step == bad else 1.0)
        if step == bad:
            governor.synchronize()  # the host's share is taken up here, not a few steps later
    return float(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("tensor_rate", [False, True])
@pytest.mark.parametrize("choice", ["rewind", "keep"])
def test_schedules_are_rewound_or_kept(choice: Any, tensor_rate: bool, device: torch.device) -> None:
    def run(bad: int) -> float:
        model = nn.Linear(2, 2).to(device)
        rate = torch.tensor(0.1, device=device) if tensor_rate else 0.1
        optimizer = torch.optim.Adam(
            model.parameters(), lr=rate, capturable=tensor_rate and device.type == "cuda"
        )
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=40)
        config = GovernorConfig(snapshot_interval=10)
        governor = TolariaGovernor(model, optimizer, schedulers=[scheduler], schedules=choice, config=config)
        rate = train(governor, scheduler, optimizer, 39, bad)
        governor.synchronize()
        assert governor.rollback_count == (bad >= 0)
        return rate

    undisturbed, disturbed = run(-1), run(25)
    assert (disturbed == pytest.approx(undisturbed)) == (choice == "keep")


def test_what_was_lowered_stays_lowered_where_schedules_are_kept() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    config = GovernorConfig(lr_factor=0.5, snapshot_interval=1000)
    governor = TolariaGovernor(model, optimizer, schedulers=[scheduler], schedules="keep", config=config)
    optimizer.step()
    scheduler.step()
    for expected in (0.25, 0.125):
        governor.step(float("nan"))
        assert optimizer.param_groups[0]["lr"] == expected
        assert scheduler.last_epoch == 1


def test_frozen_parameters_can_be_left_out() -> None:
    base, adapter = nn.Linear(64, 64).requires_grad_(False), nn.Linear(64, 2)
    model = nn.Sequential(base, adapter)
    optimizer = torch.optim.AdamW(adapter.parameters())

    def slot_bytes(**arguments: Any) -> int:
        event: Any = TolariaGovernor(model, optimizer, config=CONFIG, **arguments).poll()[0]
        return int(event.slot_bytes)

    assert slot_bytes() > 2 * 4 * 64 * 64
    assert slot_bytes(cover="trained") < 2 * 4 * 64 * 3 * 2

    governor = TolariaGovernor(model, optimizer, config=CONFIG, cover="trained")
    with torch.no_grad():
        base.weight.fill_(5.0)
        adapter.weight.fill_(5.0)
    governor.execute_rollback()
    assert bool((base.weight == 5.0).all())
    assert not bool((adapter.weight == 5.0).any())


def test_a_layer_that_is_unfrozen_joins() -> None:
    base, adapter = nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 2)
    model = nn.Sequential(base, adapter)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    governor = TolariaGovernor(model, optimizer, config=CONFIG, cover="trained")
    born = base.weight.detach().clone()
    base.requires_grad_(True)
    optimizer.add_param_group({"params": list(base.parameters())})
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    governor.step(float("nan"))
    assert torch.equal(base.weight, born)
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize(("name", "value"), [("schedules", "stay"), ("cover", "none"), ("cover", None)])
def test_a_word_that_is_no_choice_is_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{name}: expected '\w+' or '\w+', got"):
        attach(nn.Linear(2, 2), **{name: value})


class Shadow:
    """An average that is no module, as people write it."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow = {name: value.clone() for name, value in state["shadow"].items()}


def test_an_extra_that_turns_nan_is_found_at_the_next_capture() -> None:
    model = nn.Linear(2, 2)
    average = Shadow(model)
    config = GovernorConfig(snapshot_interval=4, probation=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = TolariaGovernor(model, optimizer, config=config, extras={"average": average})
    average.shadow["weight"][0, 0] = float("nan")
    for _ in range(6):
        governor.step(1.0)
    assert governor.rollback_count == 1
    assert governor.last_report is not None
    assert governor.last_report.reason.name == "NON_FINITE_STATE"
    assert governor.last_report.tensor_name == "extras['average']"
    assert torch.isfinite(average.shadow["weight"]).all()
    average.shadow["weight"][0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"extras\['average'\]: expected a finite state"):
        governor.reset()
    governor.execute_rollback()
    assert torch.isfinite(average.shadow["weight"]).all()


class Hands:
    """An extra whose state is the objects themselves: nothing else covers them."""

    def __init__(self) -> None:
        self.module, self.source, self.count = nn.Linear(2, 2), torch.Generator(), Count()

    def state_dict(self) -> dict[str, Any]:
        return {"module": self.module, "source": self.source, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module, self.source, self.count = state["module"], state["source"], state["count"]


class Count:
    def __init__(self) -> None:
        self.n = 0

    def __call__(self) -> None:
        self.n += 1


def test_objects_in_the_state_of_an_extra_go_back() -> None:
    model, extra = nn.Linear(2, 2), Hands()
    governor = attach(model, extras={"extra": extra})
    weight, draws = extra.module.weight.detach().clone(), torch.rand(3, generator=extra.source)
    for _ in range(2):
        with torch.no_grad():
            extra.module.weight.fill_(float("nan"))
        extra.count()
        governor.execute_rollback()
        assert torch.equal(extra.module.weight, weight)
        assert torch.equal(torch.rand(3, generator=extra.source), draws)
        assert extra.count.n == 0


def test_an_extra_that_was_not_finite_from_the_start_is_left_in_peace() -> None:
    model = nn.Linear(2, 2)
    average = Shadow(model)
    average.shadow["bias"][0] = float("inf")
    governor = attach(model, extras={"average": average})
    governor.snapshot()
    governor.reset()
    assert governor.rollback_count == 0
