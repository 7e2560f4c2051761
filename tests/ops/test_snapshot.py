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
    size = (_extension.stream_above() // 2 if is_large else 1 << 12) // dtype.itemsize + 77
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


def inside_guards(values):
    """The values between eight marked elements on either side: the whole memory, and the inside."""
    whole = torch.full((len(values) + 16,), 7, dtype=values.dtype, device=values.device)
    whole[8 : 8 + len(values)] = values
    return whole, whole[8 : 8 + len(values)]


@pytest.mark.skipif(not _extension.LOADED, reason="needs the compiled extension")
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_what_is_not_finite_is_found_at_any_place_inside_and_nowhere_else(device, dtype):
    """Every word of a line of 64 bytes, of the last line before the end, and of the rest behind it."""
    line, config = 64 // dtype.itemsize, GovernorConfig().to_tensor(2.3, device)
    for size in (line - 1, line, 2 * line + 3) if device.type == "cpu" else (line + 1,):
        whole, inside = inside_guards(torch.ones(size, dtype=dtype, device=device))
        whole[:8] = whole[-8:] = float("nan")
        slots = (torch.zeros_like(inside), torch.zeros_like(inside))
        table = SnapshotTable([SnapshotEntry(inside, slots, 0, 3)], device=device)
        state = governor_state(device=device)
        for place in [None, *range(size)]:
            if place is not None:
                inside[place] = float("-inf") if place % 2 else float("nan")
            give_order(state, config, 0, Order.CAPTURE, PanicReason.MANUAL)
            torch.ops.tolaria.snapshot_capture_(state, 0, table.data, 0, None)
            assert int(state[StateField.candidate_bad]) == (-1 if place is None else 3), (size, place)
            if place is not None:
                inside[place] = 1


@pytest.mark.skipif(not _extension.LOADED, reason="needs the compiled extension")
def test_a_table_of_one_part_of_any_number_of_bytes_is_copied_whole(device):
    config = GovernorConfig().to_tensor(2.3, device)
    for size in range(1, 131) if device.type == "cpu" else (1, 64, 65):
        live = torch.arange(1, size + 1, device=device).to(torch.uint8)
        for part in (0, 1):  # the other is empty
            slots = (torch.zeros_like(live), torch.zeros_like(live))
            table = SnapshotTable([SnapshotEntry(live, slots, part, -1)], device=device)
            state = governor_state(device=device)
            give_order(state, config, 0, Order.CAPTURE, PanicReason.MANUAL)
            for each in (0, 1):
                torch.ops.tolaria.snapshot_capture_(state, 0, table.data, each, None)
            assert torch.equal(slots[int(state[StateField.candidate])], live), (size, part)


@pytest.mark.skipif(not _extension.LOADED, reason="needs the compiled extension")
@pytest.mark.parametrize("header", [(-1, 2), (2, 1), (0, 3), (3, 3), (-1, -1)], ids=str)
def test_a_header_that_does_not_fit_its_table_is_refused(header):
    tensors = [torch.ones(3) for _ in range(6)]
    entries = [SnapshotEntry(tensors[k], (tensors[k + 1], tensors[k + 2]), k // 3, -1) for k in (0, 3)]
    table, state = SnapshotTable(entries), governor_state()
    config = GovernorConfig().to_tensor(2.3, "cpu")
    give_order(state, config, 0, Order.CAPTURE, PanicReason.MANUAL)
    table.data[0, :2] = torch.tensor(header)
    with pytest.raises(ValueError, match="table: header says"):
        torch.ops.tolaria.snapshot_capture_(state, 0, table.data, 0, None)
    give_order(state, config, 0, Order.ROLLBACK, PanicReason.MANUAL)
    with pytest.raises(ValueError, match="table: header says"):
        torch.ops.tolaria.snapshot_restore_(state, 0, config, table.data, None)


SIZES = [1, 5, 31, 32, 33, 64, 100, 2047, 40_001]


@pytest.mark.skipif(not _extension.LOADED, reason="needs the compiled extension")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_each_byte_of_a_table_goes_to_its_place_and_no_further(device, threads):
    """Rows of all sizes and kinds, cut between threads; either slot; the first tensor that is not finite."""
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8]
    kinds = [(dtypes[(k + j) % 5], size) for j in (0, 1, 3) for k, size in enumerate(SIZES)]
    live = [inside_guards(torch.randint(-100, 100, (n,), device=device).to(d)) for d, n in kinds]
    slots = [[inside_guards(torch.full_like(t, 3)) for _, t in live] for _ in (0, 1)]
    reports = [(k * 5) % len(kinds) if k % 9 else -1 for k in range(len(kinds))]
    entries = [
        SnapshotEntry(t, (slots[0][k][1], slots[1][k][1]), k % 2, reports[k], k == 4)
        for k, (_, t) in enumerate(live)
    ]
    table = SnapshotTable(entries, device=device)
    config, state = GovernorConfig().to_tensor(2.3, device), governor_state(device=device)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)

    def capture():
        kept = [[whole.clone() for whole, _ in slot] for slot in slots]
        give_order(state, config, 0, Order.CAPTURE, PanicReason.MANUAL)
        slot = int(state[StateField.candidate])
        for part in (0, 1):
            torch.ops.tolaria.snapshot_capture_(state, 0, table.data, part, None)
        for k, (whole, _) in enumerate(live):
            wanted = whole.clone()
            if entries[k].zeroed:
                wanted[8:-8] = 0
            assert torch.equal(bits(slots[slot][k][0]), bits(wanted)), entries[k]
            assert torch.equal(bits(slots[1 - slot][k][0]), bits(kept[1 - slot][k])), entries[k]
        return int(state[StateField.candidate_bad])

    try:
        for _ in range(2):  # into one slot, then into the other
            assert capture() == -1
            give_order(state, config, 0, Order.PROMOTE, PanicReason.MANUAL)
        good = [whole.clone() for whole, _ in live]
        wanted = len(kinds)
        for k in (0, 26, 13, 25, 8, 16, 3, 1, 10):  # 0 is not looked at
            assert live[k][1].is_floating_point()
            live[k][1][-1 if k % 2 else len(live[k][1]) // 2] = float("nan" if k % 3 else "-inf")
            wanted = min(wanted, reports[k] if k % 9 else wanted)
            assert capture() == (wanted if wanted < len(kinds) else -1)
        for k, (_, inside) in enumerate(live):
            inside.zero_() if k % 2 else inside.fill_(1)
        give_order(state, config, 0, Order.ROLLBACK, PanicReason.MANUAL)
        torch.ops.tolaria.snapshot_restore_(state, 0, config, table.data, None)
    finally:
        torch.set_num_threads(before)
    good[4][8:-8] = 0
    assert all(torch.equal(bits(whole), bits(g)) for (whole, _), g in zip(live, good, strict=True))


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
