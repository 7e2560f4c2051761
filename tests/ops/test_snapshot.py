"""The snapshot ops as ops: what torch.library asks of them. Their rule is tested in tests/governor."""

import pytest
import torch
from strategies import DTYPE_IDS, DTYPES
from torch.library import opcheck

from tolaria import _extension
from tolaria.governor import GovernorConfig
from tolaria.ops import (
    Order,
    PanicReason,
    SnapshotEntry,
    SnapshotTable,
    StateField,
    governor_mailbox,
    governor_state,
)
from tolaria.ops import governor_order_ as give_order


def bits(tensor):
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


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


@pytest.mark.skipif(not _extension.LOADED, reason="needs the compiled extension")
@pytest.mark.parametrize("is_large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64], ids=[*DTYPE_IDS, "int64"])
def test_copies_have_the_bits_and_find_what_is_not_finite(dtype, is_large):
    """What moves more than half of the last cache is written past the caches."""
    size = (_extension.last_level_cache() // 4 if is_large else 1 << 12) // dtype.itemsize + 77
    memory = torch.randint(-100, 100, (size + 1,)).to(dtype)
    live = [memory[1:], torch.tensor(3.0, dtype=torch.float64)]  # the first is not aligned
    pairs = [(torch.zeros_like(t), torch.zeros_like(t)) for t in live]
    table = SnapshotTable([SnapshotEntry(live[k], pairs[k], 0, 7 + k) for k in (0, 1)])
    config, state = GovernorConfig().to_tensor(2.3, "cpu"), governor_state()

    def capture():
        give_order(state, config, 0, Order.CAPTURE, PanicReason.MANUAL)
        slot = int(state[StateField.candidate])
        for part in (0, 1):
            torch.ops.tolaria.snapshot_capture_(state, 0, table.data, part, None)
        assert all(torch.equal(bits(t), bits(pair[slot])) for t, pair in zip(live, pairs, strict=True))
        return int(state[StateField.candidate_bad])

    assert capture() == -1
    give_order(state, config, 0, Order.PROMOTE, PanicReason.MANUAL)
    for place in (0, size // 2, size - 1) if dtype.is_floating_point else ():
        kept = live[0][place].clone()
        live[0][place] = float("inf")
        assert capture() == 7
        live[0][place] = kept
    wanted = [t.clone() for t in live]
    for t in live:
        t.zero_()
    give_order(state, config, 0, Order.ROLLBACK, PanicReason.MANUAL)
    torch.ops.tolaria.snapshot_restore_(state, 0, config, table.data, None)
    assert all(torch.equal(a, b) for a, b in zip(live, wanted, strict=True))


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
