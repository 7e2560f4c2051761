"""Verdicts and statistics: compiled against reference bit for bit, both against an independent rule."""

from __future__ import annotations

import math

import numpy as np
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
from plain_rule import PlainRule

import tolaria
from tolaria import ops
from tolaria.governor import GovernorConfig
from tolaria.ops import Order, PanicReason, StateField, StatusField
from tolaria.reference.governor_arithmetic import correctly_rounded_sqrt


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("n", [1, 3, 8, 17, 1000])
def test_compiled_equals_reference_bit_for_bit(n: int, name: str) -> None:
    config = GovernorConfig(snapshot_interval=7, **SETTINGS[name])
    settings_ = config.to_tensor(math.log(10), "cpu", gradient_may_overflow=n == 17)
    source = torch.Generator().manual_seed(n)
    states = [ops.governor_state(n, window=config.window) for _ in range(2)]
    for state in states:
        state[StateField.attached] = torch.arange(n) % 2
    boxes = [ops.governor_mailbox(n, records=4) for _ in range(2)]
    runs = zip(
        losses_like_a_run(n, 60, seed=n),
        norms_like_a_run(n, 60, seed=n),
        flags_like_a_run(n, 60, seed=n),
        strict=True,
    )
    for loss, rows, state_bad in runs:
        gradient = {1: None, 3: rows[:, 1].float(), 8: rows[:, 1].bfloat16()}.get(n, rows)
        active = torch.rand(n, generator=source) < 0.9
        flag = (torch.rand(n, generator=source) < 0.02).float()
        poisoned = torch.rand(n, generator=source) < 0.3
        bad = None if n == 3 else state_bad
        for mode, state, box in zip(("fused", "reference"), states, boxes, strict=True):
            with tolaria.backend(mode):  # type: ignore[arg-type]
                ops.governor_step_(state, settings_, loss, flag, active, box, gradient, bad)
            carry_out_captures(state, poisoned)
        assert same_bits(*states)
        assert same_bits(*boxes)


@pytest.mark.parametrize("mode", ["fused", "reference"])
def test_rows_may_stand_apart_and_do_where_they_would_share_a_cache_set(mode: str) -> None:
    n, config = 1024, GovernorConfig(snapshot_interval=7).to_tensor(math.log(10), "cpu")
    apart = ops.governor_state(n)
    assert apart.stride(0) // 8 % 2 == 1, "rows an even number of cache lines apart: 462 us instead of 70"
    wide = torch.full((len(apart), 2 * n), torch.nan, dtype=torch.float64)
    inside = wide[:, 5 : n + 5].copy_(apart)
    packed = apart.contiguous()
    with tolaria.backend(mode):  # type: ignore[arg-type]
        for loss in losses_like_a_run(n, 20, seed=5):
            for state in (apart, packed, inside):
                ops.governor_step_(state, config, loss)
        for state in (apart, packed, inside):
            ops.governor_order_(state, config, 7, Order.ROLLBACK)
    assert same_bits(apart, packed)
    assert same_bits(inside, packed)
    assert bool(wide[:, :5].isnan().all())
    assert bool(wide[:, n + 5 :].isnan().all())


def test_columns_must_lie_side_by_side() -> None:
    config, packed = GovernorConfig().to_tensor(None, "cpu"), ops.governor_state(4)
    for state in (packed.T.contiguous().T, packed[:, :1].expand(-1, 4), packed[:, ::2]):
        with tolaria.backend("fused"), pytest.raises(ValueError, match="whose rows are contiguous"):
            ops.governor_step_(state, config, torch.ones(state.shape[1]))


def test_overflowing_statistics_are_one_nan() -> None:
    config = GovernorConfig(window=2, min_history=2, drift_horizon=7).to_tensor(None, "cpu")
    states = [ops.governor_state(2) for _ in range(2)]
    for mode, state in zip(("fused", "reference"), states, strict=True):
        with tolaria.backend(mode):  # type: ignore[arg-type]
            for loss in ([1.0, 0.5], [-1.7e308, 1.7e308], [1.0, 1.7e308], [-1.7e308, -1.7e308], [2.0, 1.0]):
                ops.governor_step_(state, config, torch.tensor(loss, dtype=torch.float64))
    assert bool(states[0].isnan().any())
    assert same_bits(*states)


