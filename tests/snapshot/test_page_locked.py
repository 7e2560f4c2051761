"""Page-locked memory: exact, usable by the device, given back whatever happens, and no error left behind."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from tolaria import _extension, ops
from tolaria.errors import SnapshotError
from tolaria.governor import GovernorConfig, TolariaGovernor
from tolaria.snapshot import memory as slot_memory
from tolaria.snapshot.memory import allocate

pytestmark = pytest.mark.cuda

CUDA = torch.device("cuda", 0)


def test_it_is_exact_and_the_device_writes_it() -> None:
    for nbytes in (1, 4097, 3 << 20):
        memory = allocate(nbytes, CUDA)
        assert (memory.dtype, memory.shape, memory.device.type) == (torch.uint8, (nbytes,), "cpu")
        assert memory.untyped_storage().nbytes() == nbytes
        assert memory.is_pinned()
        memory.copy_(torch.full((nbytes,), 7, dtype=torch.uint8, device=CUDA), non_blocking=True)
        torch.cuda.synchronize()
        assert bool((memory == 7).all())


def test_failure_is_said_and_leaves_no_error_for_the_next_launch() -> None:
    for _ in range(2):
        with pytest.raises(
            SnapshotError, match=r"MiB of page-locked memory, which could not be had \(cudaHost"
        ):
            allocate(1 << 50, CUDA)
        assert ops.tensor_stats([torch.ones(3, device=CUDA)])[0] == 3
    assert TolariaGovernor(nn.Linear(2, 2).cuda(), []).rollback_count == 0


def test_attach_without_memory_then_with_the_other_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(64, 64).cuda()
    real = slot_memory._page_locked
    monkeypatch.setattr(slot_memory, "_page_locked", lambda n: real(1 << 50 if n > 10_000 else n))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(SnapshotError, match="page-locked memory"):
        TolariaGovernor(model, optimizer)
    monkeypatch.undo()
    governor = TolariaGovernor(model, optimizer, config=GovernorConfig(storage="device"))
    kept = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.fill_(3.0)
    governor.execute_rollback()
    assert torch.equal(model.weight, kept)


def test_memory_that_goes_during_a_recording_does_not_end_it() -> None:
    memory, x = [allocate(1 << 12, CUDA)], torch.ones(4, device=CUDA)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * 3
        memory.clear()
        memory.append(allocate(1 << 12, CUDA))
    graph.replay()
    assert y.tolist() == [3.0] * 4


def test_a_forked_child_frees_nothing() -> None:
    memory = [allocate(1 << 16, CUDA).fill_(5)]
    torch.cuda.synchronize()
    child = os.fork()
    if child == 0:
        memory.clear()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    memory[0].copy_(torch.full((1 << 16,), 6, dtype=torch.uint8, device=CUDA), non_blocking=True)
    torch.cuda.synchronize()
    assert bool((memory[0] == 6).all())


ENDS = """
import gc, os, sys, torch
from tolaria.governor import GovernorConfig, TolariaGovernor
model = torch.nn.Linear(256, 256).cuda()
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
governor = TolariaGovernor(model, optimizer, config=GovernorConfig(snapshot_interval=2, probation=1))
for _ in range(9):
    loss = model(torch.ones(2, 256, device="cuda")).square().mean()
    optimizer.zero_grad(); loss.backward(); optimizer.step(); governor.step(loss)
how = sys.argv[1]
if how == "cycle":
    governor.me = [governor]
elif how == "deleted":
    del governor; gc.collect()
elif how == "kept":
    sys.modules["kept"] = governor
elif how == "forked":
    if os.fork() == 0:
        sys.exit(0)
    assert os.wait()[1] == 0
print("end")
"""


@pytest.mark.skipif(not _extension.CUDA, reason="needs the kernels")
@pytest.mark.parametrize("how", ["plain", "cycle", "deleted", "kept", "forked"])
def test_the_process_ends_in_silence_with_work_in_flight(how: str) -> None:
    result = subprocess.run([sys.executable, "-c", ENDS, how], capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout.split()[:1], result.stderr) == (0, ["end"], "")
