"""A small guarded run on CUDA, its story and the means to check every restore."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tolaria.governor import GovernorConfig, PromotionEvent, RollbackEvent, TolariaGovernor
from tolaria.nn import SeedSlot
from tolaria.ops import StateField


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Forbid host syncs by torch's debug mode, and by the virtual device where that is."""
    with ExitStack() as stack:
        try:
            import vgpu  # type: ignore[import-not-found]

            stack.enter_context(vgpu.forbid_host_sync())
        except ImportError:
            pass
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that it is a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield


def usual_schedule() -> str:
    """The virtual device's schedule outside tests that choose their own."""
    return os.environ.get("VGPU_SCHEDULE", "random:1")


def judged_bits(governor: TolariaGovernor) -> Tensor:
    """The governor's state, bit by bit, but for tickets, which late captures alone have."""
    state = governor._attached.row.state.cpu().view(torch.int64)
    state[[StateField.slot_ticket_0, StateField.slot_ticket_1, StateField.restored_ticket]] = 0
    return state


class Net(nn.Module):
    """A small convolutional network with BatchNorm and a seed slot."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.slot = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), SeedSlot("mid")
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.slot(torch.relu(self.norm(self.conv(x))))
        return self.last(x.mean(dim=(2, 3)))


class Run:
    """A guarded run whose losses and states can be compared with what was captured."""

    def __init__(self, config: GovernorConfig | None = None, *, interval: int = 5, **optimizer: Any) -> None:
        torch.manual_seed(0)
        self.model = Net().cuda()
        options = {"lr": 1e-2, "fused": True, **optimizer}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **options)
        config = config or GovernorConfig(snapshot_interval=interval, probation=1)
        self.governor = TolariaGovernor(self.model, self.optimizer, config=config)
        self.x = torch.randn(8, 1, 6, 6, device="cuda")
        self.y = torch.randint(0, 3, (8,), device="cuda")
        self.bad = torch.full((), float("nan"), device="cuda")
        self.states: dict[int, dict[str, Tensor]] = {}
        torch.cuda.synchronize()

    def state(self) -> dict[str, Tensor]:
        tensors = dict(self.model.state_dict())
        for i, state in enumerate(self.optimizer.state.values()):
            tensors |= {f"{i}.{k}": v for k, v in state.items() if isinstance(v, Tensor)}
        return tensors

    def remember(self, step: int) -> None:
        """A copy of the state on the current stream, to compare a later restore with."""
        self.states[step] = {k: v.clone() for k, v in self.state().items()}

    def step(self, *, poison: bool = False) -> None:
        loss = nn.functional.cross_entropy(self.model(self.x), self.y)
        self.optimizer.zero_grad(set_to_none=False)
        (loss * self.bad if poison else loss).backward()
        self.optimizer.step()
        self.governor.step(loss * self.bad if poison else loss)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(
            a[k].contiguous().view(-1).view(torch.uint8), b[k].contiguous().view(-1).view(torch.uint8)
        )
        for k in a
    )


def story(run: Run, steps: int, poisoned: set[int]) -> list[tuple[str, int, int]]:
    """Run with host syncs forbidden; the promotions and rollbacks, after checking every restore's bytes."""
    restored: dict[int, dict[str, Tensor]] = {}
    with no_host_sync():
        for i in range(1, steps + 1):
            run.step(poison=i in poisoned)
            if i in poisoned:
                restored[i] = {k: v.clone() for k, v in run.state().items()}
            run.remember(i)
    events = run.governor.synchronize()
    log = []
    for event in events:
        if isinstance(event, PromotionEvent):
            log.append(("promoted", event.step, event.capture_step))
        elif isinstance(event, RollbackEvent):
            log.append(("rollback", event.step, event.report.restored_step))
            if event.report.restored_step:
                assert equal(restored[event.step], run.states[event.report.restored_step])
    return log


POISONED = {13, 27, 28, 41}
