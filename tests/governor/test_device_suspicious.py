"""Suspicious magnitudes on CUDA: found without waiting, in recorded graphs too, as on the CPU."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from device_run import judged_bits, no_host_sync, usual_schedule
from torch import nn

from tolaria.governor import (
    GovernorConfig,
    GovernorEvent,
    PanicReason,
    PromotionEvent,
    RollbackEvent,
    TolariaGovernor,
    VerdictEvent,
)

pytestmark = pytest.mark.cuda


class Run:
    """A linear layer with a buffer that nothing trains."""

    def __init__(self, device: str = "cuda", **settings: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(40, 40)
        self.model.register_buffer("mean", torch.full((30_000,), 0.5))
        self.model.to(device)
        self.mean = self.model.get_buffer("mean")
        capturable = device == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, capturable=capturable)
        config = GovernorConfig(**{"snapshot_interval": 4, "probation": 1, **settings})
        self.governor = TolariaGovernor(self.model, self.optimizer, config=config)
        self.x = torch.ones(2, 40, device=device)

    def step(self) -> None:
        loss = self.model(self.x).square().mean()
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()
        self.optimizer.step()
        self.governor.step(loss)


def story(events: list[GovernorEvent]) -> list[tuple[str, int, str | None]]:
    found: list[tuple[str, int, str | None]] = []
    for e in events:
        if isinstance(e, VerdictEvent) and e.reason is PanicReason.SUSPICIOUS_STATE:
            found.append(("suspicion", e.step, e.tensor_name))
        elif isinstance(e, PromotionEvent):
            found.append(("promotion", e.step, None))
        elif isinstance(e, RollbackEvent):
            found.append(("rollback", e.step, e.report.tensor_name))
    return found


@pytest.mark.parametrize("how", ["tell", "rollback"])
@pytest.mark.parametrize("storage", ["pinned", "device"])
def test_the_host_never_waits_and_hears_what_the_cpu_says(how: str, storage: str) -> None:
    told, bits = [], []
    for device in ("cpu", "cuda"):
        run = Run(device, suspicious_state=how, storage=storage)

        def train(run: Run = run) -> None:
            for step in range(1, 40):
                if step == 18:
                    run.mean[29_999:].fill_(-1e4)
                run.governor.step(1.0)

        if device == "cuda":
            torch.cuda.synchronize()
            with no_host_sync():
                train()
        else:
            train()
        told.append(story(run.governor.synchronize()))
        bits.append(judged_bits(run.governor))
        table = run.governor._engine.slots.table.magnitudes
        assert table is not None
        bits.append(table.cpu().view(torch.int64))
    assert told[0] == told[1]
    assert ("suspicion", 21, "mean") in told[0]
    assert torch.equal(bits[0], bits[2])
    known = min(len(bits[1]), len(bits[3]))
    assert torch.equal(bits[1][:known], bits[3][:known])


@pytest.mark.parametrize("how", ["tell", "rollback"])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_order_of_the_streams(how: str, seed: int) -> None:
    vgpu = pytest.importorskip("vgpu")
    stories = []
    for schedule in ("eager", ["lazy", "random:3", "starve:5", "starve:11"][seed]):
        vgpu.schedule(schedule)
        try:
            run = Run(suspicious_state=how)
            for step in range(1, 36):
                run.step()
                if step == 17:
                    run.mean.fill_(3e4)
            stories.append(story(run.governor.synchronize()))
        finally:
            vgpu.schedule("random:1")
    assert stories[0] == stories[1]
    assert any(kind == "suspicion" and name == "mean" for kind, _, name in stories[0])


def record(run: Run) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run.step()
    torch.cuda.current_stream().wait_stream(side)
    run.governor.wait()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.governor.begin_step()
        run.step()
    run.governor.wait()
    torch.cuda.synchronize()
    return graph


@pytest.mark.parametrize("how", ["tell", "rollback"])
def test_replays_of_a_graph_are_judged(how: str) -> None:
    run = Run(suspicious_state=how)
    graph = record(run)
    for step in range(40):
        graph.replay()
        torch.cuda.synchronize()
        if step == 20:
            run.mean.fill_(1e6)
    told = story(run.governor.synchronize())
    assert next(name for kind, _, name in told if kind == "suspicion") == "mean"
    rolls = [step for kind, step, _ in told if kind == "rollback"]
    assert len(rolls) == (how == "rollback")
    assert float(run.mean.max()) == (0.5 if how == "rollback" else 1e6)


def test_a_graph_that_outlives_the_governor_writes_to_no_magnitudes() -> None:
    run = Run()
    graph = record(run)
    for k in range(40):  # the table of magnitudes moves
        run.model.register_buffer(f"b{k}", torch.ones(2, device="cuda"))
    run.governor.step(1.0)
    run.governor.close()
    gc.collect()
    filler = [torch.full((256,), 7.0, device="cuda") for _ in range(50)]
    for _ in range(12):
        graph.replay()
    torch.cuda.synchronize()
    assert all(bool((t == 7.0).all()) for t in filler)


def test_looking_costs_no_launch() -> None:
    vgpu = pytest.importorskip("vgpu")
    vgpu.schedule("lazy")  # the same for all three: when the host hears decides whether it launches a capture
    counts = []
    for how in ("off", "tell", "rollback"):
        run = Run(suspicious_state=how)
        for _ in range(9):
            run.step()
        torch.cuda.synchronize()
        vgpu.reset()
        for _ in range(12):
            run.step()
        vgpu.run_all()
        stats = vgpu.stats()
        launches = sum(k["launches"] for k in stats["kernel_launches"].values())
        counts.append((launches, sum(stats["aten_launches"].values()), stats["host_sync_total"]))
    vgpu.schedule(usual_schedule())
    assert counts[0] == counts[1] == counts[2]
    assert counts[0][2] == 0