@pytest.mark.parametrize("order", list(Order))
def test_orders_equal_the_reference(order: Order) -> None:
    config = GovernorConfig(snapshot_interval=7).to_tensor(None, "cpu")
    states = [ops.governor_state(3) for _ in range(2)]
    boxes = [ops.governor_mailbox(3, records=8) for _ in range(2)]
    for mode, state, box in zip(("fused", "reference"), states, boxes, strict=True):
        with tolaria.backend(mode):  # type: ignore[arg-type]
            for loss in losses_like_a_run(3, 20, seed=3):
                ops.governor_step_(state, config, loss, None, None, box)
                carry_out_captures(state, torch.zeros(3, dtype=torch.bool))
            ops.governor_order_(state, config, 1, Order.CAPTURE, mailbox=box)
            ops.governor_order_(state, config, 1, order, PanicReason.MANUAL, 4, box)
    assert same_bits(*states)
    assert same_bits(*boxes)


@pytest.mark.parametrize("mode", ["fused", "reference"])
@pytest.mark.parametrize("name", [n for n in SETTINGS if n != "log-only"])
def test_verdicts_follow_the_rule_of_the_contract(name: str, mode: str) -> None:
    n, steps = 400, 80 if mode == "fused" else 40
    kw = SETTINGS[name]
    config = GovernorConfig(**kw)
    plain = {
        "rule": config.rule,
        "min_std": config.min_std,
        "patience": config.lobotomy_patience,
        "cooldown": config.cooldown,
        "min_panics": config.min_panics_before_rollback,
        "warmup_bound": config.warmup_bound,
        "band": config.lobotomy_band,
        "window": config.window,
        "drift_horizon": config.drift_horizon,
        "drift_threshold": config.drift_threshold,
        "gradient_multiple": config.gradient_multiplier,
        "skips_allowed": config.skips_before_rollback,
        "sigmas": config.sensitivity,
        "classic": config.lobotomy_rule == "classic",
        "collapse_patience": config.collapse_patience,
        "absolute": config.absolute_threshold,
        "shift_horizon": config.shift_horizon,
        "shift_slack": config.shift_slack,
        "shift_threshold": config.shift_threshold,
        "shift_spike": config.shift_spike,
    }
    rules = [PlainRule(guess=math.log(10), **plain) for _ in range(n)]
    state = ops.governor_state(n, window=config.window, attached=False)
    tensor = config.to_tensor(math.log(10), "cpu")
    with tolaria.backend(mode):  # type: ignore[arg-type]
        runs = zip(
            losses_like_a_run(n, steps, 7),
            norms_like_a_run(n, steps, 7),
            flags_like_a_run(n, steps, 7),
            strict=True,
        )
        for loss, rows, state_bad in runs:
            gradient = rows if name in ("drift", "shift", "balanced") else None
            norms = torch.where(rows[:, 2] > 0, math.nan, rows[:, 0].sqrt()).tolist()
            ops.governor_step_(state, tensor, loss, gradient=gradient, state_bad=state_bad.double())
            verdicts = [
                rule.judge(x, norm=None if gradient is None else norm, state_bad=bad)
                for rule, x, norm, bad in zip(rules, loss.tolist(), norms, state_bad.tolist(), strict=True)
            ]
            for rule, (_, rollback) in zip(rules, verdicts, strict=True):
                if rollback:
                    rule.rolled_back()
            assert [PanicReason(int(r)).name for r in state[StateField.reason]] == [v[0] for v in verdicts]
            assert state[StateField.rollback].bool().tolist() == [v[1] for v in verdicts]
            life = np.array([[r.count, r.mean, r.m2] for r in rules]).T
            mine = state[StateField.life_count : StateField.life_m2 + 1].numpy()
            assert np.array_equal(mine, life, equal_nan=True)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.sampled_from(["fused", "reference"]))
