"""A guard is called by the optimizers themselves: no loss, no call per step."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tolaria
from tolaria import GovernorConfig, PanicReason
from tolaria.governor.optimizer_guard import Guard


class Run:
    """A loop that tells nobody its loss; `faults` are done to it before the backward of their step."""

    def __init__(self, *, guarded: bool = True, **settings: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.settings = {"snapshot_interval": 4, "probation": 1, **settings}
        self.guard: Guard | None = None
        if guarded:
            config = GovernorConfig.balanced(**self.settings)
            self.guard = tolaria.guard(self.model, self.optimizer, config=config)
        self.steps = 0

    def step(self, *, poison: str = "") -> None:
        generator = torch.Generator().manual_seed(self.steps)
        self.steps += 1
        x = torch.randn(8, 3, generator=generator)
        loss = self.model(x).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        first = self.model[0].weight
        if poison == "gradient":
            first.grad[0, 0] = math.nan
        with torch.no_grad():
            if poison == "weight":
                first[0, 0] = math.inf
            elif poison == "moment":
                self.optimizer.state[first]["exp_avg"][0, 0] = math.nan
            elif poison == "buffer":
                self.model[1].running_mean[0] = math.nan
        self.optimizer.step()

    def state(self) -> list[Tensor]:
        moments = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        return [*self.model.state_dict().values(), *moments]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_a_clean_run_is_the_bare_one_bit_for_bit() -> None:
    runs = Run(), Run(guarded=False)
    for _ in range(30):
        for run in runs:
            run.step()
    assert runs[0].guard.step_count == 30
    assert same(*(run.state() for run in runs))


@pytest.mark.parametrize("poison", ["gradient", "weight", "moment", "buffer"])
def test_what_is_not_finite_never_outlives_the_step(poison: str) -> None:
    run = Run()
    for _ in range(8):
        run.step()
    captured = copy.deepcopy(run.state())  # the step of a capture
    run.step()
    assert run.guard.last_good_step == 8
    run.step(poison=poison)
    assert run.guard.rollback_count == 1
    assert run.guard.last_report.restored_step == 8
    assert run.guard.last_report.reason is PanicReason.NON_FINITE
    assert same(run.state(), captured)
    run.step()
    assert all(t.isfinite().all() for t in run.state())


def test_the_returned_guard_need_not_be_kept() -> None:
    run = Run()
    governor = weakref.ref(run.guard)
    run.guard = None
    gc.collect()
    run.step(poison="gradient")
    assert governor().rollback_count == 1
    del run
    gc.collect()
    assert governor() is None


def test_it_ends_with_close() -> None:
    run = Run()
    run.step()
    run.guard.close()
    run.step(poison="gradient")
    assert run.model[0].weight.isnan().any()


def test_several_optimizers_are_each_judged_and_so_is_one_that_joins() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9) for part in model]
    governor = tolaria.guard(model, optimizers[:2])
    governor.add_optimizer(optimizers[2])
    governor.add_optimizer(optimizers[2])
    for i, (part, optimizer) in enumerate(zip(model, optimizers, strict=True)):
        part(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        assert governor.step_count == 2 * i + 1
        part.weight.grad.fill_(math.nan)
        optimizer.step()
        assert governor.rollback_count == i + 1
        governor.snapshot()
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_closure_is_judged_and_an_inherited_step_once() -> None:
    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    model = nn.Linear(2, 2)
    optimizer = Twice(model.parameters(), lr=0.1)
    governor = tolaria.guard(model, optimizer)
    bad = False

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 2)).sum() * (math.nan if bad else 1.0)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert governor.step_count == 1
    bad = True
    optimizer.step(closure)
    assert governor.rollback_count == 1
    assert all(p.isfinite().all() for p in model.parameters())


def test_losses_that_are_added_are_judged() -> None:
    run = Run(gradient_norm=False)
    run.step()
    run.guard.add_loss(1.0)
    run.guard.add_loss(2.0)
    run.step()
    assert run.guard.history == [1.5]
    run.guard.add_loss(math.nan)
    run.step()
    assert run.guard.rollback_count == 1
    run.step()
    assert run.guard.step_count == 4


def test_resume_goes_on_in_the_guard() -> None:
    run, other = Run(), Run()
    for _ in range(6):
        run.step()
    other.guard.load_state_dict(run.guard.state_dict())
    other.step()
    assert other.guard.step_count == 7
    other.step(poison="gradient")
    assert other.guard.rollback_count == 1


def test_what_cannot_be_is_refused() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match=r"config: expected skip_anomalous_steps=False, got True"):
        tolaria.guard(model, optimizer, config=GovernorConfig(skip_anomalous_steps=True))
    with pytest.raises(TypeError, match=r"config: expected GovernorConfig or None, got dict"):
        tolaria.guard(model, optimizer, config={})  # type: ignore[arg-type]
    assert not optimizer._optimizer_step_post_hooks
    assert tolaria.guard(model, optimizer).config == GovernorConfig.balanced()
