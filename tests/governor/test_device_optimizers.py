"""Every optimizer of torch on CUDA: rolled back to before and after its state existed; steps left out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from device_run import no_host_sync, usual_schedule
from torch import Tensor, nn

from tolaria.errors import TolariaError
from tolaria.governor import GovernorConfig, PanicReason, TolariaGovernor

pytestmark = pytest.mark.cuda

Make = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def made(name: str, **options: Any) -> Make:
    return lambda parameters: getattr(torch.optim, name)(parameters, **{"lr": 0.02, **options})


OPTIMIZERS: dict[str, Make] = {
    "sgd": made("SGD"),
    "sgd-momentum": made("SGD", momentum=0.9),
    "sgd-dampening": made("SGD", momentum=0.9, dampening=0.5),
    "sgd-fused": made("SGD", momentum=0.9, fused=True),
    "adam-fused": made("Adam", fused=True),
    "adam-amsgrad-capturable": made("Adam", amsgrad=True, capturable=True),
    "adamw": made("AdamW"),
    "adamw-foreach": made("AdamW", foreach=True),
    "nadam": made("NAdam"),
    "nadam-capturable": made("NAdam", capturable=True),
    "rprop": made("Rprop"),
    "rprop-capturable": made("Rprop", capturable=True),
    "asgd": made("ASGD"),
    "asgd-capturable": made("ASGD", capturable=True),
    "adagrad": made("Adagrad", initial_accumulator_value=0.1),
    "adagrad-fused": made("Adagrad", fused=True),
    "rmsprop": made("RMSprop", momentum=0.9, centered=True),
    "rmsprop-capturable": made("RMSprop", momentum=0.9, capturable=True),
    "adadelta": made("Adadelta", capturable=True),
    "radam": made("RAdam"),
    "radam-capturable": made("RAdam", capturable=True),
    "adamax": made("Adamax", capturable=True),
    "adafactor": made("Adafactor"),
}
EXACT_AT_ONCE = [
    n for n in OPTIMIZERS if "fused" in n or "capturable" in n or n in ("sgd", "sgd-momentum", "adamax")
]


class Run:
    """A small network with batch norm under one optimizer."""

    def __init__(self, make: Make, **settings: Any) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).cuda()
        self.optimizer = make(self.model.parameters())
        config = GovernorConfig(**{"snapshot_interval": 1000, "probation": 1, **settings})
        self.governor = TolariaGovernor(self.model, self.optimizer, config=config)
        self.x, self.y = torch.randn(6, 5, device="cuda"), torch.arange(6, device="cuda") % 3
        self.factors = {
            "good": torch.ones((), device="cuda"),
            "nan": torch.full((), float("nan"), device="cuda"),
            "spike": torch.full((), 1e4, device="cuda"),
        }

    def step(self, kind: str = "good", *, judge_first: bool = False) -> None:
        loss = nn.functional.cross_entropy(self.model(self.x), self.y) * self.factors[kind]
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()
        verdict = self.governor.check_vital_signs(loss) if judge_first else None
        self.optimizer.step()
        self.governor.step(loss if verdict is None else verdict)

    def state(self) -> dict[str, Any]:
        return copy.deepcopy(
            {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()["state"]}
        )


def assert_same(a: object, b: object, where: str = "") -> None:
    if isinstance(a, dict):
        assert isinstance(b, dict), where
        assert a.keys() == b.keys(), f"{where}: {a.keys()} and {b.keys()}"
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, Tensor):
        assert isinstance(b, Tensor), where
        assert torch.equal(a, b), f"{where}: {a} and {b}"
    else:
        assert a == b, where


@pytest.mark.parametrize("captured", [0, 3], ids=["before-its-state", "after-its-state"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_from_the_capture_as_if_nothing_had_happened(name: str, captured: int) -> None:
    straight, run = Run(OPTIMIZERS[name]), Run(OPTIMIZERS[name])
    for _ in range(captured):
        run.step()
        straight.step()
    if captured:
        run.governor.snapshot()
    for _ in range(2):
        run.step()
    run.step("nan")
    run.governor.synchronize()
    assert run.governor.last_report is not None
    assert run.governor.last_report.restored_step == captured
    for _ in range(3):
        run.step()
        straight.step()
    assert_same(straight.state(), run.state())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fresh_state_is_what_the_optimizer_would_begin_with(name: str) -> None:
    """On the device at once, before the host has heard of the rollback."""
    run = Run(OPTIMIZERS[name])
    run.step()
    before = [{k: v.clone() for k, v in s.items() if v.is_cuda} for s in run.optimizer.state.values()]
    run.step("nan")
    # No step and no poll since: what is on the device is what the restore left there.
    fresh = Run(OPTIMIZERS[name])
    for group in fresh.optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    assert run.governor.rollback_count in (0, 1)
    for state, once in zip(run.optimizer.state.values(), before, strict=False):
        for key in once.keys() & state.keys():
            assert bool(torch.isfinite(state[key]).all()), key
            expected = {"mu_product": 1.0, "mu": 1.0, "eta": 0.02, "step_size": 0.02, "sum": 0.1}.get(
                key, 0.0
            )
            if name == "adagrad-fused":
                expected = 0.0
            assert bool((state[key] == expected).all()), (key, state[key])


@pytest.mark.parametrize("first", [0, 3], ids=["first-step", "later"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_was_never_taken(name: str, first: int) -> None:
    if first == 0 and name == "sgd-dampening":
        pytest.skip("its first step has no equal in a state that exists")
    settings = {"skip_anomalous_steps": True, "warmup_bound": 50.0, "min_panics_before_rollback": 9}
    straight, run = Run(OPTIMIZERS[name], **settings), Run(OPTIMIZERS[name], **settings)
    for _ in range(first):
        run.step(judge_first=True)
        straight.step(judge_first=True)
    run.step("spike", judge_first=True)
    events = run.governor.synchronize()
    assert [e.reason for e in events if e.kind == "verdict"] == [PanicReason.ANOMALY]
    for _ in range(3):
        run.step(judge_first=True)
        straight.step(judge_first=True)
    assert_same(straight.state(), run.state())


@pytest.mark.parametrize("name", EXACT_AT_ONCE)
def test_skipping_waits_for_nothing(name: str) -> None:
    settings = {"skip_anomalous_steps": True, "warmup_bound": 50.0, "min_panics_before_rollback": 9}
    straight, run = Run(OPTIMIZERS[name], **settings), Run(OPTIMIZERS[name], **settings)
    for each in (run, straight):
        for _ in range(2):
            each.step(judge_first=True)
    torch.cuda.synchronize()
    with no_host_sync():
        for kind in ("spike", "good", "spike", "spike", "good", "good"):
            run.step(kind, judge_first=True)
        for _ in range(3):
            straight.step(judge_first=True)
    run.governor.synchronize()
    assert_same(straight.state(), run.state())


def test_host_counters_follow_however_late_the_host_hears() -> None:
    """Plain AdamW counts on the CPU; two of seven steps are skipped, one before and one after a capture."""
    settings = {"skip_anomalous_steps": True, "warmup_bound": 50.0, "min_panics_before_rollback": 9}
    run = Run(OPTIMIZERS["adamw"], **settings)
    try:
        import vgpu  # type: ignore[import-not-found]

        vgpu.schedule("lazy")
    except ImportError:
        vgpu = None
    for i, kind in enumerate(("good", "good", "spike", "good", "spike", "good", "good")):
        if i == 4:
            run.governor.snapshot()
        run.step(kind, judge_first=True)
    run.governor.synchronize()
    assert {float(s["step"]) for s in run.optimizer.state.values()} == {5.0}
    if vgpu is not None:
        vgpu.schedule(usual_schedule())


def test_undo_copies_are_laid_out_before_a_graph() -> None:
    run = Run(OPTIMIZERS["sgd-momentum"], skip_anomalous_steps=True)
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        run.x.mul_(1.0)  # a graph with nothing in it is a warning
        with pytest.raises(TolariaError, match="eager steps first"):
            run.optimizer.step()
