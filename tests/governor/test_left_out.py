"""Bad steps that are left out on the CPU: with a closure, under any optimizer, wherever the verdict comes."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tolaria.governor import GovernorConfig, TolariaGovernor

Params = list[nn.Parameter]


class Counted(Optimizer):
    """Counts its steps in its groups, in an attribute, and decays without a gradient, too."""

    def __init__(self, params: Params) -> None:
        super().__init__(params, {"lr": 0.05, "k": 0})
        self.calls, self.seen = 0, {"sum": 0.0}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.calls += 1
        self.seen["sum"] += 1.0
        for group in self.param_groups:
            group["k"] += 1
            group["norm"] = torch.ones(1) * self.calls  # a new tensor each time
            for p in group["params"]:
                p.mul_(0.99)
                self.state[p]["seen"] = torch.ones(2) * self.calls  # likewise
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"] / group["k"] ** 0.5)
        return loss


class Lookahead(Optimizer):
    """Steps another optimizer, and now and then goes back half the way."""

    def __init__(self, params: Params) -> None:
        super().__init__(params, {})
        self.inner = torch.optim.AdamW(params, lr=0.05)
        self.param_groups = self.inner.param_groups
        self.slow = [p.detach().clone() for p in params]
        self.counter = 0

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = self.inner.step(closure)  # type: ignore[arg-type]
        self.counter += 1
        if self.counter % 2 == 0:
            with torch.no_grad():
                for slow, p in zip(self.slow, self.param_groups[0]["params"], strict=True):
                    slow.lerp_(p, 0.5)
                    p.copy_(slow)
        return loss


class Sam(Optimizer):
    """Climbs, asks the closure once more, and steps from where it was."""

    def __init__(self, params: Params) -> None:
        super().__init__(params, {"rho": 0.05})
        self.base = torch.optim.SGD(params, lr=0.05, momentum=0.9)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        assert closure is not None
        with torch.enable_grad():
            loss = closure()
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in params if p.grad is not None]).norm()
        with torch.no_grad():
            for p in params:
                self.state[p]["old"] = p.clone()
                p.add_(p.grad, alpha=float(self.param_groups[0]["rho"] / (norm + 1e-12)))
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for p in params:
                p.copy_(self.state[p]["old"])
        self.base.step()
        return loss


class Moving(Optimizer):
    """Evaluates its closure elsewhere than where it is between two steps, as schedule-free ones do."""

    def __init__(self, params: Params) -> None:
        super().__init__(params, {"lr": 0.05})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        assert closure is not None
        self._scale(0.9)
        with torch.enable_grad():
            loss = closure()
        self._scale(1.1)
        return loss

    @torch.no_grad()
    def _scale(self, factor: float) -> None:
        for p in self.param_groups[0]["params"]:
            p.mul_(factor)
            if factor > 1.0 and p.grad is not None:
                p.add_(p.grad, alpha=-self.param_groups[0]["lr"])


class Decaying(torch.optim.AdamW):
    """Does something around the step that it inherits, gradients or not, but behind the closure."""

    def __init__(self, params: Params) -> None:
        super().__init__(params, lr=0.05)
        self.calls = 0

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        if closure is None:
            self._shrink(0.99)
        loss = super().step(closure)  # type: ignore[arg-type]
        self.calls += 1
        self._shrink(0.98)
        return loss

    @torch.no_grad()
    def _shrink(self, factor: float) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(factor)


OPTIMIZERS: dict[str, Callable[[Params], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "adamw tensor rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.05)),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4),
    "lbfgs wolfe": lambda p: torch.optim.LBFGS(p, max_iter=4, line_search_fn="strong_wolfe"),
    "counted": Counted,
    "lookahead": Lookahead,
    "sam": Sam,
    "decaying": Decaying,
    "moving": Moving,
}
NEED_CLOSURE = ("lbfgs", "lbfgs wolfe", "sam", "moving")


class Run:
    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        self.optimizer = OPTIMIZERS[name](list(self.model.parameters()))
        config = GovernorConfig(skip_anomalous_steps=True, snapshot_interval=1000)
        self.governor = TolariaGovernor(self.model, self.optimizer, config=config)
        self.evaluations = 0
        self.x = torch.randn(16, 4)

    def loss(self, factor: float) -> Tensor:
        loss = (self.model(self.x) - self.x[:, :1]).square().mean()
        return loss if factor == 1.0 else (loss + 1.0) * factor

    def closure(
        self, factor: float, judge: Callable[[Tensor], None] = lambda _: None
    ) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            self.evaluations += 1
            self.optimizer.zero_grad()
            loss = self.loss(factor)
            loss.backward()
            judge(loss)
            return loss

        return evaluate

    def state(self) -> Any:
        optimizers = [self.optimizer, *(o for o in vars(self.optimizer).values() if isinstance(o, Optimizer))]
        attributes = [
            {
                k: v
                for k, v in vars(o).items()
                if isinstance(v, int | dict | list) and k in ("calls", "seen", "counter", "slow")
            }
            for o in optimizers
        ]
        return copy.deepcopy([self.model.state_dict(), [o.state_dict() for o in optimizers], attributes])


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e6])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_with_a_closure_is_left_out(name: str, bad: float) -> None:
    run = Run(name)
    for i in range(20):
        factor = bad if i in (14, 17) else 1.0
        before = run.state()
        loss = run.closure(factor)()
        verdict = run.governor.check_vital_signs(loss)
        evaluated = run.evaluations
        returned = run.optimizer.step(run.closure(factor))  # type: ignore[arg-type]
        is_bad = i in (14, 17)
        assert verdict.is_healthy is not is_bad
        if is_bad:
            assert run.evaluations == evaluated, "there is nothing to evaluate"
            assert returned is None or math.isnan(bad) or float(returned) == loss.item()
            before[0] = {k: v for k, v in before[0].items() if "weight" in k or "bias" in k}
            after = run.state()
            after[0] = {k: v for k, v in after[0].items() if k in before[0]}
            assert same(before, after)
            assert all(p.grad is None for p in run.model.parameters())
        run.governor.step(verdict)
        if not is_bad:
            assert not same(before, run.state())
    assert run.governor.offending_steps == (15, 18)
    assert run.governor.rollback_count == 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_verdict_may_come_from_within_the_closure(name: str) -> None:
    """As where a trainer calls its hooks inside the closure that it hands over."""
    run = Run(name)
    for i in range(20):
        verdicts: list[Any] = []

        def judge(loss: Tensor, verdicts: list[Any] = verdicts) -> None:
            if not verdicts:
                verdicts.append(run.governor.check_vital_signs(loss))

        before = run.state()
        run.optimizer.step(run.closure(math.nan if i == 15 else 1.0, judge))  # type: ignore[arg-type]
        after = run.state()
        assert same(before, after) is (i == 15), i
        run.governor.step(verdicts[0])
    assert run.governor.rollback_count == 0


@pytest.mark.parametrize("name", ["lbfgs", "lbfgs wolfe", "sam"])
def test_a_later_evaluation_may_be_the_bad_one(name: str) -> None:
    run = Run(name)
    for i in range(3):
        count, verdicts = 0, []

        def judge(loss: Tensor, i: int = i, verdicts: list[Any] = verdicts) -> None:
            nonlocal count
            count += 1
            if count == 2:
                verdicts.append(run.governor.check_vital_signs(loss * math.nan if i == 1 else loss))

        before = run.state()
        run.optimizer.step(run.closure(1.0, judge))  # type: ignore[arg-type]
        if i == 1:
            before[0] = {k: v for k, v in before[0].items() if "running" not in k and "num_" not in k}
            after = run.state()
            after[0] = {k: v for k, v in after[0].items() if k in before[0]}
            assert same(before, after)
        run.governor.step(verdicts[0])
    assert run.governor.rollback_count == 0


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in NEED_CLOSURE])
def test_without_a_closure_nothing_at_all_changes(name: str) -> None:
    run = Run(name)
    for i in range(16):
        before = run.state()
        loss = run.closure(1e6 if i == 15 else 1.0)()
        verdict = run.governor.check_vital_signs(loss)
        run.optimizer.step()
        assert same(before, run.state()) is (i == 15)
        run.governor.step(verdict)


@pytest.mark.parametrize("by_name", [True, False])
def test_a_closure_by_name_and_by_place(by_name: bool) -> None:
    run = Run("adamw")
    run.governor.step(run.governor.check_vital_signs(1.0))
    verdict = run.governor.check_vital_signs(math.nan)
    closure = run.closure(1.0)
    run.optimizer.step(closure=closure) if by_name else run.optimizer.step(closure)  # type: ignore[arg-type]
    assert run.evaluations == 0
    run.governor.step(verdict)
    run.optimizer.step(closure)  # type: ignore[arg-type]
    assert run.evaluations == 1


def test_a_step_that_raises_leaves_nothing_behind() -> None:
    class Raises(Counted):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            super().step(closure)
            raise OSError("the network is down")

    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    optimizer = Raises(list(model.parameters()))
    governor = TolariaGovernor(model, optimizer, config=GovernorConfig(skip_anomalous_steps=True))
    kept = copy.deepcopy(model.state_dict())
    verdict = governor.check_vital_signs(math.nan)
    for _ in range(2):
        with pytest.raises(OSError, match="down"):
            optimizer.step()
    governor.step(verdict)
    assert same(kept, model.state_dict())
    assert (optimizer.calls, optimizer.param_groups[0]["k"]) == (0, 0)


def test_schedules_and_scalers_see_a_step() -> None:
    run = Run("adamw")
    scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(4):
            loss = run.loss(math.nan if i == 0 else 1.0)
            run.optimizer.zero_grad()
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            verdict = run.governor.check_vital_signs(loss)
            scaler.step(run.optimizer)
            scaler.update()
            if i:  # the first was an overflow to the scaler, which then calls no step
                scheduler.step()
            run.governor.step(verdict)
    assert run.governor.rollback_count == 0
    assert scheduler.last_epoch == 3


def test_a_skipped_first_step_is_a_step_to_a_schedule() -> None:
    run = Run("sgd")
    scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 2)
    verdict = run.governor.check_vital_signs(math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.optimizer.step()
        scheduler.step()
    run.governor.step(verdict)


def test_the_steps_of_a_removed_optimizer_are_taken() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = TolariaGovernor(model, optimizer, config=GovernorConfig(skip_anomalous_steps=True))
    governor.remove_optimizer(optimizer)
    model(torch.ones(1, 2)).sum().backward()
    before = model.weight.detach().clone()
    verdict = governor.check_vital_signs(math.nan)
    optimizer.step()
    governor.step(verdict)
    assert not torch.equal(model.weight, before)
