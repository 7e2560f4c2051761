"""Captures weigh what they copy: the magnitude of each tensor, and which is suspicious, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LAYOUTS, laid_out
from torch import Tensor

import tolaria
from tolaria import _extension
from tolaria.governor import GovernorConfig
from tolaria.ops import (
    Order,
    SnapshotEntry,
    SnapshotTable,
    StateField,
    governor_mailbox,
    governor_order_,
    governor_state,
    governor_step_,
    live_view,
    snapshot_capture_,
    snapshot_restore_,
)
from tolaria.reference.magnitude import MagnitudeField as F

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
NAMES = ["f32", "f64", "f16", "bf16", "e4m3", "e5m2"]
COMPLEX = [torch.complex64, torch.complex128]
fused = pytest.mark.skipif(not _extension.LOADED, reason="needs the compiled extension")


class Judged:
    """A governor and the tensors that it captures, at either end of a part; on any backend and device."""

    def __init__(self, tensors: list[Tensor], births: list[int] | None = None, **settings_: object) -> None:
        self.live = [live_view(t) for t in tensors]
        self.device = self.live[0].device
        self.slots = [(torch.zeros_like(t), torch.zeros_like(t)) for t in self.live]
        self.births = births or [k + 1 for k in range(len(tensors))]
        self.table = SnapshotTable(self.entries(), device=self.device)
        choice = {"snapshot_interval": 2, "probation": 1, "min_history": 2, **settings_}
        self.config = GovernorConfig(**choice).to_tensor(None, self.device)  # type: ignore[arg-type]
        self.state = governor_state(1, device=self.device)
        self.mailbox = governor_mailbox(1, pin_memory=self.device.type == "cuda")

    def entries(self) -> list[SnapshotEntry]:
        return [
            SnapshotEntry(self.live[k], self.slots[k], k % 2, k, birth=self.births[k])
            for k in range(len(self.live))
        ]

    def order(self, order: Order) -> None:
        governor_order_(self.state, self.config, 0, order, mailbox=self.mailbox)

    def capture(self) -> None:
        for part in (0, 1):
            snapshot_capture_(self.state, 0, self.table, part, self.mailbox)

    def step(self, loss: float = 1.0) -> None:
        """As a governor's: judge, restore if ordered, capture if due."""
        given_ = torch.tensor([loss], dtype=torch.float64, device=self.device)
        governor_step_(self.state, self.config, given_, mailbox=self.mailbox)
        snapshot_restore_(self.state, 0, self.config, self.table, self.mailbox)
        self.capture()

    def field(self, field: StateField) -> float:
        return float(self.state[field])

    def known(self) -> Tensor:
        assert self.table.magnitudes is not None
        return self.table.magnitudes.cpu()

    def bits(self) -> list[Tensor]:
        """All that a backend may have written."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        tensors = [
            self.state,
            self.mailbox,
            self.known(),
            *self.live,
            *(t for pair in self.slots for t in pair),
        ]
        return [
            t.detach().cpu().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)
            for t in tensors
        ]


def largest(tensor: Tensor) -> float:
    """In plain Python; infinity where one is not finite."""
    parts = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    values = [abs(v) for v in parts.to(torch.float64).flatten().tolist()]
    return max(values, default=0.0) if all(map(math.isfinite, values)) else math.inf


@pytest.mark.parametrize("dtype", [*FLOATS, *COMPLEX], ids=[*NAMES, "c64", "c128"])
def test_the_largest_value_is_found_at_any_place_inside_and_nowhere_else(
    device: torch.device, backend: str, dtype: torch.dtype
) -> None:
    """Every word of a line of 64 bytes, of the last line before the end, and of the rest behind it."""
    line = 64 // dtype.itemsize
    for size in (1, line - 1, 2 * line + 3) if device.type == "cpu" else (line + 1,):
        whole = torch.full((size + 16,), 7.0).to(dtype).to(device)
        inside = whole[8 : 8 + size]
        inside.copy_(torch.full((size,), 0.25).to(dtype))
        judged = Judged([inside])
        for place in range(size):
            inside[place] = torch.tensor(-2.0 if place % 2 else 1.5).to(dtype)
            judged.order(Order.CAPTURE)
            judged.capture()
            slot = int(judged.field(StateField.candidate))
            assert float(judged.known()[0, F.slot_0 + slot]) == (2.0 if place % 2 else 1.5), (size, place)
            inside[place] = torch.tensor(0.25).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=NAMES)
def test_extreme_values_are_exact_and_what_is_not_finite_is_infinite(
    device: torch.device, backend: str, dtype: torch.dtype
) -> None:
    info = torch.finfo(dtype)
    odd = [info.max, info.min, info.smallest_normal, info.smallest_normal / 2, -0.0, math.nan]
    odd += [math.inf, -math.inf] if dtype is not torch.float8_e4m3fn else []
    for value in odd:
        tensor = torch.tensor([0.0, value, 0.0], dtype=torch.float64).to(dtype).to(device)
        judged = Judged([tensor])
        judged.order(Order.CAPTURE)
        judged.capture()
        slot = int(judged.field(StateField.candidate))
        assert float(judged.known()[0, F.slot_0 + slot]) == largest(tensor.cpu())
        assert judged.field(StateField.candidate_bad) == (-1.0 if math.isfinite(value) else 0.0)
        assert float(judged.known()[0, F.now]) == 0.0


TENSORS = st.lists(
    st.tuples(
        st.sampled_from([*FLOATS[:4], *COMPLEX]),
        st.sampled_from([(), (1,), (3, 5), (2, 3, 4, 5), (40_001,), (0, 3)]),
        st.sampled_from(LAYOUTS),
    ),
    min_size=1,
    max_size=5,
)


def assert_alike(first: Judged, second: Judged) -> None:
    pairs = zip(first.bits(), second.bits(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@fused
@settings(max_examples=60)
@given(TENSORS, st.integers(0, 2**16))
def test_any_tensors_weigh_the_same_on_both_backends(tensors: list, seed: int) -> None:
    source, runs = torch.Generator().manual_seed(seed), []
    made = [
        laid_out((torch.randn(shape, generator=source, dtype=torch.float32) * 3).to(dtype), layout)
        for dtype, shape, layout in tensors
    ]
    for mode in ("fused", "reference"):
        with tolaria.backend(mode):
            judged = Judged([t.clone() if t.is_contiguous() else t for t in made])
            judged.order(Order.CAPTURE)
            judged.capture()
            runs.append(judged)
    assert_alike(*runs)
    slot = int(runs[0].field(StateField.candidate))
    for k, tensor in enumerate(made):
        if tensor.numel():
            assert float(runs[0].known()[k, F.slot_0 + slot]) == largest(tensor)


ACTS = st.lists(
    st.tuples(
        st.sampled_from(["step", "step", "step", "snapshot", "promote", "rollback", "nan", "born"]),
        st.integers(0, 3),
        st.sampled_from([1.0, 1.0, 1.05, 0.95, 3.0, 0.4, 1e-3, 900.0, 1.2e3, 1e6, 1e-6, 0.0]),
    ),
    min_size=5,
    max_size=70,
)


def play(acts: list[tuple[str, int, float]], how: str, dtype: torch.dtype, device: str = "cpu") -> Judged:
    """A run in which one tensor at a time changes its size."""
    judged = Judged(
        [torch.full((5,), 0.5, dtype=dtype, device=device) for _ in range(4)], suspicious_state=how
    )
    judged.order(Order.CAPTURE)
    judged.capture()
    judged.order(Order.PROMOTE)
    for act, which, factor in acts:
        judged.live[which].mul_(factor).clamp_(-6e4, 6e4) if factor else judged.live[which].fill_(0.5)
        if act == "snapshot":
            judged.order(Order.CAPTURE)
            judged.capture()
        elif act == "promote":
            judged.order(Order.PROMOTE)
        elif act == "rollback":
            judged.order(Order.ROLLBACK)
            snapshot_restore_(judged.state, 0, judged.config, judged.table, judged.mailbox)
        elif act == "born":
            judged.births[which] += 4
            judged.table.update(judged.entries())
        else:
            judged.step(math.nan if act == "nan" else 1.0)
    return judged


@fused
@settings(max_examples=150)
@given(ACTS, st.sampled_from(["off", "tell", "rollback"]), st.sampled_from(FLOATS[:4]))
def test_any_run_is_judged_the_same_on_both_backends(acts: list, how: str, dtype: torch.dtype) -> None:
    runs = []
    for mode in ("fused", "reference"):
        with tolaria.backend(mode):
            runs.append(play(acts, how, dtype))
    assert_alike(*runs)


@pytest.mark.cuda
@settings(max_examples=40)
@given(ACTS, st.sampled_from(["tell", "rollback"]), st.sampled_from(FLOATS[:4]))
def test_any_run_is_judged_the_same_on_the_device(acts: list, how: str, dtype: torch.dtype) -> None:
    assert_alike(play(acts, how, dtype), play(acts, how, dtype, "cuda"))


@pytest.mark.cuda
def test_a_tensor_in_many_rows_is_one_tensor_on_the_device() -> None:
    """A row on CUDA is 64 KiB; tensors that fall into pieces have several anywhere."""
    source = torch.Generator().manual_seed(0)
    long = torch.randn(300_000, generator=source)
    pieces = torch.randn(64, 64, generator=source)[:, ::2]
    found = []
    for device in ("cpu", "cuda"):
        judged = Judged([long.to(device, copy=True), pieces.to(device), long.half().to(device)])
        for factor in (1.0, 2.0, 0.5, 1e4):
            judged.live[0].mul_(factor)
            judged.order(Order.CAPTURE)
            judged.capture()
            judged.order(Order.PROMOTE)
        found.append(judged)
    assert_alike(*found)


def test_a_tensor_is_suspicious_after_three_promoted_captures(device: torch.device, backend: str) -> None:
    """At exactly 1,000 times its largest it is not; captures that were not promoted do not count."""
    for promoted in range(5):
        for factor, is_suspect in ((1000.0, False), (1001.0, True)):
            judged = Judged([torch.full((3,), 0.5, device=device), torch.ones(2, device=device)])
            for k in range(promoted):
                judged.live[0].fill_(0.5 if k == 1 else 0.25)
                judged.order(Order.CAPTURE)
                judged.capture()
                judged.order(Order.PROMOTE)
            judged.live[0].fill_(100.0)  # a candidate that nobody promotes
            judged.order(Order.CAPTURE)
            judged.capture()
            judged.live[0].fill_((0.5 if promoted > 1 else 0.25) * factor)
            judged.order(Order.CAPTURE)
            judged.capture()
            expected = 0.0 if is_suspect and promoted >= 3 else -1.0
            assert judged.field(StateField.suspect) == expected, (promoted, factor)


def test_what_is_tiny_may_grow_to_one(device: torch.device, backend: str) -> None:
    for reached, is_suspect in ((1.0, False), (1.01, True)):
        judged = Judged([torch.zeros(3, device=device)])
        for _ in range(4):
            judged.order(Order.CAPTURE)
            judged.capture()
            judged.order(Order.PROMOTE)
        judged.live[0].fill_(reached)
        judged.order(Order.CAPTURE)
        judged.capture()
        assert judged.field(StateField.suspect) == (0.0 if is_suspect else -1.0)


def test_an_index_beyond_the_table_of_magnitudes_is_not_weighed(device: torch.device) -> None:
    judged = Judged([torch.ones(3, device=device), torch.ones(3, device=device)])
    table = judged.table
    before = table.magnitudes
    assert before is not None
    judged.order(Order.CAPTURE)
    for tensor in (-1, len(before), 2**40):
        judged.order(Order.CAPTURE)
        table.data[2, 5] = tensor
        judged.capture()
        assert not bool(judged.known()[0].any())
        assert float(judged.known()[1, F.birth]) == 2.0
