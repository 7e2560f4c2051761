"""Train k, capture, train j more, wreck, roll back, go on m == train k then those m, bit for bit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tolaria
from tolaria.governor import GovernorConfig, PanicReason, RollbackEvent, TolariaGovernor

K, J, M = 7, 5, 6

OptimizerFactory = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, OptimizerFactory] = {
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "sgd-dampening": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.5),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw-tensor-lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), foreach=False),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
}


class Net(nn.Module):
    """BatchNorm, dropout and tied weights in one small network."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.norm = nn.BatchNorm1d(12)
        self.drop = nn.Dropout(0.2)
        self.up = nn.Linear(12, 12, bias=False)
        self.down = nn.Linear(12, 12, bias=False)
        self.down.weight = self.up.weight
        self.last = nn.Linear(12, 3)
        self.register_buffer("mask", torch.tensor([0.0, -math.inf, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(torch.relu(self.norm(self.first(x))))
        return self.last(x + self.down(torch.relu(self.up(x))))


def batches(count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randn(16, 6, generator=source), torch.randint(0, 3, (16,), generator=source)


class Run:
    """A training run that can be stepped, wrecked and compared."""

    def __init__(
        self, make: OptimizerFactory, *, scaler: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        torch.manual_seed(0)
        self.model = Net().to(dtype)
        self.optimizer = make(self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, gamma=0.7)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=4) if scaler else None
        self.governor: TolariaGovernor | None = None

    def attach(self, **settings: Any) -> TolariaGovernor:
        config = GovernorConfig(
            **{"snapshot_interval": 10_000, "probation": 1, "restore_rng": True, **settings}
        )
        self.governor = TolariaGovernor(
            self.model, self.optimizer, config=config, schedulers=[self.scheduler], scaler=self.scaler
        )
        return self.governor

    def train(self, data: Iterator[tuple[Tensor, Tensor]]) -> None:
        for x, y in data:
            loss = nn.functional.cross_entropy(self.model(x.to(self.dtype)).float(), y)
            self.optimizer.zero_grad()
            if self.scaler is None:
                loss.backward()
                self.optimizer.step()
            else:
                self.scaler.scale(loss).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()
            self.scheduler.step()
            if self.governor is not None:
                self.governor.step(loss)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.first.weight.dtype

    def wreck(self) -> None:
        with torch.no_grad():
            for tensor in [*self.model.parameters(), *self.model.buffers()]:
                tensor.fill_(float("nan") if tensor.is_floating_point() else 77)
            for state in self.optimizer.state.values():
                for value in state.values():
                    if isinstance(value, Tensor):
                        value.fill_(float("nan"))
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * 123.0
        torch.randn(5)

    def fingerprint(self) -> dict[str, Any]:
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "scaler": None if self.scaler is None else self.scaler.state_dict(),
                "rng": torch.get_rng_state(),
            }
        )


def assert_same(a: object, b: object, where: str = "") -> None:
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor), where
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        assert torch.equal(*raw), where
    elif isinstance(a, dict):
        assert isinstance(b, dict), where
        assert a.keys() == b.keys(), f"{where}: {sorted(map(str, a))} {sorted(map(str, b))}"
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, f"{where}: {a} {b}"


@pytest.fixture(params=["fused", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with tolaria.backend(request.param):
        yield request.param


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("k", [0, K], ids=["before-optimizer-state", "after-optimizer-state"])
def test_rollback_then_training_equals_the_run_that_never_went_wrong(name: str, k: int, backend: str) -> None:
    straight, guarded = Run(OPTIMIZERS[name]), Run(OPTIMIZERS[name])
    torch.manual_seed(4)
    straight.train(batches(k, seed=1))
    torch.manual_seed(5)
    straight.train(batches(M, seed=3))

    torch.manual_seed(4)
    guarded.train(batches(k, seed=1))
    torch.manual_seed(5)
    governor = guarded.attach()
    guarded.train(batches(J, seed=2))
    guarded.wreck()
    report = governor.execute_rollback()
    assert report.reason is PanicReason.MANUAL
    assert report.restored_step == 0
    assert report.steps_lost == J
    guarded.governor = None
    guarded.train(batches(M, seed=3))
    assert_same(straight.fingerprint(), guarded.fingerprint())


@pytest.mark.parametrize("scaler", [False, True], ids=["plain", "scaler"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_rollback_to_a_promoted_capture(scaler: bool, dtype: torch.dtype, backend: str) -> None:
    make = OPTIMIZERS["adamw"]
    run = Run(make, scaler=scaler, dtype=dtype)
    governor = run.attach()
    run.train(batches(K, seed=1))
    governor.snapshot()
    at_capture = run.fingerprint()
    run.train(batches(J, seed=2))
    assert governor.last_good_step == K
    for repeated in (False, True):  # twice from the same capture
        run.wreck()
        report = governor.execute_rollback()
        assert report.restored_step == K
        restored = run.fingerprint()
        if repeated:  # the same draws would lead to the same end
            assert not torch.equal(restored.pop("rng"), at_capture.pop("rng"))
        assert_same(at_capture, restored)
        run.train(batches(3, seed=4))
    assert governor.rollback_count == 2


def test_nan_loss_rolls_back_and_clears_gradients(backend: str) -> None:
    run = Run(OPTIMIZERS["adamw"])
    governor = run.attach()
    run.train(batches(3, seed=1))
    governor.step(float("nan"))
    (event,) = [e for e in governor.poll() if isinstance(e, RollbackEvent)]
    assert event.report.reason is PanicReason.NON_FINITE
    assert event.report.reward == -10.0
    assert all(p.grad is None for p in run.model.parameters())
    assert governor.execute_rollback() == event.report, "already done: same report, not counted twice"
    assert governor.rollback_count == 1


def test_restore_keeps_every_address_and_a_capture_allocates_nothing(backend: str) -> None:
    run = Run(OPTIMIZERS["adamw"])
    governor = run.attach(snapshot_interval=3, probation=1)
    run.train(batches(8, seed=1))
    tensors = [*run.model.parameters(), *run.model.buffers()]
    tensors += [v for s in run.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    addresses = [t.data_ptr() for t in tensors]
    slots = governor._engine.slots
    arenas = [segment.data_ptr() for segment in slots.segments]
    table = slots.table.data
    run.train(batches(12, seed=2))
    governor.step(float("inf"))
    assert governor.rollback_count == 1
    assert [t.data_ptr() for t in tensors] == addresses
    assert [segment.data_ptr() for segment in slots.segments] == arenas
    assert slots.table.data is table, "the table is rebuilt only when the structure changes"


def test_poisoned_buffer_is_found_by_the_capture_and_never_promoted(backend: str) -> None:
    run = Run(OPTIMIZERS["adamw"])
    governor = run.attach(snapshot_interval=4, probation=1)
    run.train(batches(6, seed=1))
    good = governor.last_good_step
    assert good == 4
    with torch.no_grad():
        assert isinstance(run.model.norm.running_mean, Tensor)
        run.model.norm.running_mean[2] = float("nan")
    run.train(batches(4, seed=2))
    report = governor.last_report
    assert report is not None
    assert report.reason is PanicReason.NON_FINITE_STATE
    assert report.tensor_name == "norm.running_mean"
    assert report.restored_step == good
    assert all(bool(torch.isfinite(b).all()) for n, b in run.model.named_buffers() if n != "mask")


def test_infinite_mask_does_not_block_promotion(backend: str) -> None:
    run = Run(OPTIMIZERS["adamw"])
    governor = run.attach(snapshot_interval=4, probation=1)
    run.train(batches(30, seed=1))
    assert governor.rollback_count == 0
    assert governor.last_good_step >= 20
    (attach, *_) = governor.poll()
    assert attach.as_dict()["exempt"] == ["mask"]


def test_non_finite_parameter_at_attach_is_an_error() -> None:
    run = Run(OPTIMIZERS["adamw"])
    with torch.no_grad():
        run.model.last.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"last\.bias"):
        run.attach()


def test_restored_run_is_not_rolled_back_by_its_own_history(backend: str) -> None:
    run = Run(OPTIMIZERS["adamw"])
    governor = run.attach()
    for _ in range(30):
        governor.step(0.1)
    governor.step(float("nan"))
    for _ in range(30):
        governor.step(2.3)
    assert governor.rollback_count == 1
    governor = run.attach()
    for i in range(60):
        governor.step(50.0 * 0.9**i)
    governor.step(float("nan"))
    for i in range(60):
        governor.step(50.0 * 0.9**i)
    assert governor.rollback_count == 1


def test_optimizer_state_replaced_or_cleared_is_found_again(backend: str) -> None:
    run = Run(OPTIMIZERS["adamw"])
    governor = run.attach()
    run.train(batches(K, seed=1))
    governor.snapshot()
    at_capture = run.fingerprint()
    run.train(batches(3, seed=2))
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    run.train(batches(1, seed=2))
    run.optimizer.state.clear()
    governor.execute_rollback()
    assert_same(at_capture, run.fingerprint())


def test_param_group_added_after_the_capture_stays_and_starts_afresh(backend: str) -> None:
    """Else its parameters would be trained by nobody to the end of the run."""
    run = Run(OPTIMIZERS["adamw"])
    governor = run.attach()
    run.train(batches(K, seed=1))
    governor.snapshot()
    at_capture = run.fingerprint()
    run.train(batches(3, seed=2))
    extra = nn.Linear(3, 3)
    born = copy.deepcopy(extra.state_dict())
    run.model.add_module("extra", extra)
    run.optimizer.add_param_group({"params": list(extra.parameters()), "lr": 0.25})
    for parameter in extra.parameters():
        parameter.grad = torch.ones_like(parameter)
    run.optimizer.step()
    governor.step(1.0)
    governor.execute_rollback()
    group = run.optimizer.param_groups.pop()
    assert [id(p) for p in group["params"]] == [id(p) for p in extra.parameters()]
    assert group["lr"] == 0.25
    assert not any(p in run.optimizer.state for p in extra.parameters())
    for name, value in extra.state_dict().items():
        assert torch.equal(value, born[name])
    del run.model.extra
    assert_same(at_capture["optimizer"], run.fingerprint()["optimizer"])


def test_lr_factor_compounds_even_from_the_same_slot(backend: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    config = GovernorConfig(lr_factor=0.5)
    governor = TolariaGovernor(model, optimizer, config=config, schedulers=[scheduler])
    for expected in (0.5, 0.25, 0.125):
        governor.step(float("nan"))
        assert optimizer.param_groups[0]["lr"] == expected
        optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == expected, "LambdaLR computes from base_lrs"


def test_too_many_rollbacks_raise_with_the_history(backend: str) -> None:
    run = Run(OPTIMIZERS["adamw"])
    governor = run.attach(max_rollbacks=3, rollback_window=50)
    for _ in range(2):
        governor.step(float("nan"))
    with pytest.raises(tolaria.TrainingDivergedError, match="3 rollbacks within 50 steps") as caught:
        governor.step(float("nan"))
    assert len(caught.value.history) == 3
    assert bool(torch.isfinite(run.model.last.weight).all())


def test_skipped_step_changes_nothing_at_all(backend: str) -> None:
    run = Run(OPTIMIZERS["adamw"])
    governor = run.attach(skip_anomalous_steps=True)
    for x, y in batches(15, seed=1):
        loss = nn.functional.cross_entropy(run.model(x), y)
        run.optimizer.zero_grad()
        loss.backward()
        verdict = governor.check_vital_signs(loss)
        run.optimizer.step()
        governor.step(verdict)
    before = run.fingerprint()
    ((x, y),) = batches(1, seed=9)
    loss = nn.functional.cross_entropy(run.model(x * 1e4), y) + 1e6
    loss.backward()
    verdict = governor.check_vital_signs(loss)
    assert verdict.reason is PanicReason.ANOMALY
    assert not verdict
    run.optimizer.step()
    governor.step(verdict)
    after = run.fingerprint()
    assert_same(before["model"], after["model"])
    assert_same(before["optimizer"], after["optimizer"])
    governor.check_vital_signs(1.0)
    with pytest.raises(ValueError, match="was returned last"):
        governor.step(verdict)


def test_state_dict_round_trip_continues_identically(backend: str) -> None:
    run, twin = Run(OPTIMIZERS["adamw"]), Run(OPTIMIZERS["adamw"])
    governor = run.attach(snapshot_interval=5)
    losses = torch.rand(60, generator=torch.Generator().manual_seed(0)).tolist()
    losses[40:42] = [100.0, 100.0]
    for loss in losses[:30]:
        governor.step(loss)
    other = twin.attach()
    other.load_state_dict(governor.state_dict(), keep_config=False)
    assert other.config == governor.config
    for loss in losses[30:]:
        a, b = governor.check_vital_signs(loss), other.check_vital_signs(loss)
        assert (a.step, a.reason, bool(a), a.mean, a.std) == (b.step, b.reason, bool(b), b.mean, b.std)
    assert governor.lifetime == other.lifetime
