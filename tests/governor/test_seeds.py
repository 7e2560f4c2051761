"""Rollbacks of a network that grew: seeds germinated or fossilised between capture and panic."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import tolaria
from tolaria.governor import GovernorConfig, PanicReason, SeedCulledEvent, TolariaGovernor
from tolaria.nn import SeedSlot, SeedStage


@pytest.fixture(params=["fused", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with tolaria.backend(request.param):
        yield


class Grower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.slot, self.last = nn.Linear(6, 8), SeedSlot("mid"), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.slot(torch.relu(self.first(x))))


class Run:
    def __init__(self, interval: int = 4) -> None:
        torch.manual_seed(0)
        self.model = Grower()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.seed_optimizer: torch.optim.Optimizer | None = None
        config = GovernorConfig(snapshot_interval=interval, probation=1, seed_check_interval=1)
        self.governor = TolariaGovernor(self.model, self.optimizer, config=config)

    def train(self, steps: int, seed: int) -> None:
        source = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            x, y = torch.randn(8, 6, generator=source), torch.randint(0, 3, (8,), generator=source)
            loss = nn.functional.cross_entropy(self.model(x), y)
            for optimizer in filter(None, (self.optimizer, self.seed_optimizer)):
                optimizer.zero_grad()
            loss.backward()
            for optimizer in filter(None, (self.optimizer, self.seed_optimizer)):
                optimizer.step()
            if self.model.slot.schedule is not None:
                self.model.slot.schedule.step()
            self.governor.step(loss)

    def germinate(self) -> None:
        seed = self.model.slot.germinate(lambda x: nn.Linear(8, 8), torch.zeros(2, 8), rng_seed=1)
        self.seed_optimizer = torch.optim.AdamW(seed.parameters(), lr=1e-2)
        self.governor.add_optimizer(self.seed_optimizer)
        self.model.slot.start_training()

    def host(self) -> list[Tensor]:
        tensors = [*self.model.first.parameters(), *self.model.last.parameters()]
        return [t.detach().clone() for t in tensors]


def test_seed_germinated_after_the_capture_is_gone_after_the_rollback() -> None:
    straight, run = Run(10_000), Run(10_000)
    straight.train(5, seed=1)
    straight.governor.reset()
    straight.train(6, seed=3)

    run.train(5, seed=1)
    run.governor.reset()
    run.germinate()
    run.train(3, seed=2)
    run.model.slot.start_blending(4)
    run.train(3, seed=2)
    report = run.governor.execute_rollback()
    assert report.steps_lost == 6
    assert run.model.slot.stage is SeedStage.DORMANT
    assert run.model.slot.seed is None
    assert float(run.model.slot.alpha) == 0.0
    run.seed_optimizer = None
    run.train(6, seed=3)
    for a, b in zip(straight.host(), run.host(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("stage", [SeedStage.TRAINING, SeedStage.BLENDING])
def test_seed_not_fossilised_at_capture_is_dropped_even_if_it_is_now(stage: SeedStage) -> None:
    run = Run(10_000)
    run.germinate()
    run.train(4, seed=1)
    if stage is SeedStage.BLENDING:
        run.model.slot.start_blending(3)
        run.train(2, seed=1)
    run.governor.snapshot()
    captured = run.host()
    run.train(2, seed=2)
    if stage is SeedStage.TRAINING:
        run.model.slot.start_blending(3)
    run.train(3, seed=2)
    run.model.slot.fossilize()
    run.train(1, seed=2)  # the capture that this orders is on probation yet
    run.governor.execute_rollback()
    assert run.model.slot.stage is SeedStage.CULLED
    assert float(run.model.slot.alpha) == 0.0
    for a, b in zip(captured, run.host(), strict=True):
        assert torch.equal(a, b)
    run.train(12, seed=4)
    assert run.governor.rollback_count == 1


def test_seed_fossilised_at_capture_is_restored_bit_for_bit() -> None:
    run = Run(10_000)
    run.germinate()
    run.train(2, seed=1)
    run.model.slot.start_blending(2)
    run.train(3, seed=1)
    run.model.slot.fossilize()
    run.train(2, seed=1)
    run.governor.snapshot()
    run.train(2, seed=2)
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    run.governor.snapshot()
    run.train(3, seed=3)
    run.governor.step(float("nan"))
    assert run.model.slot.stage is SeedStage.FOSSILIZED
    assert float(run.model.slot.alpha) == 1.0
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_poisoned_incubating_seed_is_culled_alone() -> None:
    run = Run(4)
    run.germinate()
    run.train(6, seed=1)
    assert run.model.slot.seed is not None
    with torch.no_grad():
        next(run.model.slot.seed.parameters()).fill_(float("nan"))
    assert run.seed_optimizer is not None
    run.train(1, seed=2)
    events = [e for e in run.governor.poll() if isinstance(e, SeedCulledEvent)]
    assert [e.name for e in events] == ["slot"]
    assert run.model.slot.stage is SeedStage.CULLED
    run.train(12, seed=2)
    assert run.governor.rollback_count == 0
    assert all(bool(torch.isfinite(p).all()) for p in run.model.parameters())


def test_poisoned_blending_seed_rolls_the_run_back() -> None:
    run = Run(4)
    run.germinate()
    run.train(6, seed=1)
    run.model.slot.start_blending(20)
    run.train(3, seed=1)
    assert run.model.slot.seed is not None
    with torch.no_grad():
        next(run.model.slot.seed.parameters()).fill_(float("nan"))
    run.train(2, seed=2)
    report = run.governor.last_report
    assert report is not None
    assert report.reason is PanicReason.NON_FINITE
    assert run.model.slot.stage in (SeedStage.CULLED, SeedStage.DORMANT)
    run.train(8, seed=2)
    assert run.governor.rollback_count == 1


def test_fossil_is_captured_without_being_asked_for() -> None:
    run, other = Run(10_000), Run(10_000)
    run.germinate()
    run.train(2, seed=1)
    run.model.slot.start_blending(2)
    run.train(3, seed=1)
    run.model.slot.fossilize()
    run.train(1, seed=2)
    captured = {k: v.clone() for k, v in run.model.state_dict().items()}
    run.train(4, seed=2)
    report = run.governor.execute_rollback()
    assert run.model.slot.stage is SeedStage.FOSSILIZED
    assert report.steps_lost == 4
    assert all(torch.equal(v, captured[k]) for k, v in run.model.state_dict().items())
    other.train(6, seed=2)  # a governor over another model has heard of it, and has captured nothing
    assert other.governor.execute_rollback().steps_lost == 6


def test_fossil_that_a_rollback_takes_at_once_is_not_captured() -> None:
    run = Run(10_000)
    run.germinate()
    run.train(2, seed=1)
    run.model.slot.start_blending(2)
    run.train(3, seed=1)
    run.model.slot.fossilize()
    run.governor.execute_rollback()
    assert run.model.slot.stage is SeedStage.DORMANT
    run.seed_optimizer = None
    run.train(5, seed=2)
    assert run.governor.execute_rollback().steps_lost == 5