@settings(max_examples=60, deadline=None)
def test_window_statistics_are_those_of_two_passes(values: list[float], mode: str) -> None:
    state, config = ops.governor_state(1), GovernorConfig(warmup_bound=math.inf).to_tensor(None, "cpu")
    kept: list[float] = []
    with tolaria.backend(mode):  # type: ignore[arg-type]
        for value in values:
            ops.governor_step_(state, config, torch.tensor([value], dtype=torch.float64))
            if kept:
                spread = np.std(kept[-20:])
                assert math.isclose(
                    float(state[StateField.mean, 0]), np.mean(kept[-20:]), rel_tol=1e-12, abs_tol=1e-300
                )
                assert math.isclose(
                    float(state[StateField.std, 0]), spread, rel_tol=1e-6, abs_tol=1e-9 * max(kept)
                )
            if int(state[StateField.reason, 0]) == PanicReason.HEALTHY:
                kept.append(value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_loss_of_any_floating_dtype(dtype: torch.dtype) -> None:
    for mode in ("fused", "reference"):
        state, config = ops.governor_state(2), GovernorConfig().to_tensor(None, "cpu")
        with tolaria.backend(mode):  # type: ignore[arg-type]
            ops.governor_step_(state, config, torch.tensor([0.1, 0.7], dtype=dtype))
        assert state[StateField.loss].tolist() == torch.tensor([0.1, 0.7], dtype=dtype).double().tolist()


def test_nan_flag_counts_as_raised_in_both() -> None:
    for mode in ("fused", "reference"):
        state, config = ops.governor_state(2), GovernorConfig().to_tensor(None, "cpu")
        with tolaria.backend(mode):  # type: ignore[arg-type]
            ops.governor_step_(state, config, torch.ones(2), torch.tensor([math.nan, 0.0]))
        assert state[StateField.reason].tolist() == [1.0, 0.0]


def test_square_root_is_correctly_rounded() -> None:
    source = torch.Generator().manual_seed(0)
    for scale in (1.0, 1e-310, 1e300, 3.7e17, 1e-20):
        x = torch.rand(20_000, generator=source, dtype=torch.float64) * scale
        assert correctly_rounded_sqrt(x).tolist() == [math.sqrt(v) for v in x.tolist()]
    edge = torch.tensor([0.0, -0.0, math.inf, 5e-324, 1.7e308, 1.0, 4.0], dtype=torch.float64)
    assert correctly_rounded_sqrt(edge).tolist() == [math.sqrt(v) for v in edge.tolist()]


def test_field_names_are_the_compiled_ones() -> None:
    groups = (
        ("state", StateField),
        ("memory", ops.MemoryField),
        ("config", ops.ConfigField),
        ("status", StatusField),
        ("record", ops.RecordField),
    )
    assert torch.ops.tolaria.governor_fields() == [
        f"{group}.{f.name}" for group, fields in groups for f in fields
    ]


@pytest.mark.parametrize("mode", ["fused", "reference"])
def test_bad_arguments_are_named(mode: str) -> None:
    state, config = ops.governor_state(2), GovernorConfig().to_tensor(None, "cpu")
    untouched = state.clone()
    with tolaria.backend(mode):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"loss: expected one value for each of the 2 governors"):
            ops.governor_step_(state, config, torch.ones(3))
        with pytest.raises(TypeError, match=r"loss: expected float64"):
            ops.governor_step_(state, config, torch.ones(2, dtype=torch.int64))
        with pytest.raises(TypeError, match=r"nonfinite: expected bool"):
            ops.governor_step_(state, config, torch.ones(2), torch.ones(2, dtype=torch.int32))
        with pytest.raises(ValueError, match=r"active: expected one value"):
            ops.governor_step_(state, config, torch.ones(2), None, torch.ones(1, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"state_bad: expected one value"):
            ops.governor_step_(state, config, torch.ones(2), state_bad=torch.ones(3, dtype=torch.bool))
        with pytest.raises(TypeError, match=r"state_bad: expected bool"):
            ops.governor_step_(state, config, torch.ones(2), state_bad=torch.ones(2, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"gradient: expected one value for each of the 2 governors"):
            ops.governor_step_(state, config, torch.ones(2), gradient=torch.ones(3))
        with pytest.raises(TypeError, match=r"gradient: expected float64"):
            ops.governor_step_(state, config, torch.ones(2), gradient=torch.ones(2, dtype=torch.bool))
        with pytest.raises(ValueError, match=f"config: expected {len(ops.ConfigField)} float64"):
            ops.governor_step_(state, config[:-1], torch.ones(2))
    assert same_bits(state, untouched)
