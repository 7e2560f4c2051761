"""Bad steps that are let pass while the state is finite, and when they are not."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tolaria
from tolaria.errors import ConfigError
from tolaria.governor import GovernorBank, GovernorConfig, PanicReason, TolariaGovernor, VerdictEvent


@pytest.fixture(params=["fused", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    with tolaria.backend(request.param):
        yield


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


class Run:
    """Judges before the optimizer step, as ``skip_anomalous_steps`` asks for, or after it."""

    def __init__(self, *, before: bool = True, **settings: Any) -> None:
        torch.manual_seed(0)
        self.model, self.before = Net(), before
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        config = GovernorConfig(
            **{"snapshot_interval": 20, "probation": 1, "skip_anomalous_steps": before, **settings}
        )
        self.governor = TolariaGovernor(self.model, self.optimizer, num_classes=3, config=config)

    def step(self, *, inputs: float | None = None, ignored: bool = False) -> None:
        x = torch.randn(8, 3)
        y = x.argmax(1) if not ignored else torch.full((8,), -100)
        if inputs is not None:
            x = torch.full_like(x, inputs)
        loss = nn.functional.cross_entropy(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        if self.before:
            verdict = self.governor.check_vital_signs(loss)
            self.optimizer.step()
            self.governor.step(verdict)
        else:
            self.optimizer.step()
            self.governor.step(loss)

    def state(self) -> Any:
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("bad", [{"inputs": math.nan}, {"inputs": math.inf}, {"ignored": True}])
def test_a_bad_batch_is_left_out_and_nothing_is_thrown_away(bad: dict[str, Any]) -> None:
    run = Run()
    for _ in range(30):
        run.step()
    kept = run.state()
    run.step(**bad)
    assert same(kept, run.state()), "parameters, moments, counters and running statistics"
    assert run.governor.rollback_count == 0
    (event,) = [e for e in run.governor.poll() if isinstance(e, VerdictEvent)]
    assert (event.reason, event.rollback) == (PanicReason.NON_FINITE, False)
    assert run.governor.offending_steps == (31,)
    run.step()
    assert not same(kept, run.state())


def test_so_many_in_a_row_are_left_out_then_the_state_goes_back() -> None:
    run = Run()
    for _ in range(30):
        run.step()
    for count in (1, 2, 3):
        run.step(inputs=math.nan)
        assert (run.governor.rollback_count, len(run.governor.offending_steps)) == (0, count)
    run.step()  # a healthy one clears the count
    for _ in range(3):
        run.step(inputs=math.nan)
    assert run.governor.rollback_count == 0
    run.step(inputs=math.nan)
    assert run.governor.rollback_count == 1
    assert run.governor.offending_steps == (31, 32, 33, 35, 36, 37, 38)
    assert run.governor.last_report is not None
    assert run.governor.last_report.reward == -10.0
    for _ in range(3):  # it went back with the slot
        run.step(inputs=math.nan)
    assert run.governor.rollback_count == 1


def test_a_state_that_is_not_finite_is_never_let_pass() -> None:
    for place in ("parameter", "buffer", "moment"):
        run = Run()
        for _ in range(30):
            run.step()
        with torch.no_grad():
            if place == "parameter":
                run.model.last.bias[0] = math.inf
            elif place == "buffer":
                run.model.norm.running_mean[0] = math.nan
                run.governor._attached.skipper.after_step()  # it was there before the step
            else:
                run.optimizer.state[run.model.last.bias]["exp_avg"][0] = math.nan
        run.step(inputs=math.nan)
        assert run.governor.rollback_count == 1, place


def test_after_the_step_a_nan_is_let_pass_only_if_it_did_no_harm() -> None:
    run = Run(before=False, skips_before_rollback=2)
    for _ in range(5):
        run.step()
    run.governor.step(math.nan)
    run.governor.step(math.nan)
    assert run.governor.rollback_count == 0
    run.step()
    run.step(inputs=math.nan)  # its gradients have reached the parameters
    assert run.governor.rollback_count == 1


def test_without_the_setting_a_nan_is_a_panic_at_once() -> None:
    for run in (Run(before=False), Run(skips_before_rollback=0)):
        run.step()
        run.step(ignored=True)
        assert run.governor.rollback_count == 1


def test_a_poisoned_capture_always_rolls_back() -> None:
    run = Run(skips_before_rollback=1000)
    for _ in range(19):
        run.step()
    with torch.no_grad():
        run.model.norm.running_mean[0] = math.nan
    run.governor.step(1.0)
    assert run.governor.last_report is not None
    assert run.governor.last_report.reason is PanicReason.NON_FINITE_STATE


def test_masks_that_were_never_finite_do_not_count() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    governor = TolariaGovernor(
        model, torch.optim.SGD(model.parameters(), lr=0.1), config=GovernorConfig(skips_before_rollback=1)
    )
    governor.step(math.nan)
    assert governor.rollback_count == 0


def test_rows_of_a_bank_are_let_pass_apart() -> None:
    bank = GovernorBank(3, config=GovernorConfig(skips_before_rollback=1))
    models = [nn.Linear(2, 2) for _ in range(2)]
    for i, model in enumerate(models):
        bank.attach(i, model, torch.optim.SGD(model.parameters(), lr=0.1))
    bank.step(torch.ones(3))
    with torch.no_grad():
        models[1].weight[0, 0] = math.nan
    rewards = bank.step(torch.full((3,), math.nan))
    assert rewards.tolist() == [0.0, -10.0, 0.0]
    assert bool(models[1].weight.isfinite().all())
    assert bank.step(torch.full((3,), math.nan)).tolist() == [-10.0, 0.0, -10.0]


def test_the_default_follows_skip_anomalous_steps() -> None:
    assert GovernorConfig().skips_before_rollback == 0
    skipping = GovernorConfig(skip_anomalous_steps=True)
    assert skipping.skips_before_rollback == 3
    assert GovernorConfig().replace(skip_anomalous_steps=True) == skipping
    assert skipping.replace(skip_anomalous_steps=False) == GovernorConfig()
    assert skipping.replace(window=30).skips_before_rollback == 3
    for given in (0, 7):
        chosen = GovernorConfig(skip_anomalous_steps=True, skips_before_rollback=given)
        assert chosen.replace(cooldown=1).skips_before_rollback == given
    assert GovernorConfig(skips_before_rollback=7).replace(window=30).skips_before_rollback == 7
    assert GovernorConfig.strict(skip_anomalous_steps=True).skips_before_rollback == 3
    with pytest.raises(ConfigError, match=r"max_restores.*skips_before_rollback.*lr_factor"):
        GovernorConfig(lr_factor=2, skips_before_rollback=-1, max_restores_of_one_capture=0)


def test_the_count_survives_a_resume() -> None:
    run = Run(before=False, skips_before_rollback=2)
    for loss in (1.0, math.nan, math.nan):
        run.governor.step(loss)
    other = Run(before=False, skips_before_rollback=2)
    other.governor.load_state_dict(run.governor.state_dict())
    other.governor.step(math.nan)
    assert (run.governor.rollback_count, other.governor.rollback_count) == (0, 1)


class Averages(nn.Module):
    """Its forward replaces a buffer that its backward needs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(3))
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean * 0.9 + x.mean(0) * 0.1
        return self.linear(x) * self.mean


