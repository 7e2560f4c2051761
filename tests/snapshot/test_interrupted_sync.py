"""A structure change interrupted at any line: slots and table are the old ones or the new ones, whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.interrupting import Interruption
from tolaria.errors import SnapshotError
from tolaria.governor import GovernorConfig, TolariaGovernor
from tolaria.snapshot import slots as slots_module

FILES = ("snapshot/slots", "snapshot/place", "snapshot/arena", "snapshot/base", "snapshot/watch")
FILES += ("governor/engine", "governor/host_engine", "ops/snapshot", "ops/_layout")
LAYING_OUT = tuple(f"{name}.py" for name in FILES)
PUBLISHING = {"sync", "adopt", "sync_structure", "_structure_changed", "mark", "mark_captured"}
"""Where the marks are set: interrupted at every bytecode, elsewhere at every line."""


def interruption(at: int | None = None) -> Interruption:
    return Interruption(at, within=LAYING_OUT, in_detail=PUBLISHING)


class Run:
    """A governed model whose weights were captured, and then changed in every way."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        config = GovernorConfig(snapshot_interval=1000, probation=1)
        self.governor = TolariaGovernor(self.model, self.optimizer, config=config)
        self.kept = self.values()
        self.old = self.model[0].weight.data
        self.model[0].weight.data = torch.full((4, 4), 2.0)
        self.model.append(nn.Linear(3, 3))
        self.model[1].running_mean = torch.full((4,), 3.0)
        self.model[1].register_buffer("view", self.model[1].running_var[1:])

    def values(self) -> list[Tensor]:
        first, norm = self.model[0], self.model[1]
        return [t.detach().clone() for t in (first.weight, first.bias, norm.running_mean, norm.running_var)]

    def revert(self) -> None:
        """Undo what changed since the attach, and put other bytes where the layout may have been."""
        self.model[0].weight.data = self.old
        del self.model[2]
        del self.model[1].view

    def check_table(self) -> None:
        """The rows are those of the entries, which keep alive what the rows point to."""
        table = self.governor._engine.slots.table
        assert torch.equal(table.prepare(table.entries).matrix, table.data)

    def check_rollback(self) -> None:
        strangers = [torch.zeros(4, 4) for _ in range(16)]
        with torch.no_grad():
            for tensor in (self.model[0].bias, self.model[1].running_var):
                tensor.fill_(7.0)
        self.governor.execute_rollback()
        for live, kept in zip(self.values(), self.kept, strict=True):
            assert torch.equal(live, kept)
        assert not any(bool(stranger.any()) for stranger in strangers)
        self.check_table()
        self.governor.snapshot()
        self.governor.step(1.0)
        self.governor.execute_rollback()
        assert all(torch.equal(a, b) for a, b in zip(self.values(), self.kept, strict=True))


@pytest.mark.parametrize("then", ["goes_on", "reverts"])
def test_interrupted_at_any_line(then: str) -> None:
    run, whole = Run(), interruption()
    with whole.on():
        run.governor.notify_structure_changed()
    assert len(whole.places) > 400, "the trace sees less than it did: have the files moved?"
    for at, (code, _) in enumerate(whole.places):
        if then == "reverts" and code.co_name not in PUBLISHING:
            continue
        run, here = Run(), interruption(at)
        with here.on(), pytest.raises(KeyboardInterrupt):
            run.governor.notify_structure_changed()
        run.check_table()
        if then == "reverts":
            run.revert()
        run.check_rollback()


def test_no_memory_at_any_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    real = slots_module.allocate
    for allowed in (0, 1):
        run, calls = Run(), 0

        def limited(*arguments: Any, most: int = allowed) -> Tensor:
            nonlocal calls
            calls += 1
            if calls > most:
                raise SnapshotError("no memory left")
            return real(*arguments)

        monkeypatch.setattr(slots_module, "allocate", limited)
        with pytest.raises(SnapshotError, match="no memory left"):
            run.governor.notify_structure_changed()
        run.check_table()
        monkeypatch.setattr(slots_module, "allocate", real)
        run.check_rollback()
