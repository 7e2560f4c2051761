"""The snapshot ops as ops: what torch.library asks of them. Their rule is tested in tests/governor."""

import pytest
import torch
from torch.library import opcheck

from tolaria import _extension
from tolaria.governor import GovernorConfig
from tolaria.ops import Order, PanicReason, SnapshotEntry, SnapshotTable, governor_mailbox, governor_state
from tolaria.ops import governor_order_ as give_order


@pytest.mark.skipif(not _extension.LOADED, reason="needs the compiled extension")
@pytest.mark.parametrize("order", [Order.CAPTURE, Order.ROLLBACK], ids=["capture", "rollback"])
def test_opcheck(order):
    config, mailbox = GovernorConfig().to_tensor(2.3, "cpu"), governor_mailbox()
    live = [torch.randn(5), torch.randn(3, 4)]
    slots = [(t.clone(), t.clone()) for t in live]
    table = SnapshotTable([SnapshotEntry(live[k], slots[k], k, k) for k in (0, 1)])
    state = governor_state()
    give_order(state, config, 0, order, PanicReason.MANUAL)
    for part in (0, 1):
        opcheck(torch.ops.tolaria.snapshot_capture_, (state, 0, table.data, part, mailbox))
    opcheck(torch.ops.tolaria.snapshot_restore_, (state, 0, config, table.data, mailbox))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("where", ["live", "slots"])
def test_a_tensor_out_of_reach_is_refused(device, where):
    good, bad = torch.ones(3, device=device), torch.ones(3, device="meta" if device == "cpu" else "cpu")
    table = SnapshotTable([SnapshotEntry(good, (good.clone(), good.clone()), 0, 0)], device=device)
    before = table.data.clone()
    entry = SnapshotEntry(*((bad, (good, good)) if where == "live" else (good, (good, bad))), 0, 0)
    with pytest.raises(ValueError, match=rf"entries\[1\]\.{where}: expected a tensor on {device}.*, got"):
        table.update([table.entries[0], entry])
    assert torch.equal(table.data, before)
    assert len(table.entries) == 1
