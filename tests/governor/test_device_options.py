"""The options of `GovernorConfig.strict()` on CUDA: bit for bit the CPU's, and nothing waits for them."""

from __future__ import annotations

import pytest
import torch
from device_run import Run, judged_bits
from torch import nn

from tolaria.governor import GovernorConfig, PanicReason, RollbackEvent, TolariaGovernor

pytestmark = pytest.mark.cuda


def test_strict_story_is_that_of_the_cpu() -> None:
    losses = [0.5 * 1.01 ** max(0, i - 30) * (1.0 + 0.02 * (i % 7)) for i in range(160)]
    norms = [1.0 + 0.1 * (i % 3) for i in range(160)]
    norms[20] = norms[21] = 300.0
    norms[25] = float("inf")
    stories = []
    for device in ("cpu", "cuda"):
        model = nn.Linear(3, 3).to(device)
        config = GovernorConfig.strict(rule="all", snapshot_interval=20)
        governor = TolariaGovernor(
            model, torch.optim.SGD(model.parameters(), lr=0.0), config=config, num_classes=10
        )
        told = []
        for loss, norm in zip(losses, norms, strict=True):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, norm)
            governor.step(torch.tensor(loss, device=device))
        told = [e.report.reason for e in governor.synchronize() if isinstance(e, RollbackEvent)]
        stories.append((judged_bits(governor), told))
    assert torch.equal(stories[0][0], stories[1][0])
    assert stories[0][1] == stories[1][1]
    assert stories[0][1][:3] == [PanicReason.GRADIENT_NORM, PanicReason.GRADIENT_NORM, PanicReason.DRIFT]


def test_judging_the_gradient_costs_one_launch_and_no_wait() -> None:
    vgpu = pytest.importorskip("vgpu", reason="counts come from the virtual device")
    loss = torch.ones((), device="cuda")
    launches = []
    for setting in (False, True, True):
        run = Run(GovernorConfig(gradient_norm=setting, snapshot_interval=1000))
        run.step()
        for parameter in run.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        run.governor.synchronize()
        vgpu.reset()
        with vgpu.forbid_host_sync():
            run.governor.step(loss)
        stats = vgpu.stats()
        launches.append(sum(k["launches"] for k in stats["kernel_launches"].values()))
        assert not stats["aten_launches"]
        assert stats["host_sync_total"] == stats["event_queries"] == 0
    assert launches[1] == launches[2] == launches[0] + 1
    assert launches[0] <= 3