@pytest.mark.parametrize("make", [Net, Averages])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_step_may_be_judged_before_its_backward(make: type[nn.Module], device: str) -> None:
    torch.manual_seed(0)
    model = make().to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    governor = TolariaGovernor(model, optimizer, config=GovernorConfig(skip_anomalous_steps=True))
    for i in range(6):
        before = copy.deepcopy(model.state_dict())
        loss = model(torch.randn(8, 3, device=device)).square().mean() * (math.nan if i == 3 else 1.0)
        verdict = governor.check_vital_signs(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        governor.step(verdict)
        after = model.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in after) == (i == 3)
    governor.synchronize()
    assert governor.offending_steps == (4,)


class Decaying(torch.optim.AdamW):
    """Does something of its own behind the step that it inherits."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.9)
        return loss


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_what_a_subclass_adds_to_a_step_is_left_out_with_it(device: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).to(device)
    optimizer = Decaying(model.parameters(), lr=0.01, **options)
    governor = TolariaGovernor(model, optimizer, config=GovernorConfig(skip_anomalous_steps=True))
    for i in range(5):
        before = copy.deepcopy(model.state_dict())
        loss = model(torch.ones(4, 3, device=device)).square().mean() * (math.nan if i in (0, 3) else 1.0)
        optimizer.zero_grad()
        loss.backward()
        verdict = governor.check_vital_signs(loss)
        optimizer.step()
        governor.step(verdict)
        after = model.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in after) == (i in (0, 3))
    governor.synchronize()
    assert governor.offending_steps == (1, 4)
