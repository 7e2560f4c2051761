"""A governor op given any bytes as state never leaves its row, and does the same on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from any_bytes import CALLS, Scene, orders_something, outcome

import tolaria
from tolaria import _extension, ops
from tolaria.governor import GovernorConfig
from tolaria.ops import Order

STATES = 100


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "device",
    [
        pytest.param(
            "cpu", marks=pytest.mark.skipif(not _extension.LOADED, reason="needs the compiled extension")
        ),
        pytest.param("cuda", marks=pytest.mark.cuda),
    ],
)
def test_any_bytes_as_state_stay_in_their_row_and_are_judged_alike(device: str, call: str) -> None:
    carried_out = 0
    for seed in range(STATES):
        with tolaria.backend("reference"):
            expected = outcome(Scene(seed), call)
        with tolaria.backend("fused"):
            result = outcome(Scene(seed, device), call)
        for place, (mine, wanted) in enumerate(zip(result, expected, strict=True)):
            differ = (mine != wanted).nonzero().tolist()
            assert not differ, f"seed {seed}: tensor {place} differs at {differ[:5]}"
        carried_out += orders_something(Scene(seed), call)
    assert carried_out >= STATES // 4


def _tensors() -> dict[str, Any]:
    return {
        "state": ops.governor_state(3),
        "config": GovernorConfig().to_tensor(2.3, "cpu"),
        "loss": torch.ones(3),
        "nonfinite": None,
        "active": None,
        "mailbox": ops.governor_mailbox(3),
        "gradient": None,
        "state_bad": None,
    }


def _shrunk(tensor: torch.Tensor) -> torch.Tensor:
    """In a storage that holds all but the last byte of it."""
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() - 1)
    return tensor


WRONG: list[tuple[str, dict[str, Any]]] = [
    *[("step", {name: _shrunk(_tensors()[name])}) for name in ("state", "config", "loss", "mailbox")],
    *[("step", {name: _shrunk(torch.ones(3))}) for name in ("nonfinite", "active", "gradient", "state_bad")],
    ("step", {"loss": _shrunk(torch.ones(5)[::2])}),
    ("step", {"gradient": _shrunk(torch.ones(3, 4, dtype=torch.float64))}),
    ("step", {"state": torch.zeros(100, 3)}),
    ("step", {"state": torch.zeros(100, dtype=torch.float64)}),
    ("step", {"state": ops.governor_state(3)[:-1]}),
    ("step", {"state": ops.governor_state(3)[:40]}),
    ("step", {"state": ops.governor_state(3).t().contiguous().t()}),
    ("step", {"state": ops.governor_state(1).expand(-1, 3)}),
    ("step", {"config": torch.zeros(3, dtype=torch.float64)}),
    ("step", {"config": _tensors()["config"].float()}),
    ("step", {"config": _tensors()["config"].repeat_interleave(2)[::2]}),
    ("step", {"mailbox": ops.governor_mailbox(2)}),
    ("step", {"mailbox": ops.governor_mailbox(3)[:, :-1].contiguous()}),
    ("step", {"mailbox": ops.governor_mailbox(3)[:, :5].contiguous()}),
    ("step", {"mailbox": ops.governor_mailbox(6)[::2]}),
    ("step", {"mailbox": ops.governor_mailbox(3).float()}),
    ("step", {"loss": torch.ones(4)}),
    ("step", {"loss": torch.ones(3, dtype=torch.int64)}),
    ("step", {"nonfinite": torch.ones(3, dtype=torch.uint8)}),
    ("step", {"nonfinite": torch.ones(2)}),
    ("step", {"active": torch.ones(3, dtype=torch.complex64)}),
    ("step", {"state_bad": torch.ones(3, dtype=torch.int32)}),
    ("step", {"state_bad": torch.ones(2, dtype=torch.bool)}),
    ("step", {"gradient": torch.ones(3, 4)}),
    ("step", {"gradient": torch.ones(12, dtype=torch.int64)}),
    *[("order", {"column": column}) for column in (-1, 3, 2**40)],
    *[("order", {"order": order}) for order in (-1, len(Order), 2**32)],
    *[("order", {"reason": reason}) for reason in (-1, len(ops.PanicReason), 2**32)],
    *[("capture", {"part": part}) for part in (-1, 2, 2**32)],
    *[(call, {"column": column}) for call in ("capture", "restore") for column in (-1, 3)],
]


def _call(call: str, mode: str, changed: dict[str, Any]) -> tuple[type, str]:
    """What a call with some wrong arguments raises; it must leave the state alone."""
    given = {**_tensors(), "column": 0, "order": 0, "reason": 5, "part": 0, **changed}
    state, config, table = given["state"], given["config"], ops.SnapshotTable()
    calls = {
        "step": lambda: ops.governor_step_(**{name: given[name] for name in _tensors()}),
        "order": lambda: ops.governor_order_(state, config, given["column"], given["order"], given["reason"]),
        "capture": lambda: ops.snapshot_capture_(state, given["column"], table, given["part"]),
        "restore": lambda: ops.snapshot_restore_(state, given["column"], config, table),
    }
    before = None if "state" in changed else state.clone()
    with tolaria.backend(mode), pytest.raises((ValueError, TypeError)) as refused:  # type: ignore[arg-type]
        calls[call]()
    assert before is None or torch.equal(state, before)
    return type(refused.value), str(refused.value).split("\n")[0]


@pytest.mark.skipif(not _extension.LOADED, reason="needs the compiled extension")
@pytest.mark.parametrize(
    ("call", "changed"), WRONG, ids=[f"{c}-{'-'.join(w)}-{i}" for i, (c, w) in enumerate(WRONG)]
)
def test_wrong_arguments_are_refused_in_one_wording(call: str, changed: dict[str, Any]) -> None:
    assert _call(call, "fused", changed) == _call(call, "reference", changed)


@pytest.mark.skipif(not _extension.LOADED, reason="needs the compiled extension")
@pytest.mark.parametrize("name", ["state", "config", "loss", "mailbox", "gradient"])
def test_a_negated_view_is_read_and_written_with_its_sign(name: str) -> None:
    """torch's own fallback corrupts memory where an op that returns nothing changes such a view."""
    outcomes = []
    for mode in ("reference", "fused"):
        for is_negated in (False, True):
            given = {**_tensors(), "gradient": torch.ones(3)}
            if is_negated:
                given[name] = torch._neg_view(-given[name])
            with tolaria.backend(mode):  # type: ignore[arg-type]
                ops.governor_step_(**given)
                ops.governor_order_(
                    given["state"], given["config"], 1, Order.ROLLBACK, mailbox=given["mailbox"]
                )
            outcomes.append(torch.cat([given["state"].resolve_neg().flatten(), given["mailbox"].flatten()]))
    assert all(torch.equal(outcomes[0].nan_to_num(7.0), other.nan_to_num(7.0)) for other in outcomes[1:])


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["config", "loss", "nonfinite", "active", "gradient"])
def test_an_argument_on_another_device_is_refused_in_one_wording(name: str) -> None:
    value = _tensors()["config"] if name == "config" else torch.ones(3)
    changed = {name: value.cuda()}
    said = _call("step", "fused", changed)
    assert said == _call("step", "reference", changed)
    assert said == (ValueError, f"{name}: expected on cpu like state, got cuda:0")


