"""Two processes (gloo): every rank judges the same loss and none rolls back alone."""

from __future__ import annotations

import multiprocessing as mp
from multiprocessing.queues import Queue
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn


def worker(rank: int, store: str, out: Queue[tuple[int, list[str]]]) -> None:
    from tolaria.governor import GovernorBank, GovernorConfig, RollbackEvent, TolariaGovernor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = nn.BatchNorm1d(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    refused = []
    for build in (lambda: TolariaGovernor(model, optimizer), lambda: GovernorBank(2)):
        try:
            build()
        except RuntimeError as error:
            refused.append(str(error))
    governor = TolariaGovernor(
        model,
        optimizer,
        config=GovernorConfig(snapshot_interval=4, probation=1),
        process_group=dist.group.WORLD,
    )
    story = []
    for step in range(1, 16):
        loss = 1.0 + rank
        if step == 6 and rank == 1:
            loss = float("nan")  # one rank alone
        if step == 11 and rank == 0:
            assert model.running_mean is not None
            model.running_mean.fill_(float("nan"))  # found by rank 0's capture alone
        governor.step(loss)
        story += [
            f"{step} {e.report.reason.name} {e.report.restored_step}"
            for e in governor.poll()
            if isinstance(e, RollbackEvent)
        ]
    out.put((rank, [*story, f"mean {governor.lifetime['mean']}", *refused]))
    dist.barrier()
    dist.destroy_process_group()


def test_ranks_roll_back_together(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    out: Queue[tuple[int, list[str]]] = context.Queue()
    ranks = [context.Process(target=worker, args=(r, str(tmp_path / "store"), out)) for r in range(2)]
    for process in ranks:
        process.start()
    stories = dict(out.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert stories[0] == stories[1]
    assert stories[0][0] == "6 NON_FINITE 4"
    assert stories[0][1].split()[1] == "NON_FINITE_STATE"
    assert len(stories[0]) == 5
    assert stories[0][2] == "mean 1.5"
    assert all("one rank must never roll back alone" in text for text in stories[0][3:])


def test_sharded_parameters_are_refused() -> None:
    from tolaria.governor import TolariaGovernor

    class FlatParameter(nn.Parameter):
        pass

    model = nn.Module()
    model.register_parameter("flat", FlatParameter(torch.ones(3)))
    with pytest.raises(RuntimeError, match="flat is sharded"):
        TolariaGovernor(model, [])
