"""governor_step_ for one run and for many, against governors that bring the loss to the host."""

from __future__ import annotations

import math
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from compiled import compiled

from tolaria import GovernorConfig, ops
from tolaria.reference import governor as reference

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, and those of other packages
WINDOW = 20


class HostGovernor:
    """As people write it: a deque of floats, the default rule."""

    def __init__(self) -> None:
        self.history: deque[float] = deque(maxlen=WINDOW)
        self.consecutive = 0

    def step(self, x: float) -> bool:
        if not math.isfinite(x):
            return True
        if len(self.history) >= 10:
            mean = sum(self.history) / len(self.history)
            std = math.sqrt(sum((y - mean) ** 2 for y in self.history) / len(self.history))
            if x > 10 and x > mean + 6 * std and x > 3 * mean:
                self.consecutive += 1
                return self.consecutive >= 2
        self.history.append(x)
        self.consecutive = 0
        return False


def lightning_detector():
    """SpikeDetection of lightning-fabric, and a stand-in for the Fabric it asks (one process, no barrier)."""
    from lightning_fabric.utilities.spike import SpikeDetection

    detector = SpikeDetection(window=WINDOW)
    strategy = SimpleNamespace(
        root_device=torch.device("cpu"),
        barrier=lambda: None,
        reduce_boolean_decision=lambda decision, all: decision,
    )
    fabric = SimpleNamespace(strategy=strategy, global_rank=0)
    count = 0

    def step(loss):
        nonlocal count
        detector.on_train_batch_end(fabric, loss, None, count)
        count += 1

    step(torch.tensor(2.0))  # imports torchmetrics
    return step


def judges(n, device):
    """fused and reference on states of their own, that have seen the same 30 losses and agree on them."""
    config = GovernorConfig().to_tensor(math.log(10), device)
    states = {name: ops.governor_state(n, device=device) for name in ("fused", "reference", "compiled")}
    for k in range(30):
        loss = torch.full((n,), 2.0 + 0.01 * (k % 7), device=device)
        ops.governor_step_(states["fused"], config, loss)
        reference.governor_step_(states["reference"], config, loss)
    states["compiled"].copy_(states["reference"])
    assert torch.equal(states["fused"].view(torch.int64), states["reference"].view(torch.int64))
    return config, states


@pytest.mark.parametrize("n", [1, 32, 1024])
def bench_governor_step(n, measure, device):
    config, states = judges(n, device)
    loss = torch.full((n,), 2.03, device=device)
    hosts = [HostGovernor() for _ in range(n)]
    functions = {
        "fused": lambda: ops.governor_step_(states["fused"], config, loss),
        "reference": lambda: reference.governor_step_(states["reference"], config, loss),
        "host floats": lambda: [host.step(x) for host, x in zip(hosts, loss.tolist(), strict=True)],
    }
    absent = {}
    if n == 1:  # more governors fare no better
        step = compiled(reference.governor_step_, fullgraph=False)
        functions["compiled"] = lambda: step(states["compiled"], config, loss)
        try:
            spike, one = lightning_detector(), loss[0].cpu()
            functions["lightning"] = lambda: spike(one)
        except ImportError as error:
            absent["lightning"] = f"skipped: {error}; pip install lightning-fabric torchmetrics"
            print(absent["lightning"])
    measure(f"governor_step_/n={n}", functions, moved_bytes=0, absent=absent, slow_compile=True)
