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


BANK_RECORDS = 16  # events that the mailbox of a row of GovernorBank holds


def judges(n, device):
    """fused and reference on states of their own, that have seen the same 30 losses and agree on them.

    As in a bank they are not attached: a capture that falls due and that nobody carries out is ordered again
    at every step, which is no clean one.
    """
    config = GovernorConfig().to_tensor(math.log(10), device)
    names = ("fused", "reference", "compiled")
    states = {name: ops.governor_state(n, attached=False, device=device) for name in names}
    for k in range(30):
        loss = torch.full((n,), 2.0 + 0.01 * (k % 7), device=device)
        ops.governor_step_(states["fused"], config, loss)
        reference.governor_step_(states["reference"], config, loss)
    states["compiled"].copy_(states["reference"])
    assert torch.equal(states["fused"].view(torch.int64), states["reference"].view(torch.int64))
    return config, states


@pytest.mark.parametrize(("n", "records"), [(1, 0), (32, 0), (1024, 0), (1024, BANK_RECORDS)])
def bench_governor_step(n, records, measure, effort, device):
    config, states = judges(n, device)
    boxes = dict.fromkeys(states)
    if records:
        pinned = device == "cuda"
        boxes = {name: ops.governor_mailbox(n, records=records, pin_memory=pinned) for name in states}
    loss = torch.full((n,), 2.03, device=device)
    hosts = [HostGovernor() for _ in range(n)]
    functions = {
        "fused": lambda: ops.governor_step_(states["fused"], config, loss, mailbox=boxes["fused"]),
        "reference": lambda: reference.governor_step_(
            states["reference"], config, loss, mailbox=boxes["reference"]
        ),
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
    group = f"governor_step_/n={n}" + (", mailbox" if records else "")
    measure(group, functions, moved_bytes=0, absent=absent)
