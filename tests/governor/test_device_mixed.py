"""On CUDA beside what real loops use: GradScaler, accumulation, channels_last, several streams."""

from __future__ import annotations

import pytest
import torch
from device_run import Net, no_host_sync
from torch import nn

from tolaria.governor import GovernorConfig, PanicReason, TolariaGovernor

pytestmark = pytest.mark.cuda


def test_grad_scaler_goes_back_with_the_model_and_nothing_waits() -> None:
    torch.manual_seed(0)
    model = Net().cuda().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0, growth_interval=3)
    config = GovernorConfig(snapshot_interval=5, probation=1)
    governor = TolariaGovernor(model, optimizer, config=config, scaler=scaler)
    x, y = torch.randn(4, 1, 6, 6, device="cuda"), torch.randint(0, 3, (4,), device="cuda")
    bad = torch.full((), float("nan"), device="cuda")
    torch.cuda.synchronize()
    scales: dict[int, torch.Tensor] = {}
    after = None
    with no_host_sync():
        for i in range(1, 20):
            optimizer.zero_grad(set_to_none=False)
            losses = []
            for part in range(2):  # accumulation: the governor judges the mean
                loss = nn.functional.cross_entropy(model(x[part::2]), y[part::2]) / 2
                loss = loss * bad if i == 14 else loss
                scaler.scale(loss).backward()
                losses.append(loss.detach())
            scaler.step(optimizer)
            scaler.update()
            governor.step(torch.stack(losses).sum())
            assert scaler._scale is not None
            scales[i] = scaler._scale.clone()
            after = scales[i] if i == 14 else after
    governor.synchronize()
    report = governor.last_report
    assert report is not None
    assert report.reason is PanicReason.NON_FINITE
    assert report.step == 14
    assert after is not None
    assert torch.equal(after, scales[report.restored_step])
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_optimizers_on_streams_of_their_own_wait_for_the_capture() -> None:
    torch.manual_seed(0)
    halves = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)]).cuda()
    optimizers = [torch.optim.AdamW(half.parameters(), lr=1e-2, fused=True) for half in halves]
    config = GovernorConfig(snapshot_interval=4, probation=1)
    governor = TolariaGovernor(halves, optimizers, config=config)
    streams = [torch.cuda.Stream() for _ in halves]
    x = torch.randn(8, 64, device="cuda")
    states: dict[int, list[torch.Tensor]] = {}
    restored: list[torch.Tensor] = []
    for i in range(1, 24):
        loss = halves[1](halves[0](x)).square().mean()
        halves.zero_grad(set_to_none=False)
        loss.backward()
        for stream, optimizer in zip(streams, optimizers, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                optimizer.step()
            torch.cuda.current_stream().wait_stream(stream)
        governor.step(loss * float("nan") if i == 18 else loss)
        states[i] = [p.detach().clone() for p in halves.parameters()]
        if i == 18:
            restored = states[i]
    governor.synchronize()
    report = governor.last_report
    assert report is not None
    assert report.restored_step > 0
    assert all(torch.equal(a, b) for a, b in zip(restored, states[report.restored_step], strict=True))
