"""What each process of test_distributed runs; a module that a spawned process can import by name."""

from __future__ import annotations

import warnings
from multiprocessing.queues import Queue

import torch
import torch.distributed as dist
from torch import nn


def suspicions(rank: int) -> list[str]:
    """One rank's running mean alone is suspicious: none promotes, and after two rollbacks all accept it."""
    from tolaria.governor import GovernorConfig, TolariaGovernor

    told = []
    for how in ("tell", "rollback"):
        model = nn.BatchNorm1d(2)
        governor = TolariaGovernor(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            config=GovernorConfig(snapshot_interval=4, probation=1, suspicious_state=how),
            process_group=dist.group.WORLD,
        )
        assert model.running_mean is not None
        model.running_mean.fill_(0.5)
        for step in range(1, 48):
            if step >= 18 and rank == 0:
                model.running_mean.fill_(1e6)
            governor.step(1.0)
        kinds = [(e.kind, e.step) for e in governor.poll() if e.kind in ("promotion", "rollback")]
        told.append(f"{how} {kinds}")
    return told


def validations(rank: int) -> str:
    """What rank 1 validates collapses once: no rank captures, none promotes, until both are well again."""
    from tolaria.governor import GovernorConfig, TolariaGovernor

    model = nn.BatchNorm1d(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = GovernorConfig(snapshot_interval=4, probation=1)
    governor = TolariaGovernor(model, optimizer, config=config, process_group=dist.group.WORLD)
    for metric in (0.9, 0.8, 0.9, 0.1 if rank else 0.9, 0.8):
        for _ in range(10):
            governor.step(1.0)
        governor.step_validation(metric, higher_is_better=True)
    for _ in range(5):
        governor.step(1.0)
    return f"validated {[(e.kind, e.step) for e in governor.poll() if e.kind == 'promotion']}"


def norms(rank: int) -> str:
    """Rank 1 has no gradients at all: it reduces a norm nevertheless, and both see the other's explode."""
    from tolaria.governor import GovernorConfig, RollbackEvent, TolariaGovernor

    model = nn.BatchNorm1d(2)
    governor = TolariaGovernor(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        config=GovernorConfig(gradient_norm=True),
        process_group=dist.group.WORLD,
    )
    for step in range(1, 21):
        if rank == 0:
            model.weight.grad = torch.full((2,), 1e6 if step > 15 else 1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # rank 1's: no gradient is there
            governor.step(1.0)
    reasons = [(e.report.reason.name, e.step) for e in governor.poll() if isinstance(e, RollbackEvent)]
    return f"norms {reasons}"


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
    governor.add_loss(1.0, weight=rank)
    governor.add_loss(2.0, weight=1)
    governor.step(tag="together")
    for poisoned in (0, 1):
        if rank == poisoned:
            assert model.running_mean is not None
            model.running_mean.fill_(float("nan"))  # nothing is judged any more
        story.append(f"fine {bool(governor.verify())}, {governor.rollback_count}")
    if rank == 1:
        assert model.running_var is not None
        model.running_var.fill_(float("nan"))
    governor.close()
    story.append(f"closed {governor.rollback_count}, {bool(model.running_var.isfinite().all())}")  # type: ignore[union-attr]
    out.put(
        (
            rank,
            [
                *story,
                f"mean {governor.lifetime['mean']}",
                *refused,
                *suspicions(rank),
                validations(rank),
                norms(rank),
            ],
        )
    )
    dist.barrier()
    dist.destroy_process_group()
