"""Optimizers that people write: what ``load_state_dict(state_dict())`` brings back, a rollback does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tolaria.governor import GovernorConfig, TolariaGovernor

CONFIG = GovernorConfig(snapshot_interval=1000)


class Lookahead(torch.optim.Optimizer):
    """Slow weights over another optimizer; their groups are shared."""

    def __init__(self, inner: torch.optim.Optimizer, k: int = 3) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.k, self.count = inner, k, 0
        self.param_groups = inner.param_groups
        for p in self._params():
            self.state[p]["slow"] = p.detach().clone()

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self._step()

    @torch.no_grad()
    def _step(self) -> None:
        self.inner.step()
        self.count += 1
        if self.count % self.k == 0:
            for p in self._params():
                p.lerp_(self.state[p]["slow"], 0.5)
                self.state[p]["slow"].copy_(p)


class NeverInitialised(Lookahead):
    """Its class does not call ``Optimizer.__init__``: no hooks, no defaults."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.k, self.count = inner, 3, 0
        self.param_groups, self.state = inner.param_groups, defaultdict(dict)
        self.fast_state = inner.state
        for p in self._params():
            self.state[p]["slow"] = p.detach().clone()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  (torch puts hooks into the other)
        self._step()


class Offloads(torch.optim.Optimizer):
    """Groups that are put together whenever somebody asks, and no state of its own."""

    def __init__(self, model: nn.Module) -> None:
        self.by_parameter = {p: torch.optim.AdamW([p], lr=1e-2) for p in model.parameters()}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for each in self.by_parameter.values() for group in each.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for each in self.by_parameter.values():
            each.step()


class Several(torch.optim.Optimizer):
    """One optimizer for matrices, another for the rest."""

    def __init__(self, model: nn.Module) -> None:
        params = list(model.parameters())
        super().__init__(params, {})
        matrices = [p for p in params if p.dim() > 1]
        self.kinds = {"matrices": torch.optim.SGD(matrices, lr=0.1, momentum=0.9)}
        self.others = [torch.optim.AdamW([p for p in params if p.dim() < 2], lr=0.01)]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for each in (*self.kinds.values(), *self.others):
            each.step()


