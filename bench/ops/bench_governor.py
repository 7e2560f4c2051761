"""governor_step_ for one run and for many, against governors that bring the loss to the host."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from compiled import compiled
from detectors import DETECTORS, QUICK_ONES, HostGovernor, found
from harness import QUICK

from tolaria import GovernorConfig, ops
from tolaria.reference import governor as reference

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, and those of other packages


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
def bench_governor_step(n, measure, effort, device):
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
        one = loss[0].cpu()
        others, absent = found(
            QUICK_ONES if effort is QUICK else DETECTORS, [one + 0.01 * (k % 7) for k in range(30)]
        )
        functions |= {name: functools.partial(watch, one) for name, watch in others.items()}
    measure(f"governor_step_/n={n}", functions, moved_bytes=0, absent=absent)
