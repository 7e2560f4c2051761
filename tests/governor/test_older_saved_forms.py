"""A state_dict of version 2 to 4 is read with the same care as a new one; up to 3 it holds a tensor."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from saved_forms import WINDOW, assert_refused, changed, make, places, through_a_file
from torch import Tensor, nn

from tolaria.governor.plain_values import revived
from tolaria.governor.saved_form import _POLICY_SINCE_5, _SINCE_5
from tolaria.governor.saved_state import _VERSION_2, _VERSION_4
from tolaria.ops import MemoryField, StateField, memory_row

NAN = math.nan


def of_version_4(saved: dict[str, Any]) -> dict[str, Any]:
    """What version 4 would have saved, which knew nothing of what a network has learnt."""
    old: dict[str, Any] = {**copy.deepcopy(saved), "version": 4}
    for part, later in (("config", _SINCE_5), ("policy", _POLICY_SINCE_5)):
        for name in later:
            del old[part][name]
    del old["magnitudes"]
    old["state"] = [saved["state"][row] for row in rows_of(*_VERSION_4)]
    return old


def rows_of(names: tuple[str, ...], memory: tuple[str, ...]) -> list[int]:
    """Where a column has what an older layout knows."""
    rows = [int(StateField[name]) for name in names]
    for which in range(3):
        rows += [memory_row(which, WINDOW, MemoryField[name]) for name in memory]
        rows += [memory_row(which, WINDOW, len(MemoryField) + i) for i in range(2 * WINDOW)]
    return rows


def of_version_3(saved: dict[str, Any]) -> dict[str, Any]:
    """What version 3 would have saved: tuples, numbers that JSON does not know, a tensor."""
    old: dict[str, Any] = {**revived(of_version_4(saved)), "version": 3}
    old["config"]["lobotomy_band"] = tuple(old["config"]["lobotomy_band"])
    for report in [*old["policy"]["reports"], *old["policy"]["progress"]["reports"]]:
        report["thresholds"] = tuple(report["thresholds"])
    old["state"] = torch.tensor(old["state"], dtype=torch.float64).unsqueeze(1)
    return old


class Odd(Tensor):
    """Answers what it likes."""


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "state-none": (changed("state", None), "state: expected a plain tensor, got NoneType"),
    "state-list": (
        changed("state", lambda t: t.flatten().tolist()),
        "state: expected a plain tensor, got list",
    ),
    "state-float32": (changed("state", lambda t: t.float()), "state: expected float64 .* got torch.float32"),
    "state-int64": (changed("state", lambda t: t.long()), "state: expected float64"),
    "state-complex": (changed("state", lambda t: t.to(torch.complex128)), "state: expected float64"),
    "state-short": (changed("state", lambda t: t[:-1]), r"state: expected .* of shape \(\d+, 1\)"),
    "state-flat": (changed("state", lambda t: t[:, 0]), "state: expected .* of shape"),
    "state-two": (changed("state", lambda t: t.repeat(1, 2)), "state: expected .* of shape"),
    "state-empty": (changed("state", lambda t: t[:0]), "state: expected .* of shape"),
    "state-huge": (
        changed("state", lambda t: t[:1].expand(1 << 50, 1)),
        r"state: expected .*\(1125899906842624, 1\)",
    ),
    "state-meta": (changed("state", lambda t: t.to("meta")), "state: expected .* on meta"),
    "state-sparse": (changed("state", lambda t: t.to_sparse()), "state: expected .*sparse_coo"),
    "state-subclass": (changed("state", lambda t: t.as_subclass(Odd)), "state: expected a plain tensor"),
    "state-overlaps": (changed("state", lambda t: t[:1].expand(len(t), 1)), r"state\..*: expected "),
    "config-word": (
        changed("config.warmup_bound", "inf"),
        "warmup_bound: expected a number above 0, or None",
    ),
    "report-word": (
        changed("policy.reports.0.mean", "nan"),
        r"policy.reports\[0\].mean: expected a number, got 'nan'",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_is_damaged_is_named(kind: str) -> None:
    governor = make()
    damage, said = DAMAGED[kind]
    saved = copy.deepcopy(of_version_3(governor.state_dict()))
    damage(saved)
    assert_refused(governor, saved, said)
    governor.step(1.0)


IMPOSSIBLE = {
    "attached": 0.0,
    "history_size": 21.0,
    "slot_1.gradient_size": 21.0,
    "candidate": 2.0,
    "step": NAN,
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_no_run_reaches_is_refused(name: str) -> None:
    governor = make()
    saved = of_version_3(governor.state_dict())
    saved["state"][rows_of(*_VERSION_4).index(dict(places())[name])] = IMPOSSIBLE[name]
    assert_refused(governor, saved, rf"state\.{name}: expected ")


@pytest.mark.parametrize("older", [of_version_3, of_version_4])
def test_a_state_of_an_older_version_is_that_of_this_one(
    older: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    governor, old, new = make(), make(), make()
    saved = governor.state_dict()
    old.load_state_dict(through_a_file(older(saved)))
    new.load_state_dict(saved)
    found, wanted = old.state_dict(), new.state_dict()
    known = rows_of(*_VERSION_4)
    assert [found["state"][row] for row in known] == [wanted["state"][row] for row in known]
    assert found["policy"] == wanted["policy"]


@pytest.mark.parametrize(
    "made",
    [
        lambda t: t.clone().requires_grad_(),
        lambda t: nn.Parameter(t),
        lambda t: torch.cat([t, t], dim=1)[:, 1:],
        lambda t: t.repeat(2, 1)[: len(t)],
        lambda t: torch._neg_view(-t),
    ],
    ids=["requires-grad", "parameter", "strided", "larger-storage", "negated-view"],
)
def test_a_state_is_read_wherever_it_lies(made: Callable[[Tensor], Tensor]) -> None:
    governor, other = make(), make()
    saved = of_version_3(governor.state_dict())
    plain = saved["state"].clone()
    other.load_state_dict({**saved, "state": made(saved["state"])})
    assert not other._attached.row.state.requires_grad
    for field in (StateField.step, StateField.life_mean, StateField.rollback_count):
        assert other._attached.row.state[field] == plain[field]
    assert other.history == governor.history
    assert torch.equal(saved["state"].view(torch.int64), plain.view(torch.int64))
    other.step(NAN)
    assert torch.equal(saved["state"].view(torch.int64), plain.view(torch.int64))  # nothing is shared


@pytest.mark.cuda
def test_a_state_on_another_device_is_read() -> None:
    governor, other = make(), make()
    saved = of_version_3(governor.state_dict())
    other.load_state_dict({**saved, "state": saved["state"].cuda()})
    assert other.history == governor.history


def test_a_state_of_version_2_is_converted() -> None:
    governor, other = make(), make()
    saved = of_version_3(governor.state_dict())
    known = rows_of(*_VERSION_4)
    saved["state"] = saved["state"][[known.index(row) for row in rows_of(*_VERSION_2)]]
    saved["version"] = 2
    del saved["config"]["max_restores_of_one_capture"], saved["config"]["skips_before_rollback"]
    saved["config"]["skip_anomalous_steps"] = True  # with which version 2 rolled back at a NaN
    saved["policy"] = {name: saved["policy"][name] for name in ("reports", "offending_steps")}
    other.load_state_dict(saved, keep_config=False)
    assert other.config == governor.config.replace(
        skip_anomalous_steps=True,
        skips_before_rollback=0,
        lobotomy_rule="classic",
        suspicious_state="off",
    )
    assert (other.step_count, other.rollback_count) == (governor.step_count, governor.rollback_count)
    assert other.history == governor.history
    assert other.offending_steps == governor.offending_steps
    assert other.lifetime == governor.lifetime