class Attributes(torch.optim.SGD):
    """Counts, a schedule and tensors among its attributes, as YellowFin has them."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.total, self._norms = 0, torch.zeros(3)
        self.history = {"lr": [0.1]}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.total += 1
        self._norms[self.total % 3] = float(self.total)
        self.history["lr"].append(0.1 / self.total)
        self.param_groups[0]["lr"] = self.history["lr"][-1]
        super().step()


class Table(torch.optim.Optimizer):
    """Momentum as codes of a lookup table that all states share."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.05})
        self.tables = {"dynamic": torch.linspace(-1, 1, 256)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in (p for group in self.param_groups for p in group["params"]):
            state = self.state[p]
            if not state:
                state["code"] = torch.full(p.shape, 128, dtype=torch.uint8)
                state["map"] = self.tables["dynamic"]
            momentum = state["map"][state["code"].long()].mul(0.9).add(p.grad.clamp(-1, 1), alpha=0.1)
            state["code"] = torch.bucketize(momentum, state["map"]).clamp(max=255).to(torch.uint8)
            p.add_(state["map"][state["code"].long()], alpha=-0.05)


class Layered(torch.optim.Optimizer):
    """A layer in each group and as a key of the state, as K-FAC has them."""

    def __init__(self, model: nn.Module) -> None:
        layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        super().__init__([{"params": list(m.parameters()), "layer": m} for m in layers], {"lr": 0.05})
        for layer in layers:
            self.state[layer] = {"scale": torch.ones(())}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            scale = self.state[group["layer"]]["scale"].mul_(1.1)
            for p in group["params"]:
                p.add_(p.grad / scale, alpha=-group["lr"])


class CountsInItsGroup(torch.optim.Optimizer):
    """Bias correction by a step that the first step puts into the group."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"] / (1 - 0.9 ** group["step"]))


MAKERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "lookahead": lambda m: Lookahead(torch.optim.AdamW(m.parameters(), lr=1e-2)),
    "lookahead_twice": lambda m: Lookahead(Lookahead(torch.optim.AdamW(m.parameters(), lr=1e-2)), k=2),
    "never_initialised": lambda m: NeverInitialised(torch.optim.AdamW(m.parameters(), lr=1e-2)),
    "offloads": Offloads,
    "several": Several,
    "attributes": lambda m: Attributes(m.parameters()),
    "table": lambda m: Table(m.parameters()),
    "layered": Layered,
    "counts_in_its_group": lambda m: CountsInItsGroup(m.parameters()),
}


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    for _ in range(count):
        loss = model(torch.randn(8, 4, generator=rng)).square().mean()
        model.zero_grad()
        loss.backward()
        optimizer.step()


def poison(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()


@pytest.mark.parametrize("warm", [0, 5])
@pytest.mark.parametrize("name", MAKERS)
def test_training_goes_on_as_if_nothing_had_been(name: str, warm: int) -> None:
    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        optimizer = MAKERS[name](model)
        steps(model, optimizer, warm, seed=1)
        return model, optimizer

    (model, optimizer), (twin, twins_optimizer) = made(), made()
    governor = TolariaGovernor(model, optimizer, config=CONFIG)
    steps(model, optimizer, 4, seed=2)
    governor.execute_rollback()
    poison(optimizer, model)
    governor.step(float("nan"))
    assert governor.rollback_count == 2
    steps(model, optimizer, 7, seed=3)
    steps(twin, twins_optimizer, 7, seed=3)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_live_objects_stay_the_live_ones() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    optimizer = Layered(model)
    governor = TolariaGovernor(model, optimizer, config=CONFIG)
    governor.execute_rollback()
    assert [group["layer"] for group in optimizer.param_groups] == list(model)
    table = Table(model.parameters())
    shared = table.tables["dynamic"]
    kept = shared.clone()
    governor = TolariaGovernor(model, table, config=CONFIG)
    steps(model, table, 2, seed=1)
    governor.execute_rollback()
    assert table.tables["dynamic"] is shared
    assert torch.equal(shared, kept)


def test_one_that_was_never_initialised_runs_hooks_and_its_kin_steps_on() -> None:
    model, other = nn.Linear(4, 2), nn.Linear(4, 2)
    optimizer, kin = (NeverInitialised(torch.optim.SGD(m.parameters(), lr=0.1)) for m in (model, other))
    TolariaGovernor(model, optimizer, config=CONFIG)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    steps(model, optimizer, 1, seed=1)
    steps(other, kin, 1, seed=1)
    assert seen == ["before"]


def test_the_state_of_an_inner_optimizer_stays_one_under_two_names() -> None:
    model = nn.Linear(4, 2)
    optimizer = NeverInitialised(torch.optim.AdamW(model.parameters()))
    governor = TolariaGovernor(model, optimizer, config=CONFIG)
    steps(model, optimizer, 2, seed=1)
    governor.execute_rollback()
    steps(model, optimizer, 2, seed=1)
    assert optimizer.fast_state is optimizer.inner.state
    assert optimizer.param_groups is optimizer.inner.param_groups


def test_one_without_groups_is_refused_by_name() -> None:
    class Scaled(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.optimizer = inner

    model = nn.Linear(4, 2)
    with pytest.raises(TypeError, match=r"optimizers\[0\]: expected param_groups, which Scaled has none of"):
        TolariaGovernor(model, Scaled(torch.optim.SGD(model.parameters())), config=CONFIG)


def test_shared_groups_are_lowered_once() -> None:
    model = nn.Linear(4, 2)
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), lr=1.0))
    governor = TolariaGovernor(model, optimizer, config=GovernorConfig(lr_factor=0.5))
    governor.execute_rollback()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_an_inner_optimizer_leaves_with_the_outer_one() -> None:
    model = nn.Linear(4, 2)
    first, second = (
        Lookahead(torch.optim.SGD(model.parameters(), lr=1.0)),
        torch.optim.SGD(model.parameters()),
    )
    governor = TolariaGovernor(model, [first, second], config=CONFIG)
    assert governor._engine.covered.optimizers == [first, second, first.inner]
    governor.remove_optimizer(first)
    assert governor._engine.covered.optimizers == [second]
    governor.add_optimizer(first)
    assert governor._engine.covered.optimizers == [second, first, first.inner]
