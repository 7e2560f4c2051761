"""What a governor does not cover is refused, or named in one warning, at attach; the rest goes back."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tolaria.errors import UncoveredWarning
from tolaria.governor import GovernorBank, GovernorConfig, TolariaGovernor

CONFIG = GovernorConfig(snapshot_interval=1000, probation=1)


class Wrapper(torch.optim.Optimizer):
    """Steps another optimizer, and keeps slow weights of its own."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, {})
        self.param_groups = inner.param_groups

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.inner.step()


def attach(model: nn.Module, *optimizers: torch.optim.Optimizer, **kw: Any) -> TolariaGovernor:
    return TolariaGovernor(model, optimizers, config=CONFIG, **kw)


def attach_in_bank(model: nn.Module, *optimizers: torch.optim.Optimizer, **kw: Any) -> None:
    GovernorBank(2, config=CONFIG).attach(1, model, optimizers, **kw)


def stray_buffer() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    model = nn.Linear(2, 2)
    model.register_buffer("stray", torch.empty(3, device="meta"))
    return model, [torch.optim.SGD(model.parameters())]


def stray_parameter_of_the_optimizer() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    model = nn.Linear(2, 2)
    stray = nn.Parameter(torch.empty(3, device="meta"))
    return model, [torch.optim.SGD([*model.parameters(), stray])]


class Several(torch.optim.Optimizer):
    """As those that hold one optimizer for each kind of parameter."""

    def __init__(self, *inner: torch.optim.Optimizer) -> None:
        super().__init__([p for o in inner for group in o.param_groups for p in group["params"]], {})
        self.kinds = {"first": inner[0]}
        self.others = list(inner[1:])


def of_another_copy() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    return copy.deepcopy(model), [optimizer]


NAMED: dict[Callable[[], tuple[nn.Module, list[torch.optim.Optimizer]]], str] = {
    stray_buffer: r"does not put back stray, which is on meta",
    stray_parameter_of_the_optimizer: r"optimizer\[0\]\.group\[0\]\.params\[2\], which is on meta",
    of_another_copy: r"optimizers\[0\] \(SGD\), none of which is the model's",
}


@pytest.mark.parametrize("how", [attach, attach_in_bank])
@pytest.mark.parametrize("make", NAMED, ids=lambda f: f.__name__)
def test_what_is_not_covered_is_named_once(make: Callable[[], Any], how: Callable[..., Any]) -> None:
    model, optimizers = make()
    with pytest.warns(UncoveredWarning, match=NAMED[make]) as caught:
        how(model, *optimizers)
    assert len(caught) == 1


def test_nothing_is_said_where_all_is_covered() -> None:
    model, ema = nn.Linear(2, 2), nn.Linear(2, 2)
    inner = torch.optim.AdamW(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(model, Wrapper(inner), inner)
        attach(model, Wrapper(inner))
        attach(model, Several(torch.optim.AdamW([model.weight]), torch.optim.SGD([model.bias])))
        attach(model, inner, torch.optim.SGD(ema.parameters()), extras={"ema": ema})
        attach(model)
        attach(nn.Identity(), torch.optim.SGD([nn.Parameter(torch.ones(2))]))


def test_as_an_error_it_leaves_nothing_attached() -> None:
    model, optimizers = stray_buffer()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UncoveredWarning)
        with pytest.raises(UncoveredWarning, match="stray"):
            attach(model, *optimizers)
    assert not optimizers[0]._optimizer_step_pre_hooks  # type: ignore[attr-defined]


def test_one_that_joins_later_is_named_then() -> None:
    model = nn.Linear(2, 2)
    governor = attach(model, torch.optim.SGD(model.parameters()))
    model.register_buffer("stray", torch.empty(3, device="meta"))
    model.register_buffer("fine", torch.ones(3))
    with pytest.warns(UncoveredWarning, match="stray, which is on meta"):
        governor.notify_structure_changed()
    model.register_buffer("lonely", torch.empty(3, device="meta"))
    with pytest.warns(UncoveredWarning, match="lonely, which is on meta"):
        governor.notify_structure_changed()
    model.register_buffer("also_fine", torch.ones(3))
    governor.notify_structure_changed()


