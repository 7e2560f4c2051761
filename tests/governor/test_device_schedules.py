"""Captures on CUDA that are in flight, misaligned, short of memory or of room in the ring."""

from __future__ import annotations

import pytest
import torch
from device_run import Run, usual_schedule
from torch import nn

from tolaria import ops
from tolaria.errors import SnapshotError
from tolaria.governor import GovernorConfig, TolariaGovernor
from tolaria.snapshot import memory

pytestmark = pytest.mark.cuda


def test_capture_is_really_pending_while_the_next_forward_is_enqueued() -> None:
    vgpu = pytest.importorskip("vgpu", reason="needs a device that runs nothing until it must")
    run = Run(interval=3)
    for _ in range(4):
        run.step()
    run.governor.synchronize()
    vgpu.schedule("lazy")
    run.governor.snapshot()
    assert vgpu.pending() > 0
    before = run.governor.poll()
    run.step()
    torch.cuda.synchronize()
    vgpu.schedule(usual_schedule())
    assert not any(e.kind == "capture" for e in before)
    assert any(e.kind == "capture" for e in run.governor.synchronize())


def test_capture_writes_exactly_the_state_in_wide_words() -> None:
    vgpu = pytest.importorskip("vgpu", reason="counts come from the virtual device")
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 33)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    governor = TolariaGovernor(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    governor.step(torch.ones((), device="cuda"))
    torch.cuda.synchronize()
    vgpu.reset()
    governor.snapshot()
    torch.cuda.synchronize()
    kernels = vgpu.stats()["kernel_launches"]
    captures = [counts for name, counts in kernels.items() if "snapshot_capture" in name]
    capture = {key: sum(counts[key] for counts in captures) for key in captures[0]}
    state_bytes = governor._engine.slots.table.nbytes
    assert state_bytes <= capture["global_store_bytes"] <= state_bytes + 4096
    assert capture["global_store_sectors"] * 32 <= 1.05 * capture["global_store_bytes"]
    assert capture["global_load_sectors"] * 32 <= 1.05 * capture["global_load_bytes"]
    assert capture["local_bytes"] == 0


def test_misaligned_and_strided_tensors_come_back(rng: torch.Generator) -> None:
    base = torch.randn(1001, device="cuda")
    tensors = {
        "odd": base[1:],
        "short": torch.randn(77, device="cuda").half()[1:],
        "raw": torch.arange(31, device="cuda", dtype=torch.uint8)[3:],
        "strided": torch.randn(9, 14, device="cuda")[:, ::2],
        "last": torch.randn(2, 3, 5, 5, device="cuda").to(memory_format=torch.channels_last),
        "wide": torch.randn(5, device="cuda", dtype=torch.float64),
        "empty": torch.empty(0, device="cuda"),
        "expanded": torch.randn(4, 1, device="cuda").expand(4, 6),
    }
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    module.register_parameter("weight", nn.Parameter(torch.randn(3, device="cuda")))
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    governor = TolariaGovernor(module, [])
    for name, tensor in tensors.items():
        if name != "expanded":
            tensor.zero_()
    tensors["expanded"][:, :1].zero_()
    governor.execute_rollback()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), name
    assert float(base[0]) != 0.0


def test_slots_in_device_memory() -> None:
    model = nn.Linear(8, 8).cuda()
    config = GovernorConfig(storage="device")
    governor = TolariaGovernor(model, torch.optim.SGD(model.parameters(), lr=0.1), config=config)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    governor.execute_rollback()
    assert torch.equal(model.weight.detach(), before)
    assert all(segment.is_cuda for segment in governor._engine.slots.segments)


def test_no_memory_for_the_slots_is_an_error_and_nothing_stays_attached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def exhausted(nbytes: int) -> torch.Tensor:
        if nbytes > 100_000:
            raise MemoryError("no pages left")
        return torch.empty(nbytes, dtype=torch.uint8).pin_memory()

    monkeypatch.setattr(memory, "_page_locked", exhausted)
    model = nn.Linear(300, 300).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(SnapshotError, match="page-locked memory"):
        TolariaGovernor(model, optimizer)
    assert not optimizer._optimizer_step_pre_hooks  # type: ignore[attr-defined]


def test_replaced_memory_is_captured_where_it_was(rng: torch.Generator) -> None:
    """Storage swapped and the old one reused by another stream while the capture is in flight."""
    run = Run(interval=3)
    for _ in range(4):
        run.step()
    captured = {k: v.clone() for k, v in run.state().items()}
    run.governor.snapshot()
    weight = run.model.last.weight
    weight.data = weight.detach().clone()
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        for _ in range(8):
            torch.full(weight.shape, float("nan"), device="cuda")
    run.step()
    run.step()
    run.governor.synchronize()
    run.governor.execute_rollback()
    assert torch.equal(run.model.last.weight.detach(), captured["last.weight"])


def test_full_ring_drops_events_and_keeps_the_truth() -> None:
    model = nn.Linear(2, 2).cuda()
    config = GovernorConfig(event_capacity=4, max_rollbacks=1000)
    governor = TolariaGovernor(model, torch.optim.SGD(model.parameters(), lr=0.1), config=config)
    governor.poll()
    loss = torch.full((), float("nan"), device="cuda")
    for _ in range(20):
        governor._attached.judge.judge(governor._engine, loss, None)
        governor._engine.act()
    torch.cuda.synchronize()
    events = governor.poll()
    assert events[0].kind == "droppedevents"
    assert governor.rollback_count == 20


@pytest.mark.multi_gpu
def test_governor_of_the_second_device() -> None:
    model = nn.Linear(4, 4).to("cuda:1")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    governor = TolariaGovernor(model, optimizer, config=GovernorConfig(snapshot_interval=3, probation=1))
    assert torch.cuda.current_device() == 0
    for i in range(10):
        loss = model(torch.ones(2, 4, device="cuda:1")).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        governor.step(loss * float("nan") if i == 7 else loss)
    governor.synchronize()
    assert governor.rollback_count == 1
    assert governor._attached.row.state[ops.StateField.rollback_count].device == torch.device("cuda:1")
