"""Governors side by side are judged as each alone: clean lanes beside all others, anywhere in memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from judged_runs import (
    SETTINGS,
    carry_out_captures,
    flags_like_a_run,
    losses_like_a_run,
    norms_like_a_run,
    same_bits,
)
from torch import Tensor

import tolaria
from tolaria import _extension, ops
from tolaria.governor import GovernorConfig
from tolaria.ops import RecordField, StateField, StatusField


@st.composite
def banks(draw: st.DrawFn) -> dict[str, Any]:
    """How many governors, where they lie, how they are set, how often one is not like its neighbours."""
    return {
        "n": draw(st.sampled_from([1, 3, 4, 5, 8, 15, 16, 17, 21, 36])),
        "offset": draw(st.integers(0, 3)),
        "name": draw(st.sampled_from(sorted(SETTINGS))),
        "attached": draw(st.sampled_from(["none", "all", "some"])),
        "gradient": draw(st.sampled_from(["none", "norms", "stats"])),
        "may_overflow": draw(st.booleans()),
        "unlike": draw(st.sampled_from([0.0, 0.02, 0.3])),
        "idle": draw(st.sampled_from([0.0, 0.1])),
        "filled": draw(st.integers(0, 45)),
        "together": draw(st.booleans()),
        "records": draw(st.sampled_from([0, 1, 4])),
        "seed": draw(st.integers(0, 1 << 20)),
    }


def steps_of(bank: dict[str, Any], count: int) -> list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
    """Losses, flags, active rows and gradients of so many steps."""
    n, seed = bank["n"], bank["seed"]
    source = torch.Generator().manual_seed(seed)
    quiet = 1.0 + 0.1 * torch.rand(count, n, generator=source, dtype=torch.float64)
    unlike = torch.rand(count, n, generator=source) < bank["unlike"]
    losses = torch.where(unlike, losses_like_a_run(n, count, seed), quiet)
    stats = torch.where(
        unlike.unsqueeze(2), norms_like_a_run(n, count, seed), torch.tensor([1.0, 1.0, 0.0, -1.0])
    )
    flags = torch.rand(count, n, generator=source) < 0.1 * bank["unlike"]
    active = torch.rand(count, n, generator=source) >= bank["idle"]
    gradients = {"none": None, "norms": stats[..., 1].contiguous(), "stats": stats.contiguous()}[
        bank["gradient"]
    ]
    return [
        (
            losses[k],
            flags[k],
            active[k] if bank["idle"] else None,
            None if gradients is None else gradients[k],
        )
        for k in range(count)
    ]


@pytest.mark.skipif(not _extension.LOADED, reason="needs the compiled extension")
@given(banks())
@settings(max_examples=60, deadline=None)
def test_lanes_equal_the_reference_bit_for_bit(bank: dict[str, Any]) -> None:
    n, offset = bank["n"], bank["offset"]
    config = GovernorConfig(snapshot_interval=5, **SETTINGS[bank["name"]])
    tensor = config.to_tensor(math.log(10), "cpu", gradient_may_overflow=bank["may_overflow"])
    fresh = ops.governor_state(n, window=config.window, attached=bank["attached"] == "all")
    if bank["attached"] == "some":
        fresh[StateField.attached] = torch.arange(n) % 3 % 2
    state = torch.zeros(len(fresh), n + 5, dtype=torch.float64)[:, offset : n + offset].copy_(fresh)
    width = len(StatusField) + len(RecordField) * bank["records"]
    box = ops.governor_mailbox(n, records=4)[:, :width].contiguous()
    source = torch.Generator().manual_seed(bank["seed"])
    with tolaria.backend("fused"):  # windows filled as far as each other's, or each as far as it came
        for loss, flag, _, gradient in steps_of(bank, bank["filled"]):
            rows = torch.rand(n, generator=source) < (2.0 if bank["together"] else 0.5)
            ops.governor_step_(state, tensor, loss, flag, rows, box, gradient)
    twin, twin_box = state.clone(), box.clone()
    for (loss, flag, active, gradient), state_bad in zip(
        steps_of(bank, 8), flags_like_a_run(n, 8, bank["seed"]), strict=True
    ):
        poisoned = torch.rand(n, generator=source) < bank["unlike"]
        for mode, mine, letters in (("fused", state, box), ("reference", twin, twin_box)):
            with tolaria.backend(mode):  # type: ignore[arg-type]
                ops.governor_step_(mine, tensor, loss, flag, active, letters, gradient, state_bad)
            if bank["seed"] % 2:
                carry_out_captures(mine, poisoned)
        assert same_bits(state, twin)
        assert same_bits(box, twin_box)