class FullyShardedDataParallel(nn.Module):
    """Named like torch's, which needs a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("how", [attach, attach_in_bank])
def test_shards_are_refused_wherever_they_are(how: Callable[..., Any]) -> None:
    class DTensor(Tensor):
        pass

    shard = torch.ones(3).as_subclass(DTensor)
    flat = nn.Parameter(torch.ones(3))
    flat._is_flat_param = True  # type: ignore[attr-defined]
    models = [nn.Linear(2, 2) for _ in range(3)]
    models[0].register_buffer("part", shard)
    models[1].flat = flat
    models[2].sub = FullyShardedDataParallel(nn.Linear(2, 2))
    for model, name in zip(models, ("part", "flat", "sub"), strict=True):
        with pytest.raises(RuntimeError, match=rf"model: {name} is sharded"):
            how(model)
    with pytest.raises(RuntimeError, match=r"params\[0\] is sharded"):
        how(nn.Linear(2, 2), torch.optim.SGD([flat]))
    with pytest.raises(RuntimeError, match=r"ema\.flat is sharded"):
        how(nn.Linear(2, 2), extras={"ema": models[1]})


def scripted(model: nn.Module) -> nn.Module:
    return torch.jit.script(model)


def traced(model: nn.Module) -> nn.Module:
    return torch.jit.trace(model, torch.randn(3, 4), check_trace=False)


def scripted_inside(model: nn.Module) -> nn.Module:
    return nn.Sequential(torch.jit.script(model), nn.Linear(2, 2))


@pytest.mark.parametrize("compiled", [scripted, traced, scripted_inside], ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_script_modules_are_covered(compiled: Callable[[nn.Module], nn.Module]) -> None:
    model = compiled(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    governor = attach(model, optimizer)

    def steps(count: int) -> None:
        for i in range(count):
            loss = model(torch.randn(3, 4, generator=torch.Generator().manual_seed(i))).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            governor.step(loss)

    steps(2)
    governor.snapshot()
    governor.step(1.0)
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    steps(2)
    governor.step(math.nan)
    assert governor.rollback_count == 1
    for before, now in zip(kept, (model.state_dict(), optimizer.state_dict()), strict=True):
        assert str(before) == str(now)
    steps(2)
    model.eval()
    for _, module in model.named_modules():
        if "running_mean" in module._buffers:
            module._buffers["running_mean"] = torch.full((4,), math.nan)
    governor.execute_rollback()
    assert str(kept[0]) == str(model.state_dict())


class Loose(torch.optim.Optimizer):
    """Keeps state under names, in every form."""

    def __init__(self, params: object) -> None:
        super().__init__(params, {"lr": 0.1})  # type: ignore[arg-type]
        first = self.param_groups[0]["params"][0]
        self.state["tensor"] = torch.zeros(2, device=first.device)  # type: ignore[index]
        self.state["number"] = 0  # type: ignore[index]
        self.state["nested"] = {"energy": [torch.zeros(1, device=first.device)], "of": first}  # type: ignore[index]
        self.state[first]["parts"] = [torch.zeros(2, device=first.device)]

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        state: Any = self.state
        state["tensor"] += 1
        state["number"] += 1
        state["nested"]["energy"][0] += 1
        state["nested"].setdefault("late", 1)
        state.setdefault("late", torch.ones(1))
        state[self.param_groups[0]["params"][0]]["parts"][0] += 1


def test_state_that_belongs_to_no_parameter_goes_back(device: torch.device) -> None:
    model = nn.Linear(2, 2).to(device)
    optimizer = Loose(model.parameters())
    optimizer.step()
    state: Any = optimizer.state
    del state["late"], state["nested"]["late"]
    governor = attach(model, optimizer)
    held = state["tensor"]
    for _ in range(2):
        for _ in range(3):
            optimizer.step()
        state[model.bias.detach()] = {"orphan": torch.ones(1)}
        governor.execute_rollback()
        assert state["tensor"] is held
        assert held.tolist() == [1, 1]
        assert state["number"] == 1
        assert [float(t) for t in state["nested"]["energy"]] == [1]
        assert state["nested"]["of"] is model.weight
        assert [t.tolist() for t in state[model.weight]["parts"]] == [[1, 1]]
        assert set(map(str, state)) == {"tensor", "number", "nested", str(model.weight)}
        assert set(state["nested"]) == {"energy", "of"}