@pytest.mark.skipif(not _extension.LOADED, reason="needs the compiled extension")
@pytest.mark.parametrize("header", [(-1, 0), (2, 1), (0, 2), (2**62, 2**62), (1, -(2**63))])
def test_a_table_that_says_more_rows_than_it_has_is_refused(header: tuple[int, int]) -> None:
    live = torch.ones(3)
    pair = (torch.zeros(3), torch.zeros(3))
    table = ops.SnapshotTable([ops.SnapshotEntry(live, pair, 0, 0)])
    table.data[0, :2] = torch.tensor(header)
    state, config = ops.governor_state(1), GovernorConfig().to_tensor(2.3, "cpu")
    ops.governor_order_(state, config, 0, Order.CAPTURE)
    before = state.clone()
    with pytest.raises(ValueError, match=r"table: header says .* rows, the matrix holds 1"):
        torch.ops.tolaria.snapshot_capture_(state, 0, table.data, 0, None)
    state[ops.StateField.restore_order] = before[ops.StateField.restore_order] = 1.0
    with pytest.raises(ValueError, match=r"table: header says .* rows, the matrix holds 1"):
        torch.ops.tolaria.snapshot_restore_(state, 0, config, table.data, None)
    assert torch.equal(state, before)
    assert all(not slot.any() for slot in pair)


@pytest.mark.cuda
@pytest.mark.parametrize("header", [(-1, 0), (2, 1), (0, 2), (2**62, 2**62), (1, -(2**63))])
def test_on_cuda_no_row_outside_the_table_is_read(header: tuple[int, int]) -> None:
    """The kernel cannot raise; beyond the table lie rows that would write over a canary."""
    live, fence = torch.ones(3, device="cuda"), torch.full((3,), 7.0, device="cuda")
    pair = (torch.zeros(3, device="cuda"), torch.zeros(3, device="cuda"))
    table = ops.SnapshotTable([ops.SnapshotEntry(live, pair, 0, 0)], device="cuda")
    row = table.data[2:3].clone()
    row[0, :3] = fence.data_ptr()
    row[0, 0] = live.data_ptr()
    room = torch.cat([table.data[:3], row.expand(6, -1)]).contiguous()
    room[0, :2] = torch.tensor(header)
    for call in ("capture_0", "capture_1", "restore"):
        state, config = ops.governor_state(1, device="cuda"), GovernorConfig().to_tensor(2.3, "cuda")
        ops.governor_order_(state, config, 0, Order.CAPTURE)
        state[ops.StateField.restore_order] = 1.0
        if call == "restore":
            torch.ops.tolaria.snapshot_restore_(state, 0, config, room[:3], None)
        else:
            torch.ops.tolaria.snapshot_capture_(state, 0, room[:3], int(call[-1]), None)
        torch.cuda.synchronize()
        assert bool((fence == 7.0).all())
