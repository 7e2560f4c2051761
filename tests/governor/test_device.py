"""The device decides: guarded steps on CUDA that the host enqueues without ever waiting."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from device_run import POISONED, Net, Run, equal, judged_bits, story
from torch import Tensor, nn

from tolaria.errors import TolariaError
from tolaria.governor import (
    GovernorBank,
    GovernorConfig,
    PanicReason,
    SeedCulledEvent,
    TolariaGovernor,
)

pytestmark = pytest.mark.cuda


def test_rollbacks_restore_a_promoted_capture_bit_for_bit_without_host_sync() -> None:
    run = Run()
    log = story(run, 50, POISONED)
    assert [(kind, step) for kind, step, _ in log if kind == "rollback"] == [
        ("rollback", s) for s in sorted(POISONED)
    ]
    promoted = {capture for kind, _, capture in log if kind == "promoted"}
    assert all(capture in promoted for kind, _, capture in log if kind == "rollback")
    assert run.governor.rollback_count == len(POISONED)
    assert all(bool(torch.isfinite(p).all()) for p in run.model.parameters())


def test_same_story_as_on_the_cpu() -> None:
    losses = [1.0 + 0.01 * (i % 7) for i in range(60)]
    losses[20] = float("nan")
    losses[33] = losses[34] = 500.0
    stories = []
    for device in ("cpu", "cuda"):
        model = nn.Linear(3, 3).to(device)
        config = GovernorConfig(snapshot_interval=5, probation=2)
        governor = TolariaGovernor(
            model, torch.optim.SGD(model.parameters(), lr=0.1), config=config, num_classes=10
        )
        for loss in losses:
            governor.step(torch.tensor(loss, device=device))
        governor.synchronize()
        stories.append((judged_bits(governor), governor.rollback_count))
    assert torch.equal(stories[0][0], stories[1][0])
    assert stories[0][1] == stories[1][1] == 2


def test_found_infinity_in_a_buffer_rolls_back_and_is_named() -> None:
    run = Run(interval=4)
    for _ in range(7):
        run.step()
    with torch.no_grad():
        run.governor.wait()
        assert isinstance(run.model.norm.running_mean, Tensor)
        run.model.norm.running_var.fill_(float("inf"))  # type: ignore[union-attr]
        run.model.eval()
    for _ in range(5):
        run.step()
    run.governor.synchronize()
    report = run.governor.last_report
    assert report is not None
    assert report.reason is PanicReason.NON_FINITE_STATE
    assert report.tensor_name == "norm.running_var"
    assert bool(torch.isfinite(run.model.norm.running_var).all())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["fused", "capturable", "plain"])
def test_rollback_then_training_equals_the_run_that_never_went_wrong(kind: str) -> None:
    options: dict[str, Any] = {"fused": {}, "capturable": {"fused": False, "capturable": True}}.get(
        kind, {"fused": False}
    )
    straight, run = Run(interval=1000, **options), Run(interval=1000, **options)
    for _ in range(4):
        straight.step()
    for _ in range(4):
        run.step()
    run.governor.snapshot()
    run.step()
    straight.step()  # the healthy verdict that promotes
    for _ in range(3):
        run.step()
    run.governor.execute_rollback()
    # The capture is of step 4; the straight run goes on from there.
    for _ in range(5):
        run.step()
    for _ in range(4):
        straight.step()
    assert equal(straight.state(), run.state())


def test_skipped_step_is_left_out_on_the_device() -> None:
    torch.manual_seed(0)
    model = Net().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    governor = TolariaGovernor(model, optimizer, config=GovernorConfig(skip_anomalous_steps=True))
    x, y = torch.randn(4, 1, 6, 6, device="cuda"), torch.randint(0, 3, (4,), device="cuda")

    def step(scale: float) -> None:
        loss = nn.functional.cross_entropy(model(x * scale), y) + (scale - 1.0) * 1e6
        optimizer.zero_grad()
        loss.backward()
        verdict = governor.check_vital_signs(loss)
        optimizer.step()
        governor.step(verdict)

    for _ in range(12):
        step(1.0)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    step(50.0)
    after = (model.state_dict(), optimizer.state_dict()["state"])
    assert equal(before[0], after[0])
    assert all(equal(before[1][i], after[1][i]) for i in before[1])
    step(1.0)
    assert not equal(before[0], model.state_dict())


def test_germination_between_captures_and_rollback_drops_the_seed() -> None:
    run = Run(interval=7)
    for _ in range(8):
        run.step()
    slot = run.model.slot
    with torch.no_grad():
        features = torch.relu(run.model.norm(run.model.conv(run.x)))
    seed = slot.germinate(lambda x: nn.Conv2d(4, 4, 1).cuda(), features, rng_seed=1)
    run.optimizer.add_param_group({"params": list(seed.parameters())})
    slot.start_training()
    for _ in range(2):
        run.step()
    schedule = slot.start_blending(4)
    for _ in range(3):
        schedule.step()
        run.step()
    assert float(slot.alpha) > 0
    run.step(poison=True)
    assert float(slot.alpha) == 0.0, "zeroed by the device, whatever the host knows"
    run.governor.synchronize()
    assert slot.seed is None
    assert len(run.optimizer.param_groups) == 1
    for _ in range(8):
        run.step()
    assert run.governor.rollback_count == 1


def test_poisoned_incubating_seed_is_culled_alone() -> None:
    run = Run(interval=5)
    slot = run.model.slot
    with torch.no_grad():
        features = torch.relu(run.model.norm(run.model.conv(run.x)))
    seed = slot.germinate(lambda x: nn.Conv2d(4, 4, 1).cuda(), features, rng_seed=1)
    slot.start_training()
    run.governor.notify_structure_changed()
    with torch.no_grad():
        next(seed.parameters()).fill_(float("nan"))
    for _ in range(45):
        run.step()
    torch.cuda.synchronize()
    run.step()
    assert any(isinstance(e, SeedCulledEvent) for e in run.governor.poll())
    assert run.governor.rollback_count == 0
    assert slot.seed is None


def test_whole_guarded_step_in_a_graph() -> None:
    run = Run(interval=5, capturable=True)
    loss_out = torch.zeros((), device="cuda")
    scale = torch.ones((), device="cuda")

    def step() -> None:
        run.governor.begin_step()
        loss = nn.functional.cross_entropy(run.model(run.x), run.y) * scale
        run.optimizer.zero_grad(set_to_none=False)
        loss.backward()
        run.optimizer.step()
        run.governor.step(loss)
        loss_out.copy_(loss.detach())

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    run.governor.wait()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    run.governor.wait()
    for i in range(1, 31):
        scale.fill_(float("nan") if i in (12, 20) else 1.0)
        graph.replay()
        if i in (12, 20):
            torch.cuda.synchronize()
            assert all(bool(torch.isfinite(p).all()) for p in run.model.parameters())
    run.governor.synchronize()
    assert run.governor.rollback_count == 2
    assert run.governor.step_count == 3 + 30
    assert run.governor.last_good_step > 20


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_graph_capture_asks_for_capturable_and_a_settled_structure() -> None:
    run = Run(interval=5, fused=False)
    for _ in range(2):
        run.step()
    torch.cuda.synchronize()
    with pytest.raises(TolariaError, match="capturable=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        run.governor.step(run.bad)


def counted(vgpu: Any, run: Run) -> tuple[int, dict[str, Any]]:
    """Launches of our kernels, and the counts, of one call of step beside nothing else."""
    loss = torch.ones((), device="cuda")
    torch.cuda.synchronize()
    vgpu.reset()
    run.governor.step(loss)
    stats = vgpu.stats()
    assert not stats["aten_launches"]
    assert stats["host_sync_total"] == stats["mallocs"]["count"] == stats["host_mallocs"]["count"] == 0
    assert stats["event_queries"] == stats["stream_queries"] == 0
    assert all(m["count"] == 0 for m in stats["memcpy"].values())
    return sum(k["launches"] for k in stats["kernel_launches"].values()), stats


def test_counts_of_clean_and_capturing_steps() -> None:
    vgpu = pytest.importorskip("vgpu", reason="counts come from the virtual device")
    run = Run(interval=6)
    for _ in range(9):
        run.step()
    torch.cuda.synchronize()
    run.governor.poll()
    clean: list[int] = []
    capturing: list[int] = []
    for _ in range(8):
        launches, stats = counted(vgpu, run)
        (clean if stats["event_records"] == 0 else capturing).append(launches)
    assert capturing
    assert clean
    assert max(clean) <= 3
    assert max(capturing) <= min(clean) + 2


def test_bank_on_the_device() -> None:
    bank = GovernorBank(70, device="cuda")
    losses = torch.ones(70, device="cuda")
    for _ in range(12):
        assert not bool(bank.step(losses).any())
    losses[65] = float("nan")
    reward = bank.step(losses).tolist()
    assert reward[65] == -10.0
    assert sum(reward) == -10.0


def test_dropped_governor_waits_for_its_capture() -> None:
    for _ in range(3):
        run = Run(interval=3)
        for _ in range(4):
            run.step()
        del run
        gc.collect()
        torch.randn(1 << 16, device="cuda").sum()
    torch.cuda.synchronize()
