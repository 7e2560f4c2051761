"""snapshot_capture_, snapshot_restore_ of a model with AdamW, against clone + deepcopy and foreach_copy_."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import MIB, SIZES, named
from models import WORKLOADS, Trainee

from tolaria import GovernorConfig, ops
from tolaria.ops import Order
from tolaria.reference.snapshot import first_nonfinite


class Copies:
    """Tensors, two slots for them, and a governor whose orders the ops carry out."""

    def __init__(self, tensors, device):
        self.live = [t.detach() for t in tensors]
        self.slots = [(torch.zeros_like(t), torch.zeros_like(t)) for t in self.live]
        entries = [
            ops.SnapshotEntry(t, pair, part=1, report_index=i)
            for i, (t, pair) in enumerate(zip(self.live, self.slots, strict=True))
        ]
        self.table = ops.SnapshotTable(entries, device=device)
        self.state = ops.governor_state(1, device=device)
        self.config = GovernorConfig().to_tensor(math.nan, device)
        self.capture()
        ops.governor_order_(self.state, self.config, 0, Order.PROMOTE)
        self.nbytes = self.table.nbytes

    def capture(self):
        ops.governor_order_(self.state, self.config, 0, Order.CAPTURE)
        for part in (0, 1):
            ops.snapshot_capture_(self.state, 0, self.table, part)

    def restore(self):
        ops.governor_order_(self.state, self.config, 0, Order.ROLLBACK)
        ops.snapshot_restore_(self.state, 0, self.config, self.table)

    def foreach_capture(self):
        torch._foreach_copy_([pair[0] for pair in self.slots], self.live)

    def foreach_capture_checked(self):
        self.foreach_capture()
        return first_nonfinite([pair[0] for pair in self.slots])

    def foreach_restore(self):
        torch._foreach_copy_(self.live, [pair[0] for pair in self.slots])

    def check(self):
        """A capture holds the bytes, a restore brings them back."""
        before = [t.clone() for t in self.live]
        self.capture()
        ops.governor_order_(self.state, self.config, 0, Order.PROMOTE)
        for t in self.live:
            t.zero_()
        self.restore()
        assert all(torch.equal(a, b) for a, b in zip(before, self.live, strict=True))

    def flat(self):
        """Two arrays of as many bytes, for the ceiling."""
        return [torch.ones(self.nbytes // 4, device=self.live[0].device) for _ in range(2)]  # touched


def allocations(function):
    """How often torch took memory for tensors of 4 KiB or more during one call."""
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    return sum(e.name() == "[memory]" and e.nbytes() >= 4096 for e in events)


def in_reference(function):
    import tolaria

    def run():
        with tolaria.backend("reference"):
            function()

    return run


@pytest.mark.parametrize(
    "one_thread", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["all", "one"]
)
@pytest.mark.parametrize("direction", ["capture", "restore"])
def bench_snapshot_of_a_model(direction, one_thread, measure, device):
    trainee = Trainee(WORKLOADS["resnet18"], device)
    trainee.step()
    moments = [t for state in trainee.optimizer.state.values() for t in state.values()]
    copies = Copies([*trainee.model.parameters(), *trainee.model.buffers(), *moments], device)
    copies.check()
    model, optimizer = trainee.model, trainee.optimizer
    saved = ({k: v.clone() for k, v in model.state_dict().items()}, copy.deepcopy(optimizer.state_dict()))

    def load():
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(copy.deepcopy(saved[1]))  # it keeps what it is given, and would train it

    functions = {
        "capture": {
            "fused": copies.capture,
            "reference": in_reference(copies.capture),
            "clone + deepcopy": lambda: (
                {k: v.clone() for k, v in model.state_dict().items()},
                copy.deepcopy(optimizer.state_dict()),
            ),
            "foreach_copy_": copies.foreach_capture,
            "foreach_copy_ + check": copies.foreach_capture_checked,
        },
        "restore": {
            "fused": copies.restore,
            "reference": in_reference(copies.restore),
            "load_state_dict": load,
            "foreach_copy_": copies.foreach_restore,
        },
    }[direction]
    live, slot = copies.flat()
    threads = "1 thread" if one_thread else "all threads"
    measure(
        f"snapshot/{direction}/resnet18 + AdamW/{threads}",
        functions,
        passes=[([live], [slot])],
        absent={"compiled": "not tried: the reference is foreach_copy_, which has nothing to fuse"},
        one_thread=one_thread,
        fresh=False,
        longer=2,
        info={"allocations": allocations(functions["fused"])},
    )


@pytest.mark.parametrize(
    "size", [pytest.param(s, marks=[] if s == 8 * MIB else pytest.mark.slow) for s in SIZES], ids=named
)
@pytest.mark.parametrize("direction", ["capture", "restore"])
def bench_snapshot_of_a_tensor(direction, size, measure, device):
    copies = Copies([torch.randn(size // 4, device=device)], device)
    copies.check()
    run = copies.capture if direction == "capture" else copies.restore
    plain = copies.foreach_capture if direction == "capture" else copies.foreach_restore
    live, slot = copies.flat()
    measure(
        f"snapshot/{direction}/one tensor/{named(size)}/float32/all threads",
        {"fused": run, "reference": in_reference(run), "foreach_copy_": plain},
        passes=[([live], [slot])],
        fresh=False,
        longer=1 if size <= 64 * MIB else 0.1,
    )
